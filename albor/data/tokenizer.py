"""The tokenizer: SentencePiece BPE with byte fallback, lossless on any text.

Here a token *is* a string of bytes, and decoding is their concatenation. That makes two promises exact:
`decode(encode(text)) == text`, and the bytes of a document's tokens add up to the document's bytes, which is
what bits per byte are counted with.

SentencePiece writes a space as U+2581 and cannot tell it from a U+2581 in the text. Such characters are
encoded here as their three bytes, so that they survive.

Sources: Sennrich et al. 2016 (arXiv 1508.07909), Kudo and Richardson 2018 (arXiv 1808.06226).
"""

from __future__ import annotations

import hashlib
import heapq
import io
import itertools
import os
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece

from albor.data.sources import Document
from albor.errors import DataError

END_OF_DOCUMENT = "<|endoftext|>"
TURN_START, TURN_END = "<|im_start|>", "<|im_end|>"  # around a turn of a chat, as in ChatML
CHAT_MARKERS = (TURN_START, TURN_END)
_LARGEST_MODEL = 256 * 2**20  # bytes of a .model file; one of 256,000 tokens has 5 million
RECIPE = 2  # raised whenever training would give another model from the same text
_SPACE_MARK = "\u2581"
_MARK_RUNS = re.compile(f"({_SPACE_MARK}+)")

# Long inputs are cut at line ends: SentencePiece's time grows faster than its input, and threads share the
# parts.
_ENCODED_PART = 1 << 15
# The sample for training is drawn in parts of a few dozen lines. Lines that are longer are cut there too: the
# BPE trainer cannot address more than 65,535 characters in one word.
_TRAINING_PART = 1 << 12

# Chosen by bits per byte, not by bytes per token, which point in opposite directions here. On the Python
# library, with vocabulary 4096 and a model of 2.3M parameters after 400 steps of 2,048 tokens:
#
#     bytes per token, bits per byte                          bytes per token, bits per byte
#     lines, digits split    3.13, 2.499                      pieces over scripts    3.75, 2.688
#     lines                  3.21, 2.512                      pieces over spaces     3.82, 2.618
#     pieces over line ends  3.41, 2.593                      over both              4.23, 2.677
#
# After 1,000 steps the first two stand at 2.247 and 2.287. So a piece stays within a line, a word and a
# script, a digit is a piece of its own, and runs of spaces are pieces, as indented code needs.
_TRAINER_OPTIONS: dict[str, Any] = {
    "model_type": "bpe",
    "byte_fallback": True,
    "character_coverage": 0.9999,  # rarer characters are written in bytes and leave room for longer pieces
    "split_digits": True,
    "allow_whitespace_only_pieces": True,
    "normalization_rule_name": "identity",
    "add_dummy_prefix": False,
    "remove_extra_whitespaces": False,
    "max_sentence_length": 1 << 30,  # the default drops longer ones with no more than a log line
    "eos_id": 0,
    "eos_piece": END_OF_DOCUMENT,
    "unk_id": 1,  # SentencePiece insists on one; with byte fallback it never occurs
    "bos_id": -1,
    "pad_id": -1,
    "control_symbols": list(CHAT_MARKERS),  # ids 2 and 3: a text never yields them, however it is spelled
    "num_threads": 4,  # fixed, because the number is written into the model file
    "minloglevel": 2,
}

# Everything that a tokenizer is known to lose: doubled and leading spaces, line ends, controls, compatibility
# forms, its own marks, its own special pieces.
_PROBE = (
    "  lead\tof  two \r\n\r\n\0\x1f\x85\u00a0\u3000\u2028\ufeff\ufffd\ufffe e\u0301 \ufb01 \u2167 "
    f"\U0001f600\u200d {_SPACE_MARK} a{_SPACE_MARK}b \u2047 \u2585 "
    f"<unk> <s></s> <0x41> {END_OF_DOCUMENT} {TURN_START} {TURN_END} tail \n"
)


