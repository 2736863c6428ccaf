"""The benchmark on a CPU with tiny shapes: systems do the same work, records are kept, claims are earned."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import make_config
from typer.testing import CliRunner

from albor.architecture import Architecture
from albor.bench import calibrate as calibration_module
from albor.bench import report as reporting
from albor.bench import run as running
from albor.bench.calibrate import calibrate, operations
from albor.bench.cases import STANDARD, Case, case_of, find_case
from albor.bench.command import find_card, find_cases, find_peers, model_cases
from albor.bench.floor import (
    CARDS,
    Attention,
    Calibration,
    Gemm,
    NotCalibrated,
    Traffic,
    floor,
    step_work,
)
from albor.bench.machine import Watch, code_digest
from albor.bench.peers import DEFAULT, PEERS, TITLES
from albor.bench.peers.plain import ChunkedLoss
from albor.bench.protocol import Options, Run, order
from albor.bench.report import GOALS, Goal, build_report, case_floor, render_markdown
from albor.bench.run import run_benchmark, sdpa_choice
from albor.bench.workload import Spec, Tokens, parts, read_weights, write_tokens, write_weights
from albor.cli import app
from albor.config import RunConfig
from albor.errors import ConfigError

ROOT = Path(__file__).parents[1]
STEPS = 11  # one more than what lies between two looks at the loss
NEEDS = {
    "hf-compile": ("transformers", "accelerate"),
    "litgpt": ("litgpt", "lightning"),
}


def tiny(**keys: Any) -> RunConfig:
    return make_config(
        gradient_accumulation_steps=2, lr=3e-3, precision="fp32", max_position_embeddings=16, **keys
    )


@pytest.fixture(scope="module")
def spec(tmp_path_factory: pytest.TempPathFactory) -> Spec:
    """A tiny workload in fp32, in which rounding cannot hide a difference."""
    folder = tmp_path_factory.mktemp("workload")
    case = case_of(tiny(micro_batch_size=6), STEPS)  # the reference takes it in parts of 4 and 2
    weights, tokens = folder / "weights.safetensors", folder / "tokens.npy"
    write_weights(weights, case.config)
    write_tokens(tokens, STEPS * case.config.tokens_per_step + 1, case.config.model.vocab_size)
    # "eager" traces the model as every backend does, and generates no code, which would take half a minute.
    return Spec(case.config, "cpu", "float32", str(weights), str(tokens), STEPS, compile_backend="eager")


def run_peer(name: str, spec: Spec, folder: Path) -> tuple[int, list[dict[str, Any]], str]:
    """(exit code, what it said, standard error) of a peer in its own process."""
    path = folder / f"{name}.json"
    path.write_text(json.dumps(spec.as_json()))
    done = subprocess.run(
        [sys.executable, "-m", "albor.bench.peer", name, str(path)],
        env=running._environment(), cwd=folder, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    return done.returncode, [json.loads(line) for line in done.stdout.splitlines()], done.stderr


def losses_of(events: list[dict[str, Any]]) -> list[float]:
    return [event["loss"] for event in events if event["event"] == "step"]


@pytest.fixture(scope="module")
def reference_losses(spec: Spec, tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    code, events, errors = run_peer("reference", spec, tmp_path_factory.mktemp("reference"))
    assert code == 0, errors
    return losses_of(events)


# The systems


# The others are these with fewer options; torch-compile itself runs in the whole protocol below.
@pytest.mark.parametrize("name", ["albor", "torch-chunked", "hf-compile", "litgpt"])
def test_every_system_does_the_same_work(
    name: str, spec: Spec, reference_losses: list[float], tmp_path: Path
):
    """Same weights, tokens, optimizer, clipping and schedule: in fp32 the losses are equal, step by step."""
    for library in NEEDS.get(name, ()):
        if find_spec(library) is None:
            pytest.skip(f"{library} is not installed: {name} is not tested")
    began = time.time()
    code, events, errors = run_peer(name, spec, tmp_path)
    assert code == 0, errors
    losses = losses_of(events)
    assert len(losses) == STEPS
    assert losses == pytest.approx(reference_losses, abs=2e-5)
    assert losses[-1] < losses[0] - 0.1, "it learns, or equal losses would say little"
    steps = [event for event in events if event["event"] == "step"]
    assert all(0 < event["seconds"] < time.time() - began for event in steps)
    first = next(event for event in events if event["event"] == "first_step")
    assert began < first["at"] < time.time()
    assert events[-1]["event"] == "done"
    assert 50e6 < events[-1]["memory"]["max_rss"] < 50e9


def test_a_system_that_fails_says_why(spec: Spec, tmp_path: Path):
    code, events, errors = run_peer("torch-compile", replace(spec, weights="/absent"), tmp_path)
    assert code == 1
    assert [event["event"] for event in events] == ["failed"]
    assert "/absent" in events[0]["error"]
    assert "Traceback" in errors


def test_a_library_that_is_not_there_is_named(spec: Spec, tmp_path: Path):
    (tmp_path / "litgpt.py").write_text("raise ModuleNotFoundError('no', name='litgpt')")
    path = tmp_path / "spec.json"
    path.write_text(json.dumps(spec.as_json()))
    environment = running._environment()
    environment["PYTHONPATH"] = f"{tmp_path}{os.pathsep}{environment['PYTHONPATH']}"
    done = subprocess.run(
        [sys.executable, "-m", "albor.bench.peer", "litgpt", str(path)],
        env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert json.loads(done.stdout)["error"].startswith("litgpt is not installed; ")


def test_bf16_weights_have_fp32_masters(spec: Spec, reference_losses: list[float], tmp_path: Path):
    code, events, errors = run_peer("torch-compile", replace(spec, dtype="bfloat16"), tmp_path)
    assert code == 0, errors
    losses = losses_of(events)
    assert losses == pytest.approx(reference_losses, abs=0.03)
    assert losses != pytest.approx(reference_losses, abs=1e-5), "nothing was computed in bf16"


def test_the_chunked_loss_is_the_loss():
    generator = torch.Generator().manual_seed(0)
    x, weight = (
        torch.randn(rows, 6, generator=generator, dtype=torch.float32, requires_grad=True) for rows in (10, 9)
    )
    targets = torch.arange(10) % 9
    plain = torch.nn.functional.cross_entropy(x @ weight.t(), targets)
    expected = torch.autograd.grad(3 * plain, (x, weight))
    chunked = ChunkedLoss.apply(x, weight, targets, 4)
    assert chunked.item() == pytest.approx(plain.item(), abs=1e-6)
    for ours, theirs in zip(torch.autograd.grad(3 * chunked, (x, weight)), expected, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_every_system_has_a_title():
    assert PEERS.keys() == TITLES.keys() >= set(DEFAULT)


# What they read


@pytest.mark.parametrize("tied", [True, False])
def test_the_weights_are_those_of_albor_under_other_names(tied: bool, tmp_path: Path):
    config = tiny(tie_word_embeddings=tied)
    model, path = Architecture.from_config(config.model), tmp_path / "w.safetensors"
    write_weights(path, config)
    tensors = read_weights(str(path))
    named = [name for parameter in model.parameters for name in parts(model, parameter)]
    assert sorted(named) == sorted(tensors)
    assert sum(t.numel() for t in tensors.values()) == model.parameter_count
    assert tensors["model.layers.1.self_attn.k_proj.weight"].shape == (12, 24)
    assert ("lm_head.weight" in tensors) is not tied


def test_tokens_are_windows_of_the_file_in_order(spec: Spec):
    tokens = Tokens(spec)
    ids = np.load(spec.tokens)
    assert ids.dtype == np.uint16
    assert ids.size == STEPS * 2 * 6 * 16 + 1
    whole = [tokens.batch(step, micro) for step in range(STEPS) for micro in range(2)]
    assert np.array_equal(np.concatenate([batch.ravel() for batch, _ in whole]), ids[:-1])
    assert np.array_equal(np.concatenate([targets.ravel() for _, targets in whole]), ids[1:])
    assert whole[0][0].shape == (6, 16)


def test_a_vocabulary_of_more_than_16_bits(tmp_path: Path):
    write_tokens(tmp_path / "t.npy", 1000, 70_000)
    ids = np.load(tmp_path / "t.npy")
    assert ids.dtype == np.uint32
    assert ids.max() < 70_000


# Cases


def test_the_standard_shapes_are_those_of_the_configurations():
    for name in ("50m", "125m", "350m"):
        shipped = find_cases(ROOT / f"configs/pretrain-{name}.yaml", [], None, 30)[0]
        case = find_case(name, 30)
        same = {"max_position_embeddings": 2048}
        assert case.config.model.model_dump() | same == shipped.config.model.model_dump() | same
    assert 1.2e9 < find_case("1.3b", 30).architecture.parameter_count < 1.3e9


def test_a_standard_step_is_131072_tokens_at_any_micro_batch():
    for name in (*STANDARD, "350m-mb8", "1.3b-mb1"):
        assert find_case(name, 30).config.tokens_per_step == 131_072
    assert find_case("350m-mb4", 30).config.train.micro_batch_size == 4
    assert find_case("350m", 30).config.train.micro_batch_size == 16


@pytest.mark.parametrize("name", ["70b", "350m-mb", "350m-mb0", "350m-mb3", ""])
def test_no_other_case_exists(name: str):
    with pytest.raises(ConfigError, match="--models"):
        find_case(name, 30)


def test_a_case_of_a_configuration_has_a_constant_rate():
    config = tiny(warmup_steps=10, max_steps=None, max_tokens=9_999)
    changed = case_of(config, 30).config
    assert (changed.schedule.kind, changed.schedule.warmup_steps, changed.steps) == ("constant", 0, 30)
    assert changed.model == config.model
    with pytest.raises(ConfigError, match="fp16"):
        case_of(make_config(precision="fp16"), 30)


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


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibration_module, "_SECONDS", {"cpu": 1e-4})
    monkeypatch.setattr(calibration_module, "_REPEATS", 2)
    monkeypatch.setattr(calibration_module, "_TRAFFIC", {"cpu": [2**12, 2**16]})
    monkeypatch.setattr(calibration_module, "_LINK_BYTES", {"cpu": 2**14})


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_calibration_measures_all_that_the_floor_needs(quick: None, dtype: str):
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
        calibration_module, "seconds_per_call", lambda call, device: float(call() is not None)
    )
    monkeypatch.setattr(torch, "mm", look)
    for layout in ("nt", "nn", "tn"):
        calibration_module.time_gemm(Gemm(4, 6, 8, layout), torch.float32, "cpu")
    assert [(a, b) for a, b, _, _ in seen] == [(True, False), (True, True), (False, True)]
    assert {shape for *_, shape, _ in seen} == {(4, 6)}


# The order of things


def test_each_system_stands_beside_a_run_of_albor():
    turns = order(DEFAULT, 2)
    assert turns[-1] == "reference"
    assert turns.count("hf") == 2
    for index, peer in enumerate(turns[:-1]):
        if peer != "albor":
            assert "albor" in (turns[index - 1], turns[index + 1])
    assert order(("hf", "litgpt"), 1) == ["hf", "litgpt"]
    assert order(("albor",), 3) == ["albor"] * 3


def a_run(peer: str, seconds: list[float], *, number: int = 1, losses: list[float] | None = None) -> Run:
    return Run(
        "tiny", peer, number, "f", "ok", None, number == 1, 2.5, 9.0, losses or [2.0] * len(seconds), seconds,
        {"max_allocated": 10, "max_reserved": 20, "device_peak": 30, "max_rss": 40}, {}, {},
    )  # fmt: skip


def options_for(case: Case, out: Path, **keys: Any) -> Options:
    values = {
        "cases": (case,), "peers": ("albor", "torch-compile", "reference"), "out": out, "device": "cpu",
        "dtype": "float32", "warmup": 2, "steps": 4,
    }  # fmt: skip
    return Options(**values | keys)


HERE = {
    "date": "d", "commit": "c", "code": "x", "device": "NVIDIA H100 80GB HBM3", "is_gpu": True, "driver": "1",
    "power_limit_watts": 700.0, "clock_max_mhz": 1980, "processor": "p", "cores": 2, "platform": "l",
    "python": "3", "versions": {"torch": "2", "litgpt": None},
}  # fmt: skip


def report_of(runs: list[Run], **keys: Any) -> dict[str, Any]:
    case = replace(case_of(tiny(), 6), name="tiny")
    options = options_for(case, Path("/nowhere"), **keys)
    return build_report(options, HERE, None, runs, complete=True)


def test_a_ratio_within_the_spread_is_not_claimed():
    slow, fast = [9.0, 9.0, 1.1, 1.1, 1.1, 1.1], [9.0, 9.0, 1.0, 1.0, 1.0, 1.0]
    clear = report_of([a_run("albor", fast), a_run("torch-compile", slow)])["cases"]["tiny"]["systems"]
    row = clear["torch-compile"]
    assert row["claim"] == "faster"
    assert row["albor_is_faster_by"] == pytest.approx(1.1)
    assert clear["albor"]["tokens_per_second"] == 64  # 64 tokens in one second, warm-up not counted
    wide = [9.0, 9.0, 1.0, 1.0, 1.2, 1.2]  # albor's second half is slower than the peer
    row = report_of([a_run("albor", wide), a_run("torch-compile", slow)])["cases"]["tiny"]["systems"]
    assert row["torch-compile"]["claim"] == "not apart"
    wide = [9.0, 9.0, 1.3, 1.3, 0.9, 0.9]  # the peer's second half is faster than albor
    row = report_of([a_run("albor", fast), a_run("torch-compile", wide)])["cases"]["tiny"]["systems"]
    assert row["torch-compile"]["claim"] == "not apart"
    row = report_of([a_run("albor", slow), a_run("torch-compile", fast)])["cases"]["tiny"]["systems"]
    assert row["torch-compile"]["claim"] == "slower"


def test_mfu_is_by_the_named_formula():
    report = report_of([a_run("albor", [1.0] * 6)])
    case = report["cases"]["tiny"]
    assert case["flops_per_token"] == Architecture.from_config(tiny().model).flops_per_token(16)
    assert case["systems"]["albor"]["mfu"] == pytest.approx(64 * case["flops_per_token"] / 989.4e12)
    assert report["mfu_formula"].startswith("causal")


def test_the_loss_gap_is_the_largest_of_any_step():
    runs = [
        a_run("albor", [1.0] * 6, losses=[3.0, 2.5, 2.0, 9.0, 9.0, 9.0]),
        a_run("reference", [1.0] * 3, losses=[3.0, 2.46, 2.01]),
    ]
    systems = report_of(runs)["cases"]["tiny"]["systems"]
    assert systems["albor"]["largest_loss_gap"] == pytest.approx(0.04)
    assert systems["reference"]["largest_loss_gap"] is None
    assert "tokens_per_second" not in systems["reference"], "the reference is not timed"


@pytest.mark.parametrize(
    ("goal", "verdict"),
    [
        (Goal(None, "ratio", 1.05, "torch-compile"), "reached"),
        (Goal(None, "ratio", 1.1, "torch-compile"), "undecided"),
        (Goal(None, "ratio", 1.3, "torch-compile"), "missed"),
        (Goal(None, "ratio", 1.05, "best"), "reached"),
        (Goal(None, "ratio", 1.05, "hf"), "not measured"),
        (Goal(None, "memory_ratio", 0.5, "torch-compile"), "missed"),
        (Goal(None, "memory_ratio", 1.0, "torch-compile"), "reached"),
        (Goal(None, "bytes", 29), "missed"),
        (Goal(None, "first_step", 15.0), "reached"),
        (Goal(None, "first_step", 5.0), "not measured"),
        (Goal(None, "loss", 0.005), "not measured"),
        (Goal(None, "share_of_floor", 0.95), "not measured"),
        (Goal(None, "mfu", 1e-9, card="H100"), "reached"),
        (Goal(None, "mfu", 0.5, card="H100"), "missed"),
    ],
)
def test_goals_are_judged_by_their_range(goal: Goal, verdict: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(reporting, "GOALS", (goal,))
    runs = [
        a_run("albor", [1.0] * 6),
        a_run("torch-compile", [1.0, 1.0, 1.08, 1.08, 1.2, 1.2]),
    ]
    judged = report_of(runs)["cases"]["tiny"]["goals"]
    assert [one["verdict"] for one in judged] == [verdict]


def test_a_goal_for_one_card_is_not_judged_on_another():
    goal = Goal("350m", "mfu", 0.48, card="H100")
    assert goal.applies("350m", HERE)
    assert not goal.applies("350m", HERE | {"device": "NVIDIA H200"})
    assert not goal.applies("125m", HERE)
    assert not any(goal.applies("350m", HERE | {"is_gpu": False}) for goal in GOALS)


def test_what_failed_stays_in_the_report():
    failed = replace(a_run("torch-compile", []), status="failed", error="no room", memory={}, losses=[])
    page = render_markdown(report_of([a_run("albor", [1.0] * 6), failed]))
    assert "plain torch loop, torch.compile: failed: no room" in page
    assert "| albor | 64 |" in page


# The whole


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> tuple[Options, dict[str, Any], list[str]]:
    """A complete run of the protocol over a tiny case, calibration excepted."""
    out, lines = tmp_path_factory.mktemp("bench"), []
    options = options_for(case_of(tiny(), 6), out, calibrate=False, compile_backend="eager")
    return options, run_benchmark(options, lines.append), lines


def test_the_protocol_runs_and_can_be_gone_on_with(measured):
    options, report, _ = measured
    assert report["complete"]
    systems = report["cases"]["test"]["systems"]
    assert [row["status"] for row in systems.values()] == ["ok"] * 3, systems
    assert systems["albor"]["runs"] == 2, "one before its peer, one after it"
    assert systems["albor"]["first_step_seconds_cold"] > 0 < systems["albor"]["first_step_seconds_warm"]
    assert systems["torch-compile"]["first_step_seconds_warm"] is None
    assert max(row["largest_loss_gap"] for name, row in systems.items() if name != "reference") < 2e-5
    assert len(systems["albor"]["losses"]) == 6
    assert len(systems["reference"]["losses"]) == 4
    page = (options.out / "report.md").read_text()
    assert "This is a CPU. Nothing on this page says anything about a GPU." in page
    assert json.loads((options.out / "report.json").read_text()) == report

    (options.out / "runs/test/albor-2.json").unlink()
    again: list[str] = []
    assert run_benchmark(options, again.append)["complete"]
    assert [line for line in again if ": albor" in line or "torch" in line] == ["test: albor, run 2"]


def test_nothing_is_started_when_time_is_up(measured, tmp_path: Path):
    options = replace(measured[0], out=tmp_path, time_limit=0.0, calibrate=True)
    report = run_benchmark(options, lambda line: None)
    assert not report["complete"]
    assert report["cases"]["test"]["systems"] == {}
    assert "goes on with what is left" in (tmp_path / "report.md").read_text()


def test_results_of_other_code_are_not_gone_on_with(measured):
    options, _, _ = measured
    path = options.out / "runs/test/torch-compile-1.json"
    run = json.loads(path.read_text())
    assert running._load(path, run["fingerprint"]) is not None
    assert running._load(path, "another") is None
    assert len(code_digest()) == 16


def test_a_run_that_takes_too_long_is_ended_and_reported(measured, tmp_path: Path):
    options = replace(measured[0], out=tmp_path, peers=("torch-compile",), run_timeout=0.3)
    report = run_benchmark(options, lambda line: None)
    row = report["cases"]["test"]["systems"]["torch-compile"]
    assert (row["status"], row["error"]) == ("timed out", "did not end within 0.3 seconds")


def test_a_calibration_that_fails_leaves_the_systems(
    measured, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    options = replace(measured[0], out=tmp_path, calibrate=True, systems=False)
    monkeypatch.setattr(running, "_environment", lambda: {"PATH": "/nowhere", "PYTHONHOME": "/nowhere"})
    report = run_benchmark(options, lambda line: None)
    assert "exit code" in report["calibration_error"]
    assert report["calibration_error"] in (tmp_path / "report.md").read_text()


def test_without_a_card_there_is_nothing_to_watch():
    with Watch("cpu") as watch:
        pass
    assert watch.summary() == {}


# The command


def test_the_command_prints_one_object(quick: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    model = dict.fromkeys(("hidden_size", "intermediate_size", "vocab_size"), 8)
    model |= {"num_hidden_layers": 1, "num_attention_heads": 2}
    text = {"name": "tiny", "device": "cpu", "model": model, "data": {"sequence_length": 8},
            "schedule": {"warmup_steps": 0}, "train": {"max_steps": 9, "precision": "fp32"}}  # fmt: skip
    Path("tiny.yaml").write_text(json.dumps(text))
    words = ["bench", "tiny.yaml", "--peers", "albor", "--steps", "2", "--time-limit", "0", "--json"]
    result = CliRunner().invoke(app, words)
    report = json.loads(result.stdout)
    assert not report["complete"]
    assert not report["machine"]["is_gpu"]
    assert "(a CPU; no GPU is measured)" in result.stderr


def test_a_modelled_floor_says_so():
    result = CliRunner().invoke(app, ["bench", "--models", "350m", "--modelled", "RTX 4090"])
    assert result.stdout.startswith("| modelled floor, RTX 4090 | tokens/s | MFU |")
    values = json.loads(CliRunner().invoke(app, ["bench", "--modelled", "H200", "--json"]).stdout)
    assert values["basis"] == "modelled"
    assert list(values["cases"]) == list(STANDARD)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--models", "70b"], "'70b' is not a model of the benchmark"),
        (["--peers", "albor,keras"], "'keras' is not a system of the benchmark"),
        (["configs/quickstart.yaml", "--models", "350m"], "give one of them"),
        (["--modelled", "TPU"], "'TPU' is not modelled"),
    ],
)
def test_wrong_usage_is_refused(words: list[str], message: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(ROOT)
    result = CliRunner().invoke(app, ["bench", *words])
    assert isinstance(result.exception, ConfigError)
    assert message in str(result.exception)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_the_standard_shapes_are_refused_on_a_cpu():
    result = CliRunner().invoke(app, ["bench", "--models", "350m"])
    assert isinstance(result.exception, ConfigError)
    assert "there is no GPU here" in str(result.exception)


def test_peers_are_those_asked_for_once():
    assert find_peers("albor,hf,albor") == ("albor", "hf")
    assert find_peers(None) == DEFAULT


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_protocol_on_a_gpu(tmp_path: Path):
    """Everything, the calibration included, with a small model: bf16, streams, events and NVML."""
    config = make_config(
        hidden_size=256, intermediate_size=512, num_attention_heads=4, num_key_value_heads=2, vocab_size=2048,
        sequence_length=128, max_position_embeddings=128, micro_batch_size=4, gradient_accumulation_steps=2,
        initializer_range=0.02, accumulator="gpu",
    )  # fmt: skip
    options = options_for(
        case_of(config, 6), tmp_path, device="cuda", dtype="bfloat16",
        peers=("albor", "albor-host", "torch-compile", "reference"),
    )  # fmt: skip
    report = run_benchmark(options, print)
    systems = report["cases"]["test"]["systems"]
    assert {name: row["error"] for name, row in systems.items()} == dict.fromkeys(options.peers)
    assert max(row["largest_loss_gap"] for name, row in systems.items() if name != "reference") < 0.02
    assert all(row["memory"]["device_peak"] for row in systems.values())
    assert systems["albor"]["share_of_floor"] < 1.1


def test_floor_items_add_up():
    case = find_case("350m", 30)
    least = floor(step_work(case.architecture, 1024, 16, 8), CARDS[0])
    values = least.as_json()
    assert values["seconds_per_step"] == pytest.approx(sum(item["seconds"] for item in values["items"]))
    assert {item["name"] for item in values["items"] if item["tflops"] is None} >= {
        "rotary",
        "SwiGLU forward",
    }


# What docs/performance.md shows


def quoted(name: str) -> list[str]:
    page = (ROOT / "docs/performance.md").read_text(encoding="utf-8")
    return page.split(f"<!-- {name} -->\n")[1].split("<!-- /")[0].splitlines()


@pytest.mark.parametrize("card", ["H100", "RTX 4090"])
def test_the_modelled_floors_of_the_page_are_those_of_the_code(card: str):
    shown = CliRunner().invoke(app, ["bench", "--modelled", card]).stdout.splitlines()
    assert quoted(f"modelled {card}") == shown


def test_the_model_is_as_far_off_the_published_figures_as_the_page_says():
    shapes = {
        "0.5B": {"hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24,
                 "num_attention_heads": 14, "num_key_value_heads": 2},
        "1.5B": {"hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28,
                 "num_attention_heads": 12, "num_key_value_heads": 2},
    }  # fmt: skip
    rows = [row.strip("| ").split(" | ") for row in quoted("published")[2:]]
    assert len(rows) == 4
    for system, published, modelled, off in rows:
        size, card, batch = system.split(", ")
        micro_batch = int(batch.split(" x ")[0])
        model = make_config(vocab_size=151_936, max_position_embeddings=1024, **shapes[size]).model
        steps = 524_288 // (micro_batch * 1024)  # tokens per optimizer step, as published
        work = step_work(Architecture.from_config(model), 1024, micro_batch, steps)
        speed = 524_288 / floor(work, find_card(card)).seconds
        assert modelled == f"{speed:,.0f}"
        assert off == f"{speed / float(published.replace(',', '')) - 1:+.1%}"
