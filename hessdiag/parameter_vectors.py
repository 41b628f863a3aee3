"""Trees of parameters as one vector: probes for them, and moments, without copies of the whole.

A network's parameters stay the tensors they are. Of what is as large as all of them, an estimate
holds the gradient, a probe, a product, the mean and the squared deviations, once each.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from hessdiag.checks import check_batch
from hessdiag.intervals import stood_in_for
from hessdiag.kernels import rademacher
from hessdiag.kernels.philox import (
    FEATURES_PER_SIGN_TILE,
    PROBES_PER_SIGN_TILE,
    STREAM_RADEMACHER,
    check_counter,
    philox,
)

Tree = Any
Leaves = list[Tensor]

# Groups of 8 features whose words are made at a time: 12 MB of temporaries.
_GROUPS_AT_A_TIME = 2**15


@dataclass(frozen=True, eq=False)
class ParameterTree:
    """The tensors of a tree, which share their memory with the user's, and its structure.

    Attributes:
        leaves: The tensors, detached, in the order of the tree.
        structure: What :mod:`torch.utils._pytree` needs to put them back.

    Example:
        >>> tree = ParameterTree.of({"w": torch.ones(2, 3), "b": torch.zeros(2)})
        >>> tree.size, [tuple(part.shape) for part in tree.split(torch.arange(8.0))]
        (8, [(2, 3), (2,)])
    """

    leaves: Leaves
    structure: pytree.TreeSpec

    @classmethod
    def of(cls, parameters: Tree) -> ParameterTree:
        """Return the tree of what a user gave.

        Raises:
            TypeError: If a leaf is no real floating-point tensor, or types or devices differ.
            ValueError: If there is none, or one holds NaN or infinity.
        """
        leaves, structure = pytree.tree_flatten(parameters)
        if not leaves:
            raise ValueError("parameters must hold at least one tensor, got none")
        for leaf in leaves:
            if not isinstance(leaf, Tensor):
                raise TypeError(f"parameters must hold tensors only, got {type(leaf).__name__}")
        if len({(leaf.dtype, leaf.device) for leaf in leaves}) > 1:
            kinds = sorted({f"{leaf.dtype} on {leaf.device}" for leaf in leaves})
            raise TypeError(f"parameters must be of one type on one device, got {', '.join(kinds)}")
        # One pass over the memory, and the check that says more where the sum is not finite.
        first = leaves[0]
        is_usual = first.is_floating_point() and first.itemsize > 1 and not first.is_meta
        is_usual = is_usual and all(leaf.layout is torch.strided for leaf in leaves)
        if not is_usual or not math.isfinite(sum(leaf.detach().sum() for leaf in leaves)):
            for leaf in leaves:
                check_batch("parameters", leaf.detach()[None])
        # A tensor made in inference mode can take part in no graph; a copy of it can.
        with torch.inference_mode(False):
            plain = [leaf.clone() if leaf.is_inference() else leaf.detach() for leaf in leaves]
        return cls(plain, structure)

    @property
    def size(self) -> int:
        """The number n of all entries."""
        return sum(leaf.numel() for leaf in self.leaves)

    @property
    def dtype(self) -> torch.dtype:
        """The type of every leaf."""
        return self.leaves[0].dtype

    @property
    def device(self) -> torch.device:
        """The device of every leaf."""
        return self.leaves[0].device

    def restore(self, leaves: Sequence[Any]) -> Tree:
        """Return what belongs to each leaf as a tree."""
        return pytree.tree_unflatten(list(leaves), self.structure)

    def split(self, flat: Tensor) -> Leaves:
        """Return views of a vector of n entries in the shapes of the leaves."""
        parts = flat.split([leaf.numel() for leaf in self.leaves])
        return [part.view(leaf.shape) for part, leaf in zip(parts, self.leaves, strict=True)]

    def requiring_grad(self) -> Leaves:
        """Return new leaves of a graph that share the memory of the parameters."""
        return [leaf.detach().requires_grad_() for leaf in self.leaves]

    def zeros_for_missing(self, values: Sequence[Tensor | None]) -> Leaves:
        """Return the derivatives of autograd, zeros in place of those that it left out."""
        pairs = zip(values, self.leaves, strict=True)
        return [torch.zeros_like(leaf) if value is None else value for value, leaf in pairs]


def sign_vectors(
    features: int, seed: Tensor, dtype: torch.dtype, sample: int = 0
) -> Callable[[int], Tensor]:
    """Return the function from a probe's number to its signs, of shape (features,).

    They are those of :func:`hessdiag.kernels.rademacher` for one sample. The random-number contract
    makes 16 probes at once. A CPU keeps them, packed in two bytes a feature, until another 16 are
    asked for; a GPU makes them again sooner than it would read them.

    Example:
        >>> signs = sign_vectors(3, torch.tensor(0), torch.float32)
        >>> torch.equal(signs(5), rademacher((6, 1, 3), 0)[5, 0])
        True
    """
    check_counter("the flat feature index", 0, features)
    if seed.is_cuda:
        return lambda probe: rademacher(
            (1, 1, features),
            seed,
            probe_offset=probe,
            sample_offset=sample,
            dtype=dtype,
            device=seed.device,
        )[0, 0]
    bytes_ = torch.arange(256)[:, None]
    table = ((bytes_ >> torch.arange(FEATURES_PER_SIGN_TILE) & 1) * 2 - 1).to(dtype)
    held: dict[int, Tensor] = {}

    def signs(probe: int) -> Tensor:
        tile, place = divmod(probe, PROBES_PER_SIGN_TILE)
        if tile not in held:
            held.clear()
            held[tile] = _packed_tile(features, seed, tile, sample)
        return table.index_select(0, held[tile][place].int()).flatten()[:features]

    return signs


def _packed_tile(features: int, seed: Tensor, tile: int, sample: int) -> Tensor:
    """Return the signs of 16 probes, uint8 of shape (16, groups of 8 features), bit d for d."""
    groups = -(-features // FEATURES_PER_SIGN_TILE)
    packed = torch.empty(PROBES_PER_SIGN_TILE, groups, dtype=torch.uint8)
    fixed = [torch.full((), number) for number in (sample, tile, STREAM_RADEMACHER)]
    for first in range(0, groups, _GROUPS_AT_A_TIME):
        last = min(groups, first + _GROUPS_AT_A_TIME)
        for place, word in enumerate(philox(seed, torch.arange(first, last), *fixed)):
            for byte in range(4):
                packed[4 * place + byte, first:last] = word >> 8 * byte & 0xFF
    return packed


class TreeMoments:
    """Mean and squared deviations of trees, by Welford's recurrence, one tree after the other.

    Args:
        deviations: Whether to keep squared deviations, without which there is no standard error.

    Attributes:
        count: Trees so far.
        mean: Their mean, a list of tensors in float32 or wider.
    """

    def __init__(self, *, deviations: bool) -> None:
        self.count = 0
        self.mean: Leaves = []
        self._keeps_deviations = deviations
        self._deviations: Leaves = []

    def add(self, left: Sequence[Tensor], right: Sequence[Tensor]) -> None:
        """Take in the products of two trees, entry by entry."""
        self.count += 1
        for i, (a, b) in enumerate(zip(left, right, strict=True)):
            dtype = torch.promote_types(a.dtype, torch.float32)
            y = a.to(dtype) * b.to(dtype)
            if self.count == 1:
                self.mean.append(y)
                if self._keeps_deviations:
                    self._deviations.append(torch.zeros_like(y))
                continue
            mean = self.mean[i]
            delta = y - mean
            mean.add_(delta, alpha=1.0 / self.count)
            if self._keeps_deviations:
                self._deviations[i].addcmul_(delta, y.sub_(mean))

    def stderr(self) -> Leaves:
        """Return the standard errors of the mean, infinite for one tree.

        An entry whose few products agree by luck takes part of the mean variance of its tensor, as
        in :func:`hessdiag.intervals.standard_error`.
        """
        if self.count < 2:
            return [torch.full_like(mean, torch.inf) for mean in self.mean]
        scale = 1.0 / (self.count * (self.count - 1))
        variances = (deviation * scale for deviation in self._deviations)
        return [stood_in_for(own, own.mean(), self.count).sqrt_() for own in variances]


def root_mean_square(leaves: Sequence[Tensor]) -> Tensor:
    """Return the root mean square over all entries of a tree, of shape ().

    Example:
        >>> root_mean_square([torch.tensor([3.0]), torch.tensor([[4.0, 0.0]])]).square()
        tensor(8.3333)
    """
    total = torch.stack([leaf.square().sum() for leaf in leaves]).sum()
    return (total / sum(leaf.numel() for leaf in leaves)).sqrt()
