"""The Jacobian of a batched function at a point, as an operator that every estimator takes.

    J = hessdiag.Jacobian(score_fn, x, mode="vjp")
    J.output                                        # score_fn(x)
    hessdiag.trace(J, max_probes=16).trace          # from the same evaluation of score_fn

How ``score_fn`` is evaluated is said once, here, and holds for whatever is done with J.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, TypedDict
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from hessdiag.bases import Basis, in_basis
from hessdiag.checks import check_batch
from hessdiag.compat import NotDifferentiableError, explained
from hessdiag.functions import prepared
from hessdiag.products import (
    WAYS,
    Batching,
    Function,
    Mode,
    Way,
    WayName,
    candidate_ways,
)

ScoreFunction = Callable[[Tensor], Tensor]

# By function, or by what stands for it: the ways that it turned out not to have, and why.
_REFUSED: WeakKeyDictionary[Any, dict[WayName, str]] = WeakKeyDictionary()


class Ways(TypedDict, total=False):
    """How a function is evaluated: the keyword arguments of :class:`Jacobian`."""

    mode: Mode
    batching: Batching
    compile: bool
    autocast: torch.dtype | None
    basis: Basis | None


class Jacobian:
    """J of each sample of ``score_fn`` at x, known by its products.

    For ``score_fn: (B, ...) -> (B, ...)`` that acts on each sample alone, J is one matrix for each
    sample. :mod:`hessdiag.products` has the ways in which products are taken. The first that works
    is used, and one that ``score_fn`` turned out not to have is not tried again for that function.

    Args:
        score_fn: Maps (B, ...) to (B, ...), each sample alone.
        x: Where the Jacobian is taken: shape (B, ...), real floating point, finite.
        mode: "vjp", reverse mode, products with the transpose of J and one evaluation for all of
            them; "jvp", forward mode, products with J, no activations kept; "auto", reverse mode,
            or forward mode where ``score_fn`` has no backward graph or rule, or the graph does not
            fit in memory.
        batching: "loop", "vmap" or "fold" the probes of a chunk; "auto" is "vmap", but for large
            inputs on a CPU in reverse mode, and gives way to "loop" where vmap has no rule.
        compile: Whether to pass ``score_fn`` through ``torch.compile``; reverse mode only.
        autocast: Type for ``torch.autocast`` around ``score_fn``, bfloat16 say.
        basis: An orthonormal F: products are then those of F J F^T; see :func:`hessdiag.dct`.
        has_aux: Whether ``score_fn`` returns (output, further tensors); the latter are ``aux``.
        remember: What ways that fail are remembered by; None for ``score_fn`` itself. A module,
            for functions that are made anew around it.

    Attributes:
        x: Where the Jacobian is taken.
        basis: F, or None.
        asked_mode: The mode that was asked for.
        mode: The mode that is taken: "vjp" or "jvp".
        batching: The way that is taken: "loop", "vmap" or "fold".
        notes: Why ways before it could not be.

    Raises:
        TypeError: If x is no real floating-point tensor, ``autocast`` no lower-precision type, or
            ``score_fn`` returns no tensor or another dtype than that of x.
        ValueError: If x is not finite, an option is unknown, or ``score_fn`` returns another shape
            or does not depend on x. The last two, and all that concerns derivatives, are found out
            at the first evaluation.

    Example:
        >>> A = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
        >>> J = Jacobian(lambda x: x @ A.T, torch.ones(1, 2), mode="jvp")
        >>> J.output
        tensor([[3., 7.]])
        >>> J.products(torch.tensor([[[1.0, 0.0]], [[0.0, 1.0]]]))
        tensor([[[1., 3.]],
        <BLANKLINE>
                [[2., 4.]]])
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
        has_aux: bool = False,
        remember: object = None,
    ) -> None:
        check_batch("x", x)
        self.x, self.basis, self.asked_mode = x, basis, mode
        function, mode = prepared(score_fn, x, compile=compile, autocast=autocast, mode=mode)
        self._remember = score_fn if remember is None else remember
        self._evaluator = _Evaluator(
            Function(function, x, has_aux), mode, batching, _memory(self._remember)
        )

    @property
    def mode(self) -> str:
        """The mode that is taken: "vjp" or "jvp"."""
        return self._evaluator.candidates[0][0]

    @property
    def batching(self) -> str:
        """The way that is taken: "loop", "vmap" or "fold"."""
        return self._evaluator.candidates[0][1]

    @property
    def notes(self) -> list[str]:
        """Why ways before the one that is taken could not be."""
        return self._evaluator.notes

    @property
    def output(self) -> Tensor:
        """score_fn(x), without a gradient: in reverse mode from the evaluation of the products."""
        return self._evaluator.evaluation()[0]

    @property
    def aux(self) -> Any:
        """What ``score_fn`` returned beside its output, from the same evaluation."""
        return self._evaluator.evaluation()[1]

    def products(self, probes: Tensor) -> Tensor:
        """Return J^T v in mode "vjp", J v in mode "jvp", of probes of shape (m, B, ...).

        Raises:
            ValueError: If no way is left in which ``score_fn`` can be differentiated.
        """
        plain = self._evaluator.products
        return plain(probes) if self.basis is None else in_basis(plain, self.basis)(probes)

    def in_basis(self, basis: Basis | None) -> Jacobian:
        """Return the operator in another basis; both share one evaluation.

        Example:
            >>> J = Jacobian(torch.sin, torch.zeros(1, 2))
            >>> J.in_basis(Basis(torch.negative, torch.negative)).products(torch.ones(1, 1, 2))
            tensor([[[1., 1.]]])
        """
        other = copy.copy(self)
        other.basis = basis
        return other

    def in_mode(self, mode: Mode) -> Jacobian:
        """Return the operator of the same function and point in another mode.

        Example:
            >>> A = torch.tensor([[0.0, 1.0], [0.0, 0.0]])
            >>> J = Jacobian(lambda x: x @ A.T, torch.zeros(1, 2), mode="vjp")
            >>> J.in_mode("jvp").products(torch.tensor([[[0.0, 1.0]]]))
            tensor([[[1., 0.]]])
        """
        other = copy.copy(self)
        other.asked_mode = mode
        function, memory = self._evaluator.function, _memory(self._remember)
        other._evaluator = _Evaluator(function, mode, "auto", memory)
        return other


