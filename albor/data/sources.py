"""Where documents come from: files, JSON lines, Parquet, the Hugging Face hub, Python's own library.

A document that cannot be used (not UTF-8, empty, no text key, ...) never stops the reading and is never
dropped in silence: it is counted by reason, and the first names are kept, in the `SourceReport`. The order of
documents is the sorted order of their files, so that equal files give an equal stream.
"""

from __future__ import annotations

import codecs
import glob
import gzip
import json
import os
import stat
import sysconfig
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from albor.config import FilesSource, HubSource, JsonlSource, ParquetSource, PythonStdlibSource, Source
from albor.data.tables import hub_rows, parquet_rows
from albor.errors import ConfigError, DataError, Problem

NOT_UTF8 = "not UTF-8"
BINARY = "binary (contains a NUL byte)"
EMPTY = "empty"
UNREADABLE = "unreadable"
BAD_JSON = "not a JSON object"
NO_TEXT_KEY = "no text under text_key"
NOT_A_STRING = "text is not a string"
LONE_SURROGATE = "contains a lone surrogate"
NOT_LOSSLESS = "not reproduced exactly by the tokenizer"
CUT = "cut at max_bytes (the part before it is used)"

_NAMES_KEPT = 20
_BLOCK_BYTES = 1 << 18
_STDLIB_SKIPPED = frozenset({"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"})
_SUFFIXES = {
    "jsonl": (".jsonl", ".ndjson", ".json", ".jsonl.gz", ".ndjson.gz", ".json.gz"),
    "parquet": (".parquet",),
}


@dataclass(frozen=True)
class Document:
    """One text. `name` is for people: the file below its source, with `:line` where a file holds many."""

    name: str
    text: str


@dataclass(frozen=True)
class SourceFile:
    """A file of a source; `name` is its path below the source's root, in POSIX spelling."""

    name: str
    path: Path

    def status(self) -> os.stat_result | None:
        """Size, times and inode; None for what cannot be reached or is no file (a pipe would block)."""
        try:
            status = self.path.stat()
        except OSError:
            return None
        return status if stat.S_ISREG(status.st_mode) else None


@dataclass
class Skipped:
    """How many documents share a reason, and the names of the first of them."""

    count: int = 0
    names: list[str] = field(default_factory=list)


@dataclass
class SourceReport:
    """What a source gave: documents and UTF-8 bytes that are used, and what is not used and why."""

    documents: int = 0
    text_bytes: int = 0
    skipped: dict[str, Skipped] = field(default_factory=dict)

    def skip(self, reason: str, name: str) -> None:
        """Counts one document under `reason`."""
        entry = self.skipped.setdefault(reason, Skipped())
        entry.count += 1
        if len(entry.names) < _NAMES_KEPT:
            entry.names.append(name)

    def withdraw(self, document: Document, reason: str) -> None:
        """Takes back a document that was counted as used."""
        self.documents -= 1
        self.text_bytes -= len(document.text.encode())
        self.skip(reason, document.name)

    def lines(self) -> list[str]:
        """One line per reason, for the terminal."""
        return [
            f"{entry.count:,} {reason}: {', '.join(entry.names[:3])}{', ...' if entry.count > 3 else ''}"
            for reason, entry in self.skipped.items()
        ]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def from_json(value: dict[str, Any]) -> SourceReport:
        skipped = {reason: Skipped(**entry) for reason, entry in value["skipped"].items()}
        return SourceReport(value["documents"], value["text_bytes"], skipped)


def describe(source: Source) -> str:
    """The source in a few words, for messages."""
    return source.kind if isinstance(source, PythonStdlibSource) else f"{source.kind} {source.path}"


def read_documents(source: Source, report: SourceReport) -> Iterator[Document]:
    """The usable documents of `source` in a fixed order, at most `max_bytes` of UTF-8; fills `report` on the
    way.

    Raises ConfigError for a path or a column that is not there, and DataError where nothing can be read for
    another reason: a missing package, an unreachable hub.
    """
    left = source.max_bytes
    for name, text in _texts(source, report):
        if not isinstance(text, str):
            report.skip(NOT_A_STRING, name)
            continue
        if not text:
            report.skip(EMPTY, name)
            continue
        try:
            data = text.encode()
        except UnicodeEncodeError:  # "\ud800" is legal in JSON, and no text
            report.skip(LONE_SURROGATE, name)
            continue
        if left is not None and len(data) > left:
            report.skip(CUT, name)
            text = data[:left].decode(errors="ignore")  # drops the character that the limit cuts in two
            data = text.encode()
        if data:
            report.documents += 1
            report.text_bytes += len(data)
            yield Document(name, text)
        if left is not None:
            left -= len(data)
            if left <= 0 or CUT in report.skipped:
                return


