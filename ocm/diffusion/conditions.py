"""What samples are conditioned on, and classifier-free guidance."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ocm.diffusion.checks import check_number

# Labels, and other arguments of a backbone by name.
Arguments = tuple[Tensor | None, dict[str, Any]]


@dataclass(frozen=True, eq=False)
class Condition:
    """What samples are conditioned on, and how strongly; made by :meth:`Denoiser.condition`.

    Attributes:
        labels: Class of each sample, int64 of shape (B,), or None.
        guidance_scale: w above; 1 is the plain conditional model.
        null_label: The label that stands for no class; labels with another scale need it.
        tensors: Further keyword arguments of the backbone, by name: tensors of shape (B, ...) or
            (1, ...), dictionaries of them, and what is none, which is passed on as it is.
        null_tensors: Those that differ in the branch without a condition, needed with another
            scale: the embedding of an empty text.

    Raises:
        TypeError: If labels are no integers, or the scale is no number.
        ValueError: If there is guidance, and nothing that stands for no condition; or labels are
            not of shape (B,), or the scale is not finite.
    """

    labels: Tensor | None = None
    guidance_scale: float = 1.0
    null_label: int | None = None
    tensors: Mapping[str, Any] = field(default_factory=dict)
    null_tensors: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_number("guidance_scale", self.guidance_scale)
        check_labels(self.labels)
        if self.labels is None and not self.tensors:
            raise ValueError("labels or tensors must be given: there is no condition without them")
        unknown = sorted(set(self.null_tensors) - set(self.tensors))
        if unknown:
            raise ValueError(f"null_tensors must be named as tensors are, got {unknown}")
        if self.is_guided and self.labels is not None and self.null_label is None:
            raise ValueError(
                f"null_label must be given for guidance_scale = {self.guidance_scale}: the label "
                "that the model was trained with for no class"
            )
        if self.is_guided and self.tensors and not self.null_tensors:
            raise ValueError(
                f"null_tensors must be given for guidance_scale = {self.guidance_scale}: what "
                "takes the place of tensors without a condition, the embedding of an empty text say"
            )

        masks = {name for name in self.tensors if name.endswith(("attention_mask", "states_mask"))}
        if self.is_guided and "encoder_hidden_states" in self.null_tensors:
            missing = sorted(masks - set(self.null_tensors))
            if missing:
                raise ValueError(
                    f"null_tensors must have {missing[0]} too, that of the empty text: the one in "
                    "tensors belongs to another text"
                )

    @property
    def is_guided(self) -> bool:
        """Whether the backbone is evaluated without a condition too."""
        return self.guidance_scale != 1.0

    def arguments(self, like: Tensor) -> list[Arguments]:
        """Return labels and tensors of each evaluation, that without a condition first.

        Args:
            like: What the backbone is shown, a batch or several copies of one; floating-point
                tensors take its type.

        Raises:
            ValueError: If the batch is no multiple of the number of labels, or of rows of a tensor.
        """
        given: list[Arguments] = [(self.labels, dict(self.tensors))]
        if self.is_guided:
            null = self.labels
            if null is not None and self.null_label is not None:
                null = torch.full_like(null, self.null_label)
            given.insert(0, (null, _merged(self.tensors, self.null_tensors)))
        repeated: list[Arguments] = pytree.tree_map_only(
            Tensor, lambda values: _repeated(values, like), given
        )
        return repeated


def check_labels(labels: object) -> None:
    """Raise unless labels are None, or integers of shape (B,).

    Raises:
        TypeError: If they are no tensor of integers.
        ValueError: If they are of another shape.

    Example:
        >>> check_labels(torch.tensor([1.0]))
        Traceback (most recent call last):
        ...
        TypeError: labels must be a tensor of int64, got torch.float32
    """
    if labels is None:
        return
    if not isinstance(labels, Tensor) or labels.dtype not in (torch.int64, torch.int32):
        got = labels.dtype if isinstance(labels, Tensor) else type(labels).__name__
        raise TypeError(f"labels must be a tensor of int64, got {got}")
    if labels.dim() != 1:
        raise ValueError(f"labels must have shape (B,), got {tuple(labels.shape)}")


def check_rows(condition: Condition, count: int) -> None:
    """Raise unless labels and tensors are one for each of ``count`` samples, or one for all.

    Raises:
        TypeError: If ``condition`` is none.
        ValueError: If they are not.
    """
    if not isinstance(condition, Condition):
        raise TypeError(
            "condition must be made by Denoiser.condition(...), or None, got "
            f"{type(condition).__name__}"
        )
    for values in pytree.tree_leaves((condition.labels, condition.tensors)):
        if isinstance(values, Tensor) and values.dim() and len(values) not in (1, count):
            raise ValueError(
                "labels and tensors must be one for each sample, or one for all, got "
                f"{len(values)} for {count} samples"
            )


def _merged(given: Mapping[str, Any], nulls: Mapping[str, Any]) -> dict[str, Any]:
    """Return what is given, replaced by the null values, in nested dictionaries too."""
    merged = {**given, **nulls}
    for name, value in nulls.items():
        if isinstance(value, Mapping) and isinstance(given.get(name), Mapping):
            merged[name] = _merged(given[name], value)
    return merged


def joined(branches: list[Arguments]) -> Arguments | None:
    """Return the arguments of a batch of all branches; None where their shapes differ.

    Texts of two lengths, say, are then evaluated one after the other.
    """
    leaves = [pytree.tree_leaves(branch) for branch in branches]
    if any(map(_differ, leaves[0], leaves[-1])):
        return None
    together: Arguments = pytree.tree_map(_one_after_the_other, branches[0], branches[-1])
    return together


def _differ(first: Any, second: Any) -> bool:
    if isinstance(first, Tensor) and isinstance(second, Tensor) and first.dim() == second.dim() > 0:
        return first.shape[1:] != second.shape[1:]
    both_same = first is second or (type(first) is type(second) and bool(first == second))
    return not both_same


def _one_after_the_other(first: Any, second: Any) -> Any:
    is_batch = isinstance(second, Tensor) and second.dim() > 0
    return torch.cat([first, second]) if is_batch else second


def _repeated(values: Tensor, like: Tensor) -> Tensor:
    # Products may lay probes out as further samples of the batch.
    if values.is_floating_point():
        values = values.to(like.dtype)
    if values.dim() == 0 or len(values) == len(like):
        return values
    if len(values) == 0 or len(like) % len(values):
        raise ValueError(
            "labels and tensors must be one for each sample of a batch, or of each of its copies, "
            f"got {len(values)} for {len(like)} samples"
        )
    return values.repeat(len(like) // len(values), *[1] * (values.dim() - 1))


def guided(both: Tensor, guidance_scale: float) -> Tensor:
    """Return (1 - w) of the first half of a batch, without a condition, plus w of the second.

    Example:
        >>> guided(torch.tensor([1.0, 2.0]), 3.0)
        tensor([4.])
    """
    without, conditional = both.chunk(2)
    return (1.0 - guidance_scale) * without + guidance_scale * conditional
