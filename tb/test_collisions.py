"""Rows that are read in the cycle of their write, in the Verilog of the benches."""

import re

import pytest
from amaranth import Module
from amaranth.back import verilog
from amaranth.lib import wiring
from amaranth.lib.memory import Memory
from amaranth.lib.wiring import In, Out

from prestage_tb.collisions import poison_collisions


class _Rows(wiring.Component):
    """A memory that is read and written through its ports."""

    def __init__(self, **attributes):
        self.attributes = attributes
        super().__init__(
            {
                **{name: In(4) for name in ("read_row", "write_row")},
                "enable": In(1),
                "new": In(8),
                "found": Out(8),
            }
        )

    def elaborate(self, platform):
        m = Module()
        m.submodules.rows = rows = Memory(shape=8, depth=16, init=[], attrs=self.attributes)
        read, write = rows.read_port(), rows.write_port()
        m.d.comb += [
            read.addr.eq(self.read_row),
            self.found.eq(read.data),
            write.addr.eq(self.write_row),
            write.data.eq(self.new),
            write.en.eq(self.enable),
        ]
        return m


def _text(**attributes):
    return verilog.convert(_Rows(**attributes), emit_src=False)


def test_collision_turns_the_row_over():
    before = _text(no_rw_check=1, ram_style="block")
    after = poison_collisions(before)
    (was,), (now,) = (
        [line for line in text.splitlines() if re.search(r"<= .*\[read_row\]", line)]
        for text in (before, after)
    )
    assert re.fullmatch(r" *(_0_) <= (rows|\\?\S+) *\[read_row\];", was)
    assert now.strip() == (
        "_0_ <= (((enable) && (write_row) == (read_row))) ? ~rows [read_row] : rows [read_row];"
    )
    changed = [
        pair
        for pair in zip(before.splitlines(), after.splitlines(), strict=True)
        if pair[0] != pair[1]
    ]
    assert changed == [(was, now)]


def test_memories_that_promise_nothing_stay():
    assert poison_collisions(_text()) == _text()


def test_unknown_form():
    text = _text(no_rw_check=1)
    assert "if (enable)" in text
    with pytest.raises(ValueError, match="Memory .* must be written under a condition"):
        poison_collisions(text.replace("if (enable)", "if (enable) // now"))
