"""The report: what it shows of a run, that nothing in it comes alive, and how its file is written."""

from __future__ import annotations

import base64
import hashlib
import json
import math
import os
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from report_cases import HOSTILE, MIB, at, make_run, write_lines
from run_cases import call

from albor.report import command
from albor.report.gather import gather, label_runs
from albor.report.hours import CLOCK, SPEED, hours_of
from albor.report.thin import evenly, thin
from albor.runs.record import open_run

pytest.importorskip("plotly")
MOST_BYTES = 6_000_000


class Page(HTMLParser):
    """A page as a browser takes it apart."""

    def __init__(self, source: str):
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.texts: dict[str, str] = {}  # by the panel that they are in
        self._inside = ""
        self._panel = ""
        self.feed(source)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._inside = tag
        if tag == "script":
            self.scripts.append("")
        identity = dict(attrs).get("id") or ""
        if identity.startswith("panel-") or identity == "headline":
            self._panel = identity

    def handle_data(self, data: str) -> None:
        if self._inside == "script":
            self.scripts[-1] += data
        self.texts[self._panel] = self.texts.get(self._panel, "") + data

    def handle_endtag(self, tag: str) -> None:
        self._inside = ""

    def of(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]

    @property
    def data(self) -> dict[str, Any]:
        return json.loads(self.scripts[0])


def report(*runs: Path, out: Path) -> Page:
    found = command.write_report(runs, out)
    assert found.size == out.stat().st_size < MOST_BYTES
    return Page(out.read_text())


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("runs") / "base", rows=120)


# Fewer points


@given(st.lists(st.floats(width=32), min_size=40, max_size=200), st.integers(4, 60))
def test_thinning_keeps_the_ends_the_extremes_and_the_gaps(values: list[float], limit: int):
    places = thin(values, limit)
    assert places == sorted(set(places))
    assert {places[0], places[-1]} == {0, len(values) - 1}
    kept = [values[place] for place in places]
    finite = [value for value in values if math.isfinite(value)]
    if finite:
        shown = [value for value in kept if math.isfinite(value)]
        assert (min(shown), max(shown)) == (min(finite), max(finite))
    assert len(finite) == len(values) or len(kept) > sum(map(math.isfinite, kept))
    odd = len(kept) - sum(map(math.isfinite, kept))
    assert len(values) <= limit or len(kept) - odd <= limit


def test_a_spike_in_each_stretch_survives():
    values = [float(place % 7) for place in range(10_000)]
    spikes = range(5, 10_000, 500)
    for place in spikes:
        values[place] = 1000.0
    assert set(spikes) <= set(thin(values, 100))


@pytest.mark.parametrize(
    ("count", "limit", "found"), [(3, 5, [0, 1, 2]), (10, 2, [0, 9]), (10, 1, [9]), (9, 3, [0, 4, 8])]
)
def test_evenly_has_both_ends(count: int, limit: int, found: list[int]):
    assert evenly(count, limit) == found


# Hours


def row(step: int, seconds: float | None, rate: float | None = 100.0) -> dict[str, Any]:
    found = {"step": step, "tokens": step * 100, "train/tokens_per_second": rate}
    return found if seconds is None else found | {"time": at(seconds, precise=True)}


def test_hours_count_training_and_not_the_time_between_processes():
    rows = [row(1, 360), row(2, 720), row(3, 9_360), row(4, 9_720)]
    events = [
        {"event": "started", "step": 0, "time": at(0)},
        {"event": "stopped", "step": 2, "time": at(1080)},
        {"event": "resumed", "step": 2, "time": at(9000)},
    ]
    found = hours_of(rows, events)
    assert (found.basis, found.steps) == (CLOCK, [1, 2, 3, 4])
    assert found.hours == pytest.approx([0.1, 0.2, 0.4, 0.5])
    assert found.at(2) == pytest.approx(0.2)
    assert (found.at(0), found.at(9)) == pytest.approx((0.1, 0.5))


def test_hours_between_two_rows_are_in_proportion():
    found = hours_of([row(10, 3600), row(20, 7200)], [{"event": "started", "step": 0, "time": at(0)}])
    assert found.at(15) == pytest.approx(1.5)


