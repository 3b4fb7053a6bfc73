"""Baseline that predicts nothing."""

from amaranth import Module

from .base import Predictor

__all__ = ["NonePredictor"]


class NonePredictor(Predictor):
    """Predict nothing: every decision is taken at once, there are no candidates and no tables.

    A table read answers 0 in the next cycle.
    """

    def elaborate(self, platform):
        m = Module()
        m.d.comb += [
            self.begin.ready.eq(1),
            self.decisions.ready.eq(1),
            self.table_requests.ready.eq(~self.table_values.valid),
            self.idle.eq(~self.table_values.valid),
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
