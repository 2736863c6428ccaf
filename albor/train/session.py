"""Everything a run needs before its first step: data, plan, arena, trainer, and the state to go on from."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from albor import checkpoint, faults, ops
from albor.config import RunConfig
from albor.configfile import dump_config, load_config
from albor.data.loader import Loader
from albor.data.prepare import PreparedData
from albor.errors import CheckpointError, ConfigError, DataError, Problem
from albor.manifest import STATE
from albor.memory.arena import Arena
from albor.memory.plan import MemoryPlan
from albor.model.parameters import clear, initialise, master_weights, named_tensors
from albor.train.guard import GuardState
from albor.train.metrics import EVENTS, read_rows
from albor.train.run_directory import check_resumable, run_directory
from albor.train.step import Batch, Trainer, TrainState


@dataclass
class Session:
    """One run in memory. `state` is replaced after every step; the rest stays."""

    config: RunConfig
    data: PreparedData
    loader: Loader
    trainer: Trainer
    state: TrainState
    resumed_from: Path | None
    best_validation_loss: float | None = None

    @property
    def directory(self) -> Path:
        """The run directory."""
        return run_directory(self.config)

    @property
    def saved_step(self) -> int | None:
        """The step of the run's own checkpoint that this session began with; None for one of another run."""
        own = self.directory / checkpoint.CHECKPOINTS
        if self.resumed_from is None or self.resumed_from.parent.resolve() != own.resolve():
            return None
        return self.state.step

    @property
    def tokens(self) -> int:
        """Tokens that the run has read."""
        return self.state.step * self.config.tokens_per_step

    def batches(self, between: Callable[[], None]) -> Iterator[Batch]:
        """The next step's micro-batches, in arrays that the following one overwrites.

        `between` is called before each but the first.
        """
        train = self.config.train
        tokens = np.empty((train.micro_batch_size, self.config.data.sequence_length), dtype=np.int64)
        targets = np.empty_like(tokens)
        for micro in range(train.gradient_accumulation_steps):
            if micro:
                between()
            self.loader.next(tokens, targets)
            yield tokens, targets

    def is_finite(self) -> bool:
        """Whether weights and moments hold neither NaN nor infinity."""
        arena = self.trainer.arena
        flats = (master_weights(arena), arena["moments.first"], arena["moments.second"])
        return all(math.isfinite(ops.norm(flat)) for flat in flats)

    def save(self, *, prune: bool = True) -> Path:
        """Writes the current step's checkpoint; with `prune`, older ones beyond keep_last are removed."""
        return checkpoint.save(
            self.directory / checkpoint.CHECKPOINTS,
            self.state.step,
            checkpoint_tensors(self.trainer),
            {
                **asdict(self.state),
                "tokens": self.tokens,
                "compute_dtype": self.trainer.arena.plan.compute_dtype,
                "loader": self.loader.state(),
                "data_sha256": self.data.sha256,
                "best_validation_loss": self.best_validation_loss,
            },
            {
                "config.yaml": dump_config(self.config).encode(),
                "tokenizer.model": self.data.tokenizer.model,
            },
            self.config.checkpoint.keep_last if prune else sys.maxsize,
        )


def checkpoint_tensors(trainer: Trainer) -> dict[str, dict[str, torch.Tensor]]:
    """What a checkpoint holds, by file: the weights as they compute, and the optimizer's state."""
    arena, model = trainer.arena, trainer.architecture
    optimizer: dict[str, torch.Tensor] = {}
    for flat in ("master", "moments.first", "moments.second"):
        if flat in arena:
            optimizer |= {
                f"{flat}/{name}": tensor for name, tensor in named_tensors(arena[flat], model).items()
            }
    return {"weights": named_tensors(arena["weights"], model), "optimizer": optimizer}


