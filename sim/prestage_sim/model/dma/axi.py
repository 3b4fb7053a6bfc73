"""Memory behind the DMA engine's port."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

__all__ = ["EDGE_BYTES", "BusError", "Memory"]

#: No burst may cross a multiple of this address, in bytes.
EDGE_BYTES = 4096


class BusError(Exception):
    """The memory answered a read with SLVERR or DECERR.

    Parameters
    ----------
    address : :class:`int`
        First byte that could not be read.
    """

    def __init__(self, address: int) -> None:
        super().__init__(f"Memory answered an error at address {address:#x}")
        self.address = address


class Memory:
    """Bytes from address 0 on; reads beyond them, and of failing ranges, end in an error.

    Parameters
    ----------
    data : array of uint8 or bytes-like
        Contents, shape ``[size]``; copied.
    failing : iterable of pairs of :class:`int`
        Address ranges (first, one past the last) that answer an error.

    Attributes
    ----------
    failing : list of pairs of :class:`int`
        As above; may be changed at any time.

    Raises
    ------
    ValueError
        If the contents are not one-dimensional bytes.
    """

    def __init__(
        self, data: NDArray[np.uint8] | bytes, *, failing: Iterable[tuple[int, int]] = ()
    ) -> None:
        self.data = np.frombuffer(data, np.uint8) if isinstance(data, bytes) else np.asarray(data)
        if self.data.dtype != np.uint8 or self.data.ndim != 1:
            raise ValueError(
                f"Memory contents must be one-dimensional bytes, not {self.data.ndim}-dimensional"
                f" {self.data.dtype}"
            )
        self.failing = list(failing)
        self._bytes = self.data.tobytes()

    def read(self, address: int, size: int) -> bytes:
        """Bytes from ``address`` on.

        Raises
        ------
        BusError
            If one of the bytes cannot be read.
        """
        if not self.failing and address + size <= len(self._bytes):
            return self._bytes[address : address + size]
        bad = [
            max(first, address)
            for first, end in self.failing
            if first < end and first < address + size and address < end
        ]
        if address + size > len(self._bytes):
            bad.append(max(address, len(self._bytes)))
        if bad:
            raise BusError(min(bad))
        return self._bytes[address : address + size]
