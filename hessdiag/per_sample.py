"""Sums over a batch of squared per-sample gradients: of v_n^T f(x_n) in the parameters of f.

Two ways. Layers that are known (:mod:`hessdiag.layers`) give them from what goes in and what comes
back, for the price of a backward pass. Every other parameter is differentiated one sample at a
time, by vmap, or in a loop where an operator has no rule for it. On the first batch, and again on
one of more samples where that had few, the gradients of the known layers are compared with those
of autograd, so that a layer whose weight serves elsewhere too, or whose samples meet, is left to
the second way. For a network of PyTorch's own modules the outcome is remembered, since it follows
from :func:`description_of`; one with other code is looked at again in every call.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.utils import _pytree as pytree

from hessdiag.compat import explained, forward_mode_operators
from hessdiag.curvature import arbitrary
from hessdiag.descriptions import description_of
from hessdiag.layers import Gradients, LayerSums, sums_of
from hessdiag.parameter_vectors import Leaves, ParameterTree, Tree
from hessdiag.parameters import RandomNumbers, check_depends

Model = nn.Module | Callable[[Tree, Any], Tensor]

# Entries of gradients of samples or at layers held at a time.
_ENTRIES = 2**23
# Entries at the layers of a batch up to which one batched backward pass is faster on a CPU.
_SMALL = 2**19
# Samples that layers are checked with.
_CHECKED = 4
# The names of layers that agree with autograd, by what that follows from.
_AGREEING: dict[Hashable, frozenset[str]] = {}
_MOST_REMEMBERED = 256


@dataclass(frozen=True)
class _Layer:
    """A layer whose rule is known, and its parameters: names within it, numbers of leaves."""

    module: nn.Module
    rule: LayerSums
    leaves: list[tuple[str, int]]


@dataclass(frozen=True)
class _Call:
    """One call of a layer: what went in, and where in the graph its output is."""

    input: Tensor
    version: int
    edge: GradientEdge
    entries: int


@dataclass(frozen=True)
class _Batch:
    """Outputs with their graph to the leaves, and the calls of layers that it goes through."""

    outputs: Tensor
    leaves: Leaves
    calls: dict[str, _Call]


class SampleGradients:
    """Squared gradients of the samples of one batch after another.

    Args:
        model: A module, or a function of parameters and inputs.
        tree: The parameters; for a module a dictionary by their names.
        names: The names of the leaves, or None where ``model`` is no module.
        notes: Takes what a reader of the result should know.
        own: Whether the leaves are all parameters of the module that require gradients.

    Raises:
        ValueError: If a BatchNorm lets samples meet.
    """

    def __init__(
        self,
        model: Model,
        tree: ParameterTree,
        names: list[str] | None,
        notes: list[str],
        *,
        own: bool = False,
    ) -> None:
        self._model, self._tree, self._names, self._notes = model, tree, names, notes
        self._own = own
        self._layers: dict[str, _Layer] = {}
        # Every place that holds a leaf, once. Where one module is in two places, functional_call
        # with tied weights would not put the parameters back (torch 2.11 to 2.13).
        self._places: dict[str, int] = {}
        if isinstance(model, nn.Module):
            index = {name: i for i, name in enumerate(names or [])}
            numbers = {id(p): index[n] for n, p in model.named_parameters() if n in index}
            for name, module in model.named_modules():
                _check_batch_norm(name, module)
                prefix = f"{name}." if name else ""
                for short, p in module._parameters.items():
                    if id(p) in numbers:
                        self._places[prefix + short] = numbers[id(p)]
                rule = sums_of(module)
                owned = ((short, prefix + short) for short in module._parameters)
                leaves = [(short, index[full]) for short, full in owned if full in index]
                if rule is not None and leaves:
                    self._layers[name] = _Layer(module, rule, leaves)
        self._random_numbers = RandomNumbers(tree.device)
        self._checked_layers = self._checked_rest = 0  # samples
        self._by_vmap = True

    def at(self, inputs: Any) -> tuple[Tensor, Callable[[Tensor], Leaves]]:
        """Return the outputs of a batch, and the function from vectors to sums of squares.

        The function maps vectors v of shape (m, N, ...), N outputs each, to the sum over m and n of
        the square of the gradient of v_mn^T f(x_n), a list like the leaves.

        Raises:
            TypeError: If the model returns no tensor.
            ValueError: If it returns another number of samples, depends on no parameter, lets the
                samples of a batch meet, or draws random numbers for parameters of unknown layers.
        """
        samples = min(_CHECKED, len(leaves_of(inputs)[0]))
        if self._layers and self._checked_layers < samples:
            self._find_layers(part_of(inputs, 0, samples))
            self._checked_layers = samples
        before = self._random_numbers.states()
        batch = self._evaluate(inputs, self._own)
        after = self._random_numbers.states()
        drew = not all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
        covered = {i for name in batch.calls for _, i in self._layers[name].leaves}
        rest = [i for i in range(len(self._tree.leaves)) if i not in covered]
        if rest and drew:
            raise ValueError(
                "model must not draw random numbers (dropout?), which would differ between passes; "
                "put the module in eval mode"
            )

        def squares(vectors: Tensor) -> Leaves:
            found: list[Tensor | None] = [None] * len(self._tree.leaves)
            if covered:
                self._add_layers(found, batch, vectors)
            if rest:
                self._add_rest(found, rest, inputs, batch.outputs.detach(), vectors)
            return self._tree.zeros_for_missing(found)

        return batch.outputs.detach(), squares

    def _call(self, leaves: Leaves | None, inputs: Any) -> Tensor:
        """Return the outputs at ``leaves``, or with the module's own parameters for None."""
        if isinstance(self._model, nn.Module):
            # A list too: a DataLoader makes one of the tuples of its samples.
            args = tuple(inputs) if isinstance(inputs, (tuple, list)) else (inputs,)
            if leaves is None:
                outputs = self._model(*args)
            else:
                values = {name: leaves[i] for name, i in self._places.items()}
                outputs = torch.func.functional_call(self._model, values, args, tie_weights=False)
        else:
            outputs = self._model(self._tree.restore(leaves or []), inputs)
        if not isinstance(outputs, Tensor):
            raise TypeError(f"model must return a torch.Tensor, got {type(outputs).__name__}")
        samples = len(leaves_of(inputs)[0])
        if outputs.dim() < 1 or len(outputs) != samples:
            raise ValueError(
                f"model must return outputs of shape ({samples}, ...), one for each sample of "
                f"inputs, got {tuple(outputs.shape)}"
            )
        return outputs

    # Known layers

    def _evaluate(self, inputs: Any, own: bool = False) -> _Batch:
        """Run the model, and record the layers that are called once, with the batch in front.

        With the module's ``own`` parameters there are no leaves, which the layers need not.
        """
        calls: dict[str, list[_Call]] = {name: [] for name in self._layers}

        def recorder(name: str) -> Callable[..., None]:
            def record(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
                if isinstance(output, Tensor) and output.requires_grad and len(args) == 1:
                    a = args[0].detach()
                    edge = get_gradient_edge(output)
                    calls[name].append(_Call(a, a._version, edge, output.numel()))

            return record

        handles = [
            layer.module.register_forward_hook(recorder(name))
            for name, layer in self._layers.items()
        ]
        try:
            with torch.inference_mode(False), torch.enable_grad():
                leaves = None if own else self._tree.requiring_grad()
                outputs = self._call(leaves, inputs)
        finally:
            for handle in handles:
                handle.remove()
        check_depends("model", outputs)
        once = {
            name: found[0]
            for name, found in calls.items()
            if len(found) == 1 and found[0].input.dim() and len(found[0].input) == len(outputs)
        }
        return _Batch(outputs, leaves or [], once)

    def _add_layers(self, found: list[Tensor | None], batch: _Batch, vectors: Tensor) -> None:
        entries = sum(call.entries for call in batch.calls.values())
        # Small or on a GPU, all vectors go back at once; else the caches hold one of them better.
        together = self._by_vmap and (vectors.is_cuda or entries <= _SMALL)
        step = max(1, _ENTRIES // max(1, entries))
        for part in vectors.split(step):
            try:
                sums = self._layer_sums(batch, part, together)
            except RuntimeError as error:
                reason = explained(error, "vjp", "vmap") if together else None
                if reason is None:
                    raise
                self._note_no_vmap(str(reason))
                together = False
                sums = self._layer_sums(batch, part, together)
            for i, value in sums.items():
                held = found[i]
                found[i] = value if held is None else held.add_(value)

    def _layer_sums(self, batch: _Batch, vectors: Tensor, together: bool) -> dict[int, Tensor]:
        """Return the sums of squares of the leaves of known layers, by their numbers."""
        return self._powers(batch, _returned(batch, vectors, together), 2)

    def _powers(
        self, batch: _Batch, returned: Sequence[Gradients | None], power: int
    ) -> dict[int, Tensor]:
        sums: dict[int, Tensor] = {}
        for g, (name, call) in zip(returned, batch.calls.items(), strict=True):
            if g is None:
                continue
            if call.input._version != call.version:
                raise ValueError(
                    f"model must not write into the input of its layer {name!r}, which squares of "
                    "gradients need; make that operation out of place"
                )
            layer = self._layers[name]
            of_layer = layer.rule(layer.module, call.input, g, power)
            sums |= {i: of_layer[short] for short, i in layer.leaves}
        return sums

    def _find_layers(self, inputs: Any) -> None:
        """Leave only layers that agree with autograd on a few samples, now or in another call."""
        network = description_of(self._model) if isinstance(self._model, nn.Module) else None
        if network is None:
            self._check_layers(inputs)
            return
        # A plain number among the inputs may steer the network; what else there is, may too.
        tensors, structure = pytree.tree_flatten(inputs)
        if not all(isinstance(t, Tensor) for t in tensors):
            self._check_layers(inputs)
            return
        shapes = [(t.shape, t.dtype) for t in tensors]
        autocast = torch.is_autocast_enabled(self._tree.device.type)
        leaves = tuple(self._names or []), self._tree.dtype, self._tree.device
        key = network, leaves, structure, tuple(shapes), autocast
        agreeing = _AGREEING.get(key)
        if agreeing is not None:
            self._layers = {name: self._layers[name] for name in agreeing}
        elif self._check_layers(inputs) and self._by_vmap:
            if len(_AGREEING) >= _MOST_REMEMBERED:
                _AGREEING.clear()
            _AGREEING[key] = frozenset(self._layers)

    def _check_layers(self, inputs: Any) -> bool:
        """Leave only layers that agree with autograd, and whose samples do not meet, on a few.

        Returns:
            Whether every gradient was there to compare with: where a network is dead, zeros agree
            with anything.
        """
        batch = self._evaluate(inputs)
        if not batch.calls:
            self._layers = {}
            return False
        # Vectors for every other sample: what comes back to the others must be zero.
        vectors = arbitrary(batch.outputs, 2)
        vectors[:, 1::2] = 0.0
        expected = torch.autograd.grad(
            batch.outputs, batch.leaves, vectors.sum(0), retain_graph=True, allow_unused=True
        )

        def agreeing(together: bool) -> dict[str, _Layer]:
            returned = _returned(batch, vectors, together)
            sums = self._powers(batch, returned, 1)
            found = {}
            for g, name in zip(returned, batch.calls, strict=True):
                layer = self._layers[name]
                alone = g is None or not any(bool(v[1::2].any()) for v in g)
                if alone and all(close(sums.get(i), expected[i]) for _, i in layer.leaves):
                    found[name] = layer
            return found

        found: dict[str, _Layer] = {}
        try:
            found = agreeing(True)
        except RuntimeError as error:
            reason = explained(error, "vjp", "vmap")
            if reason is None:
                raise
            self._note_no_vmap(str(reason))
        if len(found) < len(batch.calls):
            by_loop = agreeing(False)
            if by_loop.keys() - found.keys():
                self._note_no_vmap("vmap of a backward pass gives other gradients")
            found = by_loop
        self._layers = found
        gradients = [expected[i] for layer in found.values() for _, i in layer.leaves]
        return all(g is not None and bool(g.any()) for g in gradients)

    def _note_no_vmap(self, reason: str) -> None:
        if self._by_vmap:
            self._by_vmap = False
            self._notes.append(f"passes one by one: {reason}")

    # Every other parameter

    def _add_rest(
        self,
        found: list[Tensor | None],
        rest: list[int],
        inputs: Any,
        outputs: Tensor,
        vectors: Tensor,
    ) -> None:
        samples = min(2, len(outputs))
        if self._checked_rest < samples:
            self._check_rest(rest, part_of(inputs, 0, samples), vectors[:1, :samples])
            self._checked_rest = samples
        sizes = sum(self._tree.leaves[i].numel() for i in rest)
        step = max(1, _ENTRIES // max(1, sizes))
        for first in range(0, len(outputs), step):
            last = first + step
            returned, squares = self._of_samples(
                rest, part_of(inputs, first, last), vectors[:, first:last]
            )
            if not close(returned, outputs[first:last]):
                raise ValueError(
                    "model must act on each sample alone, and its outputs for one sample are not "
                    "those in a batch; put modules like BatchNorm in eval mode"
                )
            for i, square in zip(rest, squares, strict=True):
                held = found[i]
                found[i] = square if held is None else held.add_(square)

    def _check_rest(self, rest: list[int], inputs: Any, vectors: Tensor) -> None:
        """Compare vmap with a loop: PyTorch has rules that are wrong, as that of ``cdist`` is."""
        if not self._by_vmap:
            return
        squares = self._of_samples(rest, inputs, vectors)[1]
        self._by_vmap, by_vmap = False, self._by_vmap
        expected = self._of_samples(rest, inputs, vectors)[1]
        self._by_vmap = by_vmap
        if not all(close(a, b) for a, b in zip(squares, expected, strict=True)):
            self._note_no_vmap("vmap over samples gives other gradients")

    def _of_samples(
        self, rest: list[int], inputs: Any, vectors: Tensor
    ) -> tuple[Tensor, list[Tensor]]:
        """Return the outputs of samples, and the sums of squares of the leaves in ``rest``."""
        if self._by_vmap:
            try:
                with forward_mode_operators(), torch.no_grad():
                    of_each = torch.func.vmap(
                        lambda x, v: self._of_one_by_func(rest, x, v), in_dims=(0, 1)
                    )
                    outputs, squares = of_each(inputs, vectors)
                return outputs, [square.sum(0) for square in squares]
            except (RuntimeError, ValueError) as error:
                reason = explained(error, "vjp", "vmap")
                if reason is None:
                    raise
                self._note_no_vmap(str(reason))
        parts, total = [], [torch.zeros_like(self._tree.leaves[i]) for i in rest]
        for n in range(vectors.shape[1]):
            output, squares = self._of_one(rest, part_of(inputs, n, n + 1), vectors[:, n])
            parts.append(output)
            for held, square in zip(total, squares, strict=True):
                held += square
        return torch.cat(parts), total

    def _of_one_by_func(
        self, rest: list[int], x: Any, vectors: Tensor
    ) -> tuple[Tensor, list[Tensor]]:
        def f(chosen: Leaves) -> Tensor:
            leaves = list(self._tree.leaves)
            for i, leaf in zip(rest, chosen, strict=True):
                leaves[i] = leaf
            return self._call(leaves, pytree.tree_map(lambda t: t[None], x))[0]

        evaluated: tuple[Any, ...] = torch.func.vjp(f, [self._tree.leaves[i] for i in rest])
        output, pull_back = evaluated
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
        for v in vectors if output.requires_grad else ():
            found = torch.autograd.grad(
                output, chosen, v[None], retain_graph=True, allow_unused=True
            )
            for square, g in zip(squares, found, strict=True):
                if g is not None:
                    square.addcmul_(g, g)
        return output.detach(), squares


def _returned(batch: _Batch, vectors: Tensor, together: bool) -> Sequence[Gradients | None]:
    """Return what comes back to the layers from each of m vectors, stacked or in a row."""
    edges = [call.edge for call in batch.calls.values()]

    def back(v: Tensor) -> tuple[Tensor | None, ...]:
        return torch.autograd.grad(
            batch.outputs,
            edges,
            v,
            retain_graph=True,
            allow_unused=True,
            is_grads_batched=together,
        )

    if together:
        return back(vectors)
    rows = [back(v) for v in vectors]
    return [
        None if c[0] is None else [g for g in c if g is not None] for c in zip(*rows, strict=True)
    ]


def _check_batch_norm(name: str, module: nn.Module) -> None:
    if isinstance(module, nn.modules.batchnorm._BatchNorm) and (
        module.training or module.running_mean is None
    ):
        raise ValueError(
            "BatchNorm layers of model must be in eval mode, with running statistics, got "
            f"{name!r} in training mode or without them: samples would meet"
        )


def leaves_of(tree: Any) -> list[Any]:
    """Return the leaves of a tree, for one tensor without a walk."""
    return [tree] if isinstance(tree, Tensor) else pytree.tree_leaves(tree)


def part_of(tree: Any, first: int, last: int) -> Any:
    """Return samples first .. last - 1 of every tensor of a tree."""
    if isinstance(tree, Tensor):
        return tree[first:last]
    return pytree.tree_map_only(Tensor, lambda t: t[first:last], tree)


def close(a: Tensor | None, b: Tensor | None) -> bool:
    """Say whether two results are equal but for rounding, None standing for zeros."""
    if a is None or b is None:
        other = a if b is None else b
        return other is None or not bool(other.any())
    tolerance = torch.finfo(a.dtype).eps ** 0.5
    return bool((a - b).norm() <= tolerance * b.norm())
