"""The directory that a ladder or a sweep has to itself, and in which its runs lie."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from albor.durable import make_directory
from albor.errors import AlborError
from albor.filelock import lock_file
from albor.runs.record import GROUPS, occupied_by


@contextmanager
def claim_group(directory: Path, state: str, lock: str, say: Callable[[str], None]) -> Iterator[None]:
    """Makes the directory of the group whose state file is `state`. Keeps a second one of its kind out of it,
    by the file `lock`, and this one out of what is another's.

    `say` is told where the file system has no locks, and nothing is kept out.
    """
    kind = GROUPS[state]
    if (other := occupied_by(directory, state)) is not None:
        raise AlborError(f"{directory} is {other}'s directory; choose another name for the {kind}")
    try:
        make_directory(directory)
        claimed = lock_file(directory / lock)
    except OSError as error:
        raise AlborError(f"runs_dir: {directory} cannot be used: {error.strerror}") from error
    if claimed is None:
        raise AlborError(
            f"another albor {kind} is at work in {directory}; wait for it, or choose another name"
        )
    handle, refusal = claimed
    if refusal:
        say(f"{directory} cannot be locked ({refusal}); see to it that no other {kind} works in it")
    try:
        yield
    finally:
        os.close(handle)
