"""Replication over units: by hand on small placements, and the claim on made workloads."""

import json

import numpy as np
import pytest

from prestage_sim.simulate.replication import batches, loads, main, place, spread, use_units
from prestage_sim.traces import Trace, save_trace

HOME = np.eye(4, dtype=bool)[:, [0, 1, 2, 3]]


def make(tokens=256, *, share=0.5, experts=8, layers=2, seed=1):
    """Expert 0 of a layer takes a share of all tokens."""
    rng = np.random.default_rng(seed)
    first = np.where(rng.random((tokens, layers)) < share, 0, rng.integers(1, experts, 1)[0])
    other = np.where(first == 0, rng.integers(1, experts, (tokens, layers)), first)
    return Trace(
        experts=np.where(rng.random((tokens, layers)) < share, 0, other)[..., None],
        experts_per_layer=experts,
        meta={"model": "test-moe"},
    )


def test_hot_expert_is_replicated_where_there_is_least_work():
    holds = place(np.array([9.0, 3.0, 2.0, 1.0]), HOME, 1)
    assert holds[0].all()  # 9 tokens over 1, 2, 3, then 4 units
    # Then unit 1 has most, 9 / 4 + 3, and unit 0 least and a slot left.
    assert holds[1].tolist() == [True, True, False, False]
    assert (holds[2:] == HOME[2:]).all()
    assert (place(np.array([9.0, 3.0, 2.0, 1.0]), HOME, 0) == HOME).all()
    assert (place(np.zeros(4), HOME, 2) == HOME).all()
    assert (place(np.full(4, 5.0), HOME, 2) == HOME).all()


@pytest.mark.parametrize("spare", [0, 1, 2])
def test_units_have_no_more_slots_than_they_have(spare):
    rng = np.random.default_rng(spare)
    home = np.zeros((16, 4), bool)
    home[np.arange(16), np.arange(16) % 4] = True
    # Hot experts are at home on three units, so that all replicas would go to the fourth.
    predicted = rng.random(16) * np.where(np.arange(16) % 4 == 3, 0.1, 9.0)
    held = place(predicted, home, spare).sum(axis=0)
    assert (held <= 4 + spare).all()
    assert held.max() == 4 + spare


def test_tokens_go_to_the_least_loaded_replica():
    holds = HOME.copy()
    holds[0] = True
    assert spread(np.array([6, 3, 2, 1]), holds).tolist() == [3, 3, 3, 3]
    assert spread(np.array([6, 3, 2, 1]), HOME).tolist() == [6, 3, 2, 1]


def test_batches_are_streams_side_by_side():
    trace = make(tokens=11)
    rows = batches(trace, 3)
    assert rows.tolist() == [[0, 3, 6], [1, 4, 7], [2, 5, 8]]
    found = loads(trace, rows, trace.experts[..., 0])
    assert found.sum(axis=-1).tolist() == [[3, 3]] * 3
    assert found[0, 1, 0] == (trace.experts[[0, 3, 6], 1, 0] == 0).sum()
    with pytest.raises(ValueError, match="Batch must be at most half the trace's 11 tokens, not 6"):
        batches(trace, 6)


def test_known_loads_bring_units_near_full_use():
    trace = make(tokens=2048)
    static = use_units(trace, units=4, batch=64, spare=2, plan="static")
    known = use_units(trace, units=4, batch=64, spare=2, plan="known")
    assert static.speedup == 1.0 and static.moved == 0.0
    assert static.utilisation < 0.6
    assert known.utilisation > 0.95
    assert known.speedup == pytest.approx(known.utilisation / static.utilisation)
    for plan in ("previous batch", "running mean", "predicted"):
        some = use_units(trace, units=4, batch=64, spare=2, plan=plan)
        assert static.utilisation < some.utilisation <= 1
        assert some.moved >= 0


def test_one_unit_has_nothing_to_gain():
    found = use_units(make(), units=1, batch=16, spare=4, plan="known")
    assert (found.utilisation, found.speedup, found.moved) == (1.0, 1.0, 0.0)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"units": 0}, "Units must be at least 1, not 0"),
        ({"spare": -1}, "Spare slots must be at least 0, not -1"),
        ({"batch": 0}, "Batch must be at least 1, not 0"),
        ({"plan": "luck"}, "Plan must be one of static, previous batch, .*, not 'luck'"),
    ],
)
def test_bad_numbers_are_named(change, message):
    given = {"units": 2, "batch": 8, "spare": 1, "plan": "known", **change}
    with pytest.raises(ValueError, match=message):
        use_units(make(), **given)


def test_command(tmp_path, capsys):
    save_trace(tmp_path / "one.npz", make())
    out = tmp_path / "use.json"
    options = ["--units", "4", "--batch", "16", "--spare", "2", "--json", str(out)]
    assert main([str(tmp_path / "one.npz"), *options]) == 0
    table = capsys.readouterr().out.splitlines()
    assert len(table) == 2 + 5
    assert table[2].startswith("| one | 4 | 16 | 2 | static |")
    assert [row["plan"] for row in json.loads(out.read_text())][-1] == "known"
    assert main([str(tmp_path / "one.npz"), "--batch", "1000"]) == 2
    assert "error: Batch must be at most half" in capsys.readouterr().err
