"""Golden predictors: hand-worked cases, a second reading of the specification, invariants."""

import os
import random
from pathlib import Path

import numpy as np
import pytest

from prestage_hw.contract import PRESETS, DeviceConfig, ModelConfig
from prestage_sim.model.predictor import PREDICTORS, create_predictor
from prestage_sim.profile import correlation_profile

_TRACES = Path(os.environ.get("PRESTAGE_TRACES", "/work/shared/traces"))
_VALID = 1 << 18


def _device(*, contexts=1, successors=0, predictor="st_moe", **shape):
    model = ModelConfig(name="test", **shape)
    return DeviceConfig(
        model=model,
        slots=contexts * model.top_k,
        contexts=contexts,
        successors=successors,
        predictor=predictor,
    )


def _entry(expert, confidence):
    return expert | confidence << 16 | _VALID


class SecondReading:
    """The specification of ``st_moe`` once more, slowly: every table is one dict.

    A missing key is an invalid entry. First touch is a counter.
    """

    def __init__(self, config):
        self.config = config
        self.entries = {}  # (layer, source, position): (expert, confidence)
        self.history = {}  # (ctx, layer): experts
        self.previous = {}  # ctx: layer

    def begin(self, ctx):
        self.previous.pop(ctx, None)

    def decide(self, ctx, layer, ids, stamp):
        config, model = self.config, self.config.model
        candidates = []
        if layer < model.layers - 1:
            score = dict.fromkeys(range(model.experts), 0)
            first = {}
            for s in ids:
                for j in range(config.successors):
                    if (layer, s, j) in self.entries:
                        expert, confidence = self.entries[layer, s, j]
                        score[expert] += confidence
                        first.setdefault(expert, len(first))
            for h in self.history.get((ctx, layer + 1), ()):
                score[h] += 2
                first.setdefault(h, len(first))
            wanted = {e for e in score if score[e] >= 2}
            for e in sorted(wanted, key=lambda e: (-score[e], first[e])):
                candidates.append((ctx, layer + 1, e, score[e], 0, (stamp + 1) % 256))
        if self.previous.get(ctx, -9) == layer - 1:
            for s in self.history[ctx, layer - 1]:
                places = [(layer - 1, s, j) for j in range(config.successors)]
                marked = set()
                still_open = []
                for place in places:
                    expert, confidence = self.entries.get(place, (None, 0))
                    if expert in ids:
                        self.entries[place] = (expert, min(3, confidence + 1))
                        marked.add(expert)
                    elif place in self.entries and confidence > 0:
                        self.entries[place] = (expert, confidence - 1)
                    else:
                        still_open.append(place)
                for place in still_open:
                    free = [y for y in ids if y not in marked]
                    if free:
                        self.entries[place] = (free[0], 2)
                        marked.add(free[0])
        self.history[ctx, layer] = list(ids)
        self.previous[ctx] = layer
        return candidates


def _correlation_word(config, layer, source, position):
    rows = 1 << (config.model.experts - 1).bit_length()
    entries = 1 << (config.successors - 1).bit_length()
    return (layer * rows + source) * entries + position


def _history_word(config, ctx, layer, index):
    layers = 1 << (config.model.layers - 1).bit_length()
    indices = 1 << (config.model.top_k - 1).bit_length()
    return (ctx * layers + layer) * indices + index


