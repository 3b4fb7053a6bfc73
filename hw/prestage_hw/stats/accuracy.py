"""How often the predictor's candidates come true."""

from amaranth import Array, Module, Signal
from amaranth.lib import data, wiring
from amaranth.lib.wiring import In, Out

from prestage_hw.contract.params import require_config
from prestage_hw.contract.records import Source
from prestage_hw.layouts import RecordLayout

__all__ = ["Accuracy"]


class Accuracy(wiring.Component):
    """Watch candidates and demands go by and compare them.

    For each context one bit an expert remembers what was proposed for the layer that comes next:
    the one after the layer routed last, layer 0 at the start of a token. Only the predictor's own
    candidates for that layer count, each expert once; hints and candidates for layers farther away
    don't. A layer that is routed again right away (a chunk of tokens) is compared only the first
    time, and what was proposed in between is kept. Every port only listens.

    Parameters
    ----------
    config : :class:`DeviceConfig`
        Device.

    Members
    -------
    begin, begin_ctx : ``In(1)``, ``In(ctx)``
        A token of that context starts.
    candidate_valid, candidate : ``In(1)``, ``In(RecordLayout("Candidate", config=config))``
        The predictor hands on a candidate.
    command_valid, command : ``In(1)``, ``In(RecordLayout("Command", config=config))``
        The scheduler takes a command.
    decision_valid, decision : ``In(1)``, ``In(RecordLayout("RoutingDecision", config=config))``
        The predictor takes a decision; its demands have gone by.
    strobes : ``Out(StructLayout)``
        One bit a counter: candidates, candidates_correct, demands_predicted; one cycle after the
        cause.
    """

    def __init__(self, *, config):
        require_config(config)
        self.config = config
        counters = ("candidates", "candidates_correct", "demands_predicted")
        super().__init__(
            {
                "begin": In(1),
                "begin_ctx": In(config.bits("ctx")),
                "candidate_valid": In(1),
                "candidate": In(RecordLayout("Candidate", config=config)),
                "command_valid": In(1),
                "command": In(RecordLayout("Command", config=config)),
                "decision_valid": In(1),
                "decision": In(RecordLayout("RoutingDecision", config=config)),
                "strobes": Out(data.StructLayout(dict.fromkeys(counters, 1))),
            }
        )

    def elaborate(self, platform):
        m = Module()
        config = self.config
        contexts = range(config.contexts)
        proposed = Array(Signal(config.model.experts, name=f"proposed_{c}") for c in contexts)
        # Layer that comes next.
        expected = Array(
            Signal(range(config.model.layers + 1), name=f"expected_{c}") for c in contexts
        )

        fresh = Signal()
        place = proposed[self.candidate.ctx].bit_select(self.candidate.expert, 1)
        m.d.comb += fresh.eq(
            self.candidate_valid
            & (self.candidate.source == Source.PREDICTOR)
            & (expected[self.candidate.ctx] == self.candidate.layer)
            & ~place
        )
        m.d.sync += self.strobes.candidates.eq(fresh)
        with m.If(fresh):
            m.d.sync += place.eq(1)

        demanded = self.command_valid & ~self.command.release & ~self.command.lock
        predicted = Signal()
        m.d.comb += predicted.eq(
            demanded
            & (expected[self.command.ctx] == self.command.layer)
            # A token's first layer has none before it: it counts only if something was proposed.
            & ((self.command.layer != 0) | proposed[self.command.ctx].any())
        )
        m.d.sync += [
            self.strobes.demands_predicted.eq(predicted),
            self.strobes.candidates_correct.eq(
                predicted & proposed[self.command.ctx].bit_select(self.command.expert, 1)
            ),
        ]

        with m.If(self.decision_valid):
            m.d.sync += expected[self.decision.ctx].eq(self.decision.layer + 1)
            with m.If(expected[self.decision.ctx] != self.decision.layer + 1):
                m.d.sync += proposed[self.decision.ctx].eq(0)
        with m.If(self.begin):
            m.d.sync += [proposed[self.begin_ctx].eq(0), expected[self.begin_ctx].eq(0)]
        return m
