"""Quality of predictors on routing traces.

A *ranker* orders the experts of every layer by what was known some layers before; the evaluation
compares that order with the router's choice. To add a ranker, write a subclass of :class:`Ranker`
and register it by name in :data:`RANKERS`.
"""

from __future__ import annotations

from .rankers import RANKERS, Ranker, Ranking, create_ranker

__all__ = ["RANKERS", "Ranker", "Ranking", "create_ranker"]
