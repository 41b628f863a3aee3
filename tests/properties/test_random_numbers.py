"""The random-number contract, against its text in NumPy, for any seed, offsets and sizes."""

import numpy_contract as contract
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import SEEDS, offsets, parts, splits

from hessdiag import kernels
from hessdiag.kernels import philox

SIZES = st.tuples(st.integers(1, 35), st.integers(1, 3), st.integers(1, 20))
# Of a normal number in float32: the logarithm's and the angle's rounding, at radii below 6.7.
TOLERANCE = {"rtol": 3e-6, "atol": 3e-6}


def as_int64(seed):
    return torch.tensor(seed - 2**64 if seed >= 2**63 else seed)


def counters(data, sizes):
    probes, samples = (data.draw(offsets(size)) for size in sizes[:2])
    return {"probe_offset": probes, "sample_offset": samples}


@given(st.data(), SEEDS, SIZES)
def test_signs_are_those_of_the_contract(data, seed, sizes):
    at = counters(data, sizes)
    expected = torch.from_numpy(contract.rademacher(*sizes, seed, **at))
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        made = kernels.rademacher(sizes, seed, dtype=dtype, **at)
        assert made.dtype == dtype
        assert torch.equal(made.double(), expected)


@given(st.data(), SEEDS, SIZES, st.sampled_from([1, 2]))
def test_normals_are_those_of_the_contract(data, seed, sizes, stream):
    _, samples, features = sizes
    step, first = data.draw(offsets(1)), data.draw(offsets(samples))
    expected = contract.normal(samples, features, seed, stream, step, first)
    made = kernels.normal((samples, features), seed, step=step, stream=stream, sample_offset=first)
    torch.testing.assert_close(made.double(), torch.from_numpy(expected), **TOLERANCE)


@given(st.data(), SEEDS, st.integers(1, 3), st.integers(1, 20))
def test_permutations_are_those_of_the_contract(data, seed, samples, features):
    block, first = data.draw(offsets(1)), data.draw(offsets(samples))
    expected = contract.permutation(samples, features, seed, block, first)
    made = philox.permutation_ranks(as_int64(seed), block, 1, first, samples, features)[0]
    assert torch.equal(made, torch.from_numpy(expected))


@pytest.mark.parametrize("make", [kernels.rademacher, kernels.normal_probes])
@given(st.data(), SEEDS, SIZES)
def test_any_parts_make_up_the_whole(make, data, seed, sizes):
    probes, samples, features = sizes
    at = counters(data, sizes)
    whole = make(sizes, seed, **at)
    for rows in parts(data.draw(splits(probes))):
        for batch in parts(data.draw(splits(samples))):
            size = rows.stop - rows.start, batch.stop - batch.start, features
            made = make(
                size,
                seed,
                probe_offset=at["probe_offset"] + rows.start,
                sample_offset=at["sample_offset"] + batch.start,
            )
            assert torch.equal(made, whole[rows, batch])


@given(SEEDS, st.integers(1, 9), st.integers(1, 9))
def test_features_do_not_depend_on_how_many_follow(seed, features, more):
    for make in (kernels.rademacher, kernels.normal_probes):
        few, many = make((3, 2, features), seed), make((3, 2, features + more), seed)
        assert torch.equal(many[..., :features], few)


@given(SEEDS, st.integers(1, 5))
def test_no_counter_of_more_than_32_bits_wraps_around(seed, count):
    for make in (kernels.rademacher, kernels.normal_probes):
        for at in ("probe_offset", "sample_offset"):
            make((count, count, 2), seed, **{at: 2**32 - count})
            with pytest.raises(ValueError, match=at):
                make((count, count, 2), seed, **{at: 2**32 - count + 1})


WORDS = st.integers(0, 2**32 - 1) | st.sampled_from([0, 1, 2**31, 2**32 - 1])


@given(SEEDS, st.tuples(WORDS, WORDS, WORDS, WORDS))
def test_the_words_of_pytorch_are_those_of_the_contract(seed, counter):
    words = philox.philox(as_int64(seed), *map(torch.tensor, counter))
    expected = contract.philox4x32_10(counter, (seed & 0xFFFFFFFF, seed >> 32))
    assert [int(word) for word in words] == [int(word) for word in expected]
