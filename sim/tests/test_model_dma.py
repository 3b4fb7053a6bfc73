"""Golden model of the DMA engine and of the memory behind it."""

import random

import numpy as np
import pytest

from prestage_hw.contract import DeviceConfig, preset
from prestage_hw.contract.records import FetchReason
from prestage_sim.model.dma import DMA, BusError, Completion, Memory

CONFIG = DeviceConfig(model=preset("gpt-oss-20b"), slots=64)


def test_whole_tile_in_one_burst():
    assert DMA(CONFIG).bursts(0x1000) == [(0x1000, 32)]


def test_bursts_end_at_edges():
    assert DMA(CONFIG).bursts(0x0FF0) == [(0x0FF0, 1), (0x1000, 31)]
    assert DMA(CONFIG).bursts(0x0E10) == [(0x0E10, 31), (0x1000, 1)]
    assert DMA(CONFIG).bursts(0x0E00) == [(0x0E00, 32)]


def test_bursts_are_short():
    config = CONFIG.replace(burst_beats=16)
    assert DMA(config).bursts(0x10) == [(0x10, 15), (0x100, 16), (0x200, 1)]
    assert DMA(config).bursts(0xF90) == [(0xF90, 7), (0x1000, 16), (0x1100, 9)]


def test_what_cannot_be_moved():
    config = CONFIG.replace(address_bits=30)
    for address in (0x100F, (1 << 30) - 16):
        assert DMA(config).bursts(address) == []
        assert DMA(config).completion(address) == Completion(FetchReason.ADDRESS, address)
        assert DMA(config).completion(address).failed
    assert DMA(config).bursts((1 << 30) - 512) == [((1 << 30) - 512, 32)]


@pytest.mark.parametrize("seed", range(5))
def test_bursts_keep_the_rules(seed):
    generator = random.Random(seed)
    for _ in range(200):
        data_bytes = 1 << generator.randrange(2, 7)
        config = CONFIG.replace(
            data_bytes=data_bytes,
            burst_beats=1 << generator.randrange(9),
            tile_bytes=(tile := 512 << generator.randrange(6)),
            expert_bytes=2 * tile,
        )
        address = generator.randrange(1 << 20) * data_bytes
        at = address
        for start, beats in DMA(config).bursts(address):
            assert start == at
            assert 1 <= beats <= config.burst_beats
            assert start // 4096 == (start + beats * data_bytes - 1) // 4096
            at += beats * data_bytes
        assert at == address + config.tile_bytes


def test_first_failing_burst_is_named():
    config = CONFIG.replace(burst_beats=8)
    dma = DMA(config)
    assert dma.completion(0x1000) == Completion(FetchReason.OK, 0x1000)
    assert dma.completion(0x1000, {0x1110, 0x1190}) == Completion(FetchReason.BUS, 0x1100)


def test_transfer():
    data = np.arange(8192, dtype=np.uint32).astype(np.uint8)
    memory = Memory(data, failing=[(0x1100, 0x1101)])
    dma = DMA(CONFIG.replace(burst_beats=8))
    completion, got = dma.transfer(0x200, memory)
    assert completion == Completion(FetchReason.OK, 0x200)
    assert got == data[0x200:0x400].tobytes()
    completion, got = dma.transfer(0x1000, memory)
    assert completion == Completion(FetchReason.BUS, 0x1100)
    assert got[:0x100] == data[0x1000:0x1100].tobytes()
    memory.failing.clear()
    assert dma.transfer(0x1000, memory)[0] == Completion(FetchReason.OK, 0x1000)


def test_tiles_of_rows():
    config = CONFIG.replace(expert_bytes=4096, parts=(1536, 2560), rows=((96, 160), (1280, 4096)))
    generator = np.random.default_rng(2)
    memory = Memory(generator.integers(0, 256, config.memory_bytes, dtype=np.uint8))
    dma = DMA(config)
    tiles = list(enumerate(config.tile_addresses(2, 9)))
    moved = [dma.transfer(address, memory, tile=tile) for tile, address in tiles]
    assert all(
        completion == (FetchReason.OK, tiles[n][1]) for n, (completion, _) in enumerate(moved)
    )
    spans = config.expert_spans(2, 9)
    assert b"".join(data for _, data in moved) == b"".join(memory.read(*span) for span in spans)
    # A row that cannot be read fails the tile that needs it, with the row's own address.
    at, _ = spans[6]
    memory.failing.append((at + 16, at + 32))
    reasons = [dma.transfer(address, memory, tile=tile)[0] for tile, address in tiles[:3]]
    assert reasons == [
        (FetchReason.OK, tiles[0][1]),
        (FetchReason.BUS, at),
        (FetchReason.OK, tiles[2][1]),
    ]


def test_rows_past_the_top():
    config = CONFIG.replace(rows=((96, 160),), expert_bytes=1536, address_bits=30)
    top = 1 << 30
    address = top - 512 - 2 * 160
    assert DMA(config).bursts(address) == [(address, 6), (address + 160, 6), (address + 160, 1)]
    assert DMA(config).completion(address) == Completion(FetchReason.ADDRESS, address)
    # A tile whose first row would begin below address 0.
    assert DMA(config).completion(0, tile=1) == Completion(FetchReason.ADDRESS, 0)
    assert DMA(config).completion(32, tile=1) == Completion(FetchReason.OK, 32)


def test_memory_ends():
    memory = Memory(bytes(range(100)))
    assert memory.read(90, 10) == bytes(range(90, 100))
    with pytest.raises(BusError, match="Memory answered an error at address 0x64") as caught:
        memory.read(90, 11)
    assert caught.value.address == 100
    with pytest.raises(BusError) as caught:
        memory.read(200, 4)
    assert caught.value.address == 200


def test_memory_fails_first_where_it_fails_first():
    memory = Memory(bytes(100), failing=[(60, 70), (50, 52), (10, 10)])
    assert memory.read(0, 50) == bytes(50)
    with pytest.raises(BusError) as caught:
        memory.read(51, 20)
    assert caught.value.address == 51


def test_bad_parameters():
    with pytest.raises(TypeError, match="Configuration must be a DeviceConfig, not 3"):
        DMA(3)
    with pytest.raises(ValueError, match="Memory contents must be one-dimensional bytes"):
        Memory(np.zeros((2, 2), np.uint8))
    with pytest.raises(ValueError, match="not 1-dimensional uint16"):
        Memory(np.zeros(2, np.uint16))
