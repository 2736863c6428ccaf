"""Writing: a prompt, and then token after token until something ends it."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from albor.data.tokenizer import TURN_END, Tokenizer
from albor.generate.sampler import check_settings, sample, uniform_for
from albor.generate.text_stream import TextStream
from albor.model.decode import ContextFull, Decoder

StopReason = Literal["end_of_document", "end_of_turn", "stop_string", "length", "context_full", "interrupted"]


class PromptTooLong(ContextFull):
    """The prompt alone is longer than the model's context: whoever gave it can shorten it."""

    exit_code = 2


class EndWriting(Exception):
    """Raised by `on_token`: what is written so far is the result."""


@dataclass(frozen=True)
class Settings:
    """How tokens are chosen, and what ends a text. Raises ConfigError where they mean nothing."""

    max_tokens: int
    temperature: float = 1.0  # 0: always the likeliest token
    top_k: int | None = None
    top_p: float | None = None
    stop: tuple[str, ...] = ()
    seed: int = 0

    def __post_init__(self) -> None:
        check_settings(self.temperature, self.top_k, self.top_p)
        TextStream(self.stop)  # which refuses an empty string


@dataclass(frozen=True)
class Generation:
    """What was written after a prompt."""

    text: str  # without the stop string that ended it
    tokens: tuple[int, ...]  # all that were drawn, but for a control token that ended it
    stop_reason: StopReason
    prompt_tokens: int  # with the end-of-document token in front, where there is one
    seconds: float  # for prompt and text together
    prompt_seconds: float  # until the logits of the first token
    steps: int  # tokens that were read one at a time after the prompt

    @property
    def tokens_per_second(self) -> float | None:
        """How fast was written, reading the prompt aside; None where one step was all."""
        return self.steps / (self.seconds - self.prompt_seconds) if self.steps else None


def stop_tokens(tokenizer: Tokenizer) -> dict[int, StopReason]:
    """What ends a text: the end of a document, and of a turn where the tokenizer knows turns."""
    ends: dict[int, StopReason] = {}
    if TURN_END in tokenizer.special_ids:
        ends[tokenizer.special_ids[TURN_END]] = "end_of_turn"
    return {**ends, tokenizer.end_of_document_id: "end_of_document"}


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
    """`write` after `prompt`, which is read as the beginning of a document.

    In training a document follows an end-of-document token; so an empty prompt begins a document of the
    model's own.
    """
    settings = Settings(max_tokens, temperature, top_k, top_p, tuple(stop), seed)
    prompt_ids = [tokenizer.end_of_document_id, *tokenizer.encode(prompt).tolist()]
    return write(decoder, tokenizer, prompt_ids, settings, on_text=on_text, on_token=on_token)


def write(
    decoder: Decoder,
    tokenizer: Tokenizer,
    prompt_ids: Sequence[int],
    settings: Settings,
    *,
    kept: int = 0,
    on_text: Callable[[str], None] | None = None,
    on_token: Callable[[], None] = lambda: None,
) -> Generation:
    """Goes on from the tokens `prompt_ids` as `settings` say, until a token of `stop_tokens` or they end it.

    The decoder has read the first `kept` of the prompt already, fewer than all, and forgets what it read
    after them. `on_text` gets the text in pieces as it becomes certain, and they join to the result's;
    `on_token` is called before each token, and may raise. Equal arguments give equal tokens. Raises
    PromptTooLong for a prompt that is, and NotFinite as `albor.generate.sampler.sample` does.
    """
    began = time.perf_counter()
    stream, pieces, tokens = TextStream(settings.stop), list[str](), list[int]()
    ends, vocab_size = stop_tokens(tokenizer), tokenizer.vocab_size

    def emit(piece: str) -> None:
        if piece:
            pieces.append(piece)
            if on_text is not None:
                on_text(piece)

    if len(prompt_ids) > decoder.context:
        raise PromptTooLong(
            f"the prompt has {len(prompt_ids):,} tokens, and the model's context holds {decoder.context:,} "
            "(model.max_position_embeddings); shorten the prompt"
        )
    decoder.rewind(kept)
    stop_reason: StopReason = "length"
    prompt_seconds = 0.0
    for index in range(settings.max_tokens):
        if decoder.length == decoder.context:
            stop_reason = "context_full"
            break
        try:
            on_token()
        except EndWriting:
            stop_reason = "interrupted"
            break
        if index == 0:
            logits = decoder.feed(torch.tensor(prompt_ids[kept:]))
            prompt_seconds = time.perf_counter() - began
        else:
            logits = decoder.feed_one(tokens[-1])
        # A vocabulary may be larger than its tokenizer's; nothing is written with the ids beyond.
        uniform = uniform_for(settings.seed, index) if settings.temperature else 0.0
        token = sample(logits[:vocab_size], settings.temperature, settings.top_k, settings.top_p, uniform)
        if token in ends:
            stop_reason = ends[token]
            break
        tokens.append(token)
        emit(stream.push(tokenizer.decode_bytes([token])))
        if stream.stopped:
            stop_reason = "stop_string"
            break
    emit(stream.finish())
    return Generation(
        "".join(pieces), tuple(tokens), stop_reason, len(prompt_ids),
        seconds=time.perf_counter() - began, prompt_seconds=prompt_seconds,
        steps=max(0, decoder.length - len(prompt_ids)),
    )  # fmt: skip
