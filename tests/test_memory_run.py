"""What a whole run really allocates is what was planned: PyTorch's allocator is watched from the first tensor
to the last.

Initial weights, steps, evaluations with a batch of their own, samples, checkpoints from a copy in
host memory, the end; and then the same run once more, going on from a checkpoint.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from run_cases import call, checkpoints, events, rows
from torch.profiler import ProfilerActivity, profile

from albor.memory.arena import Arena
from albor.model import parameters
from albor.tensorfile import _CHUNK_BYTES

LENGTH, WIDTH, MICRO_BATCH, EVALUATED = 32, 256, 8, 20
TENSOR = MICRO_BATCH * LENGTH * WIDTH * 4  # bytes of a micro-batch's (N, C) tensor
SMALL = 32 * 1024  # bytes: a number for every token of an evaluation's batch in float64, and as much again
OVERRIDES = (
    f"model.hidden_size={WIDTH}",
    "model.intermediate_size=512",
    "model.num_attention_heads=4",
    "model.num_key_value_heads=2",
    f"model.max_position_embeddings={2 * LENGTH}",
    f"data.sequence_length={LENGTH}",
    f"train.micro_batch_size={MICRO_BATCH}",
    "train.gradient_accumulation_steps=2",
    "train.max_steps=4",
    "schedule.warmup_steps=1",
    "optimizer.lr=1e-3",
    "data.max_epochs=100",
    "evaluate.every_steps=2",
    f"evaluate.micro_batch_size={EVALUATED}",
    "evaluate.sample_tokens=2",
    "checkpoint.every_steps=1",
    "checkpoint.keep_last=10",
    "checkpoint.background=true",
)
# What is not the arena's, and does not grow with the model: the values of initial weights that exist at one
# time, and the part of a checkpoint that is being read.
DRAWN = 4 * (parameters._DRAWN + parameters._DRAWN_TOGETHER)
STAGING = _CHUNK_BYTES


@contextmanager
def watched() -> Iterator[Counter[int]]:
    """Counts, by its bytes, whatever is allocated for a tensor; complete when it ends.

    In this thread: what writes a checkpoint in the background writes the last one too, in the foreground.
    """
    found: Counter[int] = Counter()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        yield found
    for event in profiler.profiler.kineto_results.events():
        if event.name() == "[memory]" and event.nbytes() > 0:
            found[event.nbytes()] += 1


def planned(run: Path) -> dict[str, int]:
    """The bytes of each place, from the plan.json that the run left."""
    plan = json.loads((run / "plan.json").read_text())
    ends = [(b["place"], -(-(b["offset"] + b["bytes"]) // 256) * 256) for b in plan["buffers"]]
    return {
        place: max(end for where, end in ends if where == place) for place in {where for where, _ in ends}
    }


def large(found: Counter[int]) -> Counter[int]:
    return Counter({size: count for size, count in found.items() if size > SMALL})


@pytest.fixture(scope="module")
def run(config: Path) -> Iterator[tuple[Path, Counter[int]]]:
    """A run, and what it allocated."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(config.parent)
        assert call("data", "prepare", config, *OVERRIDES).code == 0  # which is no part of the plan
        with watched() as found:
            assert call("train", config, *OVERRIDES).code == 0
        yield config.parent / "runs" / "tiny", found


def test_the_run_did_all_that_a_run_does(run: tuple[Path, Counter[int]]) -> None:
    directory, found = run
    assert checkpoints(directory) == [1, 2, 3, 4]
    assert [row["step"] for row in rows(directory) if "val/loss" in row] == [2, 4]
    assert [event["step"] for event in events(directory, "sample")] == [2, 4]
    names = {b["name"] for b in json.loads((directory / "plan.json").read_text())["buffers"]}
    assert {"snapshot.weights", "evaluate.qkv", "sample.cache", "gradients.accumulator"} <= names
    assert TENSOR > 2 * SMALL
    assert sum(found.values()) > 1000  # small ones are there, and seen


def test_a_new_run_allocates_its_plan_and_nothing_else(run: tuple[Path, Counter[int]]) -> None:
    directory, found = run
    arena = planned(directory)
    assert set(arena) == {"device", "host"}
    expected = Counter(arena.values())
    allocated = large(found)
    assert {size: allocated.pop(size) for size in expected} == expected
    assert max(allocated) == DRAWN, "initial weights are drawn in parts"


def test_a_run_that_goes_on_allocates_its_plan_and_nothing_else(
    run: tuple[Path, Counter[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    directory, _ = run
    config = directory.parents[1] / "tiny.yaml"
    with watched() as found:
        longer = call("train", config, *OVERRIDES, "train.max_steps=5", "schedule.kind=constant", "name=tiny")
    assert longer.code == 2  # another schedule is another run: refused before anything is allocated
    assert large(found) == Counter()
    with watched() as found:
        source = directory / "checkpoints" / "step-00000002"
        assert call("train", config, *OVERRIDES, "name=again", "--resume", source).code == 0
    again = directory.parent / "again"
    assert checkpoints(again) == [3, 4]
    allocated = large(found)
    expected = Counter(planned(again).values())
    assert {size: allocated.pop(size) for size in expected} == expected
    assert allocated == Counter({STAGING: allocated[STAGING]}), "a checkpoint is read in parts"
    assert allocated[STAGING] == 2  # weights and optimizer


def test_the_watch_sees_what_is_not_planned(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An arena that takes 256 bytes too many, and a phase that takes a tensor beside it."""
    build, enter = Arena._host_memory, Arena.enter

    def larger(self: Arena, size: int, *, locked: bool) -> torch.Tensor:
        return build(self, size + 256 * (size > 0), locked=locked)

    def wasteful(self: Arena, phase: str) -> None:
        enter(self, phase)
        if phase == "evaluate":
            torch.empty(TENSOR, dtype=torch.uint8)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Arena, "_host_memory", larger)
    monkeypatch.setattr(Arena, "enter", wasteful)
    with watched() as found:
        assert call("train", config, *OVERRIDES, "train.max_steps=2").code == 0
    arena = planned(tmp_path / "runs" / "tiny")
    assert found[arena["device"]] == 1
    assert found[arena["host"]] == 0
    assert found[arena["host"] + 256] == 1
    assert found[TENSOR] >= 1
