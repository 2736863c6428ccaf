"""The sweep's file, what is drawn from it, and the rounds of successive halving."""

from __future__ import annotations

import json
import math
from pathlib import Path

import jsonschema
import pytest

from albor.configfile import load_config
from albor.errors import AlborError, ConfigError
from albor.sweep.file import Range, load_sweep, schema
from albor.sweep.halving import check_rounds, promoted, rounds_of, saved_at, shared_steps
from albor.sweep.record import Outcome, Record, State, Trial, open_record
from albor.sweep.suggest import Result, suggest, trial_count
from albor.train.resume_policy import changes_on_resume
from albor.yamlcore import read_yaml

CONFIGS = Path(__file__).parents[1] / "configs"
SHIPPED = CONFIGS / "sweep-lr.yaml"
KEYS = "{optimizer.lr: {log: [1e-4, 1e-2]}}"


def write(directory: Path, text: str) -> Path:
    """A sweep of the quickstart's run."""
    path = directory / "sweep.yaml"
    path.write_text(f"name: s\nconfig: {CONFIGS / 'quickstart.yaml'}\n{text}\n")
    return path


def problems(path: Path) -> list[str]:
    with pytest.raises(ConfigError) as refused:
        load_sweep(path)
    return [str(problem).removeprefix(f"{path}:") for problem in refused.value.problems]


def test_the_shipped_sweep():
    file = load_sweep(SHIPPED)
    rounds = rounds_of(file.sweep, trial_count(file.sweep))
    assert [(one.trials, one.steps(file.base)) for one in rounds] == [(12, 40), (4, 120), (1, 360)]
    text = SHIPPED.read_text()
    assert text.startswith("# yaml-language-server: $schema=../albor/sweep/sweep.schema.json\n")
    jsonschema.validate(read_yaml(text, "shipped").value, schema())
    own = json.loads((CONFIGS.parent / "albor" / "sweep" / "sweep.schema.json").read_text())
    assert own == schema(), "albor schema --sweep > albor/sweep/sweep.schema.json"


def test_everything_that_is_wrong_is_said_at_once(tmp_path):
    found = problems(write(tmp_path, """\
overrides: [optimizer.lr=fast, name=mine]
methd: random
parallel: 0
keys:
  optimizer.lrr: {log: [1e-4, 1e-2]}
  schedule.warmup_steps: {values: [5], linear: [1, 2]}
  train.max_hours: {values: [1]}
  model.hidden_size: {vales: [64]}"""))  # fmt: skip
    assert sorted(found, key=lambda line: int(line.partition(":")[0])) == [
        "3: overrides[1]: name is the sweep's to set; remove it",
        "3: overrides[0]: optimizer.lr is the text 'fast'; a number is expected",
        "4: methd: unknown key; did you mean method?",
        "5: parallel: must be at least 1, and is 0",
        "8: keys.schedule.warmup_steps: values and linear are given; give one of values, log, linear and "
        "integer",
        "10: keys.model.hidden_size.vales: unknown key; did you mean values?",
    ]


def test_keys_are_those_of_the_run(tmp_path):
    found = problems(write(tmp_path, """\
trials: 3
metric: val/los
keys:
  optimizer.lrr: {log: [1e-4, 1e-2]}
  schedule.kind: {values: [wsd, cosin]}
  train.max_hours: {values: [1]}
  model.num_hidden_layers: {integer: [0, 3]}"""))  # fmt: skip
    assert found == [
        "4: metric: a run of this model has no metric val/los; did you mean val/loss?",
        "6: keys.optimizer.lrr: unknown key; did you mean lr?",
        "7: keys.schedule.kind: is the text 'cosin'; use 'cosine', 'linear', 'wsd' or 'constant'",
        "8: keys.train.max_hours: is the sweep's to set; remove it",
        "9: keys.model.num_hidden_layers: must be at least 1, and is 0",
    ]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (f"keys: {KEYS}", "trials: is missing; say how many trials random is to make"),
        (f"method: grid\nkeys: {KEYS}", "is a range, and a grid takes so many of it; add points: 5"),
        ("trials: 2\nkeys: {optimizer.lr: {log: [0, 1]}}", "begins at 0; a logarithm needs more than 0"),
        ("trials: 2\nkeys: {optimizer.lr: {log: [1, 0.1]}}", "goes from 1 to 0.1; put the smaller first"),
        ("trials: 2\nkeys: {optimizer.lr: {}}", "no values are given; give one of"),
        ("trials: 9\nkeys: {seed: {values: [1, 2]}}", "is 9, and the keys have 2 combinations; ask for 2"),
        (f"method: tpe\ntrials: 9\nparallel: 2\nkeys: {KEYS}", "tpe draws each trial after all before it"),
        (f"method: halving\ntrials: 9\nkeys: {KEYS}", "a cosine schedule has other learning rates"),
        (f"trials: 9\nhalving: {{factor: 2}}\nkeys: {KEYS}", "is for method halving, and method is random"),
        (
            "method: halving\ntrials: 3\noverrides: [schedule.kind=wsd]\n"
            "keys: {train.max_steps: {values: [100, 200, 300]}}",
            "is what halving varies",
        ),
        ("trials: 1\nkeys: {seed: {values: [1]}}\nconfig: quickstar.yaml", "config: is given twice"),
    ],
)  # fmt: skip
def test_what_cannot_be(tmp_path, text, expected):
    assert any(expected in found for found in problems(write(tmp_path, text)))


