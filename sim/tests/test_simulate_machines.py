"""Machine files: every figure has a source, bad ones are named, times follow from the model."""

import pickle

import numpy as np
import pytest

from prestage_sim.simulate.energy import Energy, EnergyModel, Spread
from prestage_sim.simulate.machines import MACHINES, MachineError, load_machine
from prestage_sim.simulate.models import CARDS, model_card
from prestage_sim.simulate.result import Counts
from prestage_sim.traces import Trace, TraceError

GOOD = """
title = "one of my own"
tiles = 4
[compute]
flops = 1e12
memory_bandwidth = 100e9
overhead = 2e-6
[fast]
bytes = 1e9
[[links]]
bandwidth = {value = 10e9, source = "measured"}
latency = 1e-6
[[tiers]]
name = "DRAM"
bytes = 100e6
bandwidth = 50e9
joules_per_byte = 1e-10
[[tiers]]
name = "disk"
bandwidth = 5e9
latency = 1e-4
joules_per_byte = {low = 1e-9, typical = 2e-9, high = 4e-9, source = "guess"}
[energy]
flop = 1e-12
fast_byte = 1e-11
link_byte = 2e-11
idle_watts = {low = 1, typical = 2, high = 3}
"""


def machine(tmp_path, text):
    path = tmp_path / "mine.toml"
    path.write_text(text)
    return load_machine(str(path))


def trace(*, layers=4, experts=8, top_k=2, model="other", **meta):
    order = np.tile(np.arange(experts), (3, layers, 1))[..., :top_k]
    return Trace(experts=order, experts_per_layer=experts, meta={"model": model, **meta})


CARD = model_card(trace(expert_bytes=10_000_000))


@pytest.mark.parametrize("name", MACHINES)
def test_every_figure_has_a_source(name):
    found = load_machine(name)
    assert found.title
    assert len(found.sources()) >= 5
    for key, value, source in found.sources():
        assert len(source) > 3, key
        assert value, key


@pytest.mark.parametrize("name", MACHINES)
@pytest.mark.parametrize("card", CARDS.values(), ids=lambda card: card.name)
def test_every_model_runs_on_every_machine(name, card):
    found = load_machine(name).for_model(card)
    assert found.name == name
    assert found.layer_seconds > 0
    assert 0 < found.alpha < 1
    assert (found.joules is None) == (name == "unit")
    # It goes to other processes, and is part of a key.
    assert pickle.loads(pickle.dumps(found)) == found
    assert hash(found) == hash(load_machine(name).for_model(card))


def test_unit_is_the_machine_of_the_bars():
    from prestage_sim.simulate import UNIT

    assert load_machine("unit").for_model(CARD).replace(name="unit") == UNIT


def test_times_follow_from_bytes_and_operations(tmp_path):
    card = CARDS["gpt-oss-20b"]
    found = load_machine("rtx-4090-pcie4")
    before, after = found.times(card)
    assert before == pytest.approx(36e-6 + card.attention_bytes / 1008e9)
    assert after == pytest.approx(36e-6 + 4 * card.expert_bytes / 1008e9)
    resolved = found.for_model(card)
    assert resolved.layer_seconds == pytest.approx(before + after)
    assert resolved.rho(4) == pytest.approx(4 * card.expert_bytes / 25e9 / (before + after))
    # Where arithmetic is slow it sets the time: 2 operations for each of 5e6 16-bit weights.
    slow = machine(tmp_path, GOOD.replace("flops = 1e12", "flops = 1e9"))
    assert slow.times(CARD)[1] == pytest.approx(2 * 2 * 5e6 / 1e9 + 1e-6)


def test_unknown_attention_takes_as_long_as_the_experts(tmp_path):
    assert CARD.attention_bytes is None
    before, after = machine(tmp_path, GOOD).times(CARD)
    assert before == after


def test_shared_experts_take_time():
    card = CARDS["deepseek-v2-lite"]
    found = load_machine("rtx-4090-pcie4")
    after = found.times(card)[1]
    assert after == pytest.approx(
        36e-6 + (6 * card.expert_bytes + 2 * 3 * 2048 * 1408 * 2) / 1008e9
    )


