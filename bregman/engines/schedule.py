"""The learning rate over the steps of a stage.

Owns the formula only; steps are counted by the loops.
"""

from __future__ import annotations

import math

from bregman.engines.config import ScheduleConfig


def learning_rate(peak: float, schedule: ScheduleConfig, step: int, total_steps: int) -> float:
    """The rate of step `step`, 0 <= step < total_steps: linear warm-up to `peak`, then the decay, which reaches
    `peak * schedule.final_ratio` at the last step. Steps beyond the last keep that rate."""
    warmup = schedule.warmup_steps
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = min((step - warmup) / max(total_steps - 1 - warmup, 1), 1.0)
    match schedule.kind:
        case "constant":
            share = 1.0
        case "linear":
            share = 1.0 - progress
        case "cosine":
            share = 0.5 * (1.0 + math.cos(math.pi * progress))
        case "wsd":
            share = min((1.0 - progress) / schedule.decay_share, 1.0)
    return peak * (schedule.final_ratio + (1.0 - schedule.final_ratio) * share)
