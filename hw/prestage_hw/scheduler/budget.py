"""Budget: measures layers and tiles, and says which prefetches would come too late."""

from amaranth import Array, Module, Mux, Signal, signed, unsigned
from amaranth.lib import memory, wiring
from amaranth.lib.wiring import In, Out

from prestage_hw.contract.checks import require_integer
from prestage_hw.contract.params import require_config
from prestage_hw.contract.registers import TIME_BITS

__all__ = ["Budget", "Mean", "answer_cycles"]

_EIGHTHS = 8

#: Cycles of an answer beside the multiplication.
_ANSWER_CYCLES = 4


def answer_cycles(config):
    """Cycles from a question to its answer: one for each bit of the most tiles that may be in
    flight, at least 8, and 4 more.
    """
    return max(8, ((config.inflight + 1) * config.tiles).bit_length()) + _ANSWER_CYCLES


class Mean(wiring.Component):
    """Exponential mean of times, the last of which has the weight 1/8.

    Eight times the mean is kept: from it goes an eighth, rounded down, and the new time is added.
    The first time is the mean itself.

    Parameters
    ----------
    bits : :class:`int`
        Width of times.

    Members
    -------
    sample, valid : ``In(bits)``, ``In(1)``
        Strobe: a time. Not two in a row.
    clear : ``In(1)``
        Forgets all.
    mean : ``Out(bits)``
        The mean, two cycles after its last sample; 0 if there was none.
    """

    def __init__(self, *, bits):
        self.bits = bits
        super().__init__({"sample": In(bits), "valid": In(1), "clear": In(1), "mean": Out(bits)})

    def elaborate(self, platform):
        m = Module()
        total = Signal(self.bits + 3)
        change = Signal(signed(self.bits + 4))
        adds = Signal()
        started = Signal()
        m.d.comb += self.mean.eq(total >> 3)
        m.d.sync += [
            adds.eq(self.valid),
            change.eq(Mux(started, self.sample - self.mean, self.sample << 3)),
        ]
        with m.If(adds):
            m.d.sync += [total.eq(total + change), started.eq(1)]
        with m.If(self.clear):
            m.d.sync += [total.eq(0), started.eq(0), adds.eq(0)]
        return m