def test_after_a_kill_hours_count_what_had_been_written():
    rows = [row(1, 360), row(2, 9_360)]  # rows of steps 2 to 5 were trained again
    events = [
        {"event": "started", "step": 0, "time": at(0)},
        {"event": "checkpoint", "step": 5, "time": at(720)},
        {"event": "resumed", "step": 1, "time": at(9000)},
    ]
    assert hours_of(rows, events).hours == pytest.approx([0.1, 0.3])


def test_rows_without_times_have_hours_by_their_speed():
    found = hours_of([row(36, None), row(72, 10.0, 50.0), row(90, None, None)], [])
    assert (found.basis, found.steps) == (SPEED, [36, 72])
    assert found.hours == pytest.approx([0.01, 0.03])


@pytest.mark.parametrize("rows", [[], [row(1, None, None)], [row(1, None, -5.0)]])
def test_hours_that_nothing_tells_are_not_known(rows: list[dict[str, Any]]):
    found = hours_of(rows, [])
    assert (found.basis, found.at(1)) == (None, None)


def test_a_clock_that_was_set_back_takes_no_hours_away():
    rows = [row(1, 3600), row(2, 1800), row(3, 5400)]
    found = hours_of(rows, [{"event": "started", "step": 0, "time": at(0)}])
    assert found.hours == sorted(found.hours)


# What the page shows


def test_the_headline_says_what_the_run_came_to(run: Path, tmp_path: Path):
    page = report(run, out=tmp_path / "x.html")
    text = page.texts["headline"]
    for figure in ("2.6600", "0.9200", "399M", "46.", "of 61,000"):
        assert figure in text
    tokens, parameters = 119 * 50 * 131072, 398_509_056
    gathered = gather(open_run(run), "base").headline
    assert gathered["parameters"] == parameters
    assert gathered["tokens"] == tokens
    assert gathered["chinchilla_ratio"] == pytest.approx(tokens / (20 * parameters))
    assert gathered["hours"] == pytest.approx(tokens / 120_000 / 3600, rel=0.01)
    assert f"{gathered['chinchilla_ratio']:.3g} of Chinchilla" in text


def test_every_chart_has_its_data(run: Path, tmp_path: Path):
    data = report(run, out=tmp_path / "x.html").data
    kinds = {chart["id"] for chart in data["charts"]}
    lines = {"loss", "bits", "lr", "norm", "speed", "mfu", "process"}
    assert kinds == {*lines, "heat", "memory", "shares", "timeline", "tasks"}
    (found,) = data["runs"]
    loss = found["series"]["train/loss"]
    assert found["tokens_per_step"] == 131072
    assert len(loss["s"]) == len(loss["h"]) == len(loss["y"]) == loss["of"] == 120
    assert loss["y"].count(None) == 1  # not finite: a gap
    assert found["heat"]["maps"].keys() == {"block", "attention", "mlp"}
    groups = found["heat"]["maps"]["attention"]["groups"]
    assert (groups[0], groups[1], groups[24], groups[-1]) == ("embedding", "block_00", "block_23", "head")
    assert max(max(cells) for cells in found["heat"]["maps"]["block"]["z"]) > 10  # the spike
    assert {event["lane"] for event in found["events"]} == {
        "start, resume", "checkpoint", "skip, spike", "alert", "end",
    }  # fmt: skip
    assert found["tasks"]["sciq, acc"] == {"value": pytest.approx(0.72), "stderr": 0.012, "chance": 0.25}
    assert "lambada_openai, perplexity" not in found["tasks"]
    levels = {
        (level["label"], level["y"]) for chart in data["charts"] for level in chart.get("references", ())
    }
    assert levels == {("gzip", 2.07), ("xz", 1.8), ("clipped", 1.0)}


def test_steps_of_another_size_keep_their_tokens(tmp_path: Path):
    run = make_run(tmp_path / "regrown", rows=20)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    lines[-1]["tokens"] += 1000
    write_lines(run / "metrics.jsonl", lines)
    (found,) = report(run, out=tmp_path / "x.html").data["runs"]
    assert found["tokens_per_step"] is None
    assert found["series"]["train/loss"]["t"][-1] == lines[-1]["tokens"]


def test_planned_and_measured_memory_add_up(run: Path, tmp_path: Path):
    (found,) = report(run, out=tmp_path / "x.html").data["runs"]
    planned, measured = found["memory"]["planned"], found["memory"]["measured"]
    assert sum(planned.values()) == json.loads((run / "plan.json").read_text())["required_bytes"]
    assert sum(measured.values()) == sum(planned.values()) + 20 * MIB
    assert measured["CUDA context"] == 471 * MIB
    assert measured["not told apart"] > 0