def test_a_file_that_is_not_there(tmp_path):
    path = tmp_path / "sweep.yaml"
    (tmp_path / "quickstart.yaml").touch()
    path.write_text("name: s\nconfig: quickstrat.yaml\ntrials: 2\nkeys: {seed: {values: [1, 2]}}\n")
    assert problems(path) == [
        "2: config: quickstrat.yaml: there is no such file; did you mean quickstart.yaml?"
    ]


def test_ranges_as_people_write_numbers():
    assert Range(log=(1e-4, 1e-2), points=3).grid() == [1e-4, 1e-3, 1e-2]
    assert Range(linear=(0.0, 1.0), points=5).grid() == [0.0, 0.25, 0.5, 0.75, 1.0]
    assert Range(integer=(1, 3), points=9).grid() == [1, 2, 3]
    assert Range(log=(1e-4, 1e-2)).rounded(0.00123456) == 0.00123
    assert Range(log=(1.234e-4, 1e-2)).rounded(1.2341e-4) == 1.234e-4  # not below the range


def test_a_draw_depends_on_file_and_number_alone(tmp_path):
    keys = "{optimizer.lr: {log: [1e-4, 1e-2]}, optimizer.betas: {values: [[0.9, 0.95], [0.9, 0.99]]}}"
    sweep = load_sweep(write(tmp_path, f"trials: 30\nkeys: {keys}")).sweep
    drawn = [suggest(sweep, number) for number in range(30)]
    assert [suggest(sweep, number) for number in (7, 3)] == [drawn[7], drawn[3]]
    rates = [one["optimizer.lr"] for one in drawn]
    assert len(set(rates)) > 25
    assert all(1e-4 <= rate <= 1e-2 for rate in rates)
    assert 8 <= sum(rate < 1e-3 for rate in rates) <= 22  # each factor is as likely
    assert {tuple(one["optimizer.betas"]) for one in drawn} == {(0.9, 0.95), (0.9, 0.99)}
    other = load_sweep(write(tmp_path, f"trials: 30\nseed: 2\nkeys: {keys}")).sweep
    assert suggest(other, 0) != drawn[0]


def test_listed_values_do_not_come_twice(tmp_path):
    keys = "{seed: {values: [1, 2, 3]}, optimizer.lr: {values: [0.1, 0.2]}}"
    some = load_sweep(write(tmp_path, f"trials: 5\nkeys: {keys}")).sweep
    drawn = [tuple(suggest(some, number).values()) for number in range(5)]
    assert len(set(drawn)) == 5
    whole = load_sweep(write(tmp_path, f"method: grid\nkeys: {keys}")).sweep
    assert [tuple(suggest(whole, number).values()) for number in range(trial_count(whole))] == [
        (1, 0.1), (1, 0.2), (2, 0.1), (2, 0.2), (3, 0.1), (3, 0.2),
    ]  # fmt: skip


def test_tpe_learns_from_results_and_not_from_failures(tmp_path):
    sweep = load_sweep(write(tmp_path, f"method: tpe\ntrials: 30\nkeys: {KEYS}")).sweep

    def drawn_after(best: float, *, lost: bool = False) -> list[float]:
        rates = [10 ** (-4 + 2 * i / 19) for i in range(20)]
        told = [
            Result({"optimizer.lr": rate}, None if lost else abs(math.log(rate / best))) for rate in rates
        ]
        return [suggest(sweep, number, told)["optimizer.lr"] for number in range(20, 28)]

    low, high = drawn_after(2e-4), drawn_after(8e-3)
    assert sorted(low)[4] < 5e-4
    assert sorted(high)[4] > 3e-3
    lost = drawn_after(2e-4, lost=True)
    assert lost == drawn_after(8e-3, lost=True)
    assert drawn_after(2e-4) == low


def test_rounds_cost_about_the_same(tmp_path):
    text = f"method: halving\ntrials: 27\noverrides: [schedule.kind=wsd]\nkeys: {KEYS}"
    file = load_sweep(write(tmp_path, text))
    rounds = rounds_of(file.sweep, 27)
    assert [(one.trials, one.steps(file.base)) for one in rounds] == [(27, 56), (9, 167), (3, 500), (1, 1500)]
    fewer = load_sweep(write(tmp_path, f"{text}\nhalving: {{rounds: 2}}")).sweep
    assert [one.trials for one in rounds_of(fewer, 27)] == [27, 9]


