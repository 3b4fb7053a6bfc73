"""The simulator against cases worked out by hand and against a second, plain event loop."""

import importlib.util
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from prestage_sim.simulate import (
    FIELDS,
    POLICIES,
    UNIT,
    Candidates,
    EventKind,
    Evict,
    Link,
    Machine,
    Plan,
    Recorder,
    simulate,
)
from prestage_sim.simulate.run import run_plan
from prestage_sim.traces import Trace

_SPEC = importlib.util.spec_from_file_location(
    "simulate_witness", Path(__file__).with_name("simulate_witness.py")
)
_MODULE = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(_MODULE)
Witness = _MODULE.Witness


def _trace(tokens=40, *, layers=4, experts=8, k=2, seed=1):
    rng = np.random.default_rng(seed)
    chosen = [[rng.permutation(experts)[:k] for _ in range(layers)] for _ in range(tokens)]
    return Trace(
        experts=np.array(chosen),
        experts_per_layer=experts,
        token=rng.integers(0, 20, tokens),
        meta={"model": "test-moe"},
    )


def _candidates(trace, *, seed, share=0.7):
    """Some of what is coming, and some noise, up to three layers ahead."""
    rng = np.random.default_rng(seed)
    flat = trace.experts.reshape(-1, trace.top_k)
    offset, rows = [0], []
    for token in range(trace.tokens):
        for layer in range(-1, trace.layers):
            for _ in range(rng.integers(0, 5)):
                ahead = int(rng.integers(1, 4))
                visit = token * trace.layers + layer + ahead
                expert = int(rng.integers(trace.experts_per_layer))
                if visit < len(flat) and rng.random() < share:
                    expert = int(rng.choice(flat[visit]))
                rows.append((ahead, expert, int(rng.integers(1, 256))))
            offset.append(len(rows))
    ahead, expert, score = np.array(rows, np.int16).T
    return Candidates(
        offset=np.array(offset, np.int64),
        ahead=np.ascontiguousarray(ahead),
        expert=np.ascontiguousarray(expert),
        score=np.ascontiguousarray(score),
    )


def _run(plan, trace, *, rho=2.0, slots=12, first=0, **changes):
    machine = UNIT.with_rho(rho, trace.top_k).replace(**changes)
    return run_plan(plan, trace, machine=machine, slots=slots, first=first)


# --- by hand -----------------------------------------------------------------------------------


@pytest.mark.parametrize("rho", [0.5, 24.0])
def test_everything_resident_takes_the_time_of_compute(rho):
    trace = _trace()
    result = simulate(trace, machine=UNIT, policy="resident", residency=0.2, rho=rho)
    assert result.tpot == 1.0 and result.hit_rate == 1.0 and result.bytes_per_token == 0


def test_on_demand_waits_for_the_link():
    """Half a layer, both experts over the link, and the compute of the last one."""
    rng = np.random.default_rng(1)
    chosen = [[rng.permutation(4)[:2] + 4 * (t % 2) for _ in range(4)] for t in range(50)]
    trace = Trace(experts=np.array(chosen), experts_per_layer=8, meta={"model": "test-moe"})
    result = simulate(trace, machine=UNIT, policy="on-demand", residency=1.0, rho=4.0)
    assert result.tpot == 0.5 + 4.0 + 0.25
    assert result.hit_rate == 0 and result.bytes_per_token == 1


def test_compute_starts_on_what_has_come():
    """One expert is there, one comes: its way of 1 hides the other's compute."""
    chosen = [[[0, 1]], [[0, 2]], [[0, 3]]]
    trace = Trace(experts=np.array(chosen), experts_per_layer=4, meta={"model": "test-moe"})
    done = _run(Plan(), trace, rho=2.0, slots=2, first=1)
    assert done.seconds == 2 * (0.5 + 1.0 + 0.25)
    assert done.counts.hits == 2 and done.counts.misses == 2


def _one_candidate(visits, step, ahead, expert):
    """One layer a token: step 2t is the start of token t, 2t + 1 when its layer was routed."""
    offset = np.zeros(2 * visits + 1, np.int64)
    offset[step + 1 :] = 1
    one = np.ones(1, np.int16)
    return Candidates(offset=offset, ahead=ahead * one, expert=expert * one, score=200 * one)


@pytest.mark.parametrize(
    ("rho", "seconds", "late"),
    [
        # The expert's way takes a half, as long as there is from a gate to the next layer's end.
        (1.0, 0.5 + 1.0 + 0.25 + 1.0, 0),
        # A way of 4 begins at the first gate, behind two demands of 4 each: 8.5 + 4, 8.75 being the
        # end of layer 0; the gate of layer 1 is at 9.25, the expert comes at 12.5.
        (8.0, 8.75 + 0.5 + 3.25 + 0.25, 1),
    ],
)
def test_a_prefetch_hides_its_way(rho, seconds, late):
    trace = Trace(
        experts=np.array([[[0, 1]], [[0, 2]]]), experts_per_layer=4, meta={"model": "test-moe"}
    )
    plan = Plan(candidates=_one_candidate(2, 1, 1, 2))
    done = _run(plan, trace, rho=rho, slots=4)
    assert done.seconds == seconds
    assert (done.counts.useful, done.counts.late) == (1, late)


