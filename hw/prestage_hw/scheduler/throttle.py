"""Throttle: reckons what prefetches of each kind save and cost, and says which kinds may go on."""

from amaranth import Cat, Const, Module, Mux, Signal, signed, unsigned
from amaranth.lib import data, enum, stream, wiring
from amaranth.lib.memory import Memory
from amaranth.lib.wiring import In, Out

from prestage_hw.contract.params import require_config
from prestage_hw.contract.records import PrefetchKind, PrefetchOutcome
from prestage_hw.contract.registers import THROTTLE_FIELDS

from .statistics import MarksLayout

__all__ = ["Outcome", "OutcomeLayout", "Throttle", "ThrottleStateLayout", "WeightsLayout"]

_KINDS = len(PrefetchKind)
_START = -25
_SHORTEST = 4  # binary logarithm of the fewest misses from one probe to the next
_EVICTION_BITS = 18  # evictions are counted modulo 2 ** that, or more for very many slots
_MISS_BITS = 16


class Outcome(enum.Enum, shape=unsigned(2)):
    """What the throttle is told of."""

    MISS = 0  # A demand was given a slot.
    PREFETCH = 1  # A prefetch was given a slot.
    USED = 2  # A demand came for a prefetch.
    DROPPED = 3  # A prefetch was cancelled or failed.


class OutcomeLayout(data.StructLayout):
    """One outcome.

    Parameters
    ----------
    config : :class:`DeviceConfig`
        Device whose widths apply.
    """

    def __init__(self, *, config):
        super().__init__(
            {
                "outcome": Outcome,
                "slot": unsigned(config.bits("slot")),
                "layer": unsigned(config.bits("layer")),
                "expert": unsigned(config.bits("expert")),
                "evicted": 1,
                "unused": 1,  # What was evicted had been prefetched and not used.
                "polluted": 1,  # MISS: a prefetch had evicted the expert.
                "waits": 1,  # MISS: the demand finds a prefetch's tile before it, of ``kind``.
                "kind": unsigned(2),  # Of a PREFETCH.
                "returned": unsigned((config.tiles).bit_length()),  # USED: tiles that have come.
                # USED: number of the expert's last tile, where experts differ.
                **({"last_tile": unsigned(config.bits("tile"))} if config.layer_bytes else {}),
            }
        )


class WeightsLayout(data.FlexibleLayout):
    """The register ``throttle``."""

    def __init__(self):
        super().__init__(
            32,
            {
                name: data.Field(unsigned(bits), low)
                for name, (low, bits) in THROTTLE_FIELDS.items()
            },
        )


class ThrottleStateLayout(data.StructLayout):
    """The register ``throttle_state``."""

    def __init__(self):
        super().__init__({"credits": data.ArrayLayout(signed(8), _KINDS), "on": _KINDS})


