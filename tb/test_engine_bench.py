# amaranth: UnusedElaboratable=no
"""Benchmark of the engine."""

from prestage_hw.buffer import ExpertBuffer
from prestage_tb.engine_bench import BUFFER, measure_victims


def test_victims(tmp_path):
    """What is measured is what the buffer states."""
    rows = {row["policy"]: row for row in measure_victims(output=tmp_path / "victims.json")}
    buffer = ExpertBuffer(config=BUFFER, valued=True)
    assert rows.keys() == {"LRU", "LFU", "NEXT_USE"}
    # No slot is skipped: only those of the layer are pinned, and they were used last.
    assert rows["LRU"]["least"] == rows["LRU"]["most"] == buffer.lookup_latency
    for policy in ("LFU", "NEXT_USE"):
        assert rows[policy]["least"] == rows[policy]["most"] == buffer.search_latency
    assert all(row["searches"] > 1000 for row in rows.values())
