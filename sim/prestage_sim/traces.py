"""Routing traces: what a Mixture-of-Experts router chose, token by token.

Four formats are read: our own ``.npz``, JSON lines of routed experts as vLLM and SGLang return
them, and CSV. ``docs/traces.md`` describes each. All end in one :class:`Trace`, which is checked
when it is made.
"""

from __future__ import annotations

import base64
import binascii
import csv
import io
import json
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from prestage_hw.contract import PRESETS, ModelConfig

__all__ = [
    "FORMATS",
    "UNKNOWN_TOKEN",
    "Trace",
    "TraceError",
    "format_of",
    "load_trace",
    "model_config",
    "save_trace",
    "write_trace",
]

#: Names of the formats, with the suffixes that stand for them.
FORMATS: dict[str, tuple[str, ...]] = {
    "npz": (".npz",),
    "jsonl": (".jsonl", ".ndjson", ".json"),
    "csv": (".csv",),
}

#: Token id where the input token isn't known.
UNKNOWN_TOKEN = -1

# Ids are stored as 16-bit numbers, and the contract allows 1,024 experts.
_MOST_EXPERTS = 1024
_CSV_HEAD = ("step", "request_id", "is_decode", "token", "layer")


class TraceError(ValueError):
    """A trace that can't be read or that breaks a rule of the format."""


@dataclass(frozen=True, init=False, eq=False)
class Trace:
    """Routing of T tokens through L MoE layers with k experts each.

    Parameters
    ----------
    experts : array of int16, ``[T, L, k]``
        Expert ids the router chose, descending weight. The k ids of a row are distinct.
    experts_per_layer : :class:`int`
        Experts that a layer has (E), 2 to 1024; 0 stands for one more than the highest id.
    request_id : array of int32, ``[T]``, or None
        Request of each token; the tokens of one request are contiguous and in order. None stands
        for one request.
    is_decode : array of bool, ``[T]``, or None
        False for tokens of a prompt. None stands for decode throughout.
    token : array of int32, ``[T]``, or None
        Id of the step's *input* token, -1 where unknown.
    layer_ids : array of int16, ``[L]``, or None
        Model layer of each column. None stands for 0 to L - 1.
    scores : array of float16, ``[T, L, k]``, or None
        Routing weight of each choice.
    meta : mapping
        Anything else: ``model``, ``domain``, ``native_top_k``, ...

    Raises
    ------
    TraceError
        If an array has the wrong shape or kind, there is no token, an id is out of range or occurs
        twice in a row, or ``meta`` contradicts the arrays.
    """

    experts: NDArray[np.int16]
    experts_per_layer: int
    request_id: NDArray[np.int32]
    is_decode: NDArray[np.bool_]
    token: NDArray[np.int32]
    layer_ids: NDArray[np.int16]
    scores: NDArray[np.float16] | None
    meta: Mapping[str, Any]

    def __init__(
        self,
        *,
        experts: ArrayLike,
        experts_per_layer: int = 0,
        request_id: ArrayLike | None = None,
        is_decode: ArrayLike | None = None,
        token: ArrayLike | None = None,
        layer_ids: ArrayLike | None = None,
        scores: ArrayLike | None = None,
        meta: Mapping[str, Any] | None = None,
    ) -> None:
        experts = np.asarray(experts)
        meta = {} if meta is None else meta
        if experts.ndim != 3 or experts.dtype.kind not in "iu":
            raise TraceError(
                "Trace experts must be integers of shape [tokens, layers, top_k],"
                f" not {experts.dtype} of shape {list(experts.shape)}"
            )
        tokens, layers, top_k = experts.shape
        if tokens == 0:
            raise TraceError("Trace must hold at least one token, but holds none")
        if layers == 0 or top_k == 0:
            raise TraceError(
                f"Trace must have at least one layer and one expert a row, not shape"
                f" {list(experts.shape)}"
            )
        _check_meta(meta, tokens=tokens, layers=layers, top_k=top_k)
        count = experts_per_layer or int(experts.max()) + 1
        if not experts_per_layer:
            count = max(2, top_k, count)
        if not 2 <= count <= _MOST_EXPERTS:
            raise TraceError(
                f"Trace must have 2 to {_MOST_EXPERTS} experts a layer, but has {count}"
            )
        _check_ids(experts, count=count)
        _check_distinct(experts)
        put = object.__setattr__
        put(self, "experts", np.ascontiguousarray(experts, dtype=np.int16))
        put(self, "experts_per_layer", count)
        put(self, "request_id", _column(request_id, "request_id", np.int32, tokens, 0))
        if len(np.unique(self.request_id)) != self.requests:
            raise TraceError(
                "Tokens of one request must be contiguous, but a request id comes back"
            )
        put(self, "is_decode", _column(is_decode, "is_decode", np.bool_, tokens, True))
        put(self, "token", _column(token, "token", np.int32, tokens, UNKNOWN_TOKEN))
        if layer_ids is None:
            put(self, "layer_ids", np.arange(layers, dtype=np.int16))
        else:
            put(self, "layer_ids", _column(layer_ids, "layer_ids", np.int16, layers, 0))
        if scores is not None:
            given = np.asarray(scores)
            if given.shape != experts.shape or given.dtype.kind not in "fiu":
                raise TraceError(
                    f"Trace scores must be numbers of the experts' shape {list(experts.shape)},"
                    f" not {given.dtype} of shape {list(given.shape)}"
                )
            scores = given.astype(np.float16)
        put(self, "scores", scores)
        put(self, "meta", meta)

    @property
    def tokens(self) -> int:
        """Number of tokens (T)."""
        return int(self.experts.shape[0])

    @property
    def layers(self) -> int:
        """Number of MoE layers (L)."""
        return int(self.experts.shape[1])

    @property
    def top_k(self) -> int:
        """Experts chosen for each token and layer (k)."""
        return int(self.experts.shape[2])

    @property
    def requests(self) -> int:
        """Number of requests."""
        return 1 + int(np.count_nonzero(np.diff(self.request_id)))

    @property
    def model(self) -> str:
        """Name of the model as recorded, ``"unknown"`` where it isn't."""
        name = self.meta.get("model")
        return name if isinstance(name, str) and name else "unknown"

    def named(self, model: str) -> Trace:
        """The same trace with another name of the model recorded."""
        return replace(self, meta={**self.meta, "model": model})

    def first(self, tokens: int) -> Trace:
        """The first ``tokens`` tokens, or the whole trace if it's shorter.

        Raises
        ------
        TraceError
            If ``tokens`` is less than 1.
        """
        if tokens < 1:
            raise TraceError(f"Token count must be a positive integer, not {tokens}")
        if tokens >= self.tokens:
            return self
        meta = {k: v for k, v in self.meta.items() if k not in ("tokens", "requests")}
        return replace(
            self,
            experts=self.experts[:tokens],
            request_id=self.request_id[:tokens],
            is_decode=self.is_decode[:tokens],
            token=self.token[:tokens],
            scores=None if self.scores is None else self.scores[:tokens],
            meta=meta,
        )


