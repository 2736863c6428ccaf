"""A program of the standard library's that runs another one, given on standard input, in isolation:

    python -I isolated.py JSON < program

It is a file of its own, run by a fresh interpreter, because a process with threads (torch has some) cannot
enter a user namespace. In namespaces of its own the program has no network (an interface list of nothing but
a loopback that is down), sees no other process, and a file system of nothing but a read-only Python and an
empty /tmp in memory: no home directory, no /proc, no /sys. It runs as an unprivileged user without
capabilities, under limits, and with an empty environment. What neither a namespace nor a limit covers, the
kernel refuses it by its number (`_DENIED`). When it ends, all that it started ends.

Nothing here is optional: what cannot be done ends this with exit code 70 and a line that says what it was,
and the program has not run. albor.evaluate.sandbox makes a message of it.
"""

from __future__ import annotations

import ctypes
import json
import os
import platform
import resource
import signal
import struct
import sys
from collections.abc import Callable
from typing import Any, NoReturn

REFUSED = 70
_NEWNS, _NEWCGROUP, _NEWUTS, _NEWIPC = 0x20000, 0x2000000, 0x4000000, 0x8000000
_NEWUSER, _NEWPID, _NEWNET = 0x10000000, 0x20000000, 0x40000000
_MS_NOSUID, _MS_NODEV, _MS_BIND, _MS_REC, _MS_PRIVATE = 2, 4, 4096, 16384, 1 << 18
_ATTR_RDONLY, _ATTR_NOSUID, _ATTR_NODEV = 1, 2, 4
_AT_FDCWD, _AT_RECURSIVE, _MNT_DETACH = -100, 0x8000, 2
_PR_SET_PDEATHSIG, _PR_SET_SECCOMP, _PR_SET_NO_NEW_PRIVS, _SECCOMP_MODE_FILTER = 1, 22, 38, 2
_SYSCALLS = {  # pivot_root, mount_setattr
    "x86_64": (155, 442),
    "aarch64": (41, 442),
}
# System calls that reach past namespaces and limits, x86_64 and aarch64. Shared memory of System V counts
# towards no limit of a process, and its queues and semaphores lie in the kernel's memory; io_uring opens
# sockets without `socket`; the others are ways into the kernel that no solution of a problem needs.
_DENIED = {
    "shmget": (29, 194), "shmat": (30, 196), "msgget": (68, 186), "semget": (64, 190),
    "io_uring_setup": (425, 425), "io_uring_enter": (426, 426), "io_uring_register": (427, 427),
    "add_key": (248, 217), "request_key": (249, 218), "keyctl": (250, 219), "ptrace": (101, 117),
    "bpf": (321, 280), "perf_event_open": (298, 241), "userfaultfd": (323, 282),
}  # fmt: skip
_SOCKET = (41, 198)
# A virtual machine's socket to its host (AF_VSOCK) and some others belong to no network namespace.
_FAMILIES = (1, 2, 10, 16)  # AF_UNIX, AF_INET, AF_INET6, AF_NETLINK: these do
_ARCHITECTURES = (0xC000003E, 0xC00000B7)  # AUDIT_ARCH_X86_64, AUDIT_ARCH_AARCH64
_X32 = 0x40000000  # from here on x86_64 has the numbers of another convention
_LOAD, _IF_EQUAL, _IF_AT_LEAST, _RETURN = 0x20, 0x15, 0x35, 0x06  # of the kernel's packet filter
_ALLOW, _KILL, _REFUSE = 0x7FFF0000, 0x80000000, 0x00050000 | 1  # the last one with EPERM
_INSIDE = 1000  # the program's user and group in its namespace
_NOBODY = 65534  # what that is outside, where root starts this: no file is root's to it
_libc = ctypes.CDLL(None, use_errno=True)


def main() -> NoReturn:
    """Runs the program as the JSON argument says; ends as it ends."""
    try:
        options = json.loads(sys.argv[1])
        program = sys.stdin.buffer.read()
        _isolate(options, program)
    except BaseException as error:
        _refuse(error)


def _refuse(error: BaseException) -> NoReturn:
    os.write(2, f"{error}\n".encode())
    os._exit(REFUSED)


