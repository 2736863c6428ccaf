"""A run cannot be lost: the rows of the fault matrix (docs/reliability.md) that are about a whole run.

Each case damages a run at a point of `albor.faults`, goes on with the same command, and ends in the oracle of
`fault_cases`. Each guard that a case rests on is dropped once (`mutations`), and the case must then fail.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import run_cases
import test_trainer
import torch
from checkpoint_cases import forge
from fault_cases import (
    EVERY,
    NAME,
    PLAIN,
    ROUNDED,
    STEPS,
    Bench,
    Child,
    Server,
    Variant,
    directory_of_runs,
    newest,
    outcome,
    reach,
    run_of,
    write_project,
)
from fault_server import FAIL_ARENA, FAIL_READS, FAIL_TENSORS
from helpers import END_OF_DOCUMENT, forward_backward, gradients_of, make_batches, make_config, make_trainer
from mutations import MUTATIONS
from run_cases import ENVIRONMENT, events, tree

import albor
from albor import faults
from albor.architecture import IGNORED_TARGET
from albor.checkpoint import checkpoint_name
from albor.model.batch import BatchInput
from albor.strictjson import from_json, to_json

KILLED = -signal.SIGKILL
NOT_IN_A_NEW_RUN = {"load.begin", "load.filled", "rollback.begin", "rollback.loaded"}


# Rows 1, 2, 3, 22: killed anywhere


def killed(
    bench: Bench,
    mutation: str,
    *faults_: str,
    at: int | None = None,
    own_data: bool = False,
    variant: Variant = PLAIN,
) -> None:
    """Killed by each of `faults_` in turn; after the last, the run stands `at` that step."""
    directory = bench.fresh()
    arguments = [f"data.cache_dir={directory}/data"] if own_data else []
    keywords: dict[str, Any] = {"variant": variant, "mutation": mutation}
    for fault in faults_:
        result = bench.train(directory, *arguments, fault=f"{fault}:kill", **keywords)
        reach(result.code == KILLED, (fault, result))
        stands_at = newest(directory)
    if at is not None:
        assert stands_at == at
    bench.finish(directory, *arguments, **keywords)


def littered(bench: Bench, mutation: str) -> None:
    """What a killed save left goes, also where a process that lives has its number: the run is locked."""
    directory = bench.fresh()
    reach(bench.train(directory, fault="save.verified:18:kill").code == KILLED, "not killed")
    (litter,) = (run_of(directory) / "checkpoints").glob(".step-*.tmp-*")
    litter.rename(litter.with_name(f"{litter.name.rpartition('-')[0]}-{os.getpid()}"))
    bench.finish(directory, mutation=mutation)


SAVE = ["save.begin", "save.tensors", "save.written", "save.synced", "save.verified"]  # in the old one's time
SAVED = ["save.renamed", "save.pruned"]


def completed(bench: Bench, mutation: str) -> None:
    """A run that is complete is not touched by its command, however often it is given."""
    directory = bench.fresh()
    reach(bench.train(directory, mutation=mutation).code == 0, "failed")
    before = tree(run_of(directory) / "checkpoints")
    assert bench.train(directory, mutation=mutation).code == 0
    assert tree(run_of(directory) / "checkpoints") == before, "it was saved again"
    assert len(events(run_of(directory), "checkpoint")) == STEPS // EVERY, "it was saved again"
    bench.compare(directory)


def at_an_epochs_edge(bench: Bench, mutation: str, before: int) -> None:
    """Stopped in the step in which the first epoch ends (`before` 0), or before it."""
    epochs = [
        (row["step"], row["train/epoch"]) for row in bench.expected["plain"]["rows"] if "train/epoch" in row
    ]
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
    assert result.err.count("once more ends at once\n") <= 1  # a process may end before it can say so
    under_way = int(step.split(".")[0] or stood_at) if step else stood_at
    assert newest(directory) in (under_way, under_way - point.startswith("step."))
    bench.finish(directory, *arguments, mutation=mutation)


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
    while time.monotonic() < told + 5 and Path(f"/proc/{child.pid}").exists():
        time.sleep(0.005)
    child.send(signal.SIGKILL)
    result = child.wait()
    assert result.code in (128 + signal.SIGTERM, -signal.SIGTERM)
    reach(result.err == "albor: SIGTERM: saving; once more ends at once\n" or mutation, result.err)
    newest(directory)
    bench.finish(directory)


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
    bench.finish(directory, mutation=mutation)


# Row 13: out of memory


def short_of_memory(bench: Bench, mutation: str, where: str, *, at: int, after: str = "") -> None:
    """The run ends with an explanation, and loses nothing that was saved."""
    directory = bench.fresh()
    if after:
        reach(bench.train(directory, fault=f"{after}:kill").code == KILLED, after)
    keywords: dict[str, Any] = {"fault": f"{where}:oom"} if where else {"environment": {FAIL_ARENA: "1"}}
    result = bench.train(directory, mutation=mutation, **keywords)
    reach(result.code, "there was no shortage")
    assert (result.code, "Traceback" in result.err) == (1, False), result.err
    assert "out of memory" in result.err
    assert newest(directory) == at
    bench.finish(directory, mutation=mutation)


def short_of_memory_beside_training(
    bench: Bench, mutation: str, where: str, what: str, action: str = "oom"
) -> None:
    """An evaluation or a sample that finds no memory is left out, which is said; the training goes on."""
    directory = bench.fresh()
    result = bench.train(directory, fault=f"{where}:{action}", mutation=mutation)
    assert result.code == 0, result.err
    step = int(where.split(":")[1].split(".")[0])
    (event,) = events(run_of(directory), "out_of_memory")
    assert (event["step"], event["during"]) == (step, what)
    assert f"step {step}: no memory for {what}" in result.out
    found, expected = outcome(directory), dict(bench.expected["plain"])
    if what == "evaluation":
        expected["rows"] = [row for row in expected["rows"] if row["step"] != step or "val/loss" not in row]
    assert found == expected


def saved_before_evaluation(bench: Bench, mutation: str, point: str) -> None:
    """What an evaluation dies of costs no training: the step was saved before."""
    directory = bench.fresh()
    result = bench.train(directory, fault=f"{point}:12:exit", mutation=mutation)
    reach(result.code == faults.EXIT_CODE, result)
    assert newest(directory) == 12
    bench.finish(directory, mutation=mutation)


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
    assert newest(directory) == 6, "it went on with what is not there"
    assert (result.code, "Traceback" in result.err) == (1, False), result
    assert str(shard) in result.err
    assert says in result.err
    refused = bench.train(directory, *arguments, **keywords)
    assert (refused.code, "Traceback" in refused.err) == (1, False), "damaged data were taken"
    marker.unlink(missing_ok=True)
    shutil.rmtree(cache)
    bench.finish(directory, *arguments, mutation=mutation)


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
    bench.compare(directory)


def unreadable(bench: Bench, mutation: str, name: str) -> None:
    """A file of the newest checkpoint that the disk does not give: the one before is taken."""
    directory = bench.fresh()
    reach(bench.train(directory, fault="step.begin:15:kill").code == KILLED, "not killed")
    lost = f"{checkpoint_name(12)}/{name}"
    result = bench.train(directory, mutation=mutation, environment={FAIL_TENSORS: lost})
    assert result.code == 0, result.err
    assert f"{lost}: not a readable safetensors file" in result.out
    assert "Input/output error" in result.out
    assert "going on from step 6" in result.out
    bench.compare(directory)


# Row 26: a checkpoint from a stranger, which the hashes vouch for


def forged(bench: Bench, mutation: str) -> None:
    """A state that contradicts its checkpoint's step is no state: the checkpoint before is taken."""
    directory = bench.fresh()
    reach(bench.train(directory, fault="step.begin:15:kill").code == KILLED, "not killed")
    path = run_of(directory) / "checkpoints" / checkpoint_name(12)
    state = from_json((path / "state.json").read_bytes())
    drawn = state["loader"]["samples"] + 7
    state["loader"] = {"samples": drawn, "per_source": [drawn]}
    forge(path, "state.json", to_json(state))
    result = bench.train(directory, mutation=mutation)
    assert result.code == 0, result.err
    assert "it is not the state of a run" in result.out
    bench.compare(directory)


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
    assert all(found[key] == bench.expected["plain"][key] for key in ("step", "saved", "consumed"))


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
    "1 kill with rounded state": make_case(killed, "step.updated:9", at=6, variant=ROUNDED),
    # 2: the resumed run too
    "2 kill five deep": make_case(
        killed, "step.updated:5", "save.renamed:6", "load.filled:", "evaluate.batch:12.2", "step.begin:20"
    ),
    "2 kill five in one place": make_case(killed, "step.updated:9", *["step.micro_batch:9.2"] * 4, at=6),
    "2 kill five saves": make_case(killed, *["save.synced:6"] * 3, *["save.verified:12"] * 2, at=6),
    # 3: the first save of a run, and between the files of one
    "3 kill first save.begin": make_case(killed, f"save.begin:{EVERY}", at=0),
    "3 kill first save.tensors": make_case(killed, f"save.tensors:{EVERY}", at=0),
    "3 kill first save.verified": make_case(killed, f"save.verified:{EVERY}", at=0),
    "3 kill first save.renamed": make_case(killed, f"save.renamed:{EVERY}", at=EVERY),
    "3 litter of a number that lives again": make_case(littered),
    "3 kill second file": make_case(killed, "save.tensors:18.2", at=12),
    # 6
    "6 a flipped bit": make_case(damaged, "weights.safetensors"),
    "6 an edited state": make_case(damaged, "state.json"),
    "6 an unreadable file": make_case(unreadable, "optimizer.safetensors"),
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
    "13 memory load": make_case(short_of_memory, "load.begin:", at=6, after="step.updated:9"),
    "13 memory arena": make_case(short_of_memory, "", at=6, after="step.updated:9"),
    "13 memory arena of a new run": make_case(short_of_memory, "", at=0),
    "13 memory save": make_case(short_of_memory, "save.tensors:12", at=6),
    "13 memory report": make_case(short_of_memory, f"evaluate.begin:{STEPS}.2", at=STEPS),
    "13 memory evaluation": make_case(short_of_memory_beside_training, "evaluate.batch:12.2", "evaluation"),
    "13 memory sampling": make_case(short_of_memory_beside_training, "sample.begin:12", "sampling"),
    "13 memory of the driver": make_case(
        short_of_memory_beside_training, "evaluate.batch:12.2", "evaluation", "oom-driver"
    ),
    "13 saved first": make_case(saved_before_evaluation, "evaluate.begin"),
    # 14
    "14 shard cut off": make_case(data_lost, cut_off, "became shorter while it was in use"),
    "14 shard unreadable": make_case(data_lost, make_unreadable, "Input/output error"),
    # 22
    "22 step 0": make_case(killed, "step.updated:1", at=0),
    "22 mid-accumulation": make_case(killed, "step.micro_batch:7.1", at=6),
    "22 an epoch's edge": make_case(at_an_epochs_edge, 0),
    "22 before an epoch's edge": make_case(at_an_epochs_edge, 1),
    "22 last step": make_case(killed, f"step.updated:{STEPS}", at=STEPS - EVERY),
    "22 last save": make_case(killed, f"save.renamed:{STEPS}", f"evaluate.begin:{STEPS}", at=STEPS),
    "22 the report": make_case(killed, f"sample.begin:{STEPS}.2", at=STEPS),
    "22 completed": make_case(completed),
    # 25
    "25 no metrics": make_case(without_a_log, "metrics.jsonl"),
    "25 no events": make_case(without_a_log, "events.jsonl"),
    # 26
    "26 a position that contradicts the step": make_case(forged),
}


