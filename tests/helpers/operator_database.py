"""PyTorch's own database of operators, with inputs for each, as functions of one flat vector."""

from functools import cache, partial

import torch
from torch.utils import _pytree as pytree

# Operators of the database that are no functions of their floating-point inputs.
_RANDOM = ("dropout", "rand", "normal", "bernoulli", "multinomial", "rrelu", "uniform", "empty")
_BY_DESIGN = ("padding_idx", "scale_grad_by_freq")


@cache
def operators():
    """Return the operators that have a derivative in float64, by name."""
    from torch.testing._internal.common_methods_invocations import op_db

    named = {}
    for op in op_db:
        name = op.name + (f", {op.variant_test_name}" if op.variant_test_name else "")
        differentiable = op.supports_autograd and torch.float64 in op.supported_dtypes("cpu")
        if differentiable and not any(word in name for word in _RANDOM):
            named[name] = op
    return named


def functions(op, most_inputs=150, most_outputs=300):
    """Yield (function, point): (B, n) to (B, m) and a point of shape (1, n), for each sample.

    The vector holds every real floating-point tensor among the arguments, and the output every
    floating-point tensor that comes back, complex ones by their two parts.
    """
    torch.manual_seed(0)
    for sample in op.sample_inputs("cpu", torch.float64, requires_grad=False):
        leaves, structure = pytree.tree_flatten((sample.input, sample.args, sample.kwargs))
        places = [i for i, leaf in enumerate(leaves) if _is_variable(leaf)]
        # Backward passes leave out or weigh rows by design, where forward mode does not.
        if not places or any(sample.kwargs.get(name) not in (None, False) for name in _BY_DESIGN):
            continue
        point = torch.cat([leaves[i].reshape(-1) for i in places])[None]
        # The wrapper keeps to arguments as they must be: symmetric, triangular.
        function = _flattened(partial(op.gradcheck_wrapper, op.op), leaves, structure, places)
        if not 0 < point.numel() <= most_inputs or not bool(torch.isfinite(point).all()):
            continue
        try:
            first, second = function(point.clone()), function(point.clone())
        except Exception:  # an operator that refuses its own sample says nothing of products
            continue
        if first is None or not 0 < first.numel() <= most_outputs:
            continue
        if torch.equal(first, second):
            yield function, point


def _is_variable(leaf):
    return (
        isinstance(leaf, torch.Tensor)
        and leaf.dtype == torch.float64
        and leaf.layout == torch.strided
        and leaf.is_leaf
    )


def _flattened(op, leaves, structure, places):
    shapes = [leaves[i].shape for i in places]
    sizes = [leaves[i].numel() for i in places]

    def row(vector):
        given = list(leaves)
        for i, part, shape in zip(places, vector.split(sizes), shapes, strict=True):
            # A copy: as_strided and the like would look at the whole vector.
            given[i] = part.reshape(shape).clone()
        first, args, kwargs = pytree.tree_unflatten(given, structure)
        returned = pytree.tree_leaves(op(first, *args, **kwargs))
        parts = [torch.view_as_real(y) if y.is_complex() else y for y in returned if _flows(y)]
        return torch.cat([part.reshape(-1) for part in parts]) if parts else None

    def function(x):
        rows = [row(vector) for vector in x]
        return None if any(each is None for each in rows) else torch.stack(rows)

    return function


def _flows(y):
    return isinstance(y, torch.Tensor) and y.dtype in (torch.float64, torch.complex128)
