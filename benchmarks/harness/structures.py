"""Jacobians of many structures, to see whether a choice of probes can lose against Rademacher."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional

from hessdiag.cells import cell_numbers
from hessdiag.choosing import Request, choose_start
from hessdiag.kernels.philox import seed_tensor
from hessdiag.piloting import Plan, plan
from hessdiag.probes import BalancedColoring, Partition, Rademacher, UnitVectors

Shape = tuple[int, ...]


def _dense(size: int, seed: int) -> Tensor:
    return torch.randn(size, size, generator=torch.Generator().manual_seed(seed))


def _kernel(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _of(function: Callable[[Tensor], Tensor], shape: Shape) -> Tensor:
    """The matrix of a linear function of samples."""
    size = math.prod(shape)
    return function(torch.eye(size).reshape(size, *shape)).reshape(size, size).T.contiguous()


def _places(shape: Shape) -> Tensor:
    return torch.cartesian_prod(*(torch.arange(size) for size in shape)).reshape(-1, len(shape))


def _where(shape: Shape, coupled: Callable[[Tensor, Tensor], Tensor], seed: int) -> Tensor:
    """Random numbers where two features are coupled; places are (D, 1, axes) and (1, D, axes)."""
    places = _places(shape)
    return _dense(len(places), seed) * coupled(places[:, None], places[None]).float()


def _decaying(shape: Shape, power: float, seed: int) -> Tensor:
    """Random numbers times (1 + distance)^-power, channels lying at one place."""
    places = _places(shape).float()
    if len(shape) > 2:
        places = places[:, 1:]
    return _dense(len(places), seed) * (1 + torch.cdist(places, places)) ** -power


def _convolution(shape: Shape, size: int, dilation: int, seed: int, groups: int = 1) -> Tensor:
    weight = _kernel(seed, shape[0], shape[0] // groups, size, size)
    pad = dilation * (size // 2)
    return _of(
        lambda x: functional.conv2d(x, weight, padding=pad, dilation=dilation, groups=groups),
        shape,
    )


def _moves(shape: Shape, offsets: Sequence[tuple[int, int]], seed: int) -> Tensor:
    """Features of an image that lie at one of some offsets from one another."""
    moves = torch.tensor([*offsets, *((-a, -b) for a, b in offsets), (0, 0)])

    def coupled(one: Tensor, other: Tensor) -> Tensor:
        difference = (one - other)[..., 1:]
        return (difference[..., None, :] == moves).all(-1).any(-1)

    return _where(shape, coupled, seed)


def _haar(size: int, seed: int) -> Tensor:
    """W^T diag(random) W with the Haar wavelets W along one axis."""
    W = torch.ones(1, 1)
    while len(W) < size:
        average = torch.kron(W, torch.tensor([1.0, 1.0]))
        detail = torch.kron(torch.eye(len(W)), torch.tensor([1.0, -1.0]))
        W = torch.cat([average, detail]) / 2**0.5
    return W.T @ (_kernel(seed, size)[:, None] * W)


def known_structures() -> dict[str, tuple[Shape, Tensor]]:
    """Shapes and Jacobians on which fixed lattices, rows that measure or odd numbers did lose."""
    image, colour = (1, 16, 16), (3, 16, 16)
    video = _kernel(5, 2, 2, 3, 3, 3)
    audio, filters = _kernel(10, 2, 2, 3), _kernel(9, 4, 4, 5)

    def harmonic(one: Tensor, other: Tensor) -> Tensor:
        low, high = one[..., 1] + 1, other[..., 1] + 1
        return (one[..., 2] == other[..., 2]) & ((low % high == 0) | (high % low == 0))

    def of_one_parity(one: Tensor, other: Tensor) -> Tensor:
        return (one.sum(-1) - other.sum(-1)) % 2 == 0

    def in_one_patch(one: Tensor, other: Tensor) -> Tensor:
        return (one[..., 1:] // 4 == other[..., 1:] // 4).all(-1)

    return {
        "dilated convolution, 4": (image, _convolution(image, 3, 4, 0)),
        "softmax over the last axis": (
            (4, 8, 8),
            _where((4, 8, 8), lambda a, b: (a[..., :2] == b[..., :2]).all(-1), 1),
        ),
        "row coupling": (image, _where(image, lambda a, b: a[..., 1] == b[..., 1], 2)),
        "harmonics": ((1, 32, 16), _where((1, 32, 16), harmonic, 3)),
        "checkerboard": (
            image,
            _decaying(image, 1.0, 4) * _where(image, of_one_parity, 4).ne(0),
        ),
        "roll by half": (image, _of(lambda x: x + x.roll(8, -1), image)),
        "transpose": (image, _of(lambda x: x + x.mT, image)),
        "video convolutions": (
            (2, 4, 8, 8),
            _of(
                lambda x: functional.conv3d(
                    functional.conv3d(x, video, padding=1), video, padding=1
                ),
                (2, 4, 8, 8),
            ),
        ),
        "random dense": (image, _dense(256, 6)),
        "ViT, patch 4": (colour, _where(colour, in_one_patch, 7) + 0.05 * _dense(768, 8)),
        "sequence convolution": (
            (4, 64),
            _of(lambda x: functional.conv1d(x, filters, padding=2), (4, 64)),
        ),
        "dilated audio": (
            (2, 128),
            _of(lambda x: functional.conv1d(x, audio, padding=8, dilation=8), (2, 128)),
        ),
        "tokens, MLP": ((16, 16), _where((16, 16), lambda a, b: a[..., 0] == b[..., 0], 11)),
        "tokens, attention": (
            (32, 8),
            _where((32, 8), lambda a, b: a[..., 1] == b[..., 1], 12) + 0.1 * _dense(256, 13),
        ),
        "vector of 15": ((15,), _dense(15, 14)),
        "convolution": (colour, _convolution(colour, 3, 1, 15)),
        "decay": (colour, _decaying(colour, 2.0, 16)),
        "one and all": (image, torch.eye(256) + torch.ones(256, 256) / 256),
        "permutation": (
            image,
            torch.eye(256)
            + torch.eye(256)[torch.randperm(256, generator=torch.Generator().manual_seed(17))],
        ),
        "random dense, colour": (colour, _dense(768, 18)),
    }


def further_structures() -> dict[str, tuple[Shape, Tensor]]:
    """Shapes and Jacobians that no choice was made with."""
    image, colour = (1, 16, 16), (3, 16, 16)
    time = _kernel(40, 1, 1, 3, 3, 3)
    toeplitz = _places((128,)).float()
    laplacian = torch.eye(256) * 4.1 - sum(
        _of(lambda x, s=shift, a=axis: x.roll(s, a), image)
        for shift in (1, -1)
        for axis in (-1, -2)
    )
    low_rank = _kernel(33, 768, 3)
    spectrum = _kernel(25, 1, 16, 16)
    blur = _places(image)[:, 1:].float()
    hot = _dense(256, 38)
    hot[::37] *= 30.0
    bits = _places((256,))[:, 0]
    butterfly = torch.tensor([0, *(1 << k for k in range(8))])
    mixing = _kernel(27, 16, 16)
    return {
        "causal attention": (
            (32, 8),
            _where((32, 8), lambda a, b: a[..., 0] >= b[..., 0], 20),
        ),
        "attention of one head": (
            (64, 16),
            torch.kron(torch.softmax(2 * _dense(64, 21), dim=1), 0.3 * _dense(16, 22)),
        ),
        "dilated convolution, 2": (colour, _convolution(colour, 3, 2, 23)),
        "dilated convolution, 8": ((1, 32, 16), _convolution((1, 32, 16), 3, 8, 24)),
        "circulant": (
            image,
            _of(
                lambda x: torch.fft.irfft2(
                    torch.fft.rfft2(x) * torch.fft.rfft2(spectrum), s=(16, 16)
                ),
                image,
            ),
        ),
        "wide blur": (image, torch.exp(-torch.cdist(blur, blur).square() / 32)),
        "inverse Laplacian": (image, torch.linalg.inv(laplacian)),
        "channels alone": (
            (16, 4, 4),
            _of(lambda x: torch.einsum("bchw,dc->bdhw", x, mixing), (16, 4, 4)),
        ),
        "depthwise convolution": ((8, 8, 8), _convolution((8, 8, 8), 3, 1, 28, groups=8)),
        "one phase of four": (
            image,
            _where(image, lambda a, b: ((a - b)[..., 1:] % 4 == 0).all(-1), 29),
        ),
        "Haar wavelets": (image, _haar(256, 30)),
        "Toeplitz": ((1, 128), (1 + (toeplitz - toeplitz.T).abs()) ** -1.0),
        "low rank": (colour, torch.eye(768) + low_rank @ low_rank.T / 30),
        "far stripes": (
            image,
            _where(image, lambda a, b: (a[..., 1] - b[..., 1]).abs() >= 8, 34),
        ),
        "knight's moves": (image, _moves(image, [(1, 2), (2, 1), (1, -2), (2, -1)], 35)),
        "roll by five and three": (image, _of(lambda x: x + x.roll((5, 3), (-2, -1)), image)),
        "butterfly": (
            image,
            _dense(256, 36) * torch.isin(bits[:, None] ^ bits, butterfly).float(),
        ),
        "groups of channels": (
            (8, 8, 8),
            _where((8, 8, 8), lambda a, b: a[..., 0] // 2 == b[..., 0] // 2, 37),
        ),
        "hot rows": (image, hot),
        "video dilated in time": (
            (1, 8, 8, 8),
            _of(
                lambda x: functional.conv3d(x, time, padding=(4, 1, 1), dilation=(4, 1, 1)),
                (1, 8, 8, 8),
            ),
        ),
    }


def unseen_structures() -> dict[str, tuple[Shape, Tensor]]:
    """Shapes and Jacobians that were written down after the choice was settled."""
    image, colour = (1, 16, 16), (3, 12, 12)
    generator = torch.Generator().manual_seed(60)
    groups = torch.randperm(256, generator=generator) // 16
    sparse = torch.rand(256, 256, generator=generator) < 0.03
    causal = [_kernel(61 + k, 1, 1, 2) for k in range(4)]
    frequencies = torch.fft.fftfreq(16)
    power = (frequencies[:, None].square() + frequencies.square() + 1e-3) ** -1.0
    band_limited = (frequencies[:, None].square() + frequencies.square()).sqrt() < 0.15
    spike = _kernel(66, 256) * (torch.rand(256, generator=generator) < 0.2)
    blur = _kernel(67, 1, 1, 5, 5).abs()
    wide = _kernel(79, 8, 8, 3)
    pool = torch.kron(torch.eye(8), torch.ones(1, 2) / 2)
    pool = torch.kron(pool, pool)

    def filtered(response: Tensor) -> Tensor:
        return _of(lambda x: torch.fft.ifft2(torch.fft.fft2(x) * response).real, image)

    def in_one_window(one: Tensor, other: Tensor) -> Tensor:
        return ((one[..., 1:] + 2) // 4 == (other[..., 1:] + 2) // 4).all(-1)

    def axial(one: Tensor, other: Tensor) -> Tensor:
        return (one[..., 1:] == other[..., 1:]).any(-1)

    def near_tokens(one: Tensor, other: Tensor) -> Tensor:
        return (one[..., 0] - other[..., 0]).abs() <= 3

    def sub_pixels(one: Tensor, other: Tensor) -> Tensor:
        places = [
            2 * place[..., 1:] + torch.stack([place[..., 0] // 2, place[..., 0] % 2], dim=-1)
            for place in (one, other)
        ]
        return (places[0] - places[1]).abs().amax(-1) <= 1

    def causal_filters(x: Tensor) -> Tensor:
        parts = (
            functional.conv1d(functional.pad(x, (2**k, 0)), weight, dilation=2**k)
            for k, weight in enumerate(causal)
        )
        return torch.stack(list(parts)).sum(0)

    return {
        "dilated convolution, 3": (image, _convolution(image, 3, 3, 70)),
        "dilated convolution, 5": ((2, 16, 16), _convolution((2, 16, 16), 3, 5, 71)),
        "convolution, 5 wide": (colour, _convolution(colour, 5, 1, 72)),
        "column of seven": (image, _moves(image, [(1, 0), (2, 0), (3, 0)], 73)),
        "roll by a third": ((1, 15, 15), _of(lambda x: x + x.roll(5, -1), (1, 15, 15))),
        "mirror": (image, _of(lambda x: x + x.flip(-1), image)),
        "quarter turn": (image, _of(lambda x: x + x.rot90(1, (-2, -1)), image)),
        "shifted windows": (image, _where(image, in_one_window, 74)),
        "axial attention": (image, _where(image, axial, 75)),
        "pooled dense": (image, torch.eye(256) + pool.T @ _dense(64, 76) @ pool),
        "random sparse": (image, _dense(256, 77) * sparse),
        "hidden groups": (image, _dense(256, 78) * (groups[:, None] == groups)),
        "causal filters": ((1, 256), _of(causal_filters, (1, 256))),
        "wide sequence": (
            (8, 32),
            _of(lambda x: functional.conv1d(x, wide, padding=1), (8, 32)),
        ),
        "band of tokens": ((64, 4), _where((64, 4), near_tokens, 80)),
        "pixel shuffle": ((4, 8, 8), _where((4, 8, 8), sub_pixels, 81)),
        "band-limited": (image, filtered(band_limited.float())),
        "power law": (image, filtered(power)),
        "high pass": (
            image,
            torch.eye(256)
            - _of(lambda x: functional.conv2d(x, blur / blur.sum(), padding=2), image),
        ),
        "sparse rank one": (image, torch.eye(256) + torch.outer(spike, spike)),
    }


def variance_ratio(shape: Shape, J: Tensor, max_probes: int, num_seeds: int) -> float:
    """Return the variance of "auto" over that of as many Rademacher probes, mean over the entries.

    In closed form for the sets of features that it takes, the colors within random cells left
    open, and a mean over seeds of these. Forward mode.
    """
    squares = J.double().square()
    squares.fill_diagonal_(0.0)
    plain = squares.sum(dim=1).mean() / max_probes
    total = 0.0
    for seed in range(num_seeds):
        request = Request(
            x=torch.zeros(1, *shape),
            max_probes=max_probes,
            tolerance=None,
            geometry=True,
            total=False,
            seed=seed_tensor(seed, "cpu"),
            sample_offset=0,
            probe_offset=0,
        )
        start = choose_start(
            lambda probes: (probes.flatten(1) @ J.T).reshape(probes.shape), request, "auto", []
        )
        (lane,) = start.lanes
        sets = plan(shape, max_probes, seed, 0) if isinstance(lane.design, Partition) else None
        if isinstance(lane.design, Partition) and (
            sets is None or not torch.equal(lane.design.sets, sets.lattice)
        ):
            total += _cells_variance(squares, shape, max_probes, seed, lane.design.sets, sets)
        else:
            total += _variance(squares, lane.design, max_probes)
        if isinstance(lane.design, (Rademacher, UnitVectors, BalancedColoring)):
            return float(total / plain)  # nothing of it depends on the seed
    return float(total / num_seeds / plain)


def _cells_variance(
    squares: Tensor, shape: Shape, max_probes: int, seed: int, taken: Tensor, sets: Plan | None
) -> float:
    """Return the expected variance with random cells, and of what the pilots estimate."""
    num_pilots = 0
    if sets is not None:
        num_pilots = 1 if torch.equal(taken, sets.early) else sets.num_pilots
    m = max_probes - num_pilots
    cells = cell_numbers(m, shape, seed, 0).flatten()
    chance = (cells[:, None] != cells).double() / m
    if num_pilots:
        numbers = taken.flatten()
        piloted = numbers < num_pilots
        chance[piloted] = 0.0
        chance[:, piloted] = 0.0
        chance += (numbers[:, None] == numbers).double() * piloted
    return (squares * chance).sum(dim=1).mean().item()


def _variance(squares: Tensor, design: object, max_probes: int) -> float:
    """Return the mean variance of an entry after ``max_probes``, from J_ij^2 off the diagonal."""
    size = len(squares)
    if isinstance(design, Rademacher):
        return squares.sum(dim=1).mean().item() / max_probes
    if isinstance(design, UnitVectors):
        return 0.0
    if isinstance(design, BalancedColoring):
        m = design.num_colors
        classes = [len(range(color, size, m)) for color in range(m)]
        chance = sum(n * (n - 1) for n in classes) / (size * (size - 1))
        return squares.sum(dim=1).mean().item() * chance / (max_probes // m)
    assert isinstance(design, Partition)
    sets = design.sets.flatten()
    return (squares * (sets[:, None] == sets)).sum(dim=1).mean().item()
