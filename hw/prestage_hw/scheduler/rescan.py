"""Rescans: when the buffer's own values are looked through, and for whom."""

from amaranth import Module, Mux, Signal, unsigned
from amaranth.lib import enum, stream, wiring
from amaranth.lib.wiring import In, Out

from prestage_hw.contract.params import require_config
from prestage_hw.contract.records import RescanCode
from prestage_hw.layouts import RecordLayout

__all__ = ["Rescans"]


class _State(enum.Enum, shape=unsigned(3)):
    REST = 0
    CHOOSE = 1  # Whose turn is it?
    ASK = 2
    WAIT = 3
    HOLD = 4  # What was found is registered.
    FOUND = 5


class Rescans(wiring.Component):
    """Ask the buffer what is worth a prefetch, in turn for each context that is awake.

    A context is awake from values of it that come, or a slot that may be taken again, until nothing
    is found, or what is found is given no slot; all sleep once a prefetch has failed, which would
    be found again at once. What was found is dropped, and asked for anew, if
    anything comes that may change it.

    Parameters
    ----------
    config : :class:`DeviceConfig`
        Parameters of the device.

    Members
    -------
    on : ``In(1)``
        0 lets all contexts sleep.
    near : ``In(1)``, ``ahead`` : ``In(8)``, ``least`` : ``In(8)``, ``cutoff_layer`` : ``In(8)``
        Fields of requests.
    valued : ``In(config.contexts)``
        Strobes: values of a context come.
    freed : ``In(1)``
        Strobe: a slot may be taken again.
    may_ask : ``In(1)``
        A prefetch may start, and nothing better waits.
    disturbed : ``In(1)``
        Strobe: something else is served that may change what there is to be found.
    requests : ``Out(stream.Signature(RecordLayout("RescanRequest", config=config)))``
        To the buffer.
    results : ``In(stream.Signature(RecordLayout("RescanResult", config=config)))``
        Its answers; always ready.
    found : ``Out(1)``
        There is something. Unlike a stream's ``valid`` it may fall before it is taken.
    ctx : ``Out(config.bits("ctx"))``, ``result`` : ``Out(RecordLayout("RescanResult"))``
        For whom, and what, from a cycle before ``found`` rises.
    take : ``In(1)``
        Strobe while ``found``: it is looked up.
    failed : ``In(1)``
        Strobe: what was taken last is given no slot.
    broken : ``In(1)``
        Strobe: a prefetch has failed.
    clear : ``In(1)``
        All contexts sleep.
    idle : ``Out(1)``
        None is awake, and nothing is asked.
    """

    def __init__(self, *, config):
        require_config(config)
        self.config = config
        super().__init__(
            {
                "on": In(1),
                "near": In(1),
                "ahead": In(8),
                "least": In(8),
                "cutoff_layer": In(8),
                "valued": In(config.contexts),
                "freed": In(1),
                "may_ask": In(1),
                "disturbed": In(1),
                "requests": Out(stream.Signature(RecordLayout("RescanRequest", config=config))),
                "results": In(stream.Signature(RecordLayout("RescanResult", config=config))),
                "found": Out(1),
                "ctx": Out(config.bits("ctx")),
                "result": Out(RecordLayout("RescanResult", config=config)),
                "take": In(1),
                "failed": In(1),
                "broken": In(1),
                "clear": In(1),
                "idle": Out(1),
            }
        )

    def elaborate(self, platform):
        m = Module()
        contexts = self.config.contexts
        state = Signal(_State)
        awake = Signal(contexts)
        turn = Signal.like(self.ctx)
        spoiled = Signal()  # The answer does not count.
        request = self.requests.payload

        # The first one awake from ``turn`` on.
        chosen = Signal.like(self.ctx)
        from_turn = Signal(contexts)
        m.d.comb += from_turn.eq((awake >> turn) << turn)
        for c in reversed(range(contexts)):
            with m.If(Mux(from_turn.any(), from_turn, awake)[c]):
                m.d.comb += chosen.eq(c)

        changes = Signal()
        m.d.comb += [
            changes.eq(self.disturbed | self.valued.any() | ~self.on),
            self.results.ready.eq(1),
            self.found.eq(state == _State.FOUND),
            self.idle.eq((state == _State.REST) & ~awake.any()),
            self.requests.valid.eq(state == _State.ASK),
        ]
        with m.If(changes):
            m.d.sync += spoiled.eq(1)

        sleeps = Signal()
        m.d.comb += sleeps.eq(self.failed)
        with m.Switch(state):
            with m.Case(_State.REST):
                with m.If(self.on & awake.any() & self.may_ask):
                    m.d.sync += state.eq(_State.CHOOSE)
            with m.Case(_State.CHOOSE):
                m.d.sync += [
                    self.ctx.eq(chosen),
                    request.ctx.eq(chosen),
                    request.near.eq(self.near),
                    request.ahead.eq(self.ahead),
                    request.least.eq(self.least),
                    request.cutoff_layer.eq(self.cutoff_layer),
                    spoiled.eq(0),
                    # A context may have been put to sleep.
                    state.eq(Mux(awake.any() & ~changes, _State.ASK, _State.REST)),
                ]
            with m.Case(_State.ASK):
                with m.If(self.requests.ready):
                    m.d.sync += state.eq(_State.WAIT)
            with m.Case(_State.WAIT):
                with m.If(self.results.valid):
                    m.d.sync += [self.result.eq(self.results.payload), state.eq(_State.REST)]
                    with m.If(
                        ~spoiled & ~changes & (self.results.payload.code != RescanCode.DISTURBED)
                    ):
                        m.d.sync += turn.eq(Mux(self.ctx == contexts - 1, 0, self.ctx + 1))
                        with m.If(self.results.payload.code == RescanCode.FOUND):
                            m.d.sync += state.eq(_State.HOLD)
                        with m.Else():
                            m.d.comb += sleeps.eq(1)
            with m.Case(_State.HOLD):
                m.d.sync += state.eq(Mux(changes, _State.REST, _State.FOUND))
            with m.Case(_State.FOUND):
                with m.If(self.take | changes):
                    m.d.sync += state.eq(_State.REST)

        for c in range(contexts):
            with m.If(sleeps & (self.ctx == c)):
                m.d.sync += awake[c].eq(0)
            with m.If(self.valued[c] | self.freed):
                m.d.sync += awake[c].eq(1)
        with m.If(~self.on | self.clear | self.broken):
            m.d.sync += awake.eq(0)
        with m.If(self.clear):
            m.d.sync += turn.eq(0)
        return m
