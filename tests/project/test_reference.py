"""The site's reference has every public name once, and each says what its reader needs."""

import inspect
import re
from collections import Counter
from pathlib import Path

import pytest

import hessdiag
import hessdiag.kernels
import ocm

PAGES = Path(__file__).parents[2] / "docs" / "api"
PACKAGES = {"hessdiag": hessdiag, "kernels": hessdiag.kernels, "ocm": ocm}
PUBLIC = [(package, name) for package in PACKAGES.values() for name in package.__all__]


def sections(thing):
    return set(re.findall(r"^(\w+):$", inspect.getdoc(thing) or "", re.MULTILINE))


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
    assert "Example" in sections(thing)
    parameters = [p for p in inspect.signature(thing).parameters if p != "self"]
    if parameters and not (inspect.isclass(thing) and getattr(thing, "_is_protocol", False)):
        assert sections(thing) & {"Args", "Attributes"}
