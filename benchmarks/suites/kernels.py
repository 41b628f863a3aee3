"""The ops of ``hessdiag.kernels`` against PyTorch eager, torch.compile and diffusers' schedulers.

Every op is checked against float64 before anything is timed. Bandwidth counts the least bytes the
op must move (each input read once, each output written once), and is set against a copy measured
in the same run. The rivals of ``probe_moments`` and ``ocm_loss`` are given their probes, ready
made; ours makes them again.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from harness.timing import Setting, synchronize
from torch import Tensor

from hessdiag import kernels
from ocm.evaluation.environment import Row, environment, gpu_state
from ocm.evaluation.markdown import markdown_table

COLUMNS = {
    "op": "",
    "size": "",
    "provider": "",
    "milliseconds": ".4f",
    "gigabytes_per_second": ".1f",
    "over_copy": ".2f",
    "speedup_over_eager": ".2f",
    "launches": "d",
    "peak_mebibytes": ".0f",
}

IMAGE = (64, 3, 32, 32)
PROBES = 16
STEP = kernels.StepCoefficients(1.1, -0.5, 0.6, 0.4, 0.01, 0.2)
CLAMPS: dict[str, Any] = {"x0_range": (-1.0, 1.0), "variance_range": (0.0, 1.0)}


@dataclass(frozen=True)
class Case:
    """One op at one size.

    Attributes:
        op: Name of the op.
        size: How the table calls the size.
        num_bytes: Least bytes moved.
        providers: What is timed; the first is this project's, "eager" and "compile" its rivals.
        error: Relative error of this project's result against float64.
        tolerance: Largest error that is right.
    """

    op: str
    size: str
    num_bytes: int
    providers: dict[str, Callable[[], object]]
    error: float
    tolerance: float = 1e-5
    notes: dict[str, str] = field(default_factory=dict)


def run(setting: Setting) -> tuple[Row, str]:
    """Return the record of the suite and its tables."""
    torch.manual_seed(0)
    device, quick = setting.device, setting.quick
    budget = 0.2 if quick else 0.6
    copy_bandwidth = _copy_bandwidth(device, budget)
    rows: list[Row] = []
    notes: dict[str, str] = {}
    for make in _cases(device, quick):
        case = make()
        if not case.error <= case.tolerance:
            raise RuntimeError(
                f"{case.op} at {case.size} differs from float64 by {case.error:.1e}, at most "
                f"{case.tolerance:.0e} is right; nothing is timed"
            )
        rows += _time_case(case, device, budget, copy_bandwidth, notes)
        del case
    record = {
        "suite": "kernels",
        "copy_gigabytes_per_second": copy_bandwidth,
        "seeds": {"inputs": 0},
        "notes": notes,
        "environment": environment(device),
        "rows": rows,
    }
    return record, report(record)


def report(record: Row) -> str:
    """Return the tables of a record."""
    copy = f"Copy: {record['copy_gigabytes_per_second']:.1f} GB/s"
    notes = [f"{provider} left out: {note}" for provider, note in record["notes"].items()]
    return "\n\n".join([copy, markdown_table(record["rows"], COLUMNS), *notes])


def _cases(device: torch.device, quick: bool) -> list[Callable[[], Case]]:
    """Return what makes each case, so that only one holds memory at a time."""
    shapes = {"64 x 3 x 32 x 32": IMAGE}
    if device.type == "cuda":
        shapes["256 MiB"] = (16384, 4096)
        if not quick:
            shapes["1 GiB"] = (65536, 4096)
    elif not quick:
        shapes["8 MiB"] = (512, 4096)
    dtypes = [torch.float32, torch.bfloat16] if device.type == "cuda" else [torch.float32]
    cases: list[Callable[[], Case]] = []
    for size, shape in shapes.items():
        for dtype in dtypes:
            arguments = (size, shape, dtype, device)
            cases += [
                partial(make, *arguments)
                for make in (_rademacher_case, _moments_case, _step_case, _loss_case)
            ]
    return cases


def _rademacher_case(
    size: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> Case:
    shape = (PROBES, max(1, shape[0] // PROBES), *shape[1:])
    seed = torch.tensor(1, device=device)

    def ours() -> Tensor:
        return kernels.rademacher(shape, seed, dtype=dtype, device=device)

    def eager() -> Tensor:
        return torch.randint(0, 2, shape, device=device, dtype=dtype) * 2 - 1

    small = kernels.rademacher((20, *shape[1:3]), seed, dtype=dtype, device=device)
    expected = kernels.rademacher((20, *shape[1:3]), 1, dtype=torch.float64)
    error = float(not torch.equal(small.cpu().double(), expected))
    num_bytes = _numel(shape) * dtype.itemsize
    return _case("rademacher", size, dtype, num_bytes, ours, eager, error)


def _moments_case(
    size: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> Case:
    shape = (PROBES, max(1, shape[0] // PROBES), *shape[1:])
    seed = torch.tensor(1, device=device)
    products = torch.randn(shape, device=device).to(dtype)
    probes = kernels.rademacher(shape, seed, dtype=dtype, device=device)

    def ours() -> Tensor:
        return kernels.probe_moments(products, seed).mean

    def eager() -> tuple[Tensor, Tensor]:
        y = (probes * products).float()
        mean = y.mean(dim=0)
        return mean, (y - mean).square().sum(dim=0)

    y = (probes[:, :1].double() * products[:, :1].double()).cpu()
    error = _relative_error(ours()[:1], y.mean(dim=0))
    num_bytes = products.numel() * dtype.itemsize + 2 * products[0].numel() * 4
    return _case("probe_moments", size, dtype, num_bytes, ours, eager, error)


def _step_case(size: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Case:
    seed = torch.tensor(1, device=device)
    x_t, prediction = (torch.randn(shape, device=device).to(dtype) for _ in range(2))
    variance = torch.rand(shape, device=device).to(dtype)

    def ours() -> Tensor:
        return kernels.gaussian_step(x_t, prediction, variance, STEP, seed=seed, step=3, **CLAMPS)

    def eager() -> Tensor:
        p, q, a, b, c, k = STEP
        x0_hat = (p * x_t + q * prediction).clamp(-1.0, 1.0)
        noise_std = (c + k * variance.clamp(0.0, 1.0)).sqrt()
        return a * x_t + b * x0_hat + noise_std * torch.randn_like(x_t)

    first = slice(0, 2)
    inputs = (tensor[first].double().cpu() for tensor in (x_t, prediction, variance))
    expected = kernels.gaussian_step(*inputs, STEP, seed=1, step=3, **CLAMPS)
    error = _relative_error(ours()[first], expected)
    num_bytes = 4 * x_t.numel() * dtype.itemsize
    case = _case("gaussian_step", size, dtype, num_bytes, ours, eager, error)
    if shape == IMAGE and dtype == torch.float32:
        case.providers.update(_scheduler_steps(x_t, prediction))
    return case


def _scheduler_steps(x_t: Tensor, prediction: Tensor) -> dict[str, Callable[[], object]]:
    """Return the steps of diffusers' schedulers, with a fixed variance as they have it."""
    from diffusers import DDIMScheduler, DDPMScheduler

    ddpm, ddim = DDPMScheduler(), DDIMScheduler()
    for scheduler in (ddpm, ddim):
        scheduler.set_timesteps(10, device=x_t.device)
    t = ddpm.timesteps[5].item()
    return {
        "DDPMScheduler.step": lambda: ddpm.step(prediction, t, x_t).prev_sample,
        "DDIMScheduler.step": lambda: ddim.step(prediction, t, x_t, eta=1.0).prev_sample,
    }


