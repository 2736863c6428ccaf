"""Token shards: documents as `.npy` arrays of ids with a manifest, and the stream that reads them as one.

    manifest.json       format, dtype, vocabulary, tokenizer, counts; SHA-256 and length of every file below
    tokens-00000.npy    (n,) uint16 or uint32: every document's ids, each followed by the end-of-document id
    documents.npy       (documents + 1,) int64: where each document starts in the stream, and the stream's end

Ids are checked against the vocabulary before they are narrowed to the file's dtype, and again when they are
read, so an id that wrapped around, or that the embedding has no row for, cannot reach a model.
"""

from __future__ import annotations

import bisect
import hashlib
import json
import os
import time
import warnings
import weakref
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal

import numpy as np

from albor import faults
from albor.data.cache import file_sha256
from albor.errors import DataError
from albor.strictjson import from_json, read_bounded

FORMAT = 1
SHARD_TOKENS = 100_000_000
_MANIFEST = "manifest.json"
_DOCUMENTS = "documents.npy"
_READ_PAUSES = (0.1, 0.4, 1.0)  # seconds before a read that failed is tried again
_SCANNED_TOKENS = 1 << 24  # tokens that a check of a whole shard looks at in one go


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """The narrowest unsigned dtype that holds every id of the vocabulary."""
    return np.dtype(np.uint16 if vocab_size <= 1 << 16 else np.uint32)


def shard_name(number: int) -> str:
    """The file of a stream's shard `number`, counted from 0."""
    return f"tokens-{number:05d}.npy"


