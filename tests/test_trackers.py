"""Rows, samples and results in TensorBoard, trackio and wandb, read back with what reads them; and trackers
that raise, hang and do not keep up, which the training does not notice.
"""

from __future__ import annotations

import html
import importlib.util
import json
import math
import os
import signal
import socket
import sqlite3
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from run_cases import ENVIRONMENT, albor, bits, call, checkpoints, events, rows, write_project

from albor.config import RunConfig
from albor.configfile import load_config
from albor.faults import VARIABLE
from albor.runlog import known_metrics
from albor.trackers.feed import Feed, Trackers, send_run
from albor.trackers.rows import as_row
from albor.train.loop import Loop

REAL = ("tensorboard", "trackio", "wandb")
Series = dict[str, list[tuple[int, float]]]


class Copy(NamedTuple):
    """What a tracker has of a run."""

    series: Series
    samples: dict[int, str]
    config: dict[str, Any] | str
    identity: str


def read_tensorboard(run: Path) -> Copy:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(run / "tensorboard"), size_guidance={"scalars": 0, "tensors": 0})
    found.Reload()
    series = {tag: [(e.step, e.value) for e in found.Scalars(tag)] for tag in found.Tags()["scalars"]}
    text = {
        tag: {e.step: e.tensor_proto.string_val[0].decode() for e in found.Tensors(tag)}
        for tag in found.Tags()["tensors"]
    }
    return Copy(series, text.get("samples", {}), list(text["config"].values())[-1], "")


def read_trackio(run: Path, project: str = "albor") -> Copy:
    from trackio.utils import deserialize_values

    with closing(sqlite3.connect(run / "trackio" / f"{project}.db")) as database:
        logged = database.execute("SELECT run_id, step, metrics FROM metrics ORDER BY step, id").fetchall()
        configs = database.execute("SELECT config FROM configs").fetchall()
    series: Series = {}
    samples = {}
    for _, step, metrics in logged:
        for name, value in deserialize_values(json.loads(metrics)).items():
            if name == "samples":
                samples[step] = value["_value"]
            else:
                series.setdefault(name, []).append((step, value))
    (run_id,) = {row[0] for row in logged}
    return Copy(series, samples, json.loads(configs[-1][0]), run_id)


def read_wandb(run: Path) -> Copy:
    (path,) = (run / "wandb").glob("offline-run-*/run-*.wandb")  # one file has all of it
    series: Series = {}
    samples, config, identity = {}, {}, ""
    for record in wandb_records(path):
        kind = record.WhichOneof("record_type")
        if kind == "run":
            identity = record.run.run_id
            config |= {item.key: json.loads(item.value_json) for item in record.run.config.update}
        elif kind == "history":
            values = {
                (item.key or "/".join(item.nested_key)): json.loads(item.value_json)
                for item in record.history.item
            }
            step = record.history.step.num
            for name, value in values.items():
                if name == "samples/path":
                    samples[step] = html.unescape((path.parent / "files" / value).read_text())
                elif not name.startswith(("_", "samples/")):
                    series.setdefault(name, []).append((step, float(value)))
        elif kind == "summary":
            for item in record.summary.update:
                name = item.key or "/".join(item.nested_key)
                if name.startswith("final/"):
                    series[name] = [(-1, float(json.loads(item.value_json)))]
    return Copy(series, samples, config, identity)


def wandb_records(path: Path) -> Iterator[Any]:
    """The records of a .wandb file: LevelDB's log format behind 7 bytes of wandb's own."""
    from wandb.proto.wandb_internal_pb2 import Record

    content, at, parts = path.read_bytes(), 7, b""
    while at + 7 <= len(content):
        if 32768 - at % 32768 < 7:  # no room for a header: the block is padded
            at += 32768 - at % 32768
            continue
        length, kind = int.from_bytes(content[at + 4 : at + 6], "little"), content[at + 6]
        parts = (
            content[at + 7 : at + 7 + length] if kind in (1, 2) else parts + content[at + 7 : at + 7 + length]
        )
        at += 7 + length
        if kind in (1, 4):  # whole, or its last part
            yield Record.FromString(parts)


