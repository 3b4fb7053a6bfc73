# amaranth: UnusedElaboratable=no
"""The compiled simulation: memory model, consumer port, cache and options.

::

    pipe ── rx/tx ──▶ probe ── bus ──▶ memory model
      └── reads/beats ─▶ └ storage

The probe counts cycles in hardware, so the memory's timing is checked from the other side of the
port.
"""

import math
import os
import signal
import stat
import subprocess
import sys
import threading
import time
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from prestage_hw.contract import TRANSFER_DTYPE, SimulatedPipe
from prestage_hw.contract.params import TINY_DEVICE
from prestage_hw.contract.pattern import expert_memory
from prestage_tb.compiled import BuildError, CompiledPipe, build_library, open_pipe
from prestage_tb.compiled.probe import REPLY_WORDS
from prestage_tb.compiled.traffic import Traffic

CONFIG = TINY_DEVICE
PROBE = "prestage_tb.compiled.probe:Probe"


class TB:
    """A pipe to the probe and the probe's command language."""

    def __init__(self, config=CONFIG, **options):
        self.config = config
        self.memory = expert_memory(config)
        self.pipe = CompiledPipe(config, memory=self.memory, top=PROBE, **options)

    def fetch(self, *, address, beats, bursts=1, slot=0, stall=0):
        """Cycles to the first and to the last beat, beats that failed."""
        command = bytes((slot, beats - 1, bursts - 1, stall)) + address.to_bytes(4, "little")
        reply = self.pipe.exchange(command)
        assert len(reply) == 4 * REPLY_WORDS + 1 and reply[-1] == 0
        digits = "".join(f"{byte & 0xF:x}" for byte in reply[:-1])
        first, last, failures, misplaced = (
            int(digits[at : at + 4], 16) for at in range(0, len(digits), 4)
        )
        assert misplaced == 0
        return first, last, failures

    def fetch_expert(self, layer, expert, *, slot):
        beats = self.config.expert_beats
        address = self.config.expert_address(layer, expert)
        return self.fetch(address=address, beats=beats // 4, bursts=4, slot=slot)


@pytest.fixture
def tb():
    tb = TB(latency=5)
    yield tb
    tb.pipe.close()


# --- memory ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("latency", [1, 2, 64, 1000])
@pytest.mark.parametrize("bandwidth", [Fraction(4), Fraction(8, 3), Fraction(1), Fraction(3, 7)])
@pytest.mark.parametrize(("beats", "bursts"), [(1, 1), (16, 1), (3, 7), (64, 4)])
def test_memory_timing(latency, bandwidth, beats, bursts):
    tb = TB(latency=latency, bandwidth=bandwidth)
    # Twice: what the first fetch saved or owed must not change the second.
    for _ in range(2):
        first, last, failures = tb.fetch(address=2048, beats=beats, bursts=bursts)
        assert failures == 0
        assert first == latency
        interval = CONFIG.data_bytes / bandwidth
        # Later bursts' own latency passes while earlier data arrives, except their address's cycle.
        by_bandwidth = latency + math.ceil((beats * bursts - 1) * interval)
        by_latency = latency + bursts - 1 + math.ceil((beats - 1) * interval)
        assert last == max(by_bandwidth, by_latency)


@pytest.mark.parametrize("stall", [1, 5])
def test_memory_waits_for_ready(stall):
    tb = TB(latency=10)
    first, last, _ = tb.fetch(address=0, beats=32, bursts=2, stall=stall)
    assert (first, last) == (10, 10 + 63 * (stall + 1))


def test_transfers(tb):
    assert tb.pipe.transfers().shape == (0,)
    tb.fetch(address=1024, beats=64, bursts=2)
    log = tb.pipe.transfers()
    assert log.dtype == TRANSFER_DTYPE
    assert log["address"].tolist() == [1024, 1024 + 256]
    assert log["bytes"].tolist() == [256, 256]
    assert log["failed"].tolist() == [0, 0]
    assert (log["end"] - log["start"]).tolist() == [5 + 63, 5 + 63 + 63]
    assert log["end"][-1] < tb.pipe.cycles


@pytest.mark.parametrize(
    ("failing", "address", "failures"),
    [
        ([(256, 1)], 0, 0),
        ([(255, 1)], 0, 1),
        ([(255, 2)], 252, 2),
        ([(0, 1 << 20)], 512, 64),
        ([(4, 4), (100, 8), (7, 2)], 0, 4),
        ([], 4 * 8 * 1024 - 128, 32),
        ([], 1 << 31, 64),
    ],
)
def test_memory_errors(failing, address, failures):
    tb = TB(failing=failing)
    assert tb.fetch(address=address, beats=64)[2] == failures
    assert tb.pipe.transfers()["failed"].tolist() == [int(failures > 0)]
    assert tb.fetch(address=8192, beats=64)[2] == (64 if failing == [(0, 1 << 20)] else 0)


# --- consumer port --------------------------------------------------------------------------------


def test_compare_finds_a_wrong_byte(tb):
    tb.fetch_expert(2, 3, slot=5)
    assert tb.pipe.compare([5], [2], [3]) == []
    assert tb.pipe.compare([5, 5, 5], [2, 2, 2], [3, 4, 3]) == [1]
    for position in (0, 1, CONFIG.expert_bytes // 2 + 3, CONFIG.expert_bytes - 1):
        at = CONFIG.expert_address(2, 3) + position
        tb.memory[at] ^= 0x10
        assert tb.pipe.compare([5], [2], [3]) == [0]
        tb.memory[at] ^= 0x10
    assert tb.pipe.compare([5], [2], [3]) == []


def test_compare_finds_an_invalid_tile(tb):
    tb.fetch(address=0, beats=64, bursts=3, slot=1)
    assert tb.pipe.compare([1], [0], [0]) == [0]
    with pytest.raises(OSError, match="Slot 1 holds a tile that is not valid"):
        tb.pipe.read_slot(1)
    tb.fetch_expert(0, 0, slot=1)
    assert tb.pipe.compare([1], [0], [0]) == []


def test_read_slot(tb):
    tb.fetch_expert(3, 7, slot=6)
    at = CONFIG.expert_address(3, 7)
    assert tb.pipe.read_slot(6) == tb.memory[at : at + CONFIG.expert_bytes].tobytes()


def test_interrupted_compare(tb):
    tb.fetch_expert(1, 1, slot=2)
    consume = tb.pipe._library.prestage_consume
    chosen, places = np.array([2] * 3, np.uint32), np.zeros(3, np.uint64)
    beats = np.full(3, CONFIG.expert_beats, np.uint64)
    for cycles in (0, 1, 2, 3, 10, CONFIG.expert_beats + 1):
        consume(tb.pipe._handle, 3, chosen.ctypes.data, places.ctypes.data, beats.ctypes.data)
        tb.pipe.run(cycles)
        assert tb.pipe.compare([2], [1], [1]) == []
        assert tb.pipe.compare([2, 2], [1, 0], [1, 0]) == [1]


def test_bad_compare(tb):
    with pytest.raises(ValueError, match="equally many, not 2, 1 and 1"):
        tb.pipe.compare([0, 1], [0], [0])
    with pytest.raises(ValueError, match="no expert 8 in layer 0"):
        tb.pipe.compare([0], [0], [8])
    with pytest.raises(ValueError, match="Slot must be below 8, not 8"):
        tb.pipe.compare([8], [0], [0])
    assert tb.pipe.compare([], [], []) == []


# --- pipe -----------------------------------------------------------------------------------------


def test_exchange_limits(tb):
    assert isinstance(tb.pipe, SimulatedPipe) and tb.pipe.clocked
    start = tb.pipe.cycles
    assert tb.pipe.exchange(b"\0\0\0", frames=0) == b""
    assert tb.pipe.cycles - start == 4
    assert tb.pipe.exchange(b"", frames=1, limit=1000) == b""
    assert tb.pipe.cycles - start == 1004
    # The rest of the command: three bytes were sent above.
    assert tb.pipe.exchange(b"\0\0\0\0\0").endswith(b"\0")
    assert tb.pipe.run(500) == b""


def test_same_bytes_in_same_cycles():
    def bytes_by_cycle():
        tb = TB(latency=20, bandwidth=Fraction(5, 3))
        seen = []
        for command in (bytes(8), bytes((1, 31, 1, 2, 0, 4, 0, 0))):
            tb.pipe.exchange(command, frames=0)
            seen += [tb.pipe.run(1) for _ in range(400)]
        tb.pipe.reset()
        assert tb.pipe.cycles == 0
        return seen, tb.pipe.transfers().tolist()

    first = bytes_by_cycle()
    assert first == bytes_by_cycle()
    assert sum(map(len, first[0])) == 2 * (4 * REPLY_WORDS + 1)


def test_interrupt(tb):
    sent = []

    def interrupt():
        sent.append(time.monotonic())
        signal.raise_signal(signal.SIGINT)

    timer = threading.Timer(0.3, interrupt)
    with pytest.raises(KeyboardInterrupt):
        timer.start()
        tb.pipe.run(1 << 50)
    assert time.monotonic() - sent[0] < 0.5
    timer.join()
    tb.fetch_expert(1, 2, slot=3)
    assert tb.pipe.compare([3], [1], [2]) == []


def test_close(tb):
    tb.pipe.close()
    tb.pipe.close()
    with pytest.raises(ValueError, match="Device is closed"):
        tb.pipe.exchange(b"")
    with pytest.raises(ValueError, match="Device is closed"):
        tb.pipe.cycles  # noqa: B018


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"delay": "3"}, "must be one of latency, bytes_per_cycle, error, engine, not 'delay'"),
        ({"latency": "0"}, "Memory latency must be from 1 to 1000000 cycles, not '0'"),
        ({"latency": "fast"}, "Memory latency must be .* not 'fast'"),
        ({"bytes_per_cycle": "0"}, "Memory bandwidth must be above 0 .* not '0'"),
        ({"bytes_per_cycle": "4.1"}, "at most the port's 4 bytes a cycle, .* not '4.1'"),
        ({"bytes_per_cycle": "nan"}, "Memory bandwidth must be .* not 'nan'"),
        ({"bytes_per_cycle": "0.0000001"}, "in steps of a millionth"),
        ({"error": "12"}, "Error range must be ADDRESS:SIZE .* not '12'"),
        ({"error": "0:0"}, "Error range must be ADDRESS:SIZE with a positive size"),
        ({"error": "0:4,-4:4"}, "Error range must be .* not '-4:4'"),
        ({"engine": "icarus"}, "engine must be one of verilator, cxxrtl, not 'icarus'"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        open_pipe(CONFIG, memory=expert_memory(CONFIG), options=options)


def test_bad_memory():
    with pytest.raises(ValueError, match=r"must have shape \(32768,\), not \(7,\)"):
        CompiledPipe(CONFIG, memory=np.zeros(7, np.uint8), top=PROBE)
    with pytest.raises(TypeError, match="must be an array of uint8"):
        CompiledPipe(CONFIG, memory=np.zeros(32768), top=PROBE)
    with pytest.raises(TypeError, match="must be contiguous"):
        CompiledPipe(CONFIG, memory=np.zeros(65536, np.uint8)[::2], top=PROBE)
    with pytest.raises(ValueError, match="latency of at least 1 cycle"):
        CompiledPipe(CONFIG, memory=expert_memory(CONFIG), latency=0, top=PROBE)


# --- the device -----------------------------------------------------------------------------------


def _traffic(engine):
    """What comes back in each cycle while a few tokens are routed, and the bursts."""
    with open_pipe(
        CONFIG,
        memory=expert_memory(CONFIG),
        options={"engine": engine, "latency": "17", "bytes_per_cycle": "2.5", "error": "9000:8"},
    ) as pipe:
        traffic = Traffic(CONFIG, seed=3)
        seen = []
        for token in range(3):
            frames = [traffic.frame("BEGIN_TOKEN", token & 1, 1, token)]
            for layer in range(CONFIG.model.layers):
                frames += [
                    traffic.frame("ROUTE", token & 1, layer, traffic.route(layer)),
                    traffic.frame("RELEASE", token & 1, layer),
                ]
            for frame in (*frames, traffic.frame("SYNC", token)):
                pipe.exchange(frame, frames=0)
                seen += [pipe.run(1) for _ in range(600)]
        return seen, pipe.transfers().tolist(), pipe.cycles


@pytest.mark.soak
def test_engines_agree_in_every_cycle():
    verilator = _traffic("verilator")
    cxxrtl = _traffic("cxxrtl")
    assert sum(map(len, verilator[0])) > 300
    # The first token alone finds nothing in the buffer.
    wanted = CONFIG.model.layers * CONFIG.model.top_k
    assert len(verilator[1]) >= wanted * CONFIG.expert_beats // CONFIG.longest_burst
    assert verilator == cxxrtl


def test_device_serves_tokens():
    with open_pipe(CONFIG, memory=expert_memory(CONFIG), options={"latency": "9"}) as pipe:
        traffic = Traffic(CONFIG)
        for _ in range(10):
            traffic.token(pipe)
        assert traffic.replies["READY"] == 10 * CONFIG.model.layers * CONFIG.model.top_k
        log = pipe.transfers()
        assert log["failed"].sum() == 0
        # An address and its beats take at least the latency and a cycle a beat.
        assert (log["end"] - log["start"] >= 9 + log["bytes"] // CONFIG.data_bytes - 1).all()


# --- cache ----------------------------------------------------------------------------------------


@pytest.fixture
def compiler(tmp_path, monkeypatch):
    """An empty cache and a compiler that notes what it compiles; fails while ``broken`` exists."""
    script = tmp_path / "c++"
    script.write_text(
        "#!/bin/sh\n"
        f'case "$*" in *" -c "*)\n'
        f'  [ -e {tmp_path}/broken ] && {{ echo "error: the compiler is broken" >&2; exit 3; }}\n'
        f'  echo "$*" >> {tmp_path}/compiled ;;\n'
        "esac\n"
        'exec g++ "$@" -O0\n'
    )
    script.chmod(script.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("CXX", str(script))
    monkeypatch.setenv("PRESTAGE_CACHE", str(tmp_path / "cache"))
    return tmp_path


def _compiled(folder):
    path = folder / "compiled"
    return len(path.read_text().splitlines()) if path.exists() else 0


def test_cache(compiler):
    script = (
        "import sys; sys.path[:] = eval(sys.argv[1])\n"
        "from prestage_tb.compiled import CompiledPipe\n"
        "from prestage_hw.contract.params import TINY_DEVICE\n"
        "from prestage_hw.contract.pattern import expert_memory\n"
        "memory = expert_memory(TINY_DEVICE)\n"
        f"pipe = CompiledPipe(TINY_DEVICE, memory=memory, top={PROBE!r})\n"
        "print(len(pipe.exchange(bytes(8))), 'amaranth' in sys.modules)\n"
    )

    def start():
        return subprocess.Popen(
            [sys.executable, "-c", script, repr(sys.path)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ,
        )

    # Two processes at once build once, and both run.
    both = [start(), start()]
    outputs = [process.communicate() for process in both]
    assert [out for out, _ in outputs] == ["17 False\n"] * 2, outputs
    assert sum("Waiting for another process" in error for _, error in outputs) == 1
    assert sum("Building the simulation (tiny, 8 slots" in error for _, error in outputs) == 1
    built = _compiled(compiler)
    assert built > 3

    # A third takes what is there, at once.
    begun = time.monotonic()
    library = build_library(CONFIG, top=PROBE)
    assert time.monotonic() - begun < 1
    assert _compiled(compiler) == built

    # Nothing but whole entries is left behind.
    root = compiler / "cache" / "simulation"
    assert not list(root.glob("build-*"))
    assert sorted(path.name for path in library.parent.iterdir()) == [
        "build.json",
        "build.log",
        "library.so",
    ]

    # Another configuration is another library; Verilator's own library isn't compiled again.
    other = build_library(CONFIG.replace(slots=16), top=PROBE, quiet=True)
    assert other != library
    assert built < _compiled(compiler) < 2 * built

    # The same Verilog from changed sources is found by its text.
    for pointer in (root / "sources").iterdir():
        pointer.unlink()
    built = _compiled(compiler)
    assert build_library(CONFIG, top=PROBE, quiet=True) == library
    assert _compiled(compiler) == built


def test_broken_compiler(compiler):
    (compiler / "broken").touch()
    with pytest.raises(BuildError, match="exit status 3: error: the compiler is broken") as caught:
        build_library(CONFIG, top=PROBE, quiet=True)
    log = Path(str(caught.value).splitlines()[-1].removeprefix("The log is "))
    assert "error: the compiler is broken" in log.read_text()
    assert not list((compiler / "cache" / "simulation").glob("build-*"))


def test_missing_compiler(compiler, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(
        BuildError, match="no-such-compiler is not installed; .* apt install g\\+\\+"
    ):
        build_library(CONFIG, top=PROBE, quiet=True)


def test_broken_design(compiler):
    with pytest.raises(BuildError, match="Design no_such_module:Top cannot be imported"):
        build_library(CONFIG, top="no_such_module:Top", quiet=True)
    with pytest.raises(BuildError, match="Elaboration of the RTL failed .* no attribute 'Missing'"):
        build_library(CONFIG, top="prestage_tb.compiled.probe:Missing", quiet=True)


def test_bad_build():
    with pytest.raises(TypeError, match="Configuration must be a DeviceConfig, not 3"):
        build_library(3)
    with pytest.raises(ValueError, match="Engine must be one of verilator, cxxrtl, not 'x'"):
        build_library(CONFIG, engine="x")
