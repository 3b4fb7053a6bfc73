"""Golden model of the register bank."""

from __future__ import annotations

from typing import Protocol

from prestage_hw.contract.params import MOST_PARTS, DeviceConfig
from prestage_hw.contract.registers import (
    CHANNEL_COUNTERS,
    COUNTERS,
    PROFILE_REGISTERS,
    REGISTERS,
    SLOT_BASE_BYTES,
    THROTTLE_FIELDS,
    TIMEOUT_BITS,
    shape_registers,
)

from .counters import ChannelCounters, Counters
from .profiles import Profiles

__all__ = ["RegisterBank", "Tables"]

#: Registers that the profiles answer for; of ``control`` bits 0 and 1.
_PROFILES = (
    *PROFILE_REGISTERS,
    "dma_channel",
    "profile",
    "profile_select",
    "refusal",
)


class Tables(Protocol):
    """What the bank needs of a predictor."""

    def table_words(self, table: int) -> int:
        """Words in a table, 0 if there is none."""

    def read_table(self, table: int, word: int) -> int:
        """One word of a table."""

    def write_table(self, table: int, word: int, value: int) -> None:
        """Store one word in a table."""


class State(Protocol):
    """What the bank needs of a throttle."""

    @property
    def state(self) -> int:
        """The register ``throttle_state``."""


class RegisterBank:
    """Registers of the contract, without a clock: ``cycles`` is always 0.

    Parameters
    ----------
    config : :class:`DeviceConfig`
        Device.
    counters : :class:`Counters`
        Counters to show.
    tables : :class:`Tables`
        Predictor whose tables ``table_data`` reaches.
    throttle : :class:`State`
        Throttle that ``throttle_state`` shows.
    channels : :class:`ChannelCounters`
        Counters of DMA channels.

    Attributes
    ----------
    channels : :class:`ChannelCounters`
        As the parameter.
    profiles : :class:`Profiles`
        Settings of each phase; those of the active one are the registers' own only while it is
        selected.
    """

    def __init__(
        self,
        config: DeviceConfig,
        counters: Counters,
        tables: Tables,
        throttle: State,
        channels: ChannelCounters,
    ) -> None:
        self._config = config
        self._counters = counters
        self._tables = tables
        self._throttle = throttle
        self.channels = channels
        self._by_address = {register.address: register for register in REGISTERS}
        self._high = 0
        self._wide = {counter.name for counter in COUNTERS if counter.bits == 64}
        self.profiles = Profiles(config)
        self._values = {
            r.name: r.reset
            for r in REGISTERS
            if r.access == "rw"
            and r.reset is not None
            and (r.name not in _PROFILES or r.name == "control")
        }
        self._parts = len(config.part_bytes)
        for part in range(1, MOST_PARTS):
            base = config.part_bases()[part] if part < self._parts else 0
            self._values[f"part{part}_base_low"] = base & 0xFFFFFFFF
            self._values[f"part{part}_base_high"] = base >> 32
        self._shape = shape_registers(config)
        self.cleared: set[str] = set()

    def __getitem__(self, name: str) -> int:
        """Value of a writable register that holds: of the active profile, where it is one of a
        profile's.
        """
        active = self.profiles.active
        if name == "control":
            return self._values[name] & ~3 | active[name]
        return active[name] if name in active else self._values[name]

    @property
    def bases(self) -> list[int]:
        """Address of the first expert, for each part of experts."""
        names = ("expert_base", *(f"part{part}_base" for part in range(1, self._parts)))
        return [
            (self._values[f"{name}_high"] << 32 | self._values[f"{name}_low"])
            % (1 << self._config.address_bits)
            for name in names
        ]

    def read(self, address: int) -> int | None:
        """Value of a register, None if there is none at the address."""
        register = self._by_address.get(address)
        if register is None:
            return None
        name = register.name
        if name in self._shape:
            return self._shape[name]
        if name == "table_data":
            table = self._values["table_address"] >> 24
            value = self._tables.read_table(table, self._values["table_address"] & 0xFFFFFF)
            self._advance()
            return value
        if name == "table_words":
            return self._tables.table_words(self._values["table_address"] >> 24)
        if name in _PROFILES:
            value = self.profiles.read(name)
            return self._values[name] & ~3 | value if name == "control" else value
        if name == "profile_active":
            return int(self.profiles.phase)
        if name in self._values:
            return self._values[name]
        if register.access == "wo":
            return 0
        if (counter := name.removeprefix("channel_")) in CHANNEL_COUNTERS:
            return self.channels.register(self.profiles.channel, counter)
        if name == "throttle_state":
            return self._throttle.state
        if name == "cycles_low":
            self._high = 0
            return 0
        if name.endswith("_low") and name[:-4] in self._wide:
            value = self._counters.register(name[:-4])
            self._high = value >> 32
            return value & 0xFFFFFFFF
        if name.endswith("_high"):
            return self._high
        return self._counters.register(name)

    def write(self, address: int, value: int) -> bool:
        """Write a register; False if there is none at the address or it is read-only.

        A write of ``clear`` leaves what to clear in :attr:`cleared`.
        """
        register = self._by_address.get(address)
        if register is None or register.access == "ro":
            return False
        name = register.name
        if name == "clear":
            parts = ("tables", "buffer", "counters", "checksums")
            self.cleared = {part for i, part in enumerate(parts) if value >> i & 1}
        elif name == "table_data":
            at = self._values["table_address"]
            self._tables.write_table(at >> 24, at & 0xFFFFFF, value)
            self._advance()
        else:
            if name in _PROFILES:
                self.profiles.write(name, value)
            if name in self._values:
                self._values[name] = self._legal(name, value)
        return True

    def begin(self, phase: int) -> None:
        """A token starts."""
        self.profiles.begin(phase, follow=bool(self._values["control"] & 32))

    def _legal(self, name: str, value: int) -> int:
        """What is kept of a written value."""
        if name == "control":
            return value & 63
        if name == "policy":
            return value & 3
        if name == "throttle":
            return value & sum((1 << bits) - 1 << low for low, bits in THROTTLE_FIELDS.values())
        if name == "dma_timeout":
            value %= 1 << TIMEOUT_BITS
            return max(4, value) if value else 0
        if name == "hint_threshold":
            return value & 0xFF
        if name.startswith("part") and int(name[4]) >= self._parts:
            return 0
        if name == "slot_base_low":
            return value - value % SLOT_BASE_BYTES
        if name.endswith("_base_low") and name != "token_base_low":
            return value - value % self._config.data_bytes
        return value

    def _advance(self) -> None:
        at = self._values["table_address"]
        self._values["table_address"] = at & 0xFF000000 | (at + 1) & 0xFFFFFF
