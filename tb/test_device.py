"""The driver on compiled RTL against the driver on the golden model.

::

    replay ─▶ Device ─▶ sim://    ─▶ counters, tables, files
         └──▶ Device ─▶ model://  ─▶ the same
"""

import time

import numpy as np
import pytest

import prestage
from prestage.cli import main
from prestage.errors import BadTableError, NoSlotError
from prestage.replay import device_config, replay
from prestage_hw.contract import DeviceConfig
from prestage_hw.contract.pattern import expert_memory, expert_pattern
from prestage_hw.contract.perceptron import perceptron_form
from prestage_hw.contract.records import TABLE_BURST, Phase
from prestage_hw.contract.registers import COUNTERS
from prestage_sim.traces import Trace, save_trace

LEARNING = [name for name in DeviceConfig.PREDICTORS if name != "none"]

DEVICES = ("model://", "sim://?latency=20")

#: Link counters depend on timing: how often acknowledges cross replies.
COMPARED = [c.name for c in COUNTERS if not c.name.startswith("link_")]


def walk(tokens, *, seed):
    """A trace in which experts follow each other."""
    rng = np.random.default_rng(seed)
    layers, experts, top_k = 4, 8, 2
    start = rng.integers(experts, size=(tokens, 1, 1))
    chosen = (start + np.arange(layers)[:, None] + np.arange(top_k) * 3) % experts
    noise = rng.permuted(np.tile(np.arange(experts), (tokens, layers, 1)), axis=-1)[..., :top_k]
    chosen = np.where(rng.random((tokens, layers, 1)) < 0.8, chosen, noise)
    return Trace(experts=chosen, experts_per_layer=experts, meta={"model": "walk"})


def config(predictor="st_moe"):
    return device_config(walk(1, seed=0), slots=10, expert_bytes=1024, predictor=predictor)


def same_tables(one, other):
    assert one.keys() == other.keys()
    for number, words in one.items():
        np.testing.assert_array_equal(words, other[number])


def replayed(url, trace, predictor, *, save_at=(), tables=None):
    saved = []
    with prestage.open(url, config=config(predictor)) as device:
        if tables:
            device.configure(tables=tables)

        def progress(done):
            if done in save_at:
                saved.append(device.snapshot())

        run = replay(device, trace, progress=progress)
        assert run.complete
        return {name: run.counters[name] for name in COMPARED}, device.snapshot(), saved


@pytest.mark.parametrize("predictor", LEARNING)
def test_saving_in_the_middle_disturbs_nothing(predictor):
    """Counters, candidates and tables are those of a replay without a save, on either device."""
    trace = walk(40, seed=3)
    plain, tables, _ = replayed(DEVICES[1], trace, predictor)
    assert plain["candidates"] > 100 and plain["prefetch_issued"] > 5
    for url in DEVICES:
        counters, end, saved = replayed(url, trace, predictor, save_at=(1, 17, 18, 33))
        assert counters == plain
        same_tables(end, tables)
        assert len(saved) == 4
    first, middle, _ = replayed(DEVICES[0], trace.first(17), predictor)
    assert first["candidates"] < plain["candidates"]
    same_tables(middle, saved[1])


@pytest.mark.parametrize("predictor", LEARNING)
def test_a_snapshot_warms_either_device(predictor):
    trace = walk(25, seed=9)
    _, learned, _ = replayed(DEVICES[0], walk(60, seed=4), predictor)
    cold, _, _ = replayed(DEVICES[0], trace, predictor)
    runs = [replayed(url, trace, predictor, tables=learned) for url in DEVICES]
    assert runs[0][0] == runs[1][0]
    same_tables(runs[0][1], runs[1][1])
    assert runs[0][0]["candidates_correct"] > cold["candidates_correct"]


@pytest.mark.parametrize("predictor", LEARNING)
def test_files_are_the_same_on_either_device(predictor, tmp_path):
    """Through the command: learn on one, go on with the other."""
    save_trace(tmp_path / "trace.npz", walk(12, seed=5))
    files = {}
    options = ["--slots", "10", "--expert-bytes", "1024", "--quiet"]
    for url in DEVICES:
        name = tmp_path / f"{url[:3]}.tables"
        for start in ([], ["--tables", str(name)]):
            command = ["replay", str(tmp_path / "trace.npz"), "--device", url, *options]
            command += ["--predictor", predictor]
            assert main([*command, *start, "--save-tables", str(name)]) == 0
        assert main(["tables", "load", str(name), "--device", url, "--slots", "10"]
                    + ["--expert-bytes", "1024"]) == 0  # fmt: skip
        files[url] = name.read_bytes()
    assert files[DEVICES[0]] == files[DEVICES[1]]


