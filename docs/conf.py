"""How Sphinx builds the site: ``make docs``."""

from __future__ import annotations

import os
import sys
from pathlib import Path

# Before matplotlib and torch are imported: examples draw to files, and measure nothing.
os.environ.setdefault("MPLBACKEND", "Agg")

HERE = Path(__file__).parent
ROOT = HERE.parent
sys.path.append(str(HERE / "_extensions"))

from hessdiag import __version__  # noqa: E402

project = "hessdiag"
author = "the authors of hessdiag"
project_copyright = f"2026, {author}"
version = release = __version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
    "sphinx_design",
    "sphinx_gallery.gen_gallery",
    "mathml",
    "references",
    "repository",
]
exclude_patterns = ["_build", "_extensions", "sg_execution_times.rst", "**/sg_execution_times.rst"]

# Pages

myst_enable_extensions = ["colon_fence", "deflist", "dollarmath", "substitution"]
myst_heading_anchors = 4
suppress_warnings = ["myst.header"]  # parts of a report begin at its third level
highlight_language = "text"  # of blocks that name none
nitpicky = True  # a name in :class:`...` that no page documents is an error
nitpick_ignore_regex = [
    # Other packages' names, for which the network would have to be asked.
    (r"py:.*", r"(torch|numpy|np|PIL|diffusers|accelerate|matplotlib|collections|typing)\..*"),
]

# The reference

autosummary_generate = True
autosummary_imported_members = False
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_member_order = "bysource"
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 88
templates_path = ["_templates"]

# The gallery: every script of examples/ but the demo, run as it stands.

sphinx_gallery_conf = {
    "examples_dirs": str(ROOT / "examples"),
    "gallery_dirs": "gallery",
    "filename_pattern": r"\.py$",
    "ignore_pattern": r"demo\.py$",
    "within_subsection_order": "gallery_order.key",
    "abort_on_example_error": True,
    "download_all_examples": False,
    "show_signature": False,
    "remove_config_comments": True,
    "min_reported_time": 10_000,
    "capture_repr": (),
    "reset_modules": ("matplotlib",),
    "image_srcset": ["2x"],
    "copyfile_regex": r"(?!GALLERY_HEADER).*\.rst",
}

# How it looks

html_theme = "pydata_sphinx_theme"
html_title = "hessdiag"
html_static_path = ["_static"]
html_favicon = "_static/icon.svg"
html_css_files = ["site.css"]
html_show_sourcelink = False
html_math_renderer = "mathml"
html_context = {"default_mode": "auto"}  # light or dark, as the reader's system is
html_theme_options = {
    "logo": {
        "text": "hessdiag",
        "image_light": "_static/icon.svg",
        "image_dark": "_static/icon.svg",
    },
    "navbar_align": "left",
    "header_links_before_dropdown": 8,
    "navbar_persistent": ["search-button"],
    "show_toc_level": 2,
    "navigation_with_keys": False,
    "show_prev_next": True,
    "secondary_sidebar_items": ["page-toc"],
    "footer_start": ["copyright"],
    "footer_end": [],
    "pygments_light_style": "tango",
    "pygments_dark_style": "github-dark",
}
