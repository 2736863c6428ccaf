"""Where runs and data go: room, and what kind of disk it is."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

from albor.doctor.checks import Check, Gain, Section, read
from albor.units import GIB, format_bytes

_NETWORK = (
    "9p", "afs", "beegfs", "ceph", "cifs", "fuse.", "glusterfs", "gpfs", "lustre", "nfs", "smb", "virtiofs",
)  # fmt: skip
_IN_MEMORY = ("tmpfs", "ramfs")
_ROOM, _LITTLE_ROOM = 2 * GIB, 20 * GIB  # a 350M checkpoint is 5.6 GB, and three are kept


def file_system(path: Path, root: Path = Path("/")) -> str | None:
    """The type of the file system that holds `path`, from /proc/self/mounts; None where that does not say."""
    resolved = path.resolve()
    best, found = 0, None
    for line in read(root / "proc/self/mounts").splitlines():
        _, point, kind, *_ = line.split(" ")
        mount = Path(re.sub(r"\\(\d{3})", lambda octal: chr(int(octal[1], 8)), point))  # \040 is a space
        # A later line lies over an earlier one on the same point.
        if resolved.is_relative_to(mount) and len(mount.parts) >= best:
            best, found = len(mount.parts), kind
    return found


def is_network(kind: str | None) -> bool:
    """Whether a file system of this type is reached over a network, or from the host of a virtual machine."""
    return kind is not None and kind.startswith(_NETWORK)


def existing(path: Path) -> Path:
    """`path`, or the nearest folder above it that exists."""
    return next(folder for folder in (path, *path.absolute().parents) if folder.exists())


def examine(folder: Path | None, container: bool, root: Path = Path("/")) -> Section:
    """The section on `folder`, and on its `runs` where that lies on another disk; None: it was removed."""
    if folder is None:
        check = Check("this folder", "was removed")
        return Section("Storage", {}, [check.found("warning", "nothing can be written here", "cd elsewhere")])
    places = {"this folder": folder}
    if (folder / "runs").is_dir() and (folder / "runs").stat().st_dev != folder.stat().st_dev:
        places["runs"] = folder / "runs"
    facts, checks = {}, []
    for name, path in places.items():
        free, kind = shutil.disk_usage(path).free, file_system(path, root)
        writable = os.access(path, os.W_OK)
        facts[name] = {"path": str(path), "free_bytes": free, "file_system": kind, "writable": writable}
        check = Check(name, f"{path}: {format_bytes(free)} free, {kind or 'unknown file system'}")
        checks.append(_judge(check, free, kind, writable, container))
    return Section("Storage", facts, checks)


def _judge(check: Check, free: int, kind: str | None, writable: bool, container: bool) -> Check:
    if not writable:
        return check.found(
            "warning", "cannot be written to", "start albor in a folder of yours, or set runs_dir"
        )
    if free < _ROOM:
        return check.found(
            "warning", "no room for checkpoints", "free some space, or set runs_dir to another disk"
        )
    if kind in _IN_MEMORY:
        message = "takes memory from the run, and is gone after a restart"
        return check.found("warning", message, "set runs_dir and data.cache_dir to a disk")
    if is_network(kind):
        remedy = (
            "set runs_dir and data.cache_dir to a local disk: checkpoints and data cross the network here"
        )
        return check.found("note", "a network or shared file system", remedy, gain=Gain.SLIGHT)
    if kind == "overlay" and container:
        return check.found(
            "note", "gone when the container is removed", "mount a volume, and set runs_dir to it"
        )
    if free < _LITTLE_ROOM:
        return check.found("note", "little for the checkpoints and the data of a large model")
    return check
