"""What a run costs: checkpoints to the byte, kept ones by the rules that remove them, hours and kilowatts."""

from __future__ import annotations

import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from helpers import make_config
from hypothesis import given
from hypothesis import strategies as st
from run_cases import call

from albor import checkpoint
from albor.checkpoint import Retention
from albor.config import RunConfig
from albor.configfile import dump_config, load_config
from albor.manifest import Manifest
from albor.memory.cards import find_gpu
from albor.memory.cost import Cost, most_checkpoints
from albor.memory.estimate import estimate
from albor.memory.measured import measured_tokens_per_second
from albor.tensorfile import tensor_specs

CONFIGS = Path(__file__).parent.parent / "configs"
BYTES = {"F32": 4, "BF16": 2}


def _config(*overrides: str, name: str = "pretrain-350m") -> RunConfig:
    return load_config(CONFIGS / f"{name}.yaml", overrides)


def _cost(config: RunConfig, gpu: str | None = "RTX 4090") -> Cost:
    return estimate(config, gpu).cost


# Checkpoints


@pytest.mark.usefixtures("whole")
def test_a_checkpoint_has_the_bytes_that_were_said(config: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(config.parent)
    saved = checkpoint.list_checkpoints(Path("runs/tiny/checkpoints"))
    for path in saved:
        manifest = Manifest.from_bytes((path / "manifest.json").read_bytes())
        sizes = [
            BYTES[spec.dtype] * _product(spec.shape)
            for file in manifest.tensors
            for spec in tensor_specs(path / file).values()
        ]
        assert _cost(load_config(config), None).checkpoint_bytes == sum(sizes)
        beside = sum(entry.stat().st_size for entry in path.iterdir()) - sum(sizes)
        assert 0 < beside < 2 * 2**20
    assert len(saved) == _cost(load_config(config), None).checkpoints


def _product(shape: tuple[int, ...]) -> int:
    total = 1
    for extent in shape:
        total *= extent
    return total


def test_bytes_per_parameter_follow_the_state():
    """bf16 weights, fp32 master weights and moments; bf16 alone; fp32 alone."""
    for overrides, each in (
        ((), 2 + 4 + 8),
        (("optimizer.state_dtype=bf16",), 2 + 4),
        (("train.precision=fp32",), 4 + 8),
    ):
        cost = _cost(_config(*overrides))
        assert cost.checkpoint_bytes == each * cost.parameters
        assert cost.disk_bytes == 4 * cost.checkpoint_bytes  # three are kept, and one is being written


@given(
    st.integers(1, 60), st.integers(1, 7), st.integers(1, 5), st.sampled_from([None, 1, 2, 3]), st.booleans(),
    st.integers(0, 60),
)  # fmt: skip
def test_as_many_are_kept_as_the_rules_leave(
    steps: int, every: int, keep_last: int, milestones: int | None, keep_best: bool, best: int
):
    """Against the function that chooses what is removed: never more, and as many where the best is early."""
    keep_every = None if milestones is None else milestones * every
    saves = [step for step in range(1, steps + 1) if step % every == 0 or step == steps]
    kept: list[int] = []
    most = 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint, "read_best", lambda _: SimpleNamespace(step=best))
        patch.setattr(checkpoint, "list_checkpoints", lambda _: [Path(f"step-{step:08d}") for step in kept])
        for step in saves:
            kept.append(step)
            retention = Retention(keep_last, keep_every, keep_best, rollback=step)
            for path in checkpoint.removable(Path(), step, retention):
                kept.remove(checkpoint.step_of(path))
            most = max(most, len(kept))
    config = make_config(max_steps=steps).model_copy(
        update={"checkpoint": make_config().checkpoint.model_copy(
            update={"every_steps": every, "keep_last": keep_last, "keep_every": keep_every,
                    "keep_best": keep_best})}
    )  # fmt: skip
    said = most_checkpoints(config)
    spare = keep_best and (best not in saves[:-keep_last] or (keep_every and best % keep_every == 0))
    if spare:
        assert most <= said <= most + 1
    else:
        assert most == said


# Arithmetic, hours, electricity


def test_the_horizon_is_counted():
    config, cost = _config(), _cost(_config())
    assert cost.tokens == 61_000 * 131_072
    assert cost.flops == cost.tokens * 2_541_748_224
    assert (
        cost.chinchilla_ratio
        == pytest.approx(cost.tokens / (20 * 398_509_056))
        == pytest.approx(1.0032, abs=1e-4)
    )
    (modelled,) = cost.durations
    assert modelled.basis == "modelled"
    assert modelled.hours == pytest.approx(cost.tokens / modelled.tokens_per_second / 3600)
    assert modelled.kwh == pytest.approx(0.450 * modelled.hours)
    twice = _cost(_config("train.max_steps=122000"))
    assert twice.durations[0].hours == pytest.approx(2 * modelled.hours)
    assert twice.durations[0].tokens_per_second == modelled.tokens_per_second
    assert config.steps == 61_000


def test_no_speed_is_made_up():
    for config, gpu in ((_config(), None), (_config("train.precision=fp32"), "RTX 4090"), (_config(), "T4")):
        cost = Cost.of(config, estimate(config, gpu).plan, find_gpu(gpu) if gpu else None)
        assert cost.durations == ()
        assert cost.as_json()["modelled"] is cost.as_json()["measured"] is None


