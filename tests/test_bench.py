"""The benchmark on a CPU with tiny shapes: systems do the same work, records are kept, claims are earned."""

from __future__ import annotations

import json
import os
import re
import runpy
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from bench_cases import hurry, steps_of, tiny
from helpers import make_config
from typer.testing import CliRunner

from albor.architecture import Architecture
from albor.bench import machine, recorder
from albor.bench import report as reporting
from albor.bench import run as running
from albor.bench.cases import SHAPES, STANDARD, Case, case_of, find_case
from albor.bench.command import find_card, find_cases, find_peers
from albor.bench.goals import GOALS, Goal
from albor.bench.launch import _outcome, environment
from albor.bench.machine import Watch, code_digest, facts
from albor.bench.page import render_markdown
from albor.bench.peers import DEFAULT, LIBRARIES, PEERS, TITLES
from albor.bench.peers.plain import ChunkedLoss
from albor.bench.protocol import CALIBRATE_AGAIN, PROFILED, Options, Run, order, turns
from albor.bench.records import Found, Records
from albor.bench.report import build_report
from albor.bench.run import run_benchmark
from albor.bench.workload import Spec, Tokens, parts, read_weights, write_tokens, write_weights
from albor.cli import app
from albor.errors import ConfigError
from albor.floor import (
    floor,
    step_work,
)
from albor.memory.process import Reading

ROOT = Path(__file__).parents[1]
STEPS = 11  # one more than what lies between two looks at the loss
NEEDS = {
    "hf-compile": ("transformers", "accelerate"),
    "litgpt": ("litgpt", "lightning"),
}


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
        env=environment(), cwd=folder, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    return done.returncode, [json.loads(line) for line in done.stdout.splitlines()], done.stderr


@pytest.fixture(scope="module")
def reference(spec: Spec, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[float]]:
    code, events, errors = run_peer("reference", spec, tmp_path_factory.mktemp("reference"))
    assert code == 0, errors
    return {key: steps_of(events, key) for key in ("loss", "norm")}


# The systems


# The others are these with fewer options; torch-compile itself runs in the whole protocol below.
@pytest.mark.parametrize("name", ["albor", "torch-chunked", "hf-compile", "litgpt"])
def test_every_system_does_the_same_work(
    name: str, spec: Spec, reference: dict[str, list[float]], tmp_path: Path
):
    """Same weights, tokens, optimizer, clipping and schedule: in fp32 the losses are equal, step by step."""
    for library in NEEDS.get(name, ()):
        if find_spec(library) is None:
            pytest.skip(f"{library} is not installed: {name} is not tested")
    began = time.time()
    code, events, errors = run_peer(name, spec, tmp_path)
    assert code == 0, errors
    losses = steps_of(events, "loss")
    assert len(losses) == STEPS
    assert losses == pytest.approx(reference["loss"], abs=2e-5)
    norms = steps_of(events, "norm")
    expected = [None] * STEPS if name == "hf-compile" else pytest.approx(reference["norm"], rel=1e-3)
    assert norms == expected
    assert losses[-1] < losses[0] - 0.1, "it learns, or equal losses would say little"
    steps = [event for event in events if event["event"] == "step"]
    assert all(0 < event["seconds"] < time.time() - began for event in steps)
    first = next(event for event in events if event["event"] == "first_step")
    assert began < first["at"] < time.time()
    assert events[-1]["event"] == "done"
    assert 50e6 < events[-1]["memory"]["max_rss"] < 50e9


def test_memory_is_that_of_the_program_and_not_of_who_started_it(monkeypatch: pytest.MonkeyPatch):
    """getrusage has both, and is asked only where there is no /proc."""
    asked = "import resource; from albor.memory.process import peak_resident as peak; "
    asked += "print(peak().bytes, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)"
    code = "import subprocess, sys; held = b'1' * (400 << 20); "
    code += f"subprocess.run([sys.executable, '-c', {asked!r}])"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    own, charged = map(int, said.split())
    assert own < 200 * 2**20 <= 400 * 2**20 <= charged
    monkeypatch.setattr("albor.bench.recorder.peak_resident", lambda: Reading(own, ""))
    assert recorder._peak_resident() == own
    monkeypatch.setattr("albor.bench.recorder.peak_resident", lambda: Reading(None, "no /proc"))
    assert recorder._peak_resident() > 0