# The cases wait for processes most of the time, so two are under way at once, in the order of the tests.


@pytest.fixture(scope="module")
def verdicts(request: pytest.FixtureRequest) -> Iterator[dict[tuple[str, str], Future[None]]]:
    """The verdict on each tested case, and on it without each guard: a future that raises what it raised."""
    selected = (item for item in request.session.items if getattr(item, "module", None) is request.module)
    parameters = (item.callspec.params for item in selected if hasattr(item, "callspec"))
    tested = [(given["case"], given.get("guard", "")) for given in parameters if "case" in given]
    with Server() as server, directory_of_runs() as directory:
        bench = Bench(server, directory, (PLAIN, ROUNDED))
        assert {point for point, _ in bench.points["plain"]} == set(faults.POINTS) - NOT_IN_A_NEW_RUN
        with ThreadPoolExecutor(2) as pool:
            yield {(case, guard): pool.submit(CASES[case], bench, guard) for case, guard in tested}


@pytest.mark.parametrize("case", CASES)
def test_row(verdicts: dict[tuple[str, str], Future[None]], case: str):
    verdicts[case, ""].result()


@pytest.mark.parametrize(
    ("case", "guard"), [(case, guard) for guard, mutation in MUTATIONS.items() for case in mutation.cases]
)
def test_the_row_fails_without_its_guard(
    verdicts: dict[tuple[str, str], Future[None]], case: str, guard: str
):
    """For the reason that the guard is there for."""
    with pytest.raises(AssertionError) as failed:
        verdicts[case, guard].result()
    assert MUTATIONS[guard].shows, f"what shows is not said; it is {failed.value}"
    assert re.search(MUTATIONS[guard].shows, str(failed.value)), failed.value


