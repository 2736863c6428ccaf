"""SentencePiece BPE with byte fallback: what albor trains, and model files that were made elsewhere.

SentencePiece writes a space as U+2581 and cannot tell it from a U+2581 in the text. Such characters are
encoded here as their three bytes, so that they survive.

Sources: Sennrich et al. 2016 (arXiv 1508.07909), Kudo and Richardson 2018 (arXiv 1808.06226).
"""

from __future__ import annotations

import io
import itertools
import os
import re
from collections.abc import Iterable, Sequence
from typing import Any

import sentencepiece

from albor.errors import DataError

END_OF_DOCUMENT = "<|endoftext|>"
TURN_START, TURN_END = "<|im_start|>", "<|im_end|>"  # around a turn of a chat, as in ChatML
CHAT_MARKERS = (TURN_START, TURN_END)
RECIPE = 2  # raised whenever training would give another model from the same text
SPACE_MARK = "\u2581"
_MARK_RUNS = re.compile(f"({SPACE_MARK}+)")

# Long inputs are encoded in parts, which threads share: each ends at the first place behind so many
# characters that no piece reaches across.
_ENCODED_PART = 1 << 15

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


class SentencePieceEncoder:
    """See `albor.data.tokenizer.Encoder`. `model` is the model file's content. Raises ValueError or
    RuntimeError for one that is none, and DataError for one that has nothing to end documents with.
    """

    kind = "sentencepiece"

    def __init__(self, model: bytes):
        if not model:
            raise ValueError("an empty model")  # SentencePiece would take it, and answer with zeros
        self.model = model
        self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        tokens = range(self._processor.vocab_size())
        self.byte_ids = frozenset(token for token in tokens if self._processor.is_byte(token))
        self.special_ids = {
            self._processor.id_to_piece(token): token for token in tokens if self._processor.is_control(token)
        }
        self.strings = [self._string(token) for token in tokens]
        self.end_of_document_id = self._find_end_of_document()
        self._mark_ids: list[int] = [
            self._processor.piece_to_id(f"<0x{byte:02X}>") for byte in SPACE_MARK.encode()
        ]
        self._boundary = _boundary(self.strings)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of each text, on all cores."""
        parts = [_parts(text, self._boundary) for text in texts]
        flat = [part for text_parts in parts for part in text_parts]
        encoded = iter(self._processor.encode(flat, out_type=int, num_threads=os.cpu_count() or 1))
        batch = []
        for text_parts in parts:
            ids: list[int] = []
            for part in text_parts:
                part_ids = next(encoded)
                ids += self._mark_ids * len(part) if part[0] == SPACE_MARK else part_ids
            batch.append(ids)
        return batch

    def pieces(self) -> list[tuple[str, float]]:
        """(text, score) of the vocabulary in the order of the ids. Of two merges the one goes first whose
        result has the higher score; a space is U+2581 in it, a byte "<0x41>".
        """
        processor = self._processor
        return [(processor.id_to_piece(i), processor.get_score(i)) for i in range(len(self.strings))]

    def _string(self, token: int) -> bytes:
        processor = self._processor
        piece: str = processor.id_to_piece(token)
        if processor.is_byte(token):
            return bytes([int(piece[3:5], 16)])  # "<0x41>"
        if processor.is_control(token) or processor.is_unknown(token):
            return b""
        return piece.replace(SPACE_MARK, " ").encode()

    def _find_end_of_document(self) -> int:
        named, eos = self.special_ids.get(END_OF_DOCUMENT), self._processor.eos_id()
        if named is not None:
            return named
        if eos >= 0 and self._processor.is_control(eos):
            return int(eos)
        raise DataError(f"it has no control token {END_OF_DOCUMENT} or </s> to end documents with")


def train(parts: Iterable[str], vocab_size: int) -> bytes:
    """The model file of a tokenizer with exactly `vocab_size` tokens; equal texts in equal order give an
    equal file. `parts` are of at most a few thousand characters.

    Raises DataError where the texts are too small, or the vocabulary is, and says which size would work.
    """
    # Line by line, so that no piece holds a line end; without the mark, which would be taken for a space.
    cut = (run for part in parts for run in _MARK_RUNS.split(part) if run and run[0] != SPACE_MARK)
    lines = (line for run in cut for line in run.split("\n") if line)
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
    return model.getvalue()


def _boundary(strings: Sequence[bytes]) -> re.Pattern[str] | None:
    """Finds where a text can be cut without changing its tokens: where no piece of `strings` reaches across.

    Behind a line end, or before a space; None where this vocabulary has pieces across both.
    """
    several = [string for string in strings if len(string) > 1]
    places = []
    if not any(b"\n" in string[:-1] for string in several):
        places.append(r"(?<=\n)")
    if not any(re.search(rb"[^ ] ", string) for string in several):
        places.append(r"(?<! )(?= )")
    return re.compile("|".join(places)) if places else None


def _parts(text: str, boundary: re.Pattern[str] | None) -> list[str]:
    """`text` in parts that are encoded by themselves as they are together; each is either free of U+2581 or
    made of nothing else. The parts join to the text.
    """
    parts = []
    for run in _MARK_RUNS.split(text) if SPACE_MARK in text else (text,):
        start = 0
        while boundary and len(run) - start > _ENCODED_PART:
            cut = boundary.search(run, start + _ENCODED_PART)
            if cut is None or cut.start() >= len(run):
                break
            parts.append(run[start : cut.start()])
            start = cut.start()
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
