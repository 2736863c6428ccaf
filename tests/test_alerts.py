"""Rules on metrics: how they are written and refused, when they say something, and how they end a run."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from run_cases import bits, call, checkpoints, events, rows, write_project
from test_divergence import bad_samples, killed, poison_loss, poison_moment, samples_of, stopped, train

from albor.alerts import Alarm, Watch, parse_rule
from albor.checkpoint import checkpoint_name
from albor.config import RunConfig
from albor.configfile import dump_config, load_config
from albor.errors import ConfigError
from albor.metric_names import metric_names
from albor.runlog import known_metrics, read_rows
from albor.train.loop import Loop
from albor.train.metrics import MetricsLog

RUN = Path("runs/tiny")


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = write_project(tmp_path_factory.mktemp("project"))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(path.parent)
        assert call("data", "prepare", path).code == 0
    return path


@pytest.fixture(scope="module")
def whole(config: Path) -> dict[str, Any]:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(config.parent)
        assert train(config).code == 0
    return bits(config.parent / RUN)


@pytest.fixture(autouse=True)
def own_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


# Rules


@pytest.mark.parametrize(
    ("rule", "metric", "true", "false"),
    [
        ("train/loss > 10", "train/loss", [10.1, math.inf], [10, 9, math.nan, -math.inf]),
        ("train/loss>=1e1", "train/loss", [10, 11], [9.99, math.nan]),
        ("a < -.5", "a", [-1, -math.inf], [-0.5, 0, math.nan]),
        ("a <= 1_000", "a", [1000, 0], [1001, math.nan]),
        ("a == 0", "a", [0, -0.0], [1e-9, math.nan]),
        (
            " gradients/*   is not  finite ",
            "gradients/block_00/mlp",
            [math.nan, math.inf, -math.inf],
            [0, 1e30],
        ),
        ("*/block_*/mlp > 1", "gradients/block_12/mlp", [2], [1]),
        ("* > 1", "train/loss", [2], [1]),
    ],
)
def test_a_rule_holds_or_not(rule: str, metric: str, true: list[float], false: list[float]):
    parsed = parse_rule(rule)
    assert parsed.metric.fullmatch(metric)
    assert [parsed.holds(value) for value in true] == [True] * len(true)
    assert [parsed.holds(value) for value in false] == [False] * len(false)


@pytest.mark.parametrize(
    ("pattern", "metric", "matches"),
    [
        ("train/loss", "train/loss", True), ("train/loss", "train/loss_scale", False),
        ("train/loss", "xtrain/loss", False), ("train.loss", "train/loss", False),
        ("gradients/*", "gradients/block_00/mlp", True), ("gradients/*", "gradients/", True),
        ("gradients/*", "train/grad_norm", False), ("*/loss", "val/loss", True),
        ("**loss", "val/loss", True), ("*o*", "val/loss", True), ("*x*", "val/loss", False),
    ],
)  # fmt: skip
def test_a_star_stands_for_anything_and_nothing_else_does(pattern: str, metric: str, matches: bool):
    assert bool(parse_rule(f"{pattern} > 1").metric.fullmatch(metric)) is matches


@pytest.mark.parametrize(
    ("rule", "says"),
    [
        ("", "is no rule; write METRIC > NUMBER"),
        ("train/loss", "is no rule"),
        ("> 3", "is no rule"),
        ("train loss > 3", "is no rule"),
        ("train/loss => 3", "'=>' is no comparison"),
        ("train/loss != 3", "'!=' is no comparison"),
        ("train/loss = 3", "'=' is no comparison"),
        ("train/loss > ", "'' is no finite number"),
        ("train/loss > nan", "'nan' is no finite number"),
        ("train/loss > 1e999", "'1e999' is no finite number"),
        ("train/loss > 3 4", "'3 4' is no finite number"),
        ("train/loss > val/loss", "'val/loss' is no finite number"),
        ("train/loss is finite", "write train/loss is not finite"),
        ("train/loss is", "write train/loss is not finite"),
        ("train/[a-z]+ > 3", "is no metric's name"),
    ],
)
def test_what_is_no_rule_is_explained(rule: str, says: str):
    with pytest.raises(ValueError, match=r"write|use") as error:
        parse_rule(rule)
    assert says in str(error.value)


def test_all_that_is_wrong_is_said_at_once_and_where(tmp_path: Path, config: Path):
    lines = config.read_text().splitlines()
    first = len(lines) + 1
    lines += [
        "alerts:", "  train/loss > 10: stop", "  train/loss => 9: stop", "  gradients/* > 100: wran",
        "  val/loss: 7", '  "*/loss is not finite": warn', "  12: stop",
    ]  # fmt: skip
    path = tmp_path / "wrong.yaml"
    path.write_text("\n".join(lines).replace("lr: 1e-2", "lr: fast"))
    result = call("train", path, "--dry-run")
    assert result.code == 2
    said = [line.removeprefix(f"{path}:") for line in result.err.splitlines()[1:]]
    assert [line.partition(":")[0] for line in said] == [
        str(number) for number in (18, first + 2, first + 3, first + 4, first + 4, first + 6)
    ]
    assert said[1].startswith(f"{first + 2}: alerts.train/loss => 9: '=>' is no comparison; write METRIC")
    assert said[2].endswith("alerts.gradients/* > 100: is the text 'wran'; use 'warn' or 'stop'")
    assert "is no rule" in said[3]
    assert "use 'warn' or 'stop'" in said[4]
    assert "as a key" in said[5]
    assert call("train", config, "alerts={train/loss >: stop}", "--dry-run").code == 2


@pytest.mark.parametrize(
    ("rule", "says"),
    [
        ("train/los > 10", "a run of this model has no metric train/los; did you mean train/loss?"),
        ("trian/* > 1.5", "no metric trian/*; did you mean train/*?"),
        ("val/bits_per_bite > 0.5", "did you mean val/bits_per_byte?"),
        ("gradients/block_02 > 1", "its blocks are gradients/block_00 to gradients/block_01, and each has"),
        ("gradients/block_00/ffn > 1", "and each has /attention and /mlp"),
        ("x* > 1", "there are train/loss, train/lr"),
    ],
)
def test_a_rule_on_a_metric_that_no_run_has_is_refused(rule: str, says: str, config: Path, tmp_path: Path):
    """On its line; with the name that was meant."""
    path = tmp_path / "wrong.yaml"
    path.write_text(config.read_text() + f"alerts:\n  train/loss > 1.5: warn\n  {rule}: stop\n")
    result = call("train", path, "--dry-run")
    assert result.code == 2
    line = len(config.read_text().splitlines()) + 3
    assert f"{path}:{line}: alerts.{rule}: a run of this model has no metric" in result.err
    assert says in result.err
    assert call("train", config, f"alerts={{{json.dumps(rule)}: stop}}", "--dry-run").code == 2


@pytest.mark.parametrize("tied", ["true", "false"])
def test_the_metrics_that_rules_may_be_about_are_those_that_a_run_logs(tied: str, config: Path):
    given = f"model.tie_word_embeddings={tied}"
    assert train(config, given, "train.max_steps=4", "schedule.warmup_steps=1").code == 0
    logged = {name for row in rows(RUN) for name in row} - {"step", "tokens", "time", "non_finite"}
    assert logged == set(metric_names(load_config(config, [given])))


def test_rules_survive_being_written_out(config: Path, tmp_path: Path):
    rules = {"train/loss > 10": "stop", "*/loss is not finite": "warn", "gradients/*>=1e2": "warn"}
    given = load_config(config, [f"alerts={json.dumps(rules)}"])
    assert given.alerts == rules
    (tmp_path / "resolved.yaml").write_text(dump_config(given))
    assert load_config(tmp_path / "resolved.yaml") == given
    with pytest.raises(ConfigError, match="is empty"):
        load_config(config, ["alerts=null"])
    assert RunConfig.model_fields["alerts"].default == {}


# Rows


def test_a_rule_speaks_once_until_it_has_stopped_holding():
    watch = Watch({"train/loss > 10": "warn"})
    seen = [watch.judge({"train/loss": value}) for value in (9, 11, 12, math.inf, 10, None, 11, math.nan, 11)]
    assert [len(alarms) for alarms in seen] == [0, 1, 0, 0, 0, 0, 1, 0, 1]
    assert seen[1] == [Alarm("train/loss > 10", "warn", {"train/loss": 11})]


def test_a_rule_over_several_metrics_is_one_rule():
    """It holds while it holds for any of them, whichever row brings it."""
    watch = Watch({"*/loss > 3": "warn", "*/loss > 5": "stop"})
    assert watch.judge({"train/loss": 4.0, "train/lr": 9.0}) == [
        Alarm("*/loss > 3", "warn", {"train/loss": 4.0})
    ]
    assert watch.judge({"val/loss": 6.0}) == [Alarm("*/loss > 5", "stop", {"val/loss": 6.0})]
    assert watch.judge({"train/loss": 2.0}) == []
    assert watch.judge({"train/loss": 4.0}) == [], "val/loss still is above 3"
    assert watch.holding("warn") == [Alarm("*/loss > 3", "warn", {"val/loss": 6.0, "train/loss": 4.0})]
    assert watch.judge({"val/loss": 1.0, "train/loss": 1.0}) == []
    assert watch.holding("stop") == []
    assert [alarm.values for alarm in watch.judge({"train/loss": 4.0})] == [{"train/loss": 4.0}]


def test_an_alarm_names_rule_and_values():
    values = {f"gradients/block_{i:02d}": 100.0 + i for i in range(5)}
    assert str(Alarm("g > 1", "warn", {"g": math.nan})) == "alert g > 1: g is nan"
    assert str(Alarm("gradients/* > 99", "warn", values)) == (
        "alert gradients/* > 99: gradients/block_00 is 100, gradients/block_01 is 101, gradients/block_02 is "
        "102 and 2 more"
    )


def test_a_row_is_read_back_as_it_was_judged(tmp_path: Path):
    row = {"a": math.nan, "b": math.inf, "c": -math.inf, "d": None, "e": 1.5, "f": 2}
    MetricsLog(tmp_path).row(7, 70, row)
    (read,) = read_rows(tmp_path / "metrics.jsonl")
    assert str(known_metrics(read)) == str(row)


# Runs


def reaches(step: int, whole: dict[str, Any]) -> str:
    """A rule that holds from `step` on."""
    epoch = next(row["train/epoch"] for row in whole["rows"] if row["step"] == step)
    return f'alerts={{"train/epoch >= {epoch!r}": stop}}'


def test_a_warning_is_an_event_and_a_message_and_changes_nothing(config: Path, whole: dict[str, Any]):
    result = train(config, 'alerts={"train/loss < 4": warn, "gradients/* > 1e9": stop, "val/loss > 0": warn}')
    assert result.code == 0
    first = next(row for row in rows(RUN) if row.get("train/loss", 9) < 4)
    (below, above) = events(RUN, "alert")
    assert (below["step"], below["rule"], below["action"]) == (first["step"], "train/loss < 4", "warn")
    assert below["values"] == {"train/loss": str(first["train/loss"])}
    assert (above["step"], above["rule"]) == (8, "val/loss > 0")
    assert result.out.count("alert train/loss < 4: train/loss is ") == 1
    assert bits(RUN) == whole


def test_a_stop_saves_says_why_and_goes_on_once_the_rule_is_gone(config: Path, whole: dict[str, Any]):
    """And a stop that still holds stops again, at once and as often as one tries."""
    rule = 'alerts={"train/loss < 4": stop}'
    result = train(config, rule)
    step = next(row["step"] for row in rows(RUN) if row.get("train/loss", 9) < 4)
    value = next(row["train/loss"] for row in rows(RUN) if row["step"] == step)
    assert 4 < step < 24
    assert result.code == 1
    assert result.err.startswith(
        f"albor: alert train/loss < 4: train/loss is {value:g} after step {step}; the "
    )
    assert (
        "the checkpoint is saved, and the same command goes on from it once that rule is changed"
        in result.err
    )
    assert len(result.err.splitlines()) == 1
    assert checkpoints(RUN)[-1] == step
    assert [event["event"] for event in events(RUN)][-4:] == ["alert", "checkpoint", "stopped", "memory"]
    for _ in range(2):
        again = train(config, rule)
        assert (again.code, again.err) == (1, result.err)
        assert rows(RUN)[-1]["step"] == step
        assert [event["event"] for event in events(RUN)][-2:] == ["resumed", "stopped"]
        assert events(RUN)[-1]["reason"].startswith("alert train/loss < 4: train/loss is")
    assert train(config, 'alerts={"train/loss < 1": stop}').code == 0
    assert bits(RUN) == whole


def test_a_stop_by_validation_does_not_cost_the_evaluation(config: Path, whole: dict[str, Any]):
    result = train(config, 'alerts={"val/perplexity > 1": stop}')
    assert result.code == 1
    assert "val/perplexity is" in result.err
    assert "after step 8" in result.err
    assert train(config).code == 0
    assert bits(RUN) == whole


@pytest.mark.parametrize("step", [15, 16, 17])
def test_a_stop_at_a_step_that_is_saved_anyway_changes_nothing(
    step: int, config: Path, whole: dict[str, Any]
):
    """Nor does one beside it: what a run would go back to is what it would have been."""
    assert train(config, reaches(step, whole)).code == 1
    saved = RUN / "checkpoints" / checkpoint_name(step) / "state.json"
    assert json.loads(saved.read_text())["guard"]["anchor"] == (12 if step == 15 else 16)
    assert train(config).code == 0
    assert bits(RUN) == whole


def test_a_stop_at_the_last_step_stops_the_report_too(config: Path, whole: dict[str, Any]):
    result = train(config, reaches(24, whole))
    assert result.code == 1
    assert checkpoints(RUN)[-1] == 24
    assert not (RUN / "eval").exists()
    assert train(config).code == 0
    assert bits(RUN) == whole


def test_a_stop_comes_before_a_rollback_which_is_not_forgotten(config: Path, whole: dict[str, Any]):
    """At the fifth skipped step of five the rule ends the run; the run that goes on without it goes back at
    once.
    """
    with bad_samples(samples_of(10, 11, 12, 13, 14), poison_loss):
        assert train(config, reaches(14, whole)).code == 1
        assert checkpoints(RUN)[-1] == 14
        assert events(RUN, "rollback") == []
        assert train(config).code == 0
        assert [event["from_step"] for event in events(RUN, "rollback")] == [14]
        assert train(config, "name=undisturbed").code == 0
    assert bits(RUN) == bits(Path("runs/undisturbed"))


def test_weights_that_are_not_finite_are_not_saved_by_a_stop(config: Path, whole: dict[str, Any]):
    with bad_samples(samples_of(10), poison_moment):
        result = train(config, reaches(10, whole))
    assert result.code == 1
    assert "not finite and not saved, the checkpoint is that of step 8" in result.err
    assert checkpoints(RUN)[-1] == 8


def test_a_warning_is_not_repeated_by_a_run_that_resumes(config: Path):
    rule = 'alerts={"train/loss > 1": warn}'
    stopped(config, 6, rule)
    killed(config, "step.begin", 11, rule)
    assert train(config, rule).code == 0
    assert [event["step"] for event in events(RUN, "alert")] == [1]


def test_without_looking_back_a_stop_would_be_forgotten(config: Path, monkeypatch: pytest.MonkeyPatch):
    """What the tests above rest on."""
    rule = 'alerts={"train/loss < 4": stop}'
    assert train(config, rule).code == 1
    step = rows(RUN)[-1]["step"]
    with monkeypatch.context() as patch:
        patch.setattr(Loop, "_look_back", lambda self: None)
        assert train(config, rule).code == 1
    assert rows(RUN)[-1]["step"] == step + 1


def between_rows(whole: dict[str, Any]) -> tuple[str, list[int]]:
    """A warning that begins and ends in the steps 9 to 12, none of which is logged every seventh step, and
    where it does; by loss, which is another one at every step.
    """
    losses = {row["step"]: row["train/loss"] for row in whole["rows"] if "train/loss" in row}
    bound = losses[10]
    rule = f'alerts={{"train/loss > {bound!r}": warn}}'
    holds = {step: loss > bound for step, loss in losses.items()} | {0: False}
    return rule, [step for step in range(1, 25) if holds[step] != holds[step - 1]]


def test_rules_are_judged_at_every_step_and_a_row_says_where_one_held(config: Path, whole: dict[str, Any]):
    assert train(config, reaches(10, whole), "log.every_steps=7").code == 1
    assert [row["step"] for row in rows(RUN) if "train/loss" in row] == [1, 7, 10]


def test_what_rules_saw_between_rows_survives_kills(config: Path, whole: dict[str, Any]):
    """A row is written where one begins or ends to hold, so that a run which resumes knows as much."""
    rule, turns = between_rows(whole)
    assert set(turns) & {9, 10, 11, 12}, "nothing happens between two rows"
    arguments = (rule, "log.every_steps=7", "checkpoint.every_steps=3")
    assert train(config, *arguments, "name=unkilled").code == 0
    expected, alerts = bits(Path("runs/unkilled")), events(Path("runs/unkilled"), "alert")
    logged = {row["step"] for row in expected["rows"] if "train/loss" in row}
    assert logged == {1, 7, 14, 21, 24, *turns}
    for step in (11, 13, 17):
        killed(config, "step.begin", step, *arguments)
    assert train(config, *arguments).code == 0
    assert bits(RUN) == expected
    steps = {event["step"] for event in alerts}
    assert {event["step"] for event in events(RUN, "alert")} == steps == set(turns[::2])


def test_a_row_that_would_change_nothing_is_known_before(whole: dict[str, Any]):
    watch = Watch({"*/loss > 3": "warn"})
    assert not watch.changes({"train/loss": 2.0})
    assert watch.changes({"train/loss": 4.0})
    assert watch.holding("warn") == [], "asking is not telling"
    watch.judge({"train/loss": 4.0})
    assert not watch.changes({"train/loss": 5.0})
    assert watch.changes({"train/loss": 2.0})
    watch.judge({"val/loss": 4.0})
    assert not watch.changes({"train/loss": 2.0}), "val/loss holds on"
