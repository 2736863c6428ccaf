"""`albor canary` from the configuration to its verdict. Nothing is written but the data cache."""

from __future__ import annotations

import math

import torch
from rich.console import Console

from albor.canary.compare import Agreement, UpdateCheck, compare_gradients
from albor.canary.plain import Kind, PlainTraining, choose, make_model, plain_bytes, short_name
from albor.canary.reference import unpacked
from albor.canary.report import Canary, Row, SameWeights, print_head, print_row, print_verdict
from albor.config import RunConfig
from albor.data.prepare import check_horizon, prepare
from albor.errors import ConfigError, DoesNotFit, Problem
from albor.memory.devices import format_bytes
from albor.memory.estimate import Estimate, check_fits
from albor.model.parameters import master_weights, named_tensors
from albor.progress import show_progress
from albor.train.schedule import learning_rate
from albor.train.session import Session, open_session
from albor.train.step import Accumulated, TrainState


def run_canary(config: RunConfig, target: Estimate, steps: int, kind: Kind, console: Console) -> Canary:
    """Takes the first `steps` steps of `config` in albor and in a plain reference, and compares them.

    Rows go to `console` as they come. Raises an AlborError for what a user can mend; a disagreement is no
    error but the result.
    """
    if steps > config.steps:
        remedy = f"ask for at most {config.steps}"
        problem = f"is {steps}, and the run has {config.steps} steps"
        raise ConfigError([Problem("--steps", problem, remedy, "command line")])
    chosen = choose(kind)
    _check_fits(target)
    if target.device == "cuda" and not torch.cuda.is_available():
        remedy = "install a driver that PyTorch finds, or set device to cpu"
        raise ConfigError([Problem("device", "cuda, but PyTorch finds no CUDA device here", remedy)])
    with show_progress(console) as progress:
        data = prepare(config, progress)
    if problems := check_horizon(config, data):
        raise ConfigError(problems)
    session = open_session(config, data, target.plan, target.device, None)
    module, logits, name = make_model(chosen, target.architecture, session.trainer.arena.device)
    plain = PlainTraining(config, module, logits, data.tokenizer.end_of_document_id)

    canary = Canary(config, target.device, target.plan.compute_dtype, name, steps)
    print_head(canary, console)
    _Comparison(session, plain, canary, console).run()
    print_verdict(canary, console)
    return canary


class _Comparison:
    """Both sides, step by step."""

    def __init__(self, session: Session, plain: PlainTraining, canary: Canary, console: Console):
        self.session, self.trainer, self.plain = session, session.trainer, plain
        self.canary, self.console = canary, console
        # By the names of Hugging Face's layout: views, so that they follow every update.
        master = master_weights(self.trainer.arena)
        self.weights = self._named(named_tensors(master, self.trainer.architecture))
        self.updates = UpdateCheck(self.weights, session.config.optimizer)

    def run(self) -> None:
        """Fills the canary's rows and comparisons."""
        config, state = self.session.config, self.session.state
        self.plain.load(self.weights)
        for _ in range(self.canary.steps):
            lr = learning_rate(state.step + 1, config.steps, config.optimizer.lr, config.schedule)
            row, sums = self._accumulate(state, lr)
            finite = math.isfinite(sums.loss) and math.isfinite(sums.grad_norm)
            agreements = self._compare(row, sums)
            if finite:
                row.cosines = {name: agreement.cosine for name, agreement in agreements.items()}
                if self.canary.first is None:
                    scale = row.reference_grad_norm
                    self.canary.first = SameWeights("initial weights", row, agreements, scale)
                # Of the very gradients that were compared, not of what albor says that their norm is.
                norm = math.hypot(*(agreement.norm for agreement in agreements.values()))
                gradients = self._named(self.trainer.gradients())
                self.updates.expect(gradients, sums.gradient_scale, norm, lr)
                self.plain.update(lr)
            result, state = self.trainer.update(sums, state)
            self._synchronize()
            row.updated = result.updated
            if finite:
                row.update_errors = self.updates.errors(self.weights)
            self.canary.rows.append(row)
            print_row(row, self.console)
        self._compare_once_more(state)

    def _compare_once_more(self, state: TrainState) -> None:
        """At the weights that albor has reached, on the next step's data; no weight moves."""
        self.plain.load(self.weights)
        row, sums = self._accumulate(state, None)
        agreements = self._compare(row, sums)
        row.cosines = {name: agreement.cosine for name, agreement in agreements.items()}
        norms = [before.reference_grad_norm for before in self.canary.rows if before.cosines]
        scale = max([*norms, row.reference_grad_norm])
        self.canary.last = SameWeights(f"weights after step {state.step}", row, agreements, scale)
        print_row(row, self.console)

    def _accumulate(self, state: TrainState, lr: float | None) -> tuple[Row, Accumulated]:
        """Loss and gradient of both sides for the next step's data."""
        # Copies: the session overwrites its arrays, and two sides read them.
        batches = [(tokens.copy(), targets.copy()) for tokens, targets in self.session.batches(lambda: None)]
        sums = self.trainer.accumulate(batches, state)
        row = Row(state.step + 1, lr, sums.loss, sums.grad_norm)
        with self.console.status(f"step {row.step}") as status:

            def done(sequence: int, sequences: int) -> None:
                status.update(f"step {row.step}: the reference has {sequence} of {sequences} sequences")

            row.reference_loss = self.plain.accumulate(batches, done)
        return row, sums

    def _compare(self, row: Row, sums: Accumulated) -> dict[str, Agreement]:
        """The gradients of both sides; `row` then has the norm of the reference's."""
        ours, theirs = self._named(self.trainer.gradients()), self.plain.gradients()
        agreements = compare_gradients(ours, theirs, sums.gradient_scale)
        row.reference_grad_norm = math.hypot(*(agreement.reference_norm for agreement in agreements.values()))
        return agreements

    def _named(self, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        split = unpacked(tensors, self.trainer.architecture)
        return {short_name(name): tensor for name, tensor in split.items()}

    def _synchronize(self) -> None:
        """albor computes on a stream of its own, and the reference on the default one."""
        if self.trainer.arena.device.type == "cuda":
            torch.cuda.synchronize(self.trainer.arena.device)


def _check_fits(target: Estimate) -> None:
    """Raises DoesNotFit where there is no room for both sides; an unknown capacity passes."""
    check_fits(target)
    beside = plain_bytes(target.architecture, target.config.data.sequence_length)
    needed, capacity = target.required_bytes + beside, target.hardware.capacity_bytes
    if capacity is not None and needed > capacity:
        raise DoesNotFit(
            f"{target.hardware.description}: the run fits, but not with the reference beside it: "
            f"{format_bytes(target.required_bytes)} + {format_bytes(beside)} needed, "
            f"{format_bytes(capacity)} available; the same arithmetic is tested with "
            "train.micro_batch_size=1, or with fewer layers"
        )
