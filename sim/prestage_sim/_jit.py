"""Compilation of hot loops."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from functools import cache
from pathlib import Path
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
        dispatcher: Any = numba.njit(cache=True)(function)
    except RuntimeError:
        # Numba refuses to decorate a function that it finds no folder for.
        return cast(_Function, numba.njit(function))
    # Numba compiles anew when the function's own file has changed, but machine code holds what it
    # calls in other files too.
    file = getattr(getattr(dispatcher, "_cache", None), "_cache_file", None)
    if file is not None and hasattr(file, "_source_stamp"):
        file._source_stamp = (file._source_stamp, _digest())
    return cast(_Function, dispatcher)


@cache
def _digest() -> str:
    """Digest of all files that hold compiled functions."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.rglob("*.py")):
        text = path.read_bytes()
        if b"@compiled" in text:
            digest.update(text)
    return digest.hexdigest()
