"""A sweep at work: its rounds, its failures, its interruptions, and what it reports."""

from __future__ import annotations

import json
import math
import os
import re
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from fault_cases import Server
from run_cases import call, checkpoints, events, rows, tree, write_project

from albor.checkpoint import CHECKPOINTS
from albor.configfile import load_config
from albor.filelock import lock_file
from albor.sweep import run as runner
from albor.sweep.file import load_sweep
from albor.sweep.plot import draw_sweep
from albor.sweep.record import open_record
from albor.sweep.report import ranked, winner_of
from albor.sweep.scale import as_found, scaled, yaml_lines
from albor.train.verify_resume import compare_runs

ROOT = Path(__file__).parents[1]
HALVING = "method: halving\nhalving: {factor: 2}\noverrides: [schedule.kind=wsd, schedule.warmup_steps=2]\n"


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current directory, with a run of 24 steps in it."""
    monkeypatch.chdir(tmp_path)
    write_project(tmp_path)
    return tmp_path


def write(project: Path, text: str) -> Path:
    path = project / "sweep.yaml"
    path.write_text(f"name: s\nconfig: tiny.yaml\n{text}\n")
    return path


def option(arguments: list[str], name: str) -> Any:
    """The value of the last KEY=VALUE of this name."""
    values = [a.partition("=")[2] for a in arguments if a.startswith(f"{name}=")]
    return json.loads(values[-1]) if values else None


class FakeChild:
    """A run that knows its loss without training: best at a rate of 0.01, better with every step. A rate of 1
    and more diverges, 0.5 fails, 0.25 does not fit, 0.125 is killed."""

    started: list[list[str]] = []  # noqa: RUF012  (of the test that runs)
    while_it_runs: Callable[[], bool] | None = None  # whether it needs another moment
    live = most_live = 0

    def __init__(self, arguments: list[str], on_line: Callable[[str], None], output: Any = None):
        FakeChild.started.append(arguments)
        FakeChild.live += 1
        FakeChild.most_live = max(FakeChild.most_live, FakeChild.live)
        overrides = [a for a in arguments[2:] if "=" in a]
        self.config = load_config(Path(arguments[1]), overrides)
        self.asked = self.closed = False
        self.last_words = "something\nalbor: the disk is full"
        on_line("a new run")

    def __enter__(self) -> FakeChild:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        FakeChild.live -= not self.closed
        self.closed = True

    def stop(self) -> None:
        self.asked = True

    def poll(self) -> int | None:
        if self.asked:
            return 75
        if FakeChild.while_it_runs is not None and FakeChild.while_it_runs():
            return None
        rate, config = self.config.optimizer.lr, self.config
        if rate >= 0.125:
            return 3 if rate >= 1 else {0.5: 1, 0.25: 4, 0.125: -signal.SIGKILL}[rate]
        directory = Path(config.runs_dir) / config.name
        (directory / "eval").mkdir(parents=True, exist_ok=True)
        (directory / "metrics.jsonl").touch()
        loss = 2 + abs(math.log(rate / 0.01)) + 1 / config.steps
        (directory / "eval" / "final.json").write_text(json.dumps({"val/loss": loss}))
        return 0


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> type[FakeChild]:
    for name, value in {"started": [], "while_it_runs": None, "live": 0, "most_live": 0}.items():
        monkeypatch.setattr(FakeChild, name, value)
    monkeypatch.setattr(runner, "Child", FakeChild)
    return FakeChild


def names(started: list[list[str]]) -> list[str]:
    return [option(arguments, "name") for arguments in started]


def test_the_best_go_on_from_before_their_decay(project, fake):
    path = write(project, HALVING + "trials: 4\nkeys: {optimizer.lr: {values: [0.001, 0.004, 0.009, 0.1]}}")
    result = call("sweep", path)
    assert result.code == 0, result.err
    drawn = {one.values["optimizer.lr"]: one.name for one in open_record(load_sweep(path)).trials}
    best, second = drawn[0.009], drawn[0.004]
    assert names(fake.started) == [
        "trial-0000", "trial-0001", "trial-0002", "trial-0003",
        *sorted([f"{best}-round-2", f"{second}-round-2"]), f"{best}-round-3",
    ]  # fmt: skip
    steps = [option(arguments, "train.max_steps") for arguments in fake.started]
    assert steps == [6, 6, 6, 6, 12, 12, 24]
    first, *_, last = fake.started
    assert first[-3:] == ["--resume", "auto", "--json"]
    assert option(first, "checkpoint.keep_every") == 4  # of 6 steps the last 2 are decay
    assert last[-2] == f"runs/s/{best}-round-2/checkpoints/step-00000009"
    assert option(last, "checkpoint.keep_every") is None
    assert re.search(rf"\n +{int(best[-1])}  0\.009 +24 +2\.1470  finished\n", result.out), result.out
    assert result.out.endswith(
        f"# the values of {best}, as in runs/s/{best}-round-3\noptimizer:\n  lr: 0.009\n"
    )


def test_what_fails_is_shown_and_stops_nothing(project, fake):
    path = write(project, "method: grid\nkeys: {optimizer.lr: {values: [1, 0.5, 0.25, 0.125, 0.02]}}")
    result = call("sweep", path, "--json")
    assert result.code == 0
    found = json.loads(result.out)
    assert [(one["state"], one["rounds"][0]["reason"]) for one in found["trials"]] == [
        ("diverged", "the disk is full"),
        ("failed", "exit code 1: the disk is full"),
        ("does not fit", "the disk is full"),
        ("failed", "ended by SIGKILL"),
        ("finished", ""),
    ]
    assert found["best"]["values"] == {"optimizer.lr": 0.02}
    assert found["lines"] == [{"key": "optimizer.lr", "value": 0.02, "why": ""}]
    assert "trial-0000: a new run" in result.err

    count = len(fake.started)
    assert call("sweep", path).code == 0
    assert len(fake.started) == count  # the report again, and no training
    assert call("sweep", path, "--retry").code == 0
    assert names(fake.started[count:]) == ["trial-0001", "trial-0003"]


def test_all_that_fail_are_a_failure(project, fake):
    path = write(project, "method: grid\nkeys: {optimizer.lr: {values: [1, 2]}}")
    result = call("sweep", path)
    assert result.code == 1
    assert "no trial came to a val/loss; trial-0000: the disk is full" in result.err
    assert "diverged" in result.out


def test_values_that_do_not_go_together(project, fake):
    keys = "{model.hidden_size: {values: [32, 33]}, optimizer.lr: {values: [0.01]}}"
    result = call("sweep", write(project, f"method: grid\nkeys: {keys}"))
    assert result.code == 0
    assert names(fake.started) == ["trial-0000"]
    assert re.search(r"refused: model\.hidden_size: 33 does not divide into 2 heads", result.out)


@pytest.mark.parametrize("method", ["random", "tpe", "halving"])
def test_an_interrupted_sweep_goes_on_as_if_it_had_not_been(project, fake, method):
    text = "trials: 9\nkeys: {optimizer.lr: {log: [0.001, 0.1]}, schedule.warmup_steps: {values: [2, 3]}}"
    head = HALVING if method == "halving" else f"method: {method}\noverrides: []\n"
    path = write(project, head + text)
    assert call("sweep", path).code == 0
    whole, record = tree(project / "runs"), (project / "runs/s/sweep.json").read_bytes()
    (project / "runs").rename(project / "before")

    fake.started.clear()
    interrupted = 0
    sent: set[int] = set()
    while True:
        due = len(fake.started) + 3

        def interrupt(due: int = due) -> bool:
            """In the midst of the third trial from here, once."""
            if len(fake.started) < due or due in sent:
                return False
            sent.add(due)
            os.kill(os.getpid(), signal.SIGTERM)
            return True

        fake.while_it_runs = staticmethod(interrupt)
        result = call("sweep", path)
        if result.code == 0:
            break
        assert result.code == 75, result.err
        assert "stopped by SIGTERM; what trained is saved, and the same command goes on" in result.err
        interrupted += 1
    assert interrupted > 2
    assert (project / "runs/s/sweep.json").read_bytes() == record
    assert tree(project / "runs") == whole


def test_as_many_at_a_time_as_are_asked_for(project, fake):
    keys = "{optimizer.lr: {log: [0.001, 0.1]}}"
    assert call("sweep", write(project, f"trials: 7\nparallel: 3\nkeys: {keys}")).code == 0
    assert fake.most_live == 3
    assert len(fake.started) == 7


def test_trials_that_do_not_fit_side_by_side(project, fake, monkeypatch):
    hardware = runner.this_machine("cpu")
    small = type(hardware)(**{**hardware.__dict__, "capacity_bytes": 1 << 30})
    monkeypatch.setattr(runner, "this_machine", lambda device: small)
    text = "method: grid\nparallel: 2\nkeys: {seed: {values: [1, 2]}, model.hidden_size: {values: [64]}}"
    large = write(project, text.replace("[64]", "[4096]"))
    result = call("sweep", large)
    assert result.code == 4
    assert "2 trials side by side need" in result.err
    assert fake.started == []


def test_two_commands_do_not_share_a_sweep(project, fake):
    path = write(project, "method: grid\nkeys: {seed: {values: [1]}}")
    (project / "runs/s").mkdir(parents=True)
    held = lock_file(project / "runs/s" / runner.LOCK)
    assert held is not None
    result = call("sweep", path)
    assert result.code == 1
    assert "another albor sweep is at work in runs/s" in result.err
    os.close(held[0])
    assert call("sweep", path).code == 0


def test_the_directory_of_something_else_is_left_alone(project, fake):
    path = write(project, "method: grid\nkeys: {seed: {values: [1]}}")
    (project / "runs/s").mkdir(parents=True)
    (project / "runs/s/ladder.json").write_text("{}")
    result = call("sweep", path)
    assert (result.code, "runs/s is a ladder's directory" in result.err) == (1, True)
    assert os.listdir(project / "runs/s") == ["ladder.json"]


def test_a_dry_run_writes_nothing(project, fake):
    keys = "{model.hidden_size: {values: [32, 33, 64]}}"
    path = write(project, f"method: grid\nkeys: {keys}")
    result = call("sweep", path, "--dry-run")
    assert result.code == 0
    assert re.search(r"0  32 +30,112  \d", result.out)
    assert "refused: model.hidden_size: 33 does not divide" in result.out
    found = json.loads(call("sweep", path, "--dry-run", "--json").out)
    assert [one["parameters"] for one in found["plan"]] == [30112, None, 72512]
    assert [one["fits"] for one in found["plan"]] == [True, None, True]
    assert found["rounds"] == [{"trials": 3, "steps": 24}]
    assert not (project / "runs").exists()
    assert fake.started == []
    assert call("sweep", path, "--dry-run", "--plot", "a.png").code == 2


def test_a_dry_run_on_a_card_that_is_not_here(project, fake):
    path = project / "sweep.yaml"
    path.write_text(
        f"name: s\nconfig: {ROOT / 'configs/pretrain-50m.yaml'}\nmethod: grid\noverrides: [device=cuda]\n"
        "keys: {model.num_hidden_layers: {values: [8, 900]}}\n"
    )
    result = call("sweep", path, "--dry-run", "--gpu", "RTX 4090", "--json")
    assert result.code == 0
    small, large = json.loads(result.out)["plan"]
    assert (small["fits"], large["fits"]) == (True, False)
    assert 0 < small["seconds"] < large["seconds"]
    shown = call("sweep", path, "--dry-run", "--gpu", "RTX 4090").out
    assert "does not fit" in shown
    assert re.search(r"Time in training steps: at most .* \(modelled, not measured\)", shown)
    path.write_text(path.read_text().replace("[8, 900]", "[900]"))
    assert call("sweep", path, "--dry-run", "--gpu", "RTX 4090").code == 4
    assert call("sweep", path, "--gpu", "RTX 4090").code == 2


def test_metrics_that_are_not_of_the_end(project, fake):
    """Of a metric in the log it is the mean of the last tenth; one that is not finite is none."""
    directory = project / "runs" / "r"
    (directory / "eval").mkdir(parents=True)
    lines = [{"step": step, "tokens": step, "train/tokens_per_second": float(step)} for step in range(1, 41)]
    (directory / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert runner.read_metric(directory, "train/tokens_per_second") == 38.5
    assert runner.read_metric(directory, "train/mfu") is None
    (directory / "eval" / "final.json").write_text('{"val/loss": null, "val/perplexity": 7.5}')
    assert runner.read_metric(directory, "val/loss") is None
    assert runner.read_metric(directory, "val/perplexity") == 7.5


def test_the_picture_shows_every_trial(project, fake):
    keys = "{optimizer.lr: {values: [1, 0.004, 0.02]}, optimizer.betas: {values: [[0.9, 0.95], [0.9, 0.99]]}}"
    path = write(project, f"method: grid\nkeys: {keys}")
    result = call("sweep", path, "--plot", "sweep.svg")
    assert result.code == 0
    assert result.out.endswith("Picture: sweep.svg\n")
    assert call("sweep", path, "--plot", "sweep.svg").code == 0  # its own is replaced
    assert call("sweep", path, "--plot", "tiny.yaml").code == 2

    file = load_sweep(path)
    trials = open_record(file).trials
    panels = draw_sweep(file.sweep, trials).axes
    assert [axes.get_xlabel() for axes in panels] == ["optimizer.lr", "optimizer.betas"]
    for axes in panels:
        points = {one.get_gid(): len(one.get_offsets()) for one in axes.collections}
        assert points == {"trial": 4, "best": 1, "lost": 2}
    best = winner_of(trials, "minimize")
    assert best is not None
    (ring,) = (one for one in panels[0].collections if one.get_gid() == "best")
    assert ring.get_offsets()[0].tolist() == [2, best.metric]  # the last of those listed
    assert best.values["optimizer.lr"] == 0.02
    assert [label.get_text() for label in panels[1].get_xticklabels()] == ["[0.9, 0.95]", "[0.9, 0.99]"]
    assert [one.number for one in ranked(trials, "minimize")][-2:] == [0, 1]


def test_the_rounds_of_a_trial_stand_above_each_other(project, fake):
    path = write(project, HALVING + "trials: 4\nkeys: {optimizer.lr: {log: [0.001, 0.1]}}")
    assert call("sweep", path).code == 0
    file = load_sweep(path)
    (axes,) = draw_sweep(file.sweep, open_record(file).trials).axes
    assert axes.get_xscale() == "log"
    ticks = [label.get_text() for label in axes.get_xticklabels()]
    assert {"0.001", "0.002", "0.005", "0.01", "0.1"} <= set(ticks)  # numbers, and no formulas
    points = {one.get_gid(): len(one.get_offsets()) for one in axes.collections}
    assert points == {"round 1": 4, "round 2": 2, "round 3": 1, "best": 1}
    assert sorted(len(line.get_xdata()) for line in axes.lines) == [1, 1, 2, 3]


class TestScaling:
    small = load_config(ROOT / "configs/quickstart.yaml", ["schedule.warmup_steps=60"])

    def large(self, *overrides: str) -> Any:
        return load_config(ROOT / "configs/pretrain-50m.yaml", overrides)

    def test_the_rate_falls_with_compute(self):
        large = self.large()
        values = {"optimizer.lr": 0.004, "schedule.warmup_steps": 60, "optimizer.betas": [0.9, 0.98]}
        rate, warmup, betas = scaled(values, self.small, large)
        assert 0.0005 < rate.value < 0.003
        assert "^-0.125" in rate.why
        assert "2401.02954" in rate.why
        assert warmup.value == round(60 * large.steps / 1500)
        assert (betas.value, betas.why) == ([0.9, 0.98], "carried over")
        (same,) = scaled({"optimizer.lr": 0.004}, self.small, self.small)
        assert same.value == 0.004
        (longer,) = scaled(
            {"optimizer.lr": 0.004}, self.small, self.small.model_copy(
                update={"train": self.small.train.model_copy(update={"max_steps": 1500 * 256})}
            ),
        )  # fmt: skip
        assert longer.value == 0.002  # 256 times the compute: half the rate

    def test_mup_carries_the_rate_over(self):
        (rate,) = scaled({"optimizer.lr": 0.004}, self.small, self.large("model.mup_base_width=192"))
        assert rate.value == 0.004
        assert "muP" in rate.why
        (other,) = scaled({"optimizer.lr": 0.004}, self.small, self.large("model.mup_base_width=64"))
        assert other.value is None
        assert "set model.mup_base_width: 192" in other.why

    def test_what_belongs_to_a_size_is_not_carried_over(self):
        lines = scaled({"model.hidden_size": 192, "schedule.kind": "wsd"}, self.small, self.large())
        assert yaml_lines(lines) == [
            "# model.hidden_size: 192 was best there; that says nothing of another size",
            "schedule:",
            "  kind: wsd  # carried over",
        ]

    def test_what_is_found_is_yaml(self, tmp_path):
        values = {"seed": 5, "optimizer.lr": 1e-5, "optimizer.betas": [0.9, 0.99], "model.rope_theta": 1e4}
        lines = yaml_lines(as_found(values))
        text = (ROOT / "configs/quickstart.yaml").read_text()
        text = re.sub(r"(?m)^(seed|  lr|  betas):.*\n", "", text)
        for section in ("optimizer", "model"):
            own = lines[lines.index(f"{section}:") + 1 :]
            own = own[: next((i for i, line in enumerate(own) if not line.startswith("  ")), None)]
            text = re.sub(rf"(?m)^({section}:.*\n)", lambda m, own=own: m[0] + "\n".join(own) + "\n", text)
        path = tmp_path / "c.yaml"
        path.write_text(text + lines[lines.index("seed: 5")] + "\n")
        config = load_config(path)
        assert (config.seed, config.optimizer.lr, config.optimizer.betas) == (5, 1e-5, (0.9, 0.99))
        assert config.model.rope_theta == 1e4

    def test_the_command_scales_the_winner(self, project, fake):
        path = write(project, "method: grid\nkeys: {optimizer.lr: {values: [0.02, 0.01]}}")
        result = call("sweep", path, "--for", ROOT / "configs/quickstart.yaml")
        assert result.code == 0
        assert re.search(r"optimizer:\n  lr: 0\.00\d+  # 0\.01 x [\d.]+e?\+?\d*\^-0\.125 for", result.out)
        missing = call("sweep", path, "--for", "nowhere.yaml")
        assert missing.code == 2


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with Server() as server:
        yield server


def test_a_promoted_trial_is_the_run_that_was_never_cut(project, server, monkeypatch):
    """With real runs: the winner of two rounds has the weights of one run of all steps, bit for bit."""

    class Forked(FakeChild):
        def __init__(self, arguments: list[str], on_line: Callable[[str], None], output: Any = None):
            self._result = server.run(project, *arguments)
            self.last_words, self.closed = self._result.err, True

        def poll(self) -> int:
            return self._result.code

    monkeypatch.setattr(runner, "Child", Forked)
    path = write(project, HALVING + "trials: 3\nkeys: {optimizer.lr: {values: [1e-3, 1e-2, 1e30]}}")
    result = call("sweep", path, "--json")
    assert result.code == 0, result.err
    found = json.loads(result.out)
    assert [one["state"] for one in found["trials"]].count("diverged") == 1
    best = Path(found["best"]["directory"])
    assert best.name.endswith("-round-2")
    assert checkpoints(best)[-1] == 24
    (resumed,) = events(best, "resumed")
    assert re.search(r"trial-000\d/checkpoints/step-00000009$", resumed["source"])
    assert rows(best)[0]["step"] == 10

    rate = found["best"]["values"]["optimizer.lr"]
    whole = ["train", "tiny.yaml", f"optimizer.lr={rate}", "schedule.kind=wsd", "schedule.warmup_steps=2"]
    assert server.run(project, *whole, "name=whole").code == 0
    compared = compare_runs(project / "runs/whole", best, 24)
    assert {one.what: one.difference for one in compared[:-1]} == {
        one.what: None for one in compared[:-1] if one.compared
    }
    assert (best / CHECKPOINTS).is_dir()
