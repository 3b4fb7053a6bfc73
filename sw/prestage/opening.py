"""Open a device by its URL, through whatever links are installed."""

from __future__ import annotations

from importlib.metadata import EntryPoint, entry_points
from typing import Any
from urllib.parse import parse_qsl, urlsplit

import numpy as np
from numpy.typing import NDArray

from prestage_hw.contract import DeviceConfig
from prestage_hw.contract.params import require_config
from prestage_hw.contract.pattern import expert_memory

from .copies import Copier
from .device import Device, check_mover
from .errors import ArgumentError, LinkError, MissingExtraError, UnknownDeviceError

__all__ = ["LINKS", "known_links", "open_device"]

#: Group of the entry points that open pipes, by URL scheme.
LINKS = "prestage.links"


def known_links() -> dict[str, EntryPoint]:
    """URL schemes that are installed, with the entry points that open them."""
    return {point.name: point for point in entry_points(group=LINKS)}


def _opener(scheme: str, url: str) -> Any:
    links = known_links()
    if scheme not in links:
        known = (
            ", ".join(f"{name}://" for name in sorted(links)) or "none: prestage isn't installed"
        )
        raise UnknownDeviceError(f"Device URL must start with one of {known}, not {url!r}")
    point = links[scheme]
    try:
        return point.load()
    except ImportError as error:
        extra = point.extras[0] if point.extras else scheme
        raise MissingExtraError(
            f"{scheme}:// needs the extra prestage[{extra}]:"
            f" pip install 'prestage[{extra}]' ({error})"
        ) from error


def _options(url: str) -> tuple[str, dict[str, str]]:
    """Scheme and options of a device URL."""
    if not isinstance(url, str):
        raise TypeError(f"Device URL must be a string, not {url!r}")
    parts = urlsplit(url)
    if not parts.scheme or not url.startswith(f"{url[: len(parts.scheme)]}://"):
        _opener("", url)
    try:
        pairs = parse_qsl(parts.query, keep_blank_values=True, strict_parsing=bool(parts.query))
    except ValueError:
        raise ArgumentError(
            f"Device URL must have options of the form name=value, not {parts.query!r}"
        ) from None
    options = dict(pairs)
    if len(options) != len(pairs):
        raise ArgumentError(f"Device URL must name each option once, not {parts.query!r}")
    where = parts.netloc + parts.path
    if where.strip("/"):
        options["address"] = where
    return parts.scheme, options


def open_device(
    url: str,
    *,
    config: DeviceConfig,
    memory: NDArray[np.uint8] | None = None,
    copier: Copier | None = None,
) -> Device:
    """Open a device and check that it's what the configuration says.

    Parameters
    ----------
    url : :class:`str`
        ``"sim://?latency=64&bytes_per_cycle=16"``, ``"model://"`` or the scheme of any other
        installed link.
    config : :class:`DeviceConfig`
        Device that is expected; a simulated one is built from it.
    memory : array of uint8 or None
        Bytes of all experts as the configuration has them, layer by layer where it says no more:
        ``config.memory_bytes`` of them. None stands for a pattern that depends on layer, expert and
        position. Only where the device moves experts itself.
    copier : callable or None
        With ``config.mover == "host"``, and only then: copies tiles, see :class:`Device`.

    Raises
    ------
    UnknownDeviceError
        If no installed link has the URL's scheme.
    MissingExtraError
        If the link's packages aren't installed.
    MismatchError
        If a register of the device disagrees with the configuration.
    ArgumentError
        If an option of the URL or the memory's size is wrong, or what is given doesn't suit the
        configuration's mover.
    LinkError
        If the device can't be reached or its simulation can't be built.
    """
    require_config(config)
    scheme, options = _options(url)
    opener = _opener(scheme, url)
    check_mover(config, copier)
    size = config.memory_bytes
    if config.mover == "host":
        if memory is not None:
            raise ArgumentError("Memory must not be given where the host's copier moves experts")
        size = 0
        memory = np.zeros(0, dtype=np.uint8)
    elif memory is None:
        memory = expert_memory(config)
    if not isinstance(memory, np.ndarray) or memory.dtype != np.uint8 or memory.ndim != 1:
        raise TypeError("Memory must be a one-dimensional array of uint8")
    if memory.size != size:
        raise ArgumentError(f"Memory must hold all experts, {size} bytes, not {memory.size}")
    try:
        pipe = opener(config, memory=memory, options=options)
    except ValueError as error:
        raise ArgumentError(f"{url}: {error}") from error
    except (RuntimeError, OSError) as error:
        raise LinkError(f"{url} can't be opened: {error}") from error
    try:
        return Device(pipe, config, url=url, copier=copier)
    except BaseException:
        pipe.close()
        raise