def test_a_warm_up_ends_within_the_first_round(tmp_path):
    for warmup, is_fine in ((55, True), (56, False)):
        overrides = f"[schedule.kind=wsd, schedule.warmup_steps={warmup}]"
        text = f"method: halving\ntrials: 27\noverrides: {overrides}\nkeys: {KEYS}"
        file = load_sweep(write(tmp_path, text))
        rounds = rounds_of(file.sweep, 27)
        if is_fine:
            check_rounds(file, rounds)
            continue
        with pytest.raises(ConfigError, match="rounds of 56 steps, in which a warm-up of 56 does not end"):
            check_rounds(file, rounds)


def test_the_best_go_on():
    metrics = {0: 3.0, 1: 2.0, 2: 2.5, 3: 2.0, 4: 9.0}
    assert promoted(metrics, 2, "minimize") == [1, 3]
    assert promoted(metrics, 2, "maximize") == [0, 4]
    assert promoted(metrics, 9, "minimize") == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(("kind", "shared"), [("wsd", 80), ("constant", 100)])
def test_a_longer_run_goes_on_from_where_rates_are_equal(kind, shared):
    """As far as a run may be resumed by its own rules, and not a step further."""
    short, long = (
        load_config(CONFIGS / "quickstart.yaml", [f"schedule.kind={kind}", f"train.max_steps={steps}"])
        for steps in (100, 300)
    )
    assert shared_steps(short, long) == shared
    changes_on_resume(long, short, shared, Path("checkpoint"))
    if kind == "wsd":
        with pytest.raises(ConfigError, match="step 81 of the 81 so far"):
            changes_on_resume(long, short, shared + 1, Path("checkpoint"))


@pytest.mark.parametrize(
    ("every", "step", "expected"), [(200, 80, 80), (30, 80, 20), (7, 83, 1), (40, 80, 40)]
)
def test_the_step_that_others_go_on_from_is_saved(every, step, expected):
    config = load_config(CONFIGS / "quickstart.yaml", [f"checkpoint.every_steps={every}"])
    saved = saved_at(config, step)
    assert saved == {"checkpoint.every_steps": expected, "checkpoint.keep_every": step}
    load_config(CONFIGS / "quickstart.yaml", [f"{key}={value}" for key, value in saved.items()])


class TestRecord:
    @pytest.fixture(autouse=True)
    def _there(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        (tmp_path / "runs" / "s").mkdir(parents=True)

    def file(self, tmp_path: Path, more: str = "trials: 3"):
        return load_sweep(write(tmp_path, f"{more}\nkeys: {KEYS}"))

    def begun(self, tmp_path: Path) -> Record:
        record = open_record(self.file(tmp_path))
        record.trials.append(Trial(0, {"optimizer.lr": 0.01}, [Outcome(9, State.FINISHED, 2.5)]))
        record.trials.append(Trial(1, {"optimizer.lr": 0.1}, [Outcome(9, State.DIVERGED, reason="NaN")]))
        record.save()
        return record

    def test_it_is_read_as_it_was_written(self, tmp_path):
        record = self.begun(tmp_path)
        again = open_record(self.file(tmp_path))
        assert again.trials == record.trials
        before = record.path.read_bytes()
        again.save()
        assert record.path.read_bytes() == before

    def test_another_sweep_is_refused_and_nothing_is_lost(self, tmp_path):
        record = self.begun(tmp_path)
        before = record.path.read_bytes()
        with pytest.raises(ConfigError) as refused:
            open_record(self.file(tmp_path, "trials: 3\nseed: 2\noverrides: [optimizer.eps=1e-6]"))
        assert sorted(problem.key for problem in refused.value.problems) == [
            "config.optimizer.eps", "overrides", "seed",
        ]  # fmt: skip
        assert "is 2, and was 1337 when the sweep began; restore it" in str(refused.value)
        assert record.path.read_bytes() == before
        assert len(open_record(self.file(tmp_path, "trials: 5\nparallel: 2")).trials) == 2

    @pytest.mark.parametrize(
        ("damage", "message"),
        [
            (lambda text: text[: len(text) // 2], "is damaged"),
            (
                lambda text: text.replace('"version": 1', '"version": 2'),
                "has version 2, and this albor reads 1",
            ),
            (lambda text: text.replace('"finished"', '"done"'), "is damaged"),
            (lambda text: "[]", "is damaged"),
            (lambda text: text.replace('"trials": [', '"trial": ['), "is damaged"),
        ],
    )
    def test_what_is_not_understood_stays(self, tmp_path, damage, message):
        path = self.begun(tmp_path).path
        path.write_text(damage(path.read_text()))
        before = path.read_bytes()
        with pytest.raises(AlborError, match=message):
            open_record(self.file(tmp_path))
        assert path.read_bytes() == before

    def test_it_names_no_time_and_no_place(self, tmp_path):
        content = json.loads(self.begun(tmp_path).path.read_text())
        assert set(content) == {"version", "sweep", "config", "trials"}
        assert "name" not in content["config"]
