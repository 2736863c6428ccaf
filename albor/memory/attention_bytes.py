"""What a library's attention allocates beside the arena: it takes no outputs, and asks for its own scratch.

By formula from PyTorch's sources (flash_api.cpp, attention_backward.cu, MHA.cpp) and cudnn-frontend's
(scaled_dot_product_flash_attention.h), as an upper bound: what one call frees need not suit the next. Memory
that PyTorch's allocator holds for one stream, or for captured graphs, serves no other; a run has two such
pools, see `temporaries`. No torch.
"""

from __future__ import annotations

from dataclasses import dataclass

from albor.architecture import Architecture, round_up
from albor.memory.attention import AttentionChoice
from albor.memory.pytorch import CachingAllocator

_MIB = 2**20
_MOST_MULTIPROCESSORS = 192  # of any card; the deterministic flash backward has a sum for so many programs
_DP_LIMIT = 256 * _MIB  # cuDNN keeps dP whole up to this size on sm_90 and later


@dataclass(frozen=True)
class _Shape:
    """A call's, with the bytes of its tensors in half precision."""

    batch: int
    length: int
    heads: int
    kv_heads: int
    head_dim: int

    @property
    def queries(self) -> int:
        return 2 * self.batch * self.length * self.heads * self.head_dim

    @property
    def keys(self) -> int:
        return 2 * self.batch * self.length * self.kv_heads * self.head_dim

    @property
    def rows(self) -> int:
        """An fp32 number per query and head."""
        return 4 * self.batch * self.length * self.heads

    @property
    def expanded(self) -> list[int]:
        """dK and dV of every query head, before those of a group are summed."""
        return [] if self.heads == self.kv_heads else [self.queries, self.queries]


def temporaries(
    choice: AttentionChoice,
    model: Architecture,
    batch: int,
    length: int,
    evaluation_batch: int | None = None,
) -> dict[str, int]:
    """Bytes of device memory by origin, for sequences (batch, length); nothing for albor's own kernels.

    Two pools: the first step runs as it is, and what it took stays with its stream; later ones are graphs,
    with a pool of their own. Evaluations, (evaluation_batch, length), by default as large as a micro-batch,
    go forward on that stream: they find there what the step has left, where each piece is large enough.
    """
    heads, kv_heads = model.num_attention_heads, model.num_key_value_heads
    shape, evaluated = (
        _Shape(sequences, length, heads, kv_heads, model.head_dim)
        for sequences in (batch, evaluation_batch or batch)
    )
    if choice.backend == "flash":
        forward, backward = _flash_forward(shape), _flash_backward(shape, choice.deterministic)
        evaluation = _flash_forward(evaluated)
        names = ("flash attention", "flash attention, graphs")
    elif choice.backend == "cudnn":  # no source has all of its workspace
        forward, backward, evaluation = _results(shape), _cudnn_backward(shape), _results(evaluated)
        names = ("cuDNN attention (estimate)", "cuDNN attention, graphs (estimate)")
    else:
        return {}
    step = pool_bytes([*forward, *backward])
    left = sorted([*forward, *backward], reverse=True)
    finds_room = all(need <= size for need, size in zip(sorted(evaluation, reverse=True), left, strict=False))
    eager = step if finds_room else step + pool_bytes(evaluation)
    return dict(zip(names, (eager, step), strict=True))


def _results(shape: _Shape) -> list[int]:
    return [shape.queries, shape.rows]


def _flash_forward(shape: _Shape) -> list[int]:
    """Few programs are split along the keys, and have partial results: set_params_splitkv."""
    programs = shape.batch * shape.heads * -(-shape.length // 64)
    keys = 256 if shape.head_dim <= 64 else 128 if shape.head_dim <= 128 else 64
    splits = min(-(-shape.length // keys), 128)
    if splits == 1 or programs >= 0.8 * 2 * _MOST_MULTIPROCESSORS:
        return _results(shape)
    return [*_results(shape), splits * shape.rows, splits * shape.rows * _padded(shape.head_dim)]


def _flash_backward(shape: _Shape, deterministic: bool) -> list[int]:
    """mha_bwd: dQ is summed in fp32, in one buffer, or in one for each program that adds to a head's."""
    programs = shape.batch * shape.heads
    rows = 4 * programs * round_up(shape.length, 128)
    sums = -(-_MOST_MULTIPROCESSORS // programs) if deterministic else 1
    gradients = [shape.queries, shape.keys, shape.keys, *shape.expanded]
    return [*gradients, rows, sums * rows * _padded(shape.head_dim)]


def _cudnn_backward(shape: _Shape) -> list[int]:
    """dQ's fp32 sums or, where it fits a limit, dP, whichever is larger, and what flash has too."""
    square = round_up(shape.length, 64) ** 2 * shape.batch * shape.heads * 2
    sums = shape.rows * shape.head_dim
    workspace = max(sums, square if square <= _DP_LIMIT else 0)
    return [shape.queries, shape.keys, shape.keys, sum([*shape.expanded, shape.rows, workspace])]


def _padded(head_dim: int) -> int:
    return round_up(head_dim, 32 if head_dim <= 128 else 64)


def pool_bytes(sizes: list[int]) -> int:
    """What PyTorch's caching allocator, as it is by default, takes at most to hold tensors of `sizes` bytes.

    There is always something small: the state of a random generator that nothing reads.
    """
    return CachingAllocator().reserved([*sizes, 1])
