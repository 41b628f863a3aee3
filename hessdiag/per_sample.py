"""Sums over a batch of squared per-sample gradients: of v_n^T f(x_n) in the parameters of f.

Two ways. Layers that are known (:mod:`hessdiag.layers`) give them from what goes in and what comes
back, for the price of a backward pass. Every other parameter is differentiated one sample at a
time, by vmap, or in a loop where an operator has no rule for it. On the first batch the gradients
of the known layers are compared with those of autograd, so that a layer whose weight serves
elsewhere too, or whose samples meet, is left to the second way.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.utils import _pytree as pytree

from hessdiag.compat import explained, forward_mode_operators
from hessdiag.kernels import normal
from hessdiag.layers import own_parameters, sums_of
from hessdiag.parameters import check_depends
from hessdiag.trees import Leaves, ParameterTree, Tree

Model = nn.Module | Callable[[Tree, Any], Tensor]

# Entries of per-sample gradients held at a time.
_ENTRIES = 2**23


@dataclass(frozen=True)
class _Call:
    """One call of a layer: what went in, and where in the graph its output is."""

    input: Tensor
    version: int
    edge: GradientEdge


class SampleGradients:
    """Squared gradients of the samples of one batch after another.

    Args:
        model: A module, or a function of parameters and inputs.
        tree: The parameters; for a module a dictionary by their names.
        names: The names of the leaves, or None where ``model`` is no module.
        notes: Takes what a reader of the result should know.

    Attributes:
        passes: Backward passes so far.
    """

    def __init__(
        self, model: Model, tree: ParameterTree, names: list[str] | None, notes: list[str]
    ) -> None:
        self._model, self._tree, self._notes = model, tree, notes
        self._index = {name: i for i, name in enumerate(names or [])}
        self._layers: dict[str, nn.Module] | None = None
        if isinstance(model, nn.Module):
            self._layers = {
                name: module
                for name, module in model.named_modules()
                if sums_of(module)
                and any(n in self._index for _, n in own_parameters(module, name))
            }
        self._checked = False
        self._loop = False

    def at(self, inputs: Any) -> tuple[Tensor, Callable[[Tensor], Leaves]]:
        """Return the outputs of a batch, and the function from vectors to sums of squares.

        The function maps vectors v of shape (m, N, ...), N outputs each, to the sum over m and n of
        the square of the gradient of v_mn^T f(x_n), a list like the leaves.

        Raises:
            ValueError: If the samples of a batch meet in the model, or differ in what it draws.
        """
        before = torch.get_rng_state()
        outputs, calls, leaves = self._evaluate(inputs)
        drew = not torch.equal(before, torch.get_rng_state())
        if not self._checked:
            self._strike_out(outputs, calls, leaves)
            self._checked = True
        covered = self._covered()
        rest = [i for i in range(len(leaves)) if i not in covered]
        if rest and drew:
            raise ValueError(
                "model must not draw random numbers (dropout?), which would differ between passes; "
                "put the module in eval mode"
            )
        plain = outputs.detach()

        def squares(vectors: Tensor) -> Leaves:
            found: list[Tensor | None] = [None] * len(leaves)
            if covered:
                self._add_layers(found, outputs, calls, vectors, 2)
            if rest:
                self._add_rest(found, rest, inputs, plain, vectors)
            return self._tree.zeros_for_missing(found)

        return plain, squares

    # Layers

    def _evaluate(self, inputs: Any) -> tuple[Tensor, dict[str, list[_Call]], Leaves]:
        calls: dict[str, list[_Call]] = {name: [] for name in self._layers or {}}

        def recorder(name: str) -> Callable[..., None]:
            def record(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
                if isinstance(output, Tensor) and output.requires_grad and len(args) == 1:
                    a = args[0].detach()
                    calls[name].append(_Call(a, a._version, get_gradient_edge(output)))

            return record

        handles = [
            module.register_forward_hook(recorder(name))
            for name, module in (self._layers or {}).items()
        ]
        needs_graph = bool(self._layers) or not self._checked
        try:
            with torch.inference_mode(False), torch.set_grad_enabled(needs_graph):
                leaves = self._tree.requiring_grad()
                outputs = self._call(leaves, inputs)
        finally:
            for handle in handles:
                handle.remove()
        if needs_graph:
            check_depends("model", outputs)
        return outputs, calls, leaves

    def _call(self, leaves: Leaves, inputs: Any) -> Tensor:
        parameters = self._tree.restore(leaves)
        if isinstance(self._model, nn.Module):
            args = inputs if isinstance(inputs, tuple) else (inputs,)
            outputs = torch.func.functional_call(self._model, parameters, args)
        else:
            outputs = self._model(parameters, inputs)
        if not isinstance(outputs, Tensor):
            raise TypeError(f"model must return a torch.Tensor, got {type(outputs).__name__}")
        samples = len(pytree.tree_leaves(inputs)[0])
        if outputs.dim() < 1 or len(outputs) != samples:
            raise ValueError(
                f"model must return outputs of shape ({samples}, ...), one for each sample of "
                f"inputs, got {tuple(outputs.shape)}"
            )
        return outputs

    def _covered(self) -> set[int]:
        return {
            self._index[name]
            for layer, module in (self._layers or {}).items()
            for _, name in own_parameters(module, layer)
            if name in self._index
        }

    def _add_layers(
        self,
        found: list[Tensor | None],
        outputs: Tensor,
        calls: dict[str, list[_Call]],
        vectors: Tensor,
        power: int,
    ) -> None:
        assert self._layers is not None
        edges = [calls[name][0].edge for name in self._layers]
        gradients = [
            torch.autograd.grad(outputs, edges, v, retain_graph=True, allow_unused=True)
            for v in vectors
        ]
        for i, (name, module) in enumerate(self._layers.items()):
            of_layer = [row[i] for row in gradients if row[i] is not None]
            if not of_layer:
                continue
            call, rule = calls[name][0], sums_of(module)
            assert rule is not None
            if call.input._version != call.version:
                raise ValueError(
                    f"model must not write into the input of its layer {name!r}, which the squares "
                    "of gradients need; make that operation out of place"
                )
            sums = rule(module, call.input, torch.stack(of_layer), power)
            for short, full in own_parameters(module, name):
                if full in self._index:
                    found[self._index[full]] = sums[short]

    def _strike_out(self, outputs: Tensor, calls: dict[str, list[_Call]], leaves: Leaves) -> None:
        """Leave only layers that are called once, sample by sample, and agree with autograd."""
        samples = len(outputs)
        for name in list(self._layers or {}):
            first = calls[name][0].input if len(calls[name]) == 1 else None
            if first is None or first.dim() < 1 or len(first) != samples:
                self._drop(name)
        if not self._layers:
            return
        # Vectors for every other sample: what comes back to the others must be zero.
        v = normal(outputs.shape, 0, device=outputs.device).to(outputs.dtype)
        v[1::2] = 0.0
        edges = [calls[name][0].edge for name in self._layers]
        returned = torch.autograd.grad(
            outputs, [*edges, *leaves], v, retain_graph=True, allow_unused=True
        )
        expected = dict(zip(self._index, returned[len(edges) :], strict=True))
        for g, (name, module) in zip(returned, list(self._layers.items()), strict=False):
            if g is None:
                continue
            rule = sums_of(module)
            assert rule is not None
            alone = len(g) == samples and not bool(g[1::2].any())
            sums = rule(module, calls[name][0].input, g[None], 1) if alone else {}
            agree = alone and all(
                _close(sums[short], expected[full])
                for short, full in own_parameters(module, name)
                if full in self._index
            )
            if not agree:
                self._drop(name)

    def _drop(self, name: str) -> None:
        assert self._layers is not None
        del self._layers[name]

    # Every other parameter

    def _add_rest(
        self,
        found: list[Tensor | None],
        rest: list[int],
        inputs: Any,
        outputs: Tensor,
        vectors: Tensor,
    ) -> None:
        sizes = sum(self._tree.leaves[i].numel() for i in rest)
        step = max(1, _ENTRIES // max(1, sizes))
        for first in range(0, len(outputs), step):
            here = slice(first, first + step)
            part = pytree.tree_map(lambda x: x[here], inputs)  # noqa: B023
            returned, squares = self._of_samples(rest, part, vectors[:, here])
            if not _close(returned, outputs[here]):
                raise ValueError(
                    "model must act on each sample alone, and its outputs for one sample are not "
                    "those in a batch; put modules like BatchNorm in eval mode"
                )
            for i, square in zip(rest, squares, strict=True):
                held = found[i]
                found[i] = square if held is None else held + square

    def _of_samples(
        self, rest: list[int], inputs: Any, vectors: Tensor
    ) -> tuple[Tensor, list[Tensor]]:
        if not self._loop:
            try:
                with forward_mode_operators(), torch.no_grad():
                    of_each = torch.func.vmap(
                        lambda x, v: self._of_one_by_func(rest, x, v), in_dims=(0, 1)
                    )
                    outputs, squares = of_each(inputs, vectors)
                return outputs, [square.sum(0) for square in squares]
            except (RuntimeError, ValueError) as error:
                if explained(error, "vjp", "vmap") is None:
                    raise
                self._loop = True
                self._notes.append(f"samples one by one: {explained(error, 'vjp', 'vmap')}")
        results = [
            self._of_one(rest, pytree.tree_map(lambda x: x[n : n + 1], inputs), vectors[:, n])  # noqa: B023
            for n in range(vectors.shape[1])
        ]
        outputs = torch.cat([result[0] for result in results])
        return outputs, [torch.stack(s).sum(0) for s in zip(*(r[1] for r in results), strict=True)]

    def _of_one_by_func(
        self, rest: list[int], x: Any, vectors: Tensor
    ) -> tuple[Tensor, list[Tensor]]:
        def f(chosen: Leaves) -> Tensor:
            leaves = list(self._tree.leaves)
            for i, leaf in zip(rest, chosen, strict=True):
                leaves[i] = leaf
            return self._call(leaves, pytree.tree_map(lambda t: t[None], x))[0]

        output, pull_back = torch.func.vjp(f, [self._tree.leaves[i] for i in rest])
        squares = [g.square() for g in pull_back(vectors[0])[0]]
        for v in vectors[1:]:
            squares = [s + g.square() for s, g in zip(squares, pull_back(v)[0], strict=True)]
        return output, squares

    def _of_one(self, rest: list[int], x: Any, vectors: Tensor) -> tuple[Tensor, list[Tensor]]:
        with torch.inference_mode(False), torch.enable_grad():
            leaves = list(self._tree.leaves)
            chosen = [leaves[i].detach().requires_grad_() for i in rest]
            for i, leaf in zip(rest, chosen, strict=True):
                leaves[i] = leaf
            output = self._call(leaves, x)
        squares = [torch.zeros_like(leaf) for leaf in chosen]
        for v in vectors:
            found = torch.autograd.grad(
                output, chosen, v[None], retain_graph=True, allow_unused=True
            )
            for square, g in zip(squares, found, strict=True):
                if g is not None:
                    square.addcmul_(g, g)
        return output.detach(), squares


def _close(a: Tensor, b: Tensor | None) -> bool:
    """Say whether two results are equal but for rounding, and None is zero."""
    if b is None:
        return not bool(a.any())
    tolerance = torch.finfo(a.dtype).eps ** 0.5
    return bool((a - b).abs().max() <= tolerance * b.abs().max()) if a.numel() else True
