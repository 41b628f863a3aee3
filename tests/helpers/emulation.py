"""Run the tests of the kernels on what Triton compiles for a GPU, in a Python of their own."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

# Without the tests of machine code, which emulate nothing.
ALL = ["tests/kernels", "--ignore", "tests/kernels/test_machine_code.py"]


def emulate(arguments, triton=None):
    """Run tests of the kernels with ``--emulate``, by the Triton in a folder where one is named.

    Returns how many passed, how many launches were emulated, and the version of Triton.
    """
    pytest.importorskip("triton", reason="triton has no wheels for this platform")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    if triton:
        paths = [str(triton), environment.get("PYTHONPATH", "")]
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    # Without the repository's root on the import path, which holds the folder kernels.
    script = (
        "import sys; sys.path = [path for path in sys.path if path]; import pytest; "
        "sys.exit(pytest.main(sys.argv[1:]))"
    )
    process = subprocess.run(
        [sys.executable, "-c", script, "-q", "-p", "no:cacheprovider", "--emulate", *arguments],
        capture_output=True,
        text=True,
        env=environment,
        cwd=ROOT,
    )
    assert process.returncode == 0, process.stdout[-5000:] + process.stderr[-2000:]
    passed = re.search(r"(\d+) passed", process.stdout)
    emulated = re.search(
        r"emulated (\d+) launches of (\d+) programs by triton (\S+):", process.stdout
    )
    assert "skipped" not in process.stdout.splitlines()[-1]
    return int(passed[1]), int(emulated[1]), emulated[3]
