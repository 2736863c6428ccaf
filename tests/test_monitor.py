"""`albor monitor`: what it finds to watch, its keys and sizes, its ends; a real run does not notice it."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import json
import os
import pty
import re
import select
import shutil
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from monitor_cases import EVENTS, ROWS, event, row, write_run
from run_cases import ENVIRONMENT, bits, call, tree
from textual.widgets import Static

from albor.monitor import attach
from albor.monitor.app import Monitor
from albor.monitor.attach import Attachment, Gone, find_target
from albor.runs.follow import Follower
from albor.runs.owner import LOCK, write_owner

SIZES = ((200, 50), (100, 30), (60, 15))
COLOUR = re.compile(rb"\x1b\[(?:\d+;)*(?:3[0-8]|4[0-8]|9[0-7]|10[0-7])(?:;\d+)*m")


@pytest.fixture(autouse=True)
def own_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("NO_COLOR", raising=False)


# What is watched


def begin(directory: Path, **others: Any) -> Path:
    """A run that this process trains, as far as its directory says."""
    run = write_run(directory, events=EVENTS, **others)
    handle = os.open(run / LOCK, os.O_RDWR | os.O_CREAT)
    write_owner(handle)
    os.close(handle)
    return run


def test_without_a_name_it_is_the_only_run_in_progress(tmp_path: Path):
    write_run(Path("runs/old"))
    begin(Path("runs/group/current"))
    result = call("monitor")
    assert result.code == 0
    assert result.out.startswith("run        runs/group/current\nstate      running")


def test_without_a_run_in_progress_or_with_several_it_names_them():
    result = call("monitor")
    assert (result.code, result.err.count("\n")) == (2, 1)
    assert "there are no runs under runs; name a run directory" in result.err
    write_run(Path("runs/old"))
    result = call("monitor")
    assert result.code == 2
    assert "no run is in progress under runs" in result.err
    assert re.search(r"runs/old +finished", result.err)
    begin(Path("runs/a"))
    begin(Path("runs/b"))
    result = call("monitor")
    assert result.code == 2
    assert "2 runs are in progress" in result.err
    assert "albor monitor runs/a" in result.err


@pytest.mark.parametrize(
    ("file", "kind", "part"), [("ladder.json", "ladder", "rung"), ("sweep.json", "sweep", "trial")]
)
def test_of_a_ladder_or_a_sweep_it_is_the_current_run(file: str, kind: str, part: str):
    Path("runs/up").mkdir(parents=True)
    (Path("runs/up") / file).write_text("{}")
    with open("runs/up/.lock", "w") as lock:  # a ladder's own
        fcntl.flock(lock, fcntl.LOCK_EX)
        now = [1000.0]
        attachment = Attachment(find_target(Path("runs/up")), clock=lambda: now[0])
        seen = attachment.poll()
        assert (seen.state, seen.reason) == ("new", f"no {part} of the {kind} has begun")
        write_run(Path("runs/up/first"))
        now[0] += 60
        seen = attachment.poll()
    assert (seen.name, seen.note, seen.state) == ("first", f"{part} of {kind} up, 1 begun", "finished")
    begin(Path("runs/up/second"), rows=[row(1)])
    now[0] += 60
    seen = attachment.poll()
    assert (seen.name, seen.state, seen.step) == ("second", "running", 1)
    assert "2 begun" in seen.note


def test_what_is_no_run_is_refused_and_what_is_there_is_named():
    write_run(Path("runs/one"))
    Path("runs/one/notes.txt").touch()
    for path, told in [("runs", "runs is no run, and holds one"), ("runs/one/notes.txt", "is a file")]:
        result = call("monitor", path)
        assert result.code == 2
        assert told in result.err


def test_a_run_that_has_not_begun_is_waited_for():
    attachment = Attachment(find_target(Path("runs/later")))
    assert attachment.poll().state == "new"
    write_run(Path("runs/later"), rows=ROWS[:3])
    seen = attachment.poll()
    assert (seen.state, seen.step, seen.steps) == ("finished", 3, 24)
    with open("runs/later/metrics.jsonl", "a") as file:
        file.write(json.dumps(row(4)) + "\n" + '{"step": 5, "tok')
    assert attachment.poll().step == 4


@pytest.mark.parametrize("piece", [1, 700, 3000])
def test_a_long_log_is_read_in_pieces(piece: int, monkeypatch: pytest.MonkeyPatch):
    run = write_run(Path("runs/x"))
    with open(run / "metrics.jsonl", "a") as file:
        file.write("not a row\n" + json.dumps(row(11)) + '\n{"step": 12, ')
    first = Follower(run, piece).poll()
    assert first.more
    assert 0 < len(first.rows) < len(ROWS)
    whole = Attachment(run).poll()
    monkeypatch.setattr(attach, "_PIECE", piece)
    attachment = Attachment(run)
    seen = attachment.poll()
    assert seen.step == 11
    assert seen.events == whole.events
    assert seen.problems == whole.problems
    assert seen.charts["loss"].curves[0].values.tolist() == whole.charts["loss"].curves[0].values.tolist()
    assert attachment.poll().revision == seen.revision, "there is nothing more"
    with open(run / "metrics.jsonl", "a") as file:
        file.write('"tokens": 1152}\n')
    assert attachment.poll().step == 12


def test_a_damaged_run_is_shown_as_far_as_it_can_be_read():
    run = write_run(Path("runs/x"))
    with open(run / "metrics.jsonl", "a") as file:
        file.write("not a row\n")
    (run / "config.resolved.yaml").write_text("name: x\nmodel: {hidden_width: 3}\n")
    seen = Attachment(run).poll()
    assert (seen.step, seen.steps) == (10, None)
    assert any("config.resolved.yaml:2: model.hidden_width" in problem for problem in seen.problems)
    assert any("1 damaged line" in problem for problem in seen.problems)


def test_json_is_one_object_and_nothing_is_written():
    run = write_run(Path("runs/x"))
    before = tree(run)
    seen = json.loads(call("monitor", run, "--json").out)
    assert (seen["state"], seen["step"], seen["numbers"]["train/loss"]) == ("finished", 10, 0.8)
    assert call("monitor", run, "--once").code == 0
    assert tree(run) == before


def test_without_its_libraries_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch):
    run = write_run(Path("runs/x"))
    monkeypatch.setitem(sys.modules, "plotext", None)
    result = call("monitor", run)
    assert result.code == 1
    assert "pip install 'albor[monitor]'" in result.err
    assert call("monitor", run, "--json").code == 0


# Keys and sizes


class Shown:
    """The app over a run's directory, headless."""

    def __init__(self, run: Path, size: tuple[int, int] = (100, 30)):
        attachment = Attachment(run)
        self.app = Monitor(attachment.poll, attachment.reload, interval=3600)
        self.app.drawing_share = 1e9  # draws at once
        self.size = size

    def use(self, *keys: str | Callable[[], Any]) -> Shown:
        """Presses keys, and calls what is no key; between them everything is drawn."""

        async def drive() -> None:
            async with self.app.run_test(size=self.size) as self.pilot:
                await self.pilot.pause()
                for key in keys:
                    if isinstance(key, str):
                        await self.pilot.press(key)
                    else:
                        made = key()
                        if asyncio.iscoroutine(made):
                            await made
                    await self.pilot.pause()

        asyncio.run(drive())
        return self

    def part(self, name: str) -> Static:
        return self.app.screen_stack[0].query_one(f"#{name}", Static)

    def parts(self) -> set[str]:
        return {widget.id or "" for widget in self.app.screen_stack[0].query(Static) if widget.display}

    def title(self, name: str = "large") -> str:
        return str(self.part(name).border_title)


