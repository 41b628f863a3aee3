"""The trace in the right-hand side of an ODE, as continuous normalising flows evaluate it.

By hand it is the lines below: one evaluation, one backward pass with a probe drawn before. Beside
them, hessdiag's trace with probes that are kept and with probes drawn at each evaluation, on small
networks, where what a call costs by itself shows most. Nothing is timed before the results agree.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from harness.timing import Setting, time_together
from torch import Tensor, nn

import hessdiag
from ocm.evaluation.environment import Row, environment
from ocm.evaluation.markdown import markdown_table

_COLUMNS = {
    "B": "d",
    "D": "d",
    "units": "d",
    "by_hand_milliseconds": ".2f",
    "kept_milliseconds": ".2f",
    "kept_over_by_hand": ".2f",
    "drawn_milliseconds": ".2f",
    "drawn_over_by_hand": ".2f",
}
_SIZES = ((128, 2, 64), (256, 64, 256), (512, 64, 512))
_CALLS = 5
Velocity = Callable[[Tensor], Tensor]


def run(setting: Setting) -> tuple[Row, str]:
    """Return the record of the suite and its table."""
    rounds = 40 if setting.quick else 160
    record: Row = {
        "suite": "divergence",
        "model": "two hidden layers, tanh, one probe",
        "rounds": rounds,
        "seeds": {"network and points": 0, "probes": 0},
        "environment": environment(setting.device),
        "rows": [_row(*size, device=setting.device, rounds=rounds) for size in _SIZES],
    }
    return record, report(record)


def report(record: Row) -> str:
    """Return the table of a record."""
    return (
        "**Velocity and divergence by one probe**: the time with probes that are kept, and that "
        "with probes drawn at each evaluation, over that of what one would write by hand, each the "
        "least of all rounds\n\n" + markdown_table(record["rows"], _COLUMNS)
    )


def by_hand(velocity: Velocity, z: Tensor, e: Tensor) -> tuple[Tensor, Tensor]:
    """Return the velocity and e^T J e, with no check and no error bar."""
    with torch.enable_grad():
        z = z.detach().requires_grad_()
        f = velocity(z)
        (g,) = torch.autograd.grad(f, z, e)
    return f.detach(), (g * e).sum(dim=1)


def _row(B: int, D: int, units: int, *, device: torch.device, rounds: int) -> Row:
    torch.manual_seed(0)
    hidden = [nn.Linear(D, units), nn.Tanh(), nn.Linear(units, units), nn.Tanh()]
    velocity = nn.Sequential(*hidden, nn.Linear(units, D)).requires_grad_(False).to(device)
    z = torch.randn(B, D, generator=torch.Generator().manual_seed(0)).to(device)
    kept = hessdiag.fixed_probes(z, 1)

    def trace(probes: hessdiag.ProbeDesign) -> tuple[Tensor, Tensor]:
        J = hessdiag.Jacobian(velocity, z, mode="vjp")
        estimate = hessdiag.trace(J, max_probes=1, probes=probes)
        return J.output, estimate.trace

    candidates = {
        "by hand": lambda: by_hand(velocity, z, kept.vectors[0]),
        "kept": lambda: trace(kept),
        "drawn": lambda: trace(hessdiag.Rademacher()),
    }
    for name in ("kept", "drawn"):
        for ours, theirs in zip(candidates[name](), candidates["by hand"](), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    # What a call costs by itself is its least time: others may disturb calls as short as these.
    timings, _ = time_together(
        {
            name: lambda call=call: [call() for _ in range(_CALLS)]
            for name, call in candidates.items()
        },
        device=device,
        rounds=rounds,
        baseline="by hand",
    )
    row: Row = {"B": B, "D": D, "units": units}
    for name, timing in timings.items():
        key = name.replace(" ", "_")
        row[f"{key}_milliseconds"] = 1e3 * timing.minimum / _CALLS
        if name != "by hand":
            row[f"{key}_over_by_hand"] = timing.minimum / timings["by hand"].minimum
    return row


def _repeated(call: Callable[[], object]) -> Callable[[], object]:
    return lambda: [call() for _ in range(_CALLS)]
