"""Tokens that go through the layers together: batches, chunks of prompts, verified drafts."""

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from prestage_hw.contract import DeviceConfig, ModelConfig
from prestage_hw.contract.perceptron import perceptron_form
from prestage_sim.model.predictor.perceptron import TraceRunner
from prestage_sim.simulate import (
    POLICIES,
    UNIT,
    Candidates,
    EventKind,
    Evict,
    Machine,
    Phases,
    Plan,
    Recorder,
    Workload,
    simulate,
)
from prestage_sim.simulate.energy import EnergyModel, Spread
from prestage_sim.simulate.machine import Work
from prestage_sim.simulate.machines import load_machine
from prestage_sim.simulate.models import CARDS
from prestage_sim.simulate.phases import arrange, unions
from prestage_sim.simulate.result import Counts
from prestage_sim.simulate.run import run_plan
from prestage_sim.simulate.values import perceptron_values
from prestage_sim.traces import Trace

NOTHING = Spread(0, 0, 0)


def _trace(chosen, *, experts=4, **more):
    return Trace(
        experts=np.array(chosen), experts_per_layer=experts, meta={"model": "test-moe"}, **more
    )


def _random(tokens=60, *, layers=3, experts=8, k=2, seed=1, requests=1, prompt=0):
    rng = np.random.default_rng(seed)
    request = np.arange(tokens) * requests // tokens
    place = np.arange(tokens) - np.searchsorted(request, request)
    return Trace(
        experts=np.array(
            [[rng.permutation(experts)[:k] for _ in range(layers)] for _ in range(tokens)]
        ),
        experts_per_layer=experts,
        request_id=request,
        is_decode=place >= prompt,
        token=rng.integers(0, 20, tokens),
        meta={"model": "test-moe"},
    )


def _run(plan, trace, phases, *, rho=2.0, slots=4, machine=UNIT, recorder=None):
    schedule, _ = arrange([trace], phases, seed=1)
    return run_plan(
        plan,
        schedule.trace(trace),
        machine=machine.with_rho(rho, trace.top_k),
        slots=slots,
        phases=phases,
        schedule=schedule,
        recorder=recorder,
    )


# --- by hand -----------------------------------------------------------------------------------


def test_a_batch_wants_the_union():
    """1, 0, 2 come one after another, in 1 each; 1 is first, since both tokens chose it."""
    recorder = Recorder()
    done = _run(Plan(), _trace([[[0, 1]], [[1, 2]]]), Phases(batch=2), recorder=recorder)
    assert done.seconds == 0.5 + 3.0 + 0.25
    assert done.resident == 0.5 + 3 * 0.25
    counts = done.counts
    assert (counts.steps, counts.tokens, counts.demands, counts.tiles_moved) == (1, 2, 3, 24)
    assert (counts.joined, counts.shared, counts.rejected) == (1, 1, 0)
    computed = [e.expert for e in recorder.events if e.kind == EventKind.COMPUTE]
    assert computed == [1, 0, 2]


def test_arithmetic_grows_with_tokens_and_reading_with_the_union():
    """Attention is bound by arithmetic from two tokens on, an expert from three on."""
    work = Work(attention_read=0.5, attention_token=0.3, experts_read=0.5, experts_token=0.2)
    machine = Machine(name="m", layer_seconds=1.0, work=work)
    same = _trace([[[0, 1]]] * 4)
    resident = [_run(Plan(), same, Phases(batch=b), machine=machine).resident for b in (1, 2, 4)]
    # Four layers of 1; two of 0.6 and 0.5; one of 1.2 and 0.8.
    assert resident == pytest.approx([4.0, 2 * 1.1, 2.0])


def test_what_no_expert_takes_is_shared_among_those_used():
    """A shared expert and overhead take as long whether two experts are used or three."""
    work = Work(
        attention_read=0.5,
        attention_token=0.0,
        experts_read=0.3,
        experts_token=0.0,
        shared_read=0.1,
        overhead=0.1,
    )
    machine = Machine(name="m", layer_seconds=1.1, alpha=0.6 / 1.1, work=work)
    done = _run(Plan(), _trace([[[0, 1]], [[1, 2]]]), Phases(batch=2), machine=machine)
    assert done.resident == pytest.approx(0.6 + 3 * 0.15 + 0.2)


