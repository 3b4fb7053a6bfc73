"""Memory tiers in series, each with its own link: by hand, and against a plain event loop."""

from fractions import Fraction
from importlib.resources import files

import numpy as np
import pytest

from prestage_sim.simulate import (
    UNIT,
    Candidates,
    EventKind,
    Evict,
    Link,
    Machine,
    Plan,
    Recorder,
    Tier,
    simulate,
)
from prestage_sim.simulate.machines import load_machine
from prestage_sim.simulate.models import CARDS
from prestage_sim.simulate.run import run_plan
from prestage_sim.traces import Trace, load_trace


def _trace(chosen, *, experts):
    return Trace(experts=np.array(chosen), experts_per_layer=experts, meta={"model": "test-moe"})


def _random(tokens=60, *, layers=3, experts=8, k=2, seed=1):
    rng = np.random.default_rng(seed)
    return _trace(
        [[rng.permutation(experts)[:k] for _ in range(layers)] for _ in range(tokens)],
        experts=experts,
    )


def _machine(held, *, link=0.5, disk=0.25, latency=0.0, disk_latency=0.0, tiles=8):
    return Machine(
        name="m",
        layer_seconds=1.0,
        tiles=tiles,
        links=(Link(bandwidth=link, latency=latency),),
        tiers=(
            Tier(name="DRAM", experts=held),
            Tier(name="NVMe", bandwidth=disk, latency=disk_latency),
        ),
    )


# --- by hand -----------------------------------------------------------------------------------


def test_tiles_of_a_far_expert_follow_each_other_through_both_links():
    """16 tiles take 1/2 each from the disk, and the last one 1/4 more into its slot."""
    done = run_plan(Plan(), _trace([[[0, 1]]], experts=4), machine=_machine(3), slots=2)
    assert done.seconds == 0.5 + 8 + 0.25 + 0.25
    assert done.counts.tier_tiles == (16, 16) and done.counts.tiles_moved == 16


def test_the_slower_link_sets_the_pace():
    """The disk brings a tile in 1/32, the link takes 1/4: it begins 1/32 after the gate."""
    done = run_plan(Plan(), _trace([[[0, 1]]], experts=4), machine=_machine(3, disk=4.0), slots=2)
    assert done.seconds == 0.5 + 1 / 32 + 4 + 0.25


def test_latencies_of_both_links_are_paid_once():
    machine = _machine(3, latency=0.125, disk_latency=0.0625)
    done = run_plan(Plan(), _trace([[[0, 1]]], experts=4), machine=machine, slots=2)
    assert done.seconds == 0.5 + 8 + 0.0625 + 0.25 + 0.125 + 0.25


@pytest.mark.parametrize(
    ("held", "seconds", "far"),
    [
        # Four experts in turn: where three fit, the least recent one is always the one wanted.
        (2, 4 * 9.0, 64),
        (3, 4 * 9.0, 64),
        # All fit: from the third token on they come from DRAM, in 4.
        (4, 2 * 9.0 + 2 * (0.5 + 4 + 0.25), 32),
    ],
)
def test_dram_keeps_what_came_last(held, seconds, far):
    trace = _trace([[[0, 1]], [[2, 3]], [[0, 1]], [[2, 3]]], experts=8)
    done = run_plan(Plan(), trace, machine=_machine(held), slots=2)
    assert done.seconds == seconds
    assert done.counts.tier_tiles == (64, far)


def test_a_hit_in_a_slot_does_not_touch_dram():
    """0 stays in its slot: DRAM of two experts sees 0, 1, 2, 1, and has dropped 0, not 1."""
    trace = _trace([[[0, 1]], [[0, 2]], [[0, 1]]], experts=4)
    counts = run_plan(Plan(), trace, machine=_machine(2), slots=2).counts
    # 1 is evicted from its slot by 2, and comes again from DRAM.
    assert counts.tier_tiles == (4 * 8, 3 * 8)


def _proposed(step, ahead, expert):
    offset = np.zeros(3, np.int64)
    offset[step + 1 :] = 1
    one = np.ones(1, np.int16)
    return Candidates(offset=offset, ahead=ahead * one, expert=expert * one, score=200 * one)


