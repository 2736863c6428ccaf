"""The command line: exit codes, what goes to which stream, what a terminal sees, and what is not imported."""

from __future__ import annotations

import contextlib
import io
import json
import os
import pty
import re
import select
import shlex
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

import pytest
import typer.main
from run_cases import ENVIRONMENT, Result, albor, call, checkpoints, tree, write_project

import albor as package
from albor.cli import app, main
from albor.configfile import load_config
from albor.data.tokenizer import Tokenizer
from albor.errors import AlborError
from albor.ladder.file import load_ladder
from albor.sweep.file import load_sweep

ROOT = Path(__file__).parents[1]
MALFORMED = sorted((ROOT / "tests" / "configs_malformed").glob("*.yaml"))
LARGE = ROOT / "configs" / "pretrain-350m.yaml"
RUN = Path("runs/tiny")
WITH_CONFIG = ("train", "vram-estimate", "data prepare", "tokenizer train", "tokenizer inspect")
COLOUR = re.compile(rb"\x1b\[(?:\d+;)*(?:3[0-8]|4[0-8]|9[0-7]|10[0-7])(?:;\d+)*m")


@pytest.fixture(scope="module")
def trained(config: Path) -> Path:
    """A run of a few steps, for what reads a model."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(config.parent)
        assert call("train", config, "name=trained", "train.max_steps=8").code == 0
    return config.parent / "runs" / "trained"


@pytest.fixture(autouse=True)
def own_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")


# Help and the small commands


def commands() -> Iterator[tuple[tuple[str, ...], str]]:
    """(names, docstring) of every command."""

    def walk(command: Any, names: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], str]]:
        for name, below in getattr(command, "commands", {}).items():
            yield from walk(below, (*names, name))
        if not hasattr(command, "commands"):
            yield names, command.callback.__doc__

    return walk(typer.main.get_command(app), ())


def examples(doc: str) -> list[str]:
    return [line.strip() for line in doc.splitlines() if re.match(r" *albor |.*\| albor ", line)]


@pytest.mark.parametrize(
    ("names", "doc"), list(commands()), ids=lambda value: "-".join(value) if isinstance(value, tuple) else ""
)
def test_help_shows_examples_that_can_be_copied(names: tuple[str, ...], doc: str):
    result = call(*names, "--help")
    assert result.code == 0
    assert examples(doc), "no example"
    for example in examples(doc):
        assert example in result.out, "is wrapped at 80 columns"
        words = shlex.split(example.partition(" > ")[0].rpartition("| ")[2])
        assert words[: 1 + len(names)] == ["albor", *names]
        if files := [word for word in words if word.startswith("configs/")]:
            overrides = [word for word in words if re.match(r"[a-z_.]+=", word)]
            load = {"ladder": load_ladder, "sweep": load_sweep}.get(words[1])
            load(ROOT / files[0]) if load else load_config(ROOT / files[0], overrides)


def test_version():
    assert call("--version") == (0, f"albor {package.__version__}\n", "")


def test_the_schema_is_the_shipped_one():
    assert call("schema") == (0, (ROOT / "albor" / "config.schema.json").read_text(), "")


# Exit codes


@pytest.mark.parametrize("path", MALFORMED, ids=lambda path: path.stem)
def test_a_malformed_file_is_explained_and_nothing_else_happens(path: Path):
    """Every problem on standard error, each on its line of the file."""
    expected = re.findall(r"^# (\d+: .*)$", path.read_text(), re.MULTILINE)
    result = call("train", path)
    assert (result.code, result.out) == (2, "")
    assert [line for line in result.err.splitlines() if line != "albor:"] == [
        ("albor: " if len(expected) == 1 else "") + f"{path}:{line}" for line in expected
    ]
    assert not tree(Path())


@pytest.mark.parametrize("command", WITH_CONFIG)
def test_every_command_refuses_a_bad_configuration(command: str, config: Path):
    for arguments in ([MALFORMED[0]], [config, "optimizer.lr=fast"], ["absent.yaml"]):
        result = call(*command.split(), *arguments)
        assert (result.code, result.out) == (2, "")
        assert result.err.startswith("albor:")
        assert not tree(Path())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["bogus"], "No such command"),
        (["train", "tiny.yaml", "--bogus"], "No such option"),
        (["train"], "Missing argument"),
        (["vram-estimate", LARGE, "--gpu", "RTX 4900"], "did you mean RTX 4090"),
        (["vram-estimate", LARGE, "--vram", "much"], "command line: --vram: "),
        (["vram-estimate", LARGE, "--vram", "9.39"], "did you mean 9.39GiB?"),
        (["vram-estimate", LARGE, "--vram", "0"], "0 is less than a byte; write for example 24GiB"),
        (["vram-estimate", LARGE, "--vram", "0GiB"], "0GiB is less than a byte"),
        (["vram-estimate", LARGE, "--vram", "24"], "24 bytes hold no model; did you mean 24GiB?"),
        (["vram-estimate", LARGE, "--vram", "8GiB", "--gpu", "L4"], "give --gpu or --vram"),
        (["vram-estimate", LARGE, "device=cpu", "--gpu", "L4"], "ask about a GPU"),
        (["generate", "runs/x", "--temperature", "-1"], "--temperature"),
    ],
    ids=lambda value: " ".join(map(str, value[:1] + value[2:])) if isinstance(value, list) else "",
)
def test_wrong_usage_is_2(arguments: list[object], message: str):
    result = call(*arguments)
    assert (result.code, result.out) == (2, "")
    assert message in result.err
    assert "Traceback" not in result.err


@pytest.mark.parametrize("what", ["absent", "empty"])
def test_a_run_that_is_not_there_is_1(what: str):
    Path("empty").mkdir()
    result = call("generate", what)
    assert (result.code, result.out) == (1, "")
    assert result.err.startswith(f"albor: {what}: ")
    assert len(result.err.splitlines()) == 1


def test_divergence_is_3(config: Path):
    result = call("train", config, "optimizer.lr=1e30", "schedule.warmup_steps=0")
    assert result.code == 3
    assert "lower optimizer.lr" in result.err
    assert "Traceback" not in result.err


def test_what_does_not_fit_is_4():
    large, small = (call("vram-estimate", LARGE, "--vram", size) for size in ("24GiB", "8GiB"))
    assert (large.code, small.code) == (0, 4)
    assert "Fits: " in large.out
    assert "Does not fit: " in small.out
    assert "train.recompute=block" in small.out
    # As a page prints it, which is no whole number of bytes; the rest of one holds nothing.
    pasted = json_object(call("vram-estimate", LARGE, "--vram", "20.39GiB", "--json"))
    assert pasted["capacity_bytes"] == 21_893_595_791


def test_ctrl_c_before_the_training(config: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(Tokenizer, "train", lambda *_: signal.raise_signal(signal.SIGINT))
    result = call("train", config, "data.cache_dir=new")
    assert (result.code, Path("runs").exists()) == (75, False)
    assert result.err.startswith("albor: stopped by SIGINT before the first step; no training is lost")
    result = call("data", "prepare", config, "data.cache_dir=new")
    assert (result.code, result.err) == (130, "albor: interrupted; there is nothing to save\n")


def test_sigterm_before_the_training(config: Path):
    """On a terminal, whose cursor the progress hides."""
    program = (
        "import signal, sys\nfrom albor.cli import main\nfrom albor.data.tokenizer import Tokenizer\n"
        "Tokenizer.train = lambda *_: signal.raise_signal(signal.SIGTERM)\nmain()\n"
    )
    terminal = Terminal("-c", program, "train", str(config), "data.cache_dir=new")
    assert terminal.finish() == 75
    assert b"\x1b[?25l" in terminal.shown, "there was no progress"
    assert b"albor: stopped by SIGTERM before the first step" in terminal.shown
    assert not list(Path("new").glob("*/")), "an entry that was being written is left"


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        (["data.sources=[{kind: files, path: absent}]"], "'absent' matches no file"),
        (["tokenizer.path=absent.model"], "tokenizer.path: tokenizer absent.model cannot be read"),
        (["data.sources=[{kind: files, path: one.txt}]"], "data.sources[0].separator: is null"),
    ],
)
def test_data_that_the_configuration_names_wrongly_is_2(config: Path, overrides: list[str], named: str):
    Path("one.txt").write_text("text")
    result = call("data", "prepare", config, "data.cache_dir=new", *overrides)
    assert (result.code, result.out) == (2, "")
    assert named in result.err


def test_a_bug_is_said_to_be_one(config: Path, monkeypatch: pytest.MonkeyPatch):
    def broken(*_: object) -> None:
        raise ZeroDivisionError("oh")

    monkeypatch.setattr(Tokenizer, "train", broken)
    result = call("train", config, "data.cache_dir=new")
    assert result.code == 1
    assert "ZeroDivisionError: oh\nalbor: this is a bug in albor" in result.err


def test_a_reader_that_goes_away_is_no_bug():
    """As `albor schema | head -1` does."""
    reading, writing = os.pipe()
    os.close(reading)
    result = albor(Path(), "schema", stdout=writing)
    os.close(writing)
    assert (result.code, result.err) == (1, "")


# Before torch

PROGRAM = """\
import sys
sys.argv = ["albor", *sys.argv[1:]]
from albor.cli import main
try:
    main()
