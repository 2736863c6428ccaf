"""The measurement itself, in a process of its own: `python -m albor.calibrate.measure cuda|cpu PARENT`.

A process is measured from its first byte on, and what a driver or a library once took it keeps until the
process ends; it ends with the process PARENT. On standard output is a line of JSON for every stage, and at
last what was measured.
"""

from __future__ import annotations

import contextlib
import email
import json
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from albor.config import RunConfig
from albor.errors import AlborError
from albor.memory.calibration import CUDA_CONTEXT, GRAPHS, LOADED_KERNELS, PROCESS
from albor.memory.outside import graph_nodes, outside_items
from albor.memory.plan import MemoryPlan, plan_training
from albor.memory.process import CardProcess, peak_resident, resident
from albor.memory.pytorch import pin_cublas_workspace
from albor.parent import end_with


@dataclass(frozen=True)
class Measured:
    """What a row of `albor.memory.calibration` holds of this process."""

    method: str
    bytes: dict[str, int]
    graph_nodes: int
    details: dict[str, int]
    triton: str | None
    cuda: str | None


@dataclass(frozen=True)
class Stage:
    """What the process had on the card after a stage, and what of that PyTorch's allocator held."""

    process: int
    reserved: int

    @property
    def beside(self) -> int:
        """Bytes that the allocator does not know of."""
        return self.process - self.reserved


# Layers of pretrain-350m, so that cuBLAS takes the products that it will take in earnest; two are enough.
CARD_CONFIG = {
    "name": "calibrate",
    "model": {
        "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 2, "num_attention_heads": 16,
        "num_key_value_heads": 4, "vocab_size": 32768, "max_position_embeddings": 1024,
    },
    "data": {"sequence_length": 1024},
    "train": {
        "max_steps": 10, "micro_batch_size": 4, "gradient_accumulation_steps": 2, "accumulator": "gpu",
        "attention": "triton",
    },
    "schedule": {"warmup_steps": 0},
    "evaluate": {"prompts": ["a"]},
}  # fmt: skip
_HOST_CONFIG = """\
name: calibrate
device: cpu
model:
  {hidden_size: 64, intermediate_size: 128, num_hidden_layers: 2, num_attention_heads: 2,
   num_key_value_heads: 1, vocab_size: 512, max_position_embeddings: 128}
data:
  sequence_length: 64
  sources: [{kind: files, path: CORPUS}]
  validation_fraction: 0.1
schedule: {warmup_steps: 0}
train: {max_steps: 4, micro_batch_size: 2, gradient_accumulation_steps: 2}
evaluate: {every_steps: 2, batches: 2, final_batches: 2, prompts: [a], sample_tokens: 4}
checkpoint: {every_steps: 2}
"""


def measure_card(say: Callable[[str], None]) -> Measured:
    """A context, then products, then training steps as they are and captured, each with what it adds."""
    card = CardProcess()  # before this process's first use of CUDA
    import torch

    def read(stage: str) -> Stage:
        torch.cuda.synchronize()
        reading = card.read()
        if reading.bytes is None:
            raise AlborError(f"what this process has on the card cannot be read: {reading.how}")
        say(stage)
        return Stage(reading.bytes, torch.cuda.memory_reserved())

    stages = {"context": read("context")}
    pin_cublas_workspace()
    square = torch.ones(64, 64, dtype=torch.float16, device="cuda")
    torch.mm(square, square)
    stages["products"] = read("products")
    config, dtype = card_config(torch.cuda.get_device_capability())
    plan = plan_training(config, "cuda", dtype, "gpu")

    from albor.train.rehearsal import compile_kernels

    compile_kernels(config, plan, lambda line: None)
    say("kernels compiled")
    stages |= exercise(config, plan, "cuda", read)
    import triton

    method = card.read().how
    card.close()
    bytes_, details = break_down(stages, plan)
    return Measured(method, bytes_, graph_nodes(plan), details, triton.__version__, torch.version.cuda)


def card_config(capability: tuple[int, int]) -> tuple[RunConfig, str]:
    """What is trained on a card of `capability`, and what it computes in."""
    precision, dtype = ("bf16", "bfloat16") if capability >= (8, 0) else ("fp16", "float16")
    config = RunConfig.model_validate(
        CARD_CONFIG | {"train": CARD_CONFIG["train"] | {"precision": precision}}  # type: ignore[operator]
    )
    return config, dtype


