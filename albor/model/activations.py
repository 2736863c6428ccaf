"""What a block's forward leaves for its backward, and the scratch that the two work in."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import torch

from albor.architecture import block_name
from albor.memory.arena import Arena

# What a plan holds only where the attention needs it, and `delta` only where a forward runs again.
_OPTIONAL = (".attention_lse", "backward.delta")


@dataclass(frozen=True)
class Activations:
    """The tensors of one block's forward, in the order in which it fills them."""

    input: torch.Tensor  # (N, C) the residual stream before attention
    attention_rstd: torch.Tensor  # (N,) wide
    attention_normed: torch.Tensor  # (N, C)
    qkv: torch.Tensor  # (N, (H + 2K) D), queries and keys rotated
    attention_lse: torch.Tensor | None  # (B, H, T) wide; None on the torch path
    attention_out: torch.Tensor  # (N, H D)
    middle: torch.Tensor  # (N, C) the residual stream before the feed-forward layer
    mlp_rstd: torch.Tensor  # (N,) wide
    mlp_normed: torch.Tensor  # (N, C)
    gate_up: torch.Tensor  # (N, 2F); the backward overwrites it with its gradient
    hidden: torch.Tensor  # (N, F) silu(gate) * up; scratch
    delta: torch.Tensor  # (N, C) what a half-block adds to the residual stream; scratch

    @classmethod
    def for_layer(cls, arena: Arena, layer: int, scratch: str) -> Activations:
        """Block `layer`'s own buffers where the plan keeps them, else the ones shared under `scratch`."""
        own = f"{block_name(layer)}."
        names = {f.name: f"{own}{f.name}" for f in fields(cls)}
        return cls(
            **{
                key: _found(arena, name if name in arena else f"{scratch}.{key}")
                for key, name in names.items()
            }
        )

    @classmethod
    def shared(cls, arena: Arena, scratch: str) -> Activations:
        """One set for all blocks: for a forward that no backward follows."""
        return cls(**{f.name: _found(arena, f"{scratch}.{f.name}") for f in fields(cls)})


def _found(arena: Arena, name: str) -> Any:
    return arena.get(name) if name.endswith(_OPTIONAL) else arena[name]


@dataclass(frozen=True)
class BlockGradients:
    """Gradients inside one block, shared by all blocks."""

    hidden: torch.Tensor  # (N, F)
    normed: torch.Tensor  # (N, C), of either norm's output
    attention: torch.Tensor  # (N, H D)
    qkv: torch.Tensor  # (N, (H + 2K) D)

    @classmethod
    def from_arena(cls, arena: Arena) -> BlockGradients:
        """The plan's buffers for a block's backward."""
        return cls(**{f.name: arena[f"backward.d_{f.name}"] for f in fields(cls)})
