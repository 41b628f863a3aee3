"""Moments in low precision, looks at a tolerance, and lanes that end before others."""

import torch

import hessdiag
from hessdiag.streaming import BlockMoments


def test_moments_of_low_precision_are_kept_in_full():
    """A mean in bfloat16 would stop moving after some hundred blocks."""
    g = torch.Generator().manual_seed(0)
    probes, products = (torch.randn(2000, 1, 3, generator=g).bfloat16() for _ in range(2))
    moments = BlockMoments(2, 0.5)
    for first in range(0, 2000, 50):
        moments.add(first, probes[first : first + 50], products[first : first + 50])
    count, mean, deviations = moments.moments()
    values = (probes.double() * products.double()).unflatten(0, (1000, 2)).sum(1) / 2
    assert count == 1000
    assert mean.dtype == torch.float32
    torch.testing.assert_close(mean.double(), values.mean(0), rtol=0, atol=1e-5)
    torch.testing.assert_close(deviations.double(), 999 * values.var(0), rtol=1e-4, atol=0)


def test_an_unknown_error_is_within_no_tolerance():
    """Not even the largest: a single block says nothing."""
    A = torch.randn(32, 32, generator=torch.Generator().manual_seed(0))
    result = hessdiag.estimate(
        lambda x: x @ A, torch.zeros(1, 32), max_probes=96,
        probes=hessdiag.BalancedColoring(16), atol=1e300,
    )  # fmt: skip
    assert result.num_probes.tolist() == [32]
    assert result.converged.tolist() == [True]


def test_a_sample_that_is_exact_has_one_block_beside_others():
    """Five unit vectors for the sample with large rows, signs for the one that is diagonal."""
    A = torch.zeros(2, 5, 5)
    A[0] = 1.0 + torch.eye(5)
    A[1] = torch.eye(5)
    result = hessdiag.estimate(
        lambda x: torch.einsum("bij,bj->bi", A, x), torch.zeros(2, 5), max_probes=80,
        probes="auto", rtol=0.01,
    )  # fmt: skip
    assert "UnitVectors() for 1" in result.note
    assert "Rademacher() for 1" in result.note
    assert result.num_blocks[0] == 1
    assert result.num_blocks[1] > 1
    torch.testing.assert_close(result.diagonal, A.diagonal(dim1=1, dim2=2))
    assert (result.stderr == 0).all()
