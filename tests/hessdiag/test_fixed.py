"""Probes that are kept: the same numbers as drawn anew, nothing drawn twice, and errors."""

import pytest
import torch
from torch import nn

import hessdiag
from hessdiag import BalancedColoring, Coloring, Normal, Rademacher, UnitVectors
from hessdiag.kernels.philox import seed_tensor

IMAGE = (2, 3, 4)


def network(size):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(size, 8), nn.Tanh(), nn.Linear(8, size))


def function(shape):
    net = network(shape.numel())
    return lambda x: net(x.flatten(1)).reshape(x.shape) + x.sin()


def points(number=3, shape=IMAGE):
    return torch.randn(number, *shape, generator=torch.Generator().manual_seed(1))


def values(result):
    first = result.trace if isinstance(result, hessdiag.TraceEstimate) else result.diagonal
    return first, result.stderr, result.num_probes, result.num_blocks


@pytest.mark.parametrize("what", [hessdiag.trace, hessdiag.estimate])
@pytest.mark.parametrize("mode", ["vjp", "jvp"])
@pytest.mark.parametrize("basis", [None, hessdiag.dct()])
@pytest.mark.parametrize(
    ("probes", "max_probes"),
    [
        ("rademacher", 1),
        ("rademacher", 5),
        ("normal", 5),
        ("orthogonal", 7),
        (Normal(), 1),
        (Coloring(6), 13),
        (Coloring(3, dense=True), 8),
        (BalancedColoring(4), 4),
        (UnitVectors(), 24),
        (UnitVectors(), 30),
    ],
)
def test_kept_probes_give_what_those_drawn_anew_give(what, mode, basis, probes, max_probes):
    x = points()
    J = hessdiag.Jacobian(function(x[0].shape), x, mode=mode, basis=basis)
    numbers = {"seed": 7, "sample_offset": 3}
    kept = hessdiag.fixed_probes(x, max_probes, probes, **numbers)
    anew = what(J, max_probes=max_probes, probes=probes, **numbers)
    for given in ({}, numbers, {"seed": torch.tensor(7)}, {"chunk_size": 2}):
        result = what(J, max_probes=max_probes, probes=kept, **given)
        for one, other in zip(values(result), values(anew), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_types(dtype):
    x = points(2, (5,)).to(dtype)
    net = network(5).to(dtype)
    kept = hessdiag.fixed_probes(x, 3, seed=1)
    assert kept.vectors.dtype == dtype
    result = hessdiag.trace(net, x, max_probes=3, probes=kept)
    anew = hessdiag.trace(net, x, max_probes=3, seed=1)
    assert result.trace.dtype == anew.trace.dtype
    torch.testing.assert_close(result.trace, anew.trace)


def test_a_tolerance_stops_where_it_stops_with_probes_drawn_anew():
    x = points()
    J = hessdiag.Jacobian(function(x[0].shape), x, mode="vjp")
    kept = hessdiag.fixed_probes(x, 64, seed=2)
    result = hessdiag.trace(J, max_probes=64, probes=kept, rtol=0.2)
    anew = hessdiag.trace(J, max_probes=64, seed=2, rtol=0.2)
    assert torch.equal(result.num_probes, anew.num_probes)
    assert torch.equal(result.converged, anew.converged)
    assert hessdiag.trace(J, max_probes=64, probes=kept).converged is None


@pytest.mark.parametrize("max_probes", [1, 2])
def test_gradients_through_a_trace_with_kept_probes(max_probes):
    net, x = network(4), points(2, (4,)).requires_grad_()
    kept = hessdiag.fixed_probes(x, max_probes, seed=5)
    found = []
    for given in ({"probes": kept}, {"seed": 5}):
        J = hessdiag.Jacobian(net, x, mode="vjp", differentiable=True)
        trace = hessdiag.trace(J, max_probes=max_probes, **given)
        found.append(torch.autograd.grad(trace.trace.sum(), [x, *net.parameters()][:-1]))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)


