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
keeps none. No way serves every function, so :class:`JacobianProducts` goes through those that
are left until one works, and notes why one before it did not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from hessdiag.checks import check_output
from hessdiag.compat import (
    NotDifferentiableError,
    explained,
    forward_mode_operators,
    has_tangent,
    reusable_graphs,
)

ScoreFunction = Callable[[Tensor], Tensor]
Products = Callable[[Tensor], Tensor]
Mode = Literal["auto", "vjp", "jvp"]
Batching = Literal["auto", "loop", "vmap", "fold"]

# Elements of x up to which batched backward passes are the faster ones on a CPU: measured on
# U-Nets, twice as fast at 768, as fast at 6,144.
_SMALL = 4096


class JacobianProducts:
    """Probes v, of shape (m, B, ...), to products of the same shape, by the first way that works.

    Args:
        score_fn: Maps (B, ...) to (B, ...), each sample alone.
        x: Where the Jacobian is taken, of shape (B, ...).
        mode: "vjp" for ``J^T v``, "jvp" for ``J v``. "auto" is reverse mode, which evaluates
            ``score_fn`` once for all probes; or forward mode where ``score_fn`` has no backward
            graph (under ``torch.no_grad``) or rule, or where the graph does not fit in memory.
        batching: One of the ways above. "auto" is "vmap", but for large inputs on a CPU in reverse
            mode, and gives way to "loop" where vmap has no rule.

    Attributes:
        mode: The mode that was taken.
        batching: The way that was taken.
        notes: Why ways before it could not be.

    Raises:
        TypeError: If ``score_fn`` returns no tensor or another dtype than that of x.
        ValueError: If it returns another shape, does not depend on x, or ``mode`` or ``batching``
            is unknown.

    Example:
        >>> A = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
        >>> products = JacobianProducts(lambda x: x @ A.T, torch.zeros(1, 2), "jvp")
        >>> products(torch.tensor([[[1.0, 0.0]], [[0.0, 1.0]]]))
        tensor([[[1., 3.]],
        <BLANKLINE>
                [[2., 4.]]])
    """

    def __init__(
        self,
        score_fn: ScoreFunction,
        x: Tensor,
        mode: Mode = "auto",
        batching: Batching = "auto",
    ) -> None:
        self._function = _Function(score_fn, x)
        self._candidates = _candidates(mode, batching, x)
        self._products: Products | None = None
        self.mode, self.batching = self._candidates[0]
        self.notes: list[str] = []

    def __call__(self, probes: Tensor) -> Tensor:
        """Return the products with ``probes``."""
        while True:
            self.mode, self.batching = self._candidates[0]
            try:
                if self._products is None:
                    self._products = _WAYS[self.mode, self.batching](self._function)
                return self._products(probes)
            except (RuntimeError, ValueError) as error:
                self._give_way(error)

    def _give_way(self, error: Exception) -> None:
        """Strike the way that raised off the candidates, or raise if none is left."""
        graph_too_large = isinstance(error, torch.OutOfMemoryError) and self._products is None
        if graph_too_large or isinstance(error, NotDifferentiableError):
            # Every way of this mode would meet the same.
            left = [way for way in self._candidates if way[0] != self.mode]
            if not left:
                raise error
            note = f"not mode='{self.mode}': {error}"
        else:
            left = self._candidates[1:]
            refused = explained(error, self.mode, self.batching)
            if refused is None:
                raise error
            if not left:
                raise refused from error
            note = str(refused)
        self.notes.append(note)
        self._candidates, self._products = left, None


def _candidates(
    mode: Mode, batching: Batching, x: Tensor
) -> list[tuple[Literal["vjp", "jvp"], Literal["loop", "vmap", "fold"]]]:
    if mode not in get_args(Mode):
        raise ValueError(f"mode must be one of {', '.join(get_args(Mode))}, got {mode!r}")
    if batching not in get_args(Batching):
        raise ValueError(
            f"batching must be one of {', '.join(get_args(Batching))}, got {batching!r}"
        )
    candidates: list[tuple[Literal["vjp", "jvp"], Literal["loop", "vmap", "fold"]]] = []
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


