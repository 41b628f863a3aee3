"""Diagonals that are sums over a data set, against Jacobians sample by sample in float64."""

import functools

import pytest
import torch
import torch.multiprocessing as mp
from data_worker import batches, regression, worker
from small_classifier import flat, small_classifier
from torch import nn
from torch.nn import functional

import hessdiag
from hessdiag import over_data, per_sample


def jacobians(module, inputs):
    """J of each sample, (C, ...) by name: one sample, one output and one backward pass a time."""
    parameters = {name: p for name, p in module.named_parameters() if p.requires_grad}
    found = []
    for x in inputs:
        rows = [
            torch.autograd.grad(
                output, parameters.values(), retain_graph=True, materialize_grads=True
            )
            for output in module(x[None]).flatten()
        ]
        found.append(dict(zip(parameters, map(torch.stack, zip(*rows, strict=True)), strict=True)))
    return found


def sum_of_squares(module, inputs):
    """The Gauss-Newton diagonal of half the squared outputs: the squares of all of J."""
    total = {}
    for J in jacobians(module, inputs):
        for name, part in J.items():
            total[name] = total.get(name, 0) + part.square().sum(0)
    return total


def half_squares(outputs, targets):
    return outputs.square().sum() / 2


def assert_same(result, expected, **tolerance):
    assert set(result) == set(expected)
    for name, value in expected.items():
        torch.testing.assert_close(result[name], value, msg=name, **tolerance)


@pytest.fixture(scope="module")
def problem():
    return small_classifier()


# Against matrices


@pytest.mark.parametrize("as_function", [False, True])
def test_exact_against_the_matrix(problem, as_function):
    model, parameters = problem.module, None
    if as_function:
        parameters = problem.parameters

        def model(p, x):
            return torch.func.functional_call(problem.module, p, (x,))

    G = problem.gauss_newton()
    data = [(problem.inputs, problem.targets)]
    result = hessdiag.gauss_newton_over_data(
        model, functional.cross_entropy, data, parameters=parameters
    )
    torch.testing.assert_close(flat(result.diagonal), G.diagonal())
    assert (int(result.num_probes), result.note) == (2, "")
    assert not flat(result.stderr).any()
    assert list(result.diagonal) == list(problem.parameters)


def curved_both_ways(outputs, targets):
    return (outputs.pow(3).sum(1) + outputs.prod(1)).mean()


@pytest.mark.parametrize(
    "loss", [nn.CrossEntropyLoss(), nn.CrossEntropyLoss(reduction="sum"), curved_both_ways]
)
def test_what_the_loss_averages_over_a_batch_does_not_matter(problem, loss):
    def summed(outputs):
        return sum(loss(o[None], y[None]) for o, y in zip(outputs, problem.targets, strict=True))

    G = problem.gauss_newton(summed).diagonal()
    unequal = [slice(0, 1), slice(1, 8), slice(8, 20)]
    data = [(problem.inputs[part], problem.targets[part]) for part in unequal]
    for reduction, expected in (("sum", G), ("mean", G / 20)):
        result = hessdiag.gauss_newton_over_data(problem.module, loss, data, reduction=reduction)
        torch.testing.assert_close(flat(result.diagonal), expected)


def test_empirical_fisher(problem):
    def loss(p, n):
        outputs = torch.func.functional_call(problem.module, p, (problem.inputs[n : n + 1],))
        return functional.cross_entropy(outputs, problem.targets[n : n + 1])

    expected = sum(flat(torch.func.grad(loss)(problem.parameters, n)).square() for n in range(20))
    data = [(problem.inputs[:5], problem.targets[:5]), (problem.inputs[5:], problem.targets[5:])]
    for reduction, scale in (("sum", 1), ("mean", 1 / 20)):
        result = hessdiag.empirical_fisher_over_data(
            problem.module, functional.cross_entropy, data, reduction=reduction
        )
        torch.testing.assert_close(flat(result.diagonal), scale * expected)
    assert int(result.num_probes) == 1


def test_agrees_with_products_of_the_matrix(problem):
    """The same matrix by another way: the products of ``gauss_newton_diagonal``."""
    other = hessdiag.gauss_newton_diagonal(
        problem.model, problem.loss, problem.parameters, max_probes=43, probes="auto"
    )
    result = hessdiag.gauss_newton_over_data(
        problem.module, functional.cross_entropy, [(problem.inputs, problem.targets)]
    )
    torch.testing.assert_close(flat(result.diagonal), flat(other.diagonal))


