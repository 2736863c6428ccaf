"""Perplexity and bits per byte of a text file, read in windows that overlap."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from albor.errors import ConfigError, DataError, Problem
from albor.evaluate.requests import padded_length, text_windows
from albor.evaluate.scorer import Scorer


@dataclass(frozen=True)
class TextScore:
    """What a model makes of a text."""

    nats: float  # of the whole text
    tokens: int
    text_bytes: int
    stride: int
    sha256: str

    @property
    def loss(self) -> float:
        """Nats per token."""
        return self.nats / self.tokens

    @property
    def perplexity(self) -> float:
        """exp(loss), which depends on the tokenizer."""
        return math.exp(self.loss) if self.loss < 700 else math.inf

    @property
    def bits_per_byte(self) -> float:
        """What compares models whatever their tokenizers."""
        return self.nats / math.log(2) / self.text_bytes


def read_text(path: Path) -> str:
    """The text of `path`. Raises DataError where it is none, or empty."""
    try:
        text = path.read_bytes().decode()
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        problem = f"byte {error.start} is not UTF-8 text; convert it, for instance with iconv"
        raise DataError(f"{path}: {problem}") from error
    if not text:
        raise DataError(f"{path} is empty: there is nothing to predict")
    return text


def score_text(
    scorer: Scorer, text: str, stride: int | None, on_window: Callable[[int, int], None]
) -> TextScore:
    """Every token of `text` is predicted once, as the beginning of a document and from at least context -
    stride tokens where there are so many; `stride` None: half the context.

    `on_window` is called with the tokens done and in all, and may raise.
    """
    context = scorer.context
    stride = stride or (context + 1) // 2
    if stride > context:
        problem = f"is {stride}, and the model's context holds {context}"
        raise ConfigError([Problem("--stride", problem, f"use 1 to {context}", "command line")])
    ids = scorer.tokenizer.encode(text)
    windows = list(text_windows(ids, scorer.tokenizer.end_of_document_id, context, stride))
    length = padded_length(context, context)
    at_a_time = max(1, scorer.batch_tokens // length)
    nats, done = 0.0, 0
    for start in range(0, len(windows), at_a_time):
        rows, counts = zip(*windows[start : start + at_a_time], strict=True)
        length = padded_length(max(map(len, rows)), context)
        wanted: list[int] = []
        for place, (row, count) in enumerate(zip(rows, counts, strict=True)):
            last = place * length + len(row)
            wanted += range(last - count, last)
        losses, _ = scorer.score_rows(rows, wanted, ids[done : done + len(wanted)])
        nats += float(losses.sum())
        done += len(wanted)
        on_window(done, ids.size)
    raw = text.encode()
    return TextScore(nats, ids.size, len(raw), stride, hashlib.sha256(raw).hexdigest())
