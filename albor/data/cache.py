"""What was prepared once is kept by content: fingerprints of sources, and directories that appear whole.

An entry is a directory whose name holds the hash of everything that it was made from. It is written under a
temporary name, flushed to the disk and renamed, so a crash leaves nothing that could be taken for an entry,
and of two processes that make the same entry the slower one uses the faster one's.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from albor import faults
from albor.config import Source
from albor.data.sources import SourceFile, list_files
from albor.errors import DataError

_TEMPORARY = ".writing-"
_ABANDONED_AFTER_SECONDS = 60.0


def digest(value: Any) -> str:
    """SHA-256 of a JSON-able value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def file_sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class Cache:
    """The directory `data.cache_dir`."""

    def __init__(self, directory: Path):
        self.directory = directory
        self._hashes_path = directory / "file-hashes.json"
        try:
            directory.mkdir(parents=True, exist_ok=True)
            self._remove_abandoned()
            self._hashes = _read_hashes(self._hashes_path)
        except OSError as error:
            raise DataError(
                f"data.cache_dir {directory} cannot be used: {error.strerror}; "
                "set it to a directory that you can write to"
            ) from error

    def fingerprint(self, source: Source) -> str:
        """A hash of what `source` gives: its options and its files' content, or where it lives on the hub.

        A file is read only if its size, times or inode are not those of the last reading.
        """
        files = list_files(source)
        if files is None:
            return digest(source.model_dump(exclude={"weight"}))
        before = dict(self._hashes)
        content = [(file.name, self._file_sha256(file)) for file in files]
        if self._hashes != before:
            self._save_hashes()
        # A weight changes the mix and a moved folder nothing, so neither is a reason to tokenise again.
        return digest([source.model_dump(exclude={"weight", "path"}), content])

    def entry(self, name: str, write: Callable[[Path], None]) -> Path:
        """The directory `name`, made by `write(temporary_directory)` if it is not there yet."""
        final = self.directory / name
        if final.is_dir():
            return final
        try:
            temporary = Path(tempfile.mkdtemp(prefix=_TEMPORARY, dir=self.directory))
            handle = os.open(temporary, os.O_RDONLY)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX)  # the writer lives; the system drops the lock when it dies
                write(temporary)
                _flush(temporary)
                faults.reach("shard.synced")
                temporary.chmod(0o755)  # mkdtemp's 0700 would keep others from a shared cache
                _rename_unless_there(temporary, final)
                _flush_path(self.directory)
                faults.reach("shard.renamed")
            finally:
                os.close(handle)
                shutil.rmtree(temporary, ignore_errors=True)
        except OSError as error:
            raise DataError(
                f"data.cache_dir: {final} cannot be written: {error.strerror or error}"
            ) from error
        return final

    def _file_sha256(self, file: SourceFile) -> str | None:
        """The content's hash, remembered while the file is unchanged; None for a file that cannot be read."""
        status = file.status()
        if status is None:
            return None
        identity = [status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino]
        key = str(file.path.absolute())
        known = self._hashes.get(key)
        if known is None or known[:-1] != identity:
            try:
                self._hashes[key] = known = [*identity, file_sha256(file.path)]
            except OSError:
                return None
        return str(known[-1])

    def _save_hashes(self) -> None:
        temporary = self._hashes_path.with_name(f"{_TEMPORARY}{os.getpid()}.json")
        try:
            temporary.write_text(json.dumps(self._hashes))
            temporary.replace(self._hashes_path)
        except OSError as error:
            raise DataError(f"data.cache_dir: {temporary} cannot be written: {error.strerror}") from error

    def _remove_abandoned(self) -> None:
        """Removes what killed processes left: temporary directories that are old and that nobody holds."""
        for path in self.directory.glob(f"{_TEMPORARY}*/"):
            try:
                handle = os.open(path, os.O_RDONLY)
            except OSError:
                continue  # another process removed it, or finished it
            try:
                # The age covers the moment between a writer's mkdir and its lock.
                if time.time() - os.fstat(handle).st_mtime > _ABANDONED_AFTER_SECONDS:
                    fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    shutil.rmtree(path, ignore_errors=True)
            except BlockingIOError:
                pass
            finally:
                os.close(handle)


def _read_hashes(path: Path) -> dict[str, list[Any]]:
    """The remembered hashes; they only save time, so a damaged memory is an empty one."""
    try:
        hashes = json.loads(path.read_bytes())
    except (FileNotFoundError, ValueError):
        return {}
    return hashes if isinstance(hashes, dict) else {}


def _rename_unless_there(temporary: Path, final: Path) -> None:
    try:
        temporary.rename(final)
    except OSError:
        if not final.is_dir():
            raise  # not a race that another process won


def _flush(directory: Path) -> None:
    for folder, _, names in os.walk(directory):
        for name in names:
            _flush_path(Path(folder, name))
        _flush_path(Path(folder))


def _flush_path(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
