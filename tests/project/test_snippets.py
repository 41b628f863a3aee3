"""The Python of the documents runs, and the options of their commands exist."""

import re
import shlex
from pathlib import Path

import pytest
import torch
import typer
from diffusers import DDPMPipeline, DDPMScheduler
from records import quotes

from ocm.cli import app
from ocm.training.small_unet import small_unet

ROOT = Path(__file__).parents[2]
DOCUMENTS = [ROOT / "README.md", *quotes.DOCS]
COMMANDS = typer.main.get_command(app.app).commands
(USAGE_ERROR,) = typer.BadParameter.__bases__
# What takes long stands in the documents once in these words, and is made short.
SHORTER = {
    "TrainingSettings(10_000)": "TrainingSettings(2, batch_size=4)",
    "TrainingSettings(200, ": "TrainingSettings(2, batch_size=4, ",
    "LikelihoodSettings(num_draws=2)": "LikelihoodSettings('euler', 4, num_draws=2)",
}


def fenced(text, language):
    """The blocks of a document in a language, "" for none."""
    return re.findall(rf"^```{language}\n(.*?)^```$", text, flags=re.DOTALL | re.MULTILINE)


def told_by_the_reader(folder):
    """The names that documents leave to the reader, and the models on disk that they speak of."""
    unet = small_unet((3, 16, 16), width=8)
    DDPMPipeline(unet, DDPMScheduler()).save_pretrained(folder / "path/to/a/pipeline")
    unet.save_pretrained(folder / "path/to/a/flow")
    generator = torch.Generator().manual_seed(0)
    return {"images": torch.rand(8, 3, 16, 16, generator=generator) * 2 - 1}


@pytest.mark.parametrize(
    "document",
    [file for file in DOCUMENTS if fenced(file.read_text(), "python")],
    ids=lambda file: file.stem,
)
def test_the_python_of_a_document_runs(document, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    text = document.read_text()
    for long, short in SHORTER.items():
        text = text.replace(long, short)
    names = told_by_the_reader(tmp_path)
    for block in fenced(text, "python"):
        exec(compile(block, str(document), "exec"), names)


def commands_in(text):
    """The command lines of ocm in a document, without their comments."""
    lines = [line.split("  #")[0] for block in fenced(text, "") for line in block.splitlines()]
    found = [re.search(r"(?:^|-m )ocm (.*)", line) for line in lines]
    return [shlex.split(line[1]) for line in found if line]


def parsed(arguments):
    """What a command makes of its arguments, which it checks."""
    name, *options = arguments
    if "--config" in options:  # a file that a run would have written
        at = options.index("--config")
        del options[at : at + 2]
    return COMMANDS[name].make_context(name, options).params


@pytest.mark.parametrize(
    "arguments",
    [line for file in DOCUMENTS for line in commands_in(file.read_text())],
    ids=" ".join,
)
def test_the_options_of_commands_exist(arguments):
    assert parsed(arguments)


def test_every_command_is_in_a_document():
    named = {line[0] for file in DOCUMENTS for line in commands_in(file.read_text())}
    assert named == set(COMMANDS)


@pytest.mark.parametrize("line", ["train --heads ocm", "train --head no", "sample", "fit"])
def test_commands_that_do_not_exist_are_found(line):
    with pytest.raises((KeyError, USAGE_ERROR)):
        parsed(line.split())


def test_options_that_sentences_name_exist():
    options = {o for command in COMMANDS.values() for p in command.params for o in p.opts}
    named = set()
    for file in DOCUMENTS:
        named |= set(re.findall(r"`(--[a-z-]+)", file.read_text()))
    assert named
    assert named <= options | {"--help"}
