"""`albor canary` from the configuration to its verdict. Nothing is written but the data cache."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch
from rich.console import Console

from albor.canary.compare import Agreement, UpdateCheck, compare_gradients
from albor.canary.findings import Canary, Row, SameWeights
from albor.canary.plain import Kind, PlainTraining, choose, make_model, plain_bytes, short_name
from albor.canary.reference import unpacked
from albor.canary.report import print_head, print_row, print_verdict
from albor.config import RunConfig
from albor.data.prepare import check_horizon, prepare
from albor.errors import ConfigError, DoesNotFit, Problem
from albor.memory.estimate import Estimate, check_fits
from albor.model.parameters import master_weights, named_tensors
from albor.progress import show_progress, signals_unwind
from albor.train.guard import judge
from albor.train.schedule import learning_rate
from albor.train.session import Session, open_session
from albor.train.step import Accumulated, Batch, TrainState
from albor.units import format_bytes

_SPREAD = 0.3  # the standard deviation of what the norms' scales are multiplied by, about 1


def run_canary(config: RunConfig, target: Estimate, steps: int, kind: Kind, console: Console) -> Canary:
    """Takes the first `steps` steps of `config` in albor and in a plain reference, and compares them.

    Rows go to `console` as they come. Raises an AlborError for what a user can mend; a disagreement is no
    error but the result.
    """
    if steps > config.steps:
        remedy = f"ask for at most {config.steps}"
        problem = f"is {steps}, and the run has {config.steps} steps"
        raise ConfigError([Problem("--steps", problem, remedy, "command line")])
    _check_learning_rate(config)
    chosen = choose(kind)
    _check_fits(target)
    if target.device == "cuda" and not torch.cuda.is_available():
        remedy = "install a driver that PyTorch finds, or set device to cpu"
        raise ConfigError([Problem("device", "cuda, but PyTorch finds no CUDA device here", remedy)])
    with show_progress(console) as progress:
        data = prepare(config, progress)
    if problems := check_horizon(config, data):
        raise ConfigError(problems)
    # The reference knows no spikes.
    followed = config.divergence.model_copy(update={"on_spike": "none"})
    config = config.model_copy(update={"divergence": followed})
    session = open_session(config, data, target.plan, target.device)
    module, logits, name = make_model(chosen, target.architecture, session.trainer.arena.device)
    plain = PlainTraining(config, module, logits, data.tokenizer.end_of_document_id)

    canary = Canary(config, target.device, target.plan.compute_dtype, name, steps)
    print_head(canary, console)
    with signals_unwind():
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
        # The norms' scales where they are updated, and where they are read: the same without a master.
        self._scales, self._read_scales = (
            [scale for scale in named_tensors(flat, self.trainer.architecture).values() if scale.dim() == 1]
            for flat in (master, self.trainer.arena["weights"])
        )
        self.updates = UpdateCheck(self.weights, session.config)

    def run(self) -> None:
        """Fills the canary's rows and comparisons."""
        state = self.session.state
        for number in range(self.canary.steps):
            batches = self._next_batches()
            if number == 0:
                self._compare_with_spread_norms(batches, state)
                self.plain.load(self.weights)
            row, state = self._step(batches, state)
            self.canary.rows.append(row)
            print_row(row, self.console)
        self._compare_once_more(state)

    def _step(self, batches: Sequence[Batch], state: TrainState) -> tuple[Row, TrainState]:
        """One step of both sides, each from its own weights with its own gradient."""
        config = self.session.config
        lr = learning_rate(state.step + 1, config.steps, config.optimizer.lr, config.schedule)
        sums = self.trainer.accumulate(batches, state)
        row, agreements = self._compare(str(state.step + 1), batches, state, sums)
        row.lr = lr
        if row.finite:
            # Of the very gradients that were compared, not of what albor says that their norm is.
            norm = math.hypot(*(agreement.norm for agreement in agreements.values()))
            gradients = self._named(self.trainer.gradients())
            self.updates.expect(gradients, sums.gradient_scale, norm, lr)
        result, state = self.trainer.update(sums, state)
        self._synchronize()
        row.updated = result.updated
        row.scale_search = result.verdict.kind == "loss scale"
        if self.canary.first is None and not row.scale_search:  # so far neither side has moved
            self.canary.first = SameWeights("initial weights", row, agreements, row.reference_grad_norm)
        if row.finite:
            row.update_errors = self.updates.errors(self.weights)
        # What albor's guard does, by the reference's own numbers: a reference that stopped with albor could
        # not tell a mistake of albor's from a configuration that nothing can train. Only while fp16 looks for
        # its loss scale, which the reference has not, both wait.
        if row.reference_finite and not row.scale_search:
            self.plain.update(lr)
        return row, state

    def _compare_with_spread_norms(self, batches: Sequence[Batch], state: TrainState) -> None:
        """At the initial weights, on the first step's data, but with norms whose scales are not all 1."""
        with self._spread_norms():
            self.plain.load(self.weights)
            sums = self.trainer.accumulate(batches, state)
            while True:  # fp16's loss scale may be too large for this, as in a step
                verdict, guard = judge(
                    state.guard, state.step + 1, sums.loss, sums.grad_norm, self.session.config.divergence,
                    self.trainer.arena.plan.compute_dtype,
                )  # fmt: skip
                if verdict.kind != "loss scale":
                    break
                state = replace(state, guard=guard)
                sums = self.trainer.accumulate(batches, state)
            row, agreements = self._compare("spread", batches, state, sums)
        self.canary.spread = SameWeights("spread norms", row, agreements, row.reference_grad_norm)
        print_row(row, self.console)

    @contextmanager
    def _spread_norms(self) -> Iterator[None]:
        """The norms' scales are multiplied by random factors, and given back their bits afterwards."""
        before = [scale.clone() for scale in self._scales]
        generator = torch.Generator().manual_seed(0)
        factors = (1 + _SPREAD * torch.randn(scale.shape, generator=generator) for scale in before)
        self._set_scales([scale * factor.to(scale) for scale, factor in zip(before, factors, strict=True)])
        try:
            yield
        finally:
            self._set_scales(before)

    def _set_scales(self, values: Sequence[torch.Tensor]) -> None:
        for scale, read, value in zip(self._scales, self._read_scales, values, strict=True):
            scale.copy_(value)
            read.copy_(scale)
        self._synchronize()

    def _compare_once_more(self, state: TrainState) -> None:
        """At the weights that albor has reached, on the next step's data; no weight moves."""
        self.plain.load(self.weights)
        batches = self._next_batches()
        sums = self.trainer.accumulate(batches, state)
        row, agreements = self._compare("last", batches, state, sums)
        norms = [before.reference_grad_norm for before in self.canary.rows if before.cosines]
        scale = max([*norms, row.reference_grad_norm])
        self.canary.last = SameWeights(f"weights after step {state.step}", row, agreements, scale)
        print_row(row, self.console)

    def _next_batches(self) -> list[Batch]:
        # Copies: the session overwrites its arrays, and two sides read them.
        return [(tokens.copy(), targets.copy()) for tokens, targets in self.session.batches(lambda: None)]

    def _compare(
        self, label: str, batches: Sequence[Batch], state: TrainState, sums: Accumulated
    ) -> tuple[Row, dict[str, Agreement]]:
        """What albor has accumulated of `batches`, beside the same of the reference at its own weights."""
        row = Row(label, state.step + 1, sums.loss, sums.grad_norm)
        with self.console.status(f"step {row.step}") as status:

            def done(sequence: int, sequences: int) -> None:
                status.update(f"step {row.step}: the reference has {sequence} of {sequences} sequences")

            row.reference_loss = self.plain.accumulate(batches, done)
        ours, theirs = self._named(self.trainer.gradients()), self.plain.gradients()
        agreements = compare_gradients(ours, theirs, sums.gradient_scale)
        row.reference_grad_norm = math.hypot(*(agreement.reference_norm for agreement in agreements.values()))
        if row.finite and row.reference_finite:
            row.cosines = {name: agreement.cosine for name, agreement in agreements.items()}
        return row, agreements

    def _named(self, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        split = unpacked(tensors, self.trainer.architecture)
        return {short_name(name): tensor for name, tensor in split.items()}

    def _synchronize(self) -> None:
        """albor computes on a stream of its own, and the reference on the default one."""
        if self.trainer.arena.device.type == "cuda":
            torch.cuda.synchronize(self.trainer.arena.device)


def _check_learning_rate(config: RunConfig) -> None:
    """Raises ConfigError where torch's AdamW, which takes its factors as fp32, refuses to compute."""
    optimizer, model = config.optimizer, config.model
    decay = optimizer.weight_decay * model.hidden_size / (model.mup_base_width or model.hidden_size)
    largest = torch.finfo(torch.float32).max * min(1 - optimizer.betas[0], 1 / max(decay, 1))
    if optimizer.lr > largest:
        problem = f"is {optimizer.lr:g}, and the reference's AdamW computes up to {largest:.1g}"
        raise ConfigError([Problem("optimizer.lr", problem, "lower optimizer.lr")])


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
