"""Golden trust in hints: by hand, against a second reading, and what it is worth on a trace."""

import random
from pathlib import Path

import numpy as np
import pytest

from prestage_hw.contract import PRESETS, DeviceConfig, ModelConfig
from prestage_hw.contract.perceptron import perceptron_form
from prestage_sim.model.predictor.perceptron import TraceRunner
from prestage_sim.model.predictor.ranking import ranked
from prestage_sim.model.predictor.trust import Trust
from prestage_sim.traces import load_trace

_TRACES = Path(__file__).resolve().parents[2] / "models" / "tinymoe" / "traces"

#: Tokens that a test runs, and those at its beginning in which trust is still learned.
_TOKENS, _LEARNING = 1000, 200


def _device(*, contexts=1, hints=True, **shape):
    model = ModelConfig(name="test", **{"layers": 8, "experts": 16, "top_k": 2, **shape})
    return DeviceConfig(
        model=model,
        slots=contexts * model.top_k,
        contexts=contexts,
        predictor="perceptron",
        perceptron=perceptron_form("lite").replace(hints=hints),
    )


def _values(config, **changes):
    values = [10] * config.model.experts
    for expert, value in changes.items():
        values[int(expert[1:])] = value
    return values


# --- ranking


def test_ranks_by_value_then_number():
    assert ranked([5, 9, 9, 0, 200], threshold=5, most=9) == [(4, 200), (1, 9), (2, 9), (0, 5)]
    assert ranked([5, 9, 9, 0, 200], threshold=0, most=2) == [(4, 200), (1, 9)]
    assert ranked([1, 2], threshold=3, most=2) == []


# --- by hand


def test_new_trust_changes_nothing():
    config = _device()
    trust = Trust(config)
    assert trust.value(0, 3, 5) == 0
    assert trust.written(0, 3, _values(config, e5=77)) == _values(config, e5=77)
    assert trust.hint(0, 3, 5, 255) == 77
    assert trust.value(0, 3, 5) == 77


def test_values_take_trust_of_distance_and_bin():
    trust = Trust(_device())
    for distance in range(4):
        for score_bin in range(8):
            trust.trust[distance][score_bin] = 10 * distance + score_bin
    trust.routed(0, 0, [0, 1])
    for layer, distance in ((1, 0), (2, 1), (3, 2), (4, 3)):
        assert trust.hint(0, layer, 3, 96) == 10 * distance + 3
        assert trust.hint(0, layer, 4, 95) == 10 * distance + 2
    # Farther away counts as 4 layers; the token has none routed after its start.
    trust.begin(0)
    assert trust.hint(0, 7, 0, 255) == 37
    assert trust.hint(0, 0, 0, 255) == 7


def test_values_stay_within_their_range():
    config = _device()
    trust = Trust(config)
    trust.written(0, 0, _values(config, e1=250, e2=3))
    trust.trust[0] = [200] * 4 + [-200] * 4
    assert trust.hint(0, 0, 1, 0) == 255
    assert trust.hint(0, 0, 2, 255) == 0


def test_a_head_writes_below_the_hints():
    config = _device()
    trust = Trust(config)
    trust.trust[0] = [40] * 8
    trust.hint(0, 0, 1, 255)
    trust.hint(0, 0, 9, 255)
    assert trust.written(0, 0, _values(config)) == _values(config, e1=50, e9=50)
    assert trust.written(0, 1, _values(config)) == _values(config)
    # Once the layer was routed, values are those of the head.
    trust.routed(0, 0, [1, 2])
    assert trust.written(0, 0, _values(config)) == _values(config)


def test_ignores_what_cannot_count():
    config = _device(contexts=2)
    trust = Trust(config)
    assert trust.hint(0, 2, 1, 255) == 0
    assert trust.hint(0, 2, 1, 0) is None  # repeated
    assert trust.hint(0, 6, 1, 255) is None  # place of layer 2
    assert trust.hint(1, 6, 1, 255) == 0
    for expert in (2, 3, 4):
        assert trust.hint(0, 2, expert, 255) == 0
    assert trust.hint(0, 2, 5, 255) is None  # 2k of them
    trust.routed(0, 2, [8, 9])
    for layer in range(3):
        assert trust.hint(0, layer, 7, 255) is None  # passed
    assert trust.hint(0, 6, 1, 255) == 0  # the place is free again
    trust.begin(0)
    assert trust.hint(0, 2, 1, 255) == 0


def test_begin_forgets_hints_without_learning():
    trust = Trust(_device())
    trust.hint(0, 0, 1, 255)
    trust.begin(0)
    trust.routed(0, 0, [1, 2])
    assert trust.trust == [[0] * 8] * 4


