"""Training: a loop that knows nothing of diffusion, on Hugging Face accelerate.

What it trains is in :mod:`ocm.training.objectives`. It runs on one device, or on processes that
``accelerate launch`` or ``torchrun`` started, in mixed precision, with accumulated gradients. A
step is a pure function of the weights, the seed and the step's number. So it does not matter
over how many processes or micro-batches a batch is split, to the rounding of sums, and a training
that was killed goes on to the same bits.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, get_args

import torch
from torch import Tensor, nn

from ocm.diffusion.checks import check_positive_int
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
    from accelerate import Accelerator
    from diffusers.training_utils import EMAModel

MixedPrecision = Literal["no", "bf16", "fp16"]

LossFunction = Callable[[nn.Module, Tensor, Tensor, Tensor | None, int], Tensor]
"""``loss(module, x0, t, labels, sample_offset)``: the mean over a (micro-)batch.

``module`` is the one to call: the module in training, inside DistributedDataParallel where there
are several processes. ``x0`` has shape (b, ...), ``t`` and ``labels`` are int64 of shape (b,), and
``sample_offset`` is the number of samples that training has seen before these.
"""


class ImageSource(Protocol):
    """Images that are read as they are needed; a tensor of shape (n, C, ...) is one too."""

    def __len__(self) -> int:
        """Return the number of images."""

    def __getitem__(self, indices: Tensor, /) -> Tensor:
        """Return the images of ``indices``, int64 of shape (b,), as (b, C, ...) in [-1, 1]."""


@dataclass(frozen=True)
class TrainingSettings:
    """Settings of one training loop.

    Attributes:
        num_steps: Optimiser steps.
        batch_size: Images a step, over all processes and micro-batches.
        learning_rate: Peak of AdamW's learning rate: a linear warm-up, then a cosine to zero.
        warmup_steps: Steps of the warm-up.
        ema_decay: Decay of the exponential moving average of the weights, which is what training
            leaves in the network.
        seed: Seed of the order of the images, the timesteps, the noise and the probes.
        weight_decay: AdamW's weight decay.
        max_gradient_norm: Norm to which a larger gradient is scaled down.
        gradient_accumulation_steps: Micro-batches that a process takes a step in.
        mixed_precision: What autocast computes the loss in: "no" for none, "bf16" or "fp16".
        horizontal_flip: Whether to flip each image left to right with probability 1/2.
        timestep_exponent: Timesteps are N u^exponent with u uniform: 1 for all alike, 2 to see
            little noise more often, half of the time t <= N / 4.
        checkpoint_every: Steps from one state on disk to the next, where there is a directory.
    """

    num_steps: int
    batch_size: int = 64
    learning_rate: float = 1e-3
    warmup_steps: int = 50
    ema_decay: float = 0.995
    seed: int = 0
    weight_decay: float = 0.0
    max_gradient_norm: float = 1.0
    gradient_accumulation_steps: int = 1
    mixed_precision: MixedPrecision = "no"
    horizontal_flip: bool = False
    timestep_exponent: float = 1.0
    checkpoint_every: int = 200

    def __post_init__(self) -> None:
        check_positive_int("num_steps", self.num_steps)
        check_positive_int("batch_size", self.batch_size)
        if not self.learning_rate > 0:
            raise ValueError(f"learning_rate must be positive, got {self.learning_rate}")
        if self.warmup_steps < 0:
            raise ValueError(f"warmup_steps must not be negative, got {self.warmup_steps}")
        if not 0.0 <= self.ema_decay < 1.0:
            raise ValueError(f"ema_decay must lie in [0, 1), got {self.ema_decay}")
        if not self.weight_decay >= 0:
            raise ValueError(f"weight_decay must not be negative, got {self.weight_decay}")
        if not self.max_gradient_norm > 0:
            raise ValueError(f"max_gradient_norm must be positive, got {self.max_gradient_norm}")
        check_positive_int("gradient_accumulation_steps", self.gradient_accumulation_steps)
        if self.mixed_precision not in get_args(MixedPrecision):
            raise ValueError(
                f"mixed_precision must be one of {', '.join(get_args(MixedPrecision))}, got "
                f"{self.mixed_precision!r}"
            )
        if not self.timestep_exponent > 0:
            raise ValueError(f"timestep_exponent must be positive, got {self.timestep_exponent}")
        check_positive_int("checkpoint_every", self.checkpoint_every)


@dataclass(frozen=True)
class Batch:
    """Which images a step takes, and at which timesteps.

    Attributes:
        indices: Places of the images, int64 of shape (batch_size,).
        timesteps: Timesteps in 1 .. N, int64 of shape (batch_size,).
        flips: Which images are flipped, bool of shape (batch_size,).
    """

    indices: Tensor
    timesteps: Tensor
    flips: Tensor


def batch_of_step(
    step: int, settings: TrainingSettings, num_images: int, num_timesteps: int
) -> Batch:
    """Draw images with replacement, and timesteps spread over 1 .. N, for one step.

    Each u of the timesteps N u^exponent is uniform alone; spreading them evenly within a batch
    lowers the gradient's variance.

    Example:
        >>> settings = TrainingSettings(num_steps=9, batch_size=4)
        >>> batch_of_step(7, settings, num_images=100, num_timesteps=1000).timesteps.diff()
        tensor([250, 250, 250])
    """
    generator = torch.Generator().manual_seed(_derived_seed(settings.seed, "batch", step))
    size = settings.batch_size
    indices = torch.randint(num_images, (size,), generator=generator)
    place = (torch.arange(size) + torch.rand(1, generator=generator)) / size
    place = place**settings.timestep_exponent
    timesteps = 1 + (place * num_timesteps).long().clamp(max=num_timesteps - 1)
    if settings.horizontal_flip:
        flips = torch.rand(size, generator=generator) < 0.5
    else:
        flips = torch.zeros(size, dtype=torch.bool)
    return Batch(indices, timesteps, flips)


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
    _check_data(images, labels)
    path = None if directory is None else Path(directory)
    if tensorboard:
        _check_tensorboard(path)
    with (
        _accelerator(device, settings) as accelerator,
        _own_random_numbers(accelerator, device) as place,
    ):
        run = _run(name, images, labels, num_timesteps, settings, details or {})
        training = _prepare(name, module, settings, accelerator, place)
        losses, label = _resume(training, path, run, resume)
        main = accelerator.is_main_process
        rate_of_step = _rate_of_step(settings)
        steps = range(len(losses), settings.num_steps)
        bar = tqdm(steps, label, unit="step", disable=not (progress and main))
        with _writer(path if tensorboard and main else None, len(losses)) as writer:
            for step in bar:
                rate = rate_of_step(step)
                losses.append(_backward(training, loss, images, labels, num_timesteps, step))
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
        accelerator.wait_for_everyone()
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
    accelerator: Accelerator
    device: torch.device
    module: nn.Module
    called: nn.Module
    parameters: list[nn.Parameter]
    optimizer: torch.optim.Optimizer
    average: EMAModel


@contextlib.contextmanager
def _accelerator(
    device: torch.device | str | None, settings: TrainingSettings
) -> Iterator[Accelerator]:
    """Make an Accelerator, and leave accelerate's process-wide state as it was.

    That state would refuse a second training in another precision, or on another device.
    """
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, GradientState, PartialState
    from accelerate.utils import GradientAccumulationPlugin

    if device is None:
        cpu = not torch.accelerator.is_available()
    else:
        cpu = torch.device(device).type == "cpu"
    if cpu and settings.mixed_precision == "fp16":
        raise ValueError('mixed_precision "fp16" needs a GPU, and device is the CPU; give "bf16"')
    states = [kind._shared_state for kind in (AcceleratorState, PartialState, GradientState)]
    before = [dict(state) for state in states]
    for state in states:
        state.clear()
    try:
        accelerator = Accelerator(
            # Without it processes that torchrun starts on a CPU would not find each other.
            cpu=cpu,
            mixed_precision=settings.mixed_precision,
            device_placement=False,
            # Given as a plugin, since a number gives way to an environment variable.
            gradient_accumulation_plugin=GradientAccumulationPlugin(
                num_steps=settings.gradient_accumulation_steps, sync_with_dataloader=False
            ),
        )
        _check_processes(accelerator, settings)
        yield accelerator
    finally:
        for state, entries in zip(states, before, strict=True):
            state.clear()
            state.update(entries)


def _check_processes(accelerator: Accelerator, settings: TrainingSettings) -> None:
    if str(accelerator.distributed_type.value) in ("FSDP", "DEEPSPEED", "MEGATRON_LM", "XLA"):
        raise ValueError(
            f"training keeps the whole module in every process, got {accelerator.distributed_type} "
            f"from accelerate; launch it with --multi_gpu, or by torchrun"
        )
    parts = accelerator.num_processes * settings.gradient_accumulation_steps
    if settings.batch_size % parts:
        raise ValueError(
            f"batch_size must be a multiple of {parts}, which is {accelerator.num_processes} "
            f"processes times gradient_accumulation_steps = "
            f"{settings.gradient_accumulation_steps}; got {settings.batch_size}"
        )


def _place(accelerator: Accelerator, device: torch.device | str | None) -> torch.device:
    """Return the device of this process: the CPU without an index, a GPU with its index."""

    def named(place: torch.device) -> torch.device:
        if place.type == "cpu":
            return torch.device("cpu")
        if place.type == "cuda" and place.index is None:
            return torch.device("cuda", torch.cuda.current_device())
        return place

    own = named(accelerator.device)
    place = own if device is None else named(torch.device(device))
    if accelerator.num_processes > 1 and place != own:
        raise ValueError(
            f"device must be {own} in process {accelerator.process_index}, or None, got {device}"
        )
    return place


@contextlib.contextmanager
def _own_random_numbers(
    accelerator: Accelerator, device: torch.device | str | None
) -> Iterator[torch.device]:
    """Yield the device, and leave the caller's random numbers on it and on the CPU as they were."""
    place = _place(accelerator, device)
    with torch.random.fork_rng(devices=[place] if place.type == "cuda" else []):
        yield place


