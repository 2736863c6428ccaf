"""When things happen in a run: steps, rows, checkpoints, evaluations, samples, the end. Cadence only.

At one step, saving comes before evaluating: a failure in an evaluation never costs training.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from albor import faults
from albor.data.loader import validation_batches
from albor.errors import Diverged, Interrupted
from albor.evaluate.validation import Validation, validate
from albor.generate.generate import generate
from albor.generate.sampler import NotFinite
from albor.memory.shortage import give_back, is_out_of_memory
from albor.model.decode import Decoder
from albor.seeds import derive_seed
from albor.train.display import Display
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
        peak_flops: float | None = None,
    ):
        self.session, self.log, self.display, self.stop = session, log, display, stop
        self.peak_flops = peak_flops
        self.clock = Clock()
        self.last_saved = session.saved_step
        self._owes_save = False

    def run(self) -> None:
        """Steps until the configured end.

        Raises Stopped when a signal asked for the end, and Diverged when steps stay non-finite.
        """
        session, config = self.session, self.session.config
        self.log.truncate_after(session.state.step)
        self._catch_up()
        while session.state.step < config.steps:
            self.stop.check()
            self._step()
        if self.last_saved != session.state.step:  # a finished run, which goes on under another name
            self._save()

    def _step(self) -> None:
        session = self.session
        position, started = session.loader.state(), time.perf_counter()
        try:
            result, session.state = session.trainer.step(session.batches(self.stop.check), session.state)
        except Stopped:  # between two micro-batches: as if the step had not begun
            session.loader.restore(position)
            raise
        self.clock.seconds += time.perf_counter() - started
        self.clock.tokens += session.config.tokens_per_step
        self._after_step(result)

    def _after_step(self, result: StepResult) -> None:
        config, step = self.session.config, self.session.state.step
        last = step == config.steps
        if step % config.log.every_steps == 0 or last or step == 1 or not result.updated:
            self._log_row(result)
        if not result.updated:
            self._skipped(result)
        self._owes_save |= step % config.checkpoint.every_steps == 0
        # While steps are skipped the weights may be past saving, and would push good checkpoints out.
        if last or (self._owes_save and result.updated):
            self._save()
        if step % config.evaluate.every_steps == 0 or last:
            self._evaluate()

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

    def _skipped(self, result: StepResult) -> None:
        """Records a step that changed nothing, and stops the run when they do not end."""
        state, largest = self.session.state, self.session.config.train.max_skipped_steps
        what = f"loss {result.loss:g}, gradient norm {result.grad_norm:g}"
        self.log.event("skipped_step", state.step, loss=str(result.loss), grad_norm=str(result.grad_norm))
        self.display.message(f"step {state.step} skipped, weights unchanged: {what}")
        if state.guard.skipped_in_row >= largest:
            self.log.event("diverged", state.step)
            kept = (
                f"the last checkpoint is step {self.last_saved}"
                if self.last_saved is not None
                else "there is no checkpoint yet"
            )
            raise Diverged(
                f"{state.guard.skipped_in_row} steps in a row had a non-finite loss or gradient "
                f"(step {state.step}: {what}); {kept}; start again under another name with a lower "
                "optimizer.lr or a longer schedule.warmup_steps"
            )

    def _log_row(self, result: StepResult) -> None:
        session = self.session
        rate = self.clock.take()
        flops = session.trainer.architecture.flops_per_token(session.config.data.sequence_length)
        row = {
            "train/loss": result.loss,
            "train/lr": result.lr,
            "train/grad_norm": result.grad_norm,
            "train/tokens_per_second": rate,
            "train/mfu": rate * flops / self.peak_flops if rate and self.peak_flops else None,
            "train/epoch": max(session.loader.epochs()),
            "memory/planned": float(session.trainer.arena.plan.size("device")),
            "memory/process": _resident_bytes(),
        }
        self.log.row(session.state.step, session.tokens, row)
        self.display.row(session.state.step, row)

    def _save(self) -> None:
        session, step = self.session, self.session.state.step
        if not session.is_finite():
            self.log.event("diverged", step)
            raise Diverged(
                f"after step {step} weights or moments of the optimizer are not finite, and were not saved; "
                "start again under another name with a lower optimizer.lr"
            )
        path = session.save(prune=session.state.guard.skipped_in_row == 0)
        self.last_saved, self._owes_save = step, False
        self.log.event("checkpoint", self.last_saved, path=str(path))
        self.display.checkpoint(path)

    def _evaluate(self) -> None:
        session = self.session
        config, step = session.config, session.state.step
        with self._left_out_if_short_of_memory("evaluation"):
            validation = evaluate_session(session, config.evaluate.batches, self.stop)
            if math.isfinite(validation.loss):
                self._note_best(validation.loss)
            metrics = validation.metrics()
            self.log.row(step, session.tokens, metrics)
            self.display.validation(step, metrics)
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

    def save_and_stop(self) -> Interrupted:
        """After Stopped: saves what is not saved yet, and returns what to raise."""
        session = self.session
        if self.last_saved != session.state.step:
            self._save()
        self.log.event("stopped", session.state.step, signal=self.stop.name)
        return Interrupted(
            f"stopped by {self.stop.name} after step {session.state.step} of {session.config.steps}; the "
            "checkpoint is saved, and the same command goes on from it"
        )


def evaluate_session(session: Session, batches: int, stop: StopRequest) -> Validation:
    """Validation on at most `batches` micro-batches of held-out text. Raises Stopped between two of them."""
    config, step = session.config, session.state.step
    faults.reach("evaluate.begin", step)
    held_out = validation_batches(
        session.data.validation, config.data.sequence_length, config.train.micro_batch_size, batches
    )
    trainer, token_bytes = session.trainer, session.data.tokenizer.token_bytes
    return validate(trainer.model, trainer.input, _until(stop, held_out, step), token_bytes)


def _until(stop: StopRequest, batches: Iterable[Batch], step: int) -> Iterator[Batch]:
    for batch in batches:
        faults.reach("evaluate.batch", step)
        stop.check()
        yield batch


def draw_samples(session: Session, stop: StopRequest) -> list[Sample]:
    """How the model goes on from each of `evaluate.prompts` at this step. Raises Stopped between two."""
    config, step = session.config, session.state.step
    samples = []
    for index, prompt in enumerate(config.evaluate.prompts):
        faults.reach("sample.begin", step)
        stop.check()
        try:
            generation = generate(
                Decoder(session.trainer.model, session.trainer.arena),
                session.data.tokenizer,
                prompt,
                max_tokens=config.evaluate.sample_tokens,
                temperature=config.evaluate.temperature,
                seed=derive_seed(config.seed, "sample", step, index),
            )
        except NotFinite:  # for the guard to judge, at the next step; a sample ends no run
            samples.append(Sample(prompt, None))
        else:
            samples.append(Sample(prompt, generation.text))
    return samples


def _resident_bytes() -> float | None:
    """Memory of this process that is in RAM, in bytes; None where the system does not say."""
    try:
        with open("/proc/self/statm") as file:
            return float(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return None
