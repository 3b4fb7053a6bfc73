"""Record routing traces of TinyMoE decoding held-out text, and print routing statistics.

Each request is one sequence of the full context, decoded one token at a time with NumPy. Its first
tokens are a prompt. Most requests then follow the held-out text itself; every fourth one follows
the model's own samples.

Examples
--------
Record the shipped traces::

    python models/tinymoe/corpus.py --fetch --root /tmp/tinymoe-corpus
    python models/tinymoe/record.py --corpus /tmp/tinymoe-corpus --out models/tinymoe/traces

Print the statistics of traces that are there already, in this format, from any model::

    python models/tinymoe/record.py --stats models/tinymoe/traces/tinymoe__code.npz
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
from corpus import DOMAINS, documents
from numpy.typing import NDArray
from tinymoe import BOS, Model, load, sample

__all__ = ["main", "record", "statistics"]

PROMPT_TOKENS = 32
SAMPLED_ONE_IN = 4
TEMPERATURE = 0.8
SEED = 1


def record(
    model: Model, domain: str, text: NDArray[np.int64], requests: int
) -> dict[str, NDArray[Any]]:
    """Decode ``requests`` pieces of held-out text.

    Parameters
    ----------
    model : Model
        Decodes.
    domain : str
        Goes into the trace's ``meta`` and its seed.
    text : numpy.ndarray
        Held-out tokens, documents joined.
    requests : int
        Requests wanted; each is ``model.context`` tokens long.

    Returns
    -------
    dict of str to numpy.ndarray
        Arrays of the trace format.

    Raises
    ------
    ValueError
        If there is too little text for that many pieces without overlap.
    """
    # Pieces start at a line's start, so each may lose up to half a context.
    pitch = model.context * 3 // 2
    if requests < 1 or requests * pitch > len(text):
        raise ValueError(f"Requests must be from 1 to {len(text) // pitch}, not {requests}")
    random = np.random.default_rng([SEED, DOMAINS.index(domain)])
    places = random.permutation(len(text) // pitch)[:requests]
    breaks = [
        token == BOS or model.tokenizer.token_bytes(int(token))[:1] == b"\n" for token in text
    ]
    rows: dict[str, list[Any]] = defaultdict(list)
    sampled = []
    for request, place in enumerate(places):
        first = int(place) * pitch
        first += next((at for at in range(pitch // 3) if breaks[first + at]), 0)
        piece = [int(token) for token in text[first : first + model.context]]
        follow = request % SAMPLED_ONE_IN != SAMPLED_ONE_IN - 1
        if not follow:
            sampled.append(request)
        state = model.start()
        for at in range(model.context):
            logits, routing, scores = model.step(piece[at], state)
            rows["experts"].append(routing)
            rows["scores"].append(scores.astype(np.float16))
            rows["request_id"].append(request)
            rows["is_decode"].append(at >= PROMPT_TOKENS)
            rows["token"].append(piece[at])
            if not follow and PROMPT_TOKENS <= at + 1 < model.context:
                piece[at + 1] = sample(logits, TEMPERATURE, random)
        print(f"\r{domain}: request {request + 1} of {requests}", end="", file=sys.stderr)
    print(file=sys.stderr)
    meta = {
        "model": "tinymoe",
        "domain": domain,
        "num_experts": model.experts,
        "native_top_k": model.top_k,
        "requests": requests,
        "expert_bytes": model.expert_bytes,
        "prompt_tokens": PROMPT_TOKENS,
        "sampled_requests": sampled,
        "temperature": TEMPERATURE,
    }
    return {
        "experts": np.stack(rows["experts"]),
        "scores": np.stack(rows["scores"]),
        "request_id": np.array(rows["request_id"], np.int32),
        "is_decode": np.array(rows["is_decode"], np.bool_),
        "token": np.array(rows["token"], np.int32),
        "layer_ids": np.arange(model.layers, dtype=np.int16),
        "meta": np.array(json.dumps(meta)),
    }


def _recall(guess: NDArray[Any], truth: NDArray[Any], size: int) -> float:
    """Share of true experts [n, k] among the ``size`` best of the scores ``guess`` [n, E]."""
    best = np.argsort(-guess, axis=1, kind="stable")[:, :size]
    return float((best[:, :, None] == truth[:, None, :]).any(1).mean())


def statistics(trace: dict[str, NDArray[Any]]) -> dict[str, Any]:
    """Measure how skewed, how sticky and how predictable the routing is.

    Predictors are tables counted on half of the requests and scored on the other half, guessing k
    experts and 2k experts a layer; a trace of few requests has no such scores.

    Parameters
    ----------
    trace : dict of str to numpy.ndarray
        Arrays of the trace format.

    Returns
    -------
    dict
        ``entropy_bits``, ``busiest_share``, ``reuse`` and ``reuse_by_chance`` by layer; ``recall``
        of each predictor as a mean over layers, at k and at 2k.
    """
    ids = trace["experts"].astype(np.int64)
    total, layers, k = ids.shape
    experts = int(json.loads(str(trace["meta"]))["num_experts"])
    request, token = trace["request_id"], trace["token"]
    hot = np.zeros((total, layers, experts), np.float32)
    np.put_along_axis(hot, ids, 1.0, axis=2)
    share = hot.mean(0) / k
    entropy = -(share * np.log2(np.maximum(share, 1e-12))).sum(1)
    follows = np.flatnonzero(request[1:] == request[:-1]) + 1
    reuse = (hot[follows] * hot[follows - 1]).sum(2).mean(0) / k
    # Groups of four hold one sampled request each, so both halves hold the same mixture.
    train = request // SAMPLED_ONE_IN % 2 == 0
    score = ~train
    score_rows = np.intersect1d(np.flatnonzero(score), follows)
    recall: dict[str, list[list[float]]] = defaultdict(list)
    vocabulary = np.unique(token, return_inverse=True)[1].ravel()
    for layer in range(layers if len(score_rows) else 0):
        truth = ids[score_rows, layer]
        popular = hot[train, layer].mean(0)
        by_token = np.zeros((vocabulary.max() + 1, experts), np.float32)
        np.add.at(by_token, vocabulary[train], hot[train, layer])
        guesses = {
            "popular": np.broadcast_to(popular, (len(score_rows), experts)),
            "previous token": hot[score_rows - 1, layer] + 0.01 * popular,
            "same token": by_token[vocabulary[score_rows]] + 0.5 * popular,
        }
        if layer:
            # Correlation of experts between neighbouring layers, as counts.
            pair = hot[train, layer - 1].T @ hot[train, layer]
            pair /= np.maximum(hot[train, layer - 1].sum(0)[:, None], 1)
            guesses["layer before"] = hot[score_rows, layer - 1] @ pair
        for name, guess in guesses.items():
            recall[name].append([_recall(guess, truth, k), _recall(guess, truth, 2 * k)])
    return {
        "tokens": total,
        "entropy_bits": [round(float(x), 3) for x in entropy],
        "uniform_bits": round(float(np.log2(experts)), 3),
        "busiest_share": [round(float(x), 3) for x in share.max(1)],
        "reuse": [round(float(x), 3) for x in reuse],
        "reuse_by_chance": [round(float(x), 3) for x in (share * share).sum(1) * k],
        "recall": {
            name: [round(float(x), 3) for x in np.mean(values, axis=0)]
            for name, values in recall.items()
        },
    }


def main() -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--corpus", type=Path, help="folder filled by corpus.py")
    parser.add_argument("--model", type=Path, default=Path(__file__).resolve().parent)
    parser.add_argument("--out", type=Path, help="folder for the two traces")
    parser.add_argument("--requests", type=int, default=32, help="a domain (%(default)s)")
    parser.add_argument("--stats", type=Path, nargs="+", default=[], help="traces to measure")
    options = parser.parse_args()
    paths = list(options.stats)
    if options.corpus and options.out:
        model = load(options.model)
        everything = documents(options.corpus)
        options.out.mkdir(parents=True, exist_ok=True)
        for domain in DOMAINS:
            joined: list[int] = []
            for document in everything:
                if document.domain == domain and document.held_out:
                    joined += [BOS, *model.tokenizer.encode(document.text)]
            arrays = record(model, domain, np.array(joined), options.requests)
            paths.append(options.out / f"tinymoe__{domain}.npz")
            np.savez_compressed(paths[-1], **arrays)  # type: ignore[arg-type]
    elif not paths:
        parser.error("either --corpus and --out, or --stats")
    for path in paths:
        with np.load(path) as archive:
            print(path.name, json.dumps(statistics(dict(archive)), indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
