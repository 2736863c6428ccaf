"""The memory plan: every buffer of a run, by name, with its place, its size and the phases it lives in.

The plan is what `albor vram-estimate` prints, what `albor train` checks before it launches, and what
`albor.memory.arena` allocates: there is nothing else to allocate from, so the three cannot disagree.
Computing it needs no torch and no GPU, and takes milliseconds.

A run walks the phases of `training_phases` in order, once per micro-batch up to `embed_backward`. Buffers
whose lifetimes do not meet share memory; offsets are assigned here, and the peak is the arena's size.

Letters in shapes: B sequences, T tokens of each, N = B * T, C hidden, F feed-forward, V vocabulary,
H query heads, K key/value heads, D head width.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

from albor.architecture import Architecture, block_name, round_up
from albor.config import RunConfig
from albor.memory import attention_bytes
from albor.memory.attention import AttentionChoice, choose_attention
from albor.memory.packing import Lifetime, live_sizes, pack

Place = Literal["device", "pinned", "host"]
Group = Literal["weights", "master", "moments", "gradients", "activations", "scratch", "logits", "io"]
PLACES: tuple[Place, ...] = ("device", "pinned", "host")
GROUPS: tuple[Group, ...] = (
    "weights", "master", "moments", "gradients", "activations", "scratch", "logits", "io",
)  # fmt: skip
DTYPE_BYTES = {"bool": 1, "bfloat16": 2, "float16": 2, "float32": 4, "int32": 4, "float64": 8, "int64": 8}

# What a run learns, flat; a checkpoint holds these and nothing else of the arena.
STATE_BUFFERS = ("weights", "master", "moments.first", "moments.second")

ALIGNMENT_BYTES = (
    256  # of every buffer; what CUDA's own allocator guarantees at least, and a multiple of AVX-512's
)
ROW_CHUNK = (
    256  # tokens that elementwise arithmetic takes at a time on the torch path, to stay in the L2 cache
)
WIDENED = 65536  # elements of a half-precision gradient that are widened at a time to be added to the sums
# Threads that add gradients up in host memory, and the scratch of each: chunks are larger here, since between
# two of them threads take turns.
SUM_THREADS, WIDENED_BY_THREADS = 16, 2**18
QUERY_BLOCK = 256  # queries whose attention scores exist at one time on the torch path
# The kernels' scratch. It depends on no device: a plan, and the order of every sum, is the same on all.
NORM_PARTIALS = 256  # programs of RMSNorm's backward: at least one for each multiprocessor of any card
SUM_PARTIALS = 1024  # programs of the gradient norms, and one more for each
STAGED_BATCHES = 2  # micro-batches that are on their way to a GPU, or waiting for it

ACTIVATIONS = (
    "input", "attention_rstd", "attention_normed", "qkv", "attention_lse", "attention_out",
    "middle", "mlp_rstd", "mlp_normed", "gate_up",
)  # fmt: skip
# What each recompute mode keeps of a block from its forward to its backward. SwiGLU's product is never kept:
# its backward needs gate and up anyway, and emits the product again on the way.
KEPT: dict[str, tuple[str, ...]] = {
    "none": ACTIVATIONS,
    "cheap": tuple(name for name in ACTIVATIONS if not name.endswith("_normed")),
    "block": ("input",),
}


def training_phases(layers: int) -> tuple[str, ...]:
    """The phases of a run in the order that the trainer enters them."""
    return (
        "initialise",
        "embed",
        *(f"forward.{layer:02d}" for layer in range(layers)),
        "head",
        *(f"backward.{layer:02d}" for layer in reversed(range(layers))),
        "embed_backward",
        "clip",
        "optimize",
        "evaluate",
        "sample",
        "checkpoint",
    )


INFERENCE_PHASES = ("initialise", "evaluate", "sample")


@dataclass(frozen=True)
class Buffer:
    """One tensor of the plan. It holds data from phase `first` to phase `last`, both included."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    place: Place
    group: Group
    first: int
    last: int
    offset: int = 0  # bytes from the start of its place's arena

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor itself."""
        return math.prod(self.shape) * DTYPE_BYTES[self.dtype]

    @property
    def reserved(self) -> int:
        """Bytes that it occupies in the arena, with alignment."""
        return round_up(self.nbytes, ALIGNMENT_BYTES)


@dataclass(frozen=True)
class Row:
    """Buffers that are alike but for their names and lifetimes, such as one for each block."""

    names: tuple[str, ...]
    shape: tuple[int, ...]
    dtype: str
    place: Place
    group: Group
    lifetimes: tuple[Lifetime, ...]  # of each name

    @property
    def reserved(self) -> int:
        """Bytes of one of them in the arena, with alignment."""
        return round_up(math.prod(self.shape) * DTYPE_BYTES[self.dtype], ALIGNMENT_BYTES)


@dataclass(frozen=True)
class Slab:
    """The buffers of one place and one lifetime, which lie side by side."""

    offset: int
    size: int

    @property
    def end(self) -> int:
        """One past its last byte."""
        return self.offset + self.size


@dataclass(frozen=True)
class MemoryPlan:
    """Buffers with offsets. Equal configurations give equal buffers, on every machine.

    It is kept as rows and slabs, of which there are few, so that thousands of plans can be compared; the
    buffers are listed when they are asked for.
    """

    phases: tuple[str, ...]
    rows: tuple[Row, ...]
    slabs: Mapping[Place, Mapping[Lifetime, Slab]]
    device: Literal["cpu", "cuda"]
    compute_dtype: str
    accumulator: Literal["cpu", "gpu"]
    attention: AttentionChoice
    # What operations take beside the arena within one call, by origin. Every operation writes into planned
    # buffers; what is left is what a library's GEMM or attention takes for itself.
    temporaries: dict[str, int] = field(default_factory=dict)

    @cached_property
    def buffers(self) -> tuple[Buffer, ...]:
        """Every buffer, with the bytes from its place's start at which it lies."""
        offsets = {
            place: {life: slab.offset for life, slab in slabs.items()} for place, slabs in self.slabs.items()
        }
        buffers = []
        for row in self.rows:
            reserved, free = row.reserved, offsets[row.place]
            for name, life in zip(row.names, row.lifetimes, strict=True):
                buffers.append(Buffer(name, row.shape, row.dtype, row.place, row.group, *life, free[life]))
                free[life] += reserved
        assert len({buffer.name for buffer in buffers}) == len(buffers), "two buffers have one name"
        return tuple(buffers)

    def size(self, place: Place) -> int:
        """Bytes of one place's arena: the end of its last buffer."""
        return _end(self.slabs[place])

    @cached_property
    def live_bytes(self) -> dict[str, int]:
        """Bytes of device buffers that hold data, by phase."""
        slabs = self.slabs["device"]
        live = live_sizes({life: slab.size for life, slab in slabs.items()}, len(self.phases))
        return dict(zip(self.phases, live, strict=True))

    @property
    def peak_phase(self) -> str:
        """The phase that holds the most; it sets the size of the arena."""
        return max(self.live_bytes, key=lambda phase: self.live_bytes[phase])

    def live_in(self, phase: str) -> list[Buffer]:
        """Device buffers that hold data in `phase`, the largest first."""
        index = self.phases.index(phase)
        live = [b for b in self.buffers if b.place == "device" and b.first <= index <= b.last]
        return sorted(live, key=lambda b: -b.reserved)

    @property
    def groups(self) -> dict[str, int]:
        """Device bytes by group in the peak phase; with `gaps` between buffers they sum to the arena's
        size.
        """
        sums: dict[str, int] = dict.fromkeys(GROUPS, 0)
        for buffer in self.live_in(self.peak_phase):
            sums[buffer.group] += buffer.reserved
        gaps = self.size("device") - sum(sums.values())
        return {**sums, **({"gaps": gaps} if gaps else {})}


