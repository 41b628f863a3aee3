"""The site's reference has every public name once, and each says what its reader needs."""

import ast
import inspect
import re
from collections import Counter
from pathlib import Path
from textwrap import dedent

import pytest

import hessdiag
import hessdiag.kernels
import ocm

ROOT = Path(__file__).parents[2]
PAGES = ROOT / "docs" / "api"
PACKAGES = {"hessdiag": hessdiag, "kernels": hessdiag.kernels, "ocm": ocm}
PUBLIC = [(package, name) for package in PACKAGES.values() for name in package.__all__]


def sections(thing):
    """The sections of a docstring by name, without their indentation."""
    parts = re.split(r"^(\w+):\n", inspect.cleandoc(thing.__doc__ or ""), flags=re.MULTILINE)
    return {name: dedent(text) for name, text in zip(parts[1::2], parts[2::2], strict=True)}


def arguments(thing):
    """The names of its arguments, but for those that a class it extends has documented."""
    bases = thing.__mro__[1:] if inspect.isclass(thing) else ()
    inherited = {name for base in bases for name in inspect.signature(base.__init__).parameters}
    return {
        name
        for name in inspect.signature(thing).parameters
        if not name.startswith("_") and name not in inherited - {"args", "kwargs"}
    }


@pytest.mark.parametrize("page", PACKAGES)
def test_a_page_lists_every_name_of_its_package_once(page):
    listed = re.findall(r"^   (\w+)$", (PAGES / f"{page}.md").read_text(), re.MULTILINE)
    assert Counter(listed) == Counter(PACKAGES[page].__all__)


@pytest.mark.parametrize(
    ("package", "name"), PUBLIC, ids=[f"{package.__name__}.{name}" for package, name in PUBLIC]
)
def test_every_public_name_is_documented(package, name):
    """Its arguments or attributes, and an example, which the tests of docstrings run."""
    thing = getattr(package, name)
    if not (inspect.isclass(thing) or inspect.isfunction(thing)):
        # A value, which the comment above it in its module documents.
        assert re.search(
            rf"^#: .+\n{name}\b", inspect.getsource(inspect.getmodule(type(thing))), re.M
        )
        return
    found = sections(thing)
    assert found["Example"]
    if not (inspect.isclass(thing) and getattr(thing, "_is_protocol", False)):
        listed = "\n".join(found.get(name, "") for name in ("Args", "Attributes"))
        assert arguments(thing) <= set(re.findall(r"^(\w+):", listed, re.MULTILINE))
        # A letter alone is the number of an empty list to Sphinx, which leaves it out.
        assert not re.search(r"^\w+: \w[.)]$", listed, re.MULTILINE)


@pytest.mark.parametrize("folder", PACKAGES)
def test_formulas_and_code_are_blocks(folder):
    """What is indented and does not follow a "::" is a quotation, whose lines Sphinx joins."""
    for file in (ROOT / folder).rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)):
                prose = re.split(r"^\w+:$", ast.get_docstring(node) or "", flags=re.MULTILINE)[0]
                quoted = re.search(r"^\S.*(?<!::)\n\n +\S.*", prose, re.MULTILINE)
                assert quoted is None, f"{file}: {quoted[0]}"
