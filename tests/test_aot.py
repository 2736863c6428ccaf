"""Ahead-of-time compilation: launches are recorded as the JIT would specialise them, what is compiled is what
a launch looks for, bad machine code is refused, and the kernels of the shipped configurations pass.

None of this needs a GPU; all of it needs processes without TRITON_INTERPRET (see tests/aot_cases.py).
"""

from __future__ import annotations

import copy
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import triton

from albor.kernels.launches import record

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import aot

ROOT = Path(__file__).parents[1]


def run(*command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Python on `command`, in a process that compiles its kernels."""
    inherited = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, *command], cwd=ROOT, env=inherited | environment, capture_output=True, text=True
    )


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What tests/aot_cases.py found, beginning with an empty cache."""
    result = run("tests/aot_cases.py", TRITON_CACHE_DIR=str(tmp_path_factory.mktemp("triton")))
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


def test_launches_are_recorded_as_the_jit_specialises_them(cases: dict[str, Any]) -> None:
    first, second, third = cases["launches"]
    # Three launches of one specialisation, two of them with the same grid.
    assert first["arguments"] == {"x": "*bf16:16", "out": "*bf16:16", "n": "i32:16"}
    assert first["constants"] == {"stride": 1, "bias": None, "BLOCK": 128}
    assert first["options"] == {"num_warps": 4, "num_stages": 3}
    assert first["grids"] == [[2, 3, 1], [4, 1, 1]]
    assert first["capability"] == 89
    # A pointer 2 bytes past an aligned one, odd integers, an optional pointer that is there; a grid that is
    # computed from the constants.
    assert second["arguments"] == {
        "x": "*bf16:16", "out": "*bf16", "n": "i32", "stride": "i32", "bias": "*bf16:16",
    }  # fmt: skip
    assert second["grids"] == [[4, 1, 1]]
    assert second["options"] == {"num_warps": 2, "num_stages": 3}
    # An integer that needs 64 bits, one that is 1, and an option that is not as usual.
    assert third["arguments"] == {"x": "*fp32:16", "out": "*bf16:16", "stride": "i64:16"}
    assert third["constants"] == {"n": 1, "bias": None, "BLOCK": 128}
    assert third["options"]["enable_fp_fusion"] is False


def test_a_failed_recording_leaves_triton_as_it_was(cases: dict[str, Any]) -> None:
    assert cases["restored"]


def test_a_launch_finds_what_was_precompiled(cases: dict[str, Any]) -> None:
    found = cases["compilations"]
    assert found["precompile"] == [False, False]  # both kernels were compiled
    assert found["same process"] == []  # in memory
    assert found["new process"] == [True, True]  # on disk
    assert found["other alignment"] == [False]
    assert found["other card"] == [False]


def test_a_run_compiles_before_its_first_step(cases: dict[str, Any]) -> None:
    (said,) = cases["before_the_first_step"]["said"]
    assert re.fullmatch(r"1 kernels ready after \d+\.\d s", said)
    error = cases["before_the_first_step"]["error"]
    assert error.startswith("the kernels do not compile: ")
    assert error.endswith("albor doctor shows what is missing")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_real_launch_compiles_nothing_after_precompile(cases: dict[str, Any]) -> None:
    assert cases["on_gpu"] == {"compiled": [], "right": True}


@pytest.mark.parametrize("target", aot.TARGETS)
def test_good_code_passes(cases: dict[str, Any], target: int) -> None:
    assert cases["verdicts"][f"good {target}"] == []


@pytest.mark.parametrize(
    ("case", "said"),
    [
        ("spills", "spills registers"),
        ("shared on 4090", "131,072 bytes of shared memory, 101,376 are allowed"),
        ("no tensor cores", "without a tensor-core instruction"),
        ("a dot beside", "has a tl.dot over fp32"),
        ("grid", "has a grid of (1, 65536, 1)"),
        ("broken", "does not compile: "),
    ],
)
def test_bad_code_is_refused(cases: dict[str, Any], case: str, said: str) -> None:
    (problem,) = cases["verdicts"][case]
    assert said in problem
    assert "\n" not in problem


def test_shared_memory_is_judged_by_the_card(cases: dict[str, Any]) -> None:
    assert cases["verdicts"]["shared on A100"] == []


@pytest.mark.parametrize(
    ("registers", "shared", "tensor_columns", "warps", "capability", "programs"),
    [
        (32, 0, 0, 8, 80, 8),  # 64 warps, all that there are
        (32, 0, 0, 8, 89, 6),  # 48 warps
        (32, 0, 0, 1, 86, 16),  # as many programs as this card holds
        (255, 0, 0, 4, 90, 2),  # 8,192 registers a warp: 2 warps in each of 4 partitions
        (168, 0, 0, 4, 90, 3),  # the classic 3 x 128 threads of 168 registers
        (32, 99 << 10, 0, 4, 89, 1),  # with the reserved KiB, all 100
        (32, 49 << 10, 0, 4, 89, 2),
        (32, 227 << 10, 0, 4, 90, 1),
        (32, 0, 256, 4, 100, 2),  # half of the tensor memory each
        (255, 0, 0, 16, 80, 0),  # more registers than there are
    ],
)
def test_resident_programs(
    registers: int, shared: int, tensor_columns: int, warps: int, capability: int, programs: int
) -> None:
    code = aot.Code(registers, 0, shared, tensor_columns, (), None)
    assert aot.resident_programs(code, warps, capability) == programs


@pytest.mark.parametrize(
    ("line", "instruction"),
    [
        ("        /*1660*/                   HMMA.16816.F32.BF16 R84, R136.reuse, R140, RZ ;", "HMMA"),
        ("        /*1a40*/                   HGMMA.64x128x16.F32.BF16 R24, gdesc[UR12], R24 ;", "HGMMA"),
        ("        /*0ff0*/              @!UP0 UTCHMMA gdesc[UR12], gdesc[UR14], tmem[UR6] ;", "UTCHMMA"),
        ("        /*0370*/                   HFMA2.MMA R11, -RZ, RZ, 0, 0 ;", None),  # clears a register
        ("        /*05c0*/                   FFMA R48, R4, R20, R48 ;", None),
    ],
)
def test_tensor_instructions_are_told_from_others(line: str, instruction: str | None) -> None:
    found = aot.TENSOR_INSTRUCTION.search(line)
    assert (found[1] if found else None) == instruction


def test_interpreted_kernels_are_not_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(RuntimeError, match="unset TRITON_INTERPRET"), record(90):
        pass


def test_a_record_of_other_code_is_noticed() -> None:
    committed = aot.read_record()
    assert aot.out_of_date(committed, committed) == []
    other_compiler = copy.deepcopy(committed)
    other_compiler["triton"] = "0.0"
    for figures in other_compiler["launches"][0]["targets"].values():
        figures["registers"] += 1
    assert aot.out_of_date(committed, other_compiler) == []
    other_code = copy.deepcopy(committed)
    other_code["launches"][0]["options"] = "num_warps=32 num_stages=3"
    other_code["launches"][1]["targets"].pop("90")
    (problem,) = aot.out_of_date(committed, other_code)
    changed = len(committed["launches"][0]["targets"])
    assert f"lacks {changed} launches and has {changed + 1} that are no more; run make aot" in problem


def test_the_record_is_written_as_it_is_read() -> None:
    assert aot.to_text(aot.read_record()) == aot.RECORD.read_text(encoding="utf-8")


def test_the_committed_record_is_of_this_code() -> None:
    result = run("benchmarks/aot.py", "--compare")
    assert result.returncode == 0, result.stderr


def compile_for(*arguments: str) -> list[dict[str, Any]]:
    """The launches that benchmarks/aot.py compiles, none of them with a problem."""
    result = run("benchmarks/aot.py", "--json", *arguments)
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout)
    assert found["triton"] == triton.__version__
    assert found["problems"] == []
    return found["launches"]


@pytest.mark.slow
def test_the_kernels_of_a_shipped_configuration_compile_for_every_card() -> None:
    """The others' launches are in the record, which another test holds against this code."""
    launches = compile_for("configs/pretrain-350m.yaml")
    assert {config for launch in launches for config in launch["configs"]} == {"pretrain-350m"}
    matrix = [launch for launch in launches if launch["kernel"].startswith("attention.")]
    assert len({launch["kernel"] for launch in matrix}) == 3  # forward, and a backward by queries and by keys
    expected = {"80": {"HMMA"}, "86": {"HMMA"}, "89": {"HMMA"}, "90": {"HGMMA"}, "120": {"HMMA"}}
    for target, instructions in expected.items():
        rows = [launch["targets"][target] for launch in matrix if target in launch["targets"]]
        assert {row["tensor_instruction"] for row in rows} == instructions


@pytest.mark.slow
def test_the_other_kernels_compile_for_two_cards() -> None:
    launches = compile_for(*aot.VARIANTS, "--targets", "89,90")
    assert {"rmsnorm.rmsnorm_recompute_kernel", "rmsnorm.rmsnorm_backward_wide_kernel"} <= {
        launch["kernel"] for launch in launches
    }
