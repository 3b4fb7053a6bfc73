"""Everything that can go wrong between a program and a device."""

from __future__ import annotations

from prestage_hw.contract.records import ERROR_TEXT, ErrorCode

__all__ = [
    "DEVICE_ERRORS",
    "AbortedError",
    "AddressError",
    "ArgumentError",
    "BadContextError",
    "BadCopiesError",
    "BadFetchedError",
    "BadExpertError",
    "BadLayerError",
    "BadMessageError",
    "BadReadError",
    "BadRegisterError",
    "BadTableError",
    "BusError",
    "ChecksumError",
    "ClosedError",
    "DataError",
    "DeviceError",
    "DeviceTimeoutError",
    "DuplicateExpertError",
    "HintPassedError",
    "LinkError",
    "MemoryTimeoutError",
    "MismatchError",
    "MissingExtraError",
    "NoSlotError",
    "NotHeldError",
    "NotLockedError",
    "OverrunError",
    "PrestageError",
    "SlotMemoryError",
    "UnknownDeviceError",
    "UnreleasedError",
    "UnroutedError",
    "device_error",
]


class PrestageError(Exception):
    """Base of all errors of the driver."""


class ArgumentError(PrestageError, ValueError):
    """An argument that the device would refuse; nothing was sent."""


class UnknownDeviceError(PrestageError, ValueError):
    """A device URL that no installed link understands."""


class MissingExtraError(PrestageError, ImportError):
    """A link whose packages aren't installed."""


class ClosedError(PrestageError):
    """A call on a device that is closed."""


class LinkError(PrestageError):
    """The bytes of the link make no sense, or the device doesn't answer at all."""


class DeviceTimeoutError(PrestageError, TimeoutError):
    """The device didn't answer in time."""


class MismatchError(PrestageError):
    """The device isn't what the configuration says.

    Parameters
    ----------
    register : :class:`str`
        Register that disagrees.
    expected, actual : :class:`int`
        Its value by the configuration, and the one read.
    """

    def __init__(self, register: str, *, expected: int, actual: int, hint: str = "") -> None:
        self.register = register
        self.expected = expected
        self.actual = actual
        form = "#010x" if register in ("device_id", "version", "register_hash") else "d"
        text = f"Register {register} must be {expected:{form}}, but the device has {actual:{form}}"
        super().__init__(f"{text}. {hint}" if hint else text)


class DataError(PrestageError):
    """A slot that was announced as ready doesn't hold its expert's bytes."""


class DeviceError(PrestageError):
    """An Event of the device.

    Parameters
    ----------
    code : :class:`ErrorCode`
        Why.
    ctx, layer, expert, address : :class:`int`
        What it is about; 0 where a field doesn't apply.

    Members
    -------
    others : tuple of :class:`DeviceError`
        Further errors that came with this one.
    """

    code: ErrorCode
    #: What the message says of the fields.
    details = "context {ctx}, layer {layer}"

    def __init__(self, *, ctx: int, layer: int, expert: int, address: int) -> None:
        self.ctx = ctx
        self.layer = layer
        self.expert = expert
        self.address = address
        self.others: tuple[DeviceError, ...] = ()
        about = self.details.format(ctx=ctx, layer=layer, expert=expert, address=address)
        super().__init__(f"{ERROR_TEXT[self.code]} ({self.code.name}: {about})")


class _ExpertError(DeviceError):
    details = "context {ctx}, layer {layer}, expert {expert}"


class _AddressError(DeviceError):
    details = "context {ctx}, layer {layer}, expert {expert}, address {address:#x}"


class BadContextError(DeviceError):
    """The context number is not below the number of contexts."""

    code = ErrorCode.BAD_CONTEXT


class BadLayerError(DeviceError):
    """The layer number is not below the number of layers."""

    code = ErrorCode.BAD_LAYER


class BadExpertError(_ExpertError):
    """An expert number is not below the number of experts."""

    code = ErrorCode.BAD_EXPERT


class DuplicateExpertError(_ExpertError):
    """An expert occurs twice in one routing decision."""

    code = ErrorCode.DUPLICATE_EXPERT


class UnreleasedError(DeviceError):
    """The layer was routed again before it was released."""

    code = ErrorCode.UNRELEASED