@pytest.mark.parametrize("url", DEVICES)
def test_words(url):
    """Any number of words from anywhere, and every word that isn't there."""
    rng = np.random.default_rng(2)
    with prestage.open(url, config=config()) as device:
        words = device.table_words(0)
        values = (rng.integers(8, size=words) | 3 << 16 | 1 << 18).astype(np.uint32)
        device.configure(tables={0: values})
        for start in (0, 1, words - 5, words - 1):
            for count in (1, TABLE_BURST, TABLE_BURST + 1, words - start):
                if start + count > words:
                    continue
                got = [0] * start
                device._read_words(0, got, count)
                assert got[start:] == values[start : start + count].tolist()
        for table, start, count in ((0, words, 1), (0, 1, words), (2, 0, 1), (255, 0, 1)):
            with pytest.raises(BadTableError):
                device._read_words(table, [0] * start, count)
        with pytest.raises(BadTableError):
            device._post("TABLE_WRITE", 0, words - 1, 2, *[0] * TABLE_BURST)
            device.drain()
        with pytest.raises(BadTableError):
            device._post("TABLE_READ", 0, 0, 0)
            device.drain()
        np.testing.assert_array_equal(device.save_table(0), values)


@pytest.mark.parametrize("url", DEVICES)
def test_speed(url):
    """A table of a million words takes less than a minute; about 20 cycles a word on the RTL."""
    with prestage.open(url, config=config()) as device:
        words, began, cycles = 0, time.perf_counter(), device.cycles
        while words < 10_000:
            words += len(device.save_table(0))
        seconds = time.perf_counter() - began
        if device.clocked:
            # Most of it is the predictor's, which turns a row of 8 entries for each word.
            assert (device.cycles - cycles) / words < 30
        # Measured: 30,000 to 60,000 words a second. A machine may be ten times slower.
        assert words / seconds > 2_000


@pytest.mark.parametrize("predictor", LEARNING)
@pytest.mark.parametrize("phase", [Phase.PREFILL, Phase.VERIFY])
def test_chunks(phase, predictor):
    """Several tokens a layer: what the driver counts is the same on either device."""
    found = []
    for url in DEVICES:
        rng = np.random.default_rng(6)
        with prestage.open(url, config=config(predictor)) as device:
            device.configure(hints=True, hint_threshold=0)
            for chunk in range(6):
                token = chunk if chunk % 2 else None
                device.begin_token(0, token, phase)
                for layer in range(4):
                    for _ in range(3):
                        for later in range(layer + 1, 4):
                            device.hint(0, later, int(rng.integers(8)), 200)
                            device.drain()
                        device.route(0, layer, rng.permutation(8)[:2])
                        device.drain()
                        with pytest.raises(prestage.PrestageError, match="must be released"):
                            device.route(0, layer, [0, 1])
                        assert len(list(device.wait_ready(0, layer))) == 2
                        device.release(0, layer)
                    with pytest.raises(prestage.PrestageError, match="Hint must be for a layer"):
                        device.hint(0, layer, 0)
            device.drain()
            stats = device.stats()
            found.append({name: stats[name] for name in COMPARED})
    assert found[0] == found[1]
    assert found[0]["routes"] == 6 * 4 * 3 and found[0]["prefetch_stale"] == 0
    assert found[0]["hints"] == 6 * 3 * (3 + 2 + 1) and found[0]["rejected"] == 0


def test_phases_switch_profiles():
    """Each token's phase brings its profile; counters and registers are the same on either
    device.
    """
    found = []
    names = ("profile", "profile_active", "predict_ahead", "cutoff_layer", "dma_shape", "refusal")
    for url in DEVICES:
        rng = np.random.default_rng(8)
        with prestage.open(url, config=config()) as device:
            device.configure(follow_phase=True, hint_threshold=0)
            prefill = {0: {"credits": 1, "burst_beats": 4}, 1: {"traffic": 2, "weight": 3}}
            device.configure_profile(Phase.PREFILL, prefetch=False, channels=prefill)
            device.configure_profile(Phase.VERIFY, cutoff=2, hints=True, lower_credits=1)
            registers = []
            for token in range(24):
                phase = Phase(int(rng.integers(3)))
                device.begin_token(0, token, phase)
                for layer in range(4):
                    if layer == 2 and token % 4 == 0:
                        device.switch(Phase(int(rng.integers(3))))
                    for later in range(layer, 4):
                        device.hint(0, later, int(rng.integers(8)), 200)
                    device.drain()
                    device.route(0, layer, rng.permutation(8)[:2])
                    device.drain()
                    assert len(list(device.wait_ready(0, layer))) == 2
                    device.release(0, layer)
                device.drain()
                device.write_register("profile_select", phase)
                registers.append([device.read_register(name) for name in names])
            device.write_register("profile", 3)
            assert str(device.refusal()) == (
                "Write of register profile was refused: No phase has that number."
            )
            stats = device.stats()
            found.append(({name: stats[name] for name in COMPARED}, registers))
    assert found[0] == found[1]
    counters, registers = found[0]
    assert {row[1] for row in registers} == set(Phase) and counters["hints"] > 20
    assert counters["prefetch_issued"] > 20 and counters["rejected"] == 0


