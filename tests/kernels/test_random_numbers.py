"""The random-number contract: NumPy = PyTorch reference = Triton, and its statistics."""

from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext

import numpy as np
import numpy_contract
import pytest
import torch
import triton
import triton.language as tl
from one_device import one_device
from scipy import stats

from hessdiag.kernels import normal, philox, philox_cpu, philox_triton, rademacher
from hessdiag.kernels._checks import FLOAT_TYPES
from hessdiag.kernels.normal import normal_reference, normal_triton
from hessdiag.kernels.rademacher import rademacher_reference, rademacher_triton

SEEDS = [0, 1, 2**32 + 7, 2**63 + 11, 2**64 - 1]
SHAPES = [(1, 1, 1), (3, 2, 7), (16, 1, 8), (17, 3, 9), (40, 2, 127), (5, 2, 129), (2, 1, 4097)]
OFFSETS = [(0, 0), (13, 5), (2**31 - 3, 2**31 - 1), (2**32 - 64, 2**32 - 8)]


@pytest.mark.parametrize(
    ("counter", "key", "answer"),
    [
        # Known answers distributed with the authors' Random123 library.
        ((0, 0, 0, 0), (0, 0), "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            "d16cfe09 94fdcceb 5001e420 24126ea1",
        ),
    ],
)
def test_philox_known_answers(counter, key, answer):
    seed = philox.seed_tensor(key[0] + (key[1] << 32), "cpu")
    words = philox.philox(seed, *(torch.tensor(word) for word in counter))
    assert " ".join(f"{word.item():08x}" for word in words) == answer
    words = numpy_contract.philox4x32_10(counter, key)
    assert " ".join(f"{int(word):08x}" for word in words) == answer


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("probe_offset", "sample_offset"), OFFSETS)
def test_signs_are_the_same_in_numpy_pytorch_and_triton(
    shape, probe_offset, sample_offset, kernel_device
):
    seed = SEEDS[sum(shape) % len(SEEDS)]
    expected = numpy_contract.rademacher(*shape, seed, probe_offset, sample_offset)
    offsets = {"probe_offset": probe_offset, "sample_offset": sample_offset}
    on_cpu = rademacher(shape, seed, **offsets)
    np.testing.assert_array_equal(on_cpu.numpy(), expected)
    seed_tensor = philox.seed_tensor(seed, kernel_device)
    kernel = rademacher_triton(seed_tensor, shape, probe_offset, sample_offset, torch.float32)
    np.testing.assert_array_equal(kernel.cpu().numpy(), expected)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("offset", [0, 2**31 - 1, 2**32 - 8])
