"""The weights, and anything that has their shape, as views into flat buffers."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from albor.architecture import Architecture, Parameter, block_name
from albor.memory.arena import Arena
from albor.seeds import derive_seed

_DRAWN = 2**16  # initial values that exist in fp32 at a time
_DRAWN_TOGETHER = 16  # PyTorch draws so many at once, and a tensor of fewer one by one


@dataclass(frozen=True)
class BlockTensors:
    """One block's weights, or their gradients."""

    attention_norm: torch.Tensor  # (C,)
    qkv: torch.Tensor  # ((H + 2K) D, C)
    attention_out: torch.Tensor  # (C, H D)
    mlp_norm: torch.Tensor  # (C,)
    gate_up: torch.Tensor  # (2F, C)
    down: torch.Tensor  # (C, F)


def view(flat: torch.Tensor, parameter: Parameter, start: int = 0) -> torch.Tensor:
    """`parameter` in a flat buffer whose first element is element `start` of the full layout."""
    offset = parameter.offset - start
    return flat[offset : offset + parameter.size].view(parameter.shape)


def block_tensors(flat: torch.Tensor, model: Architecture, layer: int, start: int = 0) -> BlockTensors:
    """Block `layer`'s tensors in a flat buffer whose first element is element `start` of the full layout."""
    name = block_name(layer)
    views = {
        p.name.removeprefix(f"{name}."): view(flat, p, start) for p in model.parameters if p.block == name
    }
    return BlockTensors(
        attention_norm=views["attention.norm"],
        qkv=views["attention.qkv"],
        attention_out=views["attention.out"],
        mlp_norm=views["mlp.norm"],
        gate_up=views["mlp.gate_up"],
        down=views["mlp.down"],
    )


def named_tensors(flat: torch.Tensor, model: Architecture) -> dict[str, torch.Tensor]:
    """Every parameter's elements of a full flat buffer, by parameter name: what a checkpoint holds."""
    return {parameter.name: view(flat, parameter) for parameter in model.parameters}


def master_weights(arena: Arena) -> torch.Tensor:
    """The flat weights that the optimizer updates: the wide copy where there is one, else the weights
    themselves.
    """
    return arena["master"] if "master" in arena else arena["weights"]


def clear(arena: Arena) -> None:
    """Zeros the weights and all that is summed into, padding included, for norms run over flat slices."""
    for name in ("weights", "master", "moments.first", "moments.second", "gradients.accumulator"):
        if name in arena:
            arena[name].zero_()


def initialise(arena: Arena, model: Architecture, seed: int) -> None:
    """Fills the weights with their initial values, and clears the rest of the state.

    Each parameter draws from a generator of its own, on the CPU, so that its values do not depend on the
    device or on the other parameters.
    """
    clear(arena)
    master = master_weights(arena)
    for parameter in model.parameters:
        values = view(master, parameter)
        if parameter.init_std is None:
            values.fill_(1.0)
        else:
            generator = torch.Generator().manual_seed(derive_seed(seed, "initialise", parameter.name))
            _draw(values.view(-1), parameter.init_std, generator)
    if master is not arena["weights"]:
        arena["weights"].copy_(master)


def _draw(values: torch.Tensor, std: float, generator: torch.Generator) -> None:
    """Fills values (n,) as one call of `normal_` in fp32 would, without as much memory."""
    drawn = torch.empty(min(values.numel(), _DRAWN + _DRAWN_TOGETHER), dtype=torch.float32)
    start, size = 0, values.numel()
    while start < size:
        # A last part of fewer would be drawn in another way, so it goes with the one before it.
        stop = size if size - start <= drawn.numel() else start + _DRAWN
        part = drawn[: stop - start]
        values[start:stop].copy_(part.normal_(0.0, std, generator=generator))
        start = stop