class _Draft:
    """Collects buffers under phase names, and then gives each its offset."""

    def __init__(self, phases: tuple[str, ...], compute_dtype: str):
        self.phases = phases
        self.compute_dtype = compute_dtype
        # Sums and norms of half-precision values are taken in fp32.
        self.wide_dtype = "float64" if compute_dtype == "float64" else "float32"
        self._index = {phase: i for i, phase in enumerate(phases)}
        self.rows: list[Row] = []

    def add(
        self,
        name: str,
        shape: tuple[int, ...],
        group: Group,
        *,
        first: str | None = None,
        last: str | None = None,
        dtype: str | None = None,
        place: Place = "device",
    ) -> None:
        """A buffer that lives from phase `first` to phase `last`; without either, for the whole run."""
        start = 0 if first is None else self._index[first]
        end = (len(self.phases) - 1 if first is None else start) if last is None else self._index[last]
        self.rows.append(Row((name,), shape, dtype or self.compute_dtype, place, group, ((start, end),)))

    def add_each(
        self,
        names: Iterable[str],
        shape: tuple[int, ...],
        group: Group,
        lives: Iterable[tuple[str, str]],
        *,
        dtype: str | None = None,
    ) -> None:
        """Buffers on the device of one shape, each with its first and last phase in `lives`."""
        lifetimes = tuple((self._index[first], self._index[last]) for first, last in lives)
        self.rows.append(Row(tuple(names), shape, dtype or self.compute_dtype, "device", group, lifetimes))

    def copy(self) -> _Draft:
        """Another with the same buffers, to go on with."""
        other = _Draft(self.phases, self.compute_dtype)
        other.rows = list(self.rows)
        return other

    def declared(self, names: Sequence[str]) -> list[Row]:
        """The rows of those of `names` that were added."""
        return [row for row in self.rows if row.names[0] in names]

    def sizes(self, place: Place) -> dict[Lifetime, int]:
        """Bytes of the slab of each lifetime."""
        sizes: dict[Lifetime, int] = {}
        for row in self.rows:
            if row.place == place:
                reserved = row.reserved
                for life in row.lifetimes:
                    sizes[life] = sizes.get(life, 0) + reserved
        return sizes

    def least(self) -> int:
        """Bytes that no placing of the device's buffers can do without."""
        return max(live_sizes(self.sizes("device"), len(self.phases)))

    def slabs(self, place: Place) -> dict[Lifetime, Slab]:
        """The slab of each lifetime, placed."""
        sizes = self.sizes(place)
        starts = pack(sizes)
        return {life: Slab(starts[life], size) for life, size in sizes.items()}


