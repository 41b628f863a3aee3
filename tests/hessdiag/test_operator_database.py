"""Every operator of PyTorch, every way of products: right, or an error."""

import warnings

import pytest
import torch
from operator_database import functions, operators

from hessdiag import Jacobian

WAYS = [(mode, batching) for mode in ("vjp", "jvp") for batching in ("loop", "vmap", "fold")]
OPERATORS = operators()


def differences(op, most_samples):
    """Return the ways whose products differ from an independent Jacobian, and by how much."""
    found = []
    for number, (function, x) in enumerate(functions(op)):
        if number == most_samples:
            break
        try:
            J = torch.autograd.functional.jacobian(lambda z: function(z)[0], x)[:, 0]
        except Exception:
            continue
        if not bool(torch.isfinite(J).all()):
            continue  # at a pole
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
        assert differences(OPERATORS[name], most_samples=3) == []
