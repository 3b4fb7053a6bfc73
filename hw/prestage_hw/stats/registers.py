"""The register bank."""

from amaranth import Cat, Const, Module, Mux, Signal
from amaranth.lib import data, stream, wiring
from amaranth.lib.wiring import In, Out

from prestage_hw.contract import REGISTERS
from prestage_hw.contract.params import MOST_PARTS, require_config
from prestage_hw.contract.registers import (
    CHANNEL_COUNTERS,
    COUNTERS,
    SLOT_BASE_BYTES,
    THROTTLE_FIELDS,
    TIMEOUT_BITS,
    register_by_name,
    shape_registers,
)
from prestage_hw.layouts import RecordLayout
from prestage_hw.link.dispatcher import RegisterRequestLayout, RegisterResponseLayout
from prestage_hw.scheduler import ThrottleStateLayout, WeightsLayout

from .channels import CounterAddressLayout
from .profiles import ACCESSED, ActiveProfileLayout, Profiles

__all__ = ["RegisterBank"]

#: Cycles after a clear before ``engine_idle`` is looked at again: a block needs one to go busy, one
#: more passes in registers.
_CLEAR_CYCLES = 4

#: Bits of ``control`` that are kept here: all but those of the profile.
_CONTROL_BITS = range(2, 6)


