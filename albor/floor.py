"""The least time that a training step can take: what each of its operations takes at best, added up.

`step_work` lists the operations from the shapes alone: GEMMs; attention; kernels that only move memory, by
the bytes that they cannot avoid; the optimizer. It assumes the fusions that albor has (packed projections,
the residual added inside the norm, SwiGLU in one kernel, logits read and written once, weight gradients
summed in fp32 inside the GEMM); recomputation where it is asked for.

Two things say how long an operation takes. A `Calibration` holds times that were measured on a card
(`albor.bench.calibrate`). A `Card` models them from a datasheet and published readings, for planning without
the card; whatever comes of it is called modelled.

Units: seconds, bytes, FLOP. Letters as in `albor.memory.plan`. No torch.
"""

from __future__ import annotations

import json
import math
from bisect import bisect_left
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, Protocol

from albor.architecture import Architecture
from albor.errors import AlborError

ELEMENT = 2  # bytes of bf16
# Of scaled_dot_product_attention, as torch.backends.cuda names them.
SDPA_BACKENDS = ("flash", "mem_efficient", "cudnn")


@dataclass(frozen=True)
class Gemm:
    """(m, k) x (k, n). `layout` says how the operands lie: nt for x @ weight^T, nn for d_out @ weight, tn for
    d_out^T @ x. With `accumulate` the result is added to an fp32 buffer.
    """

    m: int
    n: int
    k: int
    layout: Literal["nt", "nn", "tn"]
    accumulate: bool = False

    @property
    def flops(self) -> float:
        """Multiplications and additions."""
        return 2.0 * self.m * self.n * self.k

    @property
    def traffic(self) -> int:
        """Bytes that move where every operand moves once."""
        result = 8 if self.accumulate else ELEMENT
        return ELEMENT * (self.m * self.k + self.k * self.n) + result * self.m * self.n


@dataclass(frozen=True)
class Attention:
    """Causal attention with grouped queries over a micro-batch."""

    batch: int  # B
    length: int  # T
    heads: int  # H
    kv_heads: int  # K
    head_dim: int  # D
    direction: Literal["forward", "backward"]

    def __str__(self) -> str:
        heads = f"{self.heads}/{self.kv_heads} heads of {self.head_dim}"
        return f"attention {self.direction}, {self.batch} x {self.length}, {heads}"

    @property
    def flops(self) -> float:
        """Of the half that is not masked: two GEMMs forward, five backward."""
        gemms = 2 if self.direction == "forward" else 5
        return gemms * self.batch * self.heads * self.length**2 * self.head_dim


@dataclass(frozen=True)
class Traffic:
    """A kernel that reads and writes this many bytes in all, and does little else."""

    bytes: int

    @property
    def flops(self) -> float:
        """None that count."""
        return 0.0


Operation = Gemm | Attention | Traffic


@dataclass(frozen=True)
class Work:
    """`count` times the same operation in one step."""

    name: str
    count: float
    operation: Operation


