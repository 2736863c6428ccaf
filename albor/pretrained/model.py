"""A pretrained Llama: its numbers under albor's keys, and its tensors under Hugging Face's names."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from albor.errors import ConfigError, Problem

KEY = "model.init_from"


class Weights(Protocol):
    """Where tensors are read from."""

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """(name, tensor) of each, one in memory at a time, by the names of the Hugging Face layout."""

    @property
    def sha256(self) -> dict[str, str]:
        """The SHA-256 of each file, by its name; complete when all tensors have been read."""


@dataclass(frozen=True)
class Pretrained:
    """A model that `model.init_from` may name."""

    path: Path
    keys: Mapping[str, Any]  # of the section `model`, as they are in this model
    weights: Weights
    tokenizer: Path | None  # what `tokenizer.path` would be


def refusal(path: Path, problems: list[str]) -> ConfigError:
    """What is wrong with the model at `path`."""
    return ConfigError([Problem(KEY, f"{path}: {problem}") for problem in problems])