class ShardWriter:
    """Writes one stream into an empty directory; without `close` there is no manifest, and so no stream."""

    def __init__(
        self, directory: Path, vocab_size: int, tokenizer_sha256: str, shard_tokens: int = SHARD_TOKENS
    ):
        self._directory = directory
        self._vocab_size = vocab_size
        self._tokenizer_sha256 = tokenizer_sha256
        self._shard_tokens = shard_tokens
        self._dtype = token_dtype(vocab_size)
        self._shards: list[dict[str, Any]] = []
        self._file: IO[bytes] | None = None
        self._in_shard = 0
        self._documents = array("q", [0])
        self._text_bytes = 0
        directory.mkdir(parents=True, exist_ok=True)

    def add(self, ids: np.ndarray, text_bytes: int) -> None:
        """Appends one document: its ids with the end-of-document id, (n,) of any integer dtype."""
        if ids.ndim != 1 or ids.dtype.kind not in "iu":
            raise DataError(f"token ids must be a vector of integers, not {ids.dtype} of shape {ids.shape}")
        if ids.size and (ids.min() < 0 or ids.max() >= self._vocab_size):
            raise DataError(
                f"token ids from {ids.min()} to {ids.max()} do not fit a vocabulary of {self._vocab_size}"
            )
        faults.reach("shard.write")
        narrow = ids.astype(self._dtype)
        start = 0
        while start < len(narrow):
            if self._file is None:
                self._file = open(self._path(len(self._shards)), "wb")  # noqa: SIM115 (it outlives this call)
                self._write_header(self._file, self._shard_tokens)
            taken = narrow[start : start + self._shard_tokens - self._in_shard]
            self._file.write(taken.tobytes())
            self._in_shard += len(taken)
            start += len(taken)
            if self._in_shard == self._shard_tokens:
                self._finish_shard()
        self._documents.append(self._documents[-1] + len(narrow))
        self._text_bytes += text_bytes

    def close(self) -> None:
        """Completes the stream; the manifest comes last."""
        if self._file is not None:
            self._finish_shard()
        documents_path = self._directory / _DOCUMENTS
        np.save(documents_path, np.array(self._documents, dtype=np.int64))
        manifest = {
            "format": FORMAT,
            "dtype": self._dtype.name,
            "vocab_size": self._vocab_size,
            "tokenizer_sha256": self._tokenizer_sha256,
            "documents": len(self._documents) - 1,
            "documents_sha256": file_sha256(documents_path),
            "text_bytes": self._text_bytes,
            "tokens": self._documents[-1],
            "shards": self._shards,
        }
        (self._directory / _MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")

    def _path(self, number: int) -> Path:
        return self._directory / shard_name(number)

    def _write_header(self, file: IO[bytes], tokens: int) -> None:
        # NumPy pads the header so that a longer first axis still fits: rewriting it with the true length is
        # safe.
        header = {"descr": self._dtype.newbyteorder("<").str, "fortran_order": False, "shape": (tokens,)}
        np.lib.format.write_array_header_1_0(file, header)

    def _finish_shard(self) -> None:
        assert self._file is not None
        self._file.seek(0)
        self._write_header(self._file, self._in_shard)
        self._file.close()
        self._file = None
        path = self._path(len(self._shards))
        self._shards.append({"file": path.name, "tokens": self._in_shard, "sha256": file_sha256(path)})
        self._in_shard = 0


class _Shard:
    """A token file, held open and read in pieces. It is not mapped: a mapped file that the disk fails to
    give, or that somebody cuts off, ends the process by SIGBUS; a read says what is wrong.
    """

    def __init__(self, path: Path, sha256: str, dtype: np.dtype[Any], tokens: int):
        """Raises DataError unless the file holds just `tokens` values of `dtype`."""
        self.path, self.sha256, self._dtype, self._tokens = path, sha256, dtype, tokens
        self._start = _header_bytes(path, dtype, tokens)
        try:
            self._file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise DataError(f"{path} cannot be read: {error.strerror}; {_REMEDY}") from error
        weakref.finalize(self, os.close, self._file)

    def __len__(self) -> int:
        return self._tokens

    def read(self, start: int, count: int) -> np.ndarray:
        """Tokens `start` to `start + count` of the shard. Raises DataError where the file no longer gives
        them.
        """
        size, position = count * self._dtype.itemsize, self._start + start * self._dtype.itemsize
        content = b""
        while len(content) < size:
            try:
                part = self._pread(size - len(content), position + len(content))
            except OSError as error:
                raise DataError(f"{self.path} cannot be read: {error.strerror}; {_MEND}") from error
            if not part:
                raise DataError(f"{self.path} became shorter while it was in use; {_MEND}")
            content += part
        return np.frombuffer(content, dtype=self._dtype)

    def _pread(self, size: int, position: int) -> bytes:
        """At most `size` bytes at `position`. A disk that fails is asked again, for a network disk or a cable
        may be gone for a moment; that it was is a warning.
        """
        pauses, failed = iter(_READ_PAUSES), None
        while True:
            try:
                content = os.pread(self._file, size, position)
            except OSError as error:
                pause = next(pauses, None)
                if pause is None:
                    raise
                failed = error.strerror
                time.sleep(pause)
            else:
                if failed:
                    warnings.warn(f"{self.path} could not be read at first ({failed})", stacklevel=1)
                return content


@dataclass(frozen=True)
class TokenStream:
    """The tokens of one or more shard directories as one long vector, read from open files."""

    vocab_size: int
    tokenizer_sha256: str
    text_bytes: int
    document_offsets: np.ndarray  # (documents + 1,) int64
    _shards: tuple[_Shard, ...]
    _ends: tuple[int, ...]  # where each shard ends in the stream

    @staticmethod
    def open(directory: Path, verify: Literal["hash", "size"] = "hash") -> TokenStream:
        """The stream in `directory`. Lengths are always verified; "hash" also reads every file once, compares
        its SHA-256 and checks every id. Raises DataError that names the file which is not what was written.
        """
        manifest = _read_manifest(directory)
        dtype = token_dtype(manifest["vocab_size"])
        if manifest.get("dtype") != dtype.name:
            raise DataError(f"{directory / _MANIFEST} names dtype {manifest.get('dtype')}, not {dtype.name}")
        shards = tuple(
            _Shard(directory / entry["file"], entry["sha256"], dtype, entry["tokens"])
            for entry in manifest["shards"]
        )
        documents_path = directory / _DOCUMENTS
        offsets = _read_vector(documents_path, np.dtype(np.int64), manifest["documents"] + 1)
        if verify == "hash":
            _verify_hash(documents_path, manifest["documents_sha256"])
            for shard in shards:
                _verify_hash(shard.path, shard.sha256)
                for start in range(0, len(shard), _SCANNED_TOKENS):
                    part = shard.read(start, min(_SCANNED_TOKENS, len(shard) - start))
                    _verify_ids(part, manifest["vocab_size"], shard.path)
        stream = TokenStream._over(
            shards, manifest["vocab_size"], manifest["tokenizer_sha256"], manifest["text_bytes"], offsets
        )
        if len(stream) != manifest["tokens"] or offsets[-1] != len(stream):
            raise DataError(f"{directory / _MANIFEST} does not agree with its shards' lengths; {_REMEDY}")
        if offsets[0] != 0 or (np.diff(offsets) < 0).any():
            raise DataError(f"{documents_path} does not hold the starts of documents; {_REMEDY}")
        return stream

    @staticmethod
    def join(streams: Sequence[TokenStream]) -> TokenStream:
        """The streams one after the other; they must come from the same tokenizer."""
        first = streams[0]
        if any(stream.tokenizer_sha256 != first.tokenizer_sha256 for stream in streams):
            raise DataError("token streams of different tokenizers cannot be joined")
        starts = np.cumsum([0] + [len(stream) for stream in streams])
        offsets = [
            stream.document_offsets[:-1] + start for stream, start in zip(streams, starts, strict=False)
        ]
        return TokenStream._over(
            tuple(shard for stream in streams for shard in stream._shards),
            first.vocab_size,
            first.tokenizer_sha256,
            sum(stream.text_bytes for stream in streams),
            np.concatenate([*offsets, starts[-1:]]),
        )

    @staticmethod
    def _over(
        shards: tuple[_Shard, ...], vocab_size: int, tokenizer: str, text_bytes: int, offsets: np.ndarray
    ) -> TokenStream:
        ends = np.cumsum([len(shard) for shard in shards], dtype=np.int64)
        return TokenStream(vocab_size, tokenizer, text_bytes, offsets, shards, tuple(ends.tolist()))

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    @property
    def documents(self) -> int:
        return len(self.document_offsets) - 1

    @property
    def sha256(self) -> str:
        """Names the content: equal for equal shards in equal order, wherever they lie."""
        return hashlib.sha256("".join(shard.sha256 for shard in self._shards).encode()).hexdigest()

    def read(self, start: int, count: int) -> np.ndarray:
        """Tokens `start` to `start + count`, (count,) in the file's dtype, across shard borders."""
        if start < 0 or count < 0 or start + count > len(self):
            raise IndexError(f"tokens {start} to {start + count} of a stream of {len(self)}")
        parts = []
        index = bisect.bisect_right(self._ends, start)
        while count:
            shard = self._shards[index]
            offset = start - (self._ends[index] - len(shard))
            part = shard.read(offset, min(count, len(shard) - offset))
            _verify_ids(part, self.vocab_size, shard.path)
            parts.append(part)
            start, count, index = start + len(part), count - len(part), index + 1
        if len(parts) == 1:
            return parts[0]
        return np.concatenate(parts) if parts else np.empty(0, dtype=token_dtype(self.vocab_size))


_REMEDY = "remove the directory and prepare the data again"
_MEND = f"mend the disk, or {_REMEDY}; the same command then goes on from the last checkpoint"


def _read_manifest(directory: Path) -> dict[str, Any]:
    path = directory / _MANIFEST
    try:
        manifest = from_json(read_bounded(path))
    except FileNotFoundError as error:
        raise DataError(f"{directory} holds no token shards: {_MANIFEST} is missing") from error
    except ValueError as error:
        raise DataError(f"{path} is damaged ({error}); {_REMEDY}") from error
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        found = manifest.get("format") if isinstance(manifest, dict) else None
        raise DataError(f"{path} has format {found}, this albor reads format {FORMAT}; {_REMEDY}")
    counts = ("vocab_size", "documents", "text_bytes", "tokens")
    entries = manifest.get("shards")
    if (
        not all(_is_count(manifest.get(key)) for key in counts)
        or not all(isinstance(manifest.get(key), str) for key in ("tokenizer_sha256", "documents_sha256"))
        or not isinstance(entries, list)
        # No path out of the directory, no file twice, and none of the stream's in another's place.
        or [isinstance(entry, dict) and entry.get("file") for entry in entries]
        != [shard_name(number) for number in range(len(entries))]
        or not all(
            _is_count(entry.get("tokens")) and isinstance(entry.get("sha256"), str) for entry in entries
        )
    ):
        raise DataError(f"{path} is not what was written; {_REMEDY}")
    return manifest


def _is_count(value: Any) -> bool:
    return type(value) is int and value >= 0


def _header_bytes(path: Path, dtype: np.dtype[Any], length: int) -> int:
    """Where the values begin in a `.npy` file that holds `length` of `dtype`, and nothing else."""
    try:
        size = path.stat().st_size
        if not path.is_file():
            raise ValueError("it is no regular file")
        with open(path, "rb") as file:
            # The only version that NumPy or we write for these; its header has 64 KiB at most.
            if np.lib.format.read_magic(file) != (1, 0):
                raise ValueError("its version is not 1.0")
            shape, _, found = np.lib.format.read_array_header_1_0(file)
            start = file.tell()
    except FileNotFoundError as error:
        raise DataError(f"{path} is missing; {_REMEDY}") from error
    except Exception as error:  # NumPy evaluates the header as Python, and raises what Python's parser does
        reason = str(error).partition("\n")[0][:200] or type(error).__name__
        raise DataError(f"{path} is damaged ({reason}); {_REMEDY}") from error
    if found != dtype:
        raise DataError(f"{path} holds {found}, expected {dtype}; {_REMEDY}")
    if shape != (length,) or size != start + length * dtype.itemsize:
        raise DataError(f"{path} holds {shape} values in {size} bytes, expected {length}; {_REMEDY}")
    return start


def _read_vector(path: Path, dtype: np.dtype[Any], length: int) -> np.ndarray:
    """The vector in a `.npy` file, if the file holds exactly that. Not mapped: a page of a mapped file that
    the disk does not give any more ends the process by a signal.
    """
    start = _header_bytes(path, dtype, length)
    try:
        values = np.fromfile(path, dtype, length, offset=start)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}; {_MEND}") from error
    if len(values) != length:
        raise DataError(f"{path} is damaged (it ends after {len(values)} of {length} values); {_REMEDY}")
    return values


def _verify_hash(path: Path, sha256: str) -> None:
    try:
        found = file_sha256(path)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}; {_MEND}") from error
    if found != sha256:
        raise DataError(f"{path} is not the file that was written (its SHA-256 differs); {_REMEDY}")


def _verify_ids(ids: np.ndarray, vocab_size: int, path: Path) -> None:
    if ids.size and ids.max() >= vocab_size:
        raise DataError(
            f"{path} holds token id {ids.max()}, the vocabulary ends at {vocab_size - 1}; {_REMEDY}"
        )
