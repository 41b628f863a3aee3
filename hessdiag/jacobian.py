"""The Jacobian of a batched function at a point, as an operator that every estimator takes.

For example::

    J = hessdiag.Jacobian(score_fn, x, mode="vjp")
    J.output                                        # score_fn(x)
    hessdiag.trace(J, max_probes=16).trace          # from the same evaluation of score_fn

How ``score_fn`` is evaluated is said once, here, and holds for whatever is done with J.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, TypedDict

import torch
from torch import Tensor

from hessdiag.bases import Basis, check_basis, in_basis
from hessdiag.checks import check_batch
from hessdiag.compat import NotDifferentiableError, explained, inside_transform
from hessdiag.coupling import check_samples_alone
from hessdiag.functions import prepared
from hessdiag.inner_gradients import ConstantGradientError
from hessdiag.products import (
    WAYS,
    Batching,
    Function,
    Mode,
    Way,
    candidate_ways,
    fewest_batched,
)
from hessdiag.remembered import abilities_of

ScoreFunction = Callable[[Tensor], Tensor]


class Ways(TypedDict, total=False):
    """How a function is evaluated: the keyword arguments of :class:`Jacobian`."""

    mode: Mode
    batching: Batching
    compile: bool
    autocast: torch.dtype | None
    basis: Basis | None
    differentiable: bool


class Jacobian:
    """J of each sample of ``score_fn`` at x, known by its products.

    For ``score_fn: (B, ...) -> (B, ...)`` that acts on each sample alone, J is one matrix for each
    sample. :mod:`hessdiag.products` has the ways in which products are taken. The first that works
    is used, and one that ``score_fn`` turned out not to have is not tried again for that function.

    Args:
        score_fn: Maps (B, ...) to (B, ...), each sample alone. Arguments other than x are bound by
            ``functools.partial``; :func:`hessdiag.trees.ravel` makes one tensor of trees.
        x: Where the Jacobian is taken: shape (B, ...), real floating point, finite.
        mode: "vjp", reverse mode, products with the transpose of J and one evaluation for all of
            them; "jvp", forward mode, products with J, no activations kept; "auto", reverse mode,
            or forward mode where ``score_fn`` has no backward graph or rule, or the graph does not
            fit in memory.
        batching: "loop", "vmap" or "fold" the probes of a chunk; "auto" is "vmap", but for large
            inputs or few probes on a CPU in reverse mode, and gives way to "loop" where vmap has
            no rule, or a wrong one: the first batched product is compared with a plain one.
        compile: Whether to pass ``score_fn`` through ``torch.compile``; reverse mode only.
        autocast: Type for ``torch.autocast`` around ``score_fn``, bfloat16 say.
        basis: An orthonormal F: products are then those of F J F^T; see :func:`hessdiag.dct`.
        differentiable: Whether ``products``, ``output`` and ``aux`` carry gradients, to x and to
            whatever ``score_fn`` holds, by ``backward`` and by the transforms of ``torch.func``.
            Their graphs are kept, so memory grows with the number of probes. By "loop" or "vmap".
        has_aux: Whether ``score_fn`` returns (output, further tensors); the latter are ``aux``.
        may_be_constant: Whether an output that does not depend on x has the Jacobian zero, as the
            gradient of a linear function has; otherwise it is an error, since x is then mostly
            detached by mistake.
        rectangular: Whether the output may have samples of another shape than those of x. J then
            has products, and no diagonal: reverse mode takes probes of the shape of the output to
            products of the shape of x, and forward mode the other way round.
        remember: What ways that fail are remembered by; None for ``score_fn`` itself, which is
            known again by its code and the modules that it holds.

    Attributes:
        x: Where the Jacobian is taken.
        basis: F, or None.
        differentiable: Whether products carry gradients.
        rectangular: Whether the output may have another shape than x.
        asked_mode: The mode that was asked for.
        mode: The mode that is taken: "vjp" or "jvp".
        batching: The way that is taken: "loop", "vmap" or "fold".
        notes: Why ways before it could not be.

    Raises:
        TypeError: If x is no real floating-point tensor, ``autocast`` no lower-precision type,
            ``score_fn`` returns no tensor or another dtype than that of x, or this is called inside
            of a transform of torch.func without ``differentiable``.
        ValueError: If x is not finite, an option is unknown, or ``score_fn`` returns another shape
            or does not depend on x. The last two, and all that concerns derivatives, are found out
            at the first evaluation.

    Example:
        >>> import torch, hessdiag
        >>> A = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
        >>> J = hessdiag.Jacobian(lambda x: x @ A.T, torch.ones(1, 2), mode="jvp")
        >>> J.output
        tensor([[3., 7.]])
        >>> J.products(torch.tensor([[[1.0, 0.0]], [[0.0, 1.0]]]))
        tensor([[[1., 3.]],
        <BLANKLINE>
                [[2., 4.]]])

        With further tensors, which are what the function returned beside its output:

        >>> J = hessdiag.Jacobian(lambda x: (x.sin(), x.square()), torch.ones(1, 2), has_aux=True)
        >>> J.aux
        tensor([[1., 1.]])
    """

    def __init__(
        self,
        score_fn: Callable[[Tensor], Any],
        x: Tensor,
        *,
        mode: Mode = "auto",
        batching: Batching = "auto",
        compile: bool = False,
        autocast: torch.dtype | None = None,
        basis: Basis | None = None,
        differentiable: bool = False,
        has_aux: bool = False,
        may_be_constant: bool = False,
        rectangular: bool = False,
        remember: object = None,
    ) -> None:
        check_batch("x", x, differentiable=differentiable)
        _check_differentiable(differentiable, compile, batching)
        if not callable(score_fn):
            raise TypeError(f"score_fn must be callable, got {type(score_fn).__name__}")
        check_basis(basis, x)
        if rectangular and basis is not None:
            raise ValueError("basis must be left out with rectangular=True: it is that of x alone")
        self.x, self.basis, self.asked_mode = x, basis, mode
        self.differentiable, self.rectangular = differentiable, rectangular
        prepared_fn, mode = prepared(score_fn, x, compile=compile, autocast=autocast, mode=mode)
        function = Function(
            prepared_fn,
            x,
            abilities_of(score_fn if remember is None else remember),
            has_aux=has_aux,
            may_be_constant=may_be_constant,
            rectangular=rectangular,
            differentiable=differentiable,
            fewest_batched=fewest_batched(batching, x),
        )
        self._evaluator = _Evaluator(function, mode, batching)

    @property
    def mode(self) -> str:
        """The mode that is taken, "vjp" or "jvp"."""
        return self._evaluator.candidates[0][0]

    @property
    def batching(self) -> str:
        """The way that is taken, "loop", "vmap" or "fold"."""
        return self._evaluator.candidates[0][1]

    @property
    def notes(self) -> list[str]:
        """Why ways before the one that is taken could not be."""
        return self._evaluator.notes

    @property
    def output(self) -> Tensor:
        """score_fn(x), in reverse mode from the evaluation of the products.

        Without a gradient, unless the operator is differentiable.
        """
        return self._evaluator.evaluation()[0]

    @property
    def aux(self) -> Any:
        """What ``score_fn`` returned beside its output, from the same evaluation."""
        return self._evaluator.evaluation()[1]

    def products(self, probes: Tensor) -> Tensor:
        """Return J^T v in mode "vjp", J v in mode "jvp", of probes of shape (m, B, ...).

        Raises:
            TypeError: If the probes are no tensor of the dtype of x.
            ValueError: If they have another shape or device, or no way is left in which
                ``score_fn`` can be differentiated.
        """
        x = self.x
        if not isinstance(probes, Tensor) or probes.dtype != x.dtype:
            got = probes.dtype if isinstance(probes, Tensor) else type(probes).__name__
            raise TypeError(f"probes must be a tensor of {x.dtype}, as x is, got {got}")
        if probes.device != x.device:
            raise ValueError(f"probes must be on {x.device}, as x is, got {probes.device}")
        # The output may show that the mode has to be another one.
        output_shape = self.output.shape if self.rectangular else x.shape
        shape, other = (output_shape, x.shape) if self.mode == "vjp" else (x.shape, output_shape)
        if probes.shape[1:] != shape:
            raise ValueError(
                f"probes must have shape (m, {', '.join(map(str, shape))}) in mode "
                f"'{self.mode}', got {tuple(probes.shape)}"
            )
        if len(probes) == 0:
            return probes.new_empty(0, *other)
        plain = self._evaluator.products
        return plain(probes) if self.basis is None else in_basis(plain, self.basis)(probes)

    def expect(self, num_probes: int) -> None:
        """Say how many probes there will be at a time, since the first may come alone.

        Backward passes of a single probe are faster in a loop, and what is taken for the first
        products is taken for the others.

        Example:
            >>> import torch, hessdiag
            >>> J = hessdiag.Jacobian(torch.sin, torch.zeros(1, 2))
            >>> J.expect(16)
            >>> _ = J.products(torch.ones(1, 1, 2))
            >>> J.batching
            'vmap'
        """
        self._evaluator.expected = num_probes

    def check_samples_alone(self) -> None:
        """Raise if ``score_fn`` couples the samples of a batch, by two products, once.

        Two further products for each doubling of the batch, and only if those two leave a doubt.
        What each sample has of J is then no matrix of its own, and unit vectors in all samples at
        once would give a sum over samples in its place.

        Raises:
            ValueError: If it does.

        Example:
            >>> import torch, hessdiag
            >>> x = torch.tensor([[1.0, 2.0], [3.0, 5.0]])
            >>> hessdiag.Jacobian(torch.sin, x).check_samples_alone()
            >>> coupled = hessdiag.Jacobian(lambda x: x - x.flip(0), x)
            >>> coupled.check_samples_alone()    # doctest: +ELLIPSIS
            Traceback (most recent call last):
            ...
            ValueError: score_fn must act on each sample alone, ...
        """
        self._evaluator.check_samples_alone()

    def in_basis(self, basis: Basis | None) -> Jacobian:
        """Return the operator in another basis; both share one evaluation.

        Example:
            >>> import torch, hessdiag
            >>> J = hessdiag.Jacobian(torch.sin, torch.zeros(1, 2))
            >>> basis = hessdiag.Basis(torch.negative, torch.negative)
            >>> J.in_basis(basis).products(torch.ones(1, 1, 2))
            tensor([[[1., 1.]]])
        """
        check_basis(basis, self.x)
        other = copy.copy(self)
        other.basis = basis
        return other

    def in_mode(self, mode: Mode) -> Jacobian:
        """Return the operator of the same function and point in another mode.

        Example:
            >>> import torch, hessdiag
            >>> A = torch.tensor([[0.0, 1.0], [0.0, 0.0]])
            >>> J = hessdiag.Jacobian(lambda x: x @ A.T, torch.zeros(1, 2), mode="vjp")
            >>> J.in_mode("jvp").products(torch.tensor([[[0.0, 1.0]]]))
            tensor([[[1., 0.]]])
        """
        other = copy.copy(self)
        other.asked_mode = mode
        other._evaluator = _Evaluator(self._evaluator.function, mode, "auto")
        other._evaluator.samples_alone = self._evaluator.samples_alone
        return other


def _check_differentiable(differentiable: bool, compile: bool, batching: Batching) -> None:
    if not differentiable:
        _check_outside_of_transforms()
    elif compile:
        raise ValueError(
            "compile=True must be left out with differentiable=True: torch.compile has no second "
            "derivative of what it compiled"
        )
    elif batching == "fold":
        raise ValueError("batching must be 'loop', 'vmap' or 'auto' with differentiable=True")
    elif torch.is_inference_mode_enabled():
        raise ValueError(
            "differentiable=True must be left out in inference mode, which keeps no gradients"
        )


def _check_outside_of_transforms() -> None:
    if inside_transform():
        raise TypeError(
            "products carry no derivative, so that a transform of torch.func (grad, jvp, vmap) "
            "around them would see a constant; pass differentiable=True, or call this outside of "
            "the transform"
        )


class _Evaluator:
    """Evaluates a function by the first way that works, once, for all who share it."""

    def __init__(self, function: Function, mode: Mode, batching: Batching) -> None:
        self.function = function
        self.notes: list[str] = []
        self.samples_alone = False
        self.expected = 1
        self.candidates = candidate_ways(mode, batching, function.x)
        self._chooses = batching == "auto"
        refused = function.abilities.refused
        left = [way for way in self.candidates if way not in refused]
        if self._chooses and left:
            first = self.candidates.index(left[0])
            self.notes += [refused[way] for way in self.candidates[:first]]
            self.candidates = left
        self._way: Way | None = None
        self._evaluation: tuple[Tensor, Any] | None = None

    def products(self, probes: Tensor) -> Tensor:
        if not self.function.differentiable:
            _check_outside_of_transforms()
        if self._way is None and self._chooses and len(probes) == self.expected == 1:
            self._prefer_loop()
        while True:
            try:
                return self._built().products(probes)
            except (RuntimeError, ValueError) as error:
                self._give_way(error)

    def evaluation(self) -> tuple[Tensor, Any]:
        if not self.function.differentiable:
            _check_outside_of_transforms()
        while self._evaluation is None:
            try:
                self._evaluation = self._built().evaluation()
            except (RuntimeError, ValueError) as error:
                self._give_way(error)
        return self._evaluation

    def check_samples_alone(self) -> None:
        if not self.samples_alone:
            with torch.no_grad():
                check_samples_alone(self.products, self.function.x)
            self.samples_alone = True

    def _prefer_loop(self) -> None:
        """Leave out batched backward passes, which are slower for a single probe."""
        mode = self.candidates[0][0]
        if mode == "vjp" and (mode, "loop") in self.candidates:
            self.candidates = self.candidates[self.candidates.index((mode, "loop")) :]

    def _built(self) -> Way:
        if self._way is None:
            self._way = WAYS[self.candidates[0]](self.function)
        return self._way

    def _give_way(self, error: Exception) -> None:
        """Strike the way that raised off the candidates, or raise if none is left."""
        mode, batching = self.candidates[0]
        graph_too_large = isinstance(error, torch.OutOfMemoryError) and self._way is None
        if isinstance(error, ConstantGradientError):
            raise error
        if graph_too_large or isinstance(error, NotDifferentiableError):
            # Every way of this mode would meet the same.
            left = [way for way in self.candidates if way[0] != mode]
            if not left:
                raise self._with_notes(error) from error
            note = f"not mode='{mode}': {error}"
        else:
            left = self.candidates[1:]
            refused = explained(error, mode, batching)
            if refused is None:
                raise error
            if not left:
                raise self._with_notes(refused) from error
            note = str(refused)
            self.function.abilities.refused[mode, batching] = note
        self.notes.append(note)
        self.candidates, self._way, self._evaluation = left, None, None

    def _with_notes(self, error: Exception) -> Exception:
        """Return an error that says of every way why it could not be taken."""
        if not self.notes or not isinstance(error, NotDifferentiableError):
            return error
        return NotDifferentiableError("; ".join([str(error), *self.notes]))


def as_jacobian(function: Jacobian | ScoreFunction, x: Tensor | None, ways: Ways) -> Jacobian:
    """Return the operator that an estimator was given, or that of a function at x.

    Raises:
        TypeError: If a function comes without x.
        ValueError: If an operator comes with x, or with ways of evaluation, or may be rectangular.

    Example:
        >>> J = Jacobian(torch.sin, torch.zeros(1, 2))
        >>> as_jacobian(J, None, {}) is J
        True
    """
    if not isinstance(function, Jacobian):
        if x is None:
            raise TypeError(
                "x must be given with a function, a tensor of shape (B, ...); only a "
                "hessdiag.Jacobian holds its own"
            )
        function, x, ways = Jacobian(function, x, **ways), None, {}
    if x is not None or ways:
        given = ", ".join([*([] if x is None else ["x"]), *ways])
        raise ValueError(
            f"{given} must be left out with a hessdiag.Jacobian, which holds its point and the way "
            "it is evaluated: give them to the Jacobian"
        )
    if function.rectangular:
        raise ValueError(
            "the Jacobian must be square for this; one with rectangular=True has products alone"
        )
    return function
