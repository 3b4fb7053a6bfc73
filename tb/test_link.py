"""Link framing and go-back-N: RTL against the golden model, the driver and published vectors."""

import re
from pathlib import Path

import pytest

from prestage_hw.contract import DeviceConfig, preset
from prestage_hw.contract.params import TINY_DEVICE
from prestage_hw.link import Deframer, Framer, Link
from prestage_tb.bench import run_bench

BENCH = Path(__file__).with_name("cocotb_link.py")
WIDE_DEVICE = DeviceConfig(model=preset("qwen3-30b-a3b"), slots=64, data_bytes=64)


def tests_of(prefix):
    return re.findall(rf"^async def ({prefix}_\w+)\(dut\):", BENCH.read_text(), re.MULTILINE)


@pytest.mark.parametrize("config", [TINY_DEVICE, WIDE_DEVICE], ids=["tiny", "wide"])
def test_deframer(config):
    run_bench(
        Deframer(config=config),
        module=BENCH,
        name="deframer",
        parameters={"config": config},
        testcase=tests_of("frames_in"),
    )


@pytest.mark.parametrize("longest", [15, 253])
def test_framer(longest):
    run_bench(
        Framer(longest=longest),
        module=BENCH,
        name="framer",
        parameters={"longest": longest},
        testcase=tests_of("frames_out"),
    )


@pytest.mark.parametrize(
    ("config", "options"),
    [
        (
            TINY_DEVICE,
            {
                "replay_frames": 4,
                "acknowledge_every": 3,
                "acknowledge_idle": 40,
                "replay_cycles": 1500,
            },
        ),
        (
            WIDE_DEVICE,
            {
                "replay_frames": 16,
                "acknowledge_every": 8,
                "acknowledge_idle": 64,
                "replay_cycles": 4096,
            },
        ),
    ],
    ids=["tiny", "wide"],
)
def test_link(config, options):
    run_bench(
        Link(config=config, **options),
        module=BENCH,
        name="link",
        parameters={"config": config, "options": options},
        testcase=tests_of("link"),
    )
