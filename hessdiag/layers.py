"""Powers of per-sample gradients, layer by layer: sums over samples without the gradients.

The gradient of a layer's parameters for one sample follows from the layer's input a and from the
gradient g at its output: for a linear layer it is the outer product g a^T, whose squares sum to
(g^2) (a^2)^T over a batch (Dangel, Kunstner and Hennig, BackPACK, 2020). What is needed of the
network is then g alone, and no gradient of a weight is ever taken.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional

LayerSums = Callable[[nn.Module, Tensor, Tensor, int], dict[str, Tensor]]

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
    if rule is _convolution and module.padding_mode != "zeros":
        return None
    if rule is _embedding and (module.max_norm is not None or module.scale_grad_by_freq):
        return None
    if rule is _batch_norm and (module.training or module.running_mean is None):
        return None
    return rule


def _linear(module: nn.Module, a: Tensor, g: Tensor, power: int) -> dict[str, Tensor]:
    if a.dim() == 2:
        summed = g.pow(power).sum(0)
        return {"weight": summed.T @ a.pow(power), "bias": summed.sum(0)}
    weight = _outer_products(g.flatten(2, -2).transpose(2, 3), a.flatten(1, -2), power)
    return {"weight": weight, "bias": g.flatten(2, -2).sum(2).pow(power).sum((0, 1))}


def _convolution(module: nn.Module, a: Tensor, g: Tensor, power: int) -> dict[str, Tensor]:
    """The same as a linear layer on patches, for each group of channels."""
    dimensions = len(module.kernel_size)
    patches = _patches(module, a, dimensions)
    g = g.flatten(3)
    weights = [
        _outer_products(part, columns.transpose(1, 2), power)
        for part, columns in zip(
            g.chunk(module.groups, dim=2), patches.chunk(module.groups, dim=1), strict=True
        )
    ]
    return {
        "weight": torch.cat(weights).reshape(module.weight.shape),
        "bias": g.sum(3).pow(power).sum((0, 1)),
    }


def _patches(module: nn.Module, a: Tensor, dimensions: int) -> Tensor:
    """Return the patches that each output position sees, (N, channels * kernel, positions)."""
    sizes, padding = module.kernel_size, module._reversed_padding_repeated_twice
    a = functional.pad(a, padding)
    for axis, (size, stride, dilation) in enumerate(
        zip(sizes, module.stride, module.dilation, strict=True), start=2
    ):
        a = a.unfold(axis, dilation * (size - 1) + 1, stride)[..., ::dilation]
    # (N, channels, *positions, *kernel) -> (N, channels, *kernel, *positions)
    order = [0, 1, *range(2 + dimensions, 2 + 2 * dimensions), *range(2, 2 + dimensions)]
    return a.permute(order).flatten(2 + dimensions).flatten(1, 1 + dimensions)


def _outer_products(g: Tensor, a: Tensor, power: int) -> Tensor:
    """Sum powers of g a over m and N, from (m, N, o, T) and (N, T, i) to (o, i)."""
    m, samples, out, _ = g.shape
    inner = a.shape[-1]
    if power == 1:
        return torch.einsum("mnot,nti->oi", g, a)
    total = g.new_zeros(out, inner)
    step = max(1, _ENTRIES // max(1, m * out * inner))
    for first in range(0, samples, step):
        part, inputs = g[:, first : first + step], a[first : first + step]
        # A gradient of each of m vectors, side by side: one product of matrices for a sample.
        rows = part.transpose(0, 1).flatten(1, 2)
        total += torch.bmm(rows, inputs).square_().reshape(-1, out, inner).sum(0)
    return total


def _layer_norm(module: nn.Module, a: Tensor, g: Tensor, power: int) -> dict[str, Tensor]:
    normalised = functional.layer_norm(a, module.normalized_shape, eps=module.eps)
    last = len(module.normalized_shape)
    middle = tuple(range(2, g.dim() - last))
    return _affine(normalised, g, middle, power)


def _group_norm(module: nn.Module, a: Tensor, g: Tensor, power: int) -> dict[str, Tensor]:
    normalised = functional.group_norm(a, module.num_groups, eps=module.eps)
    return _affine(normalised, g, tuple(range(3, g.dim())), power)


def _batch_norm(module: nn.Module, a: Tensor, g: Tensor, power: int) -> dict[str, Tensor]:
    normalised = functional.batch_norm(a, module.running_mean, module.running_var, eps=module.eps)
    return _affine(normalised, g, tuple(range(3, g.dim())), power)


def _affine(x: Tensor, g: Tensor, middle: tuple[int, ...], power: int) -> dict[str, Tensor]:
    weight, bias = g * x, g
    if middle:
        weight, bias = weight.sum(middle), bias.sum(middle)
    return {"weight": weight.pow(power).sum((0, 1)), "bias": bias.pow(power).sum((0, 1))}


def _embedding(module: nn.Module, a: Tensor, g: Tensor, power: int) -> dict[str, Tensor]:
    """A row's gradient is the sum of g over the places of a sample that look it up."""
    rows, width = module.weight.shape
    samples = torch.arange(len(a), device=a.device).reshape(-1, *[1] * (a.dim() - 1))
    looked_up, place = torch.unique(samples * rows + a, return_inverse=True)
    summed = g.new_zeros(len(g), len(looked_up), width)
    summed.index_add_(1, place.flatten(), g.reshape(len(g), -1, width))
    weight = g.new_zeros(rows, width)
    weight.index_add_(0, looked_up % rows, summed.pow(power).sum(0))
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


def own_parameters(module: nn.Module, name: str) -> Iterator[tuple[str, str]]:
    """Yield the name of each of a module's own parameters, within it and within the network."""
    for short, _ in module.named_parameters(recurse=False):
        yield short, f"{name}.{short}" if name else short