READERS = {"tensorboard": read_tensorboard, "trackio": read_trackio, "wandb": read_wandb}


def truth(run: Path) -> Series:
    """The series of metrics.jsonl, with the tokens."""
    found: Series = {}
    for row in rows(run):
        for name, value in {"tokens": row["tokens"], **known_metrics(row)}.items():
            if value is not None and (row["step"], value) not in found.setdefault(name, []):
                found[name].append((row["step"], value))
    return {name: points for name, points in found.items() if points}


def assert_same(found: Series, expected: Series) -> None:
    """The same names, steps and values, in the precision of single floats; NaN is equal to NaN."""
    found = {name: sorted(set(map(repr, points))) and points for name, points in found.items()}
    assert sorted(name for name in found if not name.startswith("final/")) == sorted(expected)
    for name, points in expected.items():
        unique = dict(found[name])  # tokens stand in the rows of training and of validation
        if name != "tokens":
            assert len(unique) == len(found[name]), f"{name} stands twice at a step"
        assert list(unique) == [step for step, _ in points], name
        assert list(unique.values()) == pytest.approx(
            [value for _, value in points], rel=1e-6, nan_ok=True
        ), name


@pytest.fixture
def config(tmp_path: Path) -> Path:
    return write_project(tmp_path)


@pytest.fixture
def run(config: Path) -> Path:
    """A run directory with nothing in it."""
    directory = config.parent / "runs" / "tiny"
    directory.mkdir(parents=True)
    return directory


def settings(config: Path, *overrides: str) -> RunConfig:
    return load_config(config, overrides)


def row(step: int, loss: float | None) -> dict[str, Any]:
    time = f"2026-01-31T12:00:{step:02d}.250+00:00"
    return {"step": step, "tokens": step * 96, "time": time, "train/loss": loss, "train/mfu": None}


def sample(step: int, text: str | None) -> dict[str, Any]:
    return {"event": "sample", "step": step, "prompt": "the", "text": text}


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc").exists(), reason="looks for processes in /proc")
def test_a_run_that_is_killed_and_goes_on_is_in_all_three_as_in_its_log(config: Path):
    """Nothing else is written, sent or left running, and the bits are those of a run without."""
    home, mark = config.parent / "home", f"trackers-{os.getpid()}-{time.time_ns()}"
    home.mkdir()
    with socket.create_server(("127.0.0.1", 0)) as proxy:  # what is sent anywhere comes here
        proxy.setblocking(False)
        address = f"http://127.0.0.1:{proxy.getsockname()[1]}"
        kept = {
            key: value for key, value in ENVIRONMENT.items() if not key.startswith(("XDG_", "HF_", "WANDB_"))
        }
        proxies = dict.fromkeys(("http_proxy", "https_proxy", "HTTPS_PROXY", "ALL_PROXY"), address)
        environment = kept | proxies | {"HOME": str(home), "MARK": mark, "OMP_NUM_THREADS": "1"}
        command = ("train", config, f"track.to={json.dumps(REAL)}", "track.group=g", "track.tags=[a]")
        killed = environment | {VARIABLE: "step.updated:11:kill"}
        assert albor(config.parent, *command, env=killed).code == -signal.SIGKILL
        run = config.parent / "runs" / "tiny"
        wait_until_gone(mark)
        before = read_wandb(run).identity
        result = albor(config.parent, *command, env=environment)
        assert result.code == 0, result.err
        with pytest.raises(BlockingIOError):
            proxy.accept()
    wait_until_gone(mark)
    assert list(home.iterdir()) == []
    assert sorted(path.name for path in config.parent.iterdir()) == [
        "corpus",
        "data",
        "home",
        "runs",
        "tiny.yaml",
    ]
    final = json.loads((run / "eval" / "final.json").read_text())
    for name, reader in READERS.items():
        found = reader(run)
        assert_same(found.series, truth(run))
        assert found.series["final/val/loss"][-1][1] == pytest.approx(final["val/loss"], rel=1e-6)
        assert list(found.samples) == [4, 8, 12, 16, 20, 24]
        assert name != "wandb" or found.identity == before
        assert "max_steps: 24" in found.config if isinstance(found.config, str) else found.config["seed"] == 7
    assert not events(run, "tracker_failed")
    assert not events(run, "tracker_incomplete")

    plain = call("train", config, "name=plain", f"runs_dir={config.parent / 'runs'}")
    assert plain.code == 0
    assert bits(config.parent / "runs" / "plain") == bits(run)


