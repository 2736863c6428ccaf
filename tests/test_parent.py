"""A child ends with its parent, also where that is killed and can tell nobody."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

CHILD = "import os, time; {}; print(os.getpid(), flush=True); time.sleep(60)"
GUARD = "from albor.parent import end_with; end_with(os.getppid())"
PARENT = "import subprocess, sys; subprocess.run([sys.executable, '-c', sys.argv[1]], start_new_session=True)"


@pytest.mark.parametrize("guarded", [True, False], ids=["", "without-its-guard"])
def test_a_child_ends_with_its_parent(guarded: bool):
    child = CHILD.format(GUARD if guarded else "pass")
    parent = subprocess.Popen([sys.executable, "-c", PARENT, child], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    pid = int(parent.stdout.readline())
    parent.kill()
    parent.wait()
    deadline = time.monotonic() + (20 if guarded else 2)
    while lives(pid) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert lives(pid) is not guarded
    if not guarded:
        os.kill(pid, signal.SIGKILL)
    parent.stdout.close()


def lives(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
