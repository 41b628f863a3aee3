"""Products with the Jacobian of a batched function, a block of probes at a time.

For ``score_fn: (B, ...) -> (B, ...)`` that acts on each sample alone, the Jacobian at x is one
matrix J per sample. Reverse mode gives ``J^T v``, forward mode ``J v``, each in three ways:

=======  ======================================  ==============================================
         mode "vjp"                              mode "jvp"
=======  ======================================  ==============================================
"loop"   one evaluation for all probes, then a   one evaluation with a tangent for each probe
         backward pass for each
"vmap"   one evaluation for all probes, then     one evaluation for each block of probes
         one batched backward pass a block
"fold"   the probes laid out as further samples  the same, with tangents
         of the batch, evaluated and taken back
=======  ======================================  ==============================================

Reverse mode keeps the activations of ``score_fn``, so its memory grows with depth; forward mode
keeps none. No way fits every function: :class:`hessdiag.Jacobian` tries them in order until one
works, and notes why one before it did not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from hessdiag.checks import check_output
from hessdiag.compat import (
    NotDifferentiableError,
    forward_mode_operators,
    has_tangent,
    reusable_graphs,
)

Products = Callable[[Tensor], Tensor]
Mode = Literal["auto", "vjp", "jvp"]
Batching = Literal["auto", "loop", "vmap", "fold"]
WayName = tuple[Literal["vjp", "jvp"], Literal["loop", "vmap", "fold"]]

# Elements of x up to which batched backward passes are the faster ones on a CPU: measured on
# U-Nets, twice as fast at 768, as fast at 6,144.
_SMALL = 4096


def candidate_ways(mode: Mode, batching: Batching, x: Tensor) -> list[WayName]:
    """Return the ways to try, in order.

    Raises:
        ValueError: If ``mode`` or ``batching`` is unknown.

    Example:
        >>> candidate_ways("vjp", "auto", torch.zeros(2, 3))
        [('vjp', 'vmap'), ('vjp', 'loop')]
    """
    if mode not in get_args(Mode):
        raise ValueError(f"mode must be one of {', '.join(get_args(Mode))}, got {mode!r}")
    if batching not in get_args(Batching):
        raise ValueError(
            f"batching must be one of {', '.join(get_args(Batching))}, got {batching!r}"
        )
    candidates: list[WayName] = []
    if mode != "jvp":
        if batching == "auto":
            # Large inputs keep the cores of a CPU busy one probe at a time.
            if x.is_cuda or x.numel() <= _SMALL:
                candidates += [("vjp", "vmap")]
            candidates += [("vjp", "loop")]
        else:
            candidates += [("vjp", batching)]
    if mode != "vjp":
        if batching == "auto":
            candidates += [("jvp", "vmap"), ("jvp", "loop")]
        else:
            candidates += [("jvp", batching)]
    return candidates


class Function(NamedTuple):
    """A function and the point where it is differentiated.

    Attributes:
        score_fn: Maps (B, ...) to (B, ...), or to that and further tensors.
        x: The point.
        has_aux: Whether there are further tensors.
    """

    score_fn: Callable[[Tensor], Any]
    x: Tensor
    has_aux: bool = False

    def __call__(self, point: Tensor) -> tuple[Any, Any]:
        """Return the output and the further tensors, None where there are none."""
        returned = self.score_fn(point)
        if not self.has_aux:
            return returned, None
        if not isinstance(returned, tuple) or len(returned) != 2:
            raise TypeError(
                "score_fn must return (output, further tensors) with has_aux=True, got "
                f"{type(returned).__name__}"
            )
        return returned


class Way(NamedTuple):
    """Products by one way, and what the function returned.

    Attributes:
        products: From probes (m, B, ...) to products of the same shape.
        evaluation: Returns the output and the further tensors, detached: those of the evaluation
            behind the products where there is one, else of a plain one.
    """

    products: Products
    evaluation: Callable[[], tuple[Tensor, Any]]


def _plain_evaluation(function: Function) -> tuple[Tensor, Any]:
    with torch.no_grad():
        output, aux = function(function.x.detach().clone())
    check_output(output, function.x)
    return output.detach(), _detached(aux)


def _detached(aux: Any) -> Any:
    return pytree.tree_map_only(Tensor, Tensor.detach, aux)


def _reverse_graph(function: Function, x: Tensor) -> tuple[Tensor, Tensor, Any]:
    """Return x as a leaf, the output of the function with its graph to that leaf, and the rest."""
    with torch.inference_mode(False), torch.enable_grad(), reusable_graphs():
        # A clone: autograd refuses tensors made in inference mode, and score_fn may write into it.
        leaf = x.detach().clone().requires_grad_()
        output, aux = function(leaf.clone())
    _check_graph(output, x)
    return leaf, output, aux


def _check_graph(output: Tensor, x: Tensor) -> None:
    check_output(output, x)
    if not output.requires_grad:
        raise NotDifferentiableError(
            "the output of score_fn has no backward graph to x; is it computed under "
            "torch.no_grad() or detached?"
        )


def _backward(output: Tensor, leaf: Tensor, probes: Tensor) -> Tensor:
    (product,) = torch.autograd.grad(output, leaf, probes, retain_graph=True, allow_unused=True)
    if product is None:
        raise NotDifferentiableError(
            "the output of score_fn does not depend on x; is x detached inside score_fn?"
        )
    return product


def _reverse_loop(function: Function) -> Way:
    leaf, output, aux = _reverse_graph(function, function.x)

    def products(probes: Tensor) -> Tensor:
        return torch.stack([_backward(output, leaf, probe) for probe in probes])

    return Way(products, lambda: (output.detach(), _detached(aux)))


def _reverse_vmap(function: Function) -> Way:
    x = function.x

    def checked(point: Tensor) -> tuple[Tensor, Any]:
        output, aux = function(point.clone())
        _check_graph(output, x)
        return output, aux

    # By torch.func rather than is_grads_batched, which is slower and has rules for less. The outer
    # no_grad leaves out the graph to parameters that require gradients.
    with torch.inference_mode(False), torch.no_grad(), reusable_graphs():
        # Contiguous, since vmap has no rules for other memory formats.
        point = x.detach().clone(memory_format=torch.contiguous_format)
        evaluated: tuple[Any, ...]
        if function.has_aux:
            evaluated = torch.func.vjp(checked, point, has_aux=True)
        else:
            evaluated = (*torch.func.vjp(lambda p: checked(p)[0], point), None)
        output, pull_back, aux = evaluated

    def products(probes: Tensor) -> Tensor:
        with torch.no_grad():
            result: Tensor = torch.func.vmap(lambda probe: pull_back(probe)[0])(probes)
        return result

    return Way(products, lambda: (output.detach(), _detached(aux)))


def _reverse_fold(function: Function) -> Way:
    x = function.x

    def products(probes: Tensor) -> Tensor:
        with _deterministic(x):
            leaf, output, _ = _reverse_graph(function, _folded(x, len(probes)))
        if len(output) > 1:
            alone = torch.zeros_like(output)
            alone[0] = 1.0
            _check_alone(_backward(output, leaf, alone)[1:])
        return _backward(output, leaf, probes.flatten(0, 1)).reshape(probes.shape)

    return Way(products, lambda: _plain_evaluation(function))


def _forward_product(function: Function, x: Tensor) -> Products:
    """Return v -> J v for one probe, of the shape of x."""

    def checked(point: Tensor) -> Tensor:
        output: Tensor = function(point)[0]
        check_output(output, x)
        # torch.func.jvp would call a missing tangent zero.
        if not has_tangent(output):
            raise NotDifferentiableError(
                "the output of score_fn does not depend on x; is x detached inside score_fn?"
            )
        return output

    def product(probe: Tensor) -> Tensor:
        # Clones, since score_fn may write into its argument, and so into the tangent.
        result: Tensor = torch.func.jvp(checked, (x.detach().clone(),), (probe.clone(),))[1]
        return result

    return product


def _forward_loop(function: Function) -> Way:
    product = _forward_product(function, function.x)
    random_state = _RandomState(function.x)

    def products(probes: Tensor) -> Tensor:
        # Parameters that require gradients would record a backward graph for nothing.
        with forward_mode_operators(), torch.no_grad():
            results = []
            for probe in probes:
                with random_state.same():
                    results.append(product(probe))
            return torch.stack(results)

    def evaluation() -> tuple[Tensor, Any]:
        with random_state.same():
            return _plain_evaluation(function)

    return Way(products, evaluation)


def _forward_vmap(function: Function) -> Way:
    product = _forward_product(function, function.x)
    random_state = _RandomState(function.x)

    def products(probes: Tensor) -> Tensor:
        with forward_mode_operators(), torch.no_grad(), random_state.same():
            if len(probes) == 1:
                return product(probes[0])[None]
            return torch.func.vmap(product, randomness="same")(probes)

    def evaluation() -> tuple[Tensor, Any]:
        with random_state.same():
            return _plain_evaluation(function)

    return Way(products, evaluation)


def _forward_fold(function: Function) -> Way:
    x = function.x

    def products(probes: Tensor) -> Tensor:
        product = _forward_product(function, _folded(x, len(probes)))
        with forward_mode_operators(), torch.no_grad():
            folded = probes.flatten(0, 1)
            with _deterministic(x):
                result = product(folded)
            if len(folded) > 1:
                alone = torch.zeros_like(folded)
                alone[0] = 1.0
                _check_alone(product(alone)[1:])
        return result.reshape(probes.shape)

    return Way(products, lambda: _plain_evaluation(function))


WAYS: dict[WayName, Callable[[Function], Way]] = {
    ("vjp", "loop"): _reverse_loop,
    ("vjp", "vmap"): _reverse_vmap,
    ("vjp", "fold"): _reverse_fold,
    ("jvp", "loop"): _forward_loop,
    ("jvp", "vmap"): _forward_vmap,
    ("jvp", "fold"): _forward_fold,
}


def check_samples_alone(products: Products, x: Tensor) -> None:
    """Raise if ``score_fn`` couples the samples of a batch, by one product more.

    Unit vectors in every sample at once give each sample its own row or column only as long as no
    sample sees another.

    Raises:
        ValueError: If it does.

    Example:
        >>> x = torch.tensor([[1.0, 2.0], [3.0, 5.0]])
        >>> from hessdiag import Jacobian
        >>> J = Jacobian(lambda x: x - x.mean(dim=0), x)
        >>> check_samples_alone(J.products, x)    # doctest: +ELLIPSIS
        Traceback (most recent call last):
        ...
        ValueError: score_fn must act on each sample alone, ...
    """
    if len(x) < 2 or x.numel() == 0:
        return
    probe = torch.zeros_like(x)
    probe[0] = 1.0
    _check_alone(products(probe[None])[0, 1:])


def _check_alone(rest: Tensor) -> None:
    if bool((rest != 0).any()):
        raise ValueError(
            "score_fn must act on each sample alone, and it couples the samples of a batch; put "
            "modules like BatchNorm in eval mode, or pass one sample at a time"
        )


def _folded(x: Tensor, copies: int) -> Tensor:
    return x.detach().repeat(copies, *[1] * (x.dim() - 1))


class _RandomState:
    """Lets every evaluation see the random numbers of the first: dropout is one function."""

    def __init__(self, x: Tensor) -> None:
        self._generators = _generators(x)
        self._first: list[Tensor] | None = None

    @contextmanager
    def same(self) -> Iterator[None]:
        now = [generator.get_state() for generator in self._generators]
        if self._first is None:
            self._first = now
            yield
            return
        try:
            for generator, first in zip(self._generators, self._first, strict=True):
                generator.set_state(first)
            yield
        finally:
            for generator, current in zip(self._generators, now, strict=True):
                generator.set_state(current)


@contextmanager
def _deterministic(x: Tensor) -> Iterator[None]:
    """Raise if random numbers are drawn: copies of a sample would see different ones."""
    before = [generator.get_state() for generator in _generators(x)]
    yield
    for generator, state in zip(_generators(x), before, strict=True):
        if not torch.equal(generator.get_state(), state):
            raise NotDifferentiableError(
                "score_fn draws random numbers (dropout?), which differ between the copies of "
                "batching='fold'; use batching='loop' or 'vmap', or put the module in eval mode"
            )


def _generators(x: Tensor) -> list[torch.Generator]:
    generators = [torch.default_generator]
    if x.is_cuda:
        generators.append(torch.cuda.default_generators[x.device.index])
    return generators
