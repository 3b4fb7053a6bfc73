"""What a memory shows where a row is read in the cycle of its write.

Memories with the attribute ``no_rw_check`` promise that nobody looks at that: synthesis then leaves
out the logic that would give the old row, and block RAM gives anything. Simulators give the old
row, so that no bench would notice a broken promise. Hence the Verilog of the benches gives the row
with all its bits turned over.
"""

import re

__all__ = ["poison_collisions"]

_MODULE = re.compile(r"^module .*?^endmodule$", re.DOTALL | re.MULTILINE)
_MEMORY = re.compile(
    r"^ *\(\* no_rw_check = .*\*\)\n(?: *\(\*.*\*\)\n)*"
    r" *reg (?:\[\d+:0\] )?(?P<name>\S+) *\[\d+:0\];$",
    re.MULTILINE,
)


def poison_collisions(text: str) -> str:
    """Verilog with poisoned collisions in the memories that say ``no_rw_check``.

    Parameters
    ----------
    text : :class:`str`
        Verilog as Amaranth writes it.

    Raises
    ------
    ValueError
        If a memory's ports are written in another way than expected.
    """
    return _MODULE.sub(lambda module: _poison_module(module[0]), text)


def _poison_module(text: str) -> str:
    for memory in [found["name"] for found in _MEMORY.finditer(text)]:
        text = _poison_memory(text, memory)
    return text


def _poison_memory(text: str, memory: str) -> str:
    name = re.escape(memory)
    write = re.compile(
        rf"^ *if \((?P<enable>.*)\)\n *{name} ?\[(?P<row>.*)\] <= .*;$", re.MULTILINE
    )
    writes = [(found["enable"], found["row"]) for found in write.finditer(text)]
    if len(writes) != len(re.findall(rf"^ *{name} ?\[.*\] <= ", text, re.MULTILINE)):
        raise ValueError(f"Memory {memory} must be written under a condition on the line before")

    def poisoned(read: re.Match[str]) -> str:
        row = read["row"]
        meets = " || ".join(f"(({enable}) && ({at}) == ({row}))" for enable, at in writes)
        word = f"{memory} [{row}]"
        return f"{read['start']}({meets}) ? ~{word} : {word};"

    read = re.compile(rf"^(?P<start> *\S+ ? *<= ){name} ?\[(?P<row>.*)\];$", re.MULTILINE)
    return read.sub(poisoned, text) if writes else text