def test_learns_by_one_at_most():
    config = _device()
    trust = Trust(config)
    for _ in range(800):
        trust.begin(0)
        trust.hint(0, 0, 1, 255)
        trust.hint(0, 0, 2, 10)
        before = [trust.trust[0][7], trust.trust[0][0]]
        trust.routed(0, 0, [1, 3])
        # Certain and right: a step each time, up to the end. A value of 0 cannot be too high.
        assert trust.trust[0][7] in (before[0], before[0] + 1)
        assert trust.trust[0][0] == 0
    assert trust.trust[0][7] > 200
    for _ in range(3000):
        trust.begin(0)
        trust.written(0, 0, _values(config, e1=255))
        trust.hint(0, 0, 1, 255)
        trust.routed(0, 0, [3, 4])
    # The value was sure of what is wrong all the time, and so was the hint.
    assert trust.trust[0][7] == pytest.approx(-255, abs=10)


def test_clear_forgets_everything():
    config = _device()
    fresh = Trust(config)
    trust = Trust(config)
    for _ in range(9):
        trust.written(0, 1, _values(config, e1=100))
        trust.hint(0, 1, 1, 255)
        trust.routed(0, 1, [1, 2])
    assert trust.trust != fresh.trust
    trust.clear()
    assert vars(trust) == vars(fresh)


def test_without_hints_all_are_ignored():
    config = _device(hints=False)
    trust = Trust(config)
    assert trust.hint(0, 0, 1, 255) is None
    assert trust.written(0, 0, _values(config)) == _values(config)
    trust.routed(0, 0, [1, 2])
    assert trust.trust == [[0] * 8] * 4


def test_rejects_what_is_no_perceptron():
    with pytest.raises(TypeError, match="Configuration must be a DeviceConfig, not 3"):
        Trust(3)
    config = DeviceConfig(model=PRESETS["tiny"], slots=8, predictor="st_moe")
    with pytest.raises(ValueError, match="must have a perceptron predictor"):
        Trust(config)


# --- a second reading


class SecondReading:
    """The section "Hints" of the specification once more, with one flat list of hints."""

    def __init__(self, config):
        self.most = 2 * config.model.top_k
        self.v = {}
        self.hints = []  # [ctx, layer, expert, distance, bin, p]
        self.last = {}
        self.trust = {}
        self.random = 0xACE1ACE1 + 7

    def on_top(self, hint):
        ctx, layer, expert, d, b, _ = hint
        hint[5] = self.v.get((ctx, layer, expert), 0)
        return min(255, max(0, hint[5] + self.trust.get((d, b), 0)))

    def begin(self, ctx):
        self.hints = [hint for hint in self.hints if hint[0] != ctx]
        self.last[ctx] = -1

    def written(self, ctx, layer, values):
        values = list(values)
        self.v.update({(ctx, layer, e): value for e, value in enumerate(values)})
        for hint in self.hints:
            if hint[:2] == [ctx, layer]:
                values[hint[2]] = self.on_top(hint)
        return values

    def hint(self, ctx, layer, expert, score):
        last = self.last.get(ctx, -1)
        mine = [hint for hint in self.hints if hint[0] == ctx and hint[1] % 4 == layer % 4]
        taken = any(hint[1] != layer for hint in mine)
        if layer <= last or taken or len(mine) >= self.most or expert in [h[2] for h in mine]:
            return None
        self.hints.append([ctx, layer, expert, min(layer - last, 4) - 1, score >> 5, 0])
        return self.on_top(self.hints[-1])

    def routed(self, ctx, layer, experts):
        self.last[ctx] = layer
        for hint in [hint for hint in self.hints if hint[:2] == [ctx, layer]]:
            self.hints.remove(hint)
            for _ in range(8):
                odd, self.random = self.random & 1, self.random >> 1
                self.random ^= 0xA3000000 * odd
            where = (hint[3], hint[4])
            old = self.trust.get(where, 0)
            error = 256 * (hint[2] in experts) - min(255, max(0, hint[5] + old))
            new = old + (error + self.random % 256) // 256
            self.trust[where] = max(-255, min(255, new))


