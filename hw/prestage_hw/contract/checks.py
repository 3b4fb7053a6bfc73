"""Checks of parameters, with one wording for all."""

from __future__ import annotations

__all__ = ["require_integer", "require_power_of_two"]


def require_integer(what: str, value: object, *, low: int, high: int) -> None:
    """Refuse what is not an integer from ``low`` to ``high``.

    Raises
    ------
    TypeError
        If ``value`` is not an integer.
    ValueError
        If it is out of its range.
    """
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{what} must be an integer, not {value!r}")
    if not low <= value <= high:
        raise ValueError(f"{what} must be between {low} and {high}, not {value}")


def require_power_of_two(what: str, value: object, *, low: int, high: int) -> None:
    """Refuse what is not a power of two from ``low`` to ``high``.

    Raises
    ------
    TypeError
        If ``value`` is not an integer.
    ValueError
        If it is out of its range or not a power of two.
    """
    require_integer(what, value, low=low, high=high)
    assert isinstance(value, int)
    if value & (value - 1):
        raise ValueError(f"{what} must be a power of two, not {value}")
