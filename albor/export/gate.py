"""The export gate: what was exported, loaded by the program it is for, must compute what albor computes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np


class Runtime(Protocol):
    """A program that loads an exported model, as its users do: by the files alone.

    Whatever these methods need to know (stop tokens, positions, epsilon) they take from the exported files or
    from the program's own reading of them, never from albor: the gate would compare albor with itself.
    """

    name: str  # transformers, llama.cpp, onnxruntime
    version: str

    @property
    def stop_ids(self) -> frozenset[int]:
        """The tokens that end a generation."""

    def tokenize(self, text: str) -> list[int]:
        """The ids of `text`, without a token that the program would put in front or behind; markers such as
        `<|endoftext|>` in a text are text.
        """

    def logits(self, tokens: Sequence[int]) -> np.ndarray:
        """What follows each of `tokens`, read from position 0: (T, V) float32."""

    def greedy(self, tokens: Sequence[int], count: int, favoured: int | None = None) -> list[int]:
        """The likeliest continuation, at most `count` tokens, by the program's own loop; it ends before a
        stop token, which is not returned.

        `favoured` is a token whose logit is raised (by 1e4, say) so that it is the likeliest at each step:
        so every program can be brought to the point where it has to stop.
        """

    def close(self) -> None:
        """Gives back memory, files and processes."""


@dataclass(frozen=True)
class Tolerance:
    """How far a program's logits may be from albor's, and why so far."""

    logits: float  # largest |difference| / largest |logit of albor's|, over all positions and tokens
    reason: str  # shown with the table