def test_normals_are_the_same_in_numpy_pytorch_and_triton(shape, offset, kernel_device):
    _, batch, features = shape
    seed, stream = SEEDS[features % len(SEEDS)], 1 + features % 2
    expected = numpy_contract.normal(batch, features, seed, stream, offset, offset)
    on_cpu = normal((batch, features), seed, step=offset, stream=stream, sample_offset=offset)
    np.testing.assert_allclose(on_cpu.numpy(), expected, rtol=2e-6, atol=2e-6)
    seed_tensor = philox.seed_tensor(seed, kernel_device)
    kernel = normal_triton(seed_tensor, (1, batch, features), stream, offset, offset)[0]
    np.testing.assert_allclose(kernel.cpu().numpy(), expected, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("compute", ["_words_of_integers", "_words_of_arrays"])
@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(
    ("groups", "samples", "steps", "stream"),
    [
        (range(1), range(1), range(1), 0),
        (range(5), range(2**32 - 3, 2**32), range(2**31 - 1, 2**31 + 1), 3),
        (range(33), range(7, 9), range(2**32 - 1, 2**32), 2**32 - 1),
    ],
)
def test_words_on_a_cpu_are_those_of_the_contract(compute, seed, groups, samples, steps, stream):
    words = getattr(philox_cpu, compute)(seed, groups, samples, steps, stream)
    step, sample, group = np.meshgrid(steps, samples, groups, indexing="ij")
    key = seed & 0xFFFFFFFF, seed >> 32
    expected = numpy_contract.philox4x32_10((group, sample, step, 0 * step + stream), key)
    np.testing.assert_array_equal(words, np.stack(expected))


@pytest.mark.parametrize("features", [1, 5, 16, 130])
def test_permutations_sort_by_key(features):
    seed, block, sample = SEEDS[features % len(SEEDS)], 2**32 - 2, 2**32 - 3
    ranks = philox.permutation_ranks(philox.seed_tensor(seed, "cpu"), block, 2, sample, 3, features)
    for i, made in enumerate(ranks):
        expected = numpy_contract.permutation(3, features, seed, block + i, sample)
        np.testing.assert_array_equal(made.numpy(), expected)


@pytest.mark.parametrize("features", [1, 8, 9, 130])
@pytest.mark.parametrize(("probe_offset", "sample_offset"), OFFSETS)
def test_numpy_and_the_operators_of_pytorch_agree(
    features, probe_offset, sample_offset, monkeypatch
):
    """A GPU and a compiler take the operators; a CPU's results must not depend on who looks on."""
    for seed in (3, 2**63 + 11):
        grid = (probe_offset, 19, sample_offset, 2, features)
        seed = philox.seed_tensor(seed, "cpu")

        def draw(seed=seed, grid=grid):
            return [
                *(philox.signs(seed, *grid, dtype) for dtype in FLOAT_TYPES),
                philox.standard_normals(seed, 1, *grid),
                philox.permutation_ranks(seed, *grid),
            ]

        in_numpy = draw()
        with monkeypatch.context() as patch:
            patch.setattr(philox, "is_eager_cpu", lambda *_: False)
            patch.setattr(philox_cpu, "grid_words", None)
            by_operators = draw()
        for one, other in zip(in_numpy, by_operators, strict=True):
            assert one.dtype == other.dtype
            assert torch.equal(one, other)


@pytest.mark.parametrize("context", [nullcontext, one_device])
def test_references_do_not_read_a_seed_back_from_its_device(context):
    with context():
        seed = torch.empty((), dtype=torch.int64, device="meta")
        made = [
            rademacher_reference(seed, (3, 2, 5), 0, 0, torch.float32),
            normal_reference(seed, (3, 2, 5), 2, 0, 0),
            philox.permutation_ranks(seed, 0, 1, 0, 2, 5),
        ]
    assert all(tensor.is_meta for tensor in made)


def test_threads_do_not_disturb_one_another():
    def draw(seed):
        return rademacher((40, 3, 70), seed), normal((3, 70), seed)

    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(draw, range(32)))
    for seed, pair in enumerate(together):
        for one, other in zip(pair, draw(seed), strict=True):
            assert torch.equal(one, other)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_signs_do_not_depend_on_the_dtype(dtype, kernel_device):
    expected = rademacher((18, 2, 3, 3), 5)
    seed = philox.seed_tensor(5, kernel_device)
    for made in (
        rademacher((18, 2, 3, 3), 5, dtype=dtype),
        rademacher_triton(seed, (18, 2, 3, 3), 0, 0, dtype),
    ):
        assert made.dtype == dtype
        torch.testing.assert_close(made.float().cpu(), expected, rtol=0, atol=0)


def test_a_batch_in_two_calls_and_probes_in_three_are_the_same():
    whole = rademacher((20, 7, 5), 3, probe_offset=9, sample_offset=2)
    samples = [
        rademacher((20, n, 5), 3, probe_offset=9, sample_offset=2 + first)
        for first, n in ((0, 3), (3, 4))
    ]
    assert torch.equal(torch.cat(samples, dim=1), whole)
    probes = [
        rademacher((n, 7, 5), 3, probe_offset=9 + first, sample_offset=2)
        for first, n in ((0, 1), (1, 12), (13, 7))
    ]
    assert torch.equal(torch.cat(probes), whole)
    noise = normal((7, 5), 3, step=4)
    assert torch.equal(noise[3:], normal((4, 5), 3, step=4, sample_offset=3))


def test_seeds_streams_and_steps_give_different_numbers():
    draws = [
        normal((64, 64), seed, step=step, stream=stream).flatten()
        for seed in (0, 1, 2**32)
        for step in (0, 1)
        for stream in (1, 2)
    ]
    correlation = torch.corrcoef(torch.stack(draws)) - torch.eye(len(draws))
    assert correlation.abs().max() < 5 / 64  # five standard errors


def test_signs_are_balanced_and_pairwise_uncorrelated():
    signs = rademacher((48, 64, 64), 1).reshape(48, -1)
    count = signs.shape[1]
    assert signs.mean(dim=1).abs().max() < 5 / count**0.5
    between_probes = signs @ signs.T / count - torch.eye(48)
    assert between_probes.abs().max() < 5 / count**0.5
    features = rademacher((64, 64, 48), 2).reshape(-1, 48)
    between_features = features.T @ features / len(features) - torch.eye(48)
    assert between_features.abs().max() < 5 / len(features) ** 0.5


