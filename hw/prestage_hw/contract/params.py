"""Shapes of the model and of the device, with named presets."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate
from typing import Any, NamedTuple

from .checks import require_integer, require_power_of_two
from .perceptron import PerceptronConfig, perceptron_form

__all__ = [
    "MOST_AHEAD",
    "MOST_PARTS",
    "PRESETS",
    "TINY_DEVICE",
    "DeviceConfig",
    "ModelConfig",
    "Rows",
    "preset",
    "require_config",
]

#: Most parts that an expert may lie in.
MOST_PARTS = 4

#: Most layers that a rescan looks ahead, in a device of more.
MOST_AHEAD = 127


def _bits_for_count(count: int) -> int:
    """Width of an index that counts from 0 to ``count - 1``, in bits, at least 1."""
    return max(1, (count - 1).bit_length())


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Shape of one Mixture-of-Experts model.

    Parameters
    ----------
    name : :class:`str`
        Name of the model.
    layers : :class:`int`
        MoE layers (L), 1 to 255. Dense layers are not counted.
    experts : :class:`int`
        Routed experts a layer (E), 2 to 1024.
    top_k : :class:`int`
        Experts that the router chooses for each token and layer (k), 1 to 16, less than or equal to
        ``experts``.
    expert_bytes : :class:`int`
        Size of one expert's weights as published, in bytes; 0 where unknown.

    Raises
    ------
    TypeError
        If a shape is not an integer.
    ValueError
        If a shape is out of its range.
    """

    name: str
    layers: int
    experts: int
    top_k: int
    expert_bytes: int = 0

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name:
            raise TypeError(f"Model name must be a non-empty string, not {self.name!r}")
        require_integer("Layer count", self.layers, low=1, high=255)
        require_integer("Expert count", self.experts, low=2, high=1024)
        require_integer("Top-k", self.top_k, low=1, high=16)
        if self.top_k > self.experts:
            raise ValueError(
                f"Top-k must not exceed the expert count {self.experts}, but is {self.top_k}"
            )
        require_integer("Expert size in bytes", self.expert_bytes, low=0, high=1 << 40)


def _swiglu_bytes(*, hidden: int, intermediate: int, weight_bits: float) -> int:
    """Size of one SwiGLU expert (gate, up and down matrices), in bytes."""
    return int(3 * hidden * intermediate * weight_bits / 8)


# Shapes are those of the models' published configuration files. MXFP4 stores 4.25 bits a weight
# with its scales.
PRESETS: dict[str, ModelConfig] = {
    config.name: config
    for config in (
        ModelConfig(name="tiny", layers=4, experts=8, top_k=2, expert_bytes=1024),
        ModelConfig(
            name="gpt-oss-20b",
            layers=24,
            experts=32,
            top_k=4,
            expert_bytes=_swiglu_bytes(hidden=2880, intermediate=2880, weight_bits=4.25),
        ),
        ModelConfig(
            name="gpt-oss-120b",
            layers=36,
            experts=128,
            top_k=4,
            expert_bytes=_swiglu_bytes(hidden=2880, intermediate=2880, weight_bits=4.25),
        ),
        ModelConfig(
            name="qwen3-30b-a3b",
            layers=48,
            experts=128,
            top_k=8,
            expert_bytes=_swiglu_bytes(hidden=2048, intermediate=768, weight_bits=16),
        ),
        ModelConfig(
            name="mixtral-8x7b",
            layers=32,
            experts=8,
            top_k=2,
            expert_bytes=_swiglu_bytes(hidden=4096, intermediate=14336, weight_bits=16),
        ),
        ModelConfig(
            name="olmoe-1b-7b",
            layers=16,
            experts=64,
            top_k=8,
            expert_bytes=_swiglu_bytes(hidden=2048, intermediate=1024, weight_bits=16),
        ),
        ModelConfig(
            name="deepseek-v2-lite",
            layers=26,
            experts=64,
            top_k=6,
            expert_bytes=_swiglu_bytes(hidden=2048, intermediate=1408, weight_bits=16),
        ),
    )
}


def preset(name: str) -> ModelConfig:
    """Shape of the named model.

    Raises
    ------
    ValueError
        If no preset has that name.
    """
    try:
        return PRESETS[name]
    except KeyError:
        known = ", ".join(sorted(PRESETS))
        raise ValueError(f"Model preset must be one of {known}, not {name!r}") from None


