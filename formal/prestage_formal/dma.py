"""The DMA engine as a whole: AXI4 rules, credits, and what a demand waits for."""

from amaranth import Array, Cat, Elaboratable, Module, Mux, Signal, Value
from amaranth.asserts import AnySeq
from amaranth.hdl import Assert, Assume, Cover
from amaranth.lib import data

from .arbiter import order_lemmas
from .harness import Held, Inside, drive_freely, lemma
from .instances import dma_device
from .order import Queues

__all__ = [
    "AddressChannel",
    "Credits",
    "DemandFirst",
    "Goes",
    "LowerCredits",
    "ReadBeats",
    "Streams",
]


class _Engine:
    """The engine, free at all its inputs but the named ones, with a look into it.

    Parameters
    ----------
    m : Module
        Harness.
    channels : :class:`int`
        Channels of the instance.
    but : iterable of :class:`str`
        Inputs that the harness drives.
    """

    #: Most outstanding bursts of the instance.
    bursts = 3

    def __init__(self, m, *, channels, but=()):
        from prestage_hw.dma import DMA
        from prestage_hw.dma.settings import ActiveLayout
        from prestage_hw.layouts import RecordLayout

        self.config = config = dma_device(outstanding_bursts=self.bursts, dma_channels=channels)
        self.channels = range(channels)
        self.block = DMA(config=config)
        self.inside = Inside(self.block)
        m.submodules.block = self.inside.fragment
        drive_freely(m, self.block, but=but)

        signal = self.inside.signal
        layout = ActiveLayout(config=config)
        self.shadow = [layout(signal(f"settings.shadow_{c}")) for c in self.channels]
        self.active = [layout(signal(f"settings.active_{c}")) for c in self.channels]
        # What waits in the check of settings makes sense.
        write = RecordLayout("ChannelSettings", config=config)(signal("settings.write"))
        self.write = write
        good = signal("settings.good")
        m.d.comb += [
            lemma(~good | _power(write.burst_beats, 4)),
            lemma(~good | ((write.credits != 0) & (write.credits <= self.bursts))),
        ]
        for setting in (*self.shadow, *self.active):
            m.d.comb += [
                lemma(_power(setting.mask + 1, 4)),
                lemma((setting.credits != 0) & (setting.credits <= self.bursts)),
            ]

        # The step of the mid end: chosen, read, done.
        mid = {
            name: signal(f"midend.{name}")
            for name in ("read", "step", "null", "turn", "chosen", "chosen_null", "chosen_turn")
        }
        self.read, self.step, self.chosen = mid["read"], mid["step"], mid["chosen"]
        self.null = mid["null"]
        self.fresh = signal("midend.fresh")
        self.channel = signal("midend.channel")
        self.issue = signal("midend.issue")
        #: No step is under way: a channel may be chosen.
        self.choosing = ~self.read & ~self.step
        #: A burst was chosen and has not left.
        self.burst = Signal()
        m.d.comb += self.burst.eq(
            (self.read & (self.chosen & ~mid["chosen_null"] & ~mid["chosen_turn"]).any())
            | (self.step & ~mid["null"] & ~mid["turn"])
        )
        number = sum(Mux(self.chosen[c], c, 0) for c in self.channels)
        urgent = self.block.urgent
        traffic = [Mux(urgent[c], 0, self.active[c].traffic) for c in self.channels]
        *_, known = order_lemmas(m, self.inside, traffic, prefix="midend.arbiter.")
        m.d.comb += [
            lemma(known | (signal("midend.arbiter.wants") == 0)),
            lemma(~(self.read & self.step)),
            lemma((self.chosen & (self.chosen - 1)) == 0),
            lemma(~self.read | (self.chosen != 0)),
            lemma(~self.read | (self.channel == number)),
            lemma(self.channel < channels),
            lemma(~self.burst | ~self.block.bus.arvalid),
        ]


def _same(a, b):
    """Whether two values have the same bits."""
    return Value.cast(a) == Value.cast(b)


def _cut(m, engine):
    """Lemmas on how long the burst is that a step cuts off."""
    signal = engine.inside.signal
    at, fits, mask = (signal(f"midend.{name}") for name in ("at", "fits", "mask"))
    m.d.comb += [
        lemma(_power(mask + 1, 4)),
        lemma(~engine.step | (fits == (~at[:8] & mask))),
    ]


