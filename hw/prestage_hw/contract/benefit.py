"""What a candidate is worth, in steps of its logarithm: specified in ``docs/scheduler.md``."""

from __future__ import annotations

import math

__all__ = ["CONFIDENCE_STEPS", "LEAST_STEPS"]

#: Steps of a candidate without any confidence.
LEAST_STEPS = 42

#: Factors 7/8 by which a confidence, 0 to 255, lies below 255: a candidate for ``d`` layers ahead
#: is worth (7/8) ** (d + steps).
CONFIDENCE_STEPS: tuple[int, ...] = (
    LEAST_STEPS,
    *(round(math.log(255 / confidence) / math.log(8 / 7)) for confidence in range(1, 256)),
)
