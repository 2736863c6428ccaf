"""Measures which attention is fastest on the GPU of this machine, for `train.attention: auto`.

    python benchmarks/attention.py                          # every shape of configs/ and of the benchmark
    python benchmarks/attention.py my.yaml train.micro_batch_size=8     # the shape of this configuration

One forward and one backward of one block's attention, as a training step makes them: through albor's own
operations in the buffers of a plan, with the copies that a library's results need, replayed from a CUDA
graph. Each shape is measured twice, for deterministic runs and for others, and the backends take turns, so
that a card which gets slower as it gets warm does so for all of them. The medians go into
albor/memory/attention.json, in place of what was there for the same shape and capability; commit it. Needs
CUDA: exit code 2 without.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402  (a checkout need not be installed)
import triton  # noqa: E402

from albor.architecture import Architecture  # noqa: E402
from albor.bench.cases import STANDARD, find_case  # noqa: E402
from albor.config import RunConfig, attention_obstacles  # noqa: E402
from albor.configfile import load_config  # noqa: E402
from albor.errors import AlborError  # noqa: E402
from albor.memory.arena import Arena  # noqa: E402
from albor.memory.attention import GAIN, LIBRARY, TABLE, Measurement, read_table  # noqa: E402
from albor.memory.plan import plan_training  # noqa: E402
from albor.ops import make_ops  # noqa: E402
from albor.train.streams import Graphs, Streams, make_streams  # noqa: E402

ROUNDS = 15
SECONDS = 0.02  # that a backend's turn in a round takes
WARM_UP = 5  # steps before the clock: the first runs as it is, the second is captured


@dataclass(frozen=True, order=True)
class Shape:
    """What the time of attention depends on."""

    head_dim: int
    heads: int
    kv_heads: int
    length: int
    batch: int

    @classmethod
    def of(cls, config: RunConfig) -> Shape:
        """Of the attention in a run of `config`."""
        model = Architecture.from_config(config.model)
        heads, kv_heads = model.num_attention_heads, model.num_key_value_heads
        return cls(
            model.head_dim, heads, kv_heads, config.data.sequence_length, config.train.micro_batch_size
        )

    def config(self, backend: str, deterministic: bool) -> RunConfig:
        """A model of one block with such an attention, by `backend`."""
        return RunConfig.model_validate({
            "name": "attention",
            "model": {
                "hidden_size": self.heads * self.head_dim, "intermediate_size": 128, "num_hidden_layers": 1,
                "num_attention_heads": self.heads, "num_key_value_heads": self.kv_heads, "vocab_size": 128,
                "max_position_embeddings": self.length,
            },
            "data": {"sequence_length": self.length},
            "train": {
                "max_steps": 1, "micro_batch_size": self.batch, "accumulator": "gpu",
                "attention": backend, "deterministic": deterministic,
            },
        })  # fmt: skip


def shapes(given: list[str]) -> list[Shape]:
    """Those of a configuration with overrides; without any, of all that are shipped and benchmarked."""
    if given:
        return [Shape.of(load_config(Path(given[0]), given[1:]))]
    shipped = [path for path in sorted(ROOT.glob("configs/*.yaml")) if "\nmodel:" in path.read_text()]
    configs = [load_config(path) for path in shipped]
    configs += [find_case(name, 1).config for name in STANDARD]
    return sorted({Shape.of(config) for config in configs})


def backends(shape: Shape, deterministic: bool) -> list[str]:
    """What can compute it, albor's own kernels first."""
    fitting = [name for name in LIBRARY if not attention_obstacles(shape.config(name, deterministic), name)]
    return ["triton", *fitting]


class Attention:
    """The attention of one block in buffers of its own, on a device."""

    def __init__(self, shape: Shape, backend: str, deterministic: bool, device: str):
        config = shape.config(backend, deterministic)
        dtype = "bfloat16" if device == "cuda" else "float32"
        arena = Arena(plan_training(config, "cuda", dtype), device)
        generator = torch.Generator(device).manual_seed(0)
        for name in ("blocks.00.qkv", "backward.d_attention"):  # zeros draw less power than a model does
            arena[name].normal_(generator=generator)
        self.arena, self.ops, self.shape = arena, make_ops(arena), shape
        self.streams: Streams
        self.graphs: Graphs
        self.streams, self.graphs = make_streams(arena.device)

    def step(self) -> None:
        """One forward and one backward, asked for and not waited for."""
        self.graphs.run("attention", self._forward_backward)

    def _forward_backward(self) -> None:
        arena, shape = self.arena, (self.shape.length, self.shape.kv_heads, self.shape.head_dim)
        qkv, out, lse = (arena[f"blocks.00.{name}"] for name in ("qkv", "attention_out", "attention_lse"))
        self.ops.attention_forward(qkv, out, lse, *shape)
        self.ops.attention_backward(
            arena["backward.d_attention"], qkv, out, lse, arena["backward.d_qkv"], *shape
        )


