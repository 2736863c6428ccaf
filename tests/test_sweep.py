"""`albor vram-estimate --sweep`: every cell is that configuration's own estimate, and says what it is."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner

from albor import cli
from albor.configfile import load_config
from albor.errors import ConfigError
from albor.memory.estimate import estimate
from albor.memory.sweep import MICRO_BATCH, SEQUENCE, Axis, Sweep, default_axes, split_axes, sweep
from albor.memory.sweep_report import render_sweep
from albor.units import GIB

CONFIGS = Path(__file__).parents[1] / "configs"
LARGE = CONFIGS / "pretrain-350m.yaml"
GRID = ["data.sequence_length=1024,4096", "train.micro_batch_size=4,64"]


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("albor.memory.devices.installed_gpu", lambda: None)


def command(*words: str) -> tuple[int, str]:
    result = CliRunner().invoke(cli.app, ["vram-estimate", str(LARGE), *words])
    if isinstance(result.exception, ConfigError):
        return result.exception.exit_code, str(result.exception)
    return result.exit_code, result.output


def drawn(result: Sweep, *, terminal: bool = False) -> str:
    out = io.StringIO()
    colours = "standard" if terminal else None
    render_sweep(result, Console(file=out, width=80, force_terminal=terminal, color_system=colours))
    return out.getvalue()


def test_every_cell_is_the_estimate_of_its_own_configuration():
    result = sweep(LARGE, ["train.recompute=cheap"], "RTX 4090", None)
    assert len(result.cells) == 24
    for cell in result.cells:
        alone = estimate(load_config(LARGE, ["train.recompute=cheap", *cell.overrides]), "RTX 4090")
        assert cell.estimate is not None
        assert (cell.estimate.required_bytes, cell.estimate.fits) == (alone.required_bytes, alone.fits)
        assert cell.estimate.config == alone.config


def test_auto_is_resolved_cell_by_cell():
    vram = estimate(load_config(LARGE, ["train.accumulator=gpu"]), vram=80 * GIB).required_bytes
    result = sweep(LARGE, ["train.accumulator=auto", "train.micro_batch_size=4,8"], None, vram)
    assert [e.plan.accumulator for e in result.estimates] == ["gpu", "cpu"]


@pytest.mark.parametrize(
    ("overrides", "rest", "axes"),
    [
        (["optimizer.lr=3e-4"], ["optimizer.lr=3e-4"], ()),
        (["train.micro_batch_size=1, 2,2"], [], (Axis(MICRO_BATCH, ("1", "2")),)),
        (["optimizer.betas=[0.9,0.95]", "data.cache_dir='a,b'"], ...,  ()),
        (["train.micro_batch_size=1,", "x=,1"], ..., ()),
        (GRID, [], (Axis(SEQUENCE, ("1024", "4096")), Axis(MICRO_BATCH, ("4", "64")))),
    ],
)  # fmt: skip
def test_overrides_of_several_values_are_axes(overrides, rest, axes):
    assert split_axes(overrides) == (overrides if rest is ... else rest, axes)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([*GRID, "train.recompute=none,block"], "train.recompute are given several values; give several"),
        (["train.micro_batch_size=1,2", "train.micro_batch_size=4,8"], "are given several values"),
        (["train.micro_batch_size=" + ",".join(map(str, range(1, 402)))], "401 cells are too many"),
        (["device=cpu,cuda"], "device: is one for the whole sweep"),
        (["train.micro_bath_size=1,2"], "did you mean micro_batch_size"),
        (["train.micro_batch_size=0,-1"], "must be at least 1"),
        (["train.micro_batch_size=0"], "must be at least 1"),
    ],
)
def test_what_is_no_grid_is_a_usage_error(words, message):
    code, text = command("--sweep", *words)
    assert code == 2
    assert message in text


def test_a_refused_cell_is_shown_as_such_and_the_others_stand():
    code, text = command("--gpu", "RTX 4090", "--sweep", *GRID)
    assert code == 0
    rows = {line.split()[0]: line.split()[1:] for line in text.splitlines() if line.split()[:1] != []}
    assert rows["4096"] == ["-", "-"]
    fitting, too_large = (
        estimate(load_config(LARGE, [f"train.micro_batch_size={n}"]), "RTX 4090") for n in (4, 64)
    )
    expected = f"[{fitting.required_bytes / GIB:.2f}] x {too_large.required_bytes / GIB:.2f}"
    assert rows["1024"] == expected.split()
    assert "Refused: data.sequence_length: 4096 is longer than model.max_position_embeddings, 2048" in text
    assert "x  does not fit     [ ]  as configured     -  refused" in text
    one = command("--gpu", "RTX 4090", "--sweep", "train.micro_batch_size=4,two")[1]
    assert "Refused: train.micro_batch_size: 'two' is not a number" in one


def test_exit_code_and_capacity():
    assert command("--vram", "2GiB", "--sweep")[0] == 4
    assert command("--vram", "8GiB", "--sweep")[0] == 0  # as configured it does not fit; smaller cells do
    code, text = command("--sweep")
    assert (code, "x " in text) == (0, False)
    assert "no capacity known; give --gpu NAME" in text


def test_json_has_the_estimate_and_the_cells():
    code, text = command("--gpu", "RTX 4090", "--json", "--sweep", *GRID)
    answer = json.loads(text)
    alone = json.loads(command("--gpu", "RTX 4090", "--json")[1])
    assert code == 0
    grid = answer.pop("sweep")
    assert answer == alone
    assert grid["axes"] == [
        {"key": SEQUENCE, "values": ["1024", "4096"]},
        {"key": MICRO_BATCH, "values": ["4", "64"]},
    ]
    assert [cell["overrides"] for cell in grid["cells"]][1] == f"{SEQUENCE}=1024 {MICRO_BATCH}=64"
    assert [cell["fits"] for cell in grid["cells"]] == [True, False, None, None]
    assert grid["cells"][0]["device_bytes"] == sum(grid["cells"][0]["groups"].values())
    assert grid["cells"][0]["tokens_per_step"] * 16 == grid["cells"][1]["tokens_per_step"]
    assert "longer than" in grid["cells"][2]["problem"]


def test_tokens_per_step_are_said_to_change_or_not():
    assert "Tokens per step: 131,072 in every cell" in command("--sweep", "train.recompute=none,block")[1]
    changing = command("--sweep", "train.micro_batch_size=2,4")[1]
    assert "Tokens per step change with the cell, from 65,536 to 131,072:" in changing


def test_accumulation_takes_no_memory():
    """As the table says."""
    axes = ["train.gradient_accumulation_steps=1,2,64", "train.accumulator=gpu,cpu"]
    steps = sweep(LARGE, axes, "L4", None)
    needs = [[cell.estimate.plan.buffers for cell in row if cell.estimate] for row in steps.rows]
    assert needs[0] == needs[1] == needs[2]
    assert needs[0][0] != needs[0][1]


@pytest.mark.parametrize("name", ["quickstart", "pretrain-50m", "pretrain-350m"])
def test_default_axes_hold_the_configuration_and_are_never_too_long(name: str):
    config = load_config(CONFIGS / f"{name}.yaml")
    for overrides in ([], ["train.micro_batch_size=6"], ["data.sequence_length=100"]):
        config = load_config(CONFIGS / f"{name}.yaml", overrides)
        rows, columns = default_axes(config)
        assert str(config.data.sequence_length) in rows.values
        assert str(config.train.micro_batch_size) in columns.values
        assert all(int(length) <= config.model.max_position_embeddings for length in rows.values)
        result = sweep(CONFIGS / f"{name}.yaml", overrides, "L4", None)
        assert len(result.estimates) == len(result.cells)
        assert result.base in result.estimates


def test_the_table_holds_in_80_columns_and_loses_no_cell():
    batches = [str(2**power) for power in range(12)]
    result = sweep(LARGE, [f"{MICRO_BATCH}={','.join(batches)}", f"{SEQUENCE}=512,1024"], "L4", None)
    upright = drawn(result)
    flat = drawn(sweep(LARGE, [f"{SEQUENCE}=512,1024", f"{MICRO_BATCH}={','.join(batches)}"], "L4", None))
    for text in (upright, flat):
        assert max(map(len, text.splitlines())) <= 80
        for found in result.estimates:
            assert f"{found.required_bytes / GIB:.2f}" in text
    assert flat.count(SEQUENCE) == 3  # blocks of columns


def test_colour_on_a_terminal_and_plain_symbols_in_a_pipe():
    result = sweep(LARGE, ["train.micro_batch_size=4,64"], "RTX 4090", None)
    plain, coloured = drawn(result), drawn(result, terminal=True)
    assert plain.isascii()
    assert "\x1b" not in plain
    assert "\x1b[32m" in coloured  # green
    assert "\x1b[31m" in coloured  # red
    assert "x " in coloured  # nobody has to see the colour


def test_a_host_that_is_short_is_told_from_a_card_that_is(monkeypatch: pytest.MonkeyPatch):
    result = sweep(LARGE, ["train.micro_batch_size=4,8"], "RTX 4090", None)
    hardware = replace(result.base.hardware, host_capacity_bytes=GIB)
    monkeypatch.setattr("albor.memory.estimate.this_machine", lambda device: hardware)
    short = sweep(LARGE, ["train.micro_batch_size=4,64"], None, None)
    assert [e.fits for e in short.estimates] == [False, False]
    assert "1 of them would fit the device, but not this machine's host memory." in drawn(short)


def test_the_default_grid_takes_less_than_a_second():
    """The whole process's own time; without torch and without matplotlib."""
    code = (
        "import resource, sys\n"
        "from typer.testing import CliRunner\n"
        "from albor import cli\n"
        f"words = ['vram-estimate', {str(LARGE)!r}, '--gpu', 'L4', '--sweep']\n"
        "assert CliRunner().invoke(cli.app, words).exit_code == 0\n"
        "assert not {'torch', 'matplotlib'} & set(sys.modules)\n"
        "used = resource.getrusage(resource.RUSAGE_SELF)\n"
        "print(used.ru_utime + used.ru_stime)\n"
    )
    runs = [subprocess.run([sys.executable, "-c", code], capture_output=True, text=True) for _ in range(3)]
    assert all(run.returncode == 0 for run in runs), runs[0].stderr
    assert min(float(run.stdout) for run in runs) < 1.0
