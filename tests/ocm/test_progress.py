import contextlib
import io
import itertools
import subprocess
import sys

import pytest

from ocm import progress
from ocm.progress import tracked


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture(autouse=True)
def plain_terminal(monkeypatch):
    for name in ("FORCE_COLOR", "COLORTERM", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {"TERM": "xterm", "COLUMNS": "80", "NO_COLOR": "1"}.items():
        monkeypatch.setenv(name, value)


@pytest.fixture
def clock(monkeypatch):
    """A clock that tests move on."""
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def said(steps, stream, clock, seconds):
    """What is written to the stream, if every step takes as long."""
    with contextlib.redirect_stderr(stream):
        for _ in steps:
            clock[0] += seconds
    return stream.getvalue()


@pytest.mark.parametrize("items", [[], [4], ["a", "b", "c"], range(7)])
@pytest.mark.parametrize("shown", [True, False])
def test_the_items_come_in_their_order(items, shown):
    assert list(tracked(items, "work", shown=shown)) == list(items)


def test_what_is_not_shown_says_nothing(clock):
    assert said(tracked(range(3), "work", shown=False), Terminal(), clock, 60.0) == ""


def test_a_log_has_a_line_every_half_minute_and_one_at_the_end(clock):
    text = said(tracked(range(10), "sampling"), io.StringIO(), clock, 12.0)
    assert text.splitlines() == [
        "sampling: 3/10 steps, 0:00:36, 0:01:24 left",
        "sampling: 6/10 steps, 0:01:12, 0:00:48 left",
        "sampling: 9/10 steps, 0:01:48, 0:00:12 left",
        "sampling: 10/10 steps, 0:02:00",
    ]


def test_work_that_goes_on_counts_what_was_done_and_not_its_time(clock):
    steps = tracked(range(90, 100), "ml", done=90, note=lambda: f"loss {clock[0]:.1f}")
    first, *_, last = said(steps, io.StringIO(), clock, 30.0).splitlines()
    assert first == "ml: 91/100 steps, 0:00:30, 0:04:30 left, loss 130.0"
    assert last == "ml: 100/100 steps, 0:05:00, loss 400.0"


def test_a_terminal_has_one_bar_that_grows(clock, monkeypatch):
    monkeypatch.delenv("NO_COLOR")
    text = said(tracked(range(4), "sampling", "batches"), Terminal(), clock, 1.0)
    assert text.endswith("\n")
    assert text.count("\n") == 1
    _, *pictures = text.split("\r")
    assert [f" {n}/4 batches" in picture for n, picture in enumerate(pictures)] == [True] * 5
    grey = [picture.partition("\x1b[90m")[2].count("━") for picture in pictures]
    assert grey[0] == 24
    assert grey[1:4] == sorted(grey[1:4], reverse=True)
    assert "0:00:02, 0:00:02 left" in pictures[2]


def test_a_bar_is_drawn_anew_at_most_ten_times_a_second(clock):
    text = said(tracked(range(1000), "sampling"), Terminal(), clock, 0.001)
    assert 9 <= text.count("\r") <= 13


def test_a_bar_leaves_nothing_of_a_longer_one_and_fits_the_line(clock):
    notes = itertools.cycle(["a long note " * 9, ""])
    steps = tracked(range(4), "sampling", note=lambda: next(notes))
    text = said(steps, Terminal(), clock, 1.0)
    assert {len(picture.rstrip("\n")) for picture in text.split("\r")[1:]} == {79}


def test_an_error_has_a_line_of_its_own(clock):
    stream = Terminal()
    steps = tracked(range(4), "sampling")
    with contextlib.redirect_stderr(stream):
        next(steps)
        with pytest.raises(FloatingPointError):
            steps.throw(FloatingPointError())
    assert stream.getvalue().endswith("\n")


@pytest.mark.parametrize(
    ("error", "message"),
    [("ArithmeticError('NaN')", "error: NaN"), ("KeyboardInterrupt", "interrupted: the same")],
)
def test_a_command_ends_its_bar_before_it_says_what_went_wrong(error, message):
    code = (
        "import atexit, io, sys, typer\n"
        "from ocm.cli import app\n"
        "from ocm.progress import tracked\n"
        "class Terminal(io.StringIO):\n"
        "    isatty = lambda self: True\n"
        "sys.stderr = stream = Terminal()\n"
        "def command():\n"
        "    steps = tracked(range(4), 'work')\n"
        "    for step in steps:\n"
        f"        raise {error}\n"
        "app.app = typer.Typer()\n"
        "app.app.command()(app._interruptible(command))\n"
        "atexit.register(lambda: sys.__stderr__.write(stream.getvalue()))\n"
        "app.run()\n"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert found.returncode in (1, 130)
    bar, *rest = found.stderr.lstrip().splitlines()
    assert "0/4 steps" in bar
    assert message not in bar
    assert rest[-1].startswith(message)  # and no line that ends later


def test_what_is_not_shown_needs_no_rich(monkeypatch):
    monkeypatch.setitem(sys.modules, "rich", None)
    assert list(tracked("ab", "work", shown=False)) == ["a", "b"]
