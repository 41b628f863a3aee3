"""Run pytest again and again, without importing each time what takes seconds to import.

    python tests/mutation/faults/worker.py

Run in a copy of the project. This process imports PyTorch and other libraries, but nothing of the
project, and forks a child for each line of its input: a JSON list of the file for what the child
prints, the seconds that it may take, and the arguments of pytest. It answers with a line, the exit
status of the child, below 0 where a signal ended it.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import signal
import sys
from contextlib import suppress

import pytest

# None of them starts a thread, which a child would lack.
LIBRARIES = (
    *("numpy", "torch", "torch._dynamo", "triton", "hypothesis"),
    "diffusers.models.unets.unet_2d",
)


def main() -> None:
    """Serve until the input ends."""
    # As tests/conftest.py has it, which comes after triton is imported here.
    os.environ["TRITON_INTERPRET"] = "1"
    # Without this folder, and without the project, where libraries look for a package `kernels`.
    del sys.path[0]
    for library in LIBRARIES:
        importlib.import_module(library)
    sys.path.insert(0, os.getcwd())
    os.environ["PYTHONPATH"] = os.getcwd()
    gc.freeze()  # what is here stays, and no child need look at it
    for line in sys.stdin:
        output, limit, arguments = json.loads(line)
        child = os.fork()
        if child == 0:
            _run(output, limit, arguments)
        _, status = os.waitpid(child, 0)
        with suppress(ProcessLookupError):  # what the tests started and left behind
            os.killpg(child, signal.SIGKILL)
        print(os.waitstatus_to_exitcode(status), flush=True)


def _run(output: str, limit: int, arguments: list[str]) -> None:
    """Run the tests and end the process."""
    os.setsid()
    signal.alarm(limit)
    file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(file, 1)
    os.dup2(file, 2)
    status = int(pytest.ExitCode.INTERNAL_ERROR)
    try:
        status = int(pytest.main(arguments))
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


if __name__ == "__main__":
    main()
