"""What a covariance adds to a sampling step: passes through the backbone, and time.

Forward passes are counted by a hook on the backbone and checked before anything is timed. The
time is that of a whole DDPM step, prediction to x_s, over that of the same step with beta_tilde,
round by round.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from diffusers import UNet2DModel
from harness.timing import Setting, time_together

import ocm
from ocm.covariances.names import LEARNED
from ocm.evaluation.environment import Row, environment
from ocm.evaluation.markdown import markdown_table
from ocm.sampling.samplers import ddpm, reverse_step
from ocm.training.small_unet import small_unet

COLUMNS = {
    "network": "",
    "covariance": "",
    "passes": "d",
    "milliseconds": ".1f",
    "over_plain": ".3f",
    "over_plain_of_minima": ".3f",
}
_T, _S = 500, 400


def run(setting: Setting) -> tuple[Row, str]:
    """Return the record of the suite and its tables."""
    device, quick = setting.device, setting.quick
    networks: dict[str, tuple[Any, int]] = {
        "small U-Net, 0.6 M, 32x32": (small_unet((3, 32, 32)), 8),
        "U-Net of ddpm-cifar10-32, 35.7 M": (_cifar10_unet(), 2),
    }
    if quick:
        networks.popitem()
    rows: list[Row] = []
    for name, (unet, batch) in networks.items():
        rows += _network(name, unet.to(device), batch, setting)
    record = {
        "suite": "sampling",
        "seeds": {"networks and images": 0, "noise and probes": 0},
        "environment": environment(device),
        "rows": rows,
    }
    return record, report(record)


def report(record: Row) -> str:
    """Return the tables of a record."""
    return markdown_table(record["rows"], COLUMNS)


def _network(name: str, unet: Any, batch: int, setting: Setting) -> list[Row]:
    denoiser = ocm.Denoiser(unet, ocm.cosine()).freeze()
    generator = torch.Generator().manual_seed(0)
    x_t = torch.randn((batch, 3, 32, 32), generator=generator).to(setting.device)
    covariances: dict[str, Any] = {"beta_tilde": ocm.BetaTilde(denoiser)}
    for kind in ("simple", "residual"):
        for method, learned in LEARNED.items():
            if kind == "simple" or method == "ocm":
                head = ocm.make_head(denoiser, kind).eval().requires_grad_(False)
                covariances[f"{method}, {kind} head"] = learned(denoiser, head)
    covariances["hutchinson, M = 4"] = ocm.Hutchinson(denoiser, 4)
    covariances["hutchinson, M = 4, evaluated apart"] = _Apart(ocm.Hutchinson(denoiser, 4))
    covariances["lanczos, k = 3"] = ocm.Lanczos(denoiser, 3)
    covariances["cosine, M = 1"] = ocm.CosineDiagonal(denoiser, 1)

    def step(covariance: Any) -> torch.Tensor:
        with torch.no_grad():
            prediction = denoiser.predict(x_t, _T, s=_S)
            stated = covariance.at(prediction)
            return reverse_step(prediction, stated, ddpm(denoiser.schedule, _S, _T), seed=0)

    passes: dict[str, int] = {}
    for key, covariance in covariances.items():
        passes[key] = _passes(unet, lambda covariance=covariance: step(covariance))
        if "head" in key and passes[key] != 1:
            raise AssertionError(f"{key} took {passes[key]} passes through the backbone, not 1")
    timings, ratios = time_together(
        {key: lambda c=covariance: step(c) for key, covariance in covariances.items()},
        device=setting.device,
        rounds=5 if setting.quick else 31,
        baseline="beta_tilde",
    )
    return [
        {
            "network": name,
            "parameters": sum(p.numel() for p in unet.parameters()),
            "batch": batch,
            "covariance": key,
            "passes": passes[key],
            "milliseconds": 1e3 * timing.median,
            "over_plain": ratios[key],
            "over_plain_of_minima": timing.minimum / timings["beta_tilde"].minimum,
        }
        for key, timing in timings.items()
    ]


@dataclass(frozen=True)
class _Apart:
    """A covariance whose products are not those of the prediction's own evaluation."""

    covariance: ocm.Covariance

    def at(self, prediction: ocm.Prediction) -> ocm.PosteriorCovariance:
        prediction.output  # noqa: B018, evaluates without a graph
        again = prediction.denoiser.predict(prediction.x_t, prediction.t, s=prediction.s)
        return self.covariance.at(again)


def _passes(unet: Any, call: Any) -> int:
    """Count the evaluations of the backbone."""
    count = 0

    def counted(*_: object) -> None:
        nonlocal count
        count += 1

    hook = unet.register_forward_pre_hook(counted)
    try:
        call()
    finally:
        hook.remove()
    return count


def _cifar10_unet() -> UNet2DModel:
    """Return the architecture of the model that DDPM's authors trained on CIFAR-10, untrained."""
    torch.manual_seed(0)
    return UNet2DModel(
        sample_size=32,
        in_channels=3,
        out_channels=3,
        block_out_channels=(128, 256, 256, 256),
        down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        layers_per_block=2,
        attention_head_dim=None,
    )