def test_backpack_agrees():
    from backpack import backpack, extend
    from backpack.extensions import DiagGGNExact

    torch.manual_seed(0)
    module = nn.Sequential(
        nn.Conv2d(2, 4, 3, stride=2, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(36, 5)
    )
    x, y = torch.randn(7, 2, 6, 6), torch.randint(5, (7,))
    result = hessdiag.gauss_newton_over_data(module, functional.cross_entropy, [(x, y)])
    with backpack(DiagGGNExact()):
        extend(nn.CrossEntropyLoss())(extend(module)(x), y).backward()
    expected = {name: p.diag_ggn_exact for name, p in module.named_parameters()}
    assert_same(result.diagonal, expected, rtol=1e-5, atol=1e-7)


# Layers


class Tokens(nn.Module):
    """Embeddings, layers over tokens, attention, and a parameter that no layer holds."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(7, 4, padding_idx=0)
        self.places = nn.Parameter(torch.randn(3, 4))
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.norm = nn.LayerNorm(4)
        self.out = nn.Linear(4, 2)

    def forward(self, tokens):
        x = self.embedding(tokens) + self.places
        return self.out(self.norm(x + self.attention(x, x, x, need_weights=False)[0]))


class Tied(nn.Module):
    """One weight in two layers, one layer called twice, one weight used without its layer."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4, bias=False)
        self.second.weight = self.first.weight
        self.twice, self.elsewhere = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        x = self.second(self.first(x).tanh())
        x = self.twice(self.twice(x).tanh())
        return self.elsewhere(x) * functional.linear(x, self.elsewhere.weight)


class Permuted(nn.Module):
    """The batch is not in front inside, and as long as what is."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 3)

    def forward(self, x):
        return self.layer(x.transpose(0, 1)).tanh().sum(2).T


class Unused(nn.Module):
    def __init__(self):
        super().__init__()
        self.used, self.unused = nn.Linear(3, 2), nn.Linear(3, 2)

    def forward(self, x):
        return self.used(x)


MODULES = {
    "linear": (
        lambda: nn.Sequential(nn.Linear(3, 4, bias=False), nn.Tanh(), nn.Linear(4, 2)),
        (3,),
    ),
    "in place": (
        lambda: nn.Sequential(nn.Linear(3, 4), nn.ReLU(inplace=True), nn.Linear(4, 2)),
        (3,),
    ),
    "sequences": (lambda: nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)), (2, 5, 3)),
    "conv1d": (lambda: nn.Conv1d(4, 6, 3, stride=2, dilation=2, groups=2, padding=1), (4, 9)),
    "conv2d": (lambda: nn.Conv2d(2, 4, (3, 2), stride=(1, 2), padding="valid"), (2, 5, 6)),
    "same": (lambda: nn.Conv2d(2, 4, (4, 3), padding="same", bias=False), (2, 5, 6)),
    "depthwise": (lambda: nn.Conv2d(4, 8, 3, groups=4, padding=2), (4, 5, 5)),
    "conv3d": (lambda: nn.Conv3d(1, 2, 2), (1, 3, 3, 3)),
    "circular": (lambda: nn.Conv2d(2, 3, 3, padding=1, padding_mode="circular"), (2, 4, 4)),
    "transposed": (lambda: nn.ConvTranspose2d(2, 3, 3), (2, 4, 4)),
    "layer norm": (
        lambda: nn.Sequential(nn.LayerNorm((2, 3)), nn.Tanh(), nn.LayerNorm(3)),
        (4, 2, 3),
    ),
    "group norm": (
        lambda: nn.Sequential(nn.GroupNorm(2, 4), nn.Tanh(), nn.GroupNorm(1, 4)),
        (4, 3),
    ),
    "batch norm": (lambda: nn.Sequential(nn.BatchNorm1d(4), nn.Tanh()).eval(), (4,)),
    "batch norm 2d": (lambda: nn.Sequential(nn.BatchNorm2d(4), nn.Tanh()).eval(), (4, 3, 3)),
    "recurrent": (lambda: nn.Sequential(nn.GRU(3, 4, batch_first=True), First()), (5, 3)),
    "tokens": (Tokens, None),
    "tied": (Tied, (4,)),
    "permuted": (Permuted, (4, 3)),
    "unused": (Unused, (3,)),
}


class First(nn.Module):
    def forward(self, outputs):
        return outputs[0][:, -1]


@pytest.mark.parametrize("samples", [1, 4, 5])
@pytest.mark.parametrize("name", MODULES)
def test_modules(name, samples):
    torch.manual_seed(0)
    make, shape = MODULES[name]
    module = make().double()
    for layer in module.modules():
        if isinstance(layer, nn.BatchNorm1d | nn.BatchNorm2d):
            nn.init.uniform_(layer.running_var, 0.5, 2.0)
    if shape is None:
        inputs = torch.randint(7, (samples, 3))
    else:
        inputs = torch.randn(samples, *shape, dtype=torch.float64)
    result = hessdiag.gauss_newton_over_data(
        module, half_squares, [(inputs, inputs)], reduction="sum"
    )
    expected = sum_of_squares(module, inputs)
    assert_same(result.diagonal, expected)


@pytest.mark.parametrize(
    ("name", "layers"),
    [
        ("linear", {"0", "2"}),
        ("sequences", {"0", "2"}),
        ("conv1d", {""}),
        ("conv2d", {""}),
        ("same", {""}),
        ("depthwise", {""}),
        ("conv3d", {""}),
        ("layer norm", {"0", "2"}),
        ("group norm", {"0", "2"}),
        ("circular", set()),
        ("tokens", {"embedding", "norm", "out"}),
        ("tied", set()),
        ("permuted", set()),
    ],
)
def test_which_layers_are_known(name, layers):
    """What the check must leave to differentiation sample by sample, and what it must not."""
    torch.manual_seed(0)
    make, shape = MODULES[name]
    module = make().double()
    inputs = torch.randint(7, (4, 3)) if shape is None else torch.randn(4, *shape).double()
    names = list(dict(module.named_parameters()))
    tree = over_data.ParameterTree.of(dict(module.named_parameters()))
    gradients = per_sample.SampleGradients(module, tree, names, [])
    gradients.at(inputs)
    assert set(gradients._layers) == layers


def test_a_row_that_a_sample_looks_up_twice_has_one_gradient():
    """And a row of padding has none."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Embedding(5, 3, padding_idx=0), nn.Flatten(), nn.Linear(9, 2))
    inputs = torch.tensor([[1, 1, 2], [3, 3, 3], [0, 4, 0], [0, 1, 2]])
    module = module.double()
    result = hessdiag.gauss_newton_over_data(
        module, half_squares, [(inputs, inputs)], reduction="sum"
    )
    assert_same(result.diagonal, sum_of_squares(module, inputs))
    assert (result.diagonal["0.weight"][0] == 0).all()


def test_chunks_change_nothing(monkeypatch):
    torch.manual_seed(0)
    module = nn.Sequential(nn.Conv2d(2, 4, 3), nn.Tanh(), nn.ConvTranspose2d(4, 2, 3)).double()
    x = torch.randn(5, 2, 4, 4, dtype=torch.float64)
    whole = hessdiag.gauss_newton_over_data(module, half_squares, [(x, x)]).diagonal
    monkeypatch.setattr(per_sample, "_ENTRIES", 200)
    monkeypatch.setattr(per_sample, "_SMALL", 0)
    monkeypatch.setattr("hessdiag.layers._ENTRIES", 200)
    monkeypatch.setattr(over_data, "_ENTRIES", 200)
    parts = hessdiag.gauss_newton_over_data(module, half_squares, [(x, x)]).diagonal
    assert_same(parts, whole)


class Copied(torch.autograd.Function):
    """The identity, with a rule for vmap that is wrong, as that of PyTorch for ``cdist`` is."""

    @staticmethod
    def forward(x):
        return x.clone()

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, g):
        return g

    @staticmethod
    def vmap(info, in_dims, x):
        return 3 * x, in_dims[0]


