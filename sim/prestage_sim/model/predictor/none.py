"""Golden model of the baseline that predicts nothing."""

from __future__ import annotations

from collections.abc import Sequence

from prestage_hw.contract import DeviceConfig
from prestage_hw.contract.params import require_config
from prestage_hw.contract.records import Source

from .base import Candidate, Settings, ValueBeat

__all__ = ["NonePredictor"]


class NonePredictor(Settings):
    """Predict nothing: takes every decision, has no table.

    Parameters
    ----------
    config : :class:`DeviceConfig`
        Device that is modelled.
    """

    def __init__(self, config: DeviceConfig) -> None:
        require_config(config)
        self.config = config

    def begin(self, ctx: int, token: int, phase: int) -> list[Candidate]:
        """Start a token; there are no candidates."""
        return []

    def decide(self, ctx: int, layer: int, experts: Sequence[int], stamp: int) -> list[Candidate]:
        """Take the router's choice for a layer; there are no candidates."""
        return []

    def hint(self, ctx: int, layer: int, expert: int, score: int, deadline: int) -> list[Candidate]:
        """Pass a hint on as it is."""
        return [(ctx, layer, expert, score, int(Source.HINT), deadline)]

    def values(self) -> list[ValueBeat]:
        """What experts are worth: nothing is said of it."""
        return []

    def table_words(self, table: int) -> int:
        """Words in a table: there is none."""
        return 0

    def read_table(self, table: int, word: int) -> int:
        """Word of a table that does not exist: 0."""
        return 0

    def write_table(self, table: int, word: int, value: int) -> None:
        """Write a word of a table that does not exist: ignored."""

    def clear(self) -> None:
        """Clear all tables: there is none."""
