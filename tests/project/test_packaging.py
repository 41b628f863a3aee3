"""What the wheel holds, and what importing it needs."""

import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def wheel_files(tmp_path_factory):
    out, source = tmp_path_factory.mktemp("wheel"), tmp_path_factory.mktemp("source")
    for name in ("hessdiag", "kernels", "ocm"):
        shutil.copytree(ROOT / name, source / name)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    subprocess.run(
        [
            *(sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps"),
            *("--no-build-isolation", "--wheel-dir", str(out), str(source)),
        ],
        check=True,
    )
    (wheel,) = out.glob("*.whl")
    return zipfile.ZipFile(wheel).namelist()


def test_the_wheel_holds_the_packages_and_no_top_level_kernels(wheel_files):
    packages = {name.rpartition("/")[0] for name in wheel_files if name.endswith("__init__.py")}
    assert packages == {
        *("hessdiag", "hessdiag/kernels"),
        *("ocm", "ocm/checkpoints", "ocm/cli", "ocm/covariances"),
        *("ocm/covariances/learned", "ocm/diffusion", "ocm/diffusion/backbones"),
        *("ocm/evaluation", "ocm/integrations", "ocm/likelihoods"),
        *("ocm/sampling", "ocm/training"),
    }
    assert {name for name in wheel_files if name.endswith("py.typed")} == {
        "hessdiag/py.typed",
        "hessdiag/kernels/py.typed",
        "ocm/py.typed",
    }


def test_the_wheel_holds_every_module(wheel_files):
    expected = {
        f"{target}/{file.relative_to(ROOT / source).as_posix()}"
        for source, target in (
            ("hessdiag", "hessdiag"),
            ("kernels", "hessdiag/kernels"),
            ("ocm", "ocm"),
        )
        for file in (ROOT / source).rglob("*.py")
    }
    assert expected <= set(wheel_files)


EXTRAS = [
    *("accelerate", "datasets", "diffusers", "huggingface_hub", "matplotlib", "PIL", "pynvml"),
    *("pytest", "pytest_benchmark", "safetensors", "scipy", "sklearn", "torchdiffeq"),
    *("torchmetrics", "tqdm", "typer"),
]


@pytest.mark.parametrize(("package", "absent"), [("hessdiag", [*EXTRAS, "ocm"]), ("ocm", EXTRAS)])
def test_importing_needs_none_of_the_extras(package, absent, tmp_path):
    block = f"import sys; sys.modules.update(dict.fromkeys({absent!r})); import {package}"
    subprocess.run([sys.executable, "-c", block], check=True, cwd=tmp_path)


def test_the_command_line_says_what_it_needs(tmp_path):
    code = "import sys; sys.modules['typer'] = None; import ocm.__main__ as m; m.main()"
    answer = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, check=False
    )
    assert answer.returncode == 1
    assert "pip install 'hessdiag[ocm]'" in answer.stderr
    assert "Traceback" not in answer.stderr


def test_the_kernels_have_no_name_of_their_own(tmp_path):
    answer = subprocess.run(
        [sys.executable, "-c", "import hessdiag.kernels, kernels"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        check=False,
    )
    assert "No module named 'kernels'" in answer.stderr


def test_without_triton_the_reference_works_and_a_kernel_says_why_not(tmp_path):
    code = """
import sys
sys.modules["triton"] = None
import torch, hessdiag
from hessdiag.kernels.rademacher import rademacher_triton
print(hessdiag.hutchinson(torch.sin, torch.zeros(1, 2), 1))
rademacher_triton(torch.tensor(0), (1, 1, 1), 0, 0, torch.float32)
"""
    answer = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, check=False
    )
    assert "tensor([[1., 1.]])" in answer.stdout
    assert "triton is not installed" in answer.stderr


def test_the_lowest_versions_are_one_environment():
    """`make test-lowest` takes each lower bound that pyproject.toml names."""
    text = (ROOT / "pyproject.toml").read_text()
    bounds = dict(re.findall(r'"([a-z][a-z-]+)>=([0-9.]+)[";]', text))
    tools = {"setuptools", "mypy", "ruff"}  # of a build, and of `make lint`
    lines = (ROOT / "constraints-lowest.txt").read_text().splitlines()
    pins = dict(line.split("==") for line in lines if line and not line.startswith("#"))
    assert pins.keys() == bounds.keys() - tools
    for name, bound in bounds.items():
        if name not in tools:
            assert f"{pins[name]}.".startswith(f"{bound}."), name
