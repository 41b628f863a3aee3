"""Attention with tangents: reference and Triton kernel against NumPy and PyTorch's own rules."""

import importlib
import itertools
import math

import numpy as np
import pytest
import torch
from harness.memory import allocated_bytes
from torch.nn import functional

from hessdiag.kernels import attention_jvp

module = importlib.import_module("hessdiag.kernels.attention_jvp")
reference = importlib.import_module("hessdiag.kernels.attention_reference")

# Errors relative to the largest element: float32 rounds sums of some hundred terms, half types
# round inputs of the last product, and the interpreter truncates where a GPU rounds.
TOLERANCE = {
    torch.float64: 1e-8,
    torch.float32: 2e-5,
    torch.float16: 4e-3,
    torch.bfloat16: 3e-2,
}
TANGENTS = ("query_tangent", "key_tangent", "value_tangent")
MASKS = ("none", "boolean", "additive", "keys alone", "rows of nothing", "rows of -inf")


def inputs(
    batch=2,
    heads=2,
    queries=5,
    keys=7,
    head=16,
    value_head=None,
    probes=None,
    key_heads=None,
    dtype=torch.float64,
    seed=0,
):
    """q, k, v and a tangent of each, rounded to the type."""
    generator = torch.Generator().manual_seed(seed)
    key_heads = key_heads or heads
    shapes = [
        (batch, heads, queries, head),
        (batch, key_heads, keys, head),
        (batch, key_heads, keys, value_head or head),
    ]
    front = () if probes is None else (probes,)
    points = [torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes]
    tangents = [torch.randn(front + s, generator=generator, dtype=torch.float64) for s in shapes]
    # Values with a mean: their part of do vanishes, where the sums are right.
    points[2] += 2.0
    return [tensor.to(dtype) for tensor in (*points, *tangents)]


def mask_of(kind, batch, heads, queries, keys):
    generator = torch.Generator().manual_seed(1)
    if kind == "none":
        return None
    if kind == "boolean":
        mask = torch.rand(batch, 1, queries, keys, generator=generator) < 0.6
        mask[..., 0] = True
        return mask
    if kind == "additive":
        return 2 * torch.randn(heads, queries, keys, generator=generator)
    if kind == "keys alone":
        # Half of the keys of each sample, as padding is said.
        lengths = torch.tensor([max(1, keys - 1 - b) for b in range(batch)])
        return (torch.arange(keys) < lengths[:, None])[:, None, None, :]
    mask = torch.rand(queries, keys, generator=generator) < 0.5
    mask[0], mask[-1] = False, False
    if kind == "rows of nothing":
        return mask
    return torch.where(mask, 0.3, -math.inf)


def attention(q, k, v, mask=None, causal=False, scale=None):
    """Attention in NumPy, float64."""
    repeats = q.shape[1] // k.shape[1]
    k, v = np.repeat(k, repeats, axis=1), np.repeat(v, repeats, axis=1)
    scores = np.einsum("bhld,bhsd->bhls", q, k)
    scores = scores * (1 / math.sqrt(q.shape[-1]) if scale is None else scale)
    if mask is not None:
        mask = mask.numpy()
        scores = np.where(mask, scores, -np.inf) if mask.dtype == bool else scores + mask
    if causal:
        row, column = np.indices(scores.shape[-2:])
        scores = np.where(column <= row, scores, -np.inf)
    with np.errstate(invalid="ignore"):
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        weights = weights / weights.sum(-1, keepdims=True)
    weights = np.where(np.isneginf(scores).all(-1, keepdims=True), 0.0, weights)
    return weights @ v


def expected(points, tangents, **options):
    """Attention, and its central difference for each probe."""
    q, k, v = (point.double().numpy() for point in points)
    dq, dk, dv = (0.0 if tangent is None else tangent.double().numpy() for tangent in tangents)
    step = 1e-5
    ahead = attention(q + step * dq, k + step * dk, v + step * dv, **options)
    behind = attention(q - step * dq, k - step * dk, v - step * dv, **options)
    difference = torch.from_numpy((ahead - behind) / (2 * step))
    return torch.from_numpy(attention(q, k, v, **options)), difference