def test_a_system_that_fails_says_why(spec: Spec, tmp_path: Path):
    code, events, errors = run_peer("torch-compile", replace(spec, weights="/absent"), tmp_path)
    assert code == 1
    assert [event["event"] for event in events] == ["failed"]
    assert "/absent" in events[0]["error"]
    assert events[0]["missing"] is None
    assert "Traceback" in errors


def test_a_library_that_is_not_there_is_named(spec: Spec, tmp_path: Path):
    (tmp_path / "litgpt.py").write_text("raise ModuleNotFoundError('no', name='litgpt')")
    path = tmp_path / "spec.json"
    path.write_text(json.dumps(spec.as_json()))
    variables = environment()
    variables["PYTHONPATH"] = f"{tmp_path}{os.pathsep}{variables['PYTHONPATH']}"
    done = subprocess.run(
        [sys.executable, "-m", "albor.bench.peer", "litgpt", str(path)],
        env=variables, capture_output=True, text=True,
    )  # fmt: skip
    found = _outcome(done.stdout, done.returncode, tmp_path / "absent.log")
    assert (found["status"], found["error"]) == (
        "not installed",
        "litgpt; docs/performance.md says how to get it",
    )


def test_what_a_process_leaves_behind_is_read(tmp_path: Path):
    log = tmp_path / "log"
    log.write_text("fine\nKilled: out of memory\n\n")
    lines = [
        '{"event": "step", "loss": 2.0, "norm": null, "seconds": 0.5}',
        '{"event": "first_step", "at": 9.0}',
    ]
    killed = _outcome("\n".join([*lines, '{"event": "st']), -9, log)
    assert (killed["status"], killed["error"]) == ("failed", "ended with exit code -9: Killed: out of memory")
    assert (killed["losses"], killed["first_step_seconds"], killed["profile"]) == ([2.0], 9.0, None)
    failed = _outcome('{"event": "failed", "missing": null, "error": "no room"}', 1, log)
    assert (failed["status"], failed["error"]) == ("failed", "no room")
    assert _outcome("\n".join(lines), 0, log)["status"] == "ok"


def test_bf16_weights_have_fp32_masters(spec: Spec, reference: dict[str, list[float]], tmp_path: Path):
    # With a backend of attention that a CPU does not have: it is preferred, and not insisted on.
    changed = replace(spec, dtype="bfloat16", attention="cudnn")
    code, events, errors = run_peer("torch-compile", changed, tmp_path)
    assert code == 0, errors
    losses = steps_of(events, "loss")
    assert losses == pytest.approx(reference["loss"], abs=0.03)
    assert losses != pytest.approx(reference["loss"], abs=1e-5), "nothing was computed in bf16"


def test_the_compiled_trainer_has_no_mask_that_would_slow_it_down(
    spec: Spec, monkeypatch: pytest.MonkeyPatch
):
    for library in NEEDS["hf-compile"]:
        pytest.importorskip(library)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    peer = import_module("albor.bench.peers.huggingface")
    seen: list[dict[str, Any]] = []
    made: list[Any] = []

    class Made(Exception):
        pass

    def keep_model(*arguments: Any) -> None:
        made.append(make_model(*arguments))
        raise Made

    make_model = peer.make_model
    monkeypatch.setattr(peer, "make_model", keep_model)
    with pytest.raises(Made):
        peer.train(spec, None, compiled=True)

    def look(graph: Any, inputs: Any) -> Any:
        calls = [node for node in graph.graph.nodes if "scaled_dot_product" in str(node.target)]
        seen.extend(node.kwargs for node in calls)
        return graph

    batch = torch.arange(32).view(2, 16) % 37
    model = torch.compile(made[0], backend=look)
    model(input_ids=batch, labels=batch, shift_labels=batch)
    assert [(call["attn_mask"], call["is_causal"]) for call in seen] == [(None, True)] * len(seen)
    assert len(seen) == 2, "one for each block"


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
    assert PEERS.keys() == TITLES.keys() >= {*DEFAULT, *LIBRARIES}


