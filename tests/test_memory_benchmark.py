"""benchmarks/memory.py, as far as it needs no GPU: its shapes, its figures, its record, and a real shape on a
CPU.
"""

from __future__ import annotations

import json
import re
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from nvml_cases import Card, install

from albor.config import check_algebra
from albor.configfile import load_config
from albor.errors import AlborError
from albor.memory.cards import Hardware, find_gpu
from albor.memory.devices import this_machine
from albor.memory.estimate import Estimate
from albor.units import GIB, MIB

ROOT = Path(__file__).parents[1]


def load() -> Any:
    """benchmarks/memory.py as a module."""
    spec = spec_from_file_location("measure_memory", ROOT / "benchmarks" / "memory.py")
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules.setdefault("measure_memory", module_from_spec(spec))
    if not hasattr(module, "main"):
        spec.loader.exec_module(module)
    return module


script = load()
H100 = find_gpu("H100")
CARD = Hardware("cuda", "H100", H100, H100.usable_bytes)


# What is measured


def test_the_shapes_of_a_card_are_at_least_forty_different_ones():
    shapes = script.shapes("cuda")
    assert len(shapes) >= script.GOAL_SHAPES
    assert len({shape.name for shape in shapes}) == len(shapes)
    plans = {}
    for shape in shapes:
        assert check_algebra(shape.config) == []
        assert shape.config.steps >= 10
        assert shape.config.steps % shape.config.evaluate.every_steps == 0
        plan = Estimate.of(shape.config, CARD).plan
        plans[shape.name] = (plan.buffers, plan.attention.backend, plan.compute_dtype)
    assert len(set(plans.values())) >= script.GOAL_SHAPES, "too many have the plan of another"
    backends = {backend for _, backend, _ in plans.values()}
    assert {"triton", "flash", "cudnn"} <= backends
    assert {dtype for _, _, dtype in plans.values()} == {"bfloat16", "float16", "float32"}


def test_the_shipped_configurations_are_among_them_with_their_own_plans():
    """By their names, which benchmarks/estimators.py looks for."""
    shapes = {shape.name: shape.config for shape in script.shapes("cuda")}
    shipped = sorted(ROOT.glob("configs/pretrain-*.yaml"))
    assert len(shipped) == 4
    for path in shipped:
        plans = [Estimate.of(config, CARD).plan for config in (shapes[path.stem], load_config(path))]
        assert plans[0].buffers == plans[1].buffers, path.stem


def test_a_cpu_takes_every_shape_of_its_own():
    shapes = script.shapes("cpu")
    assert len(shapes) > 30
    for shape in shapes:
        assert check_algebra(shape.config) == []
        assert Estimate.of(shape.config, Hardware("cpu", "CPU")).required_bytes < 2 * GIB


def test_at_the_edge_of_a_card_one_more_sequence_is_refused():
    found = script.edges("cuda", CARD)
    assert len(found) == 2 * len(script._EDGES_GIB)
    for accepted, refused in zip(found[::2], found[1::2], strict=True):
        assert accepted.accepted
        assert not refused.accepted
        assert accepted.capacity == refused.capacity
        batches = [shape.config.train.micro_batch_size for shape in (accepted, refused)]
        assert batches[1] == batches[0] + 1
        needed = [Estimate.of(shape.config, CARD).required_bytes for shape in (accepted, refused)]
        assert needed[0] <= accepted.capacity < needed[1]
    small = Hardware("cuda", "half a card", H100, 12 * GIB)
    assert {shape.capacity for shape in script.edges("cuda", small)} == {
        int(size * GIB) for size in script._EDGES_GIB if size <= 12
    }
    assert script.edges("cuda", Hardware("cuda", "unknown", H100, None)) == []


@pytest.mark.parametrize("most", [0, 1, 2, 3, 7, 8, 9, 100])
def test_the_largest_that_fits(most: int):
    assert script.largest(lambda number: number <= most) == most


def test_the_allocator_gets_what_the_driver_leaves():
    config = script.shapes("cuda")[0].config
    target = Estimate.of(config, CARD)
    pooled = sum(item.bytes for item in target.outside_items if item.pooled)
    assert script.cap_of(target, None) == target.device_bytes + pooled
    assert script.cap_of(target, 8 * GIB) == 8 * GIB - (target.required_bytes - target.device_bytes - pooled)


