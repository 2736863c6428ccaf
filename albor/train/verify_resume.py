"""`albor verify-resume`: whether a resumed run is the one that was never stopped, on this machine and data.

Two runs of the real `albor train`, each command a process of its own: one that nothing disturbs, and one that
is stopped in the middle of a step (through ALBOR_FAULT, see `albor.faults`) and started again. Then
everything that the next step depends on is compared bit for bit. Where it differs, the first run is made once
more: a machine that repeats nothing cannot resume anything either. Nothing but the data cache and a temporary
directory below `runs_dir` is written to.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Console
from safetensors import safe_open

from albor.checkpoint import CHECKPOINTS, checkpoint_name, read_state, verify
from albor.child_process import Child
from albor.config import RunConfig
from albor.data.prepare import check_horizon, prepare
from albor.errors import AlborError, ConfigError, Interrupted, Problem
from albor.faults import VARIABLE
from albor.filelock import lock_file
from albor.memory.estimate import Estimate, check_fits
from albor.progress import show_progress, signals_unwind
from albor.runlog import EVENTS, METRICS, read_rows
from albor.runs.owner import LOCK
from albor.train.saver import size_on_disk
from albor.units import format_bytes

SignalName = Literal["kill", "term"]

_UNINTERRUPTED, _STOPPED, _REPEATED = "uninterrupted", "stopped", "repeated"
# What a row of metrics.jsonl says of the training, and not of the clock or the process.
_LEARNED = ("tokens", "train/loss", "train/lr", "train/grad_norm", "train/epoch")
_POLL_SECONDS = 0.1
_TEMPORARY = ".verify-resume-"
_ABANDONED_AFTER_SECONDS = 10.0  # covers the moment between the making of a directory and its lock
_CHECKPOINTS = 4  # at a time: those of three runs, of which one replaces its own


@dataclass(frozen=True)
class Comparison:
    """One kind of thing, in both runs."""

    what: str
    compared: int
    unit: str
    difference: str | None  # the first, and where; None: equal in every bit


@dataclass(frozen=True)
class Verification:
    """What `albor verify-resume` found."""

    steps: int
    checkpoint_every: int
    signal: str
    stopped_in: int  # the step
    resumed_from: int
    comparisons: list[Comparison]
    # Where the resumed run differs: whether two undisturbed ones are equal, and their first difference.
    repeats: bool | None = None
    repetition_differs: str | None = None

    @property
    def identical(self) -> bool:
        """Whether the resumed run is the one that was never stopped."""
        return all(comparison.difference is None for comparison in self.comparisons)

    def as_json(self) -> dict[str, Any]:
        """What `--json` prints."""
        return {"identical": self.identical, **asdict(self)}


def verify_resume(
    path: Path,
    overrides: Sequence[str],
    config: RunConfig,
    target: Estimate,
    steps: int,
    how: SignalName,
    console: Console,
) -> Verification:
    """Trains `steps` steps of `config`, which `path` and `overrides` give, with and without a stop in
    between.

    Raises DoesNotFit where the plan is too large, and AlborError with a command's own words where one fails
    for another reason than the stop.
    """
    if steps >= config.steps:
        remedy = f"ask for at most {config.steps - 1}"
        problem = f"is {steps}, and the run has {config.steps} steps, of which the last is evaluated"
        raise ConfigError([Problem("--steps", problem, remedy, "command line")])
    check_fits(target)
    with show_progress(console) as progress:
        data = prepare(config, progress)
    if problems := check_horizon(config, data):
        raise ConfigError(problems)

    every = max(1, steps // 4)
    stopped_in = min(steps, 2 * every + 2)  # so that there is a step behind a checkpoint to be done again
    with signals_unwind(), _temporary_directory(Path(config.runs_dir)) as directory:
        _check_room(directory, target)
        commands = _Commands(path, overrides, config, directory, steps, every, console)
        end = f"step.updated:{steps}:term"
        commands.run(_UNINTERRUPTED, end, Interrupted.exit_code)
        code = -signal.SIGKILL if how == "kill" else Interrupted.exit_code
        commands.run(_STOPPED, f"step.micro_batch:{stopped_in}:{how}", code)
        commands.run(_STOPPED, end, Interrupted.exit_code, "resumed")
        stopped = directory / _STOPPED
        resumed = [row["step"] for row in read_rows(stopped / EVENTS) if row.get("event") == "resumed"]
        if not resumed:
            raise AlborError(
                f"the run was stopped in step {stopped_in}, before its first checkpoint was complete, so "
                "nothing was resumed; give more --steps"
            )
        comparisons = compare_runs(directory / _UNINTERRUPTED, stopped, steps)
        signal_name = "SIGKILL" if how == "kill" else "SIGTERM"
        found = Verification(steps, every, signal_name, stopped_in, resumed[-1], comparisons)
        if found.identical:
            return found
        commands.run(_REPEATED, end, Interrupted.exit_code)
        again = compare_runs(directory / _UNINTERRUPTED, directory / _REPEATED, steps)
    differences = [f"{one.what}: {one.difference}" for one in again if one.difference]
    return replace(found, repeats=not differences, repetition_differs=next(iter(differences), None))


class _Commands:
    """`albor train` of one configuration in runs of its own, one command after the other."""

    def __init__(
        self,
        path: Path,
        overrides: Sequence[str],
        config: RunConfig,
        directory: Path,
        steps: int,
        every: int,
        console: Console,
    ):
        self._directory, self._steps, self._console = directory, steps, console
        # Keys that may all differ when a run goes on: none changes what is learned.
        self._arguments = [
            str(path),
            *overrides,
            f"runs_dir={json.dumps(str(directory))}",
            f"checkpoint.every_steps={every}",
            "checkpoint.keep_last=1",
            "checkpoint.keep_every=null",
            "checkpoint.keep_best=false",
            f"evaluate.every_steps={config.steps}",  # a step that none of the runs comes to
            "evaluate.prompts=[]",
            "log.every_steps=1",
            "train.max_hours=null",
            "alerts={}",
            "track.to=[]",
        ]

    def run(self, name: str, fault: str, code: int, stage: str | None = None) -> None:
        """Raises AlborError unless the command ends with `code`."""
        stage = stage or name
        self._console.out(f"{stage} run", highlight=False)
        with self._console.status(f"{stage}: starting") as status:
            found, output = run_command(
                [*self._arguments, f"name={name}"],
                {**os.environ, VARIABLE: fault},
                lambda: status.update(f"{stage}: step {self._steps_done(name)} of {self._steps}"),
            )
        if found != code:
            tail = "\n".join(output.splitlines()[-15:])
            raise AlborError(f"the {stage} run ended with {found}, not with {code}; it said:\n{tail}")

    def _steps_done(self, name: str) -> int:
        return max((row.get("step", 0) for row in read_rows(self._directory / name / METRICS)), default=0)


def run_command(
    arguments: list[str], environment: dict[str, str], while_it_runs: Callable[[], None]
) -> tuple[int, str]:
    """Runs `albor train ARGUMENTS`, which does not outlive this process, however that ends.

    Returns its exit code, or minus the number of the signal that ended it, and its last words. They are kept
    in memory: the disk may be what it fails of.
    """
    with Child(["train", *arguments], environment=environment) as child:
        while (code := child.poll()) is None:
            while_it_runs()
            time.sleep(_POLL_SECONDS)
    return code, child.last_words


def _check_room(directory: Path, target: Estimate) -> None:
    """Raises AlborError where the disk does not take what will be written."""
    needed, free = _CHECKPOINTS * size_on_disk(target.plan), shutil.disk_usage(directory).free
    if free < needed:
        raise AlborError(
            f"verify-resume writes {_CHECKPOINTS} checkpoints, {format_bytes(needed)} together, and on the "
            f"disk of {directory.parent} {format_bytes(free)} are free; free some, or move runs_dir"
        )


@contextmanager
def _temporary_directory(runs_dir: Path) -> Iterator[Path]:
    """A directory below `runs_dir`, on the disk that the run's own checkpoints will lie on. It is locked, and
    those that killed commands have left are removed.
    """
    try:
        created = [folder for folder in (runs_dir, *runs_dir.parents) if not folder.exists()]
        runs_dir.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(runs_dir)
        directory = Path(tempfile.mkdtemp(prefix=_TEMPORARY, dir=runs_dir))
        locked = lock_file(directory / LOCK)
    except OSError as error:
        raise AlborError(f"runs_dir: {runs_dir} cannot be used: {error.strerror}") from error
    try:
        yield directory
    finally:
        shutil.rmtree(directory, ignore_errors=True)
        if locked is not None:
            os.close(locked[0])
        with suppress(OSError):
            for folder in created:
                folder.rmdir()


def _remove_abandoned(runs_dir: Path) -> None:
    for directory in runs_dir.glob(f"{_TEMPORARY}*/"):
        with suppress(OSError):  # another process has just removed it
            if time.time() - directory.stat().st_mtime < _ABANDONED_AFTER_SECONDS:
                continue
            locked = lock_file(directory / LOCK)
            if locked is None:
                continue  # its command lives
            handle, refusal = locked
            if not refusal:
                shutil.rmtree(directory, ignore_errors=True)
            os.close(handle)


def compare_runs(uninterrupted: Path, resumed: Path, step: int) -> list[Comparison]:
    """The checkpoints of `step` and the rows up to it of two run directories, the undisturbed one first.

    Raises CheckpointError where one is missing or damaged.
    """
    one, other = (run / CHECKPOINTS / checkpoint_name(step) for run in (uninterrupted, resumed))
    files = [sorted(verify(path).tensors) for path in (one, other)]
    comparisons = [_compare_tensors(name, one / name, other / name) for name in files[0]]
    if files[0] != files[1]:
        comparisons.append(Comparison("files", len(files[0]), "files", f"{files[0]} and {files[1]}"))
    comparisons.append(_compare_values("state", "values", read_state(one), read_state(other)))
    rows = [_learned(run / METRICS) for run in (uninterrupted, resumed)]
    comparisons.append(_compare_values("logged losses", "steps", *rows))
    return comparisons


def _compare_tensors(file: str, one: Path, other: Path) -> Comparison:
    what = file.removesuffix(".safetensors")
    with safe_open(one, framework="pt") as first, safe_open(other, framework="pt") as second:
        names, other_names = list(first.keys()), list(second.keys())
        difference = None if names == other_names else "they do not hold the same tensors"
        for name in names if difference is None else ():
            difference = first_difference(first.get_tensor(name), second.get_tensor(name))
            if difference:
                difference = f"{name}{difference}"
                break
    return Comparison(what, len(names), "tensors", difference)


def first_difference(one: torch.Tensor, other: torch.Tensor) -> str | None:
    """Where two tensors first differ in a bit, and how much of them does; None where nothing does."""
    if one.dtype != other.dtype or one.shape != other.shape:
        return f" is {one.dtype} {list(one.shape)}, and {other.dtype} {list(other.shape)}"
    bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[one.element_size()]
    differs = one.flatten().view(bits) != other.flatten().view(bits)  # NaN is equal to itself so
    count = int(differs.sum())
    if not count:
        return None
    flat = int(differs.int().argmax())
    place = [int(i) for i in torch.unravel_index(torch.tensor(flat), one.shape)]
    values = (float(tensor.flatten()[flat]) for tensor in (one, other))
    first, second = (format(value, ".9g") for value in values)
    share = f"{count:,} of {one.numel():,} values differ"
    return f"{place} is {first} uninterrupted and {second} resumed; {share}"


def _learned(metrics: Path) -> dict[str, list[dict[str, Any]]]:
    """The training rows of each step, of which there is to be one, without what clock and process decide."""
    found: dict[str, list[dict[str, Any]]] = {}
    for row in read_rows(metrics):
        if "train/loss" in row:
            kept = {key: row[key] for key in row if key in _LEARNED or key.startswith("gradients/")}
            found.setdefault(f"step {row['step']}", []).append(kept)
    return found


def _compare_values(what: str, unit: str, one: dict[str, Any], other: dict[str, Any]) -> Comparison:
    for key in dict.fromkeys([*one, *other]):
        first, second = (json.dumps(values.get(key), sort_keys=True) for values in (one, other))
        if first != second:
            difference = f"{key} is {first} uninterrupted and {second} resumed"
            return Comparison(what, len(one), unit, difference)
    return Comparison(what, len(one), unit, None)


def print_verification(found: Verification, console: Console) -> None:
    """A small table, and the verdict."""
    lines = [
        f"stopped in step {found.stopped_in} by {found.signal}, resumed from step {found.resumed_from}, "
        f"compared after step {found.steps}",
        "",
    ]
    for comparison in found.comparisons:
        verdict = "differ" if comparison.difference else "equal"
        lines.append(f"  {comparison.what:<16}{comparison.compared:>6} {comparison.unit:<10}{verdict}")
        if comparison.difference:
            lines.append(f"    {comparison.difference}")
    verdict = "identical, bit for bit" if found.identical else "NOT the run that was never stopped"
    lines += ["", f"the resumed run: {verdict}"]
    if found.repeats:
        lines.append("two undisturbed runs are equal: it is the resume that is not exact, which is a bug")
    elif not found.identical:
        lines += [
            "two undisturbed runs differ as well: this machine does not repeat a run, however it is resumed",
            f"    {found.repetition_differs}",
        ]
    for line in lines:
        console.out(line, highlight=False)