def test_worked_by_hand():
    config = _device(layers=3, experts=8, top_k=2, successors=2)
    golden = create_predictor(config)

    def row(layer, source):
        return [golden.read_table(0, _correlation_word(config, layer, source, j)) for j in (0, 1)]

    # Token 0 meets empty tables and fills rows with what followed, in router order.
    golden.begin(0, 11, 1)
    assert golden.decide(0, 0, [1, 2], 1) == []
    assert golden.decide(0, 1, [3, 4], 2) == []
    assert golden.decide(0, 2, [5, 6], 3) == []
    assert row(0, 1) == row(0, 2) == [_entry(3, 2), _entry(4, 2)]
    assert row(1, 3) == row(1, 4) == [_entry(5, 2), _entry(6, 2)]
    # Token 1: 2 from the row of expert 2, none from that of 7, 2 from the history.
    golden.begin(0, 12, 1)
    assert golden.decide(0, 0, [2, 7], 4) == [(0, 1, 3, 4, 0, 5), (0, 1, 4, 4, 0, 5)]
    assert golden.decide(0, 1, [4, 6], 5) == [(0, 2, 5, 4, 0, 6), (0, 2, 6, 4, 0, 6)]
    assert row(0, 2) == [_entry(3, 1), _entry(4, 3)]
    assert row(0, 7) == [_entry(4, 2), _entry(6, 2)]
    # Token 2: 4 = 3 + 2 + 2, 3 = 1 + 2, 6 from the history alone.
    golden.begin(0, 13, 1)
    assert golden.decide(0, 0, [2, 1], 255) == [
        (0, 1, 4, 7, 0, 0),
        (0, 1, 3, 3, 0, 0),
        (0, 1, 6, 2, 0, 0),
    ]
    golden.decide(0, 1, [0, 6], 0)
    assert row(0, 2) == [_entry(3, 0), _entry(4, 2)]
    assert row(0, 1) == [_entry(3, 1), _entry(4, 1)]
    # Token 3: an entry that fell to 0 is replaced when it misses again, by the first of the choice.
    golden.begin(0, 14, 1)
    assert golden.decide(0, 0, [2, 5], 1) == [
        (0, 1, 4, 2, 0, 2),
        (0, 1, 0, 2, 0, 2),
        (0, 1, 6, 2, 0, 2),
    ]
    golden.decide(0, 1, [7, 0], 2)
    assert row(0, 2) == [_entry(7, 2), _entry(4, 1)]
    assert row(0, 5) == [_entry(7, 2), _entry(0, 2)]


def test_touch_without_confidence_counts():
    config = _device(layers=2, experts=8, top_k=2, successors=2)
    golden = create_predictor(config)
    golden.write_table(0, _correlation_word(config, 0, 2, 0), _entry(3, 0))
    golden.write_table(0, _correlation_word(config, 0, 2, 1), _entry(4, 2))
    for index, expert in enumerate((6, 3)):
        golden.write_table(1, _history_word(config, 0, 1, index), expert | _VALID)
    ranked = golden.decide(0, 0, [2, 5], 0)
    assert [(c[2], c[3]) for c in ranked] == [(3, 2), (4, 2), (6, 2)]


def test_learns_only_from_the_layer_before():
    config = _device(layers=3, experts=8, top_k=2, successors=2)
    golden = create_predictor(config)
    golden.decide(0, 0, [1, 2], 1)
    golden.decide(0, 2, [3, 4], 2)  # jumps over layer 1
    golden.decide(0, 0, [1, 2], 3)
    golden.begin(0, 0, 1)
    golden.decide(0, 1, [3, 4], 4)  # a new token between the two
    assert not any(golden.read_table(0, word) for word in range(golden.table_words(0)))
    golden.decide(0, 0, [1, 2], 5)
    golden.decide(0, 0, [5, 6], 6)  # the same layer twice: the later choice counts
    golden.decide(0, 1, [3, 4], 7)
    assert golden.read_table(0, _correlation_word(config, 0, 1, 0)) == 0
    assert golden.read_table(0, _correlation_word(config, 0, 5, 0)) == _entry(3, 2)


