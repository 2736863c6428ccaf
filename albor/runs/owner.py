"""Which process trains in a run directory, and whether it still does.

The trainer keeps an exclusive lock on the directory's `.lock`, and writes into it who it is:

    {"pid": 4242, "host": "node7", "boot": "f3c1...", "pids": "pid:[4026531836]", "started": 181225}

`started` is when the kernel started the process, in clock ticks since the boot: numbers of processes come
again, and this tells them apart. `pids` is the name space that `pid` is a number in, for containers. What a
system does not tell is null. A reader asks whether that process lives and never tries the lock, for a trainer
that started in that instant would be refused. An orderly end empties the file again.
"""

from __future__ import annotations

import json
import os
import socket
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

LOCK = ".lock"  # held while a process trains in the directory; stays there

_LONGEST = 4096  # bytes of the file that are read


@dataclass(frozen=True)
class Owner:
    """A process, so that no other one is taken for it."""

    pid: int
    host: str
    boot: str | None
    pids: str | None
    started: int | None

    def lives(self) -> bool | None:
        """Whether the process runs now; None where that cannot be seen from here."""
        here = this_process()
        if self.host != here.host:
            return None
        if self.boot != here.boot and None not in (self.boot, here.boot):
            return False  # the machine has been started again since
        if self.pids != here.pids:
            return None
        if self.started is not None:
            return _started(self.pid) == self.started
        try:
            os.kill(self.pid, 0)
        except (ProcessLookupError, OverflowError):
            return False
        except PermissionError:
            pass  # it lives, and belongs to somebody else
        return True


def this_process() -> Owner:
    """The process that asks."""
    boot = pids = None
    with suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    with suppress(OSError):
        pids = os.readlink("/proc/self/ns/pid")
    return Owner(os.getpid(), socket.gethostname(), boot, pids, _started(os.getpid()))


def _started(pid: int) -> int | None:
    """When the process was started, in ticks; None for one that has ended, or where nothing tells."""
    try:
        # The name, in parentheses, may hold anything; state is the first field behind it, the time the 20th.
        fields = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
        return None if fields[0] in (b"Z", b"X") else int(fields[19])
    except (OSError, ValueError, IndexError):
        return None


def write_owner(handle: int) -> None:
    """Writes this process into the lock file open at `handle`, which it has locked.

    A disk without room leaves the file empty: training needs it for nothing.
    """
    with suppress(OSError):
        os.ftruncate(handle, 0)
        os.pwrite(handle, json.dumps(asdict(this_process())).encode() + b"\n", 0)


def clear_owner(handle: int) -> None:
    """Empties the lock file: this process may live on without training."""
    with suppress(OSError):
        os.ftruncate(handle, 0)


def read_owner(directory: Path) -> Owner | None:
    """Who trains, or trained until it was killed, in `directory`; None where the file does not say."""
    try:
        with open(directory / LOCK, "rb") as file:
            content = json.loads(file.read(_LONGEST))
        pid, host = content["pid"], content["host"]
        boot, pids, started = (content.get(key) for key in ("boot", "pids", "started"))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
    texts = (host, boot or "", pids or "")
    if type(pid) is not int or pid <= 0 or not all(isinstance(text, str) for text in texts):
        return None
    return Owner(pid, host, boot, pids, started if type(started) is int else None)


def is_locked(directory: Path) -> bool:
    """Whether the kernel lists a lock on the directory's lock file: for runs whose file does not say who
    holds it. False too where the system has no such list.
    """
    try:
        status = os.stat(directory / LOCK)
        device = f"{os.major(status.st_dev):02x}:{os.minor(status.st_dev):02x}:{status.st_ino}"
        with open("/proc/locks") as locks:
            return any(device in line.split() and " FLOCK " in line for line in locks)
    except OSError:
        return False
