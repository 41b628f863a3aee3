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

from collections.abc import Callable, Hashable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from hessdiag.checks import check_output
from hessdiag.compat import (
    NotDifferentiableError,
    WrongUnderVmapError,
    forward_mode_operators,
    has_tangent,
    inside_transform,
    quiet_vmap,
    refuse_wrong_derivatives,
    reusable_graphs,
)
from hessdiag.coupling import check_product_alone
from hessdiag.inner_gradients import gradients_checked
from hessdiag.remembered import Abilities

Products = Callable[[Tensor], Tensor]
Mode = Literal["auto", "vjp", "jvp"]
Batching = Literal["auto", "loop", "vmap", "fold"]
_MODES, _BATCHINGS = get_args(Mode), get_args(Batching)
WayName = tuple[Literal["vjp", "jvp"], Literal["loop", "vmap", "fold"]]

# Elements of x up to which batched backward passes are the faster ones on a CPU, for 16 probes:
# measured on U-Nets, twice as fast at 768, as fast at 6,144; on MLPs and transformers faster up to
# 16,384. With 2 probes they are the slower ones throughout.
_SMALL_IMAGES = 4096
_SMALL = 16384
_FEWEST_BATCHED = 4


def candidate_ways(mode: Mode, batching: Batching, x: Tensor) -> list[WayName]:
    """Return the ways to try, in order.

    Raises:
        ValueError: If ``mode`` or ``batching`` is unknown.

    Example:
        >>> candidate_ways("vjp", "auto", torch.zeros(2, 3))
        [('vjp', 'vmap'), ('vjp', 'loop')]
    """
    if mode not in _MODES:
        raise ValueError(f"mode must be one of {', '.join(_MODES)}, got {mode!r}")
    if batching not in _BATCHINGS:
        raise ValueError(f"batching must be one of {', '.join(_BATCHINGS)}, got {batching!r}")
    candidates: list[WayName] = []
    if mode != "jvp":
        if batching == "auto":
            # Large inputs keep the cores of a CPU busy one probe at a time.
            if x.is_cuda or x.numel() <= (_SMALL if x.dim() < 4 else _SMALL_IMAGES):
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


def fewest_batched(batching: Batching, x: Tensor) -> int:
    """Return from how many probes on "vmap" batches them, rather than go one by one.

    Example:
        >>> fewest_batched("auto", torch.zeros(2, 3)), fewest_batched("vmap", torch.zeros(2, 3))
        (4, 2)
    """
    return _FEWEST_BATCHED if batching == "auto" and not x.is_cuda else 2


class Function(NamedTuple):
    """A function, the point where it is differentiated, and what is asked of its products.

    Attributes:
        score_fn: Maps (B, ...) to (B, ...), or to that and further tensors.
        x: The point.
        abilities: What is known of the function.
        has_aux: Whether there are further tensors.
        may_be_constant: Whether an output that does not depend on x has the Jacobian zero.
        rectangular: Whether the output may be of another shape than x.
        differentiable: Whether products carry gradients.
        fewest_batched: Probes from which on a batched backward pass is worth it.
    """

    score_fn: Callable[[Tensor], Any]
    x: Tensor
    abilities: Abilities
    has_aux: bool = False
    may_be_constant: bool = False
    rectangular: bool = False
    differentiable: bool = False
    fewest_batched: int = 2

    def __call__(self, point: Tensor) -> tuple[Tensor, Any]:
        """Return the output and the further tensors, None where there are none."""
        output, aux = self.score_fn(point), None
        if self.has_aux:
            if not isinstance(output, tuple) or len(output) != 2:
                raise TypeError(
                    "score_fn must return (output, further tensors) with has_aux=True, got "
                    f"{type(output).__name__}"
                )
            output, aux = output
        check_output(output, point, rectangular=self.rectangular)
        return output, aux

    def first(self, what: str) -> bool:
        """Say whether ``what`` was not yet found right for functions and points like these."""
        return self._like(what) not in self.abilities.checked

    def found_right(self, what: str) -> None:
        """Remember that ``what`` was found right."""
        self.abilities.checked.add(self._like(what))

    def _like(self, what: str) -> Hashable:
        return what, self.x.shape[1:], self.x.dtype, self.x.device


class Way(NamedTuple):
    """Products by one way, and what the function returned.

    Attributes:
        products: From probes (m, B, ...) to products of the same shape.
        evaluation: Returns the output and the further tensors, detached unless the products are
            differentiable: those of the evaluation behind the products where there is one, else of
            a plain one.
    """

    products: Products
    evaluation: Callable[[], tuple[Tensor, Any]]


def _plain_evaluation(function: Function) -> tuple[Tensor, Any]:
    if function.differentiable:
        return function(function.x)
    with torch.no_grad():
        output, aux = function(function.x.detach().clone())
    return output.detach(), _detached(aux)


