"""Checkpoints: named tensors and a JSON state in, a verified directory out.

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
import json
import os
import re
import shutil
import stat
import warnings
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from torch import Tensor

from albor import __version__
from albor.errors import CheckpointError
from albor.manifest import MANIFEST, STATE, Manifest, to_json
from albor.tensorfile import FileRecord, TensorSpec, read_tensors_into, tensor_specs, write_tensors

CHECKPOINTS = "checkpoints"  # where a run directory keeps them

_TENSOR_SUFFIX = ".safetensors"
_FILE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")  # a plain name: no separator, no "..", not hidden
_STEP_NAME = re.compile(r"step-([1-9][0-9]{8,}|[0-9]{8})")
# `tmp` is a save or a removal that was cut short; `old` is a checkpoint that its replacement had moved aside.
_LEFTOVER_NAME = re.compile(r"\.(step-[0-9]+)\.(tmp|old)-([0-9]+)")


def checkpoint_name(step: int) -> str:
    """The directory name of the checkpoint of `step`."""
    return f"step-{step:08d}"


def save(
    checkpoints_dir: Path,
    step: int,
    tensor_files: Mapping[str, Mapping[str, Tensor]],
    state: Mapping[str, Any],
    files: Mapping[str, bytes],
    keep_last: int,
) -> Path:
    """Save the checkpoint of `step`, remove the oldest beyond `keep_last`, return the new one's directory.

    `tensor_files` maps a file's stem (`weights`) to its named tensors; `files` holds further files by name.
    `state` is JSON and must read back equal: a non-finite float, a tuple or a key that is no string is
    refused, since JSON would change it or has no word for it (use null for "none yet").

    A checkpoint of `step` that already stands there with the same content is left as it is; one that is
    damaged or different is replaced. Newer checkpoints and the one just saved are never removed. When saving
    fails, `CheckpointError` is raised, what was written is removed, and the earlier checkpoints stay.
    """
    taken = {MANIFEST, STATE, *(stem + _TENSOR_SUFFIX for stem in tensor_files)}
    for name in (*taken, *files):
        if not _FILE_NAME.fullmatch(name) or name in taken & files.keys():
            raise CheckpointError(f"{name!r} cannot be the name of a further file in a checkpoint")
    contents = {STATE: _encode_state(state), **files}
    final = checkpoints_dir / checkpoint_name(step)
    temporary = checkpoints_dir / f".{final.name}.tmp-{os.getpid()}"
    try:
        _make_directory(checkpoints_dir)
        _clear_leftovers(checkpoints_dir)
        temporary.mkdir()
        manifest = _write_contents(temporary, step, tensor_files, contents)
        if verify(temporary) != manifest:
            raise CheckpointError(f"{temporary}: the disk does not give back what was written")
        if not (final.exists() and _holds(final, manifest)):
            _commit(temporary, final)
    except OSError as error:
        raise CheckpointError(_describe_failure(error, final, tensor_files)) from error
    finally:
        with suppress(OSError):
            _clear_leftovers(checkpoints_dir)
    _prune(checkpoints_dir, step, keep_last)
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
    for name, content in contents.items():
        _write_file(directory / name, content)
        records[name] = FileRecord(len(content), hashlib.sha256(content).hexdigest())
    specs = {
        stem + _TENSOR_SUFFIX: {name: TensorSpec.of(tensor) for name, tensor in tensors.items()}
        for stem, tensors in tensor_files.items()
    }
    manifest = Manifest(step, __version__, records, specs)
    _write_file(directory / MANIFEST, manifest.to_bytes())
    _fsync_directory(directory)
    return manifest


def _commit(temporary: Path, final: Path) -> None:
    """Give the complete `temporary` its name. A directory cannot be renamed over another, so one that stands
    there moves aside first; if we die between the two renames it still counts (`list_checkpoints`)."""
    if final.exists():
        os.rename(final, final.parent / f".{final.name}.old-{os.getpid()}")
    os.rename(temporary, final)
    _fsync_directory(final.parent)


def _holds(path: Path, manifest: Manifest) -> bool:
    """Whether `path` is an undamaged checkpoint with just this content."""
    try:
        return verify(path) == manifest
    except CheckpointError:
        return False


def _prune(checkpoints_dir: Path, step: int, keep_last: int) -> None:
    """Remove the oldest checkpoints up to `step`, which is saved and verified, beyond `keep_last`."""
    saved = [path for path in list_checkpoints(checkpoints_dir) if _step_of(path) <= step]
    try:
        for path in saved[: -max(1, keep_last)]:
            _remove(path)
    except OSError as error:  # the run's state is safe, so this is no reason to stop it
        warnings.warn(f"could not remove an old checkpoint: {error}", stacklevel=3)


def _remove(path: Path) -> None:
    """Remove a checkpoint so that it is there whole or not at all, even if we die halfway."""
    doomed = path.parent / f".{checkpoint_name(_step_of(path))}.tmp-{os.getpid()}"
    os.rename(path, doomed)
    shutil.rmtree(doomed)


def _clear_leftovers(checkpoints_dir: Path) -> None:
    """Undo what saves of this process or of dead ones left behind."""
    for path in sorted(checkpoints_dir.iterdir()):
        match = _LEFTOVER_NAME.fullmatch(path.name)
        if match is None or _is_other_live_process(int(match[3])):
            continue
        if match[2] == "old" and not (checkpoints_dir / match[1]).exists():
            os.rename(path, checkpoints_dir / match[1])  # its replacement never got the name
        else:
            shutil.rmtree(path)


def _is_other_live_process(pid: int) -> bool:
    if pid == os.getpid():
        return False
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass  # it lives, and belongs to somebody else
    return True


def verify(path: Path, only: Collection[str] | None = None) -> Manifest:
    """Read every byte of the checkpoint at `path` and compare it with the manifest.

    Of files that are not in `only`, no more than the size is compared (generation does not wait for gigabytes
    of optimizer state). Raises `CheckpointError`, which names the file and what is wrong with it.
    """
    try:
        present = {entry.name: entry.stat(follow_symlinks=False) for entry in os.scandir(path)}
        if MANIFEST not in present:
            raise CheckpointError(f"{path}: there is no {MANIFEST}, so it is no complete checkpoint")
        for name, status in present.items():
            if not stat.S_ISREG(status.st_mode):
                raise CheckpointError(f"{path / name}: not a regular file, which all of a checkpoint's are")
        try:
            manifest = Manifest.from_bytes((path / MANIFEST).read_bytes())
        except (ValueError, RecursionError) as error:
            raise CheckpointError(f"{path / MANIFEST}: {error}") from error
        named = _STEP_NAME.fullmatch(path.name)
        if named and int(named[1]) != manifest.step:
            raise CheckpointError(f"{path}: this is the checkpoint of step {manifest.step}, renamed")
        for name in sorted(present.keys() - {MANIFEST} ^ manifest.files.keys()):
            # Names in `present` have no path in them, so a manifest that names one fails here, unread.
            raise CheckpointError(f"{path / name}: " + ("unexpected" if name in present else "missing"))
        for name, expected in manifest.files.items():
            if present[name].st_size != expected.size:
                raise CheckpointError(
                    f"{path / name}: has {present[name].st_size} bytes instead of {expected.size}"
                )
            if (only is None or name in only) and _sha256(path / name) != expected.sha256:
                raise CheckpointError(f"{path / name}: content differs from what was saved (SHA-256)")
        for name, specs in manifest.tensors.items():
            if tensor_specs(path / name) != specs:
                raise CheckpointError(f"{path / name}: holds other tensors than {MANIFEST} lists")
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read as a checkpoint: {error}") from error
    return manifest


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
    rounded to the given tensors' dtypes. Raises `CheckpointError` without a tensor changed if what is read is
    damaged.
    """
    wanted = {stem + _TENSOR_SUFFIX: tensors for stem, tensors in tensor_files.items()}
    manifest = verify(path, {STATE, *wanted} if partial else None)
    unread = set() if partial else manifest.tensors.keys() - wanted.keys()
    for name in sorted(unread | wanted.keys() - manifest.tensors.keys()):
        raise CheckpointError(
            f"{path / name}: " + ("holds state that would not be restored" if name in unread else "missing")
        )
    for name, tensors in wanted.items():
        read_tensors_into(path / name, tensors, convert=convert)
    state: dict[str, Any] = json.loads((path / STATE).read_bytes())
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
    return sorted(found.values(), key=_step_of)