def test_a_demand_goes_before_a_prefetch_on_both_links():
    """A prefetch begins at 0; its first disk tile ends at the gate, where the demands come."""
    plan = Plan(candidates=_proposed(0, 2, 3), cancel=False)
    recorder = Recorder()
    trace = _trace([[[0, 1]]], experts=4)
    done = run_plan(plan, trace, machine=_machine(4), slots=4, recorder=recorder)
    # The prefetch's tile is behind the disk: the link is free for it until a demand's tile comes.
    assert done.seconds == 0.5 + 8 + 0.25 + 0.25
    prefetched = [e for e in recorder.events if e.kind == EventKind.PREFETCH_TILE]
    assert [(e.link, e.start, e.end) for e in prefetched[:2]] == [(1, 0.0, 0.5), (0, 0.5, 0.75)]
    assert all(e.start >= 8.5 for e in prefetched[2:])


def test_a_link_carries_near_experts_while_a_far_one_is_on_its_way():
    """0 lies in DRAM, 2 on the disk: the first comes in 2, the second's last tile at 4.5 + 1/4."""
    trace = _trace([[[0, 1]], [[2, 3]], [[2, 0]]], experts=5)
    whole = run_plan(Plan(), trace, machine=_machine(3), slots=2)
    begin = 2 * 9.0
    # DRAM of three holds 1, 2, 3; the slots 2 and 3. 0 comes from the disk alone.
    assert whole.seconds == begin + 0.5 + 4 + 0.25 + 0.25
    assert whole.counts.tier_tiles == (5 * 8, 5 * 8)
    near = run_plan(Plan(), trace, machine=_machine(4), slots=2)
    assert near.seconds == begin + 0.5 + 2 + 0.25
    assert near.counts.tier_tiles == (5 * 8, 4 * 8)


def test_a_prefetch_given_up_on_the_disk_is_not_in_dram():
    """It is proposed for layer 0, which does not want it: one of 8 tiles has come by then."""
    plan = Plan(candidates=_proposed(0, 1, 3))
    trace = _trace([[[0, 1]]], experts=4)
    counts = run_plan(plan, trace, machine=_machine(4), slots=4).counts
    assert (counts.cancelled, counts.tier_tiles) == (1, (16, 17))
    twice = _trace([[[0, 1]], [[3, 1]]], experts=4)
    offset = np.array([0, 1, 1, 1, 1], np.int64)
    one = np.ones(1, np.int16)
    plan = Plan(candidates=Candidates(offset=offset, ahead=one, expert=3 * one, score=200 * one))
    again = run_plan(plan, twice, machine=_machine(4), slots=4).counts
    assert (again.cancelled, again.tier_tiles[1]) == (1, 17 + 8)


# --- what must hold ----------------------------------------------------------------------------


@pytest.mark.parametrize("evict", [Evict.LRU, Evict.LFU, Evict.BELADY])
def test_a_disk_without_delay_is_no_disk(evict):
    trace = _random()
    plan = Plan(evict=evict)
    plain = run_plan(plan, trace, machine=UNIT, slots=7)
    far = _machine(3, link=1.0, disk=float("inf"))
    tiered = run_plan(plan, trace, machine=far, slots=7)
    assert tiered.seconds == plain.seconds
    assert tiered.counts.hits == plain.counts.hits
    assert tiered.counts.tier_tiles[0] == plain.counts.tiles_moved


def test_dram_for_all_reads_each_expert_once():
    trace = _random()
    used = len({(layer, e) for token in trace.experts for layer, s in enumerate(token) for e in s})
    counts = run_plan(Plan(), trace, machine=_machine(24), slots=4).counts
    assert counts.tier_tiles[1] == 8 * used
    less = run_plan(Plan(), trace, machine=_machine(12), slots=4).counts
    assert 8 * used < less.tier_tiles[1] < less.tier_tiles[0]


