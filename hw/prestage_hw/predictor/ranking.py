"""Ranking of a layer's experts: the surest first, as candidates."""

import itertools
from functools import reduce
from operator import or_

from amaranth import Cat, Const, Module, Mux, Signal, unsigned
from amaranth.lib import data, stream, wiring
from amaranth.lib.memory import Memory
from amaranth.lib.wiring import In, Out
from amaranth.utils import ceil_log2

from prestage_hw.contract.params import require_config
from prestage_hw.contract.records import Source
from prestage_hw.layouts import RecordLayout

__all__ = ["PatchLayout", "Ranking", "ValuesLayout"]

#: Experts of a group at most. The best of a group is found anew when the group loses it.
_GROUP = 8

#: Entries that are compared down to the best one in one cycle.
_FAN_IN = 4


class ValuesLayout(data.StructLayout):
    """A beat of a layer's values on the way to be ranked.

    Parameters
    ----------
    config : :class:`DeviceConfig`
        Device whose widths apply.

    Members
    -------
    ctx, layer : as in the contract's records
        Layer that the values are about.
    beat : as in the contract's records
        Element 0 is expert beat x lanes.
    values : array of 8 bits
        Confidence of each expert, in 1/256.
    deadline : 8 bits
        Deadline of the candidates, the same in all beats of a layer.
    threshold : 8 bits
        Least value of a candidate, the same in all beats of a layer.
    far : 1 bit
        At most k candidates, not 2k; the same in all beats of a layer.
    last : 1 bit
        Last beat of the layer.
    """

    def __init__(self, *, config):
        require_config(config)
        super().__init__(
            {
                "ctx": unsigned(config.bits("ctx")),
                "layer": unsigned(config.bits("layer")),
                "beat": unsigned(config.bits("lane_beat")),
                "values": data.ArrayLayout(unsigned(8), config.predictor_lanes),
                "deadline": 8,
                "threshold": 8,
                "far": 1,
                "last": 1,
            }
        )


class PatchLayout(data.StructLayout):
    """A value that takes the place of one that was loaded.

    Parameters
    ----------
    config : :class:`DeviceConfig`
        Device whose widths apply.

    Members
    -------
    expert : as in the contract's records
        Expert of the layer that was loaded.
    value : 8 bits
        Its new value.
    valid : 1 bit
        Whether there is a new value.
    go : 1 bit
        The last one: ranking may start.
    """

    def __init__(self, *, config):
        require_config(config)
        super().__init__(
            {"expert": unsigned(config.bits("expert")), "value": 8, "valid": 1, "go": 1}
        )


