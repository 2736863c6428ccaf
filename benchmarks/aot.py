"""Compiles every kernel as the shipped configurations launch it, for every supported card. It needs no GPU.

    python benchmarks/aot.py                     # writes benchmarks/results/kernels-aot.json, prints a table
    python benchmarks/aot.py --check             # writes nothing; the committed record has to be of this code
    python benchmarks/aot.py --compare           # the same without compiling, which takes seconds
    python benchmarks/aot.py --targets 90,89 my.yaml model.hidden_size=1536     # something else; never writes

The launches are not listed here but recorded: each configuration takes a training step, an evaluation and a
generation over an arena without memory, and `albor.kernels.launches` notes what is launched. Then each launch
is compiled to machine code, and it is a problem (exit code 1, one line each on stderr) when

- registers are spilled: any local memory at all counts as that;
- shared memory, tensor memory or registers exceed what one program may have, or the grid what CUDA allows;
- a matrix kernel, one with a tl.dot in it, has no tensor-core instruction, or multiplies in fp32.

Occupancy is the share of a multiprocessor's warps that registers, shared memory, tensor memory and the number
of programs leave resident. It is computed, not measured, and says nothing about speed by itself.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import triton
from triton.compiler import CompiledKernel
from triton.runtime.jit import JITFunction

from albor.bench.cases import STANDARD, find_case
from albor.config import RunConfig
from albor.configfile import load_config
from albor.kernels.launches import Grid, Launch, compile_launch, for_capability
from albor.kernels.target import Target
from albor.memory.devices import compute_dtype
from albor.memory.plan import plan_training
from albor.train.rehearsal import record_run

ROOT = Path(__file__).parents[1]
RECORD = ROOT / "benchmarks/results/kernels-aot.json"
TARGETS = (80, 86, 89, 90, 100, 120)

# Where gradients may be summed; which of the two `auto` takes depends on the card.
PLACES: dict[str, tuple[Literal["cpu", "gpu"], ...]] = {
    "cpu": ("cpu",),
    "gpu": ("gpu",),
    "auto": ("cpu", "gpu"),
}

# Ladders and sweeps name the configurations that they begin with.
SHIPPED = [
    str(path.relative_to(ROOT))
    for path in sorted(ROOT.glob("configs/*.yaml"))
    if "\nmodel:" in path.read_text()
]
# Every kernel runs in one of these or in a shipped configuration: other options, at a head width of 128; and
# rows that RMSNorm does not hold in registers.
VARIANTS = {
    "options": (
        "configs/pretrain-350m.yaml",
        [
            "model.hidden_size=2048", "model.num_hidden_layers=2", "data.document_mask=true",
            "optimizer.state_dtype=bf16", "train.recompute=cheap", "train.label_smoothing=0.1",
            "train.z_loss=1e-4", "train.accumulator=auto",
        ],
    ),
    "wide": (
        "configs/pretrain-350m.yaml",
        [
            "model.hidden_size=16384", "model.num_attention_heads=128", "model.num_key_value_heads=32",
            "model.num_hidden_layers=2", "model.tie_word_embeddings=false",
        ],
    ),
}  # fmt: skip

# Per multiprocessor. CUDA C++ programming guide, "Compute Capabilities"; the allocation units are those of
# the CUDA occupancy calculator, and tensor memory's size is the PTX manual's.
WARPS = {80: 64, 86: 48, 89: 48, 90: 64, 100: 64, 120: 48}
PROGRAMS = {80: 32, 86: 16, 89: 24, 90: 32, 100: 32, 120: 24}
SHARED_BYTES = {80: 164 << 10, 86: 100 << 10, 89: 100 << 10, 90: 228 << 10, 100: 228 << 10, 120: 100 << 10}
SHARED_RESERVED = 1024  # bytes of every program's, for the system
SHARED_UNIT = 128
PARTITIONS = 4  # each with a quarter of the 65,536 registers, given to a warp in units of 256
PARTITION_REGISTERS = 16384
REGISTER_UNIT = 256
TENSOR_MEMORY_COLUMNS = 512
# A launch's most programs along each axis.
GRID = (2**31 - 1, 65535, 65535)

# HMMA is what mma.sync becomes, HGMMA wgmma, UTCHMMA tcgen05.mma. HFMA2.MMA, which is none, begins otherwise.
TENSOR_INSTRUCTION = re.compile(r"\s(HMMA|HGMMA|UTCHMMA)\.?[\w.]*")
DOT = re.compile(r"= tt\.dot (?P<options>.*) : tensor<[\dx]+x(?P<dtype>\w+)> \*")


def read_configs(given: list[str]) -> dict[str, RunConfig]:
    """By name what is `given`, after the overrides among it: files, names of VARIANTS, the benchmark's cases.
    Without any, all of these.
    """
    overrides = [item for item in given if "=" in item]
    items = [item for item in given if "=" not in item] or [*SHIPPED, *VARIANTS, *STANDARD]
    return {Path(item).stem if item.endswith(".yaml") else item: _read(item, overrides) for item in items}


def _read(item: str, overrides: list[str]) -> RunConfig:
    if item in STANDARD:
        return find_case(item, 1).config
    if item in VARIANTS:
        path, variant = VARIANTS[item]
        return load_config(ROOT / path, [*variant, *overrides])
    return load_config(Path(item), overrides)


def record_config(config: RunConfig, capability: int) -> dict[Launch, set[Grid]]:
    """What a run of `config` launches, with gradients summed on the device or in host memory."""
    dtype = compute_dtype(config.train.precision, "cuda")
    launches: dict[Launch, set[Grid]] = {}
    for place in PLACES[config.train.accumulator]:
        found = record_run(config, plan_training(config, "cuda", dtype, place), capability)
        for launch, grids in found.items():
            launches.setdefault(launch, set()).update(grids)
    return launches


@dataclass(frozen=True)
class Code:
    """What the machine code of one launch takes."""

    registers: int  # per thread
    spilled_bytes: int  # of local memory, per thread
    shared_bytes: int  # per program
    tensor_memory_columns: int  # per program; sm_100 keeps accumulators there
    matrix_dtypes: tuple[str, ...]  # of the operands of its dots
    tensor_instruction: str | None  # HMMA, HGMMA or UTCHMMA


def inspect_code(kernel: CompiledKernel) -> Code:
    """Reads `kernel`'s machine code with the tools that come with Triton."""
    (path,) = (path for name, path in kernel.metadata_group.items() if name.endswith(".cubin"))
    usage = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", _cuobjdump("-res-usage", path)))
    lines = [line for line in kernel.asm["ttir"].splitlines() if " tt.dot" in line]
    dots = [match for match in map(DOT.search, lines) if match]
    assert len(dots) == len(lines), f"not understood: {lines}"
    dtypes = {"tf32" if "tf32" in dot["options"] else dot["dtype"] for dot in dots}
    instruction = TENSOR_INSTRUCTION.search(_cuobjdump("-sass", path)) if dots else None
    return Code(
        registers=int(usage["REG"]),
        spilled_bytes=int(usage["STACK"]) + int(usage["LOCAL"]),
        shared_bytes=kernel.metadata.shared,
        tensor_memory_columns=kernel.metadata.tmem_size or 0,
        matrix_dtypes=tuple(sorted(dtypes)),
        tensor_instruction=instruction[1] if instruction else None,
    )