def _witness(trace, *, held, slots, link, disk, tiles):
    """LRU on demand, written down once more: times in fractions, lists in order of recency."""
    cache, dram = [], []
    now = link_free = disk_free = Fraction(0)
    far = 0
    for token in trace.experts.tolist():
        for layer, wanted in enumerate(token):
            now += Fraction(1, 2)
            keys = [(layer, expert) for expert in wanted]
            missing = []
            for at, key in enumerate(keys):
                if key not in cache:
                    missing.append(key)
                    if len(cache) == slots:
                        # Neither what is on its way nor what was looked up already goes.
                        cache.remove(next(k for k in cache if k not in keys[:at]))
                else:
                    cache.remove(key)
                cache.append(key)
            come = {}
            for key in missing:
                if key in dram:
                    dram.remove(key)
                    come[key] = [now] * tiles
                else:
                    far += 1
                    disk_free = max(disk_free, now)
                    come[key] = [disk_free + disk * (n + 1) for n in range(tiles)]
                    disk_free = come[key][-1]
                    if len(dram) == held:
                        del dram[0]
                dram.append(key)
            left = {key: list(times) for key, times in come.items()}
            arrived = {}
            link_free = max(link_free, now)
            while left:
                ready = [key for key in missing if key in left and left[key][0] <= link_free]
                if not ready:
                    link_free = min(times[0] for times in left.values())
                    continue
                link_free += link
                left[ready[0]].pop(0)
                if not left[ready[0]]:
                    del left[ready[0]]
                    arrived[ready[0]] = link_free
            each = Fraction(1, 2) / len(keys)
            now += each * (len(keys) - len(missing))
            for time in sorted(arrived.values()):
                now = max(now, time) + each
    return now, far


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(
    ("held", "slots", "link", "disk"),
    [(5, 4, "1/2", "1/4"), (9, 6, "2", "3"), (14, 10, "1", "1/8")],
)
def test_agrees_with_a_plain_loop(seed, held, slots, link, disk):
    trace = _random(seed=seed)
    link, disk = Fraction(link), Fraction(disk)
    now, far = _witness(
        trace, held=held, slots=slots, link=1 / link / 8, disk=1 / disk / 8, tiles=8
    )
    machine = _machine(held, link=float(link), disk=float(disk))
    done = run_plan(Plan(), trace, machine=machine, slots=slots)
    assert done.seconds == pytest.approx(float(now), rel=1e-9)
    assert done.counts.tier_tiles[1] == 8 * far


@pytest.mark.parametrize("policy", ["lru", "st-moe", "adap-gating", "prestage", "bound"])
def test_every_tile_is_accounted_for(policy):
    trace = _random(120)
    machine = _machine(10, link=1.0, disk=0.5).with_rho(2.0, 2)
    result = simulate(trace, machine=machine, policy=policy, residency=0.4)
    assert result.bytes_per_token == result.tier_bytes[0]
    assert 0 < result.tier_bytes[1] <= result.tier_bytes[0] + 0.1
    assert result == simulate(trace, machine=machine, policy=policy, residency=0.4)


# --- machines ----------------------------------------------------------------------------------


def test_laptop_with_a_disk_behind_its_memory():
    machine = load_machine("laptop-gpu-nvme").for_model(CARDS["gpt-oss-20b"])
    assert [(tier.name, tier.experts) for tier in machine.tiers] == [
        ("host DRAM", int(8e9 // CARDS["gpt-oss-20b"].expert_bytes)),
        ("NVMe", None),
    ]
    small = CARDS["tinymoe"]
    assert len(load_machine("laptop-gpu-nvme").for_model(small).tiers) == 1


def test_energy_of_each_tier(tmp_path):
    """What comes from a disk behind memory of 60 experts costs its joules, and DRAM's twice."""
    trace, card = load_trace("models/tinymoe/traces/tinymoe__code.npz").first(200), CARDS["tinymoe"]
    text = files("prestage_sim.simulate.machines").joinpath("laptop-gpu-nvme.toml").read_text()
    path = tmp_path / "small.toml"
    path.write_text(text.replace("value = 8e9", f"value = {60 * card.expert_bytes}"))
    machine = load_machine(str(path)).for_model(card)
    result = simulate(trace, machine=machine, policy="lru", residency=0.1, score="all")
    near, far = (
        tiles * trace.layers * trace.top_k * card.expert_bytes for tiles in result.tier_bytes
    )
    assert 0 < far < near
    assert result.tier_joules == pytest.approx((120e-12 * (near + far), 1.2e-9 * far))
    outcome = machine.joules.byte.typical * near + sum(result.tier_joules)
    assert result.joules_per_token > outcome


def test_only_the_last_tier_holds_all():
    with pytest.raises(ValueError, match="Only the last tier can hold all experts, but DRAM does"):
        Machine(
            name="m", layer_seconds=1.0, tiers=(Tier(name="DRAM"), Tier(name="disk", bandwidth=1))
        )
