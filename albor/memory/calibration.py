"""What `albor calibrate` has measured on this machine: read back, and matched with where a run goes.

One file holds a row for every card, driver and version of PyTorch that was measured; one for runs on the
CPU names no card. No torch: versions are read from the installed packages' metadata.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from albor.memory.cards import Gpu, matching_gpus
from albor.strictjson import from_json, read_bounded
from albor.units import MIB

SCHEMA = 1
VARIABLE = "ALBOR_CALIBRATION"
# What is measured, by its name among `albor.memory.outside`'s items.
CUDA_CONTEXT, LOADED_KERNELS, GRAPHS = "CUDA context", "loaded kernels", "CUDA graphs"
PROCESS = "Python and torch"
MEASURED = {"cuda": {CUDA_CONTEXT, LOADED_KERNELS, GRAPHS}, "cpu": {PROCESS}}
# No context, and no process with torch in it, is as small: a reading below this is none.
_LEAST, _NEVER_LESS = 16 * MIB, {CUDA_CONTEXT, PROCESS}
_DRIVER = Path("/sys/module/nvidia/version")  # the kernel module's; there is none in WSL


@dataclass(frozen=True)
class Calibration:
    """One row: bytes beside arena and allocator, measured on one machine."""

    device: str  # cuda | cpu
    gpu: str | None  # as NVML names it
    driver: str | None  # None: it does not say
    torch: str
    triton: str | None
    cuda: str | None  # that torch is built for
    date: str  # ISO 8601
    method: str  # what was read
    bytes: dict[str, int]  # by item: those of MEASURED
    graph_nodes: int = 0  # of the graphs that bytes["CUDA graphs"] belongs to
    # What else was seen on the way, in bytes: for people, and to be compared with what the plan computes.
    details: dict[str, int] = field(default_factory=dict)

    def __str__(self) -> str:
        where = self.gpu or "the CPU"
        return f"albor calibrate, {self.date[:10]}, {where}, torch {self.torch}"

    @property
    def key(self) -> tuple[str, str | None, str | None, str]:
        """What a later measurement replaces."""
        return self.device, self.gpu, _major(self.driver), _minor(self.torch)


@dataclass(frozen=True)
class Stored:
    """The file's rows, and what is wrong with it, if anything: then there are none."""

    rows: tuple[Calibration, ...] = ()
    problem: str | None = None


def calibration_path(environment: Mapping[str, str] = os.environ) -> Path:
    """$ALBOR_CALIBRATION, or albor/calibration.json in the user's cache directory."""
    if given := environment.get(VARIABLE):
        return Path(given)
    cache = environment.get("XDG_CACHE_HOME", "")
    # The XDG specification: a path that is not absolute is to be ignored.
    return (Path(cache) if os.path.isabs(cache) else Path.home() / ".cache") / "albor" / "calibration.json"


def read_calibrations(path: Path) -> Stored:
    """What is stored at `path`. A file that cannot be used is left as it is, and its problem named."""
    try:
        raw = read_bounded(path)
    except FileNotFoundError:
        return Stored()
    except OSError as error:
        return Stored(problem=f"{path} cannot be read: {error.strerror}")
    remedy = "run `albor calibrate` again, which replaces it"
    try:
        value = from_json(raw)
    except (ValueError, RecursionError) as error:
        return Stored(problem=f"{path} is damaged ({error}); {remedy}")
    if not isinstance(value, dict) or value.get("schema") != SCHEMA:
        return Stored(problem=f"{path} is of another version of albor, or of something else; {remedy}")
    try:
        return Stored(tuple(map(_row, value["rows"])))
    except (KeyError, TypeError, ValueError) as error:
        return Stored(problem=f"{path} is damaged ({error!r}); {remedy}")


def as_json(rows: tuple[Calibration, ...]) -> dict[str, Any]:
    """What the file holds."""
    return {"schema": SCHEMA, "rows": [asdict(row) for row in rows]}


def _row(value: Any) -> Calibration:
    row = Calibration(**value)
    check(row)
    return row


def check(row: Calibration) -> None:
    """Raises ValueError or TypeError for what no measurement can have said."""
    texts = (row.device, row.torch, row.date, row.method)
    optional = (row.gpu, row.driver, row.triton, row.cuda)
    if row.device not in MEASURED or (row.device == "cuda") != (row.gpu is not None):
        raise ValueError("a row says neither cpu nor a card")
    if not isinstance(row.bytes, dict) or set(row.bytes) != MEASURED[row.device]:
        raise ValueError("a row has other sizes than are measured")
    if not isinstance(row.details, dict):
        raise ValueError("a row has no details")
    sizes = [*row.bytes.values(), *row.details.values(), row.graph_nodes]
    if not all(isinstance(text, str) for text in texts):
        raise ValueError("a text is missing")
    if not all(text is None or isinstance(text, str) for text in optional):
        raise ValueError("a version is no text")
    if not all(type(size) is int and size >= 0 for size in sizes):
        raise ValueError("a size is no count of bytes")
    if any(size < _LEAST for name, size in row.bytes.items() if name in _NEVER_LESS):
        raise ValueError("a size is too small to have been measured")
    if row.device == "cuda" and not row.graph_nodes:
        raise ValueError("its graphs have no kernels")
    if not row.torch:
        raise ValueError("a version is empty")
    datetime.fromisoformat(row.date)


@dataclass(frozen=True)
class Software:
    """What a measurement depends on besides the card."""

    driver: str | None
    torch: str | None

    @classmethod
    def installed(cls) -> Software:
        """In this Python, and on this machine."""
        from importlib import metadata  # which takes as long as an estimate

        try:
            driver = _DRIVER.read_text().strip()
        except OSError:
            driver = None
        try:
            torch = metadata.version("torch")
        except metadata.PackageNotFoundError:
            torch = None
        return cls(driver, torch)


def find_calibration(
    rows: tuple[Calibration, ...], device: str, gpu: Gpu | None, here: Software
) -> Calibration | None:
    """The row for `device` and `gpu`: the same card, driver up to its first point, torch up to its second.

    A machine without a driver asks about a card that is elsewhere: then any driver will do.
    """
    if here.torch is None or (device == "cuda" and gpu is None):
        return None
    for row in reversed(rows):
        if row.device != device or _minor(row.torch) != _minor(here.torch):
            continue
        if device == "cpu":
            return row
        if here.driver is not None and _major(row.driver) != _major(here.driver):
            continue
        if gpu is not None and row.gpu is not None and _same(gpu, row.gpu):
            return row
    return None


def _same(gpu: Gpu, name: str) -> bool:
    """Whether NVML's `name` is that of the card, which may be known by the table's."""
    return name == gpu.name or [card.name for card in matching_gpus(name)] == [gpu.name]


def _major(version: str | None) -> str | None:
    return None if version is None else version.partition(".")[0]


def _minor(version: str) -> str:
    return ".".join(version.split(".")[:2])
