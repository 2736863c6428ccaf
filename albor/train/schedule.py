"""The learning rate of every step, as a formula of the step alone."""

from __future__ import annotations

import math
from fractions import Fraction

from albor.config import ScheduleConfig


def learning_rate(step: int, steps: int, peak: float, schedule: ScheduleConfig) -> float:
    """The learning rate of update `step` of `steps`, counted from 1.

    It rises linearly to the peak at step `warmup_steps`, and reaches `min_lr_ratio * peak` at the last step;
    a constant one stays at the peak.
    """
    warmup, low = schedule.warmup_steps, schedule.min_lr_ratio
    if step <= warmup:
        return peak * step / warmup
    if schedule.kind == "constant":
        return peak
    start = warmup
    if schedule.kind == "wsd":  # warm up, stay, decay (Hu et al. 2024, arXiv:2404.06395)
        # Exactly, as the fraction is written: in floats 0.07 * 100 is a little over 7, and its ceiling 8.
        start = max(warmup, steps - math.ceil(Fraction(str(schedule.decay_fraction)) * steps))
        if step <= start:
            return peak
    progress = (step - start) / (steps - start)
    falling = 0.5 * (1.0 + math.cos(math.pi * progress)) if schedule.kind == "cosine" else 1.0 - progress
    return peak * (low + (1.0 - low) * falling)
