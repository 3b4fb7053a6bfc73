"""The golden ``perceptron`` predictor: cases worked by hand, phases, contexts, tables."""

import numpy as np
import pytest

from prestage_hw.contract import DeviceConfig, ModelConfig
from prestage_hw.contract.perceptron import FORMS, HeadConfig, PerceptronConfig, perceptron_form
from prestage_hw.contract.records import NO_TOKEN, Phase, Source, ValueKind
from prestage_sim.model.predictor.linear import create_head, head_learn, head_predict, lfsr_next
from prestage_sim.model.predictor.perceptron import PerceptronPredictor, TraceRunner
from prestage_sim.model.predictor.ranking import ranked

DECODE = int(Phase.DECODE)

MODEL = ModelConfig(name="small", layers=6, experts=16, top_k=3)


def device(perceptron="lite", *, model=MODEL, contexts=1, **changes):
    """A device with a perceptron predictor, of a named form or given."""
    if isinstance(perceptron, str):
        perceptron = perceptron_form(perceptron)
    return DeviceConfig(
        model=model,
        slots=64,
        contexts=contexts,
        predictor="perceptron",
        perceptron=perceptron.replace(token_rows=64, pair_rows=64, token_store="block", **changes),
    )


def walk(seed, *, tokens, model=MODEL, vocabulary=12):
    """A random trace with structure: a layer's choice follows from the token and the layer before.

    Returns experts ``[tokens, layers, k]`` and token ids ``[tokens]``.
    """
    random = np.random.default_rng(seed)
    likes = random.random((vocabulary, model.layers, model.experts))
    follows = random.random((model.layers, model.experts, model.experts)) ** 4
    ids = random.integers(0, vocabulary, tokens)
    chosen = np.zeros((tokens, model.layers, model.top_k), np.int16)
    for t, token in enumerate(ids):
        for layer in range(model.layers):
            score = likes[token, layer] + random.random(model.experts) * 0.3
            if layer:
                score = score + follows[layer, chosen[t, layer - 1]].sum(0)
            chosen[t, layer] = np.argsort(-score)[: model.top_k]
    return chosen, ids


def replay(predictor, chosen, ids, *, ctx=0, stamp=0, phase=DECODE):
    """Feed tokens; return the candidates of every message and the last stamp."""
    found = []
    for token, layers in zip(ids.tolist(), chosen.tolist(), strict=True):
        found.append(predictor.begin(ctx, token, phase))
        for layer, experts in enumerate(layers):
            stamp = (stamp + 1) & 0xFF
            found.append(predictor.decide(ctx, layer, experts, stamp))
    return found, stamp


def arrays(*, layers, k):
    """Unknown histories of a context: this, prev, before, memo."""
    empty = np.full((layers, k), -1, np.int16)
    return empty.copy(), empty.copy(), empty.copy(), np.full((6, layers, k), -1, np.int16)


def one_head(head, **changes):
    """A head with cleared weights, of a model with two layers, four experts and k = 1."""
    model = ModelConfig(name="hand", layers=2, experts=4, top_k=1)
    heads = (head, HeadConfig(name="P0")) if head.name == "P1" else (HeadConfig(name="P1"), head)
    config = device(PerceptronConfig(heads=heads, lanes=4, **changes), model=model)
    return create_head(config, head, number=0)


def test_random_numbers_are_those_of_the_polynomial():
    # One step of a Galois register by hand: 0x...1 shifts out a one, which the polynomial replaces.
    state = 1
    for _ in range(8):
        state = state >> 1 ^ (0xA3000000 if state & 1 else 0)
    assert lfsr_next(np.uint32(1)) == state
    seen, state = set(), np.uint32(0xACE1ACE1)
    for _ in range(10000):
        state = lfsr_next(state)
        assert state not in seen
        seen.add(state)