def _loss_case(size: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Case:
    seed = torch.tensor(1, device=device)
    head = torch.randn(shape, device=device).to(dtype).requires_grad_()
    products = torch.randn((1, *shape), device=device).to(dtype)
    probes = kernels.rademacher((1, *shape), seed, dtype=dtype, device=device)

    def ours() -> Tensor:
        return torch.autograd.grad(kernels.ocm_loss(head, products, seed), head)[0]

    def loss(head: Tensor) -> Tensor:
        return (head - (probes * products).mean(dim=0)).float().square().mean()

    def eager(loss: Callable[[Tensor], Tensor] = loss) -> Tensor:
        return torch.autograd.grad(loss(head), head)[0]

    first = slice(0, 2)
    residual = head[first].detach().double() - (probes * products)[0, first].double()
    error = _relative_error(ours()[first], (2.0 / head.numel() * residual).cpu())
    num_bytes = 5 * head.numel() * dtype.itemsize  # forward reads two, backward two and writes one
    case = _case("ocm_loss, both ways", size, dtype, num_bytes, ours, eager, error)
    case.providers["compile"] = partial(eager, torch.compile(loss, dynamic=False))
    return case


def _case(
    op: str,
    size: str,
    dtype: torch.dtype,
    num_bytes: int,
    ours: Callable[[], object],
    eager: Callable[[], object],
    error: float,
) -> Case:
    providers = {
        "hessdiag": ours,
        "eager": eager,
        "compile": torch.compile(eager, dynamic=False),
    }
    name = f"{op}, {str(dtype).removeprefix('torch.')}"
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    return Case(name, size, num_bytes, providers, error, tolerance)


def _time_case(
    case: Case,
    device: torch.device,
    budget: float,
    copy_bandwidth: float,
    notes: dict[str, str],
) -> list[Row]:
    times: dict[str, float] = {}
    rows: list[Row] = []
    for provider, call in case.providers.items():
        if provider in notes:
            continue
        try:
            call()
        except Exception as error:
            # torch.compile needs a C++ compiler on a CPU; the table says that it is missing.
            if provider != "compile":
                raise
            notes[provider] = f"{type(error).__name__}: {str(error).splitlines()[0]}"
            continue
        times[provider] = _median_seconds(call, device, budget)
        bandwidth = case.num_bytes / times[provider] / 1e9
        rows.append(
            {
                "op": case.op,
                "size": case.size,
                "provider": provider,
                "milliseconds": 1e3 * times[provider],
                "gigabytes_per_second": bandwidth,
                "over_copy": bandwidth / copy_bandwidth,
                "error_against_float64": case.error if provider == "hessdiag" else None,
                **_device_counts(call, device),
                **gpu_state(device),
            }
        )
    for row in rows:
        row["speedup_over_eager"] = times["eager"] / times[row["provider"]]
        row["times_ours"] = times[row["provider"]] / times["hessdiag"]
    return rows


def _median_seconds(call: Callable[[], object], device: torch.device, budget: float) -> float:
    """Return the median time of a call, over as many as fit the budget in seconds."""
    if device.type == "cuda":
        from triton.testing import do_bench

        milliseconds: float = do_bench(call, warmup=50, rep=1e3 * budget, return_mode="median")
        return milliseconds / 1e3
    call()
    seconds: list[float] = []
    end = time.perf_counter() + budget
    while time.perf_counter() < end or len(seconds) < 3:
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def _copy_bandwidth(device: torch.device, budget: float) -> float:
    """Return GB/s of a large copy, bytes read and written."""
    source = torch.randn(2**28 if device.type == "cuda" else 2**23, device=device)
    target = torch.empty_like(source)
    seconds = _median_seconds(lambda: target.copy_(source), device, budget)
    return 2 * source.numel() * 4 / seconds / 1e9


def _device_counts(call: Callable[[], object], device: torch.device) -> Row:
    """Return launches and peak memory of a call; None on a CPU."""
    if device.type != "cuda":
        return {"launches": None, "peak_mebibytes": None}
    from torch.profiler import ProfilerActivity, profile

    synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    with profile(activities=[ProfilerActivity.CUDA]) as trace:
        call()
        synchronize(device)
    launches = sum(event.device_type == torch.autograd.DeviceType.CUDA for event in trace.events())
    peak = torch.cuda.max_memory_allocated(device) - before
    return {"launches": launches, "peak_mebibytes": peak / 2**20}


def _relative_error(result: Tensor, expected: Tensor) -> float:
    difference = result.detach().cpu().double() - expected
    return (difference.norm() / expected.norm()).item()


def _numel(shape: tuple[int, ...]) -> int:
    return torch.Size(shape).numel()


def plot(record: Row, path: Path) -> None:
    """Draw how many times faster than eager PyTorch each provider is, for every op and size."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = [row for row in record["rows"] if row["provider"] != "eager"]
    groups = list(dict.fromkeys((row["op"], row["size"]) for row in rows))
    colors = {"hessdiag": "#0072B2", "compile": "#E69F00"}
    figure, axis = plt.subplots(figsize=(8, 1 + 0.42 * len(groups)))
    for row in rows:
        names = [r["provider"] for r in rows if (r["op"], r["size"]) == (row["op"], row["size"])]
        place = groups.index((row["op"], row["size"])) + 0.8 * (
            (names.index(row["provider"]) + 0.5) / len(names) - 0.5
        )
        color = colors.get(row["provider"], "#999999")
        axis.barh(place, row["speedup_over_eager"], 0.8 / len(names), color=color)
    axis.axvline(1.0, color="black", linewidth=0.8)
    axis.set_yticks(range(len(groups)), [f"{op}\n{size}" for op, size in groups], fontsize=7)
    axis.set(xscale="log", xlabel="times faster than eager PyTorch")
    axis.invert_yaxis()
    handles = [plt.Rectangle((0, 0), 1, 1, color=c) for c in (*colors.values(), "#999999")]
    axis.legend(handles, ["hessdiag", "torch.compile", "diffusers' scheduler"], fontsize=7)
    where = record["environment"].get("gpu") or record["environment"]["processor"]
    axis.set_title(f"Kernels on {where}", fontsize=10)
    figure.tight_layout()
    figure.savefig(path, dpi=130, facecolor="white")
    plt.close(figure)
