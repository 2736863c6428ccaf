"""From pairs of texts to rows of tokens that a model reads, and the batches that it reads them in.

The cut between context and continuation and the cutting of what is too long are lm-eval's (`TemplateLM`,
`HFLM`, 0.4.13), so that both score the same tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from albor.data.tokenizer import Tokenizer
from albor.errors import DataError

_BUCKET = 32  # lengths are rounded up to multiples of it: few shapes, little padding

Pair = tuple[str, str]


@dataclass(frozen=True)
class Part:
    """Targets that are scored together: a continuation, or a stretch of one longer than the context."""

    request: int
    row: int  # whose last positions predict them
    targets: tuple[int, ...]


@dataclass(frozen=True)
class Plan:
    """Rows of input tokens, each once however many requests read it; what is asked of them; and batches of
    parts whose rows have about the same length."""

    rows: tuple[tuple[int, ...], ...]
    parts: tuple[Part, ...]
    batches: tuple[tuple[int, ...], ...]  # indices of parts
    truncated: int  # requests whose context lost its beginning, for lack of positions
    split: int  # requests whose continuation alone is longer than the model's context


def encode_pairs(tokenizer: Tokenizer, pairs: Sequence[Pair]) -> list[tuple[list[int], list[int]]]:
    """Context and continuation of each pair in tokens, cut as lm-eval cuts them.

    A continuation's tokens are those of both together behind as many as the context has alone; white space at
    the context's end counts as the continuation's. An empty context is an end-of-document token. Raises
    DataError where no token is left of a continuation.
    """
    moved = []
    for context, continuation in pairs:
        kept = context.rstrip()
        moved.append((kept, context[len(kept) :] + continuation) if kept else (context, continuation))
    contexts = list(dict.fromkeys(context for context, _ in moved))
    alone = dict(zip(contexts, (ids.tolist() for ids in tokenizer.encode_batch(contexts)), strict=True))
    wholes = tokenizer.encode_batch([context + continuation for context, continuation in moved])
    encoded = []
    for (context, continuation), ids in zip(moved, wholes, strict=True):
        before = alone[context]
        after = ids[len(before) :].tolist()
        if not after:
            raise DataError(f"no token of {continuation!r} is left behind {context[-40:]!r}")
        encoded.append((before or [tokenizer.end_of_document_id], after))
    return encoded


def plan_requests(
    encoded: Sequence[tuple[Sequence[int], Sequence[int]]], context: int, batch_tokens: int
) -> Plan:
    """How a model with `context` positions reads these, at most `batch_tokens` at a time or one row.

    What is too long loses its beginning, so that every target is predicted from as much as there is room for.
    lm-eval refuses a continuation longer than the context; here it is scored in stretches of half a context.
    A pure function of its arguments: the batches of an evaluation that goes on are those it began with.
    """
    rows: dict[tuple[int, ...], int] = {}
    parts, truncated, split = [], 0, 0
    for request, (before, after) in enumerate(encoded):
        tokens = [*before, *after]
        stretch = len(after) if len(after) <= context else (context + 1) // 2
        split += len(after) > context
        truncated += len(tokens) > context + 1
        for end in range(len(before) + stretch, len(tokens) + stretch, stretch):
            start, end = end - stretch, min(end, len(tokens))
            row = tuple(tokens[max(0, end - context - 1) : end - 1])
            parts.append(Part(request, rows.setdefault(row, len(rows)), tuple(tokens[start:end])))
    by_row: list[list[int]] = [[] for _ in rows]
    for index, part in enumerate(parts):
        by_row[part.row].append(index)
    order = sorted(rows.items(), key=lambda entry: (-len(entry[0]), entry[0]))  # short of memory: at once
    batches = []
    for chosen in _filled([len(row) for row, _ in order], context, batch_tokens):
        batches.append(tuple(index for _, row in order[chosen] for index in by_row[row]))
    return Plan(tuple(rows), tuple(parts), tuple(batches), truncated, split)


def padded_length(length: int, context: int) -> int:
    """What rows of `length` tokens are padded to."""
    return min(context, -(-length // _BUCKET) * _BUCKET)


def _filled(lengths: Sequence[int], context: int, batch_tokens: int) -> Iterator[slice]:
    """Slices of falling `lengths` that fill a batch each."""
    start = 0
    while start < len(lengths):
        count = max(1, batch_tokens // padded_length(lengths[start], context))
        yield slice(start, start + count)
        start += count


def text_windows(ids: np.ndarray, first: int, context: int, stride: int) -> Iterator[tuple[list[int], int]]:
    """Rows of input tokens and how many targets each ends with: every one of `ids` is predicted once, from at
    least `context - stride` tokens where there are so many; the first from `first`.

    Rolling windows as lm-eval's `loglikelihood_rolling` has them, with a stride of the caller's.
    """
    tokens = [first, *ids.tolist()]
    done = 0
    while done < ids.size:
        end = min(ids.size, done + (context if done == 0 else stride))
        yield tokens[max(0, end - context) : end], end - done
        done = end
