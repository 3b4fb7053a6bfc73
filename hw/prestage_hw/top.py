"""The whole device.

::

    rx ─▶ 1 link ─▶ dispatcher ─▶ 2 predictor ─▶ 3 scheduler ─▶ 4 dma ─▶ 5 buffer ─▶ beats
    tx ◀─────┘         └─ 6 register bank, counters    bus ◀─────┘

With a host mover fetches leave over the link, and the slots are the host's, or it writes them::

    rx ─▶ 1 link ─▶ mover ─▶ dispatcher ─▶ 2 predictor ─▶ 3 scheduler ─▶ 5 buffer ─▶ beats
    tx ◀─────┘      ▲ ▲ └────────────────── completions ──────▲ │           ▲
       host_writes ─┘ └──────────────────── fetches ────────────┘           │
                       └─────────────────── writes ─────────────────────────┘
"""

from amaranth import Cat, Module
from amaranth.lib import stream, wiring
from amaranth.lib.wiring import In, Out

from prestage_hw.buffer import ExpertBuffer
from prestage_hw.buffer.arbiter import ReadArbiter
from prestage_hw.contract.crc import CHECKSUM_TABLE
from prestage_hw.contract.params import require_config
from prestage_hw.contract.registers import COUNTERS
from prestage_hw.contract.statistics import STATISTICS_TABLE, statistics_words
from prestage_hw.dma import DMA
from prestage_hw.dma.axi import AXI4ReadSignature, AXI4Signature, AXI4WriteSignature
from prestage_hw.engine import connect_engine
from prestage_hw.layouts import RecordLayout
from prestage_hw.link.dispatcher import Dispatcher
from prestage_hw.link.link import Link
from prestage_hw.link.mover import HostMover
from prestage_hw.predictor import create_predictor
from prestage_hw.scheduler import ChunkUnion, Scheduler
from prestage_hw.stats import Accuracy, ChannelCounters, Counters, RegisterBank

__all__ = ["Top"]