class Budget(wiring.Component):
    """Say whether enough of a prefetch would come before its deadline.

    With a mean time T of a layer, a mean time t of a tile, n tiles of other fetches yet to come and
    e cycles since its context's last routing decision, a prefetch whose deadline is d decisions
    away is late if ``(n + due) * t > d * T - e``: ``due`` are ``budget`` eighths of its tiles,
    rounded up. Without either mean, or if that decision is 2 ** 24 cycles or more ago, it is not.

    The time of a layer is that from one routing decision of a context to its next, over all
    contexts, if it is below 2 ** 24 cycles. The time of a tile is that from its being taken by the
    DMA engine, or the end of the tile before if that is later, to its own end, at most 2 ** 24 - 1;
    tiles that fail do not count.

    Parameters
    ----------
    config : :class:`DeviceConfig`
        Parameters of the device.
    time_bits : :class:`int`
        Width of times; 24 above.

    Members
    -------
    routed, ctx : ``In``
        Strobe: a routing decision of this context is looked up.
    fetched : ``In(1)``
        Strobe: a tile was taken by the DMA engine.
    completed, failed : ``In(1)``
        Strobe: a tile's end was taken; it had failed. Not two in a row.
    left : ``In``
        Tiles of fetches in flight that are yet to come.
    budget : ``In(4)``
        Eighths; more than 8 are 8.
    ask, ask_ctx, ask_deadline : ``In``
        Strobe: would a prefetch for this context, with a deadline so many decisions away (1 to
        128), be late? Not before the answer to the one before.
    ask_layer : ``In``
        Layer that the prefetch is for; only with ``config.layer_bytes``.
    answered, late : ``Out(1)``
        Strobe: the answer, ``latency`` cycles later.
    layer_time, tile_time : ``Out(24)``
        The means, 0 if there is none.
    clear : ``In(1)``
        A pulse forgets the means and all decisions.
    """

    def __init__(self, *, config, time_bits=TIME_BITS):
        require_config(config)
        require_integer("Width of times", time_bits, low=4, high=32)
        self.config = config
        self.time_bits = time_bits
        left = range(config.inflight * config.tiles + 1)
        #: Cycles from ``ask`` to ``answered``.
        self.latency = answer_cycles(config)
        #: Bits that are multiplied, one a cycle.
        self.steps = self.latency - _ANSWER_CYCLES
        super().__init__(
            {
                "routed": In(1),
                "ctx": In(config.bits("ctx")),
                "fetched": In(1),
                "completed": In(1),
                "failed": In(1),
                "left": In(left),
                "budget": In(4),
                "ask": In(1),
                "ask_ctx": In(config.bits("ctx")),
                "ask_deadline": In(8),
                **({"ask_layer": In(config.bits("layer"))} if config.layer_bytes else {}),
                "answered": Out(1),
                "late": Out(1),
                "layer_time": Out(time_bits),
                "tile_time": Out(time_bits),
                "clear": In(1),
            }
        )

    def elaborate(self, platform):
        m = Module()
        config = self.config
        bits = self.time_bits
        contexts = range(config.contexts)
        m.submodules.layers = layers = Mean(bits=bits)
        m.submodules.tiles = tiles = Mean(bits=bits)
        m.d.comb += [
            layers.clear.eq(self.clear),
            tiles.clear.eq(self.clear),
            self.layer_time.eq(layers.mean),
            self.tile_time.eq(tiles.mean),
        ]

        # --- layers: when each context's last decision was, modulo 2 ** bits ---
        now = Signal(bits)
        m.d.sync += now.eq(now + 1)
        # Synthesis makes no memory of a single word.
        m.submodules.stamps = stamps = memory.Memory(
            shape=unsigned(bits), depth=max(2, config.contexts), init=[]
        )
        stamp_write = stamps.write_port()
        stamp_read = stamps.read_port(domain="comb")
        known = Signal(config.contexts)  # The stamp is there,
        old = Signal(config.contexts)  # and `now` has wrapped since.
        routed, routed_ctx = Signal(), Signal(config.bits("ctx"))
        routed_at = Signal(bits)
        asks = Signal()
        m.d.sync += [
            routed.eq(self.routed & ~self.clear),
            routed_ctx.eq(self.ctx),
            routed_at.eq(now),
            asks.eq(self.ask),
        ]
        asked_ctx = Signal(config.bits("ctx"))
        with m.If(self.ask):
            m.d.sync += asked_ctx.eq(self.ask_ctx)
        # A routing decision and a question never come in the same cycle.
        stamp_ctx = Signal(config.bits("ctx"))
        elapsed = Signal(bits)
        recent = Signal()
        m.d.comb += [
            stamp_ctx.eq(Mux(routed, routed_ctx, asked_ctx)),
            stamp_read.addr.eq(stamp_ctx),
            stamp_write.addr.eq(routed_ctx),
            stamp_write.data.eq(routed_at),
            stamp_write.en.eq(routed),
        ]
        # Times are those of a cycle before.
        m.d.comb += [
            elapsed.eq(routed_at - stamp_read.data),
            recent.eq(
                known.bit_select(stamp_ctx, 1)
                & (~old.bit_select(stamp_ctx, 1) | (routed_at < stamp_read.data))
            ),
        ]
        with m.If(now == 0):
            m.d.sync += [old.eq(known), known.eq(known & ~old)]
        for c in contexts:
            with m.If(routed & (routed_ctx == c)):
                # A wrap in this very cycle, which `routed_at` is before, counts.
                m.d.sync += [known[c].eq(1), old[c].eq(now == 0)]
        with m.If(self.clear):
            m.d.sync += [known.eq(0), old.eq(0)]
        m.d.sync += [layers.sample.eq(elapsed), layers.valid.eq(routed & recent & ~self.clear)]

        # --- tiles ---
        busy = Signal(range(config.inflight * config.tiles + 1))  # Tiles with the DMA engine.
        timer = Signal(bits)
        m.d.sync += [
            busy.eq(busy + self.fetched - self.completed),
            tiles.sample.eq(timer),
            tiles.valid.eq(self.completed & ~self.failed & ~self.clear),
            timer.eq(timer + ~timer.all()),
        ]
        # Whether a tile is fetched comes late in a cycle: the timer stands at its start till then.
        with m.If(self.completed | (busy == 0)):
            m.d.sync += timer.eq(1)

        # --- answers: d * T - (n + due) * t - e, bit by bit from the highest one on ---
        due_of = [
            Array(-(-tiles * min(n, _EIGHTHS) // _EIGHTHS) for n in range(16))
            for tiles in config.layer_tiles[: None if config.layer_bytes else 1]
        ]
        due = Signal(range(config.tiles + 1))
        decisions, ahead = Signal(self.steps), Signal(self.steps)
        total = Signal(signed(bits + self.steps + 2))
        term = Signal(signed(bits + 1))
        since = Signal(bits)
        unknown = Signal()
        at = Signal(range(self.latency))
        if config.layer_bytes:
            m.d.comb += due.eq(Array(due_of)[self.ask_layer][self.budget])
        else:
            m.d.sync += due.eq(due_of[0][self.budget])
        m.d.sync += [
            self.answered.eq(at == 1),
            self.late.eq(total[-1] & ~unknown),
            term.eq(Mux(decisions[-1], layers.mean, 0) - Mux(ahead[-1], tiles.mean, 0)),
            decisions.eq(decisions << 1),
            ahead.eq(ahead << 1),
            total.eq((total << 1) + term),
        ]
        with m.If(at != 0):
            m.d.sync += at.eq(at - 1)
        with m.If(self.ask):
            m.d.sync += [
                at.eq(self.latency - 1),
                decisions.eq(self.ask_deadline),
                ahead.eq(self.left + due),
            ]
        with m.If(asks):
            # The first term is on its way.
            m.d.sync += [
                since.eq(elapsed),
                unknown.eq(~recent | (layers.mean == 0) | (tiles.mean == 0)),
                total.eq(0),
            ]
        with m.If(at == 2):
            m.d.sync += total.eq(total - since)
        return m
