"""What PyTorch differentiates wrongly without a word: here it is right, or an error."""

import pytest
import torch
from torch import nn
from wrong_under_vmap import WrongUnderVmap

import hessdiag
from hessdiag import Jacobian

WAYS = [(mode, batching) for mode in ("vjp", "jvp") for batching in ("loop", "vmap", "fold")]


def point(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).double()


def softmin_of_distances(x):
    weights = point(4, 6, seed=1)
    return torch.softmax(-(torch.cdist(x, weights) ** 2), dim=1) @ weights - x


def rows_by_autograd(function, x):
    rows = torch.autograd.functional.jacobian(function, x)
    return torch.einsum("bibj->bij", rows)


class TestVmap:
    def test_cdist_is_taken_by_the_loop(self):
        x = point(3, 6)
        result = hessdiag.estimate(softmin_of_distances, x, max_probes=6, probes="auto")
        expected = rows_by_autograd(softmin_of_distances, x).diagonal(dim1=1, dim2=2)
        torch.testing.assert_close(result.diagonal, expected)
        assert result.batching == "loop"
        assert "vmap of the derivative of torch.cdist is wrong" in result.note

    def test_cdist_under_vmap_raises(self):
        with pytest.raises(ValueError, match=r"torch\.cdist is wrong; use batching='loop'"):
            hessdiag.exact(softmin_of_distances, point(3, 6), mode="vjp", batching="vmap")

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    @pytest.mark.parametrize("mode", ["vjp", "jvp"])
    def test_a_wrong_rule_is_found_by_a_plain_product(self, mode, dtype):
        x = point(3, 5).to(dtype)
        with pytest.raises(ValueError, match=r"batched product differs from a plain one by"):
            hessdiag.exact(WrongUnderVmap.apply, x, mode=mode, batching="vmap")
        result = hessdiag.estimate(WrongUnderVmap.apply, x, max_probes=5, probes="auto", mode=mode)
        torch.testing.assert_close(result.diagonal, 2 * x)
        assert result.batching == "loop"

    @pytest.mark.parametrize("mode", ["vjp", "jvp"])
    def test_what_was_found_right_is_not_looked_at_again(self, mode):
        evaluations = []

        def counted(x):
            evaluations.append(1)
            return torch.sin(x)

        probes = point(4, 3, 5)
        J = Jacobian(counted, point(3, 5), mode=mode, batching="vmap")
        J.products(probes)
        first = len(evaluations)
        J.products(probes)
        again = Jacobian(counted, point(3, 5), mode=mode, batching="vmap")
        again.products(probes)
        # Forward mode evaluates for each block, and once more for the plain product.
        assert (first, len(evaluations)) == ((1, 2) if mode == "vjp" else (2, 4))


@pytest.mark.parametrize(("mode", "batching"), WAYS)
def test_as_strided_scatter_is_refused(mode, batching):
    def score_fn(x):
        return torch.as_strided_scatter(x, x[:, :2] ** 2, (len(x), 2), (x.shape[1], 1))

    with pytest.raises(ValueError, match="as_strided_scatter"):
        Jacobian(score_fn, point(2, 4), mode=mode, batching=batching).products(point(3, 2, 4))


def test_an_unpooling_that_writes_a_place_twice():
    indices = torch.tensor([[[0, 1, 1]]])

    def score_fn(x):
        return nn.functional.max_unpool1d(x, indices, 2, stride=1, padding=0, output_size=[4])[
            ..., :3
        ]

    x = torch.tensor([[[1.0, 2.0, 3.0]]]).double()
    with pytest.raises(ValueError, match="max_unpool with an index that occurs twice"):
        hessdiag.jacobian(score_fn, x, mode="vjp")
    with pytest.warns(UserWarning, match="takes forward mode"):
        result = hessdiag.jacobian(score_fn, x)
    expected = [
        (score_fn(x + 1e-6 * e) - score_fn(x - 1e-6 * e)).flatten() / 2e-6
        for e in torch.eye(3).double()[:, None, None]
    ]
    torch.testing.assert_close(result[0], torch.stack(expected, dim=1), rtol=1e-6, atol=1e-6)


def couples(pair):
    """The sine, and one sample that sees another by a millionth."""
    source, target = pair

    def score_fn(x):
        seen = torch.zeros_like(x)
        seen[target] = 1.0
        return x.sin() + 1e-6 * seen * x[source]

    return score_fn


COUPLED = {
    "mean": lambda t: t - t.mean(0),
    "sum": lambda t: t.sum() * t,
    "BatchNorm": nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)).double(),
    "neighbours": lambda t: t + 0.1 * t.roll(1, 0),
    "differences of features": lambda t: t + t.flip(0) - t.flip(0).roll(1, 1),
}


