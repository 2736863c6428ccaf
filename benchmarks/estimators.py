"""What seven estimators answer for the shipped configurations on one GPU, and albor among them.

    python benchmarks/estimators.py             # the table that docs/memory.md shows
    python benchmarks/estimators.py --json      # the same in bytes, with every source
    python benchmarks/estimators.py --write     # puts the table into docs/memory.md

The formulas are those that the sources named here publish, written down anew for a dense LLaMA on one GPU; no
package is imported and nothing is downloaded. Each estimator is given all that it has an option for. They do
not ask all the same question, which the table's last column says: that is the comparison's point.

A measured row appears for each record `benchmarks/results/memory-*.json` that a GPU has left.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from albor.architecture import Architecture
from albor.config import RunConfig
from albor.configfile import load_config
from albor.durable import replace_file
from albor.memory.estimate import estimate
from albor.units import GIB

ROOT = Path(__file__).parents[1]
CONFIGS = tuple(f"configs/pretrain-{size}.yaml" for size in ("50m", "125m", "350m"))
CARD = "RTX 4090"
RECORDS = ROOT / "benchmarks/results"
PAGE = ROOT / "docs/memory.md"
START, END = "<!-- estimators: python benchmarks/estimators.py --write -->", "<!-- end of estimators -->"


@dataclass(frozen=True)
class Case:
    """A run in the numbers that the formulas are made of."""

    model: Architecture
    batch: int  # B: sequences of a micro-batch
    length: int  # T: tokens of a sequence

    @classmethod
    def of(cls, config: RunConfig) -> Case:
        """The micro-batch that `config` trains on."""
        batch, length = config.train.micro_batch_size, config.data.sequence_length
        return cls(Architecture.from_config(config.model), batch, length)

    @property
    def embedding(self) -> int:
        """Parameters of the embedding matrix."""
        return self.model.vocab_size * self.model.hidden_size


def accelerate(case: Case) -> int:
    """`accelerate estimate-memory --dtypes float16`, "Training using Adam": the largest of weights 4 P,
    gradients 6 P, optimizer 8 P and step 8 P. P is AutoModel's, which has no output matrix of its own, and
    counts the rotary frequencies, D / 2 of them, and their copy.
    """
    untied = 0 if case.model.tie_word_embeddings else case.embedding
    return 8 * (case.model.parameter_count - untied + case.model.head_dim)


def deepspeed_zero2(case: Case) -> int:
    """`estimate_zero2_model_states_mem_needs`, one GPU, no offload: 2 P weights, 2 P and 4 P gradients, 4 P
    master weights, 8 P moments.
    """
    return 20 * case.model.parameter_count


def deepspeed_zero3(case: Case) -> int:
    """`estimate_zero3_model_states_mem_needs`, one GPU, no offload: 18 P, and 4 bytes for every parameter of
    the largest layer, which is a single module's own.
    """
    matrices = (case.embedding, case.model.intermediate_size * case.model.hidden_size)
    return 18 * case.model.parameter_count + 4 * max(matrices)


def eleutherai(case: Case) -> int:
    """calc_transformer_mem.py with `--ffn-expansion-factor F/C --num-mlp-linears 3 --kv-size-ratio K/H`.

    18 bytes per parameter: 2 weights, 4 gradients, 12 optimizer. It counts an output matrix even where it is
    tied, learned positions, and norms with biases: 8 C a layer. Activations are Korthikanti et al.'s
    (arXiv:2205.05198, table 2), T B C L (34 + 5 H T / C), with the attention's scores and without a head.
    """
    model, width, layers = case.model, case.model.hidden_size, case.model.num_hidden_layers
    ratio = model.num_key_value_heads / model.num_attention_heads
    parameters = (
        2 * case.embedding
        + width * case.length
        + 8 * width * layers
        + 2 * width
        + int(2 * (1 + ratio) * layers * width * width)
        + 3 * layers * width * model.intermediate_size
    )
    scores = model.num_attention_heads * case.length / width
    activations = case.length * case.batch * width * layers * (34 + 5 * scores)
    return round(18 * parameters + activations)


def megatron(case: Case) -> int:
    """theoretical_memory_usage.py on one GPU: GQA, SwiGLU, RMSNorm, a vocabulary that is a multiple of 128.

    18 bytes per parameter: bf16 weights, fp32 gradients, master weights and moments. Activations without
    sequence parallelism: 34 T B C a layer, whatever the feed-forward; 8 T B for tokens and T B C for the
    embedding's dropout; logits and the last norm in 2 bytes; 5 % on top.
    """
    model, width, tokens = case.model, case.model.hidden_size, case.length * case.batch
    activations = 34 * tokens * width * model.num_hidden_layers + 8 * tokens + tokens * width
    activations += 2 * tokens * (model.vocab_size + width)
    return round(18 * model.parameter_count + 1.05 * activations)


def unsloth(case: Case) -> int:
    """`estimate_training_vram`: full fine-tuning, adamw_torch, no gradient checkpointing, flash attention.

    10 bytes per parameter, without the last norm: 2 weights, 2 gradients, 6 optimizer. Activations are
    T B (C + 2 K D + 2 + 2 F) x 2 x 1.25 a layer. 1.4 GiB for CUDA, calibrated on an RTX 5070 Ti.
    """
    model, tokens = case.model, case.length * case.batch
    keys = model.head_dim * model.num_key_value_heads
    columns = model.hidden_size + 2 * keys + 2 + 2 * model.intermediate_size
    activations = int(tokens * columns * 2 * 1.25) * model.num_hidden_layers
    return 10 * (model.parameter_count - model.hidden_size) + activations + int(1.4 * GIB)


@dataclass(frozen=True)
class Estimator:
    """A published formula and where it stands."""

    name: str
    needs: Callable[[Case], int]
    counts: str
    repository: str
    path: str
    commit: str

    @property
    def source(self) -> str:
        """The file at that commit."""
        return f"https://github.com/{self.repository}/blob/{self.commit}/{self.path}"


_DEEPSPEED = ("deepspeedai/DeepSpeed", "edaa7221267243c7be7fb49c5d5f5c4fb97b4641")
_PROCESS = "albor as configured: the whole process"
_STATES = "weights, gradients, optimizer; no activations"
ESTIMATORS = (
    Estimator(
        "accelerate estimate-memory", accelerate, "the largest of weights, gradients, optimizer",
        "huggingface/accelerate", "src/accelerate/commands/estimate.py",
        "16cb6eb80dd9aa8b4df1a63ef57863e455d53b83",
    ),
    Estimator("DeepSpeed, ZeRO-2", deepspeed_zero2, _STATES,
              _DEEPSPEED[0], "deepspeed/runtime/zero/stage_1_and_2.py", _DEEPSPEED[1]),
    Estimator("DeepSpeed, ZeRO-3", deepspeed_zero3, _STATES,
              _DEEPSPEED[0], "deepspeed/runtime/zero/stage3.py", _DEEPSPEED[1]),
    Estimator(
        "EleutherAI cookbook", eleutherai, "states, untied; activations with attention scores; no logits",
        "EleutherAI/cookbook", "calc/calc_transformer_mem.py", "827ee3b293a63f14403f1467d08c91fda213f4e6",
    ),
    Estimator(
        "Megatron-LM", megatron, "states; activations of a 4 C feed-forward, full logits, 5 %",
        "NVIDIA/Megatron-LM", "megatron/training/theoretical_memory_usage.py",
        "d98e8a64ddf34856e74b24714e3bedb2f5a39553",
    ),
    Estimator(
        "Unsloth Studio", unsloth, "states without fp32 copies; activations x 1.25; no logits; 1.4 GiB",
        "unslothai/unsloth", "studio/backend/utils/hardware/vram_estimation.py",
        "015bdef0d94a241bcd94eec7a405b1700632180d",
    ),
)  # fmt: skip


@dataclass(frozen=True)
class Row:
    """One answer for each of CONFIGS, in bytes; None: there is none."""

    name: str
    needs: tuple[int | None, ...]
    counts: str
    source: str

    def as_json(self) -> dict[str, Any]:
        """What `--json` prints of the row."""
        needs = dict(zip(CONFIGS, self.needs, strict=True))
        return {"name": self.name, "bytes": needs, "counts": self.counts, "source": self.source}


def rows() -> Iterator[Row]:
    """The published estimates, albor's, and what was measured."""
    configs = [load_config(ROOT / path) for path in CONFIGS]
    for estimator in ESTIMATORS:
        needs = tuple(estimator.needs(Case.of(config)) for config in configs)
        yield Row(estimator.name, needs, estimator.counts, estimator.source)
    for name, overrides, counts in (
        ("albor, `train.accumulator: gpu`", ["train.accumulator=gpu"], "every buffer, and what lies outside"),
        ("albor, as configured", [], "the same, gradients summed in host memory"),
    ):
        changed = [load_config(ROOT / path, overrides) for path in CONFIGS]
        needs = tuple(estimate(config, CARD).required_bytes for config in changed)
        yield Row(name, needs, counts, "albor/memory/plan.py")
    yield from measured()


