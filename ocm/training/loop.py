"""Training: a loop that knows nothing of diffusion.

What it trains is in :mod:`ocm.training.objectives`. It runs on one device, or on processes that
``torchrun`` or ``accelerate launch`` started, in mixed precision, with accumulated gradients. A
step is a pure function of the weights, the seed and the step's number. So it does not matter
over how many processes or micro-batches a batch is split, to the rounding of sums, and a training
that was killed goes on to the same bits.
"""

from __future__ import annotations

import contextlib
import math
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, distributed, nn

from ocm.diffusion.backbones.wrappers import is_part
from ocm.diffusion.checks import check_positive_int
from ocm.progress import tracked
from ocm.training.batches import (
    Conditions,
    ImageSource,
    MicroBatch,
    MicroBatches,
    check_data,
    derived_seed,
)
from ocm.training.interruption import Interruption, waiting_signals
from ocm.training.processes import Processes, check_fits, join, naming_lost
from ocm.training.settings import TrainingSettings
from ocm.training.state import (
    Parts,
    TrainingStateError,
    check_tensors,
    newest_step,
    read_state,
    remove_states,
    restore_tensors,
    training_tensors,
    write_state,
)

if TYPE_CHECKING:
    from diffusers.training_utils import EMAModel

LossFunction = Callable[[nn.Module, Tensor, Tensor, Mapping[str, Tensor], int], Tensor]
"""``loss(module, x0, t, conditions, sample_offset)``: the mean over a (micro-)batch.

``module`` is the one to call: the module in training, inside DistributedDataParallel where there
are several processes. ``x0`` has shape (b, ...), ``t`` is int64 of shape (b,), ``conditions`` holds
the b rows that belong to ``x0``, and ``sample_offset`` is the number of samples that training has
seen before these.
"""


def train(
    name: str,
    module: nn.Module,
    loss: LossFunction,
    images: Tensor | ImageSource,
    conditions: Conditions,
    num_timesteps: int,
    settings: TrainingSettings,
    *,
    is_continuous: bool = False,
    device: torch.device | str | None = None,
    directory: str | Path | None = None,
    resume: bool = True,
    replace_other: bool = False,
    details: Mapping[str, str | int | float | bool | None] | None = None,
    tensorboard: bool = False,
    progress: bool = True,
) -> list[float]:
    """Train a module by AdamW, and leave the moving average of its weights in it.

    With a ``directory``, a training that was killed goes on from its last state there, to the same
    bits if the device computes the same bits twice. The state of a finished training stays: started
    again, it restores the module and returns. The number of processes may change in between, which
    changes sums by their rounding and dropout by its noise; with more than two, PyTorch may also
    round the first sum after a start in another order.

    With a ``directory``, SIGINT (Ctrl-C) and SIGTERM wait until the step is whole and its state is
    written, and then do what they do; a second one, a second or more later, acts at once.

    Args:
        name: What is trained, for the progress bar and for errors.
        module: Trained in place, in train mode; those of its parameters that require gradients.
        loss: The mean loss of a micro-batch. Its global random numbers, such as those of dropout,
            are seeded anew in each step; the caller's are left as they were.
        images: Training images in [-1, 1], shape (n, C, ...), or a source of them.
        conditions: What the images are conditioned on, by name: tensors of shape (n, ...), memory-
            mapped as they may be, or sources of their rows; "labels" are int64 of shape (n,).
        num_timesteps: Timesteps N of the diffusion.
        settings: Length, batch size, learning rate, seed and so on.
        is_continuous: Whether timesteps are any numbers in (0, N].
        device: Where to train; None takes the process's GPU if it has one, else the CPU. The
            module is moved there.
        directory: Where the main process writes the state every ``checkpoint_every`` steps; None
            writes nothing. All processes read it.
        resume: Whether to go on from a state in ``directory``. If not, it is removed.
        replace_other: Whether a state in ``directory`` that is damaged, or of another training, is
            removed, in place of an error; a line on stderr says so.
        details: What else a training must share with a state to go on from it, such as the settings
            of the loss, by name.
        tensorboard: Whether to write loss and learning rate to ``directory``/tensorboard.
        progress: Whether the main process shows a progress bar.

    Returns:
        The loss of every step, from the first on, as the mean over the whole batch.

    Raises:
        ConnectionError: If another of the processes has ended.
        FloatingPointError: If the loss or its gradient is not finite; it names the step, the seed
            and the last state, which no such number has gone into.
        ImportError: If tensorboard is asked for and not installed.
        OSError: If a state cannot be written; the one before stays.
        TrainingStateError: A ValueError, if the state in ``directory`` is damaged, or was written
            with other settings or another module; it names the file and the entry.
        TypeError: If the images have no length.
        ValueError: If the data or the settings do not fit each other or the device, or the module
            in training is sharded.

    Example:
        >>> line = nn.Linear(1, 1)
        >>> images = torch.linspace(-1, 1, 64)[:, None]
        >>> def loss(module, x0, t, conditions, sample_offset):
        ...     return (module(x0) - 3 * x0).square().mean()
        >>> settings = TrainingSettings(num_steps=200, learning_rate=0.1)
        >>> losses = train("line", line, loss, images, {}, 1000, settings, progress=False)
        >>> abs(line.weight.item() - 3) < 0.1
        True
    """
    check_positive_int("num_timesteps", num_timesteps)
    check_data(images, conditions)
    path = None if directory is None else Path(directory)
    if tensorboard:
        if path is None:
            raise ValueError("tensorboard needs a directory to write to, got directory=None")
        from torch.utils.tensorboard import SummaryWriter
    processes = join(device)
    check_fits(settings, processes)
    place = processes.device
    run = {
        **(details or {}),
        "name": name,
        # Neither changes a number.
        **asdict(replace(settings, checkpoint_every=1, num_workers=0)),
        "num_images": len(images),
        "labels": "labels" in conditions,
        "num_timesteps": num_timesteps,
        **({"is_continuous": True} if is_continuous else {}),
    }
    main = processes.rank == 0
    losses: list[float] = []

    def where() -> str:
        return f"at step {len(losses)} of the {name}"

    with contextlib.ExitStack() as stack:
        stack.enter_context(naming_lost(processes.count, where))
        stack.enter_context(torch.random.fork_rng(devices=[place] if place.type == "cuda" else []))
        training = _prepare(name, module, settings, processes, path)
        if path is not None:
            losses += _resume(training, path, run, resume, replace_other)
        first = len(losses)
        if first and main and progress:
            print(f"the {name} goes on from step {first} of {settings.num_steps}", file=sys.stderr)
        rate_of_step = _rate_of_step(settings)
        batches = MicroBatches(
            images,
            conditions,
            num_timesteps,
            settings,
            processes.rank,
            processes.count,
            is_continuous,
        )
        steps = tracked(
            range(first, settings.num_steps),
            name,
            shown=progress and main,
            done=first,
            note=lambda: f"loss {mean_of_last(losses):.4f}" if losses else "",
        )
        writer: SummaryWriter | None = None
        if tensorboard and main:
            # Steps that a killed training logged after its last state are taken anew.
            writer = stack.enter_context(SummaryWriter(f"{path}/tensorboard", purge_step=first))
        # Nothing is to be waited for where no state is written.
        interruption = Interruption() if path is None else stack.enter_context(waiting_signals())
        # After that, since the processes that read images get a Ctrl-C too, and must stay.
        loader = iter(batches.from_step(first))
        for step in steps:
            rate = rate_of_step(step)
            value, stop = _agreed(training, _backward(training, loss, loader, step), interruption)
            _check_finite(training, "loss", value, step)
            _update(training, rate, step)
            losses.append(value)
            if writer is not None:
                writer.add_scalar("loss", value, step)
                writer.add_scalar("learning_rate", rate, step)
            due = (step + 1) % settings.checkpoint_every == 0 or step + 1 == settings.num_steps
            if path is not None and main and (due or stop):
                tensors = training_tensors(training.parts)
                tensors["losses"] = torch.tensor(losses, dtype=torch.float64)
                write_state(path, tensors, run)
            if stop:
                if not interruption.pending:
                    raise KeyboardInterrupt("another process was interrupted")
                interruption.deliver()
        training.average.copy_to(training.parameters)
        training.parts.optimizer.zero_grad()
        processes.wait()
    return losses


