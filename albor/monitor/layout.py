"""Where each part of the picture stands, and which parts there is no room for: a function of the size alone.

From 90 columns on there are two columns, the charts on the left. A column is filled from the top in the order
of the lists below, as long as each part has its least number of lines, so what goes first when a window
shrinks is the end of a list: in one column the sample, then the events, the gradient norms, the memory, the
small charts; header, large chart and key line always stay, and alerts as long as they leave the chart its
least. Lines that are left over go to the parts by their weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

LEAST_WIDTH, LEAST_HEIGHT = 40, 10
HEADER, KEYS = 3, 1  # lines
_TWO_COLUMNS_FROM = 90
_LEFT_SHARE = 0.58


class Place(NamedTuple):
    """A rectangle of characters."""

    x: int
    y: int
    width: int
    height: int


class _Part(NamedTuple):
    name: str
    least: int  # lines, its frame included
    weight: int


_LARGE = _Part("large", 6, 8)
_ALERTS = _Part("alerts", 3, 0)
_LEFT = (_LARGE, _Part("small-1", 6, 2), _Part("small-2", 6, 2))
_RIGHT = (_Part("memory", 4, 1), _Part("gradients", 5, 2), _Part("events", 4, 4), _Part("sample", 4, 3))
_SINGLE = (
    _LARGE, _Part("small-1", 6, 2), _Part("memory", 4, 1), _Part("gradients", 5, 2), _Part("events", 4, 3),
    _Part("sample", 4, 2),
)  # fmt: skip
_MOST = {"memory": 9, "gradients": 11, "alerts": 6}  # lines beyond which nothing is gained


def arrange(width: int, height: int, *, alerts: int = 0) -> dict[str, Place]:
    """The parts that are shown in `width` times `height` characters, by name; `alerts` is how many lines
    there are to say. Empty where it is too small for anything.
    """
    if width < LEAST_WIDTH or height < LEAST_HEIGHT:
        return {}
    top, room = HEADER, height - HEADER - KEYS
    warned = [_ALERTS._replace(least=min(_MOST["alerts"], alerts + 2))] if alerts else []
    places = {"header": Place(0, 0, width, HEADER), "keys": Place(0, height - KEYS, width, KEYS)}
    if width >= _TWO_COLUMNS_FROM:
        left = round(width * _LEFT_SHARE)
        places |= _stack(_LEFT, 0, top, left, room)
        places |= _stack([*warned, *_RIGHT], left, top, width - left, room)
    else:
        places |= _stack([_SINGLE[0], *warned, *_SINGLE[1:]], 0, top, width, room)
    return places


def _stack(parts: Sequence[_Part], x: int, y: int, width: int, room: int) -> dict[str, Place]:
    """The first of `parts` that fit one above the other, in that order."""
    shown: list[_Part] = []
    for part in parts:
        if sum(one.least for one in shown) + part.least > room:
            break
        shown.append(part)
    heights = {part.name: part.least for part in shown}
    spare = room - sum(heights.values())
    while spare:
        able = [part for part in shown if part.weight and heights[part.name] < _MOST.get(part.name, room)]
        if not able:
            heights[shown[-1].name] += spare
            break
        neediest = min(able, key=lambda part: (heights[part.name] - part.least) / part.weight)
        heights[neediest.name] += 1
        spare -= 1
    places = {}
    for part in shown:
        places[part.name] = Place(x, y, width, heights[part.name])
        y += heights[part.name]
    return places
