"""Writing on a CPU, beside llama.cpp: the quickstart's model, the same weights, in one process.

    python benchmarks/decode.py             # writes benchmarks/results/decode.json, prints a table
    python benchmarks/decode.py --rounds 2 --tokens 64 --no-write

It measures what one waits for: 256 greedy tokens after a short prompt, sampling and text included, the prompt
aside, as `albor generate` and llama.cpp's server report it. The weights are random, for the speed does not
depend on them, and rounded to bf16, so that every file holds the same values. llama.cpp reads what `albor
export --to gguf` writes, through xllamacpp, with its default settings but one slot and no prompt cache.

Turns alternate, and a ratio is between turns of one round. albor takes one thread for a model of this size,
llama.cpp is given one and all cores, and the better of the two counts. On a machine that others use, turns of
both last several times as long as the fastest, and no ratio of speeds means much: look at the load in the
record, and at the processor time per token, of all threads, in which the prompt is too.

    albor fp32      what albor generate does: fp32 arithmetic, whatever the weights were trained in
    albor bf16      bf16 arithmetic, as the model was trained; not what albor generate does on a CPU
    llama.cpp F32, BF16   by the type of the file's matrices
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # as the command line has it

import torch
import xllamacpp

import albor
from albor import checkpoint
from albor.architecture import Architecture
from albor.config import RunConfig
from albor.configfile import dump_config, load_config
from albor.data.prepare import prepare_tokenizer
from albor.data.tokenizer import Tokenizer
from albor.export.format import open_source
from albor.export.gguf import write_gguf
from albor.generate.generate import generate
from albor.generate.load import load_checkpoint, load_to_write
from albor.memory.arena import Arena
from albor.memory.plan import plan_inference
from albor.model.decode import Decoder
from albor.model.parameters import initialise, named_tensors

ROOT = Path(__file__).parents[1]
PROMPT = "def "
GOAL = 0.8
OURS = "albor fp32, 1 thread"

Turn = Callable[[int], float]  # tokens to write -> tokens per second


def make_run(config: RunConfig, tokenizer: Tokenizer, directory: Path) -> Path:
    """A checkpoint of initial weights, in bf16."""
    architecture = Architecture.from_config(config.model)
    arena = Arena(plan_inference(config, "cpu", "bfloat16"), "cpu")
    initialise(arena, architecture, config.seed)
    weights = named_tensors(arena["weights"], architecture)
    # An end of document would end the text: its logit is 0 then, and is never the likeliest.
    weights["embedding.tokens"][list(tokenizer.special_ids.values())] = 0
    files = {"config.yaml": dump_config(config).encode(), tokenizer.file_name: tokenizer.model}
    state = {"step": 0, "tokens": 0}
    retention = checkpoint.Retention(keep_last=1)
    return checkpoint.save(directory / "checkpoints", 0, {"weights": weights}, state, files, retention)


def albor_turn(decoder: Decoder, tokenizer: Tokenizer) -> Turn:
    def turn(count: int) -> float:
        generation = generate(decoder, tokenizer, PROMPT, max_tokens=count, temperature=0.0)
        assert len(generation.tokens) == count, "the text ended by itself"
        speed = generation.tokens_per_second
        assert speed is not None
        return speed

    return turn


def llama_turn(path: Path, threads: int, context: int) -> Turn:
    settings = xllamacpp.CommonParams()
    settings.model.path = str(path)
    settings.n_ctx, settings.n_parallel, settings.n_gpu_layers = context, 1, 0
    settings.cpuparams.n_threads = settings.cpuparams_batch.n_threads = threads
    settings.verbosity = -1
    server = xllamacpp.Server(settings)

    def turn(count: int) -> float:
        answer = server.handle_completions(
            {
                "prompt": PROMPT,
                "n_predict": count,
                "temperature": 0,
                "ignore_eos": True,
                "cache_prompt": False,
            }
        )
        timings = answer["timings"]
        assert timings["predicted_n"] == count, "the text ended by itself"
        return float(timings["predicted_per_second"])

    return turn


def measure(turns: dict[str, Turn], rounds: int, count: int) -> dict[str, Any]:
    """Medians of every system, and of its ratio to albor's in the same round, over alternating turns."""
    for turn in turns.values():
        turn(count)
    speeds: dict[str, list[float]] = {name: [] for name in turns}
    processor: dict[str, list[float]] = {name: [] for name in turns}
    for _ in range(rounds):
        for name, turn in turns.items():
            began = time.process_time()
            speeds[name].append(turn(count))
            processor[name].append((time.process_time() - began) / count)
    return {name: described(values, speeds[OURS], processor[name]) for name, values in speeds.items()}


