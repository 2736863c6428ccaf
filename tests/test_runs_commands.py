"""`albor runs ls`, `show` and `compare`: what they say of runs, whole and damaged, and their exit codes."""

from __future__ import annotations

import io
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from recorded_runs import BEGAN, small_config, write_run
from rich.console import Console
from run_cases import call, rows, tree, write_project

from albor import checkpoint, manifest
from albor.config import DataConfig, OptimizerConfig, ScheduleConfig, TrainConfig
from albor.configfile import dump_config, load_config
from albor.runs import details
from albor.runs.compare import compare, flatten, labels_of
from albor.runs.details import gather
from albor.runs.listing import SORTS, run_listing
from albor.runs.record import find_runs, open_run
from albor.runs.summary import _written_out, summarise

ROOT = Path(__file__).parents[1]


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Four runs in `runs`, two of them a ladder's, and no run of the user's to find."""
    home = tmp_path / "some place" / "runs"
    monkeypatch.chdir(tmp_path)
    write_run(home / "one", loss=3.0)
    write_run(home / "two", loss=2.5, steps=60, ending="stopped", began=BEGAN.replace(hour=11))
    write_run(home / "big" / "50m", loss=4.0, ending=None)
    write_run(home / "big" / "one", loss=3.5, ending="failed")
    (home / "big" / "ladder.json").write_text("{}")
    return home


# ls


def listed(*arguments: object) -> list[dict[str, Any]]:
    result = call("runs", "ls", *arguments, "--json")
    assert (result.code, result.err) == (0, "")
    return json.loads(result.out)["runs"]


def test_runs_are_listed_with_what_matters_of_them(runs: Path):
    before = tree(runs)
    result = call("runs", "ls", runs)
    assert (result.code, result.err) == (0, "")
    heading, *lines = result.out.splitlines()
    assert heading.split("  ")[0] == "run"
    assert [line.split("  ")[0] for line in lines if not line.startswith("  ")] == [
        "two", "big/ (ladder, 2 runs)", "one"
    ]  # fmt: skip
    assert re.search(
        r"^two +stopped +60/100 +2\.5400 +0\.8467 +123k +1\.0k +2026-11-01 ..:.. +", result.out, re.M
    )
    assert re.search(r"^  one +failed +100/100 +3\.5200 ", result.out, re.M)
    assert "\x1b" not in result.out
    assert tree(runs) == before


def test_the_list_for_programs(runs: Path):
    two, small, other, one = listed(runs)
    assert (small["name"], small["group"], small["state"]) == ("50m", "big", "lost")
    assert (other["name"], one["name"]) == ("one", "one")  # told apart by their directories
    assert other["directory"] != one["directory"]
    tokens = small_config().tokens_per_step
    assert two["best_val/loss"] == pytest.approx(2.54)
    assert two | {"best_val/loss": None, "bytes": None} == {
        "name": "two", "directory": str(runs / "two"), "group": None, "state": "stopped", "reason": None,
        "step": 60, "steps": 100, "tokens": 60 * tokens, "train/loss": 2.5 + 1 / 60, "best_val/loss": None,
        "best_step": 50, "best_val/bits_per_byte": pytest.approx(2.54 / 3),
        "train/tokens_per_second": 1000.0, "began": "2026-11-01T11:00:00+00:00",
        "written": "2026-11-01T11:01:00+00:00", "bytes": None,
    }  # fmt: skip
    assert two["bytes"] == sum(path.stat().st_size for path in (runs / "two").rglob("*") if path.is_file())


def test_the_list_is_sorted_and_filtered(runs: Path):
    assert [run["best_val/loss"] for run in listed(runs, "--sort", "loss")] == pytest.approx(
        [2.54, 3.02, 3.52, 4.02]
    )
    assert [run["step"] for run in listed(runs, "--sort", "step")] == [100, 100, 100, 60]
    for by in SORTS:
        assert len(listed(runs, "--sort", by)) == 4
    assert [run["name"] for run in listed(runs, "--state", "lost,stopped")] == ["two", "50m"]
    assert [run["name"] for run in listed(runs, "--state", "failed", "--state", "lost")] == ["50m", "one"]
    nothing = call("runs", "ls", runs, "--state", "diverged")
    assert (nothing.code, nothing.out) == (0, f"{runs}: 4 runs, and none is diverged\n")


def test_what_ls_does_not_understand_is_refused_at_once(runs: Path):
    result = call("runs", "ls", runs / "none", "--sort", "luck", "--state", "idle")
    assert result.code == 2
    for part in ("none does not exist", "--sort: 'luck'", "--state: 'idle'"):
        assert part in result.err
    (runs / "empty").mkdir()
    empty = call("runs", "ls", runs / "empty")
    assert (empty.code, empty.err) == (0, "")
    assert "no runs here" in empty.out


def test_a_narrow_terminal_gets_fewer_columns_and_is_told(runs: Path):
    def width(columns: int) -> list[str]:
        file = io.StringIO()
        console = Console(file=file, width=columns, force_terminal=True, color_system=None)
        run_listing(runs, "began", [], False, console)
        return re.sub(r"\x1b\[[0-9;]*m", "", file.getvalue()).splitlines()

    assert max(map(len, width(60))) <= 60
    assert any("no room for" in line and "when" in line for line in width(60))
    assert not any("no room for" in line for line in width(200))


def test_a_damaged_log_is_named_once_and_the_run_is_listed(runs: Path):
    log = runs / "one" / "metrics.jsonl"
    lines = log.read_text().splitlines(keepends=True)
    log.write_text("".join([*lines[:-2], "garbage\n", *lines[-2:], '{"step": 999, "to']))
    result = call("runs", "ls", runs)
    assert result.code == 0
    assert result.err == f"albor: {log}:11: not a row of metrics, and left out\n"
    assert re.search(r"^one +finished +100/100 +3\.0200 ", result.out, re.M)


@pytest.mark.parametrize("left", [(), ("events.jsonl",), ("metrics.jsonl",), (".lock",)])
def test_a_run_of_which_little_is_left_is_listed_and_shown(tmp_path: Path, left: tuple[str, ...]):
    run = write_run(tmp_path / "run")
    for path in run.iterdir():
        if path.name not in left and path.name != "config.resolved.yaml":
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    if left:
        (run / "config.resolved.yaml").unlink()
    assert len(listed(tmp_path)) == 1
    assert call("runs", "show", run).code == 0


def test_the_best_evaluation_counts_and_not_the_last(tmp_path: Path):
    run = write_run(tmp_path / "run", steps=50)
    with open(run / "metrics.jsonl", "w") as log:
        for step, loss in ((40, None), (60, 1.25), (70, 2.0), (80, None)):
            row = {"step": step, "tokens": step, "val/loss": loss, "val/bits_per_byte": 0.5 + step / 1000}
            log.write(json.dumps(row | ({"non_finite": {"val/loss": "nan"}} if loss is None else {})) + "\n")
    figure = gather(open_run(run)).figures["val/loss"]
    assert (figure.best, figure.best_step, figure.step) == (1.25, 60, 80)
    found = summarise(open_run(run))
    assert (found.best_loss, found.best_step, found.bits_per_byte) == (1.25, 60, 0.56)
    assert found.step == 80


@pytest.mark.parametrize("config", sorted((ROOT / "configs").glob("pretrain-*.yaml")), ids=lambda p: p.stem)
def test_the_steps_of_a_list_are_those_of_the_configuration(config: Path, tmp_path: Path):
    whole = load_config(config)
    written = tmp_path / "config.resolved.yaml"
    written.write_text(dump_config(whole))
    assert summarise(open_run(tmp_path)).steps == whole.steps
    assert _written_out(written)["train.micro_batch_size"] == whole.train.micro_batch_size
    inline = re.sub(r"^train:\n((?:  .*\n)+)", "train: {max_steps: 7}\n", written.read_text(), flags=re.M)
    written.write_text(re.sub(r"warmup_steps: \d+", "warmup_steps: 1", inline))
    assert summarise(open_run(tmp_path)).steps == 7  # not as a run writes it


def test_a_list_parses_the_last_rows_and_no_configuration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    write_run(tmp_path / "run", steps=100_000, every=100)
    parsed = []
    count: Callable[[bytes], Any] = __import__("albor.runlog", fromlist=["parse_row"]).parse_row
    monkeypatch.setattr("albor.runs.summary.parse_row", lambda line: parsed.append(line) or count(line))
    monkeypatch.setattr("albor.runs.record.load_config", None)
    found = summarise(find_runs(tmp_path)[0])
    assert (found.step, found.steps) == (100_000, 100)
    assert len(parsed) < 10 + 200 + 3  # of 1,200: the last, the evaluations, two events


# show


def test_names_that_stand_for_those_of_checkpoints(tmp_path: Path):
    assert (details.CHECKPOINTS, details.BEST) == (checkpoint.CHECKPOINTS, checkpoint.BEST)
    assert details.MANIFEST == manifest.MANIFEST
    assert details.STEP_NAME.pattern == checkpoint._STEP_NAME.pattern


def test_one_page_of_a_run(runs: Path):
    happened = [
        {"event": "skipped_step", "step": 7},
        {"event": "skipped_step", "step": 8},
        {"event": "skipped_step", "step": 8},
        {"event": "rollback", "step": 5},
        {"event": "alert", "step": 20, "rule": "train/loss > 3"},
        {"event": "resumed", "step": 30},
        {"event": "config_changed", "step": 30, "key": "optimizer.lr", "before": 0.1, "after": 0.2},
        {"event": "environment_changed", "step": 30, "key": "torch", "before": "2.12", "after": "2.13"},
        {"event": "memory", "step": 10, "components": {"process": {"planned": 2**30, "measured": 2**29}}},
    ]
    run = write_run(runs / "busy", happened=happened)
    (run / "checkpoints" / "best.json").write_text('{"step": 100, "val/loss": 3.02}')
    (run / "checkpoints" / "step-00000200").mkdir()
    before = tree(run)
    result = call("runs", "show", run)
    assert (result.code, result.err) == (0, "")
    text = result.out
    for part in (
        f"{run}: finished",
        "step 100 of 100, 205k tokens",
        "115,008 parameters",
        "100.0%  python-stdlib",
        "3 steps skipped, steps 7, 8 (2 times)",
        "1 rollback, step 5",
        "1 alert, step 20: train/loss > 3",
        "1 resume, step 30",
        "changed at step 30: optimizer.lr 0.1 -> 0.2",
        "changed at step 30: torch 2.12 -> 2.13",
        "val/loss 3.0000",
        "albor generate",
    ):
        assert part in text, part
    assert re.search(r"process +1\.00 GiB +0\.50 GiB", text)
    assert re.search(r"val/loss +3\.0200 +100 +3\.0200 +100", text)
    assert re.search(r"step 100 +0\.0 MiB +best, a resume goes on from here", text)
    assert re.search(r"step 200 +0\.0 MiB +has no manifest", text)
    assert "\x1b" not in text
    assert tree(run) == before


def test_the_page_for_programs(runs: Path):
    result = call("runs", "show", runs / "one", "--json")
    shown = json.loads(result.out)
    assert (shown["state"], shown["step"], shown["steps"], shown["parameters"]) == (
        "finished",
        100,
        100,
        115_008,
    )
    assert shown["metrics"]["val/loss"] == {"last": 3.02, "step": 100, "best": 3.02, "best_step": 100}
    assert shown["checkpoints"] == [{"step": 100, "bytes": 300, "best": False, "whole": True}]
    assert (shown["seconds"], shown["final"]["val/loss"], shown["problems"]) == (100.0, 3.0, [])


def test_time_between_processes_is_not_training(tmp_path: Path):
    again = {"event": "resumed", "step": 40, "time": "2026-11-02T12:00:00+00:00"}
    stopped = {"event": "stopped", "step": 40, "time": "2026-11-01T12:00:40+00:00"}
    done = [{"event": "checkpoint", "step": 90, "time": "2026-11-02T12:00:50+00:00"}]
    run = write_run(tmp_path / "run", steps=40, happened=[stopped, again, *done], ending=None)
    assert gather(open_run(run)).seconds == 40 + 50


def test_damage_is_named_and_the_rest_is_shown(runs: Path):
    run = runs / "one"
    with open(run / "metrics.jsonl", "a") as log:
        log.write("{]\n")
    (run / "plan.json").write_text("[]")
    (run / "checkpoints" / "best.json").write_text("{}")
    (run / "config.resolved.yaml").write_text(
        (run / "config.resolved.yaml").read_text().replace("seed: 1337", "seed: 1337\nwarp: 9")
    )
    result = call("runs", "show", run)
    assert result.code == 0
    for part in ("metrics.jsonl:13: not a row", "plan.json: not what a run writes", "best.json: does not say",
                 "config.resolved.yaml:4: warp: unknown to this albor; it is left out",
                 "115,008 parameters", "val/loss"):  # fmt: skip
        assert part in result.out, part
    assert result.out.count("metrics.jsonl:13") == 1


def test_a_configuration_that_means_nothing(runs: Path):
    run = runs / "one"
    (run / "config.resolved.yaml").write_text("name: [\n")
    result = call("runs", "show", run)
    assert result.code == 0
    assert "config.resolved.yaml:2: is not valid YAML" in result.out
    assert "val/loss" in result.out
    assert call("runs", "compare", run, runs / "two").code == 0


def test_what_is_no_run_is_refused(runs: Path):
    for command in (("show", runs), ("compare", runs, runs / "one")):
        result = call("runs", *command)
        assert (result.code, result.out) == (2, "")
        assert f"{runs} is no run, and holds" in result.err
    result = call("runs", "compare", runs / "x", runs / "one", runs / "y")
    assert (result.err.count("does not exist"), result.code) == (2, 2)
    assert call("runs", "compare", runs / "one").code == 2


def test_how_to_go_on_from_where_the_paths_hold(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    home = tmp_path / "my project"
    run = write_run(home / "runs" / "small", ending="stopped")
    monkeypatch.chdir(home)
    assert gather(open_run(Path("runs/small"))).next == "albor train runs/small/config.resolved.yaml"
    monkeypatch.chdir(tmp_path)
    there = gather(open_run(run)).next
    assert there == f"cd '{home.resolve()}' && albor train runs/small/config.resolved.yaml"
    moved = tmp_path / "other"
    run.rename(moved)
    found = gather(open_run(moved)).next
    assert found == f"albor train {moved}/config.resolved.yaml runs_dir={tmp_path} name=other"


def test_a_text_of_a_run_does_not_move_the_cursor(tmp_path: Path):
    run = write_run(tmp_path / "run", happened=[{"event": "alert", "step": 1, "rule": "a\x1b[2J\nb"}])
    with open(run / "events.jsonl", "a") as log:
        log.write(json.dumps({"event": "failed", "step": 3, "error": "\x1b]0;title\x07"}) + "\n")
    result = call("runs", "show", run)
    assert "\x1b" not in result.out
    assert "\x07" not in result.out


# compare


def test_differences_stand_key_by_key_and_results_side_by_side(tmp_path: Path):
    optimizer = OptimizerConfig(lr=1e-3)
    a = write_run(tmp_path / "a", config=small_config("a"), loss=3.0)
    b = write_run(tmp_path / "b", config=small_config("b", optimizer=optimizer), loss=2.0)
    result = call("runs", "compare", a, b)
    assert (result.code, result.err) == (0, "")
    assert re.search(r"^ +a +b$", result.out, re.M)
    assert re.search(r"^best val/loss +3\.0200 +2\.0200 \*$", result.out, re.M)
    assert re.search(r"^final val/bits_per_byte +1\.0000 +0\.6667 \*$", result.out, re.M)
    assert re.search(r"^tokens per second +1\.0k +1\.0k$", result.out, re.M)
    assert re.search(r"^  optimizer\.lr +0\.0003 +0\.001$", result.out, re.M)
    assert "optimizer.eps" not in result.out
    assert "optimizer.eps" in call("runs", "compare", a, b, "--all").out
    shown = json.loads(call("runs", "compare", a, b, "--json").out)
    assert shown["config"] == {"optimizer.lr": [0.0003, 0.001]}
    assert shown["results"]["best val/loss"] == {"values": [3.02, 2.02], "better": "b"}
    assert shown["notes"] == []


def test_runs_of_other_lengths_are_compared_where_both_have_been(tmp_path: Path):
    a = write_run(tmp_path / "a", steps=100, loss=3.0)
    b = write_run(tmp_path / "b", steps=75, every=5, loss=3.0)  # evaluated at 25, 50, 75
    found = compare([open_run(a), open_run(b)])
    tokens = 75 * small_config().tokens_per_step
    assert found.tokens == tokens
    (result,) = [r for r in found.results if r.name.startswith("val/loss at")]
    # The longer one between its evaluations at 50 and 100.
    assert result.values == pytest.approx((3 + (2 / 50 + 2 / 100) / 2, 3 + 2 / 75))
    assert found.labels[result.better] == "b"
    same = compare([open_run(a), open_run(write_run(tmp_path / "c", steps=100, loss=3.0))])
    assert not [r for r in same.results if " at " in r.name]
    assert {r.better for r in same.results} == {None}


@pytest.mark.parametrize(
    ("keys", "loss", "bits", "says"),
    [
        ({"data": DataConfig(validation_fraction=0.1)}, None, None, "data.validation_fraction"),
        ({"model": "vocab_size"}, None, 1, "model.vocab_size"),
        ({"train": TrainConfig(max_steps=100, micro_batch_size=4)}, None, None, "evaluate.batches x"),
        ({"schedule": ScheduleConfig(warmup_steps=3)}, 1, 1, None),
    ],
)
def test_what_is_not_the_same_measure_is_not_called_better(
    tmp_path: Path, keys: dict[str, Any], loss: int | None, bits: int | None, says: str | None
):
    if keys.get("model"):
        keys = {"model": small_config().model.model_copy(update={"vocab_size": 600})}
    a = write_run(tmp_path / "a", loss=3.0)
    b = write_run(tmp_path / "b", loss=2.0, config=small_config(**keys))
    found = compare([open_run(a), open_run(b)])
    results = {result.name: result for result in found.results}
    assert results["best val/loss"].better == loss
    assert results["best val/bits_per_byte"].better == bits
    assert bool(found.notes) == bool(says)
    assert says is None or says in found.notes[0]


def test_lists_of_sections_have_dotted_names_of_their_own():
    nested = {"a": {"b": 1, "c": []}, "s": [{"k": 1}, {"k": 2}], "l": [1, 2], "e": {}}
    assert flatten(nested) == {"a.b": 1, "a.c": [], "s[0].k": 1, "s[1].k": 2, "l": [1, 2], "e": {}}


def test_runs_with_one_name_are_told_apart_by_their_paths(runs: Path):
    assert labels_of([runs / "one", runs / "big" / "one", runs / "two"]) == (
        "runs/one",
        "big/one",
        "runs/two",
    )
    assert labels_of([runs / "one", runs / "two"]) == ("one", "two")
    assert labels_of([runs / "one", runs / "one"]) == ("one", "one")


def test_three_runs(runs: Path):
    shown = json.loads(call("runs", "compare", runs / "one", runs / "two", runs / "big/50m", "--json").out)
    assert shown["results"]["best val/loss"]["better"] == "two"
    assert [run["state"] for run in shown["runs"]] == ["finished", "stopped", "lost"]
    assert shown["results"]["final val/loss"] == {"values": [3.0, None, None], "better": None}


# A real one


def test_a_run_that_was_trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    project = write_project(tmp_path)
    short = ("train.max_steps=6", "schedule.warmup_steps=1", "evaluate.prompts=[]", "train.precision=fp32")
    assert call("train", project, *short).code == 0
    result = call("runs", "show", "runs/tiny", "--json")
    shown = json.loads(result.out)
    assert (result.code, result.err, shown["state"], shown["problems"]) == (0, "", "finished", [])
    assert (shown["step"], shown["steps"], shown["tokens"]) == (6, 6, 6 * 96)
    assert shown["metrics"]["val/loss"]["best"] == min(
        row["val/loss"] for row in rows(Path("runs/tiny")) if "val/loss" in row
    )
    assert shown["memory"]["process"]["planned"] > 0
    assert [saved["whole"] for saved in shown["checkpoints"]] == [True, True]
    assert shown["seconds"] is not None
    line = call("runs", "ls").out.splitlines()[1]
    assert re.search(r"^tiny +finished +6/6 +\d", line)


# What is wrong


def test_a_number_that_no_run_writes_is_a_damaged_line_for_every_reader(runs: Path):
    log = runs / "one" / "metrics.jsonl"
    huge = "1" + "0" * 400
    lines = log.read_text().splitlines()
    damaged = [lines[0].replace('"step": ', f'"step": {huge}', 1), f'{{"step": 2, "tokens": {huge}}}']
    assert all(huge in line for line in damaged)
    log.write_text("\n".join([lines[0], *damaged, *lines[1:]]) + "\n")
    assert [problem.split(":")[1] for problem in open_run(runs / "one").metrics().problems] == ["2", "3"]
    (runs / "one" / "eval").mkdir(exist_ok=True)
    (runs / "one" / "eval" / "final.json").write_text(f'{{"val/loss": {huge}, "val/perplexity": {huge}}}')
    for command in (
        ("runs", "show", runs / "one"),
        ("monitor", runs / "one", "--json"),
        ("report", runs / "one", "--out", runs / "one.html"),
    ):
        assert call(*command).code == 0
    found = json.loads(call("monitor", runs / "one", "--json").out)["problems"]
    assert "one: 2 damaged lines in its logs, left out; albor runs show says where" in " ".join(found)


def test_a_run_is_not_compared_with_itself(runs: Path):
    result = call("runs", "compare", runs / "one", runs / "two" / ".." / "one")
    assert result.code == 2
    assert "one is given twice; name each run once" in result.err


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full, which only Linux has")
@pytest.mark.parametrize("option", [(), ("--json",)])
def test_output_that_a_full_disk_does_not_take_is_no_bug_of_ours(runs: Path, option: tuple[str, ...]):
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-m", "albor", "runs", "ls", str(runs), *option]
        result = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, timeout=60)
    assert result.returncode == 1
    assert result.stderr == "albor: No space left on device; free some, and give the command again\n"
