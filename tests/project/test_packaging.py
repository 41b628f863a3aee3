"""What the distributions hold, what importing them needs, and how they are tested and released."""

import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
PYPROJECT = (ROOT / "pyproject.toml").read_text()
WORKFLOWS = {
    file.stem: yaml.safe_load(file.read_text())
    for file in sorted((ROOT / ".github" / "workflows").glob("*.yml"))
}
JOBS = [job for workflow in WORKFLOWS.values() for job in workflow["jobs"].values()]
STEPS = [step for job in JOBS for step in job.get("steps", [])]


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
    *("pytest", "pytest_benchmark", "rich", "safetensors", "scipy", "sklearn", "torchdiffeq"),
    *("torchmetrics", "typer"),
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
    """`make test-lowest` takes each lower bound that pyproject.toml names, but those of `docs`."""
    text = re.sub(r"^docs = \[.*?^\]$", "", PYPROJECT, flags=re.DOTALL | re.MULTILINE)
    bounds = dict(re.findall(r'"([a-z][a-z-]+)>=([0-9.]+)[";]', text))
    tools = {"setuptools", "mypy", "ruff"}  # of a build, and of `make lint`
    lines = (ROOT / "constraints-lowest.txt").read_text().splitlines()
    pins = dict(line.split(";")[0].split("==") for line in lines if line and line[0] != "#")
    assert pins.keys() == bounds.keys() - tools
    for name, bound in bounds.items():
        if name not in tools:
            assert f"{pins[name]}.".startswith(f"{bound}."), name


# The source distribution


def git(*arguments):
    return subprocess.run(
        ["git", "-C", ROOT, *arguments], capture_output=True, text=True, check=True
    ).stdout


@pytest.mark.skipif(
    shutil.which("git") is None or not (ROOT / ".git").exists(), reason="needs a checkout"
)
def test_the_source_distribution_is_the_repository(tmp_path):
    """Tests, benchmarks and documentation run from it as from a clone."""
    tracked = {name for name in git("ls-files", "-z").split("\0") if (ROOT / name).is_file()}
    source, out = tmp_path / "source", tmp_path / "out"
    # What builds leave behind stays out.
    left = {"docs/_build/html/index.html", "docs/project/security.md", "ocm/__pycache__/a.pyc"}
    for name in tracked:
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, source / name)
    for name in left:
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_text("")
    code = "import sys; from setuptools import build_meta; build_meta.build_sdist(sys.argv[1])"
    subprocess.run(
        [sys.executable, "-c", code, str(out)], cwd=source, check=True, capture_output=True
    )
    (archive,) = out.glob("*.tar.gz")
    with tarfile.open(archive) as files:
        held = {file.name.partition("/")[2] for file in files if file.isfile()}
    made = {"PKG-INFO", "setup.cfg"}
    assert {name for name in held if not name.startswith("hessdiag.egg-info/")} == tracked | made


# The workflows


def supported_pythons():
    low, high = re.search(r'requires-python = ">=3\.(\d+),<3\.(\d+)"', PYPROJECT).groups()
    return [f"3.{minor}" for minor in range(int(low), int(high))]


def test_the_workflows_test_every_version_of_python_that_is_supported():
    matrix = WORKFLOWS["tests"]["jobs"]["tests"]["strategy"]["matrix"]
    assert matrix["python"] == supported_pythons()
    assert re.findall(r"Python :: (3\.\d+)", PYPROJECT) == supported_pythons()
    (lowest,) = re.findall(r"test-lowest: ## .*\(Python (.*)\)", (ROOT / "Makefile").read_text())
    left_out = {entry["python"] for entry in matrix["exclude"]}
    first, last = lowest.split(" to ")
    tested = [version for version in supported_pythons() if version not in left_out]
    assert (tested[0], tested[-1]) == (first, last)
    assert {entry["constraints"] for entry in matrix["exclude"]} == {"constraints-lowest.txt"}
    named = [step.get("with", {}).get("python-version") for step in STEPS]
    named += [
        version
        for job in JOBS
        for version in job.get("strategy", {}).get("matrix", {}).get("python", [])
    ]
    assert {v for v in named if v and "matrix" not in v} <= set(supported_pythons())


