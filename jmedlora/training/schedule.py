"""Learning rate over the steps of a run."""

from __future__ import annotations

import math

from jmedlora.config.run import RunSettings


def factor(step: int, settings: RunSettings, total_steps: int) -> float:
    """What the peak learning rate is multiplied by for optimizer step `step` (1-based).

    Rises linearly from 0 over `warmup_steps`, then stays (constant) or falls to 0 (linear, or half a cosine) after `total_steps`.
    """
    done = step - 1
    if done < settings.warmup_steps:
        return done / settings.warmup_steps
    if settings.schedule == "constant":
        return 1.0
    progress = (done - settings.warmup_steps) / max(1, total_steps - settings.warmup_steps)
    if settings.schedule == "linear":
        return max(0.0, 1.0 - progress)
    return max(0.0, 0.5 * (1.0 + math.cos(math.pi * progress)))
