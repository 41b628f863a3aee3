"""Functions of trees of tensors as functions of one tensor, which is what products are taken of.

flat, restore = ravel(tree)
J = Jacobian(lambda x: ravel(score_fn(restore(x)))[0], flat)
restore(hessdiag.exact(J))    # a tree again
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

Tree = Any


def ravel(tree: Tree) -> tuple[Tensor, Callable[[Tensor], Tree]]:
    """Return a tree of tensors (B, ...) as one of shape (B, D), and the way back.

    Args:
        tree: Tuples, lists and dictionaries of tensors that share their first dimension, their
            type and their device.

    Returns:
        The tensor, and a function from tensors (..., D) to trees of
        ``(..., *sample_shape)``: a batch of points, or of several products for each.

    Raises:
        TypeError: If a leaf is no tensor, or types or devices differ.
        ValueError: If there is no leaf, or the first dimensions differ.

    Example:
        >>> import torch, hessdiag
        >>> flat, restore = hessdiag.ravel({"a": torch.ones(2, 3), "b": torch.zeros(2, 1, 2)})
        >>> flat.shape, restore(torch.zeros(7, 2, 5))["b"].shape
        (torch.Size([2, 5]), torch.Size([7, 2, 1, 2]))
    """
    leaves, structure = pytree.tree_flatten(tree)
    if not leaves:
        raise ValueError("the tree must hold at least one tensor, got none")
    for leaf in leaves:
        if not isinstance(leaf, Tensor):
            raise TypeError(f"the tree must hold tensors only, got {type(leaf).__name__}")
    kinds = sorted({f"{leaf.dtype} on {leaf.device}" for leaf in leaves})
    if len(kinds) > 1:
        raise TypeError(f"the tree must be of one type on one device, got {', '.join(kinds)}")
    batches = {leaf.shape[:1] for leaf in leaves}
    if len(batches) > 1 or () in batches:
        shapes = ", ".join(str(tuple(leaf.shape)) for leaf in leaves)
        raise ValueError(f"tensors of the tree must have shapes (B, ...) of one B, got {shapes}")
    shapes_of_samples = [leaf.shape[1:] for leaf in leaves]
    sizes = [shape.numel() for shape in shapes_of_samples]

    def restore(values: Tensor) -> Tree:
        if not isinstance(values, Tensor) or values.shape[-1:] != (sum(sizes),):
            got = tuple(values.shape) if isinstance(values, Tensor) else type(values).__name__
            raise ValueError(f"values must be a tensor of shape (..., {sum(sizes)}), got {got}")
        parts = values.split(sizes, dim=-1)
        return pytree.tree_unflatten(
            [
                part.reshape(*values.shape[:-1], *shape)
                for part, shape in zip(parts, shapes_of_samples, strict=True)
            ],
            structure,
        )

    batch = len(leaves[0])
    flat = [leaf.reshape(batch, size) for leaf, size in zip(leaves, sizes, strict=True)]
    return torch.cat(flat, dim=1), restore