class Ranking(wiring.Component):
    """Sort the experts of a layer by value, equal ones by number.

    Experts lie in groups of 8 whose best entries are in registers. Loading a beat, replacing a
    value and taking the winner away all go the same way: the group is read, written and compared
    anew, while the other groups are compared with each other::

        values, patches, winner ──▶ group ─▶ 8:4 ─▶ 4:1 ─▶ best of group ─▶ 16:4 ─▶ 4:1 ─▶ winner

    One beat and one patch are taken a cycle. After ``go``, the candidates of the layer come out,
    and the next layer's beats wait for the last of them to be taken:

    =========================================== =============================================
    first candidate valid after ``go``'s cycle  ``first_candidate_cycles`` (7 for 128 in beats of 8)
    from one candidate to the next              ``next_candidate_cycles`` (4 for 128 experts)
    values ready after the last one is taken    at most ``next_candidate_cycles``
    =========================================== =============================================

    Parameters
    ----------
    config : :class:`DeviceConfig`
        Device that the block is part of.

    Members
    -------
    values : ``In(stream.Signature(ValuesLayout))``
        A layer's values, every beat once.
    patches : ``In(stream.Signature(PatchLayout))``
        Values that take the place of loaded ones; taken after the layer's last beat, up to ``go``.
    candidates : ``Out(stream.Signature(RecordLayout("Candidate")))``
        The layer's experts with values from the threshold on, at most 2k: by value descending, of
        equal values the lower expert first.
    idle : ``Out(1)``
        No layer is loaded, not even in part, and nothing is in an output register.

    Raises
    ------
    TypeError
        If ``config`` is not a :class:`DeviceConfig`.
    """

    def __init__(self, config):
        require_config(config)
        self.config = config
        super().__init__(
            {
                "values": In(stream.Signature(ValuesLayout(config=config))),
                "patches": In(stream.Signature(PatchLayout(config=config))),
                "candidates": Out(stream.Signature(RecordLayout("Candidate", config=config))),
                "idle": Out(1),
            }
        )

    @property
    def most_candidates(self):
        """Most candidates of a layer."""
        return min(2 * self.config.model.top_k, self.config.model.experts)

    @property
    def first_candidate_cycles(self):
        """Cycles from the transfer of ``go`` to the first candidate."""
        return 5 + self._far + self._slow + self._spread

    @property
    def next_candidate_cycles(self):
        """Cycles from one candidate to the next, if it is taken at once."""
        return 4 + self._far

    @property
    def _group(self):
        """Experts of a group, a power of two."""
        return min(_GROUP, 1 << self.config.bits("expert"))

    @property
    def _groups(self):
        return -(-self.config.model.experts // self._group)

    @property
    def _spread(self):
        """Cycles more that it takes to bring the best of a group to its place among many that take
        turns.
        """
        return int(self._rows > _FAN_IN)

    @property
    def _banks(self):
        """Groups that a beat holds, at least 1."""
        return max(1, self.config.predictor_lanes // self._group)

    @property
    def _rows(self):
        """Groups that take turns."""
        return -(-self._groups // self._banks)

    @property
    def _slow(self):
        """Cycles more that it takes to compare groups that are many, and so far apart."""
        return int(self._groups > _FAN_IN)

    @property
    def _joins(self):
        """Steps that leave 16 of more groups."""
        steps, left = 0, self._groups
        while left > _FAN_IN * _FAN_IN:
            steps, left = steps + 1, -(-left // _FAN_IN)
        return steps

    @property
    def _far(self):
        """Cycles more that it takes to compare more than 16 groups."""
        return 2 * self._joins

    def elaborate(self, platform):
        m = Module()

        experts, lanes = self.config.model.experts, self.config.predictor_lanes
        group, groups = self._group, self._groups
        most = self.most_candidates
        far_most = min(most, self.config.model.top_k)
        expert_bits = self.config.bits("expert")
        lane_bits = ceil_log2(group)

        # A beat is one or more groups side by side, each in a bank of its own, or part of a group.
        banks = self._banks
        bank_bits = ceil_log2(banks)
        parts = max(1, group // lanes)
        part_bits = ceil_log2(parts)
        depth = self._rows

        key_layout = data.StructLayout({"value": 8, "present": 1})
        entry_layout = data.StructLayout({"key": key_layout, "expert": unsigned(expert_bits)})
        local_layout = data.StructLayout({"key": key_layout, "lane": unsigned(lane_bits)})

        def best(entries, *, slow=False):
            """The best of up to four entries, of equal ones the first. All pairs are compared side
            by side, which is one comparison deep. If ``slow``, the values must be the same for two
            cycles; who is present may change.
            """
            entries = list(entries)
            if len(entries) == 1:
                return entries[0]
            order = range(len(entries))
            exceeds = {}
            for one, later in itertools.combinations(order, 2):
                exceeds[one, later] = Signal(name=f"exceeds{one}{later}")
                keys = entries[later].key, entries[one].key
                if not slow:
                    m.d.comb += exceeds[one, later].eq(keys[0].as_value() > keys[1].as_value())
                    continue
                greater = Signal(name=f"greater{one}{later}")
                m.d.sync += greater.eq(keys[0].value > keys[1].value)
                m.d.comb += exceeds[one, later].eq(
                    Mux(keys[0].present == keys[1].present, greater, keys[0].present)
                )
            wins = [
                Cat(
                    exceeds[other, at] if other < at else ~exceeds[at, other]
                    for other in order
                    if other != at
                ).all()
                for at in order
            ]
            result = Signal.like(entries[0])
            m.d.comb += result.eq(
                reduce(
                    or_,
                    (
                        entry.as_value() & win.replicate(len(entry.as_value()))
                        for entry, win in zip(entries, wins, strict=True)
                    ),
                )
            )
            return result

        def by_fours(entries):
            fours = (entries[at : at + _FAN_IN] for at in range(0, len(entries), _FAN_IN))
            return [best(four, slow=bool(self._slow)) for four in fours]

        # What happens in this cycle: lanes of a group, in one bank or in all, take new keys.
        load, patch, remove = Signal(), Signal(), Signal()
        one_expert = Signal(expert_bits)
        one_key = Signal(key_layout)
        beat = self.values.payload.beat
        threshold = Signal(8)
        winner = Signal(entry_layout)

        m.d.comb += [
            one_expert.eq(Mux(remove, winner.expert, self.patches.payload.expert)),
            one_key.value.eq(self.patches.payload.value),
            one_key.present.eq(~remove & (self.patches.payload.value >= threshold)),
        ]
        one_lane = one_expert[:lane_bits]
        one_bank = one_expert[lane_bits : lane_bits + bank_bits]
        one_row = one_expert[lane_bits + bank_bits :]
        row = Signal(range(max(2, depth)))
        m.d.comb += row.eq(Mux(load, beat >> part_bits, one_row))
        row_1, row_2, row_3 = Signal.like(row), Signal.like(row), Signal.like(row)
        m.d.sync += [row_1.eq(row), row_2.eq(row_1), row_3.eq(row_2)]

        bests = []
        found = []
        for bank in range(banks):
            changes = Signal(group, name=f"changes{bank}")
            keys = Signal(data.ArrayLayout(key_layout, group), name=f"keys{bank}")
            changes_1, keys_1 = Signal.like(changes), Signal.like(keys)
            changed_1, changed_2 = Signal(name=f"changed1_{bank}"), Signal(name=f"changed2_{bank}")
            of_bank = Signal(name=f"of_bank{bank}")
            m.d.comb += of_bank.eq((patch | remove) & (one_bank == bank))
            now = []
            for lane in range(group):
                value = self.values.payload.values[(bank * group + lane) % lanes]
                part = beat[:part_bits] == lane // lanes if parts > 1 else 1
                m.d.comb += [
                    changes[lane].eq(Mux(load, part, of_bank & (one_lane == lane))),
                    keys[lane].eq(one_key),
                ]
                with m.If(load):
                    m.d.comb += [
                        keys[lane].value.eq(value),
                        keys[lane].present.eq(value >= self.values.payload.threshold),
                    ]
                memory = Memory(shape=key_layout, depth=max(2, depth), init=[])
                m.submodules[f"keys{bank}_{lane}"] = memory
                read, write = memory.read_port(), memory.write_port()
                m.d.comb += [
                    read.addr.eq(row),
                    write.addr.eq(row),
                    write.data.eq(keys[lane]),
                    write.en.eq(changes[lane]),
                ]
                entry = Signal(local_layout, name=f"entry{bank}_{lane}")
                # The last group may have lanes without an expert.
                absent = [
                    row_1 == at
                    for at in range(depth)
                    if (at * banks + bank) * group + lane >= experts
                ]
                key = Mux(changes_1[lane], keys_1[lane].as_value(), read.data.as_value())
                if absent:
                    key = Mux(Cat(absent).any(), 0, key)
                m.d.comb += [entry.key.eq(key), entry.lane.eq(lane)]
                now.append(entry)
            pairs = []
            for at in range(0, group, 2):
                pair = Signal(local_layout, name=f"pair{bank}_{at}")
                m.d.sync += pair.eq(best(now[at : at + 2]))
                pairs.append(pair)
            m.d.sync += [
                changes_1.eq(changes),
                keys_1.eq(keys),
                changed_1.eq(load | of_bank),
                changed_2.eq(changed_1),
            ]
            local = best(pairs)
            found.append((local, changed_2))
            best_of_group, changed, changed_row = local, changed_2, row_2
            if self._spread:
                best_of_group = Signal(local_layout, name=f"local{bank}")
                changed, changed_row = Signal(name=f"changed3_{bank}"), row_3
                m.d.sync += [best_of_group.eq(local), changed.eq(changed_2)]
            for at in range(depth):
                number = at * banks + bank
                if number < groups:
                    kept = Signal(local_layout, name=f"best{number}")
                    with m.If(changed & (changed_row == at)):
                        m.d.sync += kept.eq(best_of_group)
                    # Nothing to compare with until it is compared anew.
                    with m.If(remove & (winner.expert >> lane_bits == number)):
                        m.d.sync += kept.key.present.eq(0)
                    bests.append((number, kept))
        bests = [kept for _, kept in sorted(bests, key=lambda pair: pair[0])]

        # The best of all groups, in one step or several.
        entries = []
        for number, kept in enumerate(bests):
            entry = Signal(entry_layout, name=f"group{number}")
            m.d.comb += [
                entry.key.eq(kept.key),
                entry.expert.eq(Cat(kept.lane, Const(number, expert_bits - lane_bits))),
            ]
            entries.append(entry)
        for step in range(self._joins):
            registers = []
            for at, entry in enumerate(by_fours(entries)):
                register = Signal(entry_layout, name=f"far{step}_{at}")
                m.d.sync += register.eq(entry)
                registers.append(register)
            entries = registers
        joined = by_fours(entries)
        finals = [Signal(entry_layout, name=f"final{at}") for at in range(len(joined))]
        gather = [final.eq(entry) for final, entry in zip(finals, joined, strict=True)]
        champion = best(finals)
        rest = Signal(entry_layout)
        m.d.sync += rest.eq(champion)

        # The group that lost its best, compared anew. It is the only one that changes then. Its
        # place among the rest is unknown, so that numbers count, too.
        lost = Signal(entry_layout)
        changed = Cat(changed for _, changed in found)
        if banks == 1:
            local = found[0][0].as_value()
        else:
            local = reduce(or_, (Mux(changed, local.as_value(), 0) for local, changed in found))
        local = local_layout(local)
        with m.If(changed.any()):
            m.d.sync += [
                lost.key.eq(local.key),
                lost.expert.eq(Cat(local.lane, winner.expert[lane_bits:])),
            ]
        first = Signal()
        pick = Signal(entry_layout)
        with m.If(first):
            m.d.comb += pick.eq(champion)
        with m.Elif(Cat(rest.expert, lost.key) > Cat(lost.expert, rest.key)):
            m.d.comb += pick.eq(lost)
        with m.Else():
            m.d.comb += pick.eq(rest)

        ctx = Signal(self.config.bits("ctx"))
        layer = Signal(self.config.bits("layer"))
        deadline = Signal(8)
        loading = Signal()
        emitted = Signal(range(most + 1))
        settle = Signal(range(3 + self._far + self._slow + self._spread))

        m.d.comb += [
            load.eq(self.values.valid & self.values.ready),
            patch.eq(self.patches.valid & self.patches.ready & self.patches.payload.valid),
            self.candidates.payload.ctx.eq(ctx),
            self.candidates.payload.layer.eq(layer),
            self.candidates.payload.expert.eq(winner.expert),
            self.candidates.payload.score.eq(winner.key.value),
            self.candidates.payload.source.eq(Source.PREDICTOR),
            self.candidates.payload.deadline.eq(deadline),
        ]

        with m.If(self.candidates.ready):
            m.d.sync += self.candidates.valid.eq(0)

        with m.FSM() as fsm:
            with m.State("Load"):
                m.d.comb += self.values.ready.eq(1)
                with m.If(self.values.valid):
                    m.d.sync += [
                        ctx.eq(self.values.payload.ctx),
                        layer.eq(self.values.payload.layer),
                        deadline.eq(self.values.payload.deadline),
                        threshold.eq(self.values.payload.threshold),
                        emitted.eq(Mux(self.values.payload.far, most - far_most, 0)),
                        loading.eq(~self.values.payload.last),
                    ]
                    with m.If(self.values.payload.last):
                        m.next = "Patch"
            with m.State("Patch"):
                m.d.comb += self.patches.ready.eq(1)
                m.d.sync += settle.eq(0)
                with m.If(self.patches.valid & self.patches.payload.go):
                    m.next = "Settle"
            with m.State("Settle"):
                # Two or three cycles until the last patch has reached the best of its group, then
                # some to compare the groups.
                m.d.sync += settle.eq(settle + 1)
                with m.If(settle == 2 + self._far + self._slow + self._spread):
                    m.d.sync += [*gather, first.eq(1)]
                    m.next = "Pick"
            with m.State("Pick"):
                with m.If(~self.candidates.valid | self.candidates.ready):
                    m.d.sync += [winner.eq(pick), first.eq(0)]
                    m.next = "Load"
                    with m.If(pick.key.present):
                        m.d.sync += [self.candidates.valid.eq(1), emitted.eq(emitted + 1)]
                        m.next = "Remove"
            with m.State("Remove"):
                m.d.comb += remove.eq(1)
                m.d.sync += settle.eq(2)
                m.next = "Compare"
                with m.If(emitted == most):
                    m.next = "Last"
            with m.State("Compare"):
                m.d.sync += settle.eq(settle + 1)
                with m.If(settle == 2 + self._far):
                    m.d.sync += gather
                    m.next = "Join"
            with m.State("Join"):
                m.next = "Pick"
            with m.State("Last"):
                with m.If(~self.candidates.valid | self.candidates.ready):
                    m.next = "Load"

        m.d.comb += self.idle.eq(fsm.ongoing("Load") & ~loading & ~self.candidates.valid)
        return m
