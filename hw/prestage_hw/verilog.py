"""Conversion of designs whose memories are large."""

import contextlib
from unittest import mock

from amaranth.back import rtlil

__all__ = ["without_zero_memories"]


@contextlib.contextmanager
def without_zero_memories():
    """Leave out the initial values of memories that start with zeros only.

    Amaranth writes the initial value of every memory bit by bit, and yosys turns it into a
    statement a word: minutes for an expert buffer. The blocks clear what they read before it is
    written, so that nothing depends on these zeros. Simulators that start memories at X still show
    what has not been written.

    Use it as a context around ``verilog.convert``, ``cxxrtl.convert`` or ``rtlil.convert``.
    """
    emit = rtlil.ModuleEmitter.emit_memory

    def emit_unless_zero(self, cell_idx, cell):
        if any(cell.init):
            emit(self, cell_idx, cell)

    with mock.patch.object(rtlil.ModuleEmitter, "emit_memory", emit_unless_zero):
        yield