class Top(wiring.Component):
    """Expert predictor and prefetch engine behind a byte stream.

    Parameters
    ----------
    config : :class:`DeviceConfig`
        Device.
    link_options : :class:`dict`
        Keyword arguments for :class:`prestage_hw.link.link.Link`, for example a shorter
        ``replay_cycles``.

    Members
    -------
    rx, tx : ``In(stream.Signature(8))``, ``Out(stream.Signature(8))``
        Bytes from and to the host.
    bus : ``Out(AXI4ReadSignature(...))``
        Memory that holds the experts; not with a host mover.
    reads, beats : ``In(stream of ReadRequest)``, ``Out(stream of Beat)``
        Consumer port of the expert buffer; only with ``config.stores_slots``. Arrays with a port a
        bank where experts may have copies.
    host_writes : ``In(stream of BufferWrite)``
        Beats that the host writes into slots; only with ``config.host_writes``.
    slot_bus : ``Out(AXI4WriteSignature(...))``
        Memory that holds the slots; only with ``config.slot_store`` "axi".
    tokens : ``Out(AXI4Signature(...))``
        Memory that holds the predictor's token tables; only with ``config.token_memory``.
    idle : ``Out(1)``
        Nothing is under way behind the link.
    """

    def __init__(self, *, config, link_options=None):
        require_config(config)
        self.config = config
        self.link_options = dict(link_options or {})
        memory = {
            "tokens": Out(
                AXI4Signature(address_bits=config.address_bits, data_bits=config.bits("data"))
            )
        }
        bus = {
            "bus": Out(
                AXI4ReadSignature(
                    address_bits=config.address_bits,
                    data_bits=config.bits("data"),
                    id_bits=config.bits("axi_id"),
                )
            )
        }
        reads = In(stream.Signature(RecordLayout("ReadRequest", config=config)))
        beats = Out(stream.Signature(RecordLayout("Beat", config=config)))
        if config.replicas > 1:
            reads, beats = reads.array(config.replicas), beats.array(config.replicas)
        consumer = {"reads": reads, "beats": beats}
        writes = {"host_writes": In(stream.Signature(RecordLayout("BufferWrite", config=config)))}
        slots = {
            "slot_bus": Out(
                AXI4WriteSignature(address_bits=config.address_bits, data_bits=config.bits("data"))
            )
        }
        super().__init__(
            {
                **(memory if config.token_memory else {}),
                "rx": In(stream.Signature(8)),
                "tx": Out(stream.Signature(8)),
                **(bus if config.mover == "dma" else {}),
                **(consumer if config.stores_slots else {}),
                **(writes if config.host_writes else {}),
                **(slots if config.slot_store == "axi" else {}),
                "idle": Out(1),
            }
        )

    def elaborate(self, platform):
        m = Module()
        config = self.config
        m.submodules.link = link = Link(config=config, **self.link_options)
        m.submodules.dispatcher = dispatcher = Dispatcher(config=config)
        m.submodules.predictor = predictor = create_predictor(config)
        m.submodules.chunks = chunks = ChunkUnion(config=config)
        m.submodules.scheduler = scheduler = Scheduler(config=config)
        if config.mover == "host":
            m.submodules.mover = dma = HostMover(config=config)
        else:
            m.submodules.dma = dma = DMA(config=config)
        m.submodules.buffer = buffer = ExpertBuffer(config=config, host_writes=config.host_writes)
        m.submodules.counters = counters = Counters(config=config)
        m.submodules.accuracy = accuracy = Accuracy(config=config)
        m.submodules.registers = registers = RegisterBank(config=config)

        # 1 link
        wiring.connect(m, wiring.flipped(self.rx), link.rx)
        wiring.connect(m, link.tx, wiring.flipped(self.tx))
        if config.mover == "host":
            self._connect_mover(m, mover=dma, link=link, dispatcher=dispatcher, scheduler=scheduler)
            m.d.comb += dma.timeout.eq(registers.control.dma_timeout)
        else:
            wiring.connect(m, link.messages, dispatcher.messages)
            wiring.connect(m, dispatcher.replies, link.replies)
        wiring.connect(m, dispatcher.registers, registers.requests)
        wiring.connect(m, registers.values, dispatcher.values)
        wiring.connect(m, dispatcher.phases, registers.phases)
        profile = registers.control.profile
        m.d.comb += [
            dispatcher.hint_enable.eq(profile.hint_enable),
            dispatcher.hint_threshold.eq(registers.control.hint_threshold),
            registers.boundary.eq(dispatcher.boundary),
        ]

        # 2 predictor
        wiring.connect(m, dispatcher.begin, predictor.begin)
        wiring.connect(m, dispatcher.decisions, predictor.decisions)
        wiring.connect(m, dispatcher.hints, predictor.hints)
        m.d.comb += [
            predictor.table_select.eq(registers.table_select),
            predictor.clear.eq(registers.clear.tables),
            predictor.threshold.eq(profile.predict_threshold),
            predictor.far_threshold.eq(profile.predict_far_threshold),
            predictor.ahead.eq(profile.predict_ahead),
        ]

        if config.token_memory:
            wiring.connect(m, predictor.bus, wiring.flipped(self.tokens))
            m.d.comb += predictor.base.eq(registers.control.token_base)

        # 3 scheduler: candidates are the predictor's and those of hints, which the predictor hands
        # on in its own order; those of a chunk are gathered; the scheduler says which it drops.
        wiring.connect(m, predictor.candidates, chunks.i)
        wiring.connect(m, chunks.o, scheduler.candidates)
        m.d.comb += [
            chunks.token_valid.eq(dispatcher.begin.valid & dispatcher.begin.ready),
            chunks.token.eq(dispatcher.begin.p),
            chunks.decision_valid.eq(dispatcher.decisions.valid & dispatcher.decisions.ready),
            chunks.decision.eq(dispatcher.decisions.p),
            chunks.wanted.eq(scheduler.wanted),
            chunks.hold.eq(scheduler.hold),
        ]
        wiring.connect(m, dispatcher.commands, scheduler.commands)
        wiring.connect(m, scheduler.ready, dispatcher.ready)
        wiring.connect(m, scheduler.events, dispatcher.events)
        if config.replicas > 1:
            wiring.connect(m, dispatcher.copies, scheduler.copies)
            wiring.connect(m, scheduler.copied, dispatcher.copied)
        m.d.comb += [
            scheduler.expert_base.eq(registers.control.expert_base),
            *(
                scheduler.part_bases[at].eq(registers.control.part_bases[at])
                for at in range(len(config.part_bytes) - 1)
            ),
            scheduler.prefetch_tiles.eq(profile.prefetch_tiles),
            scheduler.enable.eq(profile.prefetch_enable),
            scheduler.cutoff_layer.eq(profile.cutoff_layer),
            scheduler.alone.eq(registers.control.settle),
            scheduler.cancel_enable.eq(registers.control.cancel_enable),
            scheduler.throttle_enable.eq(registers.control.throttle_enable),
            scheduler.throttle_weights.eq(registers.control.throttle),
            registers.throttle_state.eq(scheduler.throttle_state),
            registers.layer_time.eq(scheduler.layer_time),
            registers.tile_time.eq(scheduler.tile_time),
            scheduler.budget.eq(profile.budget),
            *(
                getattr(scheduler, name).eq(profile[name])
                for name in ("rescan_ahead", "rescan_least")
                if config.gives_values
            ),
            scheduler.streaming.eq(chunks.streaming),
            scheduler.gathering.eq(chunks.gathering),
            scheduler.clear.eq(registers.clear.buffer),
            scheduler.clear_statistics.eq(registers.clear.counters),
        ]
        m.d.sync += scheduler.hold.eq(registers.control.settle & ~predictor.idle)

        # 4 dma
        if config.mover == "host":
            m.d.comb += registers.settings.ready.eq(1)  # Its registers can be written in vain.
            if config.host_writes:
                wiring.connect(m, wiring.flipped(self.host_writes), dma.host_writes)
                m.d.comb += counters.strobes.writes_refused.eq(dma.refused)
        else:
            wiring.connect(m, dma.bus, wiring.flipped(self.bus))
            wiring.connect(m, registers.settings, dma.settings)
            m.d.comb += [
                dma.commit.eq(registers.commit),
                dma.lower_credits.eq(profile.dma_lower_credits),
                dma.timeout.eq(registers.control.dma_timeout),
                dma.abort_all.eq(registers.abort),
            ]
            m.submodules.channels = channels = ChannelCounters(config=config)
            m.d.comb += [
                channels.strobes.eq(dma.strobes),
                channels.clear.eq(registers.clear.counters),
                channels.address.eq(registers.channel_counter),
                registers.channel_value.eq(channels.value),
            ]

        # 5 buffer
        if config.stores_slots and config.replicas > 1:
            self._connect_banks(m, dispatcher=dispatcher, buffer=buffer)
        elif config.stores_slots:
            m.submodules.arbiter = arbiter = ReadArbiter(config=config)
            wiring.connect(m, wiring.flipped(self.reads), arbiter.reads)
            wiring.connect(m, arbiter.beats, wiring.flipped(self.beats))
            wiring.connect(m, dispatcher.reads, arbiter.link_reads)
            wiring.connect(m, arbiter.link_beats, dispatcher.beats)
            wiring.connect(m, arbiter.port_reads, buffer.reads)
            wiring.connect(m, buffer.beats, arbiter.port_beats)
        elif config.slot_store == "axi":
            wiring.connect(m, dma.slot_bus, wiring.flipped(self.slot_bus))
            m.d.comb += dma.slot_base.eq(registers.control.slot_base)
        m.d.comb += [
            buffer.clear.eq(registers.clear.buffer),
            dispatcher.clear.eq(registers.clear.buffer),
        ]

        # 3, 4 and 5 with each other
        checksums = connect_engine(
            m,
            scheduler=scheduler,
            dma=dma,
            buffer=buffer,
            values=predictor.values,
            policy=registers.control.policy,
        )

        # Tables of the predictor, that of statistics, and that of checksums. One access at a time:
        # only one of them has a value.
        experts = config.model.layers * config.model.experts
        tables = {
            STATISTICS_TABLE: (
                scheduler.statistics_requests,
                scheduler.statistics_values,
                statistics_words(config),
            )
        }
        if checksums is not None:
            tables[CHECKSUM_TABLE] = (checksums.requests, checksums.values, experts)
            m.d.comb += checksums.clear.eq(registers.clear.checksums)
        requests, table_values = registers.table_requests, registers.table_values
        m.d.comb += [
            predictor.table_requests.payload.eq(requests.payload),
            table_values.payload.eq(predictor.table_values.payload),
            table_values.valid.eq(
                predictor.table_values.valid
                | Cat(told.valid for _, told, _ in tables.values()).any()
            ),
            predictor.table_values.ready.eq(table_values.ready),
            registers.table_words.eq(predictor.table_words),
        ]
        with m.Switch(requests.payload.table):
            for number, (asked, _, _) in tables.items():
                with m.Case(number):
                    m.d.comb += [
                        asked.valid.eq(requests.valid),
                        requests.ready.eq(asked.ready),
                    ]
            with m.Default():
                m.d.comb += [
                    predictor.table_requests.valid.eq(requests.valid),
                    requests.ready.eq(predictor.table_requests.ready),
                ]
        for number, (asked, told, words) in tables.items():
            m.d.comb += [
                asked.payload.eq(requests.payload),
                told.ready.eq(table_values.ready),
            ]
            with m.If(told.valid):
                m.d.comb += table_values.payload.eq(told.payload)
            with m.If(registers.table_select == number):
                m.d.comb += registers.table_words.eq(words)

        # 6 stats
        m.d.comb += [
            accuracy.begin.eq(dispatcher.begin.valid & dispatcher.begin.ready),
            accuracy.begin_ctx.eq(dispatcher.begin.p.ctx),
            accuracy.candidate_valid.eq(predictor.candidates.valid & predictor.candidates.ready),
            accuracy.candidate.eq(predictor.candidates.p),
            accuracy.command_valid.eq(dispatcher.commands.valid & dispatcher.commands.ready),
            accuracy.command.eq(dispatcher.commands.p),
            accuracy.decision_valid.eq(dispatcher.decisions.valid & dispatcher.decisions.ready),
            accuracy.decision.eq(dispatcher.decisions.p),
            counters.clear.eq(registers.clear.counters),
            registers.counters.eq(counters.values),
            counters.strobes.link_errors.eq(link.errors),
            counters.strobes.link_replays.eq(link.replays),
            counters.strobes.parity_errors.eq(predictor.parity_errors),
        ]
        sources = (dispatcher.strobes, accuracy.strobes, scheduler.strobes)
        for counter in COUNTERS:
            for strobes in sources:
                if counter.name in dict(strobes.shape()):
                    m.d.comb += counters.strobes[counter.name].eq(strobes[counter.name])

        # Messages that wait in the mover are none of the engine's business: one of them may ask
        # whether it is idle. Tiles that the host was asked for keep the scheduler busy.
        engine_idle = predictor.idle & chunks.idle & scheduler.idle & buffer.idle
        if checksums is not None:
            engine_idle &= checksums.idle
        idle = ~dispatcher.busy & ~dispatcher.messages.valid
        if config.mover == "host":
            idle &= dma.idle
            m.d.comb += counters.strobes.rejected.eq(dispatcher.strobes.rejected | dma.rejected)
        else:
            engine_idle &= dma.idle
        m.d.comb += [
            dispatcher.engine_idle.eq(engine_idle),
            registers.engine_idle.eq(engine_idle),
            self.idle.eq(engine_idle & idle),
        ]
        return m

    def _connect_banks(self, m, *, dispatcher, buffer):
        """A consumer port a bank; the link reads the bank that its slot is in."""
        config = self.config
        asked, told = dispatcher.reads, dispatcher.beats
        bank = asked.payload.slot[: config.bank_bits]
        for at in range(config.replicas):
            m.submodules[f"arbiter_{at}"] = arbiter = ReadArbiter(config=config)
            wiring.connect(m, wiring.flipped(self.reads[at]), arbiter.reads)
            wiring.connect(m, arbiter.beats, wiring.flipped(self.beats[at]))
            wiring.connect(m, arbiter.port_reads, buffer.reads[at])
            wiring.connect(m, buffer.beats[at], arbiter.port_beats)
            m.d.comb += [
                arbiter.link_reads.payload.eq(asked.payload),
                arbiter.link_reads.valid.eq(asked.valid & (bank == at)),
                arbiter.link_beats.ready.eq(told.ready),
            ]
            with m.If(bank == at):
                m.d.comb += asked.ready.eq(arbiter.link_reads.ready)
            # The link asks for one beat at a time.
            with m.If(arbiter.link_beats.valid):
                m.d.comb += [told.valid.eq(1), told.payload.eq(arbiter.link_beats.payload)]

    def _connect_mover(self, m, *, mover, link, dispatcher, scheduler):
        """Put the host mover between link and dispatcher."""
        wiring.connect(m, link.messages, mover.messages)
        wiring.connect(m, mover.commands, dispatcher.messages)
        wiring.connect(m, dispatcher.replies, mover.answers)
        wiring.connect(m, mover.replies, link.replies)
        m.d.comb += [
            mover.resets.eq(link.resets),
            mover.others_rejected.eq(dispatcher.strobes.rejected),
            mover.fetch_layer.eq(scheduler.fetch_layer),
            mover.fetch_expert.eq(scheduler.fetch_expert),
        ]
