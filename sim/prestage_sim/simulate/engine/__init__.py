"""The event loop: time on the links and in the layers, around the golden model's own rules.

What a slot is given to, which candidate goes next, and which kinds of prefetches are switched off
say the compiled functions of :mod:`prestage_sim.model`; nothing of that is here. All functions work
on one :class:`Engine`.
"""

from __future__ import annotations

from .create import create_engine
from .loop import run
from .state import COUNTED, RECORDED, Engine

__all__ = ["COUNTED", "RECORDED", "Engine", "create_engine", "run"]