def _detached(aux: Any) -> Any:
    # For None a call of pytree takes as long as three operators.
    return None if aux is None else pytree.tree_map_only(Tensor, Tensor.detach, aux)


def _independent() -> NotDifferentiableError:
    return NotDifferentiableError(
        "the output of score_fn does not depend on x; is x detached inside score_fn?"
    )


def _check_graph(function: Function, output: Tensor) -> None:
    if not output.requires_grad and not function.may_be_constant:
        raise NotDifferentiableError(
            "the output of score_fn has no backward graph to x; is it computed under "
            "torch.no_grad() or detached?"
        )


def _reverse_graph(function: Function, x: Tensor) -> tuple[Tensor, Tensor, Any]:
    """Return a tensor equal to x, the output of the function with its graph to it, and the rest."""
    with _recording(function), reusable_graphs():
        if function.differentiable and x.requires_grad:
            leaf = x.clone()
        else:
            # Autograd refuses tensors made in inference mode.
            leaf = (x.detach().clone() if x.is_inference() else x.detach()).requires_grad_()
        point = leaf.clone()  # score_fn may write into it
        with gradients_checked(leaf if leaf.is_leaf else None):
            output, aux = function(point)
    _check_graph(function, output)
    refuse_wrong_derivatives(output, batched=False)
    return leaf, output, aux


def _recording(function: Function) -> AbstractContextManager[None]:
    """Record graphs, whatever goes on outside; for differentiable products it decides."""
    if function.differentiable or not torch.is_inference_mode_enabled():
        return torch.enable_grad()
    return _outside_inference_mode()


@contextmanager
def _outside_inference_mode() -> Iterator[None]:
    with torch.inference_mode(False), torch.enable_grad():
        yield


def _backward(function: Function, output: Tensor, leaf: Tensor, probes: Tensor) -> Tensor:
    product = None
    if output.requires_grad:
        (product,) = torch.autograd.grad(
            output,
            leaf,
            probes,
            retain_graph=True,
            create_graph=function.differentiable and torch.is_grad_enabled(),
            allow_unused=True,
        )
    if product is None:
        if not function.may_be_constant:
            raise _independent()
        return torch.zeros_like(leaf)
    return product


def _reverse_loop(function: Function) -> Way:
    if function.differentiable and inside_transform():
        # What torch.func keeps of closed-over tensors is lost on torch.autograd.
        return _reverse_func(function, batched=False)
    leaf, output, aux = _reverse_graph(function, function.x)

    def products(probes: Tensor) -> Tensor:
        if len(probes) == 1:
            return _without_overlap(_backward(function, output, leaf, probes[0]))[None]
        return torch.stack([_backward(function, output, leaf, probe) for probe in probes])

    if function.differentiable:
        return Way(products, lambda: (output, aux))
    return Way(products, lambda: (output.detach(), _detached(aux)))


def _reverse_vmap(function: Function) -> Way:
    return _reverse_func(function, batched=True)


def _reverse_func(function: Function, batched: bool) -> Way:
    x = function.x

    def checked(point: Tensor) -> tuple[Tensor, Any]:
        output, aux = function(point.clone())
        _check_graph(function, output)
        refuse_wrong_derivatives(output, batched=batched)
        return output, aux

    # By torch.func rather than is_grads_batched, which is slower and has rules for less. The outer
    # no_grad leaves out the graph to parameters that require gradients.
    with _recording(function), torch.set_grad_enabled(function.differentiable), reusable_graphs():
        # Contiguous, since vmap has no rules for other memory formats.
        point = x if function.differentiable else x.detach()
        point = point.clone(memory_format=torch.contiguous_format)
        evaluated: tuple[Any, ...]
        with gradients_checked():
            if function.has_aux:
                evaluated = torch.func.vjp(checked, point, has_aux=True)
            else:
                evaluated = (*torch.func.vjp(lambda p: checked(p)[0], point), None)
        output, pull_back, aux = evaluated

    def plain(probe: Tensor) -> Tensor:
        return _without_overlap(pull_back(probe)[0])

    def products(probes: Tensor) -> Tensor:
        with torch.set_grad_enabled(function.differentiable and torch.is_grad_enabled()):
            if len(probes) == 1:
                return plain(probes[0])[None]
            if not batched or len(probes) < function.fewest_batched:
                return torch.stack([pull_back(probe)[0] for probe in probes])
            result = _without_overlap(_vmap(lambda probe: pull_back(probe)[0], probes))
            _check_once(function, "vjp vmap", plain, probes, result)
        return result

    if function.differentiable:
        return Way(products, lambda: (output, aux))
    return Way(products, lambda: (output.detach(), _detached(aux)))


def _reverse_fold(function: Function) -> Way:
    x = function.x

    def products(probes: Tensor) -> Tensor:
        if len(probes) == 0:
            return probes.new_empty(0, *x.shape)
        with _deterministic(x):
            leaf, output, _ = _reverse_graph(function, _folded(x, len(probes)))

        def folded(probes: Tensor) -> Tensor:
            return _backward(function, output, leaf, probes[0])[None]

        flat = probes.flatten(0, 1)
        result = _without_overlap(folded(flat[None])[0])
        check_product_alone(folded, flat, result)
        return result.reshape(len(probes), *x.shape)

    return Way(products, lambda: _plain_evaluation(function))