finally:
    loaded = sorted({"torch", "numpy", "sentencepiece"} & set(sys.modules))
    print("loaded:", *loaded, file=sys.stderr)
"""
ABSURD = ("device=cpu", "train.precision=fp32", "model.hidden_size=256K", "model.intermediate_size=1M")


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["vram-estimate", LARGE, "--gpu", "RTX 4090", "--json"], 0),
        (["vram-estimate", LARGE, "--vram", "2GiB"], 4),
        (["train", LARGE, *ABSURD], 4),
        (["train", LARGE, *ABSURD, "--dry-run"], 4),
        (["train", LARGE, *ABSURD, "--dry-run", "--json"], 4),
        (["train", LARGE, "--dry-run"], 0),
        (["train", MALFORMED[0]], 2),
        (["train", "--help"], 0),
    ],
    ids=lambda value: " ".join(map(str, value[:1] + value[2:3])) if isinstance(value, list) else "",
)
def test_answers_without_torch(arguments: list[object], code: int):
    """A plan, a refusal and help come at once: nothing heavy is imported, and nothing is written."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *map(str, arguments)], capture_output=True, text=True, env=ENVIRONMENT
    )
    assert done.returncode == code, done.stderr
    assert done.stderr.splitlines()[-1] == "loaded:"
    assert ("does not fit" in done.stderr) == ("device=cpu" in arguments and "--dry-run" not in arguments)
    if "--dry-run" in arguments:
        assert done.stdout.startswith("{" if "--json" in arguments else "name: ")
    assert not tree(Path())