class TestCoupling:
    @pytest.mark.parametrize("batch", [2, 3, 7, 20])
    @pytest.mark.parametrize(
        ("name", "mode"),
        # Forward mode refuses the running statistics of BatchNorm.
        [(name, "vjp") for name in COUPLED] + [(n, "jvp") for n in COUPLED if n != "BatchNorm"],
    )
    def test_coupling_raises(self, name, mode, batch):
        x = point(batch, 3)
        for function in (
            hessdiag.exact,
            hessdiag.jacobian,
            lambda *a, **k: hessdiag.block_diagonal(*a, partition=torch.tensor([0, 0, 1]), **k),
            lambda *a, **k: Jacobian(*a, **k).check_samples_alone(),
        ):
            with pytest.raises(ValueError, match="couples the samples of a batch"):
                function(COUPLED[name], x, mode=mode)

    @pytest.mark.parametrize("mode", ["vjp", "jvp"])
    @pytest.mark.parametrize("batch", [2, 5])
    def test_every_pair_is_seen(self, batch, mode):
        for source in range(batch):
            for target in set(range(batch)) - {source}:
                J = Jacobian(couples((source, target)), point(batch, 3), mode=mode)
                with pytest.raises(ValueError, match="couples the samples"):
                    J.check_samples_alone()

    def test_a_pair_among_many(self):
        for pair in ((0, 99), (57, 58), (98, 3)):
            with pytest.raises(ValueError, match="couples the samples"):
                Jacobian(couples(pair), point(100, 3)).check_samples_alone()

    @pytest.mark.parametrize("mode", ["vjp", "jvp"])
    def test_fold_sees_pairs_too(self, mode):
        J = Jacobian(couples((1, 2)), point(4, 3), mode=mode, batching="fold")
        with pytest.raises(ValueError, match="couples the samples"):
            J.products(point(2, 4, 3))

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_rounding_is_no_coupling(self, dtype):
        # A derivative that is nothing but rounding errors, a little different in each row.
        matrix = point(64, 64).to(dtype)

        def score_fn(x):
            return (x @ matrix) @ matrix - x @ (matrix @ matrix) + x * 1e-9

        Jacobian(score_fn, point(5, 64).to(dtype)).check_samples_alone()

    def test_an_infinite_derivative_is_no_coupling(self):
        J = Jacobian(lambda x: x.clamp(min=0).sqrt(), torch.tensor([[0.0], [1.0], [2.0]]))
        J.check_samples_alone()

    def test_it_is_looked_at_once_and_in_two_products(self):
        number = []
        J = Jacobian(lambda x: x.sin(), point(64, 3), batching="loop")
        products = J._evaluator.products
        J._evaluator.products = lambda probes: (number.append(len(probes)), products(probes))[1]
        J.check_samples_alone()
        J.in_basis(hessdiag.dct(1)).check_samples_alone()
        assert number == [2]


def energy_score(*, create_graph=True, of=lambda x: x, add=0.0):
    """The gradient of log cosh, whose Jacobian is sech^2, by torch.autograd.grad."""

    def score_fn(x):
        with torch.enable_grad():
            inner = of(x)
            energy = inner.cosh().log().sum()
            (gradient,) = torch.autograd.grad(energy, inner, create_graph=create_graph)
        return gradient + add * x

    return score_fn


class TestGradientsInside:
    @pytest.mark.parametrize("add", [0.0, 0.5])
    def test_with_a_graph(self, add):
        x = point(2, 3)
        result = hessdiag.exact(energy_score(of=torch.Tensor.requires_grad_, add=add), x)
        torch.testing.assert_close(result, x.cosh() ** -2 + add)

    @pytest.mark.parametrize("add", [0.0, 0.5])
    @pytest.mark.parametrize("batching", ["auto", "loop", "fold"])
    @pytest.mark.parametrize(
        "arguments",
        [
            {"create_graph": False},
            {"create_graph": False, "of": torch.Tensor.requires_grad_},
            {"create_graph": False, "of": lambda x: x.detach().requires_grad_()},
            {"of": lambda x: x.detach().requires_grad_()},
            {"of": lambda x: x.detach().clone().requires_grad_()},
        ],
    )
    def test_a_constant_gradient_is_named(self, arguments, batching, add):
        mode = "auto" if batching == "auto" else "vjp"
        score_fn = energy_score(**arguments, add=add)
        with pytest.raises(ValueError, match="create_graph=True"):
            hessdiag.exact(score_fn, point(2, 3), mode=mode, batching=batching)

    def test_backward_is_named_too(self):
        def score_fn(x):
            leaf = x.detach().requires_grad_()
            leaf.cosh().log().sum().backward()
            return leaf.grad + x

        with pytest.raises(ValueError, match="create_graph=True"):
            hessdiag.exact(score_fn, point(2, 3), mode="vjp", batching="loop")

    @pytest.mark.parametrize("batching", ["loop", "vmap"])
    def test_forward_mode_says_what_to_take(self, batching):
        score_fn = energy_score(of=torch.Tensor.requires_grad_)
        with pytest.raises(ValueError, match=r"autograd\.grad.*take it by torch\.func"):
            hessdiag.exact(score_fn, point(2, 3), mode="jvp", batching=batching)

    def test_nothing_is_left_behind(self):
        before = torch.autograd._engine_run_backward
        with pytest.raises(ValueError, match="create_graph=True"):
            hessdiag.exact(energy_score(create_graph=False), point(2, 3))
        assert torch.autograd._engine_run_backward is before
        x = torch.ones(1, requires_grad=True)
        torch.autograd.grad(x.sin(), x)