def _check_meta(meta: Mapping[str, Any], *, tokens: int, layers: int, top_k: int) -> None:
    for name, actual in (("tokens", tokens), ("layers", layers), ("top_k", top_k)):
        stated = meta.get(name)
        if stated is not None and stated != actual:
            raise TraceError(
                f"Trace says {name} = {stated!r} in its meta, but its arrays have {actual}"
            )


def _where(position: Sequence[Any]) -> str:
    return f"token {int(position[0])}, layer {int(position[1])}"


def _check_ids(experts: NDArray[Any], *, count: int) -> None:
    bad = (experts < 0) | (experts >= count)
    if bad.any():
        at = np.argwhere(bad)[0]
        raise TraceError(
            f"Expert ids must be between 0 and {count - 1}, but {_where(at)} has"
            f" {int(experts[tuple(at)])}"
        )


def _check_distinct(experts: NDArray[Any]) -> None:
    ordered = np.sort(experts, axis=-1)
    twice = np.argwhere(ordered[..., 1:] == ordered[..., :-1])
    if len(twice):
        at = twice[0]
        raise TraceError(
            f"Expert ids of a row must be distinct, but {_where(at)} has"
            f" {int(ordered[tuple(at)])} twice: {experts[at[0], at[1]].tolist()}"
        )


