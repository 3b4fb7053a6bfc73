"""What every board with a serial port and block RAM alone has in common."""

from amaranth import Module
from amaranth.lib import wiring
from amaranth.lib.wiring import In, Out

from prestage_hw.contract.params import require_config
from prestage_hw.contract.pattern import expert_memory
from prestage_hw.dma.rom import AXIBlockMemory
from prestage_hw.top import Top

from .uart import UART

__all__ = ["SerialDevice"]


class SerialDevice(wiring.Component):
    """A device whose link is a UART and whose experts lie in block RAM.

    ::

        rx_pin ─▶ UART ─▶ Top ── bus ── block RAM with the pattern of every expert
        tx_pin ◀───┘ ◀─────┘

    Parameters
    ----------
    config : :class:`DeviceConfig`
        Device. All its experts must fit into block RAM.
    clock_hz : :class:`int`
        Frequency of the clock, in hertz.
    baud : :class:`int`
        Bits a second on the line.

    Members
    -------
    rx_pin : ``In(1)``, ``tx_pin : Out(1)``
        The line, high when idle.
    idle : ``Out(1)``
        Nothing is under way behind the link.
    byte : ``Out(1)``
        Strobes for each byte from the host.
    damaged : ``Out(1)``
        Strobes for each byte that the line damaged or that found the buffer full.
    """

    def __init__(self, *, config, clock_hz, baud):
        require_config(config)
        self.config = config
        self.uart = UART(clock_hz=clock_hz, baud=baud)
        super().__init__(
            {
                "rx_pin": In(1, init=1),
                "tx_pin": Out(1, init=1),
                "idle": Out(1),
                "byte": Out(1),
                "damaged": Out(1),
            }
        )

    def elaborate(self, platform):
        m = Module()
        m.submodules.uart = uart = self.uart
        m.submodules.top = top = Top(config=self.config)
        m.submodules.memory = memory = AXIBlockMemory(
            config=self.config, init=expert_memory(self.config).tobytes()
        )
        wiring.connect(m, top.bus, memory.bus)
        wiring.connect(m, uart.received, top.rx)
        wiring.connect(m, top.tx, uart.sent)
        m.d.comb += [
            uart.rx_pin.eq(self.rx_pin),
            self.tx_pin.eq(uart.tx_pin),
            # Nothing here consumes experts; the host reads them over the link.
            top.beats.ready.eq(1),
            self.idle.eq(top.idle),
            self.byte.eq(uart.received.valid & uart.received.ready),
            self.damaged.eq(uart.framing | uart.overflow),
        ]
        return m
