"""Orthonormal bases F in which a diagonal is taken: diag(F J F^T)."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from hessdiag.checks import check_positive_int
from hessdiag.products import Products

_MOST_KEPT = 16
_KEPT: dict[tuple[int, torch.dtype, torch.device], Tensor] = {}
_FAKE = torch._C._TorchDispatchModeKey.FAKE


@dataclass(frozen=True)
class Basis:
    """An orthonormal change of basis.

    Attributes:
        analyse: From ``(..., *sample_shape)`` to coefficients of the same shape: F.
        synthesise: Back: F^T, its inverse.
        num_axes: How many axes a sample must have, so that no axis of the batch is mixed.

    Example:
        >>> import torch, hessdiag
        >>> flip = hessdiag.Basis(lambda x: x.flip(-1), lambda x: x.flip(-1))
        >>> flip.analyse(torch.arange(3))
        tensor([2, 1, 0])
    """

    analyse: Callable[[Tensor], Tensor]
    synthesise: Callable[[Tensor], Tensor]
    num_axes: int = 0


def check_basis(basis: Basis | None, x: Tensor) -> None:
    """Raise unless ``basis`` is None or one of the samples of x.

    Raises:
        TypeError: If it is neither.
        ValueError: If samples have fewer axes than it mixes.

    Example:
        >>> check_basis(dct(), torch.zeros(2, 3))
        Traceback (most recent call last):
        ...
        ValueError: basis must mix at most the 1 axes of a sample of x, got one of 2: dct(1) say
    """
    if basis is None:
        return
    if not isinstance(basis, Basis):
        raise TypeError(f"basis must be a hessdiag.Basis or None, got {type(basis).__name__}")
    axes = x.dim() - 1
    if basis.num_axes > axes:
        raise ValueError(
            f"basis must mix at most the {axes} axes of a sample of x, got one of "
            f"{basis.num_axes}" + (f": dct({axes}) say" if axes else "")
        )


def dct(num_axes: int = 2) -> Basis:
    """Return the orthonormal discrete cosine transform (type II) along the last axes.

    F_kn = sqrt((2 - [k = 0]) / N) cos(pi (n + 1/2) k / N) along each axis of length N.

    Args:
        num_axes: Number of axes, counted from the last; 2 for images.

    Raises:
        TypeError: If ``num_axes`` is no int.
        ValueError: If it is below 1.

    Example:
        >>> import torch, hessdiag
        >>> basis = hessdiag.dct()
        >>> basis.analyse(torch.ones(1, 1, 2, 2)).round(decimals=3) + 0.0
        tensor([[[[2., 0.],
                  [0., 0.]]]])
    """
    num_axes = check_positive_int("num_axes", num_axes)
    return Basis(
        lambda x: _along_last_axes(x, num_axes, transpose=False),
        lambda x: _along_last_axes(x, num_axes, transpose=True),
        num_axes,
    )


def _along_last_axes(x: Tensor, num_axes: int, *, transpose: bool) -> Tensor:
    if not isinstance(x, Tensor) or not x.is_floating_point() or x.dim() < num_axes:
        got = f"{x.dtype} of shape {tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
        raise TypeError(f"x must be a floating-point tensor of {num_axes} axes or more, got {got}")
    for axis in range(-num_axes, 0):
        F = dct_matrix(x.shape[axis], x.dtype, x.device)
        x = torch.movedim(torch.movedim(x, axis, -1) @ (F if transpose else F.T), -1, axis)
    return x


def dct_matrix(length: int, dtype: torch.dtype, device: torch.device | str) -> Tensor:
    """Return F of :func:`dct` along one axis, shape (length, length); a few are kept.

    Example:
        >>> F = dct_matrix(4, torch.float64, torch.device("cpu"))
        >>> torch.allclose(F @ F.T, torch.eye(4, dtype=torch.float64))
        True
    """
    device = torch.device(device)
    if _is_recorded(device):
        return _computed(length, dtype, device)
    key = length, dtype, device
    if key in _KEPT:
        return _KEPT[key]
    with torch.inference_mode(False):  # no gradient could pass what is made inside of it
        F = _computed(length, dtype, device)
    if not torch._C._functorch.is_functorch_wrapped_tensor(F):  # by a transform of torch.func
        if len(_KEPT) == _MOST_KEPT:
            _KEPT.clear()
        _KEPT[key] = F
    return F


def _is_recorded(device: torch.device) -> bool:
    """Return whether what is made now is part of a graph, compiled or captured, or fake."""
    return (
        torch.compiler.is_compiling()
        or torch._C._get_dispatch_mode(_FAKE) is not None
        # A captured graph may outlive what is kept here.
        or (device.type == "cuda" and torch.cuda.is_current_stream_capturing())
    )


def _computed(length: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    if length == 0:
        return torch.empty(0, 0, dtype=dtype, device=device)
    place = torch.arange(length, dtype=torch.float64, device=device)
    F = torch.cos(math.pi / length * place[:, None] * (place + 0.5)) * math.sqrt(2.0 / length)
    F[0] /= math.sqrt(2.0)
    return F.to(dtype)


def in_basis(products: Products, basis: Basis) -> Products:
    """Return products with F J F^T, or its transpose, from those with J or its transpose.

    Example:
        >>> flip = Basis(lambda x: x.flip(-1), lambda x: x.flip(-1))
        >>> in_basis(lambda v: v * torch.tensor([1.0, 2.0]), flip)(torch.ones(1, 1, 2))
        tensor([[[2., 1.]]])
    """

    def transformed(probes: Tensor) -> Tensor:
        return basis.analyse(products(basis.synthesise(probes)))

    return transformed