def step_work(
    model: Architecture,
    length: int,
    micro_batch: int,
    micro_steps: int,
    head_chunk: int = 4096,
    *,
    recompute: Literal["none", "cheap", "block"] = "none",
    sums_on_device: bool = True,
    rounded_state: bool = False,
) -> list[Work]:
    """What one optimizer step of `micro_steps` micro-batches consists of on the device, in bf16.

    Without `sums_on_device` a weight's gradient is written once, and summed and measured elsewhere. With
    `rounded_state` weights and moments are bf16 alone.
    """
    rows, width, ffn = micro_batch * length, model.hidden_size, model.intermediate_size
    layers, vocab = model.num_hidden_layers, model.vocab_size
    rotated = (model.num_attention_heads + model.num_key_value_heads) * model.head_dim
    work: list[Work] = []

    def matmul(name: str, count: float, tokens: int, inputs: int, outputs: int) -> None:
        count *= micro_steps
        work.append(Work(f"{name} forward", count, Gemm(tokens, outputs, inputs, "nt")))
        work.append(Work(f"{name} d_x", count, Gemm(tokens, inputs, outputs, "nn")))
        d_weight = Gemm(outputs, inputs, tokens, "tn", accumulate=sums_on_device)
        work.append(Work(f"{name} d_weight", count, d_weight))

    def move(name: str, count: float, columns: int) -> None:
        """A kernel that touches this many bf16 columns of every token."""
        work.append(Work(name, count * micro_steps, Traffic(columns * rows * ELEMENT)))

    matmul("qkv GEMM", layers, rows, width, model.qkv_size)
    matmul("attention-out GEMM", layers, rows, width, width)
    matmul("gate+up GEMM", layers, rows, width, 2 * ffn)
    matmul("down GEMM", layers, rows, ffn, width)
    chunk = min(head_chunk, rows)
    matmul("head GEMM", rows / chunk, chunk, width, vocab)
    attention = Attention(
        micro_batch, length, model.num_attention_heads, model.num_key_value_heads, model.head_dim, "forward"
    )
    work.append(Work("attention forward", layers * micro_steps, attention))
    work.append(Work("attention backward", layers * micro_steps, replace(attention, direction="backward")))
    move("norm + residual forward", 2 * layers, 4 * width)  # two read, two written
    move("norm + residual backward", 2 * layers, 4 * width)  # three read, one written
    move("rotary", 2 * layers, 2 * rotated)  # in place, forward and inverse
    move("SwiGLU forward", layers, 3 * ffn)
    move("SwiGLU backward", layers, 6 * ffn)  # reads three, writes two gradients and the product again
    move("attention backward, row sums", layers, 2 * width)
    work.append(Work("cross-entropy", rows / chunk * micro_steps, Traffic(2 * vocab * chunk * ELEMENT)))
    move("embedding and last norm", 1, 14 * width)  # gather 2, its gradient 4, the norm 4 + 4
    if recompute == "cheap":
        move("norms again", 2 * layers, 2 * width)
    elif recompute == "block":  # all of a block's forward but SwiGLU and the GEMM after it
        for name, inputs, outputs in (
            ("qkv", width, model.qkv_size), ("attention-out", width, width), ("gate+up", width, 2 * ffn),
        ):  # fmt: skip
            again = Gemm(rows, outputs, inputs, "nt")
            work.append(Work(f"{name} GEMM again", layers * micro_steps, again))
        work.append(Work("attention again", layers * micro_steps, attention))
        move("norms again", layers, 6 * width)  # 2 of the first, whose sum was kept; 4 of the second
        move("rotary again", layers, 2 * rotated)
    # The gradient is read for the norm and again for the update; master and moments are read and written.
    gradient = 8 if sums_on_device else 4
    state = 6 * ELEMENT if rounded_state else 24 + ELEMENT
    work.append(Work("gradient norm + AdamW", 1, Traffic(model.parameter_count * (gradient + state))))
    return work


class Rates(Protocol):
    """Something that knows how long an operation takes."""

    def seconds(self, operation: Operation) -> float:
        """Of one call."""


@dataclass(frozen=True)
class Item:
    """One line of a floor."""

    name: str
    seconds: float  # of one step
    flops: float

    @property
    def tflops(self) -> float | None:
        """Achieved, per second; None for what moves memory."""
        return self.flops / self.seconds / 1e12 if self.flops else None


@dataclass(frozen=True)
class Floor:
    """The least time of a step, by item. `basis` says whether the times were measured."""

    items: tuple[Item, ...]
    basis: Literal["measured", "modelled"]

    @property
    def seconds(self) -> float:
        """Of one step."""
        return sum(item.seconds for item in self.items)

    def as_json(self) -> dict[str, Any]:
        """For the report."""
        return {
            "basis": self.basis,
            "seconds_per_step": self.seconds,
            "items": [asdict(item) | {"tflops": item.tflops} for item in self.items],
        }


def floor(work: Iterable[Work], rates: Rates) -> Floor:
    """The times of all `work`, at `rates`."""
    items = tuple(
        Item(w.name, w.count * rates.seconds(w.operation), w.count * w.operation.flops) for w in work
    )
    return Floor(items, "modelled" if isinstance(rates, Card) else "measured")


class NotCalibrated(AlborError):
    """A calibration was not made for this shape."""


