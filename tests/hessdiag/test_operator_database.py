"""Every operator of PyTorch, every way of products: right, or an error."""

import warnings
from itertools import islice

import pytest
import torch
from operator_database import functions, operators

from hessdiag import Jacobian

WAYS = [(mode, batching) for mode in ("vjp", "jvp") for batching in ("loop", "vmap", "fold")]
OPERATORS = operators()


def independent_jacobian(name, function, x):
    """Return it row by row, or None where PyTorch has none or it is infinite."""
    if name.startswith("nn.functional.max_unpool"):
        # Linear. PyTorch's backward pass is wrong where an index occurs twice.
        return torch.stack([function(unit)[0] for unit in torch.eye(x.numel())[:, None].to(x)], 1)
    try:
        J = torch.autograd.functional.jacobian(function, x)[0, :, 0]
    except (RuntimeError, NotImplementedError):
        return None
    return J if bool(torch.isfinite(J).all()) else None


def differences(name, most_samples):
    """Return the ways whose products differ from an independent Jacobian, and by how much."""
    found = []
    for number, (function, x) in enumerate(islice(functions(OPERATORS[name]), most_samples)):
        J = independent_jacobian(name, function, x)
        if J is None:
            continue
        for mode, batching in WAYS:
            probes = torch.randn(
                (2, 1, J.shape[0 if mode == "vjp" else 1]),
                generator=torch.Generator().manual_seed(1),
                dtype=torch.float64,
            )
            expected = probes[:, 0] @ (J if mode == "vjp" else J.T)
            try:
                products = Jacobian(
                    function, x, mode=mode, batching=batching, rectangular=True
                ).products(probes)[:, 0]
            except (ValueError, RuntimeError, NotImplementedError):
                continue  # refused
            same = torch.isclose(products, expected, rtol=1e-4, atol=1e-4, equal_nan=True)
            if not bool(same.all()):
                found.append((number, mode, batching, (products - expected).abs().max().item()))
    return found


@pytest.mark.parametrize("name", OPERATORS)
def test_no_silent_difference(name):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert differences(name, most_samples=2) == []
