"""A run cannot be lost: the rows of the fault matrix (docs/reliability.md) that are about a whole run.

Each case damages a run at a point of `albor.faults`, goes on with the same command, and ends in the oracle of
`fault_cases`. Each guard that a case rests on is dropped once (`mutations`), and the case must then fail.
"""

from __future__ import annotations

import itertools
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from fault_cases import (
    EVERY,
    NAME,
    STEPS,
    Child,
    Server,
    directory_of_runs,
    outcome,
    reached,
    run_of,
    write_project,
)
from fault_server import FAIL_READS, TRACE
from mutations import MUTATIONS
from run_cases import Result, events, tree

from albor import faults
from albor.checkpoint import checkpoint_name, find_latest, list_checkpoints, verify
from albor.errors import CheckpointError

KILLED = -signal.SIGKILL
NOT_IN_A_NEW_RUN = {"load.begin", "load.filled", "rollback.begin", "rollback.loaded"}


ROUNDED = ("train.precision=bf16", "optimizer.state_dtype=bf16")  # whose updates are rounded at random


class NotReached(Exception):
    """A case did not come to what it is about, which is no verdict on it."""


def reach(condition: object, what: object) -> None:
    if not condition:
        raise NotReached(what)


class Bench:
    """The server, what undisturbed runs come to, and directories for others."""

    def __init__(self, server: Server, directory: Path):
        self.server, self._directory, self._numbers = server, directory, itertools.count()
        self.project = directory / "project"
        self.config = write_project(self.project)
        self.points: list[tuple[str, int | None]] = []
        self.expected = self._undisturbed()
        self.expected_rounded = self._undisturbed(*ROUNDED)

    def _undisturbed(self, *arguments: str) -> dict[str, Any]:
        directory = self.fresh()
        result = self.train(directory, *arguments, environment={TRACE: "1"})
        reach(result.code == 0, f"the undisturbed run failed: {result.err}")
        self.points = self.points or reached(directory)
        return outcome(directory)

    def fresh(self) -> Path:
        return self._directory / str(next(self._numbers))

    def train(self, directory: Path, *arguments: object, **keywords: Any) -> Result:
        return self.server.run(directory, "train", self.config, *arguments, **keywords)

    def start(self, directory: Path, *arguments: object, **keywords: Any) -> Child:
        return self.server.start(directory, "train", self.config, *arguments, **keywords)


def newest(directory: Path) -> int:
    """The step that a run in `directory` would go on from; whatever has a checkpoint's name is one."""
    checkpoints = run_of(directory) / "checkpoints"
    try:
        for path in list_checkpoints(checkpoints):
            verify(path)
    except CheckpointError as error:
        raise AssertionError(str(error)) from error
    latest = find_latest(checkpoints)
    return int(latest.name.removeprefix("step-")) if latest is not None else 0


def finish(bench: Bench, directory: Path, *arguments: object, mutation: str = "") -> None:
    """The same command, undisturbed, comes to what an undisturbed run comes to, and leaves nothing else."""
    result = bench.train(directory, *arguments, mutation=mutation)
    assert result.code == 0, result.err
    assert outcome(directory) == (bench.expected_rounded if set(ROUNDED) <= {*arguments} else bench.expected)
    litter = [path.name for path in (run_of(directory) / "checkpoints").glob(".*")]
    assert litter == []


# Rows 1, 2, 3, 22: killed anywhere


def killed(
    bench: Bench,
    mutation: str,
    *faults_: str,
    at: int | None = None,
    own_data: bool = False,
    arguments: tuple[str, ...] = (),
) -> None:
    """Killed by each of `faults_` in turn; after the last, the run stands `at` that step."""
    directory = bench.fresh()
    if own_data:
        arguments = (*arguments, f"data.cache_dir={directory}/data")
    for fault in faults_:
        result = bench.train(directory, *arguments, fault=f"{fault}:kill", mutation=mutation)
        reach(result.code == KILLED, (fault, result))
        stands_at = newest(directory)
    if at is not None:
        assert stands_at == at
    finish(bench, directory, *arguments, mutation=mutation)


