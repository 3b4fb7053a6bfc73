# amaranth: UnusedElaboratable=no
"""Checksums of experts (the half that pytest runs), and their arithmetic."""

import random
import zlib
from pathlib import Path

import pytest

from prestage_hw.contract import DeviceConfig, preset
from prestage_hw.contract.crc import inverted, multiply, power, remainder, times_x
from prestage_hw.contract.params import TINY_DEVICE
from prestage_hw.dma.checksum import Checksums, TileSums
from prestage_tb.bench import run_bench

HERE = Path(__file__).parent

CONFIGS = {
    # 16 beats an expert, 8 a tile: every bit of it can be wrong once, and tiles end the fastest.
    "tiny": TINY_DEVICE.replace(data_bytes=64, checksums=True),
    # Layers whose experts have two, one, three and again two tiles.
    "sizes": TINY_DEVICE.replace(
        data_bytes=64, checksums=True, expert_bytes=1536, layer_bytes=(1024, 512, 1536, 1024)
    ),
    # Three tiles, one channel, an odd number of experts.
    "narrow": DeviceConfig(
        model=preset("tiny"),
        slots=5,
        data_bytes=4,
        address_bits=36,
        expert_bytes=1536,
        dma_channels=1,
        checksums=True,
    ),
    "gpt-oss-20b": DeviceConfig(model=preset("gpt-oss-20b"), slots=64, checksums=True),
}


SIZES = [*(f"experts/stall={n}" for n in range(3)), "timing", "reset_in_flight"]


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if name in ("tiny", "sizes") else pytest.mark.soak)
        for name in CONFIGS
    ],
)
def test_checksums(name):
    config = CONFIGS[name]
    run_bench(
        Checksums(config=config),
        module=HERE / "cocotb_checksum.py",
        name="checksums",
        parameters={"config": config},
        # The other shape has every bit of it wrong once.
        testcase=SIZES if name == "sizes" else None,
    )


@pytest.mark.parametrize("block", [Checksums, TileSums])
def test_bad_config(block):
    with pytest.raises(TypeError, match="Configuration must be a DeviceConfig, not 'tiny'"):
        block(config="tiny")


def test_arithmetic():
    rng = random.Random(4)
    one, x = 1 << 31, 1 << 30
    for _ in range(50):
        a, b, c = (rng.getrandbits(32) for _ in range(3))
        assert multiply(a, b) == multiply(b, a)
        assert multiply(a, b ^ c) == multiply(a, b) ^ multiply(a, c)
        assert multiply(a, one) == a and multiply(a, x) == times_x(a)
        first, second = rng.randbytes(rng.randrange(40)), rng.randbytes(rng.randrange(40))
        moved = multiply(remainder(first), power(8 * len(second)))
        assert remainder(first + second) == moved ^ remainder(second)
        assert remainder(second, remainder(first)) == remainder(first + second)
        assert zlib.crc32(first) == remainder(first) ^ inverted(len(first))
    assert power(0) == one and power(1) == x
