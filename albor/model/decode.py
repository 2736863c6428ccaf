"""Decoding with a cache of keys and values: a prompt is read in chunks, and then one token at a time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch

from albor.errors import AlborError
from albor.memory.arena import Arena
from albor.model.activations import Activations
from albor.model.single_token import SingleToken, suits
from albor.model.transformer import Transformer


class ContextFull(AlborError):
    """There are more tokens than the model has positions."""


class Decoder:
    """Reads a sequence token by token, and gives the logits of the next.

    Everything lies in the plan's `sample.*` buffers, which share memory with other phases: after a step or an
    evaluation in between, begin again with `reset`.
    """

    def __init__(self, model: Transformer, arena: Arena):
        architecture = model.architecture
        self.model, self.arena = model, arena
        self.context = architecture.max_position_embeddings
        self.length = 0  # tokens read so far, which is the next one's position
        self._chunk: int = arena["sample.stream"].shape[0]
        self._eps = architecture.rms_norm_eps
        self._rotated_heads = architecture.num_attention_heads + architecture.num_key_value_heads
        self._cos, self._sin = arena["rotary.cos"], arena["rotary.sin"]
        self._caches = arena["sample.cache"].unbind()  # one (2, K, S, D) per layer
        self._ops = replace(model.ops, scores=arena["sample.scores"])
        self._single = self._activations(1)
        self._one = SingleToken(model, arena) if suits(arena) else None

    def reset(self) -> None:
        """Forgets the sequence."""
        self.length = 0

    def rewind(self, length: int) -> None:
        """Forgets what was read after the first `length` tokens."""
        if not 0 <= length <= self.length:
            raise ValueError(f"{self.length} tokens are read, and {length} of them cannot be kept")
        self.length = length

    def feed(self, tokens: torch.Tensor) -> torch.Tensor:
        """Appends `tokens` (n,) int64 to the sequence; returns the logits (V,) of what follows the last one.

        The logits are in the compute dtype and in the arena: the next call overwrites them. Raises
        ContextFull, with nothing read, where the model has too few positions, and ValueError without a token.
        """
        if self._one is not None and tokens.shape[0] == 1:
            return self.feed_one(int(tokens[0]))
        *_, a = self._read_all(tokens)
        self._project(a, slice(-1, None), self.arena["sample.logits"])
        return self.arena["sample.logits"][0]

    def feed_one(self, token: int) -> torch.Tensor:
        """`feed` of one token, which needs no tensor for it."""
        if self._one is None:
            return self.feed(torch.tensor([token]))
        self._make_room(1)
        logits = self._one.read(token, self.length)
        self.length += 1
        return logits

    def feed_for_each(self, tokens: torch.Tensor) -> torch.Tensor:
        """`feed`, but returns the logits (n, V) of what follows each of `tokens`, in memory of their own."""
        one = self.arena["sample.logits"]
        logits, done = one.new_empty(tokens.shape[0], one.shape[1]), 0
        for a in self._read_all(tokens):
            rows = a.delta.shape[0]
            self._project(a, slice(None), logits[done : done + rows])
            done += rows
        return logits

    def _read_all(self, tokens: torch.Tensor) -> Iterator[Activations]:
        """Checks and reads `tokens`, a chunk at a time; what comes out of a chunk's last block is given."""
        if tokens.shape[0] == 0:
            raise ValueError("there are no logits without a token to follow")
        self._make_room(tokens.shape[0])
        for chunk in tokens.to(self.arena.device).split(self._chunk):
            yield self._read(chunk)

    def _make_room(self, count: int) -> None:
        """Raises ContextFull where `count` more tokens are too many; the phase begins with the first."""
        if self.length + count > self.context:
            raise ContextFull(
                f"{self.length + count} tokens do not fit the model's context of {self.context} "
                "(model.max_position_embeddings)"
            )
        if self.length == 0:
            self.arena.enter("sample")

    def _project(self, a: Activations, rows: slice, logits: torch.Tensor) -> None:
        """The logits of these rows of a chunk: final norm and projection to the vocabulary."""
        head, residual, normed = self.model.head, a.middle[rows], a.mlp_normed[rows]
        self._ops.rmsnorm_forward(
            residual, a.delta[rows], head.norm, self._eps, residual, normed, a.mlp_rstd[rows]
        )
        head.project(normed, logits)

    def _read(self, tokens: torch.Tensor) -> Activations:
        """Runs all blocks over the next `tokens`, of which a chunk has room, and appends to the caches."""
        rows, eps = tokens.shape[0], self._eps
        a = self._single if rows == 1 else self._activations(rows)
        stream, normed, rstd, delta = a.input, a.attention_normed, a.attention_rstd, None
        self.model.embedding.forward(tokens, stream)
        for block, cache in zip(self.model.blocks, self._caches, strict=True):
            w = block.weights
            self._ops.rmsnorm_forward(stream, delta, w.attention_norm, eps, stream, normed, rstd)
            self._ops.linear_forward(normed, w.qkv, a.qkv)
            self._ops.rotary(a.qkv, self._cos, self._sin, self._rotated_heads, rows, start=self.length)
            self._ops.attention_cached(a.qkv, cache, a.attention_out, self.length)
            self._ops.linear_forward(a.attention_out, w.attention_out, a.delta)
            block.feed_forward.forward(w, a)
            delta = a.delta
        self.length += rows
        return a

    def _activations(self, rows: int) -> Activations:
        """Buffers for `rows` tokens. No backward follows: all blocks and both halves of each share them."""
        names = ("stream", "rstd", "normed", "qkv", "attention_out", "gate_up", "hidden", "delta")
        view = {name: self.arena[f"sample.{name}"][:rows] for name in names}
        return Activations(
            input=view["stream"],
            attention_rstd=view["rstd"],
            attention_lse=None,
            attention_normed=view["normed"],
            qkv=view["qkv"],
            attention_out=view["attention_out"],
            middle=view["stream"],
            mlp_rstd=view["rstd"],
            mlp_normed=view["normed"],
            gate_up=view["gate_up"],
            hidden=view["hidden"],
            delta=view["delta"],
        )
