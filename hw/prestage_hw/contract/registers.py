"""The register list: name, address, access, reset, description. Addresses count 32-bit words."""

from __future__ import annotations

import struct
import zlib
from dataclasses import dataclass

from .params import MOST_AHEAD, MOST_PARTS, DeviceConfig
from .records import Phase, Policy, Refusal

__all__ = [
    "BASES",
    "CHANNEL_COUNTERS",
    "CHANNEL_COUNTERS_ADDRESS",
    "COUNTERS",
    "DEVICE_ID",
    "PROFILE_REGISTERS",
    "REFUSAL_FIELDS",
    "REGISTERS",
    "ROW_STRIDE_BITS",
    "SHAPE_FIELDS",
    "SLOT_BASE_BYTES",
    "THROTTLE_FIELDS",
    "TOKEN_BASE_BYTES",
    "TIME_BITS",
    "TIMEOUT_BITS",
    "VERSION",
    "Counter",
    "Register",
    "base_limits",
    "refused_bits",
    "register_by_name",
    "register_hash",
]

#: "PRST" in ASCII, the first register.
DEVICE_ID = 0x50525354

#: Version of the contract: major in bits 31..16, minor in bits 15..0.
VERSION = 0x0000_0002


@dataclass(frozen=True, kw_only=True)
class Counter:
    """One event counter.

    Parameters
    ----------
    name : :class:`str`
        Name of the counter and of its register(s).
    stage : :class:`int`
        Stage of the data's way that counts: 1 link, 2 predictor, 3 scheduler, 4 dma, 5 buffer.
    bits : :class:`int`
        Width: 32 (one register) or 64 (two, low word first).
    description : :class:`str`
        One sentence.
    """

    name: str
    stage: int
    description: str
    bits: int = 32


COUNTERS: tuple[Counter, ...] = (
    Counter(name="tokens", stage=1, description="Tokens begun."),
    Counter(name="routes", stage=1, description="Routing decisions accepted."),
    Counter(name="releases", stage=1, description="Layers released."),
    Counter(name="hints", stage=1, description="Hints accepted."),
    Counter(name="rejected", stage=1, description="Messages refused with an Event."),
    Counter(
        name="candidates",
        stage=2,
        description="Experts that the predictor proposed for the layer that comes next.",
    ),
    Counter(
        name="candidates_correct",
        stage=2,
        description="Proposed experts that the layer then chose.",
    ),
    Counter(
        name="demands_predicted",
        stage=2,
        description="Demands at layers for which the predictor could propose experts.",
    ),
    Counter(
        name="parity_errors",
        stage=2,
        description="Words of predictor tables that were read with wrong parity, and errors that"
        " their memory answered.",
    ),
    Counter(name="demands", stage=3, description="Experts demanded."),
    Counter(name="hits", stage=3, description="Demands that found their expert resident."),
    Counter(name="misses", stage=3, description="Demands that had to start a fetch."),
    Counter(
        name="late", stage=3, description="Demands that found their expert in flight as a prefetch."
    ),
    Counter(
        name="merged", stage=3, description="Demands that found their expert in flight as a demand."
    ),
    Counter(name="refused", stage=3, description="Demands that found every slot pinned."),
    Counter(name="locks", stage=3, description="Experts that the host locked."),
    Counter(name="lock_misses", stage=3, description="Locks that had to start a fetch."),
    Counter(name="prefetch_issued", stage=3, description="Prefetches started."),
    Counter(
        name="prefetch_redundant", stage=3, description="Candidates found resident or in flight."
    ),
    Counter(name="prefetch_stale", stage=3, description="Candidates whose layer had been routed."),
    Counter(name="prefetch_no_slot", stage=3, description="Candidates that found no slot to take."),
    Counter(
        name="prefetch_outbid",
        stage=3,
        description="Candidates that were worth less than every expert that could give way.",
    ),
    Counter(name="prefetch_overflow", stage=3, description="Candidates lost to a full queue."),
    Counter(
        name="prefetch_throttled",
        stage=3,
        description="Candidates of a kind that has cost more than it has saved.",
    ),
    Counter(
        name="prefetch_cancelled",
        stage=3,
        description="Prefetches in flight that were given up because their layer was routed, or"
        " for a demand that found no slot.",
    ),
    Counter(
        name="useful", stage=5, description="Prefetched experts demanded or locked before eviction."
    ),
    Counter(name="useless", stage=5, description="Prefetched experts evicted without a demand."),
    Counter(name="evictions", stage=5, description="Experts evicted."),
    Counter(
        name="pollution", stage=5, description="Demand misses on an expert that a prefetch evicted."
    ),
    Counter(name="fills", stage=5, description="Experts that arrived whole."),
    Counter(name="fill_errors", stage=5, description="Fetches that ended in an error."),
    Counter(name="demand_bytes", stage=4, bits=64, description="Bytes fetched for demands."),
    Counter(name="prefetch_bytes", stage=4, bits=64, description="Bytes fetched for prefetches."),
    Counter(name="link_errors", stage=1, description="Damaged frames received."),
    Counter(name="link_replays", stage=1, description="Times the link went back to resend."),
    Counter(
        name="checksum_errors",
        stage=4,
        description="Experts that arrived whole but not with the checksum loaded for them.",
    ),
    Counter(
        name="prefetch_late_dropped",
        stage=3,
        description="Candidates of which less than the budget would have come in time.",
    ),
    Counter(
        name="routes_out_of_order",
        stage=1,
        description="Routing decisions, served all the same, for a layer below the last one that"
        " the context had routed in its token.",
    ),
    Counter(
        name="writes_refused",
        stage=5,
        description="Beats that the host wrote to no tile that it was asked for, and that changed"
        " nothing.",
    ),
)


