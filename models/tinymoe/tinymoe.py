"""Run TinyMoE with NumPy: tokenizer, weights, one decoding step at a time.

Weights are stored as float16 and every sum is float32; NumPy is the only package needed. A step
returns, beside the logits, the experts that every layer's router chose and the weights it gave
them, so that a routing trace is a by-product of decoding.

Examples
--------
Continue a prompt::

    python models/tinymoe/tinymoe.py "def main(argv):" --tokens 80

Decode by hand; ``routing`` and ``scores`` are what a trace records::

    model = load(Path("models/tinymoe"))
    state = model.start()
    for token in model.tokenizer.encode("It is a truth"):
        logits, routing, scores = model.step(token, state)
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "BOS",
    "BlockSource",
    "Model",
    "State",
    "Tokenizer",
    "expert",
    "load",
    "read_tensors",
    "sample",
]

Floats = NDArray[np.float32]

BlockSource = Callable[[int, Sequence[int]], Iterable[tuple[int, Any]]]
"""Given a layer and the chosen expert ids, yields (place in the list, byte block) in any order."""

BOS = 256
"""Token that starts a document."""

PRETOKEN = re.compile(
    rb"\n[ \t]*| ?[A-Za-z]+| ?[0-9]| ?[^A-Za-z0-9\s]+|[ \t]+(?=[ \t])|\s", re.ASCII
)
"""Pieces that merges never cross. Every byte belongs to exactly one piece."""

_DTYPES = {"F16": "<f2", "F32": "<f4"}

HERE = Path(__file__).resolve().parent


class Tokenizer:
    """Byte-level byte-pair encoding.

    Tokens 0 to 255 are the bytes, 256 is :data:`BOS`, 257 and up are merges in the order in which
    they were learned. ``decode(encode(text)) == text`` for every bytes object.

    Parameters
    ----------
    merges : sequence of pairs of int
        Ids that merge ``i`` joins to token ``257 + i``.
    """

    def __init__(self, merges: Sequence[tuple[int, int]]) -> None:
        self._merges = [(int(a), int(b)) for a, b in merges]
        self._rank = {pair: 257 + index for index, pair in enumerate(self._merges)}
        self._bytes = [bytes([value]) for value in range(256)] + [b""]
        for a, b in self._merges:
            self._bytes.append(self._bytes[a] + self._bytes[b])
        self._seen: dict[bytes, list[int]] = {}

    @classmethod
    def load(cls, path: Path) -> Tokenizer:
        """Read the JSON file that :meth:`save` wrote."""
        return cls(json.loads(Path(path).read_text())["merges"])

    def save(self, path: Path) -> None:
        """Write the merges as JSON."""
        merges = json.dumps(self._merges, separators=(",", ":"))
        Path(path).write_text(f'{{"kind":"byte-level bpe","bos":{BOS},"merges":{merges}}}\n')

    def __len__(self) -> int:
        """Tokens in the vocabulary."""
        return len(self._bytes)

    def token_bytes(self, token: int) -> bytes:
        """Bytes that one token stands for; none for :data:`BOS`."""
        return self._bytes[token]

    def encode(self, text: str | bytes) -> list[int]:
        """Token ids of ``text``, without :data:`BOS`.

        Parameters
        ----------
        text : str or bytes
            Text; str is taken as UTF-8.
        """
        data = text.encode() if isinstance(text, str) else text
        result: list[int] = []
        for piece in PRETOKEN.findall(data):
            ids = self._seen.get(piece)
            if ids is None:
                ids = self._seen[piece] = self._merge(list(piece))
            result += ids
        return result

    def _merge(self, ids: list[int]) -> list[int]:
        never = len(self._bytes)
        while len(ids) > 1:
            ranks = [self._rank.get(pair, never) for pair in pairwise(ids)]
            best = min(ranks)
            if best == never:
                break
            at = ranks.index(best)
            ids[at : at + 2] = [best]
        return ids

    def decode(self, tokens: Sequence[int]) -> bytes:
        """Bytes of ``tokens``; a cut may fall inside a UTF-8 character."""
        return b"".join(self._bytes[token] for token in tokens)


def _rms_norm(x: Floats, gain: Floats, eps: float) -> Floats:
    normed: Floats = x / np.sqrt(np.mean(x * x, dtype=np.float32) + np.float32(eps)) * gain
    return normed


def expert(layer: int, index: int, x: Floats, weights: Any) -> Floats:
    """Run one SwiGLU expert: ``down @ (silu(gate @ x) * (up @ x))``.

    Parameters
    ----------
    layer, index : int
        Which expert it is; used in messages only.
    x : numpy.ndarray
        Normed residual, float32 [width].
    weights : bytes-like
        The expert's block: float16, little-endian, row-major: gate [expert_width, width], up
        [expert_width, width], down [width, expert_width], nothing between or after.

    Returns
    -------
    numpy.ndarray
        float32 [width], not yet multiplied by the router's weight.

    Raises
    ------
    ValueError
        If the block is not three matrices for this width.
    """
    values = np.frombuffer(weights, dtype="<f2").astype(np.float32)
    part, rest = divmod(values.size, 3)
    hidden, ragged = divmod(part, x.size)
    if rest or ragged or not hidden:
        raise ValueError(
            f"Block of expert {index} in layer {layer} must hold three matrices of width "
            f"{x.size}, not {values.size} numbers"
        )
    gate = values[:part].reshape(hidden, x.size) @ x
    up = values[part : 2 * part].reshape(hidden, x.size) @ x
    # exp of a large positive number would overflow with a warning; silu is 0 there.
    active = gate / (1 + np.exp(np.minimum(-gate, np.float32(80)))) * up
    down: Floats = values[2 * part :].reshape(x.size, hidden) @ active
    return down


class State:
    """Keys and values of one sequence.

    Parameters
    ----------
    layers, context, heads, head_width : int
        Shape of the cache.

    Members
    -------
    position : int
        Tokens taken so far.
    """

    def __init__(self, *, layers: int, context: int, heads: int, head_width: int) -> None:
        self.position = 0
        self.keys: Floats = np.zeros((layers, heads, context, head_width), np.float32)
        self.values: Floats = np.zeros((layers, heads, context, head_width), np.float32)


class Model:
    """TinyMoE, one token at a time.

    Parameters
    ----------
    config : dict
        Contents of ``config.json``.
    tensors : dict of str to numpy.ndarray
        float16 tensors of ``tinymoe.safetensors``.
    tokenizer : Tokenizer
        Its tokens are the model's.
    source : BlockSource, optional
        Where the experts' bytes come from; the model's own file by default. It is called once a
        layer with the chosen ids and may yield their blocks in any order.

    Members
    -------
    layers, experts, top_k, context, width : int
        Shape.
    expert_bytes : int
        Bytes of one expert's block.
    """

    def __init__(
        self,
        config: dict[str, Any],
        tensors: dict[str, NDArray[Any]],
        tokenizer: Tokenizer,
        source: BlockSource | None = None,
    ) -> None:
        if len(tokenizer) != config["vocab"]:
            raise ValueError(f"Tokenizer must have {config['vocab']} tokens, not {len(tokenizer)}")
        self.layers: int = config["layers"]
        self.experts: int = config["experts"]
        self.top_k: int = config["top_k"]
        self.context: int = config["context"]
        self.width: int = config["width"]
        self.tokenizer = tokenizer
        self.source: BlockSource = source or self.stored_blocks
        self._heads: int = config["heads"]
        self._eps: float = config["norm_eps"]
        self._blocks = [tensors[f"layers.{layer}.experts"] for layer in range(self.layers)]
        self.expert_bytes: int = self._blocks[0][0].nbytes
        # Everything but the experts is small and kept ready in float32.
        self._dense = {
            name: value.astype(np.float32)
            for name, value in tensors.items()
            if not name.endswith(".experts")
        }
        half = self.width // self._heads // 2
        rate = config["rope_base"] ** (-np.arange(half) / half)
        angle = np.arange(self.context)[:, None] * rate
        self._cos: Floats = np.cos(angle).astype(np.float32)
        self._sin: Floats = np.sin(angle).astype(np.float32)

    def start(self) -> State:
        """Make an empty cache for a new sequence."""
        return State(
            layers=self.layers,
            context=self.context,
            heads=self._heads,
            head_width=self.width // self._heads,
        )

    def expert_block(self, layer: int, index: int) -> NDArray[np.uint8]:
        """Bytes of one expert as stored: ``expert_bytes`` bytes, a read-only view of the file."""
        block: NDArray[np.uint8] = self._blocks[layer][index].view(np.uint8)
        return block

    def stored_blocks(
        self, layer: int, ids: Sequence[int]
    ) -> Iterable[tuple[int, NDArray[np.uint8]]]:
        """Yield the blocks of ``ids`` from the model's own file, in the order asked."""
        for place, index in enumerate(ids):
            yield place, self.expert_block(layer, index)

    def route(self, layer: int, x: Floats) -> tuple[NDArray[np.int16], Floats]:
        """Choose the experts for a normed residual.

        The ``top_k`` largest router logits win, ties to the smaller id; their weights are the
        softmax over these ``top_k`` logits alone.

        Returns
        -------
        tuple of numpy.ndarray
            Ids int16 [top_k] by descending weight, and weights float32 [top_k].
        """
        logits = self._dense[f"layers.{layer}.router"] @ x
        ids = np.argsort(-logits, kind="stable")[: self.top_k]
        weights = np.exp(logits[ids] - logits[ids[0]])
        return ids.astype(np.int16), weights / weights.sum()

    def step(self, token: int, state: State) -> tuple[Floats, NDArray[np.int16], Floats]:
        """Take one token and predict the next.

        Parameters
        ----------
        token : int
            Input token.
        state : State
            Cache of this sequence; advanced by one position.

        Returns
        -------
        tuple of numpy.ndarray
            Logits float32 [vocab]; expert ids int16 [layers, top_k] by descending weight; their
            weights float32 [layers, top_k].

        Raises
        ------
        ValueError
            If the token is unknown, or the sequence is as long as the context.
        """
        if not 0 <= token < len(self.tokenizer):
            raise ValueError(f"Token must be from 0 to {len(self.tokenizer) - 1}, not {token}")
        if state.position >= self.context:
            raise ValueError(f"Sequence must be at most {self.context} tokens long")
        dense = self._dense
        routing = np.empty((self.layers, self.top_k), np.int16)
        scores = np.empty((self.layers, self.top_k), np.float32)
        x = dense["embedding"][token] * np.float32(self.width**0.5)
        for layer in range(self.layers):
            name = f"layers.{layer}."
            normed = _rms_norm(x, dense[name + "attention_norm"], self._eps)
            x = x + dense[name + "out"] @ self._attend(layer, dense[name + "qkv"] @ normed, state)
            normed = _rms_norm(x, dense[name + "expert_norm"], self._eps)
            routing[layer], scores[layer] = self.route(layer, normed)
            ids = [int(index) for index in routing[layer]]
            made = np.empty((self.top_k, self.width), np.float32)
            for place, block in self.source(layer, ids):
                made[place] = expert(layer, ids[place], normed, block)
            # Summed by rank and not by arrival, so the result does not depend on the source.
            x = x + scores[layer] @ made
        state.position += 1
        x = _rms_norm(x, dense["final_norm"], self._eps)
        return dense["embedding"] @ x, routing, scores

    def _attend(self, layer: int, qkv: Floats, state: State) -> Floats:
        at = state.position
        q, k, v = qkv.reshape(3, self._heads, -1)
        half = q.shape[1] // 2
        cos, sin = self._cos[at], self._sin[at]
        q, k = (
            np.concatenate(
                (
                    p[:, :half] * cos - p[:, half:] * sin,
                    p[:, half:] * cos + p[:, :half] * sin,
                ),
                axis=1,
            )
            for p in (q, k)
        )
        state.keys[layer, :, at] = k
        state.values[layer, :, at] = v
        keys, values = state.keys[layer, :, : at + 1], state.values[layer, :, : at + 1]
        match = (keys @ q[:, :, None])[:, :, 0] * np.float32(q.shape[1] ** -0.5)
        match = np.exp(match - match.max(axis=1, keepdims=True))
        match /= match.sum(axis=1, keepdims=True)
        mixed: Floats = (match[:, None, :] @ values).reshape(-1)
        return mixed


