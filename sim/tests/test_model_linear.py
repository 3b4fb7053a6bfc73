"""The compiled arithmetic of a head against the specification's sentences in plain Python."""

import numpy as np
import pytest

from prestage_hw.contract import DeviceConfig, ModelConfig
from prestage_hw.contract.perceptron import CROSSES, FEATURES, HeadConfig, PerceptronConfig
from prestage_sim.model.predictor.linear import NOW, OLD, create_head, head_learn, head_predict

SEED = 0xACE1ACE1


class Reference:
    """One head as ``docs/predictor-perceptron.md`` describes it: weights by name, no tables."""

    def __init__(self, head, *, model, lanes, entries, cross_rows, number):
        self.head, self.model, self.lanes, self.entries = head, model, lanes, entries
        self.cross_rows = cross_rows
        self.lfsr = SEED + number
        self.reuse = head.name == "R"
        self.bits = 10 if self.reuse else 8
        self.most = 2047 if self.reuse else 127
        self.rows, self.stages, self.lists, self.diagonals = {}, {}, {}, {}
        self.prior = 256 if self.reuse else 256 * model.top_k // model.experts

    def set_of(self, name, layer, now, tokens, memo):
        """A set or None; ``tokens[n][layer]`` is the choice n tokens ago."""
        here, later = (0 if now else 1), (1 if now else 2)
        if self.reuse:
            where = {"B": (here, 0), "Bp": (here, -1), "Bn": (later, 1), "G": (later, 0)}
            if name == "S":
                return memo["next S" if now else "S"][layer]
        else:
            h = self.head.horizon
            where = {"A": (0, -h), "C": (0, -h - 1), "D": (0, -h - 2)}
            where |= {"B": (1, 0), "Bn": (1, 1), "Bp": (1, -1), "G": (2, 0)}
            if name in memo:
                return memo[name][layer]
        ago, step = where[name]
        at = layer + step
        return tokens[ago][at] if 0 <= at < self.model.layers else None

    def active(self, layer, now, tokens, memo):
        """Keys of the active rows, in the order of learning."""
        keys = []
        for name in self.head.rows:
            for expert in self.set_of(name, layer, now, tokens, memo) or ():
                keys.append((name, layer, expert))
        for cross in self.head.crosses:
            one = self.set_of(cross[0], layer, now, tokens, memo)
            other = self.set_of(cross[1], layer, now, tokens, memo)
            if one is None or other is None:
                continue
            if cross == "AA":
                pairs = [
                    (min(one[i], one[j]), max(one[i], one[j]))
                    for i in range(len(one[:3]))
                    for j in range(i)
                ]
            else:
                pairs = [(a, b) for a in one[:2] for b in other[:2]]
            for a, b in pairs:
                keys.append((cross, layer, (157 * a + 1265 * b) % self.cross_rows))
        return keys

    def predict(self, layer, now, tokens, memo):
        values = []
        keys = self.active(layer, now, tokens, memo)
        for e in range(self.model.experts):
            total = self.prior + self.diagonals.get(("bias", layer, e), 0)
            for key in keys:
                if self.entries:
                    stored, weight = self.lists.get((key, e % self.entries), (0, 0))
                    total += weight if stored == e // self.entries else 0
                else:
                    total += self.rows.get((key, e), 0)
            for name in self.head.diagonals:
                if e in (self.set_of(name, layer, now, tokens, memo) or ()):
                    total += self.diagonals.get((name, layer, e), 0)
            values.append(min(max(total, 0), (1 << self.bits) - 1))
        return values

    def draw(self):
        for _ in range(8):
            out = self.lfsr & 1
            self.lfsr >>= 1
            if out:
                self.lfsr ^= 0xA3000000
        return self.lfsr & 255

    def moved(self, weight, error, shift, u):
        weight += ((error << shift) + (u << (self.bits - 8))) >> self.bits
        return max(-self.most, min(self.most, weight))

    def learn(self, layer, tokens, memo, values, targets, used):
        errors = [t - v for t, v in zip(targets, values, strict=True)]
        experts, lanes = self.model.experts, self.lanes
        beats = self.entries // lanes if self.entries else -(-experts // lanes)
        for key in self.active(layer, False, tokens, memo):
            for beat in range(beats):
                byte = self.draw()
                stage = self.stages.get((key, beat), 0)
                shift = 3 - stage + self.reuse
                for j in range(lanes):
                    u = (byte + 97 * j) % 256
                    if not self.entries:
                        e = beat * lanes + j
                        if e < experts:
                            old = self.rows.get((key, e), 0)
                            self.rows[key, e] = self.moved(old, errors[e], shift, u)
                        continue
                    residue = beat * lanes + j
                    index, weight = self.lists.get((key, residue), (0, 0))
                    wanted = [
                        e // self.entries
                        for e in sorted(used)
                        if e % self.entries == residue
                        and not (weight and e // self.entries == index)
                    ]
                    if abs(weight) < 4 and wanted:
                        self.lists[key, residue] = (wanted[0], 8 >> stage)
                    elif weight:
                        e = index * self.entries + residue
                        self.lists[key, residue] = (index, self.moved(weight, errors[e], shift, u))
                if stage == 0 and self.lfsr >> 24 < 64 or stage == 1 and self.lfsr >> 24 < 16:
                    self.stages[key, beat] = stage + 1
        for beat in range(-(-experts // lanes)):
            byte = self.draw()
            for f, name in enumerate(("bias", *self.head.diagonals)):
                chosen = range(experts)
                if f:
                    chosen = self.set_of(name, layer, False, tokens, memo) or ()
                for j in range(lanes):
                    e = beat * lanes + j
                    if e < experts and e in chosen:
                        u = (byte + 97 * j + 59 * f) % 256
                        old = self.diagonals.get((name, layer, e), 0)
                        new = self.moved(old, errors[e], 1 + self.reuse, u)
                        self.diagonals[name, layer, e] = new


def _array(choices, k):
    return np.array([[-1] * k if c is None else c for c in choices], np.int16)


_SMALL = ModelConfig(name="small", layers=4, experts=12, top_k=3)
_REUSE = ("B", "Bn", "Bp", "G", "S")
_CASES = {
    "everything, P1": (HeadConfig(name="P1", rows=FEATURES, crosses=CROSSES), _SMALL, 4, 0),
    "diagonals, P2": (HeadConfig(name="P2", rows=("A",), diagonals=FEATURES[3:]), _SMALL, 8, 0),
    "P3, k = 1": (
        HeadConfig(name="P3", rows=("A", "C"), crosses=CROSSES, diagonals=("B",)),
        ModelConfig(name="one", layers=6, experts=7, top_k=1),
        2,
        0,
    ),
    "P0": (HeadConfig(name="P0", rows=("B", "Bn", "Q"), diagonals=("T2", "S")), _SMALL, 4, 0),
    "lists": (HeadConfig(name="P1", rows=("A", "D", "T"), diagonals=("G",)), _SMALL, 2, 4),
    "R": (HeadConfig(name="R", rows=("B", "S"), diagonals=_REUSE), _SMALL, 4, 0),
    # As many active rows as there can be.
    "k = 16": (
        HeadConfig(name="P1", rows=FEATURES, crosses=CROSSES),
        ModelConfig(name="wide", layers=4, experts=40, top_k=16),
        8,
        0,
    ),
}


@pytest.mark.parametrize("case", _CASES)
def test_prediction_and_learning_are_as_specified(case):
    head, model, lanes, entries = _CASES[case]
    others = {"P1": HeadConfig(name="P1"), "P0": HeadConfig(name="P0")}
    others[head.name] = head
    heads = tuple(others[name] for name in HeadConfig.NAMES if name in others)
    perceptron = PerceptronConfig(heads=heads, lanes=lanes, list_entries=entries, cross_rows=8)
    config = DeviceConfig(
        model=model, slots=64, predictor="perceptron", perceptron=perceptron, expert_bytes=512
    )
    number = heads.index(head)
    compiled = create_head(config, head, number=number)
    shape = {"model": model, "lanes": lanes, "entries": entries, "cross_rows": 8}
    reference = Reference(head, number=number, **shape)
    random = np.random.default_rng(7)
    scale = 1 << reference.bits
    saturated = set()

    def choice():
        if random.random() < 0.15:
            return None
        # Few experts, so that rows and entries are met again.
        pool = min(model.experts, model.top_k + 3)
        return random.permutation(pool)[: model.top_k].tolist()

    for _ in range(120 if model.top_k < 16 else 25):
        tokens = [[choice() for _ in range(model.layers)] for _ in range(3)]
        names = ("T", "T2", "Q", "S", "next S")
        memo = {name: [choice() for _ in range(model.layers)] for name in names}
        arrays = [_array(token, model.top_k) for token in tokens]
        memos = np.stack([*(_array(memo[n], model.top_k) for n in names), arrays[0] * 0 - 1])
        layer = int(random.integers(model.layers))
        for now in (NOW, OLD):
            values = np.zeros(model.experts, np.int64)
            head_predict(compiled, 0, layer, now, *arrays, memos, values)
            assert values.tolist() == reference.predict(layer, now == NOW, tokens, memo)
        saturated.update(values.tolist())
        used = set(random.permutation(model.experts)[: model.top_k].tolist())
        mask = np.isin(np.arange(model.experts), list(used))
        targets = np.where(mask, scale, 0 if scale == 256 else random.integers(0, 800))
        head_learn(compiled, 0, layer, *arrays, memos, values, targets, mask)
        reference.learn(layer, tokens, memo, values.tolist(), targets.tolist(), used)
        assert int(compiled.lfsr[0]) == reference.lfsr
    assert len(saturated) > 10 and compiled.maturity.max() == (2 if head.rows else 0)
