"""An engine at rest, from a plan and a machine."""

from __future__ import annotations

import numpy as np

from prestage_hw.contract import DeviceConfig, ModelConfig
from prestage_hw.contract.records import Policy as BufferPolicy
from prestage_hw.contract.registers import register_by_name

from ...model.buffer.recency import touch
from ...model.buffer.state import OWNER, POLICY, READY, SLOT, STATE, create_state
from ...model.scheduler.queue import create_queue
from ...model.scheduler.rescan import create_rescans
from ...model.scheduler.throttle import ENABLE, create_throttle, set_weights
from ..machine import Machine
from ..plan import Evict, Plan
from .state import COUNTED, RECORDED, Engine

__all__ = ["create_engine"]


def create_engine(
    plan: Plan, machine: Machine, *, layers: int, experts: int, width: int, slots: int
) -> Engine:
    """An engine at rest; it knows nothing of the trace yet.

    Parameters
    ----------
    plan : :class:`Plan`
        What it does.
    machine : :class:`Machine`
        Where.
    layers, experts, width : :class:`int`
        Shape of the model, and experts that a layer wants at most.
    slots : :class:`int`
        Slots.
    """
    config = DeviceConfig(
        model=ModelConfig(name="trace", layers=layers, experts=experts, top_k=1),
        slots=slots,
        expert_bytes=512 * machine.tiles,
        tile_bytes=512,
        victim_samples=min(slots, plan.samples),
    )
    # A layer may want more than any model's k: only the pins hang on it.
    buffer = create_state(config)._replace(pins=np.full((1, layers, width), -1))
    buffer.registers[POLICY] = (
        int(plan.evict) if plan.evict <= Evict.NEXT_USE else int(BufferPolicy.LRU)
    )
    throttle = create_throttle(config)
    set_weights(throttle, register_by_name("throttle").reset or 0)
    throttle.registers[ENABLE] = plan.throttle
    bounded = [tier.experts for tier in machine.tiers if tier.experts is not None]
    tiers = len(bounded) + 1
    predicts = plan.predictor is not None and plan.proposes
    most = 0
    if predicts or plan.candidates is not None or plan.foresees or plan.rescan:
        # Those on their way always leave slots for a layer's demands.
        most = min(plan.prefetch_inflight * tiers, slots - width)
    fetches = min(slots, 2 * width + most) + 1
    settings = np.array(
        [
            int(plan.evict),
            machine.tiles,
            most,
            plan.cancel,
            plan.preempt,
            plan.foresees,
            *(0, 0),
            min(plan.rescan, layers - 1),
            plan.rescan_least,
            machine.ready_first,
            plan.prefetch_tiles,
            plan.eager,
        ],
        np.int64,
    )
    lists = np.zeros((4, fetches), np.int64)
    lists[3] = np.arange(fetches)
    ways = machine.ways
    tile = machine.expert_bytes / machine.tiles
    engine = Engine(
        buffer=buffer,
        queue=create_queue(config),
        throttle=throttle,
        rescans=create_rescans(1),
        settings=settings,
        registers=np.zeros(7, np.int64),
        clock=np.array([0.0, 0.0, machine.predict_seconds]),
        counts=np.zeros(len(COUNTED), np.int64),
        links=np.array([(0.0, tile / way.bandwidth, way.latency) for _, way in ways]),
        stages=np.array([tier for tier, _ in ways], np.int64),
        carried=np.full(len(ways), -1, np.int64),
        fetches=np.zeros((fetches, 7), np.int64),
        left=np.zeros((fetches, tiers), np.int64),
        ends=np.zeros((fetches, tiers)),
        come=np.zeros((fetches, tiers, machine.tiles)),
        lists=lists,
        lengths=np.array([0, 0, 0, fetches], np.int64),
        spent=np.zeros(slots, np.int64),
        fetch_of=np.full(slots, -1, np.int64),
        arrived=np.zeros(slots),
        rooms=np.array(bounded, np.int64),
        filled=np.zeros(len(bounded), np.int64),
        stamps=np.full((len(bounded), layers * experts), -1, np.int64),
        tier_tiles=np.zeros(tiers, np.int64),
        proposed=np.zeros((layers, experts), np.bool_),
        use_first=np.zeros(1, np.int64),
        use_at=np.zeros(0, np.int64),
        use_next=np.zeros(0, np.int64),
        held=np.zeros(layers, np.int64),
        events=np.zeros((0, RECORDED)),
    )
    if plan.preload:
        _preload(engine)
    return engine


def _preload(engine: Engine) -> None:
    """Put experts into all slots, as if they had been there for ever."""
    experts = engine.proposed.shape[1]
    for slot in range(min(len(engine.buffer.slots), len(engine.buffer.experts))):
        engine.buffer.slots[slot, OWNER] = slot
        engine.buffer.experts[slot, STATE] = READY
        engine.buffer.experts[slot, SLOT] = slot
        engine.held[slot // experts] += 1
        touch(engine.buffer, slot)
