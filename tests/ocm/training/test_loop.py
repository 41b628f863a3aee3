"""The training loop: what it computes, over processes, and after it was killed."""

import dataclasses
import math
import multiprocessing
import os
import random
import re
import signal
import time

import pytest
import torch
from training_worker import (
    NUM_TIMESTEPS,
    PARTIAL,
    SETTINGS,
    StoppedError,
    equal,
    files,
    loss,
    make_data,
    make_network,
    noise_of,
    state_of,
    stopped_at,
    stopping_at,
    train_and_report,
    train_in_process,
    trained,
)
from two_processes import received, sent_by_both, two_processes

from ocm.training.batches import batch_of_step
from ocm.training.loop import train
from ocm.training.settings import TrainingSettings


@pytest.fixture(scope="module")
def processes():
    """Processes that start with everything imported."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        [
            "pytest",
            "diffusers.optimization",
            "diffusers.training_utils",
            "safetensors.torch",
            "torch",
            "ocm.training.loop",
        ]
    )
    return context


# What a step computes


def test_training_is_adamw_with_a_warmup_a_cosine_and_an_average():
    settings = TrainingSettings(
        num_steps=12, batch_size=4, learning_rate=0.05, warmup_steps=3, ema_decay=0.3,
        weight_decay=0.1, max_gradient_norm=0.5, seed=7,
    )  # fmt: skip
    losses, module = trained(settings)

    images, conditions = make_data()
    labels = conditions["labels"]
    expected = make_network(noisy=False).double()
    weights = list(expected.parameters())
    first, second = [torch.zeros_like(w) for w in weights], [torch.zeros_like(w) for w in weights]
    average = [w.detach().clone() for w in weights]
    for step in range(12):
        batch = batch_of_step(step, settings, len(images), NUM_TIMESTEPS)
        noise = noise_of(torch.arange(4 * step, 4 * step + 4)).double()
        x = images[batch.indices].double() + noise.view(4, 1, 2, 2)
        value = (expected(x, batch.timesteps, labels[batch.indices]) - noise).square().mean()
        assert losses[step] == pytest.approx(value.item(), rel=1e-4)
        gradients = torch.autograd.grad(value, weights)
        norm = torch.cat([g.flatten() for g in gradients]).norm()
        shrink = min(1.0, 0.5 / norm.item())
        rate = 0.05 * (step / 3 if step < 3 else (1 + math.cos(math.pi * (step - 3) / 9)) / 2)
        decay = min(0.3, (1 + step) / (10 + step)) if step else 0.0
        with torch.no_grad():
            for w, g, m, v, mean in zip(weights, gradients, first, second, average, strict=True):
                m.mul_(0.9).add_(0.1 * shrink * g)
                v.mul_(0.999).add_(0.001 * (shrink * g).square())
                w.mul_(1 - 0.1 * rate)
                root = (v / (1 - 0.999 ** (step + 1))).sqrt() + 1e-8
                w.sub_(rate * m / (1 - 0.9 ** (step + 1)) / root)
                mean.mul_(decay).add_((1 - decay) * w)
    for got, mean in zip(module.parameters(), average, strict=True):
        torch.testing.assert_close(got.double(), mean, rtol=1e-3, atol=1e-4)


def test_the_random_numbers_of_the_caller_are_left_alone_and_do_not_matter():
    torch.manual_seed(5)
    before = torch.get_rng_state()
    one = trained(noisy=True)[0]
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(6)
    assert trained(noisy=True)[0] == one
    assert len(set(one)) == len(one)


def test_only_parameters_that_require_a_gradient_are_trained(tmp_path):
    module = make_network(noisy=False)
    module.first.requires_grad_(False)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    options = {"device": "cpu", "progress": False, "directory": tmp_path}
    train("network", module, loss, *make_data(), NUM_TIMESTEPS, SETTINGS, **options)
    moved = {name for name, value in module.state_dict().items() if not value.equal(before[name])}
    assert moved == {"last.weight", "last.bias"}
    assert "average/first.weight" not in state_of(tmp_path)
    module.requires_grad_(False)
    with pytest.raises(ValueError, match="no parameter of the network requires a gradient"):
        train("network", module, loss, *make_data(), NUM_TIMESTEPS, SETTINGS, **options)


def test_accumulated_gradients_are_those_of_the_whole_batch(monkeypatch):
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "8")  # Must not count.
    losses, module = trained()
    parts, other = trained(dataclasses.replace(SETTINGS, gradient_accumulation_steps=2))
    assert parts != losses
    assert parts == pytest.approx(losses, rel=1e-5)
    for got, expected in zip(other.parameters(), module.parameters(), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-5)


def test_bfloat16_trains_float32_weights_and_leaves_no_mark():
    kinds = set()

    def watch(module, x0, t, conditions, sample_offset):
        kinds.add(module(x0, t, conditions["labels"]).dtype)
        return loss(module, x0, t, conditions, sample_offset)

    losses, module = trained(dataclasses.replace(SETTINGS, mixed_precision="bf16"), loss=watch)
    assert kinds == {torch.bfloat16}
    assert {p.dtype for p in module.parameters()} == {torch.float32}
    assert "forward" not in vars(module)
    plain = trained()[0]
    assert losses != plain
    assert losses == pytest.approx(plain, rel=0.05)


def test_float16_needs_a_gpu():
    with pytest.raises(ValueError, match='mixed_precision "fp16" needs a GPU'):
        trained(dataclasses.replace(SETTINGS, mixed_precision="fp16"))


# After a kill


@pytest.mark.parametrize(("workers", "kills"), [(0, 10), (1, 3)])
def test_a_training_killed_at_any_moment_goes_on_to_the_same_bits(
    processes, tmp_path, workers, kills
):
    settings = dataclasses.replace(SETTINGS, num_steps=100, checkpoint_every=1, num_workers=workers)

    def start(settings, directory, stay=None):
        receiver, sender = processes.Pipe(duplex=False)
        process = processes.Process(
            target=train_and_report, args=(sender, settings, str(directory), stay)
        )
        process.start()
        sender.close()
        return process, receiver

    def finish(process, receiver):
        while not isinstance(message := received(receiver), tuple):
            pass
        process.join()
        return message

    process, receiver = start(settings, tmp_path / "whole")
    received(receiver)
    started = time.monotonic()
    expected_losses, expected = finish(process, receiver)
    seconds = (time.monotonic() - started) / settings.num_steps

    generator, torn = random.Random(0), 0
    directory = tmp_path / "killed"
    for kill in range(kills):
        # Half of the kills come at any moment, half while a state is being written.
        every = 2 if kill % 5 == 4 else 1
        steps = generator.randrange(1, 4)
        process, receiver = start(
            dataclasses.replace(settings, checkpoint_every=every), directory, stay=steps + 4
        )
        target = received(receiver) + steps
        while received(receiver) < target:
            pass
        if kill % 2:
            time.sleep(generator.uniform(0, 2 * seconds))
        else:
            deadline = time.monotonic() + 1
            while not (directory / PARTIAL).exists() and time.monotonic() < deadline:
                pass
            time.sleep(generator.uniform(0, seconds / 4))
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        assert process.exitcode == -signal.SIGKILL
        torn += PARTIAL in files(directory)
    print(f"{torn} of {kills} kills met a state that was being written")

    process, receiver = start(settings, directory)
    first = received(receiver)
    assert kills // 2 <= first < settings.num_steps
    losses, module = finish(process, receiver)
    assert losses == expected_losses
    assert equal(module, expected)
    assert equal(state_of(directory), state_of(tmp_path / "whole"))
    assert files(directory) == files(tmp_path / "whole") == ["training-state-00000100"]


def test_a_finished_training_is_restored_and_not_continued(tmp_path):
    losses, module = trained(noisy=True, directory=tmp_path)
    again, restored = trained(noisy=True, directory=tmp_path, seed=3, loss=stopping_at(0))
    assert again == losses
    assert equal(restored.state_dict(), module.state_dict())
    with pytest.raises(StoppedError):
        trained(noisy=True, directory=tmp_path, loss=stopping_at(0), resume=False)
    assert files(tmp_path) == []


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["no", "bf16", "fp16"])
def test_a_training_stopped_on_a_gpu_goes_on_to_the_same_bits(tmp_path, precision):
    settings = dataclasses.replace(SETTINGS, mixed_precision=precision, checkpoint_every=5)
    options = {"device": "cuda", "noisy": True}
    torch.cuda.manual_seed(5)
    before = torch.cuda.get_rng_state()
    losses, module = trained(settings, **options)
    assert torch.equal(torch.cuda.get_rng_state(), before)
    stopped_at(12, settings, tmp_path, **options)
    again, other = trained(settings, directory=tmp_path, **options)
    assert again == losses
    assert equal(other.state_dict(), module.state_dict())


def test_the_bar_says_where_training_goes_on_from(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")  # as on a terminal
    settings = dataclasses.replace(SETTINGS, checkpoint_every=4)
    stopped_at(7, settings, tmp_path)
    trained(settings, directory=tmp_path, progress=True)
    said = "the network goes on from step {} of 40\n"
    written = capsys.readouterr().err
    assert said.format(4) in written
    assert re.search(r"\rnetwork .* 4/40 steps.*\rnetwork .* 40/40 steps, .*loss 0", written)
    trained(settings, directory=tmp_path, progress=True)
    assert capsys.readouterr().err == said.format(40)


# Over processes


def in_two_processes(processes, settings, **options):
    return sent_by_both(processes, train_in_process, settings, options)


@pytest.mark.parametrize("parts", [1, 2])
def test_two_processes_train_as_one_does(processes, parts):
    expected_losses, expected = trained()
    settings = dataclasses.replace(SETTINGS, gradient_accumulation_steps=parts)
    one, other = in_two_processes(processes, settings)
    assert one[0] == other[0]
    assert equal(one[1], other[1])
    assert one[0] == pytest.approx(expected_losses, rel=1e-5)
    for name, value in expected.state_dict().items():
        torch.testing.assert_close(torch.as_tensor(one[1][name]), value, rtol=1e-3, atol=1e-5)


def test_two_processes_go_on_from_the_state_of_one(processes, tmp_path):
    settings = dataclasses.replace(SETTINGS, checkpoint_every=10)
    expected_losses = trained()[0]
    stopped_at(15, settings, tmp_path)
    one, other = in_two_processes(processes, settings, directory=str(tmp_path))
    assert one[0] == other[0]
    assert one[0][:10] == expected_losses[:10]
    assert one[0][10:] == pytest.approx(expected_losses[10:], rel=1e-5)
    assert files(tmp_path) == ["training-state-00000040"]
    assert trained(settings, directory=tmp_path)[0] == one[0]


def test_a_loss_that_is_not_finite_in_one_process_stops_both(processes):
    results = in_two_processes(processes, SETTINGS, fail_in=1)
    message = (
        "FloatingPointError: the loss of the network is nan at step 3, with seed 0; no state was "
        "written yet; try a learning_rate below 0.001, if the images are finite"
    )
    assert results == [message, message]


@pytest.mark.parametrize("killed", [0, 1])
def test_a_process_says_that_the_other_was_killed(processes, killed):
    options = {"signal_in": {killed: signal.SIGKILL}}
    with two_processes(processes, train_in_process, SETTINGS, options) as pairs:
        said = received(pairs[1 - killed][1], timeout=60)
    expected = "another of 2 processes has ended, or cannot be reached, at step 3 of the network"
    assert said.startswith(f"ConnectionError: {expected}; start all of them again")
    assert pairs[1 - killed][0].exitcode == 0
    assert pairs[killed][0].exitcode == -signal.SIGKILL


@pytest.mark.parametrize("interrupted", [(0,), (1,), (0, 1)])
def test_processes_keep_the_same_step_when_one_is_interrupted(processes, tmp_path, interrupted):
    settings = dataclasses.replace(SETTINGS, checkpoint_every=100)
    options = {"directory": str(tmp_path)}
    asked = dict.fromkeys(interrupted, signal.SIGINT)
    said = in_two_processes(processes, settings, signal_in=asked, **options)
    assert [text.split(":")[0] for text in said] == ["KeyboardInterrupt"] * 2
    assert files(tmp_path) == ["training-state-00000004"]
    expected = in_two_processes(processes, settings)
    again = in_two_processes(processes, settings, **options)
    for found, wanted in zip(again, expected, strict=True):
        assert found[0] == wanted[0]
        assert equal(found[1], wanted[1])


def test_every_process_and_step_draws_random_numbers_of_its_own(processes):
    """As dropout does: with shared ones it would drop the same features everywhere."""
    one, other = in_two_processes(processes, dataclasses.replace(SETTINGS, num_steps=3))
    assert len(one[2]) == len(other[2]) == 3
    assert len({*one[2], *other[2]}) == 6


def test_a_batch_that_does_not_divide_is_refused(processes):
    for result in in_two_processes(processes, dataclasses.replace(SETTINGS, batch_size=7)):
        assert "batch_size must be a multiple of 2, which is 2 processes times" in result
    settings = dataclasses.replace(SETTINGS, gradient_accumulation_steps=3)
    with pytest.raises(ValueError, match=r"multiple of 3, .* gradient_accumulation_steps = 3; got"):
        trained(settings)


# Refusals and logs


def test_tensorboard_gets_loss_and_learning_rate_or_says_what_to_install(tmp_path):
    with pytest.raises(ValueError, match="tensorboard needs a directory to write to"):
        trained(tensorboard=True)
    try:
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    except ImportError:
        with pytest.raises(ImportError, match="tensorboard"):
            trained(directory=tmp_path, tensorboard=True)
        return
    settings = dataclasses.replace(SETTINGS, checkpoint_every=5)
    stopped_at(12, settings, tmp_path, tensorboard=True)
    losses = trained(settings, directory=tmp_path, tensorboard=True)[0]
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    logged = {event.step: event.value for event in events.Scalars("loss")}
    assert list(logged) == list(range(40))
    assert list(logged.values()) == pytest.approx(losses)
    rates = [event.value for event in events.Scalars("learning_rate")]
    assert max(rates) == pytest.approx(SETTINGS.learning_rate)
