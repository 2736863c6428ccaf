"""The model in numbers: its parameter table, its FLOPs and where each parameter lies in the flat buffers.

Everything that needs to know a shape asks here: the memory plan, the arena's views, initialisation,
checkpoints and export. No torch.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import groupby

from albor.config import ModelConfig

# Every parameter starts at a multiple of this many elements in the flat buffers: 256 bytes in bf16, which
# is what a GEMM wants of its operands on every device that albor runs on.
ALIGNMENT_ELEMENTS = 128
IGNORED_TARGET = -1  # a target that is padding: no loss, no gradient


@dataclass(frozen=True)
class Parameter:
    """One weight tensor: where it belongs, and how it is initialised and decayed."""

    name: str  # such as blocks.07.attention.qkv
    shape: tuple[int, ...]
    block: str  # the gradient group: embedding, blocks.07, head
    offset: int  # first element in the flat buffers
    init_std: float | None  # normal with this standard deviation; None: ones (the norms)

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def decays(self) -> bool:
        """Weight decay is for matrices; a norm's scale has no reason to shrink."""
        return len(self.shape) > 1


@dataclass(frozen=True)
class BlockSlice:
    """The elements of one gradient group in the flat buffers: [start, matrices_end) decay, the rest does
    not.
    """

    name: str
    start: int
    matrices_end: int
    end: int
    lr_scale: float  # of the matrices: what their learning rate is multiplied by

    @property
    def size(self) -> int:
        """Elements, including alignment padding."""
        return self.end - self.start


@dataclass(frozen=True)
class Segment:
    """Neighbouring elements of the flat buffers, padding included, that belong to one gradient norm."""

    group: str  # whose norm: embedding, block_07/attention, block_07/mlp, head
    start: int
    end: int


