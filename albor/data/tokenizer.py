"""The tokenizer: one interface over SentencePiece's and Hugging Face's, lossless on any text.

Here a token *is* a string of bytes, and decoding is their concatenation. That makes two promises exact:
`decode(encode(text)) == text`, and the bytes of a document's tokens add up to the document's bytes, which is
what bits per byte are counted with.
"""

from __future__ import annotations

import hashlib
import heapq
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np

from albor.data.hf_encoder import HuggingFaceEncoder, read_tokenizer_json
from albor.data.sentencepiece_encoder import (
    CHAT_MARKERS,
    END_OF_DOCUMENT,
    SPACE_MARK,
    TURN_END,
    TURN_START,
    SentencePieceEncoder,
    train,
)
from albor.data.sources import Document
from albor.data.tokenizer_file import read_tokenizer_file
from albor.errors import DataError

Kind = Literal["sentencepiece", "hf"]
FILES: dict[Kind, str] = {"sentencepiece": "tokenizer.model", "hf": "tokenizer.json"}  # in a checkpoint
# A sample for training is drawn in parts of a few dozen lines. Lines that are longer are cut there too: the
# BPE trainer cannot address more than 65,535 characters in one word.
_TRAINING_PART = 1 << 12

# Everything that a tokenizer is known to lose: doubled and leading spaces, line ends, controls, compatibility
# forms, its own marks, its own special pieces.
_PROBE = (
    "  lead\tof  two \r\n\r\n\0\x1f\x85\u00a0\u3000\u2028\ufeff\ufffd\ufffe e\u0301 \ufb01 \u2167 "
    f"\U0001f600\u200d {SPACE_MARK} a{SPACE_MARK}b \u2047 \u2585 "
    f"<unk> <s></s> <0x41> {END_OF_DOCUMENT} {TURN_START} {TURN_END} tail \n"
)


class Encoder(Protocol):
    """What knows a vocabulary, and cuts texts into its tokens."""

    kind: str
    model: bytes  # the content of the file that it is made from
    strings: list[bytes]  # what each id stands for; nothing for control tokens
    byte_ids: frozenset[int]  # those that spell out, byte by byte, what no longer token covers
    special_ids: dict[str, int]  # the control tokens by name; no text is encoded to them
    end_of_document_id: int

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of each text."""


class Tokenizer:
    """Text to token ids and back. `model` is the content of a file of `kind`.

    `token_bytes[i]` is the number of UTF-8 bytes that id `i` stands for: (V,) int32, 0 for control tokens.
    `special_ids` has the control tokens by name, which no text is encoded to; one that is trained here has
    `<|endoftext|>`, `<|im_start|>` and `<|im_end|>` among them, one that is given may not.
    """

    def __init__(self, model: bytes, kind: Kind = "sentencepiece"):
        self.kind, self.model = kind, model
        self.sha256 = hashlib.sha256(model).hexdigest()
        self.encoder: Encoder
        if kind == "hf":
            self.encoder = HuggingFaceEncoder(model)
        else:
            self.encoder = SentencePieceEncoder(model)
        self._strings = self.encoder.strings
        self.vocab_size = len(self._strings)
        self.token_bytes = np.array([len(string) for string in self._strings], dtype=np.int32)
        self.special_ids = self.encoder.special_ids
        self.end_of_document_id = self.encoder.end_of_document_id

    @property
    def file_name(self) -> str:
        """What its file is called in a checkpoint."""
        return FILES[self.kind]

    @classmethod
    def load(cls, path: Path, kind: Kind = "sentencepiece") -> Tokenizer:
        """A SentencePiece .model file; for `hf` a tokenizer.json, a directory with one, or a GGUF.

        Raises DataError unless it is lossless and can end documents, and ConfigError where a library is
        missing that it needs.
        """
        try:
            read = read_tokenizer_file if kind == "sentencepiece" else read_tokenizer_json
            tokenizer = cls(read(path), kind)
        except OSError as error:
            raise DataError(f"tokenizer {path} cannot be read: {error.strerror}") from error
        except (RuntimeError, ValueError) as error:
            expected = "SentencePiece model" if kind == "sentencepiece" else FILES["hf"]
            hint = "; tokenizer.kind would be hf" if kind == "sentencepiece" and _is_hf(path) else ""
            raise DataError(f"{path} is not a {expected} file{hint}") from error
        except DataError as error:
            raise DataError(f"tokenizer {path}: {error}") from error
        tokenizer._check_lossless(path)
        return tokenizer

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int) -> Tokenizer:
        """A tokenizer with exactly `vocab_size` tokens; equal texts in equal order give an equal model file.

        Raises DataError where the texts are too small, or the vocabulary is, and says which size would work.
        """
        return cls(train((part for text in texts for part in _split(text, _TRAINING_PART)), vocab_size))

    def encode(self, text: str) -> np.ndarray:
        """The ids of `text`, (n,) int32, without an end-of-document token; text never yields that token."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """`encode` of each text, on all cores."""
        return [np.array(ids, dtype=np.int32) for ids in self.encoder.encode_batch(texts)]

    @property
    def can_chat(self) -> bool:
        """Whether both markers of a chat's turns are control tokens of it."""
        return all(marker in self.special_ids for marker in CHAT_MARKERS)

    def end_document(self, ids: np.ndarray) -> np.ndarray:
        """`ids` with the end-of-document token behind them."""
        return np.append(ids, np.int32(self.end_of_document_id))

    def decode_bytes(self, ids: Sequence[int] | np.ndarray) -> bytes:
        """The bytes that `ids` stand for; a text that is still being generated may end inside a character."""
        values = ids.tolist() if isinstance(ids, np.ndarray) else ids
        return b"".join([self._strings[i] for i in values])

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """The text of `ids`; bytes that are no UTF-8 become U+FFFD, control tokens become nothing."""
        return self.decode_bytes(ids).decode(errors="replace")

    def is_byte(self, token: int) -> bool:
        """Whether `token` is one of those that spell out, byte by byte, what no longer one covers."""
        return token in self.encoder.byte_ids

    def _check_lossless(self, path: Path) -> None:
        """Raises DataError where `_PROBE` does not come back, or a text yields a control token."""
        pieces = self.encoder.added if isinstance(self.encoder, HuggingFaceEncoder) else ()
        probe = _PROBE + " ".join([*self.special_ids, *pieces])
        # Some put a space in front only where there is none.
        if all(self._keeps(text) for text in (probe, probe.strip())):
            return
        raise DataError(
            f"tokenizer {path} changes the text that it encodes (it normalises, adds a leading space, or has "
            "no byte fallback), so that bits per byte and generated text would be wrong; "
            + ("" if self.kind == "sentencepiece" else "set tokenizer.kind to sentencepiece and ")
            + "set tokenizer.path to null to train a lossless one"
        )

    def _keeps(self, text: str) -> bool:
        """Whether `text` comes back from its tokens, none of which is a control token."""
        ids = self.encode(text)
        return self.decode_bytes(ids) == text.encode() and set(self.special_ids.values()).isdisjoint(
            ids.tolist()
        )


