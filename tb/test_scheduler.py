# amaranth: UnusedElaboratable=no
"""Scheduler (the half that pytest runs)."""

from pathlib import Path

import pytest

from prestage_hw.contract import DeviceConfig, preset
from prestage_hw.contract.params import TINY_DEVICE
from prestage_hw.contract.registers import COUNTERS
from prestage_hw.scheduler import STROBES, CandidateQueue, InflightTable, Scheduler
from prestage_tb.bench import run_bench

HERE = Path(__file__).parent

CONFIGS = {
    "tiny": TINY_DEVICE,
    "gpt-oss-20b": DeviceConfig(model=preset("gpt-oss-20b"), slots=64),
    # Experts in four parts, whose arrays lie in another order.
    "parts": TINY_DEVICE.replace(expert_bytes=3072, parts=(1024, 512, 1024, 512)),
    # Layers whose experts have two, six, one and three tiles.
    "sizes": TINY_DEVICE.replace(expert_bytes=3072, layer_bytes=(1024, 3072, 512, 1536)),
    # Parts whose rows are shorter than a tile, longer, whole fractions of it, and none; those of
    # the first follow each other expert by expert.
    "rows": TINY_DEVICE.replace(
        expert_bytes=6144,
        parts=(3072, 1536, 1024, 512),
        rows=((192, 8 * 208, 208), (768, 1024), (64, 640, 12288), ()),
    ),
    # Odd sizes, more contexts, more prefetches, a whole expert in one tile.
    "one-tile": DeviceConfig(
        model=preset("olmoe-1b-7b"),
        slots=37,
        contexts=3,
        expert_bytes=512,
        inflight=11,
        prefetch_inflight=9,
        address_bits=33,
        data_bytes=8,
    ),
}


#: What sizes make a difference to.
SIZES = [
    "timed/stall=none/latency=1/failing=0.1",
    "timed/stall=some/latency=3/failing=0.0",
    "drained/stall=none/failing=False/full=False",
    "drained/stall=some/failing=False/full=True",
    "latencies",
    "demand_promotes_a_prefetch",
    *(
        f"routed_layer_gives_up/tiles_out={n}"
        for n in ("1/wanted=False", "1/wanted=True", "0/wanted=False")
    ),
    "promoted_prefetch_goes_behind_earlier_demands",
    "reset_in_flight",
]


def run_scheduler(name, *, testcase=None):
    config = CONFIGS[name]
    run_bench(
        Scheduler(config=config),
        module=HERE / "cocotb_scheduler.py",
        name="scheduler",
        parameters={"config": config},
        testcase=testcase,
    )


#: What a shorter run, or another shape, shows too.
_SOAK = ("sizes", "rows", "one-tile")


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=pytest.mark.soak if name in _SOAK else ()) for name in CONFIGS],
)
def test_scheduler(name):
    run_scheduler(name)


def test_sizes():
    run_scheduler("sizes", testcase=SIZES)


def test_rows():
    run_scheduler(
        "rows",
        testcase=[
            "timed/stall=some/latency=3/failing=0.0",
            "drained/stall=some/failing=True/full=False",
            "latencies",
            "demand_promotes_a_prefetch",
            "routed_layer_gives_up/tiles_out=1/wanted=True",
        ],
    )


def test_copies():
    """Experts in several banks."""
    config = TINY_DEVICE.replace(replicas=2, slots=10)
    run_bench(
        Scheduler(config=config),
        module=HERE / "cocotb_scheduler.py",
        name="scheduler",
        parameters={"config": config},
        testcase=[
            *(f"copies_timed/stall={stall}" for stall in ("none", "some", "long")),
            "copies_drained/stall=none/failing=False",
            "copies_drained/stall=some/failing=True",
            "demand_leaves_a_copy_its_slot",
            "latencies",
            "reset_in_flight",
        ],
    )


@pytest.mark.parametrize("contexts", [1, 3])
def test_rescans(contexts):
    """A buffer that takes values."""
    config = TINY_DEVICE.replace(contexts=contexts, slots=10)
    run_bench(
        Scheduler(config=config, valued=True),
        module=HERE / "cocotb_scheduler.py",
        name="scheduler",
        parameters={"config": config, "valued": True},
        testcase=[
            *(f"rescans_timed/stall={stall}" for stall in ("none", "some", "long")),
            *(f"rescans_drained/stall={stall}" for stall in ("none", "some", "long")),
            *(f"rescans_with_a_budget/stall={stall}" for stall in ("none", "some", "long")),
            "timed/stall=none/latency=1/failing=0.1",
            "latencies",
            "reset_in_flight",
        ],
    )


@pytest.mark.parametrize("block", [Scheduler, InflightTable, CandidateQueue])
def test_bad_config(block):
    with pytest.raises(TypeError, match="Configuration must be a DeviceConfig, not 'tiny'"):
        block(config="tiny")


def test_strobes_are_counters():
    # But for what the host's writes count.
    counted = {c.name for c in COUNTERS if c.stage in (3, 4, 5)} - {"writes_refused"}
    assert set(STROBES) == counted
    assert dict(Scheduler(config=TINY_DEVICE).strobes.shape()).keys() == set(STROBES)
