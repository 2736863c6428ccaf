"""`albor eval`: a model's benchmark results and bits per byte, stored with its run."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from albor import __version__
from albor.durable import replace_file
from albor.errors import AlborError, ConfigError, Problem
from albor.evaluate import published
from albor.evaluate.code import CODE, Sampling, evaluate_code
from albor.evaluate.items import PACKAGE, find_items
from albor.evaluate.metrics import measure
from albor.evaluate.model import Opened, open_model
from albor.evaluate.progress import show_counts
from albor.evaluate.report import table
from albor.evaluate.requests import encode_pairs, plan_requests
from albor.evaluate.sandbox import Sandbox
from albor.evaluate.scorer import Score, Scorer
from albor.evaluate.stop import Stop
from albor.evaluate.store import Scores
from albor.evaluate.tasks import TASKS, Item, Task, find_tasks
from albor.evaluate.text import read_text, score_text
from albor.memory.shortage import explained
from albor.strictjson import to_json

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Request:
    """What `albor eval` was asked for."""

    run: Path
    tasks: str | None = None
    text: Path | None = None
    data: Path | None = None
    limit: int | None = None
    through_lm_eval: bool = False
    device: str = "auto"
    dtype: str | None = None
    batch_tokens: int | None = None
    stride: int | None = None
    samples: int = 1
    temperature: float | None = None
    allow_code: bool = False


def run_eval(request: Request, console: Console) -> dict[str, Any]:
    """Evaluates, prints the table to `console`, writes the results to RUN/eval and returns them.

    What can be refused is so before the model is read. Raises ConfigError for a request that means nothing,
    Interrupted after a signal, and what reading a checkpoint raises.
    """
    if (request.tasks is None) == (request.text is None):
        problem = "give --tasks or --text" if request.tasks is None else "tasks and a text are asked for"
        raise ConfigError([Problem("--tasks", problem, "use one of them at a time", "command line")])
    _check_options(request)
    began = time.perf_counter()
    with explained("evaluate fewer tokens at a time (--batch-tokens), or on a larger machine"):
        if request.text is not None:
            name, found, opened = _evaluate_text(request, request.text, console)
        elif request.through_lm_eval:
            from albor.evaluate.through import evaluate_through

            assert request.tasks is not None
            name, found, opened = evaluate_through(request, request.tasks)
        else:
            name, found, opened = _evaluate_tasks(request, console)
    results = {
        "albor": __version__,
        "step": opened.step,
        "checkpoint": str(opened.path),
        "model": opened.facts,
        "context": opened.loaded.config.model.max_position_embeddings,
        "limit": request.limit,
        "seconds": round(time.perf_counter() - began, 3),
        **found,
    }
    path = opened.results / f"{name}-step-{opened.step:08d}.json"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(path, to_json(results))
    except OSError as error:
        raise AlborError(f"{path} cannot be written: {error.strerror}; what is scored is kept") from error
    for line in table(results):
        console.out(line, highlight=False)
    console.out(f"\nstored in {path}", highlight=False)
    return results


def _check_options(request: Request) -> None:
    """Raises ConfigError for options that would change nothing: whoever gives one expects that it does."""
    text, through = request.text is not None, request.through_lm_eval
    writes = (
        not text and not through and any(name.strip() in CODE for name in (request.tasks or "").split(","))
    )
    of_tasks, of_programs = "belongs to --tasks", "belongs to humaneval and mbpp"
    given = (
        ("--through", text and through, of_tasks),
        ("--limit", text and request.limit is not None, of_tasks),
        ("--data", text and request.data is not None, of_tasks),
        ("--data", through and request.data is not None, "is not read by lm-eval"),
        ("--stride", not text and request.stride is not None, "belongs to --text"),
        ("--samples", not writes and request.samples != 1, of_programs),
        ("--temperature", not writes and request.temperature is not None, of_programs),
    )
    problems = [Problem(key, what, "leave it out", "command line") for key, wrong, what in given if wrong]
    if problems:
        raise ConfigError(problems)


def _evaluate_text(request: Request, text: Path, console: Console) -> tuple[str, dict[str, Any], Opened]:
    content = read_text(text)
    opened = open_model(request.run, request.device, request.dtype, request.batch_tokens)
    with show_counts(console) as report, Stop("a text is scored from its beginning") as stop:

        def on_window(done: int, total: int) -> None:
            report(f"{text.name}, tokens", done, total)
            stop.check()

        score = score_text(Scorer(opened.loaded), content, request.stride, on_window)
    found = {
        "text": {
            "path": str(text),
            "sha256": score.sha256,
            "bytes": score.text_bytes,
            "tokens": score.tokens,
            "stride": score.stride,
            "loss": score.loss,
            "perplexity": score.perplexity,
            "bits_per_byte": score.bits_per_byte,
        }
    }
    return f"text-{text.stem}-{score.sha256[:8]}", found, opened  # another text of that name: another file


def _evaluate_tasks(request: Request, console: Console) -> tuple[str, dict[str, Any], Opened]:
    assert request.tasks is not None
    names = find_tasks(request.tasks)
    writing = [name for name in names if name in CODE]
    sampling = Sampling.of(request.samples, request.temperature)
    sandbox = Sandbox()
    if writing and not request.allow_code:
        problem = f"{', '.join(writing)} runs programs that the model writes"
        remedy = "give --allow-code-execution to allow it; they run isolated, or not at all"
        raise ConfigError([Problem("--tasks", problem, remedy, "command line")])
    root = find_items(request.data)
    if writing:
        sandbox.check()
    questions = {name: TASKS[name].items(root, request.limit) for name in names if name in TASKS}
    problems = {name: CODE[name].read(root)[: request.limit] for name in writing}
    opened = open_model(request.run, request.device, request.dtype, request.batch_tokens)
    scorer = Scorer(opened.loaded)
    results: dict[str, Any] = {}
    kept = "what is scored is kept, and the same command goes on from it"
    with show_counts(console) as report, Stop(kept) as stop:
        for name in names:

            def progress(done: int, total: int, name: str = name) -> None:
                report(name, done, total)
                stop.check()

            if name in TASKS:
                results[name] = _evaluate_task(TASKS[name], questions[name], opened, scorer, progress)
            else:
                results[name] = _evaluate_code(name, problems[name], opened, sampling, sandbox, progress)
    found: dict[str, Any] = {"data": {"package": PACKAGE, "path": str(root)}, "results": results}
    compared = [name for name in names if name in TASKS]
    if compared:
        found["published"] = published.as_json(compared)
    return _name(names, request.limit), found, opened


def _name(names: Sequence[str], limit: int | None) -> str:
    """What a results file is called: another limit, another file."""
    name = "all" if set(names) == set(TASKS) else "+".join(names)
    return name if limit is None else f"{name}-first-{limit}"


def _evaluate_task(
    task: Task, items: Sequence[Item], opened: Opened, scorer: Scorer, progress: Progress
) -> dict[str, Any]:
    """Scores what is not in the store, batch by batch; the same batches, whatever was there."""
    pairs = [pair for item in items for pair in item.requests]
    plan = plan_requests(encode_pairs(scorer.tokenizer, pairs), scorer.context, scorer.batch_tokens)
    asked = json.dumps([[item.requests, item.gold, item.lengths] for item in items])
    digest = hashlib.sha256(asked.encode()).hexdigest()
    store = Scores(
        _directory(opened), _file(task.name, opened), {**opened.facts, "task": task.name, "items": digest}
    )
    owner = [(number, choice) for number, item in enumerate(items) for choice in range(len(item.requests))]
    try:
        done = 0
        for batch in plan.batches:
            progress(done, len(plan.parts))
            done += len(batch)
            if all(index in store.found for index in batch):
                continue
            entries: list[dict[str, Any]] = []
            for index, score in zip(batch, scorer.score_batch(plan, batch), strict=True):
                number, choice = owner[plan.parts[index].request]
                logprob, greedy = score
                entries.append(
                    {"n": index, "item": number, "choice": choice, "logprob": logprob, "greedy": greedy}
                )
            store.add(entries)
            store.found.update({entry["n"]: entry for entry in entries})
        progress(done, len(plan.parts))
    finally:
        store.close()
    scores = [[Score(0.0, True) for _ in item.requests] for item in items]
    for index, part in enumerate(plan.parts):
        number, choice = owner[part.request]
        entry, before = store.found[index], scores[number][choice]
        scores[number][choice] = Score(before.logprob + entry["logprob"], before.greedy and entry["greedy"])
    return {
        **{name: figure.as_json() for name, figure in measure(task, items, scores).items()},
        "items": len(items),
        "chance": _chance(items),
        "requests": len(pairs),
        "truncated": plan.truncated,
        "longer_than_context": plan.split,
        "items_sha256": digest,
        "scores": store.path.name,
    }


def _chance(items: Sequence[Item]) -> float | None:
    """The accuracy of guessing; None where there is nothing to choose from."""
    if any(len(item.requests) == 1 for item in items):
        return None
    return sum(1 / len(item.requests) for item in items) / len(items)


def _evaluate_code(
    name: str,
    documents: list[dict[str, Any]],
    opened: Opened,
    sampling: Sampling,
    sandbox: Sandbox,
    progress: Progress,
) -> dict[str, Any]:
    digest = hashlib.sha256(json.dumps(documents).encode()).hexdigest()
    settings = {
        "task": name,
        "items": digest,
        "samples": sampling.samples,
        "temperature": sampling.temperature,
        "seconds": sandbox.seconds,
    }
    store = Scores(_directory(opened), _file(name, opened), {**opened.facts, **settings})
    try:
        score = evaluate_code(opened.loaded, CODE[name], documents, sampling, sandbox, store, progress)
    finally:
        store.close()
    return {
        **{key: figure.as_json() for key, figure in score.metrics.items()},
        "items": score.items,
        "samples": sampling.samples,
        "temperature": sampling.temperature,
        "outcomes": score.outcomes,
        "items_sha256": digest,
        "scores": store.path.name,
    }


def _directory(opened: Opened) -> Path:
    return opened.results / "scores"


def _file(task: str, opened: Opened) -> str:
    return f"{task}-step-{opened.step:08d}"
