"""Frames to wire bytes: CRC-32, COBS and the delimiter."""

from amaranth import Cat, Module, Mux, Signal, unsigned
from amaranth.lib import data, stream, wiring
from amaranth.lib.memory import Memory
from amaranth.lib.wiring import In, Out

from prestage_hw.contract.wire import MAX_FRAME_BYTES

from .deframer import crc32_step

__all__ = ["Framer", "RawLayout"]


class RawLayout(data.StructLayout):
    """One byte of a frame before stuffing.

    Members
    -------
    byte : ``unsigned(8)``
        Type, sequence, acknowledge or body byte.
    last : ``unsigned(1)``
        1 with the last byte of the body; the CRC follows it.
    """

    def __init__(self):
        super().__init__({"byte": unsigned(8), "last": unsigned(1)})


class Framer(wiring.Component):
    """Append the CRC, stuff with COBS and put the delimiter behind each frame.

    Each byte is written at its place in a buffer, and a run's code at the run's first place once
    the run is over, so one pass is enough. The buffer holds two frames: one drains while the next
    is stuffed. A frame of *n* bytes, CRC included, takes n + 1 cycles to stuff and n + 2 to drain,
    so one byte leaves each cycle if bytes are offered without a pause.

    Parameters
    ----------
    longest : :class:`int`
        Longest frame, CRC included, in bytes; 5 to 253.

    Members
    -------
    raw : ``In(stream.Signature(RawLayout()))``
        Bytes of frames, one after another.
    tx : ``Out(stream.Signature(8))``
        Bytes to the host.
    idle : ``Out(1)``
        1 while no frame is in the block, not even in part.

    Attributes
    ----------
    latency : :class:`int`
        Cycles from the ``last`` byte on ``raw`` to the frame's first byte on ``tx``, if no frame is
        before it.

    Raises
    ------
    TypeError
        If ``longest`` is not an integer.
    ValueError
        If ``longest`` is out of its range.
    """

    latency = 8  # four bytes of CRC, the last run's code, the flag, the memory, the output register

    def __init__(self, *, longest):
        if isinstance(longest, bool) or not isinstance(longest, int):
            raise TypeError(f"Frame length must be an integer, not {longest!r}")
        if not 5 <= longest <= MAX_FRAME_BYTES:
            raise ValueError(f"Frame length must be between 5 and {MAX_FRAME_BYTES}, not {longest}")
        self.longest = longest
        super().__init__(
            {
                "raw": In(stream.Signature(RawLayout())),
                "tx": Out(stream.Signature(8)),
                "idle": Out(1),
            }
        )

    def elaborate(self, platform):
        m = Module()
        bits = self.longest.bit_length()  # positions 0 .. longest of the stuffed frame
        m.submodules.buffer = buffer = Memory(shape=8, depth=2 << bits, init=[])
        write = buffer.write_port()
        read = buffer.read_port()

        full = Signal(2)
        lengths = [Signal(bits + 1, name=f"length_{i}") for i in range(2)]

        # Stuffing.
        half = Signal()
        at = Signal(bits + 1, init=1)  # the stuffed frame so far, in bytes
        code_at = Signal(bits)  # where the running run's code belongs
        crc = Signal(32, init=0xFFFFFFFF)
        step = Signal(range(6))  # 0 body, 1..4 CRC, 5 the last run's code
        byte = Signal(8)
        put = Signal()

        m.d.comb += [
            self.raw.ready.eq((step == 0) & ~full.bit_select(half, 1)),
            write.addr.eq(Cat(at[:bits], half)),
            write.data.eq(byte),
        ]
        with m.If(step == 0):
            m.d.comb += [put.eq(self.raw.valid & self.raw.ready), byte.eq(self.raw.p.byte)]
            with m.If(put):
                m.d.sync += crc.eq(crc32_step(crc, byte))
                with m.If(self.raw.p.last):
                    m.d.sync += step.eq(1)
        with m.Elif(step == 5):
            m.d.comb += [
                write.en.eq(1),
                write.addr.eq(Cat(code_at, half)),
                write.data.eq(at - code_at),
            ]
            m.d.sync += [
                step.eq(0),
                half.eq(~half),
                at.eq(1),
                code_at.eq(0),
                crc.eq(0xFFFFFFFF),
            ]
        with m.Else():
            m.d.comb += [put.eq(1), byte.eq(~crc[:8])]
            m.d.sync += [crc.eq(crc >> 8), step.eq(step + 1)]
        with m.If(put):
            m.d.comb += write.en.eq(1)
            m.d.sync += at.eq(at + 1)
            with m.If(byte == 0):
                m.d.comb += [write.addr.eq(Cat(code_at, half)), write.data.eq(at - code_at)]
                m.d.sync += code_at.eq(at)

        # Draining: read, then the output register, which is faster than a block RAM's output.
        drain_half = Signal()
        read_at = Signal(bits + 1)
        fetched = Signal()
        fetched_last = Signal()
        advance = Signal()
        length = Signal(bits + 1)
        last = Signal()
        m.d.comb += [
            advance.eq(~self.tx.valid | self.tx.ready),
            read.addr.eq(Cat(read_at[:bits], drain_half)),
            read.en.eq(advance),
            length.eq(Mux(drain_half, lengths[1], lengths[0])),
            last.eq(read_at == length),
        ]
        with m.If(advance):
            m.d.sync += [
                fetched.eq(0),
                self.tx.valid.eq(fetched),
                self.tx.p.eq(Mux(fetched_last, 0, read.data)),
            ]
            with m.If(full.bit_select(drain_half, 1)):
                m.d.sync += [fetched.eq(1), fetched_last.eq(last), read_at.eq(read_at + 1)]
                with m.If(last):
                    m.d.sync += [read_at.eq(0), drain_half.eq(~drain_half)]

        m.d.comb += self.idle.eq((step == 0) & (at == 1) & (full == 0) & ~fetched & ~self.tx.valid)
        for i in range(2):
            with m.If((step == 5) & (half == i)):
                m.d.sync += [full[i].eq(1), lengths[i].eq(at)]
            with m.Elif(advance & full[i] & (drain_half == i) & last):
                m.d.sync += full[i].eq(0)
        return m
