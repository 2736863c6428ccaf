"""`albor vram-estimate --audit RUN`: a real run's residuals, the verdict, and runs that say nothing."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from run_cases import albor, call, events

from albor.errors import AlborError
from albor.memory.audit import Audit, Component, Record, audit, judge
from albor.units import GIB, MIB


@pytest.fixture(scope="module")
def trained(config: Path) -> Path:
    """The directory of a run that went to its end, in a process that holds no memory of other tests."""
    assert albor(config.parent, "train", config).code == 0
    return config.parent / "runs" / "tiny"


@pytest.fixture
def copied(trained: Path, tmp_path: Path) -> Path:
    """What an audit reads of it, for a test to change."""
    run = tmp_path / "copied"
    run.mkdir()
    for name in ("events.jsonl", "plan.json"):
        (run / name).write_bytes((trained / name).read_bytes())
    return run


def change(run: Path, alter: Callable[[dict[str, Any]], dict[str, Any] | str | None]) -> None:
    """Every event as `alter` makes it: another one, a line of text, or None to leave it out."""
    altered = [alter(event) for event in events(run)]
    lines = [line if isinstance(line, str) else json.dumps(line) for line in altered if line is not None]
    (run / "events.jsonl").write_text("".join(f"{line}\n" for line in lines))


# A real run


def test_a_runs_arena_is_as_planned_and_its_process_is_shown(trained: Path):
    result = call("vram-estimate", "--audit", trained, "--json")
    assert (result.code, result.err) == (0, "")
    found = json.loads(result.out)
    tenth, end = events(trained, "memory")
    for name, event in (("tenth_step", tenth), ("end", end)):
        parts = found[name]["components"]
        assert found[name]["step"] == event["step"]
        assert list(parts) == list(event["components"])
        for key, part in parts.items():
            recorded = event["components"][key]
            assert (part["planned"], part["measured"]) == (recorded["planned"], recorded["measured"])
            if part["measured"] is not None:
                assert part["residual"] == part["measured"] - part["planned"]
        assert parts["arena, device"]["residual"] == parts["arena, host"]["residual"] == 0
        process = parts["process, peak"]
        assert process["residual_percent"] == pytest.approx(
            100 * process["residual"] / process["measured"], abs=1e-3
        )
    assert found["device"] == "cpu"
    assert found["attention"]["backend"] == "torch"
    assert {item["name"] for item in found["outside"]} == set(found["end"]["components"]) & {
        item["name"] for item in found["outside"]
    }
    assert found["goal"] == {"residual_percent": None, "under_bytes": 64 * MIB}
    assert found["reached"] is True
    assert found["notes"] == []


def test_the_page_for_people_has_both_moments_and_the_verdict(trained: Path):
    result = call("vram-estimate", "--audit", trained)
    assert result.code == 0
    assert "At the process's tenth step, step 10" in result.out
    assert "At the process's end, step 24" in result.out
    end = json.loads(call("vram-estimate", "--audit", trained, "--json").out)["end"]["components"]
    assert result.out.count(f"{end['arena, device']['planned']:,}") == 4  # planned and measured, twice
    process = end["process, peak"]
    words = [f"{process['planned']:,}", f"{process['measured']:,}", f"{process['residual']:+,}"]
    lines = [line.split() for line in result.out.splitlines() if line.startswith("process, peak")]
    assert lines[-1][2:5] == words
    assert "(1) not told apart from the rest of the process" in result.out
    assert result.out.splitlines()[-1].startswith(
        "Within the plan: the arena is as planned, the process took "
    )
    assert "\x1b" not in result.out


def test_a_run_that_took_too_much_has_missed_its_goal(copied: Path):
    def swollen(event: dict[str, Any]) -> dict[str, Any]:
        if event["event"] == "memory" and event["moment"] == "end":
            event["components"]["process, peak"]["measured"] += 9 * GIB
        return event

    change(copied, swollen)
    result = call("vram-estimate", "--audit", copied)
    assert result.code == 1
    assert "Missed: the arena is as planned, the process took " in result.out
    assert json.loads(call("vram-estimate", "--audit", copied, "--json").out)["reached"] is False


# The verdict


def record(process: int | None, *, arena: int = GIB, **keys: Any) -> Record:
    """Of a run with an arena of 1 GiB that was planned to take 10 GiB in all."""
    parts = {
        "arena, device": Component(GIB, arena, "slab"),
        "process": Component(10 * GIB, process, "asked"),
        "process, peak": Component(10 * GIB, process, "asked"),
    }
    return Record(24, "end", **{"device": "cuda", "calibrated": True, "components": parts, **keys})


@pytest.mark.parametrize(
    ("case", "reached", "says"),
    [
        (record(10 * GIB), True, "0.0 MiB (0.0%) less"),
        (record(10 * GIB + 64 * MIB), True, "64.0 MiB (0.6%) more than planned"),
        (record(10 * GIB + 65 * MIB), False, "65.0 MiB (0.6%) more than planned"),
        (record(int(10 * GIB / 1.014)), True, "(1.4%) less than planned; the goal: within 1.5%"),
        (record(int(10 * GIB / 1.016)), False, "(1.6%) less"),
        (record(8 * GIB), False, "(25.0%) less"),
        # The plan of a card that is not calibrated has a margin, and that of a CPU is of another kind.
        (
            record(8 * GIB, calibrated=False),
            True,
            "Within the plan: the arena is as planned, the process took ",
        ),
        (
            record(8 * GIB, calibrated=False),
            True,
            "how much less is not judged: the card is not calibrated",
        ),
        (record(8 * GIB, device="cpu"), True, "how much less is not judged: host memory"),
        (record(10 * GIB), True, "Reached: "),
        (record(10 * GIB + 65 * MIB, calibrated=False), False, "65.0 MiB"),
        (record(10 * GIB + 65 * MIB, device="cpu"), False, "65.0 MiB"),
        (record(10 * GIB, arena=GIB + 1), False, "arena, device is not what was planned"),
        (record(None, arena=GIB - 1), False, "arena, device is not what was planned"),
        (record(None), None, "Unknown: the arena is as planned; the process: asked"),
    ],
)
def test_the_verdict(case: Record, reached: bool | None, says: str):
    verdict = judge(case)
    assert verdict.reached is reached
    assert says in verdict.text


def test_an_audit_judges_the_end_where_there_is_one(copied: Path):
    found = audit(copied)
    assert found.end is not None
    assert found.last is found.end
    only = Audit(copied, {}, found.tenth_step, None, ())
    assert only.last is found.tenth_step


# Runs that do not say it


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--audit", "nowhere"), "nowhere is no directory"),
        (("--audit", "."), "is no run's directory; give a run directory"),
        (("x.yaml", "--audit", "."), "CONFIG: is given with --audit"),
        (("--audit", ".", "--gpu", "H100"), "--gpu: is given with --audit"),
        (("--audit", ".", "--vram", "8GiB"), "--vram: is given with --audit"),
        ((), "give a configuration, or --audit RUN"),
    ],
)
def test_usage(arguments: tuple[str, ...], says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    result = call("vram-estimate", *arguments)
    assert result.code == 2
    assert says in result.err
    assert result.out == ""


def test_a_run_of_an_older_albor(copied: Path):
    change(copied, lambda event: None if event["event"] == "memory" else event)
    result = call("vram-estimate", "--audit", copied, "--json")
    assert (result.code, result.out) == (1, "")
    assert "there is no record of memory; the run ended before its tenth step" in result.err
    assert "trained by an albor that kept none" in result.err


def test_a_run_that_never_began(copied: Path):
    (copied / "events.jsonl").unlink()
    result = call("vram-estimate", "--audit", copied)
    assert result.code == 1
    assert "no training has begun here" in result.err


def test_a_run_that_was_killed_has_its_tenth_step(copied: Path):
    change(copied, lambda event: None if event.get("moment") == "end" else event)
    found = audit(copied)
    assert found.end is None
    assert found.last.step == 10
    assert found.notes == ("There is no record of the process's end: it still runs, or was killed.",)
    assert call("vram-estimate", "--audit", copied).code == 0


def test_the_newest_process_that_has_a_record_counts(copied: Path):
    log = copied / "events.jsonl"
    again = log.read_text().replace('"step": 24', '"step": 48')
    log.write_text(log.read_text() + again + '{"event": "resumed", "step": 48}\n')
    found = audit(copied)
    assert found.last.step == 48
    assert found.notes == ("The newest process has no record yet; here is an earlier one.",)


def test_a_process_that_was_short(copied: Path):
    change(copied, lambda event: None if event.get("moment") == "tenth step" else event)
    assert audit(copied).notes == ("The process ended before its tenth step.",)
    assert json.loads(call("vram-estimate", "--audit", copied, "--json").out)["tenth_step"] is None


@pytest.mark.parametrize(
    "line", ["{torn", '"text"', "[]", '{"step": 3}', '{"event": "x", "event": "y"}', "\xff"]
)
def test_a_damaged_line_is_named_and_left_out(copied: Path, line: str):
    log = copied / "events.jsonl"
    log.write_bytes(line.encode("latin-1") + b"\n" + log.read_bytes())
    found = audit(copied)
    assert found.last.step == 24
    assert found.notes == (f"{log}, line 1: not what a run writes, and left out",)


def component(event: dict[str, Any], **values: Any) -> dict[str, Any]:
    event["components"]["process"] |= values
    return event


@pytest.mark.parametrize(
    "damage",
    [
        lambda event: component(event, planned=-1),
        lambda event: component(event, planned="much"),
        lambda event: component(event, measured=True),
        lambda event: component(event, measured=1.5),
        lambda event: component(event, how=None),
        lambda event: {**event, "components": {}},
        lambda event: {**event, "components": [1]},
        lambda event: {**event, "moment": "now"},
        lambda event: {**event, "step": None},
        lambda event: {**event, "device": "tpu"},
        lambda event: {**event, "calibrated": 1},
        lambda event: {key: value for key, value in event.items() if key != "components"},
    ],
)
def test_a_damaged_record_is_none(copied: Path, damage: Callable[[dict[str, Any]], dict[str, Any]]):
    """Where that leaves nothing, the line is named in the refusal."""
    change(copied, lambda event: damage(event) if event["event"] == "memory" else event)
    with pytest.raises(AlborError, match="no record of memory") as caught:
        audit(copied)
    assert str(caught.value).count(": not what a run writes, and left out") == 2


def test_a_damaged_plan_takes_nothing_from_the_audit(copied: Path):
    (copied / "plan.json").write_text("{torn")
    assert audit(copied).plan == {}
    assert call("vram-estimate", "--audit", copied).code == 0


def test_no_escape_code_of_a_run_reaches_the_terminal(copied: Path):
    def hostile(event: dict[str, Any]) -> dict[str, Any]:
        if event["event"] == "memory":
            event["components"]["\x1b[31mred[/]"] = {"planned": 1, "measured": None, "how": "\x1b[2J"}
        return event

    change(copied, hostile)
    plan = json.loads((copied / "plan.json").read_text())
    (copied / "plan.json").write_text(json.dumps({**plan, "hardware": "\x1b]0;title\x07"}))
    result = call("vram-estimate", "--audit", copied)
    assert result.code == 0
    assert "\x1b" not in result.out
    assert "�[31mred[/]" in result.out
