"""Safetensors files, written and read as a stream, from and into tensors that already exist.

The format is eight bytes of header length, a JSON header and the raw tensors. The safetensors library cannot
write albor's state: it refuses tensors that are views of one storage, which every parameter in the arena is;
it never fsyncs; and it returns no hash of what it wrote. It reads through a memory map, where a sector that
the disk cannot give ends the process instead of raising an error, and where what is hashed need not be what
is loaded. Here every byte passes by once: it is hashed and stored, in either direction.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import IO, Any, NamedTuple

import torch

from albor.errors import CheckpointError, DamagedCheckpoint
from albor.strictjson import LARGEST, from_json

_DTYPE_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_DTYPES = {name: dtype for dtype, name in _DTYPE_NAMES.items()}
_CHUNK_BYTES = 4 * 2**20  # hashed and written while it is still in the processor's cache
_MOST_DIMENSIONS = 16
_LENGTH_BYTES = 8  # of the header's length; the header itself is filled up to a multiple of it


@dataclass(frozen=True)
class FileRecord:
    """What a file must contain: its length in bytes and its SHA-256 in hexadecimal."""

    size: int
    sha256: str


@dataclass(frozen=True)
class TensorSpec:
    """A tensor without its data; `dtype` is the safetensors name, such as `BF16`."""

    dtype: str
    shape: tuple[int, ...]

    @classmethod
    def of(cls, tensor: torch.Tensor) -> TensorSpec:
        return cls(_DTYPE_NAMES[tensor.dtype], tuple(tensor.shape))

    def __str__(self) -> str:
        return f"{self.dtype} {list(self.shape)}"


class _Header(NamedTuple):
    """A file's beginning, byte for byte, and the tensors that follow it in the order of their data."""

    prefix: bytes
    tensors: dict[str, TensorSpec]


def write_tensors(
    path: Path, tensors: Mapping[str, torch.Tensor], on_written: Callable[[int], None] = lambda size: None
) -> FileRecord:
    """Write `tensors` to `path` and return the size and hash of exactly the bytes that were written.

    Host tensors go to the file from where they lie; of CUDA tensors a few MB at a time; `on_written` is told
    the size of each part. The file is on the disk when this returns. Equal tensors give equal bytes: nothing
    else is in the file.

    Raises `OSError` when writing fails (the partial file stays), `KeyError` for a dtype outside the format.
    """
    # Wider types first, as the safetensors library does, so that every tensor is aligned to its own size.
    ordered = sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0]))
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}  # transformers asks for this key
    offset = 0
    for name, tensor in ordered:
        spec, end = TensorSpec.of(tensor), offset + tensor.nbytes
        header[name] = {"dtype": spec.dtype, "shape": spec.shape, "data_offsets": (offset, end)}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _LENGTH_BYTES)

    digest = hashlib.sha256()
    with open(path, "wb") as file:
        prefix = memoryview(len(text).to_bytes(_LENGTH_BYTES, "little") + text)
        for chunk in chain([prefix], *(_memory(tensor) for _, tensor in ordered)):
            digest.update(chunk)
            file.write(chunk)
            on_written(len(chunk))
        file.flush()
        os.fsync(file.fileno())
    return FileRecord(len(prefix) + offset, digest.hexdigest())


def _memory(tensor: torch.Tensor) -> Iterator[memoryview]:
    """The bytes of `tensor` in row-major order, chunk by chunk; its own memory, where that is the host's and
    the order they lie in.
    """
    for chunk in tensor.detach().reshape(-1).view(torch.uint8).split(_CHUNK_BYTES):
        yield chunk.cpu().numpy().data


def _chunks(data: memoryview) -> Iterator[memoryview]:
    for start in range(0, len(data), _CHUNK_BYTES):
        yield data[start : start + _CHUNK_BYTES]


def tensor_specs(path: Path) -> dict[str, TensorSpec]:
    """Every tensor that the file at `path` says it holds. Raises `DamagedCheckpoint` if it cannot be read."""
    try:
        with open(path, "rb", buffering=0) as file:
            return _read_header(path, file).tensors
    except OSError as error:
        raise _unreadable(path, error) from error


def read_tensors_into(
    path: Path, tensors: Mapping[str, torch.Tensor], *, convert: bool = False
) -> FileRecord:
    """Fill `tensors` from the file at `path`, and return the size and hash of exactly the bytes that were
    read.

    Names, shapes and dtypes must match exactly; with `convert`, values are rounded to the tensors' dtypes.
    Otherwise nothing is filled and `CheckpointError` lists every difference. Raises `DamagedCheckpoint` where
    the file makes no sense or the disk does not give it; the tensors may then hold part of it. They are
    contiguous; one that is in the host's memory and keeps the file's dtype is read to where it lies.
    """
    try:
        with open(path, "rb", buffering=0) as file:
            header = _read_header(path, file)
            _check_fit(path, header.tensors, tensors, convert)
            digest = hashlib.sha256(header.prefix)
            size = len(header.prefix)
            staging = torch.empty(_CHUNK_BYTES, dtype=torch.uint8)
            for name, spec in header.tensors.items():
                for chunk in _store(path, file, tensors[name].detach(), _DTYPES[spec.dtype], staging):
                    digest.update(chunk)
                    size += len(chunk)
            return FileRecord(size, digest.hexdigest())
    except OSError as error:
        raise _unreadable(path, error) from error


