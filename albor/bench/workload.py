"""What every system starts from and reads: one file of initial weights, one file of tokens.

The weights are those that `albor train` would draw, in fp32, under Hugging Face's names. The tokens are made,
not read, so that the benchmark needs no data: their frequencies fall like those of words (Zipf), and half of
them follow from the token before, so that there is something to learn, and every system shows that it does.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open

from albor.architecture import Architecture, Parameter
from albor.config import RunConfig
from albor.memory.arena import Arena
from albor.memory.plan import plan_inference
from albor.model.parameters import initialise, named_tensors
from albor.tensorfile import write_tensors

_OUTER = {
    "embedding.tokens": "model.embed_tokens", "head.norm": "model.norm", "head.tokens": "lm_head",
}  # fmt: skip
_INNER = {
    "attention.norm": ("input_layernorm",),
    "attention.qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "attention.out": ("self_attn.o_proj",),
    "mlp.norm": ("post_attention_layernorm",),
    "mlp.gate_up": ("mlp.gate_proj", "mlp.up_proj"),
    "mlp.down": ("mlp.down_proj",),
}


@dataclass(frozen=True)
class Spec:
    """All that a peer's process is told. Paths are absolute."""

    config: RunConfig
    device: str  # cuda or cpu
    dtype: str  # bfloat16 or float32: what the arithmetic runs in
    weights: str
    tokens: str
    steps: int
    compile_backend: str = "inductor"  # of torch.compile; tests take one that generates no code
    attention: str | None = None  # the SDPA backend that was measured to be fastest; None: PyTorch chooses
    profile: bool = False  # whether torch.profiler records the last step

    def as_json(self) -> dict[str, Any]:
        """What the file holds."""
        return asdict(self) | {"config": self.config.model_dump(mode="json")}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Spec:
        """What `as_json` gave."""
        return cls(**values | {"config": RunConfig.model_validate(values["config"])})


def parts(model: Architecture, parameter: Parameter) -> dict[str, int]:
    """The Hugging Face tensors that stand one below the other in a parameter of albor's: rows by name."""
    if parameter.name in _OUTER:
        return {f"{_OUTER[parameter.name]}.weight": parameter.shape[0]}
    _, layer, name = parameter.name.split(".", 2)
    query, key = (heads * model.head_dim for heads in (model.num_attention_heads, model.num_key_value_heads))
    rows = {"attention.qkv": (query, key, key), "mlp.gate_up": (model.intermediate_size,) * 2}
    names = (f"model.layers.{int(layer)}.{part}.weight" for part in _INNER[name])
    return dict(zip(names, rows.get(name, (parameter.shape[0],)), strict=True))


def write_weights(path: Path, config: RunConfig) -> None:
    """The initial weights of `config`, as fp32 safetensors."""
    model = Architecture.from_config(config.model)
    arena = Arena(plan_inference(config, "cpu", "float32"))
    initialise(arena, model, config.seed)
    named = named_tensors(arena["weights"], model)
    tensors: dict[str, torch.Tensor] = {}
    for parameter in model.parameters:
        rows = parts(model, parameter)
        tensors |= dict(zip(rows, named[parameter.name].split(list(rows.values())), strict=True))
    write_tensors(path, tensors)


def read_weights(path: str) -> dict[str, torch.Tensor]:
    """Every tensor of the file, fp32, by its Hugging Face name."""
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (it is no dict)


def packed_weights(path: str, model: Architecture) -> Iterator[tuple[Parameter, torch.Tensor]]:
    """Every parameter of albor's with its values, put together from its parts; one at a time in memory."""
    with safe_open(path, framework="pt") as file:
        for parameter in model.parameters:
            yield parameter, torch.cat([file.get_tensor(name) for name in parts(model, parameter)])


def write_tokens(path: Path, count: int, vocab_size: int, seed: int = 0) -> None:
    """`count` token ids as a .npy file of the narrowest dtype that holds the vocabulary. A larger file begins
    with the same tokens.
    """
    words, coins = (np.random.default_rng((seed, stream)) for stream in range(2))
    drawn = np.minimum(words.zipf(1.3, count + 1), vocab_size) - 1
    tokens = np.where(coins.random(count) < 0.5, drawn[1:], drawn[:-1] * 7 % vocab_size)
    np.save(path, tokens.astype(np.uint16 if vocab_size <= 2**16 else np.uint32), allow_pickle=False)


class Tokens:
    """The token file as micro-batches; the same for every system, in the same order."""

    def __init__(self, spec: Spec):
        train = spec.config.train
        self.length = spec.config.data.sequence_length
        self.sequences = train.micro_batch_size
        self.micro_steps = train.gradient_accumulation_steps
        self.ids = np.load(spec.tokens, allow_pickle=False)

    def window(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """(tokens, targets) of sequence `index`, (T,) int64 each; a target is the next token."""
        window = self.ids[index * self.length : (index + 1) * self.length + 1].astype(np.int64)
        return window[:-1], window[1:]

    def batch(self, step: int, micro_step: int) -> tuple[np.ndarray, np.ndarray]:
        """(tokens, targets) of a micro-batch, (B, T) int64 each; both count from 0."""
        first = (step * self.micro_steps + micro_step) * self.sequences
        windows = [self.window(first + row) for row in range(self.sequences)]
        tokens, targets = (np.stack(side) for side in zip(*windows, strict=True))
        return tokens, targets
