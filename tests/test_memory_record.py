"""What a run says of its memory: the metrics of a row, the event `memory`, and who is asked for them."""

from __future__ import annotations

import contextlib
import itertools
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers import make_config
from nvml_cases import Card, FakeNvml, install
from run_cases import bits, call, events, rows

from albor.configfile import load_config
from albor.memory.arena import Arena
from albor.memory.calibration import CUDA_CONTEXT, GRAPHS, LOADED_KERNELS
from albor.memory.cards import Hardware, find_gpu
from albor.memory.estimate import Estimate, plan_for_training
from albor.memory.process import CardProcess, Reading, peak_resident, resident
from albor.train import memory_record
from albor.train.memory_record import MemoryRecord
from albor.train.metrics import MetricsLog
from albor.train.step import Trainer
from albor.train.streams import Graphs
from albor.units import GIB, MIB

RUN = Path("runs/tiny")


@pytest.fixture(autouse=True)
def own_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


# A real run


def test_a_run_says_what_it_took(config: Path):
    assert call("train", config).code == 0
    target = plan_for_training(load_config(config))
    found = events(RUN, "memory")
    assert [(event["step"], event["moment"]) for event in found] == [(10, "tenth step"), (24, "end")]
    for event in found:
        parts = event["components"]
        items = {item.name: item.bytes for item in target.outside_items}
        assert {name: parts[name]["planned"] for name in items} == items
        assert parts["arena, device"]["planned"] == target.plan.size("device")
        assert parts["arena, host"]["planned"] == target.plan.size("host")
        for place in ("device", "host"):
            assert parts[f"arena, {place}"]["measured"] == parts[f"arena, {place}"]["planned"] > 0
        assert parts["process"]["planned"] == parts["process, peak"]["planned"] == target.required_bytes
        assert 50 * MIB < parts["process"]["measured"] <= parts["process, peak"]["measured"]
        unknown = [part for part in parts.values() if part["measured"] is None]
        assert len(unknown) == len(items)
        assert all(part["how"] == "not told apart from the rest of the process" for part in unknown)
    for row in rows(RUN):
        if "train/loss" in row:
            assert row["memory/planned"] == target.required_bytes
            assert row["memory/arena"] == target.device_bytes
            assert row["memory/reserved"] is None
            assert row["memory/process"] > row["memory/arena"]


def test_a_short_run_has_its_end_and_one_that_goes_on_counts_its_own_steps(config: Path):
    constant = ("schedule.kind=constant", "schedule.warmup_steps=0")  # which may go on for longer
    assert call("train", config, *constant, "train.max_steps=8").code == 0
    assert [(event["step"], event["moment"]) for event in events(RUN, "memory")] == [(8, "end")]
    assert call("train", config, *constant).code == 0
    moments = [(event["step"], event["moment"]) for event in events(RUN, "memory")]
    assert moments == [(8, "end"), (18, "tenth step"), (24, "end")]
    assert call("train", config, *constant).code == 0  # its report again: no step, nothing to say
    assert len(events(RUN, "memory")) == 3


def test_a_run_that_fails_says_it_too(config: Path, monkeypatch: pytest.MonkeyPatch):
    step = Trainer.step

    def failing(self: Trainer, batches: Any, state: Any) -> Any:
        if state.step == 3:
            raise MemoryError("no more")
        return step(self, batches, state)

    monkeypatch.setattr(Trainer, "step", failing)
    assert call("train", config).code == 1
    assert [event["event"] for event in events(RUN)][-2:] == ["memory", "failed"]
    assert events(RUN, "memory")[0]["step"] == 3


