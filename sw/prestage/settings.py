"""Settings of a device: which register writes make them so, and what they have become."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from typing import Any

from prestage_hw.contract import DeviceConfig, register_by_name
from prestage_hw.contract.records import Phase, Policy, TrafficClass
from prestage_hw.contract.registers import (
    ROW_STRIDE_BITS,
    SHAPE_FIELDS,
    SLOT_BASE_BYTES,
    THROTTLE_FIELDS,
    TIMEOUT_BITS,
    TOKEN_BASE_BYTES,
)

from .errors import ArgumentError

__all__ = ["Settings", "known_phase"]

_CONTROL_PREFETCH, _CONTROL_HINTS, _CONTROL_SETTLE = 1, 2, 4
_CONTROL_THROTTLE, _CONTROL_CANCEL, _CONTROL_FOLLOW = 8, 16, 32

#: Bits of ``control`` that each profile has for itself.
_CONTROL_PROFILE = _CONTROL_PREFETCH | _CONTROL_HINTS

#: Settings of a DMA channel that have a register each.
_ROW_SETTINGS = ("row_bytes", "row_stride")


def known_phase(phase: Phase | int) -> Phase:
    """The phase of this number.

    Raises
    ------
    ArgumentError
        If there is none.
    """
    try:
        return Phase(phase)
    except ValueError:
        names = ", ".join(f"{p.value} ({p.name})" for p in Phase)
        raise ArgumentError(f"Phase must be one of {names}, not {phase!r}") from None


class Settings:
    """What the settings of a device are, as far as its driver has to know.

    Values are checked before anything is sent: what the device would refuse raises an
    :class:`ArgumentError`.

    Parameters
    ----------
    config : :class:`DeviceConfig`
        Device.
    read : callable
        Gives the value of a register by its name, from the device.
    """

    def __init__(self, config: DeviceConfig, *, read: Callable[[str], int]) -> None:
        self._config = config
        self._read = read
        control = register_by_name("control").reset or 0
        self._control = control & ~_CONTROL_PROFILE
        # Bits of control that each profile has for itself, the profile that was asked for last, and
        # the one that is selected.
        self._flags = dict.fromkeys(Phase, control & _CONTROL_PROFILE)
        self._profile = self._selected = Phase.DECODE

    def written(self, name: str, value: int) -> None:
        """A register was written: what the device makes of it from now on."""
        if name == "control" and value < _CONTROL_FOLLOW * 2:
            self._control = value & ~_CONTROL_PROFILE
            self._flags[self._selected] = value & _CONTROL_PROFILE
        elif name == "profile" and value in list(Phase):
            self._profile = Phase(value)
        elif name == "profile_select" and value in list(Phase):
            self._selected = Phase(value)

    def token_begins(self, phase: Phase) -> None:
        """A token of this phase was announced, whose profile the device may follow."""
        if self._control & _CONTROL_FOLLOW:
            self._profile = phase

    def writes(
        self,
        *,
        settle: bool | None,
        throttle: bool | Mapping[str, int] | None,
        cancel: bool | None,
        follow_phase: bool | None,
        hint_threshold: int | None,
        expert_base: int | None,
        part_bases: Mapping[int, int] | None,
        token_base: int | None,
        slot_base: int | None,
        timeout: int | None,
        policy: Policy | None,
        **of_profile: Any,
    ) -> list[tuple[str, int]]:
        """Register writes for settings as :meth:`prestage.device.Device.configure` has them.

        Those of a profile are of the one that was asked for last.
        """
        control = self._control
        for bit, wanted in (
            (_CONTROL_SETTLE, settle),
            (_CONTROL_THROTTLE, None if throttle is None else throttle is not False),
            (_CONTROL_CANCEL, cancel),
            (_CONTROL_FOLLOW, follow_phase),
        ):
            if wanted is not None:
                control = control | bit if wanted else control & ~bit
        writes = self.profile_writes(self._profile, control=control, **of_profile)
        if hint_threshold is not None:
            if not 0 <= operator.index(hint_threshold) <= 255:
                raise ArgumentError(
                    f"Hint threshold must be between 0 and 255, not {hint_threshold}"
                )
            writes.append(("hint_threshold", hint_threshold))
        writes += self._base_writes(expert_base, part_bases, token_base, slot_base)
        if timeout is not None:
            most = (1 << TIMEOUT_BITS) - 1
            if timeout != 0 and not 4 <= operator.index(timeout) <= most:
                raise ArgumentError(
                    f"Time-out must be 0 or between 4 and {most} cycles, not {timeout}"
                )
            writes.append(("dma_timeout", timeout))
        if isinstance(throttle, Mapping):
            writes.append(("throttle", self._throttle(throttle)))
        if policy is not None:
            try:
                writes.append(("policy", int(Policy(policy))))
            except ValueError:
                names = ", ".join(f"{int(each)} ({each.name})" for each in Policy)
                raise ArgumentError(f"Policy must be one of {names}, not {policy!r}") from None
        return writes

    def profile_writes(
        self,
        phase: Phase,
        *,
        control: int | None = None,
        prefetch: bool | None = None,
        hints: bool | None = None,
        prefetch_tiles: int | None = None,
        threshold: int | None = None,
        far_threshold: int | None = None,
        ahead: int | None = None,
        cutoff: int | None = None,
        budget: int | None = None,
        rescan: int | None = None,
        rescan_least: int | None = None,
        lower_credits: int | None = None,
    ) -> list[tuple[str, int]]:
        """Register writes for what a profile holds beside the DMA channels, and for ``control``.

        Parameters
        ----------
        phase : :class:`Phase`
            Whose profile.
        control : :class:`int` or None
            Bits of ``control`` that no profile has; None leaves them.
        ...
            As for :meth:`prestage.device.Device.configure_profile`.
        """
        if control is None:
            control = self._control
        writes: list[tuple[str, int]] = []
        flags = self._flags[phase]
        for bit, wanted in ((_CONTROL_PREFETCH, prefetch), (_CONTROL_HINTS, hints)):
            if wanted is not None:
                flags = flags | bit if wanted else flags & ~bit
        if prefetch_tiles is not None:
            if not 1 <= operator.index(prefetch_tiles) <= 4:
                raise ArgumentError(f"Prefetch tiles must be between 1 and 4, not {prefetch_tiles}")
            writes.append(("prefetch_tiles", prefetch_tiles))
        for what, register, value in (
            ("Threshold", "predict_threshold", threshold),
            ("Far threshold", "predict_far_threshold", far_threshold),
            ("Layers ahead", "predict_ahead", ahead),
            ("Cut-off layer", "cutoff_layer", cutoff),
        ):
            if value is not None:
                if not 0 <= operator.index(value) <= 255:
                    raise ArgumentError(f"{what} must be between 0 and 255, not {value}")
                writes.append((register, value))
        if budget is not None:
            if not 0 <= operator.index(budget) <= 8:
                raise ArgumentError(f"Budget must be between 0 and 8 eighths, not {budget}")
            writes.append(("budget", budget))
        if rescan is not None:
            most = self._config.most_ahead
            if not 0 <= operator.index(rescan) <= most:
                rule = f"between 0 and {most} layers" if most else "0 without values to scan"
                raise ArgumentError(f"Rescan must be {rule}, not {rescan}")
            writes.append(("rescan_ahead", rescan))
        if rescan_least is not None:
            if not 0 < operator.index(rescan_least) < 256:
                raise ArgumentError(
                    f"Least confidence of a rescan must be between 1 and 255, not {rescan_least}"
                )
            writes.append(("rescan_least", rescan_least))
        if lower_credits is not None:
            most = self._config.outstanding_bursts
            if not 0 <= operator.index(lower_credits) <= most:
                raise ArgumentError(
                    f"Lower credits must be between 0 and {most}, not {lower_credits}"
                )
            writes.append(("dma_lower_credits", lower_credits))
        if (control, flags) != (self._control, self._flags[phase]):
            writes.append(("control", control | flags))
        if writes and phase is not self._selected:
            writes.insert(0, ("profile_select", int(phase)))
        return writes

    def check_channel(self, channel: int, settings: Mapping[str, int]) -> None:
        """Refuse settings of a DMA channel that the device would refuse."""
        config = self._config
        if not 0 <= operator.index(channel) < config.dma_channels:
            raise ArgumentError(
                f"DMA channel must be between 0 and {config.dma_channels - 1}, not {channel}"
            )
        known = (*SHAPE_FIELDS, *_ROW_SETTINGS)
        limits = {
            "enable": (int(channel in config.scheduled_channels), 1),
            "traffic": (min(TrafficClass), max(TrafficClass)),
            "weight": (1, 15),
            "credits": (1, config.outstanding_bursts),
            "burst_beats": (1, config.longest_burst),
            "row_bytes": (0, config.tile_bytes),
            "row_stride": (0, (1 << ROW_STRIDE_BITS) - config.data_bytes),
        }
        for name, value in settings.items():
            if name not in known:
                raise ArgumentError(
                    f"Setting of a DMA channel must be one of {', '.join(known)}, not {name!r}"
                )
            least, most = limits[name]
            rule = f"must be between {int(least)} and {int(most)}"
            fits = least <= operator.index(value) <= most
            if name == "burst_beats":
                rule = f"must be a power of two from 1 to {most}"
                fits = fits and value & (value - 1) == 0
            elif name in _ROW_SETTINGS:
                rule = f"must be a multiple of {config.data_bytes} from 0 to {most}"
                fits = fits and value % config.data_bytes == 0
            if name == "row_bytes" and config.rows:
                rule = "must be 0 where the configuration says what rows experts have"
                fits = value == 0
            if not fits:
                raise ArgumentError(f"Setting {name} of DMA channel {channel} {rule}, not {value}")

    def select_channel(self, phase: Phase, channel: int) -> list[tuple[str, int]]:
        """Register writes after which those of channels are this one's, in this profile."""
        select = [] if phase is self._selected else [("profile_select", int(phase))]
        return [*select, ("dma_channel", channel)]

    def channel_writes(self, settings: Mapping[str, int]) -> list[tuple[str, int]]:
        """Register writes for settings of the selected DMA channel; those not named stay."""
        shape = {name: settings[name] for name in SHAPE_FIELDS if name in settings}
        writes = [(f"dma_{name}", settings[name]) for name in _ROW_SETTINGS if name in settings]
        if shape:
            value = 0 if len(shape) == len(SHAPE_FIELDS) else self._read("dma_shape")
            for name, number in shape.items():
                low, bits = SHAPE_FIELDS[name]
                value = value & ~((1 << bits) - 1 << low) | int(number) << low
            writes.append(("dma_shape", value))
        return writes

    def _base_writes(
        self,
        expert_base: int | None,
        part_bases: Mapping[int, int] | None,
        token_base: int | None,
        slot_base: int | None,
    ) -> list[tuple[str, int]]:
        writes: list[tuple[str, int]] = []
        if expert_base is not None:
            if 0 in (part_bases or {}):
                raise ArgumentError("Base of part 0 must be given once, not as expert base too")
            part_bases = {**(part_bases or {}), 0: expert_base}
        for part, base in (part_bases or {}).items():
            self._check_base(part, base)
            name = f"part{part}_base" if part else "expert_base"
            writes.append((f"{name}_low", base & 0xFFFFFFFF))
            writes.append((f"{name}_high", base >> 32))
        if token_base is not None:
            if not self._config.token_memory:
                raise ArgumentError("Token base is only for token tables behind a memory port")
            most = (1 << self._config.address_bits) - TOKEN_BASE_BYTES
            if not 0 <= operator.index(token_base) <= most or token_base % TOKEN_BASE_BYTES:
                raise ArgumentError(
                    f"Token base must be a multiple of {TOKEN_BASE_BYTES} from 0 to {most:#x},"
                    f" not {token_base:#x}"
                )
            writes.append(("token_base_low", token_base & 0xFFFFFFFF))
            writes.append(("token_base_high", token_base >> 32))
        if slot_base is not None:
            size = self._config.slots * self._config.expert_bytes
            most = ((1 << self._config.address_bits) - size) // SLOT_BASE_BYTES * SLOT_BASE_BYTES
            if self._config.slot_store == "internal":
                raise ArgumentError("Slot base is only for slots in a memory of their own")
            if not 0 <= operator.index(slot_base) <= most or slot_base % SLOT_BASE_BYTES:
                raise ArgumentError(
                    f"Slot base must be a multiple of {SLOT_BASE_BYTES} from 0 to {most:#x},"
                    f" not {slot_base:#x}"
                )
            writes.append(("slot_base_low", slot_base & 0xFFFFFFFF))
            writes.append(("slot_base_high", slot_base >> 32))
        return writes

    def _throttle(self, weights: Mapping[str, int]) -> int:
        """The register ``throttle`` with these weights."""
        value = self._read("throttle")
        for name, weight in weights.items():
            if name not in THROTTLE_FIELDS:
                raise ArgumentError(
                    f"Throttle weight must be one of {', '.join(THROTTLE_FIELDS)}, not {name!r}"
                )
            low, bits = THROTTLE_FIELDS[name]
            most = (1 << bits) - 1
            if not 0 <= operator.index(weight) <= most:
                raise ArgumentError(
                    f"Throttle weight {name} must be between 0 and {most}, not {weight}"
                )
            value = value & ~(most << low) | weight << low
        return value

    def _check_base(self, part: int, base: int) -> None:
        parts = self._config.part_bytes
        if not 0 <= operator.index(part) < len(parts):
            raise ArgumentError(f"Experts have parts 0 to {len(parts) - 1}, not {part}")
        what = f"Base of part {part}" if len(parts) > 1 else "Expert base"
        most = (1 << self._config.address_bits) - self._config.array_room[part]
        if not 0 <= operator.index(base) <= most:
            raise ArgumentError(f"{what} must be between 0 and {most:#x}, not {base:#x}")
        if base % self._config.data_bytes:
            raise ArgumentError(
                f"{what} must be a multiple of {self._config.data_bytes} bytes, not {base:#x}"
            )