@pytest.mark.parametrize(
    "shape",
    [
        {"layers": 4, "experts": 8, "top_k": 2, "contexts": 2},
        {"layers": 3, "experts": 60, "top_k": 4, "successors": 5, "contexts": 3},
        {"layers": 5, "experts": 4, "top_k": 4, "successors": 2},
        {"layers": 2, "experts": 9, "top_k": 1, "successors": 1},
        {"layers": 1, "experts": 4, "top_k": 2},
        {"layers": 6, "experts": 40, "top_k": 6, "successors": 32},
    ],
)
def test_second_reading_agrees(shape):
    config = _device(**shape)
    golden, second = create_predictor(config), SecondReading(config)
    model, generator = config.model, random.Random(str(shape))
    layers = [0] * config.contexts
    proposed = 0
    for stamp in range(1500):
        ctx = generator.randrange(config.contexts)
        layer = layers[ctx] if generator.random() < 0.9 else generator.randrange(model.layers)
        layers[ctx] = (layer + 1) % model.layers
        if layer == 0 or generator.random() < 0.05:
            golden.begin(ctx, 0, 1)
            second.begin(ctx)
        pool = range(min(model.experts, 3 * model.top_k)) if stamp % 3 else range(model.experts)
        choice = generator.sample(pool, model.top_k)
        ranked = golden.decide(ctx, layer, choice, stamp & 0xFF)
        assert ranked == second.decide(ctx, layer, choice, stamp & 0xFF)
        assert len({c[2] for c in ranked}) == len(ranked)
        assert [c[3] for c in ranked] == sorted((c[3] for c in ranked), reverse=True)
        assert all(2 <= c[3] <= 3 * model.top_k + 2 for c in ranked)
        proposed += len(ranked)
    assert proposed or model.layers == 1
    for layer in range(model.layers - 1):
        for source in range(model.experts):
            row = []
            for position in range(config.successors):
                word = golden.read_table(0, _correlation_word(config, layer, source, position))
                expected = second.entries.get((layer, source, position))
                assert word == (0 if expected is None else _entry(*expected))
                if word:
                    row.append(word & 0xFFFF)
                    assert 0 <= word >> 16 & 3 <= 3
            assert len(set(row)) == len(row)
    for ctx in range(config.contexts):
        for layer in range(model.layers):
            for index in range(model.top_k):
                word = golden.read_table(1, _history_word(config, ctx, layer, index))
                experts = second.history.get((ctx, layer))
                assert word == (0 if experts is None else experts[index] | _VALID)


def test_confidence_saturates():
    config = _device(layers=2, experts=4, top_k=1, successors=1)
    golden = create_predictor(config)
    seen = []
    for chosen in (1, 1, 1, 2, 2, 2, 2, 2):
        golden.begin(0, 0, 1)
        golden.decide(0, 0, [3], 0)
        golden.decide(0, 1, [chosen], 0)
        word = golden.read_table(0, _correlation_word(config, 0, 3, 0))
        seen.append((word & 0xFFFF, word >> 16 & 3))
    assert seen == [(1, 2), (1, 3), (1, 3), (1, 2), (1, 1), (1, 0), (2, 2), (2, 3)]


def test_contexts_share_rows_but_not_history():
    config = _device(layers=2, experts=8, top_k=2, successors=2, contexts=2)
    golden = create_predictor(config)
    golden.decide(0, 0, [1, 2], 1)
    golden.decide(0, 1, [3, 4], 2)
    ranked = golden.decide(1, 0, [1, 5], 1)
    assert ranked == [(1, 1, 3, 2, 0, 2), (1, 1, 4, 2, 0, 2)]


def test_tables_from_outside():
    config = _device(layers=3, experts=5, top_k=3, successors=3, contexts=2)
    golden = create_predictor(config)
    assert golden.table_words(0) == 2 * 8 * 4
    assert golden.table_words(1) == 2 * 4 * 4
    assert golden.table_words(2) == 0
    for table in range(3):
        for word in range(golden.table_words(table) + 3):
            golden.write_table(table, word, _entry(4, 3))
    for word in range(64):
        real = word % 4 < 3 and word // 4 % 8 < 5
        assert golden.read_table(0, word) == (_entry(4, 3) if real else 0)
    for word in range(32):
        real = word % 4 < 3 and word // 4 % 4 < 3
        assert golden.read_table(1, word) == (4 | _VALID if real else 0)
    assert golden.read_table(0, 64) == golden.read_table(1, 32) == golden.read_table(2, 0) == 0
    # Every entry is the same expert: the score stays within what a sound table can give.
    assert golden.decide(0, 0, [0, 1, 2], 0) == [(0, 1, 4, 3 * 3 + 2, 0, 1)]
    # Experts that do not exist.
    golden.write_table(0, 0, _entry(5, 3))
    assert golden.read_table(0, 0) == 0
    golden.write_table(1, _history_word(config, 1, 2, 1), 5 | _VALID)
    row = [golden.read_table(1, _history_word(config, 1, 2, i)) for i in range(3)]
    assert row == [4, 0, 4]
    # Only the first word of a history row makes it valid or invalid.
    golden.write_table(1, _history_word(config, 1, 2, 1), 3 | _VALID)
    assert golden.read_table(1, _history_word(config, 1, 2, 1)) == 3
    golden.write_table(1, _history_word(config, 1, 2, 0), 1 | _VALID)
    assert golden.read_table(1, _history_word(config, 1, 2, 1)) == 3 | _VALID
    golden.write_table(1, _history_word(config, 1, 2, 0), 1)
    assert golden.read_table(1, _history_word(config, 1, 2, 1)) == 3
    golden.clear()
    for table in range(2):
        assert not any(golden.read_table(table, w) for w in range(golden.table_words(table)))