def _column(values: Any, name: str, dtype: Any, length: int, fill: Any) -> NDArray[Any]:
    if values is None:
        return np.full(length, fill, dtype=dtype)
    array = np.asarray(values)
    if array.shape != (length,) or array.dtype.kind not in "iub":
        raise TraceError(
            f"Trace {name} must be integers of shape [{length}], not {array.dtype} of shape"
            f" {list(array.shape)}"
        )
    return np.ascontiguousarray(array, dtype=dtype)


def format_of(path: str | Path, *, name: str | None = None) -> str:
    """Format of a trace file: ``name`` if given, else by the file's suffix.

    Raises
    ------
    TraceError
        If the name or the suffix is unknown.
    """
    if name is not None:
        if name not in FORMATS:
            raise TraceError(f"Trace format must be one of {', '.join(FORMATS)}, not {name!r}")
        return name
    suffix = Path(path).suffix.lower()
    for format_name, suffixes in FORMATS.items():
        if suffix in suffixes:
            return format_name
    known = ", ".join(s for suffixes in FORMATS.values() for s in suffixes)
    raise TraceError(f"Trace file name must end in one of {known}, not {str(path)!r}")


def load_trace(
    path: str | Path,
    *,
    name: str | None = None,
    experts: int | None = None,
    layers: int | None = None,
    top_k: int | None = None,
) -> Trace:
    """Read a trace.

    Parameters
    ----------
    path : path
        File to read.
    name : :class:`str` or None
        Format, ``"npz"``, ``"jsonl"`` or ``"csv"``. None stands for what the suffix says.
    experts : :class:`int` or None
        Experts a layer, where the file doesn't say.
    layers, top_k : :class:`int` or None
        Shape of a row that the file gives as flat numbers (SGLang). Where the file has a shape of
        its own they must agree with it.

    Raises
    ------
    TraceError
        If the file is missing, damaged or breaks a rule; the message starts with the path.
    """
    reader = {"npz": _read_npz, "jsonl": _read_jsonl, "csv": _read_csv}[format_of(path, name=name)]
    try:
        with Path(path).open("rb") as file:
            trace = reader(file, experts=experts, layers=layers, top_k=top_k)
    except TraceError as error:
        raise TraceError(f"{path}: {error}") from error
    except FileNotFoundError:
        raise TraceError(f"{path}: no such file") from None
    except IsADirectoryError:
        raise TraceError(f"{path}: is a directory, not a trace") from None
    except UnicodeDecodeError as error:
        raise TraceError(
            f"{path}: is not UTF-8 text ({error.reason} at byte {error.start})"
        ) from error
    except OSError as error:
        raise TraceError(f"{path}: can't be read: {error.strerror or error}") from error
    for what, wanted, actual in (("layers", layers, trace.layers), ("top-k", top_k, trace.top_k)):
        if wanted is not None and wanted != actual:
            raise TraceError(f"{path}: has {what} {actual}, but {wanted} was asked for")
    return trace


def _read_npz(
    file: IO[bytes], *, experts: int | None, layers: int | None, top_k: int | None
) -> Trace:
    try:
        with np.load(file, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files}
    except (
        zipfile.BadZipFile,
        zlib.error,
        EOFError,
        ValueError,
        KeyError,
        NotImplementedError,
        AttributeError,
    ) as error:
        raise TraceError(f"is not a whole .npz file, it may be truncated: {error}") from error
    if "experts" not in arrays:
        raise TraceError(f"has no array 'experts', only: {', '.join(sorted(arrays)) or 'nothing'}")
    meta: dict[str, Any] = {}
    if "meta" in arrays:
        try:
            meta = json.loads(str(arrays["meta"]))
        except json.JSONDecodeError as error:
            raise TraceError(f"has a meta array that isn't JSON: {error}") from error
        if not isinstance(meta, dict):
            raise TraceError("has a meta array that isn't a JSON object")
    return Trace(
        experts=arrays["experts"],
        experts_per_layer=_expert_count(meta, experts),
        request_id=arrays.get("request_id"),
        is_decode=arrays.get("is_decode"),
        token=arrays.get("token"),
        layer_ids=arrays.get("layer_ids"),
        scores=arrays.get("scores"),
        meta=meta,
    )


