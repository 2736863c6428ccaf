"""Power cuts, all of them: what a program did to its files is recorded, and every state is made in which a
disk may be found after the power went at any instant of it.

The rules are those of POSIX and no more. A write is on the disk once its file was fsynced; until then any
part of it may be missing. A name that was made, moved or removed is as the program sees it once its directory
was fsynced; until then each of these may have happened or not, in any combination that can be, but a rename
is never half done. An fsync of a file says nothing of its name.

    with record(root) as log:
        save(...)
        log.mark("saved")
    replay(log, check)        # check(directory, marks) for every state; raises what `check` raises
"""

from __future__ import annotations

import builtins
import io
import itertools
import os
import shutil
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

PAGE = 4096
MOST_STATES = 5000  # of one instant; more means that the program leaves far too much unsynced

Image = dict[str, bytes | None]  # by path below the root; None: a directory


@dataclass(frozen=True)
class Operation:
    """`kind`: mkdir, create, write, fsync, rename, unlink, rmdir; or mark, which is the recorder's own."""

    kind: str
    path: str  # below the root; "." is the root itself
    target: str = ""  # of a rename
    data: bytes = b""  # of a write, which goes to the end of the file


@dataclass
class Log:
    """What happened below `root`, in order, to what lay there `before`, when `marks` had been passed."""

    root: Path
    before: Image
    marks: tuple[str, ...]
    operations: list[Operation] = field(default_factory=list)

    def mark(self, text: str) -> None:
        """From here on, checks are told of `text`."""
        self.operations.append(Operation("mark", text))

    def without(self, dropped: Callable[[Operation], bool]) -> Log:
        """As of a program that leaves out what is `dropped`."""
        kept = [operation for operation in self.operations if not dropped(operation)]
        assert len(kept) < len(self.operations), "the program never did that"
        return Log(self.root, self.before, self.marks, kept)


def image_of(root: Path) -> Image:
    """Everything below `root`."""
    paths = sorted(root.rglob("*"))
    return {str(p.relative_to(root)): None if p.is_dir() else p.read_bytes() for p in paths}


@contextmanager
def record(root: Path, *marks: str) -> Iterator[Log]:
    """Records what this process does to files below `root`, and sees to it that nothing was missed."""
    root = root.resolve()
    log = Log(root, image_of(root), marks)

    def below(path: Any, directory: int | None = None) -> str | None:
        """`path` as the log has it; None: it is none of ours."""
        if isinstance(path, int):
            path = os.readlink(f"/proc/self/fd/{path}")
        base = Path() if directory is None else Path(os.readlink(f"/proc/self/fd/{directory}"))
        absolute = Path(os.path.abspath(base / os.fsdecode(path)))
        return str(absolute.relative_to(root)) if absolute.is_relative_to(root) else None

    def recorded(kind: str) -> Any:
        original = getattr(os, kind)

        def call(path: Any, *arguments: Any, **keywords: Any) -> Any:
            name = below(path, keywords.get("dir_fd"))
            moved = below(arguments[0]) or "" if kind in ("rename", "replace") else ""
            result = original(path, *arguments, **keywords)
            if name is not None:
                log.operations.append(Operation({"replace": "rename"}.get(kind, kind), name, moved))
            return result

        return mock.patch.object(os, kind, call)

    def opened(path: Any, mode: str = "r", *arguments: Any, **keywords: Any) -> Any:
        file = unpatched(path, mode, *arguments, **keywords)
        name = None if isinstance(path, int) else below(path)
        if name is None or mode in ("r", "rb"):
            return file
        assert mode == "wb", f"{mode} is not recorded"
        log.operations.append(Operation("create", name))
        return _Written(file, name, log)

    unpatched = builtins.open
    patches = [recorded(kind) for kind in ("mkdir", "fsync", "rename", "replace", "unlink", "rmdir")]
    patches += [mock.patch.object(module, "open", opened) for module in (builtins, io)]
    try:
        for patch in patches:
            patch.start()
        yield log
    finally:
        mock.patch.stopall()
    everything = _Disk(log.before)
    for operation in log.operations:
        everything.apply(operation)
    assert everything.image() == image_of(root), "something was done that was not recorded"


