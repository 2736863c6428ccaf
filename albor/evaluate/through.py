"""lm-eval itself over a run's model: any of its tasks, where the hub that has their items is reachable."""

from __future__ import annotations

import difflib
from typing import TYPE_CHECKING, Any

from albor.errors import AlborError, ConfigError, Problem
from albor.evaluate import published
from albor.evaluate.model import Opened, open_model
from albor.evaluate.tasks import TASKS

if TYPE_CHECKING:
    from albor.evaluate.command import Request


def evaluate_through(request: Request, tasks: str) -> tuple[str, dict[str, Any], Opened]:
    """Name, results and model, as `albor.evaluate.command` stores them.

    Raises ConfigError where lm-eval is not installed or does not know a task.
    """
    try:
        import lm_eval
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        problem, remedy = "lm-eval is not installed", "run: pip install 'albor[eval]'"
        raise ConfigError([Problem("--through", problem, remedy, "command line")]) from error
    from albor.evaluate.harness import AlborLM

    names = [
        name for part in tasks.split(",") for name in (TASKS if part.strip() == "all" else [part.strip()])
    ]
    names = list(dict.fromkeys(name for name in names if name))
    manager = TaskManager()
    _check_names(names, manager.all_tasks)
    opened = open_model(request.run, request.device, request.dtype, request.batch_tokens)
    try:
        outcome = lm_eval.simple_evaluate(
            model=AlborLM.over(opened),
            tasks=names,
            limit=request.limit,
            task_manager=manager,
            log_samples=False,
            confirm_run_unsafe_code=False,
        )
    except (ConnectionError, OSError) as error:
        raise AlborError(
            f"lm-eval could not load a task: {error}; it reads the items from the Hugging Face hub: without "
            "--through they come from a package"
        ) from error
    counts = outcome.get("n-samples", {})
    results = {name: _figures(figures, counts.get(name)) for name, figures in outcome["results"].items()}
    found: dict[str, Any] = {"through": f"lm-eval {lm_eval.__version__}", "results": results}
    compared = [name for name in results if name in TASKS]
    if compared:
        found["published"] = published.as_json(compared)
    suffix = "" if request.limit is None else f"-first-{request.limit}"
    name = "all" if set(names) == set(TASKS) else "+".join(names)
    return f"lm-eval-{name}{suffix}", found, opened


def _check_names(names: list[str], known: list[str]) -> None:
    problems = []
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            remedy = f"did you mean {near[0]}?" if near else "lm-eval ls tasks lists them"
            problems.append(Problem("--tasks", f"lm-eval has no task {name}", remedy, "command line"))
    if not names:
        problems.append(Problem("--tasks", "names no task", "lm-eval ls tasks lists them", "command line"))
    if problems:
        raise ConfigError(problems)


def _figures(figures: dict[str, Any], counts: dict[str, int] | None) -> dict[str, Any]:
    """lm-eval's `acc,none` and `acc_stderr,none` as albor has them."""
    found: dict[str, Any] = {"items": None if counts is None else counts["effective"]}
    for key, value in figures.items():
        metric, _, variant = key.partition(",")
        if variant and not metric.endswith("_stderr") and isinstance(value, int | float):
            error = figures.get(f"{metric}_stderr,{variant}")
            name = metric if variant == "none" else key
            found[name] = {"value": value, "stderr": error if isinstance(error, int | float) else None}
    return found
