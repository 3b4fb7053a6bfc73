"""Which expert has to go: use rates, the predictor's values, and the search for a victim."""

from amaranth import Array, Cat, Const, Module, Mux, Signal, unsigned
from amaranth.lib import data, stream, wiring
from amaranth.lib.memory import Memory
from amaranth.lib.wiring import In, Out

from prestage_hw.contract.params import require_config
from prestage_hw.contract.records import ValueKind
from prestage_hw.layouts import RecordLayout

from .directory import MARK_BITS, SlotLayout

__all__ = ["Victims"]

#: Visits of a layer are counted in so many bits.
_VISIT_BITS = 10

#: Use rate after that many visits of the layer without a use, in 1/256; 0 after the last.
_DECAYS = tuple(round(256 * (15 / 16) ** age) for age in range(64))

# Cycles from the one in which a slot's state is asked for to the one in which it is compared.
_STAGES = 12


def _rows(shape, depth):
    # What is read while a row is written is not looked at, so synthesis need not care for it.
    return Memory(shape=shape, depth=depth, init=[], attrs={"no_rw_check": 1})


def _delayed(m, value, cycles):
    """``value`` so many cycles later."""
    for _ in range(cycles):
        later = Signal.like(value)
        m.d.sync += later.eq(value)
        value = later
    return value


