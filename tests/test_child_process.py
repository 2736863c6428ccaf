"""Commands that albor starts: what they say, how they end, and that none is left behind."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

import pytest

from albor.child_process import Child, wait_for_one

ROOT = Path(__file__).parents[1]


def test_it_passes_on_what_is_said_and_how_it_ended():
    lines: list[str] = []
    with Child(["train", "no-such-file.yaml"], lines.append) as child:
        assert wait_for_one([child], lambda: False) is child
    assert child.poll() == 2
    assert any("no-such-file.yaml: there is no such file" in line for line in lines)
    assert lines[-1] in child.last_words
    child.close()  # a second time, which does nothing


@pytest.fixture
def sleeper(tmp_path: Path) -> dict[str, str]:
    """The environment of a command that ends only when it is told to: `albor.child` is replaced."""
    package = tmp_path / "albor"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "child.py").write_text(
        "import os, signal, sys, time\n"
        "def stop(*_):\n"
        "    signal.signal(signal.SIGTERM, lambda *_: os._exit(1))\n"  # as a second request ends albor train
        "    time.sleep(0.3)\n"
        "    sys.exit(75)\n"
        "signal.signal(signal.SIGTERM, stop)\n"
        "print(os.getpid(), flush=True)\n"
        "time.sleep(60)\n"
    )
    return {**os.environ, "PYTHONPATH": str(tmp_path), "PYTHONSAFEPATH": "1"}


def started(lines: list[str]) -> int:
    deadline = time.monotonic() + 20
    while not lines and time.monotonic() < deadline:
        time.sleep(0.01)
    return int(lines[0])


def test_a_request_to_stop_reaches_all(sleeper):
    said: list[list[str]] = [[], []]
    with Child([], said[0].append, sleeper) as one, Child([], said[1].append, sleeper) as other:
        pids = [started(lines) for lines in said]
        assert len(set(pids)) == 2
        first = wait_for_one([one, other], lambda: True)
        second = wait_for_one([child for child in (one, other) if child is not first], lambda: True)
        assert first.poll() == second.poll() == 75


def test_leaving_the_block_leaves_nothing_behind(sleeper):
    lines: list[str] = []
    with Child([], lines.append, sleeper) as child:
        pid = started(lines)
    assert child.poll() == -signal.SIGKILL
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_a_line_without_an_end_is_cut(sleeper, tmp_path):
    (tmp_path / "albor" / "child.py").write_text("print('x' * 160_000, end='')\n")
    lines: list[str] = []
    with Child([], lines.append, sleeper) as child:
        wait_for_one([child], lambda: False)
    assert "".join(lines) == "x" * 160_000
    assert len(lines) == 3
    assert sys.getsizeof(child.last_words) < 200_000
