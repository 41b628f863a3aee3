"""Every covariance on scikit-learn's digits: likelihood, samples, and diagonal against full.

A small denoiser and the heads of I-DDPM, NPR, SN and OCM are trained as ``ocm train`` does, and all
covariances scored as ``ocm evaluate --all`` does. With 64 pixels the whole Cov[x0 | x_t] is at
hand: how much of it lies off the diagonal is measured at several noise levels, and so is how far
from symmetric the Jacobian is that it comes from. Last, samples at equal numbers of network
evaluations, against the solvers of diffusers.

The training is kept below ``.cache/benchmarks/digits``, in a folder for each setting, goes on where
it was interrupted, and is not made again; the record says at which commit it was made.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from cifar10.parts import as_json, write_json
from cifar10.sizes import HEADS
from harness import budget
from harness.timing import Setting
from torch import Tensor

import hessdiag
import ocm
from hessdiag.bases import dct_matrix
from ocm import checkpoints
from ocm.checkpoints.catalogue import CovarianceSettings, available
from ocm.checkpoints.checkpoint import Checkpoint
from ocm.checkpoints.fitting import fitted
from ocm.checkpoints.held_back import held_back
from ocm.data import Images
from ocm.diffusion.noise import noisy_prediction
from ocm.evaluation import classifier
from ocm.evaluation.environment import Row, environment
from ocm.evaluation.evaluation import EvaluationSettings, evaluate
from ocm.evaluation.features import classifier_features
from ocm.evaluation.markdown import likelihood_markdown, markdown_table, quality_markdown
from ocm.evaluation.pictures import evaluation_plot
from ocm.evaluation.samples import Quality
from ocm.evaluation.scores import Estimate, estimate, steps_of
from ocm.training.settings import TrainingSettings
from ocm.training.workflow import NewDenoiser, NewHeads, train_checkpoint

_CACHE = Path(__file__).parent.parent.parent / ".cache" / "benchmarks" / "digits"


@dataclass(frozen=True)
class Sizes:
    """Sizes of the experiment.

    Attributes:
        width: Channels of the denoiser.
        denoiser_steps: Optimiser steps of the denoiser.
        head_steps: Optimiser steps of each head.
        num_images: Held-out images whose likelihood is bounded.
        num_samples: Samples for each figure of quality.
        fit_images: Training images of analytic covariances and calibrations.
        step_counts: Numbers of reverse steps K.
        structure_images: Held-out images whose whole covariance is taken.
        structure_timesteps: At which noise levels.
        budgets: Network evaluations for an image.
        budget_samples: Samples for each figure within a budget.
    """

    width: int = 16
    denoiser_steps: int = 2000
    head_steps: int = 800
    num_images: int = 128
    num_samples: int = 128
    fit_images: int = 128
    step_counts: tuple[int, ...] = (5, 10, 25)
    structure_images: int = 64
    structure_timesteps: tuple[int, ...] = (5, 50, 100, 200, 300, 500, 700, 900)
    budgets: tuple[int, ...] = budget.BUDGETS
    budget_samples: int = 512


# Every line runs, and the figures mean nothing.
QUICK = Sizes(
    width=8,
    denoiser_steps=20,
    head_steps=5,
    num_images=4,
    num_samples=8,
    fit_images=4,
    step_counts=(3,),
    structure_images=4,
    structure_timesteps=(50, 500),
    budgets=(5,),
    budget_samples=8,
)
SEED = 0


def run(setting: Setting) -> tuple[Row, str]:
    """Return the record of the suite and its tables."""
    sizes, device = QUICK if setting.quick else Sizes(), setting.device
    directory = _trained(sizes, device)
    evaluation = _evaluated(directory, sizes, device)
    loaded, images = checkpoints.load(directory, device), ocm.data.digits()
    held_out = images.test[: sizes.structure_images]
    record: Row = {
        "suite": "digits",
        "seeds": {"denoiser": SEED, "heads": SEED + 1, "evaluation": SEED},
        "sizes": asdict(sizes) | {name: list(getattr(sizes, name)) for name in _tuples(sizes)},
        "environment": environment(device),
        "training": json.loads((directory / "train.json").read_text()),
        **evaluation,
        "diagonal_against_full": diagonal_against_full(
            loaded.denoiser, held_out, sizes.structure_timesteps, SEED
        ),
        "equal_evaluations": _equal_evaluations(loaded, images, directory, sizes),
    }
    return record, report(record)


def _tuples(sizes: Sizes) -> list[str]:
    return [name for name, value in asdict(sizes).items() if isinstance(value, tuple)]


def _trained(sizes: Sizes, device: torch.device) -> Path:
    """Train the denoiser and the heads unless that was done, and return where they are."""
    name = f"width-{sizes.width}-steps-{sizes.denoiser_steps}-{sizes.head_steps}-{device.type}"
    directory = _CACHE / name
    # Written last: a checkpoint without it was interrupted, and its states are still there.
    if not (directory / "train.json").exists():
        training = TrainingSettings(sizes.denoiser_steps, seed=SEED)
        # Another seed: the heads see other noisy images than those the denoiser was fitted to.
        of_heads = replace(training, num_steps=sizes.head_steps, learning_rate=1e-2, seed=SEED + 1)
        checkpoint, record = train_checkpoint(
            ocm.data.digits(),
            NewDenoiser(training, sizes.width),
            NewHeads(of_heads, HEADS, parameterisation="paper", seed=SEED),
            directory,
            device=device,
            progress=False,
        )
        checkpoints.save(checkpoint, directory)
        write_json(directory / "train.json", record | {"environment": environment(device)})
    return directory


def _evaluated(directory: Path, sizes: Sizes, device: torch.device) -> Row:
    """Return what ``ocm evaluate --all`` records, but for its own time and place."""
    checkpoint = checkpoints.load(directory, device)
    settings = EvaluationSettings(
        available(checkpoint),
        sizes.step_counts,
        calibrated=True,
        quality=True,
        num_images=sizes.num_images,
        fit_images=sizes.fit_images,
        num_samples=sizes.num_samples,
        covariances=CovarianceSettings(seed=SEED),
        decoder="beta_tilde",
        seed=SEED,
    )
    out = directory / "evaluation"
    # Its tables are those of this suite, which shows them at the end.
    record, _ = evaluate(checkpoint, ocm.data.digits(), settings, out, progress=False)
    found: Row = as_json(record)
    return found


@torch.no_grad()
def diagonal_against_full(
    denoiser: ocm.Denoiser, images: Tensor, timesteps: Sequence[int], seed: int
) -> list[Row]:
    """Return how far Cov[x0 | x_t] is from diagonal, and the Jacobian from symmetric.

    With C = c I + k J of an image and S its symmetric part, in the pixels or in the orthonormal
    cosine transform F S F^T, means over images of

        off_diagonal, off_diagonal_in_cosines   sum_(i != j) S_ij^2 / sum_ij S_ij^2
        jacobian_asymmetry                      |J - J^T| / |J + J^T|
        covariance_asymmetry                    |C - C^T| / |C + C^T|
        negative_eigenvalues                    the share of eigenvalues of S below 0

    in Frobenius norms. A true covariance has no asymmetry and no negative eigenvalue.

    Args:
        denoiser: The frozen denoiser.
        images: Held-out images in [-1, 1], shape (n, C, H, W).
        timesteps: Noise levels in 1 .. N.
        seed: Seed of the noise.
    """
    channels, height, width = images.shape[1:]
    x0 = images.to(denoiser.device)
    like = {"dtype": torch.float64, "device": x0.device}
    plane = torch.kron(dct_matrix(height, **like), dct_matrix(width, **like))
    F = torch.kron(torch.eye(channels, **like), plane)
    rows: list[Row] = []
    for t in timesteps:
        x_t = noisy_prediction(denoiser, x0, t, seed).x_t
        J = hessdiag.jacobian(denoiser.jacobian(x_t, t)).double()
        c, k = (
            number.double().reshape(1, 1, 1) for number in denoiser.covariance_coefficients(t, x_t)
        )
        C = c * torch.eye(J.shape[-1], **like) + k * J
        S = (C + C.mT) / 2
        shares = {
            "off_diagonal": _off_diagonal(S),
            "off_diagonal_in_cosines": _off_diagonal(F @ S @ F.T),
            "jacobian_asymmetry": _asymmetry(J),
            "covariance_asymmetry": _asymmetry(C),
            "negative_eigenvalues": (torch.linalg.eigvalsh(S) < 0).double().mean(dim=1),
        }
        row: Row = {"t": t, "num_images": len(x0)}
        for name, values in shares.items():
            found = estimate(values.cpu())
            row[name], row[f"{name}_standard_error"] = found.mean, found.standard_error
        rows.append(row)
    return rows


def _off_diagonal(S: Tensor) -> Tensor:
    """Return the share of squares off the diagonal, shape (B,)."""
    squares = S.square()
    return 1.0 - squares.diagonal(dim1=1, dim2=2).sum(dim=1) / squares.sum(dim=(1, 2))


def _asymmetry(A: Tensor) -> Tensor:
    """Return |A - A^T| / |A + A^T|, shape (B,)."""
    return (A - A.mT).flatten(1).norm(dim=1) / (A + A.mT).flatten(1).norm(dim=1)


def _equal_evaluations(
    loaded: Checkpoint, images: Images, directory: Path, sizes: Sizes
) -> list[Row]:
    """Return sample quality within budgets, in the features of the evaluation's classifier."""
    x0, _ = held_back(loaded, images, sizes.fit_images)
    steps = steps_of(loaded.denoiser.schedule, sizes.budgets)
    complete = fitted(loaded, x0, ["analytic"], steps, seed=SEED)
    trained = classifier.load(directory / "evaluation" / "classifier", loaded.denoiser.device)
    extractor = classifier_features(trained)
    return budget.equal_evaluations(
        complete,
        extractor(images.train),
        extractor,
        sizes.budgets,
        num_images=sizes.budget_samples,
        seed=SEED,
    )


