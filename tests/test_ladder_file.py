"""A ladder's file: everything that is wrong is said at once, on its line; what is right becomes runs."""

from __future__ import annotations

import json
from pathlib import Path

import jsonschema
import pytest
from ladder_cases import LADDER
from run_cases import call

from albor.errors import ConfigError
from albor.ladder.file import GATES, CanaryGate, Gates, UnigramGate, load_ladder, schema
from albor.yamlcore import read_yaml

ROOT = Path(__file__).parents[1]
SHIPPED = [ROOT / "configs" / "ladder.yaml", ROOT / "configs" / "ladder-cpu.yaml"]


@pytest.fixture
def ladder(config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """LADDER beside its run's file."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny.yaml").write_text(config.read_text())
    path = tmp_path / "ladder.yaml"
    path.write_text(LADDER)
    return path


def messages(path: Path) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load_ladder(path)
    return [line.removeprefix(f"{path.parent}/") for line in str(caught.value).splitlines()]


def test_a_ladder_becomes_runs(ladder: Path):
    one, two = load_ladder(ladder).rungs
    assert (one.config.name, one.config.runs_dir, str(one.directory)) == (
        "one",
        "runs/steps",
        "runs/steps/one",
    )
    assert (one.config.steps, two.config.steps) == (16, 24)
    assert (one.config.seed, two.config.seed) == (3, 3)
    assert (one.config.model.hidden_size, two.config.model.hidden_size) == (32, 48)
    assert one.sha256 != two.sha256
    assert one.arguments[0] == str(ladder.parent / "tiny.yaml")


def test_everything_that_is_wrong_is_said_at_once(ladder: Path):
    ladder.write_text("""\
name: steps
rungz: []
overrides: [optimizer.lr=fast, name=x]
rungs:
  - {name: one, config: tiny.yaml, tokens: 1536, hours: 2}
  - {name: one, config: tinny.yaml}
  - {name: two, config: tiny.yaml, overrides: [model.hidden_size=33, oops], gates: {canry: false}}
  - {name: six, config: tiny.yaml, overrides: [model.hidden_size=33, oops]}
  - {name: ten, config: tiny.yaml, overrides: [train.max_steps=8], tokens: 1536}
  - {name: few, config: tiny.yaml, tokens: 96}
gates: {canary: {stepz: 4}, fits: null, bigrm: true, speed: {fraction: 2}}
""")
    assert messages(ladder) == [
        "ladder.yaml:2: rungz: unknown key; did you mean rungs?",
        "ladder.yaml:3: overrides[1]: name is the ladder's to set; remove it",
        "ladder.yaml:3: overrides[0]: optimizer.lr is the text 'fast'; a number is expected",
        "ladder.yaml:5: rungs[0].hours: tokens are given too; give one of them",
        "ladder.yaml:6: rungs[1].name: one is the name of another rung, on line 5; each rung has its own "
        "directory; rename one",
        "ladder.yaml:6: rungs[1].config: tinny.yaml: there is no such file; did you mean tiny.yaml?",
        "ladder.yaml:7: rungs[2].gates.canry: unknown key; did you mean canary?",
        "ladder.yaml:8: rungs[3].overrides[1]: 'oops' is not an override; write key=value, such as "
        "optimizer.lr=3e-4",
        "ladder.yaml:8: rungs[3].overrides[0]: model.hidden_size 33 does not divide into 2 heads "
        "(num_attention_heads); use 34 or 32",
        "ladder.yaml:9: rungs[4].overrides[0]: train.max_steps is set, and so is tokens; give one of them",
        "ladder.yaml:10: rungs[5].tokens: schedule.warmup_steps a warm-up of 4 steps does not end within the "
        "run's 1 (train.max_tokens); use at most 0",
        "ladder.yaml:11: gates.fits: is empty (null); write false to leave the gate out, or true",
        "ladder.yaml:11: gates.canary.stepz: unknown key; did you mean steps?",
        "ladder.yaml:11: gates.speed.fraction: must be at most 1, and is 2",
        "ladder.yaml:11: gates.bigrm: unknown key; did you mean bigram?",
    ]


def test_what_is_wrong_in_a_rungs_own_file_is_said_on_its_line(ladder: Path):
    tiny = ladder.parent / "tiny.yaml"
    tiny.write_text(tiny.read_text().replace("vocab_size: 360", "vocab_size: many"))
    (line,) = messages(ladder)  # once, though two rungs have that file
    assert line.startswith("tiny.yaml:10: model.vocab_size: 'many' is not a number")


def test_a_rung_is_not_called_as_a_file_of_the_ladders(ladder: Path):
    ladder.write_text(LADDER.replace("name: two", "name: ladder.json"))
    (found,) = messages(ladder)
    assert "rungs[1].name: ladder.json is a file of the ladder's own" in found


def test_no_rungs(ladder: Path):
    ladder.write_text("name: steps\nrungs: []\n")
    assert messages(ladder) == ["ladder.yaml:2: rungs: has 0 items, where at least 1 must be"]
    ladder.write_text("")
    assert "the file is empty" in messages(ladder)[0]


def test_a_rungs_gates_differ_by_what_they_say(ladder: Path):
    ladder.write_text(
        LADDER.replace(
            "tokens: 2304", "tokens: 2304, gates: {canary: {micro_batches: 1}, export: true, bigram: false}"
        )
        + "gates: {canary: {steps: 3}, export: false, unigram: {by_step: 9}}\n"
    )
    one, two = (planned.gates for planned in load_ladder(ladder).rungs)
    assert (one.canary, two.canary) == (CanaryGate(steps=3), CanaryGate(steps=3, micro_batches=1))
    assert (one.export, two.export is None) == (None, False)
    assert (one.bigram is None, two.bigram) == (False, None)
    assert one.unigram == two.unigram == UnigramGate(by_step=9)
    assert one.speed == Gates().speed


# The schema, and what is shipped


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_what_is_shipped_loads_and_explains_itself(path: Path):
    file = load_ladder(path)
    assert len(file.rungs) == 3
    sizes = [planned.config.model.hidden_size for planned in file.rungs]
    assert sizes == sorted(sizes)
    validator = jsonschema.Draft202012Validator(schema())
    validator.validate(read_yaml(path.read_text(), path.name).value)
    assert path.read_text().startswith("# yaml-language-server: $schema=../albor/ladder/ladder.schema.json\n")


def test_the_schema_is_the_shipped_one():
    shipped = (ROOT / "albor" / "ladder" / "ladder.schema.json").read_text()
    assert call("schema", "--ladder") == (0, shipped, ""), (
        "albor schema --ladder > albor/ladder/ladder.schema.json"
    )


def test_the_schema_describes_every_key():
    for name, section in schema()["$defs"].items():
        for key, field in section["properties"].items():
            assert "description" in field, f"{name}.{key}"
    assert set(schema()["$defs"]["Gates"]["properties"]) == set(GATES)


@pytest.mark.parametrize("gates", ["{canary: null}", "{canary: {steps: no}}", "{bigrm: false}"])
def test_the_schema_refuses_what_the_loader_refuses(ladder: Path, gates: str):
    text = f"{LADDER}gates: {gates}\n"
    ladder.write_text(text)
    assert messages(ladder)
    validator = jsonschema.Draft202012Validator(schema())
    assert not validator.is_valid(read_yaml(text, "").value)
    assert validator.is_valid(read_yaml(f"{LADDER}gates: {{canary: false, bigram: true}}\n", "").value)


# --dry-run


def test_a_dry_run_plans_every_rung_and_touches_nothing(ladder: Path, monkeypatch: pytest.MonkeyPatch):
    result = call("ladder", ladder, "--dry-run", "--json")
    assert (result.code, result.err) == (0, "")
    plan = json.loads(result.out)
    assert [rung["tokens"] for rung in plan["rungs"]] == [1536, 2304]
    assert plan["total"]["tokens"] == 3840
    assert plan["total"]["checkpoint_bytes"] == sum(rung["checkpoint_bytes"] for rung in plan["rungs"]) > 0
    assert plan["total"]["hours"] is None, "nobody knows how fast this machine is"
    assert sorted(path.name for path in ladder.parent.iterdir()) == ["ladder.yaml", "tiny.yaml"]
    table = call("ladder", ladder, "--dry-run").out
    assert "together" in table
    assert "no speed is known" in table


def test_a_dry_run_plans_what_would_be_trained(ladder: Path):
    plan = json.loads(call("ladder", ladder, "--dry-run", "--from", "two", "--json").out)
    assert [rung["name"] for rung in plan["rungs"]] == ["two"]
    refused = call("ladder", ladder, "--dry-run", "--from", "three")
    assert (refused.code, "three is no rung" in refused.err) == (2, True)


def test_a_dry_run_holds_the_plan_against_the_gate(tmp_path: Path):
    # 9.6 GiB of 79: its plan leaves less than 90 % free.
    text = f"name: x\nrungs:\n  - {{name: a, config: {ROOT / 'configs' / 'pretrain-350m.yaml'}}}\n"
    (tmp_path / "x.yaml").write_text(text + "gates: {fits: {free: 0.9}}\n")
    found = call("ladder", tmp_path / "x.yaml", "--dry-run", "--gpu", "H100", "--json")
    (rung,) = json.loads(found.out)["rungs"]
    assert (found.code, rung["fits"]) == (4, False)
    assert "less 90%" in rung["verdict"]


def test_a_dry_run_on_a_card_that_is_not_here(ladder: Path):
    ladder.write_text(LADDER.replace("seed=3", "device=auto"))
    found = json.loads(call("ladder", SHIPPED[0], "--dry-run", "--gpu", "H100", "--json").out)
    assert found["fits"] is True
    assert found["total"]["hours"] == pytest.approx(sum(rung["hours"] for rung in found["rungs"]))
    assert found["total"]["kwh"] == pytest.approx(found["total"]["hours"] * 0.7, rel=0.01)  # its 700 W
    small = call("ladder", SHIPPED[0], "--dry-run", "--gpu", "RTX 4060")
    assert small.code == 4
    assert "does not fit" in " ".join(small.out.split())
    refused = call("ladder", ladder, "--gpu", "H100")
    assert (refused.code, "add --dry-run" in refused.err) == (2, True)
