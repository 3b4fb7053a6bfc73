"""Benchmark of the engine."""

from prestage_tb.engine_bench import measure_victims


def test_victims(tmp_path):
    """What is measured is what the buffer states, which searches by value take longer for."""
    rows = {row["policy"]: row for row in measure_victims(output=tmp_path / "victims.json")}
    assert rows.keys() == {"LRU", "LFU", "NEXT_USE"}
    for row in rows.values():
        # No slot is skipped: only those of the layer are pinned, and they were used last.
        assert row["least"] == row["most"] == row["stated"]
        assert row["searches"] > 1000
    assert rows["LRU"]["most"] < rows["LFU"]["most"] == rows["NEXT_USE"]["most"]