def report(record: Row) -> str:
    """Return the tables of a record."""
    return "\n\n".join(
        [
            f"Bits/dim on {record['num_images']} held-out images of {record['data']}, ± the "
            "standard error over images",
            likelihood(record),
            f"Features: {record['features']}. {record['num_samples']} samples a cell against "
            f"{record['num_real']} training images; {record['held_out']['num_images']} held-out "
            f"images are at a Fréchet distance of {record['held_out']['frechet']:.3f}, and fewer "
            "would be further.",
            *_quality_tables(record),
            "**Diagonal against full**, from the whole Cov[x0 | x_t] of "
            f"{record['diagonal_against_full'][0]['num_images']} held-out images: the share of its "
            "squares off the diagonal, in pixels and in cosines; the antisymmetric part over the "
            "symmetric one, of the Jacobian and of the covariance; the share of negative "
            "eigenvalues",
            structure(record),
            "**At equal network evaluations**, a Jacobian product counting as one: Fréchet "
            f"distance of {record['equal_evaluations'][0]['num_images']} samples (K steps)",
            budget.table(record["equal_evaluations"]),
        ]
    )


def likelihood(
    record: Mapping[str, Any], names: Sequence[str] | None = None, *, errors: bool = True
) -> str:
    """Return the table of bits/dim.

    Args:
        record: Of this suite, or what ``ocm evaluate`` or ``examples/demo.py`` wrote.
        names: Covariances to show; None for all.
        errors: Whether to show standard errors.
    """
    bits, spread = record["nll_bits_per_dim"], record["nll_standard_error"]
    table = {
        name: {
            int(K): Estimate(value, spread[name][K] if errors else None)
            for K, value in bits[name].items()
        }
        for name in names or bits
    }
    return likelihood_markdown(table, list(next(iter(table.values()))))


