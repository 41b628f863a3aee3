"""Jacobian products on a U-Net: hutchinson against the loop that runs the network for each probe.

The loop is what the code of the Optimal Covariance Matching paper does, written here from its
description: a forward and a backward pass for every probe. Nothing is timed before the results
agree, with that loop and with ``torch.func.jacrev``.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from harness.timing import Setting, time_together
from torch import Tensor, nn

import hessdiag
from hessdiag.kernels import rademacher
from ocm.evaluation.environment import Row, environment
from ocm.evaluation.markdown import markdown_table

COLUMNS = {
    "way": "",
    "M": "d",
    "milliseconds": ".1f",
    "over_loop": ".3f",
    "over_forward": ".1f",
}


_SMALL_COLUMNS = {
    "network": "",
    "B": "d",
    "D": "d",
    "M": "d",
    "by_hand": "",
    "by_hand_milliseconds": ".2f",
    "milliseconds": ".2f",
    "over_by_hand": ".2f",
}
ScoreFunction = Callable[[Tensor], Tensor]


def run(setting: Setting) -> tuple[Row, str]:
    """Return the record of the suite and its tables."""
    device, quick = setting.device, setting.quick
    rounds = 3 if quick else 9
    shape = (8, 3, 16, 16)
    score_fn = _unet_score(shape, device)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(device)
    checks = _check(score_fn, x)
    rows: list[Row] = []
    for M in (4,) if quick else (4, 16):
        candidates: dict[str, Callable[[], object]] = {
            "forward pass alone": lambda: torch.no_grad()(score_fn)(x),
            "loop over probes": lambda M=M: naive_loop(score_fn, x, M),
            "hutchinson, vjp": lambda M=M: hessdiag.hutchinson(score_fn, x, M, mode="vjp"),
            "hutchinson, jvp": lambda M=M: hessdiag.hutchinson(score_fn, x, M, mode="jvp"),
        }
        timings, ratios = time_together(
            candidates, device=device, rounds=rounds, baseline="loop over probes"
        )
        forward = timings["forward pass alone"].median
        rows += [
            {
                "way": name,
                "M": M,
                "milliseconds": 1e3 * timing.median,
                "milliseconds_min": 1e3 * timing.minimum,
                "milliseconds_max": 1e3 * timing.maximum,
                "over_loop": ratios[name],
                "over_forward": timing.median / forward,
            }
            for name, timing in timings.items()
        ]
    small = _small_calls(device, quick)
    record = {
        "suite": "products",
        "model": "diffusers UNet2DModel, channels (32, 64), one layer each, attention",
        "shape": list(shape),
        "rounds": rounds,
        "seeds": {"network and images": 0, "probes": 0},
        "checks": checks,
        "environment": environment(device),
        "rows": rows,
        "small_calls": small,
    }
    return record, report(record)


def report(record: Row) -> str:
    """Return the tables of a record."""
    agreement = ", ".join(f"{name}: {value:.1e}" for name, value in record["checks"].items())
    table = markdown_table(record["rows"], COLUMNS)
    small = markdown_table(record["small_calls"], _SMALL_COLUMNS)
    return (
        f"{table}\n\nRelative difference of results: {agreement}\n\n**Small calls**: the time of "
        f"hutchinson over that of what one would write by hand\n\n{small}"
    )


def _small_calls(device: torch.device, quick: bool) -> list[Row]:
    """Return the time of hutchinson over that of a few lines by hand, where little is to be done.

    By hand: a loop over backward passes on one evaluation, or vmap over all of them.
    """
    torch.manual_seed(0)
    tiny, wide = (
        nn.Sequential(nn.Linear(size, 2 * size), nn.Tanh(), nn.Linear(2 * size, size))
        .requires_grad_(False)
        .to(device)
        for size in (16, 256)
    )
    unet = _unet_score((4, 3, 16, 16), device)
    cases = (
        ("MLP", tiny, (1, 16), 1, _loop_by_hand),
        ("MLP", tiny, (1, 16), 16, _vmap_by_hand),
        ("MLP", wide, (64, 256), 64, _loop_by_hand),
        ("U-Net", unet, (4, 3, 16, 16), 1, _loop_by_hand),
    )
    return [_small_call(*case, device=device, rounds=5 if quick else 25) for case in cases]


def _small_call(
    network: str,
    score_fn: ScoreFunction,
    shape: tuple[int, ...],
    M: int,
    by_hand: Callable[[ScoreFunction, Tensor, int], Tensor],
    *,
    device: torch.device,
    rounds: int,
) -> Row:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(device)
    # Both have the expectation of the exact diagonal, and the same variance.
    exact = hessdiag.exact(score_fn, x[:1])
    ours, theirs = (
        (estimate - exact).norm().item()
        for estimate in (hessdiag.hutchinson(score_fn, x[:1], 64), by_hand(score_fn, x[:1], 64))
    )
    if not 0.4 < ours / theirs < 2.5:
        raise RuntimeError(f"{network}: hutchinson is {ours:.2g} off, what one writes {theirs:.2g}")
    repeats = 1 if x.numel() > 1000 else 20
    timings, ratios = time_together(
        {
            "by hand": lambda: [by_hand(score_fn, x, M) for _ in range(repeats)],
            "hutchinson": lambda: [hessdiag.hutchinson(score_fn, x, M) for _ in range(repeats)],
        },
        device=device,
        rounds=rounds,
        baseline="by hand",
    )
    return {
        "network": network,
        "B": shape[0],
        "D": x[0].numel(),
        "M": M,
        "by_hand": "loop" if by_hand is _loop_by_hand else "vmap",
        "by_hand_milliseconds": 1e3 * timings["by hand"].median / repeats,
        "milliseconds": 1e3 * timings["hutchinson"].median / repeats,
        "over_by_hand": ratios["hutchinson"],
    }


def _loop_by_hand(score_fn: ScoreFunction, x: Tensor, M: int) -> Tensor:
    leaf = x.clone().requires_grad_()
    output, total = score_fn(leaf), torch.zeros_like(x)
    for _ in range(M):
        v = torch.randint(0, 2, x.shape, device=x.device).to(x.dtype) * 2 - 1
        total += v * torch.autograd.grad(output, leaf, v, retain_graph=True)[0]
    return total / M


def _vmap_by_hand(score_fn: ScoreFunction, x: Tensor, M: int) -> Tensor:
    pull_back = torch.func.vjp(score_fn, x)[1]
    v = torch.randint(0, 2, (M, *x.shape), device=x.device).to(x.dtype) * 2 - 1
    return (v * torch.func.vmap(lambda probe: pull_back(probe)[0])(v)).mean(dim=0)


def naive_loop(score_fn: Callable[[Tensor], Tensor], x: Tensor, M: int) -> Tensor:
    """Estimate the diagonal with a forward and a backward pass for every probe."""
    total = torch.zeros_like(x)
    for m in range(M):
        leaf = x.detach().requires_grad_()
        v = rademacher((1, *x.shape), 0, probe_offset=m, device=x.device)[0]
        with torch.enable_grad():
            (product,) = torch.autograd.grad((score_fn(leaf) * v).sum(), leaf)
        total += v * product
    return total / M


def _unet_score(shape: tuple[int, ...], device: torch.device) -> Callable[[Tensor], Tensor]:
    from diffusers import UNet2DModel

    torch.manual_seed(0)
    unet = UNet2DModel(
        sample_size=shape[-1],
        in_channels=shape[1],
        out_channels=shape[1],
        block_out_channels=(32, 64),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        norm_num_groups=8,
        attention_head_dim=16,
    )
    unet.eval().requires_grad_(False).to(device)
    return lambda x: unet(x, 200).sample


def _check(score_fn: Callable[[Tensor], Tensor], x: Tensor) -> dict[str, float]:
    """Compare with the loop and with jacrev, and raise if they disagree."""

    def difference(result: Tensor, expected: Tensor) -> float:
        return ((result - expected).norm() / expected.norm()).item()

    image = x[:1, :, :8, :8].contiguous()
    # One row at a time: vmap has no fast rule for the attention of the network.
    jacobian = torch.func.jacrev(lambda z: score_fn(z[None])[0], chunk_size=1)(image[0])
    features = image.numel()
    expected = jacobian.reshape(features, features).diagonal().reshape(image.shape)
    checks = {
        "hutchinson to loop": difference(
            hessdiag.hutchinson(score_fn, x, 3, mode="vjp"), naive_loop(score_fn, x, 3)
        ),
        "exact (vjp) to jacrev": difference(hessdiag.exact(score_fn, image, mode="vjp"), expected),
        "exact (jvp) to jacrev": difference(hessdiag.exact(score_fn, image, mode="jvp"), expected),
    }
    for name, value in checks.items():
        if not value < 1e-4:
            raise RuntimeError(f"{name}: the results differ by {value:.1e}, at most 1e-4 is right")
    return checks