def plan_training(
    config: RunConfig,
    device: Literal["cpu", "cuda"],
    compute_dtype: str,
    accumulator: Literal["cpu", "gpu"] | None = None,
    attention: AttentionChoice | None = None,
) -> MemoryPlan:
    """Every buffer that training `config` on `device` takes.

    `compute_dtype` is what `albor.memory.devices.compute_dtype` resolves the precision to; float64 is for
    tests. `accumulator` and `attention` override what is configured, where `auto` has been resolved; `auto`
    itself plans for the host, and for a card that is not known. Raises ConfigError for an attention that
    cannot run on `device`.
    """
    place = accumulator or ("gpu" if config.train.accumulator == "gpu" else "cpu")
    chosen = attention or choose_attention(config, device, capability=None)
    model = Architecture.from_config(config.model)
    draft = _draft_training(config, model, device, compute_dtype, place, chosen)
    if device == "cuda" and place == "cpu":
        draft, slabs = _with_returned_sums(draft, model)
    else:
        slabs = draft.slabs("device")
    temporaries = training_temporaries(config, device, compute_dtype, chosen)
    return _plan_of(draft, slabs, device, place, chosen, temporaries)


def training_temporaries(
    config: RunConfig, device: Literal["cpu", "cuda"], compute_dtype: str, attention: AttentionChoice
) -> dict[str, int]:
    """`MemoryPlan.temporaries` of `plan_training`, which takes next to no time."""
    return _temporaries(device, compute_dtype) | attention_bytes.temporaries(
        attention,
        Architecture.from_config(config.model),
        config.train.micro_batch_size,
        config.data.sequence_length,
        evaluation_batch(config),
    )


def least_device_bytes(
    config: RunConfig,
    device: Literal["cpu", "cuda"],
    compute_dtype: str,
    accumulator: Literal["cpu", "gpu"],
    attention: AttentionChoice,
) -> int:
    """Bytes that no placing of the device's buffers can do without: the arena of `plan_training` has as many
    or more. Takes a fraction of the time, for nothing is placed.
    """
    model = Architecture.from_config(config.model)
    return _draft_training(config, model, device, compute_dtype, accumulator, attention).least()


