"""The device's end of the link: messages in order, once, whatever the wire does."""

from amaranth import Cat, Module, Mux, Signal
from amaranth.lib import stream, wiring
from amaranth.lib.memory import Memory
from amaranth.lib.wiring import In, Out

from prestage_hw.contract.checks import require_integer
from prestage_hw.contract.params import require_config
from prestage_hw.contract.records import LINK_ACK, LINK_NAK, LINK_RESET, LINK_RESET_DONE
from prestage_hw.contract.wire import FRAME_OVERHEAD

from .deframer import Deframer
from .framer import Framer
from .layouts import MessageLayout, body_lengths

__all__ = ["Link"]


class Link(wiring.Component):
    """Exchange messages with the host over a wire that loses or damages bytes (go-back-N).

    A message that arrives while the one before it waits in ``messages`` is kept in the deframer and
    holds up ``rx``, so that two are buffered. But ``rx`` also carries the acknowledges that free
    the replay memory. So that a full replay memory cannot block itself, such a message is dropped
    like one lost on the wire while the replay memory is full, and asked for again (LINK_NAK) once
    ``messages`` has room.

    LINK_RESET_DONE repeats the sequence byte of its LINK_RESET, so that the host can tell which of
    several it answers. Messages that were accepted before a reset stay; replies that were accepted
    before it are dropped.

    Parameters
    ----------
    config : :class:`DeviceConfig`
        Device whose messages are carried.
    replay_frames : :class:`int`
        Replies kept until they are acknowledged: a power of two from 2 to 64.
    acknowledge_every : :class:`int`
        Messages after which a frame goes out that acknowledges them, 1 to 64. More than the host's
        window makes it wait for ``acknowledge_idle``.
    acknowledge_idle : :class:`int`
        Cycles without a byte on ``rx`` after which what is accepted is acknowledged, 1 to 65,535.
    replay_cycles : :class:`int`
        Cycles without a new acknowledge after which unacknowledged replies are sent again, 1 to
        16,777,215.

    Members
    -------
    rx : ``In(stream.Signature(8))``
        Bytes from the host. One a cycle while messages are taken.
    tx : ``Out(stream.Signature(8))``
        Bytes to the host. One a cycle while replies wait.
    messages : ``Out(stream.Signature(MessageLayout(config=..., to_device=True)))``
        Messages from the host, each once and in order.
    replies : ``In(stream.Signature(MessageLayout(config=..., to_device=False)))``
        Messages to the host. A reply of *n* bytes is taken n + 2 cycles after it is offered if
        there is room. A code that the host does not know goes out without a body.
    errors : ``Out(1)``
        A strobe for each damaged frame.
    replays : ``Out(1)``
        A strobe each time replies are sent again.
    resets : ``Out(1)``
        A strobe for each LINK_RESET, while no reply is being taken; only with a host mover.

    Attributes
    ----------
    message_latency : :class:`int`
        Cycles from a frame's delimiter on ``rx`` to its message on ``messages``.
    reply_overhead : :class:`int`
        Cycles from a reply of *n* bytes being taken on ``replies`` to its first byte on ``tx``,
        less n.

    Raises
    ------
    TypeError
        If a parameter is not of its type.
    ValueError
        If a parameter is out of its range.
    """

    message_latency = Deframer.latency + 1
    reply_overhead = 14

    def __init__(
        self,
        *,
        config,
        replay_frames=16,
        acknowledge_every=8,
        acknowledge_idle=64,
        replay_cycles=65536,
    ):
        require_config(config)
        require_integer("Replay memory size in frames", replay_frames, low=2, high=64)
        if replay_frames & (replay_frames - 1):
            raise ValueError(
                f"Replay memory size in frames must be a power of two, not {replay_frames}"
            )
        require_integer("Acknowledge interval", acknowledge_every, low=1, high=64)
        require_integer("Acknowledge delay in cycles", acknowledge_idle, low=1, high=65535)
        require_integer("Replay delay in cycles", replay_cycles, low=1, high=(1 << 24) - 1)
        self.config = config
        self.replay_frames = replay_frames
        self.acknowledge_every = acknowledge_every
        self.acknowledge_idle = acknowledge_idle
        self.replay_cycles = replay_cycles
        super().__init__(
            {
                "rx": In(stream.Signature(8)),
                "tx": Out(stream.Signature(8)),
                "messages": Out(stream.Signature(MessageLayout(config=config, to_device=True))),
                "replies": In(stream.Signature(MessageLayout(config=config, to_device=False))),
                "errors": Out(1),
                "replays": Out(1),
                **({"resets": Out(1)} if config.mover == "host" else {}),
            }
        )

    def elaborate(self, platform):
        m = Module()
        reply_lengths = body_lengths(self.config, to_device=False)
        longest_reply = max(reply_lengths.values())

        m.submodules.deframer = deframer = Deframer(config=self.config)
        m.submodules.framer = framer = Framer(longest=FRAME_OVERHEAD + longest_reply)
        wiring.connect(m, wiring.flipped(self.rx), deframer.rx)
        wiring.connect(m, wiring.flipped(self.tx), framer.tx)

        # A slot of the replay memory: the code, then the body.
        slot_bits = (self.replay_frames - 1).bit_length()
        offset_bits = longest_reply.bit_length()
        m.submodules.replay = replay = Memory(
            shape=8, depth=1 << (slot_bits + offset_bits), init=[]
        )
        replay_write = replay.write_port()
        replay_read = replay.read_port()

        expected = Signal(8)  # next sequence number from the host
        oldest = Signal(8)  # first reply that is not acknowledged
        following = Signal(8)  # next reply to send; oldest <= following <= end, modulo 256
        end = Signal(8)  # sequence number of the next new reply

        held = Signal(8)
        unacknowledged = Signal(8)
        full = Signal()
        m.d.comb += [
            held.eq(end - oldest),
            unacknowledged.eq(following - oldest),
            full.eq(held == self.replay_frames),
        ]

        # What the host is owed.
        owed = Signal(range(self.acknowledge_every + 1))  # messages accepted, saturating
        owed_duplicate = Signal()
        nak = Signal()
        nak_armed = Signal(init=1)  # no LINK_NAK since the last message was accepted
        refused = Signal()  # a message found no room: LINK_NAK when there is
        reset_done = Signal()
        reset_mark = Signal(8)

        # --- from the host ---
        frame = deframer.frames.p
        arrived = Signal()  # a whole frame, perhaps held up
        taken = Signal()
        is_reset = Signal()
        is_nak = Signal()
        is_data = Signal()
        in_order = Signal()
        room = Signal()
        behind = Signal(8)
        m.d.comb += [
            arrived.eq(deframer.frames.valid & ~frame.damaged),
            is_reset.eq(frame.code == LINK_RESET),
            is_nak.eq(frame.code == LINK_NAK),
            is_data.eq(~is_reset & ~is_nak & (frame.code != LINK_ACK)),
            behind.eq(expected - frame.sequence),
            in_order.eq(behind == 0),
            room.eq(~self.messages.valid),
            deframer.frames.ready.eq(~(arrived & is_data & in_order & ~room & ~full)),
            taken.eq(deframer.frames.valid & deframer.frames.ready),
        ]

        acknowledged = Signal(8)
        progress = Signal()
        m.d.comb += [
            acknowledged.eq(frame.acknowledge - oldest),
            progress.eq(arrived & ~is_reset & (acknowledged != 0) & (acknowledged <= held)),
        ]

        # --- replay timer ---
        idle = Signal()
        wait = Signal(range(self.replay_cycles + 1))
        late = Signal()
        m.d.comb += late.eq(wait == self.replay_cycles)
        with m.If((held == 0) | progress | late):
            m.d.sync += wait.eq(0)
        with m.Elif(idle & framer.idle & (following == end)):
            m.d.sync += wait.eq(wait + 1)

        # --- acknowledge timer ---
        quiet = Signal(range(self.acknowledge_idle + 1))
        quiet_long = Signal()
        m.d.comb += quiet_long.eq(quiet == self.acknowledge_idle)
        with m.If(self.rx.valid & self.rx.ready):
            m.d.sync += quiet.eq(0)
        with m.Elif(~quiet_long):
            m.d.sync += quiet.eq(quiet + 1)

        # --- to the host: choose a frame, then send it byte by byte ---
        raw = framer.raw
        step = Signal(range(6))  # 0 choose, 1 fetch, 2 code, 3 sequence, 4 acknowledge, 5 body
        m.d.comb += idle.eq(step == 0)
        control = Signal()
        code = Signal(8)
        sequence = Signal(8)
        acknowledge = Signal(8)
        offset = Signal(offset_bits)
        remaining = Signal(range(longest_reply + 1))
        slot = Signal(slot_bits)
        room_in_raw = Signal()
        length = Signal.like(remaining)
        m.d.comb += [
            room_in_raw.eq(~raw.valid | raw.ready),
            replay_read.addr.eq(Cat(offset, slot)),
        ]
        with m.Switch(replay_read.data):
            for reply_code, reply_length in reply_lengths.items():
                with m.Case(reply_code):
                    m.d.comb += length.eq(reply_length)

        chosen = Signal()
        send_reply = Signal()
        with m.If(idle):
            m.d.sync += [
                control.eq(1),
                sequence.eq(0),
                acknowledge.eq(expected),
                slot.eq(following[:slot_bits]),
                offset.eq(0),
            ]
            with m.If(reset_done):
                m.d.comb += chosen.eq(1)
                m.d.sync += [code.eq(LINK_RESET_DONE), sequence.eq(reset_mark), acknowledge.eq(0)]
                m.d.sync += reset_done.eq(0)
            with m.Elif(nak):
                m.d.comb += chosen.eq(1)
                m.d.sync += [code.eq(LINK_NAK), nak.eq(0)]
            with m.Elif(following != end):
                m.d.comb += [chosen.eq(1), send_reply.eq(1)]
                m.d.sync += [control.eq(0), sequence.eq(following), following.eq(following + 1)]
            with m.Elif(
                (owed == self.acknowledge_every) | (quiet_long & (owed_duplicate | (owed != 0)))
            ):
                m.d.comb += chosen.eq(1)
                m.d.sync += code.eq(LINK_ACK)
        with m.If(chosen):
            m.d.sync += [step.eq(1), owed.eq(0), owed_duplicate.eq(0)]

        with m.If(raw.ready):
            m.d.sync += raw.valid.eq(0)
        with m.If(step == 1):
            m.d.comb += replay_read.en.eq(1)
            m.d.sync += [offset.eq(1), step.eq(2)]
        with m.Elif(~idle & room_in_raw):
            m.d.sync += [raw.valid.eq(1), raw.p.last.eq(0), step.eq(step + 1)]
            with m.Switch(step):
                with m.Case(2):
                    m.d.sync += [
                        raw.p.byte.eq(Mux(control, code, replay_read.data)),
                        remaining.eq(Mux(control, 0, length)),
                    ]
                with m.Case(3):
                    m.d.sync += raw.p.byte.eq(sequence)
                with m.Default():
                    m.d.comb += replay_read.en.eq(1)
                    m.d.sync += [
                        raw.p.byte.eq(Mux(step == 4, acknowledge, replay_read.data)),
                        raw.p.last.eq(remaining == 0),
                        remaining.eq(remaining - 1),
                        offset.eq(offset + 1),
                        step.eq(Mux(remaining == 0, 0, 5)),
                    ]

        # --- replies into the replay memory --- A slot that is acknowledged while it is being sent
        # again may be overwritten under way. The host has that frame already and drops what it gets
        # by its number.
        reply = self.replies.p
        copied = Signal(offset_bits + 1)
        reply_length = Signal.like(remaining)
        storing = Signal()
        with m.Switch(reply.code):
            for reply_code, its_length in reply_lengths.items():
                with m.Case(reply_code):
                    m.d.comb += reply_length.eq(its_length)
        m.d.comb += [
            storing.eq(self.replies.valid & ~full & ~self.replies.ready),
            replay_write.addr.eq(Cat(copied[:offset_bits], end[:slot_bits])),
            replay_write.en.eq(storing),
        ]
        with m.Switch(copied):
            with m.Case(0):
                m.d.comb += replay_write.data.eq(reply.code)
            for at in range(longest_reply):
                with m.Case(at + 1):
                    m.d.comb += replay_write.data.eq(reply.body[at])
        m.d.sync += self.replies.ready.eq(0)
        with m.If(storing):
            m.d.sync += copied.eq(copied + 1)
            with m.If(copied == reply_length):
                m.d.sync += self.replies.ready.eq(1)
        with m.If(self.replies.ready):
            m.d.sync += [copied.eq(0), end.eq(end + 1)]

        # --- what a frame from the host changes; later assignments win over those above ---
        with m.If(self.messages.ready):
            m.d.sync += self.messages.valid.eq(0)
        m.d.sync += [self.errors.eq(taken & frame.damaged), self.replays.eq(0)]
        if self.config.mover == "host":
            m.d.sync += self.resets.eq(taken & ~frame.damaged & is_reset)

        with m.If(progress):
            m.d.sync += oldest.eq(frame.acknowledge)
            with m.If(acknowledged > unacknowledged):
                m.d.sync += following.eq(frame.acknowledge)
        with m.If(
            (
                arrived
                & is_nak
                & (unacknowledged != 0)
                & ~(progress & (acknowledged >= unacknowledged))
            )
            | (late & ~progress & (unacknowledged != 0))
        ):
            m.d.sync += [
                following.eq(Mux(progress, frame.acknowledge, oldest)),
                self.replays.eq(1),
            ]

        with m.If(refused & room):
            m.d.sync += [refused.eq(0), nak.eq(1)]
        with m.If(taken):
            with m.If(frame.damaged):
                with m.If(nak_armed):
                    m.d.sync += [nak.eq(1), nak_armed.eq(0)]
            with m.Elif(is_reset):
                m.d.sync += [
                    reset_done.eq(1),
                    reset_mark.eq(frame.sequence),
                    expected.eq(0),
                    oldest.eq(0),
                    following.eq(0),
                    end.eq(0),
                    owed.eq(0),
                    owed_duplicate.eq(0),
                    nak.eq(0),
                    nak_armed.eq(1),
                    refused.eq(0),
                    # A reply that is not taken yet is copied anew to its new place.
                    copied.eq(0),
                    self.replies.ready.eq(0),
                ]
            with m.Elif(is_data):
                with m.If(in_order & room):
                    m.d.sync += [
                        self.messages.valid.eq(1),
                        self.messages.p.code.eq(Mux(frame.misfit, 0, frame.code)),
                        self.messages.p.body.eq(frame.body),
                        expected.eq(expected + 1),
                        nak.eq(0),
                        nak_armed.eq(1),
                        refused.eq(0),
                    ]
                    with m.If(chosen):
                        m.d.sync += owed.eq(
                            1
                        )  # The frame chosen now acknowledges only what came before.
                    with m.Elif(owed != self.acknowledge_every):
                        m.d.sync += owed.eq(owed + 1)
                with m.Elif(in_order):
                    m.d.sync += [refused.eq(1), nak_armed.eq(0)]
                with m.Elif(behind <= 128):
                    m.d.sync += owed_duplicate.eq(1)
                with m.Elif(nak_armed):
                    m.d.sync += [nak.eq(1), nak_armed.eq(0)]
        return m
