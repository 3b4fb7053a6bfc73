"""Golden model of the DMA engine's settings."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from prestage_hw.contract import DeviceConfig
from prestage_hw.contract.records import SettingsRefusal, TrafficClass

__all__ = ["Channel", "Settings"]


@dataclass(frozen=True)
class Channel:
    """Settings of one channel, as in the record ChannelSettings."""

    enable: bool
    traffic: TrafficClass
    weight: int
    burst_beats: int
    credits: int
    row_bytes: int
    row_stride: int


class Settings:
    """Shadow and active settings.

    Parameters
    ----------
    config : :class:`DeviceConfig`
        Device.

    Attributes
    ----------
    shadow, active : list of :class:`Channel`
        What was written, and what holds.
    lower_credits : :class:`int`
        Most bursts outstanding below demand.
    """

    def __init__(self, config: DeviceConfig) -> None:
        self.config = config
        last = config.dma_channels - 1
        self.shadow = [
            Channel(
                enable=True,
                traffic=TrafficClass.DEMAND
                if channel == 0
                else TrafficClass.STREAM
                if channel == last and last >= 2
                else TrafficClass.PREFETCH,
                weight=1,
                burst_beats=config.longest_burst,
                credits=config.outstanding_bursts,
                row_bytes=0,
                row_stride=0,
            )
            for channel in range(config.dma_channels)
        ]
        self.active = list(self.shadow)
        self.lower_credits = config.lower_credits

    def refusal(self, write: Mapping[str, int]) -> SettingsRefusal:
        """What is wrong with a ChannelSettings, given as a mapping."""
        config = self.config
        beats = write["burst_beats"]
        if write["channel"] >= config.dma_channels:
            return SettingsRefusal.CHANNEL
        if write["traffic"] not in list(TrafficClass):
            return SettingsRefusal.TRAFFIC
        if write["weight"] == 0:
            return SettingsRefusal.WEIGHT
        if beats not in [1 << bits for bits in range(9)] or beats > config.longest_burst:
            return SettingsRefusal.BURST
        if not 1 <= write["credits"] <= config.outstanding_bursts:
            return SettingsRefusal.CREDITS
        if (
            write["row_bytes"] % config.data_bytes
            or write["row_stride"] % config.data_bytes
            or write["row_bytes"] > (0 if config.rows else config.tile_bytes)
        ):
            return SettingsRefusal.ROWS
        return SettingsRefusal.NONE

    def write(self, write: Mapping[str, int]) -> SettingsRefusal:
        """Write a channel's shadow, unless something is wrong with it."""
        refusal = self.refusal(write)
        if refusal is SettingsRefusal.NONE:
            self.shadow[write["channel"]] = Channel(
                enable=bool(write["enable"]),
                traffic=TrafficClass(write["traffic"]),
                weight=write["weight"],
                burst_beats=write["burst_beats"],
                credits=write["credits"],
                row_bytes=write["row_bytes"],
                row_stride=write["row_stride"],
            )
        return refusal

    def commit(self, lower_credits: int = 0) -> None:
        """Make the shadows active."""
        self.active = list(self.shadow)
        self.lower_credits = lower_credits or self.config.lower_credits
