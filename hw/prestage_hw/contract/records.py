"""Records of the data's way and the messages that carry them.

A field has a *kind*, which gives its width in RTL (see :meth:`DeviceConfig.bits`), and a wire width
in whole bytes. Arrays have a length that depends on the configuration.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from enum import IntEnum
from functools import lru_cache

import numpy as np

from .params import DeviceConfig

__all__ = [
    "ERROR_TEXT",
    "HOST_MESSAGES",
    "LINK_ACK",
    "LINK_NAK",
    "LINK_RESET",
    "LINK_RESET_DONE",
    "MESSAGES",
    "NO_TOKEN",
    "RECORDS",
    "REFUSAL_TEXT",
    "TABLE_BURST",
    "BufferCode",
    "BufferOp",
    "ErrorCode",
    "FetchReason",
    "Field",
    "Message",
    "Phase",
    "Policy",
    "Record",
    "Refusal",
    "RescanCode",
    "SettingsRefusal",
    "Source",
    "TrafficClass",
    "ValueKind",
    "message_by_code",
    "message_by_name",
]


#: Token id on the wire where it isn't known.
NO_TOKEN = 0xFFFFFFFF

#: Words of a predictor table in one message. With them it is about as long as one with a beat of 16
#: bytes, so that no buffer of the link grows much.
TABLE_BURST = 4


#: Messages other than FETCHED that a device with a host mover has room for while it works on those
#: before. A host must not have more of them on their way that no later answer shows to be taken.
HOST_MESSAGES = 64


class Phase(IntEnum):
    """What a token is for. PREFILL and VERIFY stand for a chunk of tokens: a layer may be routed
    several times, once for each token, before the next layer is.
    """

    PREFILL = 0
    DECODE = 1
    VERIFY = 2


class Source(IntEnum):
    """Who proposed a candidate."""

    PREDICTOR = 0
    HINT = 1


class PrefetchKind(IntEnum):
    """Whose idea a prefetch was, for the throttle."""

    NEAR = 0  # the predictor's, for the next routing decision
    FAR = 1  # the predictor's, for a later one
    HINT = 2


class PrefetchOutcome(IntEnum):
    """What became of a prefetch, for the statistics by layer and kind."""

    ISSUED = 0  # It was given a slot.
    USEFUL = 1  # A demand, or a lock, came for it.
    LATE = 2  # It was useful, but still in flight then.
    USELESS = 3  # It was evicted, given up or failed before a demand came.
    POLLUTING = 4  # A demand missed an expert that it had evicted.


class BufferOp(IntEnum):
    """Operations on the expert buffer."""

    DEMAND = 0
    PREFETCH = 1
    FILL = 2
    RELEASE = 3
    CANCEL = 4
    LOCK = 5
    UNLOCK = 6
    COPY = 7


class BufferCode(IntEnum):
    """Answers of the expert buffer."""

    RESIDENT = 0  # DEMAND, PREFETCH, LOCK, UNLOCK: whole in the slot. FILL, RELEASE, CANCEL: done.
    FILLING = 1  # DEMAND, PREFETCH, LOCK, UNLOCK: in flight to the slot. COPY: so; nothing changed.
    ALLOCATED = 2  # DEMAND, PREFETCH, LOCK, COPY: the slot is now filling; fetch it.
    NO_SLOT = 3  # DEMAND, PREFETCH, LOCK, COPY: no slot may be taken.
    OUTBID = 4  # PREFETCH: every slot that was looked at is worth more than the candidate.
    # RELEASE without a pin, CANCEL of no prefetch in flight, UNLOCK without a lock, COPY of what is
    # not held.
    REFUSED = 5
    INVALID = 6  # A number that the operation uses is out of range; nothing was done.


class ValueKind(IntEnum):
    """What the numbers of a ValueBeat are, in 1/256."""

    CHANCE = 0  # V: chance that the layer's next visit uses the expert.
    REUSE = 1  # R: reuse value of the expert after the layer's latest visit.


class RescanCode(IntEnum):
    """How a walk through the buffer's values ended."""

    NOTHING = 0  # No expert is worth a prefetch.
    FOUND = 1  # The one of greatest benefit.
    DISTURBED = 2  # Values or experts have changed meanwhile: nothing is known.


class Policy(IntEnum):
    """Which expert the buffer evicts."""

    LRU = 0  # the least recently used
    LFU = 1  # the least frequently used of those looked at
    NEXT_USE = 2  # the one of those looked at whose next use is worth least