class RegisterBank(wiring.Component):
    """Registers of the contract.

    A response comes 2 cycles after its request was taken, for ``table_data`` when the predictor
    answers, for ``clear`` when the engine is idle again, and for counters of channels after 3. For
    registers in
    :data:`prestage_hw.stats.profiles.ACCESSED` it comes 3 cycles later than :class:`Profiles`
    states.

    Parameters
    ----------
    config : :class:`DeviceConfig`
        Device.

    Members
    -------
    requests : ``In(stream.Signature(RegisterRequestLayout()))``
        Accesses, one at a time.
    values : ``Out(stream.Signature(RegisterResponseLayout()))``
        One response for each.
    table_requests : ``Out(stream.Signature(RecordLayout("TableRequest", config=config)))``
        Accesses to predictor tables.
    table_values : ``In(stream.Signature(32))``
        One value for each table read.
    table_select, table_words : ``Out(8)``, ``In(24)``
        The selected table and its size, in words.
    counters : ``In(StructLayout)``
        Values of the counters.
    channel_counter, channel_value : ``Out(CounterAddressLayout(config=config))``, ``In(32)``
        Counter of a channel, and its value a cycle later.
    throttle_state : ``In(ThrottleStateLayout())``
        The register of that name.
    engine_idle : ``In(1)``
        Nothing is under way.
    control : ``Out(StructLayout)``
        Fields ``settle``, ``throttle_enable``, ``cancel_enable``, ``throttle``, ``policy``,
        ``hint_threshold``, ``expert_base``, ``part_bases`` (of the parts after the first),
        ``token_base``, ``slot_base``, ``dma_timeout``, and ``profile``, an
        :class:`ActiveProfileLayout`.
    abort : ``Out(1)``
        Strobe: abort all tiles.
    phases : ``In(stream.Signature(8))``
        Phase of a token that starts, not while an access is under way: a layer boundary.
    boundary : ``In(1)``
        Strobe: a layer boundary, not while an access or a phase is under way.
    settings : ``Out(stream.Signature(RecordLayout("ChannelSettings", config=config)))``
        Settings of channels for the DMA engine's shadow.
    commit : ``Out(1)``
        Strobe: make that shadow active, with ``control.profile.dma_lower_credits``.
    clear : ``Out(StructLayout)``
        Pulses ``tables``, ``buffer``, ``counters``, ``checksums``.
    """

    def __init__(self, *, config):
        require_config(config)
        self.config = config
        super().__init__(
            {
                "requests": In(stream.Signature(RegisterRequestLayout())),
                "values": Out(stream.Signature(RegisterResponseLayout())),
                "table_requests": Out(
                    stream.Signature(RecordLayout("TableRequest", config=config))
                ),
                "table_values": In(stream.Signature(32)),
                "table_select": Out(8),
                "table_words": In(24),
                "counters": In(data.StructLayout({c.name: c.bits for c in COUNTERS})),
                "engine_idle": In(1),
                "throttle_state": In(ThrottleStateLayout()),
                "channel_counter": Out(CounterAddressLayout(config=config)),
                "channel_value": In(32),
                "abort": Out(1),
                "control": Out(
                    data.StructLayout(
                        {
                            "settle": 1,
                            "throttle_enable": 1,
                            "cancel_enable": 1,
                            "throttle": WeightsLayout(),
                            "policy": 2,
                            "hint_threshold": 8,
                            "expert_base": config.address_bits,
                            "part_bases": data.ArrayLayout(
                                config.address_bits, len(config.part_bytes) - 1
                            ),
                            "token_base": config.address_bits,
                            "slot_base": config.address_bits,
                            "dma_timeout": TIMEOUT_BITS,
                            "profile": ActiveProfileLayout(),
                        }
                    )
                ),
                "clear": Out(
                    data.StructLayout({"tables": 1, "buffer": 1, "counters": 1, "checksums": 1})
                ),
                "phases": In(stream.Signature(8)),
                "boundary": In(1),
                "settings": Out(stream.Signature(RecordLayout("ChannelSettings", config=config))),
                "commit": Out(1),
            }
        )

    def elaborate(self, platform):
        m = Module()
        config = self.config
        m.submodules.profiles = profiles = Profiles(config=config)

        policy = Signal(2, init=register_by_name("policy").reset)
        throttle = Signal(32, init=register_by_name("throttle").reset)
        first, last = _CONTROL_BITS[0], _CONTROL_BITS[-1]
        control = Signal(len(_CONTROL_BITS), init=register_by_name("control").reset >> first)
        settle, throttle_enable, cancel_enable, follow = control
        hint_threshold = Signal(8, init=register_by_name("hint_threshold").reset)
        base_low = Signal(32)
        base_high = Signal(32)
        token_low, token_high = Signal(32), Signal(32)
        slot_low, slot_high = Signal(32), Signal(32)
        timeout = Signal(TIMEOUT_BITS)
        part_bases = [
            (
                Signal(32, name=f"part_low_{part}", init=base & 0xFFFFFFFF),
                Signal(32, name=f"part_high_{part}", init=base >> 32),
            )
            for part, base in enumerate(config.part_bases())
            if part
        ]
        table_address = Signal(32)
        cycles = Signal(64)
        high = Signal(32)
        fields = sum((1 << bits) - 1 << low for low, bits in THROTTLE_FIELDS.values())
        # The bus reads whole beats: the low bits of the base are not kept.
        aligned = (1 << 32) - config.data_bytes

        m.d.sync += cycles.eq(cycles + 1)
        m.d.comb += [
            self.control.settle.eq(settle),
            self.control.throttle_enable.eq(throttle_enable),
            self.control.cancel_enable.eq(cancel_enable),
            self.control.throttle.eq(throttle),
            self.control.policy.eq(policy),
            self.control.hint_threshold.eq(hint_threshold),
            self.control.expert_base.eq(Cat(base_low, base_high)),
            self.control.token_base.eq(Cat(token_low, token_high)),
            self.control.slot_base.eq(Cat(slot_low, slot_high)),
            self.control.dma_timeout.eq(timeout),
            *(
                self.control.part_bases[at].eq(Cat(low, high))
                for at, (low, high) in enumerate(part_bases)
            ),
            self.control.profile.eq(profiles.active),
            self.table_select.eq(table_address[24:]),
            profiles.follow.eq(follow),
            profiles.boundary.eq(self.boundary),
            profiles.engine_idle.eq(self.engine_idle),
            self.commit.eq(profiles.commit),
        ]
        wiring.connect(m, wiring.flipped(self.phases), profiles.phases)
        wiring.connect(m, profiles.settings, wiring.flipped(self.settings))

        readable = {
            "policy": policy,
            "throttle": throttle,
            "throttle_state": self.throttle_state.as_value(),
            "hint_threshold": hint_threshold,
            "expert_base_low": base_low,
            "expert_base_high": base_high,
            "token_base_low": token_low,
            "token_base_high": token_high,
            "slot_base_low": slot_low,
            "slot_base_high": slot_high,
            "dma_timeout": timeout,
            "profile_active": profiles.active_phase,
            "table_address": table_address,
            "table_words": self.table_words,
            "cycles_low": cycles[:32],
            "cycles_high": high,
        }
        bases_low, bases_high = {}, {}
        for part in range(1, MOST_PARTS):
            low, high_word = part_bases[part - 1] if part <= len(part_bases) else (None, None)
            bases_low[f"part{part}_base_low"] = low
            bases_high[f"part{part}_base_high"] = high_word
        for name, value in (bases_low | bases_high).items():
            readable[name] = Const(0, 32) if value is None else value
        for name, value in shape_registers(config).items():
            readable[name] = Const(value, 32)
        latches = {"cycles_low": cycles[32:]}
        for counter in COUNTERS:
            value = self.counters[counter.name]
            if counter.bits == 32:
                readable[counter.name] = value
            else:
                readable[f"{counter.name}_low"] = value[:32]
                readable[f"{counter.name}_high"] = high
                latches[f"{counter.name}_low"] = value[32:]

        access = Signal(RegisterRequestLayout())
        of_profiles = Signal()
        with m.Switch(access.register):
            with m.Case(*(register_by_name(name).address for name in ACCESSED)):
                m.d.comb += of_profiles.eq(1)
        m.d.comb += profiles.requests.payload.eq(access)
        # Control bits of the profile, and those that are kept here.
        of_control = access.register == register_by_name("control").address
        profile_value = profiles.values.payload | Mux(of_control, control << first, 0)
        wait = Signal(range(_CLEAR_CYCLES + 1))

        m.d.comb += [
            self.channel_counter.channel.eq(profiles.channel),
            self.channel_counter.counter.eq(access.register),
        ]
        m.d.sync += [self.clear.eq(0), self.abort.eq(0)]
        with m.If(self.values.valid & self.values.ready):
            m.d.sync += self.values.valid.eq(0)
        with m.If(self.table_requests.valid & self.table_requests.ready):
            m.d.sync += self.table_requests.valid.eq(0)

        def respond(ok, value=0):
            m.d.sync += [
                self.values.valid.eq(1),
                self.values.p.ok.eq(ok),
                self.values.p.value.eq(value),
            ]
            m.next = "IDLE"

        with m.FSM():
            with m.State("IDLE"):
                m.d.comb += self.requests.ready.eq(~self.values.valid)
                with m.If(self.requests.valid & self.requests.ready):
                    m.d.sync += access.eq(self.requests.p)
                    m.next = "ACCESS"

            with m.State("ACCESS"):
                m.d.sync += wait.eq(0)
                with m.If(of_profiles):
                    m.next = "PROFILE"
                with m.Elif(access.write):
                    with m.Switch(access.register):
                        for name, target in (
                            ("policy", policy),
                            ("throttle", throttle),
                            ("hint_threshold", hint_threshold),
                            ("expert_base_high", base_high),
                            ("token_base_low", token_low),
                            ("token_base_high", token_high),
                            ("slot_base_high", slot_high),
                            ("table_address", table_address),
                            *bases_high.items(),
                        ):
                            with m.Case(register_by_name(name).address):
                                kept = fields if name == "throttle" else (1 << 32) - 1
                                if target is not None:
                                    m.d.sync += target.eq(access.value & kept)
                                respond(1)
                        for name, target in (("expert_base_low", base_low), *bases_low.items()):
                            with m.Case(register_by_name(name).address):
                                if target is not None:
                                    m.d.sync += target.eq(access.value & aligned)
                                respond(1)
                        with m.Case(register_by_name("slot_base_low").address):
                            m.d.sync += slot_low.eq(access.value & -SLOT_BASE_BYTES)
                            respond(1)
                        with m.Case(register_by_name("dma_timeout").address):
                            # The watchdog counts quarters of it.
                            small = (access.value[:TIMEOUT_BITS] != 0) & (
                                access.value[2:TIMEOUT_BITS] == 0
                            )
                            m.d.sync += timeout.eq(Mux(small, 4, access.value))
                            respond(1)
                        with m.Case(register_by_name("dma_abort").address):
                            m.d.sync += self.abort.eq(1)
                            respond(1)
                        with m.Case(register_by_name("clear").address):
                            m.d.sync += self.clear.eq(access.value)
                            m.next = "CLEAR"
                        with m.Case(register_by_name("table_data").address):
                            m.next = "TABLE"
                        with m.Default():
                            respond(0)
                with m.Else():
                    with m.Switch(access.register):
                        for register in REGISTERS:
                            if register.name in readable:
                                with m.Case(register.address):
                                    if register.name in latches:
                                        m.d.sync += high.eq(latches[register.name])
                                    respond(1, readable[register.name])
                        with m.Case(
                            register_by_name("clear").address,
                            register_by_name("dma_abort").address,
                        ):
                            respond(1)
                        with m.Case(
                            *(register_by_name(f"channel_{c}").address for c in CHANNEL_COUNTERS)
                        ):
                            m.next = "CHANNEL"
                        with m.Case(register_by_name("table_data").address):
                            m.next = "TABLE"
                        with m.Default():
                            respond(0)

            with m.State("CHANNEL"):
                respond(1, self.channel_value)

            with m.State("PROFILE"):
                m.d.comb += profiles.requests.valid.eq(1)
                with m.If(profiles.requests.ready):
                    with m.If(of_control & access.write):
                        m.d.sync += control.eq(access.value[first : last + 1])
                    m.next = "PROFILE_VALUE"

            with m.State("PROFILE_VALUE"):
                m.d.comb += profiles.values.ready.eq(1)
                with m.If(profiles.values.valid):
                    respond(1, profile_value)

            with m.State("CLEAR"):
                with m.If(wait != _CLEAR_CYCLES):
                    m.d.sync += wait.eq(wait + 1)
                with m.Elif(self.engine_idle):
                    respond(1)

            with m.State("TABLE"):
                m.d.sync += [
                    self.table_requests.valid.eq(1),
                    self.table_requests.p.write.eq(access.write),
                    self.table_requests.p.table.eq(table_address[24:]),
                    self.table_requests.p.word.eq(table_address[:24]),
                    self.table_requests.p.value.eq(access.value),
                ]
                m.next = "TABLE_VALUE"

            with m.State("TABLE_VALUE"):
                m.d.comb += self.table_values.ready.eq(~access.write)
                with m.If(
                    Mux(
                        access.write,
                        self.table_requests.valid & self.table_requests.ready,
                        self.table_values.valid,
                    )
                ):
                    m.d.sync += table_address[:24].eq(table_address[:24] + 1)
                    respond(1, self.table_values.p)
        return m
