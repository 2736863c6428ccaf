"""`albor train` from the configuration to the final report."""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from rich.console import Console

from albor import faults
from albor.architecture import IGNORED_TARGET
from albor.build import build_id
from albor.checkpoint import CHECKPOINTS, checkpoint_name, list_checkpoints
from albor.config import RunConfig
from albor.data.loader import validation_batches
from albor.data.prepare import PreparedData, check_horizon, prepare
from albor.errors import AlborError, Alert, ConfigError, Diverged, Interrupted, Problem
from albor.evaluate.validation import Validation
from albor.generate.smoke import Finding, summary
from albor.generate.smoke import as_json as smoke_as_json
from albor.memory.estimate import Estimate
from albor.memory.process import CardProcess
from albor.memory.shortage import is_out_of_memory
from albor.pretrained.source import open_for
from albor.progress import show_progress
from albor.trackers.feed import CLOSE_SECONDS, Trackers
from albor.trackers.installed import missing
from albor.train.display import Display, make_display
from albor.train.loop import Loop, Sample, draw_samples, evaluate_session, smoke_test_session
from albor.train.memory_record import MemoryRecord
from albor.train.metrics import MetricsLog
from albor.train.report import Summary, compression_bits_per_byte, draw_loss_curve, print_summary
from albor.train.run_directory import (
    claim,
    environment_changes,
    has_begun,
    replace_file,
    run_directory,
    write_description,
)
from albor.train.saver import preflight
from albor.train.session import (
    Session,
    changes_since,
    checkpoint_bytes,
    find_checkpoints,
    open_session,
)
from albor.train.signals import Stopped, StopRequest

_STOP_SECONDS = 10.0  # for trackers: schedulers give half a minute or more, of which the save took some


@dataclass(frozen=True)
class Outcome:
    """What a finished run has to show."""

    directory: Path
    checkpoint: Path | None
    steps: int
    tokens: int
    validation: Validation
    compressors: dict[str, float]  # bits per byte of gzip and xz on the text of the validation
    samples: list[Sample]
    losses: list[tuple[int, float]]  # (step, training loss)
    validation_losses: list[tuple[int, float]]
    smoke: list[Finding] | None = None  # None: it was not asked for, or there was no memory to write in

    def as_json(self) -> dict[str, Any]:
        """What `albor train --json` prints and `eval/final.json` holds; what is not finite is null."""
        values = {
            "run": str(self.directory),
            "checkpoint": str(self.checkpoint) if self.checkpoint else None,
            "step": self.steps,
            "tokens": self.tokens,
            **self.validation.metrics(),
            "val/target_tokens": self.validation.target_tokens,
            "val/text_bytes": self.validation.text_bytes,
            **{f"{name}/bits_per_byte": bits for name, bits in self.compressors.items()},
            "samples": [asdict(sample) for sample in self.samples],
            "smoke": summary(self.smoke) if self.smoke else None,
        }
        odd = [key for key, value in values.items() if isinstance(value, float) and not math.isfinite(value)]
        return values | dict.fromkeys(odd)