def test_a_first_step_of_learning_by_hand():
    head = one_head(HeadConfig(name="P1", rows=("A",), diagonals=("B",)))
    this, prev, before, memo = arrays(layers=2, k=1)
    this[0], this[1], prev[1] = 2, 3, 3
    values = np.zeros(4, np.int64)
    head_predict(head, 0, 1, 0, this, prev, before, memo, values)
    assert values.tolist() == [64, 64, 64, 64]  # floor(256 · 1 / 4), nothing learned
    used = np.array([False, False, False, True])
    head_learn(head, 0, 1, this, prev, before, memo, values, np.where(used, 256, 0), used)

    first = int(lfsr_next(np.uint32(0xACE1ACE1)))
    second = int(lfsr_next(np.uint32(first)))
    error = [-64, -64, -64, 192]
    row = [((error[j] << 3) + (first + 97 * j & 255)) >> 8 for j in range(4)]
    bias = [((error[j] << 1) + (second + 97 * j & 255)) >> 8 for j in range(4)]
    own = ((192 << 1) + (second + 97 * 3 + 59 & 255)) >> 8
    # Row (feature A, layer 1, source 2); layers x experts rows before the next feature.
    assert head.weights[4 + 2].tolist() == row
    assert head.diagonal[1, 0].tolist() == bias
    assert head.diagonal[1, 1].tolist() == [0, 0, 0, own]
    assert head.lfsr[0] == second
    assert not np.delete(head.weights, 6, 0).any() and not head.diagonal[0].any()
    head_predict(head, 0, 1, 0, this, prev, before, memo, values)
    assert values.tolist() == [
        64 + r + b + (own if e == 3 else 0) for e, (r, b) in enumerate(zip(row, bias, strict=True))
    ]


def test_weights_and_values_saturate():
    head = one_head(HeadConfig(name="P1", rows=("A",)))
    this, prev, before, memo = arrays(layers=2, k=1)
    this[0] = 2
    used = np.array([True, False, False, False])
    values = np.zeros(4, np.int64)
    for _ in range(2000):  # always told that 0 was far too low and 1 far too high
        head_learn(
            head,
            0,
            1,
            this,
            prev,
            before,
            memo,
            np.array([0, 255, 0, 0]),
            np.array([256, 0, 0, 0]),
            used,
        )
    assert head.weights[6, :2].tolist() == [127, -127]
    head_predict(head, 0, 1, 0, this, prev, before, memo, values)
    assert values.tolist() == [255, 0, 64, 64]


def test_lists_take_in_what_was_chosen_and_keep_the_strong():
    model = ModelConfig(name="hand", layers=2, experts=8, top_k=1)
    config = device(
        PerceptronConfig(
            heads=(HeadConfig(name="P1", rows=("A",)), HeadConfig(name="P0")),
            lanes=2,
            list_entries=2,
        ),
        model=model,
    )
    head = create_head(config, config.perceptron.heads[0], number=0)
    this, prev, before, memo = arrays(layers=2, k=1)
    this[0] = 5
    word = 8 + 5

    def teach(expert, value=0):
        used = np.arange(8) == expert
        head_learn(head, 0, 1, this, prev, before, memo, np.full(8, value), used * 256, used)

    teach(6)  # lane 0 holds the even experts; 6 is its number 3
    assert head.places[word].tolist() == [3, 0] and head.weights[word].tolist() == [8, 0]
    teach(4)  # the entry of 6 is strong: 4 finds no place
    assert head.places[word, 0] == 3
    teach(1)
    assert head.places[word].tolist() == [3, 0] and head.weights[word, 1] > 0
    for _ in range(40):
        teach(4, value=200)  # 6 was predicted and did not come: its entry weakens until 4 takes it
    assert head.places[word, 0] == 2


