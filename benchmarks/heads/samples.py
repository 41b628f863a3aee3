"""What samples of every method are worth at equal numbers of network evaluations.

Distances are taken in the features of two networks: a small classifier of the data set, and one
that was trained on ImageNet, which has seen none of these images.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from cifar10.parts import Parts
from fashion.training import unfolded
from harness import imagenet_features
from safetensors.torch import save_file
from torch import Tensor

from heads.methods import Method, methods_of, timesteps
from heads.models import Splits
from heads.sizes import SEED, DataSize, SampleSize
from ocm import data as datasets
from ocm.checkpoints.checkpoint import Checkpoint
from ocm.evaluation import classifier
from ocm.evaluation.environment import Row
from ocm.evaluation.features import FeatureExtractor, classifier_features

CLASSIFIER, IMAGENET = "classifier", "imagenet"
# Sets of the tables have the seeds from SEED on.
TUNING_SEED = 1000
_NUM_CLASSES = 10
# Of images that a network for ImageNet is asked about, in pixels.
_LEAST_SIDE = 16


@dataclass(frozen=True, eq=False)
class Reference:
    """Mean and covariance of features of real images, for many Fréchet distances to them.

    Attributes:
        mean: Shape (d,), float64.
        root: The symmetric root of the covariance, shape (d, d).
    """

    mean: Tensor
    root: Tensor

    @classmethod
    def of(cls, features: Tensor) -> Reference:
        """Return the moments of features, shape (n, d)."""
        values, vectors = torch.linalg.eigh(features.double().T.cov())
        root = vectors * values.clamp(min=0).sqrt() @ vectors.T
        return cls(features.double().mean(0), root)

    def distance(self, features: Tensor) -> float:
        """Return :func:`ocm.evaluation.distances.frechet_distance` to features, shape (n, d).

        The eigenvalues of the product of covariances are those of n by n numbers where n < d.
        """
        features = features.double()
        spread = (features - features.mean(0)) / (len(features) - 1) ** 0.5
        product = spread @ self.root
        few = len(features) < product.shape[1]
        values = torch.linalg.eigvalsh(product @ product.T if few else product.T @ product)
        traces = self.root.square().sum() + spread.square().sum()
        difference = (self.mean - features.mean(0)).square().sum()
        return (difference + traces - 2 * values.clamp(min=0).sqrt().sum()).item()


def leading(extractor: FeatureExtractor, images: Tensor, count: int) -> FeatureExtractor:
    """Return the first principal components of an extractor's features.

    A few hundred samples leave a Fréchet distance in 1,280 features to what is sampled by chance:
    200 training images of CIFAR-10 are then at 1277, and at 1369 with noise of 0.05. In the first
    64 components, with 62% of the variance, they are at 105 and 226.

    Args:
        extractor: Of the features.
        images: Whose covariance tells the components, in [-1, 1].
        count: Of components.
    """
    directions = torch.linalg.eigh(extractor(images).double().T.cov()).eigenvectors[:, -count:]
    return FeatureExtractor(
        f"the first {count} principal components, of {len(images)} validation images, of "
        f"{extractor.name}",
        count,
        lambda some: extractor(some).double() @ directions,
        extractor.batch_size,
    )


@dataclass(frozen=True, eq=False)
class Judges:
    """The networks that samples of one data set are compared in, and real images in them.

    Attributes:
        data: The data set.
        folded: Whether samples have to be unfolded.
        extractors: By name: :data:`CLASSIFIER`, and :data:`IMAGENET` if it is installed.
        validation: Validation images, by extractor.
        test: Test images, by extractor.
        described: Their names, the classifier's accuracy, and how far training images are.
    """

    data: str
    folded: bool
    extractors: Mapping[str, FeatureExtractor]
    validation: Mapping[str, Reference]
    test: Mapping[str, Reference]
    described: Row

    def validation_distance(self, images: Tensor) -> float:
        """Return the geometric mean over the networks of the distance to validation images.

        Settings are chosen by both: ImageNet's features pass saturated images, and those of a small
        classifier pass noisy ones.
        """
        found = [
            self.validation[name].distance(extractor(images))
            for name, extractor in self.extractors.items()
        ]
        return math.prod(found) ** (1 / len(found))

    def shown(self, images: Tensor) -> Tensor:
        """Return images as they look, in [-1, 1]."""
        return (unfolded(images) if self.folded else images).clamp(-1, 1)


def judges_of(
    data_name: str,
    data: Path,
    work: Path,
    images: Splits,
    data_size: DataSize,
    size: SampleSize,
    parts: Parts,
) -> Judges:
    """Train the classifier of a data set into ``work``, and look at the real images.

    Args:
        data_name: The data set.
        data: Its directory; digits have none.
        work: Where the classifier is kept.
        images: The same images as arrays, folded where the data set's are.
        data_size: How the data set was loaded.
        size: Everything else.
        parts: Where the accuracy and the distances of training images are kept.
    """

    def shown(some: Tensor) -> Tensor:
        return unfolded(some) if data_size.folded else some

    directory = work / data_name / "classifier"
    test = shown(images.test[: size.num_real])

    def train() -> Row:
        loaded = (
            datasets.digits()
            if data_name == "digits"
            else datasets.load(str(data), image_size=data_size.image_size)
        )
        labels, test_labels = loaded.train_labels, loaded.test_labels
        assert labels is not None
        assert test_labels is not None
        trained = classifier.train_classifier(
            shown(images.train[:]),
            labels[: len(images.train)],
            _NUM_CLASSES,
            num_features=size.num_features,
            num_steps=size.classifier_steps,
            seed=SEED,
        )
        classifier.save(trained, directory)
        return {"accuracy": classifier.accuracy(trained, test, test_labels[: size.num_real])}

    settings = {"num_real": size.num_real, "classifier_steps": size.classifier_steps}
    described: Row = parts.get(
        f"classifier-{data_name}", train, num_features=size.num_features, **settings
    )
    extractors = {CLASSIFIER: classifier_features(classifier.load(directory))}
    validation = shown(images.validation[-size.num_real :])
    absent = imagenet_features.missing()
    if data_size.image_size < _LEAST_SIDE:
        absent = f"Images of {data_size.image_size} pixels are too small for ImageNet features."
    if not absent:
        network = imagenet_features.imagenet_features()
        extractors[IMAGENET] = leading(network, validation, size.num_components)
    references = {name: Reference.of(extractor(test)) for name, extractor in extractors.items()}

    def floor() -> Row:
        found: dict[str, list[float]] = {name: [] for name in extractors}
        for k in range(size.num_sets):
            some = shown(images.train[k * size.num_samples : (k + 1) * size.num_samples])
            for name, extractor in extractors.items():
                found[name].append(references[name].distance(extractor(some)))
        return _figures(found)

    names = {name: extractor.name for name, extractor in extractors.items()}
    training = parts.get(
        f"training-images-{data_name}",
        floor,
        features=names,
        num_samples=size.num_samples,
        num_sets=size.num_sets,
        **settings,
    )
    return Judges(
        data_name,
        data_size.folded,
        extractors,
        {name: Reference.of(extractor(validation)) for name, extractor in extractors.items()},
        references,
        described | {"features": names, "missing": absent, "training_images": training},
    )


def sample_rows(
    checkpoint: Checkpoint,
    path: str,
    judges: Judges,
    size: SampleSize,
    parts: Parts,
    heads: Sequence[str] = ("ocm", "ml"),
) -> list[Row]:
    """Draw samples of one denoiser by every method, and return their distances to test images.

    Each method's spacing is the one of least :meth:`Judges.validation_distance`, by samples of
    another seed. At other numbers of evaluations than ``size.all_at`` the methods are drawn that
    did best there.

    Args:
        checkpoint: The denoiser with its heads, as the network sees the images.
        path: "linear", "cosine" or "flow".
        judges: Of the data set.
        size: Numbers of samples and evaluations.
        parts: Where finished cells are kept, with the first samples of each beside them.
        heads: Names of learned covariances of the checkpoint.

    Returns:
        Rows of data, path, method, covariance, spacing, evaluations, K and num_samples; for each
        extractor its Fréchet distance, the mean over sets, ``NAME_standard_error`` and
        ``NAME_sets``; ``is_ours``, ``validation`` (the distance that settings were chosen by) and
        ``samples``, the file of the first samples.

    Raises:
        FloatingPointError: If a sample is not finite.
        ValueError: If the checkpoint lacks a head.
    """
    for head in heads:
        if head not in checkpoint.learned:
            raise ValueError(
                f"heads must be of the checkpoint, which has {sorted(checkpoint.learned)}, got "
                f"{head!r}"
            )
    run = _Run(checkpoint, path, judges, size, parts)
    best = [run.best_spacing(method) for method in methods_of(path, heads)]
    best.sort(key=lambda pair: pair[1])
    everywhere = kept(best, size)
    rows = []
    for evaluations in sorted(size.evaluations, key=lambda E: E != size.all_at):
        for method, distance in best:
            if evaluations == size.all_at or method in everywhere:
                rows.append(run.row(method, evaluations) | {"validation": distance})
    return rows


def kept(best: Sequence[tuple[Method, float]], size: SampleSize) -> list[Method]:
    """Return the methods that are drawn at every number of evaluations, from all, best first.

    Of others the first ones; of ours the first processes, each with every head.
    """
    others = [method for method, _ in best if not method.is_ours][: size.kept_others]
    processes = list(dict.fromkeys(method.name for method, _ in best if method.is_ours))
    ours = [m for m, _ in best if m.is_ours and m.name in processes[: size.kept_ours]]
    return [*others, *ours]


_PLAIN = str.maketrans({"λ": "lambda", "σ": "sigma", "η": "eta"})


@dataclass(frozen=True, eq=False)
class _Run:
    """One denoiser's samples."""

    checkpoint: Checkpoint
    path: str
    judges: Judges
    size: SampleSize
    parts: Parts

    def best_spacing(self, method: Method) -> tuple[Method, float]:
        """Return the method with the spacing of least distance to validation images alone."""
        size = self.size

        def tried() -> Row:
            found = {}
            for spacing in method.spacings:
                one = replace(method, spacings=(spacing,))
                images = self._drawn(one, size.all_at, size.tuning_samples, TUNING_SEED)
                found[spacing] = self.judges.validation_distance(images)
            return found

        row: Row = self._part("tried", method, tried, num_samples=size.tuning_samples)
        spacing = min(row, key=lambda name: row[name])
        return replace(method, spacings=(spacing,)), row[spacing]

    def row(self, method: Method, evaluations: int) -> Row:
        """Return the distances of all sets of a method to test images."""
        size, extractors = self.size, self.judges.extractors

        def cell() -> Row:
            found: dict[str, list[float]] = {name: [] for name in extractors}
            for k in range(size.num_sets):
                images = self._drawn(method, evaluations, size.num_samples, SEED + k)
                if k == 0:
                    pixels = ((images[: size.num_shown] + 1) * 127.5).round().to(torch.uint8)
                    self.parts.directory.mkdir(parents=True, exist_ok=True)
                    save_file({"images": pixels.contiguous()}, file)
                for name, extractor in extractors.items():
                    features = extractor(images)
                    found[name].append(self.judges.test[name].distance(features))
            return _figures(found)

        name = f"{evaluations}-{method.spacings[0]}"
        file = self.parts.file(self._name(name, method), ".safetensors")
        figures: Row = self._part(
            name,
            method,
            cell,
            num_samples=size.num_samples,
            num_sets=size.num_sets,
            num_shown=size.num_shown,
        )
        return {
            "data": self.judges.data,
            "path": self.path,
            "method": method.name,
            "covariance": method.covariance,
            "is_ours": method.is_ours,
            "spacing": method.spacings[0],
            "evaluations": evaluations,
            "K": method.steps_within(evaluations),
            "num_samples": size.num_samples,
            **figures,
            "samples": file.name,
        }

    def _part(self, what: str, method: Method, make: Any, **settings: Any) -> Any:
        checkpoint, size = self.checkpoint, self.size
        learned = checkpoint.learned.get(method.covariance)
        return self.parts.get(
            self._name(what, method),
            make,
            spacings=method.spacings,
            all_at=size.all_at,
            denoiser=_digest(checkpoint.denoiser.backbone),
            head=_digest(learned.head) if method.is_ours and learned is not None else "",
            features=self.judges.described["features"],
            num_real=size.num_real,
            **settings,
        )

    def _name(self, what: str, method: Method) -> str:
        words = ["samples", self.judges.data, self.path, method.name, method.covariance, what]
        return re.sub(r"[^\w.]+", "-", " ".join(words).translate(_PLAIN))

    def _drawn(self, method: Method, evaluations: int, count: int, seed: int) -> Tensor:
        """Return images as they look, from ``count`` samples of a seed."""
        checkpoint, batches = self.checkpoint, []
        K = method.steps_within(evaluations)
        steps = timesteps(checkpoint.denoiser.schedule, method.spacings[0], K)
        for first in range(0, count, self.size.batch_size):
            number = min(self.size.batch_size, count - first)
            shape = (number, *checkpoint.image_shape)
            batches.append(method.draw(checkpoint, steps, shape, seed, first))
        samples = torch.cat(batches)
        if not bool(torch.isfinite(samples).all()):
            raise FloatingPointError(
                f"samples of {method.name} {method.covariance}, {evaluations} evaluations, hold "
                "NaN or infinity"
            )
        return self.judges.shown(samples)


def _figures(found: Mapping[str, Sequence[float]]) -> Row:
    """Return mean and standard error over sets, and the figures of each."""
    row: Row = {}
    for name, values in found.items():
        sets = torch.tensor(values, dtype=torch.float64)
        row[name] = sets.mean().item()
        row[f"{name}_standard_error"] = (sets.std() / len(sets) ** 0.5).item()
        row[f"{name}_sets"] = list(values)
    return row


def _digest(module: torch.nn.Module) -> str:
    digest = hashlib.sha256()
    for name, value in module.state_dict().items():
        digest.update(name.encode() + value.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