def _power(value, most):
    """Whether a value is a power of two up to that."""
    return Cat(value == 1 << i for i in range(most.bit_length())).any()


class AddressChannel(Elaboratable):
    """Whatever is asked, whatever the memory answers: bursts keep to the rules of AXI4."""

    def elaborate(self, platform):
        m = Module()
        engine = _Engine(m, channels=2)
        bus = engine.block.bus
        address = Cat(bus.araddr, bus.arlen, bus.arsize, bus.arburst, bus.arid)
        held = Held(m, bus.arvalid, bus.arready, address, name="address")
        beat = bus.araddr[6:12]
        started = Signal()
        m.d.sync += started.eq(1)
        m.d.comb += [
            Assert(started | ~bus.arvalid),
            Assert(held.kept),
            # Whole beats, within 4 KiB, no longer than the longest burst of the instance.
            Assert(~bus.arvalid | (bus.araddr[:6] == 0)),
            Assert(~bus.arvalid | (beat + bus.arlen < 64)),
            Assert(~bus.arvalid | (bus.arlen < 4)),
            Assert(bus.arsize == 6),
            Assert(bus.arburst == 1),
            Cover(bus.arvalid & bus.arready & (bus.arlen == 3) & (bus.arid == 1)),
            Cover(held.waited & bus.arready & (beat == 63)),
        ]
        _cut(m, engine)
        return m


class _Ledger:
    """Counters of bursts, and lemmas that join them to the lists and to the beats inside.

    Attributes
    ----------
    outstanding, live : list of Value
        Bursts of each channel that are outstanding, and those that somebody waits for.
    total : Value
        All that are outstanding.
    booked : list of Value
        Whether a channel's counter is what is in its list and in the beat that leaves.
    """

    def __init__(self, m, engine):
        signal, channels = engine.inside.signal, engine.channels
        self.lists = lists = Queues(
            m, engine.inside, lists=len(channels), entries=engine.bursts, prefix="backend.bursts."
        )
        self.outstanding = [signal(f"backend.outstanding_{c}") for c in channels]
        self.live = [signal(f"backend.live_{c}") for c in channels]
        dead = [signal(f"backend.dead_{c}") for c in channels]
        has_dead = signal("backend.has_dead")
        self.total = signal("midend.all_outstanding")
        config = engine.config
        beat = data.StructLayout(
            {
                "data": config.bits("data"),
                "bad": 1,
                "burst_end": 1,
                "tile_end": 1,
                "channel": config.bits("channel"),
                "entry": 2,
                "address": config.address_bits,
            }
        )(signal("backend.beat"))
        ends = signal("backend.beat_valid") & beat.burst_end
        returned, freed_place = signal("backend.returned"), signal("backend.freed_place")
        used = signal("backend.used")
        table = engine.inside.rows("backend.burst_table")
        self.booked = []
        for c in channels:
            count = lists.counts[c]
            self.booked.append(self.outstanding[c] == count + (ends & (beat.channel == c)))
            m.d.comb += [
                lemma(self.booked[c]),
                lemma(self.outstanding[c] == self.live[c] + dead[c]),
                lemma(has_dead[c] == (dead[c] != 0)),
                lemma(self.outstanding[c] <= engine.bursts),
                lemma(
                    ~(engine.burst & (engine.channel == c)) | (self.outstanding[c] < engine.bursts)
                ),
            ]
            for j, entry in enumerate(lists.queues[c]):
                burst = Array(table)[entry]
                m.d.comb += lemma(~(j < count) | (burst.channel == c))
        m.d.comb += [
            lemma(self.total == sum(lists.counts) + returned),
            lemma(~returned | (freed_place < engine.bursts)),
            lemma(~returned | ~lists.holds(freed_place)),
            lemma(~signal("backend.beat_valid") | (beat.channel < len(channels))),
            lemma(~engine.burst | (self.total < engine.bursts)),
            # A tile that is timed out was looked up just before.
            lemma(~signal("backend.looked_up") | signal("backend.expiring")),
            lemma(
                ~signal("backend.expiring") | (signal("backend.expiring_channel") < len(channels))
            ),
        ]
        for p in range(engine.bursts):
            m.d.comb += lemma(used[p] == (lists.holds(p) | (returned & (freed_place == p))))
        # What a choice knows: the state of a cycle before, with what was chosen then.
        credit = signal("midend.credit")
        self.credits_before = [Signal(5, name=f"credits_before_{c}") for c in channels]
        for c in channels:
            m.d.sync += self.credits_before[c].eq(engine.active[c].credits)
            m.d.comb += lemma(self.credits_before[c] <= engine.bursts)
            may = engine.choosing & credit[c]
            m.d.comb += [
                lemma(~may | (self.outstanding[c] < self.credits_before[c])),
                lemma(~may | (self.total < engine.bursts)),
            ]