def wait_until_gone(mark: str) -> None:
    """Until no process has `mark` in its environment."""
    deadline = time.monotonic() + 20
    while any(holds(path / "environ", mark) for path in Path("/proc").glob("[0-9]*")):
        assert time.monotonic() < deadline, "a tracker's process outlives the run"
        time.sleep(0.1)


def holds(environ: Path, mark: str) -> bool:
    try:
        return mark.encode() in environ.read_bytes()
    except OSError:
        return False


def test_going_back_takes_the_rows_beyond_with_it(config: Path, run: Path):
    """Null is left out; NaN and infinity stay. (Above, another process goes back.)"""
    log = [row(step, 0.5) for step in range(1, 7)]
    feeds = [Feed(tracker, run, settings(config)) for tracker in REAL]
    for feed in feeds:
        send(feed, {"rewind": 0}, *({"row": record} for record in log))
    write_log(run, log := log[:3])  # what the trainer does before it says so
    log += [row(4, math.nan), row(5, 0.25), row(6, None), row(7, -math.inf)]
    for feed in feeds:
        send(feed, {"rewind": 3}, *({"row": record} for record in log[3:]))
        send(feed, {"event": sample(7, "w < r\n```")}, {"event": sample(7, None)})
        feed.finish(75)
    loss = [(1, 0.5), (2, 0.5), (3, 0.5), (4, math.nan), (5, 0.25), (7, -math.inf)]
    for feed in feeds:
        feed.close(30.0)
        assert feed.problem is None
        found = READERS[feed.tracker](run)
        assert_same(found.series, {"train/loss": loss, "tokens": [(step, step * 96) for step in range(1, 8)]})
        (text,) = found.samples.values()
        assert "    thew < r\n    ```\n" in text
        assert "the (no text: the logits were not finite)" in text


def test_what_a_killed_trainer_had_not_handed_over_comes_when_the_run_goes_on(config: Path, run: Path):
    log = [row(step, 0.5) for step in range(1, 7)]
    for handed, logged in ((log[:3], log[:3]), ([], log)):
        write_log(run, logged)
        feeds = [Feed(tracker, run, settings(config)) for tracker in REAL]
        for feed in feeds:
            send(feed, {"rewind": logged[-1]["step"] if not handed else 0}, *({"row": r} for r in handed))
            assert finish(feed, 1) is None
    expected = {
        "train/loss": [(step, 0.5) for step in range(1, 7)],
        "tokens": [(step, step * 96) for step in range(1, 7)],
    }
    for reader in READERS.values():
        assert_same(reader(run).series, expected)


def write_log(run: Path, log: list[dict[str, Any]]) -> None:
    from albor.train.metrics import _encode

    (run / "metrics.jsonl").write_bytes(b"".join(map(_encode, log)))


def send(feed: Feed, *messages: dict[str, Any]) -> None:
    for message in messages:
        feed.put(message)


def finish(feed: Feed, exit_code: int, seconds: float = 30.0) -> str | None:
    """What was wrong with it."""
    feed.finish(exit_code)
    feed.close(seconds)
    return feed.problem