def test_a_system_does_not_outlive_the_benchmark(spec: Spec, tmp_path: Path):
    """However that ends: what was killed must not hold the card. Here it hangs in its library."""
    (tmp_path / "litgpt.py").write_text("import time\nprint('here', flush=True)\ntime.sleep(60)")
    path = tmp_path / "spec.json"
    path.write_text(json.dumps(spec.as_json()))
    starter = (
        "import subprocess, sys\n"
        "p = subprocess.Popen(sys.argv[1:], stderr=subprocess.PIPE, process_group=0)\n"
        "print(p.stderr.readline().decode().strip(), p.pid)"
    )
    command = [sys.executable, "-c", starter, sys.executable, "-m", "albor.bench.peer", "litgpt", str(path)]
    variables = environment()
    variables["PYTHONPATH"] = f"{tmp_path}{os.pathsep}{variables['PYTHONPATH']}"
    with subprocess.Popen(command, env=variables, stdout=subprocess.PIPE, text=True) as started:
        assert started.stdout is not None
        word, pid = started.stdout.readline().split()
    assert word == "here"
    deadline = time.time() + 20
    while _runs(int(pid)):
        assert time.time() < deadline, "it goes on alone"
        time.sleep(0.1)


def _runs(pid: int) -> bool:
    state = Path(f"/proc/{pid}/stat")
    return state.exists() and state.read_text().rpartition(")")[2].split()[0] != "Z"


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


def test_a_longer_file_begins_with_the_same_tokens(tmp_path: Path):
    """So losses of the first steps can be compared, however many follow."""
    write_tokens(tmp_path / "short.npy", 500, 99)
    write_tokens(tmp_path / "long.npy", 900, 99)
    short, long = (np.load(tmp_path / f"{name}.npy") for name in ("short", "long"))
    assert np.array_equal(short, long[:500])
    assert len(set(long)) > 30


# Cases


def test_the_standard_shapes_are_those_of_the_configurations():
    for name in SHAPES:
        shipped = find_cases(ROOT / f"configs/pretrain-{name}.yaml", [], None, 30)[0]
        case = find_case(name, 30)
        same = {"max_position_embeddings": 2048}
        assert case.config.model.model_dump() | same == shipped.config.model.model_dump() | same


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
    losses = losses or [2.0] * len(seconds)
    memory = {"max_allocated": 10, "max_reserved": 20, "device_peak": 30, "max_rss": 40}
    return Run(
        case="tiny", peer=peer, number=number, fingerprint="f", date="d", commit="c", status="ok", error=None,
        cold=number == 1, first_step_seconds=2.5, wall_seconds=9.0, losses=losses,
        norms=[1.0] * len(losses), seconds=seconds, memory=memory, gpu={}, notes={}, profile=None,
    )  # fmt: skip


def options_for(case: Case, out: Path, **keys: Any) -> Options:
    values = {
        "cases": (case,), "peers": ("albor", "torch-compile", "reference"), "out": out, "device": "cpu",
        "dtype": "float32", "warmup": 2, "steps": 4,
    }  # fmt: skip
    return Options(**values | keys)


HERE = {
    "date": "d", "commit": "c", "code": "x", "peer_code": "y", "device": "NVIDIA H100 80GB HBM3",
    "is_gpu": True, "driver": "1", "power_limit_watts": 700.0, "clock_max_mhz": 1980, "processor": "p",
    "cores": 2, "platform": "l",
    "python": "3",
    "versions": {"torch": "2", "triton": "3", "numpy": "2", "transformers": "5", "accelerate": "1",
                 "liger-kernel": "0", "litgpt": None, "lightning": None},
}  # fmt: skip


def report_of(runs: list[Run], **keys: Any) -> dict[str, Any]:
    case = replace(case_of(tiny(), 6), name="tiny")
    options = options_for(case, Path("/nowhere"), **keys)
    return build_report(options, HERE, None, Found([case], runs, 0), complete=True)


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
        replace(a_run("reference", [1.0] * 3, losses=[3.0, 2.46, 2.01]), norms=[1.0, 0.8, 1.0]),
    ]
    systems = report_of(runs)["cases"]["tiny"]["systems"]
    assert systems["albor"]["largest_loss_gap"] == pytest.approx(0.04)
    assert systems["albor"]["largest_norm_gap"] == pytest.approx(0.25)
    assert systems["albor"]["late_loss_gap"] is None
    assert systems["reference"]["largest_loss_gap"] is None
    assert "tokens_per_second" not in systems["reference"], "the reference is not timed"