class TrafficClass(IntEnum):
    """Class of a channel of the DMA engine: the lower the number, the sooner it is served."""

    DEMAND = 0
    PREFETCH = 1
    STREAM = 2


class FetchReason(IntEnum):
    """How a tile's transfer ended."""

    OK = 0
    BUS = 1  # The memory answered an error, or ended a burst in the wrong place.
    TIMEOUT = 2  # The memory did not answer in time.
    ABORTED = 3  # The tile was aborted before its last beat came.
    CRC = 4  # The expert's bytes do not have the checksum that was loaded for it.
    ADDRESS = 5  # Address or size is no whole number of beats or goes past the top of memory.
    WRITE = 6  # The slots' memory answered an error.


class SettingsRefusal(IntEnum):
    """Why settings of a channel were refused."""

    NONE = 0  # Accepted.
    CHANNEL = 1  # No such channel.
    TRAFFIC = 2  # No such class.
    WEIGHT = 3  # Weight 0.
    BURST = 4  # Burst length no power of two, or longer than the device's longest.
    CREDITS = 5  # No credit, or more than the device has.
    ROWS = 6  # Size or stride of a row no whole number of beats, or the row longer than a tile.


class Refusal(IntEnum):
    """Why the write of a register was refused, in the register ``refusal``. The first ones are
    those of :class:`SettingsRefusal`.
    """

    NONE = 0
    CHANNEL = 1
    TRAFFIC = 2
    WEIGHT = 3
    BURST = 4
    CREDITS = 5
    ROWS = 6
    ENABLE = 7
    PROFILE = 8
    BUDGET = 9
    RESCAN = 10
    VALUE = 11
    BASE = 12


#: One sentence for each refusal, for messages and documents.
REFUSAL_TEXT = {
    Refusal.NONE: "Nothing was refused.",
    Refusal.CHANNEL: "The DMA engine has no such channel.",
    Refusal.TRAFFIC: "There is no such traffic class.",
    Refusal.WEIGHT: "The weight is 0.",
    Refusal.BURST: "The burst length is no power of two, or longer than the longest burst.",
    Refusal.CREDITS: "A channel has no credit, or there are more credits than bursts outstanding.",
    Refusal.ROWS: "Size or stride of a row is no whole number of beats, or too large; any size"
    " where the device's configuration says what rows experts have.",
    Refusal.ENABLE: "Channels 0 and 1, and the last of three or more, carry demands and prefetches"
    " and can't be disabled.",
    Refusal.PROFILE: "No phase has that number.",
    Refusal.BUDGET: "A budget is at most 8 eighths.",
    Refusal.RESCAN: "A rescan needs a predictor that gives values, looks at most at all layers and"
    " at most at 127, and asks for a confidence of 1 to 255.",
    Refusal.VALUE: "The register can't hold that value.",
    Refusal.BASE: "The array that begins there must begin at a multiple of its step and end below"
    " the top of the address space, the device must have it, and the low half is written first.",
}


class ErrorCode(IntEnum):
    """Why a demand or a message was not served. Values are on the wire."""

    BAD_CONTEXT = 1
    BAD_LAYER = 2
    BAD_EXPERT = 3
    DUPLICATE_EXPERT = 4
    UNRELEASED = 5
    UNROUTED = 6
    NO_SLOT = 7
    BUS = 8
    BAD_MESSAGE = 9
    BAD_REGISTER = 10
    BAD_READ = 11
    HINT_PASSED = 12
    BAD_TABLE = 13
    NOT_LOCKED = 14
    SLOT_MEMORY = 15
    CHECKSUM = 16
    BAD_FETCHED = 17
    OVERRUN = 18
    BAD_COPIES = 19
    NOT_HELD = 20
    TIMEOUT = 21
    ABORTED = 22
    ADDRESS = 23


