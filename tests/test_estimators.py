"""benchmarks/estimators.py: its formulas are the programs', and docs/memory.md shows what it prints."""

from __future__ import annotations

import json
import re
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from albor.configfile import load_config
from albor.memory.estimate import estimate
from albor.units import GIB

ROOT = Path(__file__).parents[1]
SCRIPT = str(ROOT / "benchmarks/estimators.py")
E: dict[str, Any] = runpy.run_path(SCRIPT)
NAMES = [estimator.name for estimator in E["ESTIMATORS"]]

# Untied, every head with its own keys, no size a power of two but the length.
OTHER = (
    "model.hidden_size=384", "model.intermediate_size=1000", "model.num_hidden_layers=5",
    "model.num_attention_heads=6", "model.num_key_value_heads=6", "model.vocab_size=50304",
    "model.tie_word_embeddings=false", "data.sequence_length=512", "train.micro_batch_size=3",
)  # fmt: skip
# What the programs themselves answered: accelerate 1.15.0 over transformers 5.23.0 and DeepSpeed 0.19.8, as
# installed; the files of EleutherAI, Megatron-LM and Unsloth at the commits that the script names, executed.
# EleutherAI's prints GiB, here with more decimals than its own two.
ANSWERS = {
    "configs/pretrain-50m.yaml": (
        499_225_088, 1_248_061_440, 1_190_364_160, 4.008653640747, 2_310_172_877, 2_725_198_233),
    "configs/pretrain-125m.yaml": (
        1_308_826_112, 3_272_064_000, 3_045_520_896, 19.210169792175, 9_210_779_136, 6_789_290_393),
    "configs/pretrain-350m.yaml": (
        3_188_072_960, 7_970_181_120, 7_307_380_736, 17.950595855713, 11_061_946_368, 7_879_563_673),
    "other": (224_241_152, 946_936_320, 929_509_632, 1.000455379486, 1_121_657_702, 2_037_259_673),
}  # fmt: skip


def case(path: str, *overrides: str) -> Any:
    if path == "other":
        path, overrides = E["CONFIGS"][0], OTHER
    return E["Case"].of(load_config(ROOT / path, overrides))


@pytest.mark.parametrize("path", ANSWERS)
@pytest.mark.parametrize("place", range(6), ids=NAMES)
def test_the_formulas_answer_what_the_programs_answered(path: str, place: int):
    # The shapes are those of the day on which the programs were asked.
    needs = E["ESTIMATORS"][place].needs(case(path))
    answer = ANSWERS[path][place]
    if isinstance(answer, float):
        assert needs / GIB == pytest.approx(answer, abs=1e-9)
    else:
        assert needs == answer


def test_every_source_is_pinned():
    for estimator in E["ESTIMATORS"]:
        assert re.fullmatch(r"https://github\.com/[\w-]+/[\w-]+/blob/[0-9a-f]{40}/\S+\.py", estimator.source)


def test_what_each_depends_on_is_what_the_page_says():
    """accelerate and DeepSpeed ask neither for batch nor for sequence; the others ask for both."""
    before, batch = case(E["CONFIGS"][0]), case(E["CONFIGS"][0], "train.micro_batch_size=32")
    length = case(E["CONFIGS"][0], "data.sequence_length=2048")
    for estimator in E["ESTIMATORS"]:
        moves = not estimator.name.startswith(("accelerate", "DeepSpeed"))
        assert (estimator.needs(batch) > estimator.needs(before)) == moves, estimator.name
        assert (estimator.needs(length) > estimator.needs(before)) == moves, estimator.name


def test_albors_rows_are_what_the_command_says():
    rows = {row.name: row.needs for row in E["rows"]()}
    for name, overrides in (("as configured", []), ("`train.accumulator: gpu`", ["train.accumulator=gpu"])):
        needs = [
            estimate(load_config(ROOT / path, overrides), E["CARD"]).required_bytes for path in E["CONFIGS"]
        ]
        assert list(rows[f"albor, {name}"]) == needs


def test_the_page_shows_what_the_script_prints():
    page = (ROOT / "docs/memory.md").read_text(encoding="utf-8")
    current = E["between_markers"](page, E["table"]())
    assert page == current, "run: python benchmarks/estimators.py --write"
    assert page != E["between_markers"](page, "another table\n")
    with pytest.raises(ValueError, match="no place between"):
        E["between_markers"]("a page without markers", "")


def script(monkeypatch: pytest.MonkeyPatch, *words: str) -> Callable[[], None]:
    monkeypatch.setattr(sys, "argv", [SCRIPT, *words])
    return E["main"]


def test_the_script_prints_the_table_or_one_json_object(monkeypatch: pytest.MonkeyPatch, capsys: Any):
    script(monkeypatch)()
    assert capsys.readouterr().out == E["table"]()
    script(monkeypatch, "--json")()
    answer = json.loads(capsys.readouterr().out)
    assert [row["name"] for row in answer["rows"]][:6] == NAMES
    assert answer["rows"][1]["bytes"]["configs/pretrain-350m.yaml"] == 7_970_181_120
    assert answer["rows"][1]["source"].endswith("stage_1_and_2.py")


def test_writing_changes_the_page_between_the_markers_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    page = tmp_path / "memory.md"
    page.write_text(f"before\n{E['START']}\nold\n{E['END']}\nafter\n")
    main = script(monkeypatch, "--write")
    monkeypatch.setitem(main.__globals__, "PAGE", page)
    main()
    assert page.read_text() == f"before\n{E['START']}\n\n{E['table']()}\n{E['END']}\nafter\n"


def test_a_record_of_a_gpu_gives_a_row(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """In the form in which benchmarks/memory.py writes it; a shape is called like the configuration."""
    monkeypatch.setitem(E["measured"].__globals__, "RECORDS", tmp_path)
    (empty,) = E["measured"]()
    assert empty.needs == (None, None, None)
    shapes = [
        {"name": "pretrain-350m", "status": "ok", "measured": 9 * GIB},
        {"name": "pretrain-125m", "status": "out of memory", "measured": 8 * GIB},
        {"name": "50m-mb2-cpu", "status": "ok", "measured": 1},
    ]
    record = {"machine": {"device": "a card"}, "shapes": shapes}
    (tmp_path / "memory-card.json").write_text(json.dumps(record))
    (row,) = E["measured"]()
    assert (row.name, row.needs) == ("measured on a card", (None, None, 9 * GIB))
    (tmp_path / "memory-card.json").write_text(json.dumps({"shapes": [{"name": "x"}]}))
    with pytest.raises(KeyError):  # another form is not the same as nothing measured
        list(E["measured"]())