def _expert_count(meta: Mapping[str, Any], wanted: int | None) -> int:
    stated = meta.get("num_experts")
    if stated is not None and (isinstance(stated, bool) or not isinstance(stated, int)):
        raise TraceError(f"Trace num_experts must be an integer, not {stated!r}")
    if wanted is not None:
        if stated is not None and stated != wanted:
            raise TraceError(f"has {stated} experts a layer, but {wanted} were asked for")
        return wanted
    if stated is not None:
        if stated < 1:
            raise TraceError(f"Trace num_experts must be a positive integer, not {stated}")
        return int(stated)
    known = _preset_for(str(meta.get("model") or ""))
    return known.experts if known is not None else 0


@dataclass(kw_only=True)
class _Part:
    """Tokens of one request, as one line of JSON gives them."""

    experts: NDArray[Any]
    is_decode: NDArray[np.bool_] | None
    token: NDArray[Any] | None
    scores: NDArray[Any] | None


def _read_jsonl(
    file: IO[bytes], *, experts: int | None, layers: int | None, top_k: int | None
) -> Trace:
    meta: dict[str, Any] = {}
    layer_ids = None
    parts: list[_Part] = []
    for number, value in _json_values(file):
        try:
            if isinstance(value, dict) and "prestage_trace" in value:
                meta = dict(value.get("meta") or {})
                layer_ids = value.get("layer_ids")
                continue
            if isinstance(value, dict) and isinstance(value.get("model"), str):
                meta.setdefault("model", value["model"])
            parts.extend(_parts(value, layers=layers, top_k=top_k))
        except TraceError as error:
            raise TraceError(f"line {number}: {error}") from error
    if not parts:
        raise TraceError("Trace must hold at least one token, but holds none")
    shape = parts[0].experts.shape[1:]
    for index, part in enumerate(parts):
        if part.experts.shape[1:] != shape:
            raise TraceError(
                f"request {index} has shape [tokens, {_dims(part.experts)}],"
                f" but request 0 has [tokens, {_dims(parts[0].experts)}]"
            )
    lengths = [len(part.experts) for part in parts]

    def joined(name: str, fill: Any) -> NDArray[Any] | None:
        values = [getattr(part, name) for part in parts]
        if all(v is None for v in values):
            return None
        return np.concatenate(
            [np.full(n, fill) if v is None else v for v, n in zip(values, lengths, strict=True)]
        )

    scores = [part.scores for part in parts if part.scores is not None]
    return Trace(
        experts=np.concatenate([part.experts for part in parts]),
        experts_per_layer=_expert_count(meta, experts),
        request_id=np.repeat(np.arange(len(parts), dtype=np.int32), lengths),
        is_decode=joined("is_decode", True),
        token=joined("token", UNKNOWN_TOKEN),
        layer_ids=None if layer_ids is None else np.asarray(layer_ids),
        scores=np.concatenate(scores) if len(scores) == len(parts) else None,
        meta=meta,
    )


def _dims(experts: NDArray[Any]) -> str:
    return ", ".join(str(n) for n in experts.shape[1:])


def _json_values(file: IO[bytes]) -> Iterator[tuple[int, Any]]:
    """Number and value of each line; one JSON value over several lines counts as one line."""
    text = file.read().decode("utf-8-sig")
    lines = [(n, line) for n, line in enumerate(text.splitlines(), start=1) if line.strip()]
    for number, line in lines:
        try:
            value = json.loads(line)
        except json.JSONDecodeError as error:
            if number == lines[0][0] and len(lines) > 1:
                try:
                    whole = json.loads(text)
                except json.JSONDecodeError:
                    pass
                else:
                    yield number, whole
                    return
            raise TraceError(f"line {number}: isn't JSON: {error}") from error
        yield number, value


def _parts(value: Any, *, layers: int | None, top_k: int | None) -> Iterator[_Part]:
    """Requests in one JSON value: a response with choices, one completion, or the bare array."""
    if isinstance(value, list):
        if value and all(isinstance(item, dict) for item in value):
            for item in value:
                yield from _parts(item, layers=layers, top_k=top_k)
            return
        value = {"routed_experts": value}
    if not isinstance(value, dict):
        raise TraceError(f"must be an object or an array, not {type(value).__name__}")
    choices = value.get("choices", value.get("outputs"))
    if choices is None:
        choices = [value]
    elif not isinstance(choices, list) or not all(isinstance(c, dict) for c in choices):
        raise TraceError("'choices' must be an array of objects")
    for choice in choices:
        yield _part(value, choice, layers=layers, top_k=top_k)


