"""JSON as checkpoints hold it: equal values are equal bytes, and it is read as if a stranger had sent it."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any, NoReturn

# A model of 1,000 blocks has a manifest of 3 MB; nothing that we write is nested more than a few levels deep.
LARGEST = 64 * 2**20
DEEPEST = 64
# A string, to its end or the text's, so that brackets within do not count; or a bracket.
_BRACKETS = re.compile(r'"(?:[^"\\]|\\.)*+"?|[\[{\]}]', re.DOTALL)
_LEVELS = {"[": 1, "{": 1, "]": -1, "}": -1}


def to_json(value: Any) -> bytes:
    """The one JSON text of `value`. Raises ValueError for a NaN or infinity."""
    return json.dumps(value, indent=1, sort_keys=True, allow_nan=False).encode() + b"\n"


def from_json(raw: bytes) -> Any:
    """The value of a JSON text.

    Size and depth are looked at before anything is parsed. Raises ValueError for what is too large, too deep
    or no UTF-8, for a key that comes twice, for a NaN, an infinity or a number that overflows to one.
    """
    if len(raw) > LARGEST:
        raise ValueError(f"it is larger than the {LARGEST:,} bytes that are read")
    text = raw.decode()
    depth = 0
    for match in _BRACKETS.finditer(text):
        depth += _LEVELS.get(match[0], 0)
        if depth > DEEPEST:
            raise ValueError(f"it is nested more than {DEEPEST} levels deep")
    return json.loads(
        text, parse_float=_finite, parse_constant=_refuse, object_pairs_hook=_without_duplicates
    )


def read_bounded(path: Path) -> bytes:
    """What is in the file at `path`, or as much of it as `from_json` needs to refuse it. Raises OSError."""
    with open(path, "rb") as file:
        return file.read(LARGEST + 1)


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text} is beyond the range of a number")
    return number


def _refuse(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number in JSON")


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        raise ValueError("a key comes twice")
    return value