SAVE = ["save.begin", "save.tensors", "save.written", "save.synced", "save.verified"]  # in the old one's time
SAVED = ["save.renamed", "save.pruned"]


def completed(bench: Bench, mutation: str) -> None:
    """A run that is complete is not touched by its command, however often it is given."""
    directory = bench.fresh()
    reach(bench.train(directory, mutation=mutation).code == 0, "failed")
    before, saves = tree(run_of(directory) / "checkpoints"), len(events(run_of(directory), "checkpoint"))
    finish(bench, directory, mutation=mutation)
    assert tree(run_of(directory) / "checkpoints") == before
    assert len(events(run_of(directory), "checkpoint")) == saves


def at_an_epochs_edge(bench: Bench, mutation: str, before: int) -> None:
    """Stopped in the step in which the first epoch ends (`before` 0), or before it."""
    epochs = [(row["step"], row["train/epoch"]) for row in bench.expected["rows"] if "train/epoch" in row]
    edge = next(step for step, epoch in epochs if epoch >= 1)
    stopped(bench, mutation, f"step.micro_batch:{edge - before + 1}", "term")


# Row 8: told to stop


def stopped(
    bench: Bench, mutation: str, where: str, action: str, *, own_data: bool = False, after: str = ""
) -> None:
    """A signal is followed by a checkpoint and exit code 75, and costs at most the step under way."""
    directory = bench.fresh()
    arguments = [f"data.cache_dir={directory}/data"] if own_data else []
    stood_at = 0
    if after:
        reach(bench.train(directory, *arguments, fault=f"{after}:kill").code == KILLED, after)
        stood_at = newest(directory)
    point, step = where.split(":")
    result = bench.train(directory, *arguments, fault=f"{where}:{action}", mutation=mutation)
    reach(result.code != 0, "the signal was not sent")
    assert result.code == 75, result
    assert f"stopped by SIG{action.upper()}" in result.err
    under_way = int(step.split(".")[0] or stood_at) if step else stood_at
    assert newest(directory) in (under_way, under_way - point.startswith("step."))
    finish(bench, directory, *arguments, mutation=mutation)


def standing_still(child: Child) -> bool:
    """Whether SIGSTOP has reached it."""
    status = Path(f"/proc/{child.pid}/stat")
    return not status.exists() or status.read_text().rpartition(")")[2].split()[0] == "T"


