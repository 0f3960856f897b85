"""Sphinx: ``make docs`` builds these pages and the API reference from docstrings; a warning is an error."""

import os
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")  # defaults that depend on the machine are shown as without a GPU

import fastgan

project, release, copyright = "fastgan", fastgan.__version__, "the fastgan authors"
extensions = ["sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode", "myst_parser"]
html_theme = "furo"
html_title = f"fastgan {release.partition('+')[0]}"  # without the commit of a development version
autodoc_default_options = {"members": True, "member-order": "bysource"}
autodoc_typehints = "none"  # they are in the signatures
napoleon_numpy_docstring = False
myst_heading_anchors = 3
suppress_warnings = ["myst.xref_missing", "myst.header"]  # included documents link to files of the repository
exclude_patterns = ["_build"]


def bars(app, what, name, obj, options, lines):
    """In docstrings |x| is a norm, not a substitution of reStructuredText."""
    lines[:] = [re.sub(r"(``.*?``)|\|", lambda m: m.group(1) or r"\|", line) for line in lines]


def setup(app):
    app.connect("autodoc-process-docstring", bars)
