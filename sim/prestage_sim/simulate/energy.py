"""Joules of a run, split into compute, useful and wasted traffic."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from .result import Counts

__all__ = ["Energy", "EnergyModel", "Spread"]


class Spread(NamedTuple):
    """A figure that is known only roughly.

    Parameters
    ----------
    low, typical, high : :class:`float`
        Least, best and greatest value that sources give.
    """

    low: float
    typical: float
    high: float

    def times(self, factor: float) -> Spread:
        """The spread of so many times the figure."""
        return Spread(self.low * factor, self.typical * factor, self.high * factor)

    def plus(self, other: Spread) -> Spread:
        """The spread of the sum; both may be low or high together."""
        return Spread(*(a + b for a, b in zip(self, other, strict=True)))


class Energy(NamedTuple):
    """Joules by what they were spent for.

    Parameters
    ----------
    compute : :class:`Spread`
        Arithmetic, reading what is resident, and idle power as long as the token takes.
    useful : :class:`Spread`
        Bringing experts that a layer then used.
    wasted : :class:`Spread`
        Bringing experts that were evicted before any layer used them.
    """

    compute: Spread
    useful: Spread
    wasted: Spread

    @property
    def total(self) -> Spread:
        """All three together."""
        return self.compute.plus(self.useful).plus(self.wasted)


_NOTHING = Spread(0.0, 0.0, 0.0)


@dataclass(frozen=True, kw_only=True)
class EnergyModel:
    """Energy of a machine for one model; called with counts it gives the typical joules.

    Parameters
    ----------
    token : :class:`Spread`
        Joules of arithmetic and of reading resident weights, of a token that goes alone.
    step, expert : :class:`Spread`
        The part of it that tokens which go through the layers together share: reading what comes
        before and beside the experts of all layers, and reading an expert.
    idle_watts : :class:`Spread`
        Power that is drawn whatever happens.
    tile_bytes : :class:`float`
        Bytes of a tile.
    byte : :class:`Spread`
        Joules of a byte over the link and into fast memory.
    tiers : tuple of :class:`Spread`
        Joules of reading a byte from each memory tier, on top of that, nearest first; and of
        writing one that comes through it.
    """

    token: Spread
    idle_watts: Spread
    tile_bytes: float
    byte: Spread
    tiers: tuple[Spread, ...] = ()
    step: Spread = _NOTHING
    expert: Spread = _NOTHING

    def __call__(self, counts: Counts) -> float:
        """Typical joules of all scored tokens."""
        return self.split(counts).total.typical

    def split(self, counts: Counts) -> Energy:
        """Joules of all scored tokens, by what they were spent for."""
        compute = self.token.times(counts.tokens + counts.rejected)
        compute = compute.plus(self.step.times(-counts.joined))
        compute = compute.plus(self.expert.times(-counts.shared))
        compute = compute.plus(self.idle_watts.times(counts.seconds))
        tile = self.byte.plus(self._read(counts)).times(self.tile_bytes)
        return Energy(
            compute=compute,
            useful=tile.times(counts.demand_tiles + counts.useful_tiles),
            wasted=tile.times(counts.useless_tiles),
        )

    def by_tier(self, counts: Counts) -> tuple[Spread, ...]:
        """Joules that each memory tier takes of those of traffic, nearest first."""
        return tuple(
            joules.times(self.tile_bytes * tiles)
            for joules, tiles in zip(self.tiers, _flows(counts), strict=False)
        )

    def _read(self, counts: Counts) -> Spread:
        """Joules that tiers take for a byte that comes into a slot."""
        if not self.tiers:
            return _NOTHING
        if not sum(counts.tier_tiles):
            return self.tiers[0]
        mean = _NOTHING
        for joules, tiles in zip(self.tiers, _flows(counts), strict=False):
            mean = mean.plus(joules.times(tiles / max(1, counts.tier_tiles[0])))
        return mean


def _flows(counts: Counts) -> list[int]:
    """Tiles read from or written into each tier: what comes from a farther one is written there."""
    left = counts.tier_tiles
    return [out + into for out, into in zip(left, (*left[1:], 0), strict=True)]
