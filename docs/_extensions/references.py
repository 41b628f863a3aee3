"""References of docstrings to what has no page of its own.

A docstring names modules and functions by where they live, ``ocm.covariances.base.Covariance``. If
the object is public elsewhere the reference leads there; if it is not public its name stands there
as code. A name that does not exist stays what it is for Sphinx: a broken reference.
"""

from __future__ import annotations

import functools
import importlib
from typing import Any

from docutils import nodes
from sphinx.addnodes import pending_xref
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment
from sphinx.pycode import ModuleAnalyzer

PUBLIC = ("hessdiag", "hessdiag.kernels", "ocm")


@functools.cache
def found(name: str) -> Any:
    """The module, or the object of a module, of a dotted name; ``None`` where there is none."""
    parts = name.split(".")
    for i in range(len(parts), 0, -1):
        try:
            thing: Any = importlib.import_module(".".join(parts[:i]))
        except ModuleNotFoundError:
            continue
        for attribute in parts[i:]:
            thing = getattr(thing, attribute, None)
        return thing
    return None


@functools.cache
def public_name(name: str) -> str | None:
    """The name that the reference documents an object under, if it does."""
    thing = found(name)
    for package in PUBLIC:
        module = importlib.import_module(package)
        for public in module.__all__:
            if getattr(module, public) is thing:
                return f"{package}.{public}"
    return None


def resolve(
    app: Sphinx, env: BuildEnvironment, node: pending_xref, content: nodes.TextElement
) -> nodes.Node | None:
    """Lead a reference to the public name of its object, or let its text stand."""
    if not isinstance(
        content, nodes.literal
    ):  # the type of an argument, which no one wrote as a link
        return content
    name = node.get("reftarget", "")
    inside = node.get("py:module") or ""
    for candidate in (name, f"{inside}.{name}"):
        if not candidate.startswith(("hessdiag", "ocm")) or found(candidate) is None:
            continue
        public = public_name(candidate)
        if public is None:
            return content
        domain = env.get_domain("py")
        return domain.resolve_xref(env, node["refdoc"], app.builder, "obj", public, node, content)
    return None


def comment(
    app: Sphinx, what: str, name: str, value: object, options: object, lines: list[str]
) -> None:
    """Put the comment above a value, in its class's module, in place of its class's docstring."""
    if what == "data":
        known = ModuleAnalyzer.for_module(type(value).__module__).find_attr_docs()
        lines[:] = known.get(("", name.rpartition(".")[2]), lines)


def setup(app: Sphinx) -> dict[str, Any]:
    """Ask here about every reference that Sphinx cannot resolve."""
    app.connect("missing-reference", resolve)
    app.connect("autodoc-process-docstring", comment, priority=900)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