def run_training(
    target: Estimate,
    given: str,
    resume: str,
    console: Console,
    stop: StopRequest,
    *,
    as_json: bool = False,
) -> Outcome:
    """Trains the configuration of `target` to its end, from its newest checkpoint if there is one.

    `given` is the configuration's text as the user wrote it; `target` has been checked against the machine;
    `stop` has been entered. Raises an AlborError for everything that a user can mend; whatever ends the run
    is recorded in events.jsonl.
    """
    config, plan, device = target.config, target.plan, target.device
    say = Display(console).message
    directory = run_directory(config)
    if problems := missing(config.track.to, "track.to"):
        raise ConfigError(problems)
    if faults.ACTIVE:
        say(f"{faults.VARIABLE} is set: this run will fail on purpose ({faults.ACTIVE})")
    if device == "cuda" and not torch.cuda.is_available():
        remedy = "install a driver that PyTorch finds, or set device to cpu"
        raise ConfigError([Problem("device", "cuda, but PyTorch finds no CUDA device here", remedy)])
    card = context = None
    if device == "cuda":
        card = CardProcess()  # before anything else uses the card
        torch.cuda.synchronize()  # which makes the context
        context = card.read()
    stop.limit.set(config, checkpoint_bytes(plan))
    with claim(directory, say) as alone:
        log = MetricsLog(directory, on_failure=say)
        with _RecordedEnd(config, log, stop) as end:
            sources = find_checkpoints(config, resume, say)
            if not sources:
                open_for(config.model)  # before minutes go into data, for what does not fit it
            if device == "cuda":  # before minutes go into data: without a C compiler this fails
                from albor.train.rehearsal import compile_kernels  # imports Triton

                say(f"attention: {plan.attention}")
                compile_kernels(config, plan, say)
            with show_progress(console) as progress:
                data = prepare(config, progress)
            for report in data.reports:
                for line in report.lines():  # documents that were left out, by reason: never silently
                    say(line)
            if problems := [*check_horizon(config, data), *_check_prompts(config, data)]:
                raise ConfigError(problems)
            session = end.session = open_session(config, data, plan, device, sources, say)
            if session.left_out and (problems := check_horizon(config, data, session.left_out)):
                raise ConfigError(problems)
            preflight(session, say, alone=alone)
            if config.track.to:
                trackers = Trackers(directory, config, lambda text: log.on_failure(text), log.event)
                log.follower = end.trackers = trackers
            _describe(session, target, given, log, say)
            display = make_display(
                console, config.steps, first_step=session.state.step, title=config.name, json=as_json
            )
            log.on_failure = display.message
            memory = MemoryRecord(target, session.trainer.arena, log, card, context)
            session.trainer.before_capture(memory.before_capture)
            for row in log.events():  # earlier processes have timed saves on this disk
                if row.get("event") == "checkpoint" and isinstance(row.get("seconds"), float):
                    stop.limit.expect_save(row["seconds"])
            with display:
                stop.defer()
                outcome = _train_and_report(session, log, display, stop, memory, target.peak_flops)
            (directory / "eval").mkdir(exist_ok=True)
            if outcome.smoke:
                smoke = {"step": outcome.steps, **smoke_as_json(outcome.smoke)}
                replace_file(directory / "eval" / "smoke.json", json.dumps(smoke, indent=1) + "\n")
            replace_file(directory / "eval" / "final.json", json.dumps(outcome.as_json(), indent=1) + "\n")
            if end.trackers is not None:
                end.trackers.summary(outcome.steps, outcome.as_json())
    return outcome


class _RecordedEnd:
    """While entered, whatever ends the run has a line in events.jsonl, and a shortage of memory becomes an
    AlborError. A new run that is refused before it begins leaves no directory, and no line.
    """

    def __init__(self, config: RunConfig, log: MetricsLog, stop: StopRequest):
        self._config, self._log, self._stop = config, log, stop
        self.session: Session | None = None  # from when it is open
        self.trackers: Trackers | None = None  # from when they are fed

    def __enter__(self) -> _RecordedEnd:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        step = self.session.state.step if self.session else None
        if error is None:
            self._log.event("finished", step)
        elif isinstance(error, Interrupted | Diverged | Alert):
            pass  # recorded where they arose
        elif has_begun(run_directory(self._config)):
            if isinstance(error, Stopped):
                self._log.event("stopped", step, reason=self._stop.reason)
            else:
                self._log.event("failed", step, error=f"{type(error).__name__}: {error}")
        if self.trackers is not None:
            code = 0 if error is None else error.exit_code if isinstance(error, AlborError) else 1
            self.trackers.close(code, CLOSE_SECONDS if error is None else _STOP_SECONDS)
        if error is not None and is_out_of_memory(error):
            raise AlborError(_explain_shortage(error, self._config, step)) from error


def _describe(
    session: Session, target: Estimate, given: str, log: MetricsLog, say: Callable[[str], None]
) -> None:
    """What the run is and how it began: its files, the first events, and what is other than it was."""
    config, step, source = session.config, session.state.step, session.resumed_from
    changes = changes_since(config, source) if source else []
    others = environment_changes(source.parent.parent, target.plan) if source else []
    write_description(session.directory, given, target)
    if faults.ACTIVE:
        log.event("faults", step, faults=faults.ACTIVE)
    began = {"source": str(source) if source else None, "build": build_id()}
    log.event("resumed" if source else "started", step, **began)
    if source is None and session.begun_from is not None:
        log.event("init_from", step, source=config.model.init_from, sha256=session.begun_from)
    for kind, found in (("config_changed", changes), ("environment_changed", others)):
        for change in found:
            log.event(kind, step, key=change.key, before=change.before, after=change.after)
    if changes:
        say(f"the run goes on with another configuration: {', '.join(map(str, changes))}")
    if others:
        say(f"the run goes on where results may be rounded otherwise: {', '.join(map(str, others))}")
    say(f"{session.directory}: {_describe_start(config, step, source)}")


