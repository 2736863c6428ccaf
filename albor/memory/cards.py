"""Cards that can be bought or rented: their names, and how much memory CUDA programs can have of each."""

from __future__ import annotations

import csv
import difflib
import functools
import re
import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from albor.errors import ConfigError, Problem
from albor.units import GIB, KIB, MIB, format_bytes

Device = Literal["cpu", "cuda"]


@dataclass(frozen=True)
class Gpu:
    """One model of card, or a slice of one. None: not known, or not the same for all cards of that name."""

    name: str
    usable_bytes: int | None  # by CUDA programs, which is less than what is sold
    compute_capability: tuple[int, int]
    bf16_peak_flops: float | None  # per second, dense, summed in fp32; None also where the card has no bf16
    source: str  # of usable_bytes
    bandwidth: float | None = None  # bytes per second of its memory, as sold
    multiprocessors: int | None = None
    board_watts: int | None = None  # the power limit that the card is sold with
    also: str = ""  # another name of it
    unified: bool = False  # it has no memory of its own, and uses the host's

    @property
    def slice(self) -> str | None:
        """The MIG profile of a slice, "3g.40gb"; None for a whole card."""
        return _parts(self.name).slice


TABLE = Path(__file__).with_name("cards.csv")
_UNITS = {"B": 1, "MiB": MIB, "GiB": GIB}


def _read_row(row: dict[str, str]) -> Gpu:
    usable, source = None, row["source"]
    if row["usable"]:
        usable, source = least_bytes(row["usable"]), f"{row['usable']}: {source}"
    elif total := row["nvidia_smi_mib"]:
        reserve = reserve_mib(int(total))
        usable, source = (int(total) - reserve) * MIB, f"derived: nvidia-smi {total} MiB less {reserve}"
    major, minor = row["capability"].split(".")

    def number(column: str, unit: float) -> float | None:
        return float(row[column]) * unit if row[column] else None

    return Gpu(
        row["name"],
        usable,
        (int(major), int(minor)),
        number("bf16_tflops", 1e12),
        source,
        bandwidth=number("gb_per_s", 1e9),
        multiprocessors=int(row["multiprocessors"]) if row["multiprocessors"] else None,
        board_watts=int(row["board_watts"]) if row["board_watts"] else None,
        also=row["also"],
        unified=usable is None,
    )


def least_bytes(reported: str) -> int:
    """The least that "23.52 GiB" or "24110 MiB" may stand for: decimals were rounded, up perhaps."""
    number, unit = reported.split()
    decimals = len(number.partition(".")[2])
    half = 0.5 * 10**-decimals if decimals else 0.0
    return int((float(number) - half) * _UNITS[unit])


def reserve_mib(total_mib: int) -> int:
    """What to take off nvidia-smi's total where nobody has reported what CUDA gets of it.

    The driver keeps more of a larger card. This is as much as it keeps of any card of that size in the table
    for which both numbers are known, rounded up.
    """
    return 512 if total_mib <= 20 * KIB else 672 if total_mib <= 64 * KIB else 1088


def _read_table() -> tuple[Gpu, ...]:
    with TABLE.open(encoding="utf-8", newline="") as file:
        return tuple(map(_read_row, csv.DictReader(file)))


GPUS = _read_table()  # docs/memory.md says where its numbers come from

_NOISE = re.compile(
    r"nvidia|geforce|tesla|quadro|rtx|blackwell|generation|workstation|edition|gpu|mig|sxm\d?|hbm\d?e?"
    r"|[^a-z0-9]"
)
_LAPTOP = re.compile(r"\b(mobile|notebook)\b|(?<=\d)m\b")
_MEMORY = re.compile(r"(?<!\d)(\d{1,3})\s*gi?b\b|(?<=[\s-])(\d{1,3})$")
_SLICE = re.compile(r"(?<![\w.])(\d+g\.\d+gb)(?:[+-][a-z.]+)*")  # +me, -me, +gfx: the memory is the same
_MIG = re.compile(r"\bmig\b")


@dataclass(frozen=True)
class _Parts:
    """What a name says of a card, without decoration: NVIDIA A100-SXM4-80GB MIG 3g.40gb."""

    model: str  # "a100"
    memory: int | None  # 80
    slice: str | None  # "3g.40gb"


@functools.cache
def _parts(name: str) -> _Parts:
    lowered = _LAPTOP.sub(" laptop", name.lower().strip())
    profile = _SLICE.search(lowered)
    card = _SLICE.sub("", lowered).strip()
    memory = _MEMORY.search(card)
    gigabytes = int(memory[1] or memory[2]) if memory else None
    return _Parts(_plain(_MEMORY.sub("", card)), gigabytes, profile[1] if profile else None)


def _plain(name: str) -> str:
    return _NOISE.sub("", name.lower())


def matching_gpus(name: str, usable_bytes: int | None = None) -> list[Gpu]:
    """The rows that `name` may mean; with the bytes that a card says it has, those that have as many.

    "H100 MIG" is none of them: a slice that does not say how large it is.
    """
    if _is_some_slice(name):
        return []
    plain = _plain(name)
    named = [gpu for gpu in GPUS if plain and plain in (_plain(gpu.name), _plain(gpu.also))]
    found = named or [gpu for gpu in GPUS if plain and _may_mean(name, gpu)]
    if usable_bytes is None:
        return found
    return [gpu for gpu in found if gpu.usable_bytes is None or 0.9 < gpu.usable_bytes / usable_bytes < 1.1]


def _is_some_slice(name: str) -> bool:
    return bool(_MIG.search(name.lower())) and not _parts(name).slice


