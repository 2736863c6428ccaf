"""When things happen in a run: steps, rows, checkpoints, evaluations, samples, the end. Cadence only.

At one step, saving comes before evaluating: a failure in an evaluation never costs training.
"""

from __future__ import annotations

import math
import os
import time
from dataclasses import dataclass

from albor.data.loader import validation_batches
from albor.errors import Diverged, Interrupted
from albor.evaluate.validation import Validation, validate
from albor.generate.generate import generate
from albor.model.decode import Decoder
from albor.seeds import derive_seed
from albor.train.display import Display
from albor.train.metrics import MetricsLog, read_rows
from albor.train.session import Session
from albor.train.signals import StopRequest
from albor.train.step import StepResult


@dataclass(frozen=True)
class Sample:
    """A prompt, and how the model went on."""

    prompt: str
    text: str


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

    def __init__(self, session: Session, log: MetricsLog, display: Display, peak_flops: float | None):
        self.session, self.log, self.display, self.peak_flops = session, log, display, peak_flops
        self.clock = Clock()
        self.last_saved = session.saved_step

    def run(self) -> None:
        """Steps until the configured end.

        Raises Interrupted after saving when a signal asked for it, and Diverged when steps stay non-finite.
        """
        session, config = self.session, self.session.config
        self.log.truncate_after(session.state.step)
        with StopRequest() as stop:
            self._catch_up()
            while session.state.step < config.steps:
                if stop.name is not None:
                    self._stop(stop.name)
                started = time.perf_counter()
                result, session.state = session.trainer.step(session.batches(), session.state)
                self.clock.seconds += time.perf_counter() - started
                self.clock.tokens += config.tokens_per_step
                self._after_step(result)
            if self.last_saved != session.state.step:
                self._save()

    def _after_step(self, result: StepResult) -> None:
        config, step = self.session.config, self.session.state.step
        last = step == config.steps
        if not result.updated:
            self._skipped(result)
        if step % config.log.every_steps == 0 or last or step == 1:
            self._log_row(result)
        if step % config.checkpoint.every_steps == 0 or last:
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
        rows = [row for row in read_rows(self.log.metrics_path) if row["step"] == step and "val/loss" in row]
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
                if self.last_saved
                else "there is no checkpoint yet"
            )
            raise Diverged(
                f"{state.guard.skipped_in_row} steps in a row had a non-finite loss or gradient "
                f"(step {state.step}: {what}); {kept}; lower optimizer.lr, or lengthen schedule.warmup_steps"
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
        path = self.session.save()
        self.last_saved = self.session.state.step
        self.log.event("checkpoint", self.last_saved, path=str(path))
        self.display.checkpoint(path)

    def _evaluate(self) -> None:
        session = self.session
        config, step = session.config, session.state.step
        validation = evaluate_session(session, config.evaluate.batches)
        if math.isfinite(validation.loss):
            self._note_best(validation.loss)
        metrics = validation.metrics()
        self.log.row(step, session.tokens, metrics)
        self.display.validation(step, metrics)
        for sample in draw_samples(session):
            self.log.event("sample", step, prompt=sample.prompt, text=sample.text)

    def _note_best(self, loss: float) -> None:
        best = self.session.best_validation_loss
        self.session.best_validation_loss = loss if best is None else min(best, loss)

    def _stop(self, signal_name: str) -> None:
        session = self.session
        if self.last_saved != session.state.step:
            self._save()
        self.log.event("stopped", session.state.step, signal=signal_name)
        raise Interrupted(
            f"stopped by {signal_name} after step {session.state.step} of {session.config.steps}; the "
            "checkpoint is saved, and the same command goes on from it"
        )


def evaluate_session(session: Session, batches: int) -> Validation:
    """Validation on at most `batches` micro-batches of held-out text."""
    config = session.config
    held_out = validation_batches(
        session.data.validation, config.data.sequence_length, config.train.micro_batch_size, batches
    )
    return validate(session.trainer.model, held_out, session.data.tokenizer.token_bytes)


def draw_samples(session: Session) -> list[Sample]:
    """How the model goes on from each of `evaluate.prompts` at this step."""
    config, step = session.config, session.state.step
    samples = []
    for index, prompt in enumerate(config.evaluate.prompts):
        decoder = Decoder(session.trainer.model, session.trainer.arena)
        generation = generate(
            decoder,
            session.data.tokenizer,
            prompt,
            max_tokens=config.evaluate.sample_tokens,
            temperature=config.evaluate.temperature,
            seed=derive_seed(config.seed, "sample", step, index),
        )
        samples.append(Sample(prompt, generation.text))
    return samples


def _resident_bytes() -> float | None:
    """Memory of this process that is in RAM, in bytes; None where the system does not say."""
    try:
        with open("/proc/self/statm") as file:
            return float(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return None