#: One sentence for each error code, for messages and documents.
ERROR_TEXT = {
    ErrorCode.BAD_CONTEXT: "The context number is not below the number of contexts.",
    ErrorCode.BAD_LAYER: "The layer number is not below the number of layers.",
    ErrorCode.BAD_EXPERT: "An expert number is not below the number of experts.",
    ErrorCode.DUPLICATE_EXPERT: "An expert occurs twice in one routing decision.",
    ErrorCode.UNRELEASED: "The layer was routed again before it was released.",
    ErrorCode.UNROUTED: "The layer was released without having been routed.",
    ErrorCode.NO_SLOT: "Every slot is pinned or locked and nothing is in flight, or no more experts"
    " may be locked.",
    ErrorCode.BUS: "The memory answered a read with an error, or the host could not copy.",
    ErrorCode.BAD_MESSAGE: "The message type is unknown or its body has the wrong length.",
    ErrorCode.BAD_REGISTER: "No register has that address, or it is read-only.",
    ErrorCode.BAD_READ: "The slot or the beat of a read is out of range, or slots are the host's.",
    ErrorCode.HINT_PASSED: "The hint is for a layer that was routed already.",
    ErrorCode.BAD_TABLE: "The table or the words of a table access are out of range.",
    ErrorCode.NOT_LOCKED: "The expert was unlocked without having been locked.",
    ErrorCode.SLOT_MEMORY: "The slots' memory answered a write with an error.",
    ErrorCode.CHECKSUM: "The expert's bytes do not have the checksum that was loaded for it.",
    ErrorCode.BAD_FETCHED: "The host reported a tile that it was not asked for, or twice, or did"
    " not write whole.",
    ErrorCode.OVERRUN: "More messages wait than the device has room for; this one was dropped.",
    ErrorCode.BAD_COPIES: "The number of copies is 0 or more than the device has banks.",
    ErrorCode.NOT_HELD: "The copy was not made, because the expert itself is not held.",
    ErrorCode.TIMEOUT: "The memory did not answer a read in time, or the host a fetch.",
    ErrorCode.ABORTED: "The host aborted the transfer.",
    ErrorCode.ADDRESS: "The expert, or a row of it, would go past the top of the address space.",
}


@dataclass(frozen=True, kw_only=True)
class Field:
    """One field of a record.

    Parameters
    ----------
    name : :class:`str`
        Name, the same in RTL, NumPy, C and the documents.
    kind : :class:`str` or :class:`int`
        Kind for :meth:`DeviceConfig.bits`, or a fixed width in bits.
    wire_bits : :class:`int`
        Width on the wire: 8, 16, 32 or 64 bits.
    count : :class:`str`, :class:`int` or None
        For an array, the kind of its length for :meth:`DeviceConfig.count`, or a fixed length.
    description : :class:`str`
        One sentence.
    """

    name: str
    kind: str | int
    wire_bits: int
    description: str
    count: str | int | None = None

    def bits(self, config: DeviceConfig) -> int:
        """Width of one element in RTL, in bits."""
        return self.kind if isinstance(self.kind, int) else config.bits(self.kind)

    def length(self, config: DeviceConfig) -> int:
        """Elements: 1 for a scalar."""
        if isinstance(self.count, str):
            return config.count(self.count)
        return 1 if self.count is None else self.count

    def wire_bytes(self, config: DeviceConfig) -> int:
        """Bytes on the wire, all elements together."""
        return self.wire_bits // 8 * self.length(config)


_STRUCT_CODES = {8: "B", 16: "H", 32: "I", 64: "Q"}


@dataclass(frozen=True, kw_only=True)
class Record:
    """A named sequence of fields.

    Parameters
    ----------
    name : :class:`str`
        Name in CamelCase.
    description : :class:`str`
        One sentence.
    fields : tuple of :class:`Field`
        Fields in wire order.
    """

    name: str
    description: str
    fields: tuple[Field, ...]

    def field(self, name: str) -> Field:
        """The field of that name."""
        for candidate in self.fields:
            if candidate.name == name:
                return candidate
        known = ", ".join(f.name for f in self.fields)
        raise ValueError(f"Field of {self.name} must be one of {known}, not {name!r}")

    def wire_bytes(self, config: DeviceConfig) -> int:
        """Bytes on the wire."""
        return sum(f.wire_bytes(config) for f in self.fields)

    def dtype(self, config: DeviceConfig) -> np.dtype[np.void]:
        """NumPy dtype of the wire bytes: packed, little-endian."""
        parts: list[tuple[str, str] | tuple[str, str, tuple[int, ...]]] = []
        for f in self.fields:
            code = f"<u{f.wire_bits // 8}"
            parts.append((f.name, code) if f.count is None else (f.name, code, (f.length(config),)))
        return np.dtype(parts)

    def pack(self, config: DeviceConfig, *values: object) -> bytes:
        """Wire bytes of a record given its values in field order; an array is one sequence."""
        flat: list[object] = []
        for f, value in zip(self.fields, values, strict=True):
            if f.count is None:
                flat.append(value)
            else:
                flat.extend(value)  # type: ignore[arg-type]
        return _struct(self, config).pack(*flat)

    def unpack(self, config: DeviceConfig, body: bytes) -> dict[str, int | tuple[int, ...]]:
        """Values by field name.

        Raises
        ------
        ValueError
            If ``body`` has the wrong length.
        """
        layout = _struct(self, config)
        if len(body) != layout.size:
            raise ValueError(f"{self.name} must be {layout.size} bytes, not {len(body)}")
        flat = layout.unpack(body)
        values: dict[str, int | tuple[int, ...]] = {}
        at = 0
        for f in self.fields:
            length = f.length(config)
            values[f.name] = flat[at] if f.count is None else flat[at : at + length]
            at += length
        return values