class _Written:
    """A file whose writes are recorded; they are on their way as soon as they are called."""

    def __init__(self, file: Any, name: str, log: Log):
        self._file, self._name, self._log = file, name, log

    def write(self, data: Any) -> int:
        self._log.operations.append(Operation("write", self._name, data=bytes(data)))
        return self._file.write(data)  # type: ignore[no-any-return]

    def __enter__(self) -> _Written:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


@dataclass(eq=False)
class _File:
    content: bytes = b""
    pending: list[bytes] = field(default_factory=list)  # writes since the last fsync

    def variants(self) -> list[bytes]:
        """What the disk may have of it: nothing, zeros, any number of writes, a torn one, a page missing,
        all.
        """
        if not self.pending:
            return [self.content]
        ends = list(itertools.accumulate(map(len, self.pending), initial=0))
        whole = b"".join(self.pending)
        cut = {*ends, *((a + b) // 2 for a, b in itertools.pairwise(ends))}
        middle = len(whole) // 2 // PAGE * PAGE
        hole = whole[:middle] + bytes(min(PAGE, len(whole) - middle)) + whole[middle + PAGE :]
        parts = {bytes(len(whole)), hole, *(whole[:end] for end in cut)}
        return sorted(self.content + part for part in parts)


_Change = tuple[str, str, str, Any]  # kind, name, new name, what is linked


class _Directory:
    def __init__(self) -> None:
        self.entries: dict[str, _File | _Directory] = {}
        self.synced: dict[str, _File | _Directory] = {}
        self.pending: list[_Change] = []  # changes of names since the last fsync

    def change(self, change: _Change) -> None:
        self.entries = _changed(self.entries, change)
        self.pending.append(change)

    def sync(self) -> None:
        self.synced, self.pending = dict(self.entries), []

    def variants(self) -> list[dict[str, _File | _Directory]]:
        """The names that the disk may have: any of the pending changes, in their order, that are possible."""
        assert 2 ** len(self.pending) <= MOST_STATES, (
            f"{len(self.pending)} changes of one directory are unsynced"
        )
        found = []
        for count in range(len(self.pending) + 1):
            for chosen in itertools.combinations(self.pending, count):
                entries = dict(self.synced)
                try:
                    for change in chosen:
                        entries = _changed(entries, change)
                except _Impossible:
                    continue
                found.append(entries)
        return found


class _Impossible(Exception):
    """These changes cannot have happened without others."""


def _changed(entries: dict[str, Any], change: _Change) -> dict[str, Any]:
    kind, name, new, linked = change
    entries = dict(entries)
    if kind == "add":
        entries[name] = linked
        return entries
    if entries.pop(name, None) is not linked:
        raise _Impossible
    if kind == "move":
        replaced = entries.get(new)
        if isinstance(replaced, _Directory) and replaced.entries:
            raise _Impossible
        entries[new] = linked
    return entries


class _Disk:
    """Files and directories as the program sees them, and what of them is not on the disk yet."""

    def __init__(self, before: Image):
        self.root = _Directory()
        for path, content in sorted(before.items()):
            directory, name = self._place(path)
            directory.entries[name] = _Directory() if content is None else _File(content)
        self._sync_all(self.root)

    def _sync_all(self, directory: _Directory) -> None:
        directory.sync()
        for entry in directory.entries.values():
            if isinstance(entry, _Directory):
                self._sync_all(entry)

    def _find(self, path: str) -> Any:
        found: Any = self.root
        for part in Path(path).parts:
            found = found.entries[part]
        return found

    def _place(self, path: str) -> tuple[_Directory, str]:
        return self._find(str(Path(path).parent)), Path(path).name

    def apply(self, operation: Operation) -> None:
        """The program does this."""
        kind, path = operation.kind, operation.path
        if kind == "fsync":
            found = self._find(path)
            if isinstance(found, _Directory):
                found.sync()
            else:
                found.content, found.pending = found.content + b"".join(found.pending), []
        elif kind == "write":
            self._find(path).pending.append(operation.data)
        elif kind != "mark":
            directory, name = self._place(path)
            if kind in ("create", "mkdir"):
                assert name not in directory.entries, f"{path} is overwritten where it lies"
                directory.change(("add", name, "", _File() if kind == "create" else _Directory()))
            elif kind == "rename":
                assert self._find(str(Path(operation.target).parent)) is directory
                directory.change(("move", name, Path(operation.target).name, directory.entries[name]))
            else:
                directory.change(("remove", name, "", directory.entries[name]))

    def image(self) -> Image:
        """As the program sees it."""
        return next(_images(self.root, lambda d: [d.entries], lambda f: [f.content + b"".join(f.pending)]))

    def states(self) -> Iterator[Image]:
        """As the disk may be found."""
        return _images(self.root, lambda directory: directory.variants(), lambda file: file.variants())


def _images(
    directory: _Directory,
    names: Callable[[_Directory], Sequence[dict[str, Any]]],
    contents: Callable[[_File], Sequence[bytes]],
) -> Iterator[Image]:
    """Every combination of what `names` and `contents` allow below `directory`."""

    def below(name: str, entry: _File | _Directory) -> Iterator[Image]:
        if ".tmp-" in name:  # nobody looks into it, so that one state of it stands for all
            return iter([{name: b"" if isinstance(entry, _File) else None}])
        if isinstance(entry, _File):
            return ({name: content} for content in contents(entry))
        images = _images(entry, names, contents)
        return ({name: None, **{f"{name}/{path}": c for path, c in image.items()}} for image in images)

    for entries in names(directory):
        parts = [list(below(name, entry)) for name, entry in sorted(entries.items())]
        for chosen in itertools.product(*parts):
            yield {path: content for part in chosen for path, content in part.items()}


def replay(log: Log, check: Callable[[Path, Sequence[str]], None]) -> int:
    """Calls `check` with a directory in each state that a power cut may leave, and with the marks that the
    program had passed; returns how many there were. The same state under the same marks is checked once.
    """
    disk, marks = _Disk(log.before), list(log.marks)
    seen: dict[tuple[str, ...], set[int]] = defaultdict(set)
    checked = 0
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.path.isdir("/dev/shm") else None) as scratch:
        for operation in (None, *log.operations):
            if operation is not None:
                disk.apply(operation)
                if operation.kind == "mark":
                    marks.append(operation.path)
            for number, image in enumerate(disk.states()):
                assert number < MOST_STATES, f"after {operation}: too many states"
                key = hash(tuple(sorted(image.items(), key=lambda item: item[0])))
                if key in seen[tuple(marks)]:
                    continue
                seen[tuple(marks)].add(key)
                directory = Path(scratch, str(checked))
                _make(directory, image)
                try:
                    check(directory, tuple(marks))
                except BaseException as error:
                    error.add_note(
                        f"after {marks} and {_describe(operation)}, the disk has {_summary(image)}"
                    )
                    raise
                shutil.rmtree(directory)
                checked += 1
    return checked


def _make(directory: Path, image: Image) -> None:
    directory.mkdir()
    for path, content in sorted(image.items()):
        if content is None:
            (directory / path).mkdir()
        else:
            (directory / path).write_bytes(content)


def _describe(operation: Operation | None) -> str:
    if operation is None:
        return "nothing else"
    return f"{operation.kind} {operation.path} {operation.target}".strip()


def _summary(image: Image) -> list[str]:
    return [
        path if content is None else f"{path} ({len(content)})" for path, content in sorted(image.items())
    ]
