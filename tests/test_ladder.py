"""The way up a ladder: what is done in which order, what is not done twice, and how it ends. The commands are
stand-ins; tests/test_ladder_cpu.py goes up a real one."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
from ladder_cases import CANARY, EXPORT, LADDER, Commands, final_of, logged, run_of
from run_cases import Result, call

from albor import group_directory
from albor.config import RunConfig
from albor.export import hf
from albor.filelock import lock_file
from albor.ladder import climb, gates, readback
from albor.ladder.file import CanaryGate
from albor.ladder.gates import RunLog
from albor.ladder.readback import read_back
from albor.train.step import Trainer

STATE = Path("runs/steps/ladder.json")
# Few rows and steps: what the stand-ins' runs show is said per test.
GATES = "gates: {unigram: {by_step: 12}, validation: {gap: 9}, speed: {fraction: 0.1}}\n"


@pytest.fixture
def ladder(config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny.yaml").write_text(config.read_text())
    path = tmp_path / "ladder.yaml"
    path.write_text(LADDER + GATES)
    return path


@pytest.fixture
def commands(monkeypatch: pytest.MonkeyPatch) -> Commands:
    stand_in = Commands()
    stand_in.run = good
    monkeypatch.setattr(climb, "Child", stand_in)
    return stand_in


def good(config: RunConfig) -> RunLog:
    """A run that passes: its loss falls to 0.4, below what pairs of these few words can say."""
    rows = [{**row, **{key: row[key] / 5 for key in row if key.endswith("/loss")}} for row in logged(config)]
    return run_of(config, rows, loss=0.4)


def up(path: Path, *arguments: str) -> Result:
    return call("ladder", path, *arguments)


def results(content: dict[str, Any], rung: int) -> dict[str, str]:
    return {gate["gate"]: gate["status"] for gate in content["rungs"][rung]["gates"]}


def test_all_the_way_up(ladder: Path, commands: Commands):
    result = up(ladder, "--json")
    assert result.code == 0, result.err
    assert commands.names() == [
        *("canary one", "verify-resume one", "train one", "export one"),
        *("canary two", "verify-resume two", "train two", "export two"),
    ]
    content = json.loads(result.out)
    assert (content["passed"], content["ended_by"]) == (True, None)
    assert set(results(content, 0).values()) == set(results(content, 1).values()) == {"passed"}
    assert len(results(content, 1)) == 11
    assert all(gate["why"] and not gate["look_at"] for gate in content["rungs"][0]["gates"])
    one, two = content["rungs"]
    assert "no run has been observed" in one["prediction"]["not_predicted"]
    assert two["prediction"]["low"] < two["prediction"]["loss"] < two["prediction"]["high"]
    assert two["comparison"]["loss"] == two["result"]["loss"] == 0.4
    assert two["predicted_speed"]["hours"] > 0
    report = Path(content["report"]).read_text()
    assert "| one | verify_resume | passed |" in report
    assert two["prediction"]["method"] in report


def test_the_same_command_finds_it_done(ladder: Path, commands: Commands):
    up(ladder)
    before, commands.called = STATE.read_bytes(), []
    result = up(ladder)
    assert (result.code, commands.called) == (0, [])
    assert STATE.read_bytes() == before
    assert "one: has passed" in result.out


@pytest.mark.parametrize(
    ("command", "kept"),
    [("canary", []), ("verify-resume", ["canary"]), ("train", ["canary", "verify-resume"])],
)
def test_killed_anywhere_it_goes_on_there(ladder: Path, commands: Commands, command: str, kept: list[str]):
    """As kill -9 does it: nothing that is behind the command is run, and nothing cleaned up."""

    class Killed(BaseException):
        pass

    def kill(config: RunConfig) -> Any:
        raise Killed

    answer, commands.answers[command] = commands.answers[command], kill
    with pytest.raises(Killed):
        up(ladder)
    commands.answers[command], commands.called = answer, []
    result = up(ladder, "--json")
    assert result.code == 0, result.err
    assert json.loads(result.out)["passed"]
    assert not {f"{one} one" for one in kept} & set(commands.names()), "what had passed is judged again"
    assert commands.names()[0] == f"{command} one"


def test_a_rung_that_has_been_trained_is_not_trained_again(ladder: Path, commands: Commands):
    """Killed between the end of the training and the note of it, or with the notes lost."""
    up(ladder)
    STATE.unlink()
    commands.called = []
    result = up(ladder, "--json")
    assert json.loads(result.out)["passed"]
    assert not [name for name in commands.names() if name.startswith("train")]


def test_a_run_directory_that_is_gone_is_trained_again(ladder: Path, commands: Commands):
    up(ladder)
    shutil.rmtree("runs/steps/two")
    commands.called = []
    assert up(ladder).code == 0
    assert commands.names() == ["train two", "export two"]


def test_what_a_run_was_does_not_stand_for_the_one_after_it(ladder: Path, commands: Commands):
    up(ladder)
    shutil.rmtree("runs/steps/two")
    commands.run = lambda config: dataclasses.replace(good(config), final=final_of(config, 0.3))
    rung = json.loads(up(ladder, "--json").out)["rungs"][1]
    assert (rung["result"]["loss"], rung["comparison"]["loss"]) == (0.3, 0.3)
    # The same, trained by hand.
    final = Path("runs/steps/two/eval/final.json")
    final.write_text(final.read_text().replace("0.3", "9.9"))
    result = up(ladder, "--json")
    rung = json.loads(result.out)["rungs"][1]
    assert "two: has been trained anew since" in result.err
    assert (result.code, rung["result"]["loss"], rung["state"]) == (1, 9.9, "failed")


@pytest.mark.parametrize("content", ["seed: [", None])
def test_a_run_of_which_nobody_can_say_what_it_was(ladder: Path, commands: Commands, content: str | None):
    up(ladder)
    path = Path("runs/steps/one/config.resolved.yaml")
    path.unlink() if content is None else path.write_text(content)
    commands.called = []
    result = up(ladder)
    assert (result.code, "one has been trained, and what it was cannot be read" in result.err) == (2, True)
    assert (result.err.count("\n"), commands.called) == (1, [])


def test_lines_that_are_no_rows_are_said(ladder: Path, commands: Commands):
    up(ladder)
    STATE.unlink()
    with open("runs/steps/one/metrics.jsonl", "a") as file:
        file.write('{"step": 3, "train\n')
    result = up(ladder)
    number = Path("runs/steps/one/metrics.jsonl").read_text().count("\n")
    assert f"one: runs/steps/one/metrics.jsonl:{number}: not a row of metrics, and left out" in result.out
    assert result.code == 0


# Gates that fail


def fails(commands: Commands, gate: str) -> None:
    """Makes one gate, and no other, fail."""

    def spoilt(config: RunConfig) -> RunLog:
        run = good(config)
        rows = [dict(row) for row in run.rows]
        trained = [row for row in rows if "train/loss" in row]
        if gate == "unigram":
            for row in rows[:-1]:
                row |= {key: 6.0 for key in row if key.endswith("/loss") and row["step"] <= 12}
        elif gate == "bigram":
            return dataclasses.replace(run, final=final_of(config, 3.0))
        elif gate == "gradients":
            trained[9]["gradients/embedding"] = 0.0
        elif gate == "skipped_steps":
            events = [{"event": "skipped_step", "step": step, "action": "skipped"} for step in (2, 3, 4)]
            return dataclasses.replace(run, events=events)
        elif gate == "validation":
            rows[-1]["val/loss"] += 0.2
        elif gate == "schedule_end":
            trained[-1]["train/lr"] *= 2
        elif gate == "speed":
            for row in trained[5:]:
                row["train/tokens_per_second"] = 10.0
        return dataclasses.replace(run, rows=rows)

    commands.run = spoilt
    wrong = {"check": "logits", "compared": "9", "found": "0.3 apart", "passed": False}
    refused = {**EXPORT["exports"][0]["gate"], "passed": False, "checks": [wrong]}
    answers: dict[str, Any] = {
        "canary": (1, {**CANARY, "verdict": "FAIL", "explanation": ["FAIL: loss"]}),
        "verify-resume": (1, {"identical": False, "comparisons": []}),
        "export": (1, {"exports": [{"gate": refused}]}),
    }
    command = gate.replace("_", "-")
    if command in answers:
        commands.answers[command] = lambda config: answers[command]


@pytest.mark.parametrize(
    "gate",
    [
        *("canary", "verify_resume", "unigram", "bigram", "gradients"),
        *("skipped_steps", "validation", "schedule_end", "export", "speed"),
    ],
)
def test_a_gate_that_fails_ends_the_ladder(ladder: Path, commands: Commands, gate: str):
    fails(commands, gate)
    result = up(ladder, "--json")
    assert result.code == 1
    content = json.loads(result.out)
    assert [name for name, status in results(content, 0).items() if status == "failed"] == [gate]
    assert not any("two" in name for name in commands.names())
    (line,) = (
        line for line in result.err.splitlines() if line.startswith(f"one: {gate}: ") and "wanted" in line
    )
    assert "Look at" in line
    assert f"gates.{gate} in {ladder} has its thresholds" in result.err
    failed = next(one for one in content["rungs"][0]["gates"] if one["gate"] == gate)
    assert failed["look_at"]
    assert failed["measured"] in Path(content["report"]).read_text().replace("\\|", "|")


def test_what_has_failed_is_judged_again_and_goes_on_where_it_can(ladder: Path, commands: Commands):
    fails(commands, "validation")
    assert up(ladder).code == 1
    assert up(ladder).code == 1, "the same run, the same gate"
    ladder.write_text((LADDER + GATES).replace("gap: 9", "gap: 9, rise: 1"))
    commands.called, commands.run = [], good
    result = up(ladder)
    assert result.code == 0, result.err
    assert commands.names()[0] == "canary two", "the first rung had been trained, and all else had passed"


def test_a_gate_is_left_out_and_the_report_says_so(ladder: Path, commands: Commands):
    fails(commands, "bigram")
    ladder.write_text((LADDER + GATES).replace("gates: {", "gates: {canary: false, bigram: false, "))
    result = up(ladder, "--json")
    assert result.code == 0, result.err
    assert "canary one" not in commands.names()
    content = json.loads(result.out)
    assert results(content, 0)["bigram"] == results(content, 0)["canary"] == "left out"
    assert "| one | bigram | left out |" in Path(content["report"]).read_text()


def test_an_early_gate_stops_the_training(ladder: Path, commands: Commands, monkeypatch: pytest.MonkeyPatch):
    """The loss is not below the unigram entropy by its step: the rest of the run is not paid for."""
    fails(commands, "unigram")
    part = commands.run
    commands.run = lambda config: RunLog(config, part(config).rows[:14], [])
    stopped = []
    monkeypatch.setattr(commands, "stop", lambda: stopped.append(True), raising=False)

    def wait(children: Any, is_stopped: Any) -> Any:
        if is_stopped():
            commands.stop()
            commands.code = 75
        return children[0]

    monkeypatch.setattr(climb, "wait_for_one", wait)
    result = up(ladder)
    assert (result.code, stopped) == (1, [True])
    assert "one: unigram: " in result.err
    commands.called = []
    assert up(ladder).code == 1
    assert commands.called == [], "what lies on the disk has failed already"


def test_without_another_program_albor_reads_its_export_back(
    ladder: Path, commands: Commands, monkeypatch: pytest.MonkeyPatch
):
    gate = {**EXPORT["exports"][0]["gate"], "passed": None, "checks": [], "unchecked": "it is not installed"}
    commands.answers["export"] = lambda config: (0, {"exports": [{"gate": gate}]})
    for passed, status in ((False, "failed"), (True, "passed")):
        rows = [{"check": "weights", "compared": "1", "found": "1 differ", "passed": passed}]
        read = {"passed": passed, "runtime": "albor's own reader", "checks": rows}
        monkeypatch.setattr(readback, "read_back", lambda run, exported, read=read: read)
        content = json.loads(up(ladder, "--json").out)
        assert results(content, 0)["export"] == status
        (found,) = (one for one in content["rungs"][0]["gates"] if one["gate"] == "export")
        assert "albor's own reader" in found["measured"]
        assert "it is not installed" in found["measured"]


def test_a_rung_that_does_not_fit_is_said_before_any_is_trained(ladder: Path, commands: Commands):
    ladder.write_text(LADDER.replace("model.hidden_size=48", "model.hidden_size=1M") + GATES)
    result = up(ladder, "--json")
    assert (result.code, commands.called) == (4, [])
    assert "two: " in result.err
    assert results(json.loads(result.out), 1) == {"fits": "failed"}


# Changes


def test_a_rung_that_has_been_trained_may_not_change(ladder: Path, commands: Commands):
    up(ladder)
    commands.called = []
    ladder.write_text(
        (LADDER + GATES).replace("tokens: 1536", "tokens: 1536, overrides: [optimizer.lr=2e-2]")
    )
    result = up(ladder)
    assert (result.code, commands.called) == (2, [])
    assert result.err.startswith(
        f"albor: {ladder}:5: rungs[0]: one has been trained, and was another run then: "
    )
    assert "optimizer.lr 0.01 -> 0.02; undo that, rename the rung, or remove runs/steps/one" in result.err


def test_a_change_touches_its_own_rung_alone(ladder: Path, commands: Commands):
    fails(commands, "verify_resume")
    commands.answers["verify-resume"] = lambda config: (
        (0, {"identical": True, "comparisons": []})
        if config.name == "one"
        else (1, {"identical": False, "comparisons": []})
    )
    assert up(ladder).code == 1
    commands.called = []
    ladder.write_text((LADDER + GATES).replace("hidden_size=48", "hidden_size=64"))
    assert up(ladder).code == 1
    assert commands.names() == ["canary two", "verify-resume two"]


# --from, budgets, data


def test_from_says_what_it_skips(ladder: Path, commands: Commands):
    result = up(ladder, "--from", "two", "--json")
    assert result.code == 0, result.err
    assert "one: SKIPPED by --from, and has not passed its gates" in result.err
    assert not any("one" in name for name in commands.names())
    content = json.loads(result.out)
    assert [rung["state"] for rung in content["rungs"]] == ["skipped", "passed"]
    assert up(ladder, "--from", "three").code == 2
    commands.called = []
    assert up(ladder).code == 0
    assert commands.names() == ["canary one", "verify-resume one", "train one", "export one"]


def test_hours_become_tokens_once(ladder: Path, commands: Commands):
    text = LADDER.replace("tokens: 1536", "hours: 0.001") + GATES
    ladder.write_text(text)
    result = up(ladder, "--json")
    assert result.code == 0, result.err
    assert commands.names()[:2] == ["train one", "canary one"], "the timed steps come first"
    assert "train.max_steps=12" in commands.called[0]
    assert json.loads(result.out)["passed"] is True
    budget = json.loads(result.out)["rungs"][0]["budget"]
    # 3.6 seconds at the 1,001 tokens/s (median) that the stand-in logs, in whole steps of 96 tokens.
    assert budget["tokens"] == 3552
    assert json.loads(result.out)["rungs"][0]["result"]["tokens"] == 3552
    commands.called = []
    assert up(ladder).code == 0
    assert commands.called == []
    STATE.unlink()
    again = json.loads(up(ladder, "--json").out)
    assert again["rungs"][0]["budget"]["tokens"] == 3552, "the run says how long it is"
    assert not any(name.startswith("train") for name in commands.names())
    ladder.write_text(text.replace("0.001", "0.002"))
    changed = up(ladder)
    assert (changed.code, "rungs[0]: one has been trained" in changed.err) == (2, True)


def test_more_tokens_than_the_data_has_are_refused_before_anything_is_trained(
    ladder: Path, commands: Commands
):
    ladder.write_text(LADDER.replace("tokens: 2304", "tokens: 1M") + GATES)
    result = up(ladder)
    assert (result.code, commands.called) == (2, [])
    assert result.err.startswith(f"albor: {ladder}:6: rungs[1].tokens: ")
    assert "data.max_epochs allows 10" in result.err


# Ends


@pytest.mark.parametrize(("code", "given"), [(3, 3), (4, 4), (75, 75), (1, 1), (-9, 1)])
def test_how_a_rung_ends_is_how_the_ladder_ends(ladder: Path, commands: Commands, code: int, given: int):
    commands.answers["train"] = lambda config: (code, None)
    result = up(ladder, "--json")
    assert result.code == given
    assert "one: albor train " in result.err
    assert "train has spoken" in result.err
    assert json.loads(result.out)["ended_by"]


def test_a_state_file_that_is_not_ours_is_refused_and_kept(ladder: Path, commands: Commands):
    STATE.parent.mkdir(parents=True)
    for content, said in (
        ('{"version": 2, "rungs": {}}', "has version 2, and this albor reads version 1"),
        ('{"version": 1, "rung', "is damaged"),
        ('{"version": 1}', "is not what a ladder writes"),
    ):
        STATE.write_text(content)
        result = up(ladder)
        assert (result.code, said in result.err, "move it away" in result.err) == (1, True, True)
        assert STATE.read_text() == content
    assert commands.called == []


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("gates", []),
        ("gates", {"fits": 3}),
        ("gates", {"fits": {"key": {}, "result": {}}}),
        ("result", 3),
        ("result", {"sha256": "x", "value": {}}),
        ("baselines", {"sha256": "x", "value": {"unigram": 3.0}}),
        ("prediction", {"sha256": "x"}),
        ("budget", 7),
    ],
)
def test_a_state_file_that_is_damaged_inside(ladder: Path, commands: Commands, key: str, value: Any):
    up(ladder)
    content = json.loads(STATE.read_text())
    content["rungs"]["one"][key] = value
    STATE.write_text(json.dumps(content))
    commands.called = []
    result = up(ladder)
    assert (result.code, "is not what a ladder writes" in result.err) == (1, True)
    assert (json.loads(STATE.read_text()), commands.called) == (content, [])


def test_a_directory_that_cannot_be_locked_is_said(
    ladder: Path, commands: Commands, monkeypatch: pytest.MonkeyPatch
):
    unlocked = (os.open(ladder, os.O_RDONLY), "No locks available")
    monkeypatch.setattr(group_directory, "lock_file", lambda path: unlocked)
    result = up(ladder)
    assert (result.code, "runs/steps cannot be locked (No locks available)" in result.out) == (0, True)


@pytest.mark.parametrize(("file", "owner"), [("config.resolved.yaml", "a run"), ("sweep.json", "a sweep")])
def test_a_directory_of_something_else_is_left_alone(ladder: Path, commands: Commands, file: str, owner: str):
    STATE.parent.mkdir(parents=True)
    (STATE.parent / file).write_text("")
    result = up(ladder)
    assert (result.code, f"runs/steps is {owner}'s directory" in result.err) == (1, True)
    assert [path.name for path in STATE.parent.iterdir()] == [file]


def test_a_second_ladder_waits(ladder: Path, commands: Commands):
    STATE.parent.mkdir(parents=True)
    held = lock_file(STATE.parent / ".lock")
    assert held is not None
    result = up(ladder)
    os.close(held[0])
    assert (result.code, "another albor ladder" in result.err) == (1, True)


def test_a_signal_leaves_the_ladder_to_go_on(ladder: Path, commands: Commands):
    def interrupted(config: RunConfig) -> Any:
        signal.raise_signal(signal.SIGTERM)
        return 75, None

    train, commands.answers["train"] = commands.answers["train"], interrupted
    result = up(ladder)
    assert (result.code, "the same command goes on" in result.err) == (75, True)
    commands.answers["train"], commands.called = train, []
    assert up(ladder).code == 0
    assert commands.names()[0] == "train one"


# Real commands, broken on purpose, as the gates read them


def test_a_real_canary_and_one_that_is_broken(config: Path, monkeypatch: pytest.MonkeyPatch):
    asked = ("canary", config, "--steps", 2, "--reference", "oracle", "--json")
    monkeypatch.chdir(config.parent)
    right = call(*asked)
    assert gates.canary(CanaryGate(steps=2), right.code, json.loads(right.out)).status == "passed"
    real = Trainer.update
    # Weights that move at twice the learning rate.
    monkeypatch.setattr(
        Trainer,
        "update",
        lambda self, sums, state: real(self, sums, dataclasses.replace(state, step=state.step * 2 + 1)),
    )
    wrong = call(*asked)
    found = gates.canary(CanaryGate(steps=2), wrong.code, json.loads(wrong.out))
    assert found.status == "failed", found


def test_a_real_export_that_is_broken(
    config: Path, whole: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    run = config.parent / "runs" / "tiny"
    real = hf.config_json
    monkeypatch.setattr(hf, "config_json", lambda *given: real(*given) | {"rms_norm_eps": 1e-1})
    wrong = call("export", run, "--to", "hf", "--out", tmp_path / "wrong", "--json")
    found = gates.export(wrong.code, json.loads(wrong.out))
    assert found.status == "failed"
    assert "logits" in found.measured


def test_an_export_that_albor_reads_back(
    config: Path, whole: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    run, out = config.parent / "runs" / "tiny", tmp_path / "out"
    assert call("export", run, "--to", "hf", "--out", out, "--no-check").code == 0
    found = read_back(run, out)
    assert [(row["check"], row["found"], row["passed"]) for row in found["checks"]] == [
        ("weights", "equal", True),
        ("tokens of texts", "equal", True),
    ]
    content = bytearray((out / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (out / "model.safetensors").write_bytes(content)
    spoilt = read_back(run, out)
    assert spoilt["passed"] is False
    assert spoilt["checks"][0]["found"].startswith("1 differ, ")
    (out / "config.json").write_text("{}")
    assert read_back(run, out)["checks"][0]["check"] == "loads"
