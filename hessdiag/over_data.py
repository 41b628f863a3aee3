"""Diagonals over parameters that are sums over the samples of a data set."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator
from typing import Any, Literal, get_args

import torch
from torch import Tensor, distributed, nn
from torch.utils import _pytree as pytree

from hessdiag.checks import check_positive_int
from hessdiag.curvature import LossCurvature, Root, arbitrary, roots
from hessdiag.kernels.philox import Seed, check_counter, seed_tensor
from hessdiag.losses import closed_root, known_loss
from hessdiag.parameter_vectors import Leaves, ParameterTree, Tree
from hessdiag.parameters import ParameterDiagonal
from hessdiag.per_sample import Model, SampleGradients, close, leaves_of, part_of
from hessdiag.probes import BalancedColoring, ProbeDesign, Rademacher

Reduction = Literal["mean", "sum"]
Loss = Callable[[Tensor, Any], Tensor]
Squares = Callable[[Tensor], Leaves]

# Entries of vectors, each as large as the outputs of a batch, that are held at a time.
_ENTRIES = 2**23
# Losses whose closed form agrees with products, by all that it depends on.
_AGREEING: set[Hashable] = set()
_MOST_REMEMBERED = 256


def gauss_newton_over_data(
    model: Model,
    loss: Loss,
    data: Iterable[Any],
    *,
    parameters: Tree | None = None,
    max_probes: int | None = None,
    reduction: Reduction = "mean",
    seed: Seed = 0,
    sample_offset: int = 0,
    process_group: distributed.ProcessGroup | None = None,
) -> ParameterDiagonal:
    """Compute or estimate the diagonal of the Gauss-Newton matrix of a loss over a data set.

    With J_n the Jacobian of the C outputs of sample n in the parameters and H_n the Hessian of its
    loss in them, H_n = S_n S_n^T, the diagonal is::

        sum_n diag(J_n^T H_n J_n) = sum_n sum_c (J_n^T s_nc)^2,    s_nc the columns of S_n,

    a backward pass of the batch for each of the C columns, exact (Dangel, Kunstner and Hennig,
    BackPACK, 2020, which has it for modules and losses that it knows). Layers and losses of PyTorch
    have rules and closed forms, which are compared with autograd the first time. With fewer
    passes, K = ``max_probes`` < C, random combinations of the columns take their place: the columns
    of each sample get K colors at random and signs e_nc, and v_nk is the sum of e_nc s_nc over
    color k. The sum of (J_n^T v_nk)^2 is unbiased and never negative. An entry i has the variance::

        sum_n 2 (C - K) / (K (C - 1)) (‖u‖^4 - sum_c u_c^4),    u = S_n^T J_n e_i,

    or 2/K (...) where K is below an eighth of C and each v_nk is S_n times plain signs. For a cross
    entropy this is the Fisher matrix, and the estimate takes the place of one with drawn labels.

    Args:
        model: A module, or a function of parameters and inputs, that acts on each sample alone.
        loss: Maps outputs (N, ...) and targets to a number: the sum of the losses of the samples,
            or their mean. Both are compared with the losses of single samples.
        data: Yields batches (inputs, targets), as a DataLoader does; for one batch
            ``[(inputs, targets)]``. Every tensor has N samples along its first dimension and is
            moved to the device of the parameters. A tuple or list of inputs stands for several
            arguments of a module. Batches may hold (inputs, targets, numbers), int64 numbers of
            their samples.
        parameters: A tree of tensors; for a module a dictionary by their names, None for all that
            require gradients.
        max_probes: Most backward passes for a batch; None for an exact diagonal.
        reduction: "mean" or "sum" over the samples of all batches, whatever ``loss`` does within
            one, and whatever sizes they have.
        seed: Seed of colors and signs.
        sample_offset: Number of the first sample, where ``data`` has no numbers. By their numbers
            samples get their random signs, which so depend neither on batches nor on processes.
        process_group: Processes that each have a part of the data, and all get the result; None
            for this one alone. ``torch.distributed.group.WORLD`` stands for all.

    Returns:
        A diagonal whose ``stderr`` is zero where it is exact, and None where it is not.

    Raises:
        TypeError: As :func:`hessdiag.parameter_hessian_diagonal`, or if batches are no tuples.
        ValueError: As :func:`hessdiag.parameter_hessian_diagonal`, if there is no sample, if
            samples meet in the model or in the loss, or if a loss weights its samples by what else
            is in the batch, as a mean over classes with weights does.

    Example:
        >>> import torch, hessdiag
        >>> module = torch.nn.Linear(2, 1, bias=False)
        >>> batch = torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.zeros(2, 1)
        >>> loss = torch.nn.functional.mse_loss
        >>> result = hessdiag.gauss_newton_over_data(module, loss, [batch])
        >>> result.diagonal["weight"].round(decimals=4)    # 2 x^2, in the mean
        tensor([[10., 20.]])
    """
    if max_probes is not None:
        check_positive_int("max_probes", max_probes)
    exact = True
    # Once, since a generator moves on with every seed that it gives.
    seed = seed if isinstance(seed, Tensor) else seed_tensor(seed, "cpu")

    def add(total: _Total, outputs: Tensor, targets: Any, squares: Squares, numbers: Tensor) -> int:
        nonlocal exact
        passes = 0
        found, like = _roots_of(loss, outputs, targets)
        for root in found:
            count = root.size if max_probes is None else min(root.size, max_probes)
            exact = exact and count == root.size
            passes += count
            design = _design(count, root.size)
            step = max(1, _ENTRIES // outputs.numel())
            for first in range(0, count, step):
                e = _vectors(root, design, first, min(step, count - first), seed, numbers, like)
                weight = root.sign * (1.0 / count if isinstance(design, Rademacher) else 1.0)
                total.add(squares(root.times(e).to(outputs.dtype)), weight)
        return passes

    return _over(
        model, data, parameters, reduction, sample_offset, process_group, add, lambda: exact
    )


def empirical_fisher_over_data(
    model: Model,
    loss: Loss,
    data: Iterable[Any],
    *,
    parameters: Tree | None = None,
    reduction: Reduction = "mean",
    process_group: distributed.ProcessGroup | None = None,
) -> ParameterDiagonal:
    """Compute the diagonal of the empirical Fisher matrix: the sum of squared gradients.

    It is the sum over samples n of g_n^2, with g_n the gradient of the loss of that sample at its
    true target; one backward pass. It is not the Fisher matrix, whose targets are drawn from the
    model (Kunstner, Balles and Hennig, 2019): see :func:`gauss_newton_over_data`.

    Args:
        model: As in :func:`gauss_newton_over_data`.
        loss: As in :func:`gauss_newton_over_data`.
        data: As in :func:`gauss_newton_over_data`.
        parameters: As in :func:`gauss_newton_over_data`.
        reduction: As in :func:`gauss_newton_over_data`: of the squares, over samples.
        process_group: As in :func:`gauss_newton_over_data`.

    Returns:
        A :class:`ParameterDiagonal`, whose ``diagonal`` is a dictionary like ``named_parameters``.

    Raises:
        TypeError: As :func:`gauss_newton_over_data`.
        ValueError: As :func:`gauss_newton_over_data`.

    Example:
        >>> import torch, hessdiag
        >>> module = torch.nn.Linear(2, 1, bias=False)
        >>> _ = torch.nn.init.ones_(module.weight)
        >>> batch = torch.tensor([[1.0, 2.0]]), torch.zeros(1, 1)
        >>> loss = torch.nn.functional.mse_loss
        >>> result = hessdiag.empirical_fisher_over_data(module, loss, [batch])
        >>> result.diagonal["weight"].round(decimals=4)
        tensor([[ 36., 144.]])
    """

    def add(total: _Total, outputs: Tensor, targets: Any, squares: Squares, numbers: Tensor) -> int:
        curvature, _, scale = _loss_of(loss, outputs, targets)
        total.add(squares(scale * curvature.gradient[None].to(outputs.dtype)), 1.0)
        return 1

    return _over(model, data, parameters, reduction, 0, process_group, add, lambda: True)


class _Total:
    """The sum so far, in float32 or wider."""

    def __init__(self, tree: ParameterTree) -> None:
        dtype = torch.promote_types(tree.dtype, torch.float32)
        self.leaves = [torch.zeros_like(leaf, dtype=dtype) for leaf in tree.leaves]

    def add(self, squares: Leaves, weight: float) -> None:
        for leaf, square in zip(self.leaves, squares, strict=True):
            leaf.add_(square, alpha=weight)


def _over(
    model: Model,
    data: Iterable[Any],
    parameters: Tree | None,
    reduction: Reduction,
    sample_offset: int,
    process_group: distributed.ProcessGroup | None,
    add: Callable[[_Total, Tensor, Any, Squares, Tensor], int],
    is_exact: Callable[[], bool],
) -> ParameterDiagonal:
    if reduction not in get_args(Reduction):
        raise ValueError(
            f"reduction must be one of {', '.join(get_args(Reduction))}, got {reduction!r}"
        )
    names, tree, own = _parameters_of(model, parameters)
    notes: list[str] = []
    gradients = SampleGradients(model, tree, names, notes, own=own)
    total, samples, passes = _Total(tree), 0, 0
    for inputs, targets, numbers in _batches(data, sample_offset, tree.device):
        outputs, squares = gradients.at(inputs)
        passes = max(passes, add(total, outputs, targets, squares, numbers))
        samples += len(numbers)
    estimated = not is_exact()
    if process_group is not None:
        counts = torch.tensor([samples, passes, int(estimated)], device=tree.device)
        for leaf in total.leaves:
            distributed.all_reduce(leaf, group=process_group)
        distributed.all_reduce(counts[:1], group=process_group)
        distributed.all_reduce(counts[1:], distributed.ReduceOp.MAX, group=process_group)
        samples, passes, estimated = counts.tolist()
    if samples == 0:
        raise ValueError("data must hold at least one sample, got none")
    if reduction == "mean":
        for leaf in total.leaves:
            leaf.div_(samples)
    zeros = None if estimated else tree.restore([torch.zeros_like(t) for t in total.leaves])
    return ParameterDiagonal(
        diagonal=tree.restore(total.leaves),
        stderr=zeros,
        num_probes=torch.tensor(passes),
        mode="vjp",
        note="; ".join(notes),
        num_blocks=None if estimated else torch.tensor(1),  # of chance, none
    )


def _parameters_of(
    model: Model, parameters: Tree | None
) -> tuple[list[str] | None, ParameterTree, bool]:
    """Return their names, the tree of them, and whether a graph leads to the module's own."""
    if not isinstance(model, nn.Module):
        if parameters is None:
            raise ValueError("parameters must be given where model is no module, got None")
        return None, ParameterTree.of(parameters), False
    known = dict(model.named_parameters())
    own = parameters is None and not any(p.is_inference() for p in known.values())
    if parameters is None:
        parameters = {name: p for name, p in known.items() if p.requires_grad}
        if not parameters:
            raise ValueError("parameters must be given where none of the module requires gradients")
    if not isinstance(parameters, dict) or not parameters.keys() <= known.keys():
        raise ValueError(
            "parameters must be a dictionary by the names of model.named_parameters(), or None"
        )
    return list(parameters), ParameterTree.of(parameters), own