def test_clear_forgets_the_previous_layer():
    config = _device(layers=2, experts=8, top_k=2, successors=2)
    golden = create_predictor(config)
    golden.decide(0, 0, [1, 2], 1)
    golden.clear()
    golden.decide(0, 1, [3, 4], 2)
    assert not any(golden.read_table(0, word) for word in range(golden.table_words(0)))


def test_history_made_invalid_teaches_nothing():
    config = _device(layers=2, experts=8, top_k=2, successors=2)
    golden = create_predictor(config)
    golden.decide(0, 0, [1, 2], 1)
    golden.write_table(1, _history_word(config, 0, 0, 0), 1)
    golden.decide(0, 1, [3, 4], 2)
    assert not any(golden.read_table(0, word) for word in range(golden.table_words(0)))


def test_none():
    golden = create_predictor(_device(layers=2, experts=8, top_k=2, predictor="none"))
    golden.begin(0, 1, 1)
    golden.write_table(0, 0, _entry(1, 2))
    assert golden.decide(0, 0, [1, 2], 1) == golden.decide(0, 1, [1, 2], 2) == []
    assert golden.table_words(0) == golden.read_table(0, 0) == 0
    golden.clear()


def test_registry_is_that_of_the_contract():
    assert tuple(PREDICTORS) == DeviceConfig.PREDICTORS


@pytest.mark.parametrize("make", [create_predictor, *PREDICTORS.values()])
def test_rejects_what_is_no_configuration(make):
    with pytest.raises(TypeError, match="Configuration must be a DeviceConfig, not 3"):
        make(3)


def test_profile():
    config = _device(layers=2, experts=5, top_k=2, successors=3)
    experts = [[[0, 1], [2, 3]], [[0, 2], [3, 4]], [[0, 3], [4, 3]]]
    words = correlation_profile(experts, config=config)
    assert words.dtype == np.uint32
    assert len(words) == create_predictor(config).table_words(0)
    rows = words.reshape(8, 4)
    assert rows[0].tolist() == [_entry(3, 2), _entry(4, 2), _entry(2, 2), 0]
    assert rows[1].tolist() == [_entry(2, 2), _entry(3, 2), 0, 0]
    assert not rows[4:].any()


def test_profile_rejects():
    config = _device(layers=2, experts=5, top_k=2)
    with pytest.raises(TypeError, match="Configuration must be a DeviceConfig, not None"):
        correlation_profile([], config=None)
    with pytest.raises(TypeError, match="Experts must be integers, not float64"):
        correlation_profile(np.zeros((1, 2, 2)), config=config)
    with pytest.raises(ValueError, match=r"shape \[tokens, 2, 2\], not \[1, 3, 2\]"):
        correlation_profile(np.zeros((1, 3, 2), dtype=int), config=config)
    with pytest.raises(ValueError, match="between 0 and 4, but are 0 to 5"):
        correlation_profile([[[0, 1], [0, 5]]], config=config)


@pytest.mark.parametrize(
    ("name", "preset", "tokens"),
    [("gpt-oss-20b__cs", "gpt-oss-20b", 80), ("qwen3-30b-a3b__techqa", "qwen3-30b-a3b", 30)],
)
def test_real_trace(name, preset, tokens):
    """Both readings agree on a real trace."""
    path = _TRACES / f"{name}.npz"
    if not path.exists():
        pytest.skip(f"trace {path} is not here")
    with np.load(path) as trace:
        experts = trace["experts"][:tokens]
    shape = PRESETS[preset]
    model = ModelConfig(
        name=preset, layers=shape.layers, experts=shape.experts, top_k=experts.shape[2]
    )
    config = DeviceConfig(model=model, slots=model.top_k)
    golden, second = create_predictor(config), SecondReading(config)
    for token in experts.tolist():
        golden.begin(0, 0, 1)
        second.begin(0)
        for layer, choice in enumerate(token):
            assert golden.decide(0, layer, choice, 9) == second.decide(0, layer, choice, 9)
