"""The cache: entries appear whole, once, and are named by what they were made from."""

import fcntl
import os
import time

import pytest

from albor.config import PythonStdlibSource
from albor.data.cache import Cache
from albor.errors import DataError


def test_the_slower_of_two_processes_uses_the_entry_of_the_faster(tmp_path):
    def write_after_another(directory):
        Cache(tmp_path).entry("entry", lambda path: (path / "file").write_text("first") and None)
        (directory / "file").write_text("second")

    path = Cache(tmp_path).entry("entry", write_after_another)
    assert (path / "file").read_text() == "first"
    assert [child.name for child in tmp_path.iterdir()] == ["entry"]


def test_what_killed_processes_left_is_removed_and_what_live_ones_write_is_not(tmp_path):
    abandoned, live, young = (tmp_path / f".writing-{name}" for name in ("abandoned", "live", "young"))
    for path in (abandoned, live, young):
        path.mkdir()
        (path / "file").touch()
    for path in (abandoned, live):
        os.utime(path, (time.time() - 3600,) * 2)
    handle = os.open(live, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        Cache(tmp_path)
        assert sorted(path.name for path in tmp_path.iterdir()) == [".writing-live", ".writing-young"]
    finally:
        os.close(handle)


def test_an_entry_that_fails_leaves_nothing(tmp_path):
    def fail(directory):
        (directory / "half").touch()
        raise OSError(28, "No space left on device")

    with pytest.raises(DataError, match="entry cannot be written: No space left on device"):
        Cache(tmp_path).entry("entry", fail)
    assert not list(tmp_path.iterdir())


def test_fingerprints_depend_on_options_that_change_the_text(tmp_path):
    stdlib = PythonStdlibSource(kind="python-stdlib")
    fingerprint = Cache(tmp_path).fingerprint(stdlib)
    assert Cache(tmp_path).fingerprint(stdlib.model_copy(update={"weight": 3.0})) == fingerprint
    assert Cache(tmp_path).fingerprint(stdlib.model_copy(update={"max_bytes": 1000})) != fingerprint