def _plan_of(
    draft: _Draft,
    slabs: dict[Lifetime, Slab],
    device: Literal["cpu", "cuda"],
    accumulator: Literal["cpu", "gpu"],
    attention: AttentionChoice,
    temporaries: dict[str, int],
) -> MemoryPlan:
    places: dict[Place, dict[Lifetime, Slab]] = {
        "device": slabs, "pinned": draft.slabs("pinned"), "host": draft.slabs("host"),
    }  # fmt: skip
    return MemoryPlan(
        draft.phases,
        tuple(draft.rows),
        places,
        device,
        draft.compute_dtype,
        accumulator,
        attention,
        temporaries,
    )


def _draft_training(
    config: RunConfig,
    model: Architecture,
    device: Literal["cpu", "cuda"],
    compute_dtype: str,
    place: Literal["cpu", "gpu"],
    attention: AttentionChoice,
) -> _Draft:
    """All but the places to which sums in host memory come back."""
    layers = model.num_hidden_layers
    draft = _Draft(training_phases(layers), compute_dtype)
    batch, length = config.train.micro_batch_size, config.data.sequence_length
    rows = batch * length
    last_forward, first_backward = f"forward.{layers - 1:02d}", f"backward.{layers - 1:02d}"
    last_backward = "backward.00"

    _add_state(draft, config, model, device)
    _add_gradients(draft, model, place, device)
    _add_workspace(draft, config, model, device, trains=True, evaluates=True)
    _add_io(draft, config, max(rows, evaluation_batch(config) * length))
    _add_training_io(draft, config, rows, device)

    # Forward and backward: what is kept per block, and what all blocks share while they run.
    kept = KEPT[config.train.recompute]
    shapes = _activation_shapes(model, rows, length, device)
    blocks = [block_name(layer) for layer in range(layers)]
    lives = [(f"forward.{layer:02d}", f"backward.{layer:02d}") for layer in range(layers)]
    for name in kept:
        if name not in shapes:
            continue
        # The embedding writes the first block's input.
        own = [("embed", last_backward), *lives[1:]] if name == "input" else lives
        draft.add_each(
            [f"{block}.{name}" for block in blocks], shapes[name], "activations", own,
            dtype=_activation_dtype(draft, name),
        )  # fmt: skip
    for name in shapes:
        if name not in kept:
            # The last block's residual stream goes on into the head.
            end = "head" if name == "middle" else last_forward
            _add_activation(draft, f"forward.{name}", shapes[name], "forward.00", end)
            _add_activation(draft, f"backward.{name}", shapes[name], first_backward, last_backward)
    wide, ffn = (rows, model.hidden_size), (rows, model.intermediate_size)
    draft.add("forward.hidden", ffn, "scratch", first="forward.00", last=last_forward)  # (N, F)
    draft.add("forward.delta", wide, "scratch", first="forward.00", last="head")  # (N, C)
    draft.add("backward.hidden", ffn, "scratch", first=first_backward, last=last_backward)  # (N, F)
    if config.train.recompute == "block":
        draft.add("backward.delta", wide, "scratch", first=first_backward, last=last_backward)  # (N, C)
    draft.add("head.input", wide, "activations", first="head")  # (N, C)
    draft.add("head.rstd", (rows,), "activations", first="head", dtype=draft.wide_dtype)  # (N,)
    draft.add("head.normed", wide, "activations", first="head")  # (N, C)
    draft.add("head.d_normed", wide, "scratch", first="head")  # (N, C)
    _add_logits(draft, config, model, "head", rows, device)
    draft.add("backward.d_x", wide, "scratch", first="head", last="embed_backward")  # (N, C)
    for name, columns in (
        ("d_hidden", model.intermediate_size),
        ("d_normed", model.hidden_size),
        ("d_attention", model.hidden_size),
        ("d_qkv", model.qkv_size),
    ):
        draft.add(f"backward.{name}", (rows, columns), "scratch", first=first_backward, last=last_backward)
    if device == "cpu":
        draft.add(
            "backward.d_embedded", wide, "scratch", first="embed_backward", dtype=draft.wide_dtype
        )  # (N, C)
    elif attention.backend == "triton":
        draft.add(
            "backward.attention_delta", shapes["attention_lse"], "scratch", dtype=draft.wide_dtype,
            first=first_backward, last=last_backward,
        )  # fmt: skip
    _add_evaluation(draft, config, model, evaluation_batch(config), device)
    if config.evaluate.prompts:
        _add_sampling(draft, model, length, device)
    return draft