def test_prompts_go_in_chunks_and_then_decode():
    trace = _trace([[[0, 1]], [[1, 2]], [[2, 3]], [[0, 3]]], is_decode=[False, False, False, True])
    schedule, counts = arrange([trace], Phases(prefill_chunk=2), seed=1)
    assert schedule.first.tolist() == [0, 2, 3, 4] and counts == [3]
    assert schedule.prefill.tolist() == [True, True, False]
    done = _run(Plan(), trace, Phases(prefill_chunk=2), slots=3)
    # 1, 0, 2 come: 3.75. 2 is computed while 3 comes into the slot of 1: 1.75. All are there.
    assert done.seconds == 3.75 + 1.75 + 1.0
    counts = done.counts
    assert (counts.prefill_steps, counts.prefill_tokens, counts.prefill_seconds) == (2, 3, 5.5)
    assert done.prefill_resident == 1.25 + 1.0 and done.resident == 3.25


def test_drafts_take_their_time_and_are_verified_together():
    trace = _trace([[[0, 1]], [[1, 2]]])
    phases = Phases(draft=1, accept=1.0, draft_time=0.5)
    done = _run(Plan(), trace, phases)
    assert done.seconds == 0.5 + 3.75 and done.resident == 0.5 + 1.25
    assert (done.counts.steps, done.counts.tokens) == (1, 2)
    offset = np.array([0, 1, 1], np.int64)
    one = np.ones(1, np.int16)
    plan = Plan(candidates=Candidates(offset=offset, ahead=one, expert=one, score=200 * one))
    # 1 comes while the draft model works and attention is computed.
    ahead = _run(plan, trace, phases)
    assert ahead.seconds == 0.5 + 0.5 + 2.0 + 0.25
    assert ahead.counts.useful == 1
    assert _run(plan, trace, replace(phases, cutoff=0)).counts.issued == 0


def test_rejected_drafts_are_verified_in_vain():
    trace = _trace([[[0, 1]], [[1, 2]], [[2, 3]]])
    schedule, _ = arrange([trace], Phases(draft=1, accept=0.0), seed=1)
    assert schedule.first.tolist() == [0, 2, 4, 5] and schedule.progress.tolist() == [1, 1, 1]
    assert schedule.members[[0, 2, 4]].tolist() == [0, 1, 2]
    counts = _run(Plan(), trace, Phases(draft=1, accept=0.0), slots=4).counts
    assert (counts.tokens, counts.rejected, counts.joined) == (3, 2, 2)


def test_energy_is_shared_by_those_that_go_together():
    model = EnergyModel(
        token=Spread(10, 10, 10),
        step=Spread(3, 3, 3),
        expert=Spread(1, 1, 1),
        idle_watts=NOTHING,
        tile_bytes=1,
        byte=NOTHING,
    )
    # Four tokens and one rejected draft in two steps; two experts were wanted twice.
    counts = Counts(tokens=4, rejected=1, joined=3, shared=2)
    assert model(counts) == 5 * 10 - 3 * 3 - 2


# --- what must hold ----------------------------------------------------------------------------


@pytest.mark.parametrize("policy", POLICIES)
def test_one_at_a_time_is_no_phase(policy):
    trace = _random(60, requests=3, prompt=4)
    settings = {"machine": UNIT, "policy": policy, "residency": 0.5, "rho": 2.0}
    assert simulate(trace, **settings, phases=Phases()) == simulate(trace, **settings)


@pytest.mark.parametrize("evict", [Evict.LRU, Evict.LFU, Evict.NEXT_USE, Evict.BELADY])
def test_chunks_of_one_token_are_decode(evict):
    trace = _random(60, requests=3, prompt=10)
    plan = Plan(evict=evict)
    plain, chunks = (_run(plan, trace, p, slots=7) for p in (Phases(), Phases(prefill_chunk=1)))
    assert chunks.seconds == plain.seconds and chunks.resident == plain.resident
    assert chunks.counts.hits == plain.counts.hits
    assert chunks.counts.prefill_steps == 30 and plain.counts.prefill_steps == 0


@pytest.mark.parametrize("evict", [Evict.LRU, Evict.LFU, Evict.BELADY, Evict.LAYER_LRU])
@pytest.mark.parametrize("batch", [2, 3])
def test_contexts_that_do_the_same_are_one(evict, batch):
    one = _random(40)
    several = _trace(np.tile(one.experts, (batch, 1, 1)), experts=8)
    plain = _run(Plan(evict=evict), one, Phases(), slots=7)
    done = _run(Plan(evict=evict), several, Phases(batch=batch), slots=7)
    assert done.seconds == plain.seconds
    assert done.resident == pytest.approx(plain.resident)
    assert done.counts.demands == plain.counts.demands and done.counts.hits == plain.counts.hits
    assert done.counts.tokens == batch * plain.counts.tokens


