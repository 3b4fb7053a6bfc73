"""What every golden predictor offers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from prestage_hw.contract.registers import register_by_name

__all__ = ["Candidate", "Predictor", "Settings", "ValueBeat"]

#: ``(ctx, layer, expert, score, source, deadline)``, the fields of the contract's record in its
#: order.
Candidate = tuple[int, int, int, int, int, int]

#: ``(kind, ctx, layer, beat, values)``, the fields of the contract's record in its order.
ValueBeat = tuple[int, int, int, int, tuple[int, ...]]


class Settings:
    """What the registers tell a predictor, as it is after reset.

    Attributes
    ----------
    threshold, far_threshold : :class:`int`
        Least confidence, in 1/256, of a candidate for the next layer and for layers farther away.
    ahead : :class:`int`
        Layers that are proposed when a token starts.
    """

    threshold: int = register_by_name("predict_threshold").reset or 0
    far_threshold: int = register_by_name("predict_far_threshold").reset or 0
    ahead: int = register_by_name("predict_ahead").reset or 0


class Predictor(Protocol):
    """A predictor, one call for each transfer on the ports of its RTL twin.

    Attributes
    ----------
    threshold, far_threshold, ahead : :class:`int`
        As in :class:`Settings`.
    """

    threshold: int
    far_threshold: int
    ahead: int

    def begin(self, ctx: int, token: int, phase: int) -> list[Candidate]:
        """Start a token: the context's previous layer becomes "none".

        Returns what the predictor proposes already, best first.

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

    def hint(self, ctx: int, layer: int, expert: int, score: int, deadline: int) -> list[Candidate]:
        """Take an opinion from outside and return the candidates that it gives.

        Parameters
        ----------
        ctx, layer, expert : :class:`int`
            Context, a layer to come, expert.
        score : :class:`int`
            Confidence, 255 is certain.
        deadline : :class:`int`
            Stamp of the routing decision that will need it, modulo 256.
        """

    def values(self) -> list[ValueBeat]:
        """What experts are worth, as it was given out since the last call.

        The RTL keeps the order of the reuse values. Of the chances of a layer it may leave out
        those that later ones replace.
        """

    def table_words(self, table: int) -> int:
        """Words in a table, 0 if there is none of that number."""

    def read_table(self, table: int, word: int) -> int:
        """Word of a table; 0 in padding, beyond the end and in a table that does not exist."""

    def write_table(self, table: int, word: int, value: int) -> None:
        """Write a word of a table; ignored where :meth:`read_table` always gives 0."""

    def clear(self) -> None:
        """Clear all tables and forget every context's previous layer."""
