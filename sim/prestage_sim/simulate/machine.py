"""What the simulator needs to know of a machine, for one model."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .energy import EnergyModel

__all__ = ["UNIT", "Link", "Machine", "Tier", "Work"]


def _require(what: str, value: object, *, low: float, high: float = math.inf) -> None:
    """Refuse what is not a number in a range; ``low`` itself is refused where it is 0."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or math.isnan(value) or not low <= value <= high:  # type: ignore[operator, arg-type]
        most = "" if math.isinf(high) else f" and at most {high:g}"
        raise ValueError(f"{what} must be at least {low:g}{most}, not {value!r}")


def _require_positive(what: str, value: object) -> None:
    _require(what, value, low=0)
    if value == 0:
        raise ValueError(f"{what} must be above 0, not {value!r}")


@dataclass(frozen=True, kw_only=True)
class Link:
    """A way over which tiles come into the slots, one at a time.

    Parameters
    ----------
    bandwidth : :class:`float`
        Bytes a second.
    latency : :class:`float`
        Seconds from asking for a tile to its first byte; those of tiles in a row overlap.

    Raises
    ------
    ValueError
        If the bandwidth is not above 0, or the latency is below 0.
    """

    bandwidth: float
    latency: float = 0.0

    def __post_init__(self) -> None:
        _require_positive("Bandwidth of a link", self.bandwidth)
        _require("Latency of a link", self.latency, low=0)


@dataclass(frozen=True, kw_only=True)
class Tier:
    """A memory that experts come from, beyond the slots: host DRAM, then NVMe.

    Parameters
    ----------
    name : :class:`str`
        What it is.
    bandwidth : :class:`float`
        Bytes a second: of the nearest tier no link into the slots is faster than this, another one
        has a link of its own to the tier before it.
    latency : :class:`float`
        Seconds to the first byte, on top of the link's.
    experts : :class:`int` or None
        How many experts it holds, those that were fetched from it or through it last; None for all,
        as the last tier must.

    Raises
    ------
    ValueError
        If a number is out of its range.
    """

    name: str
    bandwidth: float = math.inf
    latency: float = 0.0
    experts: int | None = None

    def __post_init__(self) -> None:
        _require_positive(f"Bandwidth of tier {self.name}", self.bandwidth)
        _require(f"Latency of tier {self.name}", self.latency, low=0)
        if self.experts is not None:
            _require(f"Experts in tier {self.name}", self.experts, low=1)


@dataclass(frozen=True, kw_only=True)
class Work:
    """What a layer's time is made of: a part takes as long as the longer of reading and arithmetic.

    Parameters
    ----------
    attention_read, attention_token : :class:`float`
        Seconds of reading what comes before the routing, and of a token's arithmetic there.
    experts_read, experts_token : :class:`float`
        The same of k experts, each of which one token chose.
    shared_read, shared_token : :class:`float`
        The same of shared experts.
    overhead : :class:`float`
        Seconds before the routing is known, and as many after it, whatever is computed.
    """

    attention_read: float
    attention_token: float
    experts_read: float
    experts_token: float
    shared_read: float = 0.0
    shared_token: float = 0.0
    overhead: float = 0.0

    def before(self, tokens: NDArray[np.int64] | int) -> NDArray[np.float64]:
        """Seconds until the routing of so many tokens is known."""
        return np.maximum(self.attention_read, self.attention_token * tokens) + self.overhead

    def beside(self, tokens: NDArray[np.int64] | int) -> NDArray[np.float64]:
        """Seconds after that which no expert of its own takes."""
        return np.maximum(self.shared_read, self.shared_token * tokens) + self.overhead

    def experts(self, weight: NDArray[np.int64] | int) -> NDArray[np.float64]:
        """Seconds of k experts, each of which so many tokens chose."""
        return np.maximum(self.experts_read, self.experts_token * weight)