def test_the_workflows_name_files_and_targets_that_exist():
    matrix = WORKFLOWS["tests"]["jobs"]["tests"]["strategy"]["matrix"]
    assert matrix["constraints"] == ["constraints.txt", "constraints-lowest.txt"]
    texts = [file.read_text() for file in (ROOT / ".github" / "workflows").glob("*.yml")]
    for name in re.findall(r"[\w./-]+\.(?:txt|toml|yml|py)\b", "\n".join(texts)):
        assert (ROOT / name).is_file(), name
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    called = [
        found for step in STEPS for found in re.findall("make ([a-z-]+)", step.get("run", ""))
    ]
    called += WORKFLOWS["soak"]["jobs"]["soak"]["strategy"]["matrix"]["target"]
    assert {"test", "lint", "docs", "soak", "mutation"} == set(called) <= set(targets)


def test_the_workflows_may_do_no_more_than_they_must():
    """Actions are those of a commit, jobs end, and only a deployment may write."""
    for step in STEPS:
        assert "run" in step or re.search(r"@[0-9a-f]{40}$", step["uses"]), step
    for workflow in WORKFLOWS.values():
        assert workflow["permissions"] == {}
    for job in JOBS:
        assert "timeout-minutes" in job or job["uses"].startswith("./")
        assert job.get("permissions") == {"contents": "read"} or "environment" in job


# The release


@pytest.fixture
def check_release(tmp_path):
    """Run the check of a tag on a copy, in which a text of a file is replaced."""
    script = ".github/scripts/check_release.py"

    def run(tag, **replaced):
        for name in (script, "pyproject.toml", "hessdiag/__init__.py", "CITATION.cff"):
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, tmp_path / name)
        changelog = re.sub(
            r"^## \[Unreleased\] - ", "## ", (ROOT / "CHANGELOG.md").read_text(), flags=re.MULTILINE
        )
        (tmp_path / "CHANGELOG.md").write_text(replaced.get("changelog", changelog))
        if "citation" in replaced:
            (tmp_path / "CITATION.cff").write_text(replaced["citation"])
        return subprocess.run(
            [sys.executable, tmp_path / script, tag], capture_output=True, text=True, check=False
        )

    return run


VERSION = re.search('^version = "(.*)"$', PYPROJECT, re.MULTILINE)[1]


def test_the_version_is_the_same_everywhere_and_in_the_changelog(check_release):
    """The entry may still say that it is not released."""
    answer = check_release(f"v{VERSION}")
    assert (answer.returncode, answer.stderr) == (0, "")


def test_a_tag_of_another_version_is_not_released(check_release):
    answer = check_release("v9.9.9")
    assert answer.returncode == 1
    for name in ("pyproject.toml", "hessdiag/__init__.py", "CITATION.cff"):
        assert f"{name} has version {VERSION}, and the tag is v9.9.9" in answer.stderr
    assert "CHANGELOG.md has no heading '## 9.9.9'" in answer.stderr


def test_a_version_that_is_not_written_down_is_not_released(check_release):
    heading = f"## [Unreleased] - {VERSION}\n"
    answer = check_release(f"v{VERSION}", changelog=heading, citation="version: 0.0.0\n")
    assert answer.stderr.splitlines() == [
        f"CITATION.cff has version 0.0.0, and the tag is v{VERSION}",
        f"CHANGELOG.md has no heading '## {VERSION}'",
    ]
    for heading in (f"## {VERSION}", f"## [{VERSION}]", f"## [{VERSION}] - 2030-01-01"):
        assert check_release(f"v{VERSION}", changelog=f"{heading}\n").returncode == 0
    assert check_release(f"v{VERSION}", changelog=f"## {VERSION}1\n").returncode == 1
