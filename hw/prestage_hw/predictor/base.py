"""What every predictor has in common: its configuration and its ports."""

from amaranth import unsigned
from amaranth.lib import stream, wiring
from amaranth.lib.wiring import In, Out

from prestage_hw.contract.params import require_config
from prestage_hw.dma.axi import AXI4Signature
from prestage_hw.layouts import RecordLayout

__all__ = ["Predictor", "PredictorSignature"]


class PredictorSignature(wiring.Signature):
    """Ports of a predictor.

    Parameters
    ----------
    config : :class:`DeviceConfig`
        Device whose widths apply.

    Members
    -------
    begin : ``In(stream.Signature(RecordLayout("BeginToken")))``
        A token starts. Taken before a decision that is transferred in the same cycle.
    decisions : ``In(stream.Signature(RecordLayout("RoutingDecision")))``
        Truth for its layer, trigger for the next. Experts are distinct and exist.
    hints : ``In(stream.Signature(RecordLayout("Candidate")))``
        Opinions from outside, which join the candidates. Taken after a token start and a decision
        that are transferred in the same cycle.
    candidates : ``Out(stream.Signature(RecordLayout("Candidate")))``
        Experts worth prefetching, best first: predicted ones and those of hints.
    values : ``Out(stream.Signature(RecordLayout("ValueBeat")))``
        What the experts of a layer are worth, part by part: chances as soon as they are predicted,
        reuse values after the layer was routed. Nothing for predictors that rank without values.
    threshold, far_threshold : ``In(8)``
        Least confidence, in 1/256, of a candidate for the next layer and for layers farther away.
    ahead : ``In(8)``
        Layers that are proposed when a token starts.
    table_requests : ``In(stream.Signature(RecordLayout("TableRequest")))``
        Reads and writes of table words.
    table_values : ``Out(stream.Signature(32))``
        One value for each read, in order; none for a write.
    table_select : ``In(8)``
        Table that ``table_words`` is about.
    table_words : ``Out(24)``
        Words in the selected table, one cycle after ``table_select``; 0 if there is no such table.
    parity_errors : ``Out(1)``
        Strobe: a table word was read with wrong parity.
    bus, base : ``Out(AXI4Signature(...))``, ``In(address bits)``
        Memory of the token tables and where they begin; only with ``config.token_memory``.
    clear : ``In(1)``
        A pulse clears all tables, after everything that was accepted up to that cycle.
    idle : ``Out(1)``
        Nothing to do and nothing in an output register.
    """

    def __init__(self, *, config):
        memory = {
            "bus": Out(
                AXI4Signature(address_bits=config.address_bits, data_bits=config.bits("data"))
            ),
            "base": In(config.address_bits),
        }
        super().__init__(
            {
                **(memory if config.token_memory else {}),
                "begin": In(stream.Signature(RecordLayout("BeginToken", config=config))),
                "decisions": In(stream.Signature(RecordLayout("RoutingDecision", config=config))),
                "hints": In(stream.Signature(RecordLayout("Candidate", config=config))),
                "candidates": Out(stream.Signature(RecordLayout("Candidate", config=config))),
                "values": Out(stream.Signature(RecordLayout("ValueBeat", config=config))),
                "threshold": In(8),
                "far_threshold": In(8),
                "ahead": In(8),
                "table_requests": In(stream.Signature(RecordLayout("TableRequest", config=config))),
                "table_values": Out(stream.Signature(unsigned(32))),
                "table_select": In(8),
                "table_words": Out(24),
                "parity_errors": Out(1),
                "clear": In(1),
                "idle": Out(1),
            }
        )


class Predictor(wiring.Component):
    """Base of all predictors.

    Parameters
    ----------
    config : :class:`DeviceConfig`
        Device that the predictor is part of.

    Members
    -------
    As in :class:`PredictorSignature`.

    Raises
    ------
    TypeError
        If ``config`` is not a :class:`DeviceConfig`.
    """

    def __init__(self, config):
        require_config(config)
        self.config = config
        super().__init__(PredictorSignature(config=config))
