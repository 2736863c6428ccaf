"""Checkpoints: named tensors and a JSON state in, a verified directory out.

    checkpoints/best.json                                  which one had the lowest validation loss
    checkpoints/step-00005000/
        weights.safetensors, optimizer.safetensors, ...    one file per group of tensors
        state.json                                         what else influences the next step
        config.yaml, tokenizer.model, ...                  what makes the checkpoint self-describing
        manifest.json                                      size and SHA-256 of every file, every tensor

Saving writes into `.step-00005000.tmp-PID`, fsyncs every file, writes the manifest last, fsyncs it and the
directory, reads everything back, and only then renames the directory and fsyncs its parent. So a checkpoint
that has its name is complete, at whatever instant the process or the power died; and one that changed since,
by a single bit, does not verify and is never loaded. (The hashes find damage. They are no signature: whoever
can write the directory can write a manifest that fits.)

Both formats hold data and no code, and nothing here knows a trainer.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import stat
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor

from albor import __version__, faults
from albor.durable import flush_directory, make_directory, replace_file, write_file
from albor.errors import CheckpointError, DamagedCheckpoint, DiskFault
from albor.manifest import MANIFEST, STATE, Manifest
from albor.strictjson import from_json, read_bounded, to_json
from albor.tensorfile import FileRecord, TensorSpec, read_tensors_into, tensor_specs, write_tensors

CHECKPOINTS = "checkpoints"  # where a run directory keeps them
BEST = "best.json"

_TENSOR_SUFFIX = ".safetensors"
_FILE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")  # a plain name: no separator, no "..", not hidden
_STEP_NAME = re.compile(r"step-([1-9][0-9]{8,}|[0-9]{8})")
# `tmp` is a save or a removal that was cut short; `old` is a checkpoint that its replacement had moved aside.
_LEFTOVER_NAME = re.compile(r"\.(step-[0-9]+|best\.json)\.(tmp|old)-([0-9]+)")

T = TypeVar("T")


def checkpoint_name(step: int) -> str:
    """The directory name of the checkpoint of `step`."""
    return f"step-{step:08d}"


@dataclass(frozen=True)
class Retention:
    """Which checkpoints stay when a new one is saved: any of these may keep one."""

    keep_last: int | None = None  # so many with the highest steps; None: all
    keep_every: int | None = None  # those of multiples of this step
    keep_best: bool = False  # the one that best.json names
    rollback: int | None = None  # that of this step, which the run would go back to


def save(
    checkpoints_dir: Path,
    step: int,
    tensor_files: Mapping[str, Mapping[str, Tensor]],
    state: Mapping[str, Any],
    files: Mapping[str, bytes],
    retention: Retention,
    on_warning: Callable[[str], None] = warnings.warn,
) -> Path:
    """Save the checkpoint of `step`, remove what `retention` does not keep, return the new one's directory.

    `tensor_files` maps a file's stem (`weights`) to its named tensors; `files` holds further files by name.
    `state` is JSON and must read back equal: a non-finite float, a tuple or a key that is no string is
    refused, since JSON would change it or has no word for it (use null for "none yet").

    A checkpoint of `step` that already stands there with the same content is left as it is; one that is
    damaged or different is replaced. Newer checkpoints and the one just saved are never removed, and nothing
    is before the new one was read back. Raises `DiskFault` when the disk refuses: what was written is
    removed, the earlier checkpoints stay, and another attempt may succeed. An old checkpoint that cannot be
    removed is told to `on_warning`.
    """
    taken = {MANIFEST, STATE, *(stem + _TENSOR_SUFFIX for stem in tensor_files)}
    for name in (*taken, *files):
        if not _FILE_NAME.fullmatch(name) or name in taken & files.keys():
            raise CheckpointError(f"{name!r} cannot be the name of a further file in a checkpoint")
    contents = {STATE: _encode_state(state), **files}
    final = checkpoints_dir / checkpoint_name(step)
    temporary = checkpoints_dir / f".{final.name}.tmp-{os.getpid()}"
    try:
        faults.reach("save.begin", step)
        make_directory(checkpoints_dir)
        clear_leftovers(checkpoints_dir)
        temporary.mkdir()
        manifest = _write_contents(temporary, step, tensor_files, contents)
        if verify(temporary) != manifest:
            raise CheckpointError(f"{temporary}: the disk does not give back what was written")
        faults.reach("save.verified", step)
        if not (final.exists() and _holds(final, manifest)):
            _commit(temporary, final)
        faults.reach("save.renamed", step)
    except (OSError, CheckpointError) as error:
        raise DiskFault(_describe_failure(error, final, tensor_files)) from error
    finally:
        with suppress(OSError):
            clear_leftovers(checkpoints_dir)
    try:
        remove(removable(checkpoints_dir, step, retention))
        faults.reach("save.pruned", step)
    except (OSError, CheckpointError) as error:  # the run's state is safe: no reason to stop it
        on_warning(f"could not remove an old checkpoint: {error}")
    return final


def _write_contents(
    directory: Path,
    step: int,
    tensor_files: Mapping[str, Mapping[str, Tensor]],
    contents: Mapping[str, bytes],
) -> Manifest:
    """Write everything durably, the manifest last: whoever finds it finds all that it names."""
    records: dict[str, FileRecord] = {}
    for stem, tensors in tensor_files.items():
        records[stem + _TENSOR_SUFFIX] = write_tensors(directory / (stem + _TENSOR_SUFFIX), tensors)
        faults.reach("save.tensors", step)
    for name, content in contents.items():
        write_file(directory / name, content)
        records[name] = FileRecord(len(content), hashlib.sha256(content).hexdigest())
    specs = {
        stem + _TENSOR_SUFFIX: {name: TensorSpec.of(tensor) for name, tensor in tensors.items()}
        for stem, tensors in tensor_files.items()
    }
    manifest = Manifest(step, __version__, records, specs)
    write_file(directory / MANIFEST, manifest.to_bytes())
    faults.reach("save.written", step)
    flush_directory(directory)
    faults.reach("save.synced", step)
    return manifest


def _commit(temporary: Path, final: Path) -> None:
    """Give the complete `temporary` its name. A directory cannot be renamed over another, so one that stands
    there moves aside first; if we die between the two renames it still counts (`list_checkpoints`)."""
    if final.exists():
        os.rename(final, final.parent / f".{final.name}.old-{os.getpid()}")
    os.rename(temporary, final)
    flush_directory(final.parent)


def _holds(path: Path, manifest: Manifest) -> bool:
    """Whether `path` is an undamaged checkpoint with just this content."""
    try:
        return verify(path) == manifest
    except CheckpointError:
        return False


def removable(checkpoints_dir: Path, step: int, retention: Retention) -> list[Path]:
    """The checkpoints that `retention` does not keep once that of `step` is saved and verified."""
    if retention.keep_last is None:
        return []
    older = [path for path in list_checkpoints(checkpoints_dir) if step_of(path) < step]
    best = read_best(checkpoints_dir) if retention.keep_best else None

    def stays(path: Path) -> bool:
        number, every = step_of(path), retention.keep_every
        # A link is none of ours. The state before the first step is the seed's, and no milestone.
        return (
            path.is_symlink()
            or (every is not None and number > 0 and number % every == 0)
            or (best is not None and number == best.step)
            or number == retention.rollback
        )

    beyond = max(0, len(older) - (max(1, retention.keep_last) - 1))  # the new one is among the last
    return [path for path in older[:beyond] if not stays(path)]


def remove(paths: Sequence[Path]) -> None:
    """Remove checkpoints so that each is there whole or not at all, even if we or the power die halfway."""
    doomed = []
    for path in paths:
        doomed.append(path.parent / f".{checkpoint_name(step_of(path))}.tmp-{os.getpid()}")
        os.rename(path, doomed[-1])
    if doomed:
        flush_directory(doomed[0].parent)
    for path in doomed:
        shutil.rmtree(path)


def remove_after(checkpoints_dir: Path, step: int) -> None:
    """Remove the checkpoints beyond `step`, to which a run has gone back, and best.json if it names one of
    them: the run will come to other ones of those steps.
    """
    with suppress(DamagedCheckpoint):
        best = read_best(checkpoints_dir)
        if best is not None and best.step > step:
            (checkpoints_dir / BEST).unlink()
    # Or the power may leave best.json without what it names; and half of an old one, which a second save of a
    # step has replaced and removed, without the one that makes it void.
    if checkpoints_dir.is_dir():  # not so before the first save
        flush_directory(checkpoints_dir)
    remove([path for path in list_checkpoints(checkpoints_dir) if step_of(path) > step])


def clear_leftovers(checkpoints_dir: Path, *, alone: bool = False) -> None:
    """Undo what saves of this process or of dead ones left behind.

    `alone`: whoever calls keeps all others out, so that a save whose process seems to live is a dead one's
    too. Numbers of processes come again: in a container the first one always has the same.
    """
    for path in sorted(checkpoints_dir.iterdir()):
        match = _LEFTOVER_NAME.fullmatch(path.name)
        if match is None or (not alone and is_other_live_process(int(match[3]))):
            continue
        if match[2] == "old" and not (checkpoints_dir / match[1]).exists():
            os.rename(path, checkpoints_dir / match[1])  # its replacement never got the name
        elif path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def is_other_live_process(pid: int) -> bool:
    """Whether `pid` is a process that runs now, and is not this one."""
    if pid == os.getpid():
        return False
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass  # it lives, and belongs to somebody else
    return True


def verify(path: Path, *, tensors: bool = True) -> Manifest:
    """Read every byte of the checkpoint at `path` and compare it with the manifest.

    Without `tensors`, those of the tensor files are left to `load`, which reads them anyway, and only their
    headers are looked at. Raises `DamagedCheckpoint`, which names the file and what is wrong with it.
    """
    try:
        if _STEP_NAME.fullmatch(path.name) and path.is_symlink():
            raise DamagedCheckpoint(f"{path}: a symbolic link, which no checkpoint of a run is")
        present = {entry.name: entry.stat(follow_symlinks=False) for entry in os.scandir(path)}
        if MANIFEST not in present:
            raise DamagedCheckpoint(f"{path}: there is no {MANIFEST}, so it is no complete checkpoint")
        for name, status in present.items():
            if not stat.S_ISREG(status.st_mode):
                raise DamagedCheckpoint(f"{path / name}: not a regular file, which all of a checkpoint's are")
        try:
            manifest = Manifest.from_bytes(read_bounded(path / MANIFEST))
        except ValueError as error:
            raise DamagedCheckpoint(f"{path / MANIFEST}: {error}") from error
        named = _STEP_NAME.fullmatch(path.name)
        if named and int(named[1]) != manifest.step:
            raise DamagedCheckpoint(f"{path}: this is the checkpoint of step {manifest.step}, renamed")
        for name in sorted(present.keys() - {MANIFEST} ^ manifest.files.keys()):
            # Names in `present` have no path in them, so a manifest that names one fails here, unread.
            raise DamagedCheckpoint(f"{path / name}: " + ("unexpected" if name in present else "missing"))
        for name, expected in manifest.files.items():
            if present[name].st_size != expected.size:
                raise DamagedCheckpoint(
                    f"{path / name}: has {present[name].st_size} bytes instead of {expected.size}"
                )
            hashed = tensors or name not in manifest.tensors
            if hashed and _sha256(path / name) != expected.sha256:
                raise _differs(path / name)
        for name, specs in manifest.tensors.items():
            if tensor_specs(path / name) != specs:
                raise DamagedCheckpoint(f"{path / name}: holds other tensors than {MANIFEST} lists")
    except OSError as error:
        raise DamagedCheckpoint(f"{path}: cannot be read as a checkpoint: {error}") from error
    return manifest


def _differs(path: Path) -> DamagedCheckpoint:
    return DamagedCheckpoint(f"{path}: content differs from what was saved (SHA-256)")


def load(
    path: Path,
    tensor_files: Mapping[str, Mapping[str, Tensor]],
    *,
    partial: bool = False,
    convert: bool = False,
) -> dict[str, Any]:
    """Verify the checkpoint at `path`, fill the given tensors from it, and return its state.

    `tensor_files` is as in `save`, and must be all that was saved; with `partial` it may name fewer files
    (generation needs the weights, not the optimizer), each of them still in full. With `convert`, values are
    rounded to the given tensors' dtypes.

    Every byte of a tensor is read once: what is hashed is what the tensor gets. Raises `DamagedCheckpoint`
    when they then turn out to be other than what was saved, or the disk does not give them, and the tensors
    hold what must not be used; for anything else that is wrong `CheckpointError`, without a tensor changed.
    """
    wanted = {stem + _TENSOR_SUFFIX: tensors for stem, tensors in tensor_files.items()}
    manifest = verify(path, tensors=False)
    unread = set() if partial else manifest.tensors.keys() - wanted.keys()
    for name in sorted(unread | wanted.keys() - manifest.tensors.keys()):
        raise CheckpointError(
            f"{path / name}: " + ("holds state that would not be restored" if name in unread else "missing")
        )
    state = read_state(path)
    for name, tensors in wanted.items():
        if read_tensors_into(path / name, tensors, convert=convert) != manifest.files[name]:
            raise _differs(path / name)
    return state


def read_state(path: Path) -> dict[str, Any]:
    """The state that the checkpoint at `path` holds, once `verify` has found it to be what was saved."""
    try:
        state = from_json(read_bounded(path / STATE))
        if not isinstance(state, dict):
            raise ValueError("it is not a state")
    except (OSError, ValueError) as error:
        raise DamagedCheckpoint(f"{path / STATE}: {error}") from error
    return state


def list_checkpoints(checkpoints_dir: Path) -> list[Path]:
    """Every directory in `checkpoints_dir` that may be a checkpoint, lowest step first; none is verified."""
    if not checkpoints_dir.is_dir():
        return []
    found: dict[str, Path] = {}
    for path in sorted(checkpoints_dir.iterdir()):
        leftover = _LEFTOVER_NAME.fullmatch(path.name)
        # ".step-N.old-PID" sorts before "step-N", so it counts only while nothing has taken its name.
        name = leftover[1] if leftover and leftover[2] == "old" else path.name
        if _STEP_NAME.fullmatch(name) and path.is_dir():
            found[name] = path
    return sorted(found.values(), key=step_of)


def step_of(path: Path) -> int:
    """The step of a checkpoint, by its name."""
    match = _STEP_NAME.search(path.name)
    assert match is not None, f"{path} is no checkpoint's name"
    return int(match[1])


def _report_skipped(path: Path, reason: str) -> None:
    warnings.warn(f"passed over a damaged checkpoint: {reason}", stacklevel=4)


def first_intact(
    paths: Sequence[Path], use: Callable[[Path], T], on_skip: Callable[[Path, str], None] = _report_skipped
) -> T:
    """What `use` returns of the first of `paths` that it does not find damaged.

    Each that raises `DamagedCheckpoint` is passed to `on_skip` with the reason (by default a warning): going
    back further than a person expects must be seen. Where it is the only one, its own error is raised, and
    where all are damaged a `CheckpointError` that says so.
    """
    for path in paths:
        try:
            return use(path)
        except DamagedCheckpoint as error:
            if len(paths) == 1:
                raise
            on_skip(path, str(error))
    raise CheckpointError(
        f"{paths[0].parent}: none of the {len(paths)} checkpoints verifies; use a copy of one, or train anew"
    )


def find_latest(checkpoints_dir: Path, on_skip: Callable[[Path, str], None] = _report_skipped) -> Path | None:
    """The checkpoint with the highest step of which every byte verifies, or None if there is none."""
    for path in reversed(list_checkpoints(checkpoints_dir)):
        try:
            verify(path)
        except DamagedCheckpoint as error:
            on_skip(path, str(error))
        else:
            return path
    return None


def candidates(path: Path) -> list[Path]:
    """The checkpoints that `path` means, the one to be taken first; none is verified.

    A checkpoint is itself alone; a run, or a directory of checkpoints, is its checkpoints, the newest first;
    `best` in either is the one that is marked as the best. Raises `CheckpointError` if there is none.
    """
    try:
        path.stat()
    except FileNotFoundError:
        pass
    except OSError as error:  # a name that no file can have
        raise CheckpointError(f"{path}: {error.strerror}") from error
    if path.name == "best" and not path.exists():
        checkpoints_dir = _checkpoints_dir(path.parent)
        best = read_best(checkpoints_dir)
        if best is None:
            problem = "no checkpoint is marked as the best (checkpoint.keep_best does that)"
            raise CheckpointError(f"{checkpoints_dir}: {problem}")
        return [checkpoints_dir / checkpoint_name(best.step)]
    if not path.is_dir():
        raise CheckpointError(f"{path}: no such directory; give a run, or one of its checkpoints")
    if (path / MANIFEST).exists() or _STEP_NAME.fullmatch(path.name):
        return [path]
    found = list_checkpoints(_checkpoints_dir(path))
    if not found:
        raise CheckpointError(
            f"{path}: holds no complete checkpoint; a run has its first after checkpoint.every_steps steps, "
            "or when it is stopped"
        )
    return found[::-1]


def _checkpoints_dir(path: Path) -> Path:
    return path / CHECKPOINTS if (path / CHECKPOINTS).is_dir() else path


@dataclass(frozen=True)
class Best:
    """The checkpoint with the lowest validation loss of those that were evaluated while they were there."""

    step: int
    loss: float  # mean over the validation's target tokens, in nats


def mark_best(checkpoints_dir: Path, step: int, loss: float) -> bool:
    """Write best.json if the checkpoint of `step`, which must be there, has a lower loss than the one that is
    marked; returns whether it was. Raises OSError when the disk refuses, and the earlier mark stays.
    """
    try:
        best = read_best(checkpoints_dir)
    except DamagedCheckpoint:  # by the disk, for we write it whole: marking starts anew
        best = None
    there = best is not None and (checkpoints_dir / checkpoint_name(best.step)).is_dir()
    if best is not None and there and not loss < best.loss:
        return False
    replace_file(checkpoints_dir / BEST, to_json({"step": step, "val/loss": loss}))
    return True


def read_best(checkpoints_dir: Path) -> Best | None:
    """What best.json says; None where there is none. Raises `DamagedCheckpoint` if it makes no sense."""
    path = checkpoints_dir / BEST
    try:
        if path.exists() and not path.is_file():  # a pipe would keep us waiting
            raise ValueError("not a regular file")
        content = from_json(read_bounded(path))
        if not isinstance(content, dict) or content.keys() != {"step", "val/loss"}:
            raise ValueError("it does not name a step and its loss")
        step, loss = content["step"], content["val/loss"]
        if type(step) is not int or not 0 <= step < 2**63 or type(loss) is not float:
            raise ValueError(f"step {step} with loss {loss} makes no sense")
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise DamagedCheckpoint(f"{path}: {error}") from error
    return Best(step, loss)


def _encode_state(state: Mapping[str, Any]) -> bytes:
    problems = []
    for key, value in state.items():
        try:
            if not isinstance(key, str) or from_json(to_json(value)) != value:
                problems.append(f"{key!r} would not read back equal from JSON")
        except (TypeError, ValueError) as error:
            problems.append(f"{key!r}: {error}")
    if problems:
        raise CheckpointError("state that cannot be saved: " + "; ".join(problems))
    return to_json(dict(state))


def _describe_failure(error: Exception, final: Path, tensor_files: Mapping[str, Mapping[str, Tensor]]) -> str:
    needed = sum(tensor.nbytes for tensors in tensor_files.values() for tensor in tensors.values())
    reason = error.strerror or error if isinstance(error, OSError) else error
    with suppress(OSError):
        free = shutil.disk_usage(final.parent).free
        return f"could not save {final}: {reason} (it takes {_mb(needed)}, and {_mb(free)} are free)"
    return f"could not save {final}: {reason} (it takes {_mb(needed)} of disk)"


def _mb(size: int) -> str:
    return f"{size / 1e6:,.1f} MB"


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        if hasattr(os, "posix_fadvise"):  # so that the disk answers where it can, not the page cache
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        return hashlib.file_digest(file, "sha256").hexdigest()