class Rows(NamedTuple):
    """Where the rows of a part of an expert lie in memory, in bytes.

    Row r of the part of expert e of layer l begins at ``base + l * layer_stride + e * expert_stride
    + r * row_stride``. Each 0 stands for what follows from the others where nothing lies in
    between.

    Attributes
    ----------
    row_bytes : :class:`int`
        Size of a row; 0 stands for a part in one row.
    row_stride : :class:`int`
        From the start of a row to the start of the next; 0 stands for ``row_bytes``.
    expert_stride : :class:`int`
        From an expert to the next of its layer; 0 stands for all its rows, each of ``row_stride``.
        Where the rows of several experts lie in turns it is less than a row's stride.
    layer_stride : :class:`int`
        From a layer to the next; 0 stands for the greater of all experts, each of
        ``expert_stride``, and all rows, each of ``row_stride``.
    """

    row_bytes: int = 0
    row_stride: int = 0
    expert_stride: int = 0
    layer_stride: int = 0


@dataclass(frozen=True, kw_only=True)
class DeviceConfig:
    """Parameters of one device: everything that the RTL is elaborated with.

    Parameters
    ----------
    model : :class:`ModelConfig`
        Shape of the model that is served.
    slots : :class:`int`
        Experts that the buffer holds (S), at least ``contexts * model.top_k``, at most 65,535.
    expert_bytes : :class:`int`
        Size of one expert in the device's memory and in a slot, in bytes: a whole number of tiles,
        at most 16 MiB, where slots are the host's 1 GiB. It may be scaled down from
        ``model.expert_bytes``. Of experts of different sizes the greatest.
    tile_bytes : :class:`int`
        Unit of transfer, in bytes: a power of two from 512 to 16,384; where slots are the host's
        anything from 512 up to ``expert_bytes``.
    contexts : :class:`int`
        Sequences decoded side by side (C), 1 to 8.
    predictor : :class:`str`
        Name of the predictor: ``"none"``, ``"st_moe"`` or ``"perceptron"``.
    form : :class:`str`
        Named form of the ``perceptron`` predictor (:data:`prestage_hw.contract.perceptron.FORMS`).
    perceptron : :class:`PerceptronConfig` or None
        Its parameters; None takes those of ``form``. Not used by other predictors.
    successors : :class:`int`
        Entries in a row of the correlation table (K), 1 to 32 and at most ``model.experts``; 0
        stands for the smaller of 8 and ``model.experts``.
    data_bytes : :class:`int`
        Width of the memory port, in bytes: a power of two from 4 to 64.
    address_bits : :class:`int`
        Width of a memory address, 16 to 64 bits.
    inflight : :class:`int`
        Entries of the in-flight table, 4 to 32.
    prefetch_inflight : :class:`int`
        Most in-flight entries that prefetches may hold, 1 to ``inflight - 2``.
    outstanding_bursts : :class:`int`
        Read bursts that the memory port may have outstanding, 1 to 16.
    burst_beats : :class:`int`
        Longest read burst, in beats: a power of two from 1 to 256.
    dma_channels : :class:`int`
        Request channels of the DMA engine, 1 to 8.
    dma_queue_depth : :class:`int`
        Requests that wait in a channel: a power of two from 2 to 16.
    axi_ids : :class:`int`
        IDs of read bursts, 1 to ``dma_channels``; channel c has ID c modulo ``axi_ids``. 0 stands
        for one a channel.
    parts : tuple of :class:`int`
        Sizes of the parts of an expert, in bytes, at most :data:`MOST_PARTS`: for example its gate,
        up and down matrices. Each is a whole number of tiles, all together are ``expert_bytes``.
        The parts of all experts lie in an array of their own, layer by layer; in a slot they follow
        each other. Empty stands for one part.
    layer_bytes : tuple of :class:`int`
        Sizes of an expert of each layer, in bytes, where they differ: one for each layer, each a
        whole number of tiles, the greatest ``expert_bytes``, which is the size of a slot. Not
        together with ``parts``. Empty, as sizes that are all the same, stands for
        ``expert_bytes`` in every layer.
    rows : tuple of :class:`Rows`
        Where the rows of each part lie, one for each part: for example those of some columns of a
        matrix, or padded ones. A row is a whole number of beats, a part a whole number of rows; a
        tile may begin anywhere in a row. In a slot rows follow each other without gaps. Empty, as
        rows without gaps, stands for parts that lie in one piece. Not together with
        ``layer_bytes``.
    slot_store : :class:`str`
        Where the slots' bytes are: ``"internal"`` in block RAM, to be read through the consumer
        port; ``"axi"`` in a memory of their own behind an AXI4 write port, which the consumer reads
        itself.
    checksums : :class:`bool`
        Whether experts are compared with checksums as they arrive, where some were loaded.
    mover : :class:`str`
        Who moves experts into slots: ``"dma"``, the device from a memory of its own, or ``"host"``,
        which is asked for tiles over the link and keeps the slots, unless ``host_writes``.
    host_writes : :class:`bool`
        Whether slots are in the device all the same with a host mover, who writes tiles into them
        through a port, or over the link.
    replicas : :class:`int`
        Most copies of an expert, and banks of slots: 1, 2 or 4. Slot s is in bank s mod replicas;
        of slots in the device each bank has a consumer port of its own.
    victim_samples : :class:`int`
        Slots that a search for the expert of least worth looks at in one pass, 1 to ``slots``: more
        find a better one and take as many cycles. 0 stands for 32 shared by the contexts, at least
        8.

    Raises
    ------
    TypeError
        If a parameter is not of its type.
    ValueError
        If a parameter is out of its range.
    """

    model: ModelConfig
    slots: int
    expert_bytes: int = 2048
    tile_bytes: int = 512
    contexts: int = 1
    predictor: str = "st_moe"
    form: str = "lite"
    perceptron: PerceptronConfig | None = None
    successors: int = 0
    data_bytes: int = 16
    address_bits: int = 40
    inflight: int = 8
    prefetch_inflight: int = 2
    outstanding_bursts: int = 4
    burst_beats: int = 64
    dma_channels: int = 4
    dma_queue_depth: int = 4
    axi_ids: int = 0
    parts: tuple[int, ...] = ()
    layer_bytes: tuple[int, ...] = ()
    rows: tuple[Rows, ...] = ()
    slot_store: str = "internal"
    checksums: bool = False
    mover: str = "dma"
    replicas: int = 1
    victim_samples: int = 0
    host_writes: bool = False

    PREDICTORS = ("none", "st_moe", "perceptron")
    SLOT_STORES = ("internal", "axi")
    MOVERS = ("dma", "host")

    def __post_init__(self) -> None:
        if not isinstance(self.model, ModelConfig):
            raise TypeError(f"Model must be a ModelConfig, not {self.model!r}")
        require_integer("Context count", self.contexts, low=1, high=8)
        least = self.contexts * self.model.top_k
        require_integer("Slot count", self.slots, low=1, high=65535)
        if self.slots < least:
            raise ValueError(
                f"Slot count must be at least contexts x top-k = {least}, not {self.slots}"
            )
        if self.mover not in self.MOVERS:
            raise ValueError(f"Mover must be one of {', '.join(self.MOVERS)}, not {self.mover!r}")
        if not isinstance(self.host_writes, bool):
            raise TypeError(f"Host writes must be True or False, not {self.host_writes!r}")
        if self.host_writes and self.mover != "host":
            raise ValueError(f"Host writes need the mover 'host', not {self.mover!r}")
        if self.mover == "host" and not self.host_writes:
            require_integer("Tile size in bytes", self.tile_bytes, low=512, high=1 << 30)
            require_integer("Expert size in bytes", self.expert_bytes, low=512, high=1 << 30)
        else:
            require_power_of_two("Tile size in bytes", self.tile_bytes, low=512, high=16384)
            require_integer("Expert size in bytes", self.expert_bytes, low=512, high=1 << 24)
        if self.expert_bytes % self.tile_bytes:
            raise ValueError(
                f"Expert size must be a whole number of {self.tile_bytes}-byte tiles,"
                f" not {self.expert_bytes} bytes"
            )
        if self.predictor not in self.PREDICTORS:
            raise ValueError(
                f"Predictor must be one of {', '.join(self.PREDICTORS)}, not {self.predictor!r}"
            )
        if self.perceptron is None:
            form = perceptron_form(self.form)
            if self.predictor == "perceptron":
                object.__setattr__(self, "perceptron", form)
        elif not isinstance(self.perceptron, PerceptronConfig):
            raise TypeError(f"Perceptron must be a PerceptronConfig, not {self.perceptron!r}")
        if self.predictor == "perceptron":
            self._check_perceptron()
        require_integer("Successor count", self.successors, low=0, high=32)
        if self.successors == 0:
            object.__setattr__(self, "successors", min(8, self.model.experts))
        if self.successors > self.model.experts:
            raise ValueError(
                f"Successor count must not exceed the expert count {self.model.experts},"
                f" but is {self.successors}"
            )
        require_power_of_two("Memory port width in bytes", self.data_bytes, low=4, high=64)
        require_integer("Address width in bits", self.address_bits, low=16, high=64)
        self._check_layers()
        total = self.layer_starts[-1] * self.tile_bytes
        if total > 1 << self.address_bits:
            raise ValueError(
                f"Address width must span all experts ({total} bytes),"
                f" but is {self.address_bits} bits"
            )
        require_integer("In-flight table size", self.inflight, low=4, high=32)
        require_integer(
            "In-flight prefetch limit", self.prefetch_inflight, low=1, high=self.inflight - 2
        )
        require_integer("Outstanding burst limit", self.outstanding_bursts, low=1, high=16)
        require_power_of_two("Burst length in beats", self.burst_beats, low=1, high=256)
        require_integer("DMA channel count", self.dma_channels, low=1, high=8)
        require_power_of_two("DMA queue depth", self.dma_queue_depth, low=2, high=16)
        require_integer("AXI ID count", self.axi_ids, low=0, high=self.dma_channels)
        if self.axi_ids == 0:
            object.__setattr__(self, "axi_ids", self.dma_channels)
        self._check_parts()
        self._check_rows()
        if self.mover == "host":
            for name, value, only in (
                ("Slot store", self.slot_store, "internal"),
                ("Parts", self.parts, ()),
                ("Rows", self.rows, ()),
                ("Checksums", self.checksums, False),
            ):
                if value != only:
                    raise ValueError(
                        f"{name} must be {only!r} with a host mover, who keeps experts,"
                        f" not {value!r}"
                    )
        if self.slot_store not in self.SLOT_STORES:
            raise ValueError(
                f"Slot store must be one of {', '.join(self.SLOT_STORES)}, not {self.slot_store!r}"
            )
        if not isinstance(self.checksums, bool):
            raise TypeError(f"Checksums must be True or False, not {self.checksums!r}")
        self._check_replicas(least)
        require_integer("Victim sample count", self.victim_samples, low=0, high=self.slots)
        total = self.slots * self.expert_bytes
        if self.slot_store == "axi" and total > 1 << self.address_bits:
            raise ValueError(
                f"Address width must span all slots ({total} bytes),"
                f" but is {self.address_bits} bits"
            )

    def _check_replicas(self, least: int) -> None:
        """Refuse banks that slots do not fill, or copies that no slots are left for."""
        require_power_of_two("Replica count", self.replicas, low=1, high=4)
        if self.slots % self.replicas:
            raise ValueError(
                f"Slot count must be a multiple of the replica count {self.replicas},"
                f" not {self.slots}"
            )
        if self.replicas > 1 and self.slots < least + self.replicas:
            raise ValueError(
                f"Slot count must be at least contexts x top-k + replicas = {least + self.replicas}"
                f" where experts may have copies, not {self.slots}"
            )

    def _check_parts(self) -> None:
        """Refuse parts that do not make up an expert."""
        if not isinstance(self.parts, tuple):
            raise TypeError(f"Parts must be a tuple of sizes in bytes, not {self.parts!r}")
        if len(self.parts) > MOST_PARTS:
            raise ValueError(f"Expert must have at most {MOST_PARTS} parts, not {len(self.parts)}")
        for number, size in enumerate(self.parts):
            require_integer(f"Size of part {number} in bytes", size, low=512, high=1 << 24)
            if size % self.tile_bytes:
                raise ValueError(
                    f"Size of part {number} must be a whole number of {self.tile_bytes}-byte tiles,"
                    f" not {size} bytes"
                )
        if self.parts and self.layer_bytes:
            raise ValueError(
                "Experts must not have parts where their size differs from layer to layer, but"
                f" have {len(self.parts)}"
            )
        if self.parts and sum(self.parts) != self.expert_bytes:
            raise ValueError(
                f"Parts must add up to the expert size of {self.expert_bytes} bytes,"
                f" not to {sum(self.parts)}"
            )

    def _check_rows(self) -> None:
        """Refuse rows that do not make up the parts, or cannot be asked for."""
        if not isinstance(self.rows, tuple) or not all(isinstance(r, tuple) for r in self.rows):
            raise TypeError(f"Rows must be a tuple of Rows, not {self.rows!r}")
        if not self.rows:
            return
        parts = self.part_bytes
        if len(self.rows) != len(parts):
            raise ValueError(
                f"Rows must be one for each of {len(parts)} parts, not {len(self.rows)}"
            )
        if self.layer_bytes:
            raise ValueError(
                "Rows must not be given where the size of experts differs from layer to layer"
            )
        if max(map(len, self.rows)) > len(Rows._fields):
            raise ValueError(f"Rows must be at most {len(Rows._fields)} numbers, not {self.rows}")
        object.__setattr__(self, "rows", tuple(Rows(*each) for each in self.rows))
        for part, (size, rows) in enumerate(zip(parts, self.rows, strict=True)):
            for field, value in rows._asdict().items():
                name = f"{field.replace('_', ' ').replace('row bytes', 'row size').capitalize()}"
                name += f" of part {part}"
                require_integer(f"{name} in bytes", value, low=0, high=1 << 40)
                if value % self.data_bytes:
                    raise ValueError(
                        f"{name} must be a whole number of {self.data_bytes}-byte beats,"
                        f" not {value} bytes"
                    )
                if value and value < (rows.row_bytes or size):
                    raise ValueError(
                        f"{name} must be at least the row size of {rows.row_bytes or size} bytes,"
                        f" not {value}"
                    )
            if rows.row_bytes and size % rows.row_bytes:
                raise ValueError(
                    f"Part {part} must be a whole number of rows of {rows.row_bytes} bytes,"
                    f" not {size} bytes"
                )
        if self.part_rows == replace(self, rows=()).part_rows:
            object.__setattr__(self, "rows", ())
            return
        ends = zip(self.part_bases(), self.array_room, strict=True)
        total = max(self.memory_bytes, *(base + room for base, room in ends))
        if total > 1 << self.address_bits:
            raise ValueError(
                f"Address width must span all rows of all experts ({total} bytes),"
                f" but is {self.address_bits} bits"
            )

    def _check_layers(self) -> None:
        """Refuse sizes of layers' experts that do not fit the model or the slots."""
        if not isinstance(self.layer_bytes, tuple):
            raise TypeError(f"Layer sizes must be a tuple in bytes, not {self.layer_bytes!r}")
        if not self.layer_bytes:
            return
        layers = self.model.layers
        if len(self.layer_bytes) != layers:
            raise ValueError(
                f"Layer sizes must be one for each of {layers} layers, not {len(self.layer_bytes)}"
            )
        most = 1 << 30 if self.mover == "host" else 1 << 24
        for layer, size in enumerate(self.layer_bytes):
            require_integer(f"Expert size of layer {layer} in bytes", size, low=512, high=most)
            if size % self.tile_bytes:
                raise ValueError(
                    f"Expert size of layer {layer} must be a whole number of"
                    f" {self.tile_bytes}-byte tiles, not {size} bytes"
                )
        if max(self.layer_bytes) != self.expert_bytes:
            raise ValueError(
                f"Greatest expert size of a layer must be that of a slot, {self.expert_bytes}"
                f" bytes, not {max(self.layer_bytes)}"
            )
        if min(self.layer_bytes) == self.expert_bytes:
            object.__setattr__(self, "layer_bytes", ())

    def _check_perceptron(self) -> None:
        """Refuse parameters of the perceptron that do not fit the model."""
        perceptron = self.perceptron
        assert perceptron is not None
        entries, experts = perceptron.list_entries, self.model.experts
        if entries and not self.predictor_lanes <= entries < experts:
            raise ValueError(
                f"List length must be from {self.predictor_lanes} lanes to below {experts} experts,"
                f" not {entries}"
            )
        far = max(perceptron.horizons)
        if far >= self.model.layers:
            raise ValueError(
                f"Horizon must be below the layer count {self.model.layers}, not {far}"
            )

    @property
    def predictor_lanes(self) -> int:
        """Lanes of the perceptron predictor; all experts side by side for the others."""
        lanes = 1 << _bits_for_count(self.model.experts)
        if self.perceptron is not None:
            lanes = min(lanes, self.perceptron.lanes)
        return lanes

    @property
    def token_memory(self) -> bool:
        """Whether the predictor keeps token tables behind a memory port of its own."""
        return (
            self.predictor == "perceptron"
            and self.perceptron is not None
            and self.perceptron.token_store == "memory"
            and bool(self.perceptron.features() & {"T", "T2", "Q", "S"})
        )

    @property
    def lane_beats(self) -> int:
        """Beats in which a value for each expert passes through the predictor's lanes."""
        return -(-self.model.experts // self.predictor_lanes)

    @property
    def gives_values(self) -> bool:
        """Whether the predictor gives values of experts to the buffer."""
        return self.predictor == "perceptron"

    @property
    def most_ahead(self) -> int:
        """Most layers that a rescan may look ahead: none where there are no values."""
        return min(self.model.layers, MOST_AHEAD) if self.gives_values else 0

    @property
    def stores_slots(self) -> bool:
        """Whether the slots' bytes are in the device."""
        return self.slot_store == "internal" and (self.mover == "dma" or self.host_writes)

    @property
    def bank_bits(self) -> int:
        """Lowest bits of a slot's number, which name its bank."""
        return self.replicas.bit_length() - 1

    @property
    def victim_pass(self) -> int:
        """Slots that one pass of a search for a victim looks at."""
        return self.victim_samples or min(self.slots, max(8, 32 // self.contexts))

    @property
    def lockable(self) -> int:
        """Slots that may be locked or hold copies, so that every demand still finds one."""
        return self.slots - self.contexts * self.model.top_k

    @property
    def tiles(self) -> int:
        """Tiles in a slot, and so in the largest expert."""
        return self.expert_bytes // self.tile_bytes

    @cached_property
    def layer_sizes(self) -> tuple[int, ...]:
        """Size of an expert of each layer, in bytes."""
        return self.layer_bytes or (self.expert_bytes,) * self.model.layers

    @cached_property
    def layer_tiles(self) -> tuple[int, ...]:
        """Tiles in an expert of each layer."""
        return tuple(size // self.tile_bytes for size in self.layer_sizes)

    @cached_property
    def layer_starts(self) -> tuple[int, ...]:
        """Tiles of all experts of the layers before each layer, and of all layers at the end."""
        experts = self.model.experts
        return tuple(accumulate((experts * tiles for tiles in self.layer_tiles), initial=0))

    @property
    def memory_bytes(self) -> int:
        """Bytes of all experts, and of what lies between their rows."""
        return sum(self.array_bytes)

    @property
    def part_bytes(self) -> tuple[int, ...]:
        """Sizes of the parts of an expert, in bytes: one of ``expert_bytes`` by default."""
        return self.parts or (self.expert_bytes,)

    @cached_property
    def part_rows(self) -> tuple[Rows, ...]:
        """Rows of each part with all their strides; a part in one piece is one row."""
        experts = self.model.experts
        result = []
        given = self.rows or (Rows(),) * len(self.part_bytes)
        for size, rows in zip(self.part_bytes, given, strict=True):
            row_bytes = rows.row_bytes or size
            row_stride = rows.row_stride or row_bytes
            if row_stride == row_bytes:
                # Without gaps: one row.
                row_bytes = row_stride = size
            whole = size // row_bytes * row_stride
            expert_stride = rows.expert_stride or whole
            layer_stride = rows.layer_stride or max(experts * expert_stride, whole)
            result.append(Rows(row_bytes, row_stride, expert_stride, layer_stride))
        return tuple(result)

    @property
    def gathers(self) -> bool:
        """Whether a tile may lie in several rows."""
        if not self.rows:
            return False
        return any(rows.row_bytes % self.tile_bytes for rows in self.part_rows)

    @cached_property
    def array_bytes(self) -> tuple[int, ...]:
        """Size of the array of each part, with what lies between and behind its rows, in bytes."""
        if self.layer_bytes:
            return (self.layer_starts[-1] * self.tile_bytes,)
        layers, experts = self.model.layers, self.model.experts
        return tuple(
            max(
                layers * rows.layer_stride,
                experts * rows.expert_stride,
                size // rows.row_bytes * rows.row_stride,
                end,
            )
            for size, rows, end in zip(
                self.part_bytes, self.part_rows, self.array_ends, strict=True
            )
        )

    @cached_property
    def array_ends(self) -> tuple[int, ...]:
        """Bytes from the base of the array of each part to the end of the last row in it."""
        if self.layer_bytes:
            return self.array_bytes
        layers, experts = self.model.layers, self.model.experts
        return tuple(
            (layers - 1) * rows.layer_stride
            + (experts - 1) * rows.expert_stride
            + (size // rows.row_bytes - 1) * rows.row_stride
            + rows.row_bytes
            for size, rows in zip(self.part_bytes, self.part_rows, strict=True)
        )

    @property
    def array_room(self) -> tuple[int, ...]:
        """Bytes of memory that there must be from the base of the array of each part on.

        Where tiles are gathered no row may lie in the last tile of the address space: the DMA
        engine takes it for one past the top.
        """
        if self.layer_bytes:
            return self.array_ends
        return tuple(
            end + (self.tile_bytes if rows.row_bytes % self.tile_bytes else 0)
            for end, rows in zip(self.array_ends, self.part_rows, strict=True)
        )

    @property
    def stream_channel(self) -> int:
        """DMA channel of what is prefetched for a prefill chunk: the last of three or more, else
        that of other prefetches.
        """
        return self.dma_channels - 1 if self.dma_channels > 2 else min(1, self.dma_channels - 1)

    @property
    def scheduled_channels(self) -> tuple[int, ...]:
        """DMA channels that the scheduler sends to: of demands, prefetches and prefill chunks.

        None of them can be disabled: a tile that waits in one for ever would hold up demands.
        """
        return tuple(sorted({0, min(1, self.dma_channels - 1), self.stream_channel}))

    @property
    def first_tiles(self) -> tuple[int, ...]:
        """First tile of each part."""
        sizes = self.part_bytes
        return tuple(sum(sizes[:part]) // self.tile_bytes for part in range(len(sizes)))

    def part_bases(self, base: int = 0) -> tuple[int, ...]:
        """Addresses of the arrays of the parts where they follow each other from ``base`` on."""
        return tuple(accumulate(self.array_bytes[:-1], initial=base))

    def expert_spans(
        self, layer: int, expert: int, *, bases: Sequence[int] = ()
    ) -> tuple[tuple[int, int], ...]:
        """Address and size of each piece of an expert, a part or a row, in the order in which they
        lie in a slot.

        Parameters
        ----------
        layer, expert : :class:`int`
            Which one.
        bases : sequence of :class:`int`
            Address of the array of each part; empty stands for :meth:`part_bases`, as after reset.
        """
        if self.layer_bytes:
            base = bases[0] if bases else 0
            return ((self.expert_address(layer, expert, base=base), self.layer_bytes[layer]),)
        return tuple(
            (start + at, rows.row_bytes)
            for start, size, rows in self._expert_parts(layer, expert, bases)
            for at in range(0, size // rows.row_bytes * rows.row_stride, rows.row_stride)
        )

    def tile_addresses(
        self, layer: int, expert: int, *, bases: Sequence[int] = ()
    ) -> tuple[int, ...]:
        """Address of the first byte of each tile of an expert; as for :meth:`expert_spans`."""
        if self.layer_bytes:
            ((start, size),) = self.expert_spans(layer, expert, bases=bases)
            return tuple(range(start, start + size, self.tile_bytes))
        return tuple(
            start + at // rows.row_bytes * rows.row_stride + at % rows.row_bytes
            for start, size, rows in self._expert_parts(layer, expert, bases)
            for at in range(0, size, self.tile_bytes)
        )

    def _expert_parts(
        self, layer: int, expert: int, bases: Sequence[int]
    ) -> list[tuple[int, int, Rows]]:
        """Address, size and rows of each part of an expert."""
        return [
            (base + layer * rows.layer_stride + expert * rows.expert_stride, size, rows)
            for base, size, rows in zip(
                bases or self.part_bases(), self.part_bytes, self.part_rows, strict=True
            )
        ]

    @property
    def tile_beats(self) -> int:
        """Beats of the memory port in a tile."""
        return self.tile_bytes // self.data_bytes

    @property
    def expert_beats(self) -> int:
        """Beats of the memory port in a slot, and so in the largest expert."""
        return self.expert_bytes // self.data_bytes

    @property
    def longest_burst(self) -> int:
        """Beats of the longest burst that a 4 KiB edge allows, at most ``burst_beats``."""
        return min(self.burst_beats, 4096 // self.data_bytes)

    @property
    def lower_credits(self) -> int:
        """Bursts that hold about a tile: reset value of what a demand may find before it."""
        return min(self.outstanding_bursts, max(1, self.tile_beats // self.longest_burst))

    @property
    def candidate_depth(self) -> int:
        """Capacity of the candidate queue: a layer's experts for each context, at least 64."""
        return max(64, self.model.experts * self.contexts)

    @property
    def candidate_share(self) -> int:
        """Places of each context in the candidate queue."""
        return self.candidate_depth // self.contexts

    def bits(self, kind: str) -> int:
        """Width of a field of the named kind, in bits.

        Kinds: ``ctx``, ``layer``, ``expert``, ``slot``, ``tile``, ``beat`` (beat within a
        slot), ``tag`` (in-flight entry), ``index`` (position in a routing decision),
        ``lane_beat`` (beat of a value for each expert), ``channel`` (of the DMA engine),
        ``axi_id``, ``tile_bytes`` (size of a transfer, a whole tile at most), ``copy`` (of an
        expert), ``address``, ``data``.

        Raises
        ------
        ValueError
            If the kind is unknown.
        """
        counts = {
            "ctx": self.contexts,
            "layer": self.model.layers,
            "expert": self.model.experts,
            "slot": self.slots,
            "tile": self.tiles,
            "beat": self.expert_beats,
            "tag": self.inflight,
            "index": self.model.top_k,
            "lane_beat": self.lane_beats,
            "channel": self.dma_channels,
            "axi_id": self.axi_ids,
            "tile_bytes": self.tile_bytes + 1,
            "copy": self.replicas,
        }
        if kind in counts:
            return _bits_for_count(counts[kind])
        if kind == "address":
            return self.address_bits
        if kind == "data":
            return self.data_bytes * 8
        raise ValueError(
            f"Field kind must be one of {', '.join(counts)}, address, data, not {kind!r}"
        )

    def count(self, kind: str) -> int:
        """Length of an array field of the named kind: ``top_k``, ``data_bytes`` or ``lanes``."""
        if kind == "top_k":
            return self.model.top_k
        if kind == "data_bytes":
            return self.data_bytes
        if kind == "lanes":
            return self.predictor_lanes
        raise ValueError(f"Array kind must be top_k, data_bytes or lanes, not {kind!r}")

    def expert_address(self, layer: int, expert: int, *, base: int = 0) -> int:
        """Address of an expert's first byte: experts lie layer by layer, and without gaps where
        they have no rows.

        Of an expert in several parts that of the first part, whose array is at ``base``.
        """
        if self.layer_bytes:
            start = self.layer_starts[layer] * self.tile_bytes
            return base + start + expert * self.layer_bytes[layer]
        rows = self.part_rows[0]
        return base + layer * rows.layer_stride + expert * rows.expert_stride

    def expert_at(self, address: int) -> tuple[int, int]:
        """Layer and expert whose bytes are at an address after reset.

        What lies between rows belongs to the row before.
        """
        if self.layer_bytes:
            tile = address // self.tile_bytes
            layer = min(bisect_right(self.layer_starts, tile), self.model.layers) - 1
            return layer, (tile - self.layer_starts[layer]) // self.layer_tiles[layer]
        bases = self.part_bases()
        part = bisect_right(bases, address) - 1
        rest = address - bases[part]
        _, row_stride, expert_stride, layer_stride = self.part_rows[part]
        # The longest stride first; where two are the same there is one row, or one layer.
        found = {}
        for kind, stride in sorted(
            (("layer", layer_stride), ("expert", expert_stride), ("row", row_stride)),
            key=lambda each: -each[1],
        ):
            found[kind], rest = divmod(rest, stride)
        return found["layer"], found["expert"]

    @classmethod
    def from_fields(cls, fields: Mapping[str, Any]) -> DeviceConfig:
        """The configuration that :func:`dataclasses.asdict` has taken apart, with JSON in between.

        Raises
        ------
        TypeError, ValueError
            As for :class:`DeviceConfig` itself.
        """
        perceptron = fields.get("perceptron")
        if perceptron is not None:
            perceptron = PerceptronConfig.from_fields(perceptron)
        model = ModelConfig(**fields["model"])
        sizes = {name: tuple(fields.get(name, ())) for name in ("parts", "layer_bytes")}
        rows = tuple(Rows(*each) for each in fields.get("rows", ()))
        return cls(**{**fields, "model": model, "perceptron": perceptron, "rows": rows, **sizes})

    def replace(self, **changes: object) -> DeviceConfig:
        """The same configuration with some parameters changed, validated again."""
        return replace(self, **changes)  # type: ignore[arg-type]


def require_config(config: object) -> None:
    """Refuse what is not a :class:`DeviceConfig`.

    Raises
    ------
    TypeError
        If ``config`` is anything else.
    """
    if not isinstance(config, DeviceConfig):
        raise TypeError(f"Configuration must be a DeviceConfig, not {config!r}")


TINY_DEVICE = DeviceConfig(
    model=PRESETS["tiny"], slots=8, expert_bytes=1024, address_bits=32, data_bytes=4, contexts=2
)