def _part(
    response: Mapping[str, Any],
    choice: Mapping[str, Any],
    *,
    layers: int | None,
    top_k: int | None,
) -> _Part:
    raw = None
    # SGLang puts the array in meta_info (/generate) or sglext (its OpenAI endpoints), vLLM in the
    # choice itself.
    for holder in (choice, choice.get("meta_info"), choice.get("sglext")):
        if isinstance(holder, Mapping) and holder.get("routed_experts") is not None:
            raw = holder["routed_experts"]
            break
    if raw is None:
        raise TraceError(
            "has no 'routed_experts' (nor meta_info.routed_experts or sglext.routed_experts)"
        )
    experts = _expert_array(raw, layers=layers, top_k=top_k)
    prompt_tokens: int | None = None
    prompt = response.get("prompt_routed_experts")
    if prompt is not None:
        head = _expert_array(prompt, layers=layers, top_k=top_k)
        if head.shape[1:] != experts.shape[1:]:
            raise TraceError(
                f"prompt_routed_experts has shape [tokens, {_dims(head)}],"
                f" but routed_experts has [tokens, {_dims(experts)}]"
            )
        experts = np.concatenate([head, experts])
        prompt_tokens = len(head)
    prompt_ids = _token_ids(response, "prompt_token_ids")
    if prompt_ids is None:
        prompt_ids = _token_ids(choice, "prompt_token_ids")
    output_ids = _token_ids(choice, "token_ids")
    if output_ids is None:
        output_ids = _token_ids(choice, "output_ids")
    if prompt_tokens is None:
        info = choice.get("meta_info")
        counted = info.get("prompt_tokens") if isinstance(info, Mapping) else None
        if prompt_ids is not None:
            prompt_tokens = len(prompt_ids)
        elif isinstance(counted, int):
            prompt_tokens = counted
    count = len(experts)
    is_decode = None
    if "is_decode" in choice:
        is_decode = _column(choice["is_decode"], "is_decode", np.bool_, count, True)
    elif prompt_tokens is not None:
        is_decode = np.arange(count) >= prompt_tokens
    token = None
    if "token" in choice:
        token = _column(choice["token"], "token", np.int64, count, UNKNOWN_TOKEN)
    elif prompt_ids is not None:
        known = (prompt_ids + (output_ids or []))[:count]
        token = np.full(count, UNKNOWN_TOKEN, dtype=np.int64)
        token[: len(known)] = known
    scores = choice.get("scores")
    return _Part(
        experts=experts,
        is_decode=is_decode,
        token=token,
        scores=None if scores is None else _array(scores, "scores"),
    )


def _token_ids(holder: Mapping[str, Any], name: str) -> list[int] | None:
    ids = holder.get(name)
    if isinstance(ids, list) and all(isinstance(i, int) for i in ids):
        return ids
    return None


def _array(value: Any, name: str) -> NDArray[Any]:
    try:
        return np.array(value)
    except ValueError:
        raise TraceError(f"{name} must have the same number of experts in every row") from None


def _expert_array(raw: Any, *, layers: int | None, top_k: int | None) -> NDArray[Any]:
    if isinstance(raw, str):
        return _expert_bytes(raw, layers=layers, top_k=top_k)
    if raw == []:
        raise TraceError("Trace must hold at least one token, but holds none")
    array = _array(raw, "routed_experts")
    if array.ndim != 3 or array.dtype.kind not in "iu":
        raise TraceError(
            f"routed_experts must be integers of shape [tokens, layers, top_k],"
            f" not {array.dtype} of shape {list(array.shape)}"
        )
    return array


def _expert_bytes(raw: str, *, layers: int | None, top_k: int | None) -> NDArray[Any]:
    try:
        data = base64.b64decode(raw, validate=True)
    except (binascii.Error, ValueError) as error:
        raise TraceError(f"routed_experts isn't base64: {error}") from error
    if data.startswith(b"\x93NUMPY"):
        try:
            array: NDArray[Any] = np.load(io.BytesIO(data), allow_pickle=False)
        except (ValueError, EOFError) as error:
            raise TraceError(f"routed_experts isn't a whole .npy: {error}") from error
        if array.ndim != 3:
            raise TraceError(
                f"routed_experts must have shape [tokens, layers, top_k], not {list(array.shape)}"
            )
        return array
    # SGLang sends bare 32-bit numbers: without the shape they can't be told apart.
    if layers is None or top_k is None:
        raise TraceError(
            "routed_experts are bare numbers without a shape (SGLang): give --layers and --top-k"
        )
    if layers < 1 or top_k < 1 or len(data) % (4 * layers * top_k):
        raise TraceError(
            f"routed_experts holds {len(data) // 4} numbers, which isn't a multiple of"
            f" {layers} layers x {top_k} experts"
        )
    return np.frombuffer(data, dtype="<i4").reshape(-1, layers, top_k)


