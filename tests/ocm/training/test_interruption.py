"""A training that is asked to end keeps the step that it is in, and goes on to the same bits."""

import contextlib
import dataclasses
import itertools
import multiprocessing
import os
import signal
import threading

import huggingface_hub
import pytest
import torch
from full_disk import files_of_at_most
from training_worker import SETTINGS, StoppedError, equal, files, loss, state_of, trained

from ocm.training import interruption
from ocm.training.interruption import waiting_signals

SELDOM = dataclasses.replace(SETTINGS, checkpoint_every=100)
OFTEN = dataclasses.replace(SETTINGS, checkpoint_every=5)


class AskedError(BaseException):
    pass


def ask(number, frame):
    raise AskedError


@contextlib.contextmanager
def handler_of(number, handler):
    before = signal.signal(number, handler)
    try:
        yield
    finally:
        signal.signal(number, before)


def doing(act):
    """Return the loss, which does something else too in the middle of the eighth step."""

    def loss_and_act(module, x0, t, conditions, sample_offset):
        value = loss(module, x0, t, conditions, sample_offset)
        if sample_offset == 7 * SETTINGS.batch_size:
            act()
        return value

    return loss_and_act


def send(number=signal.SIGINT):
    return lambda: signal.raise_signal(number)


def interrupted(settings, directory):
    """A training that Ctrl-C meets in its eighth step."""
    with pytest.raises(KeyboardInterrupt):
        trained(settings, loss=doing(send()), directory=directory)


def assert_goes_on_from_the_fifth_step(settings, directory):
    """Raise unless its state is the only one, and leads to the losses of no interruption."""
    assert files(directory) == ["training-state-00000005"]
    assert trained(settings, directory=directory)[0] == trained(settings)[0]


@pytest.fixture
def never_within_a_second(monkeypatch):
    times = itertools.count(step=2)
    monkeypatch.setattr(interruption.time, "monotonic", lambda: next(times))


@pytest.mark.parametrize(
    ("number", "error"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, AskedError)]
)
def test_a_signal_keeps_the_step_that_it_comes_in(tmp_path, number, error):
    losses, module = trained(SELDOM, noisy=True)
    with handler_of(signal.SIGTERM, ask):
        with pytest.raises(error):
            trained(SELDOM, noisy=True, loss=doing(send(number)), directory=tmp_path)
        assert signal.getsignal(signal.SIGTERM) is ask
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert files(tmp_path) == ["training-state-00000008"]
    again, other = trained(SELDOM, noisy=True, directory=tmp_path)
    assert again == losses
    assert equal(other.state_dict(), module.state_dict())


def test_a_second_signal_ends_the_step_and_keeps_the_state_before(tmp_path, never_within_a_second):
    def twice():
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        raise AssertionError("the step went on")

    with pytest.raises(KeyboardInterrupt):
        trained(OFTEN, loss=doing(twice), directory=tmp_path)
    assert_goes_on_from_the_fifth_step(OFTEN, tmp_path)


def test_a_second_signal_while_the_state_is_written_keeps_the_one_before(
    tmp_path, monkeypatch, never_within_a_second
):
    write = huggingface_hub.save_torch_state_dict

    def write_some(tensors, folder, **options):
        write(tensors, folder, **options)
        if len(tensors["losses"]) == 8:
            signal.raise_signal(signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(huggingface_hub, "save_torch_state_dict", write_some)
        interrupted(OFTEN, tmp_path)
    assert_goes_on_from_the_fifth_step(OFTEN, tmp_path)


def test_a_signal_that_a_launcher_passes_on_at_once_is_no_second_one(tmp_path):
    def twice():
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGTERM)

    with pytest.raises(KeyboardInterrupt):
        trained(SELDOM, loss=doing(twice), directory=tmp_path)
    assert files(tmp_path) == ["training-state-00000008"]


def test_a_handler_that_raises_nothing_lets_the_training_go_on(tmp_path):
    called = []
    with handler_of(signal.SIGINT, lambda number, frame: called.append(number)):
        losses = trained(SELDOM, loss=doing(send()), directory=tmp_path)[0]
    assert called == [signal.SIGINT]
    assert losses == trained(SELDOM)[0]
    assert files(tmp_path) == ["training-state-00000040"]


def test_signals_that_are_ignored_stay_ignored(tmp_path):
    with handler_of(signal.SIGINT, signal.SIG_IGN):
        trained(SELDOM, loss=doing(send()), directory=tmp_path)
    assert files(tmp_path) == ["training-state-00000040"]


def test_without_a_directory_nothing_waits():
    def stop():
        signal.raise_signal(signal.SIGINT)
        raise AssertionError("the step went on")

    with pytest.raises(KeyboardInterrupt):
        trained(SELDOM, loss=doing(stop))


