"""The training step on a CPU, beside its peers: same shape, same weights, same batches, same optimizer, one
process.

    python benchmarks/cpu.py                # writes benchmarks/results/cpu.json, prints a table
    python benchmarks/cpu.py --rounds 1 --steps 3 --no-write

Order is A-B-A: before and after each peer's steps albor takes as many, and a peer's ratio is its median step
time over the median of the two albor runs around it. The table shows medians over rounds and their spread.

The last row is albor's own loop of a run, with rows, alerts, spike detection and a background saver, whose
checkpoints fall outside of what is timed (benchmarks/saving.py): what a run costs beyond its steps.

Peers: transformers' LlamaForCausalLM in fp32 and in bf16 autocast, and a plain torch loop of this file's own
(packed projections, SDPA, bf16 weights over fp32 masters) under torch.compile. All use PyTorch's fused AdamW,
clip the global norm at 1, and read the same batches.
"""

from __future__ import annotations

import argparse
import io
import json
import math
import os
import platform
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

# Before torch is imported: the compiled peer's first step is one with a cold cache, as a new user has it.
os.environ["TORCHINDUCTOR_CACHE_DIR"] = tempfile.mkdtemp(prefix="albor-benchmark-")

import numpy as np
import torch
import transformers
from rich.console import Console
from torch import nn
from torch.nn import functional as F

import albor
from albor.canary.reference import rotate, unpacked  # the oracle's rotary positions and its naming of weights
from albor.config import RunConfig
from albor.data.prepare import prepare
from albor.memory.arena import Arena
from albor.memory.devices import compute_dtype
from albor.memory.estimate import plan_for_training
from albor.memory.plan import plan_training
from albor.model.parameters import initialise, named_tensors
from albor.progress import show_progress
from albor.train.display import Display
from albor.train.guard import GuardState
from albor.train.loop import Loop
from albor.train.memory_record import MemoryRecord
from albor.train.metrics import MetricsLog
from albor.train.session import open_session
from albor.train.signals import StopRequest
from albor.train.step import Trainer, TrainState

LR = 1e-3
CONFIG = RunConfig.model_validate(
    {
        "name": "benchmark-8m",
        "model": {
            "hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 6, "num_attention_heads": 4,
            "num_key_value_heads": 2, "vocab_size": 8192, "max_position_embeddings": 256,
        },
        "data": {"sequence_length": 256},
        "optimizer": {"lr": LR},
        "schedule": {"kind": "constant", "warmup_steps": 0},
        "train": {"max_steps": 1_000_000, "micro_batch_size": 8},
    }
)  # fmt: skip
Batch = tuple[np.ndarray, np.ndarray]
Step = Callable[[Batch], float]


def make_batches(count: int) -> list[Batch]:
    """Zipf-like tokens with a little structure to learn: every token follows from the one before, or is
    drawn.
    """
    rng = np.random.default_rng(0)
    shape = (CONFIG.train.micro_batch_size, CONFIG.data.sequence_length + 1)
    batches = []
    for _ in range(count):
        drawn = np.minimum(rng.zipf(1.3, shape), CONFIG.model.vocab_size) - 1
        window = np.where(
            rng.random(shape) < 0.5, drawn, np.roll(drawn, 1, axis=1) * 7 % CONFIG.model.vocab_size
        )
        batches.append((window[:, :-1].copy(), window[:, 1:].copy()))
    return batches


def make_albor() -> tuple[Step, Trainer]:
    """albor's own trainer, as `albor train` builds it."""
    dtype = compute_dtype(CONFIG.train.precision, "cpu")
    trainer = Trainer(CONFIG, Arena(plan_training(CONFIG, "cpu", dtype)))
    initialise(trainer.arena, trainer.architecture, CONFIG.seed)
    state = TrainState(guard=GuardState.initial(dtype))

    def step(batch: Batch) -> float:
        nonlocal state
        result, state = trainer.step([batch], state)
        return result.loss

    return step, trainer