def _cuobjdump(option: str, path: str) -> str:
    command = [triton.knobs.nvidia.cuobjdump.path, option, path]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def resident_programs(code: Code, num_warps: int, capability: int) -> int:
    """Programs of `num_warps` warps that one multiprocessor holds at a time."""
    per_warp = math.ceil(code.registers * 32 / REGISTER_UNIT) * REGISTER_UNIT
    warps = min(WARPS[capability], PARTITIONS * (PARTITION_REGISTERS // per_warp))
    shared = math.ceil((code.shared_bytes + SHARED_RESERVED) / SHARED_UNIT) * SHARED_UNIT
    limits = [PROGRAMS[capability], warps // num_warps, SHARED_BYTES[capability] // shared]
    if code.tensor_memory_columns:
        limits.append(TENSOR_MEMORY_COLUMNS // code.tensor_memory_columns)
    return min(limits)


def problems(code: Code, launch: Launch, grids: set[Grid]) -> list[str]:
    """What is wrong with `code`, and what would put it right."""
    found = []
    if code.spilled_bytes:
        found.append(
            f"spills registers, {code.spilled_bytes} bytes per thread; take smaller blocks or more warps"
        )
    allowed = Target(launch.capability).shared_bytes
    if code.shared_bytes > allowed:
        found.append(
            f"takes {code.shared_bytes:,} bytes of shared memory, {allowed:,} are allowed;"
            " take smaller blocks or fewer stages"
        )
    if code.tensor_memory_columns > TENSOR_MEMORY_COLUMNS:
        found.append(
            f"takes {code.tensor_memory_columns} columns of tensor memory, there are {TENSOR_MEMORY_COLUMNS};"
            " take smaller blocks"
        )
    if not found and not resident_programs(code, launch.options["num_warps"], launch.capability):
        found.append(
            f"takes {code.registers} registers per thread in {launch.options['num_warps']} warps, more than"
            " there are; take fewer warps"
        )
    if code.matrix_dtypes and code.tensor_instruction is None:
        found.append(
            "multiplies matrices without a tensor-core instruction; give tl.dot bf16 or fp16 operands"
        )
    elif {"f32", "f64"} & set(code.matrix_dtypes):
        found.append(
            "has a tl.dot over fp32, which tensor cores do not take; round its operands to bf16 or fp16"
        )
    for grid in grids:
        if any(size > most for size, most in zip(grid, GRID, strict=True)):
            found.append(f"has a grid of {grid}, {GRID} is the most; put the long axis first")
    return found


@dataclass(frozen=True)
class Entry:
    """A launch, who uses it, and what became of it."""

    launch: Launch
    grids: set[Grid]
    configs: list[str]
    code: Code | None = None  # None: it was not compiled, or cannot be
    problems: tuple[str, ...] = ()

    @property
    def description(self) -> dict[str, Any]:
        """What tells it from others, but for the card."""
        return {
            "kernel": self.launch.name,
            "arguments": pairs(self.launch.arguments),
            "constants": pairs(self.launch.constants),
            "options": pairs(self.launch.options),
            "configs": self.configs,
        }

    @property
    def figures(self) -> dict[str, Any]:
        """What its machine code takes."""
        if self.code is None:
            return {}
        warps, capability = self.launch.options["num_warps"], self.launch.capability
        programs = sorted({math.prod(grid) for grid in self.grids})
        return {
            "registers": self.code.registers,
            "spilled_bytes": self.code.spilled_bytes,
            "shared_bytes": self.code.shared_bytes,
            "occupancy": round(
                resident_programs(self.code, warps, capability) * warps / WARPS[capability], 3
            ),
            "tensor_instruction": self.code.tensor_instruction,
            "programs": [programs[0], programs[-1]],
        }


def examine(entry: Entry) -> Entry:
    """Compiles `entry` and looks at the result; what does not compile is a problem, not an exception."""
    try:
        kernel = compile_launch(entry.launch)
    except (
        Exception
    ) as error:  # Triton's compiler raises RuntimeError, CompilationError, PTXASError and others
        reason = " ".join(str(error).split()) or type(error).__name__
        return replace(entry, problems=(f"does not compile: {reason}",))
    code = inspect_code(kernel)
    return replace(entry, code=code, problems=tuple(problems(code, entry.launch, entry.grids)))


def record_all(configs: dict[str, RunConfig], capability: int) -> list[Entry]:
    """Everything that `configs` launch on a card of `capability`, not compiled yet."""
    found: dict[Launch, Entry] = {}
    for name, config in configs.items():
        for launch, grids in record_config(config, capability).items():
            item = found.setdefault(launch, Entry(launch, set(), []))
            item.grids.update(grids)
            item.configs.append(name)
    return list(found.values())


def compile_all(recorded: list[Entry], capability: int, workers: int) -> list[Entry]:
    """The same, compiled and examined."""
    with for_capability(capability), ThreadPoolExecutor(workers) as pool:
        return list(pool.map(examine, recorded))


def pairs(values: dict[str, Any]) -> str:
    """a=1 b=2"""
    return " ".join(f"{name}={value}" for name, value in values.items())


def unused_kernels(entries: list[Entry]) -> list[str]:
    """Kernels that no entry launches, and that nothing launched calls: they would go unexamined."""
    modules = [module for name, module in sys.modules.items() if name.startswith("albor.kernels.")]
    kernels = {
        value for module in modules for value in vars(module).values() if isinstance(value, JITFunction)
    }
    reached = set[JITFunction]()
    waiting = [entry.launch.kernel for entry in entries]
    while waiting:
        kernel = waiting.pop()
        if kernel not in reached:
            reached.add(kernel)
            called = (kernel.__globals__.get(name) for name in kernel.fn.__code__.co_names)
            waiting += [function for function in called if isinstance(function, JITFunction)]
    return [
        f"{kernel.__module__}.{kernel.__name__} is launched by no configuration; add one to VARIANTS"
        for kernel in sorted(kernels - reached, key=lambda kernel: (kernel.__module__, kernel.__name__))
    ]


def title(entry: Entry) -> str:
    """Names it in a message."""
    constants = pairs(entry.launch.constants | entry.launch.options)
    return f"{entry.launch.name} on sm_{entry.launch.capability} ({', '.join(entry.configs)}; {constants})"


def make_record(entries: list[Entry]) -> dict[str, Any]:
    """Sorted, and free of what changes from run to run."""
    launches: dict[str, dict[str, Any]] = {}
    for entry in entries:
        launch = launches.setdefault(json.dumps(entry.description), {**entry.description, "targets": {}})
        launch["targets"][str(entry.launch.capability)] = entry.figures
    return {"triton": triton.__version__, "launches": [launches[key] for key in sorted(launches)]}


def read_record() -> dict[str, Any]:
    """The committed record; without one, a record of nothing."""
    return json.loads(RECORD.read_text(encoding="utf-8")) if RECORD.exists() else {"launches": []}


def launch_keys(record: dict[str, Any]) -> set[str]:
    """What is launched where, without what the compiler made of it."""
    return {
        json.dumps({key: value for key, value in entry.items() if key != "targets"} | {"target": target})
        for entry in record["launches"]
        for target in entry["targets"]
    }


def out_of_date(committed: dict[str, Any], current: dict[str, Any]) -> list[str]:
    """Whether `committed` is the record of other code. Another compiler's figures do not make it that."""
    before, now = launch_keys(committed), launch_keys(current)
    if before == now:
        return []
    return [
        f"{RECORD.relative_to(ROOT)} is out of date: it lacks {len(now - before)} launches"
        f" and has {len(before - now)} that are no more; run make aot"
    ]


def to_text(record: dict[str, Any]) -> str:
    """JSON with one line per launch and one per target, so that a change is a change of few lines."""
    blocks = []
    for entry in record["launches"]:
        rows = ",\n".join(
            f"   {json.dumps(target)}: {json.dumps(row)}" for target, row in entry["targets"].items()
        )
        head = json.dumps({key: value for key, value in entry.items() if key != "targets"})
        blocks.append(f'  {head[:-1]}, "targets": {{\n{rows}}}}}')
    launches = ",\n".join(blocks)
    return f'{{\n "triton": {json.dumps(record["triton"])},\n "launches": [\n{launches}\n ]\n}}\n'


def table(record: dict[str, Any], targets: list[int]) -> str:
    """Per kernel and target the most registers, the most shared memory and the lowest occupancy."""
    kernels: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for launch in record["launches"]:
        for target, figures in launch["targets"].items():
            if figures:
                kernels.setdefault(launch["kernel"], {}).setdefault(target, []).append(figures)
    heading = "registers, KiB shared, occupancy"
    width = max(map(len, (heading, *kernels)))
    lines = [f"{heading:{width}}" + "".join(f"{f'sm_{target}':>16}" for target in targets)]
    for kernel, by_target in kernels.items():
        cells = (_cell(by_target.get(str(target), [])) for target in targets)
        lines.append(f"{kernel:{width}}" + "".join(f"{cell:>16}" for cell in cells))
    return "\n".join(lines)


def _cell(rows: list[dict[str, Any]]) -> str:
    if not rows:
        return "-"
    registers, shared = (max(row[key] for row in rows) for key in ("registers", "shared_bytes"))
    return f"{registers} {shared / 1024:.0f} {min(row['occupancy'] for row in rows):.0%}"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "what", nargs="*", help="configurations, and overrides key=value; without: the shipped"
    )
    parser.add_argument("--targets", default=",".join(map(str, TARGETS)), help="compute capabilities: 90,89")
    parser.add_argument("--check", action="store_true", help="do not write; the committed record must fit")
    parser.add_argument(
        "--compare", action="store_true", help="do not compile either; only the record must fit"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="compilations at a time")
    arguments = parser.parse_args()
    targets = [int(target) for target in arguments.targets.split(",")]
    if unknown := set(targets) - set(TARGETS):
        parser.error(f"--targets: {unknown} are not among {TARGETS}")

    started = time.perf_counter()
    configs = read_configs(arguments.what)
    entries = {target: record_all(configs, target) for target in targets}
    if not arguments.compare:
        entries = {target: compile_all(found, target, arguments.workers) for target, found in entries.items()}
    flat = [entry for found in entries.values() for entry in found]
    record = make_record(flat)
    complete = not arguments.what and targets == list(TARGETS)
    wrong = [f"{title(entry)} {problem}" for entry in flat for problem in entry.problems]
    if complete:
        wrong += unused_kernels(flat)
    if complete and (arguments.check or arguments.compare):
        wrong += out_of_date(read_record(), record)
    if arguments.json:
        print(json.dumps({**record, "problems": wrong}))
    else:
        if not arguments.compare:
            print(table(record, targets))
        print(f"{len(flat)} launches in {time.perf_counter() - started:.0f} s")
    for problem in wrong:
        print(f"aot: {problem}", file=sys.stderr)
    if complete and not (arguments.check or arguments.compare or wrong):
        RECORD.write_text(to_text(record), encoding="utf-8")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