@pytest.mark.parametrize("cap", [1, 3 * MIB + 1, 6_101_308_501, 67_566_700_235])
def test_the_cap_is_the_allocators_limit_to_the_byte(cap: int, monkeypatch: pytest.MonkeyPatch):
    """PyTorch takes a fraction, and cuts its product with the total to whole bytes."""
    from albor import cli
    from albor.train import run

    total, seen = 84_929_806_336, []
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda index: SimpleNamespace(total_memory=total)
    )
    monkeypatch.setattr(
        torch.cuda, "set_per_process_memory_fraction", lambda share: seen.append(int(share * total))
    )
    monkeypatch.setattr(run, "open_session", lambda *given, **named: (given, named))
    monkeypatch.setattr(sys, "argv", [])
    monkeypatch.setattr(cli, "main", lambda: seen.append(run.open_session(1, two=2)))
    script.train_capped(Path("x.yaml"), cap)
    assert seen == [cap, ((1,), {"two": 2})]
    assert sys.argv == ["albor", "train", "x.yaml", "--resume", "never"]


# Figures and goals


def row(name: str = "a", planned: int = 1000, measured: int | None = 1000, **keys: Any) -> dict[str, Any]:
    return {
        "name": name, "planned": planned * MIB, "measured": None if measured is None else measured * MIB,
        "status": "ok", "accepted": True, "calibrated": True, "capacity_bytes": None, "error": None, **keys,
    }  # fmt: skip


def test_the_figures():
    rows = [
        row("exact"),
        row("over", 1020),
        row("under", 990),
        row("short", status="out of memory", measured=5),
        row("broken", status="failed", measured=None, error="why"),
        row("refused", 2000, accepted=False, status="out of memory", capacity_bytes=1000 * MIB),
        row("timid", 1010, 900, accepted=False, capacity_bytes=1000 * MIB),
    ]
    assert script.summarise(rows) == {
        "shapes": 3,
        "ratio": {"minimum": 0.99, "median": 1.0, "maximum": 1.02},
        "error": {"median": 0.01, "maximum": 0.02},
        "below_parity": ["under"],
        "most_above_the_plan": 10 * MIB,
        "calibrated": True,
        "out_of_memory": ["short"],
        "refused_rightly": ["refused"],
        "refused_and_trained": {"timid": 0.01},
        "failed": {"broken": "why"},
    }


def reached(rows: list[dict[str, Any]], *, is_gpu: bool = True) -> list[bool | None]:
    return [goal["reached"] for goal in script.goals(script.summarise(rows), is_gpu=is_gpu)]


def test_the_goals():
    good = [row(str(number), 1010) for number in range(40)]
    assert reached(good) == [True] * 4
    assert reached(good[1:]) == [None] * 4, "too few to say so"
    assert reached(good, is_gpu=False) == [None] * 4
    assert reached([]) == [None] * 4
    assert reached([row(str(number), 1016) for number in range(40)]) == [False, True, True, True]
    assert reached([*good, row("one", 1031)]) == [True, False, True, True]
    assert reached([*good, row("one", 9936, 10000)]) == [True, True, True, True]
    assert reached([*good, row("one", 9935, 10000)]) == [True, True, False, True]
    assert reached([*good, row("one", status="out of memory")]) == [True, True, True, False]
    assert reached([row("one", 1031), row("two", status="out of memory")]) == [None, False, None, False]


# The record


HERE = {
    "code": "c", "device": "card", "driver": "580", "is_gpu": True, "commit": "abc", "date": "today",
    "versions": {"torch": "2.13", "triton": "3.7", "numpy": "2"},
}  # fmt: skip


def measured(shape: Any, most: float) -> dict[str, Any]:
    return row(shape.name)


def test_a_second_call_does_what_is_left(tmp_path: Path):
    wanted, path, said = script.shapes("cuda")[:3], tmp_path / "memory.json", []
    now, taken = [0.0], []

    def slow(shape: Any, most: float) -> dict[str, Any]:
        taken.append((shape.name, most))
        now[0] += 50
        return row(shape.name)

    def go_on(limit: float, here: dict[str, Any] = HERE) -> dict[str, Any]:
        record = script.Record(path, here, "python benchmarks/memory.py")
        return script.benchmark(wanted, record, slow, limit, 300, said.append, lambda: now[0])

    told = go_on(90)
    assert taken == [(wanted[0].name, 90), (wanted[1].name, 40)]
    assert said[-1] == "time is up, 1 are left; the same command goes on"
    assert told == json.loads(path.read_text())
    taken.clear()
    assert len(go_on(1000)["shapes"]) == 3
    assert taken == [(wanted[2].name, 300)]
    taken.clear()
    told = go_on(1000)
    assert taken == []
    assert (told["wanted"], told["machine"]["driver"]) == (3, "580")
    assert all(one["commit"] == "abc" for one in told["shapes"])
    for other in (
        {"driver": "590"},
        {"code": "d"},
        {"device": "other"},
        {"versions": HERE["versions"] | {"torch": "3"}},
    ):
        taken.clear()
        assert len(go_on(1000, HERE | other)["shapes"]) == 3
        assert len(taken) == 3, f"{other} changes nothing"


