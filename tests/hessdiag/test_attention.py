"""Attention in forward mode: where the op is taken, where PyTorch's own rule, and both right."""

import threading

import pytest
import torch
from harness.memory import allocated_bytes
from torch import nn
from torch.nn import functional
from torch.nn.functional import scaled_dot_product_attention

import hessdiag
from hessdiag import attention as module
from hessdiag.compat import forward_mode_operators

WAYS = ("loop", "vmap", "fold")


@pytest.fixture
def taken(monkeypatch):
    """How often the op was taken, which small scores do not keep it from here."""
    calls = []
    original = module.attention_jvp

    def counted(*args, **kwargs):
        calls.append(args)
        return original(*args, **kwargs)

    monkeypatch.setattr(module, "attention_jvp", counted)
    monkeypatch.setattr(module, "_SMALL_SCORES", 0)
    return calls


def point(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def self_attention(**options):
    """Heads of x, which all of q, k and v depend on."""

    def score_fn(x):
        return scaled_dot_product_attention(x, x.sin(), x.cos() * x, **options)

    return score_fn


MASKS = {
    "none": {},
    "causal": {"is_causal": True},
    "scale": {"scale": 0.3},
    "boolean": {"attn_mask": torch.ones(5, 5).tril(1).bool()},
    "additive": {"attn_mask": point(3, 1, 5)},
    "nothing": {"attn_mask": torch.tensor([[False] * 5, *[[True] * 5] * 4])},
}


@pytest.mark.parametrize("batching", WAYS)
@pytest.mark.parametrize("kind", MASKS)
def test_products_are_those_of_reverse_mode(kind, batching, taken):
    x, probes = point(2, 3, 5, 8), point(4, 2, 3, 5, 8, seed=1)
    score_fn = self_attention(**MASKS[kind])
    J = hessdiag.Jacobian(score_fn, x, mode="jvp", batching=batching)
    products = J.products(probes)
    assert taken
    jacobian = hessdiag.jacobian(score_fn, x, mode="vjp", batching="loop")
    wanted = torch.einsum("bij,mbj->mbi", jacobian.flatten(2), probes.flatten(2))
    torch.testing.assert_close(products.flatten(2), wanted)


@pytest.mark.parametrize("batching", WAYS)
@pytest.mark.parametrize("shape", [(4, 6), (2, 4, 6)])
def test_samples_and_heads_may_lack(shape, batching, taken):
    """Of one sample by itself: attention takes (L, E) and (H, L, E)."""

    def score_fn(x):
        of_each = [scaled_dot_product_attention(sample, sample, 2 * sample) for sample in x]
        return torch.stack(of_each)

    x = point(2, *shape)
    result = hessdiag.hutchinson(score_fn, x, 3, mode="jvp", batching=batching)
    assert taken
    wanted = hessdiag.hutchinson(score_fn, x, 3, mode="vjp", batching="loop")
    assert result.shape == wanted.shape
    exact = hessdiag.exact(score_fn, x, mode="jvp", batching=batching)
    torch.testing.assert_close(exact, hessdiag.exact(score_fn, x, mode="vjp", batching="loop"))


@pytest.mark.parametrize("mask_shape", [(5, 5), (1, 5, 5), (3, 5, 5), (3, 1, 5)])
def test_masks_of_three_dimensions(mask_shape, taken):
    """(H, L, E) has a mask for each head."""
    x, mask = point(3, 5, 8), point(*mask_shape, seed=1)
    with forward_mode_operators():
        _, tangent = torch.func.jvp(self_attention(attn_mask=mask), (x,), (x,))
    assert len(taken) == 1
    jacobian = torch.autograd.functional.jacobian(self_attention(attn_mask=mask), x)
    torch.testing.assert_close(tangent, torch.tensordot(jacobian, x, dims=3))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_types(dtype, taken):
    x = point(2, 3, 5, 8).to(dtype)
    # Below float32 x.sin() and the result are rounded too.
    tolerance = {torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 1e-1}[dtype]
    with forward_mode_operators():
        results = torch.func.jvp(self_attention(), (x,), (x,))
        assert len(taken) == 1
        wanted = torch.func.jvp(self_attention(), (x.double(),), (x.double(),))
    for result, want in zip(results, wanted, strict=True):
        assert result.dtype == dtype
        torch.testing.assert_close(result.double(), want, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("given", ["query", "key", "value"])
def test_one_argument_that_depends(given, taken):
    tensors = {"query": point(2, 3, 5, 8), "key": point(2, 3, 7, 8), "value": point(2, 3, 7, 4)}
    x = tensors[given]

    def through(x):
        return scaled_dot_product_attention(**{**tensors, given: x})

    with forward_mode_operators():
        _, tangent = torch.func.jvp(through, (x,), (x,))
        batched = torch.func.vmap(lambda v: torch.func.jvp(through, (x,), (v,))[1])(x[None])
    assert len(taken) == 2
    jacobian = torch.autograd.functional.jacobian(through, x)
    torch.testing.assert_close(tangent, torch.tensordot(jacobian, x, dims=x.dim()))
    torch.testing.assert_close(batched[0], tangent)


@pytest.mark.parametrize("masked", [False, True])
def test_grouped_queries(masked, taken):
    q, k, mask = point(2, 6, 5, 8), point(2, 2, 5, 8), point(2, 1, 5, 5)

    def through(x):
        return scaled_dot_product_attention(
            q * x.sum(), x, x, attn_mask=mask if masked else None, enable_gqa=True
        )

    with forward_mode_operators():
        _, tangent = torch.func.jvp(through, (k,), (k,))
    assert len(taken) == 1
    jacobian = torch.autograd.functional.jacobian(through, k)
    torch.testing.assert_close(tangent, torch.tensordot(jacobian, k, dims=k.dim()))


def test_samples_and_probes_under_vmap(taken):
    """A vmap over samples around one over probes, and each of them with its mask."""
    x, probes, masks = point(4, 3, 5, 8), point(4, 2, 3, 5, 8, seed=1), point(4, 5, 5, seed=2)

    def of_sample(x, probes, mask):
        score_fn = self_attention(attn_mask=mask)
        return torch.func.vmap(lambda v: torch.func.jvp(score_fn, (x,), (v,))[1])(probes)

    with forward_mode_operators(), torch.no_grad():
        results = torch.func.vmap(of_sample)(x, probes, masks)
        assert len(taken) == 1
        alone = torch.stack([of_sample(*sample) for sample in zip(x, probes, masks, strict=True)])
    jacobians = [
        torch.autograd.functional.jacobian(self_attention(attn_mask=m), s)
        for s, m in zip(x, masks, strict=True)
    ]
    wanted = torch.stack(
        [
            torch.stack([torch.tensordot(J, v, dims=3) for v in vs])
            for J, vs in zip(jacobians, probes, strict=True)
        ]
    )
    torch.testing.assert_close(results, wanted)
    torch.testing.assert_close(alone, wanted)


def test_dual_numbers_without_torch_func(taken):
    x, v = point(2, 3, 5, 8), point(2, 3, 5, 8, seed=1)
    forward_ad = torch.autograd.forward_ad
    with forward_mode_operators(), forward_ad.dual_level():
        result = forward_ad.unpack_dual(self_attention()(forward_ad.make_dual(x, v))).tangent
    assert len(taken) == 1
    with forward_mode_operators():
        torch.testing.assert_close(result, torch.func.jvp(self_attention(), (x,), (v,))[1])


class TestPyTorchsOwnRule:
    """Uses that the op cannot follow go on as they did."""

    x = point(2, 3, 5, 8)

    def test_small_scores_on_a_cpu(self, monkeypatch):
        monkeypatch.setattr(module, "attention_jvp", None)
        with forward_mode_operators():
            torch.func.jvp(self_attention(), (self.x,), (self.x,))

    @pytest.mark.parametrize("probes", [1, 8])
    def test_scores_are_counted_over_probes(self, probes, taken, monkeypatch):
        """16 KiB of scores: those of all heads, samples and tangents decide."""
        x = point(2, 2, 32, 4, dtype=torch.float32)
        monkeypatch.setattr(module, "_SMALL_SCORES", 8 * 2 * 2 * 32 * 32 * 4)
        J = hessdiag.Jacobian(self_attention(), x, mode="jvp", batching="vmap")
        J.products(x.expand(probes, *x.shape))
        assert bool(taken) == (probes == 8)

    def test_forward_over_reverse(self, taken):
        def energy(x):
            return self_attention()(x).square().sum()

        x = self.x
        with forward_mode_operators():
            product = torch.func.jvp(torch.func.grad(energy), (x,), (x,))[1]
            hessian = torch.autograd.functional.hessian(energy, x)
        torch.testing.assert_close(product, torch.tensordot(hessian, x, dims=4))
        small = x[:1, :1, :2, :2]
        diagonal = hessdiag.hessian_diagonal(
            lambda x: self_attention()(x).square().flatten(1).sum(1),
            small,
            max_probes=4,
            probes="auto",
            mode="jvp",
        ).diagonal
        with forward_mode_operators():
            exact = torch.autograd.functional.hessian(energy, small).reshape(4, 4).diagonal()
        torch.testing.assert_close(diagonal.flatten(), exact)
        assert not taken

    def test_reverse_over_forward(self, taken):
        x, v = self.x, point(2, 3, 5, 8, seed=1)

        def slope(x):
            return torch.func.jvp(self_attention(), (x,), (v,))[1].square().sum()

        with forward_mode_operators():
            by_func = torch.func.grad(slope)(x)
            leaf = x.clone().requires_grad_()
            slope(leaf).backward()
        assert not taken
        step = 1e-6 * v
        with forward_mode_operators():
            difference = (slope(x + step) - slope(x - step)) / 2e-6
        torch.testing.assert_close(leaf.grad, by_func)
        torch.testing.assert_close((by_func * v).sum(), difference, rtol=1e-6, atol=1e-6)

    def test_forward_over_forward(self, taken):
        x = self.x

        def slope(x):
            return torch.func.jvp(self_attention(), (x,), (v,))[1]

        v = point(2, 3, 5, 8, seed=1)
        with forward_mode_operators():
            second = torch.func.jvp(slope, (x,), (v,))[1]
            assert not taken
            difference = (slope(x + 1e-5 * v) - slope(x - 1e-5 * v)) / 2e-5
        torch.testing.assert_close(second, difference, rtol=1e-6, atol=1e-6)

    def test_parameters_that_want_gradients(self, taken):
        """With gradients on, the graph goes through the product; without, nobody asks for it."""
        weight = point(8, 8).requires_grad_()
        x = self.x

        def product():
            return torch.func.jvp(lambda x: self_attention()(x @ weight), (x,), (x,))[1]

        with forward_mode_operators():
            found = torch.autograd.grad(product().square().sum(), weight)[0]
            assert not taken
            with torch.no_grad():
                assert not product().requires_grad
            assert len(taken) == 1
        assert found.abs().sum() > 0

    def test_differentiable_products(self, taken):
        x = self.x.clone().requires_grad_()
        results = []
        for mode in ("jvp", "vjp"):
            # Around reverse mode, for the flash backend has no second derivative.
            with forward_mode_operators():
                estimate = hessdiag.hutchinson(
                    self_attention(), x, 2, mode=mode, batching="loop", differentiable=True
                )
                results.append(torch.autograd.grad(estimate.sum(), x)[0])
        assert not taken
        assert results[0].abs().sum() > 0
        assert results[0].shape == results[1].shape
        # v^T J v is one number for J and its transpose, so is its gradient.
        torch.testing.assert_close(results[0], results[1])

    def test_masks_that_change(self, taken):
        x, bias = self.x, point(5, 5)
        with forward_mode_operators():
            _, tangent = torch.func.jvp(
                lambda b: scaled_dot_product_attention(x, x, x, attn_mask=b), (bias,), (bias,)
            )
            jacobian = torch.autograd.functional.jacobian(
                lambda b: scaled_dot_product_attention(x, x, x, attn_mask=b), bias
            )
            torch.testing.assert_close(tangent, torch.tensordot(jacobian, bias, dims=2))
            # Of x too, and with gradients on.
            torch.func.jvp(
                lambda x: scaled_dot_product_attention(x, x, x, attn_mask=x[0, 0] @ x[0, 0].mT),
                (x,),
                (x,),
            )
            learned = bias.clone().requires_grad_()
            torch.func.jvp(self_attention(attn_mask=learned), (x,), (x,))[1].sum().backward()
        assert not taken
        assert learned.grad.abs().sum() > 0

    def test_dropout(self, taken):
        torch.manual_seed(0)
        with forward_mode_operators():
            torch.func.jvp(self_attention(dropout_p=0.5), (self.x,), (self.x,))
        assert not taken

    def test_vmap_inside_of_forward_mode(self, taken):
        with forward_mode_operators():
            inside = torch.func.jvp(torch.func.vmap(self_attention()), (self.x,), (self.x,))
            assert not taken
            torch.testing.assert_close(
                inside, torch.func.jvp(self_attention(), (self.x,), (self.x,))
            )

    @pytest.mark.parametrize("shape", [(1, 2, 3, 5, 8), (1, 1, 5, 8)])
    def test_shapes_that_the_op_does_not_take(self, shape, taken):
        x = point(*shape)

        def through(x):
            return scaled_dot_product_attention(self.x, x, x)

        with forward_mode_operators():
            _, tangent = torch.func.jvp(through, (x,), (x,))
        assert not taken
        jacobian = torch.autograd.functional.jacobian(
            lambda x: torch.softmax(self.x @ x.mT / 8**0.5, -1) @ x, x
        )
        torch.testing.assert_close(tangent, torch.tensordot(jacobian, x, dims=x.dim()))

    def test_traced_code_holds_operators_of_pytorch(self, taken):
        from torch.fx.experimental.proxy_tensor import make_fx

        def product(x, v):
            return torch.func.jvp(self_attention(), (x,), (v,))[1]

        with forward_mode_operators():
            graph = make_fx(product)(self.x, self.x)
            assert not taken
            assert "hessdiag" not in graph.code
            torch.testing.assert_close(graph(self.x, self.x), product(self.x, self.x))

    def test_autocast(self, taken):
        """Of another type than autocast's it casts, of its own there is nothing to cast."""
        x = self.x.float()
        with forward_mode_operators(), torch.autocast("cpu", torch.bfloat16):
            torch.func.jvp(self_attention(), (x,), (x,))
            assert not taken
            low = torch.func.jvp(self_attention(), (x.bfloat16(),), (x.bfloat16(),))
        assert len(taken) == 1
        assert [t.dtype for t in low] == [torch.bfloat16] * 2

    def test_without_tangents(self, taken):
        with forward_mode_operators():
            result = self_attention()(self.x)
            torch.func.jvp(lambda x: self_attention()(self.x) + x, (self.x,), (self.x,))
        assert not taken
        torch.testing.assert_close(result, self_attention()(self.x))


def test_errors_are_those_of_pytorch(taken):
    x = point(2, 3, 5, 8)
    for options in (
        {"attn_mask": torch.ones(5, 5), "is_causal": True},
        {"attn_mask": torch.ones(4, 5)},
    ):
        with forward_mode_operators(), pytest.raises(RuntimeError):
            torch.func.jvp(self_attention(**options), (x,), (x,))
    assert not taken


class TestMultiHeadAttention:
    def layer(self):
        torch.manual_seed(0)
        layer = nn.MultiheadAttention(8, 2, batch_first=True).double().eval()
        return layer.requires_grad_(False)

    @pytest.mark.parametrize("masked", [False, True])
    @pytest.mark.parametrize("batching", WAYS)
    def test_products(self, masked, batching, taken):
        layer = self.layer()
        mask = torch.ones(4, 4).triu(1).bool() if masked else None

        def score_fn(x):
            return layer(x, x, x, attn_mask=mask, need_weights=False)[0]

        x = point(2, 4, 8)
        result = hessdiag.exact(score_fn, x, mode="jvp", batching=batching)
        assert taken
        torch.testing.assert_close(result, hessdiag.exact(score_fn, x, mode="vjp", batching="loop"))

    def test_the_own_function_comes_back(self, taken):
        before = functional.scaled_dot_product_attention
        layer, x = self.layer(), point(2, 4, 8)
        with forward_mode_operators():
            torch.func.jvp(lambda x: layer(x, x, x, need_weights=False)[0], (x,), (x,))
            with pytest.raises(RuntimeError):
                layer(x, x, x, attn_mask=torch.ones(4, 5), need_weights=False)
        assert functional.scaled_dot_product_attention is before

    def test_other_threads_have_their_own(self, taken, monkeypatch):
        """While one thread is inside of the layer, another takes attention as PyTorch has it."""
        x, y, found, original = point(2, 3, 5, 8), point(2, 4, 8), [], functional.linear
        threads, by_op = [], module._by_op

        def seen(*args, **kwargs):
            threads.append(threading.get_ident())
            return by_op(*args, **kwargs)

        def elsewhere():
            found.append(functional.scaled_dot_product_attention(x, x, x))

        def linear(*args):  # which the layer calls before and after its attention
            if not found:
                assert functional.scaled_dot_product_attention is not scaled_dot_product_attention
                thread = threading.Thread(target=elsewhere)
                thread.start()
                thread.join()
            return original(*args)

        layer = self.layer()
        monkeypatch.setattr(functional, "linear", linear)
        monkeypatch.setattr(module, "_by_op", seen)
        with forward_mode_operators():
            torch.func.jvp(lambda y: layer(y, y, y, need_weights=False)[0], (y,), (y,))
        assert len(taken) == 1
        assert threads == [threading.get_ident()]
        torch.testing.assert_close(found[0], scaled_dot_product_attention(x, x, x))

    @pytest.mark.parametrize("small", [0, 2**60])
    def test_autocast(self, small, monkeypatch):
        monkeypatch.setattr(module, "_SMALL_SCORES", small)
        layer, x = self.layer().float(), point(2, 4, 8).float()
        mask = point(4, 4, seed=1).float()

        def score_fn(x):
            return layer(x, x, x, attn_mask=mask, need_weights=False)[0].float()

        exact = hessdiag.exact(score_fn, x, mode="jvp", batching="vmap")
        low = hessdiag.exact(score_fn, x, mode="jvp", batching="vmap", autocast=torch.bfloat16)
        assert 0 < (low - exact).norm() < 0.05 * exact.norm()

    def test_a_second_derivative(self):
        layer, x = self.layer(), point(2, 4, 8)

        def energy(x):
            return layer(x, x, x, need_weights=False)[0].square().sum()

        with forward_mode_operators():
            product = torch.func.jvp(torch.func.grad(energy), (x,), (x,))[1]
            hessian = torch.autograd.functional.hessian(energy, x)
        torch.testing.assert_close(product, torch.tensordot(hessian, x, dims=3))


@pytest.mark.parametrize("batching", ["loop", "vmap"])
def test_memory_of_products(batching, monkeypatch):
    """Bytes that the CPU allocates for the products of a block of probes, both ways."""
    x, probes = point(1, 2, 1024, 16, dtype=torch.float32), 4

    def run():
        J = hessdiag.Jacobian(self_attention(), x, mode="jvp", batching=batching)
        return J.products(x.expand(probes, *x.shape))

    run()  # the check of the first block is left behind
    ours = allocated_bytes(run)
    monkeypatch.setattr(module, "_SMALL_SCORES", 2**60)
    theirs = allocated_bytes(run)
    scores = 2 * 1024 * 1024 * 4
    assert theirs > 3 * scores
    assert ours < 0.35 * theirs
    assert ours < 2 * scores