@pytest.mark.parametrize("form", [pytest.param("full", marks=pytest.mark.soak), "compressed"])
def test_token_tables_behind_the_memory_port(form):
    """Rows of the token tables come and go over AXI4; counters are those of the golden model."""
    trace = walk(60, seed=5)
    layers, experts = 4, 16
    chosen = (trace.experts + 8 * (np.arange(60)[:, None, None] % 3 == 0)) % experts
    tokens = np.arange(60) % 7
    tokens[::11] = -1
    trace = Trace(experts=chosen, experts_per_layer=experts, token=tokens, meta={"model": "walk"})
    perceptron = perceptron_form(form).replace(token_rows=8, pair_rows=16, cross_rows=16)
    counters = []
    for url in DEVICES:
        device = device_config(trace, slots=20, expert_bytes=1024, predictor="perceptron")
        device = device.replace(perceptron=perceptron, form=form)
        assert device.token_memory and device.model.layers == layers
        with prestage.open(url, config=device) as opened:
            opened.configure(token_base=1 << 12)
            with pytest.raises(prestage.errors.ArgumentError, match="multiple of 4096 from 0"):
                opened.configure(token_base=100)
            opened.configure(token_base=0)
            run = replay(opened, trace)
            counters.append({name: run.counters[name] for name in COMPARED})
            tables = opened.snapshot()
    assert counters[0] == counters[1]
    assert counters[0]["candidates"] > 100 and counters[0]["parity_errors"] == 0
    assert len(tables) == sum(1 + bool(head.rows) for head in perceptron.heads)


@pytest.mark.soak
def test_layers_of_different_sizes():
    """Every byte of every expert, and counters that are the same on either device."""
    trace = walk(40, seed=9)
    sizes = (1024, 512, 2048, 1536)
    counters = []
    for url in DEVICES:
        device = device_config(trace, slots=10, expert_bytes=2048, layer_bytes=sizes)
        with prestage.open(url, config=device) as opened:
            run = replay(opened, trace)
            assert run.complete and run.bytes_checked == 40 * 2 * sum(sizes)
            counters.append({name: run.counters[name] for name in COMPARED})
            # The consumer port reads no farther than the expert goes.
            opened.route(0, 1, [2, 5])
            for ready in opened.wait_ready(0, 1):
                for over_link in (False, True):
                    whole = expert_pattern(1, ready.expert, size=512).tobytes()
                    assert opened.read(ready, over_link=over_link) == whole
                with pytest.raises(OSError, match="not valid"):
                    opened.simulated.read_slot(ready.slot)
    assert counters[0] == counters[1]
    assert counters[0]["prefetch_issued"] > 5 and counters[0]["hits"] > 20


def test_replicas():
    """Copies on either device: the same slots, the right bytes, the same counters."""
    banks = config("none").replace(replicas=2)
    image = expert_memory(banks)
    results = []
    for url in DEVICES:
        with prestage.open(url, config=banks) as device:
            found = [device.replicate(layer, 5, 2) for layer in range(3)]
            for copies in found:
                for ready in copies.values():
                    data = device.read(ready)
                    start = banks.expert_address(ready.layer, ready.expert)
                    assert data == image[start : start + banks.expert_bytes].tobytes()
                    assert device.read(ready, over_link=True) == data
            for layer in range(4):
                device.route(0, layer, [5, 6])
                readies = list(device.wait_ready(0, layer))
                slots = [ready.slot for copies in found for ready in copies.values()]
                assert [ready.slot in slots for ready in readies if ready.expert == 5] == [
                    layer < 3
                ]
                for ready in readies:
                    device.read(ready)
                device.release(0, layer)
            with pytest.raises(NoSlotError):
                for expert in range(4):
                    device.replicate(3, expert, 2)
            for layer in range(3):
                device.replicate(layer, 5, 1)
            device.sync()
            stats = device.stats()
            results.append((found, {name: stats[name] for name in COMPARED}))
    assert results[0] == results[1]
    assert results[0][1]["prefetch_bytes"] >= 6 * banks.expert_bytes
