"""Golden model of the throttle: what prefetches of each kind have saved, and have cost."""

from __future__ import annotations

from prestage_hw.contract import DeviceConfig
from prestage_hw.contract.params import require_config
from prestage_hw.contract.records import PrefetchKind, Source
from prestage_hw.contract.registers import THROTTLE_FIELDS, register_by_name

__all__ = ["Throttle", "kind_of"]

_START = -25
_LEAST, _MOST = -128, 127
#: Probes are at least 2 ** that many misses apart.
_SHORTEST = 4
#: Evictions are counted modulo 2 ** that, or more for very many slots.
_EVICTION_BITS = 18


def kind_of(source: int, deadline: int, *, routes: int) -> PrefetchKind:
    """Kind of a candidate whose context has had ``routes`` routing decisions, modulo 256."""
    if source == Source.HINT:
        return PrefetchKind.HINT
    return PrefetchKind.NEAR if (deadline - routes) % 256 == 1 else PrefetchKind.FAR


class Throttle:
    """Credit of each kind of prefetch; a kind that has none left may only probe.

    Parameters
    ----------
    config : :class:`DeviceConfig`
        Device.

    Attributes
    ----------
    enable : :class:`bool`
        False admits all.
    """

    def __init__(self, config: DeviceConfig) -> None:
        require_config(config)
        self._tiles = config.tiles
        self._experts = config.model.experts
        self._count = config.model.layers * config.model.experts
        self.enable = False
        self.register = register_by_name("throttle").reset or 0
        self._jump = 1 << config.slots.bit_length()
        self._modulus = max(1 << _EVICTION_BITS, 4 * self._jump)
        self._evictions = 0
        self._evicted = [0] * self._count  # when each expert was evicted last
        self.clear()

    @property
    def register(self) -> int:
        """The register ``throttle``."""
        return self._register

    @register.setter
    def register(self, value: int) -> None:
        self._register = value
        weights = {
            name: value >> low & (1 << bits) - 1 for name, (low, bits) in THROTTLE_FIELDS.items()
        }
        self._useful, self._price = weights["useful"], weights["price"]
        self._pollution, self._wait = weights["pollution"], weights["wait"]
        self._floor = weights["floor"]
        self._longest = max(_SHORTEST, weights["probe"])

    def clear(self) -> None:
        """Forget everything, as after reset."""
        kinds = len(PrefetchKind)
        self._credit = [_START] * kinds
        self._on = [False] * kinds
        self._open = [0] * kinds  # prefetches that were neither used nor evicted
        self._misses = [0] * kinds  # demand misses since the last probe
        self._apart = [_SHORTEST] * kinds
        # By more evictions than prefetches can lie about: all before is too far back to count.
        self._evictions = (self._evictions + self._jump) % self._modulus
        self._owners: dict[int, tuple[int, PrefetchKind | None]] = {}

    @property
    def state(self) -> int:
        """The register ``throttle_state``."""
        value = 0
        for kind in PrefetchKind:
            value |= (self._credit[kind] & 0xFF) << 8 * kind | int(self._on[kind]) << 24 + kind
        return value

    def admits(self, kind: PrefetchKind) -> bool:
        """Whether a candidate of that kind may be prefetched now."""
        due = self._misses[kind] >= 1 << self._apart[kind]
        return not self.enable or self._on[kind] or due

    def miss(
        self,
        layer: int,
        expert: int,
        *,
        slot: int,
        evicted: bool,
        unused: bool,
        waits_for: PrefetchKind | None = None,
    ) -> None:
        """Count a demand that was given a slot.

        It misses because of the prefetches of a kind if no more experts were evicted since its own
        eviction than such prefetches lie about: without them, they would still be there.
        ``waits_for`` is the kind of a tile that the demand finds before it.
        """
        age = (self._evictions - self._evicted[layer * self._experts + expert]) % self._modulus
        for kind in PrefetchKind:
            self._misses[kind] = min(self._misses[kind] + 1, (1 << 16) - 1)
            cost = self._pollution if age < self._open[kind] else 0
            cost += self._wait if waits_for == kind else 0
            self._pay(kind, -cost)
        self._take(slot, layer, expert, None, evicted=evicted, unused=unused)

    def prefetch(
        self,
        layer: int,
        expert: int,
        kind: PrefetchKind,
        *,
        slot: int,
        evicted: bool,
        unused: bool,
    ) -> None:
        """Count a prefetch that was given a slot. It pays in advance, for the case of no use."""
        if not self._on[kind]:
            self._misses[kind] = 0
            self._apart[kind] = min(self._apart[kind] + 1, self._longest)
        self._pay(kind, -self._price)
        self._take(slot, layer, expert, kind, evicted=evicted, unused=unused)
        self._open[kind] += 1

    def copied(self, layer: int, expert: int, *, slot: int, evicted: bool, unused: bool) -> None:
        """Count that a copy was given a slot: it is nobody's prefetch."""
        self._take(slot, layer, expert, None, evicted=evicted, unused=unused)

    def used(self, slot: int, *, returned: int | None = None) -> None:
        """Count a demand for a prefetch that had so many tiles; None stands for all."""
        _, kind = self._owners[slot]
        assert kind is not None
        tiles = self._tiles
        eighths = 8 if returned is None else 8 * returned // tiles
        self._open[kind] -= 1
        self._apart[kind] = max(self._apart[kind] - 2, _SHORTEST)
        self._pay(kind, (self._useful * eighths >> 3) + self._price)

    def dropped(self, slot: int) -> None:
        """Count a prefetch that was cancelled, or failed, before a demand came."""
        _, kind = self._owners[slot]
        assert kind is not None
        self._open[kind] -= 1

    def _take(
        self,
        slot: int,
        layer: int,
        expert: int,
        kind: PrefetchKind | None,
        *,
        evicted: bool,
        unused: bool,
    ) -> None:
        """Note who has the slot now, and what became of the one before."""
        if evicted:
            number, before = self._owners[slot]
            self._evictions = (self._evictions + 1) % self._modulus
            self._evicted[number] = self._evictions
            if unused:
                assert before is not None
                self._open[before] -= 1
        self._owners[slot] = (layer * self._experts + expert, kind)

    def _pay(self, kind: PrefetchKind, amount: int) -> None:
        credit = max(_LEAST, min(_MOST, self._credit[kind] + amount))
        self._credit[kind] = credit
        if credit < -self._floor:
            self._on[kind] = False
        elif credit >= 0:
            self._on[kind] = True