def test_tiers_hold_what_fits(tmp_path):
    tiers = machine(tmp_path, GOOD).for_model(CARD).tiers
    assert [(tier.name, tier.experts) for tier in tiers] == [("DRAM", 10), ("disk", None)]
    # The first that holds all is the last.
    larger = GOOD.replace("bytes = 100e6", "bytes = 400e6")
    tiers = machine(tmp_path, larger).for_model(CARD).tiers
    assert [(tier.name, tier.experts) for tier in tiers] == [("DRAM", None)]
    small = GOOD.replace('name = "disk"', 'name = "disk"\nbytes = 300e6')
    with pytest.raises(MachineError, match=r"no tier holds the 32 experts of other, 0.3 GB"):
        machine(tmp_path, small).for_model(CARD)


def test_room_and_slots(tmp_path):
    found = machine(tmp_path, GOOD)
    assert found.room(CARD) == 100
    assert found.slots(CARD) is None
    fixed = machine(tmp_path, GOOD.replace("bytes = 1e9", "slots = 16"))
    assert (fixed.slots(CARD), fixed.room(CARD)) == (16, None)
    with pytest.raises(
        MachineError, match=r"fast.slots must be at most the model's 4 x 8 = 32 experts, not 33"
    ):
        machine(tmp_path, GOOD.replace("bytes = 1e9", "slots = 33")).slots(CARD)


@pytest.mark.parametrize(
    "old, new, message",
    [
        ("flops = 1e12", "", "compute.flops is missing"),
        ("flops = 1e12", "flops = -1", "compute.flops must be above 0, not -1"),
        ("latency = 1e-6", "latency = -2", r"links\[0\].latency must be at least 0, not -2"),
        ("memory_bandwidth = 100e9", "memory_bandwidth = 0", "memory_bandwidth must be above 0"),
        ("memory_bandwidth = 100e9", "memory_bandwidth = '9'", "must be a number, not '9'"),
        ("flops = 1e12", "flops = nan", "compute.flops must be a number, not nan"),
        ("flops = 1e12", "flops = true", "compute.flops must be a number, not True"),
        ("flops = 1e12", "flop = 1e12", "compute.flop is unknown; known are flops, memory_ban"),
        ("[fast]", "[fasst]", "fasst is unknown; known are title, tiles, layer, compute"),
        ("value = 10e9, ", "", r"links\[0\].bandwidth.value is missing"),
        ('bandwidth = {value = 10e9, source = "measured"}', "", r"links\[0\].bandwidth is miss"),
        ("bandwidth = 5e9", "", r"tiers\[1\].bandwidth is missing"),
        ("joules_per_byte = 1e-10", "", r"tiers\[0\].joules_per_byte is missing"),
        ("idle_watts = {low = 1, typical = 2, high = 3}", "", "energy.idle_watts is missing"),
        ("low = 1, typical", "low = 5, typical", "energy.idle_watts must have low, typical and"),
        ("typical = 2, high", "high", "energy.idle_watts.typical is missing"),
        ('name = "DRAM"', "", r"tiers\[0\].name is missing"),
        ("[[links]]", "[links]", r"links must be tables: write \[\[links\]\]"),
        ("[energy]", "[[energy]]", r"energy must be a table: write \[energy\]"),
        ("tiles = 4", "tiles = -4", "tiles must be above 0, not -4"),
        ("tiles = 4", "tiles = ", "mine.toml isn't TOML"),
    ],
)
def test_bad_figures_are_named(tmp_path, old, new, message):
    assert old in GOOD
    with pytest.raises(MachineError, match=message) as caught:
        machine(tmp_path, GOOD.replace(old, new, 1))
    assert "mine.toml" in str(caught.value)


def test_layers_with_times_of_their_own(tmp_path):
    text = "[layer]\nseconds = 2\nalpha = 0.25\nexpert_bytes = 3\n[[links]]\nbandwidth = 6\n"
    found = machine(tmp_path, text)
    assert not found.needs_model
    resolved = found.for_model(CARD)
    assert (resolved.layer_seconds, resolved.alpha, resolved.rho(2)) == (2, 0.25, 0.5)
    with pytest.raises(MachineError, match=r"layer.alpha must be at most 1, not 1.5"):
        machine(tmp_path, text.replace("0.25", "1.5"))
    with pytest.raises(MachineError, match=r"layer.expert_bytes is missing"):
        machine(tmp_path, text.replace("expert_bytes = 3\n", ""))


