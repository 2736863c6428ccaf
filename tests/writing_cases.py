"""Runs of random weights, to write with: what chat, server and smoke test need of a model."""

from __future__ import annotations

from pathlib import Path

import torch

from albor import checkpoint
from albor.architecture import Architecture
from albor.config import RunConfig
from albor.configfile import dump_config
from albor.data.tokenizer import Tokenizer

TEXT = "the cat sat on the mat and the dog ran to the cat\nuser says so, assistant answers\n"


def make_tokenizer() -> Tokenizer:
    """One with a chat's markers."""
    return Tokenizer.train([TEXT] * 20, 300)


def save_run(directory: Path, tokenizer: Tokenizer, context: int = 256, seed: int = 3) -> Path:
    """A run directory named `tiny` with one checkpoint; returns it."""
    config = RunConfig.model_validate({
        "name": "tiny",
        "model": {
            "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
            "num_key_value_heads": 1, "vocab_size": tokenizer.vocab_size, "max_position_embeddings": context,
        },
        "data": {"sequence_length": 16, "sources": [{"kind": "python-stdlib"}]},
        "train": {"max_steps": 1000, "micro_batch_size": 2, "precision": "fp32"},
    })  # fmt: skip
    generator = torch.Generator().manual_seed(seed)
    weights = {
        parameter.name: torch.randn(parameter.shape, generator=generator).mul_(0.3)
        for parameter in Architecture.from_config(config.model).parameters
    }
    # A control token's logit is 0 then, which is hardly ever drawn: texts end by what a test asks for.
    weights["embedding.tokens"][list(tokenizer.special_ids.values())] = 0
    checkpoint.save(
        directory / "checkpoints", 7, {"weights": weights}, {"step": 7},
        {"config.yaml": dump_config(config).encode(), "tokenizer.model": tokenizer.model},
        checkpoint.Retention(keep_last=1),
    )  # fmt: skip
    return directory