#: What is counted of each DMA channel: name and description. Their registers are called
#: ``channel_`` and the name, and show the channel that ``dma_channel`` names.
CHANNEL_COUNTERS = {
    "tiles": "Tiles that came whole.",
    "errors": "Tiles that ended in an error, but for those aborted.",
    "aborted": "Tiles that were aborted.",
    "beats": "Beats that went to the buffer.",
    "busy": "Cycles in which tiles waited or were under way.",
    "stall": "Cycles in which a burst wanted to leave and could not.",
}

#: Address of the first of their registers, a multiple of 8.
CHANNEL_COUNTERS_ADDRESS = 0xA0

#: Width of the register ``dma_timeout``.
TIMEOUT_BITS = 24

#: Fields of the register ``throttle``: lowest bit and width of each.
THROTTLE_FIELDS = {
    "useful": (0, 4),
    "price": (4, 4),
    "pollution": (8, 4),
    "wait": (12, 4),
    "floor": (16, 7),
    "probe": (24, 4),
}


#: Fields of the register ``dma_shape``: lowest bit and width of each.
SHAPE_FIELDS = {
    "enable": (0, 1),
    "traffic": (4, 2),
    "weight": (8, 4),
    "credits": (12, 5),
    "burst_beats": (20, 9),
}

#: Fields of the register ``refusal``: lowest bit and width of each.
REFUSAL_FIELDS = {"reason": (0, 8), "register": (8, 16), "refused": (31, 1)}

#: What the address of slot 0 is a multiple of, in bytes, where slots are in a memory of their own.
SLOT_BASE_BYTES = 4096

#: What the address of the predictor's token tables is a multiple of, in bytes.
TOKEN_BASE_BYTES = 4096

#: Addresses where arrays begin: names of the registers that hold them, without ``_low`` and
#: ``_high``.
BASES = (
    "expert_base",
    *(f"part{part}_base" for part in range(1, MOST_PARTS)),
    "token_base",
    "slot_base",
)

#: Width of the registers ``layer_time`` and ``tile_time``, in bits.
TIME_BITS = 24

#: Bits of the register ``dma_row_stride``.
ROW_STRIDE_BITS = 24

#: Registers of which each profile has its own; of ``control`` only bits 0 and 1. Those of a DMA
#: channel are there once a channel.
PROFILE_REGISTERS = (
    "control",
    "prefetch_tiles",
    "predict_threshold",
    "predict_far_threshold",
    "predict_ahead",
    "cutoff_layer",
    "budget",
    "rescan_ahead",
    "rescan_least",
    "dma_lower_credits",
    "dma_shape",
    "dma_row_bytes",
    "dma_row_stride",
)


def _throttle_reset() -> int:
    values = {"useful": 8, "price": 1, "pollution": 8, "wait": 0, "floor": 16, "probe": 10}
    return sum(values[name] << low for name, (low, _) in THROTTLE_FIELDS.items())


