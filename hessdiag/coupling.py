"""Whether a function acts on each sample of a batch alone.

Without coupling a product is linear in each sample by itself: with a factor s_b for every sample::

    J^T (s v) - s J^T v = sum_c (s_c - s_b) J_cb^T v_c = 0    for every sample b.

Two products with normal v and distinct factors show coupling of any two samples, however few they
are. Rounding may look like it, so what they show is confirmed by products in which some samples
are zero and must stay so to the bit: sets of samples of which none contains another (Sperner,
1928), so that each sample is zero in one where any other is not.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import combinations, islice
from math import comb

import torch
from torch import Tensor

Products = Callable[[Tensor], Tensor]
_SEED = 20070501


def check_samples_alone(products: Products, x: Tensor) -> None:
    """Raise if ``score_fn`` couples the samples of a batch, by two products more.

    Unit vectors in every sample at once give each sample its own row or column only as long as no
    sample sees another. Coupling that is smaller than the rounding of the products is not seen.

    Args:
        products: From probes (m, B, ...) to products of the same shape.
        x: A tensor of the shape, type and device of one probe.

    Raises:
        ValueError: If it does.

    Example:
        >>> x = torch.tensor([[1.0, 2.0], [3.0, 5.0]])
        >>> from hessdiag import Jacobian
        >>> J = Jacobian(lambda x: x - x.mean(dim=0), x)
        >>> check_samples_alone(J.products, x)    # doctest: +ELLIPSIS
        Traceback (most recent call last):
        ...
        ValueError: score_fn must act on each sample alone, ...
    """
    if len(x) < 2 or x.numel() == 0:
        return
    probe, factors = _normal(x), _factors(x)
    plain, scaled = products(torch.stack([probe, factors * probe]))
    _confirm(products, probe, plain, scaled, factors)


def check_product_alone(products: Products, probe: Tensor, product: Tensor) -> None:
    """Raise if what one sample sees of another is part of ``product``, that of ``probe``.

    Args:
        products: As in :func:`check_samples_alone`.
        probe: Shape (B, ...).
        product: Its product.

    Raises:
        ValueError: If it is.
    """
    if len(probe) < 2 or probe.numel() == 0:
        return
    factors = _factors(probe)
    _confirm(products, probe, product, products((factors * probe)[None])[0], factors)


def _confirm(
    products: Products, probe: Tensor, plain: Tensor, scaled: Tensor, factors: Tensor
) -> None:
    if not bool(_seem_coupled(plain, scaled, factors)):
        return
    normal = _normal(probe)
    for zero in _sets(len(probe), probe.device):
        masked = normal.clone()
        masked[zero] = 0.0
        rest = products(masked[None])[0][zero]
        # Where a derivative is infinite, zero times it is NaN, which says nothing of coupling.
        if bool(((rest != 0) & ~rest.isnan()).any()):
            raise ValueError(
                "score_fn must act on each sample alone, and it couples the samples of a batch; "
                "put modules like BatchNorm in eval mode, or pass one sample at a time"
            )


def _seem_coupled(plain: Tensor, scaled: Tensor, factors: Tensor) -> Tensor:
    """Say whether factors do not come out of the products, but for rounding."""
    expected = factors * plain
    error, size = _largest(scaled - expected), _largest(expected)
    rounding = float(torch.finfo(plain.dtype).eps ** 0.75)
    return (error > rounding * size).any()


def _largest(values: Tensor) -> Tensor:
    """Return the largest absolute value of each sample."""
    return values.abs().reshape(len(values), -1).amax(dim=1)


def _sets(batch: int, device: torch.device) -> list[Tensor]:
    """Return the fewest sets of samples, as masks, so that any is in one without any other."""
    number = next(n for n in range(1, batch + 2) if comb(n, n // 2) >= batch)
    members = torch.zeros(number, batch, dtype=torch.bool)
    for sample, sets in enumerate(islice(combinations(range(number), number // 2), batch)):
        members[list(sets), sample] = True
    return list(members.to(device))


def _normal(x: Tensor) -> Tensor:
    generator = torch.Generator(x.device).manual_seed(_SEED)
    return torch.randn(x.shape, generator=generator, dtype=x.dtype, device=x.device)


def _factors(x: Tensor) -> Tensor:
    """Return a factor in [0, 1] for each sample, all of them different, in a fixed random order."""
    generator = torch.Generator().manual_seed(_SEED)
    order = torch.randperm(len(x), generator=generator).to(x.device, x.dtype)
    factors: Tensor = order / (len(x) - 1)
    return factors.reshape(-1, *[1] * (x.dim() - 1))