def _batches(
    data: Iterable[Any], sample_offset: int, device: torch.device
) -> Iterator[tuple[Any, Any, Tensor]]:
    first = check_counter("sample_offset", sample_offset, 0)
    try:
        batches = iter(data)
    except TypeError:
        raise TypeError(f"data must yield batches, got {type(data).__name__}") from None
    for batch in batches:
        if not isinstance(batch, (tuple, list)) or len(batch) not in (2, 3):
            got = type(batch).__name__
            raise TypeError(
                "data must yield (inputs, targets) or (inputs, targets, numbers), and for one "
                f"batch be [(inputs, targets)], got a {got} for a batch"
            )
        inputs, targets, *rest = (_moved(part, device) for part in batch)
        tensors = [leaf for leaf in leaves_of(inputs) if isinstance(leaf, Tensor)]
        if not tensors or tensors[0].dim() == 0:
            raise TypeError("data must yield inputs with a tensor whose first dimension is N")
        count = len(tensors[0])
        numbers = rest[0] if rest else torch.arange(first, first + count)
        if not isinstance(numbers, Tensor) or numbers.shape != (count,):
            raise ValueError(f"numbers of data must be a tensor of shape ({count},)")
        if numbers.dtype != torch.int64:
            raise TypeError(f"numbers of data must be int64, got {numbers.dtype}")
        check_counter("sample_offset", first, count)
        first += count
        if count:
            yield inputs, targets, numbers.cpu()


