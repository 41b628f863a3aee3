"""Diagonals over a network's parameters: the Hessian, Gauss-Newton and the empirical Fisher matrix.

Beside other libraries, each on what it can do, and beside the loop that one writes by hand. Nothing
is timed before results agree: with the matrices of a small network, with the same probes by hand,
and with Gauss-Newton diagonals taken sample by sample and output by output in float64.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from harness.memory import peak_bytes
from harness.parameter_peers import (
    Diagonals,
    Problem,
    backpack_diagonals,
    curvlinops_gauss_newton,
    curvlinops_hessian,
    flat,
    laplace_diagonals,
    skerch_hessian,
)
from harness.timing import Setting, time_together
from torch import Tensor, nn
from torch.nn import functional

import hessdiag
from hessdiag.compat import forward_mode_operators
from hessdiag.kernels import rademacher
from ocm.evaluation.environment import Row, environment
from ocm.evaluation.markdown import markdown_table

BY_HAND = "by hand"
EXACT = "hessdiag, exact"
FISHER = "hessdiag, empirical Fisher"
_SEEDS = 5


def run(setting: Setting) -> tuple[Row, str]:
    """Return the record of the suite and its tables."""
    device, quick = setting.device, setting.quick
    M = 4 if quick else 16
    checks = _check(device)
    hessians: list[Row] = []
    for problem in _networks(device, quick):
        hessians += _hessian_rows(problem, M, rounds=2 if quick else 5)
    errors = _error_rows(_classifier(device), M=16, seeds=20 if quick else 100)
    gauss_newton: list[Row] = []
    for problem in _feed_forward(device, quick):
        gauss_newton += _gauss_newton_rows(problem, rounds=2 if quick else 5)
    record = {
        "suite": "parameters",
        "probes": M,
        "seeds": {"networks and data": 0, "probes": f"0 to {_SEEDS - 1} for errors"},
        "checks": checks,
        "environment": environment(device),
        "hessian": hessians,
        "hessian_errors": errors,
        "gauss_newton": gauss_newton,
    }
    return record, report(record)


def report(record: Row) -> str:
    """Return the tables of a record."""
    checks = ", ".join(f"{name}: {value:.1e}" for name, value in record["checks"].items())
    return "\n\n".join(
        [
            f"Relative differences before anything was timed: {checks}.",
            f"**Hessian of a loss**, {record['probes']} Rademacher probes; peak memory in sizes of "
            "the parameters\n\n"
            + markdown_table(
                record["hessian"],
                {
                    "network": "",
                    "parameters": "d",
                    "method": "",
                    "milliseconds_per_probe": ".1f",
                    "over_by_hand": ".2f",
                    "parameter_sizes": ".1f",
                    "note": "",
                },
            ),
            "**Its error** on a small network, relative, and what the variance says\n\n"
            + markdown_table(
                record["hessian_errors"],
                {"method": "", "M": "d", "relative_error": ".3f", "expected": ".3f", "note": ""},
            ),
            "**Gauss-Newton and empirical Fisher** of a batch; errors to float64, sample by sample"
            "\n\n"
            + markdown_table(
                record["gauss_newton"],
                {
                    "network": "",
                    "parameters": "d",
                    "batch": "d",
                    "method": "",
                    "relative_error": ".1e",
                    "milliseconds": ".1f",
                    "over_backpack": ".2f",
                    "megabytes": ".1f",
                    "note": "",
                },
            ),
        ]
    )


def plot(record: Row, out: Path) -> None:
    """Draw the time of each Gauss-Newton diagonal as a bar, a panel for each network.

    The error stands at the end of the bar.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = [row for row in record["gauss_newton"] if "milliseconds" in row]
    rows = [row for row in rows if "empirical" not in row["method"]]
    methods = list(dict.fromkeys(row["method"] for row in rows))[::-1]
    networks = list(dict.fromkeys(row["network"] for row in rows))
    figure, axes = plt.subplots(
        1,
        len(networks),
        figsize=(3.0 + 2.2 * len(networks), 0.6 + 0.32 * len(methods)),
        layout="constrained",
        sharey=True,
        squeeze=False,
    )
    for panel, network in zip(axes[0], networks, strict=True):
        for row in (row for row in rows if row["network"] == network):
            place, time = methods.index(row["method"]), row["milliseconds"]
            ours = row["method"].startswith("hessdiag")
            panel.barh(place, time, color="#0072B2" if ours else "#D55E00")
            error = row["relative_error"]
            text = " exact" if error < 1e-5 else f" {error:.2g}"
            panel.annotate(text, (time, place), fontsize=7, va="center")
        times = [row["milliseconds"] for row in rows if row["network"] == network]
        panel.set(xscale="log", xlabel="milliseconds", xlim=(min(times) / 2, max(times) * 5))
        panel.minorticks_off()
        panel.set_title(network, fontsize=10)
    axes[0, 0].set_yticks(range(len(methods)), methods, fontsize=8)
    figure.suptitle("Gauss-Newton diagonals: time, and relative error", fontsize=10)
    figure.savefig(out, dpi=130, facecolor="white")
    plt.close(figure)


