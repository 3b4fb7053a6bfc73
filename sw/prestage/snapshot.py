"""Files that hold everything a predictor has learned.

A snapshot is, all numbers little-endian::

    magic    8 bytes   "PRSTTABL"
    version  u32       version of this form, 1
    header   u32       length of the header, in bytes, a multiple of 4
    length   u64       length of the file, in bytes
    header             JSON, filled up with spaces
    tables             u32 each, table by table from 0 on
    digest   32 bytes  SHA-256 of everything before

The header names the model's shape, the predictor with the parameters that its tables depend on, the
hash of the register list, and the words of each table.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from prestage_hw.contract import DeviceConfig, register_hash
from prestage_hw.contract.params import require_config

from .errors import ArgumentError, PrestageError
from .output import write_file

__all__ = ["MAGIC", "VERSION", "Snapshot", "SnapshotError", "read_snapshot", "write_snapshot"]

#: First bytes of a snapshot.
MAGIC = b"PRSTTABL"

#: Version of the form.
VERSION = 1

_HEAD = struct.Struct("<8sIIQ")
_DIGEST_BYTES = hashlib.sha256().digest_size

#: Parameters of a device that its predictor's tables do not depend on.
_OTHER_PARAMETERS = frozenset(
    {
        *("model", "predictor", "form", "slots", "expert_bytes", "tile_bytes", "data_bytes"),
        *("address_bits", "inflight", "prefetch_inflight", "outstanding_bursts", "burst_beats"),
        *("dma_channels", "dma_queue_depth", "axi_ids", "mover", "parts", "slot_store"),
        *("layer_bytes", "rows", "checksums", "replicas", "victim_samples", "host_writes"),
    }
)

#: Parameters that only one predictor knows.
_OWN_PARAMETERS = {"successors": "st_moe", "perceptron": "perceptron"}


class SnapshotError(PrestageError, ValueError):
    """A file that is no snapshot, is damaged, or is of another device."""


def _parameters(config: DeviceConfig) -> dict[str, Any]:
    """Parameters that the predictor's tables depend on, as JSON gives them back."""
    values = {
        name: value
        for name, value in asdict(config).items()
        if name not in _OTHER_PARAMETERS
        and _OWN_PARAMETERS.get(name, config.predictor) == config.predictor
    }
    result: dict[str, Any] = json.loads(json.dumps(values))
    return result


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """What a predictor has learned, and which devices it fits.

    Parameters
    ----------
    model : :class:`str`
        Name of the model; only for people.
    layers, experts, top_k : :class:`int`
        Shape of the model.
    predictor : :class:`str`
        Name of the predictor.
    form : :class:`str`
        Named form of the ``perceptron`` predictor; only for people.
    parameters : mapping
        Parameters of :class:`DeviceConfig` that the tables depend on.
    register_hash : :class:`int`
        Hash of the register list of the device; only for people.
    tables : mapping of :class:`int` to arrays of uint32
        All tables, from number 0 on.
    """

    model: str
    layers: int
    experts: int
    top_k: int
    predictor: str
    form: str
    parameters: Mapping[str, Any]
    register_hash: int
    tables: Mapping[int, NDArray[np.uint32]]

    @classmethod
    def of(cls, config: DeviceConfig, tables: Mapping[int, NDArray[np.uint32]]) -> Snapshot:
        """A snapshot of a device's tables.

        Raises
        ------
        ArgumentError
            If there are no tables.
        """
        require_config(config)
        if not tables:
            raise ArgumentError(
                f"Predictor must have tables to save, but {config.predictor} has none"
            )
        if list(tables) != list(range(len(tables))):
            raise ArgumentError(f"Tables must be numbered from 0 on, not {list(tables)}")
        return cls(
            model=config.model.name,
            layers=config.model.layers,
            experts=config.model.experts,
            top_k=config.model.top_k,
            predictor=config.predictor,
            form=str(getattr(config, "form", "")) if config.predictor == "perceptron" else "",
            parameters=_parameters(config),
            register_hash=register_hash(),
            tables=dict(tables),
        )

    @property
    def words(self) -> int:
        """Words of all tables together."""
        return sum(len(table) for table in self.tables.values())

    def check(self, config: DeviceConfig) -> None:
        """Refuse a device that the tables do not fit.

        Raises
        ------
        SnapshotError
            If predictor, shape of the model, or a parameter of the predictor differ.
        """
        require_config(config)
        if self.predictor != config.predictor:
            raise SnapshotError(
                f"Snapshot must be of the predictor {config.predictor}, not {self.predictor}"
            )
        model = config.model
        if (self.layers, self.experts, self.top_k) != (model.layers, model.experts, model.top_k):
            raise SnapshotError(
                f"Snapshot must be of a model with {model.layers} layers, {model.experts} experts"
                f" and k = {model.top_k}, not {self.layers}, {self.experts} and {self.top_k}"
            )
        wanted, found = _flat(_parameters(config)), _flat(self.parameters)
        for name in sorted({*wanted, *found}):
            if name not in wanted or name not in found or wanted[name] != found[name]:
                raise SnapshotError(
                    f"Snapshot must be of a predictor with {name} = {wanted.get(name)},"
                    f" not {found.get(name)}"
                )

    def encode(self) -> bytes:
        """Bytes of the file."""
        fields = asdict(self)
        fields["tables"] = [len(table) for table in self.tables.values()]
        header = json.dumps(fields, sort_keys=True).encode()
        header += b" " * (-len(header) % 4)
        tables = b"".join(np.asarray(t).astype("<u4").tobytes() for t in self.tables.values())
        length = _HEAD.size + len(header) + len(tables) + _DIGEST_BYTES
        data = _HEAD.pack(MAGIC, VERSION, len(header), length) + header + tables
        return data + hashlib.sha256(data).digest()

    @classmethod
    def decode(cls, data: bytes) -> Snapshot:
        """The snapshot in a file's bytes, all of them checked.

        Raises
        ------
        SnapshotError
            If they are no snapshot, of another version, truncated or damaged.
        """
        if data[: len(MAGIC)] != MAGIC:
            raise SnapshotError(
                f"Snapshot must begin with {MAGIC!r}, not {data[: len(MAGIC)]!r}:"
                " this is no snapshot of tables"
            )
        if len(data) >= len(MAGIC) + 4:
            (version,) = struct.unpack_from("<I", data, len(MAGIC))
            if version != VERSION:
                raise SnapshotError(f"Snapshot version must be {VERSION}, not {version}")
        least = _HEAD.size + _DIGEST_BYTES
        if len(data) < least:
            raise SnapshotError(
                f"Snapshot must be at least {least} bytes long, not {len(data)}: it is truncated"
            )
        _, _, header_bytes, length = _HEAD.unpack_from(data)
        if len(data) < length:
            raise SnapshotError(
                f"Snapshot must be {length} bytes long, not {len(data)}: it is truncated"
            )
        wanted, found = data[-_DIGEST_BYTES:], hashlib.sha256(data[:-_DIGEST_BYTES]).digest()
        if wanted != found or len(data) != length:
            raise SnapshotError(
                f"Snapshot must be {length} bytes long with the SHA-256 {found.hex()},"
                f" not {len(data)} bytes with {wanted.hex()}: it is damaged"
            )
        return cls._decode_header(data, _HEAD.size + header_bytes)

    @classmethod
    def _decode_header(cls, data: bytes, start: int) -> Snapshot:
        """The snapshot in bytes that are undamaged; its tables begin at ``start``."""
        try:
            fields = json.loads(data[_HEAD.size : start])
            lengths = fields.pop("tables")
            snapshot = cls(**fields, tables={})
            for name, kind in (
                *(("model", str), ("predictor", str), ("form", str), ("parameters", dict)),
                *(("layers", int), ("experts", int), ("top_k", int), ("register_hash", int)),
            ):
                if not isinstance(fields[name], kind):
                    raise TypeError(f"{name} is {fields[name]!r}")
            tables = {}
            at = start
            for number, words in enumerate(lengths):
                if type(words) is not int or words < 1:
                    raise ValueError(f"table {number} has {words!r} words")
                tables[number] = np.frombuffer(data, "<u4", words, at).astype(np.uint32)
                at += 4 * words
            if at != len(data) - _DIGEST_BYTES or not tables:
                raise ValueError(f"the tables end at byte {at}")
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise SnapshotError(
                f"Snapshot must have a header of version {VERSION}, but {error}"
            ) from error
        return cls(**{**snapshot.__dict__, "tables": tables})


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested parameters by their path."""
    result: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            result |= _flat(value, f"{prefix}{name}.")
        else:
            result[prefix + name] = value
    return result


def write_snapshot(path: str | os.PathLike[str], snapshot: Snapshot) -> None:
    """Write a snapshot to a file, whole or not at all.

    Raises
    ------
    OutputError
        If it can't be written.
    """
    write_file(Path(path), snapshot.encode(), what="Snapshot")


def read_snapshot(path: str | os.PathLike[str]) -> Snapshot:
    """Read a snapshot from a file and check all of it.

    Raises
    ------
    SnapshotError
        If the file can't be read, is no snapshot, of another version, truncated or damaged.
    """
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise SnapshotError(f"Snapshot {path} can't be read: {error.strerror or error}") from error
    try:
        return Snapshot.decode(data)
    except SnapshotError as error:
        raise SnapshotError(f"{path}: {error}") from error
