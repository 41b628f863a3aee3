"""What two networks must share for what is found of one to hold for the other."""

import copy

import pytest
import torch
from torch import nn

from hessdiag.descriptions import description_of


def network():
    return nn.Sequential(
        nn.Conv2d(1, 2, 3, padding=1), nn.BatchNorm2d(2), nn.ReLU(), nn.Flatten(), nn.Linear(8, 8),
        nn.Linear(8, 8), nn.Dropout(0.5),
    )  # fmt: skip


def in_place(net):
    with torch.no_grad():
        net[4].weight.mul_(2.0)
        net[1].running_var.mul_(2.0)


@pytest.mark.parametrize(
    "change", [in_place, lambda net: net.load_state_dict(network().state_dict()), copy.deepcopy]
)
def test_numbers_do_not_matter(change):
    net = network()
    before = description_of(net)
    assert before is not None
    change(net)
    assert description_of(net) == before == description_of(network())
    assert hash(before) == hash(description_of(net))


CHANGES = {
    "another layer": lambda net: net.__setitem__(2, nn.Tanh()),
    "another size": lambda net: net.__setitem__(4, nn.Linear(8, 8, bias=False)),
    "one more": lambda net: net.append(nn.ReLU()),
    "another order": lambda net: net._modules.update({"2": net[3], "3": net[2]}),
    "one layer twice": lambda net: net.__setitem__(5, net[4]),
    "one weight twice": lambda net: setattr(net[5], "weight", net[4].weight),
    "mode": lambda net: net[6].eval(),
    "gradient": lambda net: net[4].weight.requires_grad_(False),
    "attribute": lambda net: setattr(net[0], "padding", (0, 0)),
    "new attribute": lambda net: setattr(net[2], "inplace", True),
    "type": lambda net: net[4].double(),
    "statistics": lambda net: setattr(net[1], "running_mean", None),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_everything_else_does(change):
    net = network()
    change(net)
    assert description_of(net) not in (None, description_of(network()))


def test_a_patched_class_is_another(monkeypatch):
    before = description_of(network())
    monkeypatch.setattr(nn.Linear, "forward", lambda self, x: x)
    assert description_of(network()) != before


class Derived(nn.Linear):
    pass


OTHER_CODE = {
    "class": lambda net: net.__setitem__(4, Derived(8, 8)),
    "forward": lambda net: setattr(net[4], "forward", lambda x: x),
    "hook": lambda net: net[4].register_forward_hook(lambda *_: None),
    "hook before": lambda net: net.register_forward_pre_hook(lambda *_: None),
    "function": lambda net: setattr(net[4], "activation", torch.relu),
    "tensor": lambda net: setattr(net[4], "scale", torch.ones(())),
    "parametrization": lambda net: nn.utils.parametrizations.weight_norm(net[4]),
    "norm": lambda net: nn.utils.spectral_norm(net[4]),
}


@pytest.mark.parametrize("change", OTHER_CODE.values(), ids=OTHER_CODE)
def test_no_description_of_other_code(change):
    net = network()
    change(net)
    assert description_of(net) is None


def test_no_description_under_a_hook_for_all_modules():
    handle = nn.modules.module.register_module_forward_hook(lambda *_: None)
    try:
        assert description_of(network()) is None
    finally:
        handle.remove()
    assert description_of(network()) is not None
