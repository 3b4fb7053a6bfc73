"""Block RAM with fixed contents behind an AXI4 read port."""

from amaranth import Module, Mux, Signal
from amaranth.lib import memory, wiring
from amaranth.lib.wiring import In

from prestage_hw.contract.params import require_config

from .axi import AXI4ReadSignature

__all__ = ["AXIBlockMemory"]


class AXIBlockMemory(wiring.Component):
    """Answer AXI4 read bursts from block RAM.

    One beat a cycle, also from burst to burst; ``latency`` cycles from an address being taken to
    the first beat. A beat beyond the contents carries DECERR. Bursts must be incrementing and of
    full width.

    Parameters
    ----------
    config : :class:`DeviceConfig`
        Parameters of the device.
    init : bytes-like
        Contents from address 0 on: a whole number of beats, at least one.

    Members
    -------
    bus : ``In(AXI4ReadSignature(...))``
        The port.

    Raises
    ------
    TypeError
        If ``config`` is not a :class:`DeviceConfig`.
    ValueError
        If ``init`` is empty or not a whole number of beats.
    """

    #: Cycles from an address being taken to its first beat.
    latency = 4

    RESPONSE_OKAY = 0
    RESPONSE_DECERR = 3

    def __init__(self, *, config, init):
        require_config(config)
        init = bytes(init)
        if not init or len(init) % config.data_bytes:
            raise ValueError(
                f"Memory contents must be a whole number of {config.data_bytes}-byte beats,"
                f" not {len(init)} bytes"
            )
        self.config = config
        self.words = [
            int.from_bytes(init[at : at + config.data_bytes], "little")
            for at in range(0, len(init), config.data_bytes)
        ]
        super().__init__(
            {
                "bus": In(
                    AXI4ReadSignature(
                        address_bits=config.address_bits,
                        data_bits=config.bits("data"),
                        id_bits=config.bits("axi_id"),
                    )
                )
            }
        )

    def elaborate(self, platform):
        m = Module()
        bus = self.bus
        depth = len(self.words)
        low = self.config.data_bytes.bit_length() - 1
        m.submodules.contents = contents = memory.Memory(
            shape=self.config.bits("data"), depth=depth, init=self.words
        )
        port = contents.read_port()

        # One burst in progress and one that waits, so that bursts follow each other without a gap.
        class Burst:
            def __init__(self, name):
                self.valid = Signal(name=f"{name}_valid")
                self.word = Signal(bus.araddr.shape().width - low, name=f"{name}_word")
                self.left = Signal(8, name=f"{name}_left")
                self.id = Signal.like(bus.arid, name=f"{name}_id")

        now = Burst("now")
        following = Burst("following")
        advance = Signal()
        fetched = Signal()
        fetched_last = Signal()
        fetched_bad = Signal()
        fetched_id = Signal.like(bus.arid)
        m.d.comb += [
            bus.arready.eq(~following.valid),
            advance.eq(~bus.rvalid | bus.rready),
            port.addr.eq(now.word),
            port.en.eq(advance),
        ]
        with m.If(advance):
            m.d.sync += [
                # Stage one: block RAM output. Stage two: the port's registers.
                fetched.eq(now.valid),
                fetched_last.eq(now.left == 0),
                fetched_bad.eq(now.word >= depth),
                fetched_id.eq(now.id),
                bus.rvalid.eq(fetched),
                bus.rdata.eq(port.data),
                bus.rlast.eq(fetched_last),
                bus.rresp.eq(Mux(fetched_bad, self.RESPONSE_DECERR, self.RESPONSE_OKAY)),
                bus.rid.eq(fetched_id),
                now.word.eq(now.word + 1),
                now.left.eq(now.left - 1),
            ]
        with m.If(~now.valid | (advance & (now.left == 0))):
            m.d.sync += [
                now.valid.eq(following.valid),
                now.word.eq(following.word),
                now.left.eq(following.left),
                now.id.eq(following.id),
                following.valid.eq(0),
            ]
        with m.If(bus.arvalid & bus.arready):
            m.d.sync += [
                following.valid.eq(1),
                following.word.eq(bus.araddr >> low),
                following.left.eq(bus.arlen),
                following.id.eq(bus.arid),
            ]
        return m
