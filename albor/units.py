"""Numbers as people write them: `20K`, `2B`, `64Ki` for counts, `200MB`, `24GiB` for sizes."""

from __future__ import annotations

import re
from fractions import Fraction
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, WithJsonSchema

KIB, MIB, GIB = 2**10, 2**20, 2**30

_THOUSANDS = {"K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
_BINARIES = {"KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}
_COUNT_UNITS = {"": 1, "B": 10**9} | _THOUSANDS | _BINARIES
_SIZE_UNITS = {"": 1, "B": 1} | {f"{unit}B": factor for unit, factor in (_THOUSANDS | _BINARIES).items()}
_NUMBER = r"[0-9][0-9_]{0,40}(\.[0-9]{1,40})?([eE][+-]?[0-9]{1,2})?"  # bounded: 1e999999999 is no number here
_HUMAN = re.compile(rf"\s*(?P<number>{_NUMBER})\s*(?P<unit>[A-Za-z]*)\s*")
_LARGEST = 2**63 - 1  # what a tensor's size and a file's offset can be


def _parse_human(value: Any, units: dict[str, int], example: str, *, round_down: bool = False) -> Any:
    """`value` as an int where it is a number with one of `units`; the rest is for pydantic to refuse."""
    if isinstance(value, float) and value.is_integer():
        return int(value)  # 1e6 is a float in YAML, and a perfectly clear count
    if not isinstance(value, str):
        return value
    shown = repr(value if len(value) <= 40 else value[:37] + "...")
    match = _HUMAN.fullmatch(value)
    factor = units.get(match["unit"].upper()) if match else None
    if match is None or factor is None:
        raise ValueError(f"{shown} is not a number that is understood here; write for example {example}")
    exact = Fraction(match["number"].replace("_", "")) * factor  # in floats, 1.005K is 1004.9999999999999
    if exact.denominator != 1 and not round_down:
        raise ValueError(f"{shown} is not a whole number; write for example {example}")
    return exact.numerator // exact.denominator


def parse_count(value: Any) -> Any:
    """A count of things: `20000`, `20_000`, `20K` (20,000), `2B` (2,000,000,000), `64Ki` (65,536)."""
    return _parse_human(value, _COUNT_UNITS, "20000, 20K or 2B")


def parse_bytes(value: Any) -> Any:
    """A number of bytes: `200MB` (200,000,000), `24GiB` (24 x 2^30), or a plain number of bytes."""
    return _parse_human(value, _SIZE_UNITS, "200MB or 24GiB")


def parse_capacity(text: str) -> int:
    """Bytes that are available, as they are printed: `9.39GiB` is no whole number of them, and what is left
    over holds nothing.
    """
    capacity: int = _parse_human(text, _SIZE_UNITS, "24GiB", round_down=True)
    return capacity


def _human_schema(minimum: int, unit: str) -> WithJsonSchema:
    number = {"type": "integer", "minimum": minimum, "maximum": _LARGEST}
    return WithJsonSchema({"anyOf": [number, {"type": "string", "pattern": f"^{_NUMBER} ?({unit})?$"}]})


_COUNT = _human_schema(1, "[KkMmGgTt][Ii]?|[Bb]")
_COUNT_OR_ZERO = _human_schema(0, "[KkMmGgTt][Ii]?|[Bb]")
_BYTES = _human_schema(1, "([KkMmGgTt][Ii]?)?[Bb]")

Count = Annotated[int, BeforeValidator(parse_count), Field(ge=1, le=_LARGEST), _COUNT]
CountOrZero = Annotated[int, BeforeValidator(parse_count), Field(ge=0, le=_LARGEST), _COUNT_OR_ZERO]
Bytes = Annotated[int, BeforeValidator(parse_bytes), Field(ge=1, le=_LARGEST), _BYTES]


def format_bytes(size: int) -> str:
    """`size` for people: in GiB, or in MiB where that would show nothing."""
    return f"{size / GIB:.2f} GiB" if size >= GIB / 10 else f"{size / MIB:.1f} MiB"


def format_duration(seconds: float | None) -> str:
    """`7s`, `3m10s`, `2h05m`, `3d04h`; `-` where it is not known."""
    if seconds is None:
        return "-"
    whole = round(seconds)
    for unit, smaller, size, part in (("d", "h", 86400, 3600), ("h", "m", 3600, 60), ("m", "s", 60, 1)):
        if whole >= size:
            return f"{whole // size}{unit}{whole % size // part:02d}{smaller}"
    return f"{whole}s"


def format_count(count: float | None) -> str:
    """`840`, `5.2k`, `118k`, `1.3M`, `2.0B`; `-` where it is not known."""
    if count is None:
        return "-"
    for suffix, size in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if count >= size * 0.9995:
            scaled = count / size
            return f"{scaled:.1f}{suffix}" if scaled < 99.95 else f"{scaled:.0f}{suffix}"
    return f"{count:.0f}"
