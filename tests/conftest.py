"""Shared set-up. Without a CUDA device Triton's kernels are interpreted, or emulated if asked."""

import os
import signal
import sys
from collections import Counter
from importlib.util import find_spec
from pathlib import Path

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported

import pytest
from torch.utils._python_dispatch import _disable_current_modes

# A shell starts what runs in the background with Ctrl-C ignored, which tests of it would wait for.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# TF32 keeps 10 bits of each factor, and is on by default for convolutions: an estimate is then
# 1e-3 from that of the CPU, which is all that the tests leave. The older of PyTorch's two ways to
# say so, since what reads it in that way raises once the newer one was used.
torch.backends.cudnn.allow_tf32 = False
torch.backends.cuda.matmul.allow_tf32 = False

# Property-based tests draw the same examples in every run, and `make soak` draws more of them
# (--hypothesis-profile=thorough). A GPU machine may lack hypothesis.
if find_spec("hypothesis"):
    from hypothesis import HealthCheck, settings
    from hypothesis.internal.conjecture import providers

    # It draws numbers from the code that is imported, which depends on the tests before.
    if hasattr(providers, "_get_local_constants"):
        providers._get_local_constants = lambda: providers._local_constants

    for profile, count in {"quick": 15, "thorough": 200}.items():
        settings.register_profile(
            profile,
            max_examples=count,
            deadline=None,  # nothing here is timed
            derandomize=True,
            database=None,
            suppress_health_check=[HealthCheck.too_slow],
        )
    settings.load_profile("quick")

EMULATED_CACHE = Path(__file__).parents[1] / ".cache" / "triton-emulated"


def pytest_addoption(parser):
    parser.addoption(
        "--vary-rounding",
        action="store_true",
        help="let products of matrices round as they may on another machine (CONTRIBUTING.md)",
    )
    parser.addoption(
        "--emulate",
        action="store_true",
        help="run the Triton kernels as compiled for a GPU, by tests/helpers/emulator",
    )


def pytest_ignore_collect(collection_path, config):
    """Tests of what only compiled kernels show are no tests without ``--emulate``."""
    if collection_path.name == "emulated" and not config.getoption("--emulate"):
        return True
    return None


def pytest_configure(config):
    if not config.getoption("--emulate"):
        return
    if "hessdiag.kernels" in sys.modules:
        raise pytest.UsageError("--emulate must be known before hessdiag.kernels is imported")
    os.environ.pop("TRITON_INTERPRET", None)
    os.environ.setdefault("TRITON_CACHE_DIR", str(EMULATED_CACHE))
    import emulator

    emulator.install()


def pytest_terminal_summary(terminalreporter, config):
    if not config.getoption("--emulate"):
        return
    import emulator
    import triton

    made = emulator.launches()
    programs = {launch.key: launch.kernel for launch in made}
    kernels = ", ".join(f"{name} {count}" for name, count in Counter(programs.values()).items())
    terminalreporter.write_line(
        f"emulated {len(made)} launches of {len(programs)} programs by triton "
        f"{triton.__version__}: {kernels}"
    )


@pytest.fixture(scope="session", autouse=True)
def rounding(request):
    """Under ``--vary-rounding``, that of a matrix library whose results depend on the shapes."""
    if not request.config.getoption("--vary-rounding"):
        yield
        return
    from varied_rounding import VariedRounding

    with VariedRounding():
        yield


# What tells a dispatch mode, which --vary-rounding is, from none, what fails within any, and what
# compares with another thread, which has none.
_OF_NO_MODE = (
    *("hessdiag.kernels._checks", "hessdiag.kernels.philox", "inference mode made"),
    "in_a_thread",
)


@pytest.fixture(autouse=True)
def without_modes(request):
    """No ``--vary-rounding`` around the tests that no dispatch mode may be around."""
    if any(name in request.node.name for name in _OF_NO_MODE):
        with _disable_current_modes():
            yield
    else:
        yield


def pytest_collection_modifyitems(config, items):
    if torch.cuda.is_available() and not config.getoption("--emulate"):
        return
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


@pytest.fixture
def kernel_device(request):
    """Device on which the Triton kernels run: a GPU, or the CPU, interpreted or emulated."""
    emulated = request.config.getoption("--emulate")
    return "cuda" if torch.cuda.is_available() and not emulated else "cpu"


@pytest.fixture
def unet():
    """A U-Net with random weights whose layers all matter, attention included."""
    from diffusers import UNet2DModel

    torch.manual_seed(0)
    return UNet2DModel(
        sample_size=8,
        in_channels=2,
        out_channels=2,
        block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        norm_num_groups=4,
        attention_head_dim=8,
    )
