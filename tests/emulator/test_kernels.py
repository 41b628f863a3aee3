"""The tests of the kernels once more, on what Triton compiles for a GPU."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# As `make soak` installs it: the oldest version that the kernels are for.
OLDER_TRITON = ROOT / ".cache" / "triton-3.6"

# Each kernel, and between them every type, alignment, layout, and size of numbers.
SPECIALISATIONS = [
    "test_signs[torch.float32-5x2x12-odd]",
    "test_normals[torch.float32-19x3x7-odd]",
    "test_moments[torch.float16-1x3x64-aligned]",
    "test_loss_and_gradient[torch.bfloat16-1x3x64-aligned]",
    "test_step[per element-torch.bfloat16-16x1x72-aligned]",
]
LARGE = ["test_signs[2147483948-3]", "test_step[False-1-2147487747]"]
SUBSET = [
    f"tests/kernels/emulated/{file}.py::{test}"
    for file, tests in (("test_specialisations", SPECIALISATIONS), ("test_large", LARGE))
    for test in tests
]


def emulate(arguments, older=False):
    """Run tests of the kernels with ``--emulate``; return how many passed, and the launches."""
    pytest.importorskip("triton", reason="triton has no wheels for this platform")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    if older:
        paths = [str(OLDER_TRITON), environment.get("PYTHONPATH", "")]
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


def test_a_few_of_the_kernels_as_compiled():
    passed, launches, _ = emulate(SUBSET)
    assert passed == len(SUBSET)
    # Moments are computed twice, and the loss has a gradient.
    assert launches == len(SUBSET) + 2


# Without the tests of machine code, which emulate nothing.
ALL = ["tests/kernels", "--ignore", "tests/kernels/test_machine_code.py"]


@pytest.mark.soak
def test_all_kernels_as_compiled():
    _, launches, _ = emulate(ALL)
    assert launches >= 400


@pytest.mark.soak
def test_all_kernels_as_compiled_by_an_older_triton():
    if not OLDER_TRITON.is_dir():
        pytest.skip(f"needs triton 3.6.0 in {OLDER_TRITON}, which `make soak` installs")
    _, launches, version = emulate(ALL, older=True)
    assert launches >= 400
    assert version == "3.6.0"
