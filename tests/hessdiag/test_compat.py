"""Each mend is still needed, and works; a failure here says that one can go."""

import pytest
import torch
from torch.nn import functional

from hessdiag import compat


def group_norm_jvp():
    x = torch.randn(2, 4, 3, 3).contiguous(memory_format=torch.channels_last)
    return torch.func.jvp(lambda x: functional.group_norm(x, 2), (x,), (torch.ones_like(x),))[1]


def attention_jvp():
    x = torch.randn(1, 2, 16, 8)
    return torch.func.jvp(lambda x: functional.scaled_dot_product_attention(x, x, x), (x,), (x,))[1]


@pytest.mark.skipif(
    compat.TORCH_VERSION != (2, 13), reason="the failure was recorded on torch 2.13"
)
def test_group_norm_still_needs_its_mend():
    with pytest.raises(RuntimeError, match="view size is not compatible"):
        group_norm_jvp()


def test_attention_still_needs_the_mathematical_backend():
    with pytest.raises(RuntimeError, match="forward"):
        attention_jvp()


def test_group_norm_is_mended():
    with compat.forward_mode_operators():
        assert torch.isfinite(group_norm_jvp()).all()


def test_attention_is_mended():
    with compat.forward_mode_operators():
        assert torch.isfinite(attention_jvp()).all()
