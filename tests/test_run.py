"""A whole run: what it leaves, how it ends, and that it resumes bit for bit from wherever it was stopped."""

from __future__ import annotations

import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from checkpoint_cases import exit_code_of, fork
from run_cases import (
    STEPS,
    albor,
    bits,
    call,
    checkpoints,
    events,
    rows,
    start,
    tree,
    unlogged,
    wait,
    wait_for,
)

from albor import build
from albor.build import build_id
from albor.checkpoint import checkpoint_name
from albor.configfile import load_config
from albor.evaluate.validation import Validation
from albor.memory.estimate import plan_for_training
from albor.train import loop
from albor.train.run import Outcome
from albor.train.run_directory import claim
from albor.train.signals import StopRequest
from albor.train.step import Trainer

RUN = Path("runs/tiny")
METRICS = {
    *("step", "tokens", "time", "train/loss", "train/lr", "train/grad_norm", "train/tokens_per_second"),
    *("train/mfu", "train/epoch"),
    *("memory/planned", "memory/arena", "memory/reserved", "memory/process"),
    *("gradients/embedding", "gradients/head"),
    *(f"gradients/block_{i:02d}{part}" for i in range(2) for part in ("", "/attention", "/mlp")),
}


@pytest.fixture(autouse=True)
def own_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each test has its own runs; the prepared data are the module's."""
    monkeypatch.chdir(tmp_path)


def during(step: int, act: Callable[[Trainer], None], micro_batch: int = 2) -> pytest.MonkeyPatch:
    """From here to its undo, `act` happens to the trainer in `step`, in one of the 3 micro-batches."""
    patch = pytest.MonkeyPatch()
    healthy, micro = Trainer.step, Trainer._micro_batch
    now = {"step": 0, "micro": 0}

    def counted(self: Trainer, batches: Any, state: Any) -> Any:
        now.update(step=state.step + 1, micro=0)
        return healthy(self, batches, state)

    def disturbed(self: Trainer) -> None:
        micro(self)
        now["micro"] += 1
        if now["step"] == step and now["micro"] == micro_batch:
            act(self)

    patch.setattr(Trainer, "step", counted)
    patch.setattr(Trainer, "_micro_batch", disturbed)
    return patch


def stop_in(step: int, config: Path, *arguments: object, micro_batch: int = 3) -> None:
    """A run that gets a signal in `step`, which is still taken if it comes in its last micro-batch."""
    patch = during(step, lambda _: os.kill(os.getpid(), signal.SIGTERM), micro_batch)
    result = call("train", config, *arguments)
    patch.undo()
    assert result.code == 75, result


def poison(trainer: Trainer) -> None:
    trainer.arena["io.results"][:1].fill_(math.nan)


# What a run leaves