def test_right_drafts_are_a_chunk():
    trace = _random(60)
    drafts = _run(Plan(), trace, Phases(draft=3, accept=1.0, draft_time=0.0), slots=12)
    chunks = _run(Plan(), trace, Phases(prefill_chunk=4, prompt=59), slots=12)
    assert drafts.seconds == pytest.approx(chunks.seconds, rel=0.05)
    schedule, _ = arrange([trace], Phases(draft=3, accept=1.0), seed=1)
    assert schedule.first.tolist() == list(range(0, 61, 4))
    assert schedule.members.tolist() == list(range(60))


def test_drafts_are_right_as_often_as_asked():
    trace = _random(6000, layers=1)
    schedule, _ = arrange([trace], Phases(draft=4, accept=0.75), seed=1)
    mean = schedule.progress.mean()
    assert mean == pytest.approx((1 - 0.75**5) / (1 - 0.75), rel=0.03)
    again, _ = arrange([trace], Phases(draft=4, accept=0.75), seed=1)
    assert again.digest() == schedule.digest()
    other, _ = arrange([trace], Phases(draft=4, accept=0.75), seed=2)
    assert other.digest() != schedule.digest()


@pytest.mark.parametrize(
    "phases",
    [
        Phases(batch=4),
        Phases(batch=7, prefill_chunk=5),
        Phases(draft=3),
        Phases(batch=3, prefill_chunk=4, prompt=6, draft=2),
    ],
)
def test_every_token_is_decoded_once(phases):
    trace = _random(200, requests=9, prompt=3)
    schedule, (steps,) = arrange([trace], phases, seed=3)
    assert steps == schedule.steps and schedule.progress.sum() == 200
    assert schedule.first[-1] == len(schedule.members)
    certain = Counter()
    position = {}
    for step in range(steps):
        for m in range(schedule.first[step], schedule.first[step + 1]):
            ctx, token = int(schedule.context[m]), int(schedule.members[m])
            if not schedule.draft[m]:
                certain[token] += 1
                # Each context goes through its segment in order.
                assert token > position.get(ctx, -1)
                position[ctx] = token
    assert max(certain.values()) == 1
    if not phases.draft:
        assert len(certain) == 200


@pytest.mark.parametrize("seed", range(3))
def test_unions_are_counted(seed):
    trace = _random(90, experts=12, k=3, seed=seed, requests=4, prompt=8)
    schedule, _ = arrange([trace], Phases(batch=3, prefill_chunk=4, draft=2), seed=seed)
    members = schedule.trace(trace)
    visits = unions(members.experts, schedule, 12)
    for step in range(schedule.steps):
        mine = members.experts[schedule.first[step] : schedule.first[step + 1]]
        for layer in range(3):
            votes = Counter(mine[:, layer].ravel().tolist())
            visit = step * 3 + layer
            part = slice(visits.first[visit], visits.first[visit + 1])
            # Sorting is stable, and a counter keeps the order of coming.
            wanted = sorted(votes, key=lambda e: -votes[e])
            assert visits.experts[part].tolist() == wanted
            assert visits.weight[part].tolist() == [votes[e] for e in wanted]
    assert visits.width == np.diff(visits.first).max()


