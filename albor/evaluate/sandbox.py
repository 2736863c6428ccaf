"""Runs Python programs that a model wrote, where they can do no harm: or not at all.

`albor.evaluate.isolated` says what a program has, and has not. There is no weaker way: where a machine cannot
isolate, `Sandbox` raises NotIsolated, and nothing has run.

It protects the machine from the program, not the score from a model that was trained to cheat: whatever runs
tests in the process that it tests could be told that they passed.
"""

from __future__ import annotations

import json
import os
import secrets
import signal
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from albor.errors import AlborError
from albor.evaluate import isolated

Verdict = Literal["passed", "failed", "timed out"]

# A solution takes milliseconds. All processes together: at most 4 times the memory.
LIMITS = {
    "RLIMIT_AS": 512 * 2**20,  # bytes of address space, each process
    "RLIMIT_NPROC": 4,  # processes and threads
    "RLIMIT_FSIZE": 2**20,  # bytes of a file
    "RLIMIT_NOFILE": 64,
    "RLIMIT_CORE": 0,
}
SCRATCH_BYTES = 4 * 2**20  # of /tmp, which lies in memory
_SYSTEM = ("/bin", "/lib", "/lib32", "/lib64", "/usr", "/etc/ld.so.cache")


class NotIsolated(AlborError):
    """This machine cannot isolate a program, so none is run."""


@dataclass(frozen=True)
class Sandbox:
    """Runs programs with at most `seconds` of time, of the clock and of a CPU each."""

    seconds: int = 10

    def check(self) -> None:
        """Raises NotIsolated unless a program that passes does so here, and its isolation holds."""
        verdict, reason = self._run(_PROBE)
        if verdict != "passed":
            raise NotIsolated(
                "programs that a model wrote run only where they can do no harm, and this machine cannot "
                f"isolate them ({reason or 'what should be out of reach is not'}); it takes Linux 5.12 or "
                "newer that lets you create user namespaces: in a container, ask for it to be allowed "
                "(docker: --security-opt seccomp=unconfined), or evaluate elsewhere"
            )

    def run(self, program: str) -> Verdict:
        """Whether `program` comes to its end. One that leaves before, by whatever way, has failed.

        Raises NotIsolated where it was not run.
        """
        verdict, reason = self._run(program)
        if reason:
            raise NotIsolated(f"a program could not be isolated, and was not run: {reason}")
        return verdict

    def _run(self, program: str) -> tuple[Verdict, str]:
        """The verdict, and why the program was not run, where it was not."""
        if sys.platform != "linux":
            return "failed", f"this is {sys.platform}"
        token = secrets.token_hex(16).encode()
        with tempfile.TemporaryDirectory(prefix="albor-") as root:
            read, write = os.pipe()
            try:
                options = {
                    "root": root,
                    "python": _PYTHON,
                    "visible": _visible(),
                    "limits": {
                        **LIMITS,
                        "RLIMIT_CPU": self.seconds + 1,
                    },  # of each process; the clock comes first
                    "scratch_bytes": SCRATCH_BYTES,
                    "result": write,
                }
                process = subprocess.Popen(
                    [sys.executable, "-I", isolated.__file__, json.dumps(options)],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.PIPE,
                    pass_fds=(write,),
                    env={},
                    cwd="/",
                    start_new_session=True,
                )
            except BaseException:
                os.close(read)
                raise
            finally:
                os.close(write)
            with open(read, "rb", buffering=0) as results:
                said = _end(process, _with_token(program, write, token), self.seconds)
                passed = results.read(len(token)) == token
                while results.read(65536):  # to its end: then no process that held it is left
                    pass
        if said is None:
            return "timed out", ""
        if process.returncode == isolated.REFUSED and said:
            return "failed", said.decode(errors="replace").strip()
        return ("passed" if passed else "failed"), ""


def _end(process: subprocess.Popen[bytes], program: bytes, seconds: int) -> bytes | None:
    """What the isolating process said on standard error; None where its time was up, and all is ended."""
    try:
        _, said = process.communicate(program, timeout=seconds)
        return said
    except subprocess.TimeoutExpired:
        return None
    finally:
        if process.returncode is None:  # also after Ctrl-C
            process.send_signal(signal.SIGKILL)  # the kernel then ends what depends on it
            process.wait()


def _with_token(program: str, descriptor: int, token: bytes) -> bytes:
    """`program`, and behind its end what says that it was reached: an exit before is none."""
    end = f"\n__import__('os').write({descriptor}, {token!r})\n"
    return (program + end).encode("utf-8", errors="replace")


def _visible() -> list[str]:
    """What a program may read: the system's libraries and this Python."""
    paths = [path for path in _SYSTEM if os.path.lexists(path)]
    if not _is_below(_PREFIX, paths):
        paths.append(_PREFIX)
    if os.path.isdir("/nix/store"):
        paths.append("/nix/store")
    return paths


def _is_below(path: str, roots: list[str]) -> bool:
    return any(path == root or path.startswith(f"{root}/") for root in roots)


_PYTHON = os.path.realpath(getattr(sys, "_base_executable", sys.executable))
_PREFIX = os.path.realpath(sys.base_prefix)
assert Path(_PYTHON).is_absolute()

# What must not work, tried before anything else is run. It ends before its last line if something does.
_PROBE = """
import ctypes, os, socket, sys

def impossible(attempt):
    try:
        attempt()
    except (OSError, ValueError):
        return
    os._exit(1)

def connect(address, family=socket.AF_INET):
    with socket.socket(family, socket.SOCK_DGRAM) as s:
        s.connect(address)
        s.send(b"x")

def shared_memory():
    if ctypes.CDLL(None).shmget(0, 4096, 0o1600) < 0:
        raise OSError

impossible(shared_memory)
impossible(lambda: socket.socket(getattr(socket, "AF_VSOCK", 40), socket.SOCK_STREAM).close())
impossible(lambda: connect(("192.0.2.1", 53)))
impossible(lambda: connect(("127.0.0.1", 53)))
impossible(lambda: open("/written", "w"))
impossible(lambda: open(os.path.join(sys.base_prefix, "written"), "w"))
for directory in ("/proc", "/sys", "/home", "/etc/ssl", "/tmp/../proc", "../../home"):
    impossible(lambda: os.listdir(directory))
impossible(lambda: os.kill(os.getppid() or 4194304, 0))
impossible(lambda: os.setuid(0))
assert os.getpid() == 1 and os.getuid() != 0
assert not set(os.environ) - {"PATH", "HOME", "LC_CTYPE"}
open("/tmp/written", "w").close()
"""
