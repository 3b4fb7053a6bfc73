"""Golden model of the counters."""

from __future__ import annotations

from prestage_hw.contract.registers import COUNTERS

__all__ = ["Counters"]


class Counters(dict[str, int]):
    """Counters by name, all of the contract's, unbounded; :meth:`register` gives them as
    registers see them.
    """

    def __init__(self) -> None:
        super().__init__({counter.name: 0 for counter in COUNTERS})

    def clear(self) -> None:
        """Set every counter to 0."""
        for name in self:
            self[name] = 0

    def register(self, name: str) -> int:
        """Counter wrapped to its width."""
        for counter in COUNTERS:
            if counter.name == name:
                return self[name] % (1 << counter.bits)
        raise ValueError(f"Counter must be one of {', '.join(self)}, not {name!r}")