# Rows 20 and 21, which are about numbers and need no run


@pytest.mark.parametrize("guarded", [True, False], ids=["", "without-its-guard"])
def test_row_20(guarded: bool, monkeypatch: pytest.MonkeyPatch):
    """Micro-batches make the step of one batch, also where they hold unlike numbers of targets; not so where
    each is averaged by itself.
    """
    if not guarded:
        load = BatchInput.load

        def averaged(self: BatchInput, tokens: np.ndarray, targets: np.ndarray, *, train: bool = True) -> int:
            counted = load(self, tokens, targets, train=train)
            parts = 8 / len(tokens)
            self._arena["io.scale"].fill_(0.5 / (counted * parts))  # half of all tokens are no targets
            return counted

        monkeypatch.setattr(BatchInput, "load", averaged)
    fails = pytest.raises(AssertionError, match="comparison failed")
    with contextlib.nullcontext() if guarded else fails:
        test_trainer.test_micro_batches_make_the_same_step_as_one_batch(2, 4)


@pytest.mark.parametrize("guarded", [True, False], ids=["", "without-its-guard"])
def test_row_21(guarded: bool):
    """With data.document_mask, a document's loss and all that is learned from it are the same, bit for bit,
    whatever stands before it.
    """
    config = make_config(document_mask=guarded, micro_batch_size=1)
    ((tokens, targets),) = make_batches(config)
    tokens[tokens == END_OF_DOCUMENT] += 1
    tokens[0, 6] = END_OF_DOCUMENT
    targets[0, :7] = IGNORED_TARGET
    other = tokens.copy()
    other[0, :6] = (tokens[0, :6] + 7) % END_OF_DOCUMENT
    found = []
    for text in (tokens, other):
        trainer = make_trainer(config)
        loss = forward_backward(trainer, [(text, targets)])
        found.append((loss, {name: value.clone() for name, value in gradients_of(trainer).items()}))
    (loss, gradients), (other_loss, other_gradients) = found
    assert (loss == other_loss) is guarded
    assert all(torch.equal(gradients[name], other_gradients[name]) for name in gradients) is guarded


