"""The small devices that proofs are made for."""

from prestage_hw.contract import DeviceConfig, ModelConfig

__all__ = ["buffer_device", "dma_device", "queue_device", "scheduler_device", "writer_device"]


def dma_device(**changes):
    """Two channels, tiles of two bursts of four beats, two bursts outstanding."""
    values = {
        "model": ModelConfig(name="proof", layers=1, experts=2, top_k=1),
        "slots": 2,
        "expert_bytes": 512,
        "tile_bytes": 512,
        "predictor": "none",
        "data_bytes": 64,
        "address_bits": 16,
        "inflight": 4,
        "prefetch_inflight": 1,
        "outstanding_bursts": 2,
        "burst_beats": 4,
        "dma_channels": 2,
        "dma_queue_depth": 2,
    }
    return DeviceConfig(**(values | changes))


def writer_device(**changes):
    """Two channels, tiles of two bursts of sixteen beats that go to a memory for the slots."""
    values = {"slot_store": "axi", "data_bytes": 16, "burst_beats": 16}
    return dma_device(**(values | changes))


def buffer_device(*, layers=2, experts=4, **changes):
    """Four slots, two contexts, two layers of four experts, one chosen a token."""
    values = {
        "model": ModelConfig(name="proof", layers=layers, experts=experts, top_k=1),
        "slots": 4,
        "expert_bytes": 1024,
        "tile_bytes": 512,
        "contexts": 2,
        "predictor": "none",
        "data_bytes": 64,
        "address_bits": 16,
        "inflight": 4,
        "prefetch_inflight": 1,
    }
    return DeviceConfig(**(values | changes))


def scheduler_device(kind=DeviceConfig, **changes):
    """Four entries of the in-flight table, two of them for prefetches; two contexts and tiles."""
    values = {
        "model": ModelConfig(name="proof", layers=2, experts=4, top_k=1),
        "slots": 4,
        "expert_bytes": 1024,
        "tile_bytes": 512,
        "contexts": 2,
        "predictor": "none",
        "data_bytes": 64,
        "address_bits": 16,
        "inflight": 4,
        "prefetch_inflight": 2,
        "dma_channels": 2,
    }
    return kind(**(values | changes))


class _SmallQueue(DeviceConfig):
    """A device whose queue of candidates is smaller than any device's may be."""

    candidate_depth = 4


def queue_device(**changes):
    """Two contexts with two places each in the queue of candidates."""
    return scheduler_device(kind=_SmallQueue, **changes)
