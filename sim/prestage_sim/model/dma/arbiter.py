"""Golden model of the choice between channels."""

from __future__ import annotations

from collections.abc import Collection, Sequence

__all__ = ["Arbiter"]


class Arbiter:
    """Strict priority between classes, weighted round robin inside a class.

    Parameters
    ----------
    channels : :class:`int`
        Channels.

    Attributes
    ----------
    left : list of :class:`int`
        Grants that each channel has left in its class's turn.
    """

    def __init__(self, channels: int) -> None:
        self.left = [0] * channels

    def choose(
        self, wants: Collection[int], traffic: Sequence[int], weights: Sequence[int]
    ) -> int | None:
        """The channel that is served, None if none wants to be."""
        if not wants:
            return None
        best = min(traffic[channel] for channel in wants)
        rivals = sorted(channel for channel in wants if traffic[channel] == best)
        chosen = next((channel for channel in rivals if self.left[channel]), None)
        if chosen is None:
            for channel, of in enumerate(traffic):
                if of == best:
                    self.left[channel] = weights[channel]
            chosen = rivals[0]
        self.left[chosen] -= 1
        return chosen