class _Evaluator:
    """Evaluates a function by the first way that works, once, for all who share it."""

    def __init__(
        self, function: Function, mode: Mode, batching: Batching, refused: dict[WayName, str]
    ) -> None:
        self.function, self._refused = function, refused
        self.notes: list[str] = []
        self.candidates = candidate_ways(mode, batching, function.x)
        left = [way for way in self.candidates if way not in refused]
        if batching == "auto" and left:
            first = self.candidates.index(left[0])
            self.notes += [refused[way] for way in self.candidates[:first]]
            self.candidates = left
        self._way: Way | None = None
        self._evaluation: tuple[Tensor, Any] | None = None

    def products(self, probes: Tensor) -> Tensor:
        while True:
            try:
                return self._built().products(probes)
            except (RuntimeError, ValueError) as error:
                self._give_way(error)

    def evaluation(self) -> tuple[Tensor, Any]:
        while self._evaluation is None:
            try:
                self._evaluation = self._built().evaluation()
            except (RuntimeError, ValueError) as error:
                self._give_way(error)
        return self._evaluation

    def _built(self) -> Way:
        if self._way is None:
            self._way = WAYS[self.candidates[0]](self.function)
        return self._way

    def _give_way(self, error: Exception) -> None:
        """Strike the way that raised off the candidates, or raise if none is left."""
        mode, batching = self.candidates[0]
        graph_too_large = isinstance(error, torch.OutOfMemoryError) and self._way is None
        if graph_too_large or isinstance(error, NotDifferentiableError):
            # Every way of this mode would meet the same.
            left = [way for way in self.candidates if way[0] != mode]
            if not left:
                raise error
            note = f"not mode='{mode}': {error}"
        else:
            left = self.candidates[1:]
            refused = explained(error, mode, batching)
            if refused is None:
                raise error
            if not left:
                raise refused from error
            note = str(refused)
            self._refused[mode, batching] = note
        self.notes.append(note)
        self.candidates, self._way, self._evaluation = left, None, None


def _memory(key: object) -> dict[WayName, str]:
    try:
        return _REFUSED.setdefault(key, {})
    except TypeError:  # it cannot be hashed or weakly referenced, and so not be remembered
        return {}


def as_jacobian(function: Jacobian | ScoreFunction, x: Tensor | None, ways: Ways) -> Jacobian:
    """Return the operator that an estimator was given, or that of a function at x.

    Raises:
        TypeError: If a function comes without x.
        ValueError: If an operator comes with x, or with ways of evaluation.

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
        return Jacobian(function, x, **ways)
    if x is not None or ways:
        given = ", ".join([*([] if x is None else ["x"]), *ways])
        raise ValueError(
            f"{given} must be left out with a hessdiag.Jacobian, which holds its point and the way "
            "it is evaluated: give them to the Jacobian"
        )
    return function
