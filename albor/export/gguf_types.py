"""The types that a GGUF file stores weights in, and which of them each matrix gets.

The block types quantise 32 values at a time, the K types 256 in sub-blocks (Kawrakow 2023, llama.cpp pull
request 1684). The `gguf` library computes the former; the latter are computed by llama.cpp's own code, which
`xllamacpp` carries. Norms are always in fp32: they are small, and everything goes through them.
"""

from __future__ import annotations

import ctypes
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import numpy as np

from albor.errors import AlborError


class MissingLibrary(AlborError):
    """A library that the file cannot be written without."""

    exit_code = 2

    def __init__(self, package: str, purpose: str):
        super().__init__(f"{package} is not installed, and {purpose}; run: pip install 'albor[gguf]'")


@dataclass(frozen=True)
class FileType:
    """What `--dtype` names: a type for most matrices, and better ones where a rounding costs more."""

    matrices: str  # as gguf.GGMLQuantizationType calls it
    number: int  # general.file_type, as gguf.LlamaFileType
    sensitive: str = ""  # values and the feed-forward layer's way down; empty: as the other matrices
    tokens: str = ""  # the embedding, and the output head; empty: as the other matrices

    def type_of(self, name: str) -> str:
        """The type of the tensor with this name in the Hugging Face layout."""
        if "norm" in name:
            return "F32"
        if "embed_tokens" in name or "lm_head" in name:
            return self.tokens or self.matrices
        if "v_proj" in name or "down_proj" in name:
            return self.sensitive or self.matrices
        return self.matrices

    @property
    def types(self) -> frozenset[str]:
        """All types of matrices in such a file."""
        return frozenset({self.matrices, self.sensitive or self.matrices, self.tokens or self.matrices})


# llama.cpp stores a head in Q6_K in every mix that is smaller, and in the _M ones gives about half of the
# layers Q6_K where it counts most; here all layers get it, for a small model has few. The block types' mixes
# take Q8_0 for the tokens, because theirs has no Q6_K.
FILE_TYPES = {
    "fp32": FileType("F32", 0),
    "bf16": FileType("BF16", 32),
    "fp16": FileType("F16", 1),
    "q8_0": FileType("Q8_0", 7),
    "q6_k": FileType("Q6_K", 18),
    "q5_k_m": FileType("Q5_K", 17, sensitive="Q6_K", tokens="Q6_K"),
    "q4_k_m": FileType("Q4_K", 15, sensitive="Q6_K", tokens="Q6_K"),
    "q5_1": FileType("Q5_1", 9, tokens="Q8_0"),
    "q5_0": FileType("Q5_0", 8, tokens="Q8_0"),
    "q4_1": FileType("Q4_1", 3, tokens="Q8_0"),
    "q4_0": FileType("Q4_0", 2, tokens="Q8_0"),
}
# Values of a block, and its bytes. A test holds them against the library's own table.
BLOCKS = {
    "F32": (1, 4), "F16": (1, 2), "BF16": (1, 2), "Q8_0": (32, 34), "Q5_1": (32, 24), "Q5_0": (32, 22),
    "Q4_1": (32, 20), "Q4_0": (32, 18), "Q6_K": (256, 210), "Q5_K": (256, 176), "Q4_K": (256, 144),
}  # fmt: skip


def stored_bytes(values: int, type_name: str) -> int:
    """Bytes of so many values, a multiple of the type's block."""
    block, size = BLOCKS[type_name]
    return values // block * size


def needs_llama_cpp(type_name: str) -> bool:
    """Whether llama.cpp's own code computes this type."""
    return type_name.endswith("_K")


def encode(values: np.ndarray, type_name: str) -> np.ndarray:
    """(..., columns) fp32 to the bytes of the file, (..., bytes of a row) uint8; fp32 and fp16 stay numbers.

    A row must be a whole number of blocks. Raises MissingLibrary for a K type without `xllamacpp`.
    """
    if needs_llama_cpp(type_name):
        return _encode_k(values, type_name)
    import gguf

    with np.errstate(over="ignore"):  # the caller looks for infinities
        encoded: np.ndarray = gguf.quantize(values, gguf.GGMLQuantizationType[type_name])
    return encoded


def decode(encoded: np.ndarray, type_name: str) -> np.ndarray:
    """The fp32 values that `encode` left."""
    import gguf

    values: np.ndarray = gguf.dequantize(encoded, gguf.GGMLQuantizationType[type_name])
    return values


@cache
def quantiser() -> Callable[..., int]:
    """ggml_quantize_chunk(type, values, target, first value, rows, columns, importance or null) -> bytes.

    Raises MissingLibrary where `xllamacpp` is not there, and AlborError where its build does not show the
    function to others.
    """
    if importlib.util.find_spec("xllamacpp") is None:
        raise MissingLibrary("xllamacpp", "its llama.cpp computes the K types")
    from xllamacpp import xllamacpp as extension

    try:
        function = ctypes.CDLL(extension.__file__).ggml_quantize_chunk
    except (AttributeError, OSError) as error:
        raise AlborError(
            "this build of xllamacpp does not let its ggml_quantize_chunk be called, which computes the K "
            "types; take --dtype q8_0, q5_1 or q4_1, or run llama-quantize on an fp16 export"
        ) from error
    function.restype = ctypes.c_size_t
    function.argtypes = [
        ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64, ctypes.c_int64,
        ctypes.c_void_p,
    ]  # fmt: skip
    return function


def _encode_k(values: np.ndarray, type_name: str) -> np.ndarray:
    import gguf

    values = np.ascontiguousarray(values, dtype=np.float32)
    columns = values.shape[-1]
    encoded = np.empty((*values.shape[:-1], stored_bytes(columns, type_name)), dtype=np.uint8)
    number = int(gguf.GGMLQuantizationType[type_name])
    rows = values.size // columns
    written = quantiser()(number, values.ctypes.data, encoded.ctypes.data, 0, rows, columns, None)
    if written != encoded.nbytes:
        raise AlborError(f"xllamacpp wrote {written} bytes of {type_name} where {encoded.nbytes} belong")
    return encoded
