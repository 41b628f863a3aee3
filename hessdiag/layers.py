"""Powers of per-sample gradients, layer by layer: sums over samples without the gradients.

The gradient of a layer's parameters for one sample follows from the layer's input a and from the
gradient g at its output: for a linear layer it is the outer product g a^T, whose squares sum to
(g^2) (a^2)^T over a batch (Dangel, Kunstner and Hennig, BackPACK, 2020). What is needed of the
network is then g alone, and no gradient of a weight is ever taken.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

# m of them, one after the other or stacked.
Gradients = Tensor | Sequence[Tensor]
LayerSums = Callable[[Any, Tensor, Gradients, int], dict[str, Tensor]]
_Convolution = nn.Conv1d | nn.Conv2d | nn.Conv3d
_BatchNorm = nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d

# Entries of per-sample gradients held at a time.
_ENTRIES = 2**22


def sums_of(module: nn.Module) -> LayerSums | None:
    """Return how the sums of a layer are taken, or None where no rule is known for it.

    The function takes the module, its input of shape (N, ...), gradients at its output of shape
    (m, N, ...) and a power p, 1 or 2. It returns by name, for each of the module's own parameters,
    the sum over m and N of the p-th power of the gradient of that sample.

    Example:
        >>> layer = nn.Linear(2, 1)
        >>> a, g = torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.ones(1, 2, 1)
        >>> sums_of(layer)(layer, a, g, 2)
        {'weight': tensor([[10., 20.]]), 'bias': tensor([2.])}
    """
    # By type, since a class derived from a layer may do something else with its parameters.
    rule = _RULES.get(type(module))
    if rule is None:
        return None
    if isinstance(module, _Convolution) and module.padding_mode != "zeros":
        return None
    if isinstance(module, nn.Embedding) and (
        module.max_norm is not None or module.scale_grad_by_freq
    ):
        return None
    if isinstance(module, _BatchNorm) and (module.training or module.running_mean is None):
        return None
    return rule


def _linear(module: nn.Linear, a: Tensor, g: Gradients, power: int) -> dict[str, Tensor]:
    if a.dim() == 2:
        summed = _sum_of_powers(g, power)
        return {"weight": summed.T @ a.pow(power), "bias": summed.sum(0)}
    rows = [v.flatten(1, -2).transpose(1, 2) for v in g]
    return {
        "weight": _outer_products(rows, a.flatten(1, -2), power),
        "bias": _sum_of_powers([v.sum(2) for v in rows], power).sum(0),
    }


def _convolution(module: _Convolution, a: Tensor, g: Gradients, power: int) -> dict[str, Tensor]:
    """The same as a linear layer on patches, for each group of channels."""
    rows = [v.flatten(2) for v in g]
    columns = _patches(module, a).chunk(module.groups, dim=1)
    parts = zip(*(v.chunk(module.groups, dim=1) for v in rows), strict=True)
    weights = [
        _outer_products(part, inputs.transpose(1, 2), power)
        for part, inputs in zip(parts, columns, strict=True)
    ]
    return {
        "weight": torch.cat(weights).reshape(module.weight.shape),
        "bias": _sum_of_powers([v.sum(2) for v in rows], power).sum(0),
    }


def _patches(module: _Convolution, a: Tensor) -> Tensor:
    """Return the patches that each output position sees, (N, channels * kernel, positions)."""
    dimensions = len(module.kernel_size)
    a = functional.pad(a, module._reversed_padding_repeated_twice)
    for axis, (size, stride, dilation) in enumerate(
        zip(module.kernel_size, module.stride, module.dilation, strict=True), start=2
    ):
        a = a.unfold(axis, dilation * (size - 1) + 1, stride)[..., ::dilation]
    # (N, channels, *positions, *kernel) -> (N, channels, *kernel, *positions)
    order = [0, 1, *range(2 + dimensions, 2 + 2 * dimensions), *range(2, 2 + dimensions)]
    return a.permute(order).flatten(2 + dimensions).flatten(1, 1 + dimensions)


def _sum_of_powers(g: Gradients, power: int) -> Tensor:
    """Sum powers over m vectors."""
    if isinstance(g, Tensor):
        return g.pow(power).sum(0)
    total = g[0].pow(power)
    for v in g[1:]:
        total = total.add_(v) if power == 1 else total.addcmul_(v, v)
    return total


def _outer_products(g: Sequence[Tensor], a: Tensor, power: int) -> Tensor:
    """Sum powers of g a over m and N, from m of (N, o, T) and (N, T, i) to (o, i)."""
    samples, out, _ = g[0].shape
    inner = a.shape[-1]
    total = a.new_zeros(out, inner)
    step = max(1, _ENTRIES // max(1, out * inner))
    for first in range(0, samples, step):
        here = slice(first, first + step)
        for v in g:
            products = torch.bmm(v[here], a[here])
            total += (products if power == 1 else products.square_()).sum(0)
    return total


def _layer_norm(module: nn.LayerNorm, a: Tensor, g: Gradients, power: int) -> dict[str, Tensor]:
    last = len(module.normalized_shape)
    x = functional.layer_norm(a, module.normalized_shape, eps=module.eps)
    return _affine(x, g, tuple(range(1, a.dim() - last)), power)


def _group_norm(module: nn.GroupNorm, a: Tensor, g: Gradients, power: int) -> dict[str, Tensor]:
    x = functional.group_norm(a, module.num_groups, eps=module.eps)
    return _affine(x, g, tuple(range(2, a.dim())), power)


def _batch_norm(module: _BatchNorm, a: Tensor, g: Gradients, power: int) -> dict[str, Tensor]:
    x = functional.batch_norm(a, module.running_mean, module.running_var, eps=module.eps)
    return _affine(x, g, tuple(range(2, a.dim())), power)


def _affine(x: Tensor, g: Gradients, middle: tuple[int, ...], power: int) -> dict[str, Tensor]:
    """For weight * x + bias, both broadcast over ``middle``."""
    weights = [(v * x).sum(middle) if middle else v * x for v in g]
    biases = [v.sum(middle) if middle else v for v in g]
    return {
        "weight": _sum_of_powers(weights, power).sum(0),
        "bias": _sum_of_powers(biases, power).sum(0),
    }


def _embedding(module: nn.Embedding, a: Tensor, g: Gradients, power: int) -> dict[str, Tensor]:
    """A row's gradient is the sum of g over the places of a sample that look it up."""
    rows, width = module.weight.shape
    samples = torch.arange(len(a), device=a.device).reshape(-1, *[1] * (a.dim() - 1))
    looked_up, place = torch.unique(samples * rows + a, return_inverse=True)
    summed = [
        v.new_zeros(len(looked_up), width).index_add_(0, place.flatten(), v.reshape(-1, width))
        for v in g
    ]
    weight = summed[0].new_zeros(rows, width)
    weight.index_add_(0, looked_up % rows, _sum_of_powers(summed, power))
    if module.padding_idx is not None:
        weight[module.padding_idx] = 0.0
    return {"weight": weight}


_RULES: dict[type[nn.Module], LayerSums] = {
    nn.Linear: _linear,
    nn.Conv1d: _convolution,
    nn.Conv2d: _convolution,
    nn.Conv3d: _convolution,
    nn.LayerNorm: _layer_norm,
    nn.GroupNorm: _group_norm,
    nn.BatchNorm1d: _batch_norm,
    nn.BatchNorm2d: _batch_norm,
    nn.BatchNorm3d: _batch_norm,
    nn.Embedding: _embedding,
}