def evaluation_batch(config: RunConfig) -> int:
    """Sequences that an evaluation during training runs at a time."""
    return config.evaluate.micro_batch_size or config.train.micro_batch_size


def plan_inference(
    config: RunConfig, device: Literal["cpu", "cuda"], compute_dtype: str, batch: int = 0
) -> MemoryPlan:
    """Every buffer that writing with a trained `config` takes, and evaluating `batch` sequences of its length
    at a time, 0: none. Albor's own attention does it, whatever the run was trained with.
    """
    model = Architecture.from_config(config.model)
    draft = _Draft(INFERENCE_PHASES, compute_dtype)
    draft.add("weights", (model.flat_size,), "weights")
    _add_workspace(draft, config, model, device, trains=False, evaluates=batch > 0)
    if batch:
        _add_io(draft, config, batch * config.data.sequence_length)
        _add_evaluation(draft, config, model, batch, device)
    _add_sampling(draft, model, config.data.sequence_length, device)
    attention = AttentionChoice("torch" if device == "cpu" else "triton", "nothing is trained")
    temporaries = _temporaries(device, compute_dtype)
    return _plan_of(draft, draft.slabs("device"), device, "cpu", attention, temporaries)


def _temporaries(device: str, compute_dtype: str) -> dict[str, int]:
    # oneDNN reorders blocks of a half-precision GEMM's operands: at most 1.2 MiB per thread was seen, at any
    # size.
    if device == "cpu" and compute_dtype in ("bfloat16", "float16"):
        return {"oneDNN scratch": (os.cpu_count() or 1) * 2 * 2**20}
    return {}


def _add_io(draft: _Draft, config: RunConfig, rows: int) -> None:
    """A batch of at most so many tokens, and what comes of it."""
    for name, shape, dtype in _batch_shapes(config, rows):
        draft.add(f"io.{name}", shape, "io", dtype=dtype)
    draft.add("io.losses", (rows,), "io", dtype=draft.wide_dtype)  # (N,)


def _batch_shapes(config: RunConfig, rows: int) -> list[tuple[str, tuple[int, ...], str]]:
    batch: list[tuple[str, tuple[int, ...], str]] = [
        ("tokens", (rows,), "int64"),
        ("targets", (rows,), "int64"),
    ]
    if config.data.document_mask:
        batch += [("document_start", (rows,), "int32"), ("document_end", (rows,), "int32")]
    return batch


def _add_training_io(draft: _Draft, config: RunConfig, rows: int, device: str) -> None:
    """What a step reads beside its micro-batch, and what it says."""
    index: list[tuple[str, tuple[int, ...]]] = [("unique_tokens", (rows,))]
    index += [("unique_index", (rows,))] if device == "cpu" else [
        ("segment_starts", (rows + 1,)),
        ("token_order", (rows,)),
    ]  # fmt: skip
    for name, shape in index:
        draft.add(f"io.{name}", shape, "io", dtype="int64")
    draft.add("io.scale", (1,), "io", dtype=draft.wide_dtype)  # of the loss's gradient
    # Sum of losses; squared gradient norm of every segment.
    results = (1 + len(Architecture.from_config(config.model).segments),)
    draft.add("io.results", results, "io", dtype="float64")
    if device == "cpu":
        return
    draft.add("io.update", (4,), "io", dtype="float32")  # see UpdateScalars
    draft.add("io.update_seed", (1,), "io", dtype="int64")
    draft.add("io.staged_results", results, "io", dtype="float64", place="pinned")
    batch = [*_batch_shapes(config, rows), *((name, shape, "int64") for name, shape in index)]
    for slot in range(STAGED_BATCHES):
        for name, shape, dtype in batch:
            draft.add(f"io.staged.{slot}.{name}", shape, "io", dtype=dtype, place="pinned")


def keeps_master(config: RunConfig, compute_dtype: str) -> bool:
    """Whether the optimizer updates fp32 copies of the weights."""
    return compute_dtype in ("bfloat16", "float16") and not rounds_state(config, compute_dtype)


def rounds_state(config: RunConfig, compute_dtype: str) -> bool:
    """Whether weights and moments are bf16 alone, updated with stochastic rounding."""
    return config.optimizer.state_dtype == "bf16" and compute_dtype == "bfloat16"


