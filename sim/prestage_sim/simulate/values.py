"""What the golden predictors say in the course of a trace, once for all cells that replay it.

Predictions do not hang on what a buffer holds, so that one pass serves all residencies, links and
policies. It is kept in memory for the traces used last, and on disk where a folder is given.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections import OrderedDict
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from prestage_hw.contract import DeviceConfig
from prestage_hw.contract.perceptron import perceptron_form
from prestage_hw.contract.records import Source
from prestage_hw.contract.registers import register_by_name
from prestage_sim.traces import Trace, model_config

from .._jit import compiled, sources_digest
from ..model.predictor.linear import head_learn
from ..model.predictor.perceptron import TraceRunner
from ..model.predictor.ranking import rank
from ..model.predictor.st_moe import create_tables, st_moe_decide
from .phases import Schedule, Visits
from .plan import Candidates

__all__ = [
    "Values",
    "forget",
    "foreseen_candidates",
    "perceptron_candidates",
    "perceptron_values",
    "st_moe_candidates",
    "trace_digest",
]

#: Tokens that are predicted at a time.
_CHUNK = 1024

#: Passes that are kept in memory.
_KEPT = 2


@dataclass(frozen=True, kw_only=True, eq=False)
class Values:
    """What a predictor says of every expert in the course of a trace.

    Parameters
    ----------
    horizons : array of ``int64``, ``[H]``
        Layers ahead of each row of ``chances``; the first is 0, token start. Empty: nothing is
        said, and the buffer knows of use rates alone.
    chances : array of ``uint8``, ``[H, S, L, E]``
        V of each step, a token where they go one by one: chance in 1/256 that the expert is chosen.
    reuse : array of ``uint8``, ``[S, L, E]``
        R: reuse value in 1/256 after the layer was routed.
    """

    horizons: NDArray[np.int64]
    chances: NDArray[np.uint8]
    reuse: NDArray[np.uint8]

    @classmethod
    def none(cls) -> Values:
        """No values at all, as of a predictor that gives none."""
        return cls(
            horizons=np.zeros(0, np.int64),
            chances=np.zeros((0, 0, 0, 0), np.uint8),
            reuse=np.zeros((0, 0, 0), np.uint8),
        )


def trace_digest(trace: Trace) -> str:
    """Digest of what a predictor sees of a trace."""
    digest = hashlib.sha256(str((trace.experts.shape, trace.experts_per_layer)).encode())
    digest.update(np.ascontiguousarray(trace.experts).tobytes())
    digest.update(np.ascontiguousarray(trace.token).tobytes())
    return digest.hexdigest()


_memory: OrderedDict[str, Values] = OrderedDict()


def forget() -> None:
    """Drop what is kept in memory."""
    _memory.clear()


def perceptron_values(
    trace: Trace, form: str, *, schedule: Schedule | None = None, folder: Path | None = None
) -> Values:
    """What a form of the golden perceptron says, that learns online from the trace.

    Contexts of a step share its weights; what the step is worth is the best of what its contexts
    say. Each context's tokens are predicted after those of the contexts before it have been
    learned, also of the same step. Chunks of a prompt and drafts are predicted, but nothing is
    learned from them, as in the device; a chance of a chunk, or of a token with its drafts, is the
    sum of theirs, at most 255.

    Parameters
    ----------
    trace : :class:`Trace`
        What it sees, from the first token on, its tables empty.
    form : :class:`str`
        ``"full"``, ``"lite"`` or ``"compressed"``.
    schedule : :class:`Schedule` or None
        Steps that tokens of the trace are members of; None stands for one token a step.
    folder : path or None
        Where it is kept on disk, so that processes share one copy; None keeps it in memory alone.
    """
    plain = schedule is None or schedule.plain
    steps = "" if schedule is None or plain else schedule.digest()
    key = hashlib.sha256(
        f"{trace_digest(trace)} {steps} {perceptron_form(form)!r}"
        f" {sources_digest(head_learn)}".encode()
    ).hexdigest()[:32]
    if key in _memory:
        _memory.move_to_end(key)
        return _memory[key]
    values = None if folder is None else _load(folder, key)
    if values is None:
        values = _predict(trace, form, None if plain else schedule)
        if folder is not None:
            _save(folder, key, values)
            values = _load(folder, key) or values
    _memory[key] = values
    while len(_memory) > _KEPT:
        _memory.popitem(last=False)
    return values


def _predict(trace: Trace, form: str, schedule: Schedule | None) -> Values:
    model = model_config(trace)
    perceptron = perceptron_form(form)
    # Models with few layers have no room for the farther heads.
    perceptron = perceptron.replace(
        heads=tuple(head for head in perceptron.heads if head.horizon < model.layers)
    )
    config = DeviceConfig(
        model=model,
        slots=model.top_k,
        expert_bytes=512,
        predictor="perceptron",
        perceptron=perceptron,
    )
    runner = TraceRunner(config, contexts=1 if schedule is None else schedule.contexts)
    horizons = sorted(runner.horizons)
    steps = trace.tokens if schedule is None else schedule.steps
    shape = (steps, model.layers, model.experts)
    values = Values(
        horizons=np.array(horizons, np.int64),
        chances=np.zeros((len(horizons), *shape), np.uint8),
        reuse=np.zeros(shape, np.uint8),
    )
    if schedule is not None:
        _predict_steps(runner, trace, schedule, values)
        return values
    for at in range(0, trace.tokens, _CHUNK):
        part = slice(at, at + _CHUNK)
        found, worth = runner.run_all(trace.experts[part], trace.token[part])
        for number, horizon in enumerate(horizons):
            values.chances[number, part] = found[horizon]
        values.reuse[part] = worth
    return values


def _predict_steps(runner: TraceRunner, trace: Trace, schedule: Schedule, values: Values) -> None:
    """Fill the values of steps, context by context."""
    bounds = np.flatnonzero(
        np.diff(schedule.context, prepend=-1) | np.diff(schedule.step_of, prepend=-1)
    )
    ends = [*bounds[1:].tolist(), len(schedule.members)]
    for begin, end in zip(bounds.tolist(), ends, strict=True):
        step, ctx = int(schedule.step_of[begin]), int(schedule.context[begin])
        experts, tokens = trace.experts[begin:end], trace.token[begin:end]
        if schedule.chunk[begin]:
            seen = [runner.look(experts, tokens, ctx=ctx, goes_on=True)]
            worth = runner.reuse(ctx)
        else:
            certain, after = runner.run_all(experts[:1], tokens[:1], ctx=ctx)
            worth, seen = after[0], [certain]
            if end > begin + 1:
                seen.append(runner.look(experts[1:], tokens[1:], ctx=ctx, goes_on=False))
        for number, horizon in enumerate(values.horizons.tolist()):
            total = sum(found[horizon].sum(axis=0, dtype=np.int64) for found in seen)
            chances = values.chances[number, step]
            np.maximum(chances, np.minimum(total, 255).astype(np.uint8), out=chances)
        reuse = values.reuse[step]
        np.maximum(reuse, worth.astype(np.uint8), out=reuse)


def _load(folder: Path, key: str) -> Values | None:
    try:
        parts: dict[str, Any] = {
            field.name: np.load(folder / f"{key}.{field.name}.npy", mmap_mode="r")
            for field in fields(Values)
        }
    except (OSError, ValueError):
        return None
    # A plain array over the mapped file: compiled functions know no other kind.
    return Values(**{name: part.view(np.ndarray) for name, part in parts.items()})


def _save(folder: Path, key: str, values: Values) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for field in fields(Values):
        with tempfile.NamedTemporaryFile(dir=folder, suffix=".part", delete=False) as file:
            np.save(file, getattr(values, field.name))
        os.replace(file.name, folder / f"{key}.{field.name}.npy")


@compiled
def _candidates(
    horizons: Any,
    chances: Any,
    near: Any,
    far: Any,
    near_most: Any,
    far_most: Any,
    start: Any,
    offset: Any,
    ahead: Any,
    expert: Any,
    score: Any,
) -> Any:
    """Candidates of all steps; how many there are."""
    tokens, layers, experts = chances.shape[1:]
    best = np.zeros(max(near_most, far_most), np.int64)
    count = 0
    step = 0
    for t in range(tokens):
        for layer in range(-1, layers):
            offset[step] = count
            step += 1
            for h in range(layers if layer < 0 else horizons.shape[0]):
                if layer < 0:
                    if h >= start:
                        break
                    number, distance = 0, h + 1
                else:
                    number, distance = h, horizons[h]
                    if distance == 0:
                        continue
                target = layer + distance
                if target >= layers:
                    continue
                values = chances[number, t, target]
                least = near if distance == 1 else far
                most = near_most if distance == 1 else far_most
                found = rank(values, least, most, best)
                for n in range(found):
                    ahead[count], expert[count] = distance, best[n]
                    score[count] = values[best[n]]
                    count += 1
    offset[step] = count
    return count


def perceptron_candidates(
    values: Values,
    *,
    top_k: int,
    threshold: int | None = None,
    far_threshold: int | None = None,
    ahead: int | None = None,
) -> Candidates:
    """What the golden perceptron proposes, by its registers.

    Parameters
    ----------
    values : :class:`Values`
        What it says.
    top_k : :class:`int`
        Experts that a layer chooses.
    threshold, far_threshold, ahead : :class:`int` or None
        The registers ``predict_threshold``, ``predict_far_threshold`` and ``predict_ahead``; None
        stands for their values after reset.
    """
    tokens, layers, experts = values.chances.shape[1:]

    def setting(value: int | None, name: str) -> int:
        return (register_by_name(name).reset or 0) if value is None else value

    near, far = min(2 * top_k, experts), min(top_k, experts)
    start = min(setting(ahead, "predict_ahead"), layers)
    most = near + start * far + layers * (near + len(values.horizons) * far)
    offset = np.zeros(tokens * (layers + 1) + 1, np.int64)
    ahead_of, expert, score = (np.empty(tokens * most, np.int16) for _ in range(3))
    count = int(
        _candidates(
            values.horizons,
            values.chances,
            setting(threshold, "predict_threshold"),
            setting(far_threshold, "predict_far_threshold"),
            near,
            far,
            start,
            offset,
            ahead_of,
            expert,
            score,
        )
    )
    ahead_of, expert, score = (part[:count].copy() for part in (ahead_of, expert, score))
    return Candidates(
        offset=offset,
        ahead=ahead_of,
        expert=expert,
        score=score,
        hint=np.full(count, int(Source.PREDICTOR), np.bool_),
    )


@compiled
def _run_st_moe(
    tables: Any, chosen: Any, context: Any, offset: Any, expert: Any, score: Any
) -> Any:
    """Candidates of all moments; only counts them where there is no room."""
    tokens, layers = chosen.shape[:2]
    count = moment = 0
    for t in range(tokens):
        tables.previous[context[t]] = -1
        offset[moment] = count
        moment += 1
        for layer in range(layers):
            offset[moment] = count
            moment += 1
            found = st_moe_decide(tables, context[t], layer, chosen[t, layer])
            for n in range(found):
                if count < expert.shape[0]:
                    expert[count] = tables.ranked[n]
                    score[count] = tables.scores[tables.ranked[n]]
                count += 1
    offset[moment] = count
    return count


def st_moe_candidates(trace: Trace, schedule: Schedule | None = None) -> Candidates:
    """What the golden ``st_moe`` proposes for each token, that learns online from the trace.

    A schedule says whose context each token is of; None stands for one context.
    """
    model = model_config(trace)
    config = DeviceConfig(model=model, slots=model.top_k, expert_bytes=512)
    offset = np.zeros(trace.tokens * (trace.layers + 1) + 1, np.int64)
    chosen = trace.experts.astype(np.int64)
    contexts = 1 if schedule is None else schedule.contexts
    context = np.zeros(trace.tokens, np.int64) if schedule is None else schedule.context
    count = 0
    for _ in range(2):
        expert, score = np.zeros(count, np.int16), np.zeros(count, np.int16)
        tables = create_tables(config)
        tables = tables._replace(
            history=np.repeat(tables.history, contexts, axis=0),
            valid=np.repeat(tables.valid, contexts, axis=0),
            previous=np.repeat(tables.previous, contexts),
        )
        count = int(_run_st_moe(tables, chosen, context, offset, expert, score))
    return Candidates(
        offset=offset,
        ahead=np.ones(count, np.int16),
        expert=expert,
        score=score,
        hint=np.full(count, int(Source.PREDICTOR), np.bool_),
    )


def foreseen_candidates(visits: Visits, *, layers: int, ahead: int) -> Candidates:
    """What layers will want, proposed that many layers before and with certainty."""
    visit = np.repeat(np.arange(len(visits.first) - 1), np.diff(visits.first))
    # At the very start the first layers are proposed, and after each visit one more.
    after = visit - ahead
    moment = np.where(after < 0, 0, after // layers * (layers + 1) + 1 + after % layers)
    moments = (len(visits.first) - 1) // layers * (layers + 1)
    return Candidates(
        offset=np.searchsorted(moment, np.arange(moments + 1)).astype(np.int64),
        ahead=np.minimum(visit + 1, ahead).astype(np.int16),
        expert=visits.experts,
        score=np.full(len(visit), 255, np.int16),
    )