class Credits(Elaboratable):
    """Settings change at will; the memory may answer with beats that nobody asked for."""

    def elaborate(self, platform):
        m = Module()
        engine = _Engine(m, channels=2)
        ledger = _Ledger(m, engine)
        # Credits in force when the burst was chosen that leaves now.
        granted = Signal(5)
        with m.If(engine.choosing):
            choice = engine.inside.signal("midend.arbiter.choice")
            m.d.sync += granted.eq(
                sum(Mux(choice[c], ledger.credits_before[c], 0) for c in engine.channels)
            )
        m.d.comb += [
            Assert(ledger.total <= engine.bursts),
            Assert(sum(ledger.lists.counts) <= engine.bursts),
            lemma(granted <= engine.bursts),
        ]
        for c in engine.channels:
            mine = engine.channel == c
            m.d.comb += [
                Assert(~(engine.issue & mine) | (ledger.outstanding[c] < granted)),
                Assert(ledger.outstanding[c] <= engine.bursts),
                Assert(ledger.live[c] <= ledger.outstanding[c]),
                # Nothing is lost: what is counted waits for data, or its last beat leaves.
                Assert(ledger.booked[c]),
                lemma(~(engine.burst & mine) | (ledger.outstanding[c] < granted)),
                Cover(engine.issue & mine & (ledger.outstanding[c] == 2) & (ledger.total == 2)),
                Cover(engine.issue & mine & (granted == 1)),
            ]
        m.d.comb += Cover((ledger.total == 1) & engine.inside.signal("backend.returned"))
        return m


class _Classes:
    """Channel 0 is for demands and the others are not, as after reset; lemmas on their credits."""

    def __init__(self, m, engine, ledger):
        signal, channels = engine.inside.signal, engine.channels
        offered = engine.block.settings
        m.d.comb += Assume(
            ~offered.valid | ((offered.payload.traffic == 0) == (offered.payload.channel == 0))
        )
        good, checked = signal("settings.good"), engine.write
        m.d.comb += [
            lemma(~good | ((checked.traffic == 0) == (checked.channel == 0))),
            lemma(~good | (checked.traffic < 3)),
        ]
        lower, self.room = signal("midend.lower"), signal("midend.lower_room")
        known = Signal()
        m.d.sync += known.eq(1)
        self.live = Signal(5)
        m.d.comb += self.live.eq(sum(ledger.live[c] for c in channels[1:]))
        for c in channels:
            for setting in (engine.shadow[c], engine.active[c]):
                m.d.comb += lemma((setting.traffic == 0) == (c == 0))
            m.d.comb += lemma(~known | (lower[c] == (c != 0)))
        # What a choice knows: the limit and the bursts of two cycles before.
        limit = signal("midend.lower_credits")
        reset = engine.config.lower_credits
        self.limit_before = Signal(5, init=reset)
        self.limit_two_before = Signal(5, init=reset)
        m.d.sync += [
            self.limit_before.eq(limit),
            self.limit_two_before.eq(self.limit_before),
        ]
        credit = signal("midend.credit")
        to_come = engine.burst & ~engine.read & (engine.channel != 0)
        m.d.comb += lemma(~self.room | ~known | (self.live + to_come < self.limit_before))
        for c in channels[1:]:
            may = engine.choosing & credit[c]
            m.d.comb += lemma(~may | (self.live < self.limit_two_before))
        # In the first two cycles after reset nothing has left.
        started = Signal()
        m.d.sync += started.eq(known)
        m.d.comb += [
            lemma(known | (credit == 0)),
            lemma(known | ~started),
            lemma(started | ((self.live == 0) & ~engine.burst)),
            lemma((limit != 0) & (self.limit_before != 0) & (self.limit_two_before != 0)),
        ]


