"""Bytes that stand for an expert's weights where no real ones are loaded."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from .params import DeviceConfig

__all__ = ["expert_memory", "expert_pattern"]


def _mix(words: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Finalizer of splitmix64 (Steele, Lea and Flood, 2014), which sets neighbours far apart."""
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return words ^ (words >> np.uint64(31))


def expert_pattern(layer: int, expert: int, *, size: int) -> NDArray[np.uint8]:
    """``size`` bytes (a multiple of 8) that depend on layer, expert and position."""
    start = np.uint64((layer << 48) | (expert << 32))
    words = _mix(start + np.arange(size // 8, dtype=np.uint64) + np.uint64(1))
    return words.astype("<u8").view(np.uint8)


def _scattered(config: DeviceConfig, experts: list[NDArray[np.uint8]]) -> NDArray[np.uint8]:
    """The experts in their rows, with other bytes in between."""
    memory = ~np.resize(expert_pattern(0, 0, size=4096), config.memory_bytes)
    for number, whole in enumerate(experts):
        start = 0
        for at, size in config.expert_spans(*divmod(number, config.model.experts)):
            memory[at : at + size] = whole[start : start + size]
            start += size
    return memory


def expert_memory(config: DeviceConfig) -> NDArray[np.uint8]:
    """A memory image of all experts, filled with :func:`expert_pattern`.

    Its shape is ``[config.memory_bytes]``. Experts in several parts lie as after reset: the parts'
    arrays follow each other. Between rows there are other bytes.
    """
    model = config.model
    experts = [
        expert_pattern(layer, expert, size=config.layer_sizes[layer])
        for layer in range(model.layers)
        for expert in range(model.experts)
    ]
    if config.rows:
        return _scattered(config, experts)
    if len(config.part_bytes) == 1:
        return np.concatenate(experts)
    starts = [tile * config.tile_bytes for tile in config.first_tiles]
    return np.concatenate(
        [
            expert[start : start + size]
            for start, size in zip(starts, config.part_bytes, strict=True)
            for expert in experts
        ]
    )