@dataclass(frozen=True, kw_only=True)
class Machine:
    """A machine as one model sees it.

    Parameters
    ----------
    name : :class:`str`
        Name in tables.
    layer_seconds : :class:`float`
        Time of a layer with all its experts resident, for one token.
    alpha : :class:`float`
        Share of that time that passes before the layer's routing is known; the k experts take the
        rest, in equal parts.
    expert_bytes : :class:`int`
        Size of an expert.
    tiles : :class:`int`
        Tiles of an expert: links are given to others only at the edge of a tile.
    links : tuple of :class:`Link`
        Ways into the slots; a tile goes over the one that is free first.
    tiers : tuple of :class:`Tier`
        Where experts lie beyond the slots, nearest first; none stands for one that holds all and is
        as fast as the links. An expert comes through all that are nearer than it.
    ready_first : :class:`bool`
        Whether each expert is computed as soon as it has come; else all once the last has.
    predict_seconds : :class:`float`
        Time from a layer's routing to the candidates that the predictor makes of it.
    work : :class:`Work` or None
        How those times change with the tokens that go through a layer together; None stands for
        reading alone: each expert takes as long whoever chose it.
    joules : :class:`EnergyModel` or None
        Energy of the scored tokens, from their :class:`Counts`.

    Raises
    ------
    ValueError
        If a number is out of its range, there is no link, or the last tier does not hold all.
    """

    name: str
    layer_seconds: float
    alpha: float = 0.5
    expert_bytes: int = 1
    tiles: int = 8
    links: tuple[Link, ...] = (Link(bandwidth=1.0),)
    tiers: tuple[Tier, ...] = ()
    ready_first: bool = True
    predict_seconds: float = 0.0
    work: Work | None = None
    joules: EnergyModel | None = None

    def __post_init__(self) -> None:
        _require_positive("Time of a layer", self.layer_seconds)
        _require("Alpha", self.alpha, low=0, high=1)
        _require("Expert size in bytes", self.expert_bytes, low=1)
        _require("Tile count", self.tiles, low=1)
        _require("Time of the predictor", self.predict_seconds, low=0)
        if not self.links:
            raise ValueError("Machine must have at least one link, but has none")
        for tier in self.tiers[:-1]:
            if tier.experts is None:
                raise ValueError(f"Only the last tier can hold all experts, but {tier.name} does")
        if self.tiers and self.tiers[-1].experts is not None:
            raise ValueError(
                f"Last tier must hold all experts, but {self.tiers[-1].name} holds"
                f" {self.tiers[-1].experts}"
            )

    def before_routing(self, tokens: NDArray[np.int64]) -> NDArray[np.float64]:
        """Seconds until a layer's routing is known, by the tokens that go through it."""
        one = self.alpha * self.layer_seconds
        if self.work is None:
            return np.full(len(tokens), one)
        return one * (self.work.before(tokens) / self.work.before(1))

    def of_experts(
        self,
        weight: NDArray[np.int64],
        *,
        tokens: NDArray[np.int64],
        used: NDArray[np.int64],
        top_k: int,
    ) -> NDArray[np.float64]:
        """Seconds of computing experts.

        Parameters
        ----------
        weight : array of :class:`int`
            How many tokens chose each.
        tokens, used : array of :class:`int`
            How many go through its layer, and experts that they use there.
        top_k : :class:`int`
            Experts that a token chooses.
        """
        one = (1 - self.alpha) * self.layer_seconds / top_k
        if self.work is None:
            return np.full(len(weight), one)
        mine = self.work.experts(weight) + self.work.beside(tokens) * (top_k / used)
        return one * (mine / (self.work.experts(1) + self.work.beside(1)))

    @property
    def ways(self) -> tuple[tuple[int, Link], ...]:
        """Links, each with the tier that it takes tiles from; 0 is the nearest one."""
        nearest = self.tiers[0] if self.tiers else Tier(name="memory")
        return (
            *(
                (
                    0,
                    Link(
                        bandwidth=min(link.bandwidth, nearest.bandwidth),
                        latency=link.latency + nearest.latency,
                    ),
                )
                for link in self.links
            ),
            *(
                (number, Link(bandwidth=tier.bandwidth, latency=tier.latency))
                for number, tier in enumerate(self.tiers[1:], 1)
            ),
        )

    def rho(self, top_k: int) -> float:
        """Time to load ``top_k`` experts over all links into the slots, over the layer's time."""
        bandwidth = sum(way.bandwidth for tier, way in self.ways if tier == 0)
        return top_k * self.expert_bytes / bandwidth / self.layer_seconds

    def with_rho(self, rho: float, top_k: int, *, latencies: bool = False) -> Machine:
        """The same machine with links and tiers that are as much faster or slower as makes this
        its rho.

        Parameters
        ----------
        rho : :class:`float`
            Time to load ``top_k`` experts over the layer's time.
        top_k : :class:`int`
            Experts that a token chooses in a layer.
        latencies : :class:`bool`
            Whether latencies change alike, so that they stay the same share of a transfer.

        Raises
        ------
        ValueError
            If ``rho`` is not above 0.
        """
        _require_positive("Rho", rho)
        faster = self.rho(top_k) / rho
        shorter = faster if latencies else 1.0
        return self.replace(
            links=tuple(
                Link(bandwidth=link.bandwidth * faster, latency=link.latency / shorter)
                for link in self.links
            ),
            tiers=tuple(
                replace(tier, bandwidth=tier.bandwidth * faster, latency=tier.latency / shorter)
                for tier in self.tiers
            ),
        )

    def replace(self, **changes: Any) -> Machine:
        """The same machine with some parameters changed, validated again."""
        return replace(self, **changes)


#: The machine of the study that the policies' bars come from: a layer takes the time 1, half of it
#: until its routing is known, and its experts come over one link, eight tiles each.
UNIT = Machine(name="unit", layer_seconds=1.0)