class Wrapped(torch.autograd.Function):
    """The identity, with that one in its backward pass."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x):
        return x.clone()

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, g):
        return Copied.apply(g)


class Backwards(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer, self.scale = nn.Linear(3, 2), nn.Parameter(torch.tensor([0.5, 2.0]))

    def forward(self, x):
        return Wrapped.apply(self.layer(x) * self.scale)


def test_where_vmap_is_wrong_the_samples_are_taken_one_by_one():
    torch.manual_seed(0)
    module = Backwards().double()
    x = torch.randn(5, 3, dtype=torch.float64)
    result = hessdiag.gauss_newton_over_data(module, half_squares, [(x, x)], reduction="sum")
    assert_same(result.diagonal, sum_of_squares(module, x))
    assert "gives other gradients" in result.note


class Doubled(torch.autograd.Function):
    """Without a rule for vmap."""

    @staticmethod
    def forward(ctx, x):
        return 2 * x

    @staticmethod
    def backward(ctx, g):
        return 2 * g


def test_without_a_rule_for_vmap_the_samples_are_taken_one_by_one(problem):
    def model(p, x):
        return Doubled.apply(torch.func.functional_call(problem.module, p, (x,)))

    result = hessdiag.gauss_newton_over_data(
        model,
        half_squares,
        [(problem.inputs, problem.targets)],
        parameters=problem.parameters,
        reduction="sum",
    )
    expected = {k: 4 * v for k, v in sum_of_squares(problem.module, problem.inputs).items()}
    assert_same(result.diagonal, expected)
    assert "passes one by one" in result.note


def test_dropout_of_known_layers_is_one_function_for_all_passes():
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Dropout(0.5), nn.Linear(6, 3)).double()
    module[2].register_forward_hook(lambda m, a, out: kept.append(out != 0))
    x, kept = torch.randn(8, 4, dtype=torch.float64), []
    result = hessdiag.gauss_newton_over_data(module, half_squares, [(x, x)], reduction="sum")
    hidden = module[1](module[0](x)) * kept[-1] * 2
    torch.testing.assert_close(
        result.diagonal["3.weight"], hidden.detach().square().sum(0).expand(3, -1)
    )
    first = (kept[-1] * 2 * (1 - module[1](module[0](x)).square())).square()
    expected = (module[3].weight.square().sum(0) * first).T @ x.square()
    torch.testing.assert_close(result.diagonal["0.weight"], expected.detach())


# What is remembered from one call for the next


@pytest.fixture
def forgotten(monkeypatch):
    """Nothing is remembered, and what is looked at is counted."""
    monkeypatch.setattr(per_sample, "_AGREEING", {})
    monkeypatch.setattr(over_data, "_AGREEING", set())
    looked_at = {"layers": 0, "loss": 0}

    def counted(owner, name, key):
        function = getattr(owner, name)

        def wrapper(*args):
            looked_at[key] += 1
            return function(*args)

        monkeypatch.setattr(owner, name, wrapper)

    counted(per_sample.SampleGradients, "_check_layers", "layers")
    counted(over_data, "_loss_of", "loss")
    return looked_at


def layers():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4), nn.Sigmoid(), nn.Linear(4, 3)
    ).double()


SQUARES = nn.MSELoss(reduction="sum")


def assert_right(module, samples=5):
    x = torch.randn(samples, 4, dtype=torch.float64)
    data = [(x, torch.randn(samples, 3, dtype=torch.float64))]
    result = hessdiag.gauss_newton_over_data(module, SQUARES, data, reduction="sum")
    expected = {name: 2 * square for name, square in sum_of_squares(module, x).items()}
    assert_same(result.diagonal, expected)


def test_a_second_call_looks_at_nothing_again(forgotten):
    module = layers()
    assert_right(module)
    assert forgotten == {"layers": 1, "loss": 1}
    assert_right(module)
    with torch.no_grad():
        for p in module.parameters():
            p.add_(0.1)
    assert_right(module, samples=9)
    assert_right(layers())
    assert forgotten == {"layers": 1, "loss": 1}
    # Of fewer samples than are looked at, less is known.
    assert_right(module, samples=1)
    assert forgotten == {"layers": 2, "loss": 1}
    assert_right(module)
    assert forgotten["layers"] == 2


def double_the_output(module, args, output):
    return 2 * output


def of_doubled_inputs(layer):
    return lambda x: functional.linear(2 * x, layer.weight, layer.bias)


def another_layer(module):
    module[2] = nn.Linear(4, 4, bias=False).double()


def one_weight_in_two(module):
    module[2].weight = module[0].weight


def one_layer_twice(module):
    module[2] = module[0]


def patched(module):
    module[2].forward = of_doubled_inputs(module[2])


CHANGES = {
    "another layer": another_layer,
    "one weight in two": one_weight_in_two,
    "one layer twice": one_layer_twice,
    "forward": patched,
    "hook": lambda module: module[2].register_forward_hook(double_the_output),
    "hook before": lambda module: module[2].register_forward_pre_hook(
        lambda layer, args: (2 * args[0],)
    ),
    "gradient": lambda module: module[2].weight.requires_grad_(False),
    "no layer": lambda module: module.__setitem__(2, Unlike().double()),
}


class Unlike(nn.Linear):
    """A layer that is none, although it derives from one."""

    def __init__(self):
        super().__init__(4, 4)

    def forward(self, x):
        return super().forward(2 * x)


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_changed_module_is_looked_at_again(forgotten, change):
    module = layers()
    assert_right(module)
    change(module)
    assert_right(module)
    assert forgotten["layers"] == 2


def test_a_patched_class_is_looked_at_again(forgotten, monkeypatch):
    module = layers()
    assert_right(module)
    monkeypatch.setattr(nn.Linear, "forward", lambda self, x: of_doubled_inputs(self)(x))
    assert_right(module)
    assert forgotten["layers"] == 2


def test_batch_norm_put_in_training_mode(forgotten):
    module = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)).double().eval()
    assert_right(module)
    assert_right(module)
    with pytest.raises(ValueError, match="BatchNorm layers of model must be in eval mode"):
        assert_right(module.train())


class Gated(nn.Module):
    """Code of its own, which says something else once a buffer is no longer zero."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 3)
        self.register_buffer("again", torch.zeros(()))

    def forward(self, x):
        return self.layer(x) + self.again * functional.linear(x, self.layer.weight).tanh()


