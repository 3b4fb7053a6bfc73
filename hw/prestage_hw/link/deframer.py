"""Wire bytes to checked frames: COBS, CRC-32 and length."""

from amaranth import Const, Module, Mux, Signal, unsigned
from amaranth.lib import data, stream, wiring
from amaranth.lib.wiring import In, Out

from prestage_hw.contract.params import require_config
from prestage_hw.contract.records import LINK_ACK, LINK_NAK, LINK_RESET
from prestage_hw.contract.wire import FRAME_OVERHEAD, MAX_FRAME_BYTES

from .layouts import body_lengths

__all__ = ["Deframer", "FrameLayout", "crc32_step"]

_CRC_POLYNOMIAL = 0xEDB88320
# What the register holds after any message followed by its own CRC, before the final inversion.
_CRC_RESIDUE = 0xDEBB20E3


def crc32_step(crc, byte):
    """CRC-32 register (IEEE 802.3, least significant bit first) after one more byte."""
    crc = crc ^ byte
    for _ in range(8):
        crc = crc[1:] ^ Mux(crc[0], Const(_CRC_POLYNOMIAL, 32), 0)
    return crc[:32]


class FrameLayout(data.StructLayout):
    """A received frame and the verdict on it.

    Parameters
    ----------
    config : :class:`DeviceConfig`
        Device whose bodies have to fit.

    Members
    -------
    code, sequence, acknowledge : ``unsigned(8)``
        Header. Meaningless if ``damaged``.
    damaged : ``unsigned(1)``
        Stuffing, CRC or length is wrong.
    misfit : ``unsigned(1)``
        The frame is whole, its type is known, but its body has the wrong length for that type.
    body : ``data.ArrayLayout(unsigned(8), ...)``
        First bytes of the body, as many as the longest message has.
    """

    def __init__(self, *, config):
        longest = max(body_lengths(config, to_device=True).values())
        super().__init__(
            {
                "code": unsigned(8),
                "sequence": unsigned(8),
                "acknowledge": unsigned(8),
                "damaged": unsigned(1),
                "misfit": unsigned(1),
                "body": data.ArrayLayout(unsigned(8), longest),
            }
        )


class Deframer(wiring.Component):
    """Take bytes off the wire and put out one checked frame for each delimiter.

    One byte a cycle while frames are taken; ``rx`` stalls only while a finished frame waits. An
    empty frame (a lone delimiter) gives nothing. A frame of the link itself (reset, acknowledge,
    negative acknowledge) with a body is damaged.

    Parameters
    ----------
    config : :class:`DeviceConfig`
        Device whose messages are received.

    Members
    -------
    rx : ``In(stream.Signature(8))``
        Bytes from the host.
    frames : ``Out(stream.Signature(FrameLayout(...)))``
        One frame for each delimiter that ends at least one byte.

    Attributes
    ----------
    latency : :class:`int`
        Cycles from the delimiter on ``rx`` to the frame on ``frames``.

    Raises
    ------
    TypeError
        If ``config`` is not a :class:`DeviceConfig`.
    """

    latency = 2

    def __init__(self, *, config):
        require_config(config)
        self.config = config
        self.layout = FrameLayout(config=config)
        super().__init__(
            {"rx": In(stream.Signature(8)), "frames": Out(stream.Signature(self.layout))}
        )

    def elaborate(self, platform):
        m = Module()
        frame = self.frames.p
        byte = self.rx.p

        fresh = Signal(init=1)  # nothing of a frame has come since the last delimiter
        remaining = Signal(8)  # bytes until the next COBS code
        count = Signal(8)  # bytes of the frame before stuffing, saturating
        crc = Signal(32, init=0xFFFFFFFF)
        # A code of 255, which stands for no zero, needs no check: its run alone is too long.
        bad_stuffing = Signal()
        ended = Signal()

        # The byte after a delimiter is a COBS code and changes no header or body register, and the
        # one after that is not taken while a finished frame waits. So the frame's registers can
        # serve as the output's payload.
        m.d.comb += self.rx.ready.eq(~self.frames.valid | self.frames.ready)

        raw = Signal(8)
        raw_valid = Signal()
        m.d.sync += ended.eq(0)
        with m.If(self.rx.valid & self.rx.ready):
            with m.If(byte == 0):
                m.d.sync += [
                    fresh.eq(1),
                    ended.eq(~fresh),
                    remaining.eq(0),
                    bad_stuffing.eq(remaining != 0),
                ]
            with m.Elif(remaining == 0):
                m.d.sync += [fresh.eq(0), remaining.eq(byte - 1)]
                with m.If(fresh):
                    m.d.sync += [count.eq(0), crc.eq(0xFFFFFFFF)]
                with m.Else():
                    # A code ends the run before it with the zero that stuffing took out.
                    m.d.comb += raw_valid.eq(1)
            with m.Else():
                m.d.comb += [raw_valid.eq(1), raw.eq(byte)]
                m.d.sync += remaining.eq(remaining - 1)

        with m.If(raw_valid):
            m.d.sync += crc.eq(crc32_step(crc, raw))
            with m.If(~count.all()):
                m.d.sync += count.eq(count + 1)
            with m.Switch(count):
                for at, register in enumerate([frame.code, frame.sequence, frame.acknowledge]):
                    with m.Case(at):
                        m.d.sync += register.eq(raw)
                for at in range(len(frame.body)):
                    with m.Case(3 + at):
                        m.d.sync += frame.body[at].eq(raw)

        misfit = Signal()
        bare = Signal()  # the type allows no body
        with m.Switch(frame.code):
            for code, length in body_lengths(self.config, to_device=True).items():
                with m.Case(code):
                    m.d.comb += misfit.eq(count != FRAME_OVERHEAD + length)
            with m.Case(LINK_RESET, LINK_ACK, LINK_NAK):
                m.d.comb += bare.eq(1)

        with m.If(self.frames.ready):
            m.d.sync += self.frames.valid.eq(0)
        with m.If(ended):
            m.d.sync += [
                self.frames.valid.eq(1),
                frame.misfit.eq(misfit),
                frame.damaged.eq(
                    bad_stuffing
                    | (crc != _CRC_RESIDUE)
                    | (count < FRAME_OVERHEAD)
                    | (count > MAX_FRAME_BYTES)
                    | (bare & (count != FRAME_OVERHEAD))
                ),
            ]
        return m