@pytest.mark.parametrize(("steps", "gap"), [(299, None), (300, 0.02)])
def test_losses_far_into_a_run_are_compared_with_albors(steps: int, gap: float | None):
    ours = [2.0] * steps
    theirs = [9.0] * (steps - 50) + [1.98, 2.02] * 25
    runs = [a_run("albor", [1.0] * steps, losses=ours), a_run("torch-compile", [1.0] * steps, losses=theirs)]
    systems = report_of(runs)["cases"]["tiny"]["systems"]
    assert systems["albor"]["late_loss_gap"] is None
    assert systems["torch-compile"]["late_loss_gap"] == (gap and pytest.approx(gap))


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
        (Goal(None, "first_step_cold", 15.0), "reached"),
        (Goal(None, "first_step_cold", 2.0), "missed"),
        (Goal(None, "first_step_warm", 5.0), "not measured"),
        (Goal(None, "loss", 0.005), "not measured"),
        (Goal(None, "late_loss", 0.01, "best"), "not measured"),
        (Goal(None, "norm", 0.01), "not measured"),
        (Goal(None, "host_ratio", 1.2, "torch-compile"), "reached"),
        (Goal(None, "host_ratio", 1.1, "torch-compile"), "undecided"),
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
    absent = replace(failed, peer="litgpt", status="not installed", error="litgpt", commit="of old")
    page = render_markdown(report_of([a_run("albor", [1.0] * 6), failed, absent]))
    assert "- plain torch loop, torch.compile: failed: no room" in page
    assert "- litgpt, torch.compile: not installed: litgpt\n" in page
    assert "- litgpt, torch.compile: measured at commit of old\n" in page
    assert "albor 9; plain torch loop" in page
    assert "| albor | 64 |" in page


# What is kept


def keep(records: Records, case: Case, *runs: Run) -> None:
    for run in runs:
        mark = records.fingerprint(case, run.peer, run.number)
        records.save(case, replace(run, case=case.name, fingerprint=mark))


def test_a_change_of_code_or_library_costs_only_the_runs_that_it_concerns(tmp_path: Path):
    case = case_of(tiny(), 6)
    options = options_for(case, tmp_path)
    keep(Records(options, HERE), case, *(a_run(peer, [1.0] * 6) for peer in PEERS))

    def lost(**changes: Any) -> set[str]:
        records = Records(options, HERE | changes)
        return {peer for peer in PEERS if records.find(case, peer, 1) is None}

    assert lost() == set()
    assert lost(code="z") == {"albor", "albor-host"}
    assert lost(peer_code="z") == PEERS.keys() - {"albor", "albor-host"}
    assert lost(versions=HERE["versions"] | {"litgpt": "0.5.13"}) == {"litgpt"}
    assert lost(versions=HERE["versions"] | {"accelerate": "2"}) == {"hf", "hf-compile", "hf-liger"}
    assert lost(device="another", versions=HERE["versions"]) == set(PEERS)
    for changed in (replace(options, steps=5), replace(options, dtype="bfloat16")):
        assert Records(changed, HERE).find(case, "albor", 1) is None


def test_results_of_several_calls_are_one_report(tmp_path: Path):
    small, large = (find_case(name, 6) for name in ("50m", "350m"))
    options = options_for(large, tmp_path)
    keep(Records(options, HERE), large, a_run("hf", [1.0] * 6), a_run("albor", [1.0] * 6))
    later = replace(options, cases=(small,))
    keep(Records(later, HERE), small, a_run("albor", [1.0] * 6), a_run("albor", [1.0] * 6, number=2))
    found = Records(later, HERE).everything()
    assert [case.name for case in found.cases] == ["350m", "50m"], "in the order of the standard cases"
    assert [(run.case, run.peer, run.number) for run in found.runs if run.case == "350m"] == [
        ("350m", "albor", 1), ("350m", "hf", 1),
    ]  # fmt: skip
    assert len([run for run in found.runs if run.case == "50m"]) == 2
    assert found.left_out == 0
    newer = Records(later, HERE | {"code": "z"}).everything()
    assert [run.peer for run in newer.runs] == ["hf"]
    assert newer.left_out == 3
    page = render_markdown(build_report(later, HERE, None, newer, complete=False))
    assert "3 records in the folder are of other code" in page