def test_candidates_of_members_are_gathered():
    trace = _random(30, requests=2)
    schedule, _ = arrange([trace], Phases(batch=2), seed=1)
    members = schedule.trace(trace)
    rng = np.random.default_rng(1)
    counts = rng.integers(0, 5, members.tokens * 4)
    offset = np.concatenate([[0], np.cumsum(counts)])
    total = int(offset[-1])
    given = Candidates(
        offset=offset,
        ahead=rng.integers(1, 3, total).astype(np.int16),
        expert=rng.integers(0, 8, total).astype(np.int16),
        score=rng.integers(1, 200, total).astype(np.int16),
    )
    workload = Workload(
        trace=members,
        schedule=schedule,
        phases=Phases(batch=2),
        visits=unions(members.experts, schedule, 8),
        request=np.zeros(members.tokens, np.int32),
        machine=UNIT,
        slots=8,
        seed=1,
    )
    found = workload.gather(given)
    found.check(schedule.steps, layers=3, experts=8)
    for step in range(schedule.steps):
        for place in range(4):
            expected = {}
            for member in range(schedule.first[step], schedule.first[step + 1]):
                moment = member * 4 + place
                for n in range(offset[moment], offset[moment + 1]):
                    key = int(given.ahead[n]), int(given.expert[n])
                    votes, score = expected.get(key, (0, 0))
                    expected[key] = votes + 1, score + int(given.score[n])
            moment = step * 4 + place
            part = slice(found.offset[moment], found.offset[moment + 1])
            keys = list(zip(found.ahead[part].tolist(), found.expert[part].tolist(), strict=True))
            assert set(keys) == set(expected) and len(keys) == len(expected)
            for key, score in zip(keys, found.score[part].tolist(), strict=True):
                assert score == min(255, expected[key][1])
            order = [(ahead, -expected[ahead, expert][0]) for ahead, expert in keys]
            assert order == sorted(order)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize(
    "phases",
    [
        Phases(batch=4),
        Phases(prefill_chunk=5),
        Phases(draft=3),
        Phases(batch=3, prefill_chunk=4, draft=2, cutoff=2),
    ],
)
def test_every_policy_in_every_phase(policy, phases):
    trace = _random(120, experts=16, requests=6, prompt=8)
    settings = {"machine": UNIT, "policy": policy, "residency": 0.5, "rho": 2.0, "phases": phases}
    result = simulate(trace, **settings)
    assert result == simulate(trace, **settings)
    assert result.tpot >= 0.999999 and 0 <= result.hit_rate <= 1
    assert (result.prefill is not None) == (phases.prefill_chunk > 0)
    assert result.tokens_per_step >= phases.batch - 1
    bound = simulate(trace, **{**settings, "policy": "bound"})
    assert result.bytes_per_token >= 0
    assert policy in ("resident", "bound-analytic") or bound.tpot <= result.tpot


# --- predictors --------------------------------------------------------------------------------


def test_predictions_of_steps_of_one_token_are_those_of_tokens():
    trace = _random(80, requests=2)
    plain = perceptron_values(trace, "full")
    schedule, _ = arrange([trace], Phases(), seed=1)
    # A second context that never comes makes it one of several contexts.
    found = perceptron_values(trace, "full", schedule=replace(schedule, contexts=2))
    assert np.array_equal(found.chances, plain.chances)
    assert np.array_equal(found.reuse, plain.reuse)


def _runner(trace, **more):
    config = DeviceConfig(
        model=ModelConfig(name="test", layers=3, experts=8, top_k=2),
        slots=4,
        expert_bytes=512,
        predictor="perceptron",
        perceptron=perceptron_form("lite"),
    )
    return TraceRunner(config, **more)


def test_looking_at_drafts_changes_nothing():
    trace = _random(40)
    first, second = _runner(trace), _runner(trace)
    for t in range(39):
        now = trace.experts[t : t + 1], trace.token[t : t + 1]
        found, worth = first.run_all(*now)
        if t % 3 == 0:
            first.look(trace.experts[t + 1 : t + 2], trace.token[5:6], ctx=0, goes_on=False)
        again, same = second.run_all(*now)
        assert all(np.array_equal(found[h], again[h]) for h in found)
        assert np.array_equal(worth, same)


def test_a_chunk_is_gone_on_from_and_not_learned():
    trace = _random(40)
    first, second = _runner(trace), _runner(trace)
    chunk = trace.experts[:8], trace.token[:8]
    seen = first.look(*chunk, ctx=0, goes_on=True)
    untaught = second.look(*chunk, ctx=0, goes_on=True)
    # Tables are empty and stay so: each token is predicted alike whatever came before it.
    assert all(np.array_equal(seen[h], untaught[h]) for h in seen)
    assert all((seen[h] == seen[h][:1, :1]).all() for h in seen)
    assert not first.reuse(0).any()


def test_contexts_have_their_own_past():
    """What a context is told before another one's first token hangs on that one's past alone."""
    trace = _random(60)
    alone, together = _runner(trace), _runner(trace, contexts=2)
    both = np.array_equal
    found, _ = alone.run_all(trace.experts[:1], trace.token[:1])
    same, _ = together.run_all(trace.experts[:1], trace.token[:1], ctx=1)
    assert all(both(found[h], same[h]) for h in found)
    assert together.reuse(1).any() and not together.reuse(0).any()


# --- policies ----------------------------------------------------------------------------------


def _prefetched(policy, trace, phases, *, residency=0.9):
    recorder = Recorder(tokens=10_000)
    settings = {"machine": UNIT, "residency": residency, "rho": 2.0, "phases": phases}
    simulate(trace, policy=policy, recorder=recorder, **settings)
    return [e for e in recorder.events if e.kind == EventKind.PREFETCH_TILE]