def test_what_failed_is_tried_again_after_the_rest(tmp_path: Path):
    wanted, path, taken = script.shapes("cuda")[:3], tmp_path / "memory.json", []

    def failing(shape: Any, most: float) -> dict[str, Any]:
        taken.append(shape.name)
        bad = shape is wanted[0] and len(taken) == 1
        return row(shape.name, status="failed", measured=None, error="x") if bad else row(shape.name)

    for _ in range(2):
        record = script.Record(path, HERE, "x")
        script.benchmark(wanted[: 1 + len(taken) * 2], record, failing, 1e9, 300, lambda line: None)
    assert taken == [wanted[0].name, wanted[1].name, wanted[2].name, wanted[0].name]


def test_a_shape_that_hangs_is_a_failure_and_one_cut_short_is_nothing(tmp_path: Path):
    wanted, said = script.shapes("cuda")[:1], []
    for limit, status in ((1000, ["failed"]), (100, [])):
        record = script.Record(tmp_path / f"{limit}.json", HERE, "x")
        told = script.benchmark(wanted, record, lambda shape, most: None, limit, 300, said.append)
        assert [one["status"] for one in told["shapes"]] == status
    assert "did not end within 300 seconds" in "\n".join(script.render(told)) or "time is up" in said[-1]


def test_the_page(tmp_path: Path):
    wanted = script.shapes("cuda")[:2]
    record = script.Record(tmp_path / "memory.json", HERE, "x")
    rows = iter([row(wanted[0].name, 990), row(wanted[1].name, 1030, calibrated=False)])
    told = script.benchmark(wanted, record, lambda shape, most: next(rows), 1e9, 300, lambda line: None)
    page = "\n".join(script.render(told))
    assert "planned / measured: minimum 0.9900, median 1.0100, maximum 1.0300" in page
    assert "below parity: 1, by at most 10.0 MiB" in page
    assert "Not calibrated" in page
    assert "open: median error at most 0.015, found" in page


# What a child leaves


@pytest.mark.parametrize(
    ("code", "log", "status"),
    [
        (1, "albor: out of memory after step 2 of 12: CUDA out of memory. Tried to", "out of memory"),
        (1, "RuntimeError: CUBLAS_STATUS_ALLOC_FAILED when calling", "out of memory"),
        (1, "albor: the data cannot be read", "failed"),
        (-9, "", "failed"),
        (0, "", "failed"),  # it left no record
    ],
)
def test_how_a_child_ended(code: int, log: str, status: str, tmp_path: Path):
    (tmp_path / "events.jsonl").touch()
    found = script.judge_child(script.Outcome(code, log, 5, "seen", 1.0), tmp_path)
    assert (found["status"], found["measured"]) == (status, 5)
    assert found["error"]


def event(**parts: int | None) -> str:
    components = {
        name.replace("_", ", "): {"planned": 10, "measured": size, "how": "asked"}
        for name, size in parts.items()
    }
    record = {"event": "memory", "step": 12, "moment": "end", "device": "cuda", "calibrated": True}
    return (
        json.dumps({"event": "started", "step": 0})
        + "\n"
        + json.dumps({**record, "components": components})
        + "\n"
    )


@pytest.mark.parametrize(
    ("parts", "peak", "most"),
    [
        ({"process": 7, "process_peak": 8}, 9, 9),
        ({"process": 7, "process_peak": 9}, 8, 9),
        ({"process": 7}, None, 7),
        ({"process": None, "process_peak": None}, 6, 6),
        ({"process": None}, None, None),
    ],
)
def test_the_measured_bytes_are_the_most_that_anybody_saw(
    parts: dict, peak: int | None, most: int | None, tmp_path: Path
):
    (tmp_path / "events.jsonl").write_text(event(**parts))
    found = script.judge_child(script.Outcome(0, "", peak, "seen", 1.0), tmp_path)
    assert (found["status"], found["measured"]) == ("ok" if most else "not measured", most)