def test_what_was_not_measured_is_said_and_not_drawn(tmp_path: Path):
    directory = tmp_path / "bare"
    directory.mkdir()
    write_lines(directory / "events.jsonl", [{"event": "started", "step": 0, "time": at(0)}])
    page = report(directory, out=tmp_path / "x.html")
    assert [chart["id"] for chart in page.data["charts"]] == ["timeline"]
    for name in ("loss", "bits", "lr", "norm", "heat", "speed", "mfu", "process"):
        assert "not measured" in page.texts[f"panel-{name}"]
    for name in ("memory", "shares", "configuration", "environment"):
        assert "not known" in page.texts[f"panel-{name}"]
    for name in ("samples", "evaluation"):
        assert "none yet" in page.texts[f"panel-{name}"]
    (hours,) = (tag for tag in page.of("input") if (tag.get("name"), tag.get("value")) == ("axis", "h"))
    assert "disabled" in hours
    assert page.texts["headline"].count("not measured") >= 8


def test_a_run_lacks_what_another_has(run: Path, tmp_path: Path):
    other = make_run(tmp_path / "cpu", rows=30, config="quickstart", device="cpu", times=False)
    page = report(run, other, out=tmp_path / "x.html")
    assert "Not measured: cpu." in page.texts["panel-mfu"]
    assert "of steps alone, by their speed" in page.texts["headline"]
    settings = page.texts["panel-configuration"]
    assert re.search(r"(\d+) keys, (?!0 )\d+ of them not the same", settings)
    assert "≠ model.hidden_size" in settings
    assert "≠ rope" not in settings
    differs = [tag for tag in page.of("tr") if tag.get("class") == "differs"]
    assert len(differs) == settings.count("≠ ") + page.texts["panel-environment"].count("≠ ")


def test_damaged_files_are_named_and_the_rest_is_shown(tmp_path: Path):
    run = make_run(tmp_path / "torn", rows=30)
    with open(run / "metrics.jsonl", "a") as file:
        file.write("no row\n")
    (run / "eval" / "smoke.json").write_text("{")
    (run / "eval" / "other.json").write_text("[]")
    (run / "plan.json").write_text('{"groups": 5}')
    out = tmp_path / "x.html"
    found = command.write_report([run], out)
    assert [f"{run / 'metrics.jsonl'}:" in problem for problem in found.problems].count(True) == 1
    assert sum("smoke.json" in problem or "other.json" in problem for problem in found.problems) == 2
    page = Page(out.read_text())
    assert len([chart for chart in page.data["charts"] if chart["kind"] == "line"]) == 7
    assert "not known" in page.texts["panel-memory"]


def test_long_runs_are_thinned_and_their_spikes_are_there(tmp_path: Path):
    run = make_run(tmp_path / "long", rows=4000, config="quickstart", device="cpu")
    copies = [tmp_path / f"copy-{number}" for number in range(3)]
    for copy in copies:
        shutil.copytree(run, copy)
    page = report(run, *copies, out=tmp_path / "x.html")
    for found in page.data["runs"]:
        norm = found["series"]["train/grad_norm"]
        assert norm["of"] == 4000
        assert 500 < len(norm["y"]) <= 600
        assert max(norm["y"]) == 41.0
        assert len(found["heat"]["s"]) == 120
    assert "599 of 4,000 rows are drawn" in page.texts["panel-norm"]


# Nothing in it comes alive


def test_what_a_run_wrote_stays_text(tmp_path: Path):
    run = make_run(tmp_path / "evil", rows=30, text=HOSTILE).rename(tmp_path / "<b>evil<&b>")
    with open(run / "events.jsonl", "a") as file:
        event = {"event": HOSTILE, "step": 3, "time": HOSTILE, "what": HOSTILE + "\ud800"}
        file.write(json.dumps(event) + "\n")
    (run / "env.json").write_text(json.dumps({HOSTILE: HOSTILE}))
    final = json.loads((run / "eval" / "final.json").read_text())
    (run / "eval" / "final.json").write_text(json.dumps(final | {"smoke": HOSTILE}))
    evaluated = {"step": 3, "limit": HOSTILE, "results": {HOSTILE: {"acc": {"value": 0.5, "stderr": 0.1}}}}
    (run / "eval" / "evil.json").write_text(json.dumps(evaluated))
    page = report(run, out=tmp_path / "x.html")
    assert len(page.scripts) == 3
    assert not page.of("img")
    assert not page.of("a")
    assert all(not name.startswith("on") for _, attributes in page.tags for name in attributes)
    assert HOSTILE in page.texts["panel-samples"]
    assert HOSTILE in page.texts["panel-environment"]
    assert page.data["runs"][0]["label"] == "<b>evil<&b>"