def test_unknown_machines_list_the_known(tmp_path):
    with pytest.raises(MachineError, match=r"one of unit, paper, .*, or a .toml file, not 'gpu'"):
        load_machine("gpu")
    with pytest.raises(MachineError, match=r"none.toml can't be read: No such file"):
        load_machine(str(tmp_path / "none.toml"))


def test_models():
    assert (
        model_card(trace(layers=24, experts=32, top_k=4, model="openai/gpt-oss-20b"))
        == (CARDS["gpt-oss-20b"])
    )
    # Another k and fewer bits, as the trace was recorded.
    card = model_card(
        trace(layers=48, experts=128, top_k=6, model="Qwen3-30B-A3B-Q4.gguf", expert_bytes=3059712)
    )
    assert (card.top_k, card.expert_bytes) == (6, 3059712)
    assert card.expert_weights == CARDS["qwen3-30b-a3b"].expert_weights
    assert card.attention_bytes < CARDS["qwen3-30b-a3b"].attention_bytes
    with pytest.raises(TraceError, match=r"model other doesn't say how large an expert is.*give"):
        model_card(trace())
    assert model_card(trace(), expert_bytes=77).expert_bytes == 77
    assert model_card(trace(), expert_bytes=77, attention_bytes=9.0).attention_bytes == 9.0


def test_file_overrides_the_model(tmp_path):
    text = GOOD + "[model]\nexpert_bytes = 5000000\nattention_bytes = 1e6\nweight_bits = 8\n"
    card = machine(tmp_path, text).card(CARD)
    assert (card.expert_bytes, card.attention_bytes, card.weight_bits) == (5_000_000, 1e6, 8)
    assert machine(tmp_path, text).for_model(CARD).expert_bytes == 5_000_000


def test_energy_by_hand():
    model = EnergyModel(
        token=Spread(1, 2, 3),
        idle_watts=Spread(0, 1, 2),
        tile_bytes=10,
        byte=Spread(0.1, 0.2, 0.3),
        tiers=(Spread(1, 1, 1), Spread(3, 3, 3)),
    )
    counts = Counts(
        tokens=4,
        seconds=5.0,
        demand_tiles=6,
        useful_tiles=2,
        useless_tiles=1,
        tier_tiles=(8, 2),
    )
    # Of eight tiles two come from the farther tier for 3 joules a byte, are written for 1 and read
    # again as all others for 1: (2 * (3 + 1) + 8) / 8 = 2 on average.
    assert model.split(counts) == Energy(
        compute=Spread(4, 13, 22),
        useful=Spread(8 * 10 * 2.1, 8 * 10 * 2.2, 8 * 10 * 2.3),
        wasted=Spread(10 * 2.1, 10 * 2.2, 10 * 2.3),
    )
    assert model(counts) == 13 + 9 * 22
    assert model.split(counts).total.low == 4 + 9 * 21
    assert model.by_tier(counts) == (Spread(100, 100, 100), Spread(60, 60, 60))
    # Where nobody counted, all came from the first tier.
    assert model(Counts(tokens=1, demand_tiles=1)) == 2 + 10 * 1.2


def test_energy_of_a_file(tmp_path):
    joules = machine(tmp_path, GOOD).for_model(CARD).joules
    # Two experts and attention as large: 40 MB read; 2 operations for each of 1e7 weights, and
    # one for each byte of attention.
    layer = 1e-12 * (2 * 1e7 + 2e7) + 1e-11 * 4e7
    assert joules.token.typical == pytest.approx(4 * layer)
    assert joules.tile_bytes == 2_500_000
    assert joules.byte.typical == pytest.approx(3e-11)
    assert joules.tiers == (Spread(1e-10, 1e-10, 1e-10), Spread(1e-9, 2e-9, 4e-9))
    plain = GOOD[: GOOD.index("[energy]")]
    assert machine(tmp_path, plain).for_model(CARD).joules is None
