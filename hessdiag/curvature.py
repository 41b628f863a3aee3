"""The Hessian of a loss in the outputs of a model: products with it, and its square roots.

A loss over a batch is a sum of losses of single samples, so its Hessian has a block for each
sample, of C x C for C outputs. A root S of a block, S S^T = H, turns a Gauss-Newton matrix into a
sum of squares of gradients. Three structures of H are recognised by a few products, none of which
is taken on trust:

=============  =============================================  ==================================
structure      losses                                         root
=============  =============================================  ==================================
elementwise    mean squared error, binary cross entropy, ...  the diagonal sqrt(h)
softmax        cross entropy over an axis, any weights        sqrt(w) L, L L^T = diag p - p p^T
dense          every other                                    by the eigenvectors of the block
=============  =============================================  ==================================
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from hessdiag.compat import explained, forward_mode_operators
from hessdiag.parameters import RandomNumbers, as_number, check_depends

Product = Callable[[Tensor], Tensor]
Seen = list[tuple[Tensor, Tensor]]

# Numbers of the blocks of a batch: 2 GB in float64.
_LARGEST = 2**28


class LossCurvature:
    """The gradient g and the Hessian H of a loss at ``outputs``: ``curvature(v)`` is H v.

    The loss is evaluated once and taken back twice. Where it has no second backward pass, its
    gradient is evaluated in forward mode for each product, with the same random numbers.

    Args:
        value: The loss, a function of outputs that returns a number.
        outputs: Where it is taken.

    Attributes:
        gradient: g, of the shape of ``outputs``.

    Raises:
        ValueError: If the loss is not a number, or does not depend on the outputs.

    Example:
        >>> curvature = LossCurvature(lambda y: y.pow(3).sum(), torch.tensor([1.0, 2.0]))
        >>> curvature.gradient, curvature(torch.tensor([1.0, 1.0]))
        (tensor([ 3., 12.]), tensor([ 6., 12.]))
    """

    def __init__(self, value: Callable[[Tensor], Tensor], outputs: Tensor) -> None:
        self._value = value
        self._random_numbers = RandomNumbers(outputs.device)
        with torch.inference_mode(False), torch.enable_grad(), self._random_numbers.same():
            self._leaf = outputs.detach().clone().requires_grad_()
            number = as_number("loss", value(self._leaf))
            check_depends("loss", number)
            (self._gradient,) = torch.autograd.grad(number, self._leaf, create_graph=True)
        self.gradient = self._gradient.detach()
        self._in_reverse = True

    def __call__(self, v: Tensor) -> Tensor:
        """Return H v.

        Raises:
            ValueError: If the loss has no second derivative in either mode.
        """
        if not self._gradient.requires_grad:  # the loss is linear in the outputs
            return torch.zeros_like(v)
        if self._in_reverse:
            try:
                return torch.autograd.grad(self._gradient, self._leaf, v, retain_graph=True)[0]
            except RuntimeError as error:
                if isinstance(error, torch.OutOfMemoryError) or not explained(error, "vjp", "loop"):
                    raise
                self._in_reverse = False
        gradient = torch.func.grad(self._value)
        with forward_mode_operators(), torch.no_grad(), self._random_numbers.same():
            product: Tensor = torch.func.jvp(gradient, (self._leaf.detach(),), (v,))[1]
        return product


@dataclass(frozen=True)
class Root:
    """A square root of a part of the Hessian of each sample: sign * S S^T.

    Attributes:
        sign: 1.0, or -1.0 for the directions of negative curvature.
        size: The number r of columns of S.
        times: From vectors of shape (m, N, r) to S times them, of shape (m, N, ...).
    """

    sign: float
    size: int
    times: Callable[[Tensor], Tensor]


def roots(H: Product, outputs: Tensor) -> list[Root]:
    """Return the roots of the Hessian of a loss at ``outputs``, of shape (N, ...).

    There is one, and another where the loss has negative curvature; none where it has no curvature.

    Args:
        H: Products with the Hessian, of vectors of the shape of ``outputs``.
        outputs: Outputs of N samples that do not meet in the loss.

    Raises:
        ValueError: If a product is not finite, or the blocks of a dense Hessian would fill more
            than 2 GB.

    Example:
        >>> outputs = torch.tensor([[1.0, 2.0]])
        >>> H = LossCurvature(lambda y: y.pow(3).sum() / 6, outputs)
        >>> (root,) = roots(H, outputs)
        >>> root.times(torch.eye(2)[:, None]).square().sum(0).round(decimals=4)
        tensor([[1., 2.]])
    """
    if outputs.numel() == 0:
        return []
    vectors = arbitrary(outputs, 2)
    products = torch.stack([H(v) for v in vectors])
    if not bool(torch.isfinite(products).all()):
        raise ValueError("loss must have finite second derivatives, and they hold NaN or infinity")
    seen = list(zip(vectors, products, strict=True))
    elementwise = _elementwise(seen, outputs.shape)
    if elementwise is not None:
        return elementwise
    for axis in sorted({1, outputs.dim() - 1} - {0, outputs.dim()}):
        softmax = _softmax(seen, outputs.softmax(axis), axis)
        if softmax is not None:
            return [softmax]
    return _dense(H, outputs)


def _elementwise(seen: Seen, shape: torch.Size) -> list[Root] | None:
    (first, by_first), (second, by_second) = seen
    h = by_first / first
    if not _equal(by_second, second * h, 64 * torch.finfo(h.dtype).eps):
        return None

    signs = [sign for sign in (1.0, -1.0) if bool((sign * h > 0).any())]
    return [elementwise_root((sign * h).clamp(min=0), shape, sign) for sign in signs]


def elementwise_root(h: Tensor, shape: torch.Size, sign: float = 1.0) -> Root:
    """Return the root for outputs of a shape that each have a second derivative, sign * h.

    Args:
        h: Of that shape or a number, and nowhere negative.
        shape: (N, ...).
        sign: That of the part.
    """
    root = h.sqrt()
    return Root(sign, shape[1:].numel(), lambda e: e.reshape(len(e), *shape) * root)


def _softmax(seen: Seen, p: Tensor, axis: int) -> Root | None:
    """Return the root if every position along ``axis`` has the block w (diag p - p p^T)."""
    (first, by_first), (second, by_second) = seen

    def block(v: Tensor) -> Tensor:
        return p * (v - (p * v).sum(axis, keepdim=True))

    eps = torch.finfo(p.dtype).eps
    plain = block(first)
    squares = plain.square().sum(axis, keepdim=True)
    # Where p is 1 and 0 to rounding there is no curvature to be seen.
    visible = squares > eps
    w = torch.where(visible, (plain * by_first).sum(axis, keepdim=True) / squares, 0.0)
    if bool((w < 0).any()) or not _equal(by_second, w * block(second), eps**0.75):
        return None
    return softmax_root(p, w, axis)


def softmax_root(p: Tensor, w: Tensor, axis: int) -> Root:
    """Return the root for blocks w (diag p - p p^T) along ``axis``.

    Args:
        p: Probabilities of shape (N, ...).
        w: Weights, with 1 in place of the size of ``axis``, and nowhere negative.
        axis: At least 1.
    """
    # The Cholesky factor of diag p - p p^T, with q_k the sum of p after k (Tanabe and Sagae, 1992):
    # L_kk = sqrt(p_k q_k / q_{k-1}) and L_jk = -p_j sqrt(p_k / (q_{k-1} q_k)) for j > k.
    p = p.movedim(axis, -1)
    before = p.flip(-1).cumsum(-1).flip(-1)
    after = torch.cat([before[..., 1:], torch.zeros_like(before[..., :1])], dim=-1)
    diagonal = (p * after / before).nan_to_num(0.0).sqrt()
    below = (p / before / after).nan_to_num(0.0, 0.0, 0.0).sqrt()
    scale = w.movedim(axis, -1).sqrt()
    columns = p.shape[-1] - 1

    def times(e: Tensor) -> Tensor:
        e = functional.pad(e.reshape(len(e), *p.shape[:-1], columns), (0, 1))
        terms = below * e
        product = scale * (diagonal * e - p * (terms.cumsum(-1) - terms))
        return product.movedim(-1, axis + 1)

    return Root(1.0, p[0, ..., 0].numel() * columns, times)


def _equal(a: Tensor, b: Tensor, tolerance: float) -> bool:
    """Say whether the products of every sample differ by no more than a part of the largest."""
    difference, size = (t.abs().reshape(len(a), -1).amax(1) for t in (a - b, a))
    return bool((difference <= tolerance * size).all())


def arbitrary(like: Tensor, count: int) -> Tensor:
    """Return ``count`` fixed vectors of the shape of ``like``, to compare products with.

    Their numbers are without a pattern, in (-1, 1) and never 0. No random generator moves on.
    """
    place = torch.arange(1, like.numel() + 1, dtype=torch.float64, device=like.device)
    number = torch.arange(count, dtype=torch.float64, device=like.device)
    values = torch.sin(place.square() * 0.7548776662466927 + number[:, None])
    return values.to(like.dtype).reshape(count, *like.shape)


def _dense(H: Product, outputs: Tensor) -> list[Root]:
    samples, size = len(outputs), outputs[0].numel()
    if samples * size**2 > _LARGEST:
        raise ValueError(
            f"the Hessian of loss couples the {size} outputs of a sample, and its {samples} blocks "
            "would fill more than 2 GB; pass smaller batches in data, or a loss that is "
            "elementwise or a cross entropy"
        )
    blocks = outputs.new_empty(samples, size, size)
    for c in range(size):
        unit = torch.zeros_like(outputs).reshape(samples, size)
        unit[:, c] = 1.0
        blocks[:, :, c] = H(unit.reshape(outputs.shape)).reshape(samples, size)
    values, vectors = torch.linalg.eigh(blocks)
    largest = values.abs().amax(dim=1, keepdim=True)
    noise = size * torch.finfo(values.dtype).eps * largest
    found = []
    for sign in (1.0, -1.0):
        kept = sign * values > noise
        columns = kept.any(dim=0)
        if bool(columns.any()):
            root = torch.where(kept, sign * values, 0.0).sqrt()[:, None, :] * vectors
            found.append(_dense_root(sign, root[:, :, columns], outputs.shape))
    return found


def _dense_root(sign: float, S: Tensor, shape: torch.Size) -> Root:
    return Root(
        sign,
        S.shape[-1],
        lambda e: torch.einsum("ncr,mnr->mnc", S, e).reshape(len(e), *shape),
    )