def _moved(tree: Any, device: torch.device) -> Any:
    if isinstance(tree, Tensor):
        return tree.to(device)
    return pytree.tree_map_only(Tensor, lambda t: t.to(device), tree)


# The loss


def _loss_of(loss: Loss, outputs: Tensor, targets: Any) -> tuple[LossCurvature, Tensor, float]:
    """Return the loss of a batch, where it is taken, and what makes it the sum over samples.

    It is taken in float64 where the loss has that: its curvature is a difference of nearly equal
    numbers where a network is sure.
    """

    def at(points: Tensor, targets: Any) -> LossCurvature:
        return LossCurvature(lambda y: loss(y, targets), points)

    points = outputs.double()
    try:
        whole = at(points, targets)
    except (RuntimeError, TypeError):
        points = outputs
        whole = at(points, targets)
    if not bool(torch.isfinite(whole.gradient).all()):
        raise ValueError("loss must have a finite gradient, and it holds NaN or infinity")
    samples = len(points)
    # The first and the last, alone: their gradients at once, since the losses just add.
    ends = sorted({0, samples - 1})
    with torch.inference_mode(False), torch.enable_grad():
        leaves = [points[n : n + 1].detach().clone().requires_grad_() for n in ends]
        alone = [
            loss(leaf, part_of(targets, n, n + 1)) for n, leaf in zip(ends, leaves, strict=True)
        ]
    found = torch.cat(torch.autograd.grad(alone, leaves)).reshape(len(ends), -1)
    together = whole.gradient[:: max(1, samples - 1)].reshape(len(ends), -1)
    bound = torch.finfo(outputs.dtype).eps ** 0.5 * found.abs().amax(1)
    for scale in (1.0, float(samples)):
        if bool(((scale * together - found).abs().amax(1) <= bound).all()):
            return whole, points, scale
    raise ValueError(
        "loss must be the sum or the mean over the samples of a batch of what it is for each "
        "alone, and it is neither; a mean with class weights or ignored targets is none: take "
        "the sum, as by reduction='sum'"
    )