def test_micro_batches_share_a_reference(tmp_path: Path):
    wide, narrow = find_case("350m", 6), find_case("350m-mb4", 6)
    records = Records(options_for(wide, tmp_path), HERE)
    keep(records, wide, a_run("reference", [1.0] * 4), a_run("hf", [1.0] * 6))
    shared = records.find(narrow, "reference", 1)
    assert shared is not None
    assert shared.case == "350m-mb4"
    assert records.find(narrow, "hf", 1) is None
    assert records.find(find_case("50m", 6), "reference", 1) is None


def test_records_of_another_time_do_not_count(tmp_path: Path):
    case = case_of(tiny(), 6)
    records = Records(options_for(case, tmp_path), HERE)
    keep(records, case, a_run("albor", [1.0] * 6))
    path = records.path(case, "albor", 1)
    values = json.loads(path.read_text())
    path.write_text(json.dumps(values | {"a_new_field": 1}))
    assert records.find(case, "albor", 1) is None
    assert records.everything().left_out == 1


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """What the protocol would run; each run succeeds at once but for torch-compile, which fails."""
    seen: list[tuple[str, int]] = []

    def launch(options: Options, case: Case, peer: str, number: int, *_: Any) -> Run:
        seen.append((peer, number))
        about = _[-1]
        run = replace(a_run(peer, [1.0] * 6, number=number), case=case.name, fingerprint=about["fingerprint"])
        return replace(run, status="failed", error="no", losses=[]) if peer == "torch-compile" else run

    monkeypatch.setattr(running, "launch", launch)
    monkeypatch.setattr(running, "_prepare", lambda *_: {})
    monkeypatch.setattr(running, "facts", lambda device: HERE | {"is_gpu": False})
    return seen


def test_what_failed_is_tried_again_after_what_is_missing(launched: list[tuple[str, int]], tmp_path: Path):
    case = case_of(tiny(), 6)
    options = options_for(case, tmp_path, calibrate=False, peers=("albor", "torch-compile"))
    report = run_benchmark(options, lambda line: None)
    assert launched == [("albor", 1), ("torch-compile", 1), ("albor", 2)], "once, however it ends"
    assert report["complete"]
    assert report["cases"][case.name]["systems"]["torch-compile"]["status"] == "failed"
    launched.clear()
    run_benchmark(replace(options, peers=(*options.peers, "hf")), lambda line: None)
    assert launched == [("hf", 1), ("torch-compile", 1)]


def test_a_profile_comes_after_the_timed_runs(launched: list[tuple[str, int]], tmp_path: Path):
    case = case_of(tiny(), 6)
    options = options_for(case, tmp_path, peers=("albor", "reference"), profiled=("albor",), rounds=2)
    assert turns(options) == [("albor", 1), ("albor", 2), ("reference", 1), ("albor", PROFILED)]


def test_a_calibration_that_a_kernel_ended_goes_on_in_another_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    codes = iter([CALIBRATE_AGAIN, CALIBRATE_AGAIN, 0, 99])
    monkeypatch.setattr(running, "_calibrate_in_a_process", lambda *_: next(codes))
    options = options_for(case_of(tiny(), 6), tmp_path, systems=False)
    assert run_benchmark(options, lambda line: None)["calibration_error"] is None
    assert next(codes) == 99


# The whole


Measured = tuple[Options, dict[str, Any]]


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Measured]:
    """A complete run of the protocol over a tiny case, calibration excepted."""
    options = options_for(
        case_of(tiny(), 6), tmp_path_factory.mktemp("bench"), calibrate=False, compile_backend="eager",
        reference_steps=4, profiled=("albor",),
    )  # fmt: skip
    here = facts("cpu")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(running, "facts", lambda device: here)  # whoever edits sources meanwhile
        yield options, run_benchmark(options, lambda line: None)