def test_duoserve_streams_prompts_and_predicts_decode():
    trace = _random(120, experts=16, requests=4, prompt=20)
    schedule, _ = arrange([trace], Phases(prefill_chunk=10), seed=1)
    tiles = _prefetched("duoserve", trace, Phases(prefill_chunk=10))
    of_prompts = {e.token for e in tiles} & set(np.flatnonzero(schedule.prefill).tolist())
    assert of_prompts
    settings = {"machine": UNIT, "residency": 0.9, "rho": 2.0, "phases": Phases(prefill_chunk=10)}
    streamed = simulate(trace, policy="duoserve", **settings)
    scheduled = simulate(trace, policy="eps-moe", **settings)
    assert streamed.prefill < scheduled.prefill


def test_sp_moe_prefetches_for_the_block_up_to_its_cutoff():
    trace = _random(120, experts=16)
    tiles = _prefetched("sp-moe", trace, Phases(draft=3, cutoff=1))
    assert tiles and {e.layer for e in tiles} == {0}
    deeper = _prefetched("sp-moe", trace, Phases(draft=3, cutoff=3, draft_time=0.5))
    assert {e.layer for e in deeper} == {0, 1, 2}
    # What several tokens of a block will want comes for one layer, if there is time.
    tiles = _prefetched("sp-moe", trace, Phases(draft=3, cutoff=1, draft_time=1.0), residency=0.5)
    wanted = Counter((e.token, e.expert) for e in tiles)
    assert max(Counter(token for token, _ in wanted).values()) > trace.top_k


def test_a_cutoff_holds_for_all_candidates():
    trace = _random(200, experts=16)
    for policy in ("prestage", "prestage-rtl", "st-moe", "adap-gating"):
        phases = Phases(draft=2, cutoff=2)
        schedule, _ = arrange([trace], phases, seed=1)
        drafted = set(np.flatnonzero(schedule.drafted).tolist())
        tiles = [e for e in _prefetched(policy, trace, phases) if e.token in drafted]
        assert tiles and max(e.layer for e in tiles) < 2, policy


def test_a_larger_batch_saves_time_and_energy_a_token():
    trace = _random(240, layers=8, experts=32, k=4)
    machine = load_machine("rtx-4090-pcie4").for_model(CARDS["tinymoe"])
    found = [
        simulate(
            trace, machine=machine, policy="lru", residency=0.5, score="all", phases=Phases(batch=b)
        )
        for b in (1, 4, 16)
    ]
    for one, more in zip(found, found[1:], strict=False):
        assert more.token_seconds < one.token_seconds
        assert more.joules_per_token < one.joules_per_token


# --- bad input ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("phases", "message"),
    [
        ({"batch": 0}, "Batch must be between 1 and 4,096 tokens, not 0"),
        ({"prefill_chunk": -1}, "Prefill chunk must be between 0 and 4,096 tokens, not -1"),
        ({"draft": 5000}, "Draft must be between 0 and 4,096 tokens, not 5000"),
        ({"draft": 1, "accept": 1.5}, "Acceptance must be between 0 and 1, not 1.5"),
        ({"draft": 1, "draft_time": -1.0}, "Time of a draft must be at least 0, not -1.0"),
        ({"prompt": 3}, "A prompt of so many tokens needs a prefill chunk, but there is none"),
        ({"cutoff": 3}, "A cut-off layer needs drafts, but there are none"),
        ({"draft": 1, "cutoff": -3}, "Cut-off layer must be at least 0, not -3"),
    ],
)
def test_bad_phases(phases, message):
    with pytest.raises(ValueError, match=message):
        Phases(**phases)


@pytest.mark.parametrize(
    ("phases", "message"),
    [
        (Phases(batch=61), "Batch must be at most the trace's 60 tokens, not 61"),
        (Phases(prefill_chunk=4), "Trace has no tokens of prompts to take in chunks: --prompt N"),
    ],
)
def test_a_trace_without_such_phases(phases, message):
    with pytest.raises(ValueError, match=message):
        simulate(_random(60), machine=UNIT, policy="lru", residency=0.5, phases=phases)


def test_steps_that_count_must_decode():
    trace = _random(60, prompt=60)
    with pytest.raises(ValueError, match="Steps that count must decode, but all of them are"):
        simulate(trace, machine=UNIT, policy="lru", residency=0.5, phases=Phases(prefill_chunk=4))


def test_a_plan_has_slots_for_the_widest_layer():
    with pytest.raises(ValueError, match="Slots must be from the 3 that a layer uses to all 4"):
        _run(Plan(), _trace([[[0, 1]], [[1, 2]]]), Phases(batch=2), slots=2)