@dataclass(frozen=True)
class Architecture:
    """A pre-norm LLaMA: RMSNorm, grouped-query attention with rotary positions, SwiGLU; tied or untied head.

    Weights are packed where that makes one GEMM of several: query, key and value together; gate and up
    together.
    """

    hidden_size: int  # C
    intermediate_size: int  # F
    num_hidden_layers: int
    num_attention_heads: int  # H
    num_key_value_heads: int  # K
    vocab_size: int  # V
    max_position_embeddings: int
    rope_theta: float
    rms_norm_eps: float
    tie_word_embeddings: bool
    initializer_range: float
    mup_base_width: int | None

    @classmethod
    def from_config(cls, model: ModelConfig) -> Architecture:
        """The architecture that the `model` section describes."""
        return _architecture(model)

    @property
    def head_dim(self) -> int:
        """D: width of one attention head."""
        return self.hidden_size // self.num_attention_heads

    @property
    def qkv_size(self) -> int:
        """Rows of the packed query, key and value projection: (H + 2K) * D."""
        return (self.num_attention_heads + 2 * self.num_key_value_heads) * self.head_dim

    @property
    def width_scale(self) -> float:
        """Base width / width: what muP multiplies the logits, the learning rate of the blocks' matrices and
        the variance of their initial values by (Yang et al. 2022, arXiv:2203.03466, table 8). 1 without muP.
        """
        return 1.0 if self.mup_base_width is None else self.mup_base_width / self.hidden_size

    def _shapes(self) -> Iterator[tuple[str, str, tuple[int, ...], float | None]]:
        """(block, name, shape, init_std) in the order of the forward pass, matrices first within each
        block.
        """
        std = self.initializer_range
        inner_std = std * math.sqrt(self.width_scale)
        # Each block adds two outputs to the residual stream; scaling them keeps its variance at depth
        # (GPT-2).
        residual_std = inner_std / math.sqrt(2 * self.num_hidden_layers)
        width, ffn = self.hidden_size, self.intermediate_size
        yield "embedding", "embedding.tokens", (self.vocab_size, width), std
        for layer in range(self.num_hidden_layers):
            block = block_name(layer)
            yield block, f"{block}.attention.qkv", (self.qkv_size, width), inner_std
            yield block, f"{block}.attention.out", (width, width), residual_std
            yield block, f"{block}.mlp.gate_up", (2 * ffn, width), inner_std
            yield block, f"{block}.mlp.down", (width, ffn), residual_std
            yield block, f"{block}.attention.norm", (width,), None
            yield block, f"{block}.mlp.norm", (width,), None
        if not self.tie_word_embeddings:
            yield "head", "head.tokens", (self.vocab_size, width), std
        yield "head", "head.norm", (width,), None

    @cached_property
    def parameters(self) -> tuple[Parameter, ...]:
        """Every weight tensor, in the order of the flat buffers."""
        table, offset = [], 0
        for block, name, shape, init_std in self._shapes():
            table.append(Parameter(name, shape, block, offset, init_std))
            offset += round_up(math.prod(shape), ALIGNMENT_ELEMENTS)
        return tuple(table)

    @cached_property
    def blocks(self) -> tuple[BlockSlice, ...]:
        """The gradient groups in forward order: embedding, blocks.00, ..., head."""
        slices: list[BlockSlice] = []
        for name, group in groupby(self.parameters, key=lambda parameter: parameter.block):
            members = list(group)
            matrices = [p for p in members if p.decays]
            start = members[0].offset
            end = members[-1].offset + round_up(members[-1].size, ALIGNMENT_ELEMENTS)
            matrices_end = (
                matrices[-1].offset + round_up(matrices[-1].size, ALIGNMENT_ELEMENTS) if matrices else start
            )
            inner = name not in ("embedding", "head")
            slices.append(BlockSlice(name, start, matrices_end, end, self.width_scale if inner else 1.0))
        return tuple(slices)

    @cached_property
    def segments(self) -> tuple[Segment, ...]:
        """The flat buffers cut up by gradient norms, in their order; a block's two groups lie in two pieces
        each, matrices and norm.
        """
        starts = [(_norm_group(p), p.offset) for p in self.parameters]
        firsts = [next(group) for _, group in groupby(starts, key=lambda start: start[0])]
        ends = [*(start for _, start in firsts[1:]), self.flat_size]
        return tuple(Segment(group, start, end) for (group, start), end in zip(firsts, ends, strict=True))

    @cached_property
    def parameter_count(self) -> int:
        """P: trained numbers, without alignment padding; a tied matrix counts once."""
        return sum(parameter.size for parameter in self.parameters)

    @cached_property
    def flat_size(self) -> int:
        """Elements of each flat buffer, with padding."""
        return self.blocks[-1].end

    def flops_per_token(self, sequence_length: int) -> int:
        """Training FLOPs per token, forward and backward, by the causal convention (llm.c, llmq).

        6 per weight that a GEMM reads, the output head included once, tied or not, and
        6 * layers * H * D * T for attention of which the masked half is not counted.
        """
        per_layer = sum(p.size for p in self.parameters if p.block == block_name(0) and p.decays)
        matmul_weights = self.num_hidden_layers * per_layer + self.vocab_size * self.hidden_size
        attention = 6 * self.num_hidden_layers * self.hidden_size * sequence_length
        return 6 * matmul_weights + attention


@lru_cache(maxsize=16)  # its tables take longer to make than a plan, and many plans are for one model
def _architecture(model: ModelConfig) -> Architecture:
    values = model.model_dump(exclude={"init_from"})
    if values["num_key_value_heads"] is None:
        values["num_key_value_heads"] = values["num_attention_heads"]
    return Architecture(**values)


def block_name(layer: int) -> str:
    """Name of a transformer block: `blocks.07`. Two digits keep names in order up to 100 layers."""
    return f"blocks.{layer:02d}"


def _norm_group(parameter: Parameter) -> str:
    kind, _, number = parameter.block.partition(".")
    if kind != "blocks":
        return parameter.block
    return f"block_{number}/{parameter.name.removeprefix(parameter.block)[1:].partition('.')[0]}"


def round_up(value: int, multiple: int) -> int:
    """The smallest multiple of `multiple` that is not below `value`."""
    return -(-value // multiple) * multiple
