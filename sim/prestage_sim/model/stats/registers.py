"""Golden model of the register bank."""

from __future__ import annotations

from typing import Protocol

from prestage_hw.contract.params import DeviceConfig
from prestage_hw.contract.records import Policy, Refusal
from prestage_hw.contract.registers import (
    BASES,
    CHANNEL_COUNTERS,
    COUNTERS,
    PROFILE_REGISTERS,
    REGISTERS,
    THROTTLE_FIELDS,
    TIMEOUT_BITS,
    base_limits,
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
    """Registers of the contract, without a clock: ``cycles`` and measured times are always 0.

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
        self._limits = base_limits(config)
        self._bases = dict.fromkeys(BASES, 0)
        self._bases |= dict(zip(BASES, config.part_bases(), strict=False))
        # The low half of a base that was written last, and whose it is.
        self._low_half = (BASES[0], 0)
        for name in BASES:
            self._show(name)
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
        return [self._bases[name] for name in BASES[: len(self._config.part_bytes)]]

    def _show(self, name: str) -> None:
        """Let the registers of a base have its halves."""
        base = self._bases[name]
        self._values[f"{name}_low"] = base & 0xFFFFFFFF
        self._values[f"{name}_high"] = base >> 32

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
        if name in ("layer_time", "tile_time"):
            return 0
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

        What makes no sense changes nothing but ``refusal``. A write of ``clear`` leaves what to
        clear in :attr:`cleared`.
        """
        register = self._by_address.get(address)
        if register is None or register.access == "ro":
            return False
        name = register.name
        base, _, half = name.rpartition("_")
        if not self._makes_sense(name, value):
            self.profiles.refuse(name, Refusal.VALUE)
        elif base in self._bases:
            self._write_base(base, half, value)
        elif name == "clear":
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
                self._values[name] = value
        return True

    def begin(self, phase: int) -> None:
        """A token starts."""
        self.profiles.begin(phase, follow=bool(self._values["control"] & 32))

    def _makes_sense(self, name: str, value: int) -> bool:
        """Whether a register that no profile has, and that is no base, can hold a value."""
        if name == "throttle":
            return not value & ~sum(
                (1 << bits) - 1 << low for low, bits in THROTTLE_FIELDS.values()
            )
        if name == "dma_timeout":
            return value == 0 or 4 <= value < 1 << TIMEOUT_BITS
        most = {"control": 63, "clear": 15, "policy": max(Policy), "hint_threshold": 255}
        return value <= most.get(name, value)

    def _write_base(self, name: str, half: str, value: int) -> None:
        """Write half of an address where an array begins.

        Both halves hold with the high one, which comes last, or with the low one where addresses
        have no more than 32 bits.
        """
        step, most = self._limits.get(name, (1, 0))
        wide = self._config.address_bits > 32 and name in self._limits
        if half == "low":
            whole = value
            ok = whole % step == 0 and (wide or whole <= most)
        elif wide:
            owner, low = self._low_half
            whole = value << 32 | low
            ok = owner == name and whole <= most
        else:
            whole = self._bases[name]
            ok = value == 0
        if not ok:
            self.profiles.refuse(f"{name}_{half}", Refusal.BASE)
            self._low_half = ("", 0)
        elif wide and half == "low":
            self._low_half = name, value
        else:
            self._bases[name] = whole
            self._show(name)

    def _advance(self) -> None:
        at = self._values["table_address"]
        self._values["table_address"] = at & 0xFF000000 | (at + 1) & 0xFFFFFF
