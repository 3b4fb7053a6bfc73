"""Writing a harness as RTLIL, in a process of its own: ``python -m prestage_formal.export``.

A broken twin changes modules as they are imported, so nothing of the RTL may be imported before.
"""

import sys
import warnings
from pathlib import Path

from .harness import without_lemmas
from .proofs import PROOFS

__all__ = ["main"]


def main(arguments=None):
    """Write ``design.il`` of a proof's variant into a folder."""
    name, folder, variant = sys.argv[1:] if arguments is None else arguments
    proof = next(proof for proof in PROOFS if proof.name == name)
    if variant.startswith("broken-"):
        proof.twins[int(variant.removeprefix("broken-"))].install()
        without_lemmas()
    from amaranth import ClockDomain, Module
    from amaranth.back import rtlil

    from prestage_hw.verilog import without_zero_memories

    warnings.simplefilter("error")
    # The clock has no reset: a proof begins after reset.
    m = Module()
    m.domains.sync = clock = ClockDomain(reset_less=True)
    m.submodules.harness = proof.build(variant)
    # Memories start with anything, as on a chip after reset.
    with without_zero_memories():
        text = rtlil.convert(m, name="top", ports=[clock.clk])
    Path(folder, "design.il").write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
