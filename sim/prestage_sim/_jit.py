"""Compilation of hot loops."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

import numba

__all__ = ["compiled"]

_Function = TypeVar("_Function", bound=Callable[..., Any])


def compiled(function: _Function) -> _Function:
    """Compile a function on its first call and keep the machine code on disk.

    It is kept beside the source where that folder can be written, else in the user's cache
    directory, or where ``NUMBA_CACHE_DIR`` says. Where none of them can be written it's compiled
    anew in every process.
    """
    try:
        return cast(_Function, numba.njit(cache=True)(function))
    except RuntimeError:
        # Numba refuses to decorate a function that it finds no folder for.
        return cast(_Function, numba.njit(function))
