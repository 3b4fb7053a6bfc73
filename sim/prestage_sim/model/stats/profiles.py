"""Golden model of the profiles: a switch is made at once, since nothing is ever under way."""

from __future__ import annotations

from dataclasses import replace

from prestage_hw.contract.params import DeviceConfig
from prestage_hw.contract.records import Phase, Refusal
from prestage_hw.contract.registers import (
    PROFILE_REGISTERS,
    REFUSAL_FIELDS,
    ROW_STRIDE_BITS,
    SHAPE_FIELDS,
    register_by_name,
)

from ..dma.settings import Channel, Settings

__all__ = ["Profile", "Profiles"]

#: Registers of a profile beside those of DMA channels, with the bits that are kept.
_OWN = {
    "control": 3,
    "prefetch_tiles": 7,
    "predict_threshold": 255,
    "predict_far_threshold": 255,
    "predict_ahead": 255,
    "cutoff_layer": 255,
    "budget": 15,
    "rescan_ahead": 127,
    "rescan_least": 255,
    "dma_lower_credits": 31,
}


class Profile:
    """Settings of one phase.

    Parameters
    ----------
    config : :class:`DeviceConfig`
        Device.

    Attributes
    ----------
    own : dict of :class:`str` to :class:`int`
        Values of the registers that are no channel's.
    channels : list of :class:`Channel`
        Settings of each DMA channel.
    """

    def __init__(self, config: DeviceConfig) -> None:
        resets = {name: register_by_name(name).reset for name in _OWN}
        self.own = {name: (value or 0) & _OWN[name] for name, value in resets.items()}
        self.channels = list(Settings(config).shadow)


class Profiles:
    """Settings of every phase, and those that hold.

    Parameters
    ----------
    config : :class:`DeviceConfig`
        Device.

    Attributes
    ----------
    profiles : dict of :class:`Phase` to :class:`Profile`
        What was written.
    phase, selected : :class:`Phase`
        The active profile, and the one that is accessed.
    active : dict of :class:`str` to :class:`int`
        What holds beside the settings of DMA channels.
    dma : :class:`Settings`
        Settings of DMA channels; the active ones hold.
    channel, refusal : :class:`int`
        The registers ``dma_channel`` and ``refusal``.
    """

    def __init__(self, config: DeviceConfig) -> None:
        self._config = config
        self.profiles = {phase: Profile(config) for phase in Phase}
        self.phase = self.selected = Phase.DECODE
        self.active = dict(self.profiles[self.phase].own)
        self.dma = Settings(config)
        self.refusal = 0
        self.channel = 0

    def begin(self, phase: int, *, follow: bool) -> None:
        """A token starts; its phase asks for its profile if ``follow``."""
        if not follow or phase == self.phase:
            return
        if phase > max(Phase):
            self.refuse("profile", Refusal.PROFILE)
        else:
            self._switch(Phase(phase))

    def _switch(self, phase: Phase) -> None:
        profile = self.profiles[phase]
        self.phase = phase
        self.active = dict(profile.own)
        self.dma.shadow = list(profile.channels)
        self.dma.commit(profile.own["dma_lower_credits"])

    def refuse(self, name: str, reason: Refusal) -> None:
        """Keep the register and the reason of a write that was refused, unless one is kept."""
        if not self.refusal:
            values = {"reason": reason, "register": register_by_name(name).address, "refused": 1}
            self.refusal = sum(
                int(value) << REFUSAL_FIELDS[field][0] for field, value in values.items()
            )

    def read(self, name: str) -> int:
        """Value of a register; of ``control``, bits 0 and 1."""
        profile = self.profiles[self.selected]
        channel = profile.channels[self.channel]
        if name in profile.own:
            return profile.own[name]
        if name == "dma_shape":
            return sum(
                int(getattr(channel, field)) << low for field, (low, _) in SHAPE_FIELDS.items()
            )
        return {
            "dma_row_bytes": channel.row_bytes,
            "dma_row_stride": channel.row_stride,
            "dma_channel": self.channel,
            "profile": int(self.phase),
            "profile_select": int(self.selected),
            "refusal": self.refusal,
        }[name]

    def write(self, name: str, value: int) -> None:
        """Write a register; what makes no sense changes nothing but ``refusal``."""
        reason = self._reason(name, value)
        if reason is not Refusal.NONE:
            self.refuse(name, reason)
            return
        profile = self.profiles[self.selected]
        if name in profile.own:
            profile.own[name] = value & _OWN[name]
            if self.selected is self.phase:
                self.active[name] = profile.own[name]
        elif name in PROFILE_REGISTERS:
            profile.channels[self.channel] = self._changed(name, value)
        elif name == "dma_channel":
            self.channel = value
        elif name == "profile_select":
            self.selected = Phase(value)
        elif name == "profile":
            self._switch(Phase(value))
        else:
            assert name == "refusal"
            self.refusal = 0

    def _fields(self, name: str, value: int) -> dict[str, int]:
        """Fields of a channel that a write names."""
        if name == "dma_shape":
            return {
                field: value >> low & (1 << bits) - 1 for field, (low, bits) in SHAPE_FIELDS.items()
            }
        return {name.removeprefix("dma_"): value}

    def _changed(self, name: str, value: int) -> Channel:
        old = self.profiles[self.selected].channels[self.channel]
        return replace(old, **self._fields(name, value))  # type: ignore[arg-type]

    def _reason(self, name: str, value: int) -> Refusal:
        if name in ("profile", "profile_select") and value not in list(Phase):
            return Refusal.PROFILE
        if name == "dma_channel" and value >= self._config.dma_channels:
            return Refusal.CHANNEL
        if name == "budget" and value > 8:
            return Refusal.BUDGET
        if name == "rescan_ahead" and value > self._config.most_ahead:
            return Refusal.RESCAN
        if name == "rescan_least" and not 0 < value < 256:
            return Refusal.RESCAN
        if name == "dma_lower_credits" and value > self._config.outstanding_bursts:
            return Refusal.CREDITS
        if name == "prefetch_tiles" and not 1 <= value <= 4:
            return Refusal.VALUE
        if name in _OWN and name != "control" and value > _OWN[name]:
            return Refusal.VALUE
        if name in ("dma_shape", "dma_row_bytes", "dma_row_stride"):
            fields = self._fields(name, value)
            if name == "dma_shape" and value != sum(
                fields[field] << low for field, (low, _) in SHAPE_FIELDS.items()
            ):
                return Refusal.VALUE
            if fields.get("row_stride", 0) >= 1 << ROW_STRIDE_BITS:
                return Refusal.ROWS
            old = vars(self.profiles[self.selected].channels[self.channel])
            reason = self.dma.refusal({**old, "channel": self.channel, **fields})
            if reason:
                return Refusal(reason)
            if self.channel in self._config.scheduled_channels and not fields.get("enable", 1):
                return Refusal.ENABLE
        return Refusal.NONE