def make_loop(directory: Path) -> Step:
    """The same trainer as a run has it around it, with everything on; it reads Python's standard library."""
    settings = CONFIG.model_dump()
    settings["device"] = "cpu"
    settings["runs_dir"] = str(directory)
    settings["data"] |= {"cache_dir": str(directory / "data"), "max_epochs": 1e6}
    settings["divergence"]["on_spike"] = "clip"
    settings["checkpoint"] |= {"background": True, "every_steps": 1_000_000}
    settings["evaluate"]["every_steps"] = 1_000_000
    settings["alerts"] = {
        "train/loss > 100": "stop",
        "gradients/* > 1000": "warn",
        "train/grad_norm is not finite": "stop",
    }
    config = RunConfig.model_validate(settings)
    target, console = plan_for_training(config), Console(file=io.StringIO())
    with show_progress(console) as progress:
        data = prepare(config, progress)
    session = open_session(config, data, target.plan, "cpu")
    session.directory.mkdir()
    log = MetricsLog(session.directory)
    memory = MemoryRecord(target, session.trainer.arena, log, card=None)
    loop = Loop(session, log, Display(console), StopRequest(), memory, target.peak_flops)

    def step(batch: Batch) -> float:
        loop.step()
        return math.nan  # of other text than the peers'

    return step


def make_transformers(weights: dict[str, torch.Tensor], *, autocast: bool) -> Step:
    """LlamaForCausalLM and torch.optim.AdamW(fused=True), as a training script would use them."""
    c = CONFIG.model
    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            hidden_size=c.hidden_size, intermediate_size=c.intermediate_size,
            num_hidden_layers=c.num_hidden_layers, num_attention_heads=c.num_attention_heads,
            num_key_value_heads=c.num_key_value_heads, vocab_size=c.vocab_size,
            max_position_embeddings=c.max_position_embeddings, rms_norm_eps=c.rms_norm_eps,
            rope_theta=c.rope_theta, tie_word_embeddings=True, use_cache=False, attn_implementation="sdpa",
        )
    )  # fmt: skip
    missing = model.load_state_dict({f"model.{k}": v.float() for k, v in weights.items()}, strict=False)
    assert missing.missing_keys in ([], ["lm_head.weight"]), missing
    assert not missing.unexpected_keys, missing
    optimizer = make_optimizer(dict(model.named_parameters()).values())
    model.train()

    def step(batch: Batch) -> float:
        tokens, targets = map(torch.from_numpy, batch)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = model(input_ids=tokens, labels=targets, shift_labels=targets).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return step