def _add_state(draft: _Draft, config: RunConfig, model: Architecture, device: str) -> None:
    """Weights and optimizer state: flat, one slice per block; and the copy from which a checkpoint is written
    in the background.
    """
    draft.add("weights", (model.flat_size,), "weights")
    if keeps_master(config, draft.compute_dtype):
        draft.add("master", (model.flat_size,), "master", dtype="float32")
    moments = "bfloat16" if rounds_state(config, draft.compute_dtype) else draft.wide_dtype
    for name in ("first", "second"):
        draft.add(f"moments.{name}", (model.flat_size,), "moments", dtype=moments)
    if config.checkpoint.background:
        place: Place = "pinned" if device == "cuda" else "host"
        for row in draft.declared(STATE_BUFFERS):
            draft.add(f"snapshot.{row.names[0]}", row.shape, row.group, dtype=row.dtype, place=place)


def _add_gradients(draft: _Draft, model: Architecture, accumulator: str, device: str) -> None:
    """The sum over micro-batches in fp32, and the buffers that backward writes into on the device."""
    host: Place = (
        "pinned" if device == "cuda" else "host"
    )  # a GPU copies to and from page-locked memory alone
    place: Place = "device" if accumulator == "gpu" else host
    draft.add("gradients.accumulator", (model.flat_size,), "gradients", dtype=draft.wide_dtype, place=place)
    if device == "cuda" and accumulator == "gpu":  # the weight gradients' GEMMs add to the sums themselves
        programs = norm_programs(model)
        # See Ops.squared_norms.
        draft.add("gradients.norm_partials", (sum(programs),), "scratch", dtype="float64")
        draft.add("gradients.norm_programs", (sum(programs), 4), "scratch", dtype="int64")
        draft.add("gradients.norm_firsts", (len(programs) + 1,), "scratch", dtype="int64")
        return
    threads, widened = (1, WIDENED) if device == "cpu" else (SUM_THREADS, WIDENED_BY_THREADS)
    draft.add("gradients.widened", (threads, widened), "gradients", dtype=draft.wide_dtype, place="host")
    sizes = {block.name: block.size for block in model.blocks}
    layers = model.num_hidden_layers
    # Two, so that one can leave the device while the next block's backward fills the other.
    places = {f"block.{slot}": sizes[block_name(0)] for slot in range(min(2, layers))}
    places |= {name: sizes[name] for name in ("head", "embedding")}
    begin = dict.fromkeys(places, f"backward.{layers - 1:02d}") | {"head": "head"}
    # A tied matrix gets its gradient from the head first and from the embedding last.
    begin["embedding"] = "head" if model.tie_word_embeddings else "embed_backward"
    if device == "cuda":  # the last ones leave while the next micro-batch goes forward
        begin = dict.fromkeys(places, "embed")
    for name, size in places.items():
        draft.add(f"gradients.{name}", (size,), "gradients", first=begin[name], last="embed_backward")
    if device == "cpu":
        return
    # One for each block, so that the host may add up until the block's next gradient comes.
    for name, size in sizes.items():
        draft.add(f"gradients.transfer.{name}", (size,), "gradients", place="pinned")


def _with_returned_sums(draft: _Draft, model: Architecture) -> tuple[_Draft, dict[Lifetime, Slab]]:
    """`draft` with places for the sums that come back from host memory for the update.

    Where that costs nothing at the peak, each block's has one of its own, in memory of activations that are
    done with, and travels while the backward goes on; elsewhere all take turns in two.
    """
    slots, early = draft, draft.copy()
    blocks = model.blocks
    largest = max(block.size for block in blocks)
    slots.add_each(
        [f"gradients.returned.{slot}" for slot in range(2)], (largest,), "gradients",
        [("optimize", "optimize")] * 2, dtype=draft.wide_dtype,
    )  # fmt: skip
    # From when the block's own backward is over, for its sum cannot be back earlier; the head's with the last
    # block's, since in that block's backward the arena is fullest.
    layers = model.num_hidden_layers
    after = {block_name(layer): f"backward.{layer - 1:02d}" for layer in range(1, layers)}
    after |= {block_name(0): "embed_backward", "embedding": "clip"}
    after["head"] = after[block_name(layers - 1)]
    sizes = {block.name: block.size for block in blocks}
    for size, names in by_size(sizes).items():
        early.add_each(
            [f"gradients.returned.{name}" for name in names], (size,), "gradients",
            [(after[name], "optimize") for name in names], dtype=draft.wide_dtype,
        )  # fmt: skip
    in_turns = slots.slabs("device")
    most = _end(in_turns)
    if early.least() <= most and _end(slabs := early.slabs("device")) <= most:
        return early, slabs
    return slots, in_turns


