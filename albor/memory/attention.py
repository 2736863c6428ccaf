"""Which code computes the attention of a run, and why: `train.attention`, with `auto` resolved.

`auto` goes by measurements that are committed beside this module, in attention.json, and that
benchmarks/attention.py takes. Nothing is measured when a run starts: it begins at once, and the same
configuration on the same card is the same run on every day. No torch.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from albor.architecture import Architecture
from albor.config import RunConfig, attention_obstacles
from albor.errors import ConfigError, Problem

Backend = Literal["torch", "triton", "cudnn", "flash"]
LIBRARY: tuple[Backend, ...] = ("flash", "cudnn")

TABLE = Path(__file__).with_name("attention.json")
_LIKE = 2.0  # a measurement stands for sequences of up to this many times its length, or as many times less
# A backend that is less than this faster than our own is not worth what it takes beside the arena.
GAIN = 1.03
_LEAST_CAPABILITY = (8, 0)  # that a library's attention runs on


@dataclass(frozen=True)
class AttentionChoice:
    """What computes attention, and why."""

    backend: Backend
    reason: str
    deterministic: bool = True  # whether its backward has to add in one order

    def __str__(self) -> str:
        return f"{self.backend} ({self.reason})"


@dataclass(frozen=True)
class Measurement:
    """One row of the table: a forward and a backward in bf16, by each backend that takes the shape."""

    capability: int  # 90: sm_90
    head_dim: int
    heads: int
    kv_heads: int
    length: int
    batch: int
    deterministic: bool
    device: str
    torch: str
    triton: str
    seconds: dict[str, float]  # by backend, triton always among them

    def speed(self, backend: str) -> float:
        """Of `backend`, in triton's."""
        return self.seconds["triton"] / self.seconds[backend]

    @property
    def shape(self) -> str:
        """For people."""
        return f"{self.batch} x {self.length}, {self.heads}/{self.kv_heads} heads of {self.head_dim}"


def read_table(path: Path = TABLE) -> list[Measurement]:
    """The rows of the table at `path`."""
    return [Measurement(**row) for row in json.loads(path.read_text(encoding="utf-8"))["rows"]]


def choose_attention(
    config: RunConfig, device: Literal["cpu", "cuda"], capability: tuple[int, int] | None
) -> AttentionChoice:
    """What computes attention in a run of `config` on a card of `capability`; None: not known.

    Raises ConfigError where the configured backend cannot run there: another is never put in its place.
    """
    train = config.train
    if train.attention == "auto":
        if device == "cpu":
            return AttentionChoice("torch", "on a CPU", train.deterministic)
        return AttentionChoice(*_fastest(config, capability), train.deterministic)
    if device == "cpu":
        raise _refusal(f"{train.attention} needs a GPU, and there is none here", "use auto")
    if train.attention in LIBRARY and capability is not None and capability < _LEAST_CAPABILITY:
        here, least = _name(capability), _name(_LEAST_CAPABILITY)
        raise _refusal(f"{train.attention} needs {least} or later, and the card is {here}", "use auto")
    repeats = train.deterministic or train.attention == "triton"
    reason = "as configured" if repeats else "as configured; its backward adds in any order"
    return AttentionChoice(train.attention, reason, train.deterministic)


def slowdown(config: RunConfig, backend: str, capability: tuple[int, int]) -> float:
    """How many times as long `backend` takes as the fastest that was measured on such a card; 1 where it was
    not measured.
    """
    row = _nearest(config, capability)
    if row is None or backend not in row.seconds:
        return 1.0
    return row.seconds[backend] / min(row.seconds.values())


def _refusal(message: str, remedy: str) -> ConfigError:
    return ConfigError([Problem("train.attention", message, remedy)])


def _name(capability: tuple[int, int]) -> str:
    return f"sm_{capability[0]}{capability[1]}"


def _fastest(config: RunConfig, capability: tuple[int, int] | None) -> tuple[Backend, str]:
    """What the table says of `config`, and in which words."""
    obstacles = {backend: attention_obstacles(config, backend) for backend in LIBRARY}
    possible = [backend for backend in LIBRARY if not obstacles[backend]]
    if not possible:
        return "triton", obstacles[LIBRARY[0]][0][1]
    if capability is None:
        return "triton", "the card's compute capability is not known"
    row = _nearest(config, capability)
    if row is None:
        head_dim = Architecture.from_config(config.model).head_dim
        order = "deterministic" if config.train.deterministic else "in any order"
        return "triton", f"no measurement for {_name(capability)}, head width {head_dim}, {order}"
    measured = f"measured on {row.device}, {row.shape}"
    others = {backend: row.speed(backend) for backend in possible if backend in row.seconds}
    if not others:
        return "triton", f"nothing else {measured}"
    best = max(others, key=lambda backend: others[backend])
    if others[best] >= GAIN:
        return best, f"{others[best]:.2f}x the speed of triton, {measured}"
    return "triton", f"{best} has {others[best]:.2f}x its speed, {measured}"


def _nearest(config: RunConfig, capability: tuple[int, int]) -> Measurement | None:
    """The row that is most like `config`: by its length first, then by how many heads it has to do in all."""
    model = Architecture.from_config(config.model)
    length = config.data.sequence_length
    programs = config.train.micro_batch_size * model.num_attention_heads

    def distance(row: Measurement) -> tuple[float, float]:
        return abs(math.log(row.length / length)), abs(math.log(row.batch * row.heads / programs))

    alike = [
        row
        for row in read_table()
        if row.capability == 10 * capability[0] + capability[1]
        and row.head_dim == model.head_dim
        and row.deterministic == config.train.deterministic
        and 1 / _LIKE <= row.length / length <= _LIKE
    ]
    return min(alike, key=distance, default=None)
