"""Probes that are drawn once and kept, where the same ones serve many points.

A solver of an ordinary differential equation, say, evaluates a divergence hundreds of times, and
with adaptive steps it has to be one function of the point all along: probes that are kept make it
one, and cost nothing after the first time (Grathwohl et al., 2019).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, get_args

import torch
from torch import Tensor

from hessdiag.checks import check_batch, check_positive_int
from hessdiag.choosing import Request, checked_design, choose_start
from hessdiag.kernels.philox import Seed, check_counter, seed_tensor
from hessdiag.probes import ProbeDesign, check_fit

# The other names wait for products before they choose.
FixedName = Literal["rademacher", "normal", "orthogonal"]


@dataclass(frozen=True, eq=False)
class FixedProbes(ProbeDesign):
    """Probes of another design that are kept; :func:`fixed_probes` draws them.

    An estimator takes them as ``probes`` for x of the shape, dtype and device that they were drawn
    for. Its ``seed`` and ``sample_offset`` are left out then, or the same as here. ``max_probes``
    and ``probe_offset`` pick whole blocks of those that are kept, from number 0 on.

    Attributes:
        design: What they were drawn from, and so are blocks of.
        vectors: The probes, shape (M, B, ...).
        seed: The seed they were drawn with, an int64 tensor on their device.
        sample_offset: The number of the first sample they were drawn for.

    Raises:
        ValueError: In an estimator, if x, seed or sample_offset are others, or fewer are kept than
            ``max_probes`` asks for.

    Example:
        >>> import torch, hessdiag
        >>> x = torch.zeros(2, 3)
        >>> kept = hessdiag.fixed_probes(x, max_probes=8)
        >>> kept.vectors.shape
        torch.Size([8, 2, 3])
        >>> hessdiag.trace(torch.sin, x, max_probes=8, probes=kept).trace
        tensor([3., 3.])
    """

    design: ProbeDesign
    vectors: Tensor = field(repr=False)
    seed: Tensor = field(repr=False)
    sample_offset: int

    @property
    def is_exact(self) -> bool:
        """That of the design."""
        return self.design.is_exact

    @property
    def is_single(self) -> bool:
        """Whether one probe is kept, which is a block of its own and not exact."""
        return self.vectors.shape[0] == 1 and not self.is_exact

    def disturbing(self, sample_shape: tuple[int, ...], feature: int) -> Tensor | None:
        """Return that of the design."""
        return self.design.disturbing(sample_shape, feature)

    def block_size(self, sample_shape: tuple[int, ...]) -> int:
        """Return that of the design."""
        return self.design.block_size(sample_shape)

    def weight(self, sample_shape: tuple[int, ...]) -> float:
        """Return that of the design."""
        return self.design.weight(sample_shape)

    def draw(
        self,
        shape: tuple[int, ...],
        seed: Tensor,
        *,
        probe_offset: int,
        sample_offset: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> Tensor:
        """Return probes number probe_offset .. of those that are kept, a view of them.

        Raises:
            ValueError: If so many are not kept, or they were drawn for an x of another shape, dtype
                or device, or with another seed or sample_offset. Zero stands for theirs.
        """
        kept = self.vectors
        if shape[1:] != kept.shape[1:] or dtype != kept.dtype or device != kept.device:
            raise ValueError(
                f"probes that are kept must be drawn for an x like this one, {tuple(shape[1:])} of "
                f"{dtype} on {device}, got probes for {tuple(kept.shape[1:])} of {kept.dtype} on "
                f"{kept.device}"
            )
        if sample_offset not in (0, self.sample_offset):
            raise ValueError(
                f"sample_offset must be left out with probes that are kept, or theirs, "
                f"{self.sample_offset}, got {sample_offset}"
            )
        # To read a number off a GPU means to wait for it: not where the seed was left out.
        if seed is not self.seed and int(seed) not in (0, int(self.seed)):
            raise ValueError(
                f"seed must be left out with probes that are kept, or theirs, "
                f"{int(self.seed) % 2**64}, got {int(seed) % 2**64}"
            )
        self.check_kept(probe_offset, shape[0])
        end, count = probe_offset + shape[0], kept.shape[0]
        if end > count:  # an exact block goes round
            return kept.roll(-probe_offset, dims=0)[: shape[0]]
        return kept if shape[0] == count else kept[probe_offset:end]

    def check_kept(self, probe_offset: int, count: int) -> None:
        """Raise unless probes number probe_offset .. probe_offset + count - 1 are kept.

        Raises:
            ValueError: If they are not.
        """
        left = self.vectors.shape[0] - probe_offset
        if count > left and not self.is_exact:
            raise ValueError(
                f"max_probes must be at most {max(0, left)} from probe_offset={probe_offset} on, "
                f"since {len(self.vectors)} probes are kept, got {count}"
            )


def fixed_probes(
    x: Tensor,
    max_probes: int,
    probes: FixedName | ProbeDesign = "rademacher",
    *,
    seed: Seed = 0,
    sample_offset: int = 0,
    probe_offset: int = 0,
) -> FixedProbes:
    """Draw the probes of a design once, for estimates at many points of the shape of x.

    With them every estimator returns what it returns with ``probes``, ``seed``,
    ``sample_offset`` and ``probe_offset`` as given here.

    Args:
        x: A tensor of the shape, dtype and device of the points: (B, ...).
        max_probes: Most probes for a sample; whole blocks are drawn.
        probes: A design, or the name of one that does not look at products first.
        seed: As in :func:`hessdiag.estimate`.
        sample_offset: Number of the first sample.
        probe_offset: Number of the first probe, a multiple of the design's block.

    Returns:
        The probes, a design that any estimator takes as ``probes``.

    Raises:
        TypeError: If an argument is of the wrong type.
        ValueError: If a value is out of range, or no block fits ``max_probes``.

    Example:
        The divergence in the right-hand side of an ODE, and the velocity from the same evaluation:

        >>> import torch, hessdiag
        >>> velocity, z = torch.sin, torch.zeros(2, 3)
        >>> kept = hessdiag.fixed_probes(z, max_probes=1)
        >>> def right_hand_side(t, z):
        ...     J = hessdiag.Jacobian(velocity, z, mode="vjp")
        ...     divergence = hessdiag.trace(J, max_probes=1, probes=kept).trace
        ...     return J.output, divergence
        >>> right_hand_side(0.0, z)[1]
        tensor([3., 3.])
    """
    check_batch("x", x, differentiable=True)
    max_probes = check_positive_int("max_probes", max_probes)
    probe_offset = check_counter("probe_offset", probe_offset, max_probes)
    sample_offset = check_counter("sample_offset", sample_offset, len(x))
    if isinstance(probes, str) and probes not in get_args(FixedName):
        raise ValueError(
            f"probes must be a design or one of {', '.join(get_args(FixedName))}, whose probes do "
            f"not depend on products, got {probes!r}"
        )
    number = seed_tensor(seed, x.device)
    if isinstance(probes, str):
        request = Request(x, max_probes, None, False, False, number, sample_offset, probe_offset)
        design = choose_start(_no_products, request, probes, []).lanes[0].design
    else:
        design = checked_design(probes)
    total = check_fit(design, tuple(x.shape[1:]), max_probes, probe_offset)
    vectors = design.draw(
        (total, *x.shape),
        number,
        probe_offset=probe_offset,
        sample_offset=sample_offset,
        dtype=x.dtype,
        device=x.device,
    )
    return FixedProbes(design, vectors, number, sample_offset)


def _no_products(probes: Tensor) -> Tensor:
    raise AssertionError("a design that is drawn ahead takes no products")
