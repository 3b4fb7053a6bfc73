"""A design with the ports of the top that measures the harness from inside.

It shares nothing with the device but its ports, so that a test of the harness doesn't lean on what
the harness is for.
"""

from amaranth import Cat, Module, Signal, unsigned
from amaranth.lib import memory, stream, wiring
from amaranth.lib.wiring import In, Out

from prestage_hw.contract import DeviceConfig
from prestage_hw.layouts import RecordLayout

__all__ = ["COMMAND_BYTES", "REPLY_WORDS", "Probe"]

#: Bytes of a command: slot, arlen, bursts - 1, stall (after a beat, rready is low for so many
#: cycles), address (4 bytes, little-endian).
COMMAND_BYTES = 8

#: 16-bit words of a reply: cycles from the first address to the first and to the last beat, beats
#: that weren't OKAY, rlasts that were out of place. Each word is sent as four nibbles, most
#: significant first, with 0x40 added; a zero byte ends the reply.
REPLY_WORDS = 4


class Probe(wiring.Component):
    """Read bursts from the memory into a slot on command and report when the beats came.

    Parameters
    ----------
    config : :class:`DeviceConfig`
        Device whose port widths apply.

    Members
    -------
    rx : ``In(stream.Signature(8))``
        Commands of :data:`COMMAND_BYTES` bytes.
    tx : ``Out(stream.Signature(8))``
        Replies of :data:`REPLY_WORDS` words.
    bus : ``Out(...)``
        Memory port, the top's members.
    reads : ``In(stream.Signature(ReadRequest))``
        Consumer port: what to read.
    beats : ``Out(stream.Signature(Beat))``
        Consumer port: what was read. ``ok`` is 1 for beats that the last command wrote, if none of
        its beats failed.
    """

    def __init__(self, config):
        if not isinstance(config, DeviceConfig):
            raise TypeError(f"Configuration must be a DeviceConfig, not {config!r}")
        self.config = config
        super().__init__(
            {
                "rx": In(stream.Signature(8)),
                "tx": Out(stream.Signature(8)),
                "bus": Out(
                    wiring.Signature(
                        {
                            "arvalid": Out(1),
                            "arready": In(1),
                            "araddr": Out(config.bits("address")),
                            "arlen": Out(8),
                            "arsize": Out(3),
                            "arburst": Out(2),
                            "arid": Out(1),
                            "rvalid": In(1),
                            "rready": Out(1),
                            "rdata": In(config.bits("data")),
                            "rresp": In(2),
                            "rlast": In(1),
                            "rid": In(1),
                        }
                    )
                ),
                "reads": In(stream.Signature(RecordLayout("ReadRequest", config=config))),
                "beats": Out(stream.Signature(RecordLayout("Beat", config=config))),
            }
        )

    def elaborate(self, platform):
        m = Module()
        config = self.config
        bus = self.bus

        depth = 1 << (config.bits("slot") + config.bits("beat"))
        m.submodules.storage = storage = memory.Memory(
            shape=unsigned(config.bits("data")), depth=depth, init=[]
        )
        write = storage.write_port()
        read = storage.read_port()

        slot, length, bursts, stall = (
            Signal(8, name=n) for n in "slot length bursts stall".split()
        )
        address = Signal(32)
        command = Cat(slot, length, bursts, stall, address)
        received = Signal(range(COMMAND_BYTES))
        asked = Signal(9)
        answered = Signal(9)
        beat = Signal(8)
        written = Signal(range(depth + 1))
        pause = Signal(8)
        now = Signal(16)
        first, last, failures, misplaced = (
            Signal(16, name=n) for n in "first last failures misplaced".split()
        )
        nibbles = Signal(REPLY_WORDS * 16)
        left = Signal(range(REPLY_WORDS * 4 + 2))
        started = Signal()

        m.d.comb += [
            bus.arsize.eq(config.data_bytes.bit_length() - 1),
            bus.arburst.eq(1),
            bus.arlen.eq(length),
            bus.araddr.eq(address),
            self.tx.payload.eq(nibbles[-4:] | 0x40),
            write.addr.eq(Cat(written[: config.bits("beat")], slot[: config.bits("slot")])),
            write.data.eq(bus.rdata),
        ]
        with m.If(started):
            m.d.sync += now.eq(now + 1)
        with m.If(pause != 0):
            m.d.sync += pause.eq(pause - 1)

        with m.FSM():
            with m.State("COMMAND"):
                m.d.comb += self.rx.ready.eq(1)
                with m.If(self.rx.valid):
                    m.d.sync += [
                        command.eq(Cat(command[8:], self.rx.payload)),
                        received.eq(received + 1),
                    ]
                    with m.If(received == COMMAND_BYTES - 1):
                        m.d.sync += [
                            [s.eq(0) for s in (asked, answered, beat, written, now, started)],
                            [s.eq(0) for s in (first, last, failures, misplaced)],
                        ]
                        m.next = "FETCH"
            with m.State("FETCH"):
                m.d.comb += bus.arvalid.eq(asked <= bursts)
                m.d.comb += bus.rready.eq(pause == 0)
                with m.If(bus.arvalid & bus.arready):
                    m.d.sync += [
                        started.eq(1),
                        asked.eq(asked + 1),
                        address.eq(address + (length + 1) * config.data_bytes),
                    ]
                with m.If(bus.rvalid & bus.rready):
                    m.d.comb += write.en.eq(1)
                    m.d.sync += [
                        pause.eq(stall),
                        written.eq(written + 1),
                        last.eq(now + 1),
                        failures.eq(failures + (bus.rresp != 0)),
                        misplaced.eq(misplaced + (bus.rlast != (beat == length))),
                        beat.eq(beat + 1),
                    ]
                    with m.If(written == 0):
                        m.d.sync += first.eq(now + 1)
                    with m.If(beat == length):
                        m.d.sync += [beat.eq(0), answered.eq(answered + 1)]
                        with m.If(answered == bursts):
                            m.next = "REPLY"
            with m.State("REPLY"):
                m.d.sync += [
                    nibbles.eq(Cat(misplaced, failures, last, first)),
                    left.eq(REPLY_WORDS * 4),
                ]
                m.next = "SEND"
            with m.State("SEND"):
                m.d.comb += self.tx.valid.eq(1)
                with m.If(left == 0):
                    m.d.comb += self.tx.payload.eq(0)
                with m.If(self.tx.ready):
                    m.d.sync += [nibbles.eq(nibbles << 4), left.eq(left - 1)]
                    with m.If(left == 0):
                        m.next = "COMMAND"

        # The read port answers one cycle later; a second request waits until the beat was taken.
        ok = Signal()
        m.d.comb += [
            self.reads.ready.eq(~self.beats.valid),
            read.addr.eq(Cat(self.reads.payload.beat, self.reads.payload.slot)),
            read.en.eq(self.reads.valid & self.reads.ready),
            Cat(*self.beats.payload.data).eq(read.data),
            self.beats.payload.ok.eq(ok),
        ]
        with m.If(self.reads.valid & self.reads.ready):
            m.d.sync += [
                self.beats.valid.eq(1),
                ok.eq(
                    (self.reads.payload.slot == slot)
                    & (self.reads.payload.beat < written)
                    & (failures == 0)
                ),
            ]
        with m.Elif(self.beats.ready):
            m.d.sync += self.beats.valid.eq(0)
        return m
