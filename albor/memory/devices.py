"""Where a run goes: the device, its capacity, and what the configuration resolves to there.

No torch, and no CUDA context.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from albor.config import RunConfig
from albor.errors import ConfigError, Problem
from albor.memory.cards import Hardware
from albor.memory.host import cpu_has_bf16, host_capacity
from albor.memory.nvml import installed_gpu, no_gpu
from albor.memory.outside import outside
from albor.memory.plan import plan_training


def this_machine(device: Literal["auto", "cuda", "cpu"]) -> Hardware:
    """The hardware that `device` means here: its memory is what is free now."""
    host = host_capacity()
    installed = None if device == "cpu" else installed_gpu()
    if installed is not None:
        return installed if installed.unified else replace(installed, host_capacity_bytes=host)
    if device == "cuda":
        return Hardware("cuda", f"CUDA, {no_gpu()}", host_capacity_bytes=host)
    return Hardware("cpu", "CPU, free host memory", capacity_bytes=host)


def compute_dtype(precision: str, device: str) -> str:
    """The dtype that `precision` computes in on `device`.

    A CPU without bf16 instructions computes in fp32 what is configured as bf16 (see `falls_back`): emulated
    bf16 is slower than that. Raises ConfigError for fp16 on the CPU.
    """
    if precision == "fp16" and device == "cpu":
        problem = "fp16 needs a GPU"
        raise ConfigError([Problem("train.precision", problem, "use bf16 or fp32 on the CPU")])
    if precision == "bf16" and device == "cpu" and not cpu_has_bf16():
        return "float32"
    return {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}[precision]


def falls_back(precision: str, dtype: str) -> bool:
    """Whether `compute_dtype` chose another dtype than the configuration asks for, which a run should say."""
    return precision == "bf16" and dtype != "bfloat16"


def resolve_accumulator(config: RunConfig, hardware: Hardware, dtype: str) -> Literal["cpu", "gpu"]:
    """Where gradients are summed; `auto` is the device where that is known to fit, else the host."""
    if config.train.accumulator != "auto":
        return config.train.accumulator
    if hardware.device == "cpu" or hardware.capacity_bytes is None:
        return "cpu"
    plan = plan_training(config, "cuda", dtype, "gpu")
    needed = plan.size("device") + sum(outside(plan, hardware.gpu).values())
    return "gpu" if needed <= hardware.capacity_bytes else "cpu"