def test_a_demand_waits_for_one_tile_of_a_prefetch():
    """A prefetch begins at time 0; the demands come at 0.5, in the middle of its second tile."""
    trace = Trace(experts=np.array([[[0, 1]]]), experts_per_layer=4, meta={"model": "test-moe"})
    plan = Plan(candidates=_one_candidate(1, 0, 2, 3), cancel=False)
    done = _run(plan, trace, rho=6.0, slots=4)
    tile = 3 / 8
    assert done.seconds == 2 * tile + 6.0 + 0.25
    whole = _run(
        Plan(candidates=_one_candidate(1, 0, 2, 3), preempt=False), trace, rho=6.0, slots=4
    )
    assert whole.seconds == 3.0 + 6.0 + 0.25


def test_latency_is_paid_once_for_tiles_in_a_row():
    trace = Trace(experts=np.array([[[0, 1]]]), experts_per_layer=4, meta={"model": "test-moe"})
    machine = Machine(name="m", layer_seconds=1.0, links=(Link(bandwidth=0.5, latency=0.125),))
    done = run_plan(Plan(), trace, machine=machine, slots=4)
    assert done.seconds == 0.5 + 4.0 + 0.125 + 0.25


def test_two_links_bring_twice_as_much():
    trace = Trace(experts=np.array([[[0, 1]]]), experts_per_layer=4, meta={"model": "test-moe"})
    machine = Machine(name="m", layer_seconds=1.0, links=(Link(bandwidth=0.25),) * 2)
    assert machine.rho(2) == 4.0
    done = run_plan(Plan(), trace, machine=machine, slots=4)
    # The first expert comes at 2.5, the second at 4.5.
    assert done.seconds == 0.5 + 4.0 + 0.25


# --- against the witness -----------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(
    ("rho", "slots", "options"),
    [
        ("1/2", 8, {}),
        ("2", 12, {"latency": Fraction(1, 16)}),
        ("3", 16, {"most": 1}),
        ("12", 20, {"tiles": 4}),
        ("5/4", 6, {"alpha": Fraction(1, 4)}),
    ],
)
def test_agrees_with_a_plain_event_loop(seed, rho, slots, options):
    trace = _trace(seed=seed)
    candidates = _candidates(trace, seed=seed)
    witness = Witness(slots=slots, layers=trace.layers, k=trace.top_k, rho=rho, **options)
    for token in range(trace.tokens):
        for layer in range(-1, trace.layers):
            step = token * (trace.layers + 1) + layer + 1
            offered = [
                (
                    ((layer + int(candidates.ahead[n])) % trace.layers, int(candidates.expert[n])),
                    int(candidates.score[n]),
                    int(candidates.ahead[n]),
                )
                for n in range(candidates.offset[step], candidates.offset[step + 1])
            ]
            if layer < 0:
                witness.offer(offered)
            else:
                witness.visit(layer, trace.experts[token, layer].tolist(), offered)
    machine = Machine(
        name="m",
        layer_seconds=1.0,
        alpha=float(options.get("alpha", 0.5)),
        tiles=options.get("tiles", 8),
        links=(Link(bandwidth=1.0, latency=float(options.get("latency", 0))),),
    ).with_rho(float(Fraction(rho)), trace.top_k)
    plan = Plan(candidates=candidates, prefetch_inflight=options.get("most", 2))
    done = run_plan(plan, trace, machine=machine, slots=slots)
    assert done.seconds == pytest.approx(float(witness.now), rel=1e-9)
    assert {name: getattr(done.counts, name) for name in witness.counts} == witness.counts
    assert witness.counts["useful"] and (witness.counts["late"] or float(Fraction(rho)) < 2)


# --- policies ----------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", POLICIES)
def test_every_policy_gives_every_field(policy):
    trace = _trace(60)
    result = simulate(trace, machine=UNIT, policy=policy, residency=0.5, rho=2.0, name="t")
    assert tuple(result.as_json()) == FIELDS
    assert result.tpot >= 1.0 and 0 <= result.hit_rate <= 1
    assert 0 <= result.useless <= 1 and 0 <= result.late <= 1 and 0 <= result.polluting <= 1
    again = simulate(trace, machine=UNIT, policy=policy, residency=0.5, rho=2.0, name="t")
    assert again == result


def test_belady_misses_least():
    trace = _trace(200)
    rates = {
        policy: simulate(trace, machine=UNIT, policy=policy, residency=0.4, rho=2.0).hit_rate
        for policy in ("lru", "lru-layer", "lfu", "belady")
    }
    assert max(rates, key=rates.get) == "belady"


def test_perfect_prefetch_bounds_all():
    trace = _trace(200)
    for rho in (1.0, 4.0):
        times = {
            policy: simulate(trace, machine=UNIT, policy=policy, residency=0.4, rho=rho).tpot
            for policy in ("lru", "lfu", "st-moe", "prestage", "oracle-h1", "belady", "bound")
        }
        assert min(times, key=times.get) == "bound", times
        assert times["oracle-h1"] < times["lru"]