def described(values: list[float], ours: list[float], processor: list[float]) -> dict[str, Any]:
    ratios = [own / other for own, other in zip(ours, values, strict=True)]
    return {
        "tokens_per_second": round(statistics.median(values)),
        "range": [round(min(values)), round(max(values))],
        "albor_is_faster_by": round(statistics.median(ratios), 3),
        "ratio_range": [round(min(ratios), 3), round(max(ratios), 3)],
        "processor_microseconds_per_token": round(1e6 * statistics.median(processor)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--no-write", action="store_true")
    arguments = parser.parse_args()

    load_before = os.getloadavg()
    with tempfile.TemporaryDirectory() as scratch:
        directory = Path(scratch)
        config = load_config(ROOT / "configs" / "quickstart.yaml", [f"data.cache_dir={directory}/data"])
        tokenizer, _ = prepare_tokenizer(config)
        path = make_run(config, tokenizer, directory)
        source = open_source(path)
        files = {"F32": "fp32", "BF16": "bf16"}
        for name, dtype in files.items():
            write_gguf(source, directory / f"{name}.gguf", dtype, None, lambda stage, done, total: None)
        loaded = load_to_write(path)
        narrow = load_checkpoint(path, "cpu", dtype="bfloat16")
        context = config.model.max_position_embeddings
        turns = {OURS: albor_turn(Decoder(loaded.model, loaded.arena), tokenizer)}
        for name in files:
            for number in sorted({1, os.cpu_count() or 1}):
                label = f"llama.cpp {name}, {number} thread{'s' * (number > 1)}"
                turns[label] = llama_turn(directory / f"{name}.gguf", number, context)
        turns["albor bf16, 1 thread"] = albor_turn(Decoder(narrow.model, narrow.arena), tokenizer)
        systems = measure(turns, arguments.rounds, arguments.tokens)
    for name, row in systems.items():
        low, high = row["ratio_range"]
        print(
            f"{name:<28} {row['tokens_per_second']:>7,} tokens/s  albor {row['albor_is_faster_by']:5.2f}x"
            f"  ({low:.2f}-{high:.2f})  {row['processor_microseconds_per_token']:>6,} us of processor time"
        )
    # Against the thread count that is the better one for llama.cpp.
    ratios = {
        name: min(row["albor_is_faster_by"] for label, row in systems.items() if f"{name}," in label)
        for name in files
    }
    print("; ".join(f"{ratio:.2f} of llama.cpp's best on {name}" for name, ratio in ratios.items()), end="")
    print(f" (goal {GOAL}), load {load_before[0]:.1f} to {os.getloadavg()[0]:.1f}")
    if not arguments.no_write:
        record = ROOT / "benchmarks" / "results" / "decode.json"
        content = {
            **environment(arguments, load_before), "goal": GOAL, "ratios": ratios, "systems": systems,
        }  # fmt: skip
        record.write_text(json.dumps(content, indent=1) + "\n")
        print(f"written to {record}")


def environment(arguments: argparse.Namespace, load_before: tuple[float, float, float]) -> dict[str, object]:
    def run(*command: str) -> str:
        return subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT).stdout.strip()

    cpuinfo = Path("/proc/cpuinfo").read_text()
    cpu = next((line.split(":")[1].strip() for line in cpuinfo.splitlines() if "model name" in line), "")
    changed = run(
        "git", "status", "--porcelain", "--untracked-files=no", "--", "albor", "benchmarks/decode.py"
    )
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "command": f"python benchmarks/decode.py --rounds {arguments.rounds} --tokens {arguments.tokens}",
        "commit": run("git", "rev-parse", "HEAD") + ("+changes" if changed else ""),
        "processor": cpu,
        "cores": os.cpu_count(),
        "load": {"before": load_before[0], "after": os.getloadavg()[0]},
        "platform": platform.platform(),
        "versions": {
            "albor": albor.__version__,
            "torch": torch.__version__,
            "xllamacpp": metadata.version("xllamacpp"),
            "gguf": metadata.version("gguf"),
            "python": platform.python_version(),
        },
        "shape": "the quickstart's: 4 layers, hidden 192, heads 3/1, FFN 512, vocabulary 4096 tied",
    }


if __name__ == "__main__":
    main()