def test_a_whole_run(config: Path, whole: dict[str, Any]):
    """In a process of its own, with the bits of one in this process."""
    result = albor(Path(), "train", config)
    assert (result.code, result.err) == (0, "")
    assert bits(RUN) == whole
    assert (RUN / "config.yaml").read_text() == config.read_text()
    assert load_config(RUN / "config.resolved.yaml") == load_config(config)
    plan, planned = json.loads((RUN / "plan.json").read_text()), plan_for_training(load_config(config)).plan
    assert plan["device_bytes"] == planned.size("device")
    assert [b["name"] for b in plan["buffers"]] == [b.name for b in planned.buffers]
    assert {"albor", "torch", "python", "processor"} <= json.loads((RUN / "env.json").read_text()).keys()

    trained = [row for row in rows(RUN) if "train/loss" in row]
    evaluated = [row for row in rows(RUN) if "val/loss" in row]
    assert [row["step"] for row in trained] == list(range(1, STEPS + 1))
    assert [row["step"] for row in evaluated] == list(range(4, STEPS + 1, 4))
    assert all(row.keys() == METRICS for row in trained)
    assert all({"val/perplexity", "val/bits_per_byte"} < row.keys() for row in evaluated)
    assert all(row["tokens"] == row["step"] * 3 * 32 for row in rows(RUN))
    assert trained[-1]["train/loss"] < trained[0]["train/loss"] - 1
    assert trained[-1]["train/epoch"] > 1, "no epoch ended, which other tests here rely on"

    assert checkpoints(RUN) == [STEPS - 4, STEPS]
    kinds = [event["event"] for event in events(RUN)]
    assert (kinds[0], kinds[-1], len(events(RUN, "checkpoint"))) == ("started", "finished", STEPS // 4)
    final = json.loads((RUN / "eval" / "final.json").read_text())
    assert {"val/loss", "val/bits_per_byte", "gzip/bits_per_byte", "xz/bits_per_byte"} < final.keys()
    assert (final["step"], final["samples"][0]["prompt"]) == (STEPS, "the")
    for shown in (f"{final['val/loss']:.3f}", f"{final['xz/bits_per_byte']:.3f}", "albor generate runs/tiny"):
        assert shown in result.out
    smoke = json.loads((RUN / "eval" / "smoke.json").read_text())
    assert smoke["step"] == STEPS
    assert all(finding["text"] is not None for finding in smoke["findings"][:2])
    assert smoke["summary"] == final["smoke"]
    assert smoke["summary"] in result.out


def test_a_finished_run_says_so_and_stays_as_it_is(config: Path):
    call("train", config)
    before, report = tree(RUN / "checkpoints"), (RUN / "eval" / "final.json").read_text()
    written = [path.stat().st_mtime_ns for path in sorted((RUN / "checkpoints").rglob("*"))]
    result = call("train", config)
    assert result.code == 0
    assert f"finished already, at step {STEPS}" in result.out
    assert tree(RUN / "checkpoints") == before
    assert [path.stat().st_mtime_ns for path in sorted((RUN / "checkpoints").rglob("*"))] == written
    assert (RUN / "eval" / "final.json").read_text() == report


def test_the_same_seed_gives_the_same_bits_and_another_seed_does_not(config: Path, whole: dict[str, Any]):
    call("train", config, "name=again")
    call("train", config, "name=other", "seed=8")
    assert bits(Path("runs/again")) == whole
    other = bits(Path("runs/other"))
    assert other["saved"]["weights.safetensors"] != whole["saved"]["weights.safetensors"]
    assert other["rows"][0]["train/loss"] != whole["rows"][0]["train/loss"]


def test_the_report_is_json_where_a_loss_is_not_finite():
    """A perplexity overflows long before a loss does."""
    outcome = Outcome(RUN, None, 1, 1, Validation(800.0, None, 1, 1), {}, [], [], [])
    assert outcome.as_json()["val/perplexity"] is None
    assert json.dumps(outcome.as_json(), allow_nan=False)


# Kills and signals


@pytest.fixture(scope="module")
def longer(config: Path) -> dict[str, Any]:
    """The bits of 60 undisturbed steps: time enough to be killed in."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(config.parent)
        assert call("train", config, "name=longer", "train.max_steps=60").code == 0
    return bits(config.parent / "runs/longer")


@pytest.mark.parametrize("seed", range(4))
def test_killed_three_times_at_random_moments(config: Path, longer: dict[str, Any], seed: int):
    """kill -9, also of the resumed runs. Moments are counted in steps first, so that any machine will do."""
    rng, reached = random.Random(seed), 0
    for _ in range(3):
        goal = reached + rng.randint(1, 14)
        child = fork(lambda: call("train", config, "train.max_steps=60"))
        deadline = time.monotonic() + 60
        while reached < goal and time.monotonic() < deadline:
            reached = max([0, *(json.loads(line)["step"] for line in _whole_lines(RUN / "metrics.jsonl"))])
        time.sleep(rng.uniform(0, 0.02))
        os.kill(child, signal.SIGKILL)
        assert exit_code_of(child) == -signal.SIGKILL, "it ended by itself"
    result = call("train", config, "train.max_steps=60")
    assert (result.code, "going on from step" in result.out) == (0, True)
    assert bits(RUN) == longer


def _whole_lines(path: Path) -> list[bytes]:
    return path.read_bytes().split(b"\n")[:-1] if path.exists() else []


def test_stopped_in_every_step(config: Path, whole: dict[str, Any], monkeypatch: pytest.MonkeyPatch):
    """Before the first, in the middle and at the end of each, where an epoch ends, and after the last."""
    deferred = StopRequest.defer

    def signalled(self: StopRequest) -> None:
        deferred(self)
        os.kill(os.getpid(), signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(StopRequest, "defer", signalled)
        result = call("train", config)
    assert result.code == 75
    assert "stopped by SIGINT after step 0 of 24" in result.err
    assert checkpoints(RUN) == [0]
    for step in range(1, STEPS + 1):
        stop_in(step, config, micro_batch=2)
        assert checkpoints(RUN)[-1] == step - 1
        stop_in(step, config)
        assert checkpoints(RUN)[-1] == step
    stops = [event["step"] for event in events(RUN, "stopped")]
    assert stops == [0, *(stop for step in range(1, STEPS + 1) for stop in (step - 1, step))]
    assert call("train", config).code == 0
    assert bits(RUN) == whole


def test_stopped_in_an_evaluation_and_in_the_report(
    config: Path, whole: dict[str, Any], monkeypatch: pytest.MonkeyPatch
):
    """Neither is sat through, and what is missing of them is done on resuming."""
    checked = StopRequest.check
    calls = {"until the signal": 0}

    def count_down(self: StopRequest) -> None:
        calls["until the signal"] -= 1
        if calls["until the signal"] == 0:
            os.kill(os.getpid(), signal.SIGHUP)
        checked(self)

    monkeypatch.setattr(StopRequest, "check", count_down)
    # A step checks 3 times, an evaluation 2 batches, 1 sample and its 8 tokens: in that of step 4, between
    # two tokens of its sample, and in the report.
    for checks, step in ((4 * 3 + 2, 4), (11 - 2 + 3, 4), (20 * 3 + 5 * 11 + 3, STEPS)):
        calls["until the signal"] = checks
        result = call("train", config)
        assert result.code == 75
        assert f"stopped by SIGHUP after step {step} of 24" in result.err
    assert not (RUN / "eval" / "final.json").exists()
    assert call("train", config).code == 0
    assert (RUN / "eval" / "final.json").exists()
    assert bits(RUN) == whole


def test_a_signal_that_is_ignored_from_the_start_stays_ignored(config: Path, whole: dict[str, Any]):
    previous = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    patch = during(5, lambda _: os.kill(os.getpid(), signal.SIGHUP))
    assert call("train", config).code == 0
    patch.undo()
    signal.signal(signal.SIGHUP, previous)
    assert bits(RUN) == whole


@pytest.mark.parametrize(
    ("every", "says"), [(2, "not finite, and were not saved"), (4, "or zero (steps 3, 4, 5, 6, 7)")]
)
def test_weights_past_saving_push_no_good_checkpoint_out(config: Path, every: int, says: str):
    """Step 2 breaks the weights and the steps from 3 on are skipped: nothing of that is saved."""
    patch = during(2, lambda trainer: trainer.arena["weights"].fill_(math.inf), micro_batch=3)
    cadence = ("evaluate.every_steps=3", f"checkpoint.every_steps={every}")
    result = call("train", config, *cadence, "divergence.max_rollbacks=0")
    patch.undo()
    assert result.code == 3
    assert checkpoints(RUN) == []
    assert says in result.err
    assert "start again under another name" in result.err
    if every == 4:  # through an evaluation whose sample has no finite logits
        assert [row["step"] for row in rows(RUN) if row.get("train/loss", 0) is None] == [3, 4, 5, 6, 7]
        assert events(RUN, "sample")[-1]["text"] is None


def test_the_reader_of_the_output_may_go_away(config: Path, whole: dict[str, Any]):
    """`albor train ... | head -1`: the training goes on, and the logs have what the terminal missed."""
    command = [sys.executable, "-m", "albor", "train", str(config)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=os.environ)
    assert process.stdout is not None
    process.stdout.readline()
    process.stdout.close()
    assert process.wait(60) == 0
    assert bits(RUN) == whole


def test_a_prompt_without_room_is_refused_before_training(config: Path):
    result = call("train", config, f"evaluate.prompts=[the, {'the ' * 70}]")
    assert result.code == 2
    assert "evaluate.prompts[1]: has" in result.err
    assert not RUN.exists()


def test_the_command_that_began_from_another_run_goes_on_with_its_own(config: Path, whole: dict[str, Any]):
    stop_in(7, config)
    stop_in(10, config, "name=copy", "--resume", RUN)
    result = call("train", config, "name=copy", "--resume", RUN)
    assert (result.code, "going on from step 10" in result.out) == (0, True)
    assert bits(Path("runs/copy"))["saved"] == whole["saved"]


def test_a_machine_that_computes_otherwise_is_told_so(config: Path, monkeypatch: pytest.MonkeyPatch):
    stop_in(3, config)
    monkeypatch.setattr("albor.memory.devices.cpu_has_bf16", lambda: True)
    state = RUN / "checkpoints" / checkpoint_name(3)
    monkeypatch.setattr("albor.memory.estimate.compute_dtype", lambda *_: "bfloat16")
    result = call("train", config)
    assert result.code == 2
    assert f"{Path(state)} was computed in float32" in result.err
    assert len(result.err.splitlines()) == 1


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_says_how_to_go_on(config: Path, longer: dict[str, Any], number: signal.Signals):
    process = start(Path(), "train", config, "train.max_steps=60")
    wait_for(lambda: len(_whole_lines(RUN / "metrics.jsonl")) >= 3, process)
    process.send_signal(number)
    result = wait(process)
    (stopped,) = events(RUN, "stopped")
    assert result.code == 75
    assert stopped["reason"] == number.name
    assert checkpoints(RUN)[-1] == stopped["step"] < 60
    assert f"stopped by {number.name} after step {stopped['step']} of 60" in result.err
    assert "the same command goes on" in result.err
    assert "Traceback" not in result.err
    assert call("train", config, "train.max_steps=60").code == 0
    assert bits(RUN) == longer


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_second_signal_ends_it_at_once(config: Path, whole: dict[str, Any], number: signal.Signals):
    def twice(_: Trainer) -> None:
        for _ in range(2):
            os.kill(os.getpid(), number)
            time.sleep(0.7)

    def work() -> None:
        during(6, twice)
        call("train", config)

    assert exit_code_of(fork(work)) == 128 + number
    assert checkpoints(RUN) == [4]
    assert call("train", config).code == 0
    assert bits(RUN) == whole


# Resuming


def test_a_damaged_checkpoint_is_passed_over_visibly(config: Path, whole: dict[str, Any]):
    stop_in(10, config)
    weights = RUN / "checkpoints" / checkpoint_name(10) / "weights.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    result = call("train", config)
    assert result.code == 0
    assert f"passed over a damaged checkpoint: {weights}: content differs" in result.out.replace("\n", " ")
    assert "going on from step 8" in result.out
    assert bits(RUN) == whole


def test_without_an_intact_checkpoint_nothing_starts_over(config: Path):
    """Whichever of its files is damaged, and whenever that is found."""
    stop_in(3, config)
    saved = RUN / "checkpoints" / checkpoint_name(3)
    for name, says in (
        ("weights.safetensors", "content differs from what was saved (SHA-256)"),
        ("state.json", "missing"),
    ):
        content = (saved / name).read_bytes()
        (saved / name).unlink()
        if name == "weights.safetensors":
            (saved / name).write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        before = tree(RUN / "checkpoints")
        result = call("train", config)
        assert result.code == 1
        assert result.err.endswith(f"{name}: {says}; to start again, remove {RUN / 'checkpoints'}\n")
        assert tree(RUN / "checkpoints") == before
        (saved / name).write_bytes(content)


def test_how_it_is_computed_may_change_on_the_way(config: Path, whole: dict[str, Any]):
    """Recomputation and the accumulator's place move memory, not bits."""
    stop_in(7, config)
    changes = ("train.recompute=block", "train.accumulator=gpu")
    assert call("train", config, *changes).code == 0
    arena = [row["memory/arena"] for row in rows(RUN) if "memory/arena" in row]
    assert arena[0] != arena[-1], "the changes changed nothing"
    assert bits(RUN) == whole


def test_what_is_computed_may_not_change_on_the_way(config: Path):
    """Every key is named at once, before anything is prepared for the other run."""
    stop_in(6, config)
    before, cached = unlogged(RUN), tree(config.parent / "data")
    changes = {
        "seed": 8,
        "model.vocab_size": 350,
        "data.sources[0].weight": 2.0,
        "optimizer.betas": "[0.9, 0.99]",
        "schedule.kind": "linear",
        "train.max_steps": 25,
        "train.precision": "bf16",
    }
    result = call("train", config, *(f"{key}={value}" for key, value in changes.items()))
    assert result.code == 2
    problems = result.err.splitlines()[1:]
    assert sorted(line.split(":")[0] for line in problems) == sorted(
        key.replace("[0]", ".0") for key in changes
    )
    assert all("restore it, or give the new run another name" in line for line in problems)
    assert (unlogged(RUN), tree(config.parent / "data")) == (before, cached)


def test_a_moved_corpus_is_the_same_corpus(config: Path, whole: dict[str, Any]):
    stop_in(3, config)
    shutil.copytree(config.parent / "corpus", "moved")
    assert call("train", config, "data.sources[0].path=moved").code == 0
    assert bits(RUN) == whole


def test_a_changed_corpus_is_refused(config: Path):
    corpus = Path("corpus").absolute()
    shutil.copytree(config.parent / "corpus", corpus)
    moved = f"data.sources=[{{kind: files, path: {corpus}}}]"
    stop_in(3, config, moved)
    with open(corpus / "00.txt", "a") as file:
        file.write("one more line.\n")
    before = unlogged(RUN)
    result = call("train", config, moved)
    assert result.code == 1
    assert "was trained on other data" in result.err
    assert unlogged(RUN) == before


def test_resume_never_touches_nothing_of_a_run_that_is_there(config: Path):
    assert call("train", config, "--resume", "never", "train.max_steps=5").code == 0
    before = unlogged(Path())
    result = call("train", config, "--resume", "never", "seed=8")
    assert result.code == 2
    assert f"{RUN} already holds checkpoints" in result.err
    assert unlogged(Path()) == before


def test_resume_from_another_run_leaves_it_as_it_was(config: Path, whole: dict[str, Any]):
    stop_in(7, config)
    before = tree(RUN)
    result = call("train", config, "name=copy", "--resume", RUN)
    assert result.code == 0
    assert tree(RUN) == before
    copy = bits(Path("runs/copy"))
    assert copy["saved"] == whole["saved"]
    assert copy["rows"] == [row for row in whole["rows"] if row["step"] > 7]


def test_a_finished_run_under_another_name_has_a_checkpoint_of_its_own(config: Path, whole: dict[str, Any]):
    assert call("train", config).code == 0
    assert call("train", config, "name=copy", "--resume", RUN).code == 0
    assert bits(Path("runs/copy"))["saved"] == whole["saved"]


def test_resume_would_not_leave_newer_checkpoints_behind(config: Path):
    stop_in(10, config)
    before = unlogged(RUN)
    result = call("train", config, "--resume", RUN / "checkpoints" / checkpoint_name(8))
    assert result.code == 2
    assert f"holds {checkpoint_name(10)} already" in result.err
    assert unlogged(RUN) == before


def test_two_processes_do_not_train_one_run(config: Path):
    with claim(RUN, pytest.fail):
        result = call("train", config)
    assert result.code == 1
    assert f"another process is training in {RUN}" in result.err
    assert call("train", config).code == 0, "the claim outlived its process"


# Failures


def test_a_step_that_is_not_finite_is_skipped_and_recorded(config: Path):
    """And a resume knows that there was one update less."""
    patch = during(6, poison)
    assert call("train", config, "name=unstopped").code == 0
    stop_in(7, config)
    patch.undo()
    assert call("train", config).code == 0
    assert bits(RUN) == bits(Path("runs/unstopped"))
    (event,) = events(RUN, "skipped_step")
    assert (event["step"], event["loss"]) == (6, "nan")
    (row,) = (row for row in rows(RUN) if row["step"] == 6)
    assert (row["train/loss"], row["non_finite"]["train/loss"]) == (None, "nan")
    state = json.loads((RUN / "checkpoints" / checkpoint_name(STEPS) / "state.json").read_text())
    assert (state["step"], state["updates"]) == (STEPS, STEPS - 1)


def test_steps_that_stay_non_finite_end_the_run(config: Path, monkeypatch: pytest.MonkeyPatch):
    """With 3, after going back twice to what the cadence saved; also where a stop comes between the skipped
    steps.
    """
    stop_in(5, config)
    good = tree(RUN / "checkpoints" / checkpoint_name(5))
    healthy = Trainer._micro_batch

    def broken(self: Trainer) -> None:
        healthy(self)
        poison(self)

    monkeypatch.setattr(Trainer, "_micro_batch", broken)
    stop_in(7, config)
    skipped = tree(RUN / "checkpoints" / checkpoint_name(7))
    for name in ("weights.safetensors", "optimizer.safetensors"):
        assert skipped[name] == good[name], "a skipped step changed it"
    result = call("train", config)
    assert result.code == 3
    assert "step 9: 5 of the last 20 steps had a loss or gradient norm that is not finite" in result.err
    assert "start again under another name" in result.err
    assert "Traceback" not in result.err
    skipped_steps = [6, 7, 8, 9, 10, *range(5, 10), *range(5, 10)]
    assert [event["step"] for event in events(RUN, "skipped_step")] == skipped_steps
    assert checkpoints(RUN) == [4]
    assert [event["event"] for event in events(RUN)][-2:] == ["diverged", "memory"]


@pytest.mark.parametrize("kind", [RuntimeError, OSError, KeyError])
def test_a_failed_evaluation_costs_no_training(
    config: Path, whole: dict[str, Any], kind: type[Exception], monkeypatch: pytest.MonkeyPatch
):
    """The state is saved first; the end is recorded, whatever it was; the resumed run makes up for it."""
    calls = []

    def fail_at_the_second(*arguments: Any) -> Validation:
        calls.append(arguments)
        if len(calls) == 2:
            raise kind("no more")
        return validate(*arguments)

    validate = loop.validate
    with monkeypatch.context() as patch:
        patch.setattr(loop, "validate", fail_at_the_second)
        assert call("train", config).code == 1
    assert checkpoints(RUN) == [4, 8]
    last = events(RUN)[-1]
    assert (last["event"], last["step"], last["error"][: len(kind.__name__)]) == ("failed", 8, kind.__name__)
    assert call("train", config).code == 0
    assert bits(RUN) == whole


def test_whatever_ends_a_command_is_in_the_log_of_a_run_that_has_begun(config: Path, monkeypatch: Any):
    """Also where it does not come to training. A new run that is refused leaves nothing at all."""
    absurd = "data.max_epochs=0.01"
    assert call("train", config, absurd).code == 2
    assert not RUN.exists()
    stop_in(6, config)

    def last() -> tuple[str, int | None, str]:
        event = events(RUN)[-1]
        return event["event"], event["step"], event.get("error", event.get("reason", ""))

    assert call("train", config, absurd).code == 2
    assert last()[:2] == ("failed", None)
    assert "ConfigError: train.max_steps: 24 steps read" in last()[2]
    assert call("train", config, "--resume", "never").code == 2
    assert last()[:2] == ("failed", None)
    with monkeypatch.context() as patch:
        patch.setattr("albor.train.saver._free", lambda _: 0)
        assert call("train", config).code == 1
        assert last()[:2] == ("failed", 6)
        assert "AlborError: the next 2 checkpoints take" in last()[2]
    with monkeypatch.context() as patch:
        patch.setattr("albor.train.run.prepare", lambda *_: os.kill(os.getpid(), signal.SIGTERM))
        assert call("train", config).code == 75
        assert last() == ("stopped", None, "SIGTERM")
    weights = RUN / "checkpoints" / checkpoint_name(6) / "weights.safetensors"
    weights.write_bytes(b"")
    shutil.rmtree(RUN / "checkpoints" / checkpoint_name(4))
    assert call("train", config).code == 1
    assert last()[:2] == ("failed", None)
    assert "weights.safetensors: has 0 bytes" in last()[2]


def test_other_sources_than_before_are_said_and_are_in_no_checkpoint(
    config: Path, whole: dict[str, Any], monkeypatch: pytest.MonkeyPatch
):
    stop_in(6, config)
    built = build_id()
    assert json.loads((RUN / "env.json").read_text())["build"] == built
    assert events(RUN, "started")[0]["build"] == built
    monkeypatch.setattr("albor.train.run_directory.build_id", lambda: "another")
    result = call("train", config)
    assert result.code == 0
    said = f"the run goes on where results may be rounded otherwise: build {built} -> another\n"
    assert said in result.out.replace("\n", " ").replace("another ", "another\n")
    (event,) = events(RUN, "environment_changed")
    assert (event["key"], event["before"], event["after"]) == ("build", built, "another")
    assert bits(RUN) == whole


def test_the_build_is_that_of_all_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    package = tmp_path / "albor"
    shutil.copytree(Path(build.__file__).parent, package, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(build, "__file__", str(package / "build.py"))
    found = [build_id()]
    for name in ("train/loop.py", "kernels/adamw.py"):
        (package / name).write_bytes((package / name).read_bytes() + b"\n")
        found.append(build_id())
    (package / "train/loop.py").rename(package / "train/loops.py")
    found.append(build_id())
    assert len({*found}) == len(found)
    assert build_id() == found[-1]


def test_a_run_directory_that_cannot_be_made_is_explained(config: Path):
    Path("runs").write_text("a file")
    result = call("train", config)
    assert result.code == 1
    assert result.err == f"albor: runs_dir: {RUN} cannot be used: Not a directory\n"
