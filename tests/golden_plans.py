"""Golden plans: what the plan of each of a few hundred configurations comes to, in golden_plans.json.

    python tests/golden_plans.py            writes the file anew, after a change that was meant
    python tests/golden_plans.py --check    says which plans have changed, and exits with 1 if any has

A change of the plan that nobody meant shows as a change of this file. `tests/test_plan_golden.py` compares,
and holds the file's own numbers against a calculation that knows nothing of the plan's code.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, Literal, NamedTuple

from albor.config import RunConfig
from albor.configfile import load_config
from albor.memory.attention import AttentionChoice
from albor.memory.plan import MemoryPlan, plan_inference, plan_training

FILE = Path(__file__).with_suffix(".json")
CONFIGS = Path(__file__).parents[1] / "configs"
SHIPPED = ("quickstart", "pretrain-50m", "pretrain-125m", "pretrain-350m", "pretrain-1.3b")
PLACES = ("device", "pinned", "host")
FP32 = "optimizer.state_dtype=fp32"  # of weights that are not bf16
PROMPTS = 'evaluate.prompts=["def"]'

# Overrides of every shipped configuration, with where and in what it is computed.
ON_CUDA = (
    "",
    "train.micro_batch_size=1",
    "train.micro_batch_size=3",
    "train.micro_batch_size=32",
    "data.sequence_length=128",
    "data.sequence_length=300",
    "model.max_position_embeddings=8192 data.sequence_length=8192 train.micro_batch_size=1",
    "train.recompute=cheap",
    "train.recompute=block",
    "train.recompute=block train.micro_batch_size=16",
    "train.accumulator=gpu",
    "train.accumulator=gpu train.recompute=cheap train.micro_batch_size=2",
    "train.head_chunk_tokens=1",
    "train.head_chunk_tokens=1000 train.micro_batch_size=8",
    "model.tie_word_embeddings=false",
    "model.tie_word_embeddings=false train.accumulator=gpu",
    "model.vocab_size=50257",
    "model.vocab_size=151936 train.micro_batch_size=2",
    "model.num_hidden_layers=1",
    "model.num_hidden_layers=2 train.accumulator=gpu",
    "model.num_hidden_layers=101",
    "model.num_key_value_heads=1",
    "model.num_key_value_heads=null",
    "model.intermediate_size=1365",
    "data.document_mask=true",
    "optimizer.state_dtype=bf16",
    "optimizer.state_dtype=fp32",
    "checkpoint.background=true",
    "checkpoint.background=true train.accumulator=gpu",
    f"evaluate.micro_batch_size=1 {PROMPTS}",
    f"evaluate.micro_batch_size=48 data.document_mask=true {PROMPTS}",
    f"evaluate.micro_batch_size=64 train.recompute=block train.micro_batch_size=1 {PROMPTS}",
    "train.attention=flash data.document_mask=false train.deterministic=false",
)
ON_CPU = (
    "",
    "data.sequence_length=256",
    "data.sequence_length=257 data.document_mask=true",
    f"train.recompute=block evaluate.micro_batch_size=9 {PROMPTS}",
    "train.accumulator=gpu model.tie_word_embeddings=false",
    "checkpoint.background=true train.micro_batch_size=7",
)
INFERENCE = (0, 1, 5)  # sequences that are evaluated at a time


class Case(NamedTuple):
    """One configuration, and what its plan is made for."""

    config: str  # the file in configs/
    overrides: str
    device: Literal["cpu", "cuda"]
    dtype: str
    batch: int | None = None  # of a plan for inference

    @property
    def key(self) -> str:
        """The name in the file."""
        purpose = "" if self.batch is None else f" inference={self.batch}"
        return " ".join([self.config, self.device, self.dtype + purpose, *self.overrides.split()])

    def load(self) -> RunConfig:
        """The configuration."""
        return _load(self.config, self.overrides)

    def plan(self) -> MemoryPlan:
        """Its plan. What attention `auto` stands for does not come in: that is a table of measurements."""
        config = self.load()
        if self.batch is not None:
            return plan_inference(config, self.device, self.dtype, self.batch)
        flash = config.train.attention == "flash"
        backend = "torch" if self.device == "cpu" else "flash" if flash else "triton"
        choice = AttentionChoice(backend, "golden", config.train.deterministic)
        return plan_training(config, self.device, self.dtype, attention=choice)


@cache
def _load(name: str, overrides: str) -> RunConfig:
    return load_config(CONFIGS / f"{name}.yaml", overrides.split())


def cases() -> Iterator[Case]:
    """All of them, in the file's order."""
    for name in SHIPPED:
        yield from (Case(name, overrides, "cuda", "bfloat16") for overrides in ON_CUDA)
        yield Case(name, f"train.precision=fp32 {FP32}", "cuda", "float32")
        yield Case(name, f"train.precision=fp16 {FP32}", "cuda", "float16")
        yield from (Case(name, f"{overrides} {FP32}".strip(), "cpu", "bfloat16") for overrides in ON_CPU)
        yield Case(name, f"train.precision=fp32 {FP32}", "cpu", "float32")
        for batch in INFERENCE:
            yield Case(name, PROMPTS, "cuda", "bfloat16", batch)
            yield Case(name, "data.document_mask=true", "cpu", "float32", batch)


