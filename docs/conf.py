"""Sphinx configuration: Markdown pages, no network, warnings are errors (see ``make docs``)."""

import tomllib
from pathlib import Path

from pygments.lexers.special import TextLexer
from sphinx.application import Sphinx

_project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]

project = "Prestage"
author = copyright = "Prestage contributors"
version = release = _project["version"]

extensions = ["myst_parser"]
myst_enable_extensions = ["colon_fence"]
myst_heading_anchors = 3

html_theme = "alabaster"
html_theme_options = {
    "description": _project["description"],
    "fixed_sidebar": True,
    "page_width": "1100px",
}
html_static_path: list[str] = []
exclude_patterns: list[str] = []
nitpicky = True


def setup(app: Sphinx) -> None:
    """Show CSV as it is: Pygments has no lexer for it."""
    app.add_lexer("csv", TextLexer)