def _read_csv(
    file: IO[bytes], *, experts: int | None, layers: int | None, top_k: int | None
) -> Trace:
    text = io.StringIO(file.read().decode("utf-8-sig"), newline="")
    meta: dict[str, Any] = {}
    start = text.readline()
    if start.startswith("#"):
        try:
            meta = json.loads(start[1:])
        except json.JSONDecodeError as error:
            raise TraceError(f"line 1: the comment isn't JSON: {error}") from error
        start = text.readline()
    head = [name.strip() for name in next(csv.reader([start]), [])]
    columns = {name: at for at, name in enumerate(head)}
    count = sum(1 for name in head if name[:1] == "e" and name[1:].isdigit())
    needed = ["step", "layer", *(f"e{i}" for i in range(count))]
    missing = [name for name in needed if name not in columns]
    if missing or count == 0:
        raise TraceError(
            f"header must name the columns step, layer, e0, e1, ..., not"
            f" {', '.join(head) or 'nothing'}"
        )
    with_scores = all(f"s{i}" in columns for i in range(count))
    rows = [row for row in csv.reader(text) if row]
    if not rows:
        raise TraceError("Trace must hold at least one token, but holds none")
    line = 2 + bool(meta)
    for at, row in enumerate(rows):
        if len(row) != len(head):
            raise TraceError(
                f"line {at + line}: has {len(row)} fields, but the header has {len(head)}"
            )
    table = list(zip(*rows, strict=True))

    def column(name: str, dtype: Any) -> NDArray[Any]:
        try:
            return np.array(table[columns[name]]).astype(dtype)
        except (ValueError, OverflowError) as error:
            raise TraceError(f"column {name} must hold numbers: {error}") from error

    step = column("step", np.int64)
    layer = column("layer", np.int64)
    depth = len(np.unique(layer))
    if len(rows) % depth or (layer.reshape(-1, depth) != layer[:depth]).any():
        raise TraceError(f"every step must have the same {depth} layers in the same order")
    steps = step.reshape(-1, depth)
    if (steps != steps[:, :1]).any() or len(np.unique(steps[:, 0])) != len(steps):
        raise TraceError("the rows of one step must be contiguous, one a layer")
    shape = (len(steps), depth)

    def per_token(name: str) -> NDArray[Any] | None:
        return column(name, np.int64).reshape(shape)[:, 0] if name in columns else None

    is_decode = per_token("is_decode")
    return Trace(
        experts=np.stack([column(f"e{i}", np.int64).reshape(shape) for i in range(count)], axis=-1),
        experts_per_layer=_expert_count(meta, experts),
        request_id=per_token("request_id"),
        is_decode=None if is_decode is None else is_decode != 0,
        token=per_token("token"),
        layer_ids=layer[:depth].astype(np.int16),
        scores=(
            np.stack([column(f"s{i}", np.float64).reshape(shape) for i in range(count)], axis=-1)
            if with_scores
            else None
        ),
        meta=meta,
    )


def save_trace(path: str | Path, trace: Trace, *, name: str | None = None) -> None:
    """Write a trace; the suffix or ``name`` says in which format. See :func:`write_trace`."""
    format_name = format_of(path, name=name)
    with Path(path).open("wb") as file:
        write_trace(file, trace, name=format_name)


def write_trace(file: IO[bytes], trace: Trace, *, name: str) -> None:
    """Write a trace to an open binary file.

    Parameters
    ----------
    file : binary file
        Where to write.
    trace : :class:`Trace`
        What to write. Every format keeps everything.
    name : :class:`str`
        Format, ``"npz"``, ``"jsonl"`` or ``"csv"``.
    """
    {"npz": _write_npz, "jsonl": _write_jsonl, "csv": _write_csv}[format_of("", name=name)](
        file, trace
    )