def _isolate(options: dict[str, Any], program: bytes) -> NoReturn:
    if platform.machine() not in _SYSCALLS:
        raise OSError(f"no system call numbers for {platform.machine()} are known here")
    parent = os.getpid()
    unshared, say_unshared = os.pipe()
    mapped, say_mapped = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.close(unshared)
            os.close(say_mapped)
            _enter(parent, say_unshared, mapped, options, program)
        except BaseException as error:
            _refuse(error)
    os.close(say_unshared)
    os.close(mapped)
    if os.read(unshared, 1):
        _map_users(child)
        os.write(say_mapped, b"1")
    os.close(say_mapped)
    _end_as(child)


def _end_as(child: int) -> NoReturn:
    _, status = os.waitpid(child, 0)
    code = os.waitstatus_to_exitcode(status)
    os._exit(code if code >= 0 else 128 - code)


def _enter(parent: int, say_unshared: int, mapped: int, options: dict[str, Any], program: bytes) -> NoReturn:
    _die_with(parent)
    spaces = _NEWUSER | _NEWNS | _NEWCGROUP | _NEWUTS | _NEWIPC | _NEWPID | _NEWNET
    _call("entering namespaces of its own", _libc.unshare, spaces)
    os.write(say_unshared, b"1")
    if not os.read(mapped, 1):
        raise OSError("no users could be mapped into the namespace")
    parent = os.getpid()
    child = os.fork()  # the first process of its namespace: with it all others there end
    if child == 0:
        try:
            _run(parent, options, program)
        except BaseException as error:
            _refuse(error)
    _end_as(child)


def _map_users(child: int) -> None:
    """Root maps itself, to set things up, and a user who owns nothing, for the program; others can map only
    themselves."""
    as_root = os.geteuid() == 0
    for name, own in (("uid", os.geteuid()), ("gid", os.getegid())):
        if as_root:
            lines = f"0 {own} 1\n{_INSIDE} {_NOBODY} 1\n"
        else:
            lines = f"{_INSIDE} {own} 1\n"
            if name == "gid":
                _write(f"/proc/{child}/setgroups", "deny")
        _write(f"/proc/{child}/{name}_map", lines)