def mean_of_last(losses: list[float], count: int = 100) -> float:
    """Return the mean of the last ``count`` losses, or of all if there are fewer.

    Example:
        >>> mean_of_last([9.0, 1.0, 3.0], count=2)
        2.0
    """
    return sum(losses[-count:]) / len(losses[-count:])


@dataclass(frozen=True, eq=False)
class _Training:
    """What one call of :func:`train` works on; ``called`` averages gradients over processes."""

    name: str
    settings: TrainingSettings
    processes: Processes
    called: nn.Module
    parameters: list[nn.Parameter]
    average: EMAModel
    parts: Parts
    path: Path | None


def _rate_of_step(settings: TrainingSettings) -> Callable[[int], float]:
    """Return diffusers' schedule as a function: it has no position that a state must hold."""
    from diffusers.optimization import get_cosine_schedule_with_warmup

    unused = torch.optim.SGD([torch.zeros(1)], lr=settings.learning_rate)
    schedule = get_cosine_schedule_with_warmup(unused, settings.warmup_steps, settings.num_steps)
    factor = schedule.lr_lambdas[0]
    return lambda step: settings.learning_rate * float(factor(step))


def _prepare(
    name: str,
    module: nn.Module,
    settings: TrainingSettings,
    processes: Processes,
    path: Path | None,
) -> _Training:
    from diffusers.training_utils import EMAModel

    device = processes.device
    module.to(device).train()
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    if not parameters:
        raise ValueError(f"no parameter of the {name} requires a gradient: nothing to train")
    if any(map(is_part, parameters)):
        raise ValueError(
            f"the {name} in training must be whole in every process, and fully_shard has sharded "
            "it; only the frozen backbone of a head may be sharded"
        )
    # Before the average is made: it gives all processes the main one's weights.
    called = nn.parallel.DistributedDataParallel(module) if processes.count > 1 else module
    average = EMAModel(parameters, decay=settings.ema_decay)
    optimizer = torch.optim.AdamW(
        parameters, lr=settings.learning_rate, weight_decay=settings.weight_decay
    )
    scaler = torch.amp.GradScaler(device.type, enabled=settings.mixed_precision == "fp16")
    parts = Parts(module, average.shadow_params, optimizer, scaler)
    return _Training(name, settings, processes, called, parameters, average, parts, path)