def test_blocks_of_kept_probes_by_their_numbers():
    x = points()
    J = hessdiag.Jacobian(function(x[0].shape), x, mode="vjp")
    kept = hessdiag.fixed_probes(x, 12, Coloring(4), probe_offset=8)
    parts = [hessdiag.trace(J, max_probes=4, probes=kept, probe_offset=k) for k in (0, 4, 8)]
    anew = [hessdiag.trace(J, max_probes=4, probes=Coloring(4), probe_offset=k) for k in (8, 12)]
    torch.testing.assert_close(parts[0].trace, anew[0].trace)
    torch.testing.assert_close(parts[1].trace, anew[1].trace)
    whole = hessdiag.trace(J, max_probes=12, probes=kept)
    merged = parts[0].merged(parts[1]).merged(parts[2])
    torch.testing.assert_close(merged.trace, whole.trace)
    torch.testing.assert_close(merged.stderr, whole.stderr, rtol=1e-4, atol=1e-5)


class Doubled(Normal):
    """Normal probes twice as long, and so of a quarter of the weight."""

    def weight(self, sample_shape):
        return 0.25

    def draw(self, *arguments, **numbers):
        return 2 * super().draw(*arguments, **numbers)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("shape", [(5,), IMAGE, ()])
@pytest.mark.parametrize("mode", ["vjp", "jvp"])
@pytest.mark.parametrize("probes", ["rademacher", Doubled()])
def test_a_single_probe_has_a_shorter_way_to_the_same_bits(dtype, shape, mode, probes):
    x = points(3, shape).to(dtype)
    kept = hessdiag.fixed_probes(x, 1, probes, seed=2)
    results = []
    for given in ({"probes": kept}, {"probes": kept, "chunk_size": 16}, {"probes": probes}):
        seed = 0 if given["probes"] is kept else 2
        J = hessdiag.Jacobian(torch.sin, x, mode=mode)
        results.append(hessdiag.trace(J, max_probes=1, seed=seed, **given))
    for result in results[1:]:
        assert (result.mode, result.note) == (results[0].mode, results[0].note)
        assert result.batching == results[0].batching
        for one, other in zip(values(result), values(results[0]), strict=True):
            assert one.dtype == other.dtype
            assert torch.equal(one, other)


@pytest.mark.parametrize("given", [{"max_probes": True}, {"sample_offset": 0.0}, {"seed": False}])
def test_a_single_probe_is_asked_for_by_integers(given):
    kept = hessdiag.fixed_probes(torch.zeros(2, 3), 1)
    with pytest.raises(TypeError, match=next(iter(given))):
        hessdiag.trace(torch.sin, torch.zeros(2, 3), **{"max_probes": 1, "probes": kept} | given)


@pytest.mark.parametrize("probe_offset", [7, 23, 31])
def test_kept_unit_vectors_go_round(probe_offset):
    x = points()
    J = hessdiag.Jacobian(function(x[0].shape), x, mode="vjp")
    kept = hessdiag.fixed_probes(x, 24, UnitVectors())
    for chunk_size in (5, 24):
        result = hessdiag.estimate(
            J, max_probes=24, probes=kept, probe_offset=probe_offset, chunk_size=chunk_size
        )
        torch.testing.assert_close(result.diagonal, hessdiag.exact(J))


class Counted(Normal):
    """Normal probes that say how often they were drawn."""

    def __init__(self):
        object.__setattr__(self, "drawn", [])

    def draw(self, shape, *rest, **numbers):
        self.drawn.append(shape)
        return super().draw(shape, *rest, **numbers)


def test_a_right_hand_side_draws_nothing_and_evaluates_the_network_once():
    x, design, evaluations = points(2, (5,)), Counted(), []
    net = network(5)

    def counted(x):
        evaluations.append(1)
        return net(x)

    kept = hessdiag.fixed_probes(x, 1, design, seed=3)
    (e,) = kept.vectors
    for step in range(4):
        J = hessdiag.Jacobian(counted, x + step, mode="vjp")
        trace = hessdiag.trace(J, max_probes=1, probes=kept).trace
        leaf = (x + step).requires_grad_()
        output = net(leaf)
        (product,) = torch.autograd.grad(output, leaf, e)
        torch.testing.assert_close(J.output, output.detach())
        torch.testing.assert_close(trace, (product * e).sum(dim=1))
    assert len(evaluations) == 4
    assert design.drawn == [(1, 2, 5)]
    assert torch.equal(kept.vectors, hessdiag.fixed_probes(x, 1, design, seed=3).vectors)