def test_the_protocol_runs_and_can_be_gone_on_with(measured: Measured):
    options, report = measured
    assert report["complete"]
    systems = report["cases"]["test"]["systems"]
    assert [row["status"] for row in systems.values()] == ["ok"] * 3, systems
    assert systems["albor"]["runs"] == 2, "one before its peer, one after it"
    assert systems["albor"]["first_step_seconds_cold"] > 0 < systems["albor"]["first_step_seconds_warm"]
    assert systems["torch-compile"]["first_step_seconds_warm"] is None
    assert max(row["largest_loss_gap"] for name, row in systems.items() if name != "reference") < 2e-5
    assert len(systems["albor"]["losses"]) == 6
    assert len(systems["reference"]["losses"]) == 4
    assert systems["albor"]["largest_norm_gap"] < 1e-3
    profile = report["cases"]["test"]["profiles"]["albor"]
    assert profile["status"] == "ok"
    assert 0 < profile["kinds"]["GEMM"] < profile["busy_seconds"] < 1
    products = next(row for row in profile["kernels"] if row["name"] == "aten::mm")
    assert products["calls"] == 2 * (2 * 12 + 3), "of one step: two micro-batches of two blocks and a head"
    page = (options.out / "report.md").read_text()
    assert "This is a CPU. Nothing on this page says anything about a GPU." in page
    assert "| `aten::mm` | 54 |" in page
    assert json.loads((options.out / "report.json").read_text()) == report

    (options.out / "runs/test/albor-2.json").unlink()
    again: list[str] = []
    assert run_benchmark(options, again.append)["complete"]
    assert [line for line in again if ": albor" in line or "torch" in line] == ["test: albor, run 2"]


def test_nothing_is_started_when_time_is_up(measured: Measured, tmp_path: Path):
    options = replace(measured[0], out=tmp_path, time_limit=0.0, calibrate=True)
    report = run_benchmark(options, lambda line: None)
    assert not report["complete"]
    assert report["cases"]["test"]["systems"] == {}
    assert "goes on with what is left" in (tmp_path / "report.md").read_text()


def test_a_digest_is_of_the_sources_that_are_named():
    whole, part, none = code_digest(), code_digest(("bench/peer.py", "seeds.py")), code_digest(("absent",))
    assert len({whole, part, none}) == 3
    assert none == "e3b0c44298fc1c14", "SHA-256 of nothing"
    assert part == code_digest(("seeds.py", "bench/peer.py"))


def test_a_run_that_the_end_of_time_cuts_off_is_done_again(measured: Measured, tmp_path: Path):
    options = replace(measured[0], out=tmp_path, peers=("torch-compile",), profiled=(), time_limit=0.6)
    began = time.time()
    report = run_benchmark(options, lambda line: None)
    assert time.time() - began < 5
    assert not report["complete"]
    assert report["cases"]["test"]["systems"] == {}, "that it is slow was not found out"


def test_a_run_that_takes_too_long_is_ended_and_reported(measured: Measured, tmp_path: Path):
    options = replace(measured[0], out=tmp_path, peers=("torch-compile",), run_timeout=0.3)
    report = run_benchmark(options, lambda line: None)
    row = report["cases"]["test"]["systems"]["torch-compile"]
    assert (row["status"], row["error"]) == ("timed out", "did not end within 0.3 seconds")