def wait_for(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        reach(time.monotonic() < deadline, what)
        time.sleep(0.005)


def asleep(child: Child) -> bool:
    return Path(f"/proc/{child.pid}/wchan").read_text().endswith("nanosleep")


def told_twice(bench: Bench, mutation: str, where: str) -> None:
    """A process that does not come to saving, since it hangs, ends at once at the second signal."""
    directory = bench.fresh()
    child = bench.start(directory, fault=f"{where}:hang", mutation=mutation)
    log = run_of(directory) / "events.jsonl"
    wait_for(lambda: log.exists() and '"started"' in log.read_text(), "the run did not begin")
    wait_for(partial(asleep, child), "it does not hang")
    child.send(signal.SIGTERM)
    time.sleep(0.7)  # what comes within half a second is taken for the same request
    child.send(signal.SIGTERM)
    told = time.monotonic()
    while time.monotonic() < told + 2 and Path(f"/proc/{child.pid}").exists():
        time.sleep(0.005)
    child.send(signal.SIGKILL)
    assert child.wait().code in (128 + signal.SIGTERM, -signal.SIGTERM)
    newest(directory)
    finish(bench, directory)


# Row 7: two at once


def claimed(bench: Bench, mutation: str) -> None:
    """While one trains, whatever it is doing, another of the same name is refused."""
    directory = bench.fresh()
    child = bench.start(directory, fault="step.updated:9:stop", mutation=mutation)
    wait_for(partial(standing_still, child), "it does not stand still")
    try:
        second = bench.train(directory, mutation=mutation)
    finally:
        child.send(signal.SIGCONT)
        first = child.wait()
    assert (second.code, first.code) == (1, 0)
    assert "another process is training" in second.err
    finish(bench, directory, mutation=mutation)


# Row 13: out of memory


def short_of_memory(bench: Bench, mutation: str, where: str, *, at: int) -> None:
    """The run ends with an explanation, and loses nothing that was saved."""
    directory = bench.fresh()
    result = bench.train(directory, fault=f"{where}:oom", mutation=mutation)
    reach(result.code, "there was no shortage")
    assert (result.code, "Traceback" in result.err) == (1, False), result.err
    assert "out of memory" in result.err
    assert newest(directory) == at
    finish(bench, directory, mutation=mutation)


def short_of_memory_beside_training(bench: Bench, mutation: str, where: str, what: str) -> None:
    """An evaluation or a sample that finds no memory is left out, which is said; the training goes on."""
    directory = bench.fresh()
    result = bench.train(directory, fault=f"{where}:oom", mutation=mutation)
    assert result.code == 0, result.err
    step = int(where.split(":")[1].split(".")[0])
    (event,) = events(run_of(directory), "out_of_memory")
    assert (event["step"], event["during"]) == (step, what)
    assert f"step {step}: no memory for {what}" in result.out
    found, expected = outcome(directory), dict(bench.expected)
    if what == "evaluation":
        expected["rows"] = [row for row in expected["rows"] if row["step"] != step or "val/loss" not in row]
    assert found == expected


def saved_before_evaluation(bench: Bench, mutation: str, point: str) -> None:
    """What an evaluation dies of costs no training: the step was saved before."""
    directory = bench.fresh()
    result = bench.train(directory, fault=f"{point}:12:exit", mutation=mutation)
    reach(result.code == faults.EXIT_CODE, result)
    assert newest(directory) == 12
    finish(bench, directory, mutation=mutation)


# Row 14: data that are gone


def data_lost(bench: Bench, mutation: str, damage: Callable[[Path], None], says: str) -> None:
    """A token shard that is cut off or unreadable under a run ends it with a message; once it is mended the
    run goes on from its last checkpoint.
    """
    directory = bench.fresh()
    cache, marker = directory / "data", directory / "the disk is going"
    shutil.copytree(bench.project / "data", cache)
    keywords: dict[str, Any] = {"mutation": mutation, "environment": {FAIL_READS: str(marker)}}
    arguments = [f"data.cache_dir={cache}"]
    child = bench.start(directory, *arguments, fault="step.begin:9:stop", **keywords)
    wait_for(partial(standing_still, child), "it does not stand still")
    (shard,) = cache.glob("*/train/tokens-*.npy")
    damage(shard)
    child.send(signal.SIGCONT)
    result = child.wait()
    assert (result.code, "Traceback" in result.err) == (1, False), result
    assert str(shard) in result.err
    assert says in result.err
    assert newest(directory) == 6
    refused = bench.train(directory, *arguments, **keywords)
    assert (refused.code, "Traceback" in refused.err) == (1, False), "damaged data were taken"
    marker.unlink(missing_ok=True)
    shutil.rmtree(cache)
    finish(bench, directory, *arguments, mutation=mutation)


def cut_off(path: Path) -> None:
    with open(path, "r+b") as file:
        file.truncate(200)


def make_unreadable(path: Path) -> None:
    Path(path.parents[3], "the disk is going").touch()


# Row 6: a checkpoint that is not what was saved; thousands of places are tried by `make torture`


def damaged(bench: Bench, mutation: str, name: str) -> None:
    """A flipped bit in the newest checkpoint is seen, and the one before is taken."""
    directory = bench.fresh()
    reach(bench.train(directory, fault="step.begin:15:kill").code == KILLED, "not killed")
    path = run_of(directory) / "checkpoints" / checkpoint_name(12) / name
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)
    result = bench.train(directory, mutation=mutation)
    assert result.code == 0, result.err
    assert "passed over a damaged checkpoint" in result.out
    assert str(Path(*path.parts[-5:])) in result.out
    assert outcome(directory) == bench.expected