@pytest.mark.parametrize("stream", [1, 2])
def test_normals_pass_kolmogorov_smirnov(stream):
    z = normal((500, 400), 7, stream=stream).flatten().numpy()
    assert stats.kstest(z, "norm").pvalue > 1e-3
    assert abs(stats.kurtosis(z)) < 5 * (24 / len(z)) ** 0.5
    assert np.isfinite(z).all()


@triton.jit
def _uniform_kernel(words, out, SIZE: tl.constexpr):
    index = tl.arange(0, SIZE)
    word = tl.load(words + index).to(tl.uint32)
    tl.store(out + index, philox_triton.uniform_from_word(word))


def test_uniforms_stay_inside_the_open_interval(kernel_device):
    words = torch.tensor([0, 1, 2**31, 2**32 - 1], device=kernel_device)
    expected = torch.tensor([2.0**-33, 1.5 * 2.0**-32, 0.5, 1.0 - 2.0**-24])
    assert torch.equal(philox.uniforms(words).cpu(), expected)
    out = torch.full((4,), float("nan"), device=kernel_device)
    _uniform_kernel[(1,)](words, out, SIZE=4)
    assert torch.equal(out.cpu(), expected)


def test_an_integer_seed_is_made_where_it_is_needed():
    """Not copied there: the host would wait for the GPU."""
    with one_device() as operators:
        assert philox.seed_tensor(2**64 - 1, "meta").device.type == "meta"
    assert operators == ["aten::full"]


def test_seed_may_be_a_tensor():
    assert torch.equal(rademacher((2, 3, 4), torch.tensor(9)), rademacher((2, 3, 4), 9))
    assert torch.equal(rademacher((2, 3, 4), torch.tensor(-1)), rademacher((2, 3, 4), 2**64 - 1))


@pytest.mark.parametrize("shape", [(0, 2, 3), (2, 0, 3), (2, 3, 0)])
def test_empty_shapes(shape, kernel_device):
    seed = philox.seed_tensor(0, kernel_device)
    assert rademacher(shape, 0).shape == shape
    assert rademacher_triton(seed, shape, 0, 0, torch.float32).shape == shape
    assert normal(shape[1:], 0).shape == shape[1:]
    assert normal_triton(seed, shape, 2, 0, 0).shape == shape


def test_custom_ops_pass_opcheck():
    seed = torch.tensor(3)
    torch.library.opcheck(
        torch.ops.hessdiag.rademacher.default, (seed, [3, 2, 5], 0, 0, torch.float32)
    )
    torch.library.opcheck(torch.ops.hessdiag.normal.default, (seed, [3, 2, 5], 2, 0, 0))


def test_the_interpreter_check_can_fail(kernel_device):
    """A probe number that is off by one is not the same number."""
    seed = philox.seed_tensor(3, kernel_device)
    shifted = rademacher_triton(seed, (4, 2, 64), 1, 0, torch.float32).cpu()
    assert not torch.equal(
        shifted, rademacher_reference(torch.tensor(3), (4, 2, 64), 0, 0, torch.float32)
    )


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: rademacher((2, 3), -1), ValueError, r"seed must lie in \[0, 2\*\*64\), got -1"),
        (lambda: rademacher((2, 3), 2**64), ValueError, "seed must lie in"),
        (lambda: rademacher((2, 3), 1.5), TypeError, "seed must be an int.*float"),
        (lambda: rademacher((2, 3), torch.tensor([1, 2])), ValueError, "seed must have one"),
        (lambda: rademacher((2, 3), torch.tensor(1.0)), TypeError, "seed must be an int"),
        (lambda: rademacher((2,), 0), ValueError, r"shape must be \(M, B, ...\).*got \(2,\)"),
        (lambda: rademacher((2, -3), 0), ValueError, "shape must be"),
        (lambda: rademacher((2.5, 3), 0), TypeError, r"shape must hold integers, got \(2.5, 3\)"),
        (lambda: rademacher((2, 3), 0, dtype=torch.int64), TypeError, "dtype must be one of"),
        (
            lambda: rademacher((2, 3), 0, probe_offset=2**32 - 1),
            ValueError,
            "probe_offset.*2\\*\\*32.*4294967295",
        ),
        (lambda: rademacher((2, 3), 0, sample_offset=-1), ValueError, "sample_offset.*got -1"),
        (lambda: rademacher((2, 3), 0, sample_offset=0.5), TypeError, "sample_offset.*float"),
        (lambda: normal((2, 3), 0, stream=0), ValueError, "stream must be 1.*got 0"),
        (lambda: normal((2, 3), 0, step=2**32), ValueError, "step"),
    ],
)
def test_errors_name_the_argument_and_its_value(call, error, message):
    with pytest.raises(error, match=message):
        call()