@pytest.mark.parametrize("contexts", [1, 3])
def test_second_reading_agrees(contexts):
    config = _device(contexts=contexts, layers=7, experts=9, top_k=2)
    draw = random.Random(contexts)
    both = Trust(config), SecondReading(config)
    at = [0] * contexts
    given = 0
    for _ in range(20_000):
        ctx = draw.randrange(contexts)
        layer = min(at[ctx] + draw.choice((0, 0, 0, 1, 2, 5)), 6)
        # Few experts and scores, so that something is learned.
        chosen, score = draw.sample(range(4), 2), draw.choice((0, 100, 255))
        named = draw.randrange(4, 9) if score == 100 else draw.choice(chosen)
        call, *arguments = draw.choice(
            [
                ("begin", ctx),
                ("written", ctx, layer, [draw.choice((0, 9, 90, 255)) for _ in range(9)]),
                *[("routed", ctx, layer, chosen)] * 4,
                ("hint", ctx, draw.choice((layer, layer, at[ctx] - 1)), draw.randrange(9), score),
                *[("hint", ctx, layer, named, score)] * 7,
            ]
        )
        if call == "hint" and arguments[1] < 0:
            continue
        one, other = (getattr(trust, call)(*arguments) for trust in both)
        assert one == other
        given += call == "hint" and one is not None
        if call == "begin":
            at[ctx] = 0
        elif call == "routed":
            at[ctx] = (layer + 1) % 7
    assert given > 1000
    assert both[0].trust == [[both[1].trust.get((d, b), 0) for b in range(8)] for d in range(4)]
    assert max(map(max, both[0].trust)) > 10
    assert min(map(min, both[0].trust)) < 0


# --- on a trace


@pytest.fixture(scope="module")
def predicted():
    """Choices of a trace, and what P1 says of them before they are known."""
    trace = load_trace(_TRACES / "tinymoe__code.npz")
    _, layers, top_k = trace.experts.shape
    config = _device(layers=layers, experts=trace.experts_per_layer, top_k=top_k)
    experts, tokens = trace.experts[:_TOKENS], trace.token[:_TOKENS]
    return config, experts, TraceRunner(config).run(experts, tokens)[1]


def _recall(predicted, rate):
    """Recall of every token with hints for each next layer, and the trust that was learned.

    ``rate(token)`` is how many of a layer's experts the hints name; wrong ones fill them up to k.
    """
    config, choices, values = predicted
    experts, top_k = config.model.experts, config.model.top_k
    draw = random.Random(1)
    trust = Trust(config)
    recall = []
    for token, choice in enumerate(choices.tolist()):
        trust.begin(0)
        found = 0
        for layer, chosen in enumerate(choice):
            if layer:
                truth = set(chosen)
                trust.written(0, layer, values[token, layer].tolist())
                named = [expert for expert in chosen if draw.random() < rate(token)]
                wrong = [expert for expert in range(experts) if expert not in truth]
                named += draw.sample(wrong, top_k - len(named))
                draw.shuffle(named)
                for expert in named:
                    trust.hint(0, layer, expert, draw.randrange(224, 256))
                now = [trust.value(0, layer, expert) for expert in range(experts)]
                best = ranked(now, threshold=0, most=top_k)
                found += len(truth & {expert for expert, _ in best})
            trust.routed(0, layer, chosen)
        recall.append(found / top_k / (len(choice) - 1))
    return np.array(recall), trust.trust[0][7]


def _alone(predicted):
    """Recall of every token without hints."""
    config, choices, values = predicted
    return np.array(
        [
            np.mean(
                [
                    len(set(chosen) & {e for e, _ in ranked(v, threshold=0, most=len(chosen))})
                    / len(chosen)
                    for chosen, v in zip(choice[1:], value[1:], strict=True)
                ]
            )
            for choice, value in zip(choices.tolist(), values.tolist(), strict=True)
        ]
    )


def test_trust_follows_what_hints_are_worth(predicted):
    """Right hints rule, good ones add to the predictor, bad ones do not harm it."""
    alone = _alone(predicted)[_LEARNING:].mean()
    recall, trust = {}, {}
    for rate in (0.0, 0.25, 0.5, 0.85, 1.0):
        tokens, trust[rate] = _recall(predicted, lambda _, rate=rate: rate)
        recall[rate] = tokens[_LEARNING:].mean()
    assert recall[1.0] >= 0.99
    assert recall[0.85] > max(alone, 0.85) + 0.01
    assert recall[0.5] > max(alone, 0.5) + 0.01
    assert recall[0.25] > alone - 0.01
    assert recall[0.0] > alone - 0.01
    assert sorted(trust, key=trust.get) == sorted(trust)
    assert trust[0.0] < 0
    assert trust[1.0] > 200


def test_bad_source_fades(predicted):
    """A source that names only wrong experts from some token on does no harm 50 tokens later; one
    that names the right ones again is trusted again 50 tokens later.
    """
    alone = _alone(predicted)
    recall, _ = _recall(predicted, lambda token: 0.0 if 400 <= token < 700 else 1.0)
    assert recall[300:400].mean() >= 0.99
    assert recall[400:410].mean() < alone[400:410].mean() - 0.1
    assert recall[450:700].mean() > alone[450:700].mean() - 0.01
    assert recall[700:703].mean() < 0.9
    assert recall[750:].mean() >= 0.99