def _is_hf(path: Path) -> bool:
    return path.suffix in (".json", ".gguf")


def sample_text(documents: Iterable[Document], sample_bytes: int) -> list[str]:
    """At most `sample_bytes` of the documents' text, in parts drawn evenly over all of it, in their order.

    Each part gets a rank that is a hash of its number, and the lowest ranks that fit are kept: one pass, no
    more memory than the sample, the same parts every time.
    """
    kept: list[tuple[int, int, str]] = []  # a heap with the highest rank first
    size = 0
    parts = (part for document in documents for part in _split(document.text, _TRAINING_PART))
    for number, part in enumerate(parts):
        rank = int.from_bytes(hashlib.blake2b(number.to_bytes(8, "little"), digest_size=8).digest(), "little")
        heapq.heappush(kept, (-rank, number, part))
        size += len(part.encode())
        while size > sample_bytes:
            size -= len(heapq.heappop(kept)[2].encode())
    return [part for _, _, part in sorted(kept, key=lambda entry: entry[1])]


def inspect(tokenizer: Tokenizer, texts: Iterable[str]) -> dict[str, Any]:
    """What the tokenizer makes of `texts`: bytes per token, use of the vocabulary, its longest pieces."""
    uses: Counter[int] = Counter()
    documents = text_bytes = 0
    for text in texts:
        uses.update(tokenizer.encode(text).tolist())
        documents += 1
        text_bytes += len(text.encode())
    tokens = uses.total()
    by_length = sorted(range(tokenizer.vocab_size), key=lambda token: (-tokenizer.token_bytes[token], token))
    single_bytes = sum(n for token, n in uses.items() if tokenizer.is_byte(token))
    return {
        "vocab_size": tokenizer.vocab_size,
        "sha256": tokenizer.sha256,
        "end_of_document_id": tokenizer.end_of_document_id,
        "documents": documents,
        "text_bytes": text_bytes,
        "tokens": tokens,
        "bytes_per_token": text_bytes / tokens if tokens else None,
        "byte_fallback_share": single_bytes / tokens if tokens else None,
        "tokens_used": len(uses),
        "longest": [tokenizer.decode([token]) for token in by_length[:20]],
        "most_frequent": [tokenizer.decode([token]) for token, _ in uses.most_common(20)],
    }


def _split(text: str, limit: int) -> list[str]:
    """`text` in parts of at most `limit` characters, cut at line ends where there are any."""
    parts = []
    start = 0
    while len(text) - start > limit:
        end = text.rfind("\n", start, start + limit) + 1 or start + limit
        parts.append(text[start:end])
        start = end
    if start < len(text):
        parts.append(text[start:])
    return parts
