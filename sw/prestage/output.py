"""Files that are written whole or not at all."""

from __future__ import annotations

import os
import stat
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import IO

from .errors import PrestageError

__all__ = ["Files", "OutputError", "check_writable", "write_file"]


class OutputError(PrestageError):
    """A file that can't be written."""


def _is_special(path: Path) -> bool:
    """True for a terminal, a pipe or a device such as /dev/stdout, which no rename may replace."""
    if path.absolute().parts[1] in ("dev", "proc"):
        return True  # /dev/stdout leads to a regular file where the output goes to one
    try:
        return not stat.S_ISREG(path.stat().st_mode)
    except OSError:
        return False


def check_writable(path: Path, *, what: str) -> None:
    """Find out before a long run that a file could not be written after it.

    Raises
    ------
    OutputError
        If its folder is missing or may not be written, or the path is a folder.
    """
    if path.is_dir():
        raise OutputError(f"{what} {path} can't be written: it is a directory")
    if not path.parent.is_dir():
        raise OutputError(f"{what} {path} can't be written: there is no directory {path.parent}")
    if not os.access(path if _is_special(path) else path.resolve().parent, os.W_OK):
        raise OutputError(f"{what} {path} can't be written: permission denied")


def write_file(path: Path, write: bytes | Callable[[IO[bytes]], None], *, what: str) -> None:
    """Write a file through a temporary one beside it, so that a full disk never leaves half a file.

    Parameters
    ----------
    path : path
        File to write. What isn't a regular file is written directly.
    write : :class:`bytes` or callable
        Content, or what writes it to an open binary file.
    what : :class:`str`
        What the file is, for messages.

    Raises
    ------
    OutputError
        If it can't be written; the file is then as it was before.
    """
    emit = write if callable(write) else (lambda file: file.write(write) and None)
    temporary: Path | None = None
    try:
        if _is_special(path):
            with path.open("wb") as file:
                emit(file)
            return
        path = path.resolve()  # a link stays a link
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
        temporary = Path(name)
        with os.fdopen(handle, "wb") as file:
            emit(file)
            file.flush()
            os.fsync(file.fileno())
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)
        temporary.replace(path)
        temporary = None
    except OSError as error:
        raise OutputError(f"{what} {path} can't be written: {error.strerror or error}") from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


class Files:
    """Several files of which an error in one doesn't lose the others."""

    def __init__(self) -> None:
        self._failures: list[OutputError] = []

    @property
    def complete(self) -> bool:
        """Whether all files so far were written."""
        return not self._failures

    def write(self, path: Path, text: str, *, what: str) -> None:
        """Write a file of text as :func:`write_file` does; an error waits for :meth:`close`."""
        try:
            write_file(path, text.encode(), what=what)
        except OutputError as error:
            self._failures.append(error)

    def close(self) -> None:
        """Raise the first error, if there was one."""
        if self._failures:
            raise self._failures[0]
