"""Runs as a reader finds them: what a damaged directory still tells, states, and logs while they grow."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from recorded_runs import BEGAN, add_row, write_run
from run_cases import tree

from albor.errors import ConfigError
from albor.runs import owner
from albor.runs.follow import Follower
from albor.runs.owner import LOCK, is_locked, read_owner, this_process
from albor.runs.record import find_runs, open_run
from albor.runs.state import State, standing, state_of
from albor.train.metrics import MetricsLog
from albor.train.run_directory import claim


def append(path: Path, text: str) -> None:
    with open(path, "a") as file:
        file.write(text)


# What a directory tells


def test_a_run_is_read(tmp_path: Path):
    run = open_run(write_run(tmp_path / "a run"))
    assert (run.name, run.config.steps, run.problems) == ("a run", 100, ())
    assert run.environment["torch"] == "2.13.0"
    metrics = run.metrics()
    assert metrics.series("val/loss") == ([50, 100], [3.04, 3.02])
    assert metrics.series("train/mfu") == ([], [])
    assert metrics.names[0] == "train/loss"
    assert "train/mfu" in metrics.names
    assert not {"step", "tokens", "time"} & set(metrics.names)
    assert metrics.tokens_at(50) == 50 * run.config.tokens_per_step
    assert metrics.tokens_at(51) is None
    assert [event["event"] for event in run.events()] == ["started", "checkpoint", "finished"]
    assert run.final()["val/loss"] == 3.0


def test_what_is_not_finite_comes_back(tmp_path: Path):
    run = write_run(tmp_path / "run")
    add_row(run, 110, train__loss=math.nan, train__lr=None)
    add_row(run, 120, train__loss=-math.inf)
    steps, values = open_run(run).metrics().series("train/loss")
    assert steps[-2:] == [110, 120]
    assert math.isnan(values[-2])
    assert values[-1] == -math.inf
    assert open_run(run).metrics().series("train/lr")[0][-1] == 100


def test_a_damaged_file_is_named_with_its_line_and_the_rest_is_there(tmp_path: Path):
    run = write_run(tmp_path / "run")
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    lines[2:4] = ['{"step": 30, "tok\n', "[1]\n", '{"tokens": 5}\n']
    (run / "metrics.jsonl").write_text("".join(lines) + '{"step": 110, "torn')
    (run / "env.json").write_text('{\n "albor": \n')
    (run / "config.resolved.yaml").write_text("name: x\nwarp: 1\n")
    append(run / "events.jsonl", "[" * 100_000 + "\n")
    found = open_run(run)
    assert found.config is None
    assert found.environment == {}
    assert f"{run}/config.resolved.yaml:2: warp: unknown to this albor" in "\n".join(found.problems)
    assert any(problem.startswith(f"{run}/env.json:3: ") for problem in found.problems)
    metrics = found.metrics()
    assert len(metrics.rows) == 10
    named = [f"{run}/metrics.jsonl:{line}: not a row of metrics, and left out" for line in (3, 4, 5)]
    assert list(metrics.problems) == named
    events, problems = found.event_log()
    assert len(events) == 3
    assert problems == (f"{run}/events.jsonl:4: not an event, and left out",)


def test_many_bad_lines_are_counted(tmp_path: Path):
    run = write_run(tmp_path / "run")
    append(run / "metrics.jsonl", "x\n" * 1500)
    problems = open_run(run).metrics().problems
    assert len(problems) == 11
    assert problems[-1] == f"{run}/metrics.jsonl: and 1,490 more such lines"


def test_rows_that_a_killed_run_wrote_again_count_once(tmp_path: Path):
    run = write_run(tmp_path / "run", every=50)
    add_row(run, 50, train__loss=7.0)
    assert open_run(run).metrics().series("train/loss") == ([50], [7.0])
    add_row(run, 50, train__loss=8.0)
    assert open_run(run).metrics().series("train/loss") == ([50], [8.0])


def test_what_is_no_run_is_refused_with_what_it_is(tmp_path: Path):
    def refusal(path: Path) -> str:
        with pytest.raises(ConfigError) as caught:
            open_run(path)
        return str(caught.value)

    write_run(tmp_path / "runs" / "one")
    assert f"{tmp_path / 'runs'} is no run, and holds one; give a run" in refusal(tmp_path / "runs")
    assert "does not exist" in refusal(tmp_path / "none")
    assert "is a file" in refusal(tmp_path / "runs" / "one" / "env.json")
    saved = tmp_path / "runs" / "one" / "checkpoints" / "step-00000100"
    assert "is a checkpoint or an export" in refusal(saved)
    (tmp_path / "empty").mkdir()
    assert "is an empty directory" in refusal(tmp_path / "empty")
    (tmp_path / "other" / "notes").mkdir(parents=True)
    assert "in it: notes" in refusal(tmp_path / "other")


def test_runs_are_found_below_a_directory_in_the_order_of_their_starts(tmp_path: Path):
    write_run(tmp_path / "b", began=BEGAN.replace(hour=13))
    write_run(tmp_path / "ladder" / "b", began=BEGAN.replace(hour=11))
    (tmp_path / "ladder" / LOCK).touch()  # that of the ladder, which is no run
    (tmp_path / "ladder" / "ladder.json").touch()
    (tmp_path / "ladder" / "events.jsonl").touch()
    (tmp_path / "preparing").mkdir()
    (tmp_path / "preparing" / LOCK).touch()
    write_run(tmp_path / "x" / "y" / "z")
    write_run(tmp_path / "x" / "y" / "w" / "too deep")
    write_run(tmp_path / ".verify-resume-1" / "hidden")
    (tmp_path / "again").symlink_to(tmp_path / "b")
    (tmp_path / "loop").symlink_to(tmp_path)
    (tmp_path / "notes.txt").write_text("")
    found = [str(run.directory.relative_to(tmp_path)) for run in find_runs(tmp_path)]
    assert found == ["preparing", "ladder/b", "x/y/z", "b"]
    (tmp_path / "ladder" / "ladder.json").unlink()
    (tmp_path / "ladder" / "events.jsonl").unlink()
    assert len(find_runs(tmp_path)) == 4
    assert [run.name for run in find_runs(tmp_path / "b")] == ["b"]
    assert find_runs(tmp_path / "none") == []


# States


@pytest.mark.parametrize(
    ("ending", "state"),
    [
        ("finished", State.FINISHED),
        ("stopped", State.STOPPED),
        ("diverged", State.DIVERGED),
        ("failed", State.FAILED),
        (None, State.LOST),
    ],
)
def test_a_run_without_a_process_is_what_its_last_event_says(tmp_path: Path, ending: str, state: State):
    run = write_run(tmp_path / "run", ending=ending)
    before = tree(run)
    assert state_of(open_run(run)) is state
    assert tree(run) == before


def test_a_long_log_is_read_from_its_end(tmp_path: Path):
    texts = [{"event": "sample", "step": 1, "text": "x" * 5000} for _ in range(40)]
    run = write_run(tmp_path / "run", ending=None, happened=texts)
    assert state_of(open_run(run)) is State.LOST  # its beginning stands before the part that is read first
    append(run / "events.jsonl", '{"event": "stopped", "step": 100, "reason": "SIGTERM"}\n')
    assert standing(open_run(run)).reason == "SIGTERM"
    for text in texts:
        append(run / "events.jsonl", json.dumps(text) + "\n")
    assert state_of(open_run(run)) is State.STOPPED


def test_a_command_that_is_refused_leaves_a_finished_run_finished(tmp_path: Path):
    run = write_run(tmp_path / "run")
    append(run / "events.jsonl", '{"event": "failed", "step": null, "error": "a key"}\n')
    assert state_of(open_run(run)) is State.FINISHED
    append(run / "events.jsonl", '{"event": "resumed", "step": 100}\n')  # killed while it reported again
    assert state_of(open_run(run)) is State.FINISHED
    longer = (run / "config.resolved.yaml").read_text().replace("max_steps: 100", "max_steps: 200")
    (run / "config.resolved.yaml").write_text(longer)  # killed while it went on
    assert state_of(open_run(run)) is State.LOST
    append(run / "events.jsonl", '{"event": "failed", "step": 150, "error": "OSError: disk"}\n')
    assert state_of(open_run(run)) is State.FAILED


def test_a_directory_where_nothing_has_begun_is_new(tmp_path: Path):
    (tmp_path / LOCK).touch()
    assert state_of(open_run(tmp_path)) is State.NEW
    MetricsLog(tmp_path).event("stopped", None, reason="SIGINT")
    assert state_of(open_run(tmp_path)) is State.NEW
    MetricsLog(tmp_path).event("failed", None, error="DataError: no documents")
    assert state_of(open_run(tmp_path)) is State.FAILED


def test_a_run_is_running_while_its_process_holds_the_directory(tmp_path: Path):
    run = write_run(tmp_path / "run", ending=None)
    (run / LOCK).write_text("x" * 1000)  # longer than what is written over it
    with claim(run, pytest.fail):
        assert read_owner(run) == this_process()
        assert state_of(open_run(run)) is State.RUNNING
        assert is_locked(run) or sys.platform != "linux"
    assert state_of(open_run(run)) is State.LOST  # this process lives, and trains no more
    assert not is_locked(run)


def test_looking_does_not_keep_a_trainer_out(tmp_path: Path):
    run = write_run(tmp_path / "run", ending=None)
    for _ in range(3):
        state_of(open_run(run))
        with claim(run, pytest.fail) as alone:
            assert alone


def test_a_killed_process_is_gone_though_its_number_is_taken_again(tmp_path: Path):
    run = write_run(tmp_path / "run", ending=None)
    here = this_process()

    def write(**changes: object) -> State:
        (run / LOCK).write_text(json.dumps(asdict(replace(here, **changes))))
        return state_of(open_run(run))

    assert write() is State.RUNNING
    assert write(started=None) is State.RUNNING
    if sys.platform == "linux":
        assert write(started=1) is State.LOST
        assert write(boot="another") is State.LOST
        assert write(host="node7") is State.RUNNING  # it writes: what it does cannot be seen from here
        assert write(pids="pid:[1]") is State.RUNNING
    for log in ("metrics.jsonl", "events.jsonl"):
        os.utime(run / log, (0, 0))
    assert write(host="node7") is State.LOST
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    started = owner._started(child.pid)
    assert write(pid=child.pid, started=started) is State.RUNNING
    child.kill()
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    if sys.platform == "linux":  # it has its number still, and has ended
        assert write(pid=child.pid, started=started) is State.LOST
    child.communicate()
    assert write(pid=child.pid, started=None) is State.LOST


@pytest.mark.parametrize("content", ["", "{", "[]", '{"pid": 0, "host": "a"}', '{"pid": 1, "host": 2}', "1"])
def test_a_lock_file_that_says_nothing(tmp_path: Path, content: str):
    run = write_run(tmp_path / "run", ending=None)
    (run / LOCK).write_text(content)
    assert read_owner(run) is None
    assert state_of(open_run(run)) is State.LOST


@pytest.mark.skipif(sys.platform != "linux", reason="the list of locks is Linux's")
def test_the_lock_of_an_older_albor_is_seen_by_the_list_of_locks(tmp_path: Path):
    run = write_run(tmp_path / "run", ending=None)
    with claim(run, pytest.fail):
        (run / LOCK).write_text("")
        assert state_of(open_run(run)) is State.RUNNING
    assert state_of(open_run(run)) is State.LOST


# Logs while they grow


def steps(rows: list[dict[str, object]]) -> list[object]:
    return [row["step"] for row in rows]


def test_a_follower_gets_what_is_new(tmp_path: Path):
    follower = Follower(tmp_path / "run")
    assert follower.poll().rows == []
    (tmp_path / "run").mkdir()
    log = MetricsLog(tmp_path / "run")
    log.row(1, 10, {"train/loss": 5.0})
    log.event("started", 0)
    update = follower.poll()
    assert (steps(update.rows), len(update.events)) == ([1], 1)
    assert not update.rows_anew
    assert follower.poll() == follower.poll()
    assert follower.poll().rows == []
    log.row(2, 20, {"train/loss": 4.0})
    log.row(3, 30, {"train/loss": 3.0})
    assert steps(follower.poll().rows) == [2, 3]


def test_half_a_line_waits_for_its_end(tmp_path: Path):
    follower, path = Follower(tmp_path), tmp_path / "metrics.jsonl"
    append(path, '{"step": 1}\n{"st')
    assert steps(follower.poll().rows) == [1]
    append(path, 'ep": 2')
    assert follower.poll().rows == []
    append(path, "}\n")
    assert steps(follower.poll().rows) == [2]
    append(path, '{"step": 3, "torn')
    assert follower.poll().rows == []
    MetricsLog(tmp_path).row(3, 1, {})  # which cuts it
    update = follower.poll()
    assert (steps(update.rows), update.rows_anew, update.bad_lines) == ([3], False, 0)


def test_rows_that_a_resume_removes_make_the_log_anew(tmp_path: Path):
    log, follower = MetricsLog(tmp_path), Follower(tmp_path)
    for step in range(1, 6):
        log.row(step, step, {"train/loss": 1 / step})
    follower.poll()
    log.truncate_after(3)
    log.row(4, 4, {"train/loss": 9.0})
    update = follower.poll()
    assert update.rows_anew
    assert steps(update.rows) == [1, 2, 3, 4]
    log.truncate_after(4)  # nothing is beyond it
    assert follower.poll() == type(update)()


def test_a_log_that_is_cut_or_overwritten_in_place_is_read_anew(tmp_path: Path):
    path, follower = tmp_path / "metrics.jsonl", Follower(tmp_path)
    path.write_text("".join(f'{{"step": {step}}}\n' for step in range(5)))
    follower.poll()
    os.truncate(path, 24)
    assert steps(follower.poll().rows) == [0, 1]
    with open(path, "r+") as file:
        file.write("".join(f'{{"step": {step}}}\n' for step in range(7)))
    update = follower.poll()
    assert steps(update.rows) == [2, 3, 4, 5, 6] or update.rows_anew
    path.write_text("".join(f'{{"step": {step}}}\n' for step in range(3, 9)))
    update = follower.poll()
    assert (steps(update.rows), update.rows_anew) == ([3, 4, 5, 6, 7, 8], True)


def test_a_log_that_goes_away_and_comes_back(tmp_path: Path):
    path, follower = tmp_path / "metrics.jsonl", Follower(tmp_path)
    append(path, '{"step": 1}\n')
    follower.poll()
    path.unlink()
    assert follower.poll().rows_anew
    assert not follower.poll().rows_anew
    append(path, '{"step": 7}\nnot a row\n[]\n{"no": "step"}\n')
    update = follower.poll()
    assert (steps(update.rows), update.bad_lines) == ([7], 3)


def test_a_poll_without_news_reads_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    write_run(tmp_path / "run")
    follower = Follower(tmp_path / "run")
    assert len(follower.poll().rows) == 12
    monkeypatch.setattr("builtins.open", None)
    assert follower.poll().rows == []
