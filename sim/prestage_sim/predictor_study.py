"""What the predictor's table size is worth: recall, over-fetch and precision on traces.

::

    python -m prestage_sim.predictor_study TRACE.npz [TRACE.npz ...] [--successors 4,8,16]
    python -m prestage_sim.predictor_study TRACE.npz --profile OTHER.npz
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike, NDArray

from prestage_hw.contract import DeviceConfig, ModelConfig

from .model.predictor import create_predictor
from .profile import CORRELATION_TABLE, correlation_profile

__all__ = ["StudyResult", "main", "study"]

_DECODE = 1


@dataclass(frozen=True, kw_only=True)
class StudyResult:
    """Quality of a predictor over a trace, layers 1 to L - 1 of every token.

    Parameters
    ----------
    pairs : :class:`int`
        Layers predicted.
    recall : :class:`float`
        Share of the k true experts that are among the candidates.
    recall_at_k : :class:`float`
        Share of the k true experts that are among the k best candidates.
    over_fetch : :class:`float`
        Candidates / k.
    precision : :class:`float`
        Share of the candidates that came true.
    """

    pairs: int
    recall: float
    recall_at_k: float
    over_fetch: float
    precision: float


def study(
    experts: ArrayLike, *, config: DeviceConfig, profile: NDArray[np.uint32] | None = None
) -> StudyResult:
    """Replay a trace through the golden model, one context, and compare candidates with the truth.

    Parameters
    ----------
    experts : array of :class:`int`, shape ``[tokens, layers, top_k]``
        Chosen experts.
    config : :class:`DeviceConfig`
        Device whose predictor is studied.
    profile : array of ``uint32`` or None
        Words of the correlation table to start from; None starts from a cleared table.
    """
    predictor = create_predictor(config)
    if profile is not None:
        for word in np.flatnonzero(profile).tolist():
            predictor.write_table(CORRELATION_TABLE, word, int(profile[word]))
    layers, top_k = config.model.layers, config.model.top_k
    pairs = proposed = found = found_at_k = stamp = 0
    for token in np.asarray(experts).tolist():
        predictor.begin(0, 0xFFFFFFFF, _DECODE)
        ranked: list[int] = []
        for layer in range(layers):
            choice = token[layer]
            if layer:
                hits = [expert in choice for expert in ranked]
                pairs += 1
                proposed += len(ranked)
                found += sum(hits)
                found_at_k += sum(hits[:top_k])
            stamp = (stamp + 1) & 0xFF
            ranked = [candidate[2] for candidate in predictor.decide(0, layer, choice, stamp)]
    true = max(1, pairs * top_k)
    return StudyResult(
        pairs=pairs,
        recall=found / true,
        recall_at_k=found_at_k / true,
        over_fetch=proposed / true,
        precision=found / max(1, proposed),
    )


def _load(path: Path) -> tuple[NDArray[np.int64], ModelConfig]:
    with np.load(path, allow_pickle=False) as trace:
        experts = trace["experts"].astype(np.int64)
        count = json.loads(str(trace["meta"])).get("num_experts", int(experts.max()) + 1)
    _, layers, top_k = experts.shape
    return experts, ModelConfig(name=path.stem, layers=layers, experts=count, top_k=top_k)


def main(arguments: Sequence[str] | None = None) -> int:
    """Print a Markdown table, one line for each trace and table size."""
    parser = argparse.ArgumentParser(prog="prestage_sim.predictor_study", description=__doc__)
    parser.add_argument("traces", nargs="+", type=Path, metavar="TRACE")
    parser.add_argument("--successors", default="1,2,4,6,8,12,16,32", help="values of K, by commas")
    parser.add_argument("--profile", type=Path, help="trace that fills the table beforehand")
    parser.add_argument("--first", type=int, default=None, help="use only the first tokens")
    options = parser.parse_args(arguments)
    print("| trace | tokens | K | recall | recall@k | over-fetch | precision |")
    print("|---|---|---|---|---|---|---|")
    for path in options.traces:
        experts, model = _load(path)
        experts = experts[: options.first]
        for successors in map(int, options.successors.split(",")):
            if successors > model.experts:
                continue
            config = DeviceConfig(model=model, slots=model.top_k, successors=successors)
            profile = None
            if options.profile is not None:
                profile = correlation_profile(_load(options.profile)[0], config=config)
            result = study(experts, config=config, profile=profile)
            print(
                f"| {path.stem} | {len(experts)} | {successors} | {result.recall:.3f} |"
                f" {result.recall_at_k:.3f} | {result.over_fetch:.2f} | {result.precision:.3f} |",
                flush=True,
            )
    return 0


if __name__ == "__main__":
    sys.exit(main())
