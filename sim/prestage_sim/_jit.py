"""Compilation of hot loops."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, TypeVar, cast

import numba

__all__ = ["compiled", "inlined", "inner", "kernel", "sources_digest"]

_Function = TypeVar("_Function", bound=Callable[..., Any])

#: Files that all machine code hangs on.
_COMPILERS = (__file__, str(Path(__file__).with_name("_reference.py")))

_KERNEL: dict[str, Any] = {"_nrt": False, "error_model": "numpy", "no_cfunc_wrapper": True}


def compiled(function: _Function) -> _Function:
    """Compile a function on its first call and keep the machine code on disk.

    It is kept beside the source where that folder can be written, else in the user's cache
    directory, or where ``NUMBA_CACHE_DIR`` says. Where none of them can be written it's compiled
    anew in every process.
    """
    return _compile(function, {})


def kernel(function: _Function) -> _Function:
    """Compile a function that makes no arrays: as :func:`compiled`, without counting references.

    State that is a tuple of many arrays costs little then: counting takes several times what the
    functions of the buffer do. One whose name starts with an underscore can be called by compiled
    functions alone, which saves half of the time to compile it.
    """
    if function.__name__.startswith("_"):
        return inner(function)
    return _compile(function, _KERNEL)


def inner(function: _Function) -> _Function:
    """Compile a :func:`kernel` that compiled functions alone call, from other files too."""
    return _compile(function, {**_KERNEL, "no_cpython_wrapper": True})


def inlined(function: _Function) -> _Function:
    """Compile a :func:`kernel` that becomes part of its callers: what is short and called often.

    A call hands every array on by value, in seven words and more.
    """
    private = function.__name__.startswith("_")
    return _compile(function, {**_KERNEL, "no_cpython_wrapper": private, "forceinline": True})


def _compile(function: _Function, options: dict[str, Any]) -> _Function:
    try:
        dispatcher: Any = numba.njit(cache=True, **options)(function)
    except RuntimeError:
        # Numba refuses to decorate a function that it finds no folder for.
        return cast(_Function, numba.njit(**options)(function))
    # Numba compiles anew when the function's own file has changed, but machine code holds what it
    # calls in other files too.
    file = getattr(getattr(dispatcher, "_cache", None), "_cache_file", None)
    if file is not None and hasattr(file, "_source_stamp"):
        file._source_stamp = (file._source_stamp, sources_digest(function))
    return cast(_Function, dispatcher)


def sources_digest(function: Callable[..., Any]) -> str:
    """Digest of the files that hold a compiled function and those that it may call."""
    function = getattr(function, "py_func", function)
    files = {function.__code__.co_filename, *_COMPILERS}
    found: set[int] = set()
    todo = [function.__globals__]
    while todo:
        names = todo.pop()
        if id(names) in found:
            continue
        found.add(id(names))
        for value in names.values():
            inner = getattr(value, "py_func", None)
            if inner is not None:
                files.add(inner.__code__.co_filename)
                todo.append(inner.__globals__)
    digest = hashlib.sha256()
    for file in sorted(files):
        digest.update(_text(file))
    return digest.hexdigest()


@cache
def _text(file: str) -> bytes:
    return Path(file).read_bytes()