# Streams


def json_object(result: Result) -> dict[str, Any]:
    """All of standard output is one JSON object."""
    assert result.code == 0, result.err
    value = json.loads(result.out)
    assert isinstance(value, dict)
    return value


def test_json_is_all_of_standard_output(config: Path, trained: Path):
    """With a fresh cache, so that there is progress to tell, which goes to standard error."""
    fresh = f"data.cache_dir={Path().absolute()}/data"
    prepared = call("data", "prepare", config, fresh, "--json")
    assert json_object(prepared)["sources"][0]["documents"] == 20
    assert "training the tokenizer" in prepared.err

    result = call("train", config, fresh, "train.max_steps=5", "--json")
    assert json_object(result)["step"] == 5
    assert "a new run" in result.err
    assert json_object(call("train", config, "--dry-run", "--json")).keys() == {"config", "plan"}
    assert json_object(call("vram-estimate", config, "--json"))["tokens_per_step"] == 96
    assert json_object(call("tokenizer", "inspect", config, "--json"))["vocab_size"] == 360
    written = json_object(call("generate", trained, "--prompt", "the", "--max-tokens", 5, "--json"))
    assert (written["prompt"], written["tokens"], written["stop_reason"]) == ("the", 5, "length")


def test_a_dry_run_shows_the_configuration_and_the_plan(config: Path):
    before = tree(config.parent)
    result = call("train", config, "optimizer.lr=0.5", "--dry-run")
    assert result.code == 0
    assert "lr: 0.5" in result.out
    assert "Device arena" in result.out
    assert not tree(Path())
    assert tree(config.parent) == before


