"""`albor calibrate`: what it measures and stores, and which estimates go by it."""

from __future__ import annotations

import json
import os
import signal
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
from run_cases import ENVIRONMENT, albor, call, start, write_project

from albor.calibrate import measure, run
from albor.calibrate.measure import Measured, Stage, break_down, card_config, exercise, measure_card
from albor.configfile import load_config
from albor.errors import AlborError
from albor.memory import outside as outside_module
from albor.memory.calibration import (
    CUDA_CONTEXT,
    GRAPHS,
    LOADED_KERNELS,
    PROCESS,
    Calibration,
    Software,
    as_json,
    calibration_path,
    find_calibration,
    read_calibrations,
)
from albor.memory.cards import Gpu, Hardware, find_gpu
from albor.memory.estimate import estimate
from albor.memory.outside import MARGIN, PREPARATION, graph_nodes, outside, outside_items
from albor.memory.plan import plan_training
from albor.memory.process import Reading
from albor.units import GIB, KIB, MIB

CONFIGS = Path(__file__).parents[1] / "configs"
CARD = Calibration(
    device="cuda",
    gpu="NVIDIA GeForce RTX 4090",
    driver="570.86.15",
    torch="2.13.0+cu130",
    triton="3.7.1",
    cuda="13.0",
    date="2026-11-21T18:00:00+00:00",
    method="NVML, of this process",
    bytes={CUDA_CONTEXT: 400 * MIB, LOADED_KERNELS: 100 * MIB, GRAPHS: 6 * MIB},
    graph_nodes=300,
)
HOST = replace(CARD, device="cpu", gpu=None, driver=None, bytes={PROCESS: 300 * MIB}, graph_nodes=0)
HERE = Software(driver="570.133.07", torch="2.13.1")


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where this test's calibrations are, on a machine with HERE's software."""
    monkeypatch.setenv("ALBOR_CALIBRATION", str(tmp_path / "cache" / "calibration.json"))
    monkeypatch.setattr(outside_module, "_installed", lambda: HERE)
    return tmp_path / "cache" / "calibration.json"


def store(path: Path, *rows: Calibration) -> list[str]:
    """Stores them one after the other; returns what was said."""
    said: list[str] = []
    for row in rows:
        run.store(row, path, said.append)
    return said


# The file


def test_the_file_is_in_the_users_cache() -> None:
    assert calibration_path({"ALBOR_CALIBRATION": "/x/y.json"}) == Path("/x/y.json")
    assert calibration_path({"XDG_CACHE_HOME": "/cache"}) == Path("/cache/albor/calibration.json")
    home = Path.home() / ".cache/albor/calibration.json"
    assert calibration_path({}) == calibration_path({"XDG_CACHE_HOME": "relative"}) == home


def test_a_row_replaces_that_of_the_same_card_and_software(path: Path) -> None:
    newer = replace(CARD, driver="570.195.03", torch="2.13.2", bytes={**CARD.bytes, GRAPHS: 1})
    other = replace(CARD, driver="580.65.06")
    assert store(path, CARD, HOST, other, newer) == []
    assert read_calibrations(path).rows == (HOST, other, newer)
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_where_it_cannot_be_written_the_old_file_stays(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store(path, CARD)

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(run, "replace_file", full)
    with pytest.raises(AlborError, match=r"calibration.json cannot be written: No space left"):
        store(path, HOST)
    assert read_calibrations(path).rows == (CARD,)


def _with(**changes: Any) -> str:
    value = as_json((CARD,))
    value["rows"][0] |= changes
    return json.dumps(value)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("", "damaged"),
        ('{"schema": 1, "rows": [', "damaged"),
        ("\0" * 100, "damaged"),
        ("[" * 100_000, "damaged"),
        ('{"schema": 1, "schema": 1, "rows": []}', "damaged"),
        ('{"schema": 1}', "damaged"),
        ('{"schema": 1, "rows": [7]}', "damaged"),
        ("[]", "another version"),
        ('{"schema": 2, "rows": []}', "another version"),
        ('{"name": "something else"}', "another version"),
        (_with(unheard_of=1), "damaged"),
        (_with(bytes=CARD.bytes | {CUDA_CONTEXT: -1}), "damaged"),
        (_with(bytes=CARD.bytes | {CUDA_CONTEXT: 1.5}), "damaged"),
        (_with(bytes=CARD.bytes | {CUDA_CONTEXT: True}), "damaged"),
        (_with(bytes=CARD.bytes | {"more": 1}), "damaged"),
        (_with(bytes={CUDA_CONTEXT: 1}), "damaged"),
        (_with(details=[]), "damaged"),
        (_with(bytes=[1]), "damaged"),
        (_with(gpu=None), "damaged"),
        (_with(device="tpu"), "damaged"),
        (_with(bytes=dict.fromkeys(CARD.bytes, 0)), "too small to have been measured"),
        (_with(bytes=CARD.bytes | {CUDA_CONTEXT: 16 * MIB - 1}), "too small to have been measured"),
        (_with(date="x"), "damaged"),
        (_with(date=""), "damaged"),
        (_with(torch=""), "damaged"),
        (_with(graph_nodes=0), "damaged"),
        (_with(torch=None), "damaged"),
        (_with(driver=570), "damaged"),
    ],
)
def test_a_file_that_is_no_use_is_named_left_alone_and_replaced(
    content: str, reason: str, path: Path
) -> None:
    path.parent.mkdir()
    path.write_text(content)
    stored = read_calibrations(path)
    assert stored.rows == ()
    assert stored.problem is not None
    assert str(path) in stored.problem
    assert reason in stored.problem
    target = estimate(load_config(CONFIGS / "pretrain-350m.yaml"), "RTX 4090")
    assert not target.calibrated
    assert target.calibration_note == f"not calibrated: {stored.problem}"
    assert target.outside[MARGIN] > 0
    assert path.read_text() == content
    (said,) = store(path, CARD)
    assert said.startswith("replaced: ")
    assert read_calibrations(path).rows == (CARD,)


def test_a_file_that_cannot_be_read_says_why(tmp_path: Path) -> None:
    assert "Is a directory" in str(read_calibrations(tmp_path).problem)
    assert read_calibrations(tmp_path / "none.json").problem is None


# Which row


@pytest.mark.parametrize(
    ("row", "gpu", "here", "found"),
    [
        (CARD, find_gpu("RTX 4090"), HERE, True),
        (CARD, replace(find_gpu("L4"), name=CARD.gpu), HERE, True),  # as NVML names the installed one
        (CARD, find_gpu("RTX 3090"), HERE, False),
        (CARD, None, HERE, False),
        (CARD, find_gpu("RTX 4090"), replace(HERE, driver="580.65.06"), False),
        (CARD, find_gpu("RTX 4090"), replace(HERE, driver=None), True),  # about a card that is elsewhere
        (replace(CARD, driver=None), find_gpu("RTX 4090"), HERE, False),
        (CARD, find_gpu("RTX 4090"), replace(HERE, torch="2.12.0"), False),
        (CARD, find_gpu("RTX 4090"), replace(HERE, torch=None), False),
        (replace(CARD, gpu="NVIDIA A100-SXM4-40GB"), find_gpu("A100 40GB"), HERE, True),
        (replace(CARD, gpu="NVIDIA A100-SXM4-40GB"), find_gpu("A100 80GB"), HERE, False),
        (HOST, find_gpu("RTX 4090"), HERE, False),
    ],
)
def test_a_row_is_for_its_card_driver_and_torch(
    row: Calibration, gpu: Gpu | None, here: Software, found: bool
) -> None:
    assert (find_calibration((row,), "cuda", gpu, here) is row) is found


def test_the_newest_row_counts_and_a_cpu_has_its_own() -> None:
    newer = replace(CARD, driver="570.200", bytes={**CARD.bytes, CUDA_CONTEXT: 1})
    gpu = find_gpu("RTX 4090")
    assert find_calibration((CARD, newer, HOST), "cuda", gpu, HERE) is newer
    assert find_calibration((CARD, HOST), "cpu", None, HERE) is HOST
    assert find_calibration((HOST,), "cpu", None, replace(HERE, torch="2.12.9")) is None


def test_software_is_read_without_importing_torch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    version = tmp_path / "version"
    monkeypatch.setattr("albor.memory.calibration._DRIVER", version)
    assert Software.installed().driver is None
    version.write_text("570.86.15\n")
    found = Software.installed()
    assert found.driver == "570.86.15"
    assert str(found.torch).partition("+")[0] == torch.__version__.partition("+")[0]


# The estimate


def test_an_estimate_goes_by_the_cards_row(path: Path) -> None:
    config = load_config(CONFIGS / "pretrain-350m.yaml")
    before = estimate(config, "RTX 4090")
    assert (before.calibrated, before.calibration_note) == (
        False,
        "not calibrated: run `albor calibrate` on it",
    )
    assert MARGIN in before.outside
    store(path, CARD)
    after = estimate(config, "RTX 4090")
    assert after.calibrated
    assert after.calibration_note == f"calibrated ({CARD})"
    assert MARGIN not in after.outside
    assert after.outside[CUDA_CONTEXT] == 400 * MIB
    assert after.outside[LOADED_KERNELS] == 100 * MIB
    # 6 MiB for 300 kernels are 20,972 bytes each, rounded up once.
    assert after.outside[GRAPHS] == -(-6 * MIB * graph_nodes(after.plan) // 300)
    answer = after.as_json()
    assert answer["calibrated"] is True
    assert answer["outside_sources"][CUDA_CONTEXT] == {"basis": "measured", "source": str(CARD)}
    assert set(answer["outside_sources"]) == set(answer["outside"])
    assert after.required_bytes == after.device_bytes + sum(answer["outside"].values())
    assert not estimate(config, "H100").calibrated, "another card"


def test_an_estimate_sees_a_calibration_that_came_after_it(path: Path) -> None:
    """Within one process, as a fit and a page of examples have it."""
    plan = plan_training(make_config(), "cpu", "float32")
    assert outside(plan)[PREPARATION] > 0
    store(path, HOST)
    assert outside(plan)[PROCESS] == 300 * MIB
    assert PREPARATION not in outside(plan), "the run that was measured had prepared data"
    store(path, replace(HOST, bytes={PROCESS: 301 * MIB}))
    assert outside(plan)[PROCESS] == 301 * MIB


# What is measured


def stages(context: int, kernels: int, graphs: int, reserved: int) -> dict[str, Stage]:
    """Sizes in MiB, of the process; the allocator has nothing before the arena."""
    return {
        "context": Stage(context * MIB, 0),
        "products": Stage((context + 60) * MIB, 34 * MIB),
        "kernels": Stage(kernels * MIB, reserved * MIB),
        "graphs": Stage(graphs * MIB, reserved * MIB),
    }


@pytest.mark.parametrize("more", [0, 40])
def test_what_is_measured_and_what_is_computed_add_up_to_the_process(more: int, path: Path) -> None:
    config, dtype = card_config((8, 9))
    plan = plan_training(config, "cuda", dtype, "gpu")
    computed = plan.size("device") + sum(item.bytes for item in outside_items(plan) if item.pooled)
    reserved = computed // MIB + more
    process = reserved + 410 + 95 + 7
    sizes, details = break_down(stages(410, reserved + 410 + 95, process, reserved), plan)
    assert sizes[CUDA_CONTEXT] == 410 * MIB
    assert sizes[GRAPHS] == 7 * MIB
    assert sum(sizes.values()) + computed == process * MIB, "also with what the allocator has beyond the plan"
    assert details["allocator"] - details["allocator, computed"] == pytest.approx(more * MIB, abs=MIB)
    # Stored and read back, an estimate of that very run is the process, to the byte.
    row = replace(CARD, bytes=sizes, graph_nodes=graph_nodes(plan))
    store(path, row)
    assert plan.size("device") + sum(outside(plan, find_gpu("RTX 4090")).values()) == process * MIB


def test_no_size_is_negative() -> None:
    plan = plan_training(*_of(card_config((8, 9))))
    sizes, _ = break_down(stages(410, 3000, 2990, 2000), plan)
    assert sizes[GRAPHS] == 0
    assert min(sizes.values()) >= 0


def _of(found: tuple[Any, str]) -> tuple[Any, Any, str, Any]:
    return found[0], "cuda", found[1], "gpu"


def test_what_is_trained_is_as_wide_as_the_350m_and_fits_small_cards() -> None:
    shipped = load_config(CONFIGS / "pretrain-350m.yaml").model
    for capability, precision in (((9, 0), "bf16"), ((7, 5), "fp16")):
        config, dtype = card_config(capability)
        assert config.train.precision == precision
        assert dtype == {"bf16": "bfloat16", "fp16": "float16"}[precision]
        for name in ("hidden_size", "intermediate_size", "vocab_size", "num_key_value_heads"):
            assert getattr(config.model, name) == getattr(shipped, name), name
        plan = plan_training(config, "cuda", dtype, "gpu")
        assert plan.size("device") + sum(outside(plan).values()) < 3 * GIB


class FakeCard:
    """What CardProcess answers, reading by reading."""

    def __init__(self, order: list[str], sizes: list[int | None]):
        self._order, self._sizes = order, sizes

    def __call__(self) -> FakeCard:
        self._order.append("NVML")
        return self

    def read(self) -> Reading:
        size = self._sizes.pop(0) if len(self._sizes) > 1 else self._sizes[0]
        self._order.append("read")
        return Reading(size, "NVML, of this process" if size else "NVML lists nothing")

    def close(self) -> None:
        self._order.append("close")


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> tuple[list[str], list[int | None]]:
    """A card of capability 8.9 without arithmetic: the order of what is asked of it, and what NVML says."""
    order: list[str] = []
    sizes: list[int | None] = [400 * MIB, 470 * MIB, 4000 * MIB]
    monkeypatch.setattr(measure, "CardProcess", FakeCard(order, sizes))
    monkeypatch.setattr(measure, "pin_cublas_workspace", lambda: order.append("pinned"))
    cuda = {
        "synchronize": lambda: order.append("CUDA"),
        "memory_reserved": lambda: 0,
        "get_device_capability": lambda: (8, 9),
    }
    for name, value in cuda.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(torch, "ones", lambda *_, **__: SimpleNamespace())
    monkeypatch.setattr(torch, "mm", lambda *_: order.append("product"))
    monkeypatch.setattr(
        "albor.train.rehearsal.compile_kernels", lambda *_: order.append("compiled"), raising=False
    )

    def exercised(config: Any, plan: Any, device: str, read: Any) -> dict[str, Stage]:
        order.append(f"training on {device}")
        return {"kernels": read("kernels"), "graphs": read("graphs")}

    monkeypatch.setattr(measure, "exercise", exercised)
    return order, sizes


def test_a_card_is_read_before_and_after_everything_that_adds_to_it(
    card: tuple[list[str], list[int | None]],
) -> None:
    order, _ = card
    said: list[str] = []
    measured = measure_card(said.append)
    assert order[:3] == ["NVML", "CUDA", "read"], "NVML must know what was in use before the context"
    assert order.index("pinned") < order.index("product") < order.index("compiled")
    assert order.index("compiled") < order.index("training on cuda")
    assert order[-1] == "close"
    assert said == ["context", "products", "kernels compiled", "kernels", "graphs"]
    assert measured.bytes[CUDA_CONTEXT] == 400 * MIB
    assert measured.details["cuBLAS, first product"] == 70 * MIB
    assert measured.graph_nodes == graph_nodes(plan_training(*_of(card_config((8, 9)))))
    assert measured.method == "NVML, of this process"


def test_a_card_that_says_nothing_is_no_measurement(card: tuple[list[str], list[int | None]]) -> None:
    card[1][:] = [None]
    with pytest.raises(AlborError, match="cannot be read: NVML lists nothing"):
        measure_card(lambda stage: None)


def test_all_that_a_run_does_is_done_before_it_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    from albor.evaluate import validation
    from albor.generate import sampler
    from albor.train.step import Trainer

    done: list[str] = []
    for owner, name in ((Trainer, "step"), (validation, "validate"), (sampler, "sample")):
        original = getattr(owner, name)

        def noted(*args: Any, _original: Any = original, _name: str = name, **keywords: Any) -> Any:
            done.append(_name)
            return _original(*args, **keywords)

        monkeypatch.setattr(owner, name, noted)
    config = make_config(gradient_accumulation_steps=2)
    config = config.model_copy(update={"evaluate": config.evaluate.model_copy(update={"prompts": ["a"]})})

    def read(stage: str) -> Stage:
        done.append(stage)
        return Stage(0, 0)

    exercise(config, plan_training(config, "cpu", "float32"), "cpu", read)
    assert done == ["step", "validate", "sample", "kernels", "step", "step", "graphs"]


# The command


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> None:
    found = Measured("NVML, of this process", CARD.bytes, 300, {"process": 1}, "3.7.1", "13.0")
    monkeypatch.setattr(run, "_measure", lambda device, say: say(f"on {device}") or found)
    monkeypatch.setattr(run.Software, "installed", lambda: HERE)


def test_the_installed_card_is_measured_and_stored(
    measured: None, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu = replace(find_gpu("RTX 4090"), name=CARD.gpu)
    monkeypatch.setattr(run, "installed_gpu", lambda: Hardware("cuda", "", gpu))
    result = call("calibrate")
    assert result.code == 0, result.err
    assert "NVIDIA GeForce RTX 4090, torch 2.13.1, driver 570.133.07" in result.out
    assert "0.39 GiB" in result.out
    (row,) = read_calibrations(path).rows
    assert (row.gpu, row.driver, row.bytes) == (CARD.gpu, HERE.driver, CARD.bytes)
    target = estimate(load_config(CONFIGS / "pretrain-350m.yaml"), "RTX 4090")
    assert target.calibrated
    answer = json.loads(call("calibrate", "--json").out)
    assert answer["path"] == str(path)
    assert answer["bytes"] == CARD.bytes
    assert len(read_calibrations(path).rows) == 1


def test_a_card_that_is_not_there_or_not_one_is_not_measured(
    measured: None, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "installed_gpu", lambda: None)
    result = call("calibrate", "--device", "cuda")
    assert result.code == 1
    assert "no GPU here" in result.err
    several = replace(find_gpu("RTX 4090"), name="NVIDIA L4 or NVIDIA A10")
    monkeypatch.setattr(run, "installed_gpu", lambda: Hardware("cuda", "NVIDIA L4 or NVIDIA A10", several))
    result = call("calibrate")
    assert result.code == 1
    assert "CUDA_VISIBLE_DEVICES" in result.err
    assert not path.exists()


def test_a_reading_that_cannot_be_is_not_stored(
    measured: None, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu = replace(find_gpu("RTX 4090"), name=CARD.gpu)
    monkeypatch.setattr(run, "installed_gpu", lambda: Hardware("cuda", "", gpu))
    nothing = Measured("NVML, of this process", CARD.bytes | {CUDA_CONTEXT: 0}, 300, {}, None, None)
    monkeypatch.setattr(run, "_measure", lambda device, say: nothing)
    result = call("calibrate")
    assert result.code == 1
    assert "too small to have been measured: nothing is stored (NVML, of this process)" in result.err
    assert not path.exists()


def test_a_measurement_that_fails_says_why(monkeypatch: pytest.MonkeyPatch, path: Path) -> None:
    monkeypatch.setattr(run.sys, "executable", "/bin/false")
    with pytest.raises(AlborError, match="the measurement failed: exit code 1"):
        run.calibrate("cpu", lambda stage: None)
    monkeypatch.setattr(run.sys, "executable", "/nonexistent/python")
    with pytest.raises(AlborError, match="cannot be started"):
        run.calibrate("cpu", lambda stage: None)
    assert not path.exists()


def test_a_measurement_that_hangs_is_ended(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    program = tmp_path / "python"
    program.write_text(f"#!/bin/sh\necho $$ > {tmp_path}/pid\nexec sleep 60\n")
    program.chmod(0o755)
    monkeypatch.setattr(run.sys, "executable", str(program))
    monkeypatch.setattr(run, "_SECONDS", 1)
    with pytest.raises(AlborError, match="more than 1 s"):
        run.calibrate("cpu", lambda stage: None)
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGKILL])
def test_a_measurement_ends_with_the_command(tmp_path: Path, number: signal.Signals) -> None:
    environment = ENVIRONMENT | {"ALBOR_CALIBRATION": str(tmp_path / "calibration.json")}
    process = start(tmp_path, "calibrate", "--device", "cpu", env=environment)
    try:
        assert process.stdout is not None
        assert "libraries" in process.stdout.readline()  # in the midst of it
        (child,) = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        process.send_signal(number)
        _, said = process.communicate(timeout=20)
    finally:
        process.kill()
    if number != signal.SIGKILL:  # of which nobody can say anything
        assert process.returncode == 128 + number
        assert said == "albor: interrupted; there is nothing to save\n"
    deadline = time.monotonic() + 20
    while _lives(child) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not _lives(child)
    assert not (tmp_path / "calibration.json").exists()


def _lives(pid: str) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
def test_this_machine_is_calibrated_and_a_run_stays_within_its_estimate(tmp_path: Path) -> None:
    """All of it, for real: measured here, stored, read by an estimate, and held against another run."""
    environment = ENVIRONMENT | {"ALBOR_CALIBRATION": str(tmp_path / "calibration.json")}
    result = albor(tmp_path, "calibrate", "--device", "cpu", "--json", env=environment)
    assert result.code == 0, result.err
    assert "measured: training" in result.err
    answer = json.loads(result.out)
    (row,) = read_calibrations(tmp_path / "calibration.json").rows
    assert answer["bytes"] == row.bytes
    assert 100 * MIB < row.bytes[PROCESS] < 2 * GIB
    assert row.bytes[PROCESS] == max(
        row.details["libraries"], row.details["process"] - row.details["planned"]
    )
    project = write_project(tmp_path / "project")
    answer = json.loads(albor(tmp_path, "vram-estimate", project, "--json", env=environment).out)
    assert answer["calibrated"] is True
    assert answer["outside"][PROCESS] == row.bytes[PROCESS]
    planned = answer["device_bytes"] + answer["host_bytes"] + answer["pinned_bytes"]
    most = _peak_of(tmp_path, project, environment)
    assert most <= planned + sum(answer["outside"].values()) + 64 * MIB
    assert most > planned + 100 * MIB


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_this_card_is_the_same_when_it_is_measured_again(tmp_path: Path) -> None:
    found = []
    for name in ("first", "second"):
        environment = ENVIRONMENT | {"ALBOR_CALIBRATION": str(tmp_path / f"{name}.json")}
        environment.pop("TRITON_INTERPRET", None)
        process = start(tmp_path, "calibrate", "--device", "cuda", "--json", env=environment)
        _, said = process.communicate(timeout=300)  # without a kernel cache it compiles
        assert process.returncode == 0, said
        (row,) = read_calibrations(tmp_path / f"{name}.json").rows
        found.append(row)
    first, second = found
    for item, size in first.bytes.items():
        assert abs(size - second.bytes[item]) <= 64 * MIB, item
    # What PyTorch takes is computed: no less than it takes, and no more than a segment beyond.
    assert 0 <= first.details["allocator, computed"] - first.details["allocator"] <= 24 * MIB


def _peak_of(directory: Path, project: Path, environment: dict[str, str]) -> int:
    """The most memory that a run of `project` has at a time.

    A program is charged with the memory of whoever started it, up to its `exec`: a small one stands between.
    """
    program = f"""
import os, sys
command = [sys.executable, "-m", "albor", "train", {str(project)!r}, "name=other"]
pid = os.posix_spawn(sys.executable, command, os.environ)
_, status, usage = os.wait4(pid, 0)
print(status, usage.ru_maxrss)
"""
    ran = subprocess.run(
        [sys.executable, "-c", program], cwd=directory, env=environment, stdout=subprocess.PIPE, text=True
    )
    status, most = map(int, ran.stdout.split()[-2:])
    assert status == 0
    return most * KIB