def _seed_step(training: _Training, step: int) -> None:
    """Seed PyTorch's global random numbers, of this process's device and of the CPU."""
    process = training.accelerator.process_index
    seed = _derived_seed(training.settings.seed, "module", step, process)
    place = training.device
    if place.type in ("cpu", "cuda"):
        # torch.manual_seed would seed the caller's other GPUs too.
        torch.default_generator.manual_seed(seed)
        if place.type == "cuda":
            torch.cuda.default_generators[place.index].manual_seed(seed)
    else:
        torch.manual_seed(seed)


def _derived_seed(*parts: object) -> int:
    """Return a seed for torch that differs, but for chance, wherever a part does."""
    digest = hashlib.sha256(" ".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "little") % 2**63


def _check_data(images: Tensor | ImageSource, labels: Tensor | None) -> None:
    if len(images) == 0:
        raise ValueError("images must hold at least one image, got none")
    if isinstance(images, Tensor) and not images.is_floating_point():
        raise ValueError(f"images must be floating-point numbers in [-1, 1], got {images.dtype}")
    if labels is None:
        return
    if labels.dtype != torch.int64:
        raise TypeError(f"labels must be int64, got {labels.dtype}")
    if labels.shape != (len(images),):
        raise ValueError(
            f"labels must have shape ({len(images)},), one for each image, got "
            f"{tuple(labels.shape)}"
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
    del run["checkpoint_every"]  # Changes no number.
    return {**run, **details}


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
    accelerator: Accelerator,
    place: torch.device,
) -> _Training:
    from diffusers.training_utils import EMAModel
    from torch.nn.parallel import DistributedDataParallel

    module.to(place).train()
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    if not parameters:
        raise ValueError(f"no parameter of the {name} requires a gradient: nothing to train")
    called = module
    # By hand: Accelerator.prepare would patch the module's forward and leave marks on it.
    if accelerator.num_processes > 1:
        devices = None if place.type == "cpu" else [place]
        called = DistributedDataParallel(module, device_ids=devices)
    optimizer = torch.optim.AdamW(
        parameters, lr=settings.learning_rate, weight_decay=settings.weight_decay
    )
    # After DistributedDataParallel, which gives all processes the main one's weights.
    average = EMAModel(parameters, decay=settings.ema_decay)
    return _Training(
        name,
        settings,
        accelerator,
        place,
        module,
        called,
        parameters,
        accelerator.prepare_optimizer(optimizer, device_placement=False),
        average,
    )