@dataclass
class Calibration:
    """Seconds that were measured on one card."""

    device: str
    dtype: str
    facts: dict[str, Any] = field(default_factory=dict)  # versions, clocks, date
    gemms: dict[Gemm, float] = field(default_factory=dict)
    # By backend; a backend that cannot compute a shape has the reason instead.
    attention: dict[Attention, dict[str, float | str]] = field(default_factory=dict)
    traffic: dict[int, float] = field(default_factory=dict)  # by bytes read and written in all
    links: dict[str, float] = field(default_factory=dict)  # bytes per second, by direction

    def seconds(self, operation: Operation) -> float:
        """Of one call, by the fastest backend. Raises NotCalibrated for a shape that was not measured."""
        if isinstance(operation, Traffic):
            return self._moving(operation.bytes)
        if isinstance(operation, Gemm):
            found = self.gemms.get(operation)
        else:
            found = self.backend_seconds(operation, self.best_backend(operation))
        if found is None:
            raise NotCalibrated(f"{operation} was not measured on {self.device}; run the calibration for it")
        return found

    def best_backend(self, shape: Attention, among: Iterable[str] | None = None) -> str | None:
        """The fastest backend of this direction; None where none was measured."""
        times = {
            name: value
            for name, value in self.attention.get(shape, {}).items()
            if isinstance(value, float) and (among is None or name in among)
        }
        return min(times, key=lambda name: times[name], default=None)

    def backend_seconds(self, shape: Attention, backend: str | None) -> float | None:
        """What was measured of one backend; None where it cannot compute this."""
        value = self.attention.get(shape, {}).get(backend) if backend is not None else None
        return value if isinstance(value, float) else None

    def refusals(self) -> int:
        """How often a backend could not compute a shape."""
        return sum(isinstance(value, str) for times in self.attention.values() for value in times.values())

    def _moving(self, size: int) -> float:
        """Between the measured sizes linearly, above them at the largest one's rate, below them as long as
        the smallest, which is the time of starting a kernel.
        """
        sizes = sorted(self.traffic)
        if not sizes:
            raise NotCalibrated(
                f"memory traffic was not measured on {self.device}; run the calibration for it"
            )
        if size <= sizes[0]:
            return self.traffic[sizes[0]]
        if size >= sizes[-1]:
            return self.traffic[sizes[-1]] * size / sizes[-1]
        above = bisect_left(sizes, size)
        low, high = sizes[above - 1], sizes[above]
        share = (size - low) / (high - low)
        return self.traffic[low] * (1 - share) + self.traffic[high] * share

    def save(self, path: Path) -> None:
        """As JSON; replaces the file in one piece."""
        values = {
            "device": self.device,
            "dtype": self.dtype,
            "facts": self.facts,
            "gemms": [
                asdict(gemm) | {"seconds": s, "tflops": gemm.flops / s / 1e12}
                for gemm, s in self.gemms.items()
            ],
            "attention": [asdict(shape) | {"backends": times} for shape, times in self.attention.items()],
            "traffic": [
                {"bytes": size, "seconds": s, "bytes_per_second": size / s}
                for size, s in sorted(self.traffic.items())
            ],
            "links": self.links,
        }
        draft = path.with_suffix(".tmp")
        draft.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
        draft.replace(path)

    @classmethod
    def load(cls, path: Path) -> Calibration:
        """What `save` wrote."""
        values = json.loads(path.read_text(encoding="utf-8"))
        measured = cls(values["device"], values["dtype"], values["facts"], links=values["links"])
        for row in values["gemms"]:
            seconds, _ = row.pop("seconds"), row.pop("tflops")
            measured.gemms[Gemm(**row)] = seconds
        for row in values["attention"]:
            times = row.pop("backends")
            measured.attention[Attention(**row)] = times
        measured.traffic = {row["bytes"]: row["seconds"] for row in values["traffic"]}
        return measured


_TILES = ((128, 256), (256, 128), (128, 128))  # of the result, per multiprocessor
_SPLITS = (1, 2, 3, 4, 6, 8, 12, 16)  # of k, where the result has too few tiles
_LEAST_SPLIT = 256
_SMALL_TILE = 0.9  # a 128 x 128 tile reads its operands more often: its share of the rate
_GAP = 1.5e-6  # between two kernels of a captured graph
_STREAM, _STREAM_START = 0.85, 3e-6  # share of the copy rate that a fused kernel reaches, and its ramp-up


