"""What samples and likelihoods of one model are worth, part by part."""

from __future__ import annotations

import multiprocessing
import re
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path

import torch
from cifar10.parts import Parts, as_json
from cifar10.training import data_sizes
from safetensors.torch import save_file
from torch import Tensor

import ocm
from fashion.methods import (
    COVARIANCES,
    PROCESSES,
    PRODUCTS,
    Method,
    covariance_of,
    draw,
    others,
    spacings,
)
from fashion.sizes import MODELS, SEED, TUNING_SEED, Size
from fashion.training import Model, Splits, load_images, train_model, unfolded
from ocm.checkpoints.checkpoint import Checkpoint
from ocm.diffusion.noise import noisy_prediction
from ocm.diffusion.tables import Table
from ocm.diffusion.timesteps import even_timesteps, reverse_steps
from ocm.evaluation import classifier
from ocm.evaluation.distances import frechet_distance
from ocm.evaluation.environment import Row
from ocm.evaluation.features import FeatureExtractor, classifier_features
from ocm.evaluation.scores import estimate
from ocm.sampling.likelihood import decoder_term, prior_term, step_term
from ocm.sampling.samplers import X0_RANGE

LIKELIHOODS = ("beta", "analytic", "ocm", "coloring")


def evaluate(work: Path, data: Path, size: Size) -> Row:
    """Train and score both models, and return the record of all of it.

    Args:
        work: Where states and finished parts are kept, from which an interrupted run goes on.
        data: Directory of Fashion-MNIST.
        size: Everything else.
    """
    features = _train_classifier(work, load_images(data, size), size)
    if size.side_by_side:
        spawn = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(len(MODELS), spawn, torch.set_num_threads, (1,)) as pool:
            waiting = [pool.submit(evaluate_model, path, work, data, size) for path in MODELS]
            models = [future.result() for future in waiting]
    else:
        models = [evaluate_model(path, work, data, size) for path in MODELS]
    return {
        "settings": as_json(asdict(size)),
        "seeds": {"training and tables": SEED, "choice of settings": TUNING_SEED},
        "features": features,
        "models": models,
    }


def _train_classifier(work: Path, images: Splits, size: Size) -> Row:
    """Train the classifier into ``work/classifier``, and return what its features are."""

    def make() -> Row:
        trained = classifier.train_classifier(
            unfolded(images.train[:]),
            images.train_labels,
            10,
            num_features=size.num_features,
            num_steps=size.classifier_steps,
            seed=SEED,
        )
        classifier.save(trained, work / "classifier")
        extractor, test = classifier_features(trained), unfolded(images.test[:])
        # As many training images as there are samples, against the images of the tables.
        floor = [unfolded(images.train[: size.num_samples]), test[: size.num_real]]
        return {
            "name": extractor.name,
            "accuracy": classifier.accuracy(trained, test, images.test_labels),
            "training_images": {
                "features": frechet_distance(extractor(floor[1]), extractor(floor[0])),
                "pixels": frechet_distance(floor[1].flatten(1), floor[0].flatten(1)),
            },
        }

    key = {name: getattr(size, name) for name in ("name", "image_size", "classifier_steps")}
    parts = Parts(work / "parts", "", as_json(key))
    found: Row = parts.get("classifier", make)
    return found


def evaluate_model(path: str, work: Path, data: Path, size: Size) -> Row:
    """Train one model and score it, part by part.

    Args:
        path: "flow" or "cosine".
        work: As in :func:`evaluate`.
        data: As in :func:`evaluate`.
        size: As in :func:`evaluate`.
    """
    images = load_images(data, size)
    model, training = train_model(path, work, images, size)
    parts = Parts(
        work / "parts",
        f"{path}-",
        {"data": data_sizes(data), "denoiser_loss": training["denoiser"]["loss"]},
    )
    checkpoint = _fitted(model, images, size, parts)
    extractor = classifier_features(classifier.load(work / "classifier"))
    compared = {
        "validation": unfolded(images.validation[-size.num_real :]),
        "test": unfolded(images.test[: size.num_real]),
    }
    head = {"head_loss": training["head"]["loss"]}
    runs = Samples(checkpoint, extractor, compared, size, parts, head)
    tried = runs.tried(path)
    best = chosen(tried)
    rows = runs.table(best)
    return {
        "path": path,
        "training": training,
        "tried": tried,
        "rows": rows,
        "bits_per_dim": _likelihoods(checkpoint, images, size, parts, head),
        "with_products": runs.with_products(best),
        "seconds": parts.seconds(),
    }