def test_other_code_is_looked_at_in_every_call(forgotten):
    module = Gated().double()
    assert_right(module)
    module.again.fill_(1.0)
    assert_right(module)
    assert forgotten["layers"] == 2


def test_what_a_dead_network_says_is_not_remembered(forgotten):
    """Where every gradient is zero, a wrong rule would agree."""
    module = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 3)).double()
    nn.init.constant_(module[0].bias, -100.0)
    assert_right(module)
    assert_right(module)
    assert forgotten["layers"] == 2


def test_a_closed_form_that_is_wrong_is_not_taken(forgotten, monkeypatch):
    right = over_data.closed_root
    monkeypatch.setattr(over_data, "closed_root", lambda loss, y, t: right(loss, 1.5 * y + 1, t))
    x, y = torch.randn(5, 4, dtype=torch.float64), torch.tensor([0, 1, 2, 0, 1])
    module = layers()
    results = [
        hessdiag.gauss_newton_over_data(module, loss, [(x, y)]).diagonal
        for loss in (nn.CrossEntropyLoss(), lambda o, t: functional.cross_entropy(o, t))
    ]
    assert_same(*results)
    assert not over_data._AGREEING


@pytest.mark.parametrize(
    ("targets", "error", "message"),
    [
        ([0, 1, -100, 0, 1], ValueError, "loss must be the sum or the mean over the samples"),
        ([0, 1, 3, 0, 1], IndexError, "Target 3 is out of bounds"),
    ],
)
def test_targets_are_looked_at_in_every_call(forgotten, targets, error, message):
    module, x = layers(), torch.randn(5, 4, dtype=torch.float64)
    usual = torch.tensor([0, 1, 2, 0, 1])
    loss = nn.CrossEntropyLoss()
    hessdiag.gauss_newton_over_data(module, loss, [(x, usual)])
    assert len(over_data._AGREEING) == 1
    with pytest.raises(error, match=message):
        hessdiag.gauss_newton_over_data(module, loss, [(x, torch.tensor(targets))])
    weighted = nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0, 5.0]).double())
    with pytest.raises(ValueError, match="loss must be the sum or the mean"):
        hessdiag.gauss_newton_over_data(module, weighted, [(x, usual)])