def test_the_training_is_the_same_without_it(
    config: Path, whole: dict[str, Any], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(MemoryRecord, "row", lambda self: {})
    monkeypatch.setattr(MemoryRecord, "after_step", lambda self, step: None)
    monkeypatch.setattr(MemoryRecord, "at_end", lambda self, step: None)
    assert call("train", config).code == 0
    assert events(RUN, "memory") == []
    assert bits(RUN) == whole


# On a card, with a fake of everything below


class _Allocator:
    """PyTorch's, as far as it is asked."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, reserved: int, most: int):
        self.asked = 0
        monkeypatch.setattr(torch.cuda, "memory_reserved", lambda: reserved)
        monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda: most)


class _Card:
    """A CardProcess with readings that were made up."""

    def __init__(self, *readings: Reading):
        self.readings, self.asked, self.closed = list(readings), 0, False

    def read(self) -> Reading:
        self.asked += 1
        return self.readings.pop(0) if len(self.readings) > 1 else self.readings[0]

    def close(self) -> None:
        self.closed = True


def on_a_card(tmp_path: Path, card: Any, **keys: Any) -> tuple[MemoryRecord, Estimate]:
    gpu = find_gpu("H100")
    target = Estimate.of(make_config(accumulator="cpu"), Hardware("cuda", gpu.name, gpu, gpu.usable_bytes))
    record = MemoryRecord(target, Arena(target.plan, "meta"), MetricsLog(tmp_path), card, **keys)
    return record, target


def test_on_a_card_the_allocator_and_what_is_beside_it_are_told_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    _Allocator(monkeypatch, reserved=64 * MIB, most=66 * MIB)
    how = "NVML, of this process"
    card = _Card(Reading(900 * MIB, how), Reading(700 * MIB, how))
    record, target = on_a_card(tmp_path, card)
    assert record.row() == {
        "memory/planned": target.required_bytes,
        "memory/arena": target.device_bytes,
        "memory/reserved": 64 * MIB,
        "memory/process": 900 * MIB,
    }
    for step in range(1, 11):
        record.after_step(step)
    record.at_end(10)
    assert card.closed
    tenth, end = events(tmp_path, "memory")
    assert (tenth["moment"], end["moment"], tenth["device"]) == ("tenth step", "end", "cuda")
    parts = end["components"]
    pooled = sum(item.bytes for item in target.outside_items if item.pooled)
    beside = sum(item.bytes for item in target.outside_items if not item.pooled)
    assert pooled > 0 < beside
    measured = {name: (part["planned"], part["measured"]) for name, part in parts.items()}
    assert measured["arena, device"] == (target.device_bytes, target.device_bytes)
    assert measured["arena, pinned"] == (target.plan.size("pinned"), target.plan.size("pinned"))
    assert measured["allocator"] == (target.device_bytes + pooled, 66 * MIB)
    assert measured["beside the allocator"] == (beside, 636 * MIB)
    assert measured["process"] == (target.required_bytes, 700 * MIB)
    assert measured["process, peak"] == (target.required_bytes, 900 * MIB)
    assert measured["host memory, peak"][0] == target.required_host_bytes
    assert measured["allocator"][0] + beside == target.required_bytes, "the parts are the whole"
    for item in target.outside_items:
        assert measured[item.name] == (item.bytes, None)
        place = "the allocator" if item.pooled else "what is beside it"
        assert parts[item.name]["how"] == f"not told apart from the rest of {place}"


@pytest.mark.parametrize("steps", [0, 2, 10])
def test_context_kernels_and_graphs_are_told_apart(
    steps: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    _Allocator(monkeypatch, reserved=64 * MIB, most=66 * MIB)
    how = "NVML, of this process"
    card = _Card(Reading(594 * MIB, how), Reading(600 * MIB, how))
    record, target = on_a_card(tmp_path, card, context=Reading(430 * MIB, how))
    if steps:
        record.before_capture()  # within the first step, where it has many micro-batches
    for step in range(1, steps + 1):
        record.after_step(step)
    record.after_step(steps + 1)
    record.at_end(steps + 1)
    parts = events(tmp_path, "memory")[-1]["components"]
    planned = {item.name: item.bytes for item in target.outside_items}
    expected = {
        CUDA_CONTEXT: 430 * MIB,
        LOADED_KERNELS: 100 * MIB if steps else None,  # 594 less 64 of the allocator and 430 of the context
        GRAPHS: 6 * MIB if steps else None,
    }
    for name, size in expected.items():
        assert (parts[name]["planned"], parts[name]["measured"]) == (planned[name], size), name
    if steps:
        assert "Triton modules are within it" in parts[LOADED_KERNELS]["how"]
        beside = parts["beside the allocator"]["measured"]
        assert sum(parts[name]["measured"] for name in expected) == beside == 536 * MIB
    assert card.asked <= 5


def test_a_run_reads_before_its_first_capture(monkeypatch: pytest.MonkeyPatch):
    done: list[str] = []

    class Graph:
        def replay(self) -> None:
            done.append("replay")

    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", lambda *_, **__: contextlib.nullcontext(done.append("capture")))
    graphs = Graphs(SimpleNamespace())  # type: ignore[arg-type]
    graphs.before_capture = lambda: done.append("read")
    for name in ("a", "a", "b", "b", "a"):
        graphs.run(name, lambda name=name: done.append(name))  # type: ignore[misc]
    assert done == ["a", "read", "capture", "a", "replay", "b", "capture", "b", "replay", "replay"]


def test_what_the_driver_does_not_say_is_null_with_its_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    _Allocator(monkeypatch, reserved=64 * MIB, most=66 * MIB)
    record, _ = on_a_card(tmp_path, _Card(Reading(None, "NVML: gone")))
    assert record.row()["memory/process"] is None
    record.after_step(1)
    record.at_end(1)
    parts = events(tmp_path, "memory")[0]["components"]
    for name in ("process", "process, peak", "beside the allocator"):
        assert parts[name]["measured"] is None
        assert "NVML: gone" in parts[name]["how"]
    assert parts["allocator"]["measured"] == 66 * MIB


def test_rows_ask_once_a_second_at_most(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    _Allocator(monkeypatch, reserved=64 * MIB, most=66 * MIB)
    card, now = _Card(Reading(900 * MIB, "NVML"), Reading(700 * MIB, "NVML")), [100.0]
    record, _ = on_a_card(tmp_path, card, clock=lambda: now[0])
    seen = []
    for moment in (100.0, 100.4, 100.99, 101.0, 101.2):
        now[0] = moment
        seen.append(record.row()["memory/process"])
    assert (seen, card.asked) == ([900 * MIB] * 3 + [700 * MIB] * 2, 2)


def test_a_reading_costs_next_to_nothing(tmp_path: Path):
    target = Estimate.of(make_config(), Hardware("cpu", "CPU"))
    clock = itertools.count()
    record = MemoryRecord(target, Arena(target.plan), MetricsLog(tmp_path), None, clock=lambda: next(clock))
    began = time.perf_counter()
    for _ in range(100):
        record.row()
    assert time.perf_counter() - began < 0.5  # 5 ms each, a hundredfold of what it takes


def test_the_peak_says_when_it_was_reached_before_the_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    target = Estimate.of(make_config(), Hardware("cpu", "CPU"))
    for later, says in ((5 * GIB, True), (6 * GIB, False)):
        monkeypatch.setattr(memory_record, "peak_resident", lambda: Reading(5 * GIB, "VmHWM"))
        record = MemoryRecord(target, Arena(target.plan), MetricsLog(tmp_path), None)
        monkeypatch.setattr(memory_record, "peak_resident", lambda now=later: Reading(now, "VmHWM"))
        record.after_step(1)
        record.at_end(1)
        peak = events(tmp_path, "memory")[-1]["components"]["process, peak"]
        assert peak["measured"] == later
        assert ("reached before the first step" in peak["how"]) == says


# The readings


def test_resident_memory_is_what_was_touched():
    """In a process of its own: one that ran other tests has freed memory left, which it would touch again."""
    program = """
from albor.memory.process import peak_resident, resident
before = resident()
held = b"1" * (64 << 20)
after = resident()
del held
print(before.bytes, after.bytes, resident().bytes, peak_resident().bytes, after.how)
"""
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    *numbers, how = ran.stdout.split(maxsplit=4)
    before, after, at_the_end, peak = map(int, numbers)
    assert 60 * MIB < after - before < 72 * MIB
    assert at_the_end - before < 8 * MIB
    assert peak >= after - MIB  # the kernel counts pages per core, and adds them up a little late
    assert how == "VmRSS in /proc/self/status\n"


def test_a_system_without_proc_gives_a_reason(tmp_path: Path):
    assert resident(proc=tmp_path).bytes is None
    assert "No such file" in resident(proc=tmp_path).how
    (tmp_path / "self").mkdir()
    (tmp_path / "self/status").write_text("Name:\tpython\n")
    assert peak_resident(proc=tmp_path) == Reading(None, f"{tmp_path}/self/status has no VmHWM")


PID = os.getpid()
MINE = Card("GPU-aaaa-1", free=20000, computing=((1, 700), (PID, 1500)))
OTHER = Card("GPU-bbbb-2", "NVIDIA GeForce RTX 3060", (8, 6), 11000, 12288)


def test_the_driver_lists_the_process(monkeypatch: pytest.MonkeyPatch):
    nvml = install(monkeypatch, MINE)
    card = CardProcess()
    assert card.read() == Reading(1500 * MIB, "NVML, of this process")
    card.close()
    card.close()
    assert nvml.closed


def test_of_several_cards_it_is_the_one_that_lists_the_process(monkeypatch: pytest.MonkeyPatch):
    install(monkeypatch, OTHER, MINE)
    assert CardProcess().read().bytes == 1500 * MIB
    install(monkeypatch, OTHER, replace(MINE, computing=()))
    assert CardProcess().read() == Reading(
        None, "CUDA may have taken any of several devices (CUDA_VISIBLE_DEVICES says which)"
    )


@pytest.mark.parametrize(
    "listed", [((1, 700),), ((PID, None),), None], ids=["container", "windows", "refused"]
)
def test_a_process_that_is_not_listed_is_what_the_card_has_more(monkeypatch: pytest.MonkeyPatch, listed: Any):
    nvml = install(monkeypatch, replace(MINE, computing=listed))
    card = CardProcess()
    assert card.read().bytes == 0

    def more(handle: Card, version: int | None = None) -> Any:
        return FakeNvml.nvmlDeviceGetMemoryInfo(nvml, replace(handle, free=18500), version)

    monkeypatch.setattr(nvml, "nvmlDeviceGetMemoryInfo", more)
    reading = card.read()
    assert reading.bytes == 1500 * MIB
    assert "does not list this process" in reading.how


def test_a_card_that_says_nothing_leaves_nothing_known(monkeypatch: pytest.MonkeyPatch):
    install(monkeypatch, replace(MINE, free=None, computing=None))
    reading = CardProcess().read()
    assert reading == Reading(None, "NVML lists neither this process's memory nor the card's")
    install(monkeypatch, MINE, driver=0)
    reading = CardProcess().read()
    assert reading.bytes is None
    assert reading.how.startswith("NVML cannot be used")
    install(monkeypatch, MINE, visible="")
    assert CardProcess().read() == Reading(None, "NVML knows no device that CUDA would take")
