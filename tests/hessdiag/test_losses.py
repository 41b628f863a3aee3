"""Closed forms of the Hessians of PyTorch's losses, against derivatives of each sample alone."""

import pytest
import torch
from torch import nn
from torch.nn import functional

from hessdiag.losses import closed_root, known_loss

SHAPES = [(6,), (6, 4), (6, 4, 2, 3)]
LOSSES = [
    nn.MSELoss(),
    nn.MSELoss(reduction="sum"),
    functional.mse_loss,
    nn.BCEWithLogitsLoss(),
    nn.BCEWithLogitsLoss(reduction="sum"),
    functional.binary_cross_entropy_with_logits,
    nn.CrossEntropyLoss(),
    nn.CrossEntropyLoss(reduction="sum"),
    nn.CrossEntropyLoss(label_smoothing=0.1),
    nn.CrossEntropyLoss(ignore_index=-1),
    functional.cross_entropy,
]


def classes(loss):
    return isinstance(loss, nn.CrossEntropyLoss) or loss is functional.cross_entropy


def problem(loss, shape):
    torch.manual_seed(0)
    outputs = torch.randn(shape, dtype=torch.float64)
    if classes(loss):
        return outputs, torch.randint(shape[1], (shape[0], *shape[2:]))
    return outputs, torch.rand(shape, dtype=torch.float64)


# The cross entropy of one vector is no sum over samples.
CASES = [
    (loss, shape) for loss in LOSSES for shape in SHAPES if len(shape) > 1 or not classes(loss)
]


@pytest.mark.parametrize(("loss", "shape"), CASES)
def test_the_root_squared_is_the_hessian_of_each_sample(loss, shape):
    outputs, targets = problem(loss, shape)
    assert known_loss(loss) is not None
    root = closed_root(loss, outputs, targets)
    columns = root.times(torch.eye(root.size, dtype=torch.float64)[:, None].expand(-1, 6, -1))
    S = columns.reshape(root.size, 6, -1)
    for n in range(6):

        def of_one(y, n=n):
            return loss(y, targets[n : n + 1])

        H = torch.func.jacrev(torch.func.jacrev(of_one))(outputs[n : n + 1])
        size = outputs[0].numel()
        torch.testing.assert_close(S[:, n].T @ S[:, n], H.reshape(size, size))


class Derived(nn.MSELoss):
    pass


def hooked():
    loss = nn.MSELoss()
    loss.register_forward_hook(lambda module, args, output: 2 * output)
    return loss


@pytest.mark.parametrize(
    "loss",
    [
        Derived(),
        hooked(),
        nn.MSELoss(reduction="none"),
        nn.L1Loss(),
        nn.CrossEntropyLoss(weight=torch.ones(3)),
        nn.BCEWithLogitsLoss(pos_weight=torch.ones(3)),
        lambda outputs, targets: functional.mse_loss(outputs, targets),
    ],
)
def test_other_losses_are_not_known(loss):
    assert known_loss(loss) is None


Y = torch.zeros(2, 3, dtype=torch.float64)


@pytest.mark.parametrize(
    ("loss", "outputs", "targets"),
    [
        (nn.CrossEntropyLoss(), Y, torch.tensor([0, 3])),
        (nn.CrossEntropyLoss(), Y, torch.tensor([0, -100])),
        (nn.CrossEntropyLoss(ignore_index=1), Y, torch.tensor([0, 1])),
        (nn.CrossEntropyLoss(), Y, torch.rand(2, 3)),
        (nn.CrossEntropyLoss(), Y, torch.tensor([0])),
        (nn.CrossEntropyLoss(), Y[0], torch.tensor(0)),
        (nn.CrossEntropyLoss(), torch.full_like(Y, torch.nan), torch.tensor([0, 1])),
        (nn.MSELoss(), Y, torch.zeros(2, 1)),
        (nn.MSELoss(), Y, torch.full((2, 3), torch.inf)),
        (nn.MSELoss(), Y, Y.long()),
        (nn.MSELoss(), Y, (Y,)),
        (nn.BCEWithLogitsLoss(), Y + torch.nan, Y),
    ],
)
def test_unusual_targets_are_left_to_products(loss, outputs, targets):
    assert closed_root(loss, outputs, targets) is None