def _explain_shortage(error: BaseException, config: RunConfig, step: int | None) -> str:
    saved = [path.name for path in list_checkpoints(run_directory(config) / CHECKPOINTS)][-1:]
    goes_on = f"goes on from {saved[0]}" if saved else "starts anew, for there is no checkpoint yet"
    reason = str(error).partition("\n")[0] or type(error).__name__
    when = "before the first step" if step is None else f"after step {step} of {config.steps}"
    return (
        f"out of memory {when}: {reason}; find out what else uses it (albor vram-estimate shows what the run "
        f"needs); the same command then {goes_on}"
    )


def _train_and_report(
    session: Session,
    log: MetricsLog,
    display: Display,
    stop: StopRequest,
    memory: MemoryRecord,
    peak_flops: float | None,
) -> Outcome:
    loop = Loop(session, log, display, stop, memory, peak_flops)
    try:
        loop.run()
        return _report(session, log, stop)
    except Stopped:
        raise loop.save_and_stop() from None
    finally:
        loop.saver.close()
        memory.at_end(session.state.step)


def _check_prompts(config: RunConfig, data: PreparedData) -> list[Problem]:
    """A problem for each prompt that leaves no room in the context to go on from it."""
    context = config.model.max_position_embeddings
    lengths = [len(data.tokenizer.encode(prompt)) + 1 for prompt in config.evaluate.prompts]
    return [
        Problem(
            f"evaluate.prompts[{index}]",
            f"has {length} tokens, and the context holds {context} (model.max_position_embeddings)",
            "shorten it",
        )
        for index, length in enumerate(lengths)
        if length >= context
    ]


def _describe_start(config: RunConfig, step: int, source: Path | None) -> str:
    if source is None:
        begun = config.model.init_from
        return f"a new run from the weights of {begun}" if begun else "a new run"
    if step == config.steps:
        return f"finished already, at step {step}; here is its report again"
    return f"going on from step {step} ({source})"


def _report(session: Session, log: MetricsLog, stop: StopRequest) -> Outcome:
    """Validation on all held-out text that `evaluate.final_batches` covers, and what compressors make of that
    text.
    """
    config = session.config
    validation = evaluate_session(session, config.evaluate.final_batches, stop)
    rows = log.rows()
    return Outcome(
        directory=session.directory,
        checkpoint=session.directory / CHECKPOINTS / checkpoint_name(session.state.step),
        steps=session.state.step,
        tokens=session.tokens,
        validation=validation,
        compressors=compression_bits_per_byte(_validation_text(session)),
        samples=draw_samples(session, stop),
        smoke=smoke_test_session(session, stop),
        losses=[(row["step"], row["train/loss"]) for row in rows if row.get("train/loss") is not None],
        validation_losses=[(row["step"], row["val/loss"]) for row in rows if row.get("val/loss") is not None],
    )


def _validation_text(session: Session) -> bytes:
    """The text that the final validation's targets stand for."""
    config, tokenizer = session.config, session.data.tokenizer
    sequences = config.evaluate.final_batches * config.train.micro_batch_size
    batches = validation_batches(session.data.validation, config.data.sequence_length, sequences, 1)
    return b"".join(tokenizer.decode_bytes(targets[targets != IGNORED_TARGET]) for _, targets in batches)


def print_outcome(outcome: Outcome, console: Console) -> None:
    """The loss curve, bits per byte beside gzip's and xz's, the samples, and where everything lies."""
    steps, losses = zip(*outcome.losses, strict=True) if outcome.losses else ((), ())
    width = min(console.width, 100)
    colour = console.is_terminal and not console.no_color
    console.print()
    print(draw_loss_curve(steps, losses, outcome.validation_losses, width, colour), file=console.file)
    directory = outcome.directory
    print_summary(
        console,
        Summary(
            validation_loss=outcome.validation.loss,
            bits_per_byte=outcome.validation.bits_per_byte,
            compression=outcome.compressors,
            samples=[(sample.prompt, sample.text or "") for sample in outcome.samples],
            smoke=summary(outcome.smoke) if outcome.smoke else None,
            places={
                "run": str(directory),
                "metrics": str(directory / "metrics.jsonl"),
                "configuration": str(directory / "config.resolved.yaml"),
                "checkpoint": str(outcome.checkpoint),
                "write with it": f"albor generate {shlex.quote(str(directory))} --prompt 'def '",
            },
        ),
    )
