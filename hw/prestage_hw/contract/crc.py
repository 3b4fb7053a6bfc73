"""Arithmetic of CRC-32 as :func:`zlib.crc32` has it (IEEE 802.3, reflected), for parts of data.

A remainder is a polynomial over GF(2) modulo the CRC's, the highest bit its constant term. Without
the inversions at both ends the CRC is linear: the remainder of data is the sum of the remainders of
its pieces, each times x to the power of the bits that come after it.
"""

from __future__ import annotations

import zlib

__all__ = ["CHECKSUM_TABLE", "inverted", "multiply", "power", "remainder", "times_x"]

#: Number of the table that holds the experts' checksums, by layer * experts + expert.
CHECKSUM_TABLE = 255

_POLYNOMIAL = 0xEDB88320
_ONES = 0xFFFFFFFF


def remainder(data: bytes, before: int = 0) -> int:
    """Remainder of data after data with the remainder ``before``."""
    return zlib.crc32(data, before ^ _ONES) ^ _ONES


def times_x(value: int) -> int:
    """A remainder times x."""
    return value >> 1 ^ (_POLYNOMIAL if value & 1 else 0)


def multiply(a: int, b: int) -> int:
    """Product of two remainders."""
    product = 0
    for bit in reversed(range(32)):
        if a >> bit & 1:
            product ^= b
        b = times_x(b)
    return product


def power(bits: int) -> int:
    """x to the power of ``bits``: what a remainder is multiplied by for so many bits after it."""
    result, factor = 1 << 31, 1 << 30
    while bits:
        if bits & 1:
            result = multiply(result, factor)
        factor = multiply(factor, factor)
        bits >>= 1
    return result


def inverted(size: int) -> int:
    """What the CRC of ``size`` bytes differs by from their remainder: the two inversions."""
    return multiply(_ONES, power(8 * size)) ^ _ONES