def exercise(
    config: RunConfig, plan: MemoryPlan, device: str, read: Callable[[str], Stage]
) -> dict[str, Stage]:
    """All that a run does on its device: "kernels" after a first step, an evaluation, a sample and a save's
    check; "graphs" after two more steps, in which it is captured and replayed.
    """
    import numpy as np
    import torch

    from albor.evaluate.validation import validate
    from albor.generate.sampler import sample
    from albor.memory.arena import Arena
    from albor.model.decode import Decoder
    from albor.model.parameters import initialise
    from albor.train.session import is_finite
    from albor.train.step import Batch, Trainer, TrainState

    arena = Arena(plan, device)
    trainer = Trainer(config, arena, end_of_document=0)
    initialise(arena, trainer.architecture, config.seed)
    rng = np.random.default_rng(config.seed)
    train, length, vocabulary = config.train, config.data.sequence_length, config.model.vocab_size

    def batches() -> Iterator[Batch]:
        for _ in range(train.gradient_accumulation_steps):
            tokens = rng.integers(vocabulary, size=(train.micro_batch_size, length + 1))
            yield tokens[:, :-1].copy(), tokens[:, 1:].copy()

    _, state = trainer.step(batches(), TrainState())
    with trainer.streams.computing():
        validate(trainer.model, trainer.input, batches(), np.ones(vocabulary, np.int64))
        logits = Decoder(trainer.model, arena).feed(torch.arange(4))
        sample(logits, temperature=1.0, top_k=None, top_p=None, uniform=0.5)
    if not is_finite(arena):
        raise AlborError("a first training step computes NaN or infinity on this machine: see albor doctor")
    stages = {"kernels": read("kernels")}
    for _ in range(2):
        _, state = trainer.step(batches(), state)
    return stages | {"graphs": read("graphs")}


def break_down(stages: dict[str, Stage], plan: MemoryPlan) -> tuple[dict[str, int], dict[str, int]]:
    """What the stages say by item, so that with what is computed it adds up to the process; and details.

    Whatever is not explained is among the kernels, also what the allocator has beyond what is computed.
    """
    computed = plan.size("device") + sum(item.bytes for item in outside_items(plan) if item.pooled)
    context = stages["context"].beside
    graphs = max(0, stages["graphs"].beside - stages["kernels"].beside)
    kernels = max(0, stages["graphs"].process - computed - context - graphs)
    details = {
        "arena": plan.size("device"),
        "process": stages["graphs"].process,
        "cuBLAS, first product": max(0, stages["products"].beside - context),
        "allocator": stages["graphs"].reserved,
        "allocator, computed": computed,
    }
    return {CUDA_CONTEXT: context, LOADED_KERNELS: kernels, GRAPHS: graphs}, details


def measure_host(say: Callable[[str], None]) -> Measured:
    """A whole small `albor train` on the CPU, from its data to its report: the most that it had in RAM,
    without what is planned.
    """
    from rich.console import Console

    from albor.configfile import load_config
    from albor.memory.estimate import plan_for_training
    from albor.train.run import run_training
    from albor.train.signals import StopRequest

    loaded = resident()
    say("libraries")
    corpus = Path(email.__file__).with_name("*.py")  # 20 files, which every Python has
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        text = _HOST_CONFIG.replace("CORPUS", json.dumps(str(corpus)))
        Path("calibrate.yaml").write_text(text)
        target = plan_for_training(load_config(Path("calibrate.yaml"), []))
        run_training(target, text, "never", Console(stderr=True), StopRequest(), as_json=True)
    most = peak_resident()
    if most.bytes is None or loaded.bytes is None:
        raise AlborError(f"this process's memory cannot be read: {most.how}")
    say("training")
    plan = target.plan
    planned = sum(plan.size(place) for place in ("device", "pinned", "host")) + sum(plan.temporaries.values())
    beside = max(loaded.bytes, most.bytes - planned)
    details = {"libraries": loaded.bytes, "process": most.bytes, "planned": planned}
    return Measured(most.how, {PROCESS: beside}, 0, details, None, None)


MEASURES = {"cuda": measure_card, "cpu": measure_host}


def main() -> None:
    """Measures what the first argument names, for as long as the process of the second lives."""
    end_with(int(sys.argv[2]))

    def say(stage: str) -> None:
        print(json.dumps({"stage": stage}), flush=True)

    try:
        print(json.dumps(asdict(MEASURES[sys.argv[1]](say))), flush=True)
    except AlborError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
