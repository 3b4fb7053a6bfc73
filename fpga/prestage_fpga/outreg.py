"""Let block RAMs of an ECP5 keep what they read in registers of their own.

A word that is read from a ``DP16KD`` comes 5.8 ns after the clock, most of a cycle at 100 MHz, and
where it goes to a register without any logic between, the way there must be short. The block RAM
has such registers itself, from which it comes in a fraction of that time, but yosys does not use
them. :func:`merge_output_registers` moves the registers of a netlist there: those that a memory's
output bits go to and nothing else does, all with one enable and without a reset. An enable that is
low where they load is inverted by a cell of its own. Each bit stays what it is in every cycle.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any

__all__ = ["merge_output_registers"]

_BITS = 18


def _output_bits(cell: dict[str, Any], ports: str) -> list[int]:
    """Nets of a memory's output bits."""
    connections = cell["connections"]
    bits = (connections.get(f"DO{port}{n}", [None])[0] for port in ports for n in range(_BITS))
    return [bit for bit in bits if isinstance(bit, int)]


def _register_of(
    readers: list[tuple[str, str]], cells: dict[str, Any], clock: list[Any]
) -> tuple[str, tuple[Any, bool]] | None:
    """The register that alone reads a bit, its enable and whether that is inverted, if there is."""
    if len(readers) != 1:
        return None
    name, port = readers[0]
    cell = cells[name]
    parameters, connections = cell["parameters"], cell["connections"]
    if (
        cell["type"] != "TRELLIS_FF"
        or port != "DI"
        or connections.get("LSR", ["0"]) != ["0"]
        or parameters["REGSET"] != "RESET"
        or parameters["CLKMUX"] != "CLK"
        or connections["CLK"] != clock
    ):
        return None
    mode = parameters.get("CEMUX", "1").strip()
    if mode == "1":
        return name, ("1", False)
    if mode in ("CE", "INV"):
        return name, (connections["CE"][0], mode == "INV")
    return None


def _inverted(top: dict[str, Any], net: Any) -> int:
    """A net that is the opposite of another, from a cell of its own."""
    name = f"$outreg$not${net}"
    cells = top["cells"]
    if name not in cells:
        named = (each["bits"] for each in (*top["netnames"].values(), *top["ports"].values()))
        wired = (bits for cell in cells.values() for bits in cell["connections"].values())
        nets = {bit for bits in (*named, *wired) for bit in bits if isinstance(bit, int)}
        cells[name] = {
            "hide_name": 1,
            "type": "LUT4",
            "parameters": {"INIT": "0101010101010101"},
            "attributes": {},
            "port_directions": {**dict.fromkeys("ABCD", "input"), "Z": "output"},
            "connections": {
                "A": [net],
                **{port: ["0"] for port in "BCD"},
                "Z": [1 + max(nets)],
            },
        }
    return cells[name]["connections"]["Z"][0]


def merge_output_registers(netlist: dict[str, Any]) -> int:
    """Move registers behind block RAMs into them, in place.

    Parameters
    ----------
    netlist : dict
        What ``write_json`` of yosys gives after ``synth_ecp5``.

    Returns
    -------
    :class:`int`
        Registers that are no cells of their own any more.

    Raises
    ------
    ValueError
        If the netlist has no top module.
    """
    tops = [m for m in netlist["modules"].values() if m.get("attributes", {}).get("top")]
    if len(tops) != 1:
        raise ValueError(f"Netlist must have one top module, not {len(tops)}")
    top = tops[0]
    cells = top["cells"]
    readers: dict[int, list[tuple[str, str]]] = defaultdict(list)
    for name, cell in cells.items():
        for port, bits in cell["connections"].items():
            if cell["port_directions"].get(port) != "output":
                for bit in bits:
                    readers[bit].append((name, port))
    for name, port in top["ports"].items():
        if port["direction"] != "input":
            for bit in port["bits"]:
                readers[bit].append((name, "port"))
    merged = 0
    for cell in [cell for cell in cells.values() if cell["type"] == "DP16KD"]:
        # Where a word is 36 bits wide, both halves are read by port B.
        wide = int(cell["parameters"]["DATA_WIDTH_A"], 2) == 2 * _BITS
        for ports in ("AB",) if wide else ("A", "B"):
            if any(cell["parameters"][f"REGMODE_{port}"] != "NOREG" for port in ports):
                continue
            clock = cell["connections"].get(f"CLK{ports[-1]}")
            used = [bit for bit in _output_bits(cell, ports) if readers[bit]]
            found = [_register_of(readers[bit], cells, clock) for bit in used]
            registers = [register for register in found if register is not None]
            if not registers or len(registers) < len(found):
                continue
            enables = {enable for _, enable in registers}
            if len(enables) != 1:
                continue
            ((enable, inverted),) = enables
            if inverted:
                enable = _inverted(top, enable)
            outputs = {
                bit: cells[name]["connections"]["Q"]
                for bit, (name, _) in zip(used, registers, strict=True)
            }
            for port in ports:
                cell["parameters"][f"REGMODE_{port}"] = "OUTREG"
                cell["connections"][f"OCE{port}"] = [enable]
                cell["port_directions"][f"OCE{port}"] = "input"
                for n in range(_BITS):
                    output = cell["connections"].get(f"DO{port}{n}")
                    if output and output[0] in outputs:
                        cell["connections"][f"DO{port}{n}"] = outputs[output[0]]
            for name, _ in registers:
                del cells[name]
            merged += len(registers)
    return merged
