"""Golden model of the union of what a chunk of tokens is predicted to choose."""

from __future__ import annotations

from collections.abc import Sequence

from prestage_hw.contract.params import DeviceConfig, require_config
from prestage_hw.contract.records import Phase, Source

from ..predictor.base import Candidate

__all__ = ["ChunkUnion"]

_MOST = (1 << 16) - 1


class ChunkUnion:
    """Gather a chunk's candidates for the next layer, and hand each expert on once.

    At drained pace: what one call brings is gathered before the most popular follows.

    Parameters
    ----------
    config : :class:`DeviceConfig`
        Device.

    Attributes
    ----------
    streaming, gathering : list of :class:`bool`
        Contexts that go through a prefill chunk; through any chunk.
    """

    def __init__(self, config: DeviceConfig) -> None:
        require_config(config)
        self.streaming = [False] * config.contexts
        self.gathering = [False] * config.contexts
        self._target = [0] * config.contexts
        # Popularity, deadline and whether it was handed on, by context and expert.
        self._rows: list[dict[int, tuple[int, int, bool]]] = [{} for _ in range(config.contexts)]

    def begin(self, ctx: int, phase: int) -> None:
        """A token starts, or a chunk."""
        self.gathering[ctx] = phase in (Phase.PREFILL, Phase.VERIFY)
        self.streaming[ctx] = phase == Phase.PREFILL
        self._target[ctx] = 0

    def decide(self, ctx: int, layer: int) -> None:
        """A layer is routed: what was gathered for it is forgotten."""
        self._target[ctx] = layer + 1

    def offer(self, candidates: Sequence[Candidate]) -> list[list[Candidate]]:
        """What reaches the scheduler: all that passes, then one expert at a time, in turn."""
        passed = []
        due: dict[int, int] = {}
        for candidate in candidates:
            ctx, layer, expert, score, source, deadline = candidate
            chunk = self.gathering[ctx] and layer == self._target[ctx]
            if not chunk or source != Source.PREDICTOR:
                passed.append(candidate)
                continue
            before, whose, sent = self._rows[ctx].get(expert, (0, -1, False))
            if whose != deadline:
                before, sent = 0, False
            self._rows[ctx][expert] = min(before + max(score, 1), _MOST), deadline, sent
            due[ctx] = deadline
        offered = [passed]
        for ctx, deadline in due.items():
            rows = self._rows[ctx]
            waiting = [e for e, (_, whose, sent) in rows.items() if whose == deadline and not sent]
            for expert in sorted(waiting, key=lambda e: (-rows[e][0], e)):
                popularity = rows[expert][0]
                rows[expert] = popularity, deadline, True
                score = min(popularity, 255)
                offered.append(
                    [(ctx, self._target[ctx], expert, score, Source.PREDICTOR, deadline)]
                )
        return offered
