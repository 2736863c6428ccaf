"""The benchmark's measuring: the floor, the calibration, how steps are timed and profiled."""

from __future__ import annotations

import io
import json
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from bench_cases import hurry, steps_of, tiny
from torch.nn.attention import SDPBackend, _cur_sdpa_kernel_backends

from albor.bench import calibrate as calibration_module
from albor.bench import profile as profiling
from albor.bench import recorder as recording
from albor.bench.calibrate import calibrate, operations
from albor.bench.cases import STANDARD, case_of, find_case
from albor.bench.command import find_card, model_cases
from albor.bench.protocol import CALIBRATE_AGAIN
from albor.bench.recorder import Recorder
from albor.bench.report import case_floor
from albor.bench.run import sdpa_choice
from albor.bench.sdpa import SDPA, preferring
from albor.floor import (
    CARDS,
    Attention,
    Calibration,
    Gemm,
    NotCalibrated,
    Traffic,
    floor,
    step_work,
)

STEPS = 11


# The floor


def test_the_gemms_of_the_floor_are_the_flops_of_the_model():
    for name in STANDARD:
        case = find_case(name, 30)
        train = case.config.train
        work = step_work(case.architecture, 1024, train.micro_batch_size, train.gradient_accumulation_steps)
        gemms = sum(w.count * w.operation.flops for w in work if isinstance(w.operation, Gemm))
        attention = {
            w.operation.direction: w.count * w.operation.flops
            for w in work
            if isinstance(w.operation, Attention)
        }
        # The convention counts attention's backward as twice its forward; its five GEMMs are 2.5 times.
        counted = gemms + 3 * attention["forward"]
        assert attention["backward"] == 2.5 * attention["forward"]
        assert counted == pytest.approx(case.architecture.flops_per_token(1024) * 131_072, rel=1e-9)


def test_a_modelled_gemm_obeys_the_card():
    card = find_card("h100")
    large = Gemm(8192, 8192, 8192, "nt")
    assert 770e12 < large.flops / card.seconds(large) < 810e12  # the reading that the model rests on
    one_tile, one_round = Gemm(128, 256, 4096, "nt"), Gemm(128 * 132, 256, 4096, "nt")
    assert card.seconds(one_tile) < card.seconds(one_round) < 2 * card.seconds(one_tile) * 16
    beyond = Gemm(128 * 133, 256, 4096, "nt")
    assert card.seconds(beyond) > 1.3 * card.seconds(one_round), "one tile more takes another round"
    moving = Gemm(65536, 65536, 16, "nt")
    assert card.seconds(moving) > moving.traffic / card.bandwidth


@pytest.mark.parametrize("card", CARDS, ids=lambda card: card.name)
def test_modelled_floors_are_below_the_peak(card):
    for row in model_cases([find_case(name, 30) for name in STANDARD], card)["cases"].values():
        assert 0.3 < row["mfu"] < 0.9
        assert row["floor"]["basis"] == "modelled"


def test_floor_items_add_up():
    case = find_case("350m", 30)
    least = floor(step_work(case.architecture, 1024, 16, 8), CARDS[0])
    values = least.as_json()
    assert values["seconds_per_step"] == pytest.approx(sum(item["seconds"] for item in values["items"]))
    assert {item["name"] for item in values["items"] if item["tflops"] is None} >= {
        "rotary",
        "SwiGLU forward",
    }


def test_a_calibration_returns_what_was_measured(tmp_path: Path):
    gemm, shape = Gemm(4, 8, 16, "tn", accumulate=True), Attention(1, 8, 2, 1, 4, "forward")
    times: dict[str, float | str] = {"flash": 3e-3, "cudnn": 2e-3, "mem_efficient": "cannot"}
    c = Calibration(
        "card", "bfloat16", {"a": 1}, {gemm: 1e-3}, {shape: times}, {100: 1e-4, 200: 3e-4}, {"x": 5.0}
    )
    c.save(tmp_path / "c.json")
    loaded = Calibration.load(tmp_path / "c.json")
    assert loaded == c
    assert loaded.seconds(gemm) == 1e-3
    assert loaded.seconds(shape) == 2e-3
    assert loaded.best_backend(shape) == "cudnn"
    assert loaded.best_backend(shape, ("mem_efficient",)) is None
    assert [loaded.seconds(Traffic(size)) for size in (1, 100, 150, 200, 400)] == pytest.approx(
        [1e-4, 1e-4, 2e-4, 3e-4, 6e-4]
    )
    for other in (replace(gemm, accumulate=False), replace(shape, batch=2)):
        with pytest.raises(NotCalibrated):
            loaded.seconds(other)
    with pytest.raises(NotCalibrated):
        Calibration("card", "bfloat16").seconds(Traffic(1))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_calibration_measures_all_that_the_floor_needs(dtype: str, monkeypatch: pytest.MonkeyPatch):
    hurry(monkeypatch)
    case, calibration, lines = case_of(tiny(), STEPS), Calibration("cpu", dtype), []
    assert not calibrate(calibration, [case], "cpu", lines.append, in_time=lambda: len(lines) < 5)
    assert len(lines) == 5
    assert calibrate(calibration, [case], "cpu", lines.append)
    assert set(calibration.gemms) | set(calibration.attention) == set(operations([case], "cpu"))
    for times in calibration.attention.values():
        assert isinstance(times["albor"], float), times
        assert isinstance(times["flash"], float), times
        assert isinstance(times["cudnn"], str), "there is no cuDNN on a CPU, and it does not say so"
    least = case_floor(case, calibration, "cpu")
    assert least is not None
    assert case_floor(find_case("50m", 30), calibration, "cpu") is None
    assert least.basis == "measured"
    assert 0 < least.seconds == pytest.approx(sum(item.seconds for item in least.items))
    done = len(lines)
    assert calibrate(calibration, [case], "cpu", lines.append)
    assert len(lines) == done, "something was measured twice"
    assert sdpa_choice(case, calibration) == "flash"


