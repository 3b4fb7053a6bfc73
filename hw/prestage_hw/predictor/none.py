"""Baseline that predicts nothing."""

from amaranth import Module

from .base import Predictor

__all__ = ["NonePredictor"]


class NonePredictor(Predictor):
    """Predict nothing: every decision is taken at once, the only candidates are those of hints,
    and there are no tables.

    A hint comes out in the next cycle, every other cycle at most. A table read answers 0 in the
    next cycle.
    """

    def elaborate(self, platform):
        m = Module()
        m.d.comb += [
            self.begin.ready.eq(1),
            self.decisions.ready.eq(1),
            self.hints.ready.eq(~self.candidates.valid),
            self.table_requests.ready.eq(~self.table_values.valid),
            self.idle.eq(~self.table_values.valid & ~self.candidates.valid),
        ]
        with m.If(self.candidates.ready):
            m.d.sync += self.candidates.valid.eq(0)
        with m.If(self.hints.valid & self.hints.ready):
            m.d.sync += [
                self.candidates.valid.eq(1),
                self.candidates.payload.eq(self.hints.payload),
            ]
        with m.If(self.table_values.ready):
            m.d.sync += self.table_values.valid.eq(0)
        with m.If(
            self.table_requests.valid
            & self.table_requests.ready
            & ~self.table_requests.payload.write
        ):
            m.d.sync += self.table_values.valid.eq(1)
        return m
