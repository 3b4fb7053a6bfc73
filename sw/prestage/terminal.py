"""What the commands have in common: progress bar, warnings, and the versions that a page names."""

from __future__ import annotations

import platform
import sys
from importlib import metadata

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from . import __version__

__all__ = ["progress_bar", "versions", "warn"]


def progress_bar(unit: str, *, quiet: bool) -> Progress:
    """A bar on stderr that counts what ``unit`` names; none if ``quiet`` or without a terminal."""
    console = Console(stderr=True)
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=40),
        MofNCompleteColumn(),
        TextColumn(unit),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=quiet or not console.is_terminal,
    )


def warn(text: str) -> None:
    """Say on stderr what is odd, but no error."""
    print(f"prestage: warning: {text}", file=sys.stderr)


def versions(*packages: str) -> dict[str, str]:
    """Versions of Prestage, Python and these packages, as rows of a page's settings."""
    found = {"prestage": __version__, "python": platform.python_version()}
    found |= {name: metadata.version(name) for name in packages}
    return {f"version of {name}": version for name, version in found.items()}