def expected_of_probes(points, tangents, **options):
    (number,) = {len(tangent) for tangent in tangents if tangent is not None}
    results = [
        expected(points, [None if t is None else t[m] for t in tangents], **options)
        for m in range(number)
    ]
    return results[0][0], torch.stack([tangent for _, tangent in results])


def by_kernel(points, tangents, mask=None, causal=False, scale=None, device="cpu"):
    """The Triton kernel, as the op calls it."""
    points, tangents = (
        [None if tensor is None else tensor.to(device) for tensor in tensors]
        for tensors in (points, tangents)
    )
    if mask is not None:
        mask = module._full_mask(mask.to(device), points[0], points[1])
    scale = 1 / math.sqrt(points[0].shape[-1]) if scale is None else scale
    results = module.attention_jvp_triton(*points, *tangents, mask, causal, scale)
    return [result.cpu() for result in results]


def assert_near(results, wanted, dtype):
    for result, want in zip(results, wanted, strict=True):
        assert result.dtype == dtype
        assert result.shape == want.shape
        error = (result.double() - want).abs().max() / want.abs().max()
        assert error <= TOLERANCE[dtype], error


def assert_right(points, tangents, device, *, mask=None, causal=False, scale=None):
    """Op and kernel against NumPy; tangents have a probe dimension."""
    dtype = points[0].dtype
    wanted = expected_of_probes(points, tangents, mask=mask, causal=causal, scale=scale)
    named = dict(zip(TANGENTS, tangents, strict=True))
    options = {"attn_mask": mask, "is_causal": causal, "scale": scale}
    gqa = points[0].shape[1] != points[1].shape[1]
    assert_near(attention_jvp(*points, **named, **options, enable_gqa=gqa), wanted, dtype)
    assert_near(by_kernel(points, tangents, mask, causal, scale, device), wanted, dtype)


@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("queries", "keys"), [(5, 7), (37, 18), (18, 37)])
def test_masks(kind, causal, queries, keys, kernel_device):
    heads = 2 if queries < 10 else 1
    points = inputs(2, heads, queries, keys, probes=2, dtype=torch.float32)
    mask = mask_of(kind, 2, heads, queries, keys)
    assert_right(points[:3], points[3:], kernel_device, mask=mask, causal=causal)


@pytest.mark.parametrize("head", [16, 32, 40, 64, 72, 80, 96, 128])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_head_sizes_and_types(head, dtype, kernel_device):
    points = inputs(1, 1, queries=9, keys=34, head=head, probes=2, dtype=dtype)
    mask = mask_of("additive", 1, 1, 9, 34)
    assert_right(points[:3], points[3:], kernel_device, mask=mask)