def _full_meta(trace: Trace) -> dict[str, Any]:
    return {
        **trace.meta,
        "num_experts": trace.experts_per_layer,
        "tokens": trace.tokens,
        "layers": trace.layers,
        "top_k": trace.top_k,
        "requests": trace.requests,
    }


def _write_npz(file: IO[bytes], trace: Trace) -> None:
    arrays: dict[str, NDArray[Any]] = {
        "experts": trace.experts,
        "request_id": trace.request_id,
        "is_decode": trace.is_decode,
        "token": trace.token,
        "layer_ids": trace.layer_ids,
        "meta": np.array(json.dumps(_full_meta(trace))),
    }
    if trace.scores is not None:
        arrays["scores"] = trace.scores
    np.savez_compressed(file, **arrays)  # type: ignore[arg-type]


def _write_jsonl(file: IO[bytes], trace: Trace) -> None:
    meta = {k: v for k, v in _full_meta(trace).items() if k not in ("tokens", "requests")}
    head = {"prestage_trace": 1, "layer_ids": trace.layer_ids.tolist(), "meta": meta}
    file.write(json.dumps(head).encode() + b"\n")
    edges = [0, *(np.flatnonzero(np.diff(trace.request_id)) + 1).tolist(), trace.tokens]
    for start, end in zip(edges, edges[1:], strict=False):
        line: dict[str, Any] = {
            "is_decode": trace.is_decode[start:end].astype(int).tolist(),
            "token": trace.token[start:end].tolist(),
            "routed_experts": trace.experts[start:end].tolist(),
        }
        if trace.scores is not None:
            line["scores"] = trace.scores[start:end].tolist()
        file.write(json.dumps(line, separators=(",", ":")).encode() + b"\n")


def _write_csv(file: IO[bytes], trace: Trace) -> None:
    text = io.TextIOWrapper(file, encoding="utf-8", newline="", write_through=True)
    text.write(f"# {json.dumps(_full_meta(trace))}\n")
    writer = csv.writer(text, lineterminator="\n")
    names = [f"e{i}" for i in range(trace.top_k)]
    if trace.scores is not None:
        names += [f"s{i}" for i in range(trace.top_k)]
    writer.writerow([*_CSV_HEAD, *names])
    per_token = zip(
        trace.request_id.tolist(),
        trace.is_decode.astype(int).tolist(),
        trace.token.tolist(),
        strict=True,
    )
    layer_ids = trace.layer_ids.tolist()
    for step, (request, decode, token) in enumerate(per_token):
        rows = trace.experts[step].tolist()
        scores = None if trace.scores is None else trace.scores[step].tolist()
        for at, layer in enumerate(layer_ids):
            extra = [] if scores is None else scores[at]
            writer.writerow([step, request, decode, token, layer, *rows[at], *extra])
    text.detach()


def _preset_for(model: str) -> ModelConfig | None:
    """The preset whose name the recorded model name starts with, its publisher aside."""
    base = model.replace("\\", "/").rsplit("/", 1)[-1].lower()
    # "gpt-oss-20b-Q4_K_M.gguf" is gpt-oss-20b, but "tinymoe" isn't tiny.
    found = [
        p
        for name, p in PRESETS.items()
        if base.startswith(name) and not base[len(name) : len(name) + 1].isalnum()
    ]
    return max(found, key=lambda p: len(p.name), default=None)


def model_config(trace: Trace) -> ModelConfig:
    """Shape of the model that a trace was recorded from.

    Where the recorded name belongs to a preset and layers and experts agree, the preset's name and
    expert size are taken, with the trace's own k. Otherwise everything comes from the trace.

    Raises
    ------
    TraceError
        If the shape is beyond what a device may have.
    """
    known = _preset_for(trace.model)
    size = trace.meta.get("expert_bytes")
    try:
        if known and (known.layers, known.experts) == (trace.layers, trace.experts_per_layer):
            return replace(known, top_k=trace.top_k)
        return ModelConfig(
            name=trace.model,
            layers=trace.layers,
            experts=trace.experts_per_layer,
            top_k=trace.top_k,
            expert_bytes=size if isinstance(size, int) and size > 0 else 0,
        )
    except ValueError as error:
        raise TraceError(f"Trace is beyond what a device may have: {error}") from error
