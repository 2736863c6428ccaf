"""When things happen in a run: steps, rows, checkpoints, evaluations, samples, the end. Cadence only.

At one step, saving comes before evaluating: a failure in an evaluation never costs training.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import NoReturn

from albor import faults
from albor.alerts import Alarm, Watch
from albor.data.loader import validation_batches
from albor.errors import Alert, Interrupted
from albor.evaluate.validation import Validation, validate
from albor.generate.generate import generate
from albor.generate.sampler import NotFinite
from albor.generate.smoke import Finding, smoke_test
from albor.memory.plan import evaluation_batch
from albor.memory.shortage import give_back, is_out_of_memory
from albor.model.decode import Decoder
from albor.runlog import known_metrics
from albor.seeds import derive_seed
from albor.train.display import Display
from albor.train.divergence import NOT_FINITE, Divergence
from albor.train.memory_record import MemoryRecord
from albor.train.metrics import MetricsLog
from albor.train.saver import Saver
from albor.train.session import Session
from albor.train.signals import Stopped, StopRequest
from albor.train.step import Batch, StepResult


@dataclass(frozen=True)
class Sample:
    """A prompt, and how the model went on."""

    prompt: str
    text: str | None  # None: its logits were not finite


@dataclass
class Clock:
    """Time spent in training steps since the last row, without saving and evaluating."""

    seconds: float = 0.0
    tokens: int = 0

    def take(self) -> float | None:
        """Tokens per second since the last call; None before the first step."""
        rate = self.tokens / self.seconds if self.seconds else None
        self.seconds, self.tokens = 0.0, 0
        return rate


class Loop:
    """Trains a session to its last step."""

    def __init__(
        self,
        session: Session,
        log: MetricsLog,
        display: Display,
        stop: StopRequest,
        memory: MemoryRecord,
        peak_flops: float | None = None,
    ):
        self.session, self.log, self.display, self.stop = session, log, display, stop
        self.memory, self.peak_flops = memory, peak_flops
        self.clock = Clock()
        self.saver = Saver(session, log, display, stop)
        self.divergence = Divergence(session, log, display.message)
        self._watch = Watch(session.config.alerts)

    def run(self) -> None:
        """Steps until the configured end.

        Raises Stopped when a signal or the time limit asked for the end, and Diverged when steps stay
        non-finite.
        """
        session, config = self.session, self.session.config
        self.log.truncate_after(session.state.step)
        self._look_back()
        self._catch_up()
        while session.state.step < config.steps:
            self.stop.check()
            self.step()
        if self.saver.saved_step != session.state.step:  # a finished run, which goes on under another name
            self._save(planned=True)

    def step(self) -> None:
        """One step, and what is due after it."""
        session = self.session
        position, before, started = session.loader.state(), session.state.guard, time.perf_counter()
        try:
            with self.stop.limit.step():
                result, session.state = session.trainer.step(session.batches(self.stop.check), session.state)
        except Stopped:  # between two micro-batches: as if the step had not begun
            session.loader.restore(position)
            raise
        self.clock.seconds += time.perf_counter() - started
        self.clock.tokens += session.config.tokens_per_step
        self.divergence.follow(result, before, position)
        self._after_step(result)
        self.memory.after_step(session.state.step)

    def _after_step(self, result: StepResult) -> None:
        config, step = self.session.config, self.session.state.step
        self.saver.poll()
        last, alarm, metrics = step == config.steps, None, self._metrics(result)
        due = step % config.log.every_steps == 0 or last or step == 1 or result.verdict.kind != "good"
        if due or self._watch.changes(metrics):
            alarm = self._log_row(metrics)
        reason = self.divergence.reason_to_roll_back()
        # While steps are skipped the weights may be past saving, and would push good checkpoints out.
        owed = last or (self._owes_save() and result.updated)
        if reason is None and owed and not self._save(planned=True):
            reason = f"{NOT_FINITE}, and were not saved"
        if alarm is not None:
            self._stop_by(alarm)
        if reason is not None:
            self._roll_back(reason)
            return
        if step % config.evaluate.every_steps == 0 or last:
            self._evaluate()

    def _owes_save(self) -> bool:
        """Whether a step at which the cadence saves has come since it last did."""
        guard, every = self.session.state.guard, self.session.config.checkpoint.every_steps
        return self.session.state.step // every > (guard.anchor or 0) // every

    def _catch_up(self) -> None:
        """The checkpoint's step was evaluated after it was saved: the log has the result, or we evaluate
        now.
        """
        step, config = self.session.state.step, self.session.config
        if step == 0 or (step % config.evaluate.every_steps and step < config.steps):
            return
        rows = [row for row in self.log.rows() if row["step"] == step and "val/loss" in row]
        if not rows:
            self._evaluate()
        elif rows[-1]["val/loss"] is not None:
            self._note_best(rows[-1]["val/loss"])

    def _roll_back(self, reason: str) -> None:
        self.saver.finish()
        self.divergence.roll_back(reason)
        self.saver.went_back()
        self._catch_up()

    def _look_back(self) -> None:
        """What a stop left to be done: an alert that still holds, a rollback that is due."""
        if self.session.config.alerts:
            for row in self.log.rows():
                self._watch.judge(known_metrics(row))
            for alarm in self._watch.holding("stop"):
                self._stop_by(alarm)
        if reason := self.divergence.reason_to_roll_back():
            self._roll_back(reason)

    def _judge(self, metrics: Mapping[str, float | None]) -> Alarm | None:
        """Holds a row that was logged against the alerts, and returns the one that is to end the run."""
        alarms = self._watch.judge(metrics)
        for alarm in alarms:
            self.log.event("alert", self.session.state.step, **alarm.as_json())
            self.display.message(f"step {self.session.state.step}: {alarm}")
        return next((alarm for alarm in alarms if alarm.action == "stop"), None)

    def _stop_by(self, alarm: Alarm) -> NoReturn:
        saved = self._save_to_stop()
        self.log.event("stopped", self.session.state.step, reason=str(alarm))
        raise Alert(
            f"{alarm} after step {self.session.state.step}; {saved} once that rule is changed or removed "
            "(alerts)"
        )

    def _metrics(self, result: StepResult) -> dict[str, float | None]:
        """What is known of every step; the alerts see it whether or not a row is due."""
        return {
            "train/loss": result.loss,
            "train/lr": result.lr,
            "train/grad_norm": result.grad_norm,
            "train/epoch": max(self.session.loader.epochs()),
            **{f"gradients/{group}": norm for group, norm in result.gradient_norms.items()},
        }

    def _log_row(self, metrics: Mapping[str, float | None]) -> Alarm | None:
        """Logs these and what is measured for a row. Returns the alarm that it sets off, if it is to end the
        run.
        """
        session = self.session
        rate = self.clock.take()
        flops = session.trainer.architecture.flops_per_token(session.config.data.sequence_length)
        row = {
            **metrics,
            "train/tokens_per_second": rate,
            "train/mfu": rate * flops / self.peak_flops if rate and self.peak_flops else None,
            **self.memory.row(),
        }
        self.log.row(session.state.step, session.tokens, row)
        self.display.row(session.state.step, row)
        return self._judge(row)

    def _save(self, *, planned: bool) -> bool:
        """Saves the state, unless it is not finite: then False. A rollback goes back to a `planned` one."""
        session = self.session
        if not session.is_finite():
            return False
        if planned:
            guard = replace(session.state.guard, anchor=session.state.step)
            session.state = replace(session.state, guard=guard)
        self.saver.save(prune=not session.state.guard.skips)
        return True

    def _evaluate(self) -> None:
        session = self.session
        config, step, alarm = session.config, session.state.step, None
        with self._left_out_if_short_of_memory("evaluation"):
            validation = evaluate_session(session, config.evaluate.batches, self.stop)
            if math.isfinite(validation.loss):
                self._note_best(validation.loss)
            metrics = validation.metrics()
            self.log.row(step, session.tokens, metrics)
            self.display.validation(step, metrics)
            alarm = self._judge(metrics)
        if alarm is not None:
            self._stop_by(alarm)
        with self._left_out_if_short_of_memory("sampling"):
            for sample in draw_samples(session, self.stop):
                self.log.event("sample", step, prompt=sample.prompt, text=sample.text)

    @contextmanager
    def _left_out_if_short_of_memory(self, what: str) -> Iterator[None]:
        """Training goes on without what another process's memory left no room for."""
        try:
            yield
            return
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            reason = str(error).partition("\n")[0]
        give_back()  # now that nothing holds on to the failed one's tensors
        self.log.event("out_of_memory", self.session.state.step, during=what, error=reason)
        self.display.message(
            f"step {self.session.state.step}: no memory for {what}, which is left out: {reason}"
        )

    def _note_best(self, loss: float) -> None:
        best = self.session.best_validation_loss
        self.session.best_validation_loss = loss if best is None else min(best, loss)
        self.saver.evaluated(self.session.state.step, loss)

    def save_and_stop(self) -> Interrupted:
        """After Stopped: saves what is not saved yet, and returns what to raise."""
        session = self.session
        saved = self._save_to_stop()
        self.log.event("stopped", session.state.step, reason=self.stop.reason)
        return Interrupted(
            f"stopped by {self.stop.reason} after step {session.state.step} of {session.config.steps}; "
            f"{saved}"
        )

    def _save_to_stop(self) -> str:
        """Saves what is not saved yet, and says what the same command does. Weights that are not finite are
        not saved: the run goes on from before, meets the same again, and goes back.
        """
        session = self.session
        self.saver.finish()
        if self.saver.saved_step == session.state.step or self._save(planned=False):
            return "the checkpoint is saved, and the same command goes on from it"
        self.log.event("not_saved", session.state.step, reason=NOT_FINITE)
        if self.saver.saved_step is None:
            return f"{NOT_FINITE} and not saved, there is no checkpoint yet, and the same command starts anew"
        return (
            f"{NOT_FINITE} and not saved, the checkpoint is that of step {self.saver.saved_step}, and the "
            "same command goes on from it"
        )


