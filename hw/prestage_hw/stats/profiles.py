"""Profiles: one set of settings for each phase, made active as a whole at a layer boundary."""

from amaranth import Cat, Const, Module, Mux, Signal, unsigned
from amaranth.lib import data, stream, wiring
from amaranth.lib.memory import Memory
from amaranth.lib.wiring import In, Out

from prestage_hw.contract.params import require_config
from prestage_hw.contract.records import Phase, Refusal
from prestage_hw.contract.registers import (
    PROFILE_REGISTERS,
    REFUSAL_FIELDS,
    ROW_STRIDE_BITS,
    SHAPE_FIELDS,
    refused_bits,
    register_by_name,
)
from prestage_hw.dma.settings import channel_reset, rows_are_bad, shape_refusals
from prestage_hw.layouts import RecordLayout
from prestage_hw.link.dispatcher import RegisterRequestLayout

__all__ = ["ACCESSED", "ActiveProfileLayout", "Profiles", "RefusedLayout"]

#: Registers that are read and written here.
ACCESSED = (*PROFILE_REGISTERS, "dma_channel", "profile", "profile_select", "refusal")


class ActiveProfileLayout(data.StructLayout):
    """What a profile holds beside the DMA channels."""

    def __init__(self):
        super().__init__(
            {
                "prefetch_enable": 1,
                "hint_enable": 1,
                "prefetch_tiles": 3,
                "predict_threshold": 8,
                "predict_far_threshold": 8,
                "predict_ahead": 8,
                "cutoff_layer": 8,
                "budget": 4,
                "rescan_ahead": 7,
                "rescan_least": 8,
                "dma_lower_credits": 5,
            }
        )


class RefusedLayout(data.StructLayout):
    """A write that was refused: whether there is one, why, and the address of its register."""

    def __init__(self):
        super().__init__({"valid": 1, "reason": Refusal, "register": 16})


class _ChannelLayout(data.StructLayout):
    """What a profile holds for each DMA channel."""

    def __init__(self, *, config):
        super().__init__(
            {
                **{name: bits for name, (_, bits) in SHAPE_FIELDS.items()},
                "row_bytes": config.bits("tile_bytes"),
                "row_stride": ROW_STRIDE_BITS,
            }
        )


