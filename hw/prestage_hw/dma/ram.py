"""Memory behind an AXI4 port that reads and writes."""

from amaranth import Module, Signal
from amaranth.lib import memory, wiring
from amaranth.lib.wiring import In

from prestage_hw.contract.checks import require_integer
from prestage_hw.contract.params import require_config

from .axi import AXI4Signature

__all__ = ["AXIMemory"]


class AXIMemory(wiring.Component):
    """Serve AXI4 bursts, one at a time, from a memory on chip or of a simulation.

    A beat every second cycle of a read, one a cycle of a write; reads go first where both wait. A
    beat beyond the end carries DECERR and is not written. Bursts must be incrementing and of full
    width.

    Parameters
    ----------
    config : :class:`DeviceConfig`
        Device whose address and data widths apply.
    size : :class:`int`
        Bytes: a whole number of beats, at least one.

    Members
    -------
    bus : ``In(AXI4Signature(...))``
        The port.

    Raises
    ------
    TypeError
        If ``config`` is not a :class:`DeviceConfig`, or ``size`` not an integer.
    ValueError
        If ``size`` is not a whole number of beats.
    """

    RESPONSE_OKAY = 0
    RESPONSE_DECERR = 3

    def __init__(self, *, config, size):
        require_config(config)
        require_integer("Memory size", size, low=config.data_bytes, high=1 << 32)
        if size % config.data_bytes:
            raise ValueError(
                f"Memory size must be a whole number of {config.data_bytes}-byte beats,"
                f" not {size} bytes"
            )
        self.config = config
        self.size = size
        signature = AXI4Signature(address_bits=config.address_bits, data_bits=config.bits("data"))
        super().__init__({"bus": In(signature)})

    def elaborate(self, platform):
        m = Module()
        bus = self.bus
        depth = self.size // self.config.data_bytes
        low = self.config.data_bytes.bit_length() - 1
        m.submodules.contents = contents = memory.Memory(
            shape=self.config.bits("data"), depth=depth, init=[]
        )
        read, write = contents.read_port(), contents.write_port(granularity=8)

        word = Signal(len(bus.araddr) - low)
        left = Signal(8)
        number = Signal.like(bus.arid)
        beyond, failed = Signal(), Signal()
        m.d.comb += [
            beyond.eq(word >= depth),
            read.addr.eq(word),
            write.addr.eq(word),
            write.data.eq(bus.wdata),
        ]
        with m.FSM():
            with m.State("Idle"):
                m.d.comb += [bus.arready.eq(1), bus.awready.eq(~bus.arvalid)]
                m.d.sync += failed.eq(0)
                with m.If(bus.arvalid):
                    m.d.sync += [
                        word.eq(bus.araddr >> low),
                        left.eq(bus.arlen),
                        number.eq(bus.arid),
                    ]
                    m.next = "Fetch"
                with m.Elif(bus.awvalid):
                    m.d.sync += [word.eq(bus.awaddr >> low), number.eq(bus.awid)]
                    m.next = "Write"
            with m.State("Fetch"):
                m.next = "Read"
            with m.State("Read"):
                m.d.comb += [
                    bus.rvalid.eq(1),
                    bus.rdata.eq(read.data),
                    bus.rid.eq(number),
                    bus.rlast.eq(left == 0),
                ]
                with m.If(beyond):
                    m.d.comb += bus.rresp.eq(self.RESPONSE_DECERR)
                with m.If(bus.rready):
                    m.d.sync += [word.eq(word + 1), left.eq(left - 1)]
                    m.next = "Fetch"
                    with m.If(left == 0):
                        m.next = "Idle"
            with m.State("Write"):
                m.d.comb += bus.wready.eq(1)
                with m.If(bus.wvalid):
                    m.d.comb += write.en.eq(bus.wstrb & (~beyond).replicate(len(bus.wstrb)))
                    m.d.sync += [word.eq(word + 1), failed.eq(failed | beyond)]
                    with m.If(bus.wlast):
                        m.next = "Answer"
            with m.State("Answer"):
                m.d.comb += [bus.bvalid.eq(1), bus.bid.eq(number)]
                with m.If(failed):
                    m.d.comb += bus.bresp.eq(self.RESPONSE_DECERR)
                with m.If(bus.bready):
                    m.next = "Idle"
        return m
