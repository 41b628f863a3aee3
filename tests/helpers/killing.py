"""Commands that are killed at random moments and given again."""

import json
import multiprocessing
import os
import random
import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

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


def attempt(arguments, folder, *, after=None, by=signal.SIGKILL, first=None, limit=300.0):
    """Run ``ocm`` with these arguments in a process of its own, which is sent a signal.

    Args:
        arguments: Of the command line.
        folder: Is returned with the attempt; beside it stands a file of what was said.
        after: Seconds until the signal, or a function that says whether the time has come; None
            for none.
        by: The signal.
        first: A function of a module, called in the process before the command.
        limit: Seconds after which the process must have ended.
    """
    log = folder.with_name(f"{folder.name}.log")
    log.unlink(missing_ok=True)
    process = _forked.Process(target=_run, args=([*map(str, arguments)], str(log), first))
    process.start()  # returns once the server, which may have to be started too, has forked it
    start = time.monotonic()
    if callable(after):
        while process.is_alive() and not after():
            assert time.monotonic() < start + limit, f"nothing came of {arguments}"
            time.sleep(0.005)
    elif after is not None:
        process.join(after)
    if after is not None and process.is_alive():
        os.kill(process.pid, by)
    process.join(limit)
    assert process.exitcode is not None, f"{arguments} did not end within {limit} seconds"
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
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }


def killings(
    command: Callable[[Path], list],
    root: Path,
    *,
    kills: int,
    seconds: float,
    seed: int,
    first: Callable[[], None] | None = None,
) -> Iterator[Attempt]:
    """Give a command again and again, killed at random moments, until it was killed often enough.

    Yields every attempt. One that ended by itself is the last in its folder, and the last folder is
    brought to its end.

    Args:
        command: Makes the arguments for a new folder, which it may fill first.
        root: Where the folders are made.
        kills: How often the command is killed.
        seconds: How long it runs if nobody kills it. The first moments in the folders are spread
            over that; further ones lie in what may be left.
        seed: Of the moments.
        first: As in :func:`attempt`.
    """
    chance = random.Random(seed)
    place = chance.random()
    left, begun = kills, 0
    while left:
        begun += 1
        place = (place + _GOLDEN) % 1.0  # no two of these are close
        folder = root / f"folder-{begun}"
        folder.mkdir()
        arguments, moment, spent = command(folder), place * seconds, 0.0
        killed = True
        while killed:
            found = attempt(arguments, folder, after=moment if left else None, first=first)
            killed = found.killed
            left -= killed
            spent += found.seconds
            moment = chance.uniform(0.0, max(seconds - spent, 0.1 * seconds))
            yield found


def assert_whole(folder: Path):
    """Raise unless every file of JSON, tensors or pixels below a folder can be read to its end."""
    from PIL import Image
    from safetensors.torch import load_file

    for file in folder.rglob("*"):
        if any(map(_is_unfinished, file.relative_to(folder).parts)):
            continue
        if file.suffix == ".json":
            json.loads(file.read_text(encoding="utf-8"))
        elif file.suffix == ".safetensors":
            load_file(file)
        elif file.suffix == ".png":
            with Image.open(file) as picture:
                picture.load()


def left_beside(folder: Path):
    """Return the files and folders that were being written when a process was killed."""
    return [path for path in folder.rglob("*") if _is_unfinished(path.name)]


def _is_unfinished(name):
    """Whether it lies beside the file or the folder that it was to become."""
    return name.startswith(".partial-") or name == "training-state.partial"