def _step_of(path: Path) -> int:
    match = _STEP_NAME.search(path.name)
    assert match is not None
    return int(match[1])


def _report_skipped(path: Path, reason: str) -> None:
    warnings.warn(f"passed over a damaged checkpoint: {reason}", stacklevel=3)


def find_latest(
    checkpoints_dir: Path,
    on_skip: Callable[[Path, str], None] = _report_skipped,
    only: Collection[str] | None = None,
) -> Path | None:
    """The checkpoint with the highest step that verifies (`only` as in `verify`), or None if there is none.

    Each newer one that does not verify is passed to `on_skip` with the reason (by default a warning): going
    back further than a person expects must be seen.
    """
    for path in reversed(list_checkpoints(checkpoints_dir)):
        try:
            verify(path, only)
        except CheckpointError as error:
            on_skip(path, str(error))
        else:
            return path
    return None


def resolve(
    path: Path,
    on_skip: Callable[[Path, str], None] = _report_skipped,
    only: Collection[str] | None = None,
) -> Path:
    """The verified checkpoint that `path` means: a checkpoint itself, or the newest of a run or a checkpoints
    directory. Raises `CheckpointError` if there is none."""
    if not path.is_dir():
        raise CheckpointError(f"{path}: no such directory; give a run, or one of its checkpoints")
    if (path / MANIFEST).exists() or _STEP_NAME.fullmatch(path.name):
        verify(path, only)
        return path
    checkpoints_dir = path / CHECKPOINTS if (path / CHECKPOINTS).is_dir() else path
    latest = find_latest(checkpoints_dir, on_skip, only)
    if latest is None:
        raise CheckpointError(f"{path}: holds no complete checkpoint")
    return latest


