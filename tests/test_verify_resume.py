"""`albor verify-resume` says that a resume is exact where it is, and what differs where it is not."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_cases import make_state, save_step
from fault_cases import Server
from run_cases import ENVIRONMENT, albor, call, start, tree, wait, wait_for
from test_parent import lives

from albor.configfile import load_config
from albor.errors import CheckpointError
from albor.faults import VARIABLE
from albor.memory.estimate import plan_for_training
from albor.train import saver, verify_resume
from albor.train.metrics import MetricsLog
from albor.train.verify_resume import compare_runs, first_difference


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with Server() as server:
        yield server


@pytest.fixture(autouse=True)
def own_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def through(
    server: Server,
    monkeypatch: pytest.MonkeyPatch,
    mutation: str = "",
    also: dict[str, list[str]] | None = None,
) -> list[tuple[str, int]]:
    """From here on commands are forked off a process that has imported torch already, as in test_faults.py;
    gets what each was told to fail with, and its exit code. A run may be given further arguments."""
    codes = []

    def run_command(arguments: list[str], environment: dict[str, str], _: Any) -> tuple[int, str]:
        fault, (name,) = environment[VARIABLE], (a for a in arguments if a.startswith("name="))
        given = [*arguments, *(also or {}).get(name.removeprefix("name="), ())]
        result = server.run(Path().absolute(), "train", *given, fault=fault, mutation=mutation)
        codes.append((fault, result.code))
        return result.code, result.out + result.err

    monkeypatch.setattr(verify_resume, "run_command", run_command)
    return codes


def test_a_resume_that_is_exact(config: Path, tmp_path: Path):
    """In processes of its own, as people use it."""
    result = albor(tmp_path, "verify-resume", config, "--steps", 6)
    assert (result.code, result.err) == (0, "")
    assert [" ".join(line.split()) for line in result.out.splitlines() if line][-6:] == [
        "stopped in step 4 by SIGKILL, resumed from step 3, compared after step 6",
        "optimizer 28 tensors equal",
        "weights 14 tensors equal",
        "state 10 values equal",
        "logged losses 6 steps equal",
        "the resumed run: identical, bit for bit",
    ]
    assert list(tmp_path.iterdir()) == [], "something is left of it"


@pytest.mark.parametrize(("how", "code", "resumed"), [("kill", -signal.SIGKILL, 4), ("term", 75, 5)])
def test_what_it_does(
    config: Path, server: Server, how: str, code: int, resumed: int, monkeypatch: pytest.MonkeyPatch
):
    codes = through(server, monkeypatch)
    assert call("train", config, "train.max_steps=5", "runs_dir=runs").code == 0
    before = tree(Path("runs"))
    result = call("verify-resume", config, "train.recompute=block", "--signal", how, "--json")
    assert result.code == 0
    found = json.loads(result.out)
    assert found["identical"] is True
    assert (found["steps"], found["stopped_in"], found["resumed_from"]) == (8, 6, resumed)
    assert [(one["what"], one["unit"], one["difference"]) for one in found["comparisons"]] == [
        ("optimizer", "tensors", None),
        ("weights", "tensors", None),
        ("state", "values", None),
        ("logged losses", "steps", None),
    ]
    assert all(one["compared"] >= 8 for one in found["comparisons"])
    end = "step.updated:8:term"
    assert codes == [(end, 75), (f"step.micro_batch:6:{how}", code), (end, 75)]
    assert tree(Path("runs")) == before, "it wrote to the user's runs"


@pytest.mark.parametrize(
    ("mutation", "differs"),
    [
        ("the loader's position is restored", "weights"),
        ("the bias correction's count is restored", "weights"),
        ("rows beyond the checkpoint are taken back", "logged losses"),
    ],
)
def test_a_resume_that_is_not_exact(
    config: Path, server: Server, mutation: str, differs: str, monkeypatch: pytest.MonkeyPatch
):
    """A guard of resuming is dropped in the commands that it runs."""
    through(server, monkeypatch, mutation)
    result = call("verify-resume", config)
    assert result.code == 1
    assert result.out.endswith(
        "two undisturbed runs are equal: it is the resume that is not exact, which is a bug\n"
    )
    (line,) = (line for line in result.out.splitlines() if line.strip().startswith(differs))
    assert line.endswith("differ")
    assert "the resumed run: NOT the run that was never stopped" in result.out
    if differs == "weights":
        number = r"-?[0-9.e-]+"
        assert re.search(
            rf"^    blocks\S+\[\d+.*\] is {number} uninterrupted and {number} resumed; "
            r"[\d,]+ of [\d,]+ values differ$",
            result.out,
            re.MULTILINE,
        )


def test_a_machine_that_repeats_nothing(config: Path, server: Server, monkeypatch: pytest.MonkeyPatch):
    """As if each run drew other numbers: that is no fault of the resume, and is not called one."""
    seeds = {name: [f"seed={seed}"] for seed, name in enumerate(("uninterrupted", "stopped", "repeated"))}
    codes = through(server, monkeypatch, also=seeds)
    result = call("verify-resume", config, "--json")
    found = json.loads(result.out)
    assert (result.code, found["identical"], found["repeats"], len(codes)) == (1, False, False, 4)
    assert found["repetition_differs"].startswith("optimizer: ")
    through(server, monkeypatch, also=seeds)
    assert "two undisturbed runs differ as well: this machine" in call("verify-resume", config).out


def test_the_room_is_looked_at_first(config: Path, server: Server, monkeypatch: pytest.MonkeyPatch):
    codes = through(server, monkeypatch)
    size = saver.size_on_disk(plan_for_training(load_config(config)).plan)
    usage = shutil.disk_usage(".")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=4 * size - 1))
    result = call("verify-resume", config)
    assert (result.code, codes) == (1, [])
    assert result.err.startswith("albor: verify-resume writes 4 checkpoints, ")
    assert not Path("runs").exists()


def test_what_a_command_said_is_not_on_the_disk(config: Path, tmp_path: Path):
    """Which may be full: on one with room for nothing its words reach whoever asks."""
    environment = {**ENVIRONMENT, VARIABLE: "save.begin:*:enospc", "OMP_NUM_THREADS": "1"}
    arguments = [str(config), "train.max_steps=5", "schedule.warmup_steps=1", "checkpoint.retries=0"]
    code, said = verify_resume.run_command(arguments, environment, lambda: None)
    assert code == 1
    assert "No space left on device" in said


def test_a_command_that_fails_is_quoted(config: Path, server: Server, monkeypatch: pytest.MonkeyPatch):
    through(server, monkeypatch)
    result = call("verify-resume", config, "evaluate.batches=1", "data.cache_dir=d", "train.precision=fp16")
    assert result.code == 2  # before anything is started: a CPU cannot
    monkeypatch.setattr(verify_resume, "_POLL_SECONDS", 0.01)
    run = verify_resume.run_command
    monkeypatch.setattr(
        verify_resume, "run_command", lambda arguments, *others: run([*arguments, "seed=x"], *others)
    )
    result = call("verify-resume", config)
    assert result.code == 1
    assert "the uninterrupted run ended with 2, not with 75; it said:" in result.err
    assert "seed: is the text 'x'" in result.err
    assert not list(Path().glob("runs*"))


def test_what_it_refuses(config: Path):
    result = call("verify-resume", config, "--steps", "24")
    assert (result.code, "--steps: is 24, and the run has 24 steps" in result.err) == (2, True)
    result = call("verify-resume", config, "model.hidden_size=1000000", "model.num_hidden_layers=9")
    assert (result.code, "Traceback" in result.err) == (4, False)
    assert not Path("runs").exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP], ids=lambda number: number.name)
def test_an_interrupt_leaves_nothing_behind(config: Path, number: signal.Signals):
    """Neither a file nor a process."""
    process = start(Path(), "verify-resume", config, start_new_session=True)
    trained = "runs/.verify-resume-*/uninterrupted"
    wait_for(lambda: bool(list(Path().glob(trained))), process)
    time.sleep(0.3)
    children = _children(process.pid)
    process.send_signal(number)
    result = wait(process)
    assert result.code == 128 + number
    assert "interrupted; there is nothing to save" in result.err
    assert not Path("runs").exists()
    assert len(children) == 1
    assert not any(Path("/proc", str(child)).exists() for child in children)


def test_a_kill_leaves_no_process_and_the_next_command_no_directory(config: Path, server: Server):
    """SIGKILL cannot be handled: the trainer sees that its parent is gone, and a directory without its lock
    that it has no owner.
    """
    process = start(Path(), "verify-resume", config, start_new_session=True)
    wait_for(lambda: bool(list(Path().glob("runs/.verify-resume-*/uninterrupted"))), process)
    children = _children(process.pid)
    process.kill()
    process.communicate()
    assert len(children) == 1
    deadline = time.monotonic() + 20
    while any(lives(child) for child in children):
        assert time.monotonic() < deadline, "an orphan trains on"
        time.sleep(0.05)
    (left,) = Path("runs").glob(".verify-resume-*")
    with verify_resume._temporary_directory(Path("runs")) as other:
        assert left.exists(), "it may be one that is not locked yet"
        for directory in (left, other):
            os.utime(directory, (0, 0))
        with verify_resume._temporary_directory(Path("runs")):
            assert not left.exists()
            assert other.exists(), "its command lives"
    assert list(Path("runs").iterdir()) == []


def _children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


# What is compared


def run_with(name: str, losses: list[float], change: Any = None, **state: Any) -> Path:
    """A run directory with one checkpoint of step 3, after `change` was done to its tensors."""
    directory = Path(name)
    keywords: dict[str, Any] = {"state": make_state(3) | state}
    save_step(directory / "checkpoints", 3, **keywords)
    log = MetricsLog(directory)
    for step, loss in enumerate(losses, 1):
        log.row(step, step, {"train/loss": loss, "train/tokens_per_second": os.getpid() * loss})
    return directory


def test_equal_runs_are_equal():
    one, other = run_with("one", [3.0, 2.0, 1.0]), run_with("other", [3.0, 2.0, 1.0])
    assert [found.difference for found in compare_runs(one, other, 3)] == [None] * 4


def test_a_state_and_a_row_that_differ_are_named():
    one, other = run_with("one", [3.0, 2.0, 1.0]), run_with("other", [3.0, 2.5], tokens=7)
    found = {comparison.what: comparison.difference for comparison in compare_runs(one, other, 3)}
    assert found["state"] == "tokens is 6144 uninterrupted and 7 resumed"
    assert found["logged losses"] is not None
    assert found["logged losses"].startswith('step 2 is [{"tokens": 2, "train/loss": 2.0}]')


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_first_difference_of_tensors(dtype: torch.dtype):
    one = torch.arange(12, dtype=dtype).view(3, 4)
    assert first_difference(one, one.clone()) is None
    other = one.clone()
    other[1, 2] = other[2, 0] = 20
    expected = "[1, 2] is 6 uninterrupted and 20 resumed; 2 of 12 values differ"
    assert first_difference(one, other) == expected
    other = one.clone()
    other[0, 0] = -0.0  # equal as a number
    assert first_difference(one, other) == "[0, 0] is 0 uninterrupted and -0 resumed; 1 of 12 values differ"
    assert first_difference(one[0], one[0].fill_(float("nan")).clone()) is None
    assert first_difference(one, one.view(4, 3)) is not None


def test_what_is_compared_is_verified():
    """A damaged checkpoint is no evidence."""
    one, other = run_with("one", [1.0]), run_with("other", [1.0])
    weights = other / "checkpoints" / "step-00000003" / "weights.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"weights.safetensors: content differs"):
        compare_runs(one, other, 3)