def test_a_loss_that_is_changed_is_looked_at_again(forgotten):
    module, x = layers(), torch.randn(5, 4, dtype=torch.float64)
    loss, data = nn.MSELoss(), [(x, x[:, :3])]
    mean = hessdiag.gauss_newton_over_data(module, loss, data).diagonal
    loss.reduction = "sum"
    summed = hessdiag.gauss_newton_over_data(module, loss, data).diagonal
    assert_same(summed, {name: 3 * part for name, part in mean.items()})
    loss.register_forward_hook(double_the_output)
    doubled = hessdiag.gauss_newton_over_data(module, loss, data).diagonal
    assert_same(doubled, {name: 2 * part for name, part in summed.items()})
    assert forgotten["loss"] == 3


# Fewer passes than outputs


def test_the_estimate_is_unbiased_with_the_variance_it_states():
    torch.manual_seed(0)
    module, C, K = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 6)).double(), 6, 2
    x = torch.randn(5, 3, dtype=torch.float64)
    seeds = 400
    drawn = torch.stack(
        [
            flat(
                hessdiag.gauss_newton_over_data(
                    module, half_squares, [(x, x)], max_probes=K, reduction="sum", seed=seed
                ).diagonal
            )
            for seed in range(seeds)
        ]
    )
    truth, variance = 0, 0
    for J in jacobians(module, x):
        squares = torch.cat([part.flatten(1) for part in J.values()], dim=1).square()
        truth = truth + squares.sum(0)
        variance = variance + squares.sum(0).square() - squares.square().sum(0)
    variance = variance * 2 * (C - K) / (K * (C - 1))
    assert (drawn >= 0).all()
    # The bias of the last layer is estimated without chance, as each output has its own.
    assert ((drawn.mean(0) - truth).abs() <= 4.5 * (variance / seeds).sqrt() + 1e-12).all()
    ratio = drawn.var(0).sum() / variance.sum()
    assert 0.85 < ratio < 1.15