@lru_cache(maxsize=512)
def _struct(record: Record, config: DeviceConfig) -> struct.Struct:
    return struct.Struct(
        "<" + "".join(f"{f.length(config)}{_STRUCT_CODES[f.wire_bits]}" for f in record.fields)
    )


_CTX = Field(name="ctx", kind="ctx", wire_bits=8, description="Context (sequence) number.")
_LAYER = Field(name="layer", kind="layer", wire_bits=8, description="MoE layer, from 0.")
_EXPERT = Field(name="expert", kind="expert", wire_bits=16, description="Expert within the layer.")
_SLOT = Field(name="slot", kind="slot", wire_bits=16, description="Slot of the expert buffer.")
_TILE = Field(name="tile", kind="tile", wire_bits=16, description="Tile within the expert.")
_TAG = Field(name="tag", kind="tag", wire_bits=8, description="Entry of the in-flight table.")
_CHANNEL = Field(
    name="channel", kind="channel", wire_bits=8, description="Channel of the DMA engine."
)
_STAMP = Field(
    name="stamp",
    kind=8,
    wire_bits=8,
    description="Layers that the context has routed so far, modulo 256, this one included; a layer"
    " that is routed again right away counts once.",
)
_ADDRESS = Field(
    name="address", kind="address", wire_bits=64, description="Memory address, in bytes."
)
_BEAT = Field(name="beat", kind="beat", wire_bits=32, description="Beat within the slot.")
_DATA = Field(
    name="data", kind=8, wire_bits=8, count="data_bytes", description="Bytes of one beat."
)
_OK = Field(
    name="ok", kind=1, wire_bits=8, description="1 if the beat's tile is valid in the slot."
)
_REGISTER = Field(
    name="register", kind=16, wire_bits=16, description="Register address, in 32-bit words."
)
_VALUE = Field(name="value", kind=32, wire_bits=32, description="Register value.")
_TABLE = Field(name="table", kind=8, wire_bits=8, description="Table number.")
_WORD = Field(name="word", kind=24, wire_bits=32, description="Word within the table.")
_SERIAL = Field(
    name="serial",
    kind=16,
    wire_bits=16,
    description="Number of the fetch, modulo 65,536; all tiles of an expert have the same.",
)
_COPY = Field(
    name="copy", kind="copy", wire_bits=8, description="Number of the copy; 0 is the expert itself."
)
_SYNC_TAG = Field(name="tag", kind=16, wire_bits=16, description="Echoed by the answer.")

