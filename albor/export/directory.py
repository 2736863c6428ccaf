"""A directory that appears whole or not at all.

It is filled under a temporary name beside its own, flushed to the disk, and renamed; whatever ends the
process before that, and is not its instant death, removes it. What an instant death left is removed by the
next export to the same place.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from albor.checkpoint import is_other_live_process
from albor.durable import flush_directory
from albor.errors import AlborError, ConfigError, Problem

_TEMPORARY = re.compile(r"\.(.+)\.tmp-([0-9]+)", re.DOTALL)


def check_target(target: Path) -> None:
    """Raises ConfigError unless `target` is free: nothing, or an empty directory."""
    try:
        if target.is_dir() and not target.is_symlink():
            free = not any(target.iterdir())
        else:
            free = not os.path.lexists(target)
    except OSError as error:
        raise _refused(f"{target}: {error.strerror or error}") from error
    if not free:
        raise _refused(f"{target} exists, and is not an empty directory")


def check_disk(needed: Mapping[Path, int]) -> None:
    """Raises AlborError where a file system has not as many bytes free as its targets will take together."""
    totals: dict[int, int] = {}
    for target, size in needed.items():
        present = _nearest(target)
        try:
            device, free = present.stat().st_dev, shutil.disk_usage(present).free
        except OSError as error:
            raise AlborError(f"{present}: {error.strerror or error}") from error
        totals[device] = totals.get(device, 0) + size
        if totals[device] > free:
            raise AlborError(
                f"{present}: the export takes {totals[device] / 1e6:,.1f} MB, and {free / 1e6:,.1f} MB are "
                "free on that disk; make room, or give another place with --out"
            )


@contextmanager
def new_directory(target: Path) -> Iterator[Path]:
    """Yields an empty directory that gets the name `target` when the block ends well, and else is removed,
    with those of its parents that were made for it.

    Raises ConfigError where the name is taken, and AlborError of what the disk refuses, in the block too.
    """
    check_target(target)
    made: list[Path] = []
    temporary = target.parent / f".{target.name}.tmp-{os.getpid()}"
    try:
        made += _make_parents(target)
        _clear_leftovers(target)
        temporary.mkdir()
        yield temporary
        for path in [*sorted(temporary.rglob("*")), temporary]:
            _flush(path)
        os.rename(temporary, target)  # over an empty directory too, and over nothing else
        flush_directory(target.parent)
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        for path in reversed(made):
            with suppress(OSError):  # somebody else has put something there
                path.rmdir()
        if isinstance(error, OSError):
            problem = f"cannot be written: {error.strerror or error}"
            raise AlborError(f"{target} {problem}; nothing of the export is kept") from error
        raise


def _nearest(path: Path) -> Path:
    """`path`, or the nearest of its parents that is there."""
    path = path.absolute()
    return next(place for place in (path, *path.parents) if place.exists())


def _make_parents(target: Path) -> list[Path]:
    """Makes the directories above `target` that are missing, and returns them."""
    missing = [path for path in reversed(target.absolute().parents) if not path.exists()]
    for number, path in enumerate(missing):
        try:
            path.mkdir()
        except OSError:
            for done in reversed(missing[:number]):
                done.rmdir()
            raise
    return missing


def _clear_leftovers(target: Path) -> None:
    for path in target.parent.iterdir():
        match = _TEMPORARY.fullmatch(path.name)
        if match and match[1] == target.name and not is_other_live_process(int(match[2])):
            shutil.rmtree(path)


def _flush(path: Path) -> None:
    if path.is_dir():
        flush_directory(path)
        return
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def _refused(message: str) -> ConfigError:
    return ConfigError([Problem("--out", message, "give another name, or remove it", "command line")])