def test_the_tokenizer_is_where_it_says(config: Path):
    result = call("tokenizer", "train", config)
    assert Tokenizer.load(Path(result.out.removesuffix("\n"))).vocab_size == 360


def test_a_pipe_gets_plain_lines(config: Path):
    """Also where the terminal that it leads to has no Unicode, for the braille of the curve."""
    result = albor(Path(), "train", config, env={**ENVIRONMENT, "PYTHONIOENCODING": "ascii"})
    assert (result.code, result.err) == (0, "")
    assert "\x1b" not in result.out
    assert "\r" not in result.out
    lines = [line for line in result.out.splitlines() if re.match(r"step +\d+/24  loss", line)]
    assert [int(line.split()[1].partition("/")[0]) for line in lines] == list(range(1, 25))
    assert max(map(len, lines)) <= 80


def test_the_command_at_the_end_of_the_report_can_be_pasted(config: Path):
    """Also where the shell would take the run's path apart."""
    result = call("train", config, "train.max_steps=5", "runs_dir='my runs (ü)'", "name=pasted")
    command = next(line for line in result.out.splitlines() if "albor generate" in line)
    words = shlex.split(command[command.index("albor") :])
    assert words == ["albor", "generate", "my runs (ü)/pasted", "--prompt", "def "]


# A terminal


class Terminal:
    """A program on a pseudo-terminal, as its controlling one: a Ctrl-C that is typed becomes a signal."""

    def __init__(self, *command: str, **environment: str):
        self.shown = b""
        pid, self.keyboard = pty.fork()
        if pid == 0:
            os.execve(sys.executable, [sys.executable, *command], {**ENVIRONMENT, **environment})
        self.pid, self.settings = pid, termios.tcgetattr(self.keyboard)

    def read_until(self, condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 60
        while not condition():
            assert time.monotonic() < deadline, self.shown
            if select.select([self.keyboard], [], [], 0.01)[0]:
                self.shown += os.read(self.keyboard, 1 << 16)

    def type(self, keys: bytes) -> None:
        os.write(self.keyboard, keys)

    def finish(self) -> int:
        """The exit code; the terminal's settings must be as they were, and the cursor visible."""
        with contextlib.suppress(OSError):  # EIO: the program has closed its side
            while data := os.read(self.keyboard, 1 << 16):
                self.shown += data
        code = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        after = termios.tcgetattr(self.keyboard)
        os.close(self.keyboard)
        assert after == self.settings
        assert self.shown.rfind(b"\x1b[?25h") >= self.shown.rfind(b"\x1b[?25l"), "the cursor is hidden"
        return code


@pytest.mark.parametrize("environment", [{}, {"NO_COLOR": "1"}], ids=["colour", "NO_COLOR"])
def test_ctrl_c_in_the_live_display(config: Path, environment: dict[str, str]):
    """Saves, gives the terminal back as it was, and keeps to NO_COLOR."""
    terminal = Terminal(
        *("-m", "albor", "train", str(config), "train.max_steps=5000", "data.max_epochs=5000"), **environment
    )
    terminal.read_until(lambda: b"checkpoint" in terminal.shown and b"step-0000" in terminal.shown)
    assert b"\x1b[?25l" in terminal.shown, "there was no live display"
    terminal.type(b"\x03")
    assert terminal.finish() == 75
    assert b"stopped by SIGINT" in terminal.shown
    assert b"Traceback" not in terminal.shown
    assert checkpoints(RUN)
    assert bool(COLOUR.search(terminal.shown)) == (not environment)


def test_a_second_ctrl_c_gives_the_cursor_back():
    program = (
        "import signal, time\nfrom albor.train.signals import StopRequest\nprint('\\x1b[?25l', flush=True)\n"
        "with StopRequest() as stop:\n    stop.defer()\n"
        "    for _ in range(2):\n        signal.raise_signal(signal.SIGINT)\n        time.sleep(0.7)\n"
    )
    terminal = Terminal("-c", program)
    assert terminal.finish() == 128 + signal.SIGINT


# Writing


def generate(run: Path, *arguments: object) -> str:
    result = call("generate", run, "--max-tokens", 30, *arguments)
    assert (result.code, result.err) == (0, "")
    return result.out


def test_the_same_seed_writes_the_same_text(trained: Path):
    first = generate(trained, "--prompt", "the", "--seed", 1)
    assert first.startswith("the")
    assert len(first) > 20
    assert generate(trained, "--prompt", "the", "--seed", 1) == first
    assert generate(trained, "--prompt", "the", "--seed", 2) != first
    assert generate(trained / "checkpoints" / "step-00000008", "--prompt", "the", "--seed", 1) == first
    settings = (["--temperature", 0], ["--top-k", 1], ["--top-p", 0])
    assert len({generate(trained, "--prompt", "the", *setting) for setting in settings}) == 1
    assert generate(trained, "--prompt", "the", "--top-k", 1, "--seed", 2) != first


def test_text_is_shown_as_it_is_written(trained: Path):
    class Shown(io.StringIO):
        """Remembers what had been written at each flush."""

        def __init__(self) -> None:
            super().__init__()
            self.moments: list[str] = []

        def flush(self) -> None:
            self.moments.append(self.getvalue())

    out = Shown()
    with pytest.MonkeyPatch.context() as patch, contextlib.suppress(SystemExit):
        patch.setattr(sys, "argv", ["albor", "generate", str(trained), "--max-tokens", "30"])
        patch.setattr(sys, "stdout", out)
        main()
    lengths = [len(moment) for moment in out.moments]
    assert lengths == sorted(lengths)
    assert len(set(lengths)) > 10


def test_a_prompt_from_standard_input(trained: Path, monkeypatch: pytest.MonkeyPatch):
    expected = generate(trained, "--prompt", "the model\r\n")
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"the model\r\n")))
    assert generate(trained, "--prompt", "-") == expected


