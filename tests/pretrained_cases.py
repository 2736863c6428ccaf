"""Llamas that a run may begin from, as others would have written them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from albor.architecture import Architecture
from albor.export.weights import layout
from albor.tensorfile import write_tensors


def random_tensors(model: Architecture, seed: int = 3) -> dict[str, torch.Tensor]:
    """By the names of the Hugging Face layout; norms are about 1, as in a model that has been trained."""
    generator = torch.Generator().manual_seed(seed)

    def draw(shape: tuple[int, ...]) -> torch.Tensor:
        values = 0.1 * torch.randn(shape, generator=generator)
        return values + 1 if len(shape) == 1 else values

    return {piece.name: draw(piece.shape) for piece in layout(model)}


def llama_config(model: Architecture, **changed: Any) -> dict[str, Any]:
    """config.json, as transformers 4 writes it."""
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
    names += ("num_key_value_heads", "max_position_embeddings", "rope_theta", "rms_norm_eps")
    content = {name: getattr(model, name) for name in (*names, "tie_word_embeddings")}
    fixed = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu"}
    fixed |= {"attention_bias": False, "rope_scaling": None, "torch_dtype": "float32"}
    return content | fixed | changed


def write_llama(
    directory: Path,
    model: Architecture,
    *,
    shards: int = 1,
    dtype: torch.dtype = torch.float32,
    seed: int = 3,
    **changed: Any,
) -> dict[str, torch.Tensor]:
    """A Hugging Face directory of `model` with random weights, in so many files; returns its tensors."""
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(llama_config(model, **changed)))
    tensors = {name: tensor.to(dtype) for name, tensor in random_tensors(model, seed).items()}
    if shards == 1:
        write_tensors(directory / "model.safetensors", tensors)
        return tensors
    places = {}
    for number in range(shards):
        file = f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
        part = dict(list(tensors.items())[number::shards])
        write_tensors(directory / file, part)
        places |= dict.fromkeys(part, file)
    index = {"metadata": {}, "weight_map": places}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    return tensors
