"""Safetensors files, written as a stream and read into tensors that already exist.

`safetensors.torch.save_file` cannot write albor's state: it refuses tensors that are views of one storage,
which every parameter in the arena is; it never fsyncs; and it returns no hash of what it wrote. The format is
eight bytes of header length, a JSON header and the raw tensors, so it is written here. Reading is left to the
safetensors library, which checks a foreign header for sizes, overlaps and unknown types.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from albor.errors import CheckpointError

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
_CHUNK_BYTES = 4 * 2**20  # hashed and written while it is still in the processor's cache
_HEADER_ALIGNMENT = 8


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


def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor]) -> FileRecord:
    """Write `tensors` to `path` and return the size and hash of exactly the bytes that were written.

    Host tensors go to the file from where they lie; CUDA tensors are brought over one at a time. The file is
    on the disk when this returns. Equal tensors give equal bytes: nothing else is in the file.

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
    text += b" " * (-len(text) % _HEADER_ALIGNMENT)

    digest = hashlib.sha256()
    with open(path, "wb") as file:
        prefix = memoryview(len(text).to_bytes(8, "little") + text)
        for data in chain([prefix], (_memory(tensor) for _, tensor in ordered)):
            for start in range(0, len(data), _CHUNK_BYTES):
                chunk = data[start : start + _CHUNK_BYTES]
                digest.update(chunk)
                file.write(chunk)
        file.flush()
        os.fsync(file.fileno())
    return FileRecord(len(prefix) + offset, digest.hexdigest())


def _memory(tensor: torch.Tensor) -> memoryview:
    """The bytes of `tensor` in row-major order; its own memory, where that is the order they lie in."""
    return tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy().data


def tensor_specs(path: Path) -> dict[str, TensorSpec]:
    """Every tensor that the file at `path` says it holds. Raises `CheckpointError` if it cannot be read."""
    try:
        with safe_open(path, framework="pt") as file:
            slices = {name: file.get_slice(name) for name in sorted(file.keys())}
            return {name: TensorSpec(s.get_dtype(), tuple(s.get_shape())) for name, s in slices.items()}
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: not a readable safetensors file: {error}") from error


def read_tensors_into(path: Path, tensors: Mapping[str, torch.Tensor], *, convert: bool = False) -> int:
    """Fill `tensors` from the file at `path`, and return how many were filled.

    Names, shapes and dtypes must match exactly; with `convert`, values are rounded to the tensors' dtypes.
    Otherwise nothing is filled and `CheckpointError` lists every difference.
    """
    found, expected = tensor_specs(path), {name: TensorSpec.of(tensor) for name, tensor in tensors.items()}
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
    try:
        with torch.no_grad(), safe_open(path, framework="pt") as file:
            for name, tensor in tensors.items():
                tensor.copy_(file.get_tensor(name))
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: not a readable safetensors file: {error}") from error
    return len(tensors)