def test_the_page_may_run_its_own_scripts_and_load_nothing(run: Path, tmp_path: Path):
    page = report(run, out=tmp_path / "x.html")
    (policy,) = (
        tag["content"] for tag in page.of("meta") if tag.get("http-equiv") == "Content-Security-Policy"
    )
    assert policy is not None
    rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
    assert rules["default-src"] == "'none'"
    assert rules["script-src"].split() == [
        f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"
        for script in page.scripts[1:]
    ]
    assert "http" not in policy
    loaded = [
        tag.get(key) for _, tag in page.tags for key in ("src", "href", "srcset", "action") if key in tag
    ]
    assert loaded == ["data:,"]


# The file


def test_json_says_what_was_written(run: Path, tmp_path: Path):
    out = tmp_path / "x.html"
    result = call("report", run, "--out", out, "--json")
    assert (result.code, result.err) == (0, "")
    found = json.loads(result.out)
    assert found == {"path": str(out), "bytes": out.stat().st_size, "runs": [str(run)], "problems": []}


def test_a_report_is_replaced_and_nothing_else_is(run: Path, tmp_path: Path):
    out = tmp_path / "x.html"
    assert call("report", run, "--out", out).code == 0
    assert call("report", run, "--out", out).code == 0
    out.write_text("<p>a page of somebody")
    result = call("report", run, "--out", out)
    assert result.code == 2
    assert "is no report of albor; give another name, or --force" in result.err
    assert out.read_text() == "<p>a page of somebody"
    assert call("report", run, "--out", out, "--force").code == 0
    assert command.is_ours(out)


def test_all_that_is_wrong_is_said_at_once(run: Path, tmp_path: Path):
    result = call("report", run, run, tmp_path / "nowhere", "--out", tmp_path / "missing" / "x.html")
    assert result.code == 2
    for problem in ("is given twice", "nowhere does not exist", "mkdir -p"):
        assert problem in result.err
    assert "Traceback" not in result.err
    for out in (tmp_path, Path("/dev/null"), tmp_path / ("x" * 300)):
        with pytest.raises(command.ConfigError):
            command.write_report([run], out, force=True)


def test_a_full_disk_leaves_the_old_page(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    out = tmp_path / "x.html"
    command.write_report([run], out)
    before = out.read_bytes()

    def full(*_: object) -> None:
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr("albor.durable.os.fsync", full)
    result = call("report", run, "--out", out)
    assert result.code == 1
    assert result.err.count("\n") == 1
    assert "No space left on device; free space" in result.err
    assert out.read_bytes() == before
    assert os.listdir(tmp_path) == ["x.html"]


def test_without_plotly_the_message_names_the_extra(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    result = call("report", run, "--out", tmp_path / "x.html")
    assert (result.code, os.listdir(tmp_path)) == (1, [])
    assert "pip install 'albor[report]'" in result.err


def test_runs_of_one_name_are_told_apart_by_their_parents():
    paths = [Path("/a/x/run"), Path("/a/y/run"), Path("/a/y/other")]
    assert label_runs(paths) == ["x/run", "y/run", "other"]


def test_a_run_that_was_trained_can_be_reported(config: Path, whole: dict[str, Any], tmp_path: Path):
    directory = config.parent / "runs" / "tiny"
    page = report(directory, out=tmp_path / "x.html")
    final = json.loads((directory / "eval" / "final.json").read_text())
    assert f"{final['val/loss']:.4f}" in page.texts["headline"]
    found = gather(open_run(directory), "tiny")
    assert (found.state, found.hours_from, found.problems) == ("finished", CLOCK, [])
    assert 0 < found.headline["hours"] < 0.1
    assert len(found.series["train/loss"]["y"]) == 24
    assert found.shares[0]["read"] == 1
    assert found.memory is not None
    assert found.memory["measured_total"] > 0
    (sample, *_) = found.samples
    assert sample["texts"][0]["prompt"] == "the"