def _resume(
    training: _Training, path: Path | None, run: dict[str, object], resume: bool
) -> tuple[list[float], str]:
    """Go on from a state, if there is one: return the losses so far, and what the bar says."""
    accelerator = training.accelerator
    if path is not None and not resume:
        if accelerator.is_main_process:
            remove_states(path)
        accelerator.wait_for_everyone()
    state = None if path is None else read_state(path, run)
    step = torch.tensor([0 if state is None else state.step], device=training.device)
    steps = accelerator.gather(step).tolist()
    if len(set(steps)) > 1:
        raise TrainingStateError(
            f"the processes read states of steps {steps} in {path}: it must be a directory that "
            f"all of them share"
        )
    if state is None:
        return [], training.name
    optimizer = training.optimizer
    restore_tensors(state, training.module, training.average.shadow_params, optimizer)
    training.average.optimization_step = state.step
    if state.scaler is not None and accelerator.scaler is not None:
        accelerator.scaler.load_state_dict(dict(state.scaler))
    if state.step == training.settings.num_steps:
        return state.losses, f"{training.name}, finished before"
    change = ""
    if state.num_processes != accelerator.num_processes:
        change = f" of {state.num_processes} processes"
    return state.losses, f"{training.name}, from step {state.step}{change}"


def _backward(
    training: _Training,
    loss: LossFunction,
    images: Tensor | ImageSource,
    labels: Tensor | None,
    num_timesteps: int,
    step: int,
) -> float:
    """Leave the gradient of a step in the parameters, and return the loss of its whole batch."""
    accelerator, settings = training.accelerator, training.settings
    _seed_step(training, step)
    batch = batch_of_step(step, settings, len(images), num_timesteps)
    parts = settings.gradient_accumulation_steps
    size = settings.batch_size // (accelerator.num_processes * parts)
    training.optimizer.zero_grad()
    total = torch.zeros((), device=training.device)
    for part in range(parts):
        first = (accelerator.process_index * parts + part) * size
        picked = batch.indices[first : first + size]
        x0 = images[picked].to(training.device)
        flips = batch.flips[first : first + size]
        if settings.horizontal_flip:
            x0 = _flip(x0, flips)
        t = batch.timesteps[first : first + size].to(training.device)
        y = None if labels is None else labels[picked.to(labels.device)].to(training.device)
        with accelerator.accumulate(training.called):
            with accelerator.autocast():
                value = loss(training.called, x0, t, y, step * settings.batch_size + first)
            accelerator.backward(value)
        total += value.detach().float()
    return float(accelerator.reduce(total / parts, reduction="mean").item())