def _roots_of(loss: Loss, outputs: Tensor, targets: Any) -> tuple[list[Root], Tensor]:
    """Return the roots of the Hessian of the losses of single samples, and where they are taken.

    A closed form is compared with products the first time, and then remembered by what it depends
    on. What it says of outputs and targets is looked at for every batch.
    """
    known = known_loss(loss)
    closed = None if known is None else closed_root(loss, outputs.double(), targets)
    key = known, outputs.shape[1:], outputs.dtype, outputs.device
    if closed is not None and key in _AGREEING:
        return [closed], outputs.double()
    curvature, points, scale = _loss_of(loss, outputs, targets)
    found = roots(lambda v: scale * curvature(v), points)
    if closed is None or len(found) != 1 or found[0].size != closed.size:
        return found, points
    e = arbitrary(points.new_empty(len(points), closed.size), 2)
    expected = found[0].times(e)
    agrees = found[0].sign == closed.sign and close(closed.times(e), expected)
    if not agrees or not bool(expected.any()):  # zeros say nothing of other outputs
        return found, points
    if len(_AGREEING) >= _MOST_REMEMBERED:
        _AGREEING.clear()
    _AGREEING.add(key)
    return [closed], points


# Combinations of columns


def _design(count: int, size: int) -> ProbeDesign | None:
    """Return how columns are combined: not at all, by colors, or by plain signs."""
    if count == size:
        return None
    gains = count - 1 > (size - 1) / 8
    return BalancedColoring(count) if gains else Rademacher()


def _vectors(
    root: Root,
    design: ProbeDesign | None,
    first: int,
    count: int,
    seed: Seed,
    numbers: Tensor,
    like: Tensor,
) -> Tensor:
    """Return combinations number first .. of each sample, shape (count, N, r)."""
    if design is None:
        units = like.new_zeros(count, 1, root.size)
        units[:, 0].diagonal(first).fill_(1.0)
        return units.expand(-1, len(numbers), -1)
    parts = []
    for start, length in _runs(numbers.tolist()):
        parts.append(
            design.draw(
                (count, length, root.size),
                seed_tensor(seed, like.device),
                probe_offset=first,
                sample_offset=start,
                dtype=like.dtype,
                device=like.device,
            )
        )
    return torch.cat(parts, dim=1)


def _runs(numbers: list[int]) -> list[tuple[int, int]]:
    """Return the runs of consecutive numbers, as (first, length).

    Example:
        >>> _runs([4, 5, 6, 2, 3])
        [(4, 3), (2, 2)]
    """
    runs: list[tuple[int, int]] = []
    for number in numbers:
        if runs and number == sum(runs[-1]):
            runs[-1] = runs[-1][0], runs[-1][1] + 1
        else:
            runs.append((number, 1))
    return runs
