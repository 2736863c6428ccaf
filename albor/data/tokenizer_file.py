"""A tokenizer's file as it is, of either kind."""

from __future__ import annotations

from pathlib import Path

from albor.errors import DataError

# Bytes. The largest tokenizer.json that is published has 35 million, a SentencePiece model of 256,000 tokens
# has 5.
LARGEST = 256 * 2**20


def read_tokenizer_file(path: Path) -> bytes:
    """The content. Raises OSError, and DataError for what can be no tokenizer."""
    if path.exists() and not path.is_file():  # a device may have no end
        raise DataError("it is no regular file")
    with open(path, "rb") as file:
        content = file.read(LARGEST + 1)
    if len(content) > LARGEST:
        raise DataError(f"it is larger than the {LARGEST:,} bytes that are read")
    return content