def test_nothing_passes_the_analytic_bound():
    """Belady's loads take the link that long, and compute takes 1, whatever the schedule."""
    trace = _trace(200)
    for rho in (0.5, 1.0, 4.0, 12.0):
        cell = {"machine": UNIT, "residency": 0.4, "rho": rho, "score": "all"}
        analytic = simulate(trace, policy="bound-analytic", **cell)
        belady = simulate(trace, policy="belady", **cell)
        assert analytic.tpot == pytest.approx(max(1.0, rho * belady.bytes_per_token))
        assert analytic.hit_rate == belady.hit_rate
        assert analytic.tpot <= simulate(trace, policy="bound", **cell).tpot * (1 + 1e-9)
    assert analytic.tpot > 1


def test_what_is_counted_adds_up():
    trace = _trace(100)
    plan = Plan(candidates=_candidates(trace, seed=3), evict=Evict.NEXT_USE)
    counts = _run(plan, trace, slots=10).counts
    assert counts.demands == trace.experts.size == counts.hits + counts.misses + counts.late
    settled = counts.demand_tiles + counts.useful_tiles + counts.useless_tiles
    # What lies unused at the end is neither.
    assert settled <= counts.tiles_moved <= settled + 10 * 8
    assert counts.useful + counts.useless + counts.cancelled <= counts.issued


def test_events_are_recorded():
    trace = _trace(20)
    recorder = Recorder(first=5, tokens=2)
    simulate(trace, machine=UNIT, policy="st-moe", residency=0.3, rho=4.0, recorder=recorder)
    assert {event.token for event in recorder.events} == {5, 6}
    by_kind = {kind: [e for e in recorder.events if e.kind == kind] for kind in EventKind}
    assert len(by_kind[EventKind.ATTENTION]) == 2 * trace.layers
    assert len(by_kind[EventKind.COMPUTE]) == 2 * trace.layers * trace.top_k
    tiles = by_kind[EventKind.DEMAND_TILE] + by_kind[EventKind.PREFETCH_TILE]
    ends = sorted((event.start, event.end) for event in tiles)
    assert all(one[1] <= other[0] for one, other in zip(ends, ends[1:], strict=False))


# --- bad input ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"policy": "mru"}, "Policy must be one of resident, .*, bound-analytic, not 'mru'"),
        ({"score": "half"}, "Score must be one of second-half, all, not 'half'"),
        ({"residency": 0.0}, "Residency must be above 0 and at most 1, not 0.0"),
        ({"residency": 1.5}, "Residency must be above 0 and at most 1, not 1.5"),
        ({"rho": 0.0}, "Rho must be above 0, not 0.0"),
        (
            {"warm": (_trace(3, experts=9),)},
            "Trace to warm up with must have 4 layers, 8 experts and k = 2, but number 0 has"
            " 4, 9 and 2",
        ),
    ],
)
def test_bad_input(change, message):
    with pytest.raises(ValueError, match=message):
        simulate(
            _trace(3), **{"machine": UNIT, "policy": "lru", "residency": 0.5, "rho": 1.0, **change}
        )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layer_seconds": -1.0}, "Time of a layer must be at least 0, not -1.0"),
        ({"layer_seconds": 0.0}, "Time of a layer must be above 0, not 0.0"),
        ({"alpha": 1.5}, "Alpha must be at least 0 and at most 1, not 1.5"),
        ({"tiles": 0}, "Tile count must be at least 1, not 0"),
        ({"links": ()}, "Machine must have at least one link, but has none"),
    ],
)
def test_bad_machine(change, message):
    with pytest.raises(ValueError, match=message):
        Machine(**{"name": "m", "layer_seconds": 1.0, **change})


def test_bad_slots():
    with pytest.raises(ValueError, match="Slots must be from the 2 .* to all 32 experts, not 33"):
        _run(Plan(slots=33), _trace(3))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ahead": 0}, "Layers ahead of a candidate must be between 1 and 127, not from 0 to 0"),
        ({"expert": 4}, "Expert of a candidate must be between 0 and 3, not from 4 to 4"),
        ({"score": 256}, "Confidence of a candidate must be between 0 and 255, not from 256 to"),
        ({"offset": 3}, "Candidates must have 5 ascending offsets for 2 tokens of 1 layers, not"),
    ],
)
def test_bad_candidates(change, message):
    trace = Trace(
        experts=np.array([[[0, 1]], [[0, 2]]]), experts_per_layer=4, meta={"model": "test-moe"}
    )
    fields = {"ahead": 1, "expert": 2, "score": 200, "offset": 5, **change}
    offset = np.ones(fields.pop("offset"), np.int64)
    offset[0] = 0
    arrays = {name: np.full(1, value, np.int16) for name, value in fields.items()}
    with pytest.raises(ValueError, match=message):
        _run(Plan(candidates=Candidates(offset=offset, **arrays)), trace, slots=4)