def _forward_product(function: Function, x: Tensor) -> Products:
    """Return v -> J v for one probe, of the shape of x."""

    def checked(point: Tensor) -> Tensor:
        output = function(point)[0]
        # torch.func.jvp would call a missing tangent zero.
        if not function.may_be_constant and not has_tangent(output):
            raise _independent()
        return output

    def product(probe: Tensor) -> Tensor:
        # Clones, since score_fn may write into its argument, and so into the tangent.
        point = x.clone() if function.differentiable else x.detach().clone()
        result: Tensor = torch.func.jvp(checked, (point,), (probe.clone(),))[1]
        return result

    return product


@contextmanager
def _forward(function: Function) -> Iterator[None]:
    """Prepare for forward mode, for one thread at a time.

    Parameters that require gradients would record a backward graph for nothing.
    """
    recording = function.differentiable and torch.is_grad_enabled()
    with forward_mode_operators(), torch.set_grad_enabled(recording):
        yield


def _forward_loop(function: Function) -> Way:
    product = _forward_product(function, function.x)
    random_state = _RandomState(function.x)

    def products(probes: Tensor) -> Tensor:
        with _forward(function):
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

    def plain(probe: Tensor) -> Tensor:
        with random_state.same():
            return _without_overlap(product(probe))

    def products(probes: Tensor) -> Tensor:
        with _forward(function):
            if len(probes) == 1:
                return plain(probes[0])[None]
            with random_state.same():
                result = _without_overlap(_vmap(product, probes, randomness="same"))
            _check_once(function, "jvp vmap", plain, probes, result)
            return result

    def evaluation() -> tuple[Tensor, Any]:
        with random_state.same():
            return _plain_evaluation(function)

    return Way(products, evaluation)


def _forward_fold(function: Function) -> Way:
    x = function.x

    def products(probes: Tensor) -> Tensor:
        product = _forward_product(function, _folded(x, len(probes)))
        with _forward(function):
            flat = probes.flatten(0, 1)
            with _deterministic(x):
                result = _without_overlap(product(flat))
            check_product_alone(lambda probes: product(probes[0])[None], flat, result)
        return result.reshape(len(probes), len(x), *result.shape[1:])

    return Way(products, lambda: _plain_evaluation(function))


WAYS: dict[WayName, Callable[[Function], Way]] = {
    ("vjp", "loop"): _reverse_loop,
    ("vjp", "vmap"): _reverse_vmap,
    ("vjp", "fold"): _reverse_fold,
    ("jvp", "loop"): _forward_loop,
    ("jvp", "vmap"): _forward_vmap,
    ("jvp", "fold"): _forward_fold,
}


def _without_overlap(product: Tensor) -> Tensor:
    """Return a tensor whose elements each have a place of their own, where a sum expands one."""
    if product.is_contiguous():
        return product
    overlap = any(
        stride == 0 and size > 1
        for size, stride in zip(product.shape, product.stride(), strict=True)
    )
    return product.contiguous() if overlap else product


# What a batched product may differ by from a plain one, relative to its norm: rules of vmap that
# are wrong are so by a part of the whole, and in lower precision inside score_fn (autocast, TF32)
# rounding is a few percent.
_MOST_ROUNDING = {torch.float64: 1e-4}
_MOST_ROUNDING_ELSEWHERE = 0.05


def _check_once(
    function: Function, way: str, plain: Products, probes: Tensor, batched: Tensor
) -> None:
    """Compare a block of batched products with a plain one, once for functions like this.

    The plain one is that of a sum of the probes with different weights. Inside of a transform of
    torch.func nothing can be compared.

    Raises:
        WrongUnderVmapError: If they differ by more than rounding.
    """
    if inside_transform() or not function.first(way):
        return
    with torch.no_grad():
        weights = torch.arange(1, len(probes) + 1, dtype=probes.dtype, device=probes.device).cos()
        expected = plain(torch.tensordot(weights, probes, dims=1))
        got = torch.tensordot(weights, batched.detach(), dims=1)
        most = _MOST_ROUNDING.get(probes.dtype, _MOST_ROUNDING_ELSEWHERE)
        error, size = (got - expected).norm(), torch.maximum(got.norm(), expected.norm())
        if bool(error > most * size):
            raise WrongUnderVmapError(
                "PyTorch's batched product differs from a plain one by "
                f"{float(error / size):.2g} of its norm"
            )
    function.found_right(way)


def _vmap(function: Products, probes: Tensor, randomness: str = "error") -> Tensor:
    with quiet_vmap():
        result: Tensor = torch.func.vmap(function, randomness=randomness)(probes)
    return result


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