def summary(plan: MemoryPlan) -> dict[str, Any]:
    """What the file holds of a plan. `parts` are sums of the buffers' own bytes, without alignment."""
    parts: dict[str, int] = {}
    for buffer in plan.buffers:
        part = _part(buffer.name)
        parts[part] = parts.get(part, 0) + buffer.nbytes
    listed = "\n".join(
        f"{b.name} {b.shape} {b.dtype} {b.place} {b.group} {b.first} {b.last} {b.offset}"
        for b in plan.buffers
    )
    return {
        **{place: plan.size(place) for place in PLACES},
        "peak": plan.peak_phase,
        "groups": plan.groups,
        # oneDNN's scratch goes by the machine's threads.
        "temporaries": {name: size for name, size in plan.temporaries.items() if name != "oneDNN scratch"},
        "parts": parts,
        "buffers": len(plan.buffers),
        "sha256": hashlib.sha256(listed.encode()).hexdigest()[:16],
    }


def _part(name: str) -> str:
    """Which sum a buffer belongs to: blocks.07.qkv to `blocks`, gradients.block.1 to `gradients.block`."""
    first, _, rest = name.partition(".")
    return first if first not in ("gradients", "head", "moments") else f"{first}.{rest.partition('.')[0]}"


def golden() -> dict[str, dict[str, Any]]:
    """What the file should hold."""
    return {case.key: summary(case.plan()) for case in cases()}


def differences(recorded: dict[str, Any], found: dict[str, Any]) -> list[str]:
    """A line for every plan that is not as it was recorded, with what is another."""
    lines = []
    for key in dict.fromkeys([*recorded, *found]):
        before, after = recorded.get(key), found.get(key)
        if before is None or after is None:
            lines.append(f"{key}: {'new' if before is None else 'gone'}")
        elif before != after:
            changed = [
                f"{name} {before.get(name)} -> {after[name]}"
                for name in after
                if before.get(name) != after[name]
            ]
            lines.append(f"{key}: {'; '.join(changed)}")
    return lines


def main() -> int:
    """Writes or checks the file."""
    found = golden()
    if "--check" in sys.argv[1:]:
        lines = differences(json.loads(FILE.read_text()), found)
        print("\n".join(lines) or f"{len(found)} plans are as recorded")
        return 1 if lines else 0
    rows = ",\n".join(f"{json.dumps(key)}: {json.dumps(value)}" for key, value in found.items())
    FILE.write_text(f"{{\n{rows}\n}}\n")
    print(f"wrote {len(found)} plans to {FILE}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