def test_a_gemm_is_timed_with_operands_that_lie_as_in_training(monkeypatch: pytest.MonkeyPatch):
    seen = []

    def look(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        seen.append((a.is_contiguous(), b.is_contiguous(), tuple(out.shape), out.dtype))
        return out

    monkeypatch.setattr(
        calibration_module, "seconds_per_call", lambda call, device, **keys: float(call() is not None)
    )
    monkeypatch.setattr(torch, "mm", look)
    for layout in ("nt", "nn", "tn"):
        calibration_module.time_gemm(Gemm(4, 6, 8, layout), torch.float32, "cpu")
    assert [(a, b) for a, b, _, _ in seen] == [(True, False), (True, True), (False, True)]
    assert {shape for *_, shape, _ in seen} == {(4, 6)}


@pytest.mark.parametrize("name", SDPA)
def test_a_backend_of_attention_is_preferred_and_the_others_stay_on(name: str):
    before = _cur_sdpa_kernel_backends(with_priority=True)
    with preferring(name):
        during = _cur_sdpa_kernel_backends(with_priority=True)
    assert during[0] == SDPA[name]
    assert during[-1] == SDPBackend.MATH, "the slowest comes last"
    assert {*SDPA.values(), SDPBackend.MATH} <= set(during)
    assert _cur_sdpa_kernel_backends(with_priority=True) == before
    with preferring(None):
        assert _cur_sdpa_kernel_backends(with_priority=True) == before


def test_an_error_after_which_nothing_works_is_kept_and_gone_on_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    hurry(monkeypatch)
    case, path = case_of(tiny(), STEPS), tmp_path / "c.json"

    def crash(shape: Attention, dtype: torch.dtype, device: str) -> float:
        raise RuntimeError("CUDA error: an illegal memory access\nand more")

    monkeypatch.setattr(calibration_module, "_time_own_attention", crash)
    job = tmp_path / "job.json"
    job.write_text(json.dumps({
        "cases": {case.name: case.config.model_dump(mode="json")}, "device": "cpu", "dtype": "float32",
        "card": "cpu", "facts": {}, "out": str(path), "until": 1e12,
    }))  # fmt: skip
    monkeypatch.setattr(sys, "argv", ["calibrate", str(job)])
    # Each direction of attention ends one process.
    assert [calibration_module.main() for _ in range(3)] == [CALIBRATE_AGAIN, CALIBRATE_AGAIN, 0]
    times = Calibration.load(path).attention
    assert {of["albor"] for of in times.values()} == {"CUDA error: an illegal memory access"}
    assert len(times) == 2

    def bug(*_: Any) -> float:
        raise TypeError("ours")

    path.unlink()
    monkeypatch.setattr(calibration_module, "time_gemm", bug)
    assert calibration_module.main() == 1, "what is no fault of the card would go on for ever"


# A GPU that is none: what is said to it, and what is made of its answers


class FakeCuda:
    """A device on which a call lasts 2 ms: at once, or when a graph that captured it is replayed."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.clock, self.capturing, self.waits = 0.0, 0, 0
        device = self

        class Event:
            def __init__(self, enable_timing: bool = False):
                assert enable_timing

            def record(self) -> None:
                self.at = device.clock

            def elapsed_time(self, end: Any) -> float:
                return end.at - self.at

        class Graph:
            calls = 0

            def replay(self) -> None:
                device.clock += 2.0 * self.calls

        class Capture:
            def __init__(self, graph: Graph):
                self.graph = graph

            def __enter__(self) -> None:
                device.capturing = 1

            def __exit__(self, *_: Any) -> None:
                self.graph.calls, device.capturing = device.capturing - 1, 0

        for name, value in {
            "Event": Event, "CUDAGraph": Graph, "graph": Capture, "synchronize": self.synchronize,
            "max_memory_allocated": lambda: 11, "max_memory_reserved": lambda: 22,
        }.items():  # fmt: skip
            monkeypatch.setattr(torch.cuda, name, value)

    def synchronize(self) -> None:
        self.waits += 1

    def call(self) -> None:
        if self.capturing:
            self.capturing += 1
        else:
            self.clock += 2.0


@pytest.mark.parametrize("graphed", [True, False])
def test_calls_on_a_gpu_are_timed_by_events(graphed: bool, monkeypatch: pytest.MonkeyPatch):
    gpu = FakeCuda(monkeypatch)
    assert calibration_module.seconds_per_call(gpu.call, "cuda", graphed=graphed) == pytest.approx(2e-3)
    # 3 to warm up and 3 to guess; 30 ms are 15 calls: five times, and once more to load the graph
    assert gpu.clock == 2.0 * (3 + 3 + 15 * (6 if graphed else 5))


def test_steps_on_a_gpu_are_timed_by_events_and_looked_at_every_tenth(monkeypatch: pytest.MonkeyPatch):
    gpu, out = FakeCuda(monkeypatch), io.StringIO()
    recorder = Recorder("cuda", out)
    gpu.clock = 100.0
    recorder.begin()
    for step in range(12):
        gpu.clock += 500.0 + step
        recorder.add_loss(torch.tensor(1.5))
        recorder.add_loss(1.0)
        recorder.end_step(torch.tensor(0.25))
    recorder.finish()
    events = [json.loads(line) for line in out.getvalue().splitlines()]
    assert steps_of(events, "seconds") == pytest.approx([0.5 + step / 1e3 for step in range(12)])
    assert set(steps_of(events, "loss")) == {2.5}
    assert set(steps_of(events, "norm")) == {0.25}
    assert [event["event"] for event in events[:2]] == ["step", "first_step"]
    assert gpu.waits == 3, "after the first, the tenth and the last"
    assert {"max_allocated": 11, "max_reserved": 22}.items() <= events[-1]["memory"].items()


def test_the_last_step_is_profiled(monkeypatch: pytest.MonkeyPatch):
    calls: list[str] = []
    fake = SimpleNamespace(start=lambda: calls.append("start"), stop=lambda: calls.append("stop") or {"a": 1})
    monkeypatch.setattr(recording, "StepProfile", lambda device: fake)
    out = io.StringIO()
    recorder = Recorder("cpu", out, profiled_step=3)
    recorder.begin()
    for step in range(3):
        calls.append(f"step {step + 1}")
        recorder.end_step()
    recorder.finish()
    assert calls == ["step 1", "step 2", "start", "step 3", "stop"]
    assert {"event": "profile", "found": {"a": 1}} in [
        json.loads(line) for line in out.getvalue().splitlines()
    ]


def kernel(name: str, start: float, end: float, **keys: Any) -> SimpleNamespace:
    times = torch.autograd.profiler_util.Interval(start, end)
    usual = {"device_type": profiling.DeviceType.CUDA, "is_user_annotation": False}
    return SimpleNamespace(name=name, time_range=times, **usual | keys)


def test_kernels_of_a_gpu_are_summed_by_name_and_kind(monkeypatch: pytest.MonkeyPatch):
    FakeCuda(monkeypatch)
    events = [
        kernel("nvjet_tst_128x256", 0.0, 40.0), kernel("nvjet_tst_128x256", 50.0, 80.0),
        kernel("Memcpy DtoH (Device -> Pinned)", 60.0, 90.0), kernel("swiglu_forward_kernel", 90.0, 100.0),
        kernel("cudaLaunchKernel", 0.0, 999.0, device_type=profiling.DeviceType.CPU),
        kernel("a step", 0.0, 999.0, is_user_annotation=True),
    ]  # fmt: skip
    fake = SimpleNamespace(start=lambda: None, stop=lambda: None, events=lambda: events)
    monkeypatch.setattr(profiling, "profile", lambda activities: fake)
    found = profiling.StepProfile("cuda").stop()
    assert found["busy_seconds"] == pytest.approx(90e-6), "what runs at the same time counts once"
    assert [(row["name"][:6], row["calls"]) for row in found["kernels"]] == [
        ("nvjet_", 2), ("Memcpy", 1), ("swiglu", 1),
    ]  # fmt: skip
    assert list(found["kinds"].values()) == pytest.approx([70e-6, 0.0, 10e-6, 30e-6])
    events.clear()
    with pytest.raises(RuntimeError, match="saw no kernel"):
        profiling.StepProfile("cuda").stop()


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64", "GEMM"),
        ("void cutlass::device_kernel<cutlass::gemm::kernel::GemmUniversal<...>", "GEMM"),
        ("triton_tem_fused_mm_3", "GEMM"),
        ("triton_poi_fused__scaled_dot_product_flash_attention_mm_2", "memory and arithmetic"),
        ("void pytorch_flash::flash_bwd_dq_dk_dv_loop_seqk_parallel_kernel<cutlass::...", "attention"),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_7", "attention"),
        ("fmha_cutlassF_bf16_aligned_64x64_rf_sm80", "attention"),
        ("attention_backward_kv", "attention"),
        ("rmsnorm_forward_kernel", "memory and arithmetic"),
        ("Memset (Device)", "copies"),
    ],
)
def test_kernels_are_sorted_by_their_names(name: str, kind: str):
    assert profiling.kind_of(name) == kind