def _fitted(model: Model, images: Splits, size: Size, parts: Parts) -> Checkpoint:
    """Return the checkpoint of a model, with its analytic variance."""
    x0 = images.validation[: size.num_fit]
    levels = [1, 5, 20, *range(50, 1001, 50)]

    def make() -> Row:
        # By the law of total variance: towards alpha = 0 the network's errors are not multiplied.
        found = ocm.fit_analytic_from_data(model.denoiser, x0, levels, seed=SEED)
        return found.scaled_variances.to_json()

    table = Table.from_json(parts.get("scaled-variances-from-data", make, num_fit=size.num_fit))
    return Checkpoint(
        model.denoiser,
        tuple(x0.shape[1:]),
        256,
        "fashion_mnist",
        {"ocm": model.ocm},
        {"analytic": ocm.Analytic(model.denoiser, table)},
    )


# Samples


class Samples:
    """Draws samples of one model, and compares them with real images."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        extractor: FeatureExtractor,
        real: dict[str, Tensor],
        size: Size,
        parts: Parts,
        head: Row,
    ) -> None:
        self.checkpoint, self.extractor, self.size, self.parts = checkpoint, extractor, size, parts
        # What tells the samples of a covariance from those of another one of its name.
        self.told_apart: dict[str, Row] = {"ocm": head, "analytic": {"num_fit": size.num_fit}}
        self.pixels = {name: images.flatten(1) for name, images in real.items()}
        self.features = {name: extractor(images) for name, images in real.items()}

    def tried(self, path: str) -> list[Row]:
        """Return how every setting does on validation images, by samples of another seed.

        Of ours the analytic covariance stands for all.
        """
        size = self.size
        tasks = [Method(name) for name in others(path)] + [
            Method(name, "analytic") for name in PROCESSES
        ]
        rows: list[Row] = []
        for method in tasks:
            for spacing in spacings(path, method.name):
                K = method.steps_within(size.tuning_budget)
                rows += self._compared(
                    replace(method, spacing=spacing),
                    K,
                    size.tuning_samples,
                    TUNING_SEED,
                    "validation",
                )
        return rows

    def table(self, best: dict[str, Row]) -> list[Row]:
        """Return the rows of every method with its best setting; of the best at other budgets."""
        size, rows = self.size, []
        for budget in size.budgets:
            for method in _methods(best, every=budget == size.tuning_budget):
                K = method.steps_within(budget)
                found = self._compared(method, K, size.num_samples, SEED, "test")
                rows += [
                    {"budget": budget, **row}
                    for row in found
                    if row["noise_at_end"] == method.noise_at_end
                ]
        return rows

    def with_products(self, best: dict[str, Row]) -> list[Row]:
        """Return the same with covariances of products, and with the others for as many samples.

        The process is the one of ours that was best on validation images; the best two of the
        others stand beside it.
        """
        size, rows = self.size, []
        ours = [_as_chosen(_ours(best)[0], covariance) for covariance in COVARIANCES]
        others = [_as_chosen(row, "") for row in _others(best)[:2]]
        runs = [(m, m.steps_within(E)) for E in size.product_budgets for m in [*others, *ours]]
        # The products paid for out of the budget; one step says nothing of its noise.
        counted = [(m, m.steps_with_products_within(E)) for E in size.budgets for m in ours]
        runs += [(m, K) for m, K in counted if m.covariance in PRODUCTS and K > 1]
        for method, K in runs:
            found = self._compared(method, K, size.product_samples, SEED, "test")
            rows += [row for row in found if row["noise_at_end"] == method.noise_at_end]
        return rows

    def _compared(self, method: Method, K: int, count: int, seed: int, against: str) -> list[Row]:
        """Return the rows of a method: one, or two of both ends."""
        end = "-noise" if method.covariance in PRODUCTS and method.noise_at_end else ""
        words = [method.name, method.covariance or "none", method.spacing + end, f"K{K}"]
        slug = re.sub(r"[^\w.-]", "", "-".join(words).translate(_PLAIN))
        name = f"{against}-{slug}-{count}"
        size = self.size
        settings = {"classifier_steps": size.classifier_steps, "num_real": size.num_real}
        rows: list[Row] = self.parts.get(
            name,
            lambda: self._measured(method, K, count, seed, against, name),
            **settings,
            **self.told_apart.get(method.covariance, {}),
        )
        return rows

    def _measured(
        self, method: Method, K: int, count: int, seed: int, against: str, name: str
    ) -> list[Row]:
        batches: dict[bool, list[Tensor]] = {}
        for first in range(0, count, self.size.batch_size):
            number = min(self.size.batch_size, count - first)
            found = draw(self.checkpoint, method, K, number, seed, first)
            for noisy, images in found.items():
                batches.setdefault(noisy, []).append(unfolded(images))
        rows = []
        for noisy, parts in batches.items():
            images = torch.cat(parts).clamp(-1, 1)
            if not bool(torch.isfinite(images).all()):
                raise FloatingPointError(f"the samples of {method} hold NaN")
            kept: Row = {}
            if against == "test":
                shown = ((images[: self.size.num_shown] + 1) * 127.5).round().to(torch.uint8)
                file = self.parts.file(f"{name}-{int(noisy)}", ".safetensors")
                save_file({"images": shown.contiguous()}, file)
                kept = {"samples": file.name}
            ours = replace(method, noise_at_end=noisy)
            distances = {}
            for what, real, features in (
                ("features", self.features[against], self.extractor(images)),
                ("pixels", self.pixels[against], images.flatten(1)),
            ):
                distances[what] = frechet_distance(real, features)
                if against == "test":
                    distances[f"{what}_left_out"] = left_out(real, features, self.size.blocks)
            rows.append(
                {
                    "method": method.name,
                    "covariance": method.covariance,
                    "spacing": method.spacing,
                    "noise_at_end": noisy,
                    "K": K,
                    "evaluations": ours.evaluations_of(K),
                    "products": ours.products_of(K),
                    "num_samples": count,
                    **distances,
                    **kept,
                }
            )
        return rows


_PLAIN = str.maketrans({"λ": "lambda", "σ": "sigma", "β": "beta", "\u0303": "_tilde"})


def chosen(tried: Sequence[Row]) -> dict[str, Row]:
    """Return the setting of least distance of each method."""
    best: dict[str, Row] = {}
    for row in tried:
        name = row["method"]
        if name not in best or row["features"] < best[name]["features"]:
            best[name] = row
    return best


def _ours(best: dict[str, Row]) -> list[Row]:
    """Return the settings of ours, best first."""
    return sorted(
        (row for row in best.values() if row["covariance"]), key=lambda row: row["features"]
    )


def _others(best: dict[str, Row]) -> list[Row]:
    """Return the settings of others, best first."""
    return sorted(
        (row for row in best.values() if not row["covariance"]), key=lambda row: row["features"]
    )


def _as_chosen(setting: Row, covariance: str) -> Method:
    return Method(setting["method"], covariance, setting["spacing"], setting["noise_at_end"])


def _methods(best: dict[str, Row], *, every: bool) -> list[Method]:
    """Return the methods of a table: every one, or the best four of others and the best of ours."""
    return [
        *(_as_chosen(row, "") for row in _others(best)[: None if every else 4]),
        *(
            _as_chosen(row, covariance)
            for row in _ours(best)[: None if every else 1]
            for covariance in ("analytic", "ocm")
        ),
    ]


def left_out(real: Tensor, features: Tensor, blocks: int) -> list[float]:
    """Return the Fréchet distances without one block of the samples, for each block in turn.

    Samples of the same number begin with the same noise, and are in the same block.
    """
    keep = torch.arange(len(features)) % blocks
    return [frechet_distance(real, features[keep != block]) for block in range(blocks)]


# Likelihood


def _likelihoods(
    checkpoint: Checkpoint, images: Splits, size: Size, parts: Parts, head: Row
) -> list[Row]:
    denoiser = checkpoint.denoiser
    visits: dict[int, list[tuple[int, int]]] = {}
    for K in size.step_counts:
        # Whole, on the flow too: calibrations are fitted to whole timesteps.
        steps = [round(t) for t in even_timesteps(denoiser.schedule, K)]
        for s, t in reverse_steps(steps):
            visits.setdefault(t, []).append((K, int(s)))
    settings: Row = {
        name: getattr(size, name)
        for name in ("step_counts", "num_scored", "num_calibration", "coloring_probes", "num_fit")
    } | head
    totals: dict[tuple[str, int], Tensor] = {}
    for t in sorted(visits):
        made: Row = parts.get(
            f"bits-{t}",
            lambda t=t: bits_of_steps_from(checkpoint, images, t, visits[t], size),
            **settings,
        )
        for key, values in made.items():
            name, K = key.rsplit(" ", 1)
            totals[name, int(K)] = totals.get((name, int(K)), 0.0) + torch.tensor(values)
    rows = []
    for (name, K), values in totals.items():
        found = estimate(values)
        rows.append(
            {
                "covariance": name,
                "K": K,
                "bits_per_dim": found.mean,
                "standard_error": found.standard_error,
                "num_images": len(values),
            }
        )
    return rows


@torch.no_grad()
def bits_of_steps_from(
    checkpoint: Checkpoint,
    images: Splits,
    t: int,
    ends: Sequence[tuple[int, int]],
    size: Size,
) -> dict[str, list[float]]:
    """Return the terms of the bound that begin at t, by covariance and K: bits/dim of each image.

    Args:
        checkpoint: The denoiser, with what the covariances need.
        images: Test images are scored, validation images calibrated on.
        t: The timestep.
        ends: K and s of every step from t.
        size: How many of them.
    """
    denoiser = checkpoint.denoiser
    x0 = images.test[: size.num_scored]
    prediction = noisy_prediction(denoiser, x0, t, SEED)
    found: dict[str, list[float]] = {}
    noisy = [(K, s) for K, s in ends if s > 0]
    versions = {}
    if noisy:
        fitted_on = images.validation[: size.num_calibration]
        # The coloring first: it keeps the evaluation of which it takes products.
        for name in LIKELIHOODS[::-1]:
            covariance = covariance_of(checkpoint, name, SEED, size.coloring_probes)
            stated = covariance.at(prediction).bounded(X0_RANGE)
            versions[name] = stated
            weights = ocm.calibrate(denoiser, covariance, fitted_on, [t], seed=SEED).weights
            scale, shift = weights.at(None, t).tolist()
            versions[f"{name}, calibrated"] = stated.affine(scale, shift).bounded(X0_RANGE)
    for name in [f"{n}{end}" for n in LIKELIHOODS for end in ("", ", calibrated")]:
        for K, s in ends:
            if s == 0:
                decoded = decoder_term(None, prediction, x0, checkpoint.levels, "beta_tilde")
                terms = prior_term(denoiser, x0) + decoded
            else:
                terms = step_term(versions[name], prediction.towards(s), x0)
            found[f"{name} {K}"] = terms.double().tolist()
    return found