def test_little_data_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    command = ["vram-estimate", CONFIGS / "pretrain-1.3b.yaml", "--gpu", "RTX 4090"]
    enough, little = call(*command), call(*command, "train.max_steps=12000")
    assert "Little data" in little.out
    assert "0.064 of Chinchilla's 20" in little.out
    assert "Little data" not in enough.out
    assert max(map(len, little.out.splitlines())) <= 80


def test_the_page_and_json_agree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    words = ["vram-estimate", CONFIGS / "pretrain-350m.yaml", "--gpu", "RTX 4090"]
    page, cost = call(*words).out, json.loads(call(*words, "--json").out)["cost"]
    assert set(cost) == {
        *("parameters", "tokens", "chinchilla_ratio", "flops", "modelled", "measured"),
        *("checkpoint_bytes", "checkpoints", "disk_bytes"),
    }
    assert f"{cost['modelled']['hours']:,.1f} hours at {cost['modelled']['tokens_per_second']:,.0f}" in page
    assert f"{cost['modelled']['kwh']:,.1f} kWh" in page
    assert f"{cost['checkpoint_bytes'] / 2**30:.2f} GiB per checkpoint" in page


# What the run has measured


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The directory of a run of the 350M configuration on an RTX 4090."""
    monkeypatch.chdir(tmp_path)
    directory = tmp_path / "runs" / "pretrain-350m"
    directory.mkdir(parents=True)
    (directory / "config.resolved.yaml").write_text(dump_config(_config()))
    (directory / "env.json").write_text(json.dumps({"device": "NVIDIA GeForce RTX 4090"}))
    _write(directory, *(_row(step, 40_000 + step) for step in (10, 20, 30)))
    return directory


def _row(step: int, rate: Any) -> str:
    return json.dumps({"step": step, "tokens": step, "train/tokens_per_second": rate})


def _write(run: Path, *lines: str) -> None:
    (run / "metrics.jsonl").write_text("\n".join(lines) + "\n")


def _measured(*overrides: str, gpu: str = "RTX 4090") -> float | None:
    found = measured_tokens_per_second(_config(*overrides), "cuda", find_gpu(gpu))
    return found.tokens_per_second if found else None


def test_a_run_says_how_fast_it_is(run: Path):
    modelled, measured = _cost(_config()).durations
    assert (modelled.basis, measured.basis) == ("modelled", "measured")
    assert measured.tokens_per_second == 40_020
    assert measured.hours == pytest.approx(61_000 * 131_072 / 40_020 / 3600)
    page = call("vram-estimate", CONFIGS / "pretrain-350m.yaml", "--gpu", "RTX 4090").out
    assert "at 40,020 tokens/s, measured in runs/pretrain-350m" in page
    assert f"{measured.kwh:,.1f} kWh" in page
    assert run.is_dir()


def test_the_first_step_counts_where_it_is_all_there_is(run: Path):
    _write(run, _row(1, 5.0))
    assert _measured() == 5.0
    _write(run, _row(1, 5.0), _row(10, 70.0))
    assert _measured() == 70.0


def test_another_speed_is_not_this_ones(run: Path):
    assert _measured("train.max_steps=70000", "evaluate.every_steps=7") == 40_020
    for other in ("train.micro_batch_size=8", "model.num_hidden_layers=23", "train.recompute=cheap",
                  "data.sequence_length=512", "optimizer.state_dtype=bf16", "name=other"):  # fmt: skip
        assert _measured(other) is None, other
    assert _measured(gpu="RTX 3090") is None
    assert measured_tokens_per_second(_config(), "cpu", None) is None
    (run / "env.json").write_text(json.dumps({"device": "cpu"}))
    assert _measured() is None
    assert measured_tokens_per_second(_config(), "cpu", None) is not None


def test_a_log_may_hold_anything(run: Path):
    rows = [_row(step, rate) for step, rate in enumerate((None, "fast", -1, 0, True, [1.0], 10**400), 5)]
    _write(
        run, "\x00\xff garbage", "[1, 2]", '{"step": 3', "[" * 100_000, *rows, _row(40, 7.0), _row(50, 9.0)
    )
    assert _measured() == 8.0
    with open(run / "metrics.jsonl", "ab") as log:
        log.write(
            b'{"step": 60, "train/tokens_per_second": NaN}\n{"step": 61, "train/tokens_per_second": Infini'
        )
    assert _measured() == 8.0
    _write(run, *(f'{{"step": {step}, "x": "{"y" * 1000}"}}' for step in range(10_000)), _row(40, 7.0))
    assert _measured() == 7.0
    _write(run, "")
    assert _measured() is None


@pytest.mark.parametrize("name", ["metrics.jsonl", "env.json", "config.resolved.yaml"])
@pytest.mark.parametrize("what", ["gone", "folder", "fifo", "garbage", "unreadable"])
def test_what_cannot_be_read_is_no_measurement(run: Path, name: str, what: str):
    path = run / name
    if what == "unreadable":
        path.chmod(0)
        if os.access(path, os.R_OK):
            pytest.skip("this user reads everything")
    else:
        path.unlink()
    if what == "folder":
        path.mkdir()
    elif what == "fifo":
        if name == "config.resolved.yaml":
            pytest.skip("albor's own reader of YAML refuses what is no file")
        os.mkfifo(path)
    elif what == "garbage":
        path.write_bytes(b"\xff\x00[" * 1000)
    assert _measured() is None
