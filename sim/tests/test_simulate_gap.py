"""The share of the gap between LRU and the bound, from times and from a trace."""

import json

import numpy as np
import pytest

from prestage_sim.simulate import UNIT, simulate
from prestage_sim.simulate.gap import gaps, main, summary
from prestage_sim.traces import Trace, save_trace


def _trace(tokens=60):
    rng = np.random.default_rng(4)
    chosen = [[rng.permutation(8)[:2] for _ in range(4)] for _ in range(tokens)]
    return Trace(experts=np.array(chosen), experts_per_layer=8, meta={"model": "test-moe"})


def test_share_of_cells_with_a_gap():
    """The better LRU counts for the gap, the global one for being slower."""
    times = {
        (0.1, 1.0): {"lru": 3.0, "lru-layer": 2.0, "bound": 1.0, "p": 1.5},
        (0.1, 4.0): {"lru": 2.0, "lru-layer": 4.0, "bound": 1.0, "p": 1.9},
        (0.6, 1.0): {"lru": 1.01, "lru-layer": 1.02, "bound": 1.0, "p": 1.02},
    }
    assert summary(times, "p") == {
        "policy": "p",
        "cells_with_a_gap": 2,
        "gap_closed": pytest.approx((0.5 + 0.1) / 2),
        "worst_over_lru": pytest.approx(1.02 / 1.01, abs=1e-5),
    }
    assert summary(times, "bound")["gap_closed"] == 1


def test_times_are_those_of_the_simulator():
    trace = _trace()
    (found,) = gaps({"t": trace}, policies=["st-moe"], residencies=[0.4], rhos=[2.0, 4.0])
    assert [row["policy"] for row in found["policies"]] == ["lru", "lru-layer", "bound", "st-moe"]
    for cell in found["cells"]:
        for policy in ("lru", "lru-layer", "bound", "st-moe"):
            one = simulate(trace, machine=UNIT, policy=policy, residency=0.4, rho=cell["rho"])
            assert cell[policy] == round(one.tpot, 5)


def test_command_prints_json(tmp_path, capsys):
    path = tmp_path / "t.npz"
    save_trace(path, _trace())
    command = [str(path), "--policy", "lru", "--residency", "0.4", "--rho", "4", "--no-cache"]
    assert main(command) == 0
    (found,) = json.loads(capsys.readouterr().out)
    assert found["trace"] == "t" and len(found["cells"]) == 1
    assert main([*command, "--policy", "mru"]) == 2
    assert "Policy must be one of" in capsys.readouterr().err
