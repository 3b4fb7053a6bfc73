"""Tests of TinyMoE's NumPy inference, its weights and its traces; they need NumPy alone."""

from __future__ import annotations

import importlib.util
import json
import math
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

HERE = Path(__file__).resolve().parent


def _module() -> ModuleType:
    # Loaded by path: the folder is no package, and other tests may not rely on sys.path.
    spec = importlib.util.spec_from_file_location("tinymoe_inference", HERE / "tinymoe.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


tinymoe = _module()


@pytest.fixture(scope="module")
def model() -> Any:
    return tinymoe.load(HERE)


@pytest.fixture(scope="module")
def training() -> dict[str, Any]:
    result: dict[str, Any] = json.loads((HERE / "training.json").read_text())
    return result


def _decode(model: Any, tokens: Sequence[int]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    state = model.start()
    logits, routing, scores = zip(*(model.step(int(t), state) for t in tokens), strict=True)
    return np.stack(logits), np.stack(routing), np.stack(scores)


def _excerpt(model: Any, name: str) -> tuple[list[int], int]:
    tokens = model.tokenizer.encode((HERE / name).read_bytes())[: model.context]
    return tokens, len(model.tokenizer.decode(tokens[1:]))


class TestTokenizer:
    def test_round_trip(self, model: Any) -> None:
        random = np.random.default_rng(3)
        texts = [b"", b" ", b"\n\n\t x", bytes(range(256)), "naïve – ‘quote’ 漢字".encode()]
        texts += [random.integers(0, 256, 300, dtype=np.uint8).tobytes() for _ in range(20)]
        texts += [random.choice(list(b" \t\n\rab1_.\x0b"), 200).astype(np.uint8).tobytes()]
        texts += [path.read_bytes() for path in HERE.glob("*.py")]
        for text in texts:
            assert model.tokenizer.decode(model.tokenizer.encode(text)) == text

    def test_compresses_text(self, model: Any) -> None:
        for name in ("excerpt_code.txt", "excerpt_prose.txt"):
            text = (HERE / name).read_bytes()
            assert len(model.tokenizer.encode(text)) * 2 < len(text)

    def test_merges_follow_rank(self) -> None:
        # 257 = "ab", 258 = "abc": the earlier merge wins although "bc" comes later in rank.
        small = tinymoe.Tokenizer([(97, 98), (257, 99), (98, 99)])
        assert small.encode("abc") == [258]
        assert small.encode("bcab") == [259, 257]
        assert small.decode([258, 256, 259]) == b"abcbc"

    def test_start_token_is_never_encoded(self, model: Any) -> None:
        text = bytes(range(256)) * 4
        assert tinymoe.BOS not in model.tokenizer.encode(text)
        assert model.tokenizer.token_bytes(tinymoe.BOS) == b""

    def test_save_and_load(self, model: Any, tmp_path: Path) -> None:
        model.tokenizer.save(tmp_path / "t.json")
        assert (tmp_path / "t.json").read_bytes() == (HERE / "tokenizer.json").read_bytes()


class TestFile:
    def test_size(self) -> None:
        assert (HERE / "tinymoe.safetensors").stat().st_size < 12_000_000

    def test_expert_block_is_contiguous_in_the_file(self, model: Any) -> None:
        raw = (HERE / "tinymoe.safetensors").read_bytes()
        start = 8 + int.from_bytes(raw[:8], "little")
        header = json.loads(raw[8:start])
        for layer, index in ((0, 0), (3, 17), (model.layers - 1, model.experts - 1)):
            entry = header[f"layers.{layer}.experts"]
            assert entry["dtype"] == "F16"
            at = start + entry["data_offsets"][0] + index * model.expert_bytes
            block = raw[at : at + model.expert_bytes]
            assert model.expert_block(layer, index).tobytes() == block

    @pytest.mark.parametrize("keep", [0, 4, 100, -1])
    def test_cut_file(self, keep: int, tmp_path: Path) -> None:
        raw = (HERE / "tinymoe.safetensors").read_bytes()
        (tmp_path / "cut").write_bytes(raw[:keep])
        if keep == 0:  # An empty file cannot be mapped at all.
            with pytest.raises(ValueError, match="empty"):
                tinymoe.read_tensors(tmp_path / "cut")
            return
        with pytest.raises(ValueError, match="cut short|whole header"):
            tinymoe.read_tensors(tmp_path / "cut")

    def test_foreign_file(self, tmp_path: Path) -> None:
        (tmp_path / "x").write_bytes((12).to_bytes(8, "little") + b"not json at all")
        with pytest.raises(ValueError, match="no JSON"):
            tinymoe.read_tensors(tmp_path / "x")
        header = b'{"a":{"dtype":"BF16","shape":[1],"data_offsets":[0,2]}}'
        (tmp_path / "x").write_bytes(len(header).to_bytes(8, "little") + header + b"\0\0")
        with pytest.raises(ValueError, match="F16 or F32, not BF16"):
            tinymoe.read_tensors(tmp_path / "x")


class TestExpert:
    def test_layout_gate_up_down(self, model: Any) -> None:
        random = np.random.default_rng(5)
        x = random.standard_normal(model.width).astype(np.float32)
        block = model.expert_block(2, 9)
        gate, up, down = np.split(np.frombuffer(block, "<f2").astype(np.float64), 3)
        hidden = len(gate) // model.width
        a = gate.reshape(hidden, model.width) @ x
        h = a / (1 + np.exp(-a)) * (up.reshape(hidden, model.width) @ x)
        expected = down.reshape(model.width, hidden) @ h
        assert np.abs(expected).max() > 1e-3
        np.testing.assert_allclose(tinymoe.expert(2, 9, x, block), expected, atol=1e-4)
        # A block as plain bytes, as a device would return it, gives the very same result.
        same = tinymoe.expert(2, 9, x, block.tobytes())
        assert np.array_equal(same, tinymoe.expert(2, 9, x, block))

    def test_extreme_input_is_finite(self, model: Any) -> None:
        for factor in (1e4, -1e4):
            x = np.full(model.width, factor, np.float32)
            assert np.isfinite(tinymoe.expert(0, 0, x, model.expert_block(0, 0))).all()

    def test_wrong_block(self, model: Any) -> None:
        x = np.ones(model.width, np.float32)
        for size in (0, 2, model.expert_bytes - 2, model.expert_bytes - 6):
            block = model.expert_block(0, 0).tobytes()[:size]
            with pytest.raises(ValueError, match="Block of expert 0 in layer 0 must hold three"):
                tinymoe.expert(0, 0, x, block)


class TestModel:
    def test_routing_is_top_k_softmax(self, model: Any) -> None:
        random = np.random.default_rng(8)
        tensors = tinymoe.read_tensors(HERE / "tinymoe.safetensors")
        for layer in range(model.layers):
            x = random.standard_normal(model.width).astype(np.float32)
            ids, weights = model.route(layer, x)
            logits = tensors[f"layers.{layer}.router"].astype(np.float64) @ x
            best = np.sort(logits)[::-1][: model.top_k]
            np.testing.assert_allclose(logits[ids], best, atol=1e-4)
            np.testing.assert_allclose(weights, np.exp(best) / np.exp(best).sum(), atol=1e-5)
            assert len(set(ids.tolist())) == model.top_k

    def test_cached_steps_equal_whole_sequence(self, model: Any) -> None:
        """A second, uncached implementation in float64 gives the same logits."""
        tokens, _ = _excerpt(model, "excerpt_code.txt")
        tokens = tokens[:40]
        got, routing, _ = _decode(model, tokens)
        t = tinymoe.read_tensors(HERE / "tinymoe.safetensors")
        w = {name: value.astype(np.float64) for name, value in t.items()}
        config = json.loads((HERE / "config.json").read_text())
        heads, size = config["heads"], len(tokens)

        def norm(x: np.ndarray, gain: np.ndarray) -> np.ndarray:
            scale = np.sqrt((x * x).mean(1, keepdims=True) + config["norm_eps"])
            return np.asarray(x / scale * gain)

        half = model.width // heads // 2
        angle = np.outer(np.arange(size), config["rope_base"] ** (-np.arange(half) / half))
        turn = np.exp(1j * angle)
        mask = np.triu(np.full((size, size), -np.inf), 1)
        x = w["embedding"][tokens] * math.sqrt(model.width)
        for layer in range(model.layers):
            name = f"layers.{layer}."
            qkv = norm(x, w[name + "attention_norm"]) @ w[name + "qkv"].T
            q, k, v = qkv.reshape(size, 3, heads, 2 * half).transpose(1, 2, 0, 3)
            q, k = ((p[..., :half] + 1j * p[..., half:]) * turn for p in (q, k))
            match = (q @ k.conj().transpose(0, 2, 1)).real / math.sqrt(2 * half) + mask
            match = np.exp(match - match.max(-1, keepdims=True))
            mixed = (match / match.sum(-1, keepdims=True)) @ v
            x = x + mixed.transpose(1, 0, 2).reshape(size, -1) @ w[name + "out"].T
            h = norm(x, w[name + "expert_norm"])
            logits = h @ w[name + "router"].T
            for at in range(size):
                # The rounding of float32 may swap near ties, so the choice is taken as made.
                ids = routing[at, layer].astype(int)
                assert logits[at, ids].min() > np.sort(logits[at])[-model.top_k] - 1e-3
                weights = np.exp(logits[at, ids] - logits[at, ids].max())
                for index, weight in zip(ids, weights / weights.sum(), strict=True):
                    gate, up, down = np.split(w[name + "experts"][index], 3)
                    a = gate.reshape(-1, model.width) @ h[at]
                    b = a / (1 + np.exp(-a)) * (up.reshape(-1, model.width) @ h[at])
                    x[at] += weight * (down.reshape(model.width, -1) @ b)
        expected = norm(x, w["final_norm"]) @ w["embedding"].T
        np.testing.assert_allclose(got, expected, atol=2e-3)

    def test_agrees_with_torch(self, model: Any, training: dict[str, Any]) -> None:
        """PyTorch's logits were kept when the weights were made."""
        reference = training["reference"]
        logits, _, _ = _decode(model, reference["tokens"])
        np.testing.assert_allclose(logits[-1], reference["last_logits"], atol=5e-3)
        assert np.argmax(logits, axis=1).tolist() == reference["argmax"]

    @pytest.mark.parametrize(
        ("name", "bits", "other"),
        [("excerpt_code.txt", 0.95, 2.5), ("excerpt_prose.txt", 2.08, 4.0)],
    )
    def test_perplexity(self, model: Any, name: str, bits: float, other: float) -> None:
        """Neither excerpt was trained on; a byte costs at most this many bits."""
        tokens, size = _excerpt(model, name)
        logits, _, _ = _decode(model, tokens[:-1])
        top = logits.max(axis=1)
        log_sum = top + np.log(np.exp(logits - top[:, None]).sum(axis=1))
        right = logits[np.arange(len(tokens) - 1), tokens[1:]]
        assert (log_sum - right).sum() / math.log(2) / size < bits

        # The experts matter: with every expert swapped for its neighbour the text is a riddle.
        def swapped(layer: int, ids: Sequence[int]) -> Iterable[tuple[int, Any]]:
            for place, index in enumerate(ids):
                yield place, model.expert_block(layer, index ^ 1)

        confused = tinymoe.load(HERE, swapped)
        logits, _, _ = _decode(confused, tokens[:-1])
        top = logits.max(axis=1)
        log_sum = top + np.log(np.exp(logits - top[:, None]).sum(axis=1))
        right = logits[np.arange(len(tokens) - 1), tokens[1:]]
        assert (log_sum - right).sum() / math.log(2) / size > other

    def test_deterministic_in_any_order_of_arrival(self, model: Any) -> None:
        tokens, _ = _excerpt(model, "excerpt_prose.txt")
        asked: list[tuple[int, tuple[int, ...]]] = []

        def backwards(layer: int, ids: Sequence[int]) -> Iterable[tuple[int, bytes]]:
            asked.append((layer, tuple(ids)))
            for place in reversed(range(len(ids))):
                yield place, model.expert_block(layer, ids[place]).tobytes()

        first = _decode(model, tokens[:24])
        again = _decode(model, tokens[:24])
        other = _decode(tinymoe.load(HERE, backwards), tokens[:24])
        for left, right, turned in zip(first, again, other, strict=True):
            assert np.array_equal(left, right)
            assert np.array_equal(left, turned)
        assert asked[: model.layers] == [
            (layer, tuple(first[1][0, layer].tolist())) for layer in range(model.layers)
        ]

    def test_bad_steps(self, model: Any) -> None:
        state = model.start()
        for token in (-1, len(model.tokenizer)):
            with pytest.raises(ValueError, match=f"Token must be from 0 to 1023, not {token}"):
                model.step(token, state)
        assert state.position == 0
        state.position = model.context
        with pytest.raises(ValueError, match=f"at most {model.context} tokens"):
            model.step(0, state)

    def test_wrong_tokenizer(self) -> None:
        config = json.loads((HERE / "config.json").read_text())
        with pytest.raises(ValueError, match="Tokenizer must have 1024 tokens, not 257"):
            tinymoe.Model(config, {}, tinymoe.Tokenizer([]))


class TestSampling:
    def test_greedy_and_seeded(self) -> None:
        logits = np.array([0.0, 3.0, 2.0, -9.0], np.float32)
        random = np.random.default_rng(0)
        assert tinymoe.sample(logits, 0, random) == 1
        drawn = [tinymoe.sample(logits, 1.0, np.random.default_rng(s)) for s in range(400)]
        assert drawn == [tinymoe.sample(logits, 1.0, np.random.default_rng(s)) for s in range(400)]
        expected = math.exp(3) / (1 + math.exp(3) + math.exp(2) + math.exp(-9))
        assert abs(drawn.count(1) / 400 - expected) < 0.1
        assert set(drawn) >= {0, 1, 2}

    def test_negative_temperature(self) -> None:
        with pytest.raises(ValueError, match="Temperature must not be negative, not -1"):
            tinymoe.sample(np.zeros(3, np.float32), -1, np.random.default_rng(0))

    def test_command_line(self) -> None:
        command = [sys.executable, str(HERE / "tinymoe.py"), "def f(x):\n", "--tokens", "8"]
        texts = [subprocess.run(command, capture_output=True, check=True).stdout for _ in range(2)]
        assert texts[0] == texts[1]
        assert texts[0].startswith(b"def f(x):\n") and len(texts[0]) > 12
        refused = subprocess.run(
            [*command[:2], "word " * 500], capture_output=True, text=True, check=False
        )
        assert refused.returncode == 2
        assert "prompt must be at most 256 tokens" in refused.stderr


class TestTraces:
    @pytest.mark.parametrize("domain", ["code", "prose"])
    def test_format(self, model: Any, domain: str) -> None:
        with np.load(HERE / f"traces/tinymoe__{domain}.npz") as archive:
            t = dict(archive)
        shape = t["experts"].shape
        assert shape[0] > 4000 and shape[1:] == (model.layers, model.top_k)
        types = {name: value.dtype.str for name, value in t.items() if name != "meta"}
        assert types == {
            "experts": "<i2",
            "scores": "<f2",
            "request_id": "<i4",
            "is_decode": "|b1",
            "token": "<i4",
            "layer_ids": "<i2",
        }
        assert t["meta"].shape == () and t["meta"].dtype.kind == "U"
        meta = json.loads(str(t["meta"]))
        assert meta["domain"] == domain and meta["num_experts"] == model.experts
        assert meta["native_top_k"] == model.top_k
        assert meta["expert_bytes"] == model.expert_bytes
        assert meta["requests"] == len(np.unique(t["request_id"]))
        assert (np.diff(t["request_id"]) >= 0).all()
        assert t["experts"].min() >= 0 and t["experts"].max() < model.experts
        assert (np.diff(np.sort(t["experts"], axis=2), axis=2) > 0).all()
        assert (np.diff(t["scores"].astype(np.float32), axis=2) <= 0).all()
        np.testing.assert_allclose(t["scores"].astype(np.float32).sum(2), 1, atol=4e-3)

    def test_size(self) -> None:
        assert sum(path.stat().st_size for path in HERE.glob("traces/*.npz")) < 3_000_000

    @pytest.mark.parametrize("domain", ["code", "prose"])
    def test_the_model_made_it(self, model: Any, domain: str) -> None:
        with np.load(HERE / f"traces/tinymoe__{domain}.npz") as archive:
            tokens, experts = archive["token"][:48], archive["experts"][:48]
            scores = archive["scores"][:48].astype(np.float32)
        _, routing, weights = _decode(model, tokens)
        # Another BLAS rounds differently and may swap near ties; anything more is an error.
        assert (routing == experts).mean() > 0.99
        assert np.median(np.abs(weights - scores)) < 1e-3

    @pytest.mark.parametrize("domain", ["code", "prose"])
    def test_routing_is_not_uniform(self, model: Any, domain: str) -> None:
        with np.load(HERE / f"traces/tinymoe__{domain}.npz") as archive:
            experts, request = archive["experts"].astype(int), archive["request_id"]
        same = request[1:] == request[:-1]
        for layer in range(model.layers):
            use = np.bincount(experts[:, layer].ravel(), minlength=model.experts)
            share = use / use.sum()
            # Of 32,768 uniform choices the busiest expert would get less than 1.15 / 32.
            assert share.max() > 1.4 / model.experts
            both = (experts[1:, layer, :, None] == experts[:-1, layer, None, :]).any(2)
            assert both[same].mean() > 1.1 * model.top_k / model.experts