def _encode_state(state: Mapping[str, Any]) -> bytes:
    problems = []
    for key, value in state.items():
        try:
            if not isinstance(key, str) or json.loads(to_json(value)) != value:
                problems.append(f"{key!r} would not read back equal from JSON")
        except (TypeError, ValueError) as error:
            problems.append(f"{key!r}: {error}")
    if problems:
        raise CheckpointError("state that cannot be saved: " + "; ".join(problems))
    return to_json(dict(state))


def _describe_failure(error: OSError, final: Path, tensor_files: Mapping[str, Mapping[str, Tensor]]) -> str:
    needed = sum(tensor.nbytes for tensors in tensor_files.values() for tensor in tensors.values())
    return (
        f"could not save {final}: {error.strerror or error} (it takes {needed / 1e6:,.1f} MB of disk); "
        "earlier checkpoints are untouched"
    )


def _write_file(path: Path, content: bytes) -> None:
    with open(path, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        if hasattr(os, "posix_fadvise"):  # so that the disk answers where it can, not the page cache
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        return hashlib.file_digest(file, "sha256").hexdigest()


def _fsync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _make_directory(path: Path) -> None:
    """Create `path` and its parents, each of them durable before anything is put into it."""
    if path.is_dir():
        return
    _make_directory(path.parent)
    path.mkdir()
    _fsync_directory(path.parent)
