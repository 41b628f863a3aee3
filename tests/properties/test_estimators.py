"""Estimates are linear in the function, and the same however they are computed."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import (
    BATCHES,
    FUNCTIONS,
    IMAGES,
    NUMBERS,
    SEEDS,
    SHAPES,
    TENSOR_SEEDS,
    block_jacobian,
    curved,
    designs,
    linear,
    matrix,
    offsets,
    parts,
    splits,
    tensor,
    times,
)

import hessdiag
from hessdiag.intervals import merge
from hessdiag.kernels import rademacher

close = torch.testing.assert_close


def blocks_of(design, shape, count):
    """Probes of so many blocks."""
    return design.block_size(shape) * (1 if design.is_exact else count)


@given(st.data(), SHAPES, BATCHES, TENSOR_SEEDS, SEEDS, NUMBERS, NUMBERS)
def test_estimates_are_linear_in_the_function(data, shape, batch, seed, probe_seed, a, b):
    design, x = data.draw(designs(shape)), tensor((batch, *shape), seed)
    f, g = curved(shape, seed), linear(shape, seed + 7)
    M = blocks_of(design, shape, data.draw(st.integers(1, 3)))
    of_f, of_g, of_both = (
        hessdiag.estimate(function, x, max_probes=M, probes=design, seed=probe_seed).diagonal
        for function in (f, g, lambda x: a * f(x) + b * g(x))
    )
    close(of_both, a * of_f + b * of_g, rtol=1e-9, atol=1e-11)


@given(st.data(), SHAPES, BATCHES, TENSOR_SEEDS, SEEDS, st.integers(1, 7))
def test_estimates_do_not_depend_on_chunks(data, shape, batch, seed, probe_seed, chunk):
    design, f = data.draw(designs(shape)), curved(shape, seed)
    M = blocks_of(design, shape, data.draw(st.integers(1, 4)))
    whole, chunked = (
        hessdiag.estimate(
            f,
            tensor((batch, *shape), seed),
            max_probes=M,
            probes=design,
            seed=probe_seed,
            chunk_size=size,
        )
        for size in (M, chunk)
    )
    close(chunked.diagonal, whole.diagonal, rtol=1e-10, atol=1e-12)
    # Of blocks that agree it is infinite, or that of their rounding.
    known, wanted = (e.stderr.nan_to_num(nan=torch.nan, posinf=0.0) for e in (chunked, whole))
    close(known, wanted, rtol=1e-6, atol=1e-9)
    assert torch.equal(chunked.num_blocks, whole.num_blocks)


@pytest.mark.parametrize("kind", ["estimate", "trace", "blocks", "xdiag"])
@given(st.data(), SHAPES, st.integers(2, 4), TENSOR_SEEDS, SEEDS)
def test_a_batch_in_parts_and_in_any_order_is_the_whole(kind, data, shape, batch, seed, probe_seed):
    x, f = tensor((batch, *shape), seed), curved(shape, seed)
    first = data.draw(offsets(batch))
    design, D = data.draw(designs(shape)), math.prod(shape)
    M = blocks_of(design, shape, 2)

    def found(x, offset):
        own = {"seed": probe_seed, "sample_offset": offset}
        if kind == "estimate":
            return hessdiag.estimate(f, x, max_probes=M, probes=design, **own).diagonal
        if kind == "trace":
            return hessdiag.trace(f, x, max_probes=M, probes=design, **own).trace
        if kind == "xdiag":
            return hessdiag.xdiag(f, x, num_probes=2 * max(2, min(D, 3)), **own)
        partition, probes = torch.arange(D).reshape(shape) % 2, hessdiag.Rademacher()
        return hessdiag.block_diagonal(
            f, x, partition=partition, probes=probes, max_probes=2 * D, **own
        ).blocks

    whole = found(x, first)
    for part in data.draw(st.permutations(parts(data.draw(splits(batch))))):
        close(found(x[part], first + part.start), whole[part], rtol=1e-7, atol=1e-9)


@given(FUNCTIONS, SHAPES, st.integers(2, 4), TENSOR_SEEDS, st.randoms(use_true_random=False))
def test_what_is_exact_goes_with_its_sample(make, shape, batch, seed, random):
    x, f = tensor((batch, *shape), seed), make(shape, seed)
    order = random.sample(range(batch), batch)
    for exactly in (hessdiag.exact, hessdiag.jacobian):
        close(exactly(f, x[order]), exactly(f, x)[order], rtol=1e-10, atol=1e-12)


@given(st.data(), SHAPES, BATCHES, TENSOR_SEEDS, SEEDS, st.integers(1, 3), st.integers(1, 3))
def test_an_estimate_that_is_continued_is_the_whole(
    data, shape, batch, seed, probe_seed, before, after
):
    design = data.draw(designs(shape).filter(lambda design: not design.is_exact))
    x, f, m = tensor((batch, *shape), seed), curved(shape, seed), design.block_size(shape)
    first = data.draw(offsets((before + after) * m, m))
    for kind, value in ((hessdiag.estimate, "diagonal"), (hessdiag.trace, "trace")):
        whole, begun, added = (
            kind(f, x, max_probes=k * m, probes=design, seed=probe_seed, probe_offset=first + o * m)
            for k, o in ((before + after, 0), (before, 0), (after, before))
        )
        both = begun.merged(added)
        close(getattr(both, value), getattr(whole, value), rtol=1e-9, atol=1e-11)
        assert torch.equal(both.num_blocks, whole.num_blocks)
        # What agrees but for the rounding of the products is as good as exact.
        known = whole.stderr.isfinite() & (whole.stderr > 1e-9)
        assert bool(both.stderr.isfinite()[known].all())
        if isinstance(design, hessdiag.Normal):  # whose few blocks never agree by luck
            close(both.stderr, whole.stderr, rtol=1e-6, atol=1e-9)


def test_blocks_that_agreed_by_luck_leave_a_merged_standard_error_finite():
    unknown = torch.tensor([[1.0]]), torch.tensor([[math.inf]]), torch.tensor([3])
    known = torch.tensor([[2.0]]), torch.tensor([[0.5]]), torch.tensor([3])
    mean, stderr, count = merge(unknown, known)
    # The six blocks 1, 1, 1 and three of mean 2 and squared deviations 3 * 2 * 0.5^2.
    deviations = 1.5 + 3 * 0.5**2 + 3 * 0.5**2
    close(mean, torch.tensor([[1.5]]))
    close(stderr, torch.tensor([[math.sqrt(deviations / (6 * 5))]]))
    assert count == 6


def test_means_that_agree_but_for_rounding_leave_a_merged_standard_error_unknown():
    tenth = torch.tensor([[0.1]], dtype=torch.float64)
    unknown = torch.full_like(tenth, math.inf)
    one, two = (tenth, unknown, torch.tensor([1])), (tenth, unknown, torch.tensor([2]))
    mean, stderr, _ = merge(one, two)
    assert mean != tenth  # rounded
    assert stderr == math.inf


def test_a_mean_that_is_nan_leaves_a_merged_standard_error_nan():
    """It was 0 from ten blocks on: a NaN that counts as exact."""
    block = torch.tensor([[math.nan]]), torch.tensor([[math.inf]]), torch.tensor([1])
    mean, stderr, _ = merge(*[block] * 10)
    assert mean.isnan()
    assert stderr.isnan()


@given(st.data(), SHAPES, BATCHES, TENSOR_SEEDS, SEEDS)
def test_reverse_mode_is_forward_mode_of_the_transpose(data, shape, batch, seed, probe_seed):
    design, x = data.draw(designs(shape)), tensor((batch, *shape), seed)
    A = matrix(shape, seed)
    M = blocks_of(design, shape, 2)
    forward, backward = (
        hessdiag.estimate(g, x, max_probes=M, probes=design, seed=probe_seed, mode=mode).diagonal
        for g, mode in ((times(A), "jvp"), (times(A.mT), "vjp"))
    )
    close(forward, backward, rtol=1e-10, atol=1e-12)


@given(st.data(), SHAPES, BATCHES, TENSOR_SEEDS, SEEDS)
def test_signs_are_exact_where_the_jacobian_is_diagonal(data, shape, batch, seed, probe_seed):
    design = data.draw(designs(shape).filter(lambda d: not isinstance(d, hessdiag.Normal)))
    x = tensor((batch, *shape), seed)
    M = blocks_of(design, shape, 1)
    found = hessdiag.estimate(torch.sin, x, max_probes=M, probes=design, seed=probe_seed)
    close(found.diagonal, x.cos(), rtol=1e-10, atol=1e-12)


@given(SHAPES, BATCHES, TENSOR_SEEDS, SEEDS)
def test_as_many_probes_as_features_are_exact(shape, batch, seed, probe_seed):
    x, f, D = tensor((batch, *shape), seed), curved(shape, seed), math.prod(shape)
    expected = block_jacobian(f, x).diagonal(dim1=1, dim2=2).reshape(x.shape)
    exact = [hessdiag.UnitVectors(), hessdiag.BalancedColoring(D), "auto"]
    if len(shape) > 1:
        exact += [hessdiag.Coloring(D), hessdiag.Coloring(D, dense=True)]
    for design in exact:
        M = D if design == "auto" else design.block_size(shape)
        found = hessdiag.estimate(f, x, max_probes=M, probes=design, seed=probe_seed)
        close(found.diagonal, expected, rtol=1e-9, atol=1e-11)


@given(st.data(), SHAPES, BATCHES, TENSOR_SEEDS, SEEDS)
def test_the_trace_is_the_sum_of_the_diagonal(data, shape, batch, seed, probe_seed):
    design, x, f = data.draw(designs(shape)), tensor((batch, *shape), seed), curved(shape, seed)
    options = {"max_probes": blocks_of(design, shape, 2), "probes": design, "seed": probe_seed}
    diagonal = hessdiag.estimate(f, x, **options).diagonal
    trace = hessdiag.trace(f, x, **options).trace
    close(trace, diagonal.flatten(1).sum(1), rtol=1e-9, atol=1e-11)


@given(IMAGES, BATCHES, TENSOR_SEEDS)
def test_the_blocks_of_pixels_are_those_of_the_matrix(shape, batch, seed):
    x, f = tensor((batch, *shape), seed), curved(shape, seed)
    channels, positions = shape[0], shape[1] * shape[2]
    matrix = block_jacobian(f, x).reshape(batch, channels, positions, channels, positions)
    expected = matrix.diagonal(dim1=2, dim2=4).permute(0, 3, 1, 2)
    found = hessdiag.block_diagonal(f, x)
    close(found.blocks, expected, rtol=1e-9, atol=1e-11)
    diagonal = found.blocks.diagonal(dim1=2, dim2=3).mT.reshape(x.shape)
    close(diagonal, hessdiag.exact(f, x), rtol=1e-9, atol=1e-11)


@given(st.integers(1, 6), BATCHES, TENSOR_SEEDS, SEEDS)
def test_xdiag_is_exact_where_the_rank_is_small(D, batch, seed, probe_seed):
    u, v = tensor((D, 1), seed), tensor((1, D), seed + 1)
    x = tensor((batch, D), seed)
    found = hessdiag.xdiag(times(u @ v), x, num_probes=4, seed=probe_seed)
    expected = (u @ v).diagonal().expand(batch, D)
    close(found, expected, rtol=1e-7, atol=1e-8)


def test_xdiag_of_a_sign_vector_that_comes_twice_is_its_definition():
    """Among 3 features one of 3 sign vectors often is another one; QR fills in a direction then."""
    x, A, k = torch.zeros(12, 3).double(), tensor((3, 3), 0), 3
    found = hessdiag.xdiag(lambda x: x @ A.T, x, num_probes=2 * k, seed=0)
    signs = rademacher((k, 12, 3), 0, dtype=torch.float64)
    for sample, own in enumerate(signs.unbind(1)):
        products, terms = own @ A.T, []
        for i in range(k):
            others = torch.cat([products[:i], products[i + 1 :]])
            _, sizes, axes = torch.linalg.svd(others, full_matrices=False)
            axes = axes[sizes > 1e-10]
            projector = axes.T @ axes
            rest = products[i] - projector @ products[i]
            terms.append((projector @ A).diagonal() + own[i] * rest)
        close(found[sample], torch.stack(terms).mean(0), rtol=1e-9, atol=1e-11)
    assert any(len(torch.unique(own * own[:, :1], dim=0)) < k for own in signs.unbind(1))


@given(st.data(), SHAPES, BATCHES, TENSOR_SEEDS, SEEDS, st.integers(1, 4))
def test_probes_that_were_kept_are_those_that_would_be_drawn(
    data, shape, batch, seed, probe_seed, count
):
    design, x = data.draw(designs(shape)), tensor((batch, *shape), seed)
    f, M = curved(shape, seed), blocks_of(design, shape, count)
    kept = hessdiag.fixed_probes(x, max_probes=M, probes=design, seed=probe_seed)
    drawn, again = (
        hessdiag.estimate(f, x, max_probes=M, probes=probes, seed=probe_seed).diagonal
        for probes in (design, kept)
    )
    close(again, drawn, rtol=1e-12, atol=1e-13)