class LowerCredits(Elaboratable):
    """Bursts below demand; their limit changes at will, as do weights and credits."""

    def elaborate(self, platform):
        m = Module()
        engine = _Engine(m, channels=2)
        ledger = _Ledger(m, engine)
        classes = _Classes(m, engine, ledger)
        # Limit in force when the burst was chosen that leaves now.
        granted = Signal(5)
        with m.If(engine.choosing):
            m.d.sync += granted.eq(classes.limit_two_before)
        lower = engine.channel != 0
        m.d.comb += [
            Assert(~(engine.issue & lower) | (classes.live < granted)),
            lemma(~(engine.burst & lower) | (classes.live < granted)),
            Cover(engine.issue & lower & (granted == 1)),
            Cover(engine.issue & lower & (granted == 3) & (classes.live == 2)),
        ]
        return m


class DemandFirst(Elaboratable):
    """Settings as after reset: a tile's worth of bursts may be outstanding below demand."""

    def elaborate(self, platform):
        m = Module()
        engine = _Engine(m, channels=2, but=("settings.valid", "commit"))
        ledger = _Ledger(m, engine)
        classes = _Classes(m, engine, ledger)
        signal, config = engine.inside.signal, engine.config
        wants, choice = signal("midend.arbiter.wants"), signal("midend.arbiter.choice")
        chosen = engine.burst & (engine.channel != 0)
        longest = config.longest_burst
        # Demands wait for what is in channel 1, too: it takes turns. What is told counts a cycle
        # later.
        raised = Signal()
        m.d.sync += raised.eq(engine.block.urgent[1])
        m.d.comb += [
            # Beats that may come for others once a demand wants to.
            Assert((classes.live + chosen) * longest <= config.tile_beats),
            # Nobody below is chosen from then on.
            Assert(~(engine.choosing & wants[0] & ~raised) | (choice == 1)),
            lemma(classes.limit_before == config.lower_credits),
            lemma(classes.limit_two_before == config.lower_credits),
            lemma(signal("midend.lower_credits") == config.lower_credits),
            lemma(~chosen | (classes.live < config.lower_credits)),
            lemma(classes.live <= config.lower_credits),
            Cover(chosen & ((classes.live + 1) * longest == config.tile_beats)),
            Cover(engine.choosing & (wants == 3) & (classes.live == 1)),
            Cover(engine.choosing & (wants == 3) & (choice == 2)),
        ]
        for c in engine.channels:
            for setting in (engine.shadow[c], engine.active[c]):
                m.d.comb += lemma(setting.traffic == c)
        m.d.comb += [lemma(~signal("settings.good")), lemma(~signal("settings.arrived"))]
        m.d.comb += lemma(signal("settings.commits") == 0)
        return m


class Streams(Elaboratable):
    """What the engine offers to the buffer and to the scheduler."""

    def elaborate(self, platform):
        m = Module()
        engine = _Engine(m, channels=2)
        block = engine.block
        # The beat's data is a register like all the rest; leaving it out keeps the proof small.
        beat = Cat(block.writes.payload.slot, block.writes.payload.beat)
        writes = Held(m, block.writes.valid, block.writes.ready, beat, name="writes")
        completions = Held(
            m,
            block.completions.valid,
            block.completions.ready,
            block.completions.payload,
            name="completions",
        )
        m.d.comb += [
            Assert(writes.kept),
            Assert(completions.kept),
            Cover(writes.waited & block.writes.ready),
            Cover(completions.waited & block.completions.ready),
        ]
        return m


