"""The training loop: what it computes, over processes, and after it was killed."""

import dataclasses
import itertools
import json
import math
import multiprocessing
import os
import random
import signal
import socket
import time
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import nn
from training_worker import (
    NUM_TIMESTEPS,
    SETTINGS,
    loss,
    make_data,
    make_network,
    noise_of,
    train_and_report,
    train_in_process,
    trained,
)

from ocm.training.loop import TrainingSettings, batch_of_step, train
from ocm.training.state import (
    TrainingState,
    TrainingStateError,
    read_state,
    remove_states,
    write_state,
)

TIMEOUT = 120
PARTIAL = "training-state.partial"
TENSORS = "state-00001-of-00001.safetensors"


@pytest.fixture(scope="module")
def processes():
    """Processes that start with everything imported."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        [
            "pytest",
            "accelerate",
            "diffusers.optimization",
            "diffusers.training_utils",
            "safetensors.torch",
            "torch",
            "ocm.training.loop",
        ]
    )
    return context


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


class StoppedError(Exception):
    pass


def stopping_at(step, settings=SETTINGS):
    def stopping(module, x0, t, labels, sample_offset):
        if sample_offset == step * settings.batch_size:
            raise StoppedError
        return loss(module, x0, t, labels, sample_offset)

    return stopping


def stopped_at(step, settings, directory, **options):
    with pytest.raises(StoppedError):
        trained(settings, loss=stopping_at(step, settings), directory=directory, **options)


# What a step computes


def test_training_is_adamw_with_a_warmup_a_cosine_and_an_average():
    settings = TrainingSettings(
        num_steps=12, batch_size=4, learning_rate=0.05, warmup_steps=3, ema_decay=0.3,
        weight_decay=0.1, max_gradient_norm=0.5, seed=7,
    )  # fmt: skip
    losses, module = trained(settings)

    images, labels = make_data()
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


def test_batches_are_a_function_of_the_seed_and_the_step():
    settings = dataclasses.replace(SETTINGS, batch_size=500)
    batch = batch_of_step(3, settings, 20, NUM_TIMESTEPS)
    again = batch_of_step(3, settings, 20, NUM_TIMESTEPS)
    assert equal(vars(batch), vars(again))
    assert batch.indices.unique().tolist() == list(range(20))
    assert 1 <= batch.timesteps.min() <= 2
    assert 999 <= batch.timesteps.max() <= 1000
    assert batch.timesteps.diff().unique().tolist() == [2]
    assert 200 < batch.flips.sum() < 300
    for other in (
        batch_of_step(4, settings, 20, NUM_TIMESTEPS),
        batch_of_step(3, dataclasses.replace(settings, seed=1), 20, NUM_TIMESTEPS),
        batch_of_step(3, dataclasses.replace(settings, seed=-1), 20, NUM_TIMESTEPS),
    ):
        assert not torch.equal(batch.indices, other.indices)
    plain = dataclasses.replace(settings, horizontal_flip=False)
    assert not batch_of_step(3, plain, 20, NUM_TIMESTEPS).flips.any()


def test_timesteps_are_uniform_in_every_place():
    settings = TrainingSettings(num_steps=1, batch_size=4)
    drawn = torch.stack([batch_of_step(step, settings, 1, 8).timesteps for step in range(400)])
    counts = torch.bincount(drawn.flatten(), minlength=9)
    assert counts[0] == 0
    assert counts[1:].min() > 150


def test_an_exponent_of_two_spends_half_of_the_time_on_a_quarter_of_the_timesteps():
    settings = TrainingSettings(num_steps=1, batch_size=100, timestep_exponent=2.0)
    drawn = torch.cat([batch_of_step(step, settings, 1, 1000).timesteps for step in range(200)])
    assert (drawn.min(), drawn.max()) == (1, 1000)
    for t, share in ((10, 0.1), (250, 0.5), (640, 0.8)):  # sqrt(t / N)
        assert abs((drawn <= t).double().mean() - share) < 0.01


def test_an_exponent_must_be_positive():
    with pytest.raises(ValueError, match="timestep_exponent must be positive, got 0"):
        TrainingSettings(num_steps=1, timestep_exponent=0.0)


def test_flips_reverse_the_images_that_were_drawn_for_it():
    images = torch.arange(40.0).view(10, 1, 2, 2) / 40
    settings = dataclasses.replace(SETTINGS, num_steps=1)
    seen = []

    def watch(module, x0, t, labels, sample_offset):
        seen.append(x0)
        return module(x0).mean()

    module = nn.Conv2d(1, 1, 1)
    train("network", module, watch, images, None, 10, settings, device="cpu", progress=False)
    batch = batch_of_step(0, settings, 10, 10)
    assert 0 < batch.flips.sum() < len(batch.flips)
    for x, index, flip in zip(seen[0], batch.indices, batch.flips, strict=True):
        rows = [row[::-1] if flip else row for row in images[index, 0].tolist()]
        assert x[0].tolist() == rows


def test_a_source_of_images_trains_as_a_tensor_does():
    images, labels = make_data()

    class Source:
        def __len__(self):
            return len(images)

        def __getitem__(self, indices):
            return images[indices]

    module = make_network(noisy=False)
    losses = train(
        "network", module, loss, Source(), labels, NUM_TIMESTEPS, SETTINGS, device="cpu",
        progress=False,
    )  # fmt: skip
    assert losses == trained()[0]


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
    from accelerate.state import AcceleratorState, PartialState

    before = dict(AcceleratorState._shared_state), dict(PartialState._shared_state)
    kinds = set()

    def watch(module, x0, t, labels, sample_offset):
        kinds.add(module(x0, t, labels).dtype)
        return loss(module, x0, t, labels, sample_offset)

    losses, module = trained(dataclasses.replace(SETTINGS, mixed_precision="bf16"), loss=watch)
    assert kinds == {torch.bfloat16}
    assert {p.dtype for p in module.parameters()} == {torch.float32}
    assert "forward" not in vars(module)
    plain = trained()[0]
    assert losses != plain
    assert losses == pytest.approx(plain, rel=0.05)
    assert (dict(AcceleratorState._shared_state), dict(PartialState._shared_state)) == before


def test_float16_needs_a_gpu():
    with pytest.raises(ValueError, match='mixed_precision "fp16" needs a GPU'):
        trained(dataclasses.replace(SETTINGS, mixed_precision="fp16"))


# After a kill


def test_a_training_killed_at_any_moment_goes_on_to_the_same_bits(processes, tmp_path):
    settings = dataclasses.replace(SETTINGS, num_steps=100, checkpoint_every=1)

    def start(settings, directory, stay=None):
        receiver, sender = processes.Pipe(duplex=False)
        process = processes.Process(
            target=train_and_report, args=(sender, settings, str(directory), stay)
        )
        process.start()
        sender.close()
        return process, receiver

    def receive(receiver):
        assert receiver.poll(TIMEOUT)
        return receiver.recv()

    def finish(process, receiver):
        while not isinstance(message := receive(receiver), tuple):
            pass
        process.join()
        return message

    process, receiver = start(settings, tmp_path / "whole")
    receive(receiver)
    started = time.monotonic()
    expected_losses, expected = finish(process, receiver)
    seconds = (time.monotonic() - started) / settings.num_steps

    generator, torn = random.Random(0), 0
    directory = tmp_path / "killed"
    for kill in range(10):
        # Half of the kills come at any moment, half while a state is being written.
        every = 2 if kill % 5 == 4 else 1
        steps = generator.randrange(1, 4)
        process, receiver = start(
            dataclasses.replace(settings, checkpoint_every=every), directory, stay=steps + 4
        )
        target = receive(receiver) + steps
        while receive(receiver) < target:
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
    print(f"{torn} of 10 kills met a state that was being written")

    process, receiver = start(settings, directory)
    first = receive(receiver)
    assert 5 <= first < settings.num_steps
    losses, module = finish(process, receiver)
    assert losses == expected_losses
    assert equal(module, expected)
    assert equal(state_of(directory), state_of(tmp_path / "whole"))
    assert files(directory) == files(tmp_path / "whole") == ["training-state-00000100"]


def a_state(step):
    tensors = {f"module/{i}": torch.full((2,), float(i)) for i in range(3)}
    return TrainingState(step, tensors | {"losses": torch.arange(step).double()}, None, 1)


def cut_short(function, point, monkeypatch):
    """Run ``function`` up to its ``point``-th call of the system, and say if it got that far."""
    calls = itertools.count()

    class Killed(BaseException):
        pass

    def counted(call):
        def counting(*args, **options):
            if next(calls) == point:
                raise Killed
            return call(*args, **options)

        return counting

    with monkeypatch.context() as patch:
        for name in ("rename", "open", "fsync", "close", "unlink", "rmdir", "mkdir"):
            patch.setattr(os, name, counted(getattr(os, name)))
        patch.setattr(safetensors.torch, "save_file", counted(safetensors.torch.save_file))
        patch.setattr(Path, "write_text", counted(Path.write_text))
        try:
            function()
        except Killed:
            return True
    return False


def test_a_state_cut_short_at_any_call_leaves_a_complete_one(tmp_path, monkeypatch):
    found = []
    for point in itertools.count():
        directory = tmp_path / str(point)
        write_state(directory, a_state(1), {})
        # Over several files.
        cut = cut_short(
            lambda d=directory: write_state(d, a_state(2), {}, max_file_bytes=20),
            point,
            monkeypatch,
        )
        found.append(read_state(directory, {}).step)
        write_state(directory, a_state(3), {})
        assert files(directory) == ["training-state-00000003"]
        if not cut:
            break
    assert len(found) > 12
    assert found == sorted(found)
    assert set(found) == {1, 2}


def test_a_state_is_spread_over_files_of_at_most_so_many_bytes(tmp_path):
    sizes = {"a": 3, "b": 4, "c": 30, "d": 1, "losses": 5}
    tensors = {name: torch.arange(size).double() for name, size in sizes.items()}
    folder = write_state(tmp_path, TrainingState(5, tensors, None, 1), {}, max_file_bytes=60)
    found = [safetensors.torch.load_file(file) for file in sorted(folder.glob("*.safetensors"))]
    assert [set(part) for part in found] == [{"a", "b"}, {"c"}, {"d", "losses"}]
    assert files(folder) == [
        *(f"state-0000{i}-of-00003.safetensors" for i in (1, 2, 3)),
        "state.json",
    ]
    assert equal(read_state(tmp_path, {}).tensors, tensors)
    flip_a_bit(folder / "state-00003-of-00003.safetensors")
    with pytest.raises(TrainingStateError, match=r"state-00003-of-00003\.safetensors is damaged"):
        read_state(tmp_path, {})


def test_removing_states_cut_short_at_any_call_leaves_a_complete_one_or_none(tmp_path, monkeypatch):
    for point in itertools.count():
        directory = tmp_path / str(point)
        folder = write_state(directory, a_state(1), {})
        # As a kill between the rename of one and the removal of the other leaves them.
        os.rename(folder, tmp_path / "aside")
        write_state(directory, a_state(2), {})
        os.rename(tmp_path / "aside", folder)
        (directory / "mine").touch()
        cut = cut_short(lambda d=directory: remove_states(d), point, monkeypatch)
        state = read_state(directory, {})
        assert state is None or state.step == 2
        if not cut:
            break
    assert state is None
    assert point > 4
    assert files(directory) == ["mine"]


def test_a_folder_that_a_kill_left_is_ignored(tmp_path):
    settings = dataclasses.replace(SETTINGS, checkpoint_every=5)
    (tmp_path / PARTIAL).mkdir()
    (tmp_path / PARTIAL / "state.json").write_text("{")
    assert trained(settings, directory=tmp_path)[0] == trained(settings)[0]
    assert files(tmp_path) == ["training-state-00000040"]


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


def test_the_bar_says_where_training_goes_on_from(tmp_path, capsys):
    settings = dataclasses.replace(SETTINGS, checkpoint_every=4)
    stopped_at(7, settings, tmp_path)
    trained(settings, directory=tmp_path, progress=True)
    assert "network, from step 4:" in capsys.readouterr().err
    trained(settings, directory=tmp_path, progress=True)
    assert "network, finished before:" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "old", "new"),
    [
        ("learning_rate", 0.001, 0.002),
        ("num_steps", 40, 41),
        ("seed", 0, 1),
        ("batch_size", 8, 4),
        ("mixed_precision", "'no'", "bf16"),
    ],
)
def test_a_state_of_other_settings_is_refused(tmp_path, name, old, new):
    stopped_at(1, dataclasses.replace(SETTINGS, checkpoint_every=1), tmp_path)
    message = rf"state\.json is of another training: {name} was {old}, now it is .*{new}.*; put it"
    with pytest.raises(TrainingStateError, match=message):
        trained(dataclasses.replace(SETTINGS, **{name: new}), directory=tmp_path)


def test_a_state_of_another_module_or_other_data_is_refused(tmp_path):
    stopped_at(1, dataclasses.replace(SETTINGS, checkpoint_every=1), tmp_path)
    options = {"device": "cpu", "progress": False, "directory": tmp_path}
    images, labels = make_data()
    module = make_network(noisy=False, width=17)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    message = (
        r"training-state-00000001 is of another module: module/first\.weight is torch\.float32 of "
        r"shape \(16, 8\) there, and torch\.float32 of shape \(17, 8\) here"
    )
    with pytest.raises(TrainingStateError, match=message):
        train("network", module, loss, images, labels, NUM_TIMESTEPS, SETTINGS, **options)
    assert equal(module.state_dict(), before)
    module = make_network(noisy=False)
    with pytest.raises(TrainingStateError, match="num_images was 20, now it is 19"):
        train("network", module, loss, images[1:], labels[1:], NUM_TIMESTEPS, SETTINGS, **options)
    with pytest.raises(TrainingStateError, match="name was 'network', now it is 'head'"):
        train("head", module, loss, images, labels, NUM_TIMESTEPS, SETTINGS, **options)
    with pytest.raises(TrainingStateError, match="num_probes was None, now it is 2"):
        trained(directory=tmp_path, details={"num_probes": 2})
    with pytest.raises(ValueError, match=r"details must have other names .* got seed"):
        trained(details={"seed": 2})
    with pytest.raises(TrainingStateError, match=r"module/middle\.mean is absent there"):
        trained(directory=tmp_path, noisy=True)


def flip_a_bit(file):
    content = bytearray(file.read_bytes())
    content[-3] ^= 4
    file.write_bytes(content)


def edit(**changes):
    return lambda file: file.write_text(json.dumps(json.loads(file.read_text()) | changes))


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        (TENSORS, flip_a_bit, "its SHA-256 is"),
        (TENSORS, lambda f: f.write_bytes(f.read_bytes()[:-9]), "its SHA-256 is"),
        (TENSORS, Path.unlink, "cannot be read"),
        ("state.json", Path.unlink, "cannot be read as JSON"),
        ("state.json", lambda f: f.write_text(f.read_text()[:50]), "cannot be read as JSON"),
        ("state.json", lambda f: f.write_text("[]"), "its entry format must be"),
        ("state.json", edit(version=9), "version 9, this ocm reads 2"),
        ("state.json", edit(run=3), "its entry run must be of type dict, got 3"),
        ("state.json", edit(step=True), "its entry step must be of type int, got True"),
        ("state.json", edit(step=2), r"its step is 2, but .* losses of shape \(1,\)"),
        ("state.json", edit(num_processes="x"), "its entry num_processes must be of type int"),
        ("state.json", edit(scaler=3), "its entry scaler must be null or an object, got 3"),
        ("state.json", edit(files=None), "its entry files must be of type dict, got None"),
        ("state.json", edit(files={"../x": ""}), "must name files of tensors, got '../x'"),
        ("state.json", edit(files={}), "its step is 1, but its files have losses of shape None"),
        (TENSORS, lambda f: edit(files={TENSORS: None})(f.parent / "state.json"), "says None"),
    ],
)
def test_a_damaged_state_is_refused(tmp_path, name, damage, message):
    stopped_at(1, dataclasses.replace(SETTINGS, checkpoint_every=1), tmp_path)
    (folder,) = tmp_path.iterdir()
    damage(folder / name)
    with pytest.raises(TrainingStateError, match=rf"{name}.*{message}.*resume=False"):
        trained(directory=tmp_path)


def test_a_module_with_state_that_is_no_tensor_is_refused(tmp_path):
    class Counting(nn.Conv2d):
        def get_extra_state(self):
            return {"calls": 1}

    with pytest.raises(TypeError, match="_extra_state of Counting is a dict"):
        train(
            "network", Counting(1, 1, 1), lambda m, x, *_: m(x).mean(), make_data()[0], None, 10,
            TrainingSettings(num_steps=1), device="cpu", directory=tmp_path, progress=False,
        )  # fmt: skip


# Over processes


def in_two_processes(processes, settings, **options):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    pairs = []
    for rank in range(2):
        receiver, sender = processes.Pipe(duplex=False)
        process = processes.Process(
            target=train_in_process, args=(sender, rank, port, settings, dict(options))
        )
        process.start()
        sender.close()
        pairs.append((process, receiver))
    try:
        results = []
        for _, receiver in pairs:
            assert receiver.poll(TIMEOUT)
            results.append(receiver.recv())
    finally:
        for process, _ in pairs:
            process.join(10)
            if process.is_alive():
                process.kill()
    return results


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
    message = "FloatingPointError: the loss of the network is nan at step 3; try a learning_rate"
    assert all(result.startswith(message) for result in results)


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
        with pytest.raises(ImportError, match="pip install tensorboard"):
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


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"warmup_steps": -1}, "warmup_steps must not be negative, got -1"),
        ({"weight_decay": -0.5}, "weight_decay must not be negative, got -0.5"),
        ({"max_gradient_norm": 0.0}, "max_gradient_norm must be positive, got 0.0"),
        ({"gradient_accumulation_steps": 0}, "gradient_accumulation_steps must be at least 1"),
        ({"mixed_precision": "fp8"}, "mixed_precision must be one of no, bf16, fp16, got 'fp8'"),
        ({"checkpoint_every": 0}, "checkpoint_every must be at least 1, got 0"),
    ],
)
def test_settings_out_of_range(changes, message):
    with pytest.raises(ValueError, match=message):
        TrainingSettings(num_steps=1, **changes)


@pytest.mark.parametrize(
    ("images", "labels", "changes", "error", "message"),
    [
        (torch.zeros(0, 1, 2, 2), None, {}, ValueError, "images must hold at least one image"),
        (torch.zeros(3, 1).long(), None, {}, ValueError, "must be floating-point .* torch.int64"),
        (torch.zeros(3, 1), torch.zeros(3), {}, TypeError, "labels must be int64, got torch.float"),
        (torch.zeros(3, 1), torch.zeros(2).long(), {}, ValueError, r"shape \(3,\), .* got \(2,\)"),
        (torch.zeros(3, 4), None, {"horizontal_flip": True}, ValueError, r"got \(8, 4\)"),
    ],
)
def test_data_and_settings_that_do_not_fit(images, labels, changes, error, message):
    settings = TrainingSettings(num_steps=1, batch_size=8, **changes)
    with pytest.raises(error, match=message):
        train(
            "network", nn.Linear(4, 4), loss, images, labels, 10, settings, device="cpu",
            progress=False,
        )  # fmt: skip