def each_tensor(
    path: Path, on_read: Callable[[bytes | memoryview], object]
) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, tensor) of every tensor in the file at `path`, on the CPU, one in memory at a time.

    `on_read` gets the bytes of the file in their order: when the last tensor has come, all of them. Raises
    `DamagedCheckpoint` where the file makes no sense or the disk does not give it.
    """
    try:
        with open(path, "rb", buffering=0) as file:
            header = _read_header(path, file)
            on_read(header.prefix)
            for name, spec in header.tensors.items():
                tensor = torch.empty(spec.shape, dtype=_DTYPES[spec.dtype])
                for chunk in _store(path, file, tensor, tensor.dtype, tensor.new_empty(0)):
                    on_read(chunk)
                yield name, tensor
    except OSError as error:
        raise _unreadable(path, error) from error


def _store(
    path: Path, file: IO[bytes], tensor: torch.Tensor, dtype: torch.dtype, staging: torch.Tensor
) -> Iterator[memoryview]:
    """Reads `tensor` from where `file` stands, where it has `dtype`; yields the bytes as they come."""
    flat = tensor.view(-1)
    if tensor.device.type == "cpu" and tensor.dtype == dtype:
        for chunk in _chunks(flat.view(torch.uint8).numpy().data):
            _read_exactly(path, file, chunk)
            yield chunk
        return
    step = staging.numel() // dtype.itemsize
    for start in range(0, flat.numel(), step):
        target = flat[start : start + step]
        part = staging[: target.numel() * dtype.itemsize]
        _read_exactly(path, file, part.numpy().data)
        target.copy_(part.view(dtype))
        yield part.numpy().data


def _check_fit(
    path: Path, found: Mapping[str, TensorSpec], tensors: Mapping[str, torch.Tensor], convert: bool
) -> None:
    expected = {name: TensorSpec.of(tensor) for name, tensor in tensors.items()}
    if convert:
        found = {name: replace(s, dtype=expected.get(name, s).dtype) for name, s in found.items()}
    problems = [
        *(
            f"{name} is missing ({expected[name]} expected)"
            for name in sorted(expected.keys() - found.keys())
        ),
        *(f"{name} is not expected ({found[name]})" for name in sorted(found.keys() - expected.keys())),
        *(
            f"{name} is {found[name]}, expected {expected[name]}"
            for name in sorted(found.keys() & expected.keys())
            if found[name] != expected[name]
        ),
    ]
    if problems:
        raise CheckpointError("\n  ".join([f"{path} does not fit this model:", *problems]))


def _read_header(path: Path, file: IO[bytes]) -> _Header:
    """The header that `file` begins with. Its tensors fill the rest of the file, one behind the other."""
    size = os.fstat(file.fileno()).st_size
    length = bytearray(_LENGTH_BYTES)
    if size < _LENGTH_BYTES:
        raise _unreadable(path, f"{size} bytes are no header")
    _read_exactly(path, file, memoryview(length))
    count = int.from_bytes(length, "little")
    if count > min(size - _LENGTH_BYTES, LARGEST):
        raise _unreadable(path, f"a header of {count:,} bytes in a file of {size:,}")
    text = bytearray(count)
    _read_exactly(path, file, memoryview(text))
    try:
        tensors = _parse_header(bytes(text), size - _LENGTH_BYTES - count)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise _unreadable(path, f"its header: {error}") from error
    return _Header(bytes(length + text), tensors)


def _parse_header(text: bytes, data_bytes: int) -> dict[str, TensorSpec]:
    """The tensors of a header, in the order of their data. Raises for anything that is not just right."""
    content: dict[str, dict[str, Any]] = from_json(text)
    entries = []
    for name, entry in content.items():
        if name == "__metadata__":
            continue
        (start, end), shape, dtype = entry["data_offsets"], entry["shape"], entry["dtype"]
        plausible = (type(n) is int and 0 <= n < 2**63 for n in (start, end, *shape))
        if not all(plausible) or len(shape) > _MOST_DIMENSIONS:
            raise ValueError(f"{name} has a shape or a place that is none")
        if dtype not in _DTYPES:
            raise ValueError(f"{name} has the unknown dtype {dtype}")
        spec = TensorSpec(dtype, tuple(shape))
        if math.prod(spec.shape) * _DTYPES[spec.dtype].itemsize != end - start:
            raise ValueError(f"{name} is {spec}, which {end - start} bytes are not")
        entries.append((start, end, name, spec))
    entries.sort(key=lambda entry: entry[:2])
    place = 0
    for start, end, name, _ in entries:
        if start != place:
            raise ValueError(f"{name} does not begin where the tensor before it ends")
        place = end
    if place != data_bytes:
        raise ValueError(f"it describes {place:,} bytes, and {data_bytes:,} follow")
    return {name: spec for _, _, name, spec in entries}


def _read_exactly(path: Path, file: IO[bytes], target: memoryview) -> None:
    done = 0
    while done < len(target):
        count = file.readinto(target[done:])  # type: ignore[attr-defined]  # a raw file has it
        if not count:
            raise _unreadable(path, "it ends too early")
        done += count


def _unreadable(path: Path, reason: object) -> DamagedCheckpoint:
    return DamagedCheckpoint(f"{path}: not a readable safetensors file: {reason}")