class Throttle(wiring.Component):
    """Give each kind of prefetch credit for what it saves, and charge what it costs.

    Who prefetches pays a price, which comes back with the prefetch's worth when a demand uses it:
    the whole worth if all tiles had come, else as many eighths of it as had. A demand that misses
    costs each kind that it misses because of: no more experts were evicted since its own expert's
    eviction than prefetches of that kind lie about unused, so that without them it would still be
    there. A kind with less credit than minus ``floor`` is switched off, and on again at 0. While it
    is off, a candidate may probe after 2 ** 4 demand misses, then after twice as many each time up
    to 2 ** ``probe``; a probe that is used makes it a quarter again.

    An outcome takes ``latency`` cycles unless ``marks`` waits, after which ``admits`` shows it.

    Parameters
    ----------
    config : :class:`DeviceConfig`
        Parameters of the device.

    Members
    -------
    outcomes : ``In(stream.Signature(OutcomeLayout(config=config)))``
        What became of demands and prefetches, in order.
    weights : ``In(WeightsLayout())``
        The register ``throttle``.
    enable : ``In(1)``
        0 admits all kinds; outcomes are counted all the same.
    marks : ``Out(stream.Signature(MarksLayout(config=config)))``
        What each outcome is in the statistics by layer and kind.
    admits : ``Out(3)``
        One bit for each ``PrefetchKind``: a candidate may be prefetched now.
    state : ``Out(ThrottleStateLayout())``
        Credit of each kind, and whether it is switched on.
    clear : ``In(1)``
        A pulse forgets everything, after the outcome that is being counted.
    idle : ``Out(1)``
        Every outcome that was taken is counted, and nothing is being cleared.
    """

    #: Cycles from an outcome being taken to the next one.
    latency = 12

    def __init__(self, *, config):
        require_config(config)
        self.config = config
        super().__init__(
            {
                "outcomes": In(stream.Signature(OutcomeLayout(config=config))),
                "weights": In(WeightsLayout()),
                "marks": Out(stream.Signature(MarksLayout(config=config))),
                "enable": In(1),
                "admits": Out(_KINDS),
                "state": Out(ThrottleStateLayout()),
                "clear": In(1),
                "idle": Out(1),
            }
        )

    def elaborate(self, platform):
        m = Module()
        config = self.config
        expert_bits = config.bits("expert")
        number_layout = data.StructLayout(
            {"expert": unsigned(expert_bits), "layer": unsigned(config.bits("layer"))}
        )
        owner_layout = data.StructLayout({"number": number_layout, "kind": unsigned(2)})

        # Whom a slot belongs to: read only for slots that were given away before, and never while
        # one is written.
        own = {"no_rw_check": 1}
        m.submodules.owners = owners = Memory(
            shape=owner_layout, depth=config.slots, init=[], attrs=own
        )
        owner_read, owner_write = owners.read_port(), owners.write_port()
        # When an expert was evicted last, and for whom.
        depth = config.model.layers << expert_bits
        eviction_bits = max(_EVICTION_BITS, config.slots.bit_length() + 2)
        m.submodules.evicted = evicted = Memory(
            shape=data.StructLayout(
                {"at": eviction_bits, "layer": config.bits("layer"), "kind": 2}
            ),
            depth=depth,
            init=[],
            attrs=own,
        )
        evicted_read, evicted_write = evicted.read_port(), evicted.write_port()

        credits = [Signal(signed(8), name=f"credit{n}", init=_START) for n in range(_KINDS)]
        on = Signal(_KINDS)
        # Prefetches that were neither used nor evicted; misses since the last probe.
        unused = [Signal(range(config.slots + 1), name=f"unused{n}") for n in range(_KINDS)]
        misses = [Signal(_MISS_BITS, name=f"misses{n}") for n in range(_KINDS)]
        apart = [Signal(4, name=f"apart{n}", init=_SHORTEST) for n in range(_KINDS)]
        due = Signal(_KINDS)
        # Neither a reset nor a clear touches the memory: they count on by more evictions than
        # prefetches can lie about, so that all before, and what never was, lies too far back.
        evictions = Signal(eviction_bits, reset_less=True)

        m.d.sync += self.admits.eq(Mux(self.enable, on | due, (1 << _KINDS) - 1))
        m.d.comb += [
            *(self.state.credits[n].eq(credits[n]) for n in range(_KINDS)),
            self.state.on.eq(on),
        ]

        # Weights as the sums need them.
        floor, longest = Signal(signed(8)), Signal(4)
        m.d.sync += [
            floor.eq(-self.weights.floor),
            longest.eq(Mux(self.weights.probe < _SHORTEST, _SHORTEST, self.weights.probe)),
        ]

        now = Signal(OutcomeLayout(config=config))
        before = Signal(owner_layout, reset_less=True)  # who had the slot
        since = Signal(evicted_read.data.shape(), reset_less=True)
        age = Signal(eviction_bits)
        eighths = Signal(range(9))
        worth = Signal(8)
        steps = Signal(_KINDS + 4)
        clear_waits = Signal(init=1)
        with m.If(self.clear):
            m.d.sync += clear_waits.eq(1)

        is_miss = now.outcome == Outcome.MISS
        is_prefetch = now.outcome == Outcome.PREFETCH
        is_used = now.outcome == Outcome.USED
        takes = is_miss | is_prefetch
        # Eighths of an expert that so many tiles are.
        reached = Cat(now.returned >= -(-n * config.tiles // 8) for n in range(1, 9))
        if config.layer_bytes:
            # Compared in eighths of tiles, with multiples that settle in the state "Read".
            whole = now.last_tile + 1
            thrice = whole + (whole << 1)
            multiples = [
                *(whole, whole << 1, thrice, whole << 2),
                *((whole << 2) + whole, thrice << 1, (whole << 3) - whole, whole << 3),
            ]
            wanted = [Signal(range(8 * config.tiles + 1), name=f"wanted_{n}") for n in range(1, 9)]
            m.d.sync += [each.eq(value) for each, value in zip(wanted, multiples, strict=True)]
            reached = Cat(now.returned << 3 >= each for each in wanted)
        m.d.comb += [
            owner_read.addr.eq(now.slot),
            owner_read.en.eq(1),
            evicted_read.addr.eq(Cat(now.expert, now.layer)),
            evicted_read.en.eq(1),
            owner_write.addr.eq(now.slot),
            owner_write.data.number.expert.eq(now.expert),
            owner_write.data.number.layer.eq(now.layer),
            owner_write.data.kind.eq(Mux(is_prefetch, now.kind, _KINDS)),
            evicted_write.addr.eq(before.number),
            evicted_write.data.at.eq(evictions),
            evicted_write.data.layer.eq(now.layer),
            evicted_write.data.kind.eq(owner_write.data.kind),
        ]
        first, second = self.marks.payload.first, self.marks.payload.second
        late = now.returned != config.tiles
        if config.layer_bytes:
            late = now.returned <= now.last_tile
        counts = 1
        if config.replicas > 1:
            # A copy is a prefetch of nobody, also when its fetch fails.
            counts = Mux(is_prefetch, now.kind, before.kind) != _KINDS
        with m.If(self.marks.ready):
            m.d.sync += self.marks.valid.eq(0)

        with m.FSM(init="Clear") as fsm:
            with m.State("Clear"):
                # A reset may stay here for long; evictions go on once.
                m.next = "Forget"
            with m.State("Forget"):
                m.d.sync += [
                    clear_waits.eq(0),
                    evictions.eq(evictions + (1 << config.slots.bit_length())),
                    on.eq(0),
                    due.eq(0),
                ]
                for n in range(_KINDS):
                    m.d.sync += [
                        credits[n].eq(_START),
                        unused[n].eq(0),
                        misses[n].eq(0),
                        apart[n].eq(_SHORTEST),
                    ]
                m.next = "Settle"
            with m.State("Idle"):
                m.d.comb += self.outcomes.ready.eq(~clear_waits)
                m.d.sync += now.eq(self.outcomes.payload)
                with m.If(clear_waits):
                    m.next = "Clear"
                with m.Elif(self.outcomes.valid):
                    m.next = "Read"
            with m.State("Read"):
                m.next = "Keep"
            with m.State("Keep"):
                # Block RAMs alone need most of a cycle.
                m.d.sync += [
                    before.eq(owner_read.data),
                    since.eq(evicted_read.data),
                    eighths.eq(sum(reached)),
                ]
                m.next = "Age"
            with m.State("Age"):
                m.d.sync += [
                    age.eq(evictions - since.at),
                    worth.eq(self.weights.useful * eighths),
                    evictions.eq(evictions + (takes & now.evicted)),
                    steps.eq(1),
                    self.marks.valid.eq(1),
                    first.valid.eq(Mux(is_miss, now.polluted, counts)),
                    first.layer.eq(before.number.layer),
                    first.kind.eq(before.kind),
                    first.outcome.eq(Mux(is_used, PrefetchOutcome.USEFUL, PrefetchOutcome.USELESS)),
                    # A prefetch that is evicted unused, or used before it has come.
                    second.valid.eq(Mux(is_used, late, takes & now.evicted & now.unused)),
                    second.layer.eq(before.number.layer),
                    second.kind.eq(before.kind),
                    second.outcome.eq(Mux(is_used, PrefetchOutcome.LATE, PrefetchOutcome.USELESS)),
                ]
                with m.If(is_prefetch):
                    m.d.sync += [
                        first.layer.eq(now.layer),
                        first.kind.eq(now.kind),
                        first.outcome.eq(PrefetchOutcome.ISSUED),
                    ]
                with m.If(is_miss):
                    m.d.sync += [
                        first.layer.eq(since.layer),
                        first.kind.eq(since.kind),
                        first.outcome.eq(PrefetchOutcome.POLLUTING),
                    ]
                m.next = "Count"
            with m.State("Count"):
                # One kind after the other, each in five cycles.
                m.d.comb += [
                    owner_write.en.eq(takes & steps[0]),
                    evicted_write.en.eq(takes & now.evicted & steps[0]),
                ]
                m.d.sync += steps.eq(steps << 1)
                with m.If(steps[-1]):
                    m.next = "Settle"
            with m.State("Settle"):
                # ``admits`` is a register behind the flags.
                with m.If(~self.marks.valid):
                    m.next = "Idle"

        # Step n looks at kind n; what it finds goes on through the registers of four more cycles.
        for n in range(_KINDS):
            missed, mine, frees = (Signal(name=f"{w}{n}") for w in ("missed", "mine", "frees"))
            change, total = Signal(signed(9), name=f"change{n}"), Signal(signed(10))
            credit = Signal(signed(8), name=f"new_credit{n}")
            m.d.comb += credit.eq(
                Mux(total < -128, -128, Mux(total > 127, 127, total[:8].as_signed()))
            )
            with m.If(steps[n]):
                m.d.sync += [
                    # Because of prefetches of this kind.
                    missed.eq(is_miss & (age < unused[n])),
                    mine.eq(Mux(takes, now.kind, before.kind) == n),
                    frees.eq((before.kind == n) & (~takes | (now.evicted & now.unused))),
                ]
            with m.If(steps[n + 1]):
                cost = Mux(missed, self.weights.pollution, Const(0, 4))
                waits = Mux(now.waits & mine, self.weights.wait, Const(0, 4))
                m.d.sync += change.eq(0)
                with m.If(is_miss):
                    m.d.sync += change.eq(-(cost + waits))
                    with m.If(~misses[n].all()):
                        m.d.sync += misses[n].eq(misses[n] + 1)
                with m.If(is_prefetch & mine):
                    m.d.sync += change.eq(-self.weights.price)
                    with m.If(~on[n]):
                        m.d.sync += misses[n].eq(0)
                        with m.If(apart[n] < longest):
                            m.d.sync += apart[n].eq(apart[n] + 1)
                        with m.Else():
                            m.d.sync += apart[n].eq(longest)
                with m.If(is_used & mine):
                    m.d.sync += change.eq((worth >> 3) + self.weights.price)
                    with m.If(apart[n] < _SHORTEST + 2):
                        m.d.sync += apart[n].eq(_SHORTEST)
                    with m.Else():
                        m.d.sync += apart[n].eq(apart[n] - 2)
                with m.If(frees & ~(is_prefetch & mine)):
                    m.d.sync += unused[n].eq(unused[n] - 1)
                with m.If(~frees & is_prefetch & mine):
                    m.d.sync += unused[n].eq(unused[n] + 1)
            with m.If(steps[n + 2]):
                m.d.sync += total.eq(credits[n] + change)
            with m.If(steps[n + 3]):
                m.d.sync += [credits[n].eq(credit), due[n].eq((misses[n] >> apart[n]).any())]
            with m.If(steps[n + 4]):
                with m.If(credits[n] < floor):
                    m.d.sync += on[n].eq(0)
                with m.Elif(credits[n] >= 0):
                    m.d.sync += on[n].eq(1)

        m.d.comb += self.idle.eq(fsm.ongoing("Idle") & ~clear_waits)
        return m