# Row 25: logs


def without_a_log(bench: Bench, mutation: str, name: str) -> None:
    """A log that cannot be written, nor read, is said to have gaps; the training is the same."""
    directory = bench.fresh()
    (run_of(directory) / name).mkdir(parents=True)  # works as root too, whom permissions do not stop
    result = bench.train(directory, fault="step.updated:9:kill", mutation=mutation)
    assert result.code == KILLED, result.err
    result = bench.train(directory, mutation=mutation)
    assert result.code == 0, result.err
    assert f"cannot use {Path('runs', NAME, name)}" in result.out
    (run_of(directory) / name).rmdir()
    if name == "metrics.jsonl":
        (run_of(directory) / name).touch()
    found = outcome(directory)
    assert all(found[key] == bench.expected[key] for key in ("step", "saved", "consumed"))


Case = Callable[[Bench, str], None]


def make_case(check: Callable[..., None], *arguments: Any, **keywords: Any) -> Case:
    def case(bench: Bench, mutation: str = "") -> None:
        check(bench, mutation, *arguments, **keywords)

    return case


STEP = ["step.begin", "step.micro_batch", "step.accumulated", "step.updated"]
BESIDE = ["evaluate.begin", "evaluate.batch", "sample.begin"]
BY_TURNS = zip([*STEP, *SAVE, *SAVED, *BESIDE], itertools.cycle(("term", "int", "hup")), strict=False)

