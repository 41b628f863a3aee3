"""The commit that a record names is that of the repository that holds the code, or none."""

import importlib.util
import shutil
import subprocess

import pytest
import torch

from ocm.evaluation import environment as here

CPU = torch.device("cpu")


def git(root, *arguments):
    name = ["-c", "user.name=n", "-c", "user.email=e"]
    answer = subprocess.run(
        ["git", "-C", root, *name, *arguments], capture_output=True, text=True, check=True
    )
    return answer.stdout.strip()


@pytest.fixture
def repository(tmp_path):
    if shutil.which("git") is None:
        pytest.skip("needs git")
    git(tmp_path, "init", "--quiet")
    (tmp_path / "README.md").write_text("a project\n")
    (tmp_path / ".gitignore").write_text(".venv\n")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "--quiet", "--message", "first")
    return tmp_path


def installed(folder):
    """The module, copied into a folder as pip would or as a checkout has it."""
    file = folder / "ocm" / "evaluation" / "environment.py"
    file.parent.mkdir(parents=True)
    shutil.copy(here.__file__, file)
    spec = importlib.util.spec_from_file_location("environment_elsewhere", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("folder", [".venv/lib/python3/site-packages", "vendored"])
def test_a_repository_around_the_package_is_not_its_own(repository, folder):
    found = installed(repository / folder).environment(CPU)
    assert (found["commit"], found["uncommitted_changes"]) == (None, False)


def test_a_checkout_names_its_commit_and_what_was_changed(repository):
    module = installed(repository)
    git(repository, "add", ".")
    git(repository, "commit", "--quiet", "--message", "second")
    commit = git(repository, "rev-parse", "HEAD")
    (repository / "README.md").write_text("prose is not measured\n")
    (repository / "benchmarks" / "results").mkdir(parents=True)
    (repository / "benchmarks" / "results" / "earlier.json").write_text("{}")
    found = module.environment(CPU)
    assert (found["commit"], found["uncommitted_changes"]) == (commit, False)
    (repository / "other.py").write_text("x = 1\n")
    assert module.environment(CPU)["uncommitted_changes"] is True


def test_outside_of_a_repository_there_is_no_commit(tmp_path):
    found = installed(tmp_path).environment(CPU)
    assert (found["commit"], found["uncommitted_changes"]) == (None, False)
    assert found["torch"] == torch.__version__
    assert found["processor"]