def test_an_evaluation_that_was_left_out_for_want_of_memory_counts(tmp_path: Path):
    left_out = '{"event": "out_of_memory", "step": 6, "during": "evaluation"}\n'
    (tmp_path / "events.jsonl").write_text(event(process=7) + left_out)
    found = script.judge_child(script.Outcome(0, "no memory for evaluation", 5, "seen", 1.0), tmp_path)
    assert found["status"] == "out of memory"


# For real


@pytest.fixture
def corpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Text enough for a vocabulary of 512."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text").mkdir()
    for path in sorted((ROOT / "albor" / "train").glob("*.py")):
        (tmp_path / "text" / path.name).write_text(path.read_text())
    return str(tmp_path / "text" / "*.py")


def test_a_cpus_run_is_measured_for_real(corpus: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    given = ["--device", "cpu", "--only", "^10m-mb4-gpu$", "--text", corpus]
    assert script.main(given) == 0
    out = capsys.readouterr().out
    told = json.loads((tmp_path / "runs/memory/memory-cpu.json").read_text())
    (found,) = told["shapes"]
    config = script.shapes("cpu", corpus)[1].config
    target = Estimate.of(config, this_machine("cpu"))
    assert (found["name"], found["status"], found["planned"]) == ("10m-mb4-gpu", "ok", target.required_bytes)
    parts = found["components"]
    assert parts["arena, device"]["residual"] == 0
    assert set(parts) == set(found["at_the_tenth_step"])
    assert found["measured"] == max(found["seen_from_outside"], parts["process, peak"]["measured"])
    # Two ways to the same number: the run's own, and its parent's, who looks until shortly before its end.
    assert found["seen_from_outside"] == pytest.approx(parts["process, peak"]["measured"], rel=0.2)
    assert found["measured"] > 100 * MIB
    assert told["command"] == f"python benchmarks/memory.py {' '.join(given)}".replace(
        "^10m-mb4-gpu$", "'^10m-mb4-gpu$'"
    ).replace(corpus, f"'{corpus}'")
    assert "A CPU, as a stand-in" in out
    assert f"{found['planned'] / MIB:,.1f}" in out
    assert not list((tmp_path / "runs/memory/runs").iterdir()), "gigabytes of checkpoints would stay"
    assert script.main(given) == 0  # nothing is left to do
    assert json.loads((tmp_path / "runs/memory/memory-cpu.json").read_text())["shapes"] == [found]


@pytest.mark.parametrize("options", [(), ("--list",)])
def test_names_that_no_shape_has_leave_no_record(
    options: tuple[str, ...],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    monkeypatch.chdir(tmp_path)
    assert script.main(["--device", "cpu", "--only", "351m", *options]) == 2
    assert "none is left; leave out --only" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
    with pytest.raises(SystemExit) as ended:
        script.main(["--device", "cpu", "--only", "[350m"])
    assert ended.value.code == 2
    assert "'[350m' is no regular expression" in capsys.readouterr().err


def test_text_that_is_not_there_is_explained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(AlborError, match=r"the data cannot be prepared: albor: .*nothing-here"):
        script.prepare(script.shapes("cpu", str(tmp_path / "nothing-here"))[:1], tmp_path, lambda line: None)


def test_the_shapes_of_this_card_are_listed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
):
    monkeypatch.chdir(tmp_path)
    install(monkeypatch, Card("GPU-1", "NVIDIA A100-SXM4-40GB", (8, 0), free=40000, total=40960))
    assert script.main(["--list", "--only", "350m|card"]) == 0
    listed, left_out = capsys.readouterr()
    cards = [size for size in script._EDGES_GIB if size <= 40000 / 1024]
    assert sum(line.startswith("card-") for line in listed.splitlines()) == 2 * len(cards)
    assert re.search(r"^350m-mb2-cpu +[\d,.]+ MiB$", listed, re.MULTILINE)
    assert left_out == ""
    install(monkeypatch, Card("GPU-1", "NVIDIA A100-SXM4-40GB", (8, 0), free=9000, total=40960))
    assert script.main(["--list", "--only", "350m"]) == 0
    listed, left_out = capsys.readouterr()
    assert "350m-mb8-gpu" not in listed
    assert re.search(r"^350m-mb8-gpu: .* needed, more than .*; left out$", left_out, re.MULTILINE)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is one")
def test_without_a_card_it_says_so(capsys: pytest.CaptureFixture[str]):
    assert script.main([]) == 2
    assert "run it on a GPU, or with --device cpu" in capsys.readouterr().err