def test_plain_signs_where_there_are_many_outputs():
    torch.manual_seed(0)
    module = nn.Linear(2, 40, bias=False).double()
    mixing = torch.randn(40, 40, dtype=torch.float64) / 6

    def loss(outputs, targets):
        return (outputs @ mixing).square().sum() / 2

    x = torch.randn(3, 2, dtype=torch.float64)
    truth = hessdiag.gauss_newton_over_data(module, loss, [(x, x)]).diagonal["weight"]
    drawn = torch.stack(
        [
            hessdiag.gauss_newton_over_data(
                module, loss, [(x, x)], max_probes=2, seed=seed
            ).diagonal["weight"]
            for seed in range(200)
        ]
    )
    error = (drawn.mean(0) - truth) / (drawn.std(0) / 200**0.5)
    assert error.abs().max() < 4.5
    assert int((drawn[0] - truth).abs().gt(1e-3).sum()) > 60


def test_as_many_probes_as_columns_are_exact(problem):
    data = [(problem.inputs, problem.targets)]
    exact = hessdiag.gauss_newton_over_data(problem.module, functional.cross_entropy, data)
    for K in (2, 16):
        result = hessdiag.gauss_newton_over_data(
            problem.module, functional.cross_entropy, data, max_probes=K
        )
        assert torch.equal(flat(result.diagonal), flat(exact.diagonal))
    one = hessdiag.gauss_newton_over_data(
        problem.module, functional.cross_entropy, data, max_probes=1
    )
    assert one.stderr is None
    assert int(one.num_probes) == 1


# Data


def test_a_sample_has_its_signs_in_whatever_batch_it_is():
    module, data = regression()
    x, y = data.tensors

    def run(data, **options):
        return flat(
            hessdiag.gauss_newton_over_data(
                module, nn.functional.mse_loss, data, max_probes=2, reduction="sum", **options
            ).diagonal
        )

    whole = run([(x, y)])
    torch.testing.assert_close(run(batches(5)), whole)
    torch.testing.assert_close(run(batches(4)), whole)
    halves = run([(x[:7], y[:7])]) + run([(x[7:], y[7:])], sample_offset=7)
    torch.testing.assert_close(halves, whole)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(run([(x[order], y[order], order)]), whole)
    assert (run([(x, y)], seed=1) - whole).norm() > 1e-3 * whole.norm()


