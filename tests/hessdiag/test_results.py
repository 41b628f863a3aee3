"""Results as objects: that they can be saved, sent and loaded."""

import copy
import io
import pickle

import pytest
import torch

import hessdiag


def results():
    x = torch.linspace(0, 1, 6).reshape(2, 3)

    def coupled(x):
        return torch.sin(x) * x.sum(dim=1, keepdim=True)

    parameters = {"w": torch.ones(2, 3), "b": torch.zeros(2)}
    return {
        "estimate": hessdiag.estimate(coupled, x, max_probes=64, rtol=0.5),
        "trace": hessdiag.trace(coupled, x, max_probes=4),
        "blocks": hessdiag.block_diagonal(coupled, x, partition=torch.tensor([0, 0, 1])),
        "parameters": hessdiag.parameter_hessian_diagonal(
            lambda p: p["w"].square().sum() * p["b"].exp().sum(), parameters, max_probes=3
        ),
    }


@pytest.mark.parametrize("name", ["estimate", "trace", "blocks", "parameters"])
@pytest.mark.parametrize("way", ["torch.load", "pickle", "deepcopy"])
def test_a_result_comes_back_as_it_was(name, way):
    result = results()[name]
    if way == "torch.load":
        file = io.BytesIO()
        torch.save(result, file)
        file.seek(0)
        loaded = torch.load(file, weights_only=True)
    else:
        loaded = pickle.loads(pickle.dumps(result)) if way == "pickle" else copy.deepcopy(result)
    assert type(loaded) is type(result)
    assert vars(loaded).keys() == vars(result).keys()
    for field, value in vars(result).items():
        if isinstance(value, (torch.Tensor, dict)):
            torch.testing.assert_close(getattr(loaded, field), value, rtol=0, atol=0)
        else:
            assert getattr(loaded, field) == value
