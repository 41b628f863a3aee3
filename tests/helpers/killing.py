"""Commands that are killed at random moments and given again."""

import multiprocessing
import os
import random
import signal
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from folders import assert_whole
from two_processes import environment_of, free_port

# A server that has imported these and runs no threads forks a process for each attempt, which
# would take 5 seconds to start by itself.
_forked = multiprocessing.get_context("forkserver")
_forked.set_forkserver_preload(
    [
        *("torch", "diffusers.models.unets", "safetensors.torch", "sklearn.datasets"),
        *("torchmetrics.image.fid", "matplotlib.pyplot", "huggingface_hub"),
        *("ocm", "ocm.cli.app", "ocm.cli.inputs", "ocm.evaluation.evaluation", "killing"),
    ]
)
_GOLDEN = 0.618
_LIMIT = 300.0  # seconds, within which every process must end


@dataclass(frozen=True)
class Attempt:
    """One time that a command was given.

    Attributes:
        folder: What the command was made for.
        status: Its exit status, negative for the signal that ended it.
        said: What it wrote to stdout and stderr.
        seconds: How long it ran.
    """

    folder: Path
    status: int
    said: str
    seconds: float

    @property
    def killed(self):
        """Whether SIGKILL ended it."""
        return self.status == -signal.SIGKILL


def attempt(arguments, folder, *, after=None, first=None):
    """Run ``ocm`` with these arguments in a process of its own, which may be killed.

    Args:
        arguments: Of the command line.
        folder: Is returned with the attempt; beside it stands a file of what was said.
        after: Seconds until it is killed, or a function that says whether the time has come; None
            for never.
        first: A function of a module, called in the process before the command.
    """
    log = folder.with_name(f"{folder.name}.log")
    log.unlink(missing_ok=True)
    process = _forked.Process(target=_run, args=([*map(str, arguments)], str(log), first))
    process.start()  # returns once the server, which may have to be started too, has forked it
    start = time.monotonic()
    if callable(after):
        while process.is_alive() and not after():
            assert time.monotonic() < start + _LIMIT, f"nothing came of {arguments}"
            time.sleep(0.005)
    elif after is not None:
        process.join(after)
    if after is not None and process.is_alive():
        process.kill()
    process.join(_LIMIT)
    assert process.exitcode is not None, f"{arguments} did not end within {_LIMIT} seconds"
    said = log.read_text(encoding="utf-8") if log.exists() else ""
    return Attempt(folder, process.exitcode, said, time.monotonic() - start)


def _run(arguments, log, first):
    """Run the command line as the console script does, in the process that was forked."""
    file = os.open(log, os.O_WRONLY | os.O_CREAT, 0o600)
    os.dup2(file, 1)
    os.dup2(file, 2)
    # In place of what pytest may have given to the server.
    sys.stdout, sys.stderr = (os.fdopen(n, "w", encoding="utf-8", closefd=False) for n in (1, 2))
    sys.argv = ["ocm", *arguments]
    if first is not None:
        first()
    from ocm.cli.app import run

    run()


# What a process may do before its command. It is found by its name, in a module that can be
# imported: tests cannot.


def learn_quickly():
    """Let the classifier of an evaluation learn next to nothing, which takes no time."""
    from ocm.evaluation import classifier

    classifier.train_classifier = partial(classifier.train_classifier, num_steps=5)


def be_one_of_two(rank, port):
    """Be one of two processes, as torchrun starts them."""
    os.environ.update(environment_of(rank, port))


def attempt_by_two(arguments, root, *, killed=None, after=None):
    """Return the attempts of two processes, as torchrun starts them.

    Args:
        arguments: Of the command line, the same for both.
        root: Where the files are made of what they say.
        killed: The number of the one that is killed; None for none.
        after: When it is, as in :func:`attempt`.
    """
    port = free_port()
    with ThreadPoolExecutor(2) as pool:
        started = [
            pool.submit(
                attempt,
                arguments,
                root / f"process-{rank}",
                after=after if rank == killed else None,
                first=partial(be_one_of_two, rank, port),
            )
            for rank in range(2)
        ]
        return [process.result() for process in started]


def finished(command, folder, *, first=None):
    """Return the attempt of a command that nobody kills, in a new folder.

    Args:
        command: Makes the arguments for a folder, which it may fill first.
        folder: That folder.
        first: As in :func:`attempt`.
    """
    folder.mkdir()
    found = attempt(command(folder), folder, first=first)
    assert found.status == 0, found.said
    return found


def killings(command, whole, *, kills, seed, first=None):
    """Give a command again and again, killed at random moments, until it was killed often enough.

    Yields every attempt, after each of which every file must be whole. One that ended by itself is
    the last in its folder, and the last folder is brought to its end.

    Args:
        command: As in :func:`finished`.
        whole: The same command that nobody killed. The folders are made beside its own; the first
            moments in them are spread over its seconds, further ones over what may be left.
        kills: How often the command is killed.
        seed: Of the moments.
        first: As in :func:`attempt`.
    """
    chance = random.Random(seed)
    place = chance.random()
    left, begun = kills, 0
    while left > 0:
        begun += 1
        place = (place + _GOLDEN) % 1.0  # no two of these are close
        folder = whole.folder.with_name(f"folder-{begun}")
        folder.mkdir()
        arguments, moment, spent = command(folder), place * whole.seconds, 0.0
        killed = True
        while killed:
            found = attempt(arguments, folder, after=moment if left else None, first=first)
            killed = found.killed
            left -= killed
            spent += found.seconds
            moment = chance.uniform(0.0, max(whole.seconds - spent, 0.1 * whole.seconds))
            assert_whole(folder)
            yield found
    assert left == 0, "nobody else kills"
