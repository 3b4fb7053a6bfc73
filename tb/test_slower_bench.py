"""The comparison of time with prefetching and without, on the simulated RTL."""

import json

import numpy as np
import pytest

from prestage.replay import device_config
from prestage_hw.contract.records import Policy
from prestage_sim.evaluate.slower import BAR
from prestage_sim.traces import Trace, save_trace
from prestage_tb.slower_bench import cycles_of, main


def _trace(tokens):
    """Layers of the tiny preset in turn want experts that those before give away."""
    experts = np.empty((tokens, 4, 2), np.int16)
    for token in range(tokens):
        for layer in range(4):
            first = (token % 3 + layer) % 8
            experts[token, layer] = sorted((first, (first + 3) % 8))
    return Trace(
        experts_per_layer=8, token=(np.arange(tokens) % 3).astype(np.int32), experts=experts
    )


def test_prefetching_what_comes_saves_time():
    trace = _trace(60)
    config = device_config(trace, slots=8, predictor="st_moe")
    times = [
        cycles_of(trace, config, rho=2, policy=Policy.LRU, prefetch=prefetch)
        for prefetch in (False, True)
    ]
    # A layer takes 512 cycles, and the link 2 * 512 for its experts, if all of them are missing.
    assert 60 * 4 * 512 < times[1] < 0.9 * times[0]
    assert times[0] > 60 * 4 * 3 * 512 * 0.8


def test_faster_link_than_the_port():
    trace = _trace(1)
    config = device_config(trace, slots=8, predictor="none")
    with pytest.raises(ValueError, match="Rho must be at least 0.5, the memory port's, not 0.4"):
        cycles_of(trace, config, rho=0.4, policy=Policy.LRU, prefetch=False)


def test_command(tmp_path, capsys):
    save_trace(tmp_path / "a.npz", _trace(12))
    out = tmp_path / "out.json"
    arguments = [str(tmp_path / "a.npz"), "--first", "10", "--source", "noise", "--rho", "2"]
    status = main([*arguments, "--residency", "0.25", "--json", str(out)])
    (cell,) = json.loads(out.read_text())["cells"]
    assert status == (cell["throttled"] > BAR * cell["without"])
    assert (cell["trace"], cell["tokens"], cell["policy"]) == ("a", 10, "lru")
    assert cell["throttled"] > 4 * 512 and cell["without"] > 4 * 512
    assert f"worst of 1: {cell['throttled'] / cell['without']:.4f}" in capsys.readouterr().out
