"""Fetches that leave over the link, for a host that copies experts itself."""

from amaranth import Cat, Const, Module, Mux, Signal, unsigned
from amaranth.lib import data, fifo, stream, wiring
from amaranth.lib.memory import Memory
from amaranth.lib.wiring import In, Out

from prestage_hw.contract import MESSAGES
from prestage_hw.contract.params import require_config
from prestage_hw.contract.records import HOST_MESSAGES, ErrorCode, FetchReason
from prestage_hw.contract.registers import TIMEOUT_BITS
from prestage_hw.dma.watchdog import Watchdog
from prestage_hw.layouts import RecordLayout, body_bytes, body_fields

from .gate import WriteGate
from .layouts import MessageLayout

__all__ = ["HostMover"]


class HostMover(wiring.Component):
    """Stand between link and dispatcher, and in the place of the DMA engine.

    ::

        link.messages ─▶ FETCHED ──▶ completions ─▶ scheduler
                    └──▶ queue ───▶ commands ─────▶ dispatcher
        link.replies  ◀─ EVENT ◀── FETCH ◀── fetches (scheduler) ◀── answers (dispatcher)

    Each tile that the scheduler wants leaves as a FETCH. The host answers each with one FETCHED, in
    any order. One that names no tile that is outstanding, or a fetch that has ended, is answered
    with an EVENT BAD_FETCHED and changes nothing.

    FETCHED overtakes all other messages, which wait in a queue: the dispatcher may be held up by
    the very fetch that a FETCHED ends. So that nothing can hold up FETCHED, the block always takes
    messages: one that finds the queue full is dropped and answered with an EVENT OVERRUN. Taking a
    FETCHED needs no room for an answer but that of the EVENT for a bad one, and such room comes
    without the scheduler's doing.

    A restart of the link means that the host has forgotten its fetches, or never heard of them: all
    tiles of which a FETCH was sent are then completed as failed.

    A fetch of which no tile was asked for and none came back for too long has expired: all of its
    tiles that are with the host are completed as failed, with the reason TIMEOUT.

    EVENTs go before FETCHes and answers, which take turns.

    With ``config.host_writes`` the host writes tiles into the device's slots, from a port or with
    WRITE, which overtakes other messages as FETCHED does. :class:`WriteGate` says which beats reach
    a slot: those of a tile from its FETCH on until it is reported. A FETCHED that says that a tile
    is there, of which not all beats were taken before, is refused as one of no tile at all.

    Parameters
    ----------
    config : :class:`DeviceConfig`
        Device, with the mover ``"host"``.
    depth : :class:`int`
        Messages that may wait, at least 1.

    Members
    -------
    messages : ``In(stream.Signature(MessageLayout(config=config, to_device=True)))``
        Messages of the host.
    commands : ``Out(stream.Signature(MessageLayout(config=config, to_device=True)))``
        The same without FETCHED, for the dispatcher.
    answers : ``In(stream.Signature(MessageLayout(config=config, to_device=False)))``
        Replies of the dispatcher.
    replies : ``Out(stream.Signature(MessageLayout(config=config, to_device=False)))``
        Messages for the host.
    fetches : ``In(stream.Signature(RecordLayout("FetchRequest", config=config)))``
        Tiles that the scheduler wants.
    fetch_layer, fetch_expert : ``In``
        Expert that ``fetches`` offers a tile of.
    completions : ``Out(stream.Signature(RecordLayout("Completion", config=config)))``
        One for each fetch. The address is that of the tile.
    host_writes : ``In(stream.Signature(RecordLayout("BufferWrite", config=config)))``
        Beats of the host's own bus; only with ``config.host_writes``, as the next two.
    writes : ``Out(stream.Signature(RecordLayout("BufferWrite", config=config)))``
        Beats for the buffer.
    refused : ``Out(1)``
        A strobe for each beat that was dropped.
    resets : ``In(1)``
        A strobe: the link was restarted.
    timeout : ``In(24)``
        Cycles before a fetch expires, 4 or more, as in :class:`Watchdog`: at most a quarter more
        pass. 0: none expires.
    rejected : ``Out(1)``
        A strobe for each EVENT, never while ``others_rejected`` is high.
    others_rejected : ``In(1)``
        The dispatcher's strobe of the same counter.
    idle : ``Out(1)``
        No message, answer or completion is in the block. Tiles that the host was asked for are the
        scheduler's to wait for.

    Attributes
    ----------
    fetch_latency : :class:`int`
        Cycles from a fetch being taken to its reply being offered, with nothing else to send.
    fetched_latency : :class:`int`
        Cycles from a FETCHED being offered to its completion being offered. With
        ``config.host_writes`` at most, if no beats wait.
    message_latency : :class:`int`
        Cycles from another message being taken to its being offered to the dispatcher.

    Raises
    ------
    TypeError
        If ``config`` is not a :class:`DeviceConfig`, or the depth not an integer.
    ValueError
        If the device's mover is not the host, or the depth not positive.
    """

    fetch_latency = 1
    fetched_latency = 3
    message_latency = 3

    def __init__(self, *, config, depth=HOST_MESSAGES):
        require_config(config)
        if config.mover != "host":
            raise ValueError(f"Mover must be the host, not {config.mover!r}")
        if isinstance(depth, bool) or not isinstance(depth, int):
            raise TypeError(f"Queue depth must be an integer, not {depth!r}")
        if depth < 1:
            raise ValueError(f"Queue depth must be a positive integer, not {depth}")
        self.config = config
        self.depth = depth
        if config.host_writes:
            self.fetched_latency = 6
        to_device = stream.Signature(MessageLayout(config=config, to_device=True))
        to_host = stream.Signature(MessageLayout(config=config, to_device=False))

        def record(name):
            return stream.Signature(RecordLayout(name, config=config))

        writes = {
            "host_writes": In(record("BufferWrite")),
            "writes": Out(record("BufferWrite")),
            "refused": Out(1),
        }
        super().__init__(
            {
                "messages": In(to_device),
                "commands": Out(to_device),
                "answers": In(to_host),
                "replies": Out(to_host),
                "fetches": In(record("FetchRequest")),
                "fetch_layer": In(config.bits("layer")),
                "fetch_expert": In(config.bits("expert")),
                "completions": Out(record("Completion")),
                **(writes if config.host_writes else {}),
                "resets": In(1),
                "timeout": In(TIMEOUT_BITS),
                "rejected": Out(1),
                "others_rejected": In(1),
                "idle": Out(1),
            }
        )

    def elaborate(self, platform):
        m = Module()
        config = self.config
        tag_bits, tile_bits = config.bits("tag"), config.bits("tile")
        address_bits = config.bits("address")

        layout = self.messages.p.shape()
        m.submodules.queue = queue = fifo.SyncFIFOBuffered(width=layout.size, depth=self.depth)
        # A bit for each tile that the host was asked for and has not reported.
        m.submodules.asked = asked = Memory(
            shape=unsigned(1), depth=1 << (tag_bits + tile_bits), init=[]
        )
        asked_read, asked_write = asked.read_port(), asked.write_port()
        # How many of an entry's, if it is pending. A FETCH leaves and a tile completes in different
        # states, so that one port is enough.
        m.submodules.counts = counts = Memory(
            shape=unsigned(config.tiles.bit_length()), depth=1 << tag_bits, init=[]
        )
        count_write = counts.write_port()
        fetch_count = counts.read_port(domain="comb")
        ended_count = counts.read_port(domain="comb")
        pending = Signal(config.inflight)
        # What an entry's tiles have in common, written with the first of them.
        common = {"serial": 16, "address": address_bits}
        if config.host_writes:
            common["slot"] = config.bits("slot")
        subject_layout = data.StructLayout(common)
        m.submodules.subjects = subjects = Memory(
            shape=subject_layout, depth=1 << tag_bits, init=[]
        )
        subject_write = subjects.write_port()
        subject_read = subjects.read_port(domain="comb")
        fetch_read = subjects.read_port(domain="comb")

        message = self.messages.p
        fetched = body_fields("Fetched", config=config, body=message.body)
        is_fetched = Signal()
        place = Signal(tag_bits + tile_bits)  # tile and entry that are looked up
        m.d.comb += [
            is_fetched.eq(message.code == MESSAGES["FETCHED"].code),
            asked_read.addr.eq(place),
        ]

        # --- the other messages ---
        room = Signal()
        m.d.comb += [
            room.eq(queue.w_rdy),
            queue.w_data.eq(message),
            queue.r_en.eq(~self.commands.valid | self.commands.ready),
        ]
        with m.If(~self.commands.valid | self.commands.ready):
            m.d.sync += [
                self.commands.valid.eq(queue.r_rdy),
                self.commands.p.eq(layout(queue.r_data)),
            ]

        # --- to the host ---
        serial = Signal(16)  # of the fetch that began last
        event_valid = Signal()
        event = Signal(RecordLayout("Event", config=config))
        may_send = Signal()  # A FETCH may leave.
        turn = Signal()  # It is the answers' turn, if there are both.
        free = Signal()
        fetch = self.fetches.p
        first = Signal()
        m.d.comb += [
            free.eq(~self.replies.valid | self.replies.ready),
            first.eq(fetch.tile == 0),
            asked_write.addr.eq(Cat(fetch.tile, fetch.tag)),
            asked_write.data.eq(1),
            fetch_read.addr.eq(fetch.tag),
            subject_write.addr.eq(fetch.tag),
            subject_write.data.serial.eq(serial + 1),
            subject_write.data.address.eq(fetch.address),
        ]
        if config.host_writes:
            m.d.comb += subject_write.data.slot.eq(fetch.slot)

        # --- time-out ---
        m.submodules.watchdog = watchdog = Watchdog(config=config, count=config.inflight)
        asks, ends = Signal(config.inflight), Signal(config.inflight)  # of an entry, a tile
        expired = Signal(config.inflight)
        m.d.comb += [
            watchdog.cycles.eq(self.timeout),
            watchdog.run.eq(1),
            watchdog.pending.eq(pending),
            watchdog.progress.eq(asks | ends),
            fetch_count.addr.eq(fetch.tag),
            count_write.addr.eq(fetch.tag),
            count_write.data.eq(Mux((pending & (1 << fetch.tag)).any(), fetch_count.data, 0) + 1),
        ]
        m.d.sync += expired.eq((expired | watchdog.expired) & pending & ~(asks | ends))

        def load(name, values):
            m.d.sync += self.replies.p.code.eq(MESSAGES[name].code)
            record = MESSAGES[name].record.name
            for i, value in enumerate(body_bytes(record, config=config, **values)):
                m.d.sync += self.replies.p.body[i].eq(value)

        with m.If(free):
            m.d.sync += self.replies.valid.eq(0)
            with m.If(event_valid):
                m.d.sync += [self.replies.valid.eq(1), event_valid.eq(0)]
                load("EVENT", {name: event[name] for name, _ in event.shape()})
            with m.Elif(self.fetches.valid & may_send & ~(turn & self.answers.valid)):
                m.d.comb += [
                    self.fetches.ready.eq(1),
                    asked_write.en.eq(1),
                    subject_write.en.eq(first),
                    count_write.en.eq(1),
                    asks.eq(1 << fetch.tag),
                ]
                m.d.sync += [
                    self.replies.valid.eq(1),
                    turn.eq(1),
                    pending.eq(pending | asks),
                ]
                with m.If(first):
                    m.d.sync += serial.eq(serial + 1)
                load(
                    "FETCH",
                    {
                        "tag": fetch.tag,
                        "serial": Mux(first, serial + 1, fetch_read.data.serial),
                        "demand": fetch.demand,
                        "layer": self.fetch_layer,
                        "expert": self.fetch_expert,
                        "slot": fetch.slot,
                        "tile": fetch.tile,
                    },
                )
            with m.Elif(self.answers.valid):
                m.d.comb += self.answers.ready.eq(1)
                m.d.sync += [
                    self.replies.valid.eq(1),
                    self.replies.p.eq(self.answers.p),
                    turn.eq(0),
                ]

        # --- rejections ---
        uncounted = Signal()
        m.d.comb += self.rejected.eq(uncounted & ~self.others_rejected)
        with m.If(self.rejected):
            m.d.sync += uncounted.eq(0)

        def reject(code, *, expert, address):
            """Drop the message. There is room for the event and for its strobe."""
            m.d.comb += self.messages.ready.eq(1)
            m.d.sync += [
                event_valid.eq(1),
                event.as_value().eq(0),
                event.code.eq(code),
                event.expert.eq(expert),
                event.address.eq(address),
                uncounted.eq(1),
            ]

        may_reject = ~event_valid & ~uncounted

        # --- completions ---
        may_complete = Signal()
        with m.If(self.completions.ready):
            m.d.sync += self.completions.valid.eq(0)
        m.d.comb += may_complete.eq(~self.completions.valid | self.completions.ready)

        was_asked = Signal()
        subject = Signal(subject_layout)
        looked_up = Signal(tag_bits + tile_bits)
        offset = Signal(address_bits)
        m.d.comb += subject_read.addr.eq(looked_up[tile_bits:])

        def capture():
            """Take what was looked up into registers: block RAM is slow out of the clock edge."""
            m.d.sync += [
                was_asked.eq(asked_read.data),
                subject.eq(subject_read.data),
                offset.eq(looked_up[:tile_bits] * config.tile_bytes),
            ]

        ended_tag = looked_up[tile_bits:]
        m.d.comb += ended_count.addr.eq(ended_tag)

        def complete(failed, reason=FetchReason.BUS):
            m.d.comb += [
                count_write.en.eq(1),
                count_write.addr.eq(ended_tag),
                count_write.data.eq(ended_count.data - 1),
                ends.eq(1 << ended_tag),
                asked_write.en.eq(1),
                asked_write.addr.eq(looked_up),
                asked_write.data.eq(0),
            ]
            m.d.sync += [
                self.completions.valid.eq(1),
                self.completions.p.tag.eq(looked_up[tile_bits:]),
                self.completions.p.tile.eq(looked_up[:tile_bits]),
                self.completions.p.failed.eq(failed),
                self.completions.p.address.eq(subject.address + offset),
                self.completions.p.channel.eq(0),
                self.completions.p.reason.eq(Mux(failed, reason, FetchReason.OK)),
            ]
            with m.If(ended_count.data == 1):
                m.d.sync += pending.eq(pending & ~ends)

        restarted = Signal()
        spared_valid = Signal()
        spared = Signal(tag_bits + tile_bits)
        sweep = Signal(tag_bits + tile_bits)
        ending = Signal()  # Only an entry is swept, which has expired.
        oldest = Signal(tag_bits)
        for i in reversed(range(config.inflight)):
            with m.If(expired[i]):
                m.d.comb += oldest.eq(i)
        tag_fits = fetched["tag"] < config.inflight
        tile_fits = fetched["tile"] < config.tiles
        fits = Signal()
        same = Signal()  # of the fetch that the host means
        failed = fetched["failed"] != 0
        reports, looked = fits & same & was_asked, "JUDGE"
        cleared = Const(1)
        if config.host_writes:
            m.submodules.gate = gate = WriteGate(config=config)
            is_write = self._connect_gate(m, gate, message)
            looked, cleared = "WRITTEN", ~gate.clearing
            whole = Signal()
            reports &= whole | failed
            # Tiles are open as long as they are outstanding.
            m.d.comb += [
                gate.changes.eq(asked_write.en),
                gate.opens.eq(asked_write.data),
                gate.slot.eq(Mux(gate.opens, fetch.slot, subject.slot)),
                gate.tile.eq(asked_write.addr),
                gate.asked_slot.eq(subject.slot),
                gate.asked_tile.eq(looked_up),
            ]

        with m.FSM(init="CLEAR") as fsm:
            with m.State("CLEAR"):
                m.d.comb += [
                    asked_write.en.eq(1),
                    asked_write.addr.eq(sweep),
                    asked_write.data.eq(0),
                ]
                m.d.sync += sweep.eq(sweep + 1)
                with m.If(sweep.all() & cleared):
                    m.next = "IDLE"

            with m.State("IDLE"):
                m.d.comb += place.eq(Cat(fetched["tile"][:tile_bits], fetched["tag"][:tag_bits]))
                m.d.sync += looked_up.eq(place)
                # What came before a restart is heard before it takes effect.
                with m.If(self.messages.valid & is_fetched):
                    m.next = "LOOK"
                if config.host_writes:
                    with m.Elif(self.messages.valid & is_write):
                        m.d.comb += may_send.eq(~self.resets & ~restarted)
                        self._take_write(m, gate, message)
                with m.Elif(restarted):
                    m.d.sync += [sweep.eq(0), restarted.eq(0)]
                    m.next = "SWEEP"
                with m.Elif(expired.any()):
                    m.d.sync += [sweep.eq(oldest << tile_bits), ending.eq(1)]
                    m.next = "SWEEP"
                with m.Else():
                    m.d.comb += may_send.eq(~self.resets)
                    with m.If(self.messages.valid & room):
                        m.d.comb += [queue.w_en.eq(1), self.messages.ready.eq(1)]
                    with m.Elif(self.messages.valid & may_reject):
                        reject(ErrorCode.OVERRUN, expert=0, address=message.code)

            with m.State("LOOK"):
                # A FETCH leaves here too, so that none waits for ever while FETCHED come.
                m.d.comb += may_send.eq(~self.resets & ~restarted)
                capture()
                m.d.sync += [
                    fits.eq(tag_fits & tile_fits),
                    same.eq(fetched["serial"] == subject_read.data.serial),
                ]
                m.next = looked

            if config.host_writes:
                with m.State("WRITTEN"):
                    m.d.comb += gate.asks.eq(1)
                    m.d.sync += whole.eq(gate.whole)
                    with m.If(gate.told):
                        m.next = "JUDGE"

            with m.State("JUDGE"):
                with m.If(reports):
                    with m.If(may_complete):
                        complete(failed)
                        m.d.comb += self.messages.ready.eq(1)
                        m.next = "IDLE"
                with m.Elif(may_reject):
                    reject(ErrorCode.BAD_FETCHED, expert=fetched["tag"], address=fetched["tile"])
                    m.next = "IDLE"

            # After a restart each tile is looked at, or each of an entry that has expired. No FETCH
            # leaves meanwhile.
            with m.State("SWEEP"):
                m.d.comb += place.eq(sweep)
                m.d.sync += looked_up.eq(place)
                m.next = "SWEEP LOOK"

            with m.State("SWEEP LOOK"):
                capture()
                m.next = "SWEEP JUDGE"

            with m.State("SWEEP JUDGE"):
                spare = spared_valid & (spared == looked_up) & ~ending
                with m.If(~was_asked | spare | may_complete):
                    with m.If(was_asked & ~spare):
                        complete(1, Mux(ending, FetchReason.TIMEOUT, FetchReason.BUS))
                    m.d.sync += sweep.eq(sweep + 1)
                    m.next = "SWEEP"
                    with m.If(sweep[:tile_bits].all() & (ending | sweep[tile_bits:].all())):
                        m.d.sync += ending.eq(0)
                        m.next = "IDLE"

        # A FETCH that the link has not taken yet goes to the host that has come.
        with m.If(self.resets):
            m.d.sync += [
                restarted.eq(1),
                spared_valid.eq(
                    self.replies.valid & (self.replies.p.code == MESSAGES["FETCH"].code)
                ),
                spared.eq(self._place_of_reply(tile_bits=tile_bits, tag_bits=tag_bits)),
            ]
        m.d.comb += self.idle.eq(
            fsm.ongoing("IDLE")
            & (gate.idle if config.host_writes else 1)
            & ~self.messages.valid
            & ~queue.r_rdy
            & (queue.level == 0)
            & ~self.commands.valid
            & ~self.replies.valid
            & ~self.completions.valid
            & ~event_valid
            & ~restarted
        )
        return m

    def _connect_gate(self, m, gate, message):
        """Lead beats of the port and of the link through the gate; whether a message is a WRITE."""
        wiring.connect(m, wiring.flipped(self.host_writes), gate.port)
        wiring.connect(m, gate.o, wiring.flipped(self.writes))
        is_write = Signal()
        with m.If(gate.link.ready):
            m.d.sync += gate.link.valid.eq(0)
        m.d.comb += [
            is_write.eq(message.code == MESSAGES["WRITE"].code),
            self.refused.eq(gate.refused),
        ]
        return is_write

    def _take_write(self, m, gate, message):
        """Hand a WRITE to the gate as soon as that has taken the one before."""
        fields = body_fields("BufferWrite", config=self.config, body=message.body)
        config = self.config
        with m.If(~gate.link.valid):
            m.d.comb += self.messages.ready.eq(1)
            m.d.sync += [
                gate.link.valid.eq(1),
                gate.astray.eq(
                    (fields["slot"] >= config.slots) | (fields["beat"] >= config.expert_beats)
                ),
                gate.link.payload.slot.eq(fields["slot"]),
                gate.link.payload.beat.eq(fields["beat"]),
                gate.link.payload.data.eq(Cat(fields["data"])),
            ]

    def _place_of_reply(self, *, tile_bits, tag_bits):
        """Tile and entry of the FETCH in ``replies``."""
        fields = body_fields("Fetch", config=self.config, body=self.replies.p.body)
        return Cat(fields["tile"][:tile_bits], fields["tag"][:tag_bits])
