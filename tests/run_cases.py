"""A whole run that is small enough for a test: its files, the commands upon it, and what it leaves behind."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

from albor.checkpoint import find_latest
from albor.cli import main

STEPS = 24
YAML = """\
name: tiny
seed: 7
device: cpu
model:
  hidden_size: 32
  intermediate_size: 64
  num_hidden_layers: 2
  num_attention_heads: 2
  num_key_value_heads: 1
  vocab_size: 360
  max_position_embeddings: 64
data:
  sequence_length: 32
  sources: [{kind: files, path: PROJECT/corpus}]
  validation_fraction: 0.2
  max_epochs: 10
  cache_dir: PROJECT/data
optimizer: {lr: 1e-2}
schedule: {warmup_steps: 4}
train: {max_steps: 24, micro_batch_size: 1, gradient_accumulation_steps: 3, precision: fp32}
evaluate: {every_steps: 4, batches: 2, final_batches: 4, prompts: [the], sample_tokens: 8}
checkpoint: {every_steps: 4, keep_last: 2}
log: {every_steps: 1}
"""
ENVIRONMENT = {**os.environ, "TERM": "xterm", "COLUMNS": "80", "LINES": "24"}
_WORDS = ("the", "model", "reads", "text", "and", "writes", "def", "return", "self", "quick", "lazy")


def write_project(directory: Path) -> Path:
    """A corpus of 20 files in `directory`, and beside it the configuration, whose path is returned."""
    rng = random.Random(0)
    (directory / "corpus").mkdir(parents=True)
    for number in range(20):
        lines = (" ".join(rng.choices(_WORDS, k=8)) + ".\n" for _ in range(9))
        (directory / "corpus" / f"{number:02d}.txt").write_text("".join(lines))
    config = directory / "tiny.yaml"
    config.write_text(YAML.replace("PROJECT", str(directory)))
    return config


class Result(NamedTuple):
    """What a command ended with."""

    code: int
    out: str
    err: str


def start(directory: Path, *arguments: object, **keywords: Any) -> subprocess.Popen[str]:
    """`albor ARGUMENTS` in a process of its own, in `directory`."""
    pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    command = [sys.executable, "-m", "albor", *map(str, arguments)]
    return subprocess.Popen(command, cwd=directory, **{"env": ENVIRONMENT, **pipes, **keywords})


def wait(process: subprocess.Popen[str], given: str | None = None) -> Result:
    """Its end; no command here takes a minute."""
    out, err = process.communicate(given, timeout=60)
    return Result(process.returncode, out, err)


def albor(directory: Path, *arguments: object, **keywords: Any) -> Result:
    """`start` and `wait`."""
    return wait(start(directory, *arguments, **keywords))


def call(*arguments: object) -> Result:
    """`albor ARGUMENTS` in this process and its current directory: no start-up, and it can be patched."""
    out, err = io.StringIO(), io.StringIO()
    with (
        mock.patch.object(sys, "argv", ["albor", *map(str, arguments)]),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        try:
            main()
            code = 0
        except SystemExit as end:
            code = int(end.code or 0)
    return Result(code, out.getvalue(), err.getvalue())


def rows(run: Path) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl, every line of which must be whole."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def events(run: Path, kind: str | None = None) -> list[dict[str, Any]]:
    """The events, or those of one kind."""
    found = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    return [event for event in found if kind in (None, event["event"])]


def checkpoints(run: Path) -> list[int]:
    """The steps of the checkpoints that are kept."""
    return sorted(int(path.name.removeprefix("step-")) for path in (run / "checkpoints").glob("step-*"))


def tree(directory: Path) -> dict[str, str]:
    """SHA-256 of every file below `directory`."""
    return {
        str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }


def unlogged(directory: Path) -> dict[str, str]:
    """What a refused command leaves as it was: all but the log, which says that there was one."""
    return {name: digest for name, digest in tree(directory).items() if not name.endswith("events.jsonl")}


def bits(run: Path) -> dict[str, Any]:
    """All that must be equal between two runs that learn the same: every number but the clock's and those
    of memory, and every byte of the newest checkpoint, which must verify, but the run's name."""
    newest = find_latest(run / "checkpoints")
    assert newest is not None
    unlike = ("time", "train/tokens_per_second", "train/mfu", "memory/")
    measured = [{key: value for key, value in row.items() if not key.startswith(unlike)} for row in rows(run)]
    named = ("config.yaml", "manifest.json")
    saved = {name: digest for name, digest in tree(newest).items() if name not in named}
    return {"step": newest.name, "saved": saved, "rows": measured}


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    """Until `condition`, which `process` brings about."""
    deadline = time.monotonic() + 60
    while not condition():
        assert process.poll() is None, f"ended by itself: {process.communicate()}"
        assert time.monotonic() < deadline, "nothing happened for a minute"
        time.sleep(0.001)
