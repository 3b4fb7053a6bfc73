"""Policies of other systems: cards, hints of the published recall, and what each of them does."""

import numpy as np
import pytest

from prestage_sim.simulate import POLICIES, UNIT, Plan, Workload, simulate
from prestage_sim.simulate.phases import Phases, arrange, unions
from prestage_sim.simulate.policies.hints import collect, hinted, hints
from prestage_sim.simulate.policies.moe_infinity import expected_activation
from prestage_sim.simulate.policies.sp_moe import cutoff_layer
from prestage_sim.traces import Trace

RIVALS = {
    "pre-gated": 1.0,
    "adap-gating": 0.90,
    "speculating-experts": 0.90,
    "speculating-experts-executed": 0.90,
    "duoserve": 0.605 ** (1 / 4),
    "sp-moe": 0.885,
    "eps-moe": None,
    "replication": 0.92,
    "moe-infinity": None,
    "promoe": 0.847,
}


def make(tokens=400, *, layers=5, experts=16, top_k=4, seed=3, requests=8, prompt=0):
    rng = np.random.default_rng(seed)
    order = rng.permuted(np.tile(np.arange(experts), (tokens, layers, 1)), axis=-1)
    return Trace(
        experts=order[..., :top_k],
        experts_per_layer=experts,
        request_id=np.arange(tokens) * requests // tokens,
        is_decode=np.arange(tokens) >= prompt,
        token=rng.integers(0, 30, tokens),
        meta={"model": "test-moe"},
    )


TRACE = make()


def plan(name, trace=TRACE, slots=24, machine=UNIT, seed=1):
    schedule, _ = arrange([trace], Phases(), seed=seed)
    workload = Workload(
        trace=trace,
        schedule=schedule,
        phases=Phases(),
        visits=unions(trace.experts, schedule, trace.experts_per_layer),
        request=trace.request_id,
        machine=machine,
        slots=slots,
        seed=seed,
    )
    return POLICIES[name].plan(workload)


def proposals(candidates, trace=TRACE):
    """Sets of what was proposed for each token and layer, and the farthest it was ahead."""
    found = {}
    for step in range(trace.tokens * (trace.layers + 1)):
        token, layer = divmod(step, trace.layers + 1)
        for n in range(candidates.offset[step], candidates.offset[step + 1]):
            ahead = int(candidates.ahead[n])
            at = (token, layer - 1 + ahead)
            found.setdefault(ahead, {}).setdefault(at, set()).add(int(candidates.expert[n]))
    return found


@pytest.mark.parametrize("name", POLICIES)
def test_every_policy_has_a_card(name):
    card = POLICIES[name].card
    for text in (card.source, card.predicts_from, card.simplified):
        assert len(text) > 4


@pytest.mark.parametrize("name", RIVALS)
def test_emulated_recall_is_that_of_the_card(name):
    candidates = plan(name).candidates
    if RIVALS[name] is None:
        return
    by_ahead = proposals(candidates)
    nearest = by_ahead[min(by_ahead)]
    right = [len(set(TRACE.experts[at]) & chosen) / 4 for at, chosen in nearest.items()]
    assert np.mean(right) == pytest.approx(RIVALS[name], abs=0.015)
    # Exactly k are hinted, so that precision is recall.
    assert {len(chosen) for chosen in nearest.values()} == {4}


@pytest.mark.parametrize("name", RIVALS)
def test_plans_hang_on_the_seed_alone(name):
    one, same, other = plan(name), plan(name), plan(name, seed=2)
    if one.candidates is None:
        assert name == "eps-moe"
        return
    assert np.array_equal(one.candidates.expert, same.candidates.expert)
    differs = not np.array_equal(one.candidates.expert, other.candidates.expert)
    assert differs == (name not in ("pre-gated", "moe-infinity"))


@pytest.mark.parametrize("name", RIVALS)
@pytest.mark.parametrize("residency", [0.05, 0.0625, 0.1, 0.3])
def test_rivals_run(name, residency):
    # Four slots are those of a layer, five leave room for one prefetch.
    result = simulate(TRACE, machine=UNIT, policy=name, residency=residency, rho=2.0)
    assert 1 <= result.tpot <= 1 + 2.0 * 2
    assert result.bytes_per_token > 0


def test_layers_ahead():
    assert set(proposals(plan("pre-gated").candidates)) == {1}
    assert set(proposals(plan("adap-gating").candidates)) == {1, 2, 3}
    assert set(proposals(plan("promoe").candidates)) == {1, 2}
    # Layer 0 is hinted at the token's start where a system does that.
    assert (5, 0) in proposals(plan("adap-gating").candidates)[1]
    assert (5, 0) not in proposals(plan("pre-gated").candidates)[1]
    # Whole tokens at their start: layer l is l + 1 decisions ahead.
    whole = proposals(plan("replication", slots=60).candidates)
    assert {ahead: {layer for _, layer in at} for ahead, at in whole.items()} == {
        n + 1: {n} for n in range(5)
    }


def test_farther_hints_are_worse():
    by_ahead = proposals(plan("adap-gating").candidates)

    def recall(ahead):
        at = [(t, m) for t, m in by_ahead[ahead] if m >= 3]
        return np.mean([len(set(TRACE.experts[a]) & by_ahead[ahead][a]) / 4 for a in at])

    assert recall(1) > recall(2) > recall(3) > 0.78


def test_double_buffers_do_not_grow():
    for name in ("pre-gated", "speculating-experts", "duoserve", "eps-moe"):
        assert plan(name, slots=60).slots == 8
        assert plan(name, slots=6).slots == 6


