"""The register bank."""

from amaranth import Cat, Const, Module, Mux, Signal
from amaranth.lib import data, stream, wiring
from amaranth.lib.wiring import In, Out

from prestage_hw.contract import REGISTERS
from prestage_hw.contract.params import require_config
from prestage_hw.contract.records import Policy, Refusal
from prestage_hw.contract.registers import (
    BASES,
    CHANNEL_COUNTERS,
    COUNTERS,
    TIME_BITS,
    TIMEOUT_BITS,
    base_limits,
    refused_bits,
    register_by_name,
    shape_registers,
)
from prestage_hw.layouts import RecordLayout
from prestage_hw.link.dispatcher import RegisterRequestLayout, RegisterResponseLayout
from prestage_hw.scheduler import ThrottleStateLayout, WeightsLayout

from .channels import CounterAddressLayout
from .profiles import ACCESSED, ActiveProfileLayout, Profiles, RefusedLayout

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

    A write of what a register can't hold changes nothing but ``refusal``. Where addresses have more
    than 32 bits, the low half of a base waits for the high half, and both hold at once.

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
    layer_time, tile_time : ``In(24)``
        The registers of these names.
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
                "layer_time": In(TIME_BITS),
                "tile_time": In(TIME_BITS),
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

    def _refusal(self, m, *, low_half, low_of):
        """Whether the write that is asked for makes no sense, and why: but for what the profiles
        look at themselves.
        """
        config = self.config
        wanted = self.requests.p
        bits, odd, reason = Signal(32), Signal(), Signal(Refusal)
        timeout = wanted.value[:TIMEOUT_BITS]
        ranges = {
            "policy": wanted.value[:2] > max(Policy),
            # The watchdog counts quarters of it.
            "dma_timeout": (timeout != 0) & (timeout[2:] == 0),
        }
        two_halves = config.address_bits > 32
        whole = Cat(low_half, wanted.value) if two_halves else wanted.value
        for number, name in enumerate(BASES):
            if name in (limits := base_limits(config)):
                beyond = whole[: config.address_bits] > limits[name][1]
                if two_halves:
                    ranges[f"{name}_high"] = beyond | (low_of != number)
                else:
                    ranges[f"{name}_low"] = beyond
        with m.Switch(wanted.register):
            for name, (zeros, why) in refused_bits(config).items():
                with m.Case(register_by_name(name).address):
                    m.d.comb += [bits.eq(zeros), reason.eq(why), odd.eq(ranges.get(name, 0))]
        return (wanted.value & bits).any() | odd, reason

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
        timeout = Signal(TIMEOUT_BITS)
        limits = base_limits(config)
        # Of a base only the bits above its step.
        resets = dict(zip(BASES, config.part_bases(), strict=False))
        low_bits = {name: step.bit_length() - 1 for name, (step, _) in limits.items()}
        held = {
            name: Signal(config.address_bits - low, name=name, init=resets.get(name, 0) >> low)
            for name, low in low_bits.items()
        }
        bases = {name: Cat(Const(0, low), held[name]) for name, low in low_bits.items()}
        # The low half that was written last, and of which base, if addresses have two. None is
        # left once half of one was refused, so that its high half does not come to another.
        two_halves = config.address_bits > 32
        low_half = Signal(32)
        low_of = Signal(range(len(BASES) + 1))
        table_address = Signal(32)
        cycles = Signal(64)
        high = Signal(32)

        m.d.sync += cycles.eq(cycles + 1)
        m.d.comb += [
            self.control.settle.eq(settle),
            self.control.throttle_enable.eq(throttle_enable),
            self.control.cancel_enable.eq(cancel_enable),
            self.control.throttle.eq(throttle),
            self.control.policy.eq(policy),
            self.control.hint_threshold.eq(hint_threshold),
            self.control.expert_base.eq(bases["expert_base"]),
            self.control.token_base.eq(bases.get("token_base", 0)),
            self.control.slot_base.eq(bases.get("slot_base", 0)),
            self.control.dma_timeout.eq(timeout),
            *(
                self.control.part_bases[part].eq(bases[BASES[part + 1]])
                for part in range(len(config.part_bytes) - 1)
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
            "layer_time": self.layer_time,
            "tile_time": self.tile_time,
            "hint_threshold": hint_threshold,
            "dma_timeout": timeout,
            "profile_active": profiles.active_phase,
            "table_address": table_address,
            "table_words": self.table_words,
            "cycles_low": cycles[:32],
            "cycles_high": high,
        }
        for name in BASES:
            base = bases.get(name, Const(0, 64))
            readable[f"{name}_low"] = base[:32]
            readable[f"{name}_high"] = base[32:] if len(base) > 32 else Const(0, 32)
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
        bad, reason = self._refusal(m, low_half=low_half, low_of=low_of)
        refused = Signal(RefusedLayout())
        m.d.comb += [profiles.refused.eq(refused), profiles.refused.register.eq(access.register)]

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
                    m.d.sync += [
                        access.eq(self.requests.p),
                        refused.reason.eq(reason),
                        refused.valid.eq(self.requests.p.write & bad),
                    ]
                    m.next = "ACCESS"

            with m.State("ACCESS"):
                m.d.sync += wait.eq(0)
                with m.If(refused.valid):
                    m.d.sync += refused.valid.eq(0)
                    with m.If(refused.reason == Refusal.BASE):
                        m.d.sync += low_of.eq(len(BASES))
                    respond(1)
                with m.Elif(of_profiles):
                    m.next = "PROFILE"
                with m.Elif(access.write):
                    with m.Switch(access.register):
                        for name, target in (
                            ("policy", policy),
                            ("throttle", throttle),
                            ("hint_threshold", hint_threshold),
                            ("dma_timeout", timeout),
                            ("table_address", table_address),
                        ):
                            with m.Case(register_by_name(name).address):
                                m.d.sync += target.eq(access.value)
                                respond(1)
                        for number, name in enumerate(BASES):
                            with m.Case(register_by_name(f"{name}_low").address):
                                if name in held and two_halves:
                                    m.d.sync += [low_half.eq(access.value), low_of.eq(number)]
                                elif name in held:
                                    m.d.sync += held[name].eq(access.value[low_bits[name] :])
                                respond(1)
                            with m.Case(register_by_name(f"{name}_high").address):
                                if name in held and two_halves:
                                    whole = Cat(low_half, access.value)
                                    m.d.sync += held[name].eq(whole[low_bits[name] :])
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