class UnroutedError(DeviceError):
    """The layer was released without having been routed."""

    code = ErrorCode.UNROUTED


class NoSlotError(_ExpertError):
    """Every slot is pinned or locked and nothing is in flight, or no more experts may be locked."""

    code = ErrorCode.NO_SLOT


class BusError(_AddressError):
    """The memory answered a read with an error, or the host's copier failed.

    What the copier has raised is the ``__cause__``.
    """

    code = ErrorCode.BUS


class BadMessageError(DeviceError):
    """The device doesn't know a message, or its body has the wrong length."""

    code = ErrorCode.BAD_MESSAGE
    details = "type {address:#04x}"


class BadRegisterError(DeviceError):
    """No register has that address, or it is read-only."""

    code = ErrorCode.BAD_REGISTER
    details = "register {address:#x}"


class BadReadError(DeviceError):
    """The slot or the beat of a read is out of range."""

    code = ErrorCode.BAD_READ
    details = "slot {expert}, beat {address}"


class BadFetchedError(DeviceError):
    """The device was told of a tile that it did not ask for."""

    code = ErrorCode.BAD_FETCHED
    details = "entry {expert}, tile {address}"


class OverrunError(DeviceError):
    """The device had no room for a message."""

    code = ErrorCode.OVERRUN
    details = "type {address:#04x}"


class BadTableError(DeviceError):
    """The table or the words of a table access are out of range."""

    code = ErrorCode.BAD_TABLE
    details = "table {expert}, word {address}"


class HintPassedError(_ExpertError):
    """The hint is for a layer that was routed already."""

    code = ErrorCode.HINT_PASSED


class NotLockedError(_ExpertError):
    """The expert was unlocked without having been locked."""

    code = ErrorCode.NOT_LOCKED


class SlotMemoryError(_AddressError):
    """The slots' memory answered a write with an error; ``address`` is one of that memory."""

    code = ErrorCode.SLOT_MEMORY


class ChecksumError(_AddressError):
    """The expert's bytes do not have the checksum that was loaded for it."""

    code = ErrorCode.CHECKSUM


class BadCopiesError(_ExpertError):
    """The number of copies is 0 or more than the device has banks."""

    code = ErrorCode.BAD_COPIES
    details = "context {ctx}, layer {layer}, expert {expert}, copies {address}"


class NotHeldError(_ExpertError):
    """A copy was not made, because the expert itself is not held."""

    code = ErrorCode.NOT_HELD


class MemoryTimeoutError(_AddressError):
    """The memory did not answer a read in time, or the host a fetch; ``address`` is that of the
    tile or burst.
    """

    code = ErrorCode.TIMEOUT


class AbortedError(_AddressError):
    """The host aborted the transfer."""

    code = ErrorCode.ABORTED


class AddressError(_AddressError):
    """The expert, or a row of it, would go past the top of the address space; ``address`` is that
    of the tile.
    """

    code = ErrorCode.ADDRESS


#: The exception of each error code.
DEVICE_ERRORS: dict[ErrorCode, type[DeviceError]] = {
    kind.code: kind
    for kind in (
        BadContextError,
        BadLayerError,
        BadExpertError,
        DuplicateExpertError,
        UnreleasedError,
        UnroutedError,
        NoSlotError,
        BusError,
        BadMessageError,
        BadRegisterError,
        BadReadError,
        HintPassedError,
        BadTableError,
        NotLockedError,
        SlotMemoryError,
        ChecksumError,
        BadFetchedError,
        OverrunError,
        BadCopiesError,
        NotHeldError,
        MemoryTimeoutError,
        AbortedError,
        AddressError,
    )
}


def device_error(
    code: int, *, ctx: int, layer: int, expert: int, address: int
) -> DeviceError | LinkError:
    """The exception of an Event; a :class:`LinkError` if its code is unknown."""
    try:
        kind = DEVICE_ERRORS[ErrorCode(code)]
    except ValueError:
        return LinkError(
            f"Event must have a known code, not {code} (context {ctx}, layer {layer}, expert"
            f" {expert},"
            f" address {address:#x})"
        )
    return kind(ctx=ctx, layer=layer, expert=expert, address=address)
