"""Golden model of the budget: it is told in which cycle things happen."""

from __future__ import annotations

from prestage_hw.contract import DeviceConfig
from prestage_hw.contract.params import require_config
from prestage_hw.contract.registers import TIME_BITS

__all__ = ["Budget", "due_tiles"]


def due_tiles(config: DeviceConfig, budget: int, *, layer: int = 0) -> int:
    """Tiles of a prefetch that must come in time: so many eighths of all, rounded up."""
    return -(-config.layer_tiles[layer] * min(budget, 8) // 8)


class _Mean:
    """Exponential mean, kept as its eightfold."""

    def __init__(self) -> None:
        self._total = 0

    @property
    def value(self) -> int:
        return self._total // 8

    def add(self, sample: int) -> None:
        self._total = self._total - self._total // 8 + sample if self._total else 8 * sample


class Budget:
    """Mean times of layers and tiles, and which prefetches would be late by them.

    Parameters
    ----------
    config : :class:`DeviceConfig`
        Device.
    time_bits : :class:`int`
        Width of times.
    """

    def __init__(self, config: DeviceConfig, *, time_bits: int = TIME_BITS) -> None:
        require_config(config)
        self._config = config
        self._limit = 1 << time_bits
        self._busy = 0  # tiles with the DMA engine
        self._since = 0  # when the tile began that ends next
        self.clear()

    def clear(self) -> None:
        """Forget means and decisions; tiles under way stay so."""
        self._layer, self._tile = _Mean(), _Mean()
        self._routed: list[int | None] = [None] * self._config.contexts

    @property
    def layer_time(self) -> int:
        """The register of that name."""
        return self._layer.value

    @property
    def tile_time(self) -> int:
        """The register of that name."""
        return self._tile.value

    def routed(self, ctx: int, *, now: int) -> None:
        """A routing decision is looked up in cycle ``now``."""
        before = self._routed[ctx]
        if before is not None and now - before < self._limit:
            self._layer.add(now - before)
        self._routed[ctx] = now

    def completed(self, *, failed: bool, now: int) -> None:
        """The end of a tile is taken. Before :meth:`fetched`, if both are in one cycle."""
        if not failed:
            self._tile.add(min(now - self._since, self._limit - 1))
        self._since = now
        self._busy -= 1

    def fetched(self, *, now: int) -> None:
        """A tile is taken by the DMA engine."""
        if not self._busy:
            self._since = now
        self._busy += 1

    def late(
        self, ctx: int, deadline: int, *, left: int, budget: int, now: int, layer: int = 0
    ) -> bool:
        """Whether a prefetch whose deadline is so many decisions away would be late.

        ``left`` tiles of other fetches are yet to come; ``budget`` is the register, ``layer`` the
        prefetch's.
        """
        routed = self._routed[ctx]
        if budget == 0 or routed is None or now - routed >= self._limit:
            return False
        if not self.layer_time or not self.tile_time:
            return False
        tiles = left + due_tiles(self._config, budget, layer=layer)
        return tiles * self.tile_time > deadline * self.layer_time - (now - routed)