def seconds_per_step(attention: Attention, count: int) -> float:
    """By the device's clock, over `count` steps one after the other."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    with attention.streams.computing():
        start.record()
        for _ in range(count):
            attention.step()
        end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / 1e3 / count


def measure(shape: Shape, deterministic: bool, machine: dict[str, Any]) -> Measurement:
    """Times all backends that take `shape`; one that this PyTorch refuses is named on standard error."""
    running: dict[str, tuple[Attention, int]] = {}
    for name in backends(shape, deterministic):
        try:
            attention = Attention(shape, name, deterministic, "cuda")
            seconds_per_step(attention, WARM_UP)
            count = max(1, round(SECONDS / seconds_per_step(attention, WARM_UP)))
        except RuntimeError as error:
            if name == "triton" or "CUDA error" in str(error):  # after that nothing works in this process
                raise
            print(f"{name} does not take {shape}: {str(error).splitlines()[0]}", file=sys.stderr)
            continue
        running[name] = attention, count
    times: dict[str, list[float]] = {name: [] for name in running}
    for _ in range(ROUNDS):
        for name, (attention, count) in running.items():
            times[name].append(seconds_per_step(attention, count))
    seconds = {name: statistics.median(rounds) for name, rounds in times.items()}
    return Measurement(**machine, **asdict(shape), deterministic=deterministic, seconds=seconds)


def this_machine() -> dict[str, Any]:
    """What a row says of where it was measured."""
    major, minor = torch.cuda.get_device_capability()
    return {
        "capability": 10 * major + minor,
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
    }


def _key(row: Measurement) -> tuple[Any, ...]:
    shape = Shape(row.head_dim, row.heads, row.kv_heads, row.length, row.batch)
    return row.capability, shape, not row.deterministic


def merge(old: Iterable[Measurement], new: Iterable[Measurement]) -> list[Measurement]:
    """Sorted; of two rows for one shape, capability and order of adding, the new one."""
    rows = {_key(row): row for row in (*old, *new)}
    return [rows[key] for key in sorted(rows)]


def write_table(rows: Iterable[Measurement], path: Path) -> None:
    """A row a line, so that a change of one is a line in a diff. The file is replaced whole or not at all."""
    lines = ",\n".join(json.dumps(asdict(row)) for row in rows)
    temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    temporary.write_text(f'{{"rows": [\n{lines}\n]}}\n' if lines else '{"rows": []}\n', encoding="utf-8")
    os.replace(temporary, path)


def render(rows: Iterable[Measurement]) -> str:
    """A table for people: milliseconds by backend, and what `auto` takes where shape and card are these."""
    names = ("triton", *LIBRARY)
    lines = [f"{'':44}{'adds in':>10}" + "".join(f"{name:>9}" for name in names) + "  auto"]
    for row in rows:
        times = "".join(f"{1e3 * row.seconds[n]:9.3f}" if n in row.seconds else f"{'-':>9}" for n in names)
        best = max(row.seconds, key=row.speed)
        chosen = best if row.speed(best) >= GAIN else "triton"
        order = "one order" if row.deterministic else "any order"
        lines.append(f"{f'sm_{row.capability}, {row.shape}':44}{order:>10}{times}  {chosen}")
    return "\n".join(lines)


def main(given: list[str], measure_shape: Callable[..., Measurement] = measure, table: Path = TABLE) -> int:
    """Returns the exit code."""
    if not torch.cuda.is_available():
        print("benchmarks/attention.py: PyTorch finds no CUDA device; run it on the GPU", file=sys.stderr)
        return 2
    try:
        wanted = shapes(given)
    except AlborError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    machine, measured = this_machine(), []
    for shape, deterministic in product(wanted, (True, False)):
        measured.append(measure_shape(shape, deterministic, machine))
        # After each, so that what an interrupted run has measured is not lost.
        write_table(merge(read_table(table), measured), table)
        print(render(measured[-1:]) if len(measured) == 1 else render(measured[-1:]).splitlines()[1])
    print(f"written to {table}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
