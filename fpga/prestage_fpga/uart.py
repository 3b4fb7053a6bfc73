"""Bytes over an asynchronous serial line: eight data bits, no parity, one stop bit."""

from amaranth import Cat, Module, Signal
from amaranth.lib import fifo, stream, wiring
from amaranth.lib.cdc import FFSynchronizer
from amaranth.lib.wiring import In, Out

__all__ = ["UART"]


class UART(wiring.Component):
    """Send and receive bytes.

    The receiver looks at the middle of each bit as the start bit's falling edge sets it. It bears a
    sender whose bits are up to 4 % longer or shorter, less the rounding of ``divisor``. Bytes that
    find the buffer full are lost: the line has no way to stop the sender, but the link on top of it
    asks again.

    Parameters
    ----------
    clock_hz : :class:`int`
        Frequency of the clock, in hertz.
    baud : :class:`int`
        Bits a second. ``clock_hz / baud`` must be at least 8 and within 1 % of an integer.
    buffer_bytes : :class:`int`
        Bytes that are received and not taken yet, 2 to 4,096.

    Members
    -------
    rx_pin : ``In(1)``, ``tx_pin : Out(1)``
        The line, high when idle. ``rx_pin`` may be asynchronous.
    received : ``Out(stream.Signature(8))``
        Bytes from the line.
    sent : ``In(stream.Signature(8))``
        Bytes for the line.
    framing : ``Out(1)``
        Strobes for a byte that is dropped because its stop bit is low.
    overflow : ``Out(1)``
        Strobes for a byte that is dropped because the buffer is full.

    Attributes
    ----------
    divisor : :class:`int`
        Clock cycles a bit.

    Raises
    ------
    TypeError
        If a parameter is not an integer.
    ValueError
        If a parameter is out of its range.
    """

    def __init__(self, *, clock_hz, baud, buffer_bytes=64):
        for what, value in (
            ("Clock frequency", clock_hz),
            ("Baud rate", baud),
            ("Buffer size", buffer_bytes),
        ):
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"{what} must be an integer, not {value!r}")
            if value <= 0:
                raise ValueError(f"{what} must be positive, not {value}")
        if not 2 <= buffer_bytes <= 4096:
            raise ValueError(f"Buffer size must be between 2 and 4096 bytes, not {buffer_bytes}")
        self.divisor = round(clock_hz / baud)
        if self.divisor < 8:
            raise ValueError(
                f"Baud rate must be at most an eighth of the clock's {clock_hz} Hz, not {baud}"
            )
        if abs(clock_hz - self.divisor * baud) > clock_hz / 100:
            raise ValueError(
                f"Baud rate must divide the clock's {clock_hz} Hz to 1 %, but {baud} does not"
            )
        self.clock_hz = clock_hz
        self.baud = baud
        self.buffer_bytes = buffer_bytes
        super().__init__(
            {
                "rx_pin": In(1, init=1),
                "tx_pin": Out(1, init=1),
                "received": Out(stream.Signature(8)),
                "sent": In(stream.Signature(8)),
                "framing": Out(1),
                "overflow": Out(1),
            }
        )

    def elaborate(self, platform):
        m = Module()
        divisor = self.divisor

        # Sender: start bit, data from the lowest bit, stop bit.
        shift = Signal(10, init=0x3FF)
        tx_left = Signal(range(11))
        tx_count = Signal(range(divisor))
        m.d.comb += [
            self.tx_pin.eq(shift[0]),
            self.sent.ready.eq(tx_left == 0),
        ]
        with m.If(tx_left == 0):
            with m.If(self.sent.valid):
                m.d.sync += [
                    shift.eq(Cat(0, self.sent.payload, 1)),
                    tx_left.eq(10),
                    tx_count.eq(divisor - 1),
                ]
        with m.Elif(tx_count == 0):
            m.d.sync += [
                shift.eq(Cat(shift[1:], 1)),
                tx_left.eq(tx_left - 1),
                tx_count.eq(divisor - 1),
            ]
        with m.Else():
            m.d.sync += tx_count.eq(tx_count - 1)

        # Receiver.
        line = Signal(init=1)
        m.submodules.synchronizer = FFSynchronizer(self.rx_pin, line, init=1)
        m.submodules.buffer = buffer = fifo.SyncFIFOBuffered(width=8, depth=self.buffer_bytes)
        rx_count = Signal(range(divisor))
        rx_left = Signal(range(9))
        byte = Signal(8)
        m.d.comb += [
            self.received.payload.eq(buffer.r_data),
            self.received.valid.eq(buffer.r_rdy),
            buffer.r_en.eq(self.received.ready),
            buffer.w_data.eq(byte),
        ]
        middle = rx_count == 0
        with m.If(middle):
            m.d.sync += rx_count.eq(divisor - 1)
        with m.Else():
            m.d.sync += rx_count.eq(rx_count - 1)
        with m.FSM():
            with m.State("IDLE"):
                # Two cycles of the synchronizer have passed, but a bit's own sampling is as late.
                m.d.sync += rx_count.eq(divisor // 2 - 1)
                with m.If(~line):
                    m.next = "START"
            with m.State("START"):
                m.d.sync += rx_left.eq(8)
                with m.If(middle):
                    # A pulse shorter than half a bit is noise.
                    with m.If(line):
                        m.next = "IDLE"
                    with m.Else():
                        m.next = "DATA"
            with m.State("DATA"):
                with m.If(middle):
                    m.d.sync += [byte.eq(Cat(byte[1:], line)), rx_left.eq(rx_left - 1)]
                    with m.If(rx_left == 1):
                        m.next = "STOP"
            with m.State("STOP"):
                with m.If(middle):
                    with m.If(line):
                        m.d.comb += [
                            buffer.w_en.eq(1),
                            self.overflow.eq(~buffer.w_rdy),
                        ]
                        m.next = "IDLE"
                    with m.Else():
                        m.d.comb += self.framing.eq(1)
                        m.next = "BREAK"
            with m.State("BREAK"):
                # A start bit is an edge: wait for the line to come back first.
                with m.If(line):
                    m.next = "IDLE"
        return m