class ReadBeats(Elaboratable):
    """What memory answers: each beat that is taken counts once, in order, for the right burst."""

    def elaborate(self, platform):
        m = Module()
        engine = _Engine(m, channels=2)
        ledger = _Ledger(m, engine)
        bus, inside = engine.block.bus, engine.inside
        part = "BackEnd"

        def local(name):
            return inside.local(name, part=part)

        _cut(m, engine)
        arrived, spare = local("arrived"), local("spare")
        arrived_valid, spare_valid = local("arrived_valid"), local("spare_valid")
        goes = local("arrived_go")
        came, went = bus.rvalid & bus.rready, arrived_valid & goes
        # One beat, whichever the solver likes, is followed to where its burst is looked up.
        level, ahead, followed = Signal(2), Signal(2), Signal()
        kept = Signal(arrived.shape())
        offered = local("offered")
        m.d.sync += level.eq(level + came - went)
        with m.If(~followed & came & AnySeq(1)):
            m.d.sync += [followed.eq(1), kept.eq(offered), ahead.eq(level - went)]
        with m.Elif(followed & went):
            m.d.sync += [ahead.eq(ahead - 1), followed.eq(ahead != 0)]
        stalled = Signal()  # It could not go on in the cycle before.
        m.d.sync += stalled.eq(~goes)

        # Beats that each ID's first burst has taken.
        known, end = local("known"), local("burst_end")
        ids = range(engine.config.axi_ids)
        taken = [Signal(3, name=f"taken_{i}") for i in ids]
        table = Array(inside.rows("backend.burst_table"))
        lists = ledger.lists
        counting, ending = local("counting"), local("ending")
        rows = inside.rows("backend.beat_counts")
        m.d.comb += [
            Assert(arrived_valid == (level != 0)),
            Assert(~(followed & arrived_valid & (ahead == 0)) | _same(arrived, kept)),
            # Memory is made to wait only while a beat can't go on.
            Assert(bus.rready | (level == 2)),
            Assert(bus.rready | stalled),
            lemma(level == arrived_valid + spare_valid),
            lemma(~spare_valid | (arrived_valid & stalled)),
            lemma(~followed | (ahead < level)),
            lemma(~(followed & (ahead == 1)) | _same(spare, kept)),
            Cover(followed & (ahead == 1) & went),
        ]
        for i in ids:
            mine = went & known & (arrived.id == i)
            with m.If(mine):
                m.d.sync += taken[i].eq(Mux(end, 0, taken[i] + 1))
            length = table[lists.queues[i][0]].length
            has = lists.counts[i] != 0
            m.d.comb += [
                # As many beats as were asked for, whatever memory calls the last one.
                Assert(~mine | (has & (end == (taken[i] == length)))),
                lemma((taken[i] == 0) | has),
                lemma(~has | (taken[i] <= length)),
                lemma(counting[i] == (taken[i] != 0)),
                lemma(~counting[i] | (rows[i] == (length - taken[i])[:8])),
                lemma(~counting[i] | (ending[i] == (taken[i] == length))),
                Cover(mine & end & (taken[i] == 3)),
                Cover(mine & ~end & bus.rlast & (taken[i] == 1)),
            ]
            for j, entry in enumerate(lists.queues[i]):
                burst = table[entry]
                in_list = j < lists.counts[i]
                m.d.comb += [
                    lemma(~in_list | (burst.length < 4)),
                    lemma(~in_list | (self._mark(inside, lists, i, j) == (burst.length == 0))),
                ]
        return m

    @staticmethod
    def _mark(inside, lists, i, j):
        """Mark of the j-th entry of a list."""
        prefix = lists.prefix
        if j == 0:
            return inside.signal(f"{prefix}mark_{i}")
        return Array(inside.rows(f"{prefix}next_marks"))[lists.queues[i][j - 1]]


