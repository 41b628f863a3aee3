"""The diagonal of the Hessian of a loss over parameters."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from hessdiag.checks import check_positive_int
from hessdiag.choosing import ProbeName
from hessdiag.compat import NotDifferentiableError, explained, forward_mode_operators
from hessdiag.estimate import estimate_from_products, tolerance_of
from hessdiag.intervals import half_width
from hessdiag.kernels.philox import PROBES_PER_SIGN_TILE, Seed, check_counter, seed_tensor
from hessdiag.parameter_vectors import (
    Leaves,
    ParameterTree,
    Tree,
    TreeMoments,
    root_mean_square,
    sign_vectors,
)
from hessdiag.probes import ProbeDesign, Rademacher
from hessdiag.streaming import Tolerance, chunk_of

TreeMode = Literal["auto", "vjp", "jvp"]
TreeProduct = Callable[[Leaves], Leaves]


@dataclass(frozen=True, eq=False)
class ParameterDiagonal:
    """The diagonal of a matrix over parameters, in their own structure.

    Attributes:
        diagonal: The estimate: a tree like the parameters.
        stderr: Its standard errors: a tree like the parameters, zeros where the diagonal is exact;
            None where they were not asked for.
        num_probes: Products taken, or backward passes for each batch; int64 of shape ().
        mode: How derivatives were taken: "vjp" is reverse mode alone, "jvp" has a part in forward
            mode.
        note: What a reader should know of how it was done, or "".
        converged: Whether the tolerance was reached, bool of shape (); None where there was none.
        num_blocks: Independent blocks of probes behind it, int64 of shape (); None where there are
            no standard errors.

    Example:
        >>> import torch, hessdiag
        >>> parameters = {"w": torch.tensor([1.0, 2.0]), "b": torch.tensor(3.0)}
        >>> loss = lambda p: (p["w"] ** 3).sum() + p["w"].prod() + p["b"] ** 2
        >>> result = hessdiag.parameter_hessian_diagonal(loss, parameters, max_probes=256)
        >>> error = (result.diagonal["w"] - torch.tensor([6.0, 12.0])).abs()
        >>> bool((error < 4 * result.stderr["w"]).all()), result.sum_of_each()["b"]
        (True, tensor(2.))
    """

    diagonal: Tree
    stderr: Tree | None
    num_probes: Tensor
    mode: str
    note: str
    converged: Tensor | None = None
    num_blocks: Tensor | None = None

    def interval(self, level: float = 0.95) -> tuple[Tree, Tree]:
        """Return the ends of the intervals that cover each entry with probability ``level``.

        As :meth:`hessdiag.DiagonalEstimate.interval`, tensor by tensor; trees like the parameters.

        Raises:
            ValueError: If ``level`` is not between 0 and 1, or there are no standard errors.

        Example:
            >>> import torch, hessdiag
            >>> loss = lambda p: p["w"].prod() + p["w"].square().sum()
            >>> parameters = {"w": torch.ones(3)}
            >>> result = hessdiag.parameter_hessian_diagonal(loss, parameters, max_probes=64)
            >>> low, high = result.interval(0.99)
            >>> bool(((low["w"] < 2.0) & (2.0 < high["w"])).all())
            True
        """
        if self.stderr is None or self.num_blocks is None:
            raise ValueError("stderr must have been kept for an interval, got None")
        blocks = self.num_blocks.reshape(1)
        half = torch.utils._pytree.tree_map(
            lambda leaf: half_width(leaf[None], blocks, level)[0], self.stderr
        )
        ends = torch.utils._pytree.tree_map
        return ends(torch.sub, self.diagonal, half), ends(torch.add, self.diagonal, half)

    def sum_of_each(self) -> Tree:
        """Return the sum over each parameter tensor: the trace of its block of the matrix.

        Example:
            >>> import torch, hessdiag
            >>> diagonal = {"w": torch.tensor([1.0, 2.0]), "b": torch.tensor(3.0)}
            >>> result = hessdiag.ParameterDiagonal(diagonal, None, torch.tensor(1), "vjp", "")
            >>> result.sum_of_each()
            {'w': tensor(3.), 'b': tensor(3.)}
        """
        return torch.utils._pytree.tree_map(torch.sum, self.diagonal)

    def mean_of_each(self) -> Tree:
        """Return the mean over each parameter tensor: its mean curvature.

        Layers are ranked by it for quantisation (Dong et al., HAWQ-V2, 2020).

        Example:
            >>> import torch, hessdiag
            >>> diagonal = {"w": torch.tensor([1.0, 2.0]), "b": torch.tensor(3.0)}
            >>> result = hessdiag.ParameterDiagonal(diagonal, None, torch.tensor(1), "vjp", "")
            >>> result.mean_of_each()
            {'w': tensor(1.5000), 'b': tensor(3.)}
        """
        return torch.utils._pytree.tree_map(torch.mean, self.diagonal)


def parameter_hessian_diagonal(
    loss: Callable[[Tree], Tensor],
    parameters: Tree,
    *,
    max_probes: int,
    probes: ProbeName | ProbeDesign = "rademacher",
    rtol: float | None = None,
    atol: float | None = None,
    stderr: bool = True,
    mode: TreeMode = "auto",
    chunk_size: int | Literal["auto"] = "auto",
    seed: Seed = 0,
    probe_offset: int = 0,
) -> ParameterDiagonal:
    """Estimate the diagonal of the Hessian of a loss over parameters.

    The estimate is the mean of v * (H v) over probes v (Bekas, Kokiopoulou and Saad, 2007), with
    variance (1/M) sum_{j != i} H_ij^2 for M Rademacher probes. The parameters are one sample of all
    their entries, numbered in the order of the tree.

    Beside what one backward pass through the gradient takes, it holds six times the parameters: the
    gradient, a probe and its packed bits, a product, the mean and the squared deviations.

    Args:
        loss: Maps parameters to a number, as in
            ``lambda p: criterion(torch.func.functional_call(module, p, inputs), targets)``. If it
            draws random numbers, as dropout does, they are the same for every product.
        parameters: A tensor, or a tree of tensors of one floating-point type and one device, as
            ``dict(module.named_parameters())``.
        max_probes: Most probes.
        probes: As in :func:`hessdiag.estimate`.
        rtol: As in :func:`hessdiag.estimate`, over all parameters.
        atol: As in :func:`hessdiag.estimate`.
        stderr: Whether to keep standard errors, which takes once the parameters in memory; a
            tolerance needs them.
        mode: "vjp" is reverse over reverse, with one evaluation of the loss for all products; "jvp"
            forward over reverse, with an evaluation for each and no graph kept between them;
            "auto" the first, and the second where an operator has no second backward pass or the
            graph does not fit in memory.
        chunk_size: Probes drawn at a time, where ``probes`` is not "rademacher". Products are taken
            one after the other.
        seed: Seed of the probes.
        probe_offset: Number of the first probe.

    Returns:
        A :class:`ParameterDiagonal`; ``diagonal`` and ``stderr`` are trees like the parameters.

    Raises:
        TypeError: As :func:`hessdiag.estimate`, or if a leaf is no tensor, or types differ.
        ValueError: As :func:`hessdiag.estimate`, or if the loss is not a number or does not depend
            on the parameters, or a tolerance comes with ``stderr=False``.

    Example:
        >>> import torch, hessdiag
        >>> parameters = {"w": torch.tensor([1.0, 2.0]), "b": torch.tensor(3.0)}
        >>> loss = lambda p: (p["w"] ** 3).sum() + p["b"] ** 2
        >>> hessdiag.parameter_hessian_diagonal(loss, parameters, max_probes=1).diagonal
        {'w': tensor([ 6., 12.]), 'b': tensor(2.)}
    """
    tree = ParameterTree.of(parameters)

    def value(leaves: Leaves) -> Tensor:
        return as_number("loss", loss(tree.restore(leaves)))

    products = FirstThatWorks(
        mode,
        {
            "vjp": lambda: _reverse_over_reverse(value, tree),
            "jvp": lambda: _forward_over_reverse(value, tree),
        },
    )
    return estimate_over_parameters(
        products,
        tree,
        max_probes=max_probes,
        probes=probes,
        tolerance=tolerance_of(rtol, atol),
        stderr=stderr,
        chunk_size=chunk_size,
        seed=seed,
        probe_offset=probe_offset,
    )


# How products are taken


class FirstThatWorks:
    """Products by the first of several modes that the function has, built when it is needed.

    Args:
        mode: One of the names, or "auto" for all of them in order.
        builders: From the name of a mode to what evaluates the function and returns its product.

    Attributes:
        notes: Why the modes before the one that is taken could not be.
    """

    def __init__(self, mode: str, builders: dict[str, Callable[[], TreeProduct]]) -> None:
        if mode not in get_args(TreeMode):
            raise ValueError(f"mode must be one of {', '.join(get_args(TreeMode))}, got {mode!r}")
        self._builders = dict(builders) if mode == "auto" else {mode: builders[mode]}
        self._product: TreeProduct | None = None
        self.notes: list[str] = []

    @property
    def mode(self) -> str:
        """The mode that is taken."""
        return next(iter(self._builders))

    def __call__(self, probe: Leaves) -> Leaves:
        """Return the product of one probe, leaf by leaf."""
        while True:
            try:
                if self._product is None:
                    self._product = self._builders[self.mode]()
                return self._product(probe)
            except (RuntimeError, NotDifferentiableError) as error:
                self._give_way(error)

    def _give_way(self, error: Exception) -> None:
        graph_too_large = isinstance(error, torch.OutOfMemoryError) and self._product is None
        if graph_too_large or isinstance(error, NotDifferentiableError):
            reason: Exception | None = error
        else:
            reason = explained(error, self.mode, "loop")
        if reason is None or isinstance(error, DoesNotDependError):
            raise error
        if len(self._builders) == 1:
            raise reason from (None if reason is error else error)
        self.notes.append(f"not mode='{self.mode}': {reason}")
        del self._builders[self.mode]
        self._product = None


class DoesNotDependError(NotDifferentiableError):
    """What should be differentiated has no graph to the parameters, in any mode."""


def _reverse_over_reverse(value: Callable[[Leaves], Tensor], tree: ParameterTree) -> TreeProduct:
    with twice_differentiable():
        leaves = tree.requiring_grad()
        number = value(leaves)
        check_depends("loss", number)
        gradient = torch.autograd.grad(number, leaves, create_graph=True, allow_unused=True)
    curved = [i for i, g in enumerate(gradient) if g is not None and g.requires_grad]
    outputs = [gradient[i] for i in curved]
    del gradient, number

    def product(probe: Leaves) -> Leaves:
        if not curved:  # the loss is linear
            return tree.zeros_for_missing([None] * len(leaves))
        found = torch.autograd.grad(
            outputs, leaves, [probe[i] for i in curved], retain_graph=True, allow_unused=True
        )
        return tree.zeros_for_missing(found)

    return product


def _forward_over_reverse(value: Callable[[Leaves], Tensor], tree: ParameterTree) -> TreeProduct:
    random_numbers = RandomNumbers(tree.device)

    def gradient(leaves: Leaves) -> Leaves:
        result: Leaves = torch.func.grad(value)(leaves)
        return result

    def product(probe: Leaves) -> Leaves:
        with forward_mode_operators(), torch.no_grad(), random_numbers.same():
            result: Leaves = torch.func.jvp(gradient, (tree.leaves,), (probe,))[1]
        return result

    return product


@contextmanager
def twice_differentiable() -> Iterator[None]:
    """Evaluate by operators that have a second backward pass, with gradients switched on.

    The flash and memory-efficient attention of PyTorch have none, the mathematical one has.
    """
    with torch.inference_mode(False), torch.enable_grad(), forward_mode_operators():
        yield


class RandomNumbers:
    """Lets every evaluation see the random numbers of the first: dropout is one function."""

    def __init__(self, device: torch.device) -> None:
        self._generators = [torch.default_generator]
        if device.type == "cuda":
            self._generators.append(torch.cuda.default_generators[device.index])
        self._first: list[Tensor] | None = None

    def states(self) -> list[Tensor]:
        """Return the states of the generators: equal ones, and nothing was drawn in between."""
        return [generator.get_state() for generator in self._generators]

    @contextmanager
    def same(self) -> Iterator[None]:
        """Run with the state of the first time, and leave behind the state that was found."""
        found = self.states()
        if self._first is None:
            self._first = found
            yield
            return
        try:
            for generator, state in zip(self._generators, self._first, strict=True):
                generator.set_state(state)
            yield
        finally:
            for generator, state in zip(self._generators, found, strict=True):
                generator.set_state(state)


def check_depends(name: str, output: Tensor) -> None:
    """Raise unless ``output``, which ``name`` returned, has a graph.

    Raises:
        NotDifferentiableError: If it has none.
    """
    if not output.requires_grad:
        raise DoesNotDependError(
            f"the output of {name} has no backward graph to parameters; is it computed under "
            "torch.no_grad() or detached, or with the module's own parameters in place of those "
            "that it is given?"
        )


def as_number(name: str, value: object) -> Tensor:
    """Return ``value``, which ``name`` returned.

    Raises:
        TypeError: If it is complex.
        ValueError: If it is no 0-dimensional tensor.
    """
    if not isinstance(value, Tensor) or value.dim() != 0:
        got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(f"{name} must return a 0-dimensional tensor, got {got}")
    if value.is_complex():
        raise TypeError(f"{name} must return a real number, got {value.dtype}")
    return value


# How they are averaged


def estimate_over_parameters(
    products: FirstThatWorks,
    tree: ParameterTree,
    *,
    max_probes: int,
    probes: ProbeName | ProbeDesign,
    tolerance: Tolerance | None,
    stderr: bool,
    chunk_size: int | Literal["auto"],
    seed: Seed,
    probe_offset: int,
) -> ParameterDiagonal:
    """Return the mean of v * product(v) over the probes of a design.

    The arguments are those of :func:`parameter_hessian_diagonal`.
    """
    check_positive_int("max_probes", max_probes)
    probe_offset = check_counter("probe_offset", probe_offset, max_probes)
    # A probe is as large as all parameters.
    chunk = 1 if chunk_size == "auto" else chunk_of(chunk_size, tree.leaves[0])
    if tolerance and not stderr:
        raise ValueError("stderr must be True with rtol or atol, which stop by it, got False")
    if probes == "rademacher" or isinstance(probes, Rademacher):
        mean, errors, count, converged = _by_signs(
            products, tree, max_probes, tolerance, stderr, seed_tensor(seed, tree.device),
            probe_offset,
        )  # fmt: skip
        blocks, notes = torch.tensor(count), list[str]()
    else:

        def flat_products(flat: Tensor) -> Tensor:
            rows = [
                torch.cat([leaf.reshape(-1) for leaf in products(tree.split(probe[0]))])[None]
                for probe in flat
            ]
            return torch.stack(rows)

        streamed, notes = estimate_from_products(
            flat_products,
            tree.leaves[0].new_zeros(1).expand(1, tree.size),
            max_probes=max_probes,
            probes=probes,
            tolerance=tolerance,
            chunk_size=chunk,
            seed=seed,
            probe_offset=probe_offset,
        )
        mean, count = tree.split(streamed.mean[0]), int(streamed.num_probes[0])
        blocks = streamed.num_blocks[0].cpu()
        errors = tree.split(streamed.stderr[0]) if stderr else None
        converged = streamed.converged is not None and bool(streamed.converged[0])
    return ParameterDiagonal(
        diagonal=tree.restore(mean),
        stderr=None if errors is None else tree.restore(errors),
        num_probes=torch.tensor(count),
        mode=products.mode,
        note="; ".join(products.notes + notes),
        converged=torch.tensor(converged) if tolerance else None,
        num_blocks=blocks if stderr else None,
    )


def _by_signs(
    products: TreeProduct,
    tree: ParameterTree,
    max_probes: int,
    tolerance: Tolerance | None,
    stderr: bool,
    seed: Tensor,
    probe_offset: int,
) -> tuple[Leaves, Leaves | None, int, bool]:
    signs = sign_vectors(tree.size, seed, tree.dtype)
    moments = TreeMoments(deviations=stderr)
    converged = False
    for m in range(max_probes):
        probe = tree.split(signs(probe_offset + m))
        moments.add(probe, products(probe))
        looks = moments.count % PROBES_PER_SIGN_TILE == 0 or moments.count == max_probes
        converged = tolerance is not None and looks and _reached(tolerance, moments)
        if converged:
            break
    return moments.mean, moments.stderr() if stderr else None, moments.count, converged


def _reached(tolerance: Tolerance, moments: TreeMoments) -> bool:
    num_entries = sum(mean.numel() for mean in moments.mean)
    size, error = root_mean_square(moments.mean), root_mean_square(moments.stderr())
    return bool(tolerance.holds(size, error, num_entries, moments.count))