def test_a_run_that_is_over_is_written_anew(config: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(config.parent)
    assert call("train", config, "train.max_steps=5", "schedule.warmup_steps=2").code == 0
    run = config.parent / "runs" / "tiny"
    with open(run / "metrics.jsonl", "ab") as file:
        file.write(b'{"step": 6, "tok\n')
    for _ in range(2):  # in place of what is there
        result = call("track", run, "--to", "tensorboard", "--json")
        assert json.loads(result.out)["trackers"] == {"tensorboard": {"rows": 7, "problem": None}}
        assert "metrics.jsonl:8" in result.err
    lines = (run / "metrics.jsonl").read_text().splitlines()
    (run / "metrics.jsonl").write_text("\n".join(lines[:-1]) + "\n")
    found = read_tensorboard(run)
    assert_same(found.series, truth(run))
    assert list(found.samples) == [4, 5]
    assert call("track", run, "--to", "tensorboad").code == 2
    with open(run / "config.resolved.yaml", "a") as file:  # of another albor
        file.write("something: 1\n")
    result = call("track", run, "--to", "tensorboard")
    assert result.code == 0
    assert "something: unknown to this albor; it is left out" in result.out
    assert call("track", run, "--to", "tensorboard", "track.projekt=a").code == 2
    assert call("track", config.parent, "--to", "tensorboard").code == 2


def test_what_a_finished_run_hands_over():
    """Samples behind the rows of their steps; of those that were written twice the last, none of steps that
    are gone."""
    handed: list[dict[str, Any]] = []

    class Recorder:
        put = staticmethod(lambda message, wait: handed.append(message))

    drawn = [sample(2, "old"), sample(4, "gone"), sample(2, "new")]
    assert (
        send_run(Recorder(), [row(1, 1.0), row(2, 1.0), row(3, 1.0)], drawn, {"val/loss": 2.0, "run": "x"})
        == 3
    )
    order = [next(iter(message)) for message in handed]
    assert order == ["rewind", "row", "row", "event", "row", "summary"]
    assert handed[3]["event"]["text"] == "new"
    assert handed[5] == {"summary": {"val/loss": 2.0}, "step": 3}


def test_a_row_is_what_is_known_of_it():
    found = as_row(row(7, math.inf) | {"val/loss": None, "non_finite": {"val/loss": "nan"}})
    assert (found.step, found.tokens, found.seconds) == (7, 672, 1769860807.25)
    assert found.metrics["train/loss"] == math.inf
    assert math.isnan(found.metrics["val/loss"])
    assert "train/mfu" not in found.metrics


# What fails: a package called wandb that does, in the worker

FAKE = """\
import atexit, os, sys, time
def Settings(**keys): pass
def Html(text, inject): return text
def teardown(code): pass
def init(**keys):
    {init}
    return Run()
class Run:
    id, summary = "x", {{}}
    def log(self, values, step):
        open({record!r}, "a").write(f"{{step}}\\n")
        {log}
    def finish(self, exit_code):
        {finish}
"""


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Makes such a package, and returns the file in which it notes the steps that it got."""

    def make(init: str = "pass", log: str = "pass", finish: str = "pass") -> Path:
        record = tmp_path / "fake" / "steps"
        (tmp_path / "fake" / "wandb").mkdir(parents=True)
        content = FAKE.format(init=init, log=log, finish=finish, record=str(record))
        (tmp_path / "fake" / "wandb" / "__init__.py").write_text(content)
        monkeypatch.setenv("PYTHONPATH", str(tmp_path / "fake"))
        monkeypatch.syspath_prepend(tmp_path / "fake")
        return record

    return make


@pytest.mark.parametrize(
    ("where", "problem"),
    [
        (
            {"init": "raise OSError(28, 'No space left on device')"},
            "OSError: [Errno 28] No space left on device",
        ),
        ({"log": "raise ValueError('no\\n  step')"}, "ValueError: no step"),
        ({"log": "os._exit(0)"}, "its process has ended"),
        ({"finish": "os.kill(os.getpid(), 9)"}, "its process has ended"),
        ({"finish": "sys.exit(3)"}, "SystemExit: 3"),
    ],
)
def test_a_tracker_that_fails_says_why(
    where: Mapping[str, str], problem: str, fake: Any, config: Path, run: Path
):
    fake(**where)
    feed = Feed("wandb", run, settings(config))
    send(feed, {"rewind": 0}, {"row": row(1, 1.0)}, {"row": row(2, 1.0)})
    assert finish(feed, 0) == problem


def test_a_tracker_that_hangs_is_ended_in_time_and_what_it_lacks_is_counted(
    fake: Any, config: Path, run: Path
):
    record = fake(log="time.sleep(100)")
    feed = Feed("wandb", run, settings(config), queued=8)
    feed.put({"rewind": 0})
    wide = row(1, 1.0) | {f"gradients/{number}": 0.1 for number in range(3000)}  # wider than a pipe
    feed.put({"row": wide}, wait=True)
    while not record.exists():
        time.sleep(0.05)
    started = time.monotonic()
    for step in range(2, 40):
        feed.put({"row": wide | {"step": step}})
    assert time.monotonic() - started < 1.0, "the training waits for it"
    assert 38 - 8 - 1 <= feed.left_out <= 38 - 8 + 1  # one may be on its way
    feed.put({"rewind": 1})
    assert feed.problem == "it did not keep up when the run went back"
    started = time.monotonic()
    finish(feed, 0, seconds=0.5)
    assert time.monotonic() - started < 3.0
    assert feed._process.poll() == -signal.SIGKILL


def test_a_slow_tracker_hears_of_the_end_though_its_queue_is_full(fake: Any, config: Path, run: Path):
    fake(log="time.sleep(0.02)")
    feed = Feed("wandb", run, settings(config), queued=2)
    feed.put({"rewind": 0}, wait=True)
    wide = row(1, 1.0) | {f"gradients/{number}": 0.1 for number in range(3000)}  # wider than a pipe
    for step in range(1, 20):
        feed.put({"row": wide | {"step": step}}, wait=True)
    assert finish(feed, 0, seconds=5.0) is None
    assert feed.left_out == 0


def test_a_worker_ends_after_its_trainer_did(fake: Any, config: Path, run: Path):
    """Which was killed and could say nothing; the tracker hangs."""
    record = fake(finish="time.sleep(100)")
    feed = Feed("wandb", run, settings(config), close_seconds=0.5)
    send(feed, {"rewind": 0}, {"row": row(1, 1.0)})
    while not record.exists():
        time.sleep(0.05)
    feed._queue.put(None)  # as the end of the trainer's process does, this closes the pipe
    assert feed._process.wait(timeout=10) == 1


def test_a_run_with_a_tracker_that_fails_is_the_run_without(
    fake: Any, config: Path, monkeypatch: pytest.MonkeyPatch
):
    """The same bits and exit code; said once on the terminal and in the log, and at the end what to do."""
    fake(log="if step == 3: print('x' * 9999); raise RuntimeError('full')")
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    monkeypatch.chdir(config.parent)
    short = ("train.max_steps=8", "evaluate.smoke_test=false")
    tracked = call("train", config, *short, "track.to=[wandb]")
    plain = call("train", config, *short, "name=plain")
    assert tracked.code == plain.code == 0
    run = Path("runs/tiny")
    assert bits(run) == bits(Path("runs/plain"))
    (failed,) = events(run, "tracker_failed")
    assert (failed["tracker"], failed["error"]) == ("wandb", "RuntimeError: full")
    (incomplete,) = events(run, "tracker_incomplete")
    assert incomplete["tracker"] == "wandb"
    assert tracked.out.count("wandb: RuntimeError: full; training goes on") == 1
    assert tracked.out.count("albor track runs/tiny --to wandb") == 1
    assert "track" not in plain.out
    assert "wandb" not in sys.modules, "the trainer itself imports no tracker"


def test_a_stop_waits_for_a_hanging_tracker_only_so_long(
    fake: Any, config: Path, monkeypatch: pytest.MonkeyPatch
):
    fake(init="time.sleep(100)")
    monkeypatch.setattr("albor.train.run._STOP_SECONDS", 0.5)
    after_step = Loop._after_step

    def stop_at_5(self: Loop, *arguments: Any) -> None:
        after_step(self, *arguments)
        if self.session.state.step == 5:
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(Loop, "_after_step", stop_at_5)
    monkeypatch.chdir(config.parent)
    stopped = call("train", config, "track.to=[wandb]")
    assert stopped.code == 75
    assert "waiting for wandb to write what is left, at most 0.5 seconds" in stopped.out
    assert checkpoints(Path("runs/tiny"))[-1] == 5
    (failed,) = events(Path("runs/tiny"), "tracker_failed")
    assert failed["error"] == "it did not end within 0.5 seconds"


def test_a_tracker_that_is_not_installed_is_refused_before_anything_is_done(
    config: Path, monkeypatch: pytest.MonkeyPatch
):
    found = importlib.util.find_spec
    monkeypatch.setattr(
        "albor.trackers.installed.importlib.util.find_spec",
        lambda name: None if name in ("trackio", "wandb") else found(name),
    )
    monkeypatch.chdir(config.parent)
    result = call("train", config, "track.to=[wandb,tensorboard,trackio]")
    assert result.code == 2
    assert "track.to: wandb is not installed; run: pip install wandb, or 'albor[track]' for all" in result.err
    assert "trackio is not installed" in result.err
    assert "tensorboard" not in result.err
    assert not Path("runs").exists()
    assert not Path("data").exists()
    assert call("train", config, "track.to=[wandb,wandb]").code == 2


def test_wandb_goes_back_online_by_resuming_from_the_step(fake: Any, config: Path, run: Path, tmp_path: Path):
    """What its server does with that is its own; a copy that is to be empty is a new run."""
    log = tmp_path / "calls"
    shown = "'id', 'resume', 'resume_from', 'project', 'entity', 'group', 'tags', 'mode'"
    fake(init=f"open({str(log)!r}, 'a').write(repr([keys.get(name) for name in ({shown})]) + '\\n')")
    keys = ("track.wandb_mode=online", "track.entity=e", "track.group=g", "track.tags=[t]", "track.project=p")
    for step in (0, 7, -1):
        feed = Feed("wandb", run, settings(config, *keys))
        feed.put({"rewind": step})
        assert finish(feed, 0) is None
        names = (run / "wandb" / "run_id").read_text().split()
        if step == 0:
            (first,) = names
    (last,) = names
    rest = "'p', 'e', 'g', ('t',), 'online']"
    assert log.read_text().splitlines() == [
        f"['{first}', 'allow', None, {rest}",
        f"[None, None, '{first}?_step=7', {rest}",
        f"['{last}', 'allow', None, {rest}",
    ]
    assert first != last


def test_trackers_are_told_of_samples_only(monkeypatch: pytest.MonkeyPatch, config: Path, run: Path):
    """Of all events; the rest is in the log."""
    handed: list[dict[str, Any]] = []
    monkeypatch.setattr(
        Feed,
        "__init__",
        lambda self, tracker, *_: vars(self).update(tracker=tracker, left_out=0, problem=None),
    )
    monkeypatch.setattr(Feed, "put", lambda self, message: handed.append(message))
    trackers = Trackers(run, settings(config, "track.to=[tensorboard]"), print, print)
    trackers.event({"event": "checkpoint", "step": 1})
    trackers.event(sample(1, None))
    trackers.rewind(0)
    assert handed == [{"event": sample(1, None)}, {"rewind": 0}]


def test_two_runs_share_a_dashboard_of_trackio(config: Path, run: Path, tmp_path: Path):
    """With `trackio_dir`; one that goes on goes on in its own rows, though another one has its name."""
    shared = f"track.trackio_dir={tmp_path / 'shared'}"
    other = run.parent / "other"
    other.mkdir()
    for directory, loss in ((run, 0.5), (other, 0.25)):  # one after the other: the newer one has the name
        feed = Feed("trackio", directory, settings(config, shared))
        send(feed, {"rewind": 0}, {"row": row(1, loss)})
        write_log(directory, [row(1, loss)])
        assert finish(feed, 75) is None
    feed = Feed("trackio", run, settings(config, shared))
    send(feed, {"rewind": 1}, {"row": row(2, 0.5)})
    assert finish(feed, 0) is None
    with closing(sqlite3.connect(tmp_path / "shared" / "albor.db")) as database:
        logged = database.execute("SELECT run_id, step, metrics FROM metrics ORDER BY id").fetchall()
    by_run: dict[str, list[tuple[int, float]]] = {}
    for run_id, step, metrics in logged:
        by_run.setdefault(run_id, []).append((step, json.loads(metrics)["train/loss"]))
    assert sorted(by_run.values()) == [[(1, 0.25)], [(1, 0.5), (2, 0.5)]]