def test_a_calibration_that_fails_leaves_the_systems(
    measured: Measured, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    options = replace(measured[0], out=tmp_path, calibrate=True, systems=False)
    monkeypatch.setattr(running, "environment", lambda: {"PATH": "/nowhere", "PYTHONHOME": "/nowhere"})
    report = run_benchmark(options, lambda line: None)
    assert "exit code" in report["calibration_error"]
    assert report["calibration_error"] in (tmp_path / "report.md").read_text()


def test_without_a_card_there_is_nothing_to_watch():
    with Watch("cpu") as watch:
        pass
    assert watch.summary() == {}


# The command


def test_the_command_prints_one_object(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    hurry(monkeypatch)
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
        (["configs/quickstart.yaml", "--profile", "keras"], "--profile: 'keras' is not a system"),
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


# The script of the repository


@pytest.fixture
def script() -> dict[str, Any]:
    return runpy.run_path(str(ROOT / "benchmarks/gpu.py"))


def test_a_report_of_a_gpu_is_put_where_it_is_committed(
    script: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    main, names = script["main"], script["main"].__globals__
    results = tmp_path / "benchmarks/results"
    results.mkdir(parents=True)
    seen: list[list[str]] = []

    def albor(device: str, end: type[BaseException] | None = None) -> Callable[[], None]:
        def run() -> None:
            seen.append(sys.argv)
            folder = Path(sys.argv[-1])
            folder.mkdir(exist_ok=True)
            machine = {"device": device, "is_gpu": device != "CPU"}
            (folder / "report.json").write_text(json.dumps({"machine": machine}))
            (folder / "report.md").write_text("page")
            if end is not None:
                raise end

        return run

    monkeypatch.setitem(names, "ROOT", tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--models", "350m", f"--out={tmp_path / 'here'}"])
    monkeypatch.setitem(names, "albor", albor("CPU"))
    main()
    assert list(results.iterdir()) == []
    assert seen[-1] == ["albor", "bench", "--models", "350m", "--out", str(tmp_path / "here")]
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--out", str(tmp_path / "here"), "--json"])
    monkeypatch.setitem(names, "albor", albor("NVIDIA H100 80GB HBM3", KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        main()
    assert sorted(path.name for path in results.iterdir()) == [
        "gpu-nvidia-h100-80gb-hbm3.json", "gpu-nvidia-h100-80gb-hbm3.md",
    ]  # fmt: skip
    for path in results.iterdir():
        path.unlink()
    monkeypatch.setitem(names, "albor", lambda: None)  # `--help`, or a mistake: nothing was measured
    os.utime(tmp_path / "here/report.json", (1, 1))
    main()
    assert list(results.iterdir()) == []


def test_the_commands_of_the_page_are_accepted():
    page = (ROOT / "docs/performance.md").read_text(encoding="utf-8").replace("\\\n", " ")
    commands = re.findall(r"^(?:python benchmarks/gpu\.py|albor bench)( [^#\n]*)?", page, re.MULTILINE)
    assert len(commands) >= 6
    for words in map(shlex.split, commands):
        shown = CliRunner().invoke(app, ["bench", *words, "--modelled", "H100"])
        assert shown.exit_code == 0, (words, shown.output)
        for option in ("--peers", "--profile"):
            if option in words:
                find_peers(words[words.index(option) + 1])


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
        peers=("albor", "albor-host", "torch-compile", "torch-graphs", "reference"), profiled=("albor",),
    )  # fmt: skip
    report = run_benchmark(options, print)
    systems = report["cases"]["test"]["systems"]
    profile = report["cases"]["test"]["profiles"]["albor"]
    assert profile["status"] == "ok", profile["error"]
    assert min(profile["kinds"][kind] for kind in ("GEMM", "attention")) > 0
    assert {name: row["error"] for name, row in systems.items()} == dict.fromkeys(options.peers)
    assert max(row["largest_loss_gap"] for name, row in systems.items() if name != "reference") < 0.02
    assert all(row["memory"]["device_peak"] for row in systems.values())
    assert systems["albor"]["share_of_floor"] < 1.1


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


def test_a_card_that_only_cuda_would_choose_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    may_be = SimpleNamespace(chosen=None)
    monkeypatch.setattr(machine, "read_machine", lambda: (None, [may_be, may_be]))
    with pytest.raises(ConfigError, match="one of several devices; set CUDA_VISIBLE_DEVICES to a UUID"):
        machine.chosen_gpu()


@pytest.mark.parametrize(
    ("device", "peak"),
    [
        ("NVIDIA GeForce RTX 4090", 165.2e12),
        ("NVIDIA GeForce RTX 4060 Ti", 44.1e12),  # sold with 8 GB and with 16 GB
        ("NVIDIA GeForce RTX 3080", None),  # sold with two memories and as many multiprocessors
        ("NVIDIA Novelty", None),
    ],
)
def test_the_peak_of_a_name_that_fits_two_cards(device: str, peak: float | None) -> None:
    assert reporting._peak_flops({"is_gpu": True, "device": device}) == peak
    assert reporting._peak_flops({"is_gpu": False, "device": device}) is None