def _flip(x0: Tensor, flips: Tensor) -> Tensor:
    if x0.dim() < 4:
        raise ValueError(
            f"horizontal_flip needs images of shape (n, C, H, W), got {tuple(x0.shape)}"
        )
    return torch.where(flips.to(x0.device)[:, None, None, None], x0.flip(-1), x0)


def _check_finite(training: _Training, loss: float, step: int) -> None:
    if not math.isfinite(loss):
        raise FloatingPointError(
            f"the loss of the {training.name} is {loss} at step {step}; "
            f"try a learning_rate below {training.settings.learning_rate}"
        )


def _update(training: _Training, rate: float) -> None:
    for group in training.optimizer.param_groups:
        group["lr"] = rate
    norm = training.settings.max_gradient_norm
    training.accelerator.clip_grad_norm_(training.parameters, norm)
    training.optimizer.step()
    training.average.step(training.parameters)


def _write(training: _Training, path: Path, run: dict[str, object], losses: list[float]) -> None:
    tensors = training_tensors(training.module, training.average.shadow_params, training.optimizer)
    tensors["losses"] = torch.tensor(losses, dtype=torch.float64)
    scaler = training.accelerator.scaler
    state = TrainingState(
        len(losses),
        tensors,
        None if scaler is None else scaler.state_dict(),
        training.accelerator.num_processes,
    )
    write_state(path, state, run)