def _quality_tables(record: Row) -> list[str]:
    parts: list[str] = []
    for sampler, rows in record["quality"].items():
        table = {
            name: {int(K): Quality(**cell) for K, cell in row.items()} for name, row in rows.items()
        }
        parts += [
            f"Fréchet distance of {sampler.upper()} samples (precision, recall)",
            quality_markdown(table, record["step_counts"]),
        ]
    return parts


def structure(record: Row) -> str:
    """Return the table of the diagonal against the full covariance."""
    columns = {
        "t": "d",
        "off_diagonal": ".3f",
        "off_diagonal_in_cosines": ".3f",
        "jacobian_asymmetry": ".3f",
        "covariance_asymmetry": ".3f",
        "negative_eigenvalues": ".3f",
    }
    return markdown_table(record["diagonal_against_full"], columns)


def plot(record: Row, path: Path) -> None:
    """Draw likelihood and samples against K, and beside it the structure against t."""
    sizes = record["sizes"]
    title = (
        f"scikit-learn's digits, {record['training']['denoiser']['schedule']} schedule, N = 1000, "
        f"a U-Net of width {sizes['width']}"
    )
    evaluation_plot(record, path, title=title)
    _plot_structure(record, path.with_name(f"{path.stem}_full.png"))


def _plot_structure(record: Row, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    # Okabe and Ito's colours, which colour-blind readers can tell apart; a marker each besides.
    panels = {
        "share of squares off the diagonal": {
            "off_diagonal": ("in pixels", "#0072B2", "o-"),
            "off_diagonal_in_cosines": ("in cosines", "#D55E00", "s--"),
        },
        "antisymmetric over symmetric part": {
            "jacobian_asymmetry": ("of the Jacobian", "#009E73", "^-"),
            "covariance_asymmetry": ("of the covariance", "#CC79A7", "D--"),
        },
    }
    rows = record["diagonal_against_full"]
    ts = [row["t"] for row in rows]
    figure, axes = plt.subplots(1, 2, figsize=(9.5, 3.8), layout="constrained")
    for axis, (title, lines) in zip(axes, panels.items(), strict=True):
        for name, (what, colour, style) in lines.items():
            means = [row[name] for row in rows]
            errors = [row[f"{name}_standard_error"] or 0.0 for row in rows]
            axis.errorbar(ts, means, errors, fmt=style, color=colour, label=what, capsize=2)
        axis.set(xlabel="timestep t", ylim=(0, None))
        axis.set_title(title, fontsize=10)
        axis.grid(alpha=0.25)
        axis.legend(fontsize=8)
    figure.savefig(path, dpi=130, facecolor="white")
    plt.close(figure)
