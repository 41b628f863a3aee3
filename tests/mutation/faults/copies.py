"""A copy of the project, and its tests run there."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

COPIED = ("hessdiag", "ocm", "tests", "benchmarks", "examples", "pyproject.toml")


class Copy:
    """A copy of the project, where one fault at a time is planted."""

    def __init__(self, root: Path, place: Path) -> None:
        """Copy what the tests need; the kernels lie where the installed package has them."""
        self.place = place
        self._worker: subprocess.Popen[str] | None = None
        ignored = shutil.ignore_patterns("__pycache__", "results")
        place.mkdir(parents=True)
        for name in COPIED:
            if (root / name).is_dir():
                shutil.copytree(root / name, place / name, ignore=ignored, symlinks=True)
            else:
                shutil.copy(root / name, place / name)
        kernels = place / "hessdiag" / "kernels"
        if kernels.is_symlink():
            kernels.unlink()
        if not kernels.exists():
            shutil.copytree(root / "kernels", kernels, ignore=ignored)
        (place / "kernels").symlink_to(kernels)

    def test(self, arguments: tuple[str, ...], limit: int) -> tuple[int, str]:
        """Run pytest, and return its exit status, below 0 for a signal, and what it printed.

        Args:
            arguments: Of pytest.
            limit: Seconds after which it is ended.
        """
        arguments = ("-qx", "-p", "no:cacheprovider", "--durations-min", "600", *arguments)
        run = self._alone if "--emulate" in arguments else self._by_worker
        return run(arguments, limit)

    def _by_worker(self, arguments: tuple[str, ...], limit: int) -> tuple[int, str]:
        """Have worker.py run it, which has imported what takes seconds."""
        if self._worker is None:
            self._worker = subprocess.Popen(
                [sys.executable, str(self.place / "tests" / "mutation" / "faults" / "worker.py")],
                cwd=self.place, env=_environment(), text=True,
                stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            )  # fmt: skip
        to, answers = self._worker.stdin, self._worker.stdout
        assert to is not None
        assert answers is not None
        output = self.place / "output.txt"
        print(json.dumps([str(output), limit, list(arguments)]), file=to, flush=True)
        status = int(answers.readline())
        return status, output.read_text(encoding="utf-8", errors="replace")

    def _alone(self, arguments: tuple[str, ...], limit: int) -> tuple[int, str]:
        """Run it in a Python of its own, as the emulator must be there before Triton is."""
        own = {"PYTHONPATH": str(self.place), "TRITON_CACHE_DIR": str(self.place / ".cache")}
        command = [sys.executable, "-m", "pytest", *arguments]
        try:
            done = subprocess.run(
                command, cwd=self.place, env=_environment() | own, capture_output=True, text=True,
                timeout=limit,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            return -signal.SIGALRM, f"the tests did not end within {limit} s"
        return done.returncode, done.stdout + done.stderr

    def close(self) -> None:
        """End the worker."""
        if self._worker is not None:
            self._worker.communicate()


def _environment() -> dict[str, str]:
    """Return that of this process, less what would lead to another copy of the project."""
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    # No test chosen here needs a plugin of pytest, and some take long to import.
    own = ("PYTHONDONTWRITEBYTECODE", "OMP_NUM_THREADS", "PYTEST_DISABLE_PLUGIN_AUTOLOAD")
    return kept | dict.fromkeys(own, "1")