class Profiles(wiring.Component):
    """Settings of every phase in a small memory, and those that hold.

    A row of the memory holds a profile's settings beside the DMA channels, and one each channel.
    When a profile is asked for, its rows are read one a cycle: those of the channels go to the DMA
    engine's shadow, the last one stays in a register. At the next layer boundary, at once if the
    engine is idle, that register becomes active, and ``commit`` makes the shadow active.

    A response comes ``latency`` cycles after its request was taken. While a switch waits, or if the
    request asks for one, the rows are read before it: ``config.dma_channels + 2`` cycles more,
    unless ``settings`` waits. So at a boundary, which comes between accesses, the rows are there.

    Parameters
    ----------
    config : :class:`DeviceConfig`
        Device.

    Members
    -------
    requests : ``In(stream.Signature(RegisterRequestLayout()))``
        Accesses to the registers in :data:`ACCESSED`, of ``control`` to bits 0 and 1. Bits that
        :func:`refused_bits` names are 0.
    values : ``Out(stream.Signature(32))``
        One for each access, the value read.
    phases : ``In(stream.Signature(8))``
        Phase of a token that starts, not while an access is under way. Taken once its profile is
        active, if ``follow``. It is a layer boundary.
    follow : ``In(1)``
        A token's phase asks for its profile.
    boundary : ``In(1)``
        Strobe: a layer boundary. Not while an access or a phase is under way.
    engine_idle : ``In(1)``
        Nothing is under way.
    active : ``Out(ActiveProfileLayout())``
        Settings that hold.
    settings : ``Out(stream.Signature(RecordLayout("ChannelSettings", config=config)))``
        Settings of channels for the DMA engine's shadow.
    commit : ``Out(1)``
        Strobe, in the first cycle in which ``active`` is another profile's: makes the shadow
        active, with ``active.dma_lower_credits``.
    asked, selected, active_phase : ``Out(2)``
        Profile that was asked for last, that is accessed, that is active.
    refused : ``In(RefusedLayout())``
        Strobe ``valid``: a write was refused before it came here. Not while a phase is under way.
    refusal : ``Out(32)``
        The register ``refusal``.
    """

    #: Cycles from a request to its response while no switch waits.
    latency = 4

    def __init__(self, *, config):
        require_config(config)
        self.config = config
        super().__init__(
            {
                "requests": In(stream.Signature(RegisterRequestLayout())),
                "values": Out(stream.Signature(32)),
                "phases": In(stream.Signature(8)),
                "follow": In(1),
                "boundary": In(1),
                "engine_idle": In(1),
                "active": Out(ActiveProfileLayout(), init=self._reset()),
                "settings": Out(stream.Signature(RecordLayout("ChannelSettings", config=config))),
                "commit": Out(1),
                "asked": Out(2, init=Phase.DECODE),
                "selected": Out(2, init=Phase.DECODE),
                "active_phase": Out(2, init=Phase.DECODE),
                "refused": In(RefusedLayout()),
                "refusal": Out(32),
                "channel": Out(range(config.dma_channels)),
            }
        )

    def _reset(self):
        def reset(name):
            return register_by_name(name).reset

        return {
            "prefetch_enable": reset("control") & 1,
            "hint_enable": reset("control") >> 1 & 1,
            **{
                name: reset(name)
                for name in ActiveProfileLayout().members
                if not name.endswith("_enable")
            },
        }

    def _reason(self, m, access, channel):
        """What is wrong with an access."""
        config = self.config
        # What is held of the value; the bits above are 0.
        held = {
            name: access.value[: (0xFFFFFFFF & ~bits).bit_length()]
            for name, (bits, _) in refused_bits(config).items()
        }
        shape = {name: access.value[low : low + bits] for name, (low, bits) in SHAPE_FIELDS.items()}
        enabled = shape.pop("enable")
        tiles, least = held["prefetch_tiles"], held["rescan_least"]
        row_bytes, row_stride = held["dma_row_bytes"], held["dma_row_stride"]
        checks = {
            "profile": ((held["profile"] > max(Phase), Refusal.PROFILE),),
            "profile_select": ((held["profile_select"] > max(Phase), Refusal.PROFILE),),
            # None would stop prefetching for ever, and more than 4 is not built.
            "prefetch_tiles": (((tiles == 0) | (tiles > 4), Refusal.VALUE),),
            "budget": ((held["budget"] > 8, Refusal.BUDGET),),
            "rescan_ahead": ((held["rescan_ahead"] > config.most_ahead, Refusal.RESCAN),),
            "rescan_least": ((least == 0, Refusal.RESCAN),),
            "dma_channel": ((held["dma_channel"] >= config.dma_channels, Refusal.CHANNEL),),
            "dma_lower_credits": (
                (held["dma_lower_credits"] > config.outstanding_bursts, Refusal.CREDITS),
            ),
            "dma_shape": (
                *shape_refusals(config, **shape),
                (
                    ~enabled & Cat(channel == c for c in config.scheduled_channels).any(),
                    Refusal.ENABLE,
                ),
            ),
            "dma_row_bytes": ((rows_are_bad(config, row_bytes=row_bytes), Refusal.ROWS),),
            "dma_row_stride": ((rows_are_bad(config, row_stride=row_stride), Refusal.ROWS),),
        }
        reason = Signal(Refusal)
        with m.If(access.write), m.Switch(access.register):
            for name, reasons in checks.items():
                with m.Case(register_by_name(name).address):
                    for bad, because in reversed(reasons):
                        with m.If(bad):
                            m.d.comb += reason.eq(because)
        return reason

    def elaborate(self, platform):
        m = Module()
        config = self.config
        channels = config.dma_channels
        profile_layout = ActiveProfileLayout()
        channel_layout = _ChannelLayout(config=config)
        width = max(profile_layout.size, channel_layout.size)
        # Row 0 is the profile's own, row c + 1 that of channel c.
        row_bits = channels.bit_length()
        m.submodules.rows = rows = Memory(shape=unsigned(width), depth=4 << row_bits, init=[])
        read = rows.read_port()
        write = rows.write_port()

        channel_number = self.channel
        access = Signal(RegisterRequestLayout())
        refused = Signal(Refusal)
        reason = self._reason(m, access, channel_number)
        row = Signal(width)
        changed = Signal(width)
        own = data.View(profile_layout, row[: profile_layout.size])
        own_changed = data.View(profile_layout, changed[: profile_layout.size])
        shape = data.View(channel_layout, row[: channel_layout.size])
        shape_changed = data.View(channel_layout, changed[: channel_layout.size])
        value = Signal(32)
        of_channel = Signal()
        own_row = Signal()

        idle = Signal()  # `engine_idle`, which comes late in its cycle.
        # A switch was asked for and has not come. In IDLE its rows were read, and `row` is the
        # profile's own.
        waiting = Signal()
        answering = Signal()  # An access waits for that.
        sweep = Signal(2 + row_bits)
        step = Signal(range(channels + 2))
        advance = Signal()
        switch = Signal()
        asks = Signal()
        unknown = Signal()
        refuse = Signal()
        refuse_reason = Signal(Refusal)
        refuse_register = Signal(16)

        m.d.comb += [
            asks.eq(self.follow & (self.phases.payload != self.asked)),
            unknown.eq(self.follow & (self.phases.payload > max(Phase))),
            changed.eq(row),
            refuse.eq(self.refused.valid),
            refuse_reason.eq(self.refused.reason),
            refuse_register.eq(self.refused.register),
            self.settings.p.enable.eq(shape.enable),
            self.settings.p.traffic.eq(shape.traffic),
            self.settings.p.weight.eq(shape.weight),
            self.settings.p.credits.eq(shape.credits),
            self.settings.p.burst_beats.eq(shape.burst_beats),
            self.settings.p.row_bytes.eq(shape.row_bytes),
            self.settings.p.row_stride.eq(shape.row_stride),
        ]
        with m.If(self.values.ready):
            m.d.sync += self.values.valid.eq(0)
        m.d.sync += [self.commit.eq(0), idle.eq(self.engine_idle)]

        # What an access reads of its row, and what a write makes of it.
        with m.Switch(access.register):
            with m.Case(register_by_name("control").address):
                m.d.comb += [
                    own_row.eq(1),
                    value.eq(Cat(own.prefetch_enable, own.hint_enable)),
                    Cat(own_changed.prefetch_enable, own_changed.hint_enable).eq(access.value),
                ]
            for name in (
                "prefetch_tiles",
                "predict_threshold",
                "predict_far_threshold",
                "predict_ahead",
                "cutoff_layer",
                "budget",
                "rescan_ahead",
                "rescan_least",
                "dma_lower_credits",
            ):
                with m.Case(register_by_name(name).address):
                    m.d.comb += [
                        own_row.eq(1),
                        value.eq(own[name]),
                        own_changed[name].eq(access.value),
                    ]
            with m.Case(register_by_name("dma_shape").address):
                m.d.comb += of_channel.eq(1)
                for name, (low, bits) in SHAPE_FIELDS.items():
                    m.d.comb += [
                        value[low : low + bits].eq(shape[name]),
                        shape_changed[name].eq(access.value[low : low + bits]),
                    ]
            for name in ("row_bytes", "row_stride"):
                with m.Case(register_by_name(f"dma_{name}").address):
                    m.d.comb += [
                        of_channel.eq(1),
                        value.eq(shape[name]),
                        shape_changed[name].eq(access.value),
                    ]
            with m.Case(register_by_name("dma_channel").address):
                m.d.comb += value.eq(channel_number)
            with m.Case(register_by_name("profile").address):
                m.d.comb += value.eq(self.asked)
            with m.Case(register_by_name("profile_select").address):
                m.d.comb += value.eq(self.selected)
            with m.Case(register_by_name("refusal").address):
                m.d.comb += value.eq(self.refusal)

        with m.FSM(init="CLEAR"):
            with m.State("CLEAR"):
                # A reset does not clear the memory.
                m.d.comb += [write.en.eq(1), write.addr.eq(sweep)]
                with m.Switch(sweep[:row_bits]):
                    with m.Case(0):
                        m.d.comb += write.data.eq(profile_layout.const(self._reset()).as_value())
                    for channel in range(channels):
                        with m.Case(channel + 1):
                            reset = channel_layout.const(channel_reset(config, channel))
                            m.d.comb += write.data.eq(reset.as_value())
                m.d.sync += sweep.eq(sweep + 1)
                with m.If(sweep.all()):
                    m.next = "IDLE"

            with m.State("IDLE"):
                m.d.sync += [answering.eq(0), step.eq(0)]
                m.d.comb += self.requests.ready.eq(~self.values.valid)
                m.d.comb += switch.eq(waiting & (self.boundary | idle))
                with m.If(self.requests.valid & self.requests.ready):
                    m.d.sync += access.eq(self.requests.p)
                    m.next = "ROW"
                with m.Elif(self.phases.valid):
                    with m.If(asks & ~unknown):
                        m.d.sync += [self.asked.eq(self.phases.payload), waiting.eq(1)]
                        m.d.comb += switch.eq(0)
                        m.next = "STAGE"
                    with m.Else():
                        m.d.comb += [
                            self.phases.ready.eq(1),
                            switch.eq(waiting),
                            refuse.eq(unknown),
                            refuse_reason.eq(Refusal.PROFILE),
                            refuse_register.eq(register_by_name("profile").address),
                        ]

            with m.State("ROW"):
                m.d.comb += read.addr.eq(
                    Cat(Mux(of_channel, channel_number + 1, 0)[:row_bits], self.selected)
                )
                m.d.sync += refused.eq(reason)
                m.next = "READ"

            with m.State("READ"):
                m.d.sync += row.eq(read.data)
                m.next = "APPLY"

            with m.State("APPLY"):
                m.d.sync += [self.values.payload.eq(value), answering.eq(1), step.eq(0)]
                m.d.comb += [
                    write.addr.eq(
                        Cat(Mux(of_channel, channel_number + 1, 0)[:row_bits], self.selected)
                    ),
                    write.data.eq(changed),
                ]
                asked_now = Signal()
                with m.If(access.write & (refused != Refusal.NONE)):
                    m.d.comb += [
                        refuse.eq(1),
                        refuse_reason.eq(refused),
                        refuse_register.eq(access.register),
                    ]
                with m.Elif(access.write):
                    m.d.comb += write.en.eq(own_row | of_channel)
                    with m.If(own_row & (self.selected == self.active_phase)):
                        m.d.sync += self.active.eq(own_changed)
                    with m.Switch(access.register):
                        with m.Case(register_by_name("dma_channel").address):
                            m.d.sync += channel_number.eq(access.value)
                        with m.Case(register_by_name("profile_select").address):
                            m.d.sync += self.selected.eq(access.value)
                        with m.Case(register_by_name("profile").address):
                            m.d.comb += asked_now.eq(1)
                            m.d.sync += [self.asked.eq(access.value), waiting.eq(1)]
                        with m.Case(register_by_name("refusal").address):
                            m.d.sync += self.refusal.eq(0)
                with m.If(waiting | asked_now):
                    m.next = "STAGE"
                with m.Else():
                    m.d.sync += self.values.valid.eq(1)
                    m.next = "IDLE"

            # In step s the address is that of row s + 1, at last of row 0; `row` holds what was
            # addressed two steps before.
            with m.State("STAGE"):
                m.d.comb += [
                    advance.eq(~self.settings.valid | self.settings.ready),
                    read.en.eq(advance),
                    read.addr.eq(Cat(Mux(step >= channels, 0, step + 1)[:row_bits], self.asked)),
                ]
                with m.If(advance):
                    m.d.sync += [
                        row.eq(read.data),
                        step.eq(step + 1),
                        self.settings.valid.eq((step != 0) & (step <= channels)),
                        self.settings.p.channel.eq(step - 1),
                    ]
                    with m.If(step == channels + 1):
                        m.d.sync += self.values.valid.eq(answering)
                        m.next = "IDLE"

        with m.If(switch):
            m.d.sync += [
                self.active.eq(own),
                self.active_phase.eq(self.asked),
                self.commit.eq(1),
                waiting.eq(0),
            ]
        low = {name: at for name, (at, _) in REFUSAL_FIELDS.items()}
        with m.If(refuse & ~self.refusal[low["refused"]]):
            m.d.sync += self.refusal.eq(
                (Const(1, 32) << low["refused"])
                | (refuse_register << low["register"])
                | (refuse_reason << low["reason"])
            )
        return m
