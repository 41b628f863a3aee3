"""Every operator of PyTorch, every way of products: right, or an error."""

from itertools import islice

import pytest
import torch
from operator_database import functions, operators

from hessdiag import Jacobian

WAYS = [(mode, batching) for mode in ("vjp", "jvp") for batching in ("loop", "vmap", "fold")]
# The database takes seconds to import: it is not, where these tests are not run.
PARTS = 16


def independent_jacobian(name, function, x):
    """Return it row by row, or None where PyTorch has none or it is infinite."""
    if name.startswith("nn.functional.max_unpool"):
        # Linear. PyTorch's backward pass is wrong where an index occurs twice.
        return torch.stack([function(unit)[0] for unit in torch.eye(x.numel())[:, None].to(x)], 1)
    try:
        J = torch.autograd.functional.jacobian(function, x)[0, :, 0]
    except RuntimeError:  # PyTorch has no derivative to compare with
        return None
    return J if bool(torch.isfinite(J).all()) else None


def differences(name, most_samples):
    """Return the ways whose products differ from an independent Jacobian, and by how much."""
    found = []
    for number, (function, x) in enumerate(islice(functions(operators()[name]), most_samples)):
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
            except (ValueError, RuntimeError):  # refused, which is not silent
                continue
            same = torch.isclose(products, expected, rtol=1e-4, atol=1e-4, equal_nan=True)
            if not bool(same.all()):
                found.append((number, mode, batching, (products - expected).abs().max().item()))
    return found


def differences_of_all(part, most_samples):
    """Return what :func:`differences` finds, by operator, for one part of the database."""
    names = list(operators())
    assert len(names) > 400
    found = {name: differences(name, most_samples) for name in names[part::PARTS]}
    return {name: each for name, each in found.items() if each}


@pytest.mark.filterwarnings("ignore")
def test_no_silent_difference():
    """Of some of the operators, for a few inputs; of all below."""
    assert differences_of_all(0, most_samples=2) == {}


@pytest.mark.soak
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("part", range(PARTS))
def test_no_silent_difference_for_any_input(part):
    assert differences_of_all(part, most_samples=500) == {}