def smoke_test_session(session: Session, stop: StopRequest) -> list[Finding] | None:
    """How the model goes on from the smoke test's prompts; None where it is not asked for, or where there is
    no memory to write in. Raises Stopped between two tokens.
    """
    trainer = session.trainer
    if not session.config.evaluate.smoke_test or not session.config.evaluate.prompts:
        return None
    with trainer.streams.computing():
        decoder = Decoder(trainer.model, trainer.arena)
        return smoke_test(decoder, session.data.tokenizer, on_token=stop.check)


def evaluate_session(session: Session, batches: int, stop: StopRequest) -> Validation:
    """Validation on at most `batches` micro-batches of held-out text, as many of them at a time as
    `evaluate.micro_batch_size` makes. Raises Stopped between two passes.
    """
    config, step = session.config, session.state.step
    faults.reach("evaluate.begin", step)
    sequences = batches * config.train.micro_batch_size
    held_out = validation_batches(
        session.data.validation, config.data.sequence_length, sequences, evaluation_batch(config)
    )
    trainer, token_bytes = session.trainer, session.data.tokenizer.token_bytes
    with trainer.streams.computing():  # where cuBLAS has its workspace: each stream would have its own
        return validate(trainer.model, trainer.input, _until(stop, held_out, step), token_bytes)


def _until(stop: StopRequest, batches: Iterable[Batch], step: int) -> Iterator[Batch]:
    for batch in batches:
        faults.reach("evaluate.batch", step)
        stop.check()
        yield batch


def draw_samples(session: Session, stop: StopRequest) -> list[Sample]:
    """How the model goes on from each of `evaluate.prompts` at this step. Raises Stopped between two
    tokens.
    """
    config, step = session.config, session.state.step
    samples = []
    for index, prompt in enumerate(config.evaluate.prompts):
        faults.reach("sample.begin", step)
        stop.check()
        try:
            with session.trainer.streams.computing():
                generation = generate(
                    Decoder(session.trainer.model, session.trainer.arena),
                    session.data.tokenizer,
                    prompt,
                    max_tokens=config.evaluate.sample_tokens,
                    temperature=config.evaluate.temperature,
                    seed=derive_seed(config.seed, "sample", step, index),
                    on_token=stop.check,
                )
        except NotFinite:  # for the guard to judge, at the next step; a sample ends no run
            samples.append(Sample(prompt, None))
        else:
            samples.append(Sample(prompt, generation.text))
    return samples
