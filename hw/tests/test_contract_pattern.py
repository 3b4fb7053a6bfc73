"""The bytes that stand for weights."""

import numpy as np

from prestage_hw.contract import DeviceConfig, preset
from prestage_hw.contract.pattern import expert_memory, expert_pattern


def test_memory_holds_the_pattern_of_every_expert():
    config = DeviceConfig(model=preset("tiny"), slots=4, expert_bytes=512)
    memory = expert_memory(config)
    assert memory.dtype == np.uint8
    assert memory.shape == (4 * 8 * 512,)
    for layer in range(4):
        for expert in range(8):
            at = config.expert_address(layer, expert)
            pattern = expert_pattern(layer, expert, size=512)
            assert np.array_equal(memory[at : at + 512], pattern)


def test_words_of_different_experts_differ():
    patterns = np.stack(
        [expert_pattern(layer, e, size=512).view("<u8") for layer in range(8) for e in range(64)]
    )
    assert len(np.unique(patterns)) == patterns.size


def test_pattern_is_splitmix64():
    # First outputs of splitmix64's finalizer for the inputs 1 and 2, as its authors publish it.
    def mix(z):
        mask = (1 << 64) - 1
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
        return z ^ (z >> 31)

    base = (3 << 48) | (7 << 32)
    expected = [mix(base + 1 + n) for n in range(4)]
    assert expert_pattern(3, 7, size=32).view("<u8").tolist() == expected


def test_shorter_pattern_is_the_beginning_of_a_longer_one():
    assert np.array_equal(expert_pattern(1, 2, size=64), expert_pattern(1, 2, size=512)[:64])


def test_memory_of_layers_that_differ():
    config = DeviceConfig(
        model=preset("tiny"), slots=4, expert_bytes=1536, layer_bytes=(512, 1536, 1024, 512)
    )
    memory = expert_memory(config)
    assert memory.shape == (config.memory_bytes,)
    for layer, size in enumerate(config.layer_bytes):
        for expert in range(8):
            ((at, length),) = config.expert_spans(layer, expert)
            assert length == size
            pattern = expert_pattern(layer, expert, size=size)
            assert np.array_equal(memory[at : at + size], pattern)


def test_memory_of_experts_in_rows():
    config = DeviceConfig(
        model=preset("tiny"),
        slots=4,
        expert_bytes=2560,
        parts=(1536, 1024),
        rows=((96, 112), (64, 8 * 64, 64)),
    )
    memory = expert_memory(config)
    assert memory.shape == (config.memory_bytes,)
    left = np.ones(memory.size, bool)
    for layer in range(4):
        for expert in range(8):
            spans = config.expert_spans(layer, expert)
            whole = np.concatenate([memory[at : at + size] for at, size in spans])
            assert np.array_equal(whole, expert_pattern(layer, expert, size=2560))
            for at, size in spans:
                assert left[at : at + size].all(), "rows overlap"
                left[at : at + size] = False
    # What lies between rows is no row's.
    assert left.sum() == 32 * 16 * 16