def test_kept_probes_may_be_kept_from_others():
    x = points()
    kept = hessdiag.fixed_probes(x, 6, seed=9)
    some = hessdiag.fixed_probes(x, 2, kept, probe_offset=3, seed=9)
    assert torch.equal(some.vectors, kept.vectors[3:5])


def test_a_generator_is_drawn_from_once():
    x = points()
    generator, same = (torch.Generator().manual_seed(4) for _ in range(2))
    kept = hessdiag.fixed_probes(x, 3, seed=generator)
    number = seed_tensor(same, "cpu")
    assert torch.equal(kept.vectors, hessdiag.fixed_probes(x, 3, seed=number).vectors)
    assert torch.equal(generator.get_state(), same.get_state())


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"x": torch.zeros(4, 5)}, r"an x like this one, \(4, 5\) .* got probes for \(3, 5\)"),
        ({"x": torch.zeros(3, 6)}, r"an x like this one, \(3, 6\)"),
        ({"x": torch.zeros(3, 5).double()}, "float64 on cpu, got probes for .*float32"),
        ({"max_probes": 9}, "max_probes must be at most 8 from probe_offset=0 on, .* got 9"),
        ({"max_probes": 40, "chunk_size": 4}, "max_probes must be at most 8 .* got 40"),
        ({"probe_offset": 5}, "max_probes must be at most 3 from probe_offset=5 on"),
        ({"probe_offset": 50}, "max_probes must be at most 0 from probe_offset=50 on"),
        ({"seed": 6}, "seed must be left out with probes that are kept, or theirs, 5, got 6"),
        ({"seed": torch.Generator()}, "seed must be left out"),
        ({"sample_offset": 1}, "sample_offset must be left out .* or theirs, 2, got 1"),
    ],
)
def test_other_samples_numbers_or_seeds_than_were_kept(changed, message):
    kept = hessdiag.fixed_probes(torch.zeros(3, 5), 8, seed=5, sample_offset=2)
    arguments = {"x": torch.zeros(3, 5), "max_probes": 8, "probes": kept} | changed
    for what in (hessdiag.trace, hessdiag.estimate):
        with pytest.raises(ValueError, match=message):
            what(torch.sin, **arguments)


def test_max_probes_is_wrong_before_anything_is_evaluated():
    def never(x):
        raise AssertionError

    kept = hessdiag.fixed_probes(torch.zeros(1, 2), 2)
    with pytest.raises(ValueError, match="max_probes must be at most 2"):
        hessdiag.trace(never, torch.zeros(1, 2), max_probes=3, probes=kept)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((torch.zeros(2, 3), 1, "auto"), ValueError, "probes must be a design or one of rad.*auto"),
        ((torch.zeros(2, 3), 1, "coloring"), ValueError, "do not depend on products.*coloring"),
        ((torch.zeros(2, 3), 1, 3), TypeError, "probes must be a name or a design"),
        ((torch.zeros(2, 3), 0), ValueError, "max_probes must be at least 1"),
        ((torch.zeros(2, 3), 2, UnitVectors()), ValueError, "max_probes must be at least 3"),
        ((torch.zeros(2, 3, dtype=torch.int64), 1), TypeError, "x must be a real floating-point"),
    ],
)
def test_what_cannot_be_kept(arguments, error, message):
    with pytest.raises(error, match=message):
        hessdiag.fixed_probes(*arguments)
    with pytest.raises(ValueError, match="probe_offset must be a multiple of 3"):
        hessdiag.fixed_probes(torch.zeros(2, 3), 3, BalancedColoring(3), probe_offset=1)


def test_rademacher_signs_are_those_of_the_contract():
    x = points(3, (5,))
    kept = hessdiag.fixed_probes(x, 4, Rademacher(), seed=2, sample_offset=6, probe_offset=1)
    expected = hessdiag.kernels.rademacher((4, 3, 5), 2, sample_offset=6, probe_offset=1)
    assert torch.equal(kept.vectors, expected)
    assert "Rademacher()" in repr(kept)
    assert "tensor" not in repr(kept)
