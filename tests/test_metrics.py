"""The logs: valid JSON always, no duplicate rows after a resume, and no harm when they cannot be written."""

from __future__ import annotations

import json
import math
import os
import resource
from datetime import datetime
from pathlib import Path

import pytest
from checkpoint_cases import exit_code_of, fork

from albor.runlog import known_metrics, read_rows
from albor.train.metrics import MetricsLog


def _lines(path: Path) -> list[dict[str, object]]:
    def refuse(constant: str) -> None:
        pytest.fail(f"{constant} is not JSON")

    text = path.read_text()
    assert text.endswith("\n")
    return [json.loads(line, parse_constant=refuse) for line in text.splitlines()]


def test_rows_and_events_are_json_lines(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path)
    log.row(10, 20480, {"train/loss": 4.25, "train/mfu": None})
    log.event("checkpoint", 10, path="checkpoints/step-00000010")
    (row,) = _lines(log.metrics_path)
    assert datetime.fromisoformat(str(row.pop("time"))).tzinfo is not None
    assert row == {"step": 10, "tokens": 20480, "train/loss": 4.25, "train/mfu": None}
    (event,) = _lines(log.events_path)
    time = event.pop("time")
    assert event == {"event": "checkpoint", "step": 10, "path": "checkpoints/step-00000010"}
    assert isinstance(time, str)
    assert datetime.fromisoformat(time).tzinfo is not None


def test_what_is_not_finite_is_null_and_noted(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path)
    log.row(1, 2, {"train/loss": math.nan, "train/grad_norm": math.inf, "train/lr": 0.1})
    log.event("skipped", 1, loss=-math.inf)
    (row,) = _lines(log.metrics_path)
    assert "time" in row
    assert "time" not in known_metrics(row)
    assert {key: row[key] for key in row if key != "time"} == {
        "step": 1,
        "tokens": 2,
        "train/loss": None,
        "train/grad_norm": None,
        "train/lr": 0.1,
        "non_finite": {"train/loss": "nan", "train/grad_norm": "inf"},
    }
    assert _lines(log.events_path)[0]["non_finite"] == {"loss": "-inf"}


def test_each_line_is_there_as_soon_as_it_is_written(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path)
    for step in range(1, 4):
        log.row(step, step, {"train/loss": 1.0})
        assert len(_lines(log.metrics_path)) == step


def test_resuming_removes_the_rows_beyond_it_and_no_event(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path)
    for step in range(10, 60, 10):
        log.row(step, step, {"train/loss": 1 / step})
        log.event("row", step)
    before = _lines(log.metrics_path)
    log = MetricsLog(tmp_path)
    log.truncate_after(30)
    assert _lines(log.metrics_path) == before[:3]
    log.row(40, 40, {"train/loss": 1 / 40})
    *kept, again = _lines(log.metrics_path)
    assert kept == before[:3]
    assert again | {"time": None} == before[3] | {"time": None}
    assert len(_lines(log.events_path)) == 5
    assert sorted(os.listdir(tmp_path)) == ["events.jsonl", "metrics.jsonl"]


def test_a_torn_last_line_spoils_nothing(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path)
    log.row(1, 1, {})
    log.row(2, 2, {})
    log.metrics_path.write_bytes(log.metrics_path.read_bytes()[:-5])
    log = MetricsLog(tmp_path)
    log.truncate_after(1)
    log.row(2, 2, {})
    assert [row["step"] for row in _lines(log.metrics_path)] == [1, 2]


def test_reading_passes_over_what_is_no_row(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n\xff\xfe\n[1]\n\n{"step": 2}\n{"st')
    assert list(read_rows(path)) == [{"step": 1}, {"step": 2}]
    assert list(read_rows(tmp_path / "absent.jsonl")) == []


def test_a_log_that_cannot_be_written_is_flagged_once_and_recovers(tmp_path: Path) -> None:
    failures: list[str] = []
    log = MetricsLog(tmp_path, failures.append)
    log.metrics_path.mkdir()  # works as root too, whom chmod does not stop
    for step in range(3):
        log.row(step, step, {})
    log.truncate_after(0)
    assert len(failures) == 1
    assert "metrics.jsonl" in failures[0]
    assert "training goes on" in failures[0]
    log.metrics_path.rmdir()
    log.row(3, 3, {})
    assert [row["step"] for row in _lines(log.metrics_path)] == [3]


def test_a_disk_that_fills_up_leaves_no_half_line(tmp_path: Path) -> None:
    def fill() -> None:
        failures: list[str] = []
        log = MetricsLog(tmp_path, failures.append)
        log.row(1, 1, {"train/loss": 1.0})
        resource.setrlimit(
            resource.RLIMIT_FSIZE, (100, 100)
        )  # stands in for a full disk, inside the second row
        log.row(2, 2, {"train/loss": 1.0})
        assert len(failures) == 1

    assert exit_code_of(fork(fill)) == 0
    assert [row["step"] for row in _lines(tmp_path / "metrics.jsonl")] == [1]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full, which only Linux has")
def test_a_full_disk_is_flagged_on_stderr(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = MetricsLog(tmp_path)
    log.events_path.symlink_to("/dev/full")
    log.event("start", 0)
    log.event("end", 1)
    assert capsys.readouterr().err.count("No space left on device") == 1
