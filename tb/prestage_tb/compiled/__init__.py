"""The RTL as a library in this process: what ``sim://`` opens.

The top is elaborated, compiled once for each configuration and kept in a cache; see
:mod:`.build`. ``harness.h`` documents the C interface, :mod:`.pipe` wraps it.
"""

from .build import BuildError, build_library
from .pipe import CompiledPipe, open_pipe

__all__ = ["BuildError", "CompiledPipe", "build_library", "open_pipe"]
