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
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ocm.diffusion.checks import check_positive_int
from ocm.training.batches import (
    ImageSource,
    MicroBatch,
    MicroBatches,
    check_data,
    derived_seed,
)
from ocm.training.processes import Processes, join, seed_random_numbers
from ocm.training.settings import TrainingSettings
from ocm.training.state import (
    TrainingState,
    TrainingStateError,
    read_state,
    remove_states,
    restore_tensors,
    training_tensors,
    write_state,
)

if TYPE_CHECKING:
    from diffusers.training_utils import EMAModel

LossFunction = Callable[[nn.Module, Tensor, Tensor, Tensor | None, int], Tensor]
"""``loss(module, x0, t, labels, sample_offset)``: the mean over a (micro-)batch.

``module`` is the one to call: the module in training, inside DistributedDataParallel where there
are several processes. ``x0`` has shape (b, ...), ``t`` and ``labels`` are int64 of shape (b,), and
``sample_offset`` is the number of samples that training has seen before these.
"""


def train(
    name: str,
    module: nn.Module,
    loss: LossFunction,
    images: Tensor | ImageSource,
    labels: Tensor | None,
    num_timesteps: int,
    settings: TrainingSettings,
    *,
    device: torch.device | str | None = None,
    directory: str | Path | None = None,
    resume: bool = True,
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

    Args:
        name: What is trained, for the progress bar and for errors.
        module: Trained in place, in train mode; those of its parameters that require gradients.
        loss: The mean loss of a micro-batch. Its global random numbers, such as those of dropout,
            are seeded anew in each step; the caller's are left as they were.
        images: Training images in [-1, 1], shape (n, C, ...), or a source of them.
        labels: Classes of the images, int64 of shape (n,), or None.
        num_timesteps: Timesteps N of the diffusion.
        settings: Length, batch size, learning rate, seed and so on.
        device: Where to train; None takes the process's GPU if it has one, else the CPU. The
            module is moved there.
        directory: Where the main process writes the state every ``checkpoint_every`` steps; None
            writes nothing. All processes read it.
        resume: Whether to go on from a state in ``directory``. If not, it is removed.
        details: What else a training must share with a state to go on from it, such as the settings
            of the loss, by name.
        tensorboard: Whether to write loss and learning rate to ``directory``/tensorboard.
        progress: Whether the main process shows a progress bar.

    Returns:
        The loss of every step, from the first on, as the mean over the whole batch.

    Raises:
        FloatingPointError: If the loss is not finite.
        ImportError: If tensorboard is asked for and not installed.
        TrainingStateError: A ValueError, if the state in ``directory`` is damaged, or was written
            with other settings or another module; it names the file and the entry.
        TypeError: If the images have no length or the labels are not int64.
        ValueError: If the data or the settings do not fit each other or the device.

    Example:
        >>> line = nn.Linear(1, 1)
        >>> images = torch.linspace(-1, 1, 64)[:, None]
        >>> def loss(module, x0, t, labels, sample_offset):
        ...     return (module(x0) - 3 * x0).square().mean()
        >>> settings = TrainingSettings(num_steps=200, learning_rate=0.1)
        >>> losses = train("line", line, loss, images, None, 1000, settings, progress=False)
        >>> abs(line.weight.item() - 3) < 0.1
        True
    """
    from tqdm import tqdm

    check_positive_int("num_timesteps", num_timesteps)
    check_data(images, labels)
    path = None if directory is None else Path(directory)
    if tensorboard:
        _check_tensorboard(path)
    processes = join(device)
    _check_settings(settings, processes)
    run = _run(name, images, labels, num_timesteps, settings, details or {})
    place = processes.device
    # The caller's random numbers are left as they were.
    with torch.random.fork_rng(devices=[place] if place.type == "cuda" else []):
        training = _prepare(name, module, settings, processes)
        losses, label = _resume(training, path, run, resume)
        rate_of_step = _rate_of_step(settings)
        batches = MicroBatches(
            images, labels, num_timesteps, settings, processes.rank, processes.count
        )
        loader = iter(batches.from_step(len(losses)))
        main = processes.is_main
        steps = range(len(losses), settings.num_steps)
        bar = tqdm(steps, label, unit="step", disable=not (progress and main))
        with _writer(path if tensorboard and main else None, len(losses)) as writer:
            for step in bar:
                rate = rate_of_step(step)
                losses.append(_backward(training, loss, loader, step))
                _check_finite(training, losses[-1], step)
                _update(training, rate)
                if step % 10 == 0:
                    bar.set_postfix(loss=f"{mean_of_last(losses):.4f}")
                if writer is not None:
                    writer.add_scalar("loss", losses[-1], step)
                    writer.add_scalar("learning_rate", rate, step)
                due = (step + 1) % settings.checkpoint_every == 0 or step + 1 == settings.num_steps
                if path is not None and main and due:
                    _write(training, path, run, losses)
        training.average.copy_to(training.parameters)
        training.optimizer.zero_grad()
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
    """What one call of :func:`train` works on.

    ``called`` is the module, inside DistributedDataParallel where there are several processes.
    """

    name: str
    settings: TrainingSettings
    processes: Processes
    module: nn.Module
    called: nn.Module
    parameters: list[nn.Parameter]
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    average: EMAModel


def _check_settings(settings: TrainingSettings, processes: Processes) -> None:
    if settings.mixed_precision == "fp16" and processes.device.type == "cpu":
        raise ValueError('mixed_precision "fp16" needs a GPU, and device is the CPU; give "bf16"')
    parts = processes.count * settings.gradient_accumulation_steps
    if settings.batch_size % parts:
        raise ValueError(
            f"batch_size must be a multiple of {parts}, which is {processes.count} processes times "
            f"gradient_accumulation_steps = {settings.gradient_accumulation_steps}; got "
            f"{settings.batch_size}"
        )


def _check_tensorboard(path: Path | None) -> None:
    if path is None:
        raise ValueError("tensorboard needs a directory to write to, got directory=None")
    try:
        import torch.utils.tensorboard  # noqa: F401
    except ImportError as error:
        raise ImportError(
            f"tensorboard=True needs the package tensorboard ({error}): pip install tensorboard"
        ) from error


def _writer(path: Path | None, step: int) -> contextlib.AbstractContextManager[Any]:
    if path is None:
        return contextlib.nullcontext()
    from torch.utils.tensorboard import SummaryWriter

    # Steps that a killed training logged after its last state are taken anew.
    return SummaryWriter(str(path / "tensorboard"), purge_step=step)


def _run(
    name: str,
    images: Tensor | ImageSource,
    labels: Tensor | None,
    num_timesteps: int,
    settings: TrainingSettings,
    details: Mapping[str, object],
) -> dict[str, object]:
    """Return what two trainings must share for one to go on from the other's state."""
    run = {
        "name": name,
        **asdict(settings),
        "num_images": len(images),
        "labels": labels is not None,
        "num_timesteps": num_timesteps,
    }
    if both := run.keys() & details.keys():
        raise ValueError(
            f"details must have other names than the settings have, got {', '.join(sorted(both))}"
        )
    for changes_no_number in ("checkpoint_every", "num_workers"):
        del run[changes_no_number]
    return {**run, **details}


def _rate_of_step(settings: TrainingSettings) -> Callable[[int], float]:
    """Return diffusers' schedule as a function: it has no position that a state must hold."""
    from diffusers.optimization import get_cosine_schedule_with_warmup

    unused = torch.optim.SGD([torch.zeros(1)], lr=settings.learning_rate)
    schedule = get_cosine_schedule_with_warmup(unused, settings.warmup_steps, settings.num_steps)
    factor = schedule.lr_lambdas[0]
    return lambda step: settings.learning_rate * float(factor(step))


def _prepare(
    name: str, module: nn.Module, settings: TrainingSettings, processes: Processes
) -> _Training:
    from diffusers.training_utils import EMAModel

    module.to(processes.device).train()
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    if not parameters:
        raise ValueError(f"no parameter of the {name} requires a gradient: nothing to train")
    return _Training(
        name,
        settings,
        processes,
        module,
        # Before the average is made: it gives all processes the main one's weights.
        processes.wrap(module),
        parameters,
        torch.optim.AdamW(
            parameters, lr=settings.learning_rate, weight_decay=settings.weight_decay
        ),
        torch.amp.GradScaler(processes.device.type, enabled=settings.mixed_precision == "fp16"),
        EMAModel(parameters, decay=settings.ema_decay),
    )


def _resume(
    training: _Training, path: Path | None, run: dict[str, object], resume: bool
) -> tuple[list[float], str]:
    """Go on from a state, if there is one: return the losses so far, and what the bar says."""
    processes = training.processes
    if path is not None and not resume:
        if processes.is_main:
            remove_states(path)
        processes.wait()
    state = None if path is None else read_state(path, run)
    steps = processes.all_of(0 if state is None else state.step)
    if len(set(steps)) > 1:
        raise TrainingStateError(
            f"the processes read states of steps {steps} in {path}: it must be a directory that "
            f"all of them share"
        )
    if state is None:
        return [], training.name
    restore_tensors(state, training.module, training.average.shadow_params, training.optimizer)
    training.average.optimization_step = state.step
    if state.scaler is not None and training.scaler.is_enabled():
        training.scaler.load_state_dict(dict(state.scaler))
    if state.step == training.settings.num_steps:
        return state.losses, f"{training.name}, finished before"
    change = ""
    if state.num_processes != processes.count:
        change = f" of {state.num_processes} processes"
    return state.losses, f"{training.name}, from step {state.step}{change}"


def _backward(
    training: _Training, loss: LossFunction, batches: Iterator[MicroBatch], step: int
) -> float:
    """Leave the gradient of a step in the parameters, and return the loss of its whole batch."""
    processes, settings = training.processes, training.settings
    device, parts = processes.device, settings.gradient_accumulation_steps
    seed_random_numbers(device, derived_seed(settings.seed, "module", step, processes.rank))
    training.optimizer.zero_grad()
    total = torch.zeros((), device=device)
    for part in range(parts):
        x0, t, labels, sample_offset = next(batches)
        y = None if labels is None else labels.to(device)
        with _gradients_of_all(training.called, last=part == parts - 1):
            with _autocast(settings, device):
                value = loss(training.called, x0.to(device), t.to(device), y, sample_offset)
            training.scaler.scale(value / parts).backward()
        total += value.detach().float()
    return float(processes.mean(total / parts).item())


def _gradients_of_all(called: nn.Module, *, last: bool) -> contextlib.AbstractContextManager[Any]:
    """Average gradients over processes in the last micro-batch alone, which has the sum."""
    if last or not isinstance(called, nn.parallel.DistributedDataParallel):
        return contextlib.nullcontext()
    return called.no_sync()


def _autocast(
    settings: TrainingSettings, device: torch.device
) -> contextlib.AbstractContextManager[Any]:
    dtype = {"no": None, "bf16": torch.bfloat16, "fp16": torch.float16}[settings.mixed_precision]
    return contextlib.nullcontext() if dtype is None else torch.autocast(device.type, dtype)


def _check_finite(training: _Training, loss: float, step: int) -> None:
    if not math.isfinite(loss):
        raise FloatingPointError(
            f"the loss of the {training.name} is {loss} at step {step}; try a learning_rate below "
            f"{training.settings.learning_rate}, if the images are finite"
        )


def _update(training: _Training, rate: float) -> None:
    for group in training.optimizer.param_groups:
        group["lr"] = rate
    training.scaler.unscale_(training.optimizer)
    nn.utils.clip_grad_norm_(training.parameters, training.settings.max_gradient_norm)
    training.scaler.step(training.optimizer)
    training.scaler.update()
    training.average.step(training.parameters)


def _write(training: _Training, path: Path, run: dict[str, object], losses: list[float]) -> None:
    tensors = training_tensors(training.module, training.average.shadow_params, training.optimizer)
    tensors["losses"] = torch.tensor(losses, dtype=torch.float64)
    # A scaler that is not enabled has an empty state.
    scaler = training.scaler.state_dict() or None
    write_state(path, TrainingState(len(losses), tensors, scaler, training.processes.count), run)
