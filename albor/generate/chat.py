"""A conversation: turns as a chat model reads them, in ChatML, and a history that stays within the context.

The markers are control tokens. What is said in a turn is text and never yields one, however it is spelled, so
nobody can end a turn, or begin another's, by writing a marker.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from albor.data.tokenizer import CHAT_MARKERS, TURN_END, TURN_START, Tokenizer
from albor.errors import AlborError
from albor.generate.generate import Generation, PromptTooLong, Settings, write
from albor.model.decode import Decoder
from albor.seeds import derive_seed

Role = Literal["system", "user", "assistant"]


class CannotChat(AlborError):
    """The model's tokenizer has no markers for the turns of a chat."""

    exit_code = 2


@dataclass(frozen=True)
class Turn:
    """What one side said."""

    role: Role
    content: str


def render(turns: Sequence[Turn]) -> str:
    """The turns and the beginning of the answer as text: what albor/export/chat_template.jinja makes of them
    with `add_generation_prompt`.
    """
    said = (f"{TURN_START}{turn.role}\n{turn.content}{TURN_END}\n" for turn in turns)
    return "".join([*said, f"{TURN_START}assistant\n"])


def encode(tokenizer: Tokenizer, turns: Sequence[Turn]) -> list[int]:
    """The tokens of `render`, each marker a single one. Raises CannotChat for a tokenizer without them."""
    check_can_chat(tokenizer)
    start, end = (tokenizer.special_ids[marker] for marker in CHAT_MARKERS)
    texts = [*(f"{turn.role}\n{turn.content}" for turn in turns), "\n", "assistant\n"]
    *said, line_end, answer = (ids.tolist() for ids in tokenizer.encode_batch(texts))
    return [token for ids in said for token in (start, *ids, end, *line_end)] + [start, *answer]


def check_can_chat(tokenizer: Tokenizer) -> None:
    """Raises CannotChat unless both markers are control tokens of `tokenizer`."""
    if not tokenizer.can_chat:
        raise CannotChat(
            f"the model's tokenizer has no tokens {' and '.join(CHAT_MARKERS)} to mark who says what, so it "
            "can continue a text but hold no conversation; use albor generate"
        )


@dataclass(frozen=True)
class Answer:
    """What the model said, and what it no longer read."""

    generation: Generation
    dropped: int  # turns at the beginning that were left out, in all, so that the rest fits


class Chat:
    """A conversation with one model, which reads only what is new: the rest is in its cache.

    Of a history that is too long for the context, the oldest turns are left out, but never the system's:
    until what is left has room for an answer of `settings.max_tokens`, or half the context, behind it.
    """

    def __init__(self, decoder: Decoder, tokenizer: Tokenizer, settings: Settings, system: str | None = None):
        check_can_chat(tokenizer)
        self._decoder, self._tokenizer, self._settings = decoder, tokenizer, settings
        self._system = () if system is None else (Turn("system", system),)
        self._cached: list[int] = []  # tokens that the decoder has read
        self.reset()

    def reset(self) -> None:
        """Begins anew; the system's turn stays."""
        self._turns: list[Turn] = []
        self._dropped = self._asked = 0

    def ask(
        self,
        message: str,
        on_text: Callable[[str], None] | None = None,
        on_token: Callable[[], None] = lambda: None,
    ) -> Answer:
        """The model's answer to `message`; `on_text` and `on_token` are those of `write`.

        Both become part of the history, unless something is raised: PromptTooLong where the message alone has
        no room beside the system's turn.
        """
        turns = [*self._turns, Turn("user", message)]
        turns, prompt_ids = self._fitting(turns)
        seed = derive_seed(self._settings.seed, "turn", self._asked)
        kept = self._common_prefix(prompt_ids)
        self._cached = self._cached[:kept]  # should `write` raise
        generation = write(
            self._decoder, self._tokenizer, prompt_ids, replace(self._settings, seed=seed),
            kept=kept, on_text=on_text, on_token=on_token,
        )  # fmt: skip
        self._cached = [*prompt_ids, *generation.tokens][: self._decoder.length]
        self._dropped += len(self._turns) + 1 - len(turns)
        self._turns = [*turns, Turn("assistant", generation.text)]
        self._asked += 1
        return Answer(generation, self._dropped)

    def _fitting(self, turns: list[Turn]) -> tuple[list[Turn], list[int]]:
        """As many of the last `turns` as fit, the first of them the user's, and their tokens."""
        context = self._decoder.context
        room = min(self._settings.max_tokens, context // 2)
        starts = [number for number, turn in enumerate(turns) if turn.role == "user"]
        for start in starts:
            prompt_ids = encode(self._tokenizer, [*self._system, *turns[start:]])
            if len(prompt_ids) + room <= context or (start == starts[-1] and len(prompt_ids) <= context):
                return turns[start:], prompt_ids
        raise PromptTooLong(
            f"this message has {len(prompt_ids):,} tokens with what stands around it, and the model's "
            f"context holds {context:,} (model.max_position_embeddings); shorten it"
        )

    def _common_prefix(self, prompt_ids: Sequence[int]) -> int:
        """How many tokens of a prompt the decoder has read; the last one is read again, for its logits."""
        pairs = zip(self._cached, prompt_ids[:-1], strict=False)
        shorter = min(len(self._cached), len(prompt_ids) - 1)
        return next((n for n, (a, b) in enumerate(pairs) if a != b), shorter)
