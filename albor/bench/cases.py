"""What is benchmarked: a model, its batch, and the settings that all systems share."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from albor.architecture import Architecture
from albor.config import RunConfig
from albor.errors import ConfigError, Problem

TOKENS_PER_STEP = 131_072
_SEQUENCE_LENGTH = 1024
_SHARED = {"vocab_size": 32768, "tie_word_embeddings": True}
# (model, micro-batch). The models are those of configs/pretrain-*.yaml.
SHAPES: dict[str, tuple[dict[str, int], int]] = {
    "50m": (
        {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 12,
         "num_attention_heads": 8, "num_key_value_heads": 2}, 32,
    ),
    "125m": (
        {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 16,
         "num_attention_heads": 12, "num_key_value_heads": 4}, 32,
    ),
    "350m": (
        {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24,
         "num_attention_heads": 16, "num_key_value_heads": 4}, 16,
    ),
    "1.3b": (
        {"hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 24,
         "num_attention_heads": 16, "num_key_value_heads": 4}, 8,
    ),
}  # fmt: skip
STANDARD = ("350m", "350m-mb4", "125m", "50m", "1.3b")


@dataclass(frozen=True)
class Case:
    """One thing to train. The learning rate is constant, so that all systems have the same."""

    name: str
    config: RunConfig

    @property
    def architecture(self) -> Architecture:
        """The model in numbers."""
        return Architecture.from_config(self.config.model)


def find_case(name: str, steps: int) -> Case:
    """A standard case of `steps` steps of 131,072 tokens: `350m`, or with another micro-batch `350m-mb8`.

    Raises ConfigError for any other name, or a micro-batch that does not divide the step.
    """
    found = re.fullmatch(r"(.+?)(?:-mb(\d+))?", name)
    shape = SHAPES.get(found[1]) if found else None
    if found is None or shape is None:
        known = ", ".join(SHAPES)
        raise _refuse(
            f"{name!r} is not a model of the benchmark", f"use {known}, or {STANDARD[1]} and the like"
        )
    model, micro_batch = shape[0], int(found[2] or shape[1])
    sequences = TOKENS_PER_STEP // _SEQUENCE_LENGTH
    if not micro_batch or sequences % micro_batch:
        raise _refuse(
            f"{name}: {sequences} sequences a step are no multiple of {micro_batch}", "use a power of 2"
        )
    config = RunConfig.model_validate({
        "name": f"bench-{name}",
        "model": _SHARED | model,
        "data": {"sequence_length": _SEQUENCE_LENGTH},
        **_settings({"lr": 3e-4}),
        "train": {
            "max_steps": steps, "micro_batch_size": micro_batch, "accumulator": "auto",
            "gradient_accumulation_steps": sequences // micro_batch,
        },
    })  # fmt: skip
    return Case(name, config)


def case_of(config: RunConfig, steps: int) -> Case:
    """A user's own configuration, with `steps` steps at its peak learning rate.

    Raises ConfigError for fp16 and for muP, in which not every peer computes.
    """
    if config.model.mup_base_width is not None:
        raise _refuse("the peers have no muP", "use model.mup_base_width=null", "model.mup_base_width")
    if config.train.precision == "fp16":
        raise _refuse("the peers do not compute in fp16", "use train.precision=bf16", "train.precision")
    values = config.model_dump(mode="json")
    changed = _settings(values["optimizer"])
    changed["train"] = values["train"] | {"max_steps": steps, "max_tokens": None}
    return Case(config.name, RunConfig.model_validate(values | changed))


def _settings(optimizer: dict[str, Any]) -> dict[str, Any]:
    return {"optimizer": optimizer, "schedule": {"kind": "constant", "warmup_steps": 0}}


def _refuse(message: str, remedy: str, key: str = "--models") -> ConfigError:
    return ConfigError([Problem(key, message, remedy, "command line")])