def make_optimizer(parameters) -> torch.optim.AdamW:
    o = CONFIG.optimizer
    parameters = list(parameters)
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": o.weight_decay},
        {"params": [p for p in parameters if p.ndim == 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=LR, betas=o.betas, eps=o.eps, fused=True)


class PlainBlock(nn.Module):
    """Packed projections, SDPA with grouped queries, SwiGLU: what a careful person writes in plain
    PyTorch.
    """

    def __init__(self) -> None:
        super().__init__()
        c = CONFIG.model
        self.heads, self.kv_heads = c.num_attention_heads, c.num_key_value_heads or c.num_attention_heads
        self.head_dim = c.hidden_size // self.heads
        self.attention_norm = nn.Parameter(torch.ones(c.hidden_size))
        self.qkv = nn.Linear(c.hidden_size, (self.heads + 2 * self.kv_heads) * self.head_dim, bias=False)
        self.out = nn.Linear(c.hidden_size, c.hidden_size, bias=False)
        self.mlp_norm = nn.Parameter(torch.ones(c.hidden_size))
        self.gate_up = nn.Linear(c.hidden_size, 2 * c.intermediate_size, bias=False)
        self.down = nn.Linear(c.intermediate_size, c.hidden_size, bias=False)

    def forward(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        batch, length, width = x.shape
        normed = F.rms_norm(x, (width,), self.attention_norm, CONFIG.model.rms_norm_eps)
        qkv = self.qkv(normed).view(batch, length, -1, self.head_dim).transpose(1, 2)
        qk, v = qkv.split([self.heads + self.kv_heads, self.kv_heads], dim=1)
        first, second = qk.chunk(2, dim=-1)
        qk = torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
        q, k = qk.split([self.heads, self.kv_heads], dim=1)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        x = x + self.out(mixed.transpose(1, 2).reshape(batch, length, width))
        gate, up = self.gate_up(F.rms_norm(x, (width,), self.mlp_norm, CONFIG.model.rms_norm_eps)).chunk(
            2, dim=-1
        )
        return x + self.down(F.silu(gate) * up)


class Plain(nn.Module):
    """The plain model, tied head, loss included."""

    def __init__(self) -> None:
        super().__init__()
        c = CONFIG.model
        self.embedding = nn.Embedding(c.vocab_size, c.hidden_size)
        self.blocks = nn.ModuleList(PlainBlock() for _ in range(c.num_hidden_layers))
        self.norm = nn.Parameter(torch.ones(c.hidden_size))
        head_dim = c.hidden_size // c.num_attention_heads
        # cos and sin by rotating the vectors (1, 0): the same angles as the oracle's.
        unit = torch.cat([torch.ones(head_dim // 2), torch.zeros(head_dim // 2)])
        turned = rotate(unit.expand(1, 1, CONFIG.data.sequence_length, head_dim), c.rope_theta)[0, 0]
        self.register_buffer("cos", turned[:, : head_dim // 2].clone())
        self.register_buffer("sin", turned[:, head_dim // 2 :].clone())

    def forward(self, tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x, self.cos, self.sin)
        x = F.rms_norm(x, x.shape[-1:], self.norm, CONFIG.model.rms_norm_eps)
        logits = F.linear(x, self.embedding.weight)
        return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())


def make_compiled(named: dict[str, torch.Tensor]) -> Step:
    """bf16 weights over fp32 masters; forward and loss under torch.compile, fused AdamW on the masters."""
    model = Plain()
    ours = {
        "embedding.weight": "embedding.tokens", "norm": "head.norm", "attention_norm": "attention.norm",
        "qkv.weight": "attention.qkv", "out.weight": "attention.out", "mlp_norm": "mlp.norm",
        "gate_up.weight": "mlp.gate_up", "down.weight": "mlp.down",
    }  # fmt: skip
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            key = name
            if name.startswith("blocks."):
                _, layer, rest = name.split(".", 2)
                key = f"blocks.{int(layer):02d}.{ours[rest]}"
            parameter.copy_(named[ours.get(name, key)])
    masters = [p.detach().clone().float() for p in model.parameters()]
    model = model.to(torch.bfloat16)
    parameters = list(model.parameters())
    optimizer = make_optimizer(masters)
    compiled = torch.compile(model)

    def step(batch: Batch) -> float:
        loss = compiled(*map(torch.from_numpy, batch))
        loss.backward()
        for master, parameter in zip(masters, parameters, strict=True):
            master.grad = parameter.grad.float()
            parameter.grad = None
        torch.nn.utils.clip_grad_norm_(masters, 1.0)
        optimizer.step()
        with torch.no_grad():
            torch._foreach_copy_(parameters, masters)
        return loss.item()

    return step


def timed(step: Step, batches: list[Batch]) -> list[float]:
    seconds = []
    for batch in batches:
        start = time.perf_counter()
        step(batch)
        seconds.append(time.perf_counter() - start)
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=8, help="steps per turn")
    parser.add_argument("--no-write", action="store_true")
    arguments = parser.parse_args()

    directory = tempfile.TemporaryDirectory(prefix="albor-benchmark-")  # of the run whose loop is timed
    batches = make_batches(16)
    start = time.perf_counter()
    albor_step, trainer = make_albor()
    named = {
        name: t.clone() for name, t in named_tensors(trainer.arena["weights"], trainer.architecture).items()
    }
    losses = {"albor": [albor_step(batches[0])]}
    first_step = {"albor": time.perf_counter() - start}
    if "master" in trainer.arena:  # the peers start from the same fp32 values
        fresh = make_albor()[1]
        named = named_tensors(fresh.arena["master"], fresh.architecture)
    weights = unpacked(named, trainer.architecture)

    makers = {
        "transformers fp32": lambda: make_transformers(weights, autocast=False),
        "transformers bf16 autocast": lambda: make_transformers(weights, autocast=True),
        "plain torch bf16 + compile": lambda: make_compiled(named),
        "albor, the loop of a run": lambda: make_loop(Path(directory.name)),
    }
    peers: dict[str, Step] = {}
    for name, make in makers.items():
        start = time.perf_counter()
        peers[name] = make()
        losses[name] = [peers[name](batches[0])]
        first_step[name] = time.perf_counter() - start
    for batch in batches[1:]:  # warm-up, and the proof that all do the same work
        for name, step in {"albor": albor_step, **peers}.items():
            losses[name].append(step(batch))

    turn = (batches * 10)[: arguments.steps]
    ratios: dict[str, list[float]] = {name: [] for name in peers}
    medians: dict[str, list[float]] = {name: [] for name in ("albor", *peers)}
    for _ in range(arguments.rounds):
        for name, step in peers.items():
            before = timed(albor_step, turn)
            peer = statistics.median(timed(step, turn))
            ours = statistics.median(before + timed(albor_step, turn))
            medians["albor"].append(ours)
            medians[name].append(peer)
            ratios[name].append(peer / ours)

    tokens = CONFIG.tokens_per_step
    systems = {
        name: {
            "tokens_per_second": round(tokens / statistics.median(medians[name])),
            "albor_is_faster_by": round(statistics.median(ratios[name]), 3) if name in ratios else None,
            "ratio_range": [round(f(ratios[name]), 3) for f in (min, max)] if name in ratios else None,
            "first_step_seconds": round(first_step[name], 2),
            "loss_first": _loss(losses[name][0]),
            "loss_after_16": _loss(losses[name][-1]),
        }
        for name in medians
    }
    for name, row in systems.items():
        ratio = row["albor_is_faster_by"]
        spread = (
            f"{ratio:5.2f}x  ({row['ratio_range'][0]:.2f}-{row['ratio_range'][1]:.2f})" if ratio else " " * 19
        )
        print(
            f"{name:<28} {row['tokens_per_second']:>7,} tok/s  albor {spread}  "
            f"first step {row['first_step_seconds']:6.2f} s  "
            f"loss {row['loss_first']} -> {row['loss_after_16']}"
        )
    if not arguments.no_write:
        path = Path(__file__).parent / "results" / "cpu.json"
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps({**environment(arguments), "systems": systems}, indent=1) + "\n")
        print(f"written to {path}")


def _loss(loss: float) -> float | None:
    return None if math.isnan(loss) else round(loss, 4)


def environment(arguments: argparse.Namespace) -> dict[str, object]:
    def run(*command: str) -> str:
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()

    cpuinfo = Path("/proc/cpuinfo").read_text()
    cpu = next((line.split(":")[1].strip() for line in cpuinfo.splitlines() if "model name" in line), "")
    changed = run("git", "status", "--porcelain", "--untracked-files=no", "--", "albor", "benchmarks/cpu.py")
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "command": f"python benchmarks/cpu.py --rounds {arguments.rounds} --steps {arguments.steps}",
        "commit": run("git", "rev-parse", "HEAD") + ("+changes" if changed else ""),
        "processor": cpu,
        "threads": torch.get_num_threads(),
        "platform": platform.platform(),
        "versions": {
            "albor": albor.__version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "numpy": np.__version__,
            "python": platform.python_version(),
        },
        "shape": "8M: 6 layers, hidden 256, heads 4/2, FFN 1024, vocabulary 8192 tied, 8 x 256 tokens a step",
    }


if __name__ == "__main__":
    main()
