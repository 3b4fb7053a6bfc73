"""The engine of the device: scheduler, DMA engine and expert buffer, without what tells them what
to do.

::

    commands, candidates ─▶ 3 scheduler ─▶ 4 dma ─▶ 5 buffer ─▶ beats
    ready, events        ◀─────┘   ▲        │ bus      │  ▲
                                   └────────┴──────────┘  └─ values, policy
"""

from amaranth import Module
from amaranth.lib import stream, wiring
from amaranth.lib.wiring import In, Out

from prestage_hw.buffer import ExpertBuffer
from prestage_hw.contract.params import require_config
from prestage_hw.dma import DMA
from prestage_hw.dma.checksum import Checksums
from prestage_hw.layouts import RecordLayout
from prestage_hw.scheduler import Scheduler

__all__ = ["Engine", "connect_engine"]

# Ports by block that lead out of the engine under their own names.
_SCHEDULER_PORTS = (
    *("commands", "candidates", "ready", "events", "expert_base", "prefetch_tiles", "enable"),
    *(
        "cutoff_layer",
        "hold",
        "wanted",
        "alone",
        "cancel_enable",
        "throttle_enable",
        "throttle_weights",
        "throttle_state",
        *("budget", "layer_time", "tile_time", "streaming", "gathering"),
        *("statistics_requests", "statistics_values", "clear_statistics"),
    ),
    *("demanding", "strobes"),
)
_PARTS_PORTS = ("part_bases",)
_SLOT_PORTS = ("slot_bus", "slot_base")
_DMA_PORTS = (
    *("bus", "settings", "commit", "lower_credits", "refused", "refusal", "abort", "abort_tag"),
    *("abort_all", "timeout", "stray", "expired"),
)
_BUFFER_PORTS = ("reads", "beats")
_COPY_PORTS = ("copies", "copied")
_RESCAN_PORTS = ("rescan_ahead", "rescan_least")


def connect_engine(m, *, scheduler, dma, buffer, values, policy):
    """Connect the blocks of an engine with each other.

    Parameters
    ----------
    m : :class:`Module`
        Module that the blocks are part of.
    scheduler, dma, buffer : :class:`Scheduler`, :class:`DMA`, :class:`ExpertBuffer`
        The blocks; with a host mover a :class:`HostMover` in place of the DMA engine.
    values : ``Out(stream.Signature(RecordLayout("ValueBeat", config=config)))``
        What the predictor says of experts.
    policy : value of 2 bits
        Policy that the buffer is to follow.

    Returns
    -------
    :class:`Checksums` or None
        What compares experts with their checksums, with ``config.checksums``. Its table is not
        connected.
    """
    wiring.connect(m, scheduler.fetches, dma.fetches)
    config = dma.config
    checksums = None
    if config.checksums:
        m.submodules.checksums = checksums = Checksums(config=config)
        wiring.connect(m, dma.completions, checksums.ended)
        wiring.connect(m, checksums.completions, scheduler.completions)
        m.d.comb += checksums.tap.eq(dma.tap)
        last = ("start_last_tile",) if scheduler.config.layer_bytes else ()
        for name in ("start", "start_tag", "start_number", "start_address", *last):
            m.d.comb += getattr(checksums, name).eq(getattr(scheduler, name))
    else:
        wiring.connect(m, dma.completions, scheduler.completions)
    if config.mover == "dma":
        m.d.comb += dma.urgent.eq(scheduler.urgent)
    if config.host_writes:
        wiring.connect(m, dma.writes, buffer.host_writes)
    elif config.stores_slots:
        wiring.connect(m, dma.writes, buffer.writes)
    wiring.connect(m, scheduler.buffer_requests, buffer.requests)
    wiring.connect(m, buffer.results, scheduler.buffer_results)
    # Demands are looked up by what was known before them; policies change between operations.
    m.d.comb += [
        buffer.values.payload.eq(values.payload),
        buffer.values.valid.eq(values.valid & ~scheduler.demanding),
        values.ready.eq(buffer.values.ready & ~scheduler.demanding),
    ]
    if config.gives_values:
        wiring.connect(m, scheduler.rescans, buffer.rescans)
        wiring.connect(m, buffer.rescanned, scheduler.rescanned)
        come = buffer.values.valid & buffer.values.ready
        m.d.comb += scheduler.valued.eq(come << values.payload.ctx)
    with m.If(buffer.idle):
        m.d.sync += buffer.policy.eq(policy)
    return checksums


