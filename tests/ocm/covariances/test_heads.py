"""Heads compute in the type of their weights."""

import pytest
import torch

from ocm.covariances.learned.heads import CovarianceHead, ResidualHead, TokenHead

MAKERS = {
    "simple": (lambda: CovarianceHead(16, 3, 4), (2, 16, 4, 4)),
    "residual": (lambda: ResidualHead(16, 3, 4), (2, 16, 4, 4)),
    "tokens": (lambda: TokenHead(16, 3, 2, residual=True), (2, 3, 4, 16)),
}


@pytest.mark.parametrize("kind", MAKERS)
def test_heads_keep_their_digits_under_autocast(kind):
    """bfloat16 has a spacing of 1/256 below one, and leaves nothing of a small 1 + o."""
    make, shape = MAKERS[kind]
    head, generator = make(), torch.Generator().manual_seed(0)
    for parameter in head.parameters():
        torch.nn.init.normal_(parameter, std=0.1, generator=generator)
    features = torch.randn(shape, generator=generator)
    expected = head(features)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(head(features), expected)
        low = head(features.bfloat16())
    assert low.dtype == torch.float32
    assert torch.equal(low, head(features.bfloat16().float()))


@pytest.mark.parametrize("kind", MAKERS)
def test_heads_of_float64_stay_so(kind):
    make, shape = MAKERS[kind]
    assert make().double()(torch.randn(shape)).dtype == torch.float64