def read_tensors(path: Path) -> dict[str, NDArray[Any]]:
    """Map a safetensors file into memory.

    The format is eight bytes of header length, a JSON header with type, shape and place of each
    tensor, then the tensors. Only the types F16 and F32 are known here.

    Parameters
    ----------
    path : Path
        File.

    Returns
    -------
    dict of str to numpy.ndarray
        Read-only views of the file by name.

    Raises
    ------
    ValueError
        If the file is cut short, is no safetensors file or holds another type.
    """
    data = np.memmap(path, dtype=np.uint8, mode="r")
    start = 8 + int.from_bytes(data[:8].tobytes(), "little")
    if not 10 <= start <= data.size:
        raise ValueError(f"{path} must be a safetensors file with a whole header")
    try:
        header = json.loads(data[8:start].tobytes())
    except ValueError as error:
        raise ValueError(f"{path} must be a safetensors file: its header is no JSON") from error
    tensors = {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        if entry["dtype"] not in _DTYPES:
            raise ValueError(f"Tensor {name} must be F16 or F32, not {entry['dtype']}")
        first, last = entry["data_offsets"]
        if start + last > data.size:
            raise ValueError(f"{path} is cut short: tensor {name} ends at byte {start + last}")
        part = np.asarray(data)[start + first : start + last]
        tensors[name] = part.view(_DTYPES[entry["dtype"]]).reshape(entry["shape"])
    return tensors


def load(folder: Path = HERE, source: BlockSource | None = None) -> Model:
    """Open the model.

    Parameters
    ----------
    folder : Path
        Holds ``config.json``, ``tokenizer.json`` and ``tinymoe.safetensors``.
    source : BlockSource, optional
        See :class:`Model`.

    Raises
    ------
    FileNotFoundError
        If one of the three files is absent.
    """
    folder = Path(folder)
    config = json.loads((folder / "config.json").read_text())
    tokenizer = Tokenizer.load(folder / "tokenizer.json")
    return Model(config, read_tensors(folder / "tinymoe.safetensors"), tokenizer, source)


def sample(logits: Floats, temperature: float, random: np.random.Generator) -> int:
    """Draw the next token.

    Parameters
    ----------
    logits : numpy.ndarray
        float32 [vocab].
    temperature : float
        0 takes the likeliest token and draws nothing.
    random : numpy.random.Generator
        Seeded by the caller.

    Raises
    ------
    ValueError
        If the temperature is negative.
    """
    if temperature < 0:
        raise ValueError(f"Temperature must not be negative, not {temperature}")
    if temperature == 0:
        return int(np.argmax(logits))
    share = np.exp((logits.astype(np.float64) - logits.max()) / temperature)
    return int(np.searchsorted(np.cumsum(share), random.random() * share.sum(), side="right"))


def main() -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("prompt", help="text to continue")
    parser.add_argument("--folder", type=Path, default=HERE, help="folder of the model")
    parser.add_argument("--tokens", type=int, default=100, help="tokens to add (%(default)s)")
    parser.add_argument("--temperature", type=float, default=0.7, help="0 is greedy (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the sampling (%(default)s)")
    options = parser.parse_args()
    model = load(options.folder)
    state = model.start()
    random = np.random.default_rng(options.seed)
    tokens = model.tokenizer.encode(options.prompt) or [BOS]
    room = model.context - len(tokens)
    if room < 0:
        parser.error(f"prompt must be at most {model.context} tokens long, not {len(tokens)}")
    for token in tokens:
        logits, _, _ = model.step(token, state)
    for _ in range(min(options.tokens, room)):
        tokens.append(sample(logits, options.temperature, random))
        if len(tokens) < model.context:
            logits, _, _ = model.step(tokens[-1], state)
    print(model.tokenizer.decode(tokens).decode(errors="replace"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
