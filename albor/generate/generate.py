"""Writing: a prompt, and then token after token until something ends it."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from albor.data.tokenizer import Tokenizer
from albor.generate.sampler import check_settings, sample, uniform_for
from albor.generate.text_stream import TextStream
from albor.model.decode import ContextFull, Decoder

StopReason = Literal["end_of_document", "stop_string", "length", "context_full"]


class PromptTooLong(ContextFull):
    """The prompt alone is longer than the model's context: whoever gave it can shorten it."""

    exit_code = 2


@dataclass(frozen=True)
class Generation:
    """What was written after a prompt."""

    text: str  # without the stop string that ended it
    tokens: tuple[int, ...]  # all that were drawn, but for the end-of-document token
    stop_reason: StopReason
    prompt_tokens: int  # with the end-of-document token in front
    seconds: float  # for prompt and text together


def generate(
    decoder: Decoder,
    tokenizer: Tokenizer,
    prompt: str,
    *,
    max_tokens: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    stop: Sequence[str] = (),
    seed: int = 0,
    on_text: Callable[[str], None] | None = None,
    on_token: Callable[[], None] = lambda: None,
) -> Generation:
    """Goes on from `prompt` for at most `max_tokens` tokens, chosen as `albor.generate.sampler.sample` does.

    The prompt is read as the beginning of a document, which in training follows an end-of-document token; so
    an empty one begins a document of the model's own. `on_text` gets the text in pieces as it becomes
    certain, and they join to the result's; `on_token` is called before each token, and may raise. Equal
    arguments give equal tokens. Raises PromptTooLong for a prompt that is, and ConfigError for settings that
    mean nothing.
    """
    began = time.perf_counter()
    check_settings(temperature, top_k, top_p)
    stream, pieces, tokens = TextStream(stop), list[str](), list[int]()

    def emit(piece: str) -> None:
        if piece:
            pieces.append(piece)
            if on_text is not None:
                on_text(piece)

    prompt_ids = [tokenizer.end_of_document_id, *tokenizer.encode(prompt).tolist()]
    if len(prompt_ids) > decoder.context:
        raise PromptTooLong(
            f"the prompt has {len(prompt_ids):,} tokens, and the model's context holds {decoder.context:,} "
            "(model.max_position_embeddings); shorten the prompt"
        )
    decoder.reset()
    unread = prompt_ids
    stop_reason: StopReason = "length"
    for index in range(max_tokens):
        if decoder.length + len(unread) > decoder.context:
            stop_reason = "context_full"
            break
        on_token()
        logits = decoder.feed(torch.tensor(unread))
        # A vocabulary may be larger than its tokenizer's; nothing is written with the ids beyond.
        logits = logits[: tokenizer.vocab_size]
        token = sample(logits, temperature, top_k, top_p, uniform_for(seed, index))
        if token == tokenizer.end_of_document_id:
            stop_reason = "end_of_document"
            break
        tokens.append(token)
        emit(stream.push(tokenizer.decode_bytes([token])))
        if stream.stopped:
            stop_reason = "stop_string"
            break
        unread = [token]
    emit(stream.finish())
    seconds = time.perf_counter() - began
    return Generation("".join(pieces), tuple(tokens), stop_reason, len(prompt_ids), seconds)