@dataclass(frozen=True, kw_only=True)
class Register:
    """One 32-bit register.

    Parameters
    ----------
    name : :class:`str`
        Name in lower case.
    address : :class:`int`
        Address, in 32-bit words.
    access : :class:`str`
        ``"ro"`` read-only, ``"rw"`` read and write, ``"wo"`` write-only.
    reset : :class:`int` or None
        Value after reset; None where it depends on the configuration or counts.
    description : :class:`str`
        One sentence.
    """

    name: str
    address: int
    access: str
    reset: int | None
    description: str


def _layout() -> tuple[Register, ...]:
    registers: list[Register] = []

    def add(at: int, name: str, access: str, reset: int | None, description: str) -> None:
        registers.append(
            Register(name=name, address=at, access=access, reset=reset, description=description)
        )

    add(0x00, "device_id", "ro", DEVICE_ID, 'The letters "PRST".')
    add(0x01, "version", "ro", VERSION, "Version of the contract: major 31..16, minor 15..0.")
    add(0x02, "register_hash", "ro", None, "CRC-32 of the register list; the driver checks it.")
    add(0x03, "layers", "ro", None, "MoE layers (L).")
    add(0x04, "experts", "ro", None, "Experts a layer (E).")
    add(0x05, "top_k", "ro", None, "Experts chosen for each token and layer (k).")
    add(0x06, "slots", "ro", None, "Slots of the expert buffer (S).")
    add(0x07, "expert_bytes", "ro", None, "Size of a slot, and so of the largest expert, in bytes.")
    add(0x08, "tile_bytes", "ro", None, "Size of a tile, in bytes.")
    add(0x09, "contexts", "ro", None, "Contexts (C).")
    add(0x0A, "predictor", "ro", None, "Predictor: index in the list of names, 0 none, 1 st_moe.")
    add(0x0B, "successors", "ro", None, "Entries in a row of the correlation table (K).")
    add(0x0C, "data_bytes", "ro", None, "Width of the memory port, in bytes.")
    add(0x0D, "mover", "ro", None, "Who moves experts into slots: 0 the DMA engine, 1 the host.")
    add(
        0x0E,
        "layer_sizes",
        "ro",
        None,
        "CRC-32 of the tiles of an expert of each layer, as 32-bit little-endian numbers, where"
        " experts of different layers differ in size, or of the four numbers of the rows of each"
        " part, as 64-bit ones, where parts have rows; else 0.",
    )
    add(
        0x10,
        "control",
        "rw",
        17,
        "Bit 0: prefetch from the predictor's candidates. Bit 1: prefetch from hints. Bit 2: a"
        " candidate waits until the predictor is at rest and nothing is in flight, so that what is"
        " evicted for it does not hang on time. Bit 3: candidates of a kind that costs more than it"
        " saves are dropped. Bit 4: a prefetch in flight is given up at a tile's edge once its"
        " layer was routed, or for a demand that finds no slot. Bit 5: the phase of BEGIN_TOKEN"
        " asks for its profile. Bits 0 and 1 are those of the profile that profile_select names.",
    )
    add(
        0x11,
        "clear",
        "wo",
        0,
        "Write ones to clear. Bit 0: predictor tables. Bit 1: buffer (all slots become free,"
        " every layer released). Bit 2: counters. Bit 3: checksums of experts, so that none is"
        " checked. Waits until the engine is idle.",
    )
    add(0x12, "hint_threshold", "rw", 128, "Hints with a lower score are dropped (bits 7..0).")
    add(
        0x13,
        "expert_base_low",
        "rw",
        0,
        "Address of (part 0 of) expert 0 of layer 0, bits 31..0. Of each address the low half is"
        " written first, and where addresses have more than 32 bits it holds from the write of the"
        " high half on, with that.",
    )
    add(
        0x14,
        "expert_base_high",
        "rw",
        0,
        "Address of (part 0 of) expert 0 of layer 0, bits 63..32.",
    )
    add(0x15, "prefetch_tiles", "rw", 1, "Prefetch tiles that the DMA may hold at once, 1 to 4.")
    add(
        0x16,
        "predict_threshold",
        "rw",
        64,
        "Least confidence of a candidate for the next layer, in 1/256 (bits 7..0).",
    )
    add(
        0x17,
        "predict_far_threshold",
        "rw",
        160,
        "Least confidence of a candidate for a layer after the next, in 1/256 (bits 7..0).",
    )
    add(
        0x18,
        "predict_ahead",
        "rw",
        3,
        "Layers, from layer 0 on, that are proposed when a token starts (bits 7..0).",
    )
    add(
        0x19,
        "table_address",
        "rw",
        0,
        "Table word for table_data: table in bits 31..24, word in bits 23..0. Table 255 holds the"
        " experts' checksums, table 254 the statistics of prefetches.",
    )
    add(
        0x1A,
        "table_data",
        "rw",
        None,
        "The addressed table word; each access moves table_address one word on.",
    )
    add(0x1B, "table_words", "ro", None, "Words in the table that table_address selects.")
    add(
        0x1C,
        "token_base_low",
        "rw",
        0,
        "Address of the predictor's token tables where they lie behind a memory port, bits 31..0:"
        " a multiple of 4096.",
    )
    add(0x1D, "token_base_high", "rw", 0, "The same, bits 63..32.")
    add(
        0x1E,
        "policy",
        "rw",
        0,
        "Which expert gives way to another: "
        + ", ".join(f"{int(policy)} {policy.name}" for policy in Policy)
        + ".",
    )
    add(0x20, "cycles_low", "ro", None, "Clock cycles since reset, bits 31..0; latches the rest.")
    add(0x21, "cycles_high", "ro", None, "Clock cycles since reset, bits 63..32, as latched.")
    add(
        0x22,
        "throttle",
        "rw",
        _throttle_reset(),
        "What the throttle reckons with. Bits 3..0: worth of a useful prefetch; 7..4: price of each"
        " prefetch, paid back when it is used; 11..8: cost of a demand that misses because of"
        " prefetches; 15..12: cost of a demand that waits for a prefetch's tile; 22..16: below"
        " minus that credit a kind is switched off, to be switched on again at 0; 27..24: binary"
        " logarithm of the most demand misses from one probe to the next, at least 4.",
    )
    add(
        0x23,
        "throttle_state",
        "ro",
        None,
        "Credit of the kinds near, far and hint in bits 7..0, 15..8 and 23..16, signed; bits 24 to"
        " 26: they are switched on.",
    )
    add(
        0x24,
        "profile",
        "rw",
        int(Phase.DECODE),
        "Phase whose profile is asked for: "
        + ", ".join(f"{int(phase)} {phase.name}" for phase in Phase)
        + ". It becomes active as a whole, its DMA channels included, at the next layer boundary,"
        " at once if nothing is under way; a write of the active one makes its DMA channels"
        " active.",
    )
    add(0x25, "profile_active", "ro", int(Phase.DECODE), "Phase whose profile is active.")
    add(
        0x26,
        "profile_select",
        "rw",
        int(Phase.DECODE),
        "Profile that these registers belong to: "
        + ", ".join(PROFILE_REGISTERS).replace("control", "control (bits 0 and 1)")
        + ". Writes for the active one hold at once, but for those of the DMA.",
    )
    add(
        0x27,
        "cutoff_layer",
        "rw",
        255,
        "Candidates for this layer and those above are dropped (bits 7..0); 255: none are.",
    )
    add(
        0x28,
        "dma_lower_credits",
        "rw",
        0,
        "Most bursts outstanding in the classes below demand; 0: as many as hold a tile.",
    )
    add(
        0x29,
        "dma_channel",
        "rw",
        0,
        "DMA channel of dma_shape, dma_row_bytes, dma_row_stride and the channel_ counters.",
    )
    add(
        0x2A,
        "dma_shape",
        "rw",
        None,
        "Bit 0: the channel is enabled. Bits 5..4: traffic class; 11..8: weight; 16..12: credits;"
        " 28..20: longest burst, in beats.",
    )
    add(0x2B, "dma_row_bytes", "rw", 0, "Bytes of a row if tiles are gathered from rows, else 0.")
    add(
        0x2C,
        "dma_row_stride",
        "rw",
        0,
        f"Bytes from the start of a row to the start of the next, below {1 << ROW_STRIDE_BITS:,}.",
    )
    add(
        0x2D,
        "refusal",
        "rw",
        0,
        "What was wrong with the first write that was refused, which has changed nothing. Bit 31: a"
        " write was refused. Bits 23..8: address of its register. Bits 7..0: a Refusal. Any write"
        " clears it.",
    )
    add(
        0x2E,
        "dma_timeout",
        "rw",
        0,
        "Cycles that a DMA channel waits for the memory, or a fetch for the host, before its tiles"
        f" fail, 4 to {(1 << TIMEOUT_BITS) - 1:,}; 0: for ever.",
    )
    add(
        0x2F,
        "dma_abort",
        "wo",
        0,
        "A write aborts all tiles that the DMA engine was asked for: their experts' fetches fail.",
    )
    for part in range(1, MOST_PARTS):
        text = f"Address of part {part} of expert 0 of layer 0"
        add(
            0x2E + 2 * part,
            f"part{part}_base_low",
            "rw",
            None,
            f"{text}, bits 31..0. After reset the parts' arrays follow each other from address 0"
            " on; 0 where experts have no such part.",
        )
        add(0x2F + 2 * part, f"part{part}_base_high", "rw", None, f"{text}, bits 63..32.")
    for part in range(MOST_PARTS):
        add(
            0x36 + part,
            f"part{part}_bytes",
            "ro",
            None,
            f"Size of part {part} of an expert, in bytes, 0 if there is none.",
        )
    add(
        0x3A,
        "slot_base_low",
        "rw",
        0,
        "Address of slot 0 where slots are in a memory behind an AXI4 write port, bits 31..0: a"
        f" multiple of {SLOT_BASE_BYTES}.",
    )
    add(0x3B, "slot_base_high", "rw", 0, "The same, bits 63..32.")
    add(
        0x3C,
        "features",
        "ro",
        None,
        "What the device has. Bit 0: slots are in a memory behind an AXI4 write port. Bit 1:"
        " checksums of experts. Bit 2: the host writes slots. Bits 15..8: copies that an expert may"
        " have beside itself.",
    )
    add(
        0x3D,
        "budget",
        "rw",
        0,
        "Eighths of a prefetch's tiles that must be expected before its deadline, 1 to 8, or it is"
        " dropped; 0: none is. No effect while control bit 2 is set.",
    )
    add(
        0x3E,
        "layer_time",
        "ro",
        None,
        "Cycles from one routing decision of a context to the next: a mean with the weight 1/8 for"
        f" the last one; 0 before there are two, and {1 << TIME_BITS:,} or more do not count.",
    )
    add(
        0x3F,
        "tile_time",
        "ro",
        None,
        "Cycles that the DMA engine, or the host, takes for a tile while it has any: a mean like"
        " that; 0 before there is one.",
    )
    at = 0x40
    for counter in COUNTERS:
        text = f"{counter.description} Stage {counter.stage}."
        if counter.bits == 32:
            add(at, counter.name, "ro", 0, text)
            at += 1
        else:
            add(at, f"{counter.name}_low", "ro", 0, f"{text} Bits 31..0; latches the rest.")
            add(at + 1, f"{counter.name}_high", "ro", 0, f"{text} Bits 63..32, as latched.")
            at += 2
    for number, (name, text) in enumerate(CHANNEL_COUNTERS.items()):
        text = f"{text} Of the channel that dma_channel names. Stage 4."
        add(CHANNEL_COUNTERS_ADDRESS + number, f"channel_{name}", "ro", 0, text)
    add(
        0xA8,
        "rescan_ahead",
        "rw",
        0,
        "Layers, from the one after a context's latest routing decision on, whose values are looked"
        f" through for what is worth a prefetch: at most L, and {MOST_AHEAD}. It takes the place of"
        " the predictor's candidates, which are dropped; 0: none are looked through. Only where"
        " the predictor gives values.",
    )
    add(
        0xA9,
        "rescan_least",
        "rw",
        24,
        "Least confidence of what such a rescan finds, in 1/256: 1 to 255.",
    )
    return tuple(registers)


