"""Time with prefetching over time without."""

import json
import os
from pathlib import Path

import numpy as np
import pytest

from prestage_hw.contract.records import Policy
from prestage_sim.evaluate.slower import BAR, SOURCES, main, time_of
from prestage_sim.traces import Trace, load_trace, save_trace

ROOT = Path(__file__).parents[2]
SHARED = Path(os.environ.get("PRESTAGE_TRACES", ROOT.parent / "shared" / "traces"))


def _trace(tokens=120, *, sequences=4):
    """A few sequences of experts take turns, each layer as the one before says."""
    rng = np.random.default_rng(5)
    known = np.stack([[rng.permutation(16)[:2] for _ in range(4)] for _ in range(sequences)])
    return Trace(
        experts=known[rng.integers(0, sequences, tokens)],
        experts_per_layer=16,
        meta={"model": "test-moe"},
    )


def test_everything_resident_takes_its_time():
    """Each expert is fetched once, and then a layer takes the time 1."""
    trace = _trace()
    time, counts = time_of(trace, source="none", residency=1.0, rho=2.0)
    different = len(np.unique(trace.experts + 16 * np.arange(4)[None, :, None]))
    assert counts["misses"] == different
    # A miss costs at most its way over the link.
    assert 1 < time <= 1 + different * 1.0 / (120 * 4)


def test_nothing_resident_takes_the_link():
    """With room for one layer alone each demand misses; compute hides behind the last expert."""
    rng = np.random.default_rng(1)
    experts = np.stack(
        [[rng.permutation(8)[:2] + 8 * (t % 2) for _ in range(4)] for t in range(50)]
    )
    trace = Trace(experts=experts, experts_per_layer=16, meta={"model": "test-moe"})
    time, counts = time_of(trace, source="none", residency=2 / 64, rho=4.0)
    assert counts["misses"] == experts.size
    # Half a layer's time, both experts over the link, and the last one's compute.
    assert time == pytest.approx(0.5 + 4.0 + 0.25)


def test_prefetching_hides_what_is_predicted():
    trace = _trace(300)
    without, _ = time_of(trace, source="st_moe", residency=0.125, rho=0.5, prefetch=False)
    prefetched, counts = time_of(trace, source="st_moe", residency=0.125, rho=0.5)
    assert counts["prefetches"] and prefetched < 0.97 * without


def test_the_throttle_stops_noise():
    trace = _trace(300, sequences=12)
    times = {
        name: time_of(trace, source="noise", residency=0.8, rho=12.0, **switches)[0]
        for name, switches in (
            ("without", {"prefetch": False}),
            ("all", {"throttle": False}),
            ("throttled", {}),
        )
    }
    assert times["all"] > 1.08 * times["without"]
    assert times["throttled"] < 1.005 * times["without"]


@pytest.mark.parametrize(
    ("source", "policy", "residency", "rho", "most"),
    [
        # Gains where the link is the bottleneck come only if a good source stays switched on.
        ("perceptron", Policy.NEXT_USE, 0.4, 12.0, 0.985),
        ("st_moe", Policy.LRU, 0.1, 2.0, 0.95),
        ("noise", Policy.LRU, 0.4, 12.0, 1.002),
    ],
)
def test_never_slower_on_a_real_trace(source, policy, residency, rho, most):
    path = SHARED / "gpt-oss-20b__business.npz"
    if not path.exists():
        pytest.skip(f"there is no {path}")
    cell = {"source": source, "policy": policy, "residency": residency, "rho": rho}
    trace = load_trace(path).first(150)
    without, _ = time_of(trace, prefetch=False, **cell)
    assert time_of(trace, **cell)[0] < most * without


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"source": "oracle"}, f"Source must be one of {', '.join(SOURCES)}, not 'oracle'"),
        ({"residency": 0}, "Residency must be above 0 and at most 1, not 0"),
        ({"rho": 0.0}, "Rho must be above 0, not 0.0"),
    ],
)
def test_bad_input(change, message):
    with pytest.raises(ValueError, match=message):
        time_of(_trace(3), **{"source": "none", "residency": 0.5, "rho": 1.0, **change})


def test_command(tmp_path, capsys):
    save_trace(tmp_path / "a.npz", _trace(20))
    out = tmp_path / "out.json"
    arguments = [str(tmp_path / "a.npz"), "--first", "15", "--source", "noise", "--rho", "2"]
    status = main([*arguments, "--residency", "0.25", "0.5", "--json", str(out)])
    cells = json.loads(out.read_text())["cells"]
    assert status == any(cell["throttled"] > BAR * cell["without"] for cell in cells)
    assert [cell["residency"] for cell in cells] == [0.25, 0.5]
    assert all(cell["without"] >= 1 for cell in cells)
    assert "\nnoise 2 | " in capsys.readouterr().out