def test_a_loader_with_workers():
    module, data = regression()
    loader = torch.utils.data.DataLoader(data, batch_size=4, num_workers=2)
    alone = hessdiag.gauss_newton_over_data(module, nn.functional.mse_loss, batches(13))
    result = hessdiag.gauss_newton_over_data(module, nn.functional.mse_loss, loader)
    assert_same(result.diagonal, alone.diagonal)


@pytest.mark.parametrize("world_size", [2])
def test_processes_sum_over_the_data_set(world_size, tmp_path):
    """Each has every other sample, an unequal number, and all get the result of one process."""
    mp.spawn(worker, (world_size, str(tmp_path)), nprocs=world_size)
    module, _ = regression()
    for max_probes in (None, 2):
        alone = hessdiag.gauss_newton_over_data(
            module, nn.functional.mse_loss, batches(13), max_probes=max_probes
        )
        for rank in range(world_size):
            result = torch.load(tmp_path / f"{rank}-{max_probes}.pt", weights_only=True)
            assert_same(result, alone.diagonal)


class TwoInputs(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 2)

    def forward(self, a, b):
        return self.layer(a) * b


def test_inputs_and_targets_of_several_tensors():
    module = TwoInputs().double()
    a, b = torch.randn(2, 5, 3, dtype=torch.float64)
    b = b[:, :2]

    def loss(outputs, targets):
        return ((outputs - targets["y"]).square() * targets["weight"]).sum() / 2

    targets = {"y": torch.randn(5, 2).double(), "weight": torch.rand(5, 1).double()}
    result = hessdiag.gauss_newton_over_data(module, loss, [((a, b), targets)], reduction="sum")
    expected = (b.square() * targets["weight"]).T @ a.square()
    torch.testing.assert_close(result.diagonal["layer.weight"], expected)


def test_some_of_the_parameters(problem):
    data = [(problem.inputs, problem.targets)]
    whole = hessdiag.gauss_newton_over_data(problem.module, functional.cross_entropy, data)
    chosen = {"2.weight": problem.parameters["2.weight"]}
    part = hessdiag.gauss_newton_over_data(
        problem.module, functional.cross_entropy, data, parameters=chosen
    )
    assert_same(part.diagonal, {"2.weight": whole.diagonal["2.weight"]})


@pytest.mark.parametrize("twice", [False, True], ids=["one weight", "one module"])
def test_a_module_with_something_in_two_places_is_left_as_it_was(twice):
    module = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3))
    if twice:
        module[2] = module[0]
    module[2].weight = weight = module[0].weight
    chosen = dict(module.named_parameters())
    x = torch.randn(5, 3)
    for parameters in (None, chosen, {"0.weight": 2 * weight.detach()}):
        hessdiag.gauss_newton_over_data(module, half_squares, [(x, x)], parameters=parameters)
        assert module[0].weight is weight
        assert module[2].weight is weight
        assert dict(module.named_parameters()).keys() == chosen.keys()


def test_the_module_is_left_as_it_was(problem):
    x = problem.inputs
    before = problem.module(x)
    data = [(x, problem.targets)]
    hessdiag.gauss_newton_over_data(problem.module, functional.cross_entropy, data)
    assert torch.equal(problem.module(x), before)
    assert all(p.grad is None for p in problem.module.parameters())
    assert not any(m._forward_hooks for m in problem.module.modules())


# Errors