def test_keys_choose_the_metric_its_scale_and_its_steps():
    titles: list[str] = []
    shown = Shown(write_run(Path("runs/x")))

    def note() -> None:
        titles.append(shown.title())

    shown.use(
        note, "tab", note, "right", note, "left", "shift+tab", "l", note, "up", "up", note, "down", "l", note
    )
    assert titles == [
        "loss, validation ●", "learning rate 1.00e-03", "tokens/s 96", "loss, validation ●, log scale",
        "loss, validation ●, log scale, last 1/4 of the steps", "loss, validation ●, last 1/2 of the steps",
    ]  # fmt: skip


def test_help_opens_and_closes_and_q_quits():
    depths: list[int] = []
    shown = Shown(write_run(Path("runs/x")))

    def note() -> None:
        depths.append(len(shown.app.screen_stack))

    shown.use(note, "question_mark", note, "escape", note, "q")
    assert depths == [1, 2, 1]
    assert shown.app.return_value == 0


@pytest.mark.parametrize("key", ["q", "escape", "ctrl+c"])
def test_these_keys_quit(key: str):
    assert Shown(write_run(Path("runs/x"))).use(key).app.return_value == 0


def test_a_window_that_changes_its_size_keeps_what_fits():
    found: list[set[str]] = []
    shown = Shown(write_run(Path("runs/x")))
    steps: list[str | Callable[[], Any]] = []
    for size in (*SIZES, (30, 8), SIZES[1]):
        steps += [lambda size=size: shown.pilot.resize_terminal(*size), lambda: found.append(shown.parts())]
    shown.use(*steps)
    everything = {
        "header",
        "keys",
        "large",
        "small-1",
        "small-2",
        "alerts",
        "memory",
        "gradients",
        "events",
        "sample",
    }
    assert found[:2] == [everything, everything]
    assert found[2:4] == [{"header", "keys", "large", "alerts"}, {"header"}]
    assert found[4] == everything


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_the_picture(size: tuple[int, int]):
    """What stands where, by the text of the screen."""
    lines: list[str] = []
    shown = Shown(begin(Path("runs/x")), size)

    def note() -> None:
        strips = shown.app.screen_stack[0]._compositor.render_strips()
        lines.extend("".join(segment.text for segment in strip) for strip in strips)

    shown.use(note)
    assert len(lines) == size[1]
    assert {len(line) for line in lines} == {size[0]}
    assert lines[0].startswith("RUNNING  x")
    assert "step 10/24" in lines[1]
    assert "loss 0.800" in lines[2]
    assert "loss, validation ●" in lines[3]
    assert any("gradients/* > 0.2 holds since step 3" in line for line in lines)
    assert lines[-1].startswith("q quit")
    assert any("●" in line for line in lines[4:-10]) or size[1] < 20, "the validation"
    if size[0] >= 90:
        assert any("attention" in line for line in lines)
        assert any("spike" in line for line in lines)


