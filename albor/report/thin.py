"""Fewer points for a chart, none of the extremes lost."""

from __future__ import annotations

import math
from collections.abc import Sequence


def thin(values: Sequence[float], limit: int) -> list[int]:
    """The places of at most about `limit` of `values`, in their order.

    The first, the last, and of each stretch of equal length the lowest and the highest, as they come: a spike
    of one step is still there. One value that is not finite is kept of each stretch that has some, so that a
    line can show the gap. Where there are no more than `limit` values, all are.
    """
    count = len(values)
    if count <= limit:
        return list(range(count))
    stretches = max(1, (limit - 2) // 2)
    kept = {0, count - 1}
    for stretch in range(stretches):
        begin, end = stretch * count // stretches, (stretch + 1) * count // stretches
        finite = [place for place in range(begin, end) if math.isfinite(values[place])]
        if finite:
            kept |= {min(finite, key=values.__getitem__), max(finite, key=values.__getitem__)}
        if len(finite) < end - begin:
            kept.add(next(place for place in range(begin, end) if not math.isfinite(values[place])))
    return sorted(kept)


def evenly(count: int, limit: int) -> list[int]:
    """The places of at most `limit` of `count` things, the first and the last among them, evenly spaced."""
    if count <= limit:
        return list(range(count))
    if limit < 2:
        return [count - 1][:limit]
    return sorted({place * (count - 1) // (limit - 1) for place in range(limit)})
