"""The site's reference has every public name once, and each says what its reader needs."""

import ast
import builtins
import doctest
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


def takes_no_arguments(thing):
    """Whether a class is made by those who extend it, or by what raises it."""
    return getattr(thing, "_is_protocol", False) or issubclass(thing, Exception)


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
    if not (inspect.isclass(thing) and takes_no_arguments(thing)):
        listed = "\n".join(found.get(name, "") for name in ("Args", "Attributes"))
        assert arguments(thing) <= set(re.findall(r"^(\w+):", listed, re.MULTILINE))
        # A letter alone is the number of an empty list to Sphinx, which leaves it out.
        assert not re.search(r"^\w+: \w[.)]$", listed, re.MULTILINE)


def parts_of(thing):
    """A function, or a class and what it has of methods and properties, with their docstrings."""
    of_class = vars(thing).items() if inspect.isclass(thing) else ()
    members = {
        name: getattr(member, "fget", None) or getattr(member, "__func__", member)
        for name, member in of_class
        if not name.startswith("_")
    }
    return [(name, part) for name, part in members.items() if inspect.isfunction(part)]


def names_taken_for_granted(source):
    """Names that an example uses and neither imports nor defines."""
    nodes = list(ast.walk(ast.parse(source)))
    names = [node for node in nodes if isinstance(node, ast.Name)]
    used = {node.id for node in names if isinstance(node.ctx, ast.Load)}
    made = {node.id for node in names if not isinstance(node.ctx, ast.Load)}
    made |= {node.arg for node in nodes if isinstance(node, ast.arg)}
    naming = (ast.FunctionDef, ast.ClassDef, ast.ExceptHandler)
    made |= {node.name for node in nodes if isinstance(node, naming)}
    imports = [node for node in nodes if isinstance(node, (ast.Import, ast.ImportFrom))]
    made |= {(a.asname or a.name).split(".")[0] for node in imports for a in node.names}
    return used - made - set(dir(builtins))


def test_names_that_an_example_takes_for_granted_are_found():
    assert names_taken_for_granted("import torch\ny = [f(x) for x in torch.ones(2)]") == {"f"}
    assert names_taken_for_granted("from a import b as c\nlambda x: x + c + b") == {"b"}


@pytest.mark.parametrize(
    ("package", "name"), PUBLIC, ids=[f"{package.__name__}.{name}" for package, name in PUBLIC]
)
def test_every_example_can_be_pasted_alone(package, name):
    thing = getattr(package, name)
    for part in (thing, *(part for _, part in parts_of(thing))):
        examples = doctest.DocTestParser().get_examples(inspect.getdoc(part) or "")
        source = "".join(example.source for example in examples)
        assert names_taken_for_granted(source) == set(), part.__name__


@pytest.mark.parametrize(
    ("package", "name"), PUBLIC, ids=[f"{package.__name__}.{name}" for package, name in PUBLIC]
)
def test_every_function_says_what_it_returns(package, name):
    thing = getattr(package, name)
    if inspect.isfunction(thing):
        says = re.match(r"Return", thing.__doc__)
        assert says or "Returns" in sections(thing)


@pytest.mark.parametrize("folder", PACKAGES)
def test_formulas_and_code_are_blocks(folder):
    """What is indented and does not follow a "::" is a quotation, whose lines Sphinx joins."""
    for file in (ROOT / folder).rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)):
                prose = re.split(r"^\w+:$", ast.get_docstring(node) or "", flags=re.MULTILINE)[0]
                quoted = re.search(r"^\S.*(?<!::)\n\n +\S.*", prose, re.MULTILINE)
                assert quoted is None, f"{file}: {quoted[0]}"
