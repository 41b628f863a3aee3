"""Strategies of the property-based tests: functions, offsets, paths, covariances.

Tensors are drawn by seeds: hypothesis shrinks shapes and seeds, and no list of a thousand numbers.
"""

import math

import torch
from hypothesis import strategies as st
from torch import nn

import hessdiag
import ocm

SEEDS = st.one_of(
    st.integers(0, 2**64 - 1),
    st.sampled_from([0, 1, 2**31, 2**32 - 1, 2**32, 2**63 - 1, 2**63, 2**64 - 1]),
)
SHAPES = st.lists(st.integers(1, 4), min_size=1, max_size=3).map(tuple)
IMAGES = st.tuples(st.integers(1, 3), st.integers(1, 5), st.integers(1, 5))
BATCHES = st.integers(1, 3)
NUMBERS = st.floats(-3.0, 3.0, allow_subnormal=False).map(lambda x: round(x, 3))


def tensor(shape, seed, dtype=torch.float64):
    """Standard normal numbers."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


TENSOR_SEEDS = st.integers(0, 2**31)


def offsets(count, multiple=1):
    """First numbers of a run of ``count`` counters, of 32 bits: small, at 2^31, at the end."""
    last = (2**32 - count) // multiple * multiple
    edges = [2**31 - count, 2**31 - 1, 2**31, 2**31 + 1, last]
    some = st.integers(0, 40) | st.sampled_from(edges) | st.integers(0, last)
    return some.map(lambda first: min(first // multiple * multiple, last))


def splits(count):
    """Ends of the parts that a run is taken apart into, the last of them ``count``."""
    inner = st.sets(st.integers(1, count - 1), max_size=3) if count > 1 else st.just(set())
    return inner.map(lambda ends: [*sorted(ends), count])


def parts(ends):
    """The slices of such ends."""
    return [slice(first, last) for first, last in zip([0, *ends], ends, strict=False)]


def matrix(shape, seed):
    """A square matrix over the features of a sample."""
    return tensor((math.prod(shape),) * 2, seed)


def times(A):
    """x -> A x of each sample, features in order."""
    return lambda x: (x.flatten(1) @ A.mT).reshape(x.shape)


def linear(shape, seed):
    return times(matrix(shape, seed))


def curved(shape, seed):
    """x -> tanh(A x + c) + B x, a network whose Jacobian differs between samples."""
    A, B = matrix(shape, seed) / math.sqrt(math.prod(shape)), 0.3 * matrix(shape, seed + 1)
    c = tensor(shape, seed + 2)
    return lambda x: torch.tanh(times(A)(x) + c) + times(B)(x)


class Attention(nn.Module):
    """Tokens that attend to each other: every output depends on every input of its sample."""

    def __init__(self, features):
        super().__init__()
        self.to_qkv = nn.Linear(features, 3 * features)

    def forward(self, x):
        q, k, v = self.to_qkv(x.reshape(len(x), -1, x.shape[-1])).chunk(3, dim=-1)
        return x + ((q @ k.mT).softmax(-1) @ v).reshape(x.shape)


def network(shape, seed, kind):
    """Small networks of modules in float64: linear, normalised or with attention."""
    features = shape[-1]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layers = {
            "perceptron": lambda: nn.Sequential(
                nn.Linear(features, 5), nn.SiLU(), nn.Linear(5, features)
            ),
            "normalised": lambda: nn.Sequential(
                nn.LayerNorm(features), nn.Linear(features, features), nn.Softplus()
            ),
            "attention": lambda: Attention(features),
        }[kind]()
    return layers.double().requires_grad_(False)


FUNCTIONS = st.sampled_from([linear, curved])


def block_jacobian(function, x):
    """The Jacobian of every sample, (B, D, D), by reverse mode of PyTorch alone."""
    D = x[0].numel()
    whole = torch.func.jacrev(function)(x).reshape(len(x), D, len(x), D)
    return whole.diagonal(dim1=0, dim2=2).permute(2, 0, 1)


def designs(shape):
    """A probe design that fits samples of a shape."""
    D = math.prod(shape)
    colors = st.integers(1, D)
    return st.one_of(
        st.sampled_from([hessdiag.Rademacher(), hessdiag.Normal(), hessdiag.UnitVectors()]),
        *[st.builds(hessdiag.BalancedColoring, colors)] * (D > 1),
        *[st.builds(hessdiag.Coloring, colors, dense=st.booleans())] * (len(shape) > 1),
    )


@st.composite
def schedules(draw, discrete=True):
    """A path with its options, of few or many timesteps."""
    names = ["vp", "flow", "edm", "trigflow"] + ["linear", "cosine", "betas"] * discrete
    name = draw(st.sampled_from(names))
    N = draw(st.sampled_from([2, 3, 10, 100, 1000, 4000]) | st.integers(2, 60))
    if name == "betas":
        seed = draw(TENSOR_SEEDS)
        betas = torch.rand(N, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        most = min(draw(st.sampled_from([0.01, 0.1, 0.9])), 600 / N)  # so that signal is left
        return ocm.from_betas((betas * most).clamp(min=1e-6))
    options = {}
    if name == "vp":
        low = draw(st.floats(0.01, 1.0))
        options = {"beta_min": low, "beta_max": low + draw(st.floats(0.0, 20.0))}
    if name == "edm":
        low = draw(st.floats(1e-3, 0.1))
        options = {
            "sigma_min": low,
            "sigma_max": low * draw(st.floats(2.0, 1e5)),
            "rho": draw(st.floats(0.5, 9.0)),
            "data_std": draw(st.floats(0.1, 2.0)),
        }
    if name == "trigflow":
        options = {"data_std": draw(st.floats(0.1, 2.0))}
    return getattr(ocm, name)(N, **options)


@st.composite
def trajectories(draw, schedule, count=5, least=1e-3, to_the_end=False):
    """Increasing timesteps of a path: any that are at least ``least`` apart."""
    N = schedule.num_timesteps
    if schedule.is_continuous:
        units = draw(st.lists(st.floats(0.0, 1.0), min_size=1, max_size=count))
        places = sorted({max(least, round(u * N / least) * least) for u in units})
        places = [min(t, N) for t in places]
    else:
        places = sorted(draw(st.sets(st.integers(1, N), min_size=1, max_size=count)))
    if to_the_end:
        places = [t for t in places if t < N - least] + [N]
    return places


@st.composite
def tables(draw, width=None, by_step=None, least=-1e6):
    """A table by timestep, or by step, of numbers from ``least`` on."""
    k = draw(st.integers(1, 3)) if width is None else width
    values = st.lists(st.floats(least, 1e6), min_size=k, max_size=k)
    times = st.integers(0, 1000) | st.floats(1e-6, 1e4)
    if draw(st.booleans()) if by_step is None else by_step:
        pairs = st.tuples(times, times).filter(lambda pair: pair[0] != pair[1])
        places = pairs.map(lambda pair: tuple(sorted(pair)))
    else:
        places = times
    return ocm.diffusion.tables.Table(draw(st.dictionaries(places, values, min_size=1, max_size=6)))