# ALBOR_FAULT itself


@pytest.mark.parametrize(
    ("value", "says"),
    [
        ("kill", "'kill' is not point:when:action"),
        ("step.begin:1:kill,", "'' is not point:when:action"),
        ("step.start:1:kill", "there is no point 'step.start'"),
        ("step.begin:one:kill", "'one' in 'step.begin:one:kill' is neither a step"),
        ("step.begin:1.0:kill", "is neither a step"),
        ("step.begin:1:sigkill", "there is no action 'sigkill'"),
        ("load.begin:1:kill", "load.begin belongs to no step"),
        ("step.begin:1:nan", "nan is for step.accumulated"),
    ],
)
def test_a_fault_that_makes_no_sense_ends_the_process(value: str, says: str):
    command = [sys.executable, "-c", "import albor.faults"]
    environment = {**ENVIRONMENT, faults.VARIABLE: value}
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 2
    assert result.stderr.startswith("albor: ALBOR_FAULT: ")
    assert result.stderr.count("\n") == 1
    assert says in result.stderr


@pytest.mark.parametrize(
    ("when", "taken"),
    [
        ("", [(1, 0)]),
        (".3", [(2, 0)]),
        ("2", [(2, 0)]),
        ("2.2", [(2, 1)]),
        ("3.9", []),
        ("*", [(step, time) for step in (1, 2, 3) for time in (0, 1)]),
    ],
)
def test_when_an_action_is_taken(when: str, taken: list[tuple[int, int]]):
    plan = faults.Plan(faults.parse(f"step.accumulated:{when}:spike"))
    found = []
    for step in (1, 2, 3):
        for time_ in (0, 1):
            assert plan.reach("step.begin", step) == 1.0
            if plan.reach("step.accumulated", step) == 100.0:
                found.append((step, time_))
    assert found == taken