class Tokenizer:
    """Text to token ids and back. `model` is the SentencePiece model file's content.

    `token_bytes[i]` is the number of UTF-8 bytes that id `i` stands for: (V,) int32, 0 for control tokens.
    `special_ids` has the control tokens by name, which no text is encoded to; one that is trained here has
    `<|endoftext|>`, `<|im_start|>` and `<|im_end|>` among them, one that is given may not.
    """

    def __init__(self, model: bytes):
        if not model:
            raise ValueError("an empty model")  # SentencePiece would take it, and answer with zeros
        self.model = model
        self.sha256 = hashlib.sha256(model).hexdigest()
        self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        self.vocab_size: int = self._processor.vocab_size()
        self._token_strings = [self._bytes_of(i) for i in range(self.vocab_size)]
        self.token_bytes = np.array([len(string) for string in self._token_strings], dtype=np.int32)
        mark = _SPACE_MARK.encode()
        self._mark_ids: list[int] = [self._processor.piece_to_id(f"<0x{byte:02X}>") for byte in mark]
        self.special_ids: dict[str, int] = {
            self._processor.id_to_piece(i): i for i in range(self.vocab_size) if self._processor.is_control(i)
        }
        self.end_of_document_id = self._find_end_of_document()

    @classmethod
    def load(cls, path: Path) -> Tokenizer:
        """A SentencePiece .model file. Raises DataError unless it is lossless and can end documents."""
        try:
            if path.exists() and not path.is_file():  # a device may have no end
                raise DataError("it is no regular file")
            with open(path, "rb") as file:
                model = file.read(_LARGEST_MODEL + 1)
            if len(model) > _LARGEST_MODEL:
                raise DataError(f"it is larger than the {_LARGEST_MODEL:,} bytes that are read")
            tokenizer = cls(model)
        except OSError as error:
            raise DataError(f"tokenizer {path} cannot be read: {error.strerror}") from error
        except (RuntimeError, ValueError) as error:
            raise DataError(f"{path} is not a SentencePiece model file") from error
        except DataError as error:
            raise DataError(f"tokenizer {path}: {error}") from error
        ids, special = tokenizer.encode(_PROBE), set(tokenizer.special_ids.values())
        if tokenizer.decode_bytes(ids) != _PROBE.encode() or special & set(ids.tolist()):
            raise DataError(
                f"tokenizer {path} changes the text that it encodes (it normalises, adds a leading space, or "
                "has no byte fallback), so that bits per byte and generated text would be wrong; set "
                "tokenizer.path to null to train a lossless one"
            )
        return tokenizer

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int) -> Tokenizer:
        """A tokenizer with exactly `vocab_size` tokens; equal texts in equal order give an equal model file.

        Raises DataError where the texts are too small, or the vocabulary is, and says which size would work.
        """
        parts = (part for text in texts for part in _split(text, _TRAINING_PART) if part[0] != _SPACE_MARK)
        # Line by line, so that no piece holds a line end.
        lines = (line for part in parts for line in part.split("\n") if line)
        first = next(lines, None)
        if first is None:
            raise DataError("there is no text to train a tokenizer on; check data.sources")
        model = io.BytesIO()
        try:
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=itertools.chain([first], lines),
                model_writer=model,
                vocab_size=vocab_size,
                **_TRAINER_OPTIONS,
            )
        except RuntimeError as error:
            raise _training_error(vocab_size, str(error)) from error
        return cls(model.getvalue())

    def encode(self, text: str) -> np.ndarray:
        """The ids of `text`, (n,) int32, without an end-of-document token; text never yields that token."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """`encode` of each text, on all cores."""
        parts = [_split(text, _ENCODED_PART) for text in texts]
        flat = [part for text_parts in parts for part in text_parts]
        encoded = iter(self._processor.encode(flat, out_type=int, num_threads=os.cpu_count() or 1))
        batch = []
        for text_parts in parts:
            ids: list[int] = []
            for part in text_parts:
                part_ids = next(encoded)
                ids += self._mark_ids * len(part) if part[0] == _SPACE_MARK else part_ids
            batch.append(np.array(ids, dtype=np.int32))
        return batch

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
        return b"".join([self._token_strings[i] for i in values])

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """The text of `ids`; bytes that are no UTF-8 become U+FFFD, control tokens become nothing."""
        return self.decode_bytes(ids).decode(errors="replace")

    def is_byte(self, token: int) -> bool:
        """Whether `token` is one of the 256 tokens that spell out what no piece covers."""
        return bool(self._processor.is_byte(token))

    def _bytes_of(self, token: int) -> bytes:
        processor = self._processor
        piece: str = processor.id_to_piece(token)
        if self.is_byte(token):
            return bytes([int(piece[3:5], 16)])  # "<0x41>"
        if processor.is_control(token) or processor.is_unknown(token):
            return b""
        return piece.replace(_SPACE_MARK, " ").encode()

    def _find_end_of_document(self) -> int:
        named, eos = self.special_ids.get(END_OF_DOCUMENT), self._processor.eos_id()
        if named is not None:
            return named
        if eos >= 0 and self._processor.is_control(eos):
            return int(eos)
        raise DataError(f"it has no control token {END_OF_DOCUMENT} or </s> to end documents with")


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
    """`text` in parts of at most `limit` characters, cut at line ends where there are any; a part is either
    free of U+2581 or made of nothing else. The parts join to the text.
    """
    parts = []
    for run in _MARK_RUNS.split(text) if _SPACE_MARK in text else (text,):
        start = 0
        while len(run) - start > limit:
            end = run.rfind("\n", start, start + limit) + 1 or start + limit
            parts.append(run[start:end])
            start = end
        if start < len(run):
            parts.append(run[start:])
    return parts


def _training_error(vocab_size: int, reason: str) -> DataError:
    """SentencePiece's own complaint, in our user's words."""
    if match := re.search(r"too high .* value <= (\d+)", reason):
        return DataError(
            f"the text is too small for a vocabulary of {vocab_size}; "
            f"lower model.vocab_size to {match.group(1)} or less, or add text to data.sources"
        )
    if match := re.search(r"smaller than required_chars\. \d+ vs (\d+)", reason):
        return DataError(
            f"a vocabulary of {vocab_size} has no room for all bytes and the characters of this text; "
            f"raise model.vocab_size to {match.group(1)} or more"
        )
    return DataError(f"SentencePiece could not train a tokenizer: {reason}")