@pytest.mark.parametrize("form", sorted(FORMS))
def test_messages_and_whole_traces_give_the_same(form):
    config = device(form)
    predictor, runner = PerceptronPredictor(config), TraceRunner(config)
    chosen, ids = walk(1, tokens=60)
    values = runner.run(chosen, ids)
    found, _ = replay(predictor, chosen, ids)
    at = stamp = 0
    for t in range(len(chosen)):
        wanted = [
            (0, layer, expert, value, Source.PREDICTOR, stamp + layer + 1 & 0xFF)
            for layer in range(3)
            for expert, value in ranked(
                values[0][t, layer].tolist(),
                threshold=160 if layer else 64,
                most=3 if layer else 6,
            )
        ]
        assert found[at] == wanted
        at += 1
        for layer in range(MODEL.layers):
            stamp = stamp + 1 & 0xFF
            wanted = [
                (0, layer + h, expert, value, Source.PREDICTOR, stamp + h & 0xFF)
                for h in config.perceptron.horizons
                if layer + h < MODEL.layers
                for expert, value in ranked(
                    values[h][t, layer + h].tolist(),
                    threshold=64 if h == 1 else 160,
                    most=6 if h == 1 else 3,
                )
            ]
            assert found[at] == wanted
            at += 1


@pytest.mark.parametrize("form", sorted(FORMS))
def test_it_learns(form):
    config = device(form)
    runner = TraceRunner(config)
    chosen, ids = walk(2, tokens=600)
    values = runner.run(chosen, ids)[1]
    order = np.argsort(-values.astype(int), axis=-1, kind="stable")[..., : MODEL.top_k]
    hit = (order[..., None] == chosen[:, :, None, :]).any(-2).mean((1, 2))
    assert hit[-200:].mean() > 0.7 > 0.5 > hit[:20].mean()


def test_chunks_of_a_trace_make_no_difference():
    config = device("full")
    chosen, ids = walk(3, tokens=50)
    whole = TraceRunner(config).run(chosen, ids)
    runner = TraceRunner(config)
    parts = [runner.run(chosen[a:b], ids[a:b]) for a, b in ((0, 1), (1, 17), (17, 50))]
    for horizon, values in whole.items():
        assert np.array_equal(values, np.concatenate([part[horizon] for part in parts]))


def test_contexts_have_their_own_histories():
    chosen, ids = walk(4, tokens=40)
    # Banked weights and no token ids: two contexts are two devices.
    unknown = np.full(len(ids), NO_TOKEN)
    both = PerceptronPredictor(device("full", contexts=2, banked=True))
    alone = [PerceptronPredictor(device("full")) for _ in range(2)]
    orders = [chosen, chosen[::-1]]
    stamps = [0, 0]
    for t in range(len(ids)):
        for ctx in (0, 1):
            part = orders[ctx][t : t + 1]
            got, _ = replay(both, part, unknown[:1], ctx=ctx, stamp=stamps[ctx])
            want, stamps[ctx] = replay(alone[ctx], part, unknown[:1], stamp=stamps[ctx])
            # Random numbers are shared by the banks, so that weights differ in their last bits:
            # the contexts must not differ in what they are about.
            assert [len(c) > 0 for c in got[1:]] == [len(c) > 0 for c in want[1:]] or t < 5
            assert all(candidate[0] == ctx for message in got for candidate in message)
    assert not np.array_equal(both.histories.prev[0], both.histories.prev[1])


