"""Roots of the Hessians of PyTorch's own losses, in closed form.

==========================  ==============================  ========================
loss                        block of the Hessian            root
==========================  ==============================  ========================
mean squared error          2 I                             elementwise
binary cross entropy        diag p (1 - p), p = sigmoid y   elementwise, of logits
cross entropy of classes    diag p - p p^T, p = softmax y   softmax
==========================  ==============================  ========================

each over the number of terms of a sample where the loss is their mean. Where anything is unusual,
there is none here, and it is found by products (:mod:`hessdiag.curvature`).
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from hessdiag.curvature import Root, elementwise_root, softmax_root
from hessdiag.descriptions import description_of

_FUNCTIONS: dict[Callable[..., Any], type[nn.Module]] = {
    functional.mse_loss: nn.MSELoss,
    functional.binary_cross_entropy_with_logits: nn.BCEWithLogitsLoss,
    functional.cross_entropy: nn.CrossEntropyLoss,
}


def known_loss(loss: Callable[..., Any]) -> Hashable | None:
    """Return what the closed form of a loss depends on, or None where none is known for it.

    Example:
        >>> known_loss(nn.MSELoss()) == known_loss(nn.MSELoss())
        True
        >>> known_loss(nn.CrossEntropyLoss(weight=torch.ones(3))) is None
        True
    """
    if any(loss is function for function in _FUNCTIONS):
        return loss
    if type(loss) not in _FUNCTIONS.values() or not isinstance(loss, nn.Module):
        return None
    if loss.reduction not in ("mean", "sum") or any(b is not None for b in loss.buffers()):
        return None
    return description_of(loss)


def closed_root(loss: Callable[..., Any], outputs: Tensor, targets: Any) -> Root | None:
    """Return the root of the Hessian of the losses of N samples, each alone.

    Args:
        loss: One that :func:`known_loss` knows.
        outputs: Of shape (N, ...).
        targets: Targets of the batch.

    Returns:
        None where outputs and targets are not as they usually are: they are of another shape, a
        class is ignored or out of range, or a number is not finite.

    Example:
        >>> root = closed_root(nn.MSELoss(), torch.zeros(1, 2), torch.ones(1, 2))
        >>> root.times(torch.eye(2)[:, None]).square().sum(0)
        tensor([[1., 1.]])
    """
    if not isinstance(targets, Tensor) or outputs.numel() == 0:
        return None
    if isinstance(loss, nn.Module):
        kind, mean = type(loss), loss.reduction == "mean"
    else:
        kind, mean = _FUNCTIONS[loss], True
    if kind is nn.CrossEntropyLoss:
        ignored = loss.ignore_index if isinstance(loss, nn.CrossEntropyLoss) else -100
        return _cross_entropy(outputs, targets, ignored, mean)
    if targets.shape != outputs.shape or not targets.is_floating_point():
        return None
    scale = 1.0 / outputs[0].numel() if mean else 1.0
    if not bool(torch.isfinite(outputs - targets).all()):
        return None
    if kind is nn.MSELoss:
        return elementwise_root(outputs.new_full((), 2.0 * scale), outputs.shape)
    return elementwise_root(scale * outputs.sigmoid() * (-outputs).sigmoid(), outputs.shape)


def _cross_entropy(outputs: Tensor, targets: Tensor, ignored: int, mean: bool) -> Root | None:
    if outputs.dim() < 2 or targets.dtype != torch.long:
        return None
    if targets.shape != (len(outputs), *outputs.shape[2:]):
        return None
    usual = (targets >= 0) & (targets < outputs.shape[1])
    if ignored >= 0:
        usual &= targets != ignored
    p = outputs.softmax(1)
    if not bool(usual.all() & torch.isfinite(p).all()):
        return None
    w = 1.0 / targets[0].numel() if mean else 1.0
    return softmax_root(p, torch.full_like(p[:, :1], w), 1)