RECORDS: dict[str, Record] = {
    record.name: record
    for record in (
        Record(
            name="BeginToken",
            description="A token starts; its id is known before layer 0 runs.",
            fields=(
                _CTX,
                Field(
                    name="phase",
                    kind=2,
                    wire_bits=8,
                    description="A Phase; any other number counts as DECODE.",
                ),
                Field(
                    name="token",
                    kind=32,
                    wire_bits=32,
                    description=f"Id of the input token, 0x{NO_TOKEN:X} where unknown.",
                ),
            ),
        ),
        Record(
            name="Route",
            description="The router's choice for one layer, as the host sends it.",
            fields=(
                _CTX,
                _LAYER,
                Field(
                    name="experts",
                    kind="expert",
                    wire_bits=16,
                    count="top_k",
                    description="Chosen experts, descending weight.",
                ),
            ),
        ),
        Record(
            name="RoutingDecision",
            description="A checked Route on its way to the predictor.",
            fields=(
                _CTX,
                _LAYER,
                Field(
                    name="experts",
                    kind="expert",
                    wire_bits=16,
                    count="top_k",
                    description="Chosen experts, descending weight.",
                ),
                _STAMP,
            ),
        ),
        Record(
            name="Command",
            description="A demand for one expert, the release of a layer, or an expert's lock or"
            " unlock, in the host's order.",
            fields=(
                Field(
                    name="release",
                    kind=1,
                    wire_bits=8,
                    description="1: release or unlock, 0: demand or lock.",
                ),
                Field(
                    name="lock",
                    kind=1,
                    wire_bits=8,
                    description="1: lock or unlock one expert, 0: demand one or release a layer.",
                ),
                _CTX,
                _LAYER,
                _EXPERT,
                Field(
                    name="index",
                    kind="index",
                    wire_bits=8,
                    description="Position in the routing decision; 0 starts a new one.",
                ),
                Field(
                    name="repeat",
                    kind=1,
                    wire_bits=8,
                    description="Demand: 1 if the context's last decision in this token was of this"
                    " layer too, so that the stamp stays.",
                ),
            ),
        ),
        Record(
            name="Hint",
            description="An opinion from outside about a layer to come.",
            fields=(
                _CTX,
                _LAYER,
                _EXPERT,
                Field(name="score", kind=8, wire_bits=8, description="Confidence, 255 is certain."),
            ),
        ),
        Record(
            name="Release",
            description="The consumer is done with a layer of a context.",
            fields=(_CTX, _LAYER),
        ),
        Record(
            name="Lock",
            description="Keep an expert in the buffer, say a shared one, or no longer.",
            fields=(
                _CTX,
                _LAYER,
                _EXPERT,
                Field(
                    name="lock",
                    kind=1,
                    wire_bits=8,
                    description="1: fetch it if it is missing, answer with a Ready of this context,"
                    " and never evict it; 0: it may be evicted again.",
                ),
            ),
        ),
        Record(
            name="Replicate",
            description="Hold so many copies of an expert, each in a bank of its own.",
            fields=(
                _CTX,
                _LAYER,
                _EXPERT,
                Field(
                    name="copies",
                    kind=8,
                    wire_bits=8,
                    description="1 to the device's replicas. From 2 on the expert itself is held,"
                    " too, and each of them is answered by a Copy or an Event of this context; 1"
                    " gives all of them back, without an answer.",
                ),
            ),
        ),
        Record(
            name="CopyCommand",
            description="Hold one copy of an expert, or give it back.",
            fields=(
                Field(name="keep", kind=1, wire_bits=8, description="1: hold it, 0: give it back."),
                _CTX,
                _LAYER,
                _EXPERT,
                _COPY,
            ),
        ),
        Record(
            name="Candidate",
            description="An expert that may be worth prefetching.",
            fields=(
                _CTX,
                _LAYER,
                _EXPERT,
                Field(
                    name="score", kind=8, wire_bits=8, description="Confidence, greater is surer."
                ),
                Field(name="source", kind=1, wire_bits=8, description="A Source."),
                Field(
                    name="deadline",
                    kind=8,
                    wire_bits=8,
                    description="Stamp of the routing decision that will need it, modulo 256.",
                ),
            ),
        ),
        Record(
            name="ValueBeat",
            description="What the experts of a layer are worth, some at a time.",
            fields=(
                Field(name="kind", kind=1, wire_bits=8, description="A ValueKind."),
                _CTX,
                _LAYER,
                Field(
                    name="beat",
                    kind="lane_beat",
                    wire_bits=16,
                    description="Part of the layer: element 0 is expert beat x lanes.",
                ),
                Field(
                    name="values",
                    kind=8,
                    wire_bits=8,
                    count="lanes",
                    description="Value of each expert in 1/256; 0 past the last.",
                ),
            ),
        ),
        Record(
            name="FetchRequest",
            description="One tile for the DMA engine.",
            fields=(
                _TAG,
                Field(name="demand", kind=1, wire_bits=8, description="1: demand, 0: prefetch."),
                _SLOT,
                _TILE,
                _ADDRESS,
                _CHANNEL,
                Field(
                    name="sized",
                    kind=1,
                    wire_bits=8,
                    description="0: a whole tile, 1: as much as `bytes` says.",
                ),
                Field(
                    name="bytes",
                    kind="tile_bytes",
                    wire_bits=32,
                    description="Size of the transfer if it is `sized`; 0 moves nothing.",
                ),
            ),
        ),
        Record(
            name="Completion",
            description="A tile has arrived in its slot, or failed.",
            fields=(
                _TAG,
                _TILE,
                Field(
                    name="failed",
                    kind=1,
                    wire_bits=8,
                    description="1: the reason is not OK.",
                ),
                Field(
                    name="address",
                    kind="address",
                    wire_bits=64,
                    description="Address of the first burst that failed, else of the tile.",
                ),
                _CHANNEL,
                Field(name="reason", kind=3, wire_bits=8, description="A FetchReason."),
            ),
        ),
        Record(
            name="Fetch",
            description="Ask the host to copy one tile of an expert into a slot.",
            fields=(
                _TAG,
                _SERIAL,
                Field(name="demand", kind=1, wire_bits=8, description="1: demand, 0: prefetch."),
                _LAYER,
                _EXPERT,
                _SLOT,
                _TILE,
            ),
        ),
        Record(
            name="Fetched",
            description="The host has copied a tile, or could not.",
            fields=(
                _TAG,
                _SERIAL,
                _TILE,
                Field(
                    name="failed",
                    kind=1,
                    wire_bits=8,
                    description="0: the tile is in the slot, else it is not.",
                ),
            ),
        ),
        Record(
            name="ChannelSettings",
            description="How a channel of the DMA engine works from the next commit on.",
            fields=(
                _CHANNEL,
                Field(
                    name="enable",
                    kind=1,
                    wire_bits=8,
                    description="1: requests are begun; 0: they wait.",
                ),
                Field(name="traffic", kind=2, wire_bits=8, description="A TrafficClass."),
                Field(
                    name="weight",
                    kind=4,
                    wire_bits=8,
                    description="Bursts in a turn among the channels of its class, 1 to 15.",
                ),
                Field(
                    name="burst_beats",
                    kind=9,
                    wire_bits=16,
                    description="Longest burst, in beats: a power of two.",
                ),
                Field(
                    name="credits",
                    kind=5,
                    wire_bits=8,
                    description="Most bursts that may be outstanding.",
                ),
                Field(
                    name="row_bytes",
                    kind="tile_bytes",
                    wire_bits=32,
                    description="Bytes of a row if tiles are gathered from rows, else 0.",
                ),
                Field(
                    name="row_stride",
                    kind=24,
                    wire_bits=32,
                    description="Bytes from the start of a row to the start of the next.",
                ),
            ),
        ),
        Record(
            name="BufferRequest",
            description="One operation on the expert buffer's directory.",
            fields=(
                Field(name="op", kind=3, wire_bits=8, description="A BufferOp."),
                _CTX,
                _LAYER,
                _EXPERT,
                Field(
                    name="index",
                    kind="index",
                    wire_bits=8,
                    description="DEMAND: position in the routing decision; 0 starts a new one.",
                ),
                _SLOT,
                _TILE,
                Field(
                    name="last",
                    kind=1,
                    wire_bits=8,
                    description="FILL: 1 with the tile that completes the expert. COPY: 1 to hold"
                    " it. PREFETCH: 1 if an expert of the same worth outbids it, too.",
                ),
                Field(
                    name="failed",
                    kind=1,
                    wire_bits=8,
                    description="FILL: 1 with last if any tile failed; the expert is dropped.",
                ),
                Field(
                    name="value",
                    kind=8,
                    wire_bits=8,
                    description="PREFETCH: confidence in 1/256; 0 takes whatever slot is found."
                    " COPY: which one.",
                ),
            ),
        ),
        Record(
            name="BufferResult",
            description="The answer to a BufferRequest, exactly one each, in order.",
            fields=(
                Field(name="code", kind=3, wire_bits=8, description="A BufferCode."),
                _SLOT,
                Field(
                    name="prefetched",
                    kind=1,
                    wire_bits=8,
                    description="DEMAND that found its expert: the first one on a prefetch.",
                ),
                Field(name="evicted", kind=1, wire_bits=8, description="An expert was evicted."),
                Field(
                    name="evicted_unused",
                    kind=1,
                    wire_bits=8,
                    description="The evicted expert was a prefetch that nobody demanded.",
                ),
                Field(
                    name="polluted",
                    kind=1,
                    wire_bits=8,
                    description="DEMAND that allocated: a prefetch had evicted this expert.",
                ),
            ),
        ),
        Record(
            name="RescanRequest",
            description="Look for an expert worth a prefetch in the buffer's own values.",
            fields=(
                _CTX,
                Field(
                    name="near",
                    kind=1,
                    wire_bits=8,
                    description="1 if the layer after the context's latest decision counts, too.",
                ),
                Field(
                    name="ahead",
                    kind=8,
                    wire_bits=8,
                    description="Layers after that decision's, those of the next token included.",
                ),
                Field(
                    name="least",
                    kind=8,
                    wire_bits=8,
                    description="Least confidence, in 1/256.",
                ),
                Field(
                    name="cutoff_layer",
                    kind=8,
                    wire_bits=8,
                    description="This layer and those above do not count; 255: all do.",
                ),
            ),
        ),
        Record(
            name="RescanResult",
            description="The answer to a RescanRequest. All but the code is 0 if NOTHING was found,"
            " and anything if DISTURBED.",
            fields=(
                Field(name="code", kind=2, wire_bits=8, description="A RescanCode."),
                _LAYER,
                _EXPERT,
                Field(
                    name="value",
                    kind=8,
                    wire_bits=8,
                    description="Confidence in 1/256: V, or half of R where that is newer.",
                ),
                Field(
                    name="ahead",
                    kind=8,
                    wire_bits=8,
                    description="Layers after the one of the context's latest decision.",
                ),
            ),
        ),
        Record(
            name="BufferWrite",
            description="One beat of an arriving expert.",
            fields=(_SLOT, _BEAT, _DATA),
        ),
        Record(
            name="TableRequest",
            description="Read or write one word of a predictor table.",
            fields=(
                Field(name="write", kind=1, wire_bits=8, description="1: write, 0: read."),
                _TABLE,
                _WORD,
                _VALUE,
            ),
        ),
        Record(
            name="Ready",
            description="The slot holds exactly this expert's bytes until the layer is released.",
            fields=(_CTX, _LAYER, _EXPERT, _SLOT),
        ),
        Record(
            name="Copy",
            description="The slot holds exactly this expert's bytes until fewer copies are asked"
            " for.",
            fields=(_CTX, _LAYER, _EXPERT, _COPY, _SLOT),
        ),
        Record(
            name="Event",
            description="An error, with what it is about; fields that do not apply are 0.",
            # The widths are those of the wire: an event reports values that were out of range.
            fields=(
                Field(name="code", kind=8, wire_bits=8, description="An ErrorCode."),
                Field(name="ctx", kind=8, wire_bits=8, description="Context number."),
                Field(name="layer", kind=8, wire_bits=8, description="MoE layer."),
                Field(name="expert", kind=16, wire_bits=16, description="Expert."),
                _ADDRESS,
            ),
        ),
        Record(
            name="ReadRequest",
            description="Read one beat of a slot through the consumer port.",
            fields=(_SLOT, _BEAT),
        ),
        Record(
            name="Read",
            description="Read beats of a slot over the link.",
            fields=(
                _SLOT,
                _BEAT,
                Field(name="count", kind=16, wire_bits=16, description="Beats to read."),
            ),
        ),
        Record(name="Beat", description="One beat of a slot.", fields=(_DATA, _OK)),
        Record(
            name="Data",
            description="One beat of a slot, as it goes over the link.",
            fields=(_SLOT, _BEAT, _DATA, _OK),
        ),
        Record(name="RegisterRead", description="Ask for a register.", fields=(_REGISTER,)),
        Record(name="RegisterWrite", description="Write a register.", fields=(_REGISTER, _VALUE)),
        Record(name="RegisterValue", description="A register's value.", fields=(_REGISTER, _VALUE)),
        Record(
            name="TableRead",
            description="Read words of a predictor table, one at a time while the engine is idle.",
            fields=(
                _TABLE,
                _WORD,
                Field(
                    name="count",
                    kind=16,
                    wire_bits=16,
                    description=f"Words to read, {TABLE_BURST} in an answer.",
                ),
            ),
        ),
        Record(
            name="TableWrite",
            description="Write words of a predictor table, one at a time while the engine is idle.",
            fields=(
                _TABLE,
                _WORD,
                Field(
                    name="count",
                    kind=8,
                    wire_bits=8,
                    description=f"Words to write, 1 to {TABLE_BURST}.",
                ),
                Field(
                    name="values",
                    kind=32,
                    wire_bits=32,
                    count=TABLE_BURST,
                    description="The words; those past count mean nothing.",
                ),
            ),
        ),
        Record(
            name="TableData",
            description="Words of a predictor table.",
            fields=(
                _TABLE,
                _WORD,
                Field(
                    name="values",
                    kind=32,
                    wire_bits=32,
                    count=TABLE_BURST,
                    description="The words from there on; 0 past the last that was asked for.",
                ),
            ),
        ),
        Record(
            name="Sync",
            description="Answer when everything before this is done and the engine is idle.",
            fields=(_SYNC_TAG,),
        ),
        Record(name="Synced", description="The answer to Sync.", fields=(_SYNC_TAG,)),
    )
}


