# amaranth: UnusedElaboratable=no
"""Link framing and go-back-N: RTL against the golden model, the driver and published vectors."""

import re
from pathlib import Path

import pytest

from prestage_hw.contract import DeviceConfig, preset
from prestage_hw.contract.params import TINY_DEVICE
from prestage_hw.link import Deframer, Framer, Link, MessageLayout
from prestage_tb.bench import run_bench

BENCH = Path(__file__).with_name("cocotb_link.py")
WIDE_DEVICE = DeviceConfig(model=preset("qwen3-30b-a3b"), slots=64, data_bytes=64)


def cases_of(prefix):
    return re.findall(rf"^async def ({prefix}_\w+)\(dut\):", BENCH.read_text(), re.MULTILINE)


@pytest.mark.parametrize("config", [TINY_DEVICE, WIDE_DEVICE], ids=["tiny", "wide"])
def test_deframer(config):
    run_bench(
        Deframer(config=config),
        module=BENCH,
        name="deframer",
        parameters={"config": config},
        testcase=cases_of("frames_in"),
    )


@pytest.mark.parametrize("longest", [15, 253])
def test_framer(longest):
    run_bench(
        Framer(longest=longest),
        module=BENCH,
        name="framer",
        parameters={"longest": longest},
        testcase=cases_of("frames_out"),
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
        testcase=cases_of("link"),
    )


@pytest.mark.parametrize(
    ("create", "error", "text"),
    [
        (lambda: Deframer(config=3), TypeError, "Configuration must be a DeviceConfig, not 3"),
        (lambda: Framer(longest="9"), TypeError, "Frame length must be an integer, not '9'"),
        (lambda: Framer(longest=4), ValueError, "Frame length must be between 5 and 253, not 4"),
        (
            lambda: Framer(longest=254),
            ValueError,
            "Frame length must be between 5 and 253, not 254",
        ),
        (lambda: Link(config=None), TypeError, "Configuration must be a DeviceConfig, not None"),
        (
            lambda: Link(config=TINY_DEVICE, replay_frames=12),
            ValueError,
            "Replay memory size in frames must be a power of two, not 12",
        ),
        (
            lambda: Link(config=TINY_DEVICE, replay_frames=128),
            ValueError,
            "Replay memory size in frames must be between 2 and 64, not 128",
        ),
        (
            lambda: Link(config=TINY_DEVICE, acknowledge_every=0),
            ValueError,
            "Acknowledge interval must be between 1 and 64, not 0",
        ),
        (
            lambda: Link(config=TINY_DEVICE, acknowledge_idle=1.5),
            TypeError,
            "Acknowledge delay in cycles must be an integer, not 1.5",
        ),
        (
            lambda: Link(config=TINY_DEVICE, replay_cycles=1 << 24),
            ValueError,
            "Replay delay in cycles must be between 1 and 16777215, not 16777216",
        ),
        (
            lambda: MessageLayout(config=1, to_device=True),
            TypeError,
            "Configuration must be a DeviceConfig, not 1",
        ),
        (
            lambda: MessageLayout(config=TINY_DEVICE, to_device=1),
            TypeError,
            "Direction must be a boolean, not 1",
        ),
    ],
)
def test_parameters_are_checked(create, error, text):
    with pytest.raises(error) as caught:
        create()
    assert str(caught.value) == text


def test_message_layout():
    layout = MessageLayout(config=WIDE_DEVICE, to_device=True)
    assert layout.size == 8 + 8 * 22  # four words of a table, with their place and number
    layout = MessageLayout(config=WIDE_DEVICE, to_device=False)
    assert layout.size == 8 + 8 * 71  # 64 bytes of a slot, with slot, beat and flag