def weighted(outputs, targets):
    weight = torch.tensor([1.0, 2.0, 5.0], dtype=outputs.dtype)
    return functional.cross_entropy(outputs, targets, weight=weight)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"loss": weighted}, ValueError, "loss must be the sum or the mean over the samples"),
        (
            {"loss": lambda o, y: o.sum().square()},
            ValueError,
            "loss must be the sum or the mean over the samples",
        ),
        (
            {"loss": functools.partial(functional.cross_entropy, reduction="none")},
            ValueError,
            r"loss must return a 0-dimensional tensor, got \(20,\)",
        ),
        (
            {"loss": lambda o, y: o.sum() * float("nan")},
            ValueError,
            "loss must have a finite gradient",
        ),
        ({"data": []}, ValueError, "data must hold at least one sample"),
        (
            {"data": (torch.zeros(2, 4).double(), torch.zeros(2))},
            TypeError,
            r"data must yield \(inputs, targets\).*got a Tensor for a batch",
        ),
        ({"data": [(1.0, 2.0)]}, TypeError, "data must yield inputs with a tensor"),
        (
            {"data": [(torch.zeros(2, 4).double(), torch.zeros(2), torch.zeros(3))]},
            ValueError,
            r"numbers of data must be a tensor of shape \(2,\)",
        ),
        ({"reduction": "none"}, ValueError, "reduction must be one of mean, sum, got 'none'"),
        ({"max_probes": 0}, ValueError, "max_probes must be at least 1, got 0"),
        ({"parameters": {"other": torch.ones(1)}}, ValueError, "parameters must be a dictionary"),
        ({"model": lambda p, x: x}, ValueError, "parameters must be given where model is no mod"),
        (
            {"model": lambda p, x: x, "parameters": torch.ones(2)},
            ValueError,
            "model has no backward graph to parameters",
        ),
        (
            {"model": lambda p, x: (x * p).sum(), "parameters": torch.ones(1).double()},
            ValueError,
            r"model must return outputs of shape \(20, ...\), one for each sample",
        ),
        (
            {"model": lambda p, x: p * (x - x.mean(0)), "parameters": torch.ones(1).double()},
            ValueError,
            "model must act on each sample alone",
        ),
        (
            {"model": nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)).double()},
            ValueError,
            "BatchNorm layers of model must be in eval mode.*got '1' in training mode",
        ),
        (
            {
                "model": lambda p, x: functional.dropout(p * x, 0.5),
                "parameters": torch.ones(1).double(),
            },
            ValueError,
            "model must not draw random numbers",
        ),
    ],
)
def test_errors(problem, change, error, message):
    arguments = {
        "model": problem.module,
        "loss": functional.cross_entropy,
        "data": [(problem.inputs, problem.targets)],
    }
    with pytest.raises(error, match=message):
        hessdiag.gauss_newton_over_data(**arguments | change)


# What a data set may look like


class Centred(nn.Module):
    """Subtracts the mean over the batch, so that samples meet in it."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x):
        hidden = self.first(x)
        return self.second((hidden - hidden.mean(dim=0)).tanh())


@pytest.mark.parametrize("sizes", [[1, 7], [2, 1, 5]])
def test_samples_that_meet_in_a_later_batch_are_seen(sizes):
    x, y = torch.randn(sum(sizes), 3), torch.zeros(sum(sizes), 2)
    data = list(zip(x.split(sizes), y.split(sizes), strict=True))
    with pytest.raises(ValueError, match="on each sample alone"):
        hessdiag.gauss_newton_over_data(Centred(), functional.mse_loss, data)


class ProductOfInputs(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 2)

    def forward(self, a, b):
        return self.linear(a * b)


def test_a_loader_of_samples_with_several_inputs():
    module, x = ProductOfInputs(), torch.randn(5, 3)
    loader = torch.utils.data.DataLoader(
        [((row, 2 * row), torch.zeros(2)) for row in x], batch_size=2
    )
    result = hessdiag.empirical_fisher_over_data(module, functional.mse_loss, loader)
    expected = hessdiag.empirical_fisher_over_data(
        module, functional.mse_loss, [((x, 2 * x), torch.zeros(5, 2))]
    )
    assert_same(result.diagonal, expected.diagonal)


def test_a_generator_gives_one_seed_for_all_batches(problem):
    module, x, y = problem.module, problem.inputs, problem.targets

    def estimate(sizes):
        data = list(zip(x.split(sizes), y.split(sizes), strict=True))
        generator = torch.Generator().manual_seed(3)
        return hessdiag.gauss_newton_over_data(
            module, functional.cross_entropy, data, max_probes=1, seed=generator
        ).diagonal

    assert_same(estimate(len(x)), estimate(1))


def test_in_inference_mode(problem):
    module, x, y = problem.module, problem.inputs, problem.targets
    expected = hessdiag.gauss_newton_over_data(module, functional.cross_entropy, [(x, y)])
    with torch.inference_mode():
        result = hessdiag.gauss_newton_over_data(module, functional.cross_entropy, [(x, y)])
        fisher = hessdiag.empirical_fisher_over_data(module, functional.cross_entropy, [(x, y)])
    assert_same(result.diagonal, expected.diagonal)
    assert all(bool(torch.isfinite(value).all()) for value in fisher.diagonal.values())