class _Function(NamedTuple):
    """A function and the point where it is differentiated."""

    score_fn: ScoreFunction
    x: Tensor


def _reverse_graph(score_fn: ScoreFunction, x: Tensor) -> tuple[Tensor, Tensor]:
    """Return x as a leaf, and the output of ``score_fn`` with its graph to that leaf."""
    with torch.inference_mode(False), torch.enable_grad(), reusable_graphs():
        # A clone: autograd refuses tensors made in inference mode, and score_fn may write into it.
        leaf = x.detach().clone().requires_grad_()
        output = score_fn(leaf.clone())
    _check_graph(output, x)
    return leaf, output


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


def _reverse_loop(function: _Function) -> Products:
    leaf, output = _reverse_graph(function.score_fn, function.x)
    return lambda probes: torch.stack([_backward(output, leaf, probe) for probe in probes])


def _reverse_vmap(function: _Function) -> Products:
    x = function.x

    def checked(point: Tensor) -> Tensor:
        output = function.score_fn(point.clone())
        _check_graph(output, x)
        return output

    # By torch.func rather than is_grads_batched, which is slower and has rules for less. The outer
    # no_grad leaves out the graph to parameters that require gradients.
    with torch.inference_mode(False), torch.no_grad(), reusable_graphs():
        # Contiguous, since vmap has no rules for other memory formats.
        point = x.detach().clone(memory_format=torch.contiguous_format)
        pull_back = torch.func.vjp(checked, point)[1]

    def products(probes: Tensor) -> Tensor:
        with torch.no_grad():
            result: Tensor = torch.func.vmap(lambda probe: pull_back(probe)[0])(probes)
        return result

    return products


def _reverse_fold(function: _Function) -> Products:
    score_fn, x = function.score_fn, function.x

    def products(probes: Tensor) -> Tensor:
        with _deterministic(x):
            leaf, output = _reverse_graph(score_fn, _folded(x, len(probes)))
        if len(output) > 1:
            alone = torch.zeros_like(output)
            alone[0] = 1.0
            _check_alone(_backward(output, leaf, alone)[1:])
        return _backward(output, leaf, probes.flatten(0, 1)).reshape(probes.shape)

    return products


def _forward_product(score_fn: ScoreFunction, x: Tensor) -> Products:
    """Return v -> J v for one probe, of the shape of x."""

    def checked(point: Tensor) -> Tensor:
        output = score_fn(point)
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


def _forward_loop(function: _Function) -> Products:
    product = _forward_product(function.score_fn, function.x)
    random_state = _RandomState(function.x)

    def products(probes: Tensor) -> Tensor:
        # Parameters that require gradients would record a backward graph for nothing.
        with forward_mode_operators(), torch.no_grad():
            results = []
            for probe in probes:
                with random_state.same():
                    results.append(product(probe))
            return torch.stack(results)

    return products


def _forward_vmap(function: _Function) -> Products:
    product = _forward_product(function.score_fn, function.x)
    random_state = _RandomState(function.x)

    def products(probes: Tensor) -> Tensor:
        with forward_mode_operators(), torch.no_grad(), random_state.same():
            if len(probes) == 1:
                return product(probes[0])[None]
            return torch.func.vmap(product, randomness="same")(probes)

    return products


def _forward_fold(function: _Function) -> Products:
    score_fn, x = function.score_fn, function.x

    def products(probes: Tensor) -> Tensor:
        product = _forward_product(score_fn, _folded(x, len(probes)))
        with forward_mode_operators(), torch.no_grad():
            folded = probes.flatten(0, 1)
            with _deterministic(x):
                result = product(folded)
            if len(folded) > 1:
                alone = torch.zeros_like(folded)
                alone[0] = 1.0
                _check_alone(product(alone)[1:])
        return result.reshape(probes.shape)

    return products


_WAYS: dict[tuple[str, str], Callable[[_Function], Products]] = {
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
        >>> check_samples_alone(JacobianProducts(lambda x: x - x.mean(dim=0), x),
        ...                     x)    # doctest: +ELLIPSIS
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