def test_new_rows_are_drawn_and_the_end_is_said():
    run = begin(Path("runs/x"))
    shown = Shown(run)
    seen: list[str] = []

    def note() -> None:
        seen.append(f"{shown.part('header').content}\n{shown.part('keys').content}")

    def finish() -> None:
        with open(run / "metrics.jsonl", "a") as rows, open(run / "events.jsonl", "a") as events:
            rows.write(json.dumps(row(24, 0.125)) + "\n")
            events.write(json.dumps(event("finished", 24, 30)) + "\n")
        (run / ".lock").write_text("")

    shown.use(note, finish, lambda: shown.app.refresh_view(), note)
    assert "step 10/24" in seen[0]
    assert "q quit" in seen[0]
    assert "FINISHED" in seen[1]
    assert "step 24/24" in seen[1]
    assert "loss 0.125" in seen[1]
    assert "The run has ended: finished (at step 24)." in seen[1]


def test_r_reads_everything_again():
    run = write_run(Path("runs/x"))
    shown = Shown(run)
    found: list[int | None] = []

    def rewrite() -> None:
        status = os.stat(run / "metrics.jsonl")
        text = (run / "metrics.jsonl").read_text().replace('"step": 10', '"step": 12')
        (run / "metrics.jsonl").write_text(text)
        os.utime(run / "metrics.jsonl", ns=(status.st_atime_ns, status.st_mtime_ns))  # a poll sees no change

    def note() -> None:
        found.append(shown.app.view.step if shown.app.view else None)

    shown.use(rewrite, lambda: shown.app.refresh_view(), note, "r", note)
    assert found == [10, 12]


def test_while_rows_come_pictures_wait_and_the_header_does_not():
    run = begin(Path("runs/x"))
    shown = Shown(run)
    shown.app.drawing_share = 1e-9
    titles: list[str] = []

    def more() -> None:
        with open(run / "metrics.jsonl", "a") as rows:
            rows.write(json.dumps(row(11, **{"train/lr": 5e-4})) + "\n")
        shown.app.refresh_view()

    def note() -> None:
        titles.append(shown.title("small-1") + str(shown.part("header").content).split("\n")[1])

    shown.use(more, note, "l", note)
    assert "1.00e-03" in titles[0]
    assert "step 11/24" in titles[0]
    assert "5.00e-04" in titles[1], "a key is answered at once"


# The terminal