def _end(slabs: Mapping[Lifetime, Slab]) -> int:
    return max((slab.end for slab in slabs.values()), default=0)


def by_size(sizes: Mapping[str, int]) -> dict[int, list[str]]:
    """Names by their sizes."""
    names: dict[int, list[str]] = {}
    for name, size in sizes.items():
        names.setdefault(size, []).append(name)
    return names


def _activation_shapes(
    model: Architecture, rows: int, length: int, device: str
) -> dict[str, tuple[int, ...]]:
    width = (rows, model.hidden_size)
    shapes: dict[str, tuple[int, ...]] = {
        "input": width,  # (N, C) the residual stream before attention
        "attention_rstd": (rows,),
        "attention_normed": width,
        "qkv": (rows, model.qkv_size),  # (N, (H + 2K) D), q and k rotated
        "attention_out": width,  # (N, H D)
        "middle": width,  # (N, C) the residual stream before the feed-forward layer
        "mlp_rstd": (rows,),
        "mlp_normed": width,
        "gate_up": (rows, 2 * model.intermediate_size),  # (N, 2F), overwritten by its gradient
    }
    if device == "cuda":
        # (B, H, T) the logarithm of each softmax's denominator; the torch path computes the weights again.
        shapes["attention_lse"] = (rows // length, model.num_attention_heads, length)
    return {name: shapes[name] for name in ACTIVATIONS if name in shapes}


def _activation_dtype(draft: _Draft, name: str) -> str:
    """A norm's reciprocal root mean square, one per token, stays wide; so does a softmax's denominator."""
    return draft.wide_dtype if name.endswith(("rstd", "lse")) else draft.compute_dtype


def _add_activation(draft: _Draft, name: str, shape: tuple[int, ...], first: str, last: str) -> None:
    dtype = _activation_dtype(draft, name)
    draft.add(name, shape, "activations", first=first, last=last, dtype=dtype)


def head_chunk_tokens(config: RunConfig, device: str) -> int:
    """Tokens whose logits exist at one time."""
    rows = config.train.micro_batch_size * config.data.sequence_length
    # 256 rows keep a chunk in a CPU's L3 cache; a GPU wants GEMMs of a few thousand rows.
    return min(config.train.head_chunk_tokens or (256 if device == "cpu" else 4096), rows)


def _add_logits(
    draft: _Draft, config: RunConfig, model: Architecture, phase: str, rows: int, device: str
) -> None:
    chunk = min(head_chunk_tokens(config, device), rows)
    draft.add(f"{phase}.logits", (chunk, model.vocab_size), "logits", first=phase)  # (chunk, V)
    if device == "cpu" and draft.compute_dtype != draft.wide_dtype:
        draft.add(
            f"{phase}.probabilities", (chunk, model.vocab_size), "logits", first=phase, dtype=draft.wide_dtype
        )


def norm_programs(model: Architecture) -> list[int]:
    """How many programs take the gradient norm of each segment: by its size, at least one, so that all end at
    about the same time.
    """
    return [1 + (part.end - part.start) * SUM_PARTIALS // model.flat_size for part in model.segments]


def _add_workspace(
    draft: _Draft, config: RunConfig, model: Architecture, device: str, *, trains: bool, evaluates: bool
) -> None:
    """Small scratch that all phases share; its sizes do not depend on the micro-batch."""
    half = model.head_dim // 2
    # The kernels compute in fp32 from whatever they load; the torch path would have to widen what it reads.
    tables = draft.wide_dtype if device == "cuda" else None
    for name in ("cos", "sin"):
        draft.add(f"rotary.{name}", (model.max_position_embeddings, half), "scratch", dtype=tables)
    if device == "cpu":
        _add_torch_workspace(draft, config, model, trains=trains, evaluates=evaluates)
        return
    if trains:
        draft.add(
            "workspace.norm_partials", (NORM_PARTIALS, model.hidden_size), "scratch", dtype=draft.wide_dtype
        )


def _add_torch_workspace(
    draft: _Draft, config: RunConfig, model: Architecture, *, trains: bool, evaluates: bool
) -> None:
    length = config.data.sequence_length
    queries = min(QUERY_BLOCK, length)
    kv_heads, group = model.num_key_value_heads, model.num_attention_heads // model.num_key_value_heads
    half = model.head_dim // 2

    def add(name: str, *shape: int, dtype: str | None = None) -> None:
        draft.add(f"workspace.{name}", shape, "scratch", dtype=dtype)

    for slot in range(3):
        add(f"wide.{slot}", ROW_CHUNK, model.hidden_size, dtype=draft.wide_dtype)
    add("rotated", ROW_CHUNK, model.num_attention_heads + kv_heads, half)
    for name in ("query", "d_query"):
        add(name, kv_heads, group, queries, model.head_dim)
    add("causal_mask", queries, queries)
    if not (trains or evaluates):
        return
    add("scores", kv_heads, group * queries, length)
    for name in ("key", "value"):
        add(name, kv_heads, length, model.head_dim)
    if config.data.document_mask:
        add("hidden_keys", queries, length, dtype="bool")
    if not trains:
        return
    add("weight_gradient", model.hidden_size, dtype=draft.wide_dtype)
    add("feed_forward", ROW_CHUNK, model.intermediate_size)
    add("d_scores", kv_heads, group * queries, length)
    add("d_out", kv_heads, group, queries, model.head_dim)
    add("d_key", kv_heads, length, model.head_dim)
    if length > queries:  # several query blocks add to one key's gradient: that sum is taken wide
        for name in ("d_key_sum", "d_value_sum", "d_key_wide"):
            add(name, kv_heads, length, model.head_dim, dtype=draft.wide_dtype)


def _add_evaluation(draft: _Draft, config: RunConfig, model: Architecture, batch: int, device: str) -> None:
    """`batch` sequences at a time go block after block through one set of activations."""
    length = config.data.sequence_length
    rows = batch * length
    for name, shape in _activation_shapes(model, rows, length, device).items():
        _add_activation(draft, f"evaluate.{name}", shape, "evaluate", "evaluate")
    for name, columns in (("hidden", model.intermediate_size), ("delta", model.hidden_size)):
        draft.add(f"evaluate.{name}", (rows, columns), "scratch", first="evaluate")
    _add_logits(draft, config, model, "evaluate", rows, device)


def _add_sampling(draft: _Draft, model: Architecture, length: int, device: str) -> None:
    """The keys and values of one text as long as the context, and one chunk of its prompt."""
    context, kv_heads = model.max_position_embeddings, model.num_key_value_heads
    cache = (model.num_hidden_layers, 2, kv_heads, context, model.head_dim)
    draft.add("sample.cache", cache, "activations", first="sample")  # (L, 2, K, S, D)
    chunk = min(
        ROW_CHUNK, QUERY_BLOCK, length
    )  # prompt tokens read at a time: the workspace has room for these
    for name, columns in (
        ("stream", model.hidden_size),
        ("normed", model.hidden_size),
        ("delta", model.hidden_size),
        ("qkv", model.qkv_size),
        ("attention_out", model.hidden_size),
        ("gate_up", 2 * model.intermediate_size),
        ("hidden", model.intermediate_size),
    ):
        draft.add(f"sample.{name}", (chunk, columns), "scratch", first="sample")
    draft.add("sample.rstd", (chunk,), "scratch", first="sample", dtype=draft.wide_dtype)
    # The workspace's scores reach over a training sequence; here they reach over the context.
    group = model.num_attention_heads // kv_heads
    draft.add("sample.scores", (kv_heads, group * chunk, context), "scratch", first="sample")
    draft.add("sample.logits", (1, model.vocab_size), "logits", first="sample")  # (1, V)
    if device == "cuda":  # the torch path has these for training too
        for name in ("query", "d_query"):
            draft.add(f"workspace.{name}", (kv_heads, group, chunk, model.head_dim), "scratch")
        draft.add("workspace.causal_mask", (chunk, chunk), "scratch")


def peak_buffers(plan: MemoryPlan, count: int = 3) -> Sequence[Buffer]:
    """The largest buffers of the peak phase."""
    return plan.live_in(plan.peak_phase)[:count]
