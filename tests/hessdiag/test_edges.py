"""What is empty, small or of an odd shape, by every public function of a batch and every probe."""

import pytest
import torch

import hessdiag

PROBES = ["rademacher", "normal", "orthogonal", "auto"]


def coupled(x):
    """Couples the features of a sample, whatever its shape."""
    total = x.flatten(1).sum(dim=1) if x.dim() > 1 else torch.zeros_like(x)
    return torch.sin(x) * (2 + total.reshape(-1, *[1] * (x.dim() - 1)))


@pytest.mark.parametrize("mode", ["vjp", "jvp"])
@pytest.mark.parametrize("probes", PROBES)
@pytest.mark.parametrize("shape", [(0, 4), (0, 3, 8, 8), (3, 0), (2, 3, 0), (0,)])
def test_nothing_is_estimated_of_nothing(shape, probes, mode):
    x = torch.zeros(shape)
    result = hessdiag.estimate(coupled, x, max_probes=4, probes=probes, mode=mode)
    assert result.diagonal.shape == result.stderr.shape == shape
    assert result.num_probes.shape == shape[:1]
    trace = hessdiag.trace(coupled, x, max_probes=4, probes=probes, mode=mode)
    assert torch.equal(trace.trace, torch.zeros(shape[:1]))
    low, high = result.interval()
    assert low.shape == high.shape == shape
    with_tolerance = hessdiag.estimate(coupled, x, max_probes=64, probes=probes, rtol=0.1)
    assert with_tolerance.diagonal.shape == shape


@pytest.mark.parametrize("probes", PROBES)
@pytest.mark.parametrize("shape", [(5,), (5, 1), (5, 1, 1), (5, 1, 1, 1)])
def test_a_single_feature_is_exact(shape, probes):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    exact = hessdiag.exact(coupled, x)
    assert exact.shape == shape
    if probes != "normal":
        estimate = hessdiag.estimate(coupled, x, max_probes=3, probes=probes)
        torch.testing.assert_close(estimate.diagonal, exact)
        trace = hessdiag.trace(coupled, x, max_probes=3, probes=probes)
        torch.testing.assert_close(trace.trace, exact.flatten())
    torch.testing.assert_close(hessdiag.hutchinson(coupled, x, 2), exact)
    torch.testing.assert_close(hessdiag.xdiag(coupled, x, num_probes=4), exact)
    jacobian = hessdiag.jacobian(coupled, x)
    torch.testing.assert_close(jacobian.reshape(shape), exact)


@pytest.mark.parametrize(
    "shape",
    [(1, 2), (2, 1), (1, 2, 2), (3, 1, 1), (1, 1, 7), (2, 3, 1), (1, 1, 1, 2), (2, 2, 2, 2)],
)
@pytest.mark.parametrize("probes", ["auto", "coloring"])
def test_small_samples_take_any_number_of_probes(shape, probes):
    x = torch.randn(40, *shape, generator=torch.Generator().manual_seed(0))
    exact = hessdiag.exact(coupled, x)
    for max_probes in range(1, x[0].numel() + 3):
        result = hessdiag.estimate(coupled, x, max_probes=max_probes, probes=probes)
        assert (result.num_probes <= max_probes).all()
        if max_probes >= x[0].numel():
            torch.testing.assert_close(result.diagonal, exact, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "f",
    [
        lambda x: x - x.mean(dim=0),
        torch.nn.BatchNorm1d(3, affine=False, track_running_stats=False).train(),
        lambda x: torch.cat([x[:1], x[1:] + x[1:].flip(0).sin() * 2 - x[1:].sin()]),
    ],
)
def test_coupled_samples_are_refused_by_auto_as_by_exact(f):
    x = torch.randn(3, 3, generator=torch.Generator().manual_seed(0))
    for call in (
        lambda: hessdiag.estimate(f, x, max_probes=3, probes="auto"),
        lambda: hessdiag.estimate(f, x, max_probes=3, probes=hessdiag.UnitVectors()),
        lambda: hessdiag.trace(f, x, max_probes=9, probes="auto"),
        lambda: hessdiag.exact(f, x),
        lambda: hessdiag.jacobian(f, x),
    ):
        with pytest.raises(ValueError, match="couples the samples of a batch"):
            call()


def test_a_coupled_energy_is_refused_by_auto():
    x = torch.randn(4, 2, generator=torch.Generator().manual_seed(0))
    with pytest.raises(ValueError, match="couples the samples of a batch"):
        hessdiag.hessian_diagonal(lambda t: t.sum() ** 2, x, max_probes=8, probes="auto")


def test_the_trace_of_a_tolerance_takes_no_more_than_signs_would():
    """Where the diagonal's criterion would ask for the exact diagonal."""
    size = 256
    A = torch.randn(size, size, generator=torch.Generator().manual_seed(0)) / size**0.5
    A += torch.eye(size)
    x = torch.zeros(2, 1, 16, 16)

    def run(probes):
        return hessdiag.trace(
            lambda x: (x.flatten(1) @ A.T).reshape(x.shape),
            x,
            max_probes=2000,
            rtol=0.05,
            probes=probes,
        )

    chosen, signs = run("auto"), run("rademacher")
    assert chosen.converged.all()
    assert (chosen.num_probes <= signs.num_probes + 2).all()


@pytest.mark.parametrize(("needed", "design"), [(60, "UnitVectors()"), (20, "Rademacher()")])
def test_the_variance_of_a_trace_counts_both_sides_of_a_symmetric_jacobian(needed, design):
    """Of J_ij = 1 for all i and j: 2 D (D - 1) / M by M signs, and none by the D unit vectors."""
    D = 40
    result = hessdiag.trace(
        lambda x: x @ torch.ones(D, D), torch.zeros(1, D), max_probes=100, probes="auto",
        atol=(2 * D * (D - 1) / needed) ** 0.5,
    )  # fmt: skip
    assert f"{design} for 1" in result.note
