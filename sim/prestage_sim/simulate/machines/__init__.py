"""Machines by name, a TOML file each, and those of the user.

A figure is a number, or a table with ``value`` and ``source``; an energy may have ``low``,
``typical`` and ``high`` in place of ``value``. To add a machine, copy a file of this folder.
``docs/simulate.md`` describes the keys.
"""

from __future__ import annotations

import math
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from importlib.resources import files
from pathlib import Path
from typing import Any

from ..energy import EnergyModel, Spread
from ..machine import Link, Machine, Tier, Work
from ..models import ModelCard

__all__ = ["MACHINES", "MachineError", "MachineFile", "load_machine"]

#: Names of the machines that come with the package.
MACHINES = (
    "unit",
    "paper",
    "rtx-4090-pcie4",
    "h100-pcie5",
    "laptop-nvme",
    "laptop-gpu-nvme",
    "ecpix5",
)

#: Tables of a machine file and their keys: True where the figure may be 0.
_KEYS: dict[str, dict[str, bool]] = {
    "layer": {"seconds": False, "alpha": True, "expert_bytes": False},
    "compute": {
        "flops": False,
        "memory_bandwidth": False,
        "attention_bandwidth": False,
        "overhead": True,
    },
    "fast": {"bytes": False, "slots": False},
    "links": {"bandwidth": False, "latency": True},
    "tiers": {
        "name": False,
        "bytes": False,
        "bandwidth": False,
        "latency": True,
        "joules_per_byte": True,
    },
    "energy": {"flop": True, "fast_byte": True, "link_byte": True, "idle_watts": True},
    "model": {"expert_bytes": False, "attention_bytes": False, "weight_bits": False},
}
_TOP = ("title", "tiles", *_KEYS)
_ENERGIES = {"joules_per_byte", *_KEYS["energy"]}


class MachineError(ValueError):
    """A machine file that can't be read or that breaks a rule."""


@dataclass(frozen=True)
class _Figure:
    """A number with where it comes from."""

    key: str
    spread: Spread
    source: str

    @property
    def value(self) -> float:
        return self.spread.typical