REGISTERS: tuple[Register, ...] = _layout()

_BY_NAME = {register.name: register for register in REGISTERS}


def register_by_name(name: str) -> Register:
    """The register of that name.

    Raises
    ------
    ValueError
        If there is none.
    """
    try:
        return _BY_NAME[name]
    except KeyError:
        raise ValueError(f"Register must be one of {', '.join(_BY_NAME)}, not {name!r}") from None


def register_hash() -> int:
    """CRC-32 over name, address, access and reset of every register, in address order."""
    text = "\n".join(
        f"{r.address:#06x} {r.name} {r.access} {'-' if r.reset is None else r.reset}"
        for r in sorted(REGISTERS, key=lambda r: r.address)
    )
    return zlib.crc32(text.encode())


def _layout_checksum(config: DeviceConfig) -> int:
    """Value of the register ``layer_sizes``."""
    if config.layer_bytes:
        return zlib.crc32(struct.pack(f"<{config.model.layers}I", *config.layer_tiles))
    if config.rows:
        return zlib.crc32(b"".join(struct.pack("<4Q", *rows) for rows in config.part_rows))
    return 0


def base_limits(config: DeviceConfig) -> dict[str, tuple[int, int]]:
    """Step and greatest value of the address where each array begins, in bytes.

    By the names in :data:`BASES`; arrays that the device does not have are left out.
    """
    steps = {
        name: (room, config.data_bytes)
        for name, room in zip(BASES, config.array_room, strict=False)
    }
    if config.token_memory:
        steps["token_base"] = (TOKEN_BASE_BYTES, TOKEN_BASE_BYTES)
    if config.slot_store == "axi":
        steps["slot_base"] = (config.slots * config.expert_bytes, SLOT_BASE_BYTES)
    top = 1 << config.address_bits
    return {name: (step, (top - size) // step * step) for name, (size, step) in steps.items()}


#: Bits that registers hold, and why other values are refused; of fields, and of what depends on the
#: configuration, :func:`refused_bits` knows more.
_WIDTHS = {
    "control": (6, Refusal.VALUE),
    "clear": (4, Refusal.VALUE),
    "hint_threshold": (8, Refusal.VALUE),
    "prefetch_tiles": (3, Refusal.VALUE),
    "predict_threshold": (8, Refusal.VALUE),
    "predict_far_threshold": (8, Refusal.VALUE),
    "predict_ahead": (8, Refusal.VALUE),
    "policy": (2, Refusal.VALUE),
    "profile": (2, Refusal.PROFILE),
    "profile_select": (2, Refusal.PROFILE),
    "cutoff_layer": (8, Refusal.VALUE),
    "dma_lower_credits": (5, Refusal.CREDITS),
    "dma_channel": (3, Refusal.CHANNEL),
    "dma_row_stride": (ROW_STRIDE_BITS, Refusal.ROWS),
    "dma_timeout": (TIMEOUT_BITS, Refusal.VALUE),
    "budget": (4, Refusal.BUDGET),
    "rescan_ahead": (7, Refusal.RESCAN),
    "rescan_least": (8, Refusal.RESCAN),
}


def refused_bits(config: DeviceConfig) -> dict[str, tuple[int, Refusal]]:
    """Bits of registers that must be written as 0, and the reason why others are refused.

    By the names of the registers; those that hold whatever is written are left out.
    """
    word = 0xFFFFFFFF
    widths = {**_WIDTHS, "dma_row_bytes": (config.bits("tile_bytes"), Refusal.ROWS)}
    bits = {name: (word >> width << width, why) for name, (width, why) in widths.items()}
    for name, fields in (("throttle", THROTTLE_FIELDS), ("dma_shape", SHAPE_FIELDS)):
        held = sum((1 << width) - 1 << low for low, width in fields.values())
        bits[name] = (word ^ held, Refusal.VALUE)
    limits = base_limits(config)
    for name in BASES:
        step, _ = limits.get(name, (0, 0))
        held = (1 << config.address_bits) - step if step else 0
        bits[f"{name}_low"] = (word & ~held, Refusal.BASE)
        bits[f"{name}_high"] = (word & ~(held >> 32), Refusal.BASE)
    return bits


def shape_registers(config: DeviceConfig) -> dict[str, int]:
    """Values of the read-only registers that describe a configuration."""
    return {
        "device_id": DEVICE_ID,
        "version": VERSION,
        "register_hash": register_hash(),
        "layers": config.model.layers,
        "experts": config.model.experts,
        "top_k": config.model.top_k,
        "slots": config.slots,
        "expert_bytes": config.expert_bytes,
        "layer_sizes": _layout_checksum(config),
        "tile_bytes": config.tile_bytes,
        "contexts": config.contexts,
        "predictor": config.PREDICTORS.index(config.predictor),
        "successors": config.successors,
        "data_bytes": config.data_bytes,
        **{
            f"part{part}_bytes": sum(config.part_bytes[part : part + 1])
            for part in range(MOST_PARTS)
        },
        "features": (config.slot_store == "axi")
        | config.checksums << 1
        | config.host_writes << 2
        | (config.replicas - 1) << 8,
        "mover": config.MOVERS.index(config.mover),
    }