def list_files(source: Source) -> list[SourceFile] | None:
    """The files that `source` reads, in reading order; None for a data set that lives on the hub.

    Hidden files and folders are left out. Raises ConfigError where the path matches nothing.
    """
    if isinstance(source, PythonStdlibSource):
        root = Path(sysconfig.get_path("stdlib"))
        files = [file for file in _walk(root, _STDLIB_SKIPPED) if file.name.endswith(".py")]
        if not files:
            raise DataError(
                f"the Python library at {root} holds no source files (some distributions ship it compiled); "
                "use a source of kind files instead, or a Python with its source"
            )
        return files
    path = Path(source.path).expanduser()
    try:
        is_directory = path.is_dir()
    except OSError as error:  # a name that no file can have
        problem = f"{source.kind} path {source.path!r} cannot be read: {error.strerror}"
        raise ConfigError([Problem("data.sources", problem, "check the spelling")]) from error
    if isinstance(source, HubSource):
        return _walk(path) if is_directory else None
    if is_directory:
        suffixes = _SUFFIXES.get(source.kind)
        files = [file for file in _walk(path) if suffixes is None or file.name.lower().endswith(suffixes)]
        wanted = f" with a name that ends in {' or '.join(suffixes)}" if suffixes else ""
    elif os.path.lexists(path):
        files, wanted = [SourceFile(path.name, path)], ""
    else:
        root = _glob_root(path)
        matches = sorted(Path(match) for match in glob.glob(str(path), recursive=True))
        files = [
            SourceFile(match.relative_to(root).as_posix(), match) for match in matches if not match.is_dir()
        ]
        wanted = ""
    if not files:
        message = f"{source.kind} path {source.path!r} matches no file{wanted}"
        remedy = f"check the spelling (relative paths start at {Path.cwd()})"
        raise ConfigError([Problem("data.sources", message, remedy)])
    return files


def _walk(root: Path, skipped_folders: frozenset[str] = frozenset()) -> list[SourceFile]:
    found: list[Path] = []

    def keep(error: OSError) -> None:
        """A folder that cannot be listed stands for what is in it, and is reported as unreadable."""
        found.append(Path(error.filename))

    for folder, subfolders, names in os.walk(root, onerror=keep):
        subfolders[:] = [
            name for name in subfolders if not name.startswith(".") and name not in skipped_folders
        ]
        found += [Path(folder, name) for name in names if not name.startswith(".")]
    return [SourceFile(path.relative_to(root).as_posix(), path) for path in sorted(found)]


def _glob_root(pattern: Path) -> Path:
    """The part of `pattern` before its first wildcard."""
    parts = pattern.parts
    magic = next((i for i, part in enumerate(parts) if glob.has_magic(part)), len(parts) - 1)
    return Path(*parts[:magic])


def _texts(source: Source, report: SourceReport) -> Iterator[tuple[str, Any]]:
    """(name, text) pairs as they stand in the source; the text is not checked yet."""
    if isinstance(source, HubSource):
        yield from hub_rows(source)
        return
    for file in list_files(source) or []:
        if file.status() is None:
            report.skip(UNREADABLE, file.name)
            continue
        try:
            match source:
                case PythonStdlibSource():
                    yield from _text_file(file, None, report)
                case FilesSource():
                    yield from _text_file(file, source.separator, report)
                case JsonlSource():
                    yield from _json_lines(file, source.text_key, report)
                case ParquetSource():
                    yield from parquet_rows(file.path, file.name, source.text_key)
        except (OSError, EOFError, zlib.error):  # the last two: a damaged .gz
            report.skip(UNREADABLE, file.name)


class _NulByte(Exception):
    """The file is no text."""


def _text_file(file: SourceFile, separator: str | None, report: SourceReport) -> Iterator[tuple[str, str]]:
    """The file's documents. Where it stops being text, those before have been given already, and stay."""
    blocks = _decoded(file.path)
    try:
        if separator is None:
            yield file.name, "".join(blocks)
            return
        # Between two separators in a row is no document.
        parts = (part for part in _split(blocks, separator) if part.strip())
        yield from ((f"{file.name} part {number}", part) for number, part in enumerate(parts, 1))
    except _NulByte:
        report.skip(BINARY, file.name)
    except UnicodeDecodeError:
        report.skip(NOT_UTF8, file.name)


def _decoded(path: Path) -> Iterator[str]:
    """The text of a UTF-8 file as it stands, line ends and all, block by block."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    with path.open("rb") as file:
        while block := file.read(_BLOCK_BYTES):
            if b"\0" in block:
                raise _NulByte
            yield decoder.decode(block)
    yield decoder.decode(b"", final=True)


def _split(blocks: Iterable[str], separator: str) -> Iterator[str]:
    """What `"".join(blocks).split(separator)` gives, with no more in memory than a block and one part."""
    held: list[str] = []  # of the part that goes on, without its tail
    tail = ""  # which may be the beginning of a separator
    for block in blocks:
        *ended, rest = (tail + block).split(separator)
        for part in ended:
            yield "".join([*held, part])
            held = []
        cut = max(len(rest) - len(separator) + 1, 0)
        held.append(rest[:cut])
        tail = rest[cut:]
    yield "".join([*held, tail])


def _json_lines(file: SourceFile, text_key: str, report: SourceReport) -> Iterator[tuple[str, Any]]:
    opener = gzip.open if file.name.lower().endswith(".gz") else open
    with opener(file.path, "rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            name = f"{file.name}:{number}"
            try:
                row = json.loads(line)
            except UnicodeDecodeError:
                report.skip(NOT_UTF8, name)
            except (ValueError, RecursionError):
                report.skip(BAD_JSON, name)
            else:
                if not isinstance(row, dict):
                    report.skip(BAD_JSON, name)
                elif text_key not in row:
                    report.skip(NO_TEXT_KEY, name)
                else:
                    yield name, row[text_key]
