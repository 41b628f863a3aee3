"""What the trainings of ``tests/ocm/training`` do; importable by name from another process."""

import os
import signal
import time
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import nn
from two_processes import environment_of

from ocm.training.loop import train
from ocm.training.settings import TrainingSettings

NUM_TIMESTEPS = 1000
PARTIAL = "training-state.partial"
SETTINGS = TrainingSettings(num_steps=40, batch_size=8, warmup_steps=5, horizontal_flip=True)


class Noisy(nn.Module):
    """Random numbers and a buffer, which going on from a state must bring back too."""

    def __init__(self, width):
        super().__init__()
        self.register_buffer("mean", torch.zeros(width))

    def forward(self, x):
        if self.training:
            self.mean.lerp_(x.detach().mean(dim=0), 0.1)
        return nn.functional.dropout(x - self.mean, 0.2, self.training)


class Network(nn.Module):
    """An MLP of an image, its timestep and its class."""

    def __init__(self, *, noisy, width=16):
        super().__init__()
        self.first = nn.Linear(4 + 1 + 3, width)
        self.middle = Noisy(width) if noisy else nn.SiLU()
        self.last = nn.Linear(width, 4)

    def forward(self, x, t, labels):
        classes = nn.functional.one_hot(labels, 3).to(x)
        x = torch.cat([x.flatten(1), t[:, None] / NUM_TIMESTEPS, classes], dim=1)
        return self.last(self.middle(self.first(x)))


def make_network(*, noisy, seed=0, width=16):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Network(noisy=noisy, width=width)


def make_data():
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(20, 1, 2, 2, generator=generator) * 2 - 1
    return images, {"labels": torch.randint(0, 3, (20,), generator=generator)}


def noise_of(samples):
    """Return noise that is a function of the number of the sample, shape (b, 4)."""
    return torch.sin(samples[:, None].double() * torch.arange(1, 5)).float()


def loss(module, x0, t, conditions, sample_offset):
    noise = noise_of(sample_offset + torch.arange(len(x0))).to(x0.device)
    return (module(x0 + noise.view(x0.shape), t, conditions["labels"]) - noise).square().mean()


def trained(settings=SETTINGS, *, noisy=False, seed=0, loss=loss, **options):
    """Train a new network and return the losses and the network."""
    module = make_network(noisy=noisy, seed=seed)
    options = {"device": "cpu", "progress": False, **options}
    losses = train("network", module, loss, *make_data(), NUM_TIMESTEPS, settings, **options)
    return losses, module


class StoppedError(Exception):
    pass


def equal(one, other):
    return one.keys() == other.keys() and all(
        torch.equal(torch.as_tensor(one[name]), torch.as_tensor(other[name])) for name in one
    )


def files(directory):
    return sorted(path.name for path in Path(directory).iterdir())


def state_of(directory):
    (folder,) = Path(directory).glob("training-state-*[0-9]")
    tensors = {}
    for file in folder.glob("*.safetensors"):
        tensors |= safetensors.torch.load_file(file)
    return tensors


def stopping_at(step, settings=SETTINGS):
    def stopping(module, x0, t, conditions, sample_offset):
        if sample_offset == step * settings.batch_size:
            raise StoppedError
        return loss(module, x0, t, conditions, sample_offset)

    return stopping


def stopped_at(step, settings, directory, **options):
    with pytest.raises(StoppedError):
        trained(settings, loss=stopping_at(step, settings), directory=directory, **options)


def train_and_report(connection, settings, directory, stay):
    """Train, and send the number of a step when its loss is computed.

    After ``stay`` steps, if it is given, wait to be killed.
    """
    torch.set_num_threads(1)
    sent = []

    def reporting(module, x0, t, conditions, sample_offset):
        sent.append(sample_offset // settings.batch_size)
        connection.send(sent[-1])
        if stay is not None and len(sent) > stay:
            time.sleep(3600)
        return loss(module, x0, t, conditions, sample_offset)

    losses, module = trained(settings, noisy=True, loss=reporting, directory=directory)
    connection.send((losses, {k: v.numpy() for k, v in module.state_dict().items()}))


def train_in_process(connection, rank, port, settings, options):
    """Train as one of two processes, of which the other has another random network at first."""
    torch.set_num_threads(1)
    os.environ.update(environment_of(rank, port), OMP_NUM_THREADS="1")
    fail_in, signal_in = options.pop("fail_in", None), options.pop("signal_in", {})
    drawn = []

    def failing(module, x0, t, conditions, sample_offset):
        drawn.append(torch.rand(()).item())
        value = loss(module, x0, t, conditions, sample_offset)
        if rank in signal_in and sample_offset // settings.batch_size == 3:
            signal.raise_signal(signal_in[rank])
        return value * float("nan") if rank == fail_in and sample_offset >= 24 else value

    try:
        losses, module = trained(settings, seed=rank, loss=failing, **options)
        result = losses, {k: v.numpy() for k, v in module.state_dict().items()}, drawn
    except (ValueError, ArithmeticError, ConnectionError, KeyboardInterrupt) as error:
        result = f"{type(error).__name__}: {error}"
    connection.send(result)
    torch.distributed.destroy_process_group()