def _run(parent: int, options: dict[str, Any], program: bytes) -> NoReturn:
    os.setsid()
    if os.geteuid() == 0 or os.getuid() == 0:
        os.setgid(0)
        os.setuid(0)
    _write("/proc/self/oom_score_adj", "1000")  # short of memory, the program goes first
    _write("/proc/sys/user/max_user_namespaces", "0")  # none within this one
    _make_root(options, program)
    for name, limit in options["limits"].items():
        resource.setrlimit(getattr(resource, name), (limit, limit))
    if os.getuid() == 0:
        os.setgroups([])
    os.setresgid(_INSIDE, _INSIDE, _INSIDE)
    os.setresuid(_INSIDE, _INSIDE, _INSIDE)
    _call("giving up privileges", _libc.prctl, _PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    _die_with(parent)
    _deny()
    os.closerange(3, options["result"])
    os.closerange(options["result"] + 1, 65536)
    null = os.open("/dev/null", os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(null, descriptor)
    os.set_inheritable(options["result"], True)
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    # A user that is not root has no capabilities after this.
    os.execve(
        options["python"],
        [options["python"], "-I", "-S", "-B", "/tmp/program.py"],
        {"PATH": "/usr/bin:/bin", "HOME": "/tmp"},
    )


def _make_root(options: dict[str, Any], program: bytes) -> None:
    """A file system in memory that has what Python needs, to read, and an empty /tmp."""
    root = options["root"]
    _mount("none", "/", None, _MS_REC | _MS_PRIVATE)
    _mount("tmpfs", root, "tmpfs", _MS_NOSUID | _MS_NODEV, "size=1m,mode=755")
    for path in options["visible"]:
        inside = root + path
        if os.path.islink(path):
            os.symlink(os.readlink(path), inside)
            continue
        os.makedirs(os.path.dirname(inside), mode=0o755, exist_ok=True)
        if os.path.isdir(path):
            os.makedirs(inside, mode=0o755, exist_ok=True)
        else:
            os.close(os.open(inside, os.O_CREAT | os.O_WRONLY, 0o644))
        _mount(path, inside, None, _MS_BIND | _MS_REC)
        _set_attributes(inside, _ATTR_RDONLY | _ATTR_NOSUID | _ATTR_NODEV, _AT_RECURSIVE)
    os.makedirs(f"{root}/dev", exist_ok=True)
    os.close(os.open(f"{root}/dev/null", os.O_CREAT | os.O_WRONLY, 0o666))
    _mount("/dev/null", f"{root}/dev/null", None, _MS_BIND)
    os.mkdir(f"{root}/tmp")
    size = options["scratch_bytes"]
    _mount("tmpfs", f"{root}/tmp", "tmpfs", _MS_NOSUID | _MS_NODEV, f"size={size},nr_inodes=1000,mode=777")
    with open(f"{root}/tmp/program.py", "wb") as file:
        file.write(program)
    _set_attributes(root, _ATTR_RDONLY | _ATTR_NOSUID | _ATTR_NODEV, 0)
    os.chdir(root)
    number, _ = _SYSCALLS[platform.machine()]
    _call("changing the root", _libc.syscall, number, b".", b".")  # the old one then lies over the new one
    _call("leaving the old root", _libc.umount2, b".", _MNT_DETACH)
    os.chdir("/tmp")


def _set_attributes(path: str, attributes: int, flags: int) -> None:
    _, number = _SYSCALLS[platform.machine()]
    settings = (ctypes.c_uint64 * 4)(attributes, 0, 0, 0)
    size = ctypes.c_size_t(ctypes.sizeof(settings))
    what = f"making {path} read-only"
    _call(what, _libc.syscall, number, _AT_FDCWD, os.fsencode(path), flags, ctypes.byref(settings), size)


def _mount(source: str, target: str, kind: str | None, flags: int, data: str = "") -> None:
    names = source.encode(), os.fsencode(target), kind and kind.encode()
    _call(f"mounting {source} at {target}", _libc.mount, *names, ctypes.c_ulong(flags), data.encode())


def _die_with(parent: int) -> None:
    """The kernel ends this process when its parent ends, which may have happened already. A process in a new
    namespace sees 0 for a parent outside it."""
    _call("tying it to its parent", _libc.prctl, _PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() not in (parent, 0):
        os._exit(REFUSED)


def _deny() -> None:
    """From now on the calls in `_DENIED`, and sockets that are not of `_FAMILIES`, fail with EPERM."""
    which = list(_SYSCALLS).index(platform.machine())

    def step(code: int, value: int, if_true: int = 0, if_false: int = 0) -> bytes:
        return struct.pack("HBBI", code, if_true, if_false, value)

    def when(value: int, then: int, code: int = _IF_EQUAL) -> list[bytes]:
        return [step(code, value, 0, 1), step(_RETURN, then)]

    # struct seccomp_data: the call's number at 0, the architecture at 4, the first argument at 16.
    families = [
        step(_LOAD, 16),
        *(part for f in _FAMILIES for part in when(f, _ALLOW)),
        step(_RETURN, _REFUSE),
    ]
    steps = [
        step(_LOAD, 4),
        step(_IF_EQUAL, _ARCHITECTURES[which], 1, 0),
        step(_RETURN, _KILL),
        step(_LOAD, 0),
    ]
    steps += when(_X32, _REFUSE, _IF_AT_LEAST)
    for numbers in _DENIED.values():
        steps += when(numbers[which], _REFUSE)
    steps += [step(_IF_EQUAL, _SOCKET[which], 0, len(families)), *families, step(_RETURN, _ALLOW)]
    code = ctypes.create_string_buffer(b"".join(steps))
    program = struct.pack("HP", len(steps), ctypes.addressof(code))
    _call("refusing system calls", _libc.prctl, _PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, program, 0, 0)


def _write(path: str, content: str) -> None:
    with open(path, "w") as file:
        file.write(content)


def _call(doing: str, function: Callable[..., int], *arguments: Any) -> None:
    if function(*arguments) < 0:
        number = ctypes.get_errno()
        raise OSError(f"{doing}: {os.strerror(number)}")


if __name__ == "__main__":
    main()