def find_checkpoint(config: RunConfig, resume: str, warn: Callable[[str], None]) -> Path | None:
    """The verified checkpoint that `config` goes on from: `auto`, `never`, or the path of one (or of a run).

    Raises before anything would be overwritten: `never` in a run that has checkpoints, and an older
    checkpoint of the run itself while newer ones exist.
    """
    own = run_directory(config) / checkpoint.CHECKPOINTS
    source = _named_checkpoint(config, own, resume, warn)
    if source is not None:  # now, before minutes are spent on the data of what may be another run
        check_resumable(config, load_config(source / "config.yaml"), source)
    return source


def _named_checkpoint(config: RunConfig, own: Path, resume: str, warn: Callable[[str], None]) -> Path | None:
    existing = checkpoint.list_checkpoints(own)

    def skipped(path: Path, reason: str) -> None:
        warn(f"passed over a damaged checkpoint: {reason}")

    if resume == "never":
        if existing:
            remedy = f"choose another name, or remove {own.parent}"
            problem = f"{own.parent} already holds checkpoints of a run"
            raise ConfigError([Problem("name", problem, remedy, "--resume never")])
        return None
    if resume == "auto":
        latest = checkpoint.find_latest(own, skipped)
        if latest is None and existing:
            raise CheckpointError(f"{own}: none of the checkpoints verifies; remove them to start again")
        return latest
    source = checkpoint.resolve(Path(resume), skipped)
    newest = existing[-1] if existing else None
    if newest is not None and newest.resolve() != source.resolve():
        if _began_from(own.parent, source):  # the same command, once more
            return checkpoint.find_latest(own, skipped)
        remedy = "give the new run another name (name=...), or go on from there (--resume auto)"
        problem = f"{own.parent} holds {newest.name} already, which resuming from {source} would leave behind"
        raise ConfigError([Problem("name", problem, remedy, f"--resume {resume}")])
    return source


def _began_from(directory: Path, source: Path) -> bool:
    """Whether the run in `directory` once began from a checkpoint beside `source`, of another run."""
    origin = source.parent.resolve()
    if origin == (directory / checkpoint.CHECKPOINTS).resolve():
        return False
    resumed = (row for row in read_rows(directory / EVENTS) if row.get("event") == "resumed")
    return any(Path(row["source"]).parent.resolve() == origin for row in resumed)


def open_session(
    config: RunConfig,
    data: PreparedData,
    plan: MemoryPlan,
    device: Literal["cpu", "cuda"],
    source: Path | None,
) -> Session:
    """Allocates the plan, and fills it from the checkpoint `source`, or with initial weights."""
    if source is not None:
        _check_dtype(source, plan)
    arena = Arena(plan, device)
    trainer = Trainer(config, arena, data.tokenizer.end_of_document_id)
    weights = [s.weight for s in config.data.sources]
    loader_arguments = (
        data.train,
        weights,
        config.data.sequence_length,
        config.train.micro_batch_size,
        config.seed,
    )
    if source is None:
        initialise(arena, trainer.architecture, config.seed)
        state = TrainState(guard=GuardState.initial(plan.compute_dtype))
        return Session(config, data, Loader(*loader_arguments), trainer, state, None)
    clear(arena)
    faults.reach("load.begin")
    saved = checkpoint.load(source, checkpoint_tensors(trainer))
    faults.reach("load.filled")
    if saved["data_sha256"] != data.sha256:
        raise DataError(
            f"{source} was trained on other data or with another tokenizer than data.sources now give; "
            "restore the sources (or tokenizer.path), or give the new run another name"
        )
    return Session(
        config,
        data,
        Loader(*loader_arguments, state=saved["loader"]),
        trainer,
        _restore_state(saved),
        source,
        saved["best_validation_loss"],
    )


def _check_dtype(source: Path, plan: MemoryPlan) -> None:
    computed = json.loads((source / STATE).read_bytes())["compute_dtype"]
    if computed != plan.compute_dtype:
        problem = (
            f"{source} was computed in {computed}, and this machine computes the run in {plan.compute_dtype}"
        )
        remedy = "go on where it began, or give a new run another name"
        raise ConfigError([Problem("train.precision", problem, remedy)])


def _restore_state(saved: dict[str, Any]) -> TrainState:
    return TrainState(saved["step"], saved["updates"], GuardState(**saved["guard"]))