class Victims(wiring.Component):
    """Rank the experts in the slots, and search for the one that has to go.

    A search looks at the slot that the last one remembered and at ``samples`` slots after those of
    the last one, a slot and context a cycle, and takes the least worth. While no slot may be taken
    it goes on with ``samples`` more, until all were looked at. ``done`` rises
    ``search_cycles + (passes - 1) * pass_cycles`` cycles after ``begin``.

    Parameters
    ----------
    config : :class:`DeviceConfig`
        Device whose experts are ranked.
    valued : :class:`bool`
        Whether the predictor gives values; else those that come are ignored.

    Attributes
    ----------
    samples : :class:`int`
        Slots of one pass.
    passes : :class:`int`
        Most passes of a search.
    search_cycles, pass_cycles : :class:`int`
        See above, in cycles.
    row_bits : :class:`int`
        Width of ``row``, in bits.

    Members
    -------
    values : ``In(stream.Signature(RecordLayout("ValueBeat", config=config)))``
        Values of experts. Taken at once unless a search or clearing is under way.
    layer, expert, ctx : ``In``
        The request that arrived with ``look``, from the next cycle to the end of its search. The
        next ``look`` comes seven cycles later at the earliest if it counts.
    look : ``In(1)``
        Read the use rate of ``look_key``.
    look_key : ``In(StructLayout({"expert": ..., "layer": ...}))``
        Expert of a request that arrives.
    count : ``In(1)``
        In the cycle after ``look``: it is a demand.
    first : ``In(1)``
        With ``count``: it starts a decision.
    mark : ``Out(MARK_BITS)``
        Visits of ``layer``, from two cycles after ``look`` on.
    next_use : ``In(1)``
        Rank by predicted next use; else by use rate.
    begin : ``In(1)``
        Start a search, in the cycle after ``look`` or later.
    bids : ``In(1)``
        With ``begin``, to the end of the search: it is for a prefetch that has to be worth as much.
    value : ``In(8)``
        Confidence of that prefetch.
    strict : ``In(1)``
        It has to be worth more.
    banked : ``In(1)``, ``bank`` : ``In(config.bank_bits)``
        With ``begin``, to the end of the search: only slots of that bank may be taken; only where
        experts may have copies.
    searching : ``Out(1)``
        A search is under way and ``slot`` counts.
    slot : ``Out(config.bits("slot"))``
        Slot whose state is asked for; when ``done``, the victim.
    state : ``In(SlotLayout(config=config))``
        State of the slot that was asked for two cycles ago.
    done : ``Out(1)``
        The search ends. The members below count in that cycle.
    found : ``Out(1)``
        A slot may be taken.
    outbid : ``Out(1)``
        It is worth more than the prefetch, or as much if that is strict.
    victim : ``Out(config.bits("slot"))``
        The slot.
    free : ``In(1)``, ``free_slot`` : ``In(config.bits("slot"))``
        A slot became free: look at it first.
    clear : ``In(1)``, ``row`` : ``In(row_bits)``
        Forget row ``row`` of all memories.

    Raises
    ------
    TypeError
        If ``config`` is not a :class:`DeviceConfig`.
    """

    def __init__(self, *, config, valued):
        require_config(config)
        self.config = config
        self.valued = valued
        self.samples = config.victim_pass
        self.passes = -(-config.slots // self.samples)
        self.pass_cycles = self.samples * config.contexts + _STAGES + 1
        self.search_cycles = 2 * config.contexts + self.pass_cycles
        layer, expert = config.bits("layer"), config.bits("expert")
        key = data.StructLayout({"expert": unsigned(expert), "layer": unsigned(layer)})
        self._ctx_bits = config.bits("ctx") if config.contexts > 1 else 0
        self._beat_bits = config.bits("lane_beat") if config.lane_beats > 1 else 0
        self.row_bits = max(key.size, self._ctx_bits + layer + self._beat_bits)
        slot = unsigned(config.bits("slot"))
        banks = {"banked": In(1), "bank": In(config.bank_bits)}
        super().__init__(
            {
                **(banks if config.replicas > 1 else {}),
                "values": In(stream.Signature(RecordLayout("ValueBeat", config=config))),
                "layer": In(layer),
                "expert": In(expert),
                "ctx": In(config.bits("ctx")),
                "look": In(1),
                "look_key": In(key),
                "count": In(1),
                "first": In(1),
                "mark": Out(MARK_BITS),
                "next_use": In(1),
                "begin": In(1),
                "bids": In(1),
                "value": In(8),
                "strict": In(1),
                "searching": Out(1),
                "slot": Out(slot),
                "state": In(SlotLayout(config=config)),
                "done": Out(1),
                "found": Out(1),
                "outbid": Out(1),
                "victim": Out(slot),
                "free": In(1),
                "free_slot": In(slot),
                "clear": In(1),
                "row": In(self.row_bits),
            }
        )

    def elaborate(self, platform):
        m = Module()
        m.d.comb += self.values.ready.eq(~self.searching & ~self.clear)
        self._search(m, *self._count_uses(m))
        return m

    def _count_uses(self, m):
        """Memories of use rates and visits.

        Returns, for the search, the port of the rates, what was read there a cycle ago, the rate of
        that two cycles later, and the port of the visits.
        """
        config = self.config
        rate_layout = data.StructLayout({"rate": 8, "stamp": _VISIT_BITS})
        key_bits = config.bits("expert") + config.bits("layer")
        m.submodules.rates = rates = _rows(rate_layout, 1 << key_bits)
        m.submodules.visits = visits = _rows(_VISIT_BITS, 1 << config.bits("layer"))
        rate_read, rate_write = rates.read_port(), rates.write_port()
        visit_read, visit_write = visits.read_port(), visits.write_port()

        # In the second cycle after `look`: what was read, and a visit counted.
        looked = Signal()
        rate = Signal(rate_layout, reset_less=True)
        read_visits = Signal(_VISIT_BITS)
        counting = Signal()
        first = Signal()
        m.d.sync += [
            looked.eq(self.look),
            counting.eq(self.count),
            first.eq(self.first),
            rate.eq(rate_read.data),
        ]
        rate_later = _delayed(m, rate.rate, 2)
        with m.If(looked):
            m.d.sync += read_visits.eq(visit_read.data)
        key = Signal(key_bits)
        with m.If(self.count):
            m.d.sync += key.eq(Cat(self.expert, self.layer))
        visits_now = Signal(_VISIT_BITS)
        m.d.comb += visits_now.eq(read_visits + (counting & first))
        with m.If(counting):
            m.d.sync += read_visits.eq(visits_now)
        m.d.comb += [
            self.mark.eq(read_visits),
            visit_write.addr.eq(key[config.bits("expert") :]),
            visit_write.data.eq(visits_now),
            visit_write.en.eq(counting & first),
        ]

        # Third: its age, which the visit that is being counted makes one more. Fourth: how much of
        # the rate is left. Fifth: what the use makes of it.
        age = Signal(_VISIT_BITS)
        ages = _delayed(m, counting & first, 1)
        decay = Signal(9)
        left = Signal(8)
        m.d.sync += [
            age.eq(read_visits - rate.stamp),
            decay.eq(self._decay(age, ages)),
            left.eq((rate_later * decay) >> 8),
            rate_write.addr.eq(key),
            rate_write.data.rate.eq(left + ((271 - left) >> 4)),
            rate_write.data.stamp.eq(read_visits),
            rate_write.en.eq(_delayed(m, counting, 3)),
        ]
        with m.If(self.clear):
            m.d.comb += [
                visit_write.addr.eq(self.row),
                visit_write.data.eq(0),
                visit_write.en.eq(1),
            ]
            m.d.sync += [
                rate_write.addr.eq(self.row),
                rate_write.data.as_value().eq(0),
                rate_write.en.eq(1),
            ]
        m.d.comb += [
            rate_read.addr.eq(self.look_key.as_value()),
            visit_read.addr.eq(self.look_key.layer),
        ]
        return rate_read, rate, rate_later, visit_read

    def _decay(self, age, more=None):
        """What is left of a use rate after so many visits, or one more, in 1/256."""
        # An addition in front of the table would be too long a path.
        table = [*_DECAYS, *_DECAYS[1:], 0]
        index = age[:6] if more is None else Cat(age[:6], more)
        values = Array(Const(decay, 9) for decay in table[: 1 << len(index)])
        return Mux(age[6:].any(), 0, values[index])

    def _read_values(self, m, address, lane):
        """Memories of the values; V, R and which is newer, two cycles after ``address``."""
        config = self.config
        if not self.valued:
            return Const(0, 8), Const(0, 8), Const(0, 1)
        lanes = config.predictor_lanes
        depth = 1 << len(address)
        arriving = self.values.payload
        taken = self.values.valid & self.values.ready
        # Written from registers: the memories are far apart.
        place, word_to_write = Signal(len(address)), Signal(8 * lanes)
        m.d.sync += [
            place.eq(self._value_address(arriving.ctx, arriving.layer, arriving.beat)),
            word_to_write.eq(arriving.values.as_value()),
        ]
        with m.If(self.clear):
            m.d.sync += [place.eq(self.row), word_to_write.eq(0)]
        found = []
        for name, kind in (
            ("chances", ValueKind.CHANCE),
            ("reuse", ValueKind.REUSE),
            ("newer", None),
        ):
            width = 8 * lanes if kind is not None else 1
            memory = _rows(width, depth)
            m.submodules[name] = memory
            read, write = memory.read_port(), memory.write_port()
            m.d.comb += [read.addr.eq(address), write.addr.eq(place)]
            if kind is None:
                m.d.sync += [
                    write.data.eq(arriving.kind & ~self.clear),
                    write.en.eq(taken | self.clear),
                ]
            else:
                m.d.comb += write.data.eq(word_to_write)
                m.d.sync += write.en.eq(taken & (arriving.kind == kind) | self.clear)
            word = Signal(width, reset_less=True)
            m.d.sync += word.eq(read.data)
            found.append(word if kind is None else word.word_select(lane, 8))
        return found

    def _value_address(self, ctx, layer, beat):
        return Cat(beat[: self._beat_bits], layer, ctx[: self._ctx_bits])

    def _search(self, m, rate_read, rate_5, rate_7, visit_read):
        config = self.config
        contexts, layers = config.contexts, config.model.layers
        slot_bits = config.bits("slot")

        # Layer of the latest decision of each context.
        current = [Signal(config.bits("layer"), name=f"current_{c}") for c in range(contexts)]
        active = [Signal(name=f"active_{c}") for c in range(contexts)]
        for c in range(contexts):
            with m.If(self.count & self.first & (self.ctx == c)):
                m.d.sync += [current[c].eq(self.layer), active[c].eq(1)]
            with m.If(self.clear):
                m.d.sync += active[c].eq(0)

        # What is asked for: the candidate, the remembered slot, then the pass.
        pointer = Signal(slot_bits)
        remembered = Signal(slot_bits)
        remembers = Signal()
        step = Signal(range(self.samples + 2))
        ctx = Signal(range(contexts))
        asking = Signal()
        passes = Signal(range(self.passes + 1))
        is_candidate = Signal()
        is_remembered = Signal()
        last_ctx = Signal()
        last = Signal()
        m.d.comb += [
            is_candidate.eq(step == 0),
            is_remembered.eq(step == 1),
            last_ctx.eq(ctx == contexts - 1),
            last.eq(asking & last_ctx & (step == self.samples + 1)),
        ]
        with m.If(~asking):
            m.d.comb += self.slot.eq(self.victim)
        with m.Elif(is_remembered):
            m.d.comb += self.slot.eq(remembered)
        with m.Else():
            m.d.comb += self.slot.eq(pointer)
        with m.If(asking & last_ctx):
            m.d.sync += [ctx.eq(0), step.eq(step + 1)]
            with m.If(step >= 2):
                m.d.sync += pointer.eq(Mux(pointer == config.slots - 1, 0, pointer + 1))
        with m.Elif(asking):
            m.d.sync += ctx.eq(ctx + 1)
        with m.If(last):
            m.d.sync += [asking.eq(0), passes.eq(passes + 1)]

        # Stage 1: the slot's state comes. Stage 2: whose values to read. Stage 3: they are asked
        # for, from registers, since the memories are far apart.
        state = self.state
        candidate_2 = _delayed(m, is_candidate, 2)
        ctx_3 = _delayed(m, ctx, 3)
        layer = Signal(config.bits("layer"))
        expert = Signal(config.bits("expert"))
        m.d.sync += [
            layer.eq(Mux(candidate_2, self.layer, state.layer)),
            expert.eq(Mux(candidate_2, self.expert, state.expert)),
        ]
        with m.If(self.searching):
            m.d.comb += [
                rate_read.addr.eq(Cat(expert, layer)),
                visit_read.addr.eq(layer),
            ]
        lane_bits = (config.predictor_lanes - 1).bit_length()
        address = Signal(self._ctx_bits + config.bits("layer") + self._beat_bits)
        m.d.comb += address.eq(self._value_address(ctx_3, layer, expert >> lane_bits))
        chance, reuse, newer = self._read_values(m, address, _delayed(m, expert[:lane_bits], 2))

        # Stage 4: the distance. Stage 5: its discount.
        distance = Signal(range(layers + 1))
        here = Array(current)[ctx_3]
        with m.If(layer >= here):
            m.d.sync += distance.eq(layer - here)
        with m.Else():
            m.d.sync += distance.eq(layer + layers - here)
        table = [min(255, round(256 * (63 / 64) ** ahead)) for ahead in range(layers + 1)]
        discount = Signal(8)
        full_turn = Signal()
        m.d.sync += [
            discount.eq(Array(Const(entry, 8) for entry in table)[distance]),
            full_turn.eq(distance == 0),
        ]
        is_active = _delayed(m, Array(active)[ctx_3], 2)

        # Stage 5: values and rates are in registers. 6: how old the rate is. 7: how much of it is
        # left.
        visits_5 = Signal(_VISIT_BITS)
        m.d.sync += visits_5.eq(visit_read.data)
        candidate_5 = _delayed(m, candidate_2, 3)
        waits_6 = Signal()  # a prefetch whose layer was not routed since
        confidence = Signal(8)
        mark_5 = _delayed(m, state.mark, 3)
        prefetched_5 = _delayed(m, state.prefetched, 3)
        value_5 = _delayed(m, state.value, 3)
        m.d.sync += [
            waits_6.eq(candidate_5 | (prefetched_5 & (mark_5 == visits_5[:MARK_BITS]))),
            confidence.eq(Mux(candidate_5, self.value, value_5)),
        ]
        age = Signal(_VISIT_BITS)
        decay = Signal(9)
        waits = _delayed(m, waits_6, 1)
        least = Signal(8)
        chance_7, reuse_7, newer_7 = (_delayed(m, each, 2) for each in (chance, reuse, newer))
        discount_7, full_turn_7 = _delayed(m, discount, 2), _delayed(m, full_turn, 2)
        m.d.sync += [
            age.eq(visits_5 - rate_5.stamp),
            decay.eq(self._decay(age)),
            least.eq(Mux(waits_6, confidence, 0)),
        ]

        # Stage 8: use rate, and the chance that a waiting prefetch raises.
        chance_now = Signal(8)
        rate_8, chance_8 = Signal(8), Signal(8)
        by_habit = Signal()
        discount_8 = Signal(8)
        m.d.comb += chance_now.eq(Mux(newer_7, 0, chance_7))
        m.d.sync += [
            rate_8.eq((rate_7 * decay) >> 8),
            chance_8.eq(Mux(chance_now > least, chance_now, least)),
            by_habit.eq(newer_7 & ~waits),
            discount_8.eq(Mux(full_turn_7 & (newer_7 | waits), table[layers], discount_7)),
        ]
        reuse_8, least_8 = _delayed(m, reuse_7, 1), _delayed(m, least, 1)

        # Stage 9: habit. 10: its share where the chance fails. 11: worth. 12: worth of a use then.
        habit = Signal(9)
        failing = Signal(9)
        failing_13 = Signal(12)
        frequency = Signal(8)
        m.d.comb += failing.eq(256 - chance_8)
        m.d.sync += [
            habit.eq(reuse_8 + rate_8),
            # Thirteen times as much; a multiplier would be slower than sums.
            failing_13.eq((failing << 3) + (failing << 2) + failing),
            frequency.eq(Mux(rate_8 > least_8, rate_8, least_8)),
        ]
        product = Signal(21)
        m.d.sync += product.eq(failing_13 * habit)
        habit_10, chance_10 = _delayed(m, habit, 1), _delayed(m, chance_8, 2)
        worth = Signal(9)
        m.d.sync += worth.eq(
            Mux(_delayed(m, by_habit, 2), habit_10, (chance_10 << 1) + (product >> 12))
        )
        keep = Signal(12)
        frequency_11 = _delayed(m, frequency, 2)
        is_active_11 = _delayed(m, is_active, 6)
        discount_11 = _delayed(m, discount_8, 3)
        with m.If(~self.next_use):
            m.d.sync += keep.eq(frequency_11 << 4)
        with m.Elif(is_active_11):
            m.d.sync += keep.eq((worth * discount_11) >> 5)
        with m.Else():
            m.d.sync += keep.eq(0)

        # Stage 12: the greatest over the contexts, then the least over the slots.
        may = Signal()  # the slot may be taken
        may_take = ~candidate_2 & (state.pins == 0) & ~state.filling & ~state.locked
        if config.replicas > 1:
            bank_2 = _delayed(m, self.slot[: config.bank_bits], 2)
            may_take &= ~state.held & (~self.banked | (bank_2 == self.bank))
        m.d.sync += may.eq(may_take)
        eligible = _delayed(
            m, may & _delayed(m, asking & (~is_remembered | remembers), 3), _STAGES - 3
        )
        owned = _delayed(m, state.valid, _STAGES - 2)
        number = _delayed(m, self.slot, _STAGES)
        is_bid = _delayed(m, _delayed(m, asking & is_candidate, 3), _STAGES - 3)
        final = _delayed(m, last_ctx, _STAGES)
        ended = _delayed(m, last, _STAGES + 1)
        greatest = Signal(12)
        if contexts > 1:
            so_far = Signal(12)
            fresh = _delayed(m, ctx == 0, _STAGES)
            m.d.comb += greatest.eq(Mux(~fresh & (so_far > keep), so_far, keep))
            m.d.sync += so_far.eq(greatest)
        else:
            m.d.comb += greatest.eq(keep)
        key = Signal(13)
        m.d.comb += key.eq(Mux(owned, Cat(greatest, Const(1, 1)), 0))

        bid = Signal(13)
        best, second = Signal(13), Signal(13)
        best_slot, second_slot = Signal(slot_bits), Signal(slot_bits)
        has_best, has_second = Signal(), Signal()
        with m.If(is_bid & final):
            m.d.sync += bid.eq(Cat(greatest, Const(1, 1)))
        with m.If(eligible & final):
            with m.If(~has_best | (key < best)):
                m.d.sync += [
                    best.eq(key),
                    best_slot.eq(number),
                    has_best.eq(1),
                    second.eq(best),
                    second_slot.eq(best_slot),
                    has_second.eq(has_best),
                ]
            with m.Elif((number != best_slot) & (~has_second | (key < second))):
                m.d.sync += [second.eq(key), second_slot.eq(number), has_second.eq(1)]

        exhausted = Signal()
        m.d.comb += [
            exhausted.eq(has_best | (passes == self.passes)),
            self.done.eq(ended & exhausted),
            self.found.eq(has_best),
            self.outbid.eq(has_best & self.bids & Mux(self.strict, best >= bid, best > bid)),
            self.victim.eq(best_slot),
        ]
        with m.If(ended & ~exhausted):
            m.d.sync += [asking.eq(1), step.eq(2)]
        with m.If(self.done):
            m.d.sync += [
                self.searching.eq(0),
                remembered.eq(Mux(self.outbid, best_slot, second_slot)),
                remembers.eq(self.outbid | has_second),
            ]
        with m.If(self.begin):
            m.d.sync += [
                self.searching.eq(1),
                asking.eq(1),
                step.eq(0),
                ctx.eq(0),
                passes.eq(0),
                has_best.eq(0),
                has_second.eq(0),
            ]
        with m.If(self.free):
            m.d.sync += [remembered.eq(self.free_slot), remembers.eq(1)]
        with m.If(self.clear):
            m.d.sync += [pointer.eq(0), remembers.eq(0)]
