"""Pages that live elsewhere in the repository, and links between them and the pages of docs/.

A link is written for readers of the repository: ``../../benchmarks/results/README.md#heads``. The
site has that file as ``results/index``. Here the files are copied beside the pages, and each link
is led to the page of its file. A link to a file that the site does not have is an error.
"""

from __future__ import annotations

import posixpath
import re
import shutil
from pathlib import Path
from typing import Any

from sphinx.application import Sphinx
from sphinx.errors import ExtensionError

# Files and folders of the repository, and where the site has them.
COPIED = {
    "benchmarks/results": "results",
    "CHANGELOG.md": "project/changelog.md",
    "CONTRIBUTING.md": "project/contributing.md",
    "CODE_OF_CONDUCT.md": "project/code_of_conduct.md",
    "SECURITY.md": "project/security.md",
}
# What the site has in another form.
PAGES = {
    "README.md": "index.md",
    "benchmarks/results/README.md": "results/index.md",
    "examples": "gallery/index.rst",
}
_LINK = re.compile(r"(?<=\]\()(?![a-z]+:|#)([^)#\s]+)(?=(?:#[^)\s]*)?\))")


def copy(app: Sphinx) -> None:
    """Copy what has changed since the last build."""
    site = Path(app.srcdir)
    for source in COPIED:
        if (site.parent / source).is_dir():
            files = [file for file in (site.parent / source).rglob("*") if file.is_file()]
        else:
            files = [site.parent / source]
        for file in files:
            target = site / page_of(file.relative_to(site.parent).as_posix())
            if not target.exists() or target.stat().st_mtime < file.stat().st_mtime:
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(file, target)
                _entitle(target)


def _entitle(file: Path) -> None:
    """Give a page without a title, as the parts of a report are, that of its name."""
    if file.suffix == ".md" and not (text := file.read_text(encoding="utf-8")).startswith("# "):
        file.write_text(f"# {file.stem.replace('_', ' ').capitalize()}\n\n{text}", encoding="utf-8")


def page_of(path: str) -> str:
    """The file of the site that shows a file of the repository.

    Raises:
        KeyError: The site has no such page.

    Example:
        >>> page_of("benchmarks/results/README.md"), page_of("examples/likelihood.py")
        ('results/index.md', 'gallery/likelihood.rst')
        >>> page_of("docs/guides/diagonal.md"), page_of("benchmarks/results/cpu/heads.md")
        ('guides/diagonal.md', 'results/cpu/heads.md')
    """
    if path in PAGES:
        return PAGES[path]
    if path.startswith("docs/"):
        return path.removeprefix("docs/")
    if path.startswith("examples/"):
        return "gallery/" + path.removeprefix("examples/").removesuffix(".py") + ".rst"
    for source, place in COPIED.items():
        if path == source or path.startswith(source + "/"):
            return place + path.removeprefix(source)
    raise KeyError(path)


def file_of(page: str) -> str:
    """The file of the repository that a page of the site, without its suffix, was made of."""
    for path, place in (PAGES | COPIED).items():
        if page == place.rsplit(".", 1)[0] and place != "index.md":
            return path
    if page.startswith("results/"):
        return f"benchmarks/{page}.md"
    return f"docs/{page}.md"


def lead(app: Sphinx, page: str, source: list[str]) -> None:
    """Lead the links of a page to the site's own pages."""
    if page.startswith(("gallery/", "api/generated/")):
        return
    file = file_of(page)

    def led(found: re.Match[str]) -> str:
        path = posixpath.normpath(posixpath.join(posixpath.dirname(file), found[1]))
        try:
            return posixpath.relpath(page_of(path), posixpath.dirname(page) or ".")
        except KeyError:
            raise ExtensionError(f"{file} links to {path}, which the site does not have") from None

    source[0] = _LINK.sub(led, source[0])
    if page == "results/index":
        source[0] += "\n```{toctree}\n:hidden:\n:glob:\n\ncpu/*\ndemo/*\n```\n"


def setup(app: Sphinx) -> dict[str, Any]:
    """Copy before the pages are found, and lead links as each is read."""
    app.connect("builder-inited", copy, priority=100)
    app.connect("source-read", lead)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
