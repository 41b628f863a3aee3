"""What a sampling step costs beside its network: host time, and launches.

The network returns its input and the images are small, so that a step takes what Python and the
launches take: `ocm.sample` by covariance, beside the bare op, whose coefficients were made before,
and the steps of diffusers' scheduler and of ours. All do the same number of steps, timed round by
round. The bare op is the step of beta, and its samples are those of `ocm.sample`, bit for bit.

Launches are the operators that PyTorch dispatches but for views and memory that nobody has written:
those of a GPU, and on a CPU also those of numbers in tensors. An op counts once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from diffusers import DDPMScheduler
from harness.timing import Setting, time_together
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import ocm
from hessdiag.kernels import StepCoefficients, gaussian_step, seed_tensor
from ocm.covariances.names import LEARNED
from ocm.diffusion.tables import Table
from ocm.diffusion.timesteps import even_timesteps, reverse_steps
from ocm.evaluation.environment import Row, environment
from ocm.evaluation.markdown import markdown_table
from ocm.sampling.samplers import starting_noise

COLUMNS = {
    "step": "",
    "microseconds": ".0f",
    "over_diffusers": ".2f",
    "over_op": ".2f",
    "launches": ".1f",
}
SHAPE = (2, 3, 8, 8)
_DIFFUSERS, _OP = "DDPMScheduler.step", "gaussian_step alone"


class Unchanged(nn.Module):
    """A backbone whose output and features are its input."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Identity()
        self.weight = nn.Parameter(torch.zeros(()))

    def forward(self, x_t: Tensor) -> Tensor:
        """Return x_t."""
        features: Tensor = self.features(x_t)
        return features


def run(setting: Setting) -> tuple[Row, str]:
    """Return the record of the suite and its table."""
    steps, rounds = (10, 3) if setting.quick else (50, 61)
    loops = _loops(setting.device, steps)
    with torch.no_grad():
        if not torch.equal(loops["ocm.sample, beta"](), loops[_OP]()):
            raise AssertionError("ocm.sample must draw what the op draws")
        for loop in loops.values():  # what is made once
            loop()
        launches = {name: count_launches(loop) / steps for name, loop in loops.items()}
        timings, over_diffusers = time_together(
            loops, device=setting.device, rounds=rounds, baseline=_DIFFUSERS
        )
    rows: list[Row] = [
        {
            "step": name,
            "microseconds": 1e6 * timing.median / steps,
            "over_diffusers": over_diffusers[name],
            "over_op": timing.minimum / timings[_OP].minimum,
            "launches": launches[name],
        }
        for name, timing in timings.items()
    ]
    record = {
        "suite": "overhead",
        "seeds": {"noise": 0},
        "shape": list(SHAPE),
        "steps": steps,
        "environment": environment(setting.device),
        "rows": rows,
    }
    return record, report(record)


def report(record: Row) -> str:
    """Return the table of a record."""
    return markdown_table(record["rows"], COLUMNS)


def _loops(device: torch.device, steps: int) -> dict[str, Callable[[], Tensor]]:
    """Return loops of as many steps, by name."""
    architecture = ocm.Architecture("Unchanged", "features", lambda module, x, *_: module(x))
    denoiser = ocm.Denoiser(
        Unchanged().to(device), ocm.linear(), architecture=architecture
    ).freeze()
    head = nn.Identity()
    beta, learned = ocm.Beta(denoiser), ocm.OptimalCovarianceMatching(denoiser, head)
    covariances: dict[str, Any] = {
        "beta": beta,
        "analytic": ocm.Analytic(denoiser, Table({1: [0.5], 1000: [1.0]})),
        **{f"{name} head": kind(denoiser, head) for name, kind in LEARNED.items()},
        "ocm head, calibrated": ocm.Calibrated(
            (learned,), Table({1: [0.5, 0.1], 1000: [1.0, 0.2]})
        ),
    }
    loops: dict[str, Callable[[], Tensor]] = {
        _DIFFUSERS: _of_scheduler(DDPMScheduler(), steps, device, states=False),
        _OP: _of_op(denoiser, steps),
    }
    for name, covariance in covariances.items():
        loops[f"ocm.sample, {name}"] = lambda covariance=covariance: ocm.sample(
            denoiser, covariance, SHAPE, steps
        )
    second = ocm.SecondOrder(0.5)
    loops["ocm.sample, beta, second order"] = lambda: ocm.sample(
        denoiser, beta, SHAPE, steps, sampler=second
    )
    ours = ocm.OCMScheduler(data_std=0.5), ocm.OCMDDIMScheduler(data_std=0.5)
    for scheduler in ours:
        name = f"{type(scheduler).__name__}.step"
        loops[name] = _of_scheduler(scheduler, steps, device, states=True)
    return loops


def _of_scheduler(
    scheduler: Any, steps: int, device: torch.device, *, states: bool
) -> Callable[[], Tensor]:
    """Return the loop of a scheduler, whose model states a variance or none."""
    scheduler.set_timesteps(steps, device=device)
    noise = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0)).to(device)
    stated = torch.cat([noise, noise.abs()], dim=1) if states else noise

    def loop() -> Tensor:
        x = noise
        for t in scheduler.timesteps:
            x = scheduler.step(stated, t, x).prev_sample
        return x

    return loop


def _of_op(denoiser: ocm.Denoiser, steps: int) -> Callable[[], Tensor]:
    """Return the loop of the op with beta, for which all else was made before."""
    schedule, device = denoiser.schedule, denoiser.device
    seed = seed_tensor(0, device)
    timesteps = even_timesteps(schedule, steps)
    prepared = []
    for s, t in reverse_steps(timesteps):
        (p, q, _), (a, b, noise) = denoiser.numbers(t), ocm.ddpm(schedule, s, t)
        if s == 0:  # the last step adds none
            coefficients = StepCoefficients(p, q, a, b, 0.0, 0.0)
        else:
            coefficients = StepCoefficients(p, q, a, b, noise, b**2)
        variance = torch.full((1, 1, 1, 1), schedule.level(t).beta_bar, device=device)
        prepared.append((int(t), variance, coefficients))
    noise_of_x_N = starting_noise(denoiser, SHAPE, timesteps[-1], seed, 0)

    def loop() -> Tensor:
        x = noise_of_x_N
        for t, variance, coefficients in prepared:
            x = gaussian_step(
                x, x, variance, coefficients, seed=seed, step=t,
                x0_range=(-1.0, 1.0), variance_range=(0.0, 1.0),
            )  # fmt: skip
        return x

    return loop


def count_launches(call: Callable[[], object]) -> int:
    """Count the operators of a call that compute something.

    Example:
        >>> count_launches(lambda: torch.ones(2).reshape(1, 2) + 1)
        2
    """
    mode = _Counted()
    with mode:
        call()
    return mode.count


class _Counted(TorchDispatchMode):
    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name()
        self.count += not (func.is_view or "empty" in name or name in _NOTHING)
        return func(*args, **(kwargs or {}))


# Of types, of numbers that become tensors, and of a number that is read.
_NOTHING = (
    *("aten::promote_types", "aten::lift_fresh", "aten::_local_scalar_dense"),
    "aten::_unsafe_view",
)