@pytest.mark.parametrize("prompt", ["-", "\udcff"])
def test_a_prompt_that_is_not_utf8_is_refused(trained: Path, monkeypatch: pytest.MonkeyPatch, prompt: str):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"\xff")))
    result = call("generate", trained, "--prompt", prompt)
    assert (result.code, result.out) == (2, "")
    assert result.err == "albor: command line: --prompt: is not UTF-8 text\n"


def test_a_stop_string_ends_the_text(trained: Path):
    free = json_object(call("generate", trained, "--prompt", "the", "--json"))
    stop = free["text"][5:7]
    stops = ("--stop", "@@", "--stop", stop)
    stopped = json_object(call("generate", trained, "--prompt", "the", *stops, "--json"))
    assert stopped["text"] == free["text"][: free["text"].index(stop)]
    assert stopped["stop_reason"] == "stop_string"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prompt", "the model " * 200], "tokens, and the model's context holds 64 "),
        (["--prompt", "the", "--stop", ""], "stop: is empty"),
    ],
    ids=["prompt", "stop"],
)
def test_a_prompt_is_not_echoed_before_it_is_accepted(trained: Path, arguments: list[str], message: str):
    result = call("generate", trained, *arguments)
    assert (result.code, result.out) == (2, "")
    assert message in result.err


def test_a_prompt_that_nothing_follows_is_shown(trained: Path):
    """The whole text is held back by a stop string that it may be the beginning of, or is one."""
    text = json_object(call("generate", trained, "--prompt", "the", "--json"))["text"]
    assert generate(trained, "--prompt", "the", "--stop", text[0]) == "the\n"


@pytest.mark.parametrize(
    "command", [("train", "--resume", "nowhere"), ("canary",), ("verify-resume", "--steps", "99999")]
)
def test_what_one_should_know_of_the_machine_is_said_once(
    command: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """All of it: the estimate's notes, of which a dtype that falls back is one."""

    def refuse(*_: object) -> NoReturn:
        raise AlborError("enough")

    monkeypatch.setattr("albor.memory.estimate.Estimate.notes", property(lambda self: ["One.", "Another."]))
    monkeypatch.setattr("albor.canary.run.run_canary", refuse)
    monkeypatch.chdir(tmp_path)
    result = call(command[0], write_project(tmp_path), *command[1:])
    assert result.code != 0
    assert (result.out + result.err).startswith("One.\nAnother.\n")
    assert (result.out + result.err).count("One.") == 1
