"""What the tests of exports build: a model with random weights that needs no training, and its export."""

from __future__ import annotations

import copy
import functools
from pathlib import Path
from typing import Any

import torch

from albor.architecture import Architecture
from albor.config import RunConfig
from albor.data.tokenizer import Tokenizer
from albor.export.format import Source
from albor.export.gate import CORPUS
from albor.generate.load import Loaded
from albor.memory.arena import Arena
from albor.memory.plan import plan_inference
from albor.model.parameters import named_tensors
from albor.model.transformer import Transformer

VOCABULARY = 400  # ids that the tokenizer knows
MODEL = {
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 96,
}
STATE = {"step": 3, "tokens": 96, "loader": {"per_source": [6], "samples": 6}}


@functools.cache
def tokenizer() -> Tokenizer:
    """One that is trained on code and prose."""
    return Tokenizer.train([*CORPUS[:5], Path(__file__).read_text()], VOCABULARY)


def make_source(directory: Path, **keys: Any) -> Source:
    """MODEL with `keys` changed and random weights: large ones, so that every term of the arithmetic shows,
    and norms away from 1. `directory` is the run's, which has no files.
    """
    config = RunConfig.model_validate({
        "name": "random",
        "model": MODEL | keys,
        "data": {"sequence_length": 16, "sources": [{"kind": "python-stdlib"}]},
        "train": {"max_steps": 3, "micro_batch_size": 2, "precision": "fp32"},
    })  # fmt: skip
    architecture = Architecture.from_config(config.model)
    arena = Arena(plan_inference(config, "cpu", "float32"))
    generator = torch.Generator().manual_seed(3)
    for name, tensor in named_tensors(arena["weights"], architecture).items():
        mean, std = (1.0, 0.3) if name.endswith("norm") else (0.0, 0.15)
        tensor.normal_(mean, std, generator=generator)
    loaded = Loaded(config, Transformer(architecture, arena, 16), tokenizer(), arena)
    return Source(directory, directory / "checkpoints" / "step-00000003", copy.deepcopy(STATE), loaded, None)