def test_duoserve_predicts_in_decode_only():
    trace = make(prompt=100)
    found = proposals(plan("duoserve", trace).candidates, trace)[1]
    assert min(token for token, _ in found) == 100


def test_executed_guesses_miss_only_in_layer_0():
    executed = plan("speculating-experts-executed")
    assert np.array_equal(executed.executes[:, 0], TRACE.experts[:, 0])
    share = np.mean(
        [
            len(set(a) & set(b)) / 4
            for a, b in zip(
                executed.executes[:, 1:].reshape(-1, 4),
                TRACE.experts[:, 1:].reshape(-1, 4),
                strict=True,
            )
        ]
    )
    assert share == pytest.approx(0.90, abs=0.015)
    both = [
        simulate(TRACE, machine=UNIT, policy=name, residency=0.3, rho=2.0, score="all")
        for name in ("speculating-experts-executed", "speculating-experts")
    ]
    assert both[0].precision == 1.0
    assert both[0].tpot < both[1].tpot


def test_plan_without_executes_runs_the_router():
    assert Plan().executes is None


def test_cutoff_layer():
    assert cutoff_layer(layers=24, width=4, slots=400, rho=1.0, tokens=1.0) == 24
    assert cutoff_layer(layers=24, width=4, slots=400, rho=4.0, tokens=1.0) == 6
    assert cutoff_layer(layers=24, width=4, slots=20, rho=1.0, tokens=1.0) == 4
    assert cutoff_layer(layers=24, width=4, slots=4, rho=100.0, tokens=1.0) == 1
    assert cutoff_layer(layers=24, width=4, slots=400, rho=4.0, tokens=0.25) == 2


def test_moe_infinity_recalls_a_request_like_this_one():
    # Two kinds of requests take turns; each has experts of its own.
    kind = np.arange(80) // 10 % 2
    experts = np.where(kind[:, None, None] == 0, np.arange(4), np.arange(8, 12))
    trace = Trace(
        experts=np.broadcast_to(experts, (80, 5, 4)),
        experts_per_layer=16,
        request_id=np.arange(80) // 10,
    )
    expected = expected_activation(trace, arrange([trace], Phases(), seed=1)[0], trace.request_id)
    assert expected[0].sum() == 0
    assert np.allclose(expected[1:].sum(axis=-1), 1)
    # The third request is like the first, not like the second, once a token of it was seen.
    assert set(np.flatnonzero(expected[21, 2])) == {0, 1, 2, 3}
    assert set(np.flatnonzero(expected[31, 2])) == {8, 9, 10, 11}


@pytest.mark.parametrize("recall", [0.0, 0.5, 1.0])
def test_hinted_are_distinct_and_as_right_as_asked(recall):
    found = hinted(TRACE, recall=recall, seed=(1,))
    rows = np.sort(found.reshape(-1, 4), axis=-1)
    assert (np.diff(rows, axis=-1) > 0).all()
    true = (found[..., :, None] == TRACE.experts[..., None, :]).any(axis=-1)
    assert true.mean() == pytest.approx(recall, abs=0.01)


def test_hinted_where_there_are_too_few_wrong_experts():
    trace = make(experts=5, top_k=3)
    found = hinted(trace, recall=0.0, seed=(1,))
    assert (np.diff(np.sort(found.reshape(-1, 3), axis=-1), axis=-1) > 0).all()
    true = (found[..., :, None] == trace.experts[..., None, :]).any(axis=-1)
    assert true.mean() == pytest.approx(1 / 3)


@pytest.mark.parametrize("recall", [-0.1, 1.5])
def test_recall_must_be_a_probability(recall):
    with pytest.raises(ValueError, match=f"Recall must be between 0 and 1, not {recall}"):
        hinted(TRACE, recall=recall, seed=(1,))


def test_hints_are_remembered_by_all_that_they_hang_on():
    one = hints(TRACE, {1: 0.9}, seed=1)
    assert hints(make(), {1: 0.9}, seed=1) is one
    others = [
        hints(TRACE, {1: 0.8}, seed=1),
        hints(TRACE, {1: 0.9}, seed=2),
        hints(TRACE, {1: 0.9}, seed=1, at_start=1),
        hints(TRACE, {1: 0.9}, seed=1, only=np.zeros(TRACE.tokens, bool)),
        hints(make(seed=9), {1: 0.9}, seed=1),
    ]
    assert all(other is not one for other in others)
    assert len(others[3].expert) == 0


def test_nothing_to_collect():
    candidates = collect(TRACE, [])
    assert len(candidates.expert) == 0
    assert (candidates.offset == 0).all()
    assert len(candidates.offset) == TRACE.tokens * (TRACE.layers + 1) + 1


def test_steps_are_those_of_the_plan():
    trace = make(tokens=2, layers=3)
    candidates = hints(trace, {1: 1.0, 2: 1.0}, seed=1, at_start=1)
    # Token start: layer 0. After layer 0: layers 1 and 2. After layer 1: layer 2. Then nothing.
    assert candidates.offset.tolist() == [0, 4, 12, 16, 16, 20, 28, 32, 32]
    assert candidates.ahead[:16].tolist() == [1] * 4 + [1] * 4 + [2] * 4 + [1] * 4
    assert set(candidates.expert[4:8]) == set(trace.experts[0, 1])
    assert set(candidates.expert[8:12]) == set(trace.experts[0, 2])
    assert (candidates.score == 0).all()