def _may_mean(name: str, gpu: Gpu) -> bool:
    asked, row = _parts(name), _parts(gpu.name)
    models = {_parts(other.name).model for other in GPUS}
    model = asked.model
    if model not in models:
        model = model.removesuffix("pcie")  # another speed for an H100, the same card for the others
    if asked.slice != row.slice or (model != row.model and not (asked.slice and not model)):
        return False
    # Cards are sold with up to a tenth more than CUDA can use. Of a slice, the name says what the card has.
    whole = _whole(gpu).usable_bytes or 0
    return asked.memory is None or abs(asked.memory - whole / GIB) <= asked.memory / 10


def _whole(gpu: Gpu) -> Gpu:
    """The card that `gpu` is a slice of, or itself."""
    name = gpu.name.partition(" MIG ")[0]
    return next(other for other in GPUS if other.name == name)


def find_gpu(name: str) -> Gpu:
    """The card that `name` means: "RTX 4090", "4090", "nvidia geforce rtx 4090 24GB", "A100-SXM4-40GB".

    A slice is named by its card and its profile, "H100 3g.40gb". Raises ConfigError, with what it may be
    instead, where there is no such card or more than one.
    """
    found = matching_gpus(name)
    if len(found) == 1:
        return found[0]
    if found:
        what = "is more than one card"
        remedy = _listed("say which", [gpu.name for gpu in found])
    elif _is_some_slice(name):
        what = "does not say which slice"
        slices = _slices_of(_MIG.sub("", name.lower()))
        remedy = (
            _listed("say which", slices) if slices else f"albor knows no slices of it: name another, {_OTHER}"
        )
    else:
        what, remedy = "is not a card that albor knows", _nearest(name)
    raise ConfigError([Problem("--gpu", f"{name!r} {what}", remedy, "command line")])


_OTHER = "or, for any other card, give its memory: --vram 24GiB"
_LINE = 100  # characters of a line of names


def _slices_of(card: str) -> list[str]:
    cards = matching_gpus(card)
    return [gpu.name for gpu in GPUS if gpu.slice and _whole(gpu) in cards]


def _nearest(name: str) -> str:
    """What may be meant by a name that no card has."""
    slices = _slices_of(_MIG.sub("", _SLICE.sub("", name.lower()))) if _parts(name).slice else []
    if slices:
        return f"{_listed('its slices are', slices)}; {_OTHER}"
    if close := _close(name):
        return f"did you mean {' or '.join(close)}? {_OTHER}"
    return f"{_listed('known are', [gpu.name for gpu in GPUS if not gpu.slice])}\n  {_OTHER}"


def _listed(words: str, names: list[str]) -> str:
    """`names` after `words`; many of them in lines of their own."""
    text = ", ".join(names)
    if len(text) <= _LINE:
        return f"{words}: {text}"
    whole = ", ".join(name.replace(" ", "\N{NO-BREAK SPACE}") for name in names)
    lines = textwrap.wrap(whole, _LINE, break_long_words=False, break_on_hyphens=False)
    return "\n    ".join([f"{words}:", *(line.replace("\N{NO-BREAK SPACE}", " ") for line in lines)])


def _close(name: str) -> list[str]:
    """Up to two cards that may be meant: the same with another memory, else those that are spelled alike."""
    asked = _parts(name)
    rows = [gpu for gpu in GPUS if bool(gpu.slice) == bool(asked.slice)]
    same = [gpu.name for gpu in rows if _parts(gpu.name).model == asked.model]
    if same and not asked.slice:
        return same[:2]
    spelled = {_parts(gpu.name).model: gpu.name for gpu in rows if not gpu.slice}
    spelled |= {_plain(gpu.slice): gpu.name for gpu in rows if gpu.slice}
    spelled |= {_plain(called): gpu.name for gpu in rows for called in (gpu.also, gpu.name) if called}
    # In "RTX 409", 409 is no memory: the whole name is compared.
    like = [spelled[key] for key in difflib.get_close_matches(_plain(name), spelled, n=3, cutoff=0.6)]
    return list(dict.fromkeys(like + same))[:2]


@dataclass(frozen=True)
class Process:
    """A program that holds memory of a card. Without a pid: all those that the driver does not tell apart."""

    pid: int | None
    name: str | None
    memory_bytes: int | None  # None: the driver does not say
    computes: bool = False  # with CUDA; else it draws, or it is not known

    def __str__(self) -> str:
        if self.pid is None:
            return "programs that the driver does not tell apart"
        return f"{self.name or 'name hidden'} (pid {self.pid})"


_NAMED = 5  # programs that a line has room for


@dataclass(frozen=True)
class Hardware:
    """Where a run is to go. A capacity that is not known is None."""

    device: Device
    description: str
    gpu: Gpu | None = None
    capacity_bytes: int | None = None  # for the device arena and what lies around it
    host_capacity_bytes: int | None = None  # for the host's part of a run on a GPU of this machine
    holders: tuple[Process, ...] = ()  # other programs that hold memory of the card, the largest first
    unified: bool = False  # the device has no memory of its own: its capacity is for the host's part too

    @property
    def held_bytes(self) -> int:
        """What `holders` have together, as far as it is known."""
        return sum(holder.memory_bytes or 0 for holder in self.holders)

    @property
    def held(self) -> str | None:
        """`holders` for people: "20.3 GiB by others: python (pid 4711) 20.0 GiB, ..."."""
        if not self.holders:
            return None
        named = [
            f"{holder}, its size not said" if size is None else f"{holder} {format_bytes(size)}"
            for holder in self.holders[:_NAMED]
            for size in [holder.memory_bytes]
        ]
        if rest := self.holders[_NAMED:]:
            named.append(f"{len(rest)} more {format_bytes(sum(holder.memory_bytes or 0 for holder in rest))}")
        return f"{format_bytes(self.held_bytes)} by others: {', '.join(named)}"
