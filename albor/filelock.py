"""Locks on files, which keep a second process out and end with the one that holds them."""

from __future__ import annotations

import fcntl
import os
from contextlib import suppress
from pathlib import Path


def lock_file(path: Path) -> tuple[int, str | None] | None:
    """The open file at `path`, and why it could not be locked, if so; None if another process has locked
    it.
    """
    while True:
        # For writing, because NFS makes a lock on a byte range of flock, and an exclusive one needs that.
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(handle)
            return None
        except OSError as error:
            return handle, error.strerror
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(handle), os.stat(path)):
                return handle, None
        os.close(handle)  # its last owner has removed it since we opened it
