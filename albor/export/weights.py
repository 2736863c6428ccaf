"""The weights under the names, and in the pieces, of the Hugging Face Llama layout.

albor packs query, key and value into one matrix, and gate and up into another; here they are cut apart, and
put together again. Nothing is permuted: albor turns the pairs (x[i], x[i + D/2]) of a head, as Hugging Face
does. A Llama has no output multiplier: muP's is in the weight of the final norm, whose output it multiplies.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch

from albor.architecture import Architecture, Parameter, block_name
from albor.errors import CheckpointError
from albor.memory.arena import Arena
from albor.model.parameters import view

HEAD = "lm_head.weight"
EMBEDDING = "model.embed_tokens.weight"
_TABLE_OF_FREQUENCIES = ".rotary_emb.inv_freq"  # files of transformers before 4.32 hold it; it is no weight
_SHOWN_PROBLEMS = 5


@dataclass(frozen=True)
class Piece:
    """A tensor of the Hugging Face layout: so many rows of one of albor's parameters, times a factor."""

    name: str  # such as model.layers.7.self_attn.q_proj.weight
    parameter: Parameter
    start: int
    rows: int
    factor: float = 1.0

    @property
    def shape(self) -> tuple[int, ...]:
        """The tensor's shape; a norm's is (C,)."""
        return (self.rows, *self.parameter.shape[1:])

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    def of(self, flat: torch.Tensor) -> torch.Tensor:
        """Its rows in a flat buffer of all parameters, as a contiguous view, without the factor."""
        return view(flat, self.parameter)[self.start : self.start + self.rows]

    def times_factor(self, rows: torch.Tensor) -> torch.Tensor:
        """The tensor's values from those of its rows: these themselves where the factor is 1."""
        return rows if self.factor == 1.0 else rows * self.factor


def layout(model: Architecture) -> Iterator[Piece]:
    """Every tensor of the Hugging Face layout, in the order of the forward pass; a tied head has none."""
    table = {parameter.name: parameter for parameter in model.parameters}

    def pieces(name: str, factor: float = 1.0, /, **parts: int) -> Iterator[Piece]:
        """The rows of `name`, cut up into `parts`."""
        start = 0
        for theirs, rows in parts.items():
            yield Piece(prefix + theirs.replace("__", ".") + ".weight", table[name], start, rows, factor)
            start += rows
        assert start == table[name].shape[0], f"{name} has rows that belong to nobody"

    width, ffn, head_dim = model.hidden_size, model.intermediate_size, model.head_dim
    queries, keys = model.num_attention_heads * head_dim, model.num_key_value_heads * head_dim
    prefix = "model."
    yield from pieces("embedding.tokens", embed_tokens=model.vocab_size)
    for layer in range(model.num_hidden_layers):
        ours, prefix = block_name(layer), f"model.layers.{layer}."
        yield from pieces(f"{ours}.attention.norm", input_layernorm=width)
        yield from pieces(
            f"{ours}.attention.qkv", self_attn__q_proj=queries, self_attn__k_proj=keys, self_attn__v_proj=keys
        )
        yield from pieces(f"{ours}.attention.out", self_attn__o_proj=width)
        yield from pieces(f"{ours}.mlp.norm", post_attention_layernorm=width)
        yield from pieces(f"{ours}.mlp.gate_up", mlp__gate_proj=ffn, mlp__up_proj=ffn)
        yield from pieces(f"{ours}.mlp.down", mlp__down_proj=width)
    prefix = "model."
    yield from pieces("head.norm", model.width_scale, norm=width)
    if not model.tie_word_embeddings:
        prefix = ""
        yield from pieces("head.tokens", lm_head=model.vocab_size)


def hf_tensors(arena: Arena, model: Architecture) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, tensor) of the whole model, contiguous, in the arena's dtype: views of the arena's weights but
    where a factor is in them.
    """
    for piece in layout(model):
        yield piece.name, piece.times_factor(piece.of(arena["weights"]))


def read_hf_tensors(
    tensors: Iterable[tuple[str, torch.Tensor]], flat: torch.Tensor, model: Architecture
) -> None:
    """Fills `flat`, a flat buffer of all parameters, from the (name, tensor) of a Hugging Face Llama.

    Values are rounded to the buffer's dtype; alignment padding stays as it is. Tensors are taken one at a
    time, so they may be read from a file as they are asked for. Raises CheckpointError, which names them, for
    tensors that are missing, that a Llama of this architecture does not have (biases, q_norm), whose shape is
    another, or that are not finite; `flat` then holds what must not be used. A head that is stored although
    it is tied must equal the embedding. The model is one without muP.
    """
    assert model.width_scale == 1.0, "check_algebra refuses init_from with muP"
    wanted = {piece.name: piece for piece in layout(model)}
    problems, seen, tied_head = [], set(), None
    for name, tensor in tensors:
        if name.endswith(_TABLE_OF_FREQUENCIES):
            continue
        if name == HEAD and model.tie_word_embeddings:
            tied_head = tensor
            continue
        piece = wanted.get(name)
        if piece is None:
            problems.append(f"{name} has no place in this model")
        elif name in seen:
            problems.append(f"{name} occurs twice")
        elif tuple(tensor.shape) != piece.shape:
            problems.append(f"{name} is {list(tensor.shape)}, and would be {list(piece.shape)}")
        elif not tensor.isfinite().all():
            problems.append(f"{name} has values that are NaN or infinite")
        else:
            piece.of(flat).copy_(tensor)
        seen.add(name)
    problems += [f"{name} is missing" for name in wanted if name not in seen]
    if tied_head is not None and not problems:
        embedding = wanted[EMBEDDING].of(flat)
        if tied_head.shape != embedding.shape or not torch.equal(tied_head.to(flat), embedding):
            problems.append(
                f"{HEAD} differs from {EMBEDDING}, although tie_word_embeddings says that they are one"
            )
    if problems:
        more = len(problems) - _SHOWN_PROBLEMS
        shown = problems[:_SHOWN_PROBLEMS] + ([f"and {more} more"] if more > 0 else [])
        raise CheckpointError("these weights are not the configured model's: " + "; ".join(shown))
