"""Run the formal proofs and print a table: ``python -m prestage_formal``."""

import argparse
import importlib.util
import json
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from .engine import SOLVERS, EngineError, prepare_solver, run_proof
from .proofs import PROOFS

__all__ = ["main"]

_EXAMPLES = """examples:
  python -m prestage_formal --list
  python -m prestage_formal --only arbiter-priority --only arbiter-fairness
  python -m prestage_formal --jobs 1 --json build/formal.json

A failed proof leaves a waveform, build/formal/PROOF/proof/base.vcd or induction.vcd; docs/formal.md
tells how to read it."""


def _parser():
    parser = argparse.ArgumentParser(
        prog="python -m prestage_formal",
        description="Prove properties of small instances of the RTL by k-induction, and show that"
        " each proof fails once the RTL is broken on purpose.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--list", action="store_true", help="list the proofs and end")
    parser.add_argument(
        "--only", action="append", metavar="PROOF", help="run this proof; may be given repeatedly"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the table there")
    parser.add_argument(
        "--jobs", type=int, default=2, metavar="N", help="proofs at a time (default: 2)"
    )
    parser.add_argument("--solver", choices=SOLVERS, default="bitwuzla", help="default: bitwuzla")
    parser.add_argument(
        "--timeout",
        type=float,
        default=600,
        metavar="SECONDS",
        help="most seconds for one run of a tool (default: 600)",
    )
    parser.add_argument(
        "--folder",
        type=Path,
        default=Path("build/formal"),
        metavar="FOLDER",
        help="where to work (default: build/formal)",
    )
    return parser


def _chosen(names):
    """The proofs with these names, in their own order; all of them for None."""
    if names is None:
        return PROOFS
    known = {proof.name for proof in PROOFS}
    for name in names:
        if name not in known:
            raise ValueError(f"Proof must be one of {', '.join(sorted(known))}, not {name!r}")
    return tuple(proof for proof in PROOFS if proof.name in names)


def _table(rows):
    """Lines of a table with a heading."""
    heading = ("proof", "depth", "engine", "seconds", "result", "broken twin", "seconds")
    cells = [
        heading,
        *(
            (
                *(
                    (row.proof, str(row.depth), row.engine, f"{row.seconds:.1f}", row.result)
                    if twin is row.twins[0]
                    else ("",) * 5
                ),
                twin.result,
                f"{twin.seconds:.1f}",
            )
            for row in rows
            for twin in row.twins
        ),
    ]
    widths = [max(len(line[i]) for line in cells) for i in range(len(heading))]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in cells
    ]


def main(arguments=None):
    """Run the proofs; gives the exit status.

    0 if every proof holds and every broken twin fails, 1 if not, 2 if the command line is wrong.
    """
    parser = _parser()
    options = parser.parse_args(arguments)
    try:
        proofs = _chosen(options.only)
    except ValueError as error:
        parser.error(str(error))
    if options.jobs < 1:
        parser.error(f"Number of jobs must be a positive integer, not {options.jobs}")
    if options.timeout <= 0:
        parser.error(f"Timeout must be a positive number of seconds, not {options.timeout:g}")
    if importlib.util.find_spec(SOLVERS[options.solver]) is None:
        package = SOLVERS[options.solver].replace("_", "-")
        parser.error(f"Solver {options.solver} needs the Python package {package}")
    if options.list:
        for proof in proofs:
            print(f"{proof.name:<20} {proof.statement}")
        return 0

    begun = time.monotonic()

    def run(proof):
        def progress(what):
            print(f"[{time.monotonic() - begun:5.0f} s] {proof.name}: {what}", file=sys.stderr)

        try:
            result = run_proof(
                proof,
                folder=options.folder / proof.name,
                solver=options.solver,
                timeout=options.timeout,
                progress=progress,
            )
        except EngineError as error:
            progress(f"error: {error}")
            return error
        progress("; its broken twin ".join((result.result, *(t.result for t in result.twins))))
        return result

    prepare_solver(options.folder, options.solver)
    # Tools run as processes of their own, so that threads are enough.
    with ThreadPoolExecutor(options.jobs) as pool:
        results = list(pool.map(run, proofs))
    rows = [result for result in results if not isinstance(result, EngineError)]
    for line in _table(rows):
        print(line)
    seconds = time.monotonic() - begun
    good = sum(row.passed for row in rows)
    print(f"{good} of {len(proofs)} proofs hold and fail once broken; {seconds:.0f} s in all")
    if options.json is not None:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        report = {
            "solver": options.solver,
            "seconds": round(seconds, 1),
            "proofs": [row.as_dict() for row in rows],
            "errors": [str(r) for r in results if isinstance(r, EngineError)],
        }
        options.json.write_text(json.dumps(report, indent=1) + "\n")
    return 0 if good == len(proofs) else 1


if __name__ == "__main__":
    sys.exit(main())