def test_shared_tables_learn_from_every_context():
    chosen, ids = walk(5, tokens=150)
    predictor = PerceptronPredictor(device("lite", contexts=2))
    replay(predictor, chosen, ids, ctx=0)
    warm, _ = replay(predictor, chosen[:3], ids[:3], ctx=1)
    cold, _ = replay(PerceptronPredictor(device("lite", contexts=2)), chosen[:3], ids[:3], ctx=1)
    right = [
        sum(
            candidate[2] in chosen[(at - 1) // 7, candidate[1]]
            for at, message in enumerate(found)
            if at % 7
            for candidate in message
        )
        for found in (warm, cold)
    ]
    assert right[0] > right[1]


def test_verify_adds_predictions_and_learns_from_the_certain_token_only():
    chosen, ids = walk(6, tokens=60)
    plain, verify = (PerceptronPredictor(device("full")) for _ in range(2))
    _, stamp = replay(plain, chosen[:50], ids[:50])
    replay(verify, chosen[:50], ids[:50])
    random = np.random.default_rng(0)
    more = 0
    for t in range(50, 60):
        token = int(ids[t])
        assert plain.begin(0, token, DECODE) == verify.begin(0, token, int(Phase.VERIFY))
        for layer in range(MODEL.layers):
            stamp = stamp + 1 & 0xFF
            experts = chosen[t, layer].tolist()
            assert plain.decide(0, layer, experts, stamp) == verify.decide(0, layer, experts, stamp)
            for _ in range(3):  # draft tokens
                draft = random.permutation(MODEL.experts)[: MODEL.top_k].tolist()
                more += len(verify.decide(0, layer, draft, stamp))
    assert more
    for a, b in zip(plain.heads, verify.heads, strict=True):
        for table in ("weights", "places", "maturity", "diagonal", "lfsr"):
            assert np.array_equal(getattr(a, table), getattr(b, table))


def test_prefill_learns_nothing_and_keeps_the_last_token_as_history():
    chosen, ids = walk(7, tokens=60)
    predictor = PerceptronPredictor(device("full"))
    _, stamp = replay(predictor, chosen[:40], ids[:40])
    learned = ("weights", "places", "maturity", "diagonal", "lfsr")
    before = [{name: getattr(head, name).copy() for name in learned} for head in predictor.heads]
    tables = [table.copy() for table in predictor.histories.tables]
    predictor.values()
    predictor.begin(0, NO_TOKEN, int(Phase.PREFILL))
    tables = [table.copy() for table in predictor.histories.tables]  # the token before was stored
    proposals = []
    for layer in range(MODEL.layers):
        stamp = stamp + 1 & 0xFF
        for t in range(40, 60):
            proposals.append(predictor.decide(0, layer, chosen[t, layer].tolist(), stamp))
    assert any(proposals[:20]) and not any(proposals[1:20])  # the first of each layer predicts
    for head, copy in zip(predictor.heads, before, strict=True):
        assert all(np.array_equal(getattr(head, name), copy[name]) for name in learned)
    assert {kind for kind, *_ in predictor.values()} == {ValueKind.CHANCE}  # nothing is learned
    predictor.begin(0, 3, DECODE)
    assert all(
        np.array_equal(x, y) for x, y in zip(predictor.histories.tables, tables, strict=True)
    )
    assert np.array_equal(predictor.histories.prev[0], chosen[59])


def test_reuse_values_rise_for_what_comes_back():
    model = ModelConfig(name="cycle", layers=4, experts=8, top_k=2)
    predictor = PerceptronPredictor(device("full", model=model))
    always, never = (0, 1), 7
    stamp = 0
    for _ in range(400):
        predictor.begin(0, NO_TOKEN, DECODE)
        for layer in range(model.layers):
            stamp = stamp + 1 & 0xFF
            predictor.decide(0, layer, list(always), stamp)
        given = predictor.values()
    beats = [beat[1:] for beat in given if beat[0] == ValueKind.REUSE]
    assert [beat[:3] for beat in beats] == [(0, layer, 0) for layer in range(4)]
    for _, _, _, values in beats:
        assert min(values[e] for e in always) > 240 > 40 > values[never]
    # Chances of all layers at token start, then of each that is predicted from the one before.
    chances = [beat[2] for beat in given if beat[0] == ValueKind.CHANCE]
    assert chances[:4] == [0, 1, 2, 3] and set(chances[4:]) <= {1, 2, 3} and len(chances) > 6


@pytest.mark.parametrize("form", sorted(FORMS))
def test_chances_are_the_confidence_of_candidates(form):
    """Without hints a candidate's score is what the stream of values says of the expert."""
    chosen, ids = walk(11, tokens=40)
    predictor = PerceptronPredictor(device(form))
    predictor.threshold = predictor.far_threshold = 1
    lanes, latest, stamp, compared = predictor.config.predictor_lanes, {}, 0, 0
    for t, token in enumerate(ids.tolist()):
        calls = [lambda token=token: predictor.begin(0, token, DECODE)]
        for layer in range(MODEL.layers):
            stamp = stamp + 1 & 0xFF
            experts = chosen[t, layer].tolist()
            calls.append(lambda args=(0, layer, experts, stamp): predictor.decide(*args))
        for call in calls:
            candidates = call()
            for kind, _, layer, beat, values in predictor.values():
                if kind == ValueKind.CHANCE:
                    for lane, value in enumerate(values):
                        latest[layer, beat * lanes + lane] = value
            for _, layer, expert, score, _, _ in candidates:
                assert latest[layer, expert] == score
                compared += 1
    assert compared > 40 * MODEL.top_k


@pytest.mark.parametrize("form", sorted(FORMS))
def test_tables_written_back_give_the_same_predictions(form):
    chosen, ids = walk(8, tokens=40)
    config = device(form)
    learned = PerceptronPredictor(config)
    replay(learned, chosen, ids)
    fresh = PerceptronPredictor(config)
    table = 0
    while words := learned.table_words(table):
        assert fresh.table_words(table) == words
        for word in range(words):
            value = learned.read_table(table, word)
            fresh.write_table(table, word, value)
            assert fresh.read_table(table, word) == value
        assert learned.read_table(table, words) == 0
        table += 1
    assert table >= 5
    for a, b in zip(learned.heads, fresh.heads, strict=True):
        for name in ("weights", "places", "maturity", "diagonal"):
            assert np.array_equal(getattr(a, name), getattr(b, name)), name
    for x, y in zip(learned.histories.tables, fresh.histories.tables, strict=True):
        assert np.array_equal(x, y)


def test_clear_forgets_everything():
    chosen, ids = walk(9, tokens=30)
    predictor = PerceptronPredictor(device("compressed"))
    first = replay(predictor, chosen, ids)
    predictor.hint(0, MODEL.layers - 1, 1, 200, 1)
    predictor.clear()
    predictor.values()
    assert replay(predictor, chosen, ids) == first


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "P4"}, "Head name must be one of P1, P2, P3, P0, R, not 'P4'"),
        ({"rows": ("X",)}, "Row features of P1 must be among A, C, .*, not 'X'"),
        ({"rows": ("A", "A")}, r"Row features of P1 must be distinct, not \('A', 'A'\)"),
        ({"crosses": ("CC",)}, "Crosses of P1 must be among AC, AA, AB, not 'CC'"),
        ({"name": "P0", "rows": ("A",)}, "Feature A of P0 is not known at token start"),
        ({"name": "R", "rows": ("T",)}, "Features of R must be among B, Bn, Bp, G, S, not 'T'"),
        ({"name": "P0", "crosses": ("AC",)}, "Crosses need this token's choices, which P0"),
    ],
)
def test_heads_refuse(changes, message):
    with pytest.raises(ValueError, match=message):
        HeadConfig(**{"name": "P1", **changes})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"heads": (HeadConfig(name="P1"),)}, "Heads must include P0, but are P1"),
        (
            {"heads": (HeadConfig(name="P0"), HeadConfig(name="P1"))},
            "Heads must be distinct and in the order P1, P2, P3, P0, R, not P0, P1",
        ),
        ({"lanes": 3}, "Lane count must be a power of two, not 3"),
        ({"list_entries": 12}, "List length must be a power of two, not 12"),
        ({"token_store": "disk"}, "Token store must be one of block, memory, not 'disk'"),
        ({"token_rows": 100}, "Rows of the token table must be a power of two, not 100"),
    ],
)
def test_perceptrons_refuse(changes, message):
    with pytest.raises(ValueError, match=message):
        perceptron_form("lite").replace(**changes)


def test_devices_refuse_what_does_not_fit_the_model():
    with pytest.raises(ValueError, match="Horizon must be below the layer count 3, not 3"):
        device("full", model=ModelConfig(name="flat", layers=3, experts=16, top_k=3))
    with pytest.raises(ValueError, match="List length must be from 8 lanes to below 8 experts"):
        device("compressed", model=ModelConfig(name="few", layers=4, experts=8, top_k=2))
    with pytest.raises(ValueError, match="Predictor form must be one of lite, .*, not 'huge'"):
        DeviceConfig(model=MODEL, slots=64, form="huge")
    with pytest.raises(ValueError, match="Predictor must be perceptron, not 'none'"):
        PerceptronPredictor(DeviceConfig(model=MODEL, slots=64, predictor="none"))