class Engine(wiring.Component):
    """Scheduler, DMA engine and expert buffer as the device has them, to be measured together.

    The device has the three blocks side by side, each under its own name; they are connected by
    the same :func:`connect_engine`.

    Parameters
    ----------
    config : :class:`DeviceConfig`
        Device.

    Members
    -------
    commands, candidates, ready, events, expert_base, part_bases, prefetch_tiles, enable, \
    cutoff_layer, hold, wanted, alone, cancel_enable, throttle_enable, throttle_weights, \
    throttle_state, budget, layer_time, tile_time, streaming, gathering, \
    statistics_requests, statistics_values, clear_statistics, demanding, strobes
        As of :class:`Scheduler`.
    copies, copied
        As of :class:`Scheduler`; only where experts may have copies.
    rescan_ahead, rescan_least
        As of :class:`Scheduler`; only where the predictor gives values.
    bus, settings, commit, lower_credits, refused, refusal, abort, abort_tag, abort_all, timeout, \
    stray, expired
        As of :class:`DMA`.
    reads, beats
        As of :class:`ExpertBuffer`; not with ``config.slot_store`` "axi".
    slot_bus, slot_base
        As of :class:`DMA`; only with "axi".
    checksum_requests, checksum_values
        As ``requests`` and ``values`` of :class:`Checksums`; only with ``config.checksums``.
    channel_strobes, buffer_strobes
        ``strobes`` of :class:`DMA` and :class:`ExpertBuffer`.
    values : ``In(stream.Signature(RecordLayout("ValueBeat", config=config)))``
        What the predictor says of experts; waits while a demand does.
    policy : ``In(2)``
        As of :class:`ExpertBuffer`; may change at any time, and counts from the next request on.
    clear : ``In(1)``
        As of :class:`Scheduler` and :class:`ExpertBuffer`.
    idle : ``Out(1)``
        All blocks are.

    Raises
    ------
    ValueError
        If the host moves experts.
    """

    def __init__(self, *, config):
        require_config(config)
        if config.mover != "dma":
            raise ValueError(f"Engine must have a DMA engine, not the mover {config.mover!r}")
        self.config = config
        checksums = {
            "checksum_requests": In(stream.Signature(RecordLayout("TableRequest", config=config))),
            "checksum_values": Out(stream.Signature(32)),
        }
        self._scheduler = Scheduler(config=config)
        self._dma = DMA(config=config)
        self._buffer = ExpertBuffer(config=config)
        super().__init__(
            {
                **{
                    name: block.signature.members[name]
                    for block, names in self._own_ports()
                    for name in names
                },
                "channel_strobes": self._dma.signature.members["strobes"],
                "buffer_strobes": self._buffer.signature.members["strobes"],
                **(checksums if config.checksums else {}),
                "values": In(stream.Signature(RecordLayout("ValueBeat", config=config))),
                "policy": In(2),
                "clear": In(1),
                "idle": Out(1),
            }
        )

    def _own_ports(self):
        return (
            (self._scheduler, _SCHEDULER_PORTS),
            (self._scheduler, _PARTS_PORTS if len(self.config.part_bytes) > 1 else ()),
            (self._scheduler, _COPY_PORTS if self.config.replicas > 1 else ()),
            (self._scheduler, _RESCAN_PORTS if self.config.gives_values else ()),
            (self._dma, _DMA_PORTS),
            (self._buffer, _BUFFER_PORTS)
            if self.config.slot_store == "internal"
            else (self._dma, _SLOT_PORTS),
        )

    def elaborate(self, platform):
        m = Module()
        m.submodules.scheduler = scheduler = self._scheduler
        m.submodules.dma = dma = self._dma
        m.submodules.buffer = buffer = self._buffer
        checksums = connect_engine(
            m,
            scheduler=scheduler,
            dma=dma,
            buffer=buffer,
            values=wiring.flipped(self.values),
            policy=self.policy,
        )
        idle = scheduler.idle & dma.idle & buffer.idle
        if checksums is not None:
            wiring.connect(m, wiring.flipped(self.checksum_requests), checksums.requests)
            wiring.connect(m, checksums.values, wiring.flipped(self.checksum_values))
            idle &= checksums.idle
        for block, names in self._own_ports():
            for name in names:
                member = block.signature.members[name]
                outside, inside = getattr(self, name), getattr(block, name)
                if member.is_signature and member.dimensions:
                    for outer, inner in zip(outside, inside, strict=True):
                        wiring.connect(m, wiring.flipped(outer), inner)
                elif member.is_signature:
                    wiring.connect(m, wiring.flipped(outside), inside)
                elif member.flow == In:
                    m.d.comb += inside.eq(outside)
                else:
                    m.d.comb += outside.eq(inside)
        m.d.comb += [
            self.channel_strobes.eq(dma.strobes),
            self.buffer_strobes.eq(buffer.strobes),
            scheduler.clear.eq(self.clear),
            buffer.clear.eq(self.clear),
            self.idle.eq(idle),
        ]
        return m
