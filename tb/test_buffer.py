# amaranth: UnusedElaboratable=no
"""Expert buffer (the half that pytest runs)."""

import os
from pathlib import Path

import pytest

from prestage_hw.buffer import (
    Directory,
    EntryLayout,
    ExpertBuffer,
    PinLayout,
    RecencyList,
    SlotLayout,
    Storage,
)
from prestage_hw.contract import DeviceConfig, ModelConfig, preset
from prestage_hw.contract.params import TINY_DEVICE
from prestage_tb.bench import run_bench

HERE = Path(__file__).parent

#: Operations of one random run; 3000 take about ten minutes in all.
STEPS = int(os.environ.get("PRESTAGE_BUFFER_STEPS", "600"))

CONFIGS = {
    "tiny": TINY_DEVICE,
    # No slot to spare: contexts x top_k.
    "barely": DeviceConfig(
        model=preset("tiny"), slots=8, contexts=4, expert_bytes=512, data_bytes=8
    ),
    # Nothing is a power of two, and the data take five memories.
    "odd": DeviceConfig(
        model=ModelConfig(name="odd", layers=5, experts=60, top_k=3),
        slots=23,
        contexts=3,
        expert_bytes=1536,
        data_bytes=4,
    ),
    "one-slot": DeviceConfig(
        model=ModelConfig(name="one", layers=1, experts=2, top_k=1),
        slots=1,
        expert_bytes=512,
        data_bytes=64,
    ),
    # Passes of a search overlap.
    "two-banks": TINY_DEVICE.replace(
        model=ModelConfig(name="two", layers=3, experts=11, top_k=2),
        replicas=2,
        slots=16,
        victim_samples=5,
    ),
    "four-banks": DeviceConfig(
        model=ModelConfig(name="banks", layers=3, experts=12, top_k=1),
        slots=12,
        replicas=4,
        contexts=3,
        expert_bytes=1536,
        predictor="perceptron",
    ),
    "gpt-oss-20b": DeviceConfig(model=preset("gpt-oss-20b"), slots=192, predictor="perceptron"),
}

#: Configurations whose buffer takes no values, and those into which the host writes too.
VALUELESS = ("one-slot",)
HOST_WRITES = ("tiny", "odd", "two-banks")


#: Larger shapes of what the others show.
_SOAK = ("four-banks", "gpt-oss-20b")


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=pytest.mark.soak if n in _SOAK else ()) for n in CONFIGS],
)
def test_buffer(name):
    config = CONFIGS[name]
    valued, host_writes = name not in VALUELESS, name in HOST_WRITES
    run_bench(
        lambda: ExpertBuffer(config=config, valued=valued, host_writes=host_writes),
        module=HERE / "cocotb_buffer.py",
        name="buffer",
        parameters={
            "config": config,
            # Copies are rarer than all else.
            "steps": 2 * STEPS if config.replicas > 1 else STEPS,
            "valued": valued,
            "host_writes": host_writes,
        },
    )


@pytest.mark.parametrize(
    "component",
    [ExpertBuffer, Directory, RecencyList, Storage, EntryLayout, SlotLayout, PinLayout],
)
def test_refuses_a_configuration_of_another_kind(component):
    with pytest.raises(TypeError, match="Configuration must be a DeviceConfig, not 'tiny'"):
        component(config="tiny")