def _resume(
    training: _Training, path: Path, run: Mapping[str, object], resume: bool, replace_other: bool
) -> list[float]:
    """Go on from a state, if there is one, and return the losses so far."""
    if not resume:
        _remove(training, path)
    try:
        return _restored(training, path, run)
    except TrainingStateError as error:
        if not replace_other:
            raise
        _remove(training, path)
        if training.processes.rank == 0:
            said = f"removed the unfinished training of the {training.name} in {path}: {error}"
            print(said, file=sys.stderr)
    return []


def _remove(training: _Training, path: Path) -> None:
    training.processes.wait()  # all have read what is removed
    if training.processes.rank == 0:
        remove_states(path)
    training.processes.wait()


def _restored(training: _Training, path: Path, run: Mapping[str, object]) -> list[float]:
    """Restore a state, if there is one, in all processes or in none, and return its losses."""
    processes, refused = training.processes, None
    tensors: dict[str, Tensor] | None = None
    try:
        tensors = read_state(path, run)
        if tensors is not None:
            check_tensors(tensors, training.parts)
    except TrainingStateError as error:
        refused = error
    losses: list[float] = [] if tensors is None else tensors["losses"].tolist()
    steps = processes.all_of(-1 if refused else len(losses))
    if len(set(steps)) > 1:
        raise ValueError(
            f"the processes read states of steps {steps} (-1 for none that fits) in {path}: it "
            "must be a directory that all of them share"
        )
    if refused is not None:
        raise refused
    if tensors is not None:
        restore_tensors(tensors, training.parts)
        training.average.optimization_step = len(losses)
    return losses


def _backward(
    training: _Training, loss: LossFunction, batches: Iterator[MicroBatch], step: int
) -> Tensor:
    """Leave the gradient of a step in the parameters, and return the sum of this process's losses.

    A loss for each of its micro-batches.
    """
    processes, settings, called = training.processes, training.settings, training.called
    dtype = torch.float16 if settings.mixed_precision == "fp16" else torch.bfloat16
    device, parts = processes.device, settings.gradient_accumulation_steps
    seed = derived_seed(settings.seed, "module", step, processes.rank)
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":  # the caller's generators of other devices stay as they were
        torch.cuda.default_generators[device.index].manual_seed(seed)
    training.parts.optimizer.zero_grad()
    total = torch.zeros((), device=device)
    for part in range(parts):
        x0, t, rows, sample_offset = next(batches)
        conditions = {name: values.to(device) for name, values in rows.items()}
        with contextlib.ExitStack() as stack:
            if isinstance(called, nn.parallel.DistributedDataParallel) and part < parts - 1:
                stack.enter_context(called.no_sync())  # The last gradient has the sum.
            with torch.autocast(device.type, dtype, enabled=settings.mixed_precision != "no"):
                value = loss(called, x0.to(device), t.to(device), conditions, sample_offset)
            training.parts.scaler.scale(value / parts).backward()
        total += value.detach().float()
    return total


def _agreed(training: _Training, total: Tensor, interruption: Interruption) -> tuple[float, bool]:
    """Return the mean loss over all processes, and whether a signal waits in any of them."""
    count, pending = training.processes.count, False
    if count == 1:
        value = total.item()
        pending = interruption.pending
    else:
        both = torch.stack([total, total.new_tensor(float(interruption.pending))])
        distributed.all_reduce(both)
        value, pending = both[0].item(), bool(both[1] > 0)
    return value / (training.settings.gradient_accumulation_steps * count), pending


def _check_finite(training: _Training, what: str, value: float, step: int) -> None:
    if math.isfinite(value):
        return
    path, settings = training.path, training.settings
    last = None if path is None else newest_step(path)
    state = "no state was written yet"
    if last is not None:
        state = f"the last good state is that of step {last} in {path}"
    plain = "" if settings.mixed_precision == "no" else ' or mixed_precision "no"'
    raise FloatingPointError(
        f"the {what} of the {training.name} is {value} at step {step}, with seed {settings.seed}; "
        f"{state}; try a learning_rate below {settings.learning_rate}{plain}, if the images are "
        "finite"
    )


def _update(training: _Training, rate: float, step: int) -> None:
    optimizer, scaler = training.parts.optimizer, training.parts.scaler
    for group in optimizer.param_groups:
        group["lr"] = rate
    scaler.unscale_(optimizer)
    largest = training.settings.max_gradient_norm
    norm = nn.utils.clip_grad_norm_(training.parameters, largest)
    if not scaler.is_enabled():  # it leaves such a step out by itself, and scales less
        _check_finite(training, "gradient", norm.item(), step)
    scaler.step(optimizer)
    scaler.update()
    training.average.step(training.parameters)
