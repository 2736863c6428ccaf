"""A GGUF file as its metadata and its tensors; the `gguf` library reads it, and knows the quantised types.

Source: the GGUF specification in ggml's docs/gguf.md.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from albor.errors import ConfigError, DataError, Problem

SUFFIX = ".gguf"


@lru_cache(maxsize=1)
def _read(path: Path, size: int, modified: int) -> Any:
    """The library's reader. It takes seconds for a vocabulary, and weights and tokenizer are in one file."""
    import gguf

    return gguf.GGUFReader(path)


class GGUFFile:
    """The file at `path`. Raises DataError where it is no GGUF or a damaged one, and ConfigError where the
    library is missing. `needed_for` is the key that asks for it.
    """

    def __init__(self, path: Path, needed_for: str):
        try:
            import gguf
        except ModuleNotFoundError as error:
            message = f"{path} needs the gguf library, which is not installed"
            raise ConfigError([Problem(needed_for, message, "run: pip install 'albor[gguf]'")]) from error
        self.path, self._library = path, gguf
        if path.exists() and not path.is_file():  # a device may have no end
            raise DataError(f"{path} is no regular file")
        try:
            status = path.stat()
            self._reader = _read(path.absolute(), status.st_size, status.st_mtime_ns)
        except OSError as error:
            raise DataError(f"{path} cannot be read: {error.strerror or error}") from error
        except Exception as error:  # whatever the library stumbles over in a file that is none
            raise DataError(f"{path} is no readable GGUF file: {error}") from error

    def get(self, key: str, default: Any = None) -> Any:
        """The metadata's value: a string, a number, a bool, or a list of them."""
        field = self._reader.fields.get(key)
        if field is None:
            return default
        try:
            return field.contents()
        except (ValueError, IndexError) as error:  # text that is not UTF-8, an array that ends too early
            raise DataError(f"{self.path}: {key} cannot be read: {error}") from error

    def need(self, key: str) -> Any:
        """`get`. Raises DataError where there is no such key."""
        value = self.get(key)
        if value is None:
            raise DataError(f"{self.path} has no {key}")
        return value

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The tensors, in the file's order, with the shapes that torch gives them."""
        # The file has the fastest dimension first.
        return {t.name: tuple(int(size) for size in reversed(t.shape)) for t in self._reader.tensors}

    def sha256(self) -> str:
        """Of the whole file, in hexadecimal; reads it once more."""
        try:
            with open(self.path, "rb") as file:
                return hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            raise DataError(f"{self.path} cannot be read: {error.strerror or error}") from error

    def tensors(self) -> Iterator[tuple[str, np.ndarray]]:
        """(name, values) of each tensor, fp32 in the shape that torch gives it, one in memory at a time.

        Raises DataError for a type that the library cannot read, as of new kinds of quantisation.
        """
        for tensor in self._reader.tensors:
            kind = tensor.tensor_type
            try:
                values = self._library.dequantize(np.asarray(tensor.data), kind)
            except (NotImplementedError, ValueError) as error:
                raise DataError(f"{self.path}: {tensor.name} is {kind.name}: {error}") from error
            yield tensor.name, np.array(values, dtype=np.float32).reshape(self.shapes[tensor.name])