def test_an_error_in_the_step_comes_before_the_signal(tmp_path):
    def fail():
        signal.raise_signal(signal.SIGINT)
        raise StoppedError

    with pytest.raises(StoppedError):
        trained(SELDOM, loss=doing(fail), directory=tmp_path)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_signal_that_nobody_delivers_comes_at_the_end():
    with pytest.raises(KeyboardInterrupt), waiting_signals():
        signal.raise_signal(signal.SIGINT)


def test_a_training_in_a_thread_takes_no_signals(tmp_path):
    found = []
    thread = threading.Thread(
        target=lambda: found.append(trained(SELDOM, directory=tmp_path)[0]), daemon=True
    )
    thread.start()
    thread.join(60)
    assert found == [trained(SELDOM)[0]]


def test_processes_that_read_images_outlive_the_signal(tmp_path):
    """A terminal sends Ctrl-C to them too, and the step needs more than they have read ahead."""
    settings = dataclasses.replace(SELDOM, num_workers=1, gradient_accumulation_steps=8)

    def to_all():
        (reader,) = multiprocessing.active_children()
        os.kill(reader.pid, signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    losses = trained(settings)[0]
    with pytest.raises(KeyboardInterrupt):
        trained(settings, loss=doing(to_all), directory=tmp_path)
    assert len(state_of(tmp_path)["losses"]) >= 8
    assert trained(settings, directory=tmp_path)[0] == losses


# What is not finite


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_nothing_of_a_step_that_is_not_finite_is_kept(tmp_path, what, value):
    settings = dataclasses.replace(OFTEN, seed=3)

    def broken(module, x0, t, conditions, sample_offset):
        found = loss(module, x0, t, conditions, sample_offset)
        if sample_offset != 9 * settings.batch_size:
            return found
        if what == "gradient":
            found.register_hook(lambda gradient: gradient * value)
            return found
        return found * value

    message = (
        rf"the {what} of the network is (nan|inf) at step 9, with seed 3; the last good state is "
        rf"that of step 5 in {tmp_path}; try a learning_rate below 0\.001, if the images are finite"
    )
    with pytest.raises(FloatingPointError, match=message):
        trained(settings, loss=broken, directory=tmp_path)
    assert all(torch.isfinite(x).all() for x in state_of(tmp_path).values())
    assert_goes_on_from_the_fifth_step(settings, tmp_path)


# What is in the way


@pytest.mark.parametrize("change", [{"seed": 1}, {"learning_rate": 0.002}, {"num_steps": 20}])
def test_an_unfinished_training_of_other_settings_is_replaced_where_asked_to(
    tmp_path, change, capsys
):
    interrupted(OFTEN, tmp_path)
    other = dataclasses.replace(OFTEN, **change)
    options = {"directory": tmp_path, "replace_other": True}
    assert trained(other, **options)[0] == trained(other)[0]
    (line,) = capsys.readouterr().err.splitlines()
    (name,) = change
    assert line.startswith(f"removed the unfinished training of the network in {tmp_path}: ")
    assert f"{name} was {getattr(OFTEN, name)!r}, now it is {change[name]!r}" in line
    assert files(tmp_path) == [f"training-state-{other.num_steps:08d}"]


def test_an_unfinished_training_of_the_same_settings_goes_on_where_others_are_replaced(tmp_path):
    interrupted(OFTEN, tmp_path)
    seen = []

    def counted(module, x0, t, conditions, sample_offset):
        seen.append(sample_offset // OFTEN.batch_size)
        return loss(module, x0, t, conditions, sample_offset)

    options = {"directory": tmp_path, "replace_other": True}
    assert trained(OFTEN, loss=counted, **options)[0] == trained(OFTEN)[0]
    assert seen == list(range(8, 40))


def test_a_damaged_state_is_replaced_where_asked_to(tmp_path, capsys):
    interrupted(SELDOM, tmp_path)
    (tmp_path / "training-state-00000008" / "state.json").write_text("{")
    assert trained(SELDOM, directory=tmp_path, replace_other=True)[0] == trained(SELDOM)[0]
    assert "state.json is damaged" in capsys.readouterr().err


def test_a_full_disk_is_an_error_of_the_system_and_keeps_the_state_before(tmp_path):
    disk = contextlib.ExitStack()
    fill = doing(lambda: disk.enter_context(files_of_at_most(1000)))
    with disk, pytest.raises(OSError, match=r"training-state-00000010 cannot be written: .*large"):
        trained(OFTEN, loss=fill, directory=tmp_path)
    assert_goes_on_from_the_fifth_step(OFTEN, tmp_path)