# Networks


class _Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.before, self.after = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.wide, self.narrow = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        qkv = self.qkv(self.before(x)).view(batch, length, 3, self.heads, -1)
        attended = functional.scaled_dot_product_attention(
            *qkv.permute(2, 0, 3, 1, 4), is_causal=True
        )
        x = x + self.out(attended.transpose(1, 2).reshape(batch, length, width))
        return x + self.narrow(functional.gelu(self.wide(self.after(x))))


class SmallGPT(nn.Module):
    """A decoder of characters; returns logits of shape (B, characters, T)."""

    def __init__(self, characters: int, length: int, width: int, depth: int) -> None:
        super().__init__()
        self.characters = nn.Embedding(characters, width)
        self.places = nn.Parameter(0.02 * torch.randn(length, width))
        self.blocks = nn.Sequential(*[_Block(width, 4) for _ in range(depth)])
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, characters)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return the logits of the next characters."""
        x = self.characters(tokens) + self.places[: tokens.shape[1]]
        return self.head(self.norm(self.blocks(x))).transpose(1, 2)


def _mlp(*widths: int, activation: type[nn.Module] = nn.ReLU) -> nn.Module:
    layers: list[nn.Module] = []
    for first, second in itertools.pairwise(widths):
        layers += [nn.Linear(first, second), activation()]
    return nn.Sequential(*layers[:-1])


def _cnn() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(64 * 64, 10),
    )  # fmt: skip


def _problem(
    name: str, module: nn.Module, inputs: Tensor, targets: Tensor, device: torch.device
) -> Problem:
    classes = not targets.is_floating_point()
    criterion = nn.CrossEntropyLoss() if classes else nn.MSELoss()
    return Problem(name, module.to(device), criterion, inputs.to(device), targets.to(device))


def _networks(device: torch.device, quick: bool) -> Iterable[Problem]:
    torch.manual_seed(0)
    widths = (784, 256, 10) if quick else (784, 1024, 1024, 256, 10)
    x, y = torch.randn(64, 784), torch.randint(10, (64,))
    yield _problem("MLP", _mlp(*widths), x, y, device)
    x, y = torch.randn(16, 3, 32, 32), torch.randint(10, (16,))
    yield _problem("CNN", _cnn(), x, y, device)
    gpt = SmallGPT(65, 64, 64 if quick else 128, 2 if quick else 4)
    tokens, following = torch.randint(65, (2, 4, 64))
    yield _problem("GPT", gpt, tokens, following, device)


def _feed_forward(device: torch.device, quick: bool) -> Iterable[Problem]:
    torch.manual_seed(0)
    x, y = torch.randn(128, 20), torch.randint(10, (128,))
    yield _problem("small MLP", _mlp(20, 32, 10, activation=nn.Tanh), x, y, device)
    widths = (784, 128, 10) if quick else (784, 1024, 1024, 256, 10)
    x, y = torch.randn(128, 784), torch.randint(10, (128,))
    yield _problem("MLP", _mlp(*widths), x, y, device)
    x, y = torch.randn(16, 3, 32, 32), torch.randint(10, (16,))
    yield _problem("CNN", _cnn(), x, y, device)
    x, y = torch.randn(128, 50), torch.randn(128, 5)
    yield _problem("regression", _mlp(50, 200, 5, activation=nn.Tanh), x, y, device)


def _classifier(device: torch.device) -> Problem:
    torch.manual_seed(0)
    x, y = torch.randn(64, 8), torch.randint(4, (64,))
    return _problem("small classifier", _mlp(8, 16, 4, activation=nn.Tanh), x, y, device)


# Truth


def by_hand(problem: Problem, M: int) -> Tensor:
    """Double backward: the gradient with its graph, then a pass for each vector of signs."""
    parameters = problem.parameters
    leaves = [p.requires_grad_() for p in parameters.values()]
    with forward_mode_operators(), torch.enable_grad():  # attention that can go back twice
        value = problem.total(dict(zip(parameters, leaves, strict=True)))
        gradient = torch.autograd.grad(value, leaves, create_graph=True)
    total = [torch.zeros_like(leaf) for leaf in leaves]
    for _ in range(M):
        signs = [
            torch.randint(0, 2, p.shape, device=p.device).mul_(2).sub_(1).to(p) for p in leaves
        ]
        products = torch.autograd.grad(gradient, leaves, signs, retain_graph=True)
        for held, product, sign in zip(total, products, signs, strict=True):
            held.add_(product * sign)
    return flat(total) / M


def _sample_by_sample(problem: Problem) -> tuple[Tensor, Tensor]:
    """Return the Gauss-Newton and the empirical Fisher diagonal in float64, from definitions."""
    module = copy.deepcopy(problem.module).double()
    parameters = list(module.parameters())
    inputs, targets = problem.inputs, problem.targets
    inputs = inputs.double() if inputs.is_floating_point() else inputs
    targets = targets.double() if targets.is_floating_point() else targets
    gauss_newton = torch.zeros(problem.size, dtype=torch.float64, device=inputs.device)
    fisher = gauss_newton.clone()
    for n in range(len(inputs)):
        outputs = module(inputs[n : n + 1])

        def loss(z: Tensor, n: int = n) -> Tensor:
            return problem.criterion(z, targets[n : n + 1])

        H = torch.func.jacrev(torch.func.jacrev(loss))(outputs.detach())
        size = outputs.numel()
        values, vectors = torch.linalg.eigh(H.reshape(size, size))
        for value, vector in zip(values, vectors.T, strict=True):
            row = torch.autograd.grad(
                outputs, parameters, vector.reshape(outputs.shape), retain_graph=True
            )
            gauss_newton += value * flat(row).square()
        fisher += flat(torch.autograd.grad(loss(outputs), parameters)).square()
    return gauss_newton / len(inputs), fisher / len(inputs)


def _check(device: torch.device) -> Row:
    """Compare with the matrices of a small network, or raise."""
    problem = _classifier(device)
    H, M = _hessian(problem), 16
    v = rademacher((M, 1, problem.size), 0, device=device)[:, 0].double()
    found = hessdiag.parameter_hessian_diagonal(problem.total, problem.parameters, max_probes=M)
    exact = hessdiag.parameter_hessian_diagonal(
        problem.total, problem.parameters, max_probes=problem.size, probes="auto"
    )
    truth, fisher = _sample_by_sample(problem)
    data = [(problem.inputs, problem.targets)]
    ours = hessdiag.gauss_newton_over_data(problem.module, problem.criterion, data)
    squares = hessdiag.empirical_fisher_over_data(problem.module, problem.criterion, data)
    products = hessdiag.gauss_newton_diagonal(
        problem.outputs, problem.loss, problem.parameters, max_probes=problem.size, probes="auto"
    )
    checks = {
        "Hessian, same probes": _difference(flat(found.diagonal), (v * (v @ H)).mean(0)),
        "Hessian, exact": _difference(flat(exact.diagonal), H.diagonal()),
        "Gauss-Newton over data": _difference(flat(ours.diagonal), truth),
        "Gauss-Newton by products": _difference(flat(products.diagonal), truth),
        "empirical Fisher": _difference(flat(squares.diagonal), fisher),
    }
    if not max(checks.values()) < 1e-5:
        raise RuntimeError(f"the diagonals are wrong: {checks}")
    return checks


def _hessian(problem: Problem) -> Tensor:
    """Return the whole matrix in float64."""
    module = copy.deepcopy(problem.module).double()
    parameters = {name: p.detach() for name, p in module.named_parameters()}
    sizes = [p.numel() for p in parameters.values()]

    def loss(vector: Tensor) -> Tensor:
        parts = zip(parameters.items(), vector.split(sizes), strict=True)
        tree = {name: part.reshape(p.shape) for (name, p), part in parts}
        outputs = torch.func.functional_call(module, tree, (problem.inputs.double(),))
        return problem.criterion(outputs, problem.targets)

    return torch.func.hessian(loss)(flat(parameters)).detach()


def _difference(found: Tensor, truth: Tensor) -> float:
    return ((found.double() - truth).norm() / truth.norm()).item()


# Measurements


def _installed(
    make: Callable[..., Diagonals], problem: Problem, M: int
) -> tuple[Diagonals, list[Row]]:
    """Return the diagonals of a library, or a row that says why there are none."""
    try:
        return make(problem, M), []
    except ImportError as error:
        name = make.__name__.split("_")[0]
        return {}, [{"network": problem.name, "method": name, "note": f"not installed: {error}"}]


def _works(
    candidates: Diagonals, network: str, measure: Callable[[str, Tensor], Row]
) -> tuple[Diagonals, list[Row]]:
    """Run each once: those that work, and a row for each with what ``measure`` says or why not."""
    working, rows = {}, []
    for name, compute in candidates.items():
        row: Row = {"network": network, "method": name}
        try:
            row |= measure(name, compute())
        except Exception as failure:
            # What another library cannot do is for the table to say; ours must.
            if name.startswith(("hessdiag", BY_HAND)):
                raise
            lines = str(failure).strip().splitlines() or [type(failure).__name__]
            row["note"] = lines[0][:90]
        else:
            working[name] = compute
        rows.append(row)
    return working, rows


def _hessian_rows(problem: Problem, M: int, rounds: int) -> list[Row]:
    def ours(**options: bool) -> Tensor:
        result = hessdiag.parameter_hessian_diagonal(
            problem.total, problem.parameters, max_probes=M, **options
        )
        return flat(result.diagonal)

    candidates: Diagonals = {
        BY_HAND: lambda: by_hand(problem, M),
        "hessdiag": ours,
        "hessdiag, no standard errors": lambda: ours(stderr=False),
    }
    absent: list[Row] = []
    for make in (curvlinops_hessian, skerch_hessian):
        found, missing = _installed(make, problem, M)
        candidates |= found
        absent += missing
    working, rows = _works(candidates, problem.name, lambda name, result: {})
    timings, ratios = time_together(
        working, device=problem.inputs.device, rounds=rounds, baseline=BY_HAND
    )
    size = flat(problem.parameters).nbytes
    for row in rows:
        row["parameters"] = problem.size
        if row["method"] in timings:
            row["milliseconds_per_probe"] = 1e3 * timings[row["method"]].median / M
            row["over_by_hand"] = ratios[row["method"]]
            row["parameter_sizes"] = peak_bytes(working[row["method"]]) / size
    return rows + absent


def _error_rows(problem: Problem, M: int, seeds: int) -> list[Row]:
    """Root mean square of the error over seeds, beside the square root of the variance."""
    H = _hessian(problem)
    truth = H.diagonal()
    expected = ((H.square().sum() - truth.square().sum()) / M).sqrt() / truth.norm()
    candidates: dict[str, Callable[[int], Tensor]] = {
        "hessdiag": lambda seed: flat(
            hessdiag.parameter_hessian_diagonal(
                problem.total, problem.parameters, max_probes=M, seed=seed
            ).diagonal
        ),
        BY_HAND: lambda seed: by_hand(problem, M),
    }
    absent: list[Row] = []
    for make in (curvlinops_hessian, skerch_hessian):
        found, missing = _installed(make, problem, M)
        absent += missing
        candidates |= {name: lambda seed, run=run: run() for name, run in found.items()}
    rows: list[Row] = []
    for name, run_seed in candidates.items():
        torch.manual_seed(0)
        row: Row = {"network": problem.name, "method": name, "M": M, "expected": expected.item()}
        try:
            squares = [_difference(run_seed(seed), truth) ** 2 for seed in range(seeds)]
            row["relative_error"] = (sum(squares) / seeds) ** 0.5
        except Exception as failure:
            if name.startswith(("hessdiag", BY_HAND)):
                raise
            row["note"] = str(failure).strip().splitlines()[0][:90]
        rows.append(row)
    return rows + absent


def _gauss_newton_rows(problem: Problem, rounds: int) -> list[Row]:
    truth, fisher = _sample_by_sample(problem)
    data = [(problem.inputs, problem.targets)]

    def over_data(max_probes: int | None = None, seed: int = 0) -> Tensor:
        result = hessdiag.gauss_newton_over_data(
            problem.module, problem.criterion, data, max_probes=max_probes, seed=seed
        )
        return flat(result.diagonal)

    candidates: Diagonals = {EXACT: over_data}
    candidates |= {
        f"hessdiag, {K} {'probe' if K == 1 else 'probes'}": lambda K=K: over_data(K, _next_seed())
        for K in (1, 4, 16)
    }
    candidates["hessdiag, products, 16 probes"] = lambda: flat(
        hessdiag.gauss_newton_diagonal(
            problem.outputs, problem.loss, problem.parameters, max_probes=16, seed=_next_seed()
        ).diagonal
    )
    candidates[FISHER] = lambda: flat(
        hessdiag.empirical_fisher_over_data(problem.module, problem.criterion, data).diagonal
    )
    absent: list[Row] = []
    for make in (backpack_diagonals, curvlinops_gauss_newton, laplace_diagonals):
        found, missing = _installed(make, problem, 16)
        candidates |= found
        absent += missing
    torch.manual_seed(0)

    def error(name: str, result: Tensor) -> Row:
        right = fisher if "empirical" in name else truth
        squares = [_difference(result, right) ** 2]
        if "probe" in name or "samples" in name:
            squares += [_difference(candidates[name](), right) ** 2 for _ in range(_SEEDS - 1)]
        return {"relative_error": (sum(squares) / len(squares)) ** 0.5}

    working, rows = _works(candidates, problem.name, error)
    wrong = {
        row["method"]: row["relative_error"]
        for row in rows
        if row["method"] in (EXACT, FISHER) and not row["relative_error"] < 1e-5
    }
    if wrong:
        raise RuntimeError(f"the diagonals of {problem.name} are wrong: {wrong}")
    baseline = "BackPACK, exact" if "BackPACK, exact" in working else EXACT
    timings, ratios = time_together(
        working, device=problem.inputs.device, rounds=rounds, baseline=baseline
    )
    for row in rows:
        row |= {"parameters": problem.size, "batch": len(problem.inputs)}
        if row["method"] in timings:
            row["milliseconds"] = 1e3 * timings[row["method"]].median
            if baseline != EXACT:
                row["over_backpack"] = ratios[row["method"]]
            row["megabytes"] = peak_bytes(working[row["method"]]) / 1e6
    return rows + absent


_seed = 0


def _next_seed() -> int:
    """Return another seed at every call, as the libraries that draw from a global state do."""
    global _seed
    _seed += 1
    return _seed