CASES: dict[str, Case] = {
    # 1: at every point
    "1 kill shard.write": make_case(killed, "shard.write:.5", at=0, own_data=True),
    "1 kill shard.synced": make_case(killed, "shard.synced:.2", at=0, own_data=True),
    "1 kill shard.renamed": make_case(killed, "shard.renamed:.2", at=0, own_data=True),
    "1 kill load.begin": make_case(killed, "step.updated:9", "load.begin:", at=6),
    "1 kill load.filled": make_case(killed, "step.updated:9", "load.filled:", at=6),
    **{f"1 kill {point}": make_case(killed, f"{point}:15", at=12) for point in STEP},
    **{f"1 kill {point}": make_case(killed, f"{point}:18", at=12) for point in SAVE},
    **{f"1 kill {point}": make_case(killed, f"{point}:18", at=18) for point in SAVED + BESIDE},
    "1 kill with rounded state": make_case(killed, "step.updated:9", at=6, arguments=ROUNDED),
    # 2: the resumed run too
    "2 kill five deep": make_case(
        killed, "step.updated:5", "save.renamed:6", "load.filled:", "evaluate.batch:12.2", "step.begin:20"
    ),
    "2 kill five in one place": make_case(killed, "step.updated:9", *["step.micro_batch:9.2"] * 4, at=6),
    "2 kill five saves": make_case(killed, *["save.synced:6"] * 3, *["save.verified:12"] * 2, at=6),
    # 3: the first save of a run, and between the files of one
    **{f"3 kill first {point}": make_case(killed, f"{point}:{EVERY}", at=0) for point in SAVE},
    **{f"3 kill first {point}": make_case(killed, f"{point}:{EVERY}", at=EVERY) for point in SAVED},
    "3 kill second file": make_case(killed, "save.tensors:18.2", at=12),
    # 6
    "6 a flipped bit": make_case(damaged, "weights.safetensors"),
    "6 an edited state": make_case(damaged, "state.json"),
    # 7
    "7 claimed": make_case(claimed),
    # 8
    "8 first batch": make_case(stopped, "step.micro_batch:1.1", "term"),
    "8 before the first step": make_case(stopped, "step.begin:1", "int"),
    "8 tokenising": make_case(stopped, "shard.write:", "term", own_data=True),
    "8 data ready": make_case(stopped, "shard.renamed:.2", "int", own_data=True),
    "8 loading": make_case(stopped, "load.begin:", "hup", after="step.updated:9"),
    "8 loaded": make_case(stopped, "load.filled:", "term", after="step.updated:9"),
    **{
        f"8 {action} {point}": make_case(stopped, f"{point}:{15 if point in STEP else 18}", action)
        for point, action in BY_TURNS
    },
    "8 told twice in a step": make_case(told_twice, "step.micro_batch:9"),
    "8 told twice in a save": make_case(told_twice, "save.written:12"),
    # 13
    "13 memory step": make_case(short_of_memory, "step.micro_batch:9", at=6),
    "13 memory save": make_case(short_of_memory, "save.tensors:12", at=6),
    "13 memory report": make_case(short_of_memory, f"evaluate.begin:{STEPS}.2", at=STEPS),
    "13 memory evaluation": make_case(short_of_memory_beside_training, "evaluate.batch:12.2", "evaluation"),
    "13 memory sampling": make_case(short_of_memory_beside_training, "sample.begin:12", "sampling"),
    "13 saved first": make_case(saved_before_evaluation, "evaluate.begin"),
    # 14
    "14 shard cut off": make_case(data_lost, cut_off, "became shorter while it was in use"),
    "14 shard unreadable": make_case(data_lost, make_unreadable, "Input/output error"),
    # 22
    "22 step 0": make_case(killed, "step.updated:1", at=0),
    "22 mid-accumulation": make_case(killed, "step.micro_batch:7.1", at=6),
    "22 stopped mid-accumulation": make_case(stopped, "step.micro_batch:7.1", "term"),
    "22 an epoch's edge": make_case(at_an_epochs_edge, 0),
    "22 before an epoch's edge": make_case(at_an_epochs_edge, 1),
    "22 last step": make_case(killed, f"step.updated:{STEPS}", at=STEPS - EVERY),
    "22 last save": make_case(killed, f"save.renamed:{STEPS}", f"evaluate.begin:{STEPS}", at=STEPS),
    "22 the report": make_case(killed, f"sample.begin:{STEPS}.2", at=STEPS),
    "22 completed": make_case(completed),
    # 25
    "25 no metrics": make_case(without_a_log, "metrics.jsonl"),
    "25 no events": make_case(without_a_log, "events.jsonl"),
}


# The cases wait for processes most of the time, so two are under way at once, in the order of the tests.


@pytest.fixture(scope="module")
def verdicts(request: pytest.FixtureRequest) -> Iterator[dict[tuple[str, str], Future[None]]]:
    """The verdict on each tested case, and on it without each guard: a future that raises what it raised."""
    tested = [
        (item.callspec.params["case"], item.callspec.params.get("guard", ""))
        for item in request.session.items
        if isinstance(item, pytest.Function) and item.module is request.module and hasattr(item, "callspec")
    ]
    with Server() as server, directory_of_runs() as directory:
        bench = Bench(server, directory)
        assert {point for point, _ in bench.points} == set(faults.POINTS) - NOT_IN_A_NEW_RUN
        with ThreadPoolExecutor(2) as pool:
            yield {(case, guard): pool.submit(CASES[case], bench, guard) for case, guard in tested}


@pytest.mark.parametrize("case", CASES)
def test_row(verdicts: dict[tuple[str, str], Future[None]], case: str):
    verdicts[case, ""].result()


@pytest.mark.parametrize(("case", "guard"), [(m.case, guard) for guard, m in MUTATIONS.items()])
def test_the_row_fails_without_its_guard(
    verdicts: dict[tuple[str, str], Future[None]], case: str, guard: str
):
    with pytest.raises(AssertionError):
        verdicts[case, guard].result()
