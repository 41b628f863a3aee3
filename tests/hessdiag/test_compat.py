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


def has_tangent_inside(function):
    """Whether forward mode runs through the function, as it is seen from inside."""
    found = []

    def looking(x):
        y = function(x)
        found.append(compat.has_tangent(y))
        return y

    torch.func.jvp(looking, (torch.ones(2),), (torch.ones(2),))
    return found[0]


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


@pytest.mark.skipif(
    compat.TORCH_VERSION != (2, 11), reason="the failure was recorded on torch 2.11"
)
def test_inference_mode_still_has_to_be_left():
    with torch.inference_mode():
        assert not has_tangent_inside(torch.sin)


def test_inference_mode_is_left():
    with torch.inference_mode(), compat.forward_mode_operators():
        assert not torch.is_inference_mode_enabled()
        assert not torch.is_grad_enabled()
        assert has_tangent_inside(torch.sin)
    with compat.forward_mode_operators():
        assert torch.is_grad_enabled()


def test_attention_is_mended():
    with compat.forward_mode_operators():
        assert torch.isfinite(attention_jvp()).all()
