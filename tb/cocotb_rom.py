"""Block memory behind AXI4, read by a small master (the half that runs in the simulator)."""

import random

import cocotb
from cocotb.triggers import FallingEdge, RisingEdge

from prestage_hw.dma import AXIBlockMemory
from prestage_tb.axi import pattern
from prestage_tb.bench import cycles, parameters, reset, start_clock


class Master:
    """Ask for bursts and collect what comes back."""

    def __init__(self, dut, *, stall):
        self.dut = dut
        self.random = random.Random(cocotb.RANDOM_SEED)
        self.stall = stall
        self.queue = []
        self.asked = []
        self.beats = []
        self.arrival = []
        self.cycle = 0
        dut.bus__arvalid.value = 0
        dut.bus__rready.value = 0
        cocotb.start_soon(self._run())

    async def _run(self):
        dut = self.dut
        waits = False
        held = None
        await RisingEdge(dut.clk)
        while True:
            if not waits and self.queue and self.random.random() >= self.stall:
                address, beats, number = self.queue[0]
                dut.bus__araddr.value = address
                dut.bus__arlen.value = beats - 1
                dut.bus__arid.value = number
                dut.bus__arsize.value = parameters()["config"].data_bytes.bit_length() - 1
                dut.bus__arburst.value = 1
                waits = True
            dut.bus__arvalid.value = int(waits)
            ready = self.random.random() >= self.stall
            dut.bus__rready.value = int(ready)
            await FallingEdge(dut.clk)
            if str(dut.rst.value) != "0":
                await RisingEdge(dut.clk)
                held, waits = None, False
                continue
            taken = waits and str(dut.bus__arready.value) == "1"
            beat = None
            if str(dut.bus__rvalid.value) == "1":
                beat = tuple(
                    int(getattr(dut, f"bus__{m}").value) for m in ("rdata", "rresp", "rlast", "rid")
                )
                assert held is None or held == beat, "a beat must not change while it waits"
                held = None if ready else beat
            else:
                assert held is None, "rvalid must not fall before rready"
            await RisingEdge(dut.clk)
            self.cycle += 1
            if taken and self.queue:  # A reset may have emptied it just now.
                self.queue.pop(0)
                self.asked.append(self.cycle)
                waits = False
            if beat is not None and ready:
                self.beats.append(beat)
                self.arrival.append(self.cycle)

    async def check(self, bursts):
        config, size = parameters()["config"], parameters()["size"]
        first = len(self.beats)
        self.queue += bursts
        expected = []
        for address, beats, number in bursts:
            for beat in range(beats):
                at = address + beat * config.data_bytes
                data = int.from_bytes(pattern(at, config.data_bytes), "little")
                inside = at < size
                expected.append(
                    (data if inside else None, 0 if inside else 3, beat == beats - 1, number)
                )
        for _ in range(100 + 20 * len(expected)):
            if len(self.beats) - first >= len(expected):
                break
            await cycles(self.dut, 1)
        await cycles(self.dut, 10)
        got = [
            (data if response == 0 else None, response, bool(last), number)
            for data, response, last, number in self.beats[first:]
        ]
        assert got == expected


def random_bursts(generator, count):
    config, size = parameters()["config"], parameters()["size"]
    bursts = []
    for _ in range(count):
        beats = generator.choice((1, 2, 3, generator.randrange(1, 65)))
        word = generator.randrange(size // config.data_bytes + 8)
        word = min(
            word, (word // (4096 // config.data_bytes) + 1) * (4096 // config.data_bytes) - beats
        )
        bursts.append((max(word, 0) * config.data_bytes, beats, generator.randrange(2)))
    return bursts


@cocotb.test()
@cocotb.parametrize(stall=[0.0, 0.4])
async def reads(dut, stall):
    start_clock(dut)
    master = Master(dut, stall=stall)
    await reset(dut)
    await master.check(random_bursts(master.random, 60))


@cocotb.test()
async def keeps_up(dut):
    """One beat a cycle from burst to burst; the first after ``latency`` cycles."""
    start_clock(dut)
    master = Master(dut, stall=0.0)
    await reset(dut)
    config = parameters()["config"]
    await master.check([(n * 4 * config.data_bytes, 4, n % 2) for n in range(10)])
    assert master.arrival == list(range(master.arrival[0], master.arrival[0] + 40))
    assert master.arrival[0] - master.asked[0] == AXIBlockMemory.latency


@cocotb.test()
async def reset_in_flight(dut):
    start_clock(dut)
    master = Master(dut, stall=0.2)
    await reset(dut)
    for _ in range(10):
        master.queue += random_bursts(master.random, 5)
        await cycles(dut, master.random.randrange(1, 30))
        dut.rst.value = 1
        master.queue.clear()
        await cycles(dut, 2)
        dut.rst.value = 0
        master.beats.clear()
        await master.check(random_bursts(master.random, 2))