def measured() -> Iterator[Row]:
    """What whole processes held, by NVML, in every record of benchmarks/memory.py; without one, a row without
    numbers.
    """
    records = sorted(RECORDS.glob("memory-*.json"))
    for path in records:
        record = json.loads(path.read_text(encoding="utf-8"))
        held = {shape["name"]: shape["measured"] for shape in record["shapes"] if shape["status"] == "ok"}
        needs = tuple(held.get(Path(config).stem) for config in CONFIGS)
        yield Row(
            f"measured on {record['machine']['device']}", needs, _PROCESS, f"benchmarks/results/{path.name}"
        )
    if not records:
        yield Row("measured on a GPU", (None,) * len(CONFIGS), _PROCESS, "")


def table() -> str:
    """The Markdown table, in GiB."""
    names = [Path(path).stem for path in CONFIGS]
    lines = [
        f"| GiB | {' | '.join(names)} | what is counted |",
        f"|---|{'---:|' * len(names)}---|",
    ]
    for row in rows():
        cells = ["not measured" if size is None else f"{size / GIB:.2f}" for size in row.needs]
        name = f"[{row.name}]({row.source})" if row.source.startswith("https:") else row.name
        lines.append(f"| {name} | {' | '.join(cells)} | {row.counts} |")
    return "\n".join(lines) + "\n"


def between_markers(page: str, content: str) -> str:
    """`page` with `content` between the two markers. Raises ValueError where they do not stand in it."""
    found = re.search(rf"({re.escape(START)}\n).*?({re.escape(END)})", page, re.DOTALL)
    if found is None:
        raise ValueError(f"the page has no place between {START} and {END}")
    return page[: found.end(1)] + "\n" + content + "\n" + page[found.start(2) :]


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="albor's memory estimate beside other tools'.")
    output = parser.add_mutually_exclusive_group()
    output.add_argument("--json", action="store_true", help="print one JSON object, in bytes")
    output.add_argument("--write", action="store_true", help="put the table into docs/memory.md")
    arguments = parser.parse_args()
    if arguments.json:
        print(json.dumps({"card": CARD, "rows": [row.as_json() for row in rows()]}, indent=2))
    elif arguments.write:
        page = between_markers(PAGE.read_text(encoding="utf-8"), table())
        replace_file(PAGE, page.encode())
    else:
        print(table(), end="")


if __name__ == "__main__":
    main()