@pytest.mark.parametrize(("queries", "keys"), [(1, 1), (64, 64), (65, 33), (1, 130), (130, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("causal", [False, True])
def test_tails(queries, keys, dtype, causal, kernel_device):
    points = inputs(1, 1, queries, keys, head=20, value_head=24, probes=1, dtype=dtype)
    assert_right(points[:3], points[3:], kernel_device, causal=causal, scale=0.7)


@pytest.mark.parametrize("given", list(itertools.product([True, False], repeat=3))[:-1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tangents_that_are_zero(given, dtype, kernel_device):
    points = inputs(queries=9, keys=20, probes=3, dtype=dtype)
    tangents = [t if is_given else None for t, is_given in zip(points[3:], given, strict=True)]
    assert_right(points[:3], tangents, kernel_device)


def test_no_tangents_at_all(kernel_device):
    points = inputs(dtype=torch.float32)[:3]
    wanted, _ = expected(points, [None] * 3)
    for out, tangent in (attention_jvp(*points), by_kernel(points, [None] * 3)):
        torch.testing.assert_close(out.double(), wanted, rtol=1e-5, atol=1e-5)
        assert torch.equal(tangent.squeeze(0) if tangent.dim() == 5 else tangent, 0 * out)


@pytest.mark.parametrize(("key_heads", "kind"), [(1, "none"), (2, "additive"), (3, "boolean")])
def test_grouped_queries(key_heads, kind, kernel_device):
    points = inputs(heads=6, key_heads=key_heads, probes=2, dtype=torch.float32)
    mask = mask_of(kind, 2, 6, 5, 7)
    assert_right(points[:3], points[3:], kernel_device, mask=mask)
    out = functional.scaled_dot_product_attention(*points[:3], attn_mask=mask, enable_gqa=True)
    mine = attention_jvp(*points[:3], attn_mask=mask, enable_gqa=True)[0]
    torch.testing.assert_close(mine, out, rtol=1e-5, atol=1e-5)


# Three programs of two probes: of fewer, one that starts a probe too soon writes all the same.
@pytest.mark.parametrize("probes", [1, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_probes_at_once_are_each_alone(probes, dtype, kernel_device):
    points = inputs(queries=9, keys=35, head=32, probes=probes, dtype=dtype)
    named = dict(zip(TANGENTS, points[3:], strict=True))
    out, tangents = attention_jvp(*points[:3], **named)
    assert tangents.shape == (probes, *out.shape)
    on_kernel = by_kernel(points[:3], points[3:], device=kernel_device)[1]
    for m in range(probes):
        one = {name: tangent[m] for name, tangent in named.items()}
        torch.testing.assert_close(attention_jvp(*points[:3], **one)[1], tangents[m])
        alone = by_kernel(points[:3], [t[m : m + 1] for t in points[3:]], device=kernel_device)[1]
        torch.testing.assert_close(alone[0], on_kernel[m], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_changes_nothing(dtype):
    points = inputs(probes=2, dtype=dtype)
    with torch.autocast("cpu", torch.bfloat16):
        results = attention_jvp(*points)
    torch.testing.assert_close(results, attention_jvp(*points), rtol=0, atol=0)


def test_scores_far_apart(kernel_device):
    """The largest score grows from block to block, by more than exp can hold."""
    points = inputs(1, 1, 3, 100, probes=2, dtype=torch.float32)
    mask = torch.linspace(-400, 400, 100).expand(3, 100)
    assert_right(points[:3], points[3:], kernel_device, mask=mask)
    # As transformers masks: finite, and what is left of the scores is lost in it.
    mask = torch.zeros(3, 100)
    mask[0], mask[1, :60] = torch.finfo(torch.float32).min, torch.finfo(torch.float32).min
    q, k, v, *tangents = points
    out, tangent = attention_jvp(
        q, k, v, **dict(zip(TANGENTS, tangents, strict=True)), attn_mask=mask
    )
    wanted = by_mathematics(mask)
    for m in range(2):
        one = tuple(t[m] for t in tangents)
        values = torch.func.jvp(wanted, (q, k, v), one)
        torch.testing.assert_close((out, tangent[m]), values, rtol=1e-4, atol=1e-5)
    on_kernel = by_kernel((q, k, v), tangents, mask, device=kernel_device)
    torch.testing.assert_close(on_kernel, [out, tangent], rtol=1e-4, atol=1e-5)


def by_mathematics(mask=None, causal=False, scale=None, gqa=False):
    """PyTorch's mathematical backend, which has a forward-mode rule."""

    def of(q, k, v):
        additive = mask
        if mask is not None and mask.dtype == torch.bool:
            additive = torch.where(mask, 0.0, -math.inf).to(q.dtype)
        return torch.ops.aten._scaled_dot_product_attention_math(
            q, k, v, additive, 0.0, causal, scale=scale, enable_gqa=gqa
        )[0]

    return of


@pytest.mark.parametrize("kind", MASKS)
def test_rows_without_keys_are_those_of_pytorch(kind):
    q, k, v, *tangents = inputs(dtype=torch.float32)
    mask = mask_of(kind, 2, 2, 5, 7)
    wanted = torch.func.jvp(by_mathematics(mask), (q, k, v), tuple(tangents))
    mine = attention_jvp(q, k, v, *tangents, attn_mask=mask)
    torch.testing.assert_close(mine, wanted, rtol=1e-5, atol=1e-5)
    if kind.startswith("rows"):
        assert (mine[0][:, :, 0] == 0).all()
        assert (mine[1][:, :, 0] == 0).all()
        assert (mine[0][:, :, 1] != 0).any()


def test_nan_is_not_hidden(kernel_device):
    q, k, v, *tangents = inputs(1, 1, 3, 4, dtype=torch.float32)
    q[0, 0, 1, 2] = math.nan
    wanted = torch.func.jvp(by_mathematics(), (q, k, v), tuple(tangents))
    results = [attention_jvp(q, k, v, *tangents)]
    on_kernel = by_kernel((q, k, v), [t[None] for t in tangents], device=kernel_device)
    results.append((on_kernel[0], on_kernel[1][0]))
    for result in results:
        for one, other in zip(result, wanted, strict=True):
            assert torch.equal(one.isnan(), other.isnan())


@pytest.mark.parametrize("layout", ["transposed", "columns apart", "expanded"])
def test_strides(layout, kernel_device):
    points = inputs(queries=7, keys=7, probes=2, dtype=torch.float32)

    def laid(tensor):
        if layout == "transposed":
            return tensor.transpose(-3, -2).contiguous().transpose(-3, -2)
        if layout == "columns apart":
            return tensor.mT.contiguous().mT
        return tensor[..., :1, :, :].expand(tensor.shape)

    points = [laid(tensor) for tensor in points]
    mask = torch.randn(2, 7, 1).expand(2, 7, 7)[:, None].mT  # strides of 0
    assert_right(points[:3], points[3:], kernel_device, mask=mask)
    copied = mask.contiguous()
    torch.testing.assert_close(
        by_kernel(points[:3], points[3:], mask, device=kernel_device),
        by_kernel(points[:3], points[3:], copied, device=kernel_device),
    )


def test_large_strides_are_counted_in_64_bits(kernel_device, monkeypatch):
    """The same program as for offsets that do not fit, on small tensors."""
    points = inputs(queries=9, keys=20, probes=2, dtype=torch.float32)
    mask = torch.randn(9, 20)
    seen = []

    class Launched:
        def __getitem__(self, grid):
            def launch(*arguments, **constants):
                seen.append(constants["WIDE"])
                return kernel[grid](*arguments, **(constants | {"WIDE": True, "UPCAST": False}))

            return launch

    by_triton = importlib.import_module("hessdiag.kernels.attention_triton")
    kernel = by_triton._attention_jvp_kernel
    monkeypatch.setattr(by_triton, "_attention_jvp_kernel", Launched())
    wanted = expected_of_probes(points[:3], points[3:], mask=mask)
    result = by_kernel(points[:3], points[3:], mask, device=kernel_device)
    assert_near(result, wanted, torch.float32)
    assert seen == [False]


@pytest.mark.parametrize("empty", ["queries", "keys", "batch", "probes"])
def test_nothing_to_attend(empty, kernel_device):
    sizes = {"batch": 2, "queries": 3, "keys": 4, "probes": 2, empty: 0}
    points = inputs(**sizes, dtype=torch.float32)
    for out, tangent in (
        attention_jvp(*points),
        by_kernel(points[:3], points[3:], device=kernel_device),
    ):
        assert out.shape == points[0].shape
        assert tangent.shape == points[3].shape
        assert not tangent.any()
        if empty == "keys":
            assert not out.any()


def test_outputs_are_written_everywhere(kernel_device, monkeypatch):
    points = inputs(queries=35, keys=7, head=24, probes=3, dtype=torch.float32)
    original = torch.Tensor.new_empty
    monkeypatch.setattr(
        torch.Tensor, "new_empty", lambda x, *a, **k: original(x, *a, **k).fill_(math.nan)
    )
    for results in (
        by_kernel(points[:3], points[3:], device=kernel_device),
        attention_jvp(*points),
    ):
        assert all(torch.isfinite(result).all() for result in results)


class TestTemporaryMemory:
    """Of the reference, whose scores are those of a block of queries."""

    @pytest.mark.parametrize("limit", [0, 500, 3000, 10**9])
    @pytest.mark.parametrize("kind", ["none", "boolean", "additive"])
    @pytest.mark.parametrize("causal", [False, True])
    def test_results_do_not_depend_on_the_blocks(self, limit, kind, causal, monkeypatch):
        monkeypatch.setitem(reference.TEMPORARY_BYTES, "cpu", limit)
        points = inputs(2, 4, 5, 7, probes=2, key_heads=2)
        mask = mask_of(kind, 2, 4, 5, 7)
        wanted = expected_of_probes(points[:3], points[3:], mask=mask, causal=causal)
        results = attention_jvp(*points, attn_mask=mask, is_causal=causal, enable_gqa=True)
        assert_near(results, wanted, torch.float64)

    @pytest.mark.parametrize("rows", [1, 3, 4, 10, 24, 100])
    def test_blocks_cover_every_query_once(self, rows):
        seen = torch.zeros(6, 4, dtype=torch.int)
        for group, first, last in reference._blocks(6, 4, 28, 3 * 28 * rows):
            assert (group.stop - group.start) * (last - first) <= rows
            seen[group, first:last] += 1
        assert (seen == 1).all()

    @pytest.mark.parametrize("size", [1024, 4096])
    def test_it_does_not_grow_with_the_scores(self, size):
        """Bytes that the CPU allocates, of the op and of PyTorch's rule."""
        q, k, v, dq, dk, dv = inputs(1, 1, size, size, head=16, dtype=torch.float32)
        ours = allocated_bytes(lambda: attention_jvp(q, k, v, dq, dk, dv))
        theirs = allocated_bytes(lambda: torch.func.jvp(by_mathematics(), (q, k, v), (dq, dk, dv)))
        outputs = 2 * q.nbytes
        assert ours <= outputs + reference.TEMPORARY_BYTES["cpu"] + 4 * q.nbytes
        assert theirs >= 3 * size * size * 4
        assert theirs >= (3 if size == 1024 else 25) * ours


def test_under_vmap_and_jvp():
    """By the op's rule for vmap, with every pattern of what is batched."""
    points = inputs(probes=3)
    wanted = expected_of_probes(points[:3], points[3:])
    q, k, v, dq, dk, dv = points
    named = dict(zip(TANGENTS, (dq, dk, dv), strict=True))
    assert_near(attention_jvp(q, k, v, **named), wanted, torch.float64)
    probes = torch.func.vmap(lambda *t: attention_jvp(q, k, v, *t), out_dims=(None, 0))(dq, dk, dv)
    assert_near(probes, wanted, torch.float64)
    samples = torch.func.vmap(
        lambda q, k, v, *t: attention_jvp(q[None], k[None], v[None], *(d[:, None] for d in t)),
        in_dims=(0, 0, 0, 1, 1, 1),
        out_dims=(0, 1),
    )(*points)
    assert_near([samples[0][:, 0], samples[1][:, :, 0]], wanted, torch.float64)
    both = torch.func.vmap(
        lambda q, k, v, *t: torch.func.vmap(
            lambda *d: attention_jvp(q[None], k[None], v[None], *(x[None] for x in d))
        )(*t),
        in_dims=(0, 0, 0, 1, 1, 1),
        out_dims=(0, 1),
    )(*points)
    assert_near([both[0][:, 0, 0], both[1][:, :, 0]], wanted, torch.float64)


def test_blocks_of_probes_under_vmap():
    q, k, v, *tangents = inputs(probes=6)
    blocks = [tangent.unflatten(0, (2, 3)) for tangent in tangents]
    _, found = torch.func.vmap(lambda *block: attention_jvp(q, k, v, *block), out_dims=(None, 0))(
        *blocks
    )
    wanted = attention_jvp(q, k, v, *tangents)[1]
    torch.testing.assert_close(found.flatten(0, 1), wanted)


@pytest.mark.parametrize("kind", ["boolean", "additive", "keys alone"])
@pytest.mark.parametrize("mask_too", [False, True])
@pytest.mark.parametrize("batch", [1, 2])
def test_masks_under_vmap(kind, mask_too, batch):
    """Samples beside samples: the mask is that of each, or one for all."""
    groups = [inputs(batch=batch, seed=seed) for seed in range(3)]
    masks = [mask_of(kind, batch, 2, 5, 7) for _ in range(3)]
    if mask_too:
        masks = [mask.roll(shift, -1) for shift, mask in enumerate(masks)]
        masks = [mask & True if mask.dtype == torch.bool else mask for mask in masks]
    stacked = [torch.stack(tensors) for tensors in zip(*groups, strict=True)]
    outs, tangents = torch.func.vmap(
        lambda mask, *points: attention_jvp(*points, attn_mask=mask),
        in_dims=(0 if mask_too else None, 0, 0, 0, 0, 0, 0),
    )(torch.stack(masks) if mask_too else masks[0], *stacked)
    for group, mask, out, tangent in zip(groups, masks, outs, tangents, strict=True):
        wanted = expected(group[:3], group[3:], mask=mask)
        assert_near((out, tangent), wanted, torch.float64)


def test_the_op_passes_opcheck():
    q, k, v, *tangents = inputs(probes=2, dtype=torch.float32)
    mask = module._full_mask(mask_of("additive", 2, 2, 5, 7), q, k)
    op = torch.ops.hessdiag.attention_jvp.default
    torch.library.opcheck(op, (q, k, v, *tangents, mask, False, 0.5))
    torch.library.opcheck(op, (q, k, v, None, None, tangents[2], None, True, 0.5))


POINT = torch.zeros(2, 3, 4, 5)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"query": [1]}, TypeError, "query must be a torch.Tensor, got list"),
        ({"query": POINT.int()}, TypeError, "query must be.*int32"),
        ({"query": POINT[0]}, ValueError, r"query must have shape \(B, H, L, E\), got \(3, 4, 5\)"),
        ({"key": POINT.double()}, TypeError, "key must be of torch.float32.*float64"),
        ({"value": POINT[:1]}, ValueError, r"must have shapes.*\(1, 3, 4, 5\)"),
        ({"key": POINT[..., :4]}, ValueError, r"must have shapes.*\(2, 3, 4, 4\)"),
        ({"key": POINT.to("meta")}, ValueError, "key must be on cpu, got meta"),
        (
            {"key": POINT[:, :1], "value": POINT[:, :1]},
            ValueError,
            "with enable_gqa=True a divisor of them, got 1 for 3",
        ),
        (
            {"key": POINT[:, :2], "value": POINT[:, :2], "enable_gqa": True},
            ValueError,
            "got 2 for 3",
        ),
        ({"query_tangent": POINT[0]}, ValueError, r"query_tangent must have shape \(2, 3, 4, 5\)"),
        ({"key_tangent": POINT.half()}, TypeError, "key_tangent must be of torch.float32"),
        (
            {"key_tangent": POINT, "value_tangent": POINT[None]},
            ValueError,
            "key_tangent: None, value_tangent: 1",
        ),
        (
            {"key_tangent": POINT.expand(2, *POINT.shape), "value_tangent": POINT[None]},
            ValueError,
            "key_tangent: 2, value_tangent: 1",
        ),
        ({"dropout_p": 0.1}, ValueError, "dropout_p must be 0, got 0.1"),
        ({"attn_mask": 1.0}, TypeError, "attn_mask must be a torch.Tensor, got float"),
        ({"attn_mask": torch.ones(4, 4).int()}, TypeError, "attn_mask must be boolean.*int32"),
        ({"attn_mask": torch.ones(3, 4)}, ValueError, r"to \(2, 3, 4, 4\), got \(3, 4\)"),
        ({"attn_mask": torch.ones(1, 2, 3, 4, 4)}, ValueError, "attn_mask must broadcast"),
        (
            {"attn_mask": torch.ones(4, 4, requires_grad=True)},
            ValueError,
            "attn_mask must not require gradients",
        ),
        ({"attn_mask": torch.ones(4, 4, device="meta")}, ValueError, "attn_mask must be on cpu"),
    ],
)
def test_errors_name_the_argument_and_its_value(change, error, message):
    with pytest.raises(error, match=message):
        attention_jvp(**{"query": POINT, "key": POINT, "value": POINT, **change})


@pytest.mark.parametrize("name", ["query", "key", "attn_mask"])
def test_dual_numbers_are_refused(name):
    points = {"query": POINT, "key": POINT, "value": POINT, "attn_mask": torch.zeros(4, 4)}

    def call(x):
        return attention_jvp(**{**points, name: x})[0]

    with pytest.raises(TypeError, match=f"{name} carries a tangent"):
        torch.func.jvp(call, (points[name],), (points[name],))