@dataclass(frozen=True, kw_only=True)
class MachineFile:
    """A machine before it is known which model runs on it.

    Parameters
    ----------
    name : :class:`str`
        Name in tables.
    title : :class:`str`
        What it is.
    path : :class:`str`
        Where it was read from, for messages.
    figures : mapping
        All figures by key, such as ``compute.flops`` or ``links[0].bandwidth``.
    tier_names : tuple of :class:`str`
        Names of the memory tiers, nearest first.
    """

    name: str
    title: str
    path: str
    figures: Mapping[str, _Figure] = field(repr=False)
    tier_names: tuple[str, ...] = ()

    def get(self, key: str) -> float | None:
        """Figure of a key; None if the file doesn't have it."""
        figure = self.figures.get(key)
        return None if figure is None else figure.value

    def need(self, key: str) -> float:
        """Figure of a key.

        Raises
        ------
        MachineError
            If the file doesn't have it.
        """
        value = self.get(key)
        if value is None:
            raise MachineError(f"Machine file {self.path}: {key} is missing")
        return value

    @property
    def needs_model(self) -> bool:
        """Whether times follow from the sizes of a model."""
        return "layer.seconds" not in self.figures

    def sources(self) -> list[tuple[str, str, str]]:
        """Key, figure and source of everything in the file, in its order."""
        rows = []
        for figure in self.figures.values():
            low, typical, high = figure.spread
            text = f"{typical:g}" if low == high else f"{low:g} / {typical:g} / {high:g}"
            rows.append((figure.key, text, figure.source))
        return rows

    def card(self, card: ModelCard) -> ModelCard:
        """The model's card with the sizes that the file's table ``model`` has instead."""
        changes: dict[str, Any] = {}
        for key in ("attention_bytes", "weight_bits"):
            value = self.get(f"model.{key}")
            if value is not None:
                changes[key] = value
        size = self.get("model.expert_bytes")
        if size is not None:
            changes["expert_bytes"] = int(size)
        return replace(card, **changes)

    def slots(self, card: ModelCard) -> int | None:
        """Slots that ``fast.slots`` asks for; None if it doesn't.

        Raises
        ------
        MachineError
            If they are more than the model has experts.
        """
        slots = self.get("fast.slots")
        if slots is None:
            return None
        total = card.layers * card.experts
        if slots > total:
            raise MachineError(
                f"Machine file {self.path}: fast.slots must be at most the model's"
                f" {card.layers} x {card.experts} = {total} experts, not {slots:g}"
            )
        return int(slots)

    def room(self, card: ModelCard) -> int | None:
        """Experts that fit in the fast memory; None if the file doesn't say how large that is."""
        size = self.get("fast.bytes")
        return None if size is None else int(size // card.expert_bytes)

    def work(self, card: ModelCard) -> Work:
        """What a layer's time is made of."""
        flops, bandwidth = self.need("compute.flops"), self.need("compute.memory_bandwidth")
        before = self.get("compute.attention_bandwidth") or bandwidth
        experts = (
            card.top_k * card.expert_bytes / bandwidth,
            2 * card.top_k * card.expert_weights / flops,
        )
        attention, shared = experts, (0.0, 0.0)
        if card.attention_bytes is not None:
            # Attention's weights have 16 bits in all cards, so that a byte is one operation.
            attention = (card.attention_bytes / before, card.attention_bytes / flops)
            weights = card.shared_bytes * 8 / card.weight_bits
            shared = (card.shared_bytes / before, 2 * weights / flops)
        return Work(
            attention_read=attention[0],
            attention_token=attention[1],
            experts_read=experts[0],
            experts_token=experts[1],
            shared_read=shared[0],
            shared_token=shared[1],
            overhead=(self.get("compute.overhead") or 0.0) / 2,
        )

    def times(self, card: ModelCard) -> tuple[float, float]:
        """Seconds of a layer for one token until its routing is known, and of its k experts.

        Each is the longer of reading its bytes and doing its arithmetic, and half of the overhead
        of a layer.
        """
        work = self.work(card)
        return float(work.before(1)), float(work.experts(1) + work.beside(1))

    def for_model(self, card: ModelCard) -> Machine:
        """The machine as one model sees it.

        Parameters
        ----------
        card : :class:`ModelCard`
            Sizes of the model.

        Raises
        ------
        MachineError
            If a figure that is needed is missing.
        """
        tiles = int(self.get("tiles") or 8)
        links = tuple(
            Link(bandwidth=self.need(f"{at}.bandwidth"), latency=self.get(f"{at}.latency") or 0.0)
            for at in self._rows("links")
        )
        if not links:
            raise MachineError(f"Machine file {self.path}: links[0].bandwidth is missing")
        if not self.needs_model:
            return Machine(
                name=self.name,
                layer_seconds=self.need("layer.seconds"),
                alpha=self.need("layer.alpha"),
                expert_bytes=int(self.need("layer.expert_bytes")),
                tiles=tiles,
                links=links,
            )
        card = self.card(card)
        before, after = self.times(card)
        tiers = self._tiers(card)
        return Machine(
            name=self.name,
            layer_seconds=before + after,
            alpha=before / (before + after),
            expert_bytes=card.expert_bytes,
            tiles=tiles,
            links=links,
            tiers=tiers,
            work=self.work(card),
            joules=self._joules(card, tiles=tiles, tiers=len(tiers)),
        )

    def _rows(self, table: str) -> Iterator[str]:
        at = 0
        while any(key.startswith(f"{table}[{at}].") for key in self.figures):
            yield f"{table}[{at}]"
            at += 1

    def _tiers(self, card: ModelCard) -> tuple[Tier, ...]:
        """Memory tiers; the first that holds all experts is the last."""
        total = card.layers * card.experts
        tiers: list[Tier] = []
        for at, name in zip(self._rows("tiers"), self.tier_names, strict=True):
            size = self.get(f"{at}.bytes")
            held = total if size is None else int(size // card.expert_bytes)
            bandwidth = self.get(f"{at}.bandwidth") or math.inf
            latency = self.get(f"{at}.latency") or 0.0
            if held >= total:
                tiers.append(Tier(name=name, bandwidth=bandwidth, latency=latency))
                return tuple(tiers)
            if held:
                tiers.append(Tier(name=name, bandwidth=bandwidth, latency=latency, experts=held))
        if tiers or self.tier_names:
            raise MachineError(
                f"Machine file {self.path}: no tier holds the {total} experts of {card.name},"
                f" {total * card.expert_bytes / 1e9:.1f} GB; leave out bytes of the last one"
            )
        return ()

    def _joules(self, card: ModelCard, *, tiles: int, tiers: int) -> EnergyModel | None:
        if "energy.flop" not in self.figures:
            return None

        def spread(key: str) -> Spread:
            self.need(key)
            return self.figures[key].spread

        resident = card.top_k * card.expert_bytes
        before = card.attention_bytes if card.attention_bytes is not None else resident
        flops = before + 2 * card.top_k * card.expert_weights
        flops += 2 * card.shared_bytes * 8 / card.weight_bits
        read = before + resident + card.shared_bytes
        fast_byte = spread("energy.fast_byte")
        layer = spread("energy.flop").times(flops).plus(fast_byte.times(read))
        names = [f"{at}.joules_per_byte" for at in self._rows("tiers")]
        return EnergyModel(
            token=layer.times(card.layers),
            step=fast_byte.times(card.layers * (before + card.shared_bytes)),
            expert=fast_byte.times(card.expert_bytes),
            idle_watts=spread("energy.idle_watts"),
            tile_bytes=card.expert_bytes / tiles,
            byte=spread("energy.link_byte").plus(spread("energy.fast_byte")),
            tiers=tuple(spread(name) for name in names[:tiers]),
        )


def load_machine(name: str) -> MachineFile:
    """Read a machine by its name, or from the path of a TOML file.

    Parameters
    ----------
    name : :class:`str`
        One of :data:`MACHINES`, or a path that ends in ``.toml``.

    Raises
    ------
    MachineError
        If there is no such machine or file, it isn't TOML, or a figure is missing, unknown,
        negative or not a number.
    """
    if name in MACHINES:
        text = files("prestage_sim.simulate.machines").joinpath(f"{name}.toml").read_bytes()
        return _parse(text, name=name, path=f"{name}.toml")
    path = Path(name)
    if path.suffix != ".toml":
        raise MachineError(
            f"Machine must be one of {', '.join(MACHINES)}, or a .toml file, not {name!r}"
        )
    try:
        text = path.read_bytes()
    except OSError as error:
        raise MachineError(f"Machine file {name} can't be read: {error.strerror}") from error
    return _parse(text, name=path.stem, path=name)


def _parse(text: bytes, *, name: str, path: str) -> MachineFile:
    try:
        data = tomllib.loads(text.decode())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise MachineError(f"Machine file {path} isn't TOML: {error}") from error
    _known(data, _TOP, at="", path=path)
    figures: dict[str, _Figure] = {}
    names: list[str] = []
    if "tiles" in data:
        _add(figures, data["tiles"], key="tiles", zero=False, path=path)
    for table, keys in _KEYS.items():
        if table not in data:
            continue
        several = table in ("links", "tiers")
        rows = data[table] if several else [data[table]]
        if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
            kind = f"tables: write [[{table}]]" if several else f"a table: write [{table}]"
            raise MachineError(f"Machine file {path}: {table} must be {kind}")
        for number, row in enumerate(rows):
            at = f"{table}[{number}]" if several else table
            _known(row, keys, at=f"{at}.", path=path)
            for key, zero in keys.items():
                if key == "name" and key not in row:
                    raise MachineError(f"Machine file {path}: {at}.name is missing")
                if key == "name":
                    names.append(str(row[key]))
                elif key in row:
                    _add(figures, row[key], key=f"{at}.{key}", zero=zero, path=path)
            if several and f"{at}.bandwidth" not in figures:
                raise MachineError(f"Machine file {path}: {at}.bandwidth is missing")
    machine = MachineFile(
        name=name,
        title=str(data.get("title", name)),
        path=path,
        figures=figures,
        tier_names=tuple(names),
    )
    _check(machine)
    return machine


def _known(row: Mapping[str, Any], keys: Any, *, at: str, path: str) -> None:
    for key in row:
        if key not in keys:
            raise MachineError(
                f"Machine file {path}: {at}{key} is unknown; known are {', '.join(keys)}"
            )


def _add(figures: dict[str, _Figure], given: Any, *, key: str, zero: bool, path: str) -> None:
    source = ""
    values = given
    if isinstance(given, dict):
        energy = key.rpartition(".")[2] in _ENERGIES
        parts = ("low", "typical", "high") if energy and "value" not in given else ("value",)
        _known(given, (*parts, "source"), at=f"{key}.", path=path)
        for part in parts:
            if part not in given:
                raise MachineError(f"Machine file {path}: {key}.{part} is missing")
        source = str(given.get("source", ""))
        values = [given[part] for part in parts]
    numbers = values if isinstance(values, list) else [values]
    for value in numbers:
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not number or not math.isfinite(value):
            raise MachineError(f"Machine file {path}: {key} must be a number, not {value!r}")
        if value < 0 or (value == 0 and not zero):
            rule = "at least 0" if zero else "above 0"
            raise MachineError(f"Machine file {path}: {key} must be {rule}, not {value:g}")
    if numbers != sorted(numbers):
        raise MachineError(
            f"Machine file {path}: {key} must have low, typical and high in that order"
        )
    spread = Spread(*map(float, numbers if len(numbers) == 3 else numbers[:1] * 3))
    figures[key] = _Figure(key, spread, source)


def _check(machine: MachineFile) -> None:
    """Refuse a file that lacks what every model needs, or says things that don't go together."""
    if machine.needs_model:
        wanted = ["compute.flops", "compute.memory_bandwidth"]
    else:
        wanted = ["layer.seconds", "layer.alpha", "layer.expert_bytes"]
    wanted.append("links[0].bandwidth")
    if any(key.startswith("energy.") for key in machine.figures):
        wanted += [f"energy.{key}" for key in _KEYS["energy"]]
        wanted += [f"{at}.joules_per_byte" for at in machine._rows("tiers")]
    for key in wanted:
        machine.need(key)
    alpha = machine.get("layer.alpha")
    if alpha is not None and alpha > 1:
        raise MachineError(
            f"Machine file {machine.path}: layer.alpha must be at most 1, not {alpha:g}"
        )
