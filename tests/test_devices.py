"""Where a run goes: its dtype, where gradients are summed, and what lies outside the arena."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from helpers import make_config

from albor.errors import ConfigError
from albor.memory import devices
from albor.memory.cards import Hardware, find_gpu
from albor.memory.devices import compute_dtype, resolve_accumulator
from albor.memory.host import has_bf16_instructions
from albor.memory.outside import outside
from albor.memory.plan import plan_training


@pytest.mark.parametrize(
    ("flags", "dtype"), [("avx2 avx512_bf16", "bfloat16"), ("amx_bf16", "bfloat16"), ("avx512f", "float32")]
)
def test_cpu_computes_bf16_where_it_can(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flags: str, dtype: str
) -> None:
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text(f"processor\t: 0\nflags\t\t: fpu {flags} sse\nbugs\t\t:\n")
    known = has_bf16_instructions(cpuinfo)
    monkeypatch.setattr(devices, "cpu_has_bf16", lambda: known)
    assert compute_dtype("bf16", "cpu") == dtype
    assert devices.falls_back("bf16", dtype) == (dtype == "float32")


def test_dtypes() -> None:
    assert [compute_dtype(p, "cuda") for p in ("bf16", "fp16", "fp32")] == ["bfloat16", "float16", "float32"]
    assert compute_dtype("fp32", "cpu") == "float32"
    assert not devices.falls_back("fp32", "float32")
    with pytest.raises(ConfigError, match="use bf16 or fp32"):
        compute_dtype("fp16", "cpu")


def test_accumulator_goes_to_the_device_where_it_fits() -> None:
    config = make_config(accumulator="auto")
    plan = plan_training(config, "cuda", "bfloat16", "gpu")
    gpu = find_gpu("L4")
    enough = plan.size("device") + sum(outside(plan, gpu).values())

    def resolved(device: Any, capacity: int | None) -> str:
        return resolve_accumulator(config, Hardware(device, "", gpu, capacity), "bfloat16")

    assert resolved("cuda", enough) == "gpu"
    assert resolved("cuda", enough - 1) == "cpu"
    assert resolved("cuda", None) == "cpu"
    assert resolved("cpu", enough) == "cpu"
    asked = make_config(accumulator="gpu")
    assert resolve_accumulator(asked, Hardware("cuda", ""), "bfloat16") == "gpu"