@dataclass(frozen=True)
class Card:
    """A model of a card.

    A GEMM's result is cut into tiles, which the multiprocessors take in rounds; a round lasts as long as its
    arithmetic at the sustained rate plus a fixed time to fill and drain the pipeline. So a short k, or a last
    round that is nearly empty, costs. Attention has published rates, and memory a measured bandwidth.
    """

    name: str
    peak_flops: float  # dense bf16, as sold
    sustained_flops: float  # in large GEMMs
    bandwidth: float  # bytes per second of a large copy
    multiprocessors: int
    round_seconds: float  # fill and drain
    attention_flops: dict[
        int, tuple[float, float]
    ]  # by head width: forward and backward, causal half counted
    source: str

    def seconds(self, operation: Operation) -> float:
        """Modelled, of one call."""
        if isinstance(operation, Gemm):
            return self._gemm(operation)
        if isinstance(operation, Traffic):
            return operation.bytes / (self.bandwidth * _STREAM) + _STREAM_START
        forward = operation.direction == "forward"
        rate = self._attention_rate(operation.head_dim, 0 if forward else 1)
        return operation.flops / rate + (1 if forward else 3) * _GAP

    def _attention_rate(self, head_dim: int, direction: int) -> float:
        """Between known widths linearly. A narrower head has fewer products for as many exponentials; a wider
        one has the widest one's rate.
        """
        widths = sorted(self.attention_flops)
        rates = [self.attention_flops[width][direction] for width in widths]
        if head_dim <= widths[0]:
            return rates[0] * head_dim / widths[0]
        if head_dim >= widths[-1]:
            return rates[-1]
        above = bisect_left(widths, head_dim)
        share = (head_dim - widths[above - 1]) / (widths[above] - widths[above - 1])
        return rates[above - 1] * (1 - share) + rates[above] * share

    def _gemm(self, gemm: Gemm) -> float:
        per_processor = self.sustained_flops / self.multiprocessors
        choices = []
        for height, breadth in _TILES:
            rate = per_processor * (_SMALL_TILE if height == breadth else 1.0)
            tiles = math.ceil(gemm.m / height) * math.ceil(gemm.n / breadth)
            for split in _SPLITS:
                if split > 1 and gemm.k < split * _LEAST_SPLIT:
                    break
                rounds = math.ceil(tiles * split / self.multiprocessors)
                one = 2.0 * height * breadth * gemm.k / split / rate + self.round_seconds
                partial_sums = 4 * gemm.m * gemm.n * split / self.bandwidth if split > 1 else 0.0
                choices.append(rounds * one + partial_sums)
        return max(min(choices), gemm.traffic / (0.92 * self.bandwidth)) + _GAP


_HOPPER = {64: (290e12, 262e12), 128: (430e12, 330e12)}
_PUBLISHED = "attention: FlashAttention-3 paper, figures 5 and 6; GEMM: 790 TFLOP/s at 8192^3"
_ASSUMED = "datasheet peak, users' readings of large GEMMs; attention rates are assumptions"
CARDS = (
    Card("H100", 989.4e12, 828e12, 3.0e12, 132, 2.6e-6, _HOPPER, _PUBLISHED),
    Card("H200", 989.4e12, 828e12, 4.3e12, 132, 2.4e-6, _HOPPER, _PUBLISHED),
    Card(
        "A100", 312e12, 285e12, 1.6e12, 108, 3.0e-6, {64: (150e12, 130e12), 128: (170e12, 145e12)}, _ASSUMED
    ),
    Card(
        "RTX 4090", 165.2e12, 162e12, 0.93e12, 128, 4.0e-6, {64: (115e12, 90e12), 128: (125e12, 95e12)},
        _ASSUMED,
    ),
    Card("RTX 3090", 71e12, 69e12, 0.86e12, 82, 4.5e-6, {64: (55e12, 42e12), 128: (57e12, 44e12)}, _ASSUMED),
)  # fmt: skip
