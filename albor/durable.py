"""Files and directories that are there after a power cut, whole or not at all.

What a program wrote lies in memory until it is flushed, and so does a directory's list of names: a file whose
name was not flushed may be gone, and a name may come back without its content.
"""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path


def write_file(path: Path, content: bytes) -> None:
    """Writes `content` to `path`, and returns when the disk has it. The name is the caller's to flush."""
    with open(path, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def replace_file(path: Path, content: bytes) -> None:
    """Gives the file at `path` new content: whoever looks finds the old one or the new one, never a part.

    Raises OSError when it cannot be written, and the old content stays.
    """
    temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    try:
        write_file(temporary, content)
        os.replace(temporary, path)
    except OSError:
        with suppress(OSError):
            temporary.unlink()
        raise
    flush_directory(path.parent)


def flush_directory(path: Path) -> None:
    """Returns when the disk has the names of all that lies in `path`."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_directory(path: Path) -> None:
    """Creates `path` and its parents, each of them on the disk before anything is put into it."""
    if path.is_dir():
        return
    make_directory(path.parent)
    path.mkdir()
    flush_directory(path.parent)