class Goes(Elaboratable):
    """No request waits while nothing is in flight; the watchdog is off, settings as after reset."""

    def elaborate(self, platform):
        m = Module()
        engine = _Engine(m, channels=2, but=("settings.valid", "commit", "timeout"))
        ledger = _Ledger(m, engine)
        _cut(m, engine)
        block, inside, signal = engine.block, engine.inside, engine.inside.signal
        channels = engine.channels

        def local(name, part="BackEnd"):
            return inside.local(name, part=part)

        tiles = Queues(m, inside, lists=len(channels), entries=block.tiles, prefix="backend.tiles.")
        beat, beat_valid = local("beat"), local("beat_valid")
        begun, waiting = signal("midend.begun"), signal("frontend.waiting")
        wants, hold = signal("midend.arbiter.wants"), signal("midend.hold")
        room, held = local("room"), local("held_valid")
        table = Array(inside.rows("backend.burst_table"))
        rows = inside.rows("midend.places")
        incoming = local("incoming_to", "FrontEnd")
        used, entry = local("tile_used"), signal("midend.tile_entry")
        tile_room = signal("midend.tile_room")

        # Cycles of a step that nothing holds up.
        worked = Signal(3)
        with m.If(engine.choosing):
            m.d.sync += worked.eq(0)
        with m.Elif(~hold):
            m.d.sync += worked.eq(worked + 1)
        # Cycles for which one bad beat holds it up though what leaves has room.
        held_up = Signal(3)
        with m.If(~hold | local("beat_go")):
            m.d.sync += held_up.eq(0)
        with m.Elif(room):
            m.d.sync += held_up.eq(held_up + 1)
        # Cycles for which there is something to do, nothing is chosen, and nothing on its way.
        in_flight = (sum(ledger.lists.counts) != 0) | block.bus.arvalid | beat_valid | held
        needs, stuck, most = (waiting | begun).any(), Signal(3), 3
        blocked = needs & engine.choosing & ~wants.any()
        m.d.sync += stuck.eq(Mux(blocked & ~in_flight, stuck + 1, 0))
        m.d.comb += [
            Assert(worked <= 2),
            Assert(held_up <= 1),
            lemma(~hold | (held_up == 0) | ~held),
            Assert(stuck <= most),
            Cover(blocked & in_flight & waiting[0] & ~begun[0]),
            Cover(stuck == 1),
            Cover(held_up == 1),
        ]
        for c in channels:
            listed = [
                (j < ledger.lists.counts[c]) & table[entry].last
                for j, entry in enumerate(ledger.lists.queues[c])
            ]
            ends = beat_valid & beat.tile_end & (beat.channel == c)
            open_tiles = tiles.counts[c]
            m.d.comb += [
                # A tile that is open has bursts under way, or to come.
                Assert((open_tiles == 0) | begun[c] | (ledger.outstanding[c] != 0)),
                lemma(open_tiles == begun[c] + sum(listed) + ends),
                lemma(~(beat_valid & beat.tile_end) | beat.burst_end),
            ]
            # Bursts are of the tiles in their order.
            order = Array(tiles.queues[c])
            mine = beat_valid & (beat.channel == c)
            place = rows[c].entry
            last_tile = order[(open_tiles - 1)[:2]]
            level = local("levels", "FrontEnd")[c]
            of_step = engine.step & ~engine.null & (engine.channel == c)
            m.d.comb += [
                lemma(~mine | ((beat.entry == order[0]) & (open_tiles != 0))),
                lemma(~begun[c] | (place == last_tile)),
                lemma(~of_step | Mux(engine.fresh, ~begun[c], begun[c])),
                lemma(~(of_step & ~engine.fresh) | (signal("midend.entry") == last_tile)),
                lemma(~(of_step & engine.fresh) | (tile_room & (signal("midend.entry") == entry))),
                lemma(level + incoming[c] <= engine.config.dma_queue_depth),
                lemma(~(engine.read & (engine.channel == c) & ~begun[c]) | (level != 0)),
                lemma(~(engine.step & engine.fresh & (engine.channel == c)) | (level != 0)),
                lemma(~engine.null | engine.fresh),
                lemma(~signal(f"frontend.movable_{c}") | (level != 0)),
                lemma(~signal("midend.wants_null")[c] | ((level != 0) & ~begun[c])),
                lemma(signal(f"frontend.filled_{c}") == (level != 0)),
            ]
            before = ends
            for (j, number), is_last in zip(enumerate(ledger.lists.queues[c]), listed, strict=True):
                at = Signal(3, name=f"tile_of_{c}_{j}")
                m.d.comb += [
                    at.eq(before),
                    lemma(~(j < ledger.lists.counts[c]) | (table[number].entry == order[at[:2]])),
                    lemma(~(j < ledger.lists.counts[c]) | (at < open_tiles)),
                ]
                before = before + is_last
        for i in range(block.tiles):
            m.d.comb += lemma(used[i] == tiles.holds(i))
        m.d.comb += [
            lemma(~tile_room | ~tiles.holds(entry)),
            lemma(~tile_room | (entry < block.tiles)),
            lemma(Value.cast(signal("backend.expired")) == 0),
            lemma(~local("expiring") & ~local("looked_up")),
            lemma(local("quarter", "Watchdog") == 0),
            lemma(~local("tick", "Watchdog")),
            lemma(~signal("settings.good") & ~signal("settings.arrived")),
            lemma(signal("settings.commits") == 0),
            lemma(local("has_dead") == 0),
            lemma(signal("midend.turning") == 0),
            lemma((signal("midend.more") == 0) & ~signal("midend.has_more")),
            lemma(~signal("midend.turn") & (signal("midend.chosen_turn") == 0)),
            lemma(worked <= Mux(engine.step, 1, 2)),
            lemma(~engine.read | (worked == 0)),
            lemma(~engine.choosing | (worked <= 2)),
        ]
        for c in channels:
            for setting in (engine.shadow[c], engine.active[c]):
                m.d.comb += [
                    lemma(setting.traffic == c),
                    lemma(setting.enable & ~setting.rows),
                    lemma(setting.credits == engine.bursts),
                ]
        return m