class Watching:
    """`albor monitor` on a pseudo-terminal."""

    def __init__(self, *arguments: object, size: tuple[int, int] = (100, 30), **environment: str):
        self.keyboard, self.side = pty.openpty()
        fcntl.ioctl(self.side, termios.TIOCSWINSZ, struct.pack("HHHH", size[1], size[0], 0, 0))
        self.before, self.shown = termios.tcgetattr(self.side), b""
        self.process = subprocess.Popen(
            [sys.executable, "-m", "albor", "monitor", *map(str, arguments)],
            stdin=self.side, stdout=self.side, stderr=self.side, start_new_session=True,
            env={**ENVIRONMENT, "TERM": "xterm-256color", **environment},
        )  # fmt: skip

    def read(self) -> bool:
        """Takes what there is to read for a moment; False once the program has ended and nothing is left."""
        if select.select([self.keyboard], [], [], 0.02)[0]:
            self.shown += os.read(self.keyboard, 1 << 16)
            return True
        return self.process.poll() is None

    def read_until(self, text: bytes) -> None:
        deadline = time.monotonic() + 60
        while text not in self.shown:
            assert self.read(), self.shown
            assert time.monotonic() < deadline, self.shown

    def finish(self) -> int:
        """The exit code; the terminal must be as it was."""
        while self.read():
            pass
        code = self.process.wait(10)
        assert termios.tcgetattr(self.side) == self.before
        for on, off in ((b"?1049h", b"?1049l"), (b"?25l", b"?25h"), (b"?2004h", b"?2004l"), (b"?7l", b"?7h")):
            assert self.shown.count(b"\x1b[" + on) == self.shown.count(b"\x1b[" + off), (
                on,
                self.shown[-300:],
            )
        for mouse in (b"?1000h", b"?1003h"):
            assert mouse not in self.shown
        return code

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        for handle in (self.keyboard, self.side):
            with contextlib.suppress(OSError):
                os.close(handle)


@pytest.fixture
def watch() -> Iterator[Callable[..., Watching]]:
    """Starts `albor monitor`; what is still there at the end is ended."""
    started: list[Watching] = []

    def start(*arguments: object, **keywords: Any) -> Watching:
        started.append(Watching(*arguments, **keywords))
        return started[-1]

    yield start
    for one in started:
        one.close()


def test_whatever_ends_it_the_terminal_is_as_it_was(watch: Callable[..., Watching]):
    run, doomed = begin(Path("runs/x")), begin(Path("runs/doomed"))
    ends: list[tuple[Callable[[Watching], Any], int, bytes]] = [
        (lambda one: os.write(one.keyboard, b"\x03"), 0, b"runs/x: running"),
        (lambda one: one.process.send_signal(signal.SIGTERM), 143, b""),
        (lambda one: one.process.send_signal(signal.SIGHUP), 129, b""),
        (lambda one: shutil.rmtree(doomed), 1, b"runs/doomed is gone: it was moved or deleted"),
    ]
    watching = [watch(doomed if code == 1 else run, "--interval", 0.2) for _, code, _ in ends]
    plain = watch(run, NO_COLOR="1")
    hung = watch(run, "--interval", 0.2)
    for one in (*watching, plain, hung):
        one.read_until(b"q quit")
    for one, (end, _, _) in zip(watching, ends, strict=True):
        end(one)
    os.write(plain.keyboard, b"q")
    for handle in (hung.keyboard, hung.side):
        os.close(handle)
    for one, (_, code, told) in zip(watching, ends, strict=True):
        assert one.finish() == code
        assert told in one.shown
        assert COLOUR.search(one.shown)
    assert plain.finish() == 0
    assert not COLOUR.search(plain.shown)
    assert hung.process.wait(30) != 0, "its terminal was closed"


def test_a_dumb_terminal_gets_plain_lines(watch: Callable[..., Watching]):
    one = watch(write_run(Path("runs/x")), TERM="dumb")
    assert one.finish() == 0
    assert b"\x1b" not in one.shown
    assert b"state      finished (at step 10)" in one.shown


def test_a_run_that_is_watched_learns_the_same_bits(
    watch: Callable[..., Watching], config: Path, whole: dict[str, Any], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(config.parent)
    run = Path("runs/watched")
    one = watch(run, "--interval", 0.1)
    one.read_until(b"Waiting for runs/watched to begin")
    assert call("train", config, "name=watched").code == 0
    one.read_until(b"The run has ended: finished (at step 24)")
    os.write(one.keyboard, b"q")
    assert one.finish() == 0
    assert b"RUNNING" in one.shown
    assert b"runs/watched: finished (at step 24)" in one.shown
    assert bits(run) == whole
    assert set(tree(run)) == set(tree(Path("runs/tiny"))), "nothing is added"


def test_a_directory_that_goes_away_is_told_from_one_that_has_not_come():
    run = write_run(Path("runs/x"))
    attachment = Attachment(run)
    attachment.poll()
    shutil.rmtree(run)
    with pytest.raises(Gone, match=r"runs/x is gone"):
        attachment.poll()