@dataclass(frozen=True, kw_only=True)
class Message:
    """A record with a frame type.

    Parameters
    ----------
    code : :class:`int`
        Frame type, 0 to 255.
    record : :class:`Record` or None
        Body; None for frames of the link itself.
    to_device : :class:`bool`
        True from host to device.
    name : :class:`str`
        Name in UPPER_CASE.
    replicas, host_writes : :class:`bool`
        Whether only devices whose experts may have copies, or whose slots the host writes, have it;
        others take it for unknown.
    """

    code: int
    name: str
    to_device: bool
    record: Record | None = None
    replicas: bool = False
    host_writes: bool = False

    def known(self, config: DeviceConfig) -> bool:
        """Whether the device has it."""
        return (config.replicas > 1 or not self.replicas) and (
            config.host_writes or not self.host_writes
        )

    def body_bytes(self, config: DeviceConfig) -> int:
        """Length of the body, in bytes."""
        return 0 if self.record is None else self.record.wire_bytes(config)


# Frames of the link itself carry no sequence number of their own; LINK_RESET restarts both
# directions at 0.
LINK_RESET, LINK_RESET_DONE, LINK_ACK, LINK_NAK = 0x7C, 0x7D, 0x7E, 0x7F

MESSAGES: dict[str, Message] = {
    message.name: message
    for message in (
        Message(code=0x01, name="REGISTER_READ", to_device=True, record=RECORDS["RegisterRead"]),
        Message(code=0x02, name="REGISTER_WRITE", to_device=True, record=RECORDS["RegisterWrite"]),
        Message(code=0x03, name="TABLE_READ", to_device=True, record=RECORDS["TableRead"]),
        Message(code=0x04, name="TABLE_WRITE", to_device=True, record=RECORDS["TableWrite"]),
        Message(code=0x10, name="BEGIN_TOKEN", to_device=True, record=RECORDS["BeginToken"]),
        Message(code=0x11, name="ROUTE", to_device=True, record=RECORDS["Route"]),
        Message(code=0x12, name="HINT", to_device=True, record=RECORDS["Hint"]),
        Message(code=0x13, name="RELEASE", to_device=True, record=RECORDS["Release"]),
        Message(code=0x14, name="READ", to_device=True, record=RECORDS["Read"]),
        Message(code=0x15, name="SYNC", to_device=True, record=RECORDS["Sync"]),
        Message(code=0x16, name="LOCK", to_device=True, record=RECORDS["Lock"]),
        Message(code=0x17, name="FETCHED", to_device=True, record=RECORDS["Fetched"]),
        Message(
            code=0x18,
            name="REPLICATE",
            to_device=True,
            record=RECORDS["Replicate"],
            replicas=True,
        ),
        Message(
            code=0x19,
            name="WRITE",
            to_device=True,
            record=RECORDS["BufferWrite"],
            host_writes=True,
        ),
        Message(code=LINK_RESET, name="LINK_RESET", to_device=True),
        Message(code=LINK_RESET_DONE, name="LINK_RESET_DONE", to_device=False),
        Message(code=LINK_ACK, name="LINK_ACK", to_device=True),
        Message(code=LINK_NAK, name="LINK_NAK", to_device=True),
        Message(code=0x81, name="REGISTER_VALUE", to_device=False, record=RECORDS["RegisterValue"]),
        Message(code=0x83, name="TABLE_DATA", to_device=False, record=RECORDS["TableData"]),
        Message(code=0x90, name="READY", to_device=False, record=RECORDS["Ready"]),
        Message(code=0x91, name="EVENT", to_device=False, record=RECORDS["Event"]),
        Message(code=0x94, name="DATA", to_device=False, record=RECORDS["Data"]),
        Message(code=0x95, name="SYNCED", to_device=False, record=RECORDS["Synced"]),
        Message(code=0x96, name="FETCH", to_device=False, record=RECORDS["Fetch"]),
        Message(code=0x97, name="COPY", to_device=False, record=RECORDS["Copy"], replicas=True),
    )
}

_BY_CODE = {message.code: message for message in MESSAGES.values()}


def message_by_code(code: int) -> Message | None:
    """The message of that frame type, None if there is none."""
    return _BY_CODE.get(code)


def message_by_name(name: str) -> Message:
    """The message of that name.

    Raises
    ------
    ValueError
        If there is none.
    """
    try:
        return MESSAGES[name]
    except KeyError:
        raise ValueError(f"Message must be one of {', '.join(MESSAGES)}, not {name!r}") from None
