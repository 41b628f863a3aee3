"""Forward mode in several threads, and what it may not leave behind in the process."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention

import hessdiag
from hessdiag.compat import forward_mode_operators

SWITCHES = (
    torch.backends.cuda.flash_sdp_enabled,
    torch.backends.cuda.mem_efficient_sdp_enabled,
    torch.backends.cuda.math_sdp_enabled,
    torch.backends.cuda.cudnn_sdp_enabled,
)


def attention(x):
    return scaled_dot_product_attention(x, x, x) + x


@pytest.mark.parametrize("batching", ["loop", "vmap", "fold"])
def test_threads_give_what_one_gives(batching):
    points = [torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(k)) for k in range(8)]

    def diagonal(x):
        return hessdiag.exact(attention, x, mode="jvp", batching=batching)

    alone = [diagonal(x) for x in points]
    before = [switch() for switch in SWITCHES]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(diagonal, points * 3))
    assert [switch() for switch in SWITCHES] == before
    for k, result in enumerate(together):
        torch.testing.assert_close(result, alone[k % len(points)])


def test_both_modes_at_once():
    x = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0))
    expected = hessdiag.exact(attention, x)
    with ThreadPoolExecutor(4) as pool:
        results = list(
            pool.map(lambda mode: hessdiag.exact(attention, x, mode=mode), ["vjp", "jvp"] * 8)
        )
    for result in results:
        torch.testing.assert_close(result, expected)


def test_other_threads_keep_their_attention():
    inside, done, seen = threading.Event(), threading.Event(), []

    def look():
        inside.wait(60)
        seen.extend(switch() for switch in SWITCHES)
        done.set()

    thread = threading.Thread(target=look)
    thread.start()

    def score_fn(x):
        inside.set()
        done.wait(60)
        return attention(x)

    before = [switch() for switch in SWITCHES]
    hessdiag.hutchinson(score_fn, torch.ones(1, 3, 4), 1, mode="jvp")
    thread.join()
    assert seen == before


def test_a_gradient_in_another_thread_is_not_refused():
    inside, done, found = threading.Event(), threading.Event(), []

    def train():
        inside.wait(60)
        weight = torch.ones(3, requires_grad=True)
        weight.square().sum().backward()
        found.append(weight.grad)
        done.set()

    thread = threading.Thread(target=train)
    thread.start()

    def score_fn(x):
        inside.set()
        done.wait(60)
        return x.sin()

    hessdiag.hutchinson(score_fn, torch.ones(1, 3), 1, mode="vjp")
    thread.join()
    assert torch.equal(found[0], torch.full((3,), 2.0))


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_multi_head_attention_in_forward_mode(masked, dtype):
    torch.manual_seed(0)
    layer = nn.MultiheadAttention(8, 2, batch_first=True).to(dtype).eval()
    mask = torch.ones(4, 4).triu(1).bool() if masked else None

    def score_fn(x):
        return layer(x, x, x, attn_mask=mask, need_weights=False)[0]

    x = torch.randn(2, 4, 8, generator=torch.Generator().manual_seed(1)).to(dtype)
    for batching in ("loop", "vmap", "fold"):
        torch.testing.assert_close(
            hessdiag.exact(score_fn, x, mode="jvp", batching=batching),
            hessdiag.exact(score_fn, x, mode="vjp", batching="loop"),
        )


@pytest.mark.parametrize(
    "arguments",
    [{}, {"is_causal": True}, {"scale": 0.3}, {"attn_mask": torch.ones(4, 4).tril().bool()}],
)
def test_attention_is_what_it_is_elsewhere(arguments):
    q, k, v = torch.randn(3, 2, 3, 4, 8, generator=torch.Generator().manual_seed(0))
    expected = scaled_dot_product_attention(q, k, v, **arguments)
    with forward_mode_operators():
        result = scaled_dot_product_attention(q, k, value=v, **arguments)
    torch.testing.assert_close(result, expected)