def test_actions_that_raise():
    for action, kind in [("enospc", OSError), ("oom", torch.OutOfMemoryError), ("raise", RuntimeError)]:
        plan = faults.Plan(faults.parse(f"save.begin:5:{action}"))
        assert plan.reach("save.begin", 4) == 1.0
        with pytest.raises(kind):
            plan.reach("save.begin", 5)
        assert plan.reach("save.begin", 5) == 1.0


def test_every_point_is_in_the_code_and_in_the_table():
    """And nothing reaches a point that there is not."""
    sources = [path.read_text(encoding="utf-8") for path in Path(albor.__file__).parent.rglob("*.py")]
    literal = {point for source in sources for point in re.findall(r'faults\.reach\(\s*"([^"]*)"', source)}
    assert literal == set(faults.POINTS)
    table = re.findall(r"^    ([a-z_]+\.[a-z_]+)  ", faults.__doc__ or "", re.MULTILINE)
    assert table == list(faults.POINTS)


def test_a_run_says_that_it_was_told_to_fail(tmp_path: Path):
    """In a process of its own, as a user would; the fault is that of one who forgot about it."""
    config = write_project(tmp_path)
    environment = {**ENVIRONMENT, faults.VARIABLE: "save.tensors:6.2:kill"}
    result = run_cases.albor(tmp_path, "train", config, env=environment)
    assert result.code == KILLED
    assert result.out.startswith(
        "ALBOR_FAULT is set: this run will fail on purpose (save.tensors:6.2:kill)\n"
    )
    assert events(run_of(tmp_path), "faults")[0]["faults"] == "save.tensors:6.2:kill"
    assert newest(tmp_path) == 0
    assert [path.suffix for path in (run_of(tmp_path) / "checkpoints").glob(".*/*")] == [".safetensors"] * 2


def test_without_a_fault_a_point_is_an_empty_function():
    command = [
        sys.executable,
        "-c",
        "import dis, albor.faults as f; print(f.ACTIVE, len(list(dis.get_instructions(f.reach))))",
    ]
    environment = {name: value for name, value in ENVIRONMENT.items() if name != faults.VARIABLE}
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0
    assert int(result.stdout) <= 3
