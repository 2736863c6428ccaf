"""Weights on their way to the Hugging Face layout and back."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from helpers import make_config, make_trainer, spread_norms, weights_of

from albor.architecture import Architecture
from albor.canary.reference import unpacked
from albor.errors import CheckpointError
from albor.export.weights import hf_tensors, layout, read_hf_tensors
from albor.memory.arena import Arena

MODELS = {
    "tied": {},
    "untied": {"tie_word_embeddings": False},
    "one-kv-head": {"num_key_value_heads": 1},
    "no-grouping": {"num_key_value_heads": 4},
    "deep": {"num_hidden_layers": 11},  # layer numbers with two digits
}


def built(keys: dict, dtype: str = "float32") -> tuple[Arena, Architecture]:
    trainer = make_trainer(make_config(**keys), dtype, poison=False)
    spread_norms(trainer)
    return trainer.arena, trainer.architecture


@pytest.mark.parametrize("keys", MODELS.values(), ids=MODELS.keys())
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_there_and_back_gives_the_same_bits(keys: dict, dtype: str):
    arena, model = built(keys, dtype)
    weights = arena["weights"]
    back = torch.zeros_like(weights)
    read_hf_tensors(hf_tensors(arena, model), back, model)
    for parameter in model.parameters:
        there = slice(parameter.offset, parameter.offset + parameter.size)
        assert weights[there].any()
        assert torch.equal(back[there], weights[there]), parameter.name


@pytest.mark.parametrize("keys", MODELS.values(), ids=MODELS.keys())
def test_the_pieces_are_the_oracles(keys: dict):
    """The same cuts as the canary's independent ones, which are held against LlamaForCausalLM."""
    trainer = make_trainer(make_config(**keys), "float32", poison=False)
    expected = unpacked(weights_of(trainer), trainer.architecture)
    found = dict(hf_tensors(trainer.arena, trainer.architecture))
    assert {name.removeprefix("model.") for name in found} == expected.keys()
    for name, tensor in found.items():
        assert torch.equal(tensor, expected[name.removeprefix("model.")]), name
        assert tensor.is_contiguous()


@pytest.mark.parametrize("keys", [{}, {"tie_word_embeddings": False}], ids=["tied", "untied"])
def test_every_name_and_shape_is_that_of_transformers(keys: dict):
    transformers = pytest.importorskip("transformers")
    arena, model = built(keys)
    fields = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
    llama = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            **{name: getattr(model, name) for name in fields},
            num_key_value_heads=model.num_key_value_heads,
            tie_word_embeddings=model.tie_word_embeddings,
        )
    )
    theirs = {name: tuple(tensor.shape) for name, tensor in llama.named_parameters()}
    assert {piece.name: piece.shape for piece in layout(model)} == theirs
    assert {name: tuple(tensor.shape) for name, tensor in hf_tensors(arena, model)} == theirs


def test_what_is_read_is_rounded_to_the_buffer():
    arena, model = built({})
    flat = torch.zeros_like(arena["weights"], dtype=torch.bfloat16)
    read_hf_tensors(hf_tensors(arena, model), flat, model)
    assert torch.equal(flat, arena["weights"].bfloat16())


def drop(named: dict) -> None:
    del named["model.layers.1.mlp.up_proj.weight"]


def add_bias(named: dict) -> None:
    named["model.layers.0.self_attn.q_proj.bias"] = torch.zeros(24)


def reshape(named: dict) -> None:
    named["model.norm.weight"] = torch.ones(23)


def poison(named: dict) -> None:
    named["model.layers.0.mlp.down_proj.weight"][3, 3] = torch.nan


def own_head(named: dict) -> None:
    named["lm_head.weight"] = named["model.embed_tokens.weight"] + 1


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (drop, "model.layers.1.mlp.up_proj.weight is missing"),
        (add_bias, "model.layers.0.self_attn.q_proj.bias has no place in this model"),
        (reshape, r"model.norm.weight is \[23\], and would be \[24\]"),
        (poison, "model.layers.0.mlp.down_proj.weight has values that are NaN or infinite"),
        (own_head, "lm_head.weight differs from model.embed_tokens.weight"),
    ],
)
def test_what_does_not_fit_is_named(change: Callable[[dict], None], said: str):
    arena, model = built({})
    named = {name: tensor.clone() for name, tensor in hf_tensors(arena, model)}
    change(named)
    with pytest.raises(CheckpointError, match=said):
        read_hf_tensors(named.items(), torch.zeros_like(arena["weights"]), model)


def test_a_stored_copy_of_the_tied_head_and_old_frequencies_are_passed_over():
    arena, model = built({})
    named = dict(hf_tensors(arena, model))
    named["lm_head.weight"] = named["model.embed_tokens.weight"].clone()
    named["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(3)
    flat = torch.zeros_like(arena["weights"])
    read_hf_tensors(named.items(), flat, model)
    assert torch.equal(flat, arena["weights"])


def test_a_tensor_that_comes_twice_is_refused():
    arena, model = built({})
    pairs = list(hf_tensors(arena, model))
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight occurs twice"):
        read_hf_tensors([*pairs, pairs[-1]], torch.zeros_like(arena["weights"]), model)
