"""What every golden predictor offers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

__all__ = ["Candidate", "Predictor"]

#: ``(ctx, layer, expert, score, source, deadline)``, the fields of the contract's record in its
#: order.
Candidate = tuple[int, int, int, int, int, int]


class Predictor(Protocol):
    """A predictor, one call for each transfer on the ports of its RTL twin."""

    def begin(self, ctx: int, token: int, phase: int) -> None:
        """Start a token: the context's previous layer becomes "none".

        Parameters
        ----------
        ctx : :class:`int`
            Context.
        token : :class:`int`
            Id of the input token, 0xFFFFFFFF where unknown.
        phase : :class:`int`
            A :class:`prestage_hw.contract.records.Phase`.
        """

    def decide(self, ctx: int, layer: int, experts: Sequence[int], stamp: int) -> list[Candidate]:
        """Take the router's choice for a layer and return the ranked candidates for the next.

        Parameters
        ----------
        ctx : :class:`int`
            Context.
        layer : :class:`int`
            Layer that was routed.
        experts : sequence of :class:`int`
            The k chosen experts, distinct, in the router's order.
        stamp : :class:`int`
            Routing decisions of the context so far, modulo 256, this one included.
        """

    def table_words(self, table: int) -> int:
        """Words in a table, 0 if there is none of that number."""

    def read_table(self, table: int, word: int) -> int:
        """Word of a table; 0 in padding, beyond the end and in a table that does not exist."""

    def write_table(self, table: int, word: int, value: int) -> None:
        """Write a word of a table; ignored where :meth:`read_table` always gives 0."""

    def clear(self) -> None:
        """Clear all tables and forget every context's previous layer."""
