"""The C++ that Verilator writes, as few files to compile.

Verilator spreads a design over many files, so that many compilers can work on it. Each reads the
model's header and Verilator's again, which for the blocks of this project takes as long as the code
itself. Neither a precompiled header nor one file for all is as quick as one file for the code that
runs every cycle and one for the code that runs once: compilers get slow in functions that are
optimized for nothing.
"""

from __future__ import annotations

import re
from pathlib import Path

FAST = ("VM_CLASSES_FAST", "VM_SUPPORT_FAST")
"""Lists of the code that runs every cycle."""

SLOW = ("VM_CLASSES_SLOW", "VM_SUPPORT_SLOW")
"""Lists of the code that runs once."""


def listed(folder: Path, *lists: str) -> list[str]:
    """Names of C++ files, without suffix, in lists of Verilator's ``Vtop_classes.mk``."""
    text = (folder / "Vtop_classes.mk").read_text()
    names = []
    for name in lists:
        (words,) = re.findall(rf"^{name} \+= \\\n((?:.*\\\n)*)", text, re.MULTILINE)
        names += [word for word in words.split() if word != "\\"]
    return names


def merge(folder: Path, name: str, *lists: str, parts: int = 1) -> list[str]:
    """Write files that include those of lists, and return their names without suffix.

    Parameters
    ----------
    folder : :class:`~pathlib.Path`
        Where Verilator wrote, as it does with ``--prefix Vtop``.
    name : :class:`str`
        Beginning of the new files' names.
    lists : :class:`str`
        Lists of ``Vtop_classes.mk``, such as :data:`FAST`.
    parts : :class:`int`
        Most files to write, of sizes as equal as whole files allow.
    """
    bins: list[list[str]] = [[] for _ in range(parts)]
    sizes = [0] * parts
    sources = {
        source: (folder / f"{source}.cpp").stat().st_size for source in listed(folder, *lists)
    }
    for source in sorted(sources, key=lambda source: (-sources[source], source)):
        smallest = sizes.index(min(sizes))
        bins[smallest].append(source)
        sizes[smallest] += sources[source]
    names = []
    for number, members in enumerate(bins):
        if members:
            names.append(f"{name}_{number}")
            text = "".join(f'#include "{member}.cpp"\n' for member in members)
            (folder / f"{names[-1]}.cpp").write_text(text)
    return names
