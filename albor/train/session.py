"""Everything a run needs before its first step: data, plan, arena, trainer, and the state to go on from."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
import torch

from albor import checkpoint, faults, ops
from albor.config import RunConfig
from albor.configfile import dump_config, load_config
from albor.data.loader import Loader
from albor.data.prepare import PreparedData
from albor.errors import CheckpointError, ConfigError, DamagedCheckpoint, DataError, Problem
from albor.manifest import STATE
from albor.memory.arena import Arena
from albor.memory.plan import STATE_BUFFERS, MemoryPlan
from albor.model.parameters import clear, initialise, named_tensors
from albor.pretrained.source import fill_weights, open_for
from albor.runlog import EVENTS, read_rows
from albor.train.guard import GuardState, rolled_back
from albor.train.resume_policy import Change, changes_on_resume
from albor.train.run_directory import run_directory
from albor.train.saved import CONFIG, check_tokenizer, read_saved
from albor.train.step import Batch, Trainer, TrainState

T = TypeVar("T")


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
    begun_from: dict[str, str] | None = None  # SHA-256 by file of model.init_from's weights

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

    @property
    def left_out(self) -> int:
        """Samples that were read and left behind by rollbacks."""
        train = self.config.train
        per_step = train.micro_batch_size * train.gradient_accumulation_steps
        samples: int = self.loader.state()["samples"]
        return samples - self.state.step * per_step

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
        return is_finite(self.trainer.arena)

    def roll_back(self, warn: Callable[[str], None]) -> tuple[Path | None, dict[str, Any]]:
        """Goes back to the newest good checkpoint that this run's cadence saved, but not in the data: what
        was read since is left behind. Checkpoints beyond it are removed. Before there is one, that is the
        beginning, which the seed gives again.

        Returns the checkpoint, or None for the beginning, and the loader's position there. Raises
        CheckpointError where none is good; the state in memory is then of no use.
        """
        left, home = self.state.guard, self.directory / checkpoint.CHECKPOINTS
        if left.anchor is None:
            arena = self.trainer.arena
            try:
                begun_from = _begin(self.trainer, self.config)
            except (ConfigError, DataError) as error:  # the model is gone, or another
                raise CheckpointError(str(error)) from error
            if begun_from != self.begun_from:
                place = self.config.model.init_from
                raise CheckpointError(
                    f"model.init_from: {place} has other weights than those that the run began with"
                )
            begun = GuardState.initial(arena.plan.compute_dtype)
            self.state = TrainState(guard=rolled_back(left, begun))
            self.best_validation_loss = None
            checkpoint.remove_after(home, 0)
            return None, {"samples": 0, "per_source": [0] * len(self.data.train)}
        sources = [p for p in checkpoint.list_checkpoints(home) if checkpoint.step_of(p) <= left.anchor]
        if not sources:
            raise CheckpointError(f"{home} holds none of step {left.anchor} or before")
        if checkpoint.step_of(sources[-1]) != left.anchor:
            warn(f"the checkpoint of step {left.anchor} is gone")

        def fill(source: Path) -> tuple[Path, dict[str, Any], TrainState, float | None]:
            return source, *read_saved(fill_from(self.trainer, source), source, self.config.divergence)

        source, position, state, best = _first_intact(sources[::-1], fill, warn)
        self.state = replace(state, guard=rolled_back(left, state.guard))
        self.best_validation_loss = best
        checkpoint.remove_after(source.parent, state.step)
        return source, position

    def saved_state(self) -> dict[str, Any]:
        """What a checkpoint's state.json holds: with the tensors, all that the next step depends on."""
        return {
            **self.state.as_json(),
            "tokens": self.tokens,
            "compute_dtype": self.trainer.arena.plan.compute_dtype,
            "attention": self.trainer.arena.plan.attention.backend,
            "loader": self.loader.state(),
            "data_sha256": self.data.sha256,
            "best_validation_loss": self.best_validation_loss,
            "begun_from": self.begun_from,
        }

    def saved_files(self) -> dict[str, bytes]:
        """The files that make a checkpoint self-describing."""
        return {
            CONFIG: dump_config(self.config).encode(),
            self.data.tokenizer.file_name: self.data.tokenizer.model,
        }


def checkpoint_tensors(
    trainer: Trainer, flats: Mapping[str, torch.Tensor] | None = None
) -> dict[str, dict[str, torch.Tensor]]:
    """What a checkpoint holds, by file: the weights as they compute, and the optimizer's state.

    `flats` are the flat buffers of STATE_BUFFERS that it is taken from; by default the run's own.
    """
    arena, model = trainer.arena, trainer.architecture
    flats = flats or {name: arena[name] for name in STATE_BUFFERS if name in arena}
    optimizer = {
        f"{flat}/{name}": tensor
        for flat in flats
        if flat != "weights"
        for name, tensor in named_tensors(flats[flat], model).items()
    }
    return {"weights": named_tensors(flats["weights"], model), "optimizer": optimizer}


def checkpoint_bytes(plan: MemoryPlan) -> int:
    """The size of a checkpoint's tensors, in bytes."""
    return sum(buffer.nbytes for buffer in plan.buffers if buffer.name in STATE_BUFFERS)


def changes_since(config: RunConfig, source: Path) -> list[Change]:
    """The keys whose values `config` changes of those that the checkpoint `source` was trained with.

    Raises ConfigError for what may not change.
    """
    step = read_saved(checkpoint.read_state(source), source, config.divergence).state.step
    return changes_on_resume(config, load_config(source / CONFIG), step, source)


def find_checkpoints(config: RunConfig, resume: str, warn: Callable[[str], None]) -> list[Path]:
    """The checkpoints that `config` may go on from, the one to be taken first; none for a new run.

    `resume` is `auto`, `never`, or the path of a checkpoint or of a run. The first is verified, but for the
    content of its tensors, which loading does; the others are for when that finds it damaged. Raises before
    anything would be overwritten: `never` in a run that has checkpoints, and an older checkpoint of the run
    itself while newer ones exist.
    """
    own = run_directory(config) / checkpoint.CHECKPOINTS
    sources = _named_checkpoints(own, resume)
    if not sources:
        return []

    def check(path: Path) -> Path:
        checkpoint.verify(path, tensors=False)
        # Now, before minutes are spent on the data of what may be another run.
        changes_since(config, path)
        return path

    with _remedy(own, sources):
        first = _first_intact(sources, check, warn)
    return sources[sources.index(first) :]


def _first_intact(sources: Sequence[Path], use: Callable[[Path], T], warn: Callable[[str], None]) -> T:
    def skipped(path: Path, reason: str) -> None:
        warn(f"passed over a damaged checkpoint: {reason}")

    return checkpoint.first_intact(sources, use, skipped)


@contextmanager
def _remedy(own: Path, sources: Sequence[Path]) -> Iterator[None]:
    """Adds to a CheckpointError what is left where the run's `own` checkpoints were all that it could use."""
    try:
        yield
    except CheckpointError as error:
        if sources[0].parent.resolve() != own.resolve():
            raise
        raise CheckpointError(f"{error}; to start again, remove {own}") from error


def _named_checkpoints(own: Path, resume: str) -> list[Path]:
    existing = checkpoint.list_checkpoints(own)[::-1]
    if resume == "never":
        if existing:
            remedy = f"choose another name, or remove {own.parent}"
            problem = f"{own.parent} already holds checkpoints of a run"
            raise ConfigError([Problem("name", problem, remedy, "--resume never")])
        return []
    if resume == "auto":
        return existing
    sources = checkpoint.candidates(Path(resume))
    if existing and existing[0].resolve() != sources[0].resolve():
        if _began_from(own.parent, sources[0]):  # the same command, once more
            return existing
        remedy = "give the new run another name (name=...), or go on from there (--resume auto)"
        newest = existing[0].name
        problem = f"{own.parent} holds {newest} already, which resuming from {sources[0]} would leave behind"
        raise ConfigError([Problem("name", problem, remedy, f"--resume {resume}")])
    return sources


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
    sources: Sequence[Path] = (),
    warn: Callable[[str], None] = warnings.warn,
) -> Session:
    """Allocates the plan, and fills it from the first of the checkpoints `sources` that is intact; without
    any, with initial weights.
    """
    if sources:
        _check_arithmetic(sources[0], plan, config.device)
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
    if not sources:
        begun_from = _begin(trainer, config)
        state = TrainState(guard=GuardState.initial(plan.compute_dtype))
        return Session(config, data, Loader(*loader_arguments), trainer, state, None, begun_from=begun_from)

    def fill(source: Path) -> Session:
        clear(arena)
        saved = fill_from(trainer, source)
        if saved.get("data_sha256") != data.sha256:
            raise DataError(_explain_other_data(config, source, data))
        check_tokenizer(source, data.tokenizer)
        position, state, best = read_saved(saved, source, config.divergence)
        try:
            loader = Loader(*loader_arguments, state=position)
        except DataError as error:  # the data are the run's, so it is the position that is wrong
            raise DamagedCheckpoint(f"{source / STATE}: {error}") from error
        begun_from = saved.get("begun_from")  # a checkpoint of an older albor has none
        return Session(config, data, loader, trainer, state, source, best, begun_from)

    with _remedy(run_directory(config) / checkpoint.CHECKPOINTS, sources):
        return _first_intact(sources, fill, warn)


def _begin(trainer: Trainer, config: RunConfig) -> dict[str, str] | None:
    """The weights that a run begins with; returns the SHA-256 of the files that they come from, if any."""
    pretrained = open_for(config.model)
    if pretrained is not None:
        return fill_weights(trainer.arena, trainer.architecture, pretrained)
    initialise(trainer.arena, trainer.architecture, config.seed)
    return None


def _explain_other_data(config: RunConfig, source: Path, data: PreparedData) -> str:
    saved = source / data.tokenizer.file_name
    # One that is trained on the data is another one when these are.
    given = config.tokenizer.path is not None
    if given and not (saved.is_file() and saved.read_bytes() == data.tokenizer.model):
        return (
            f"{source} was trained with another tokenizer than {data.tokenizer_path}; restore "
            "tokenizer.path, or give the new run another name"
        )
    return (
        f"{source} was trained on other data than data.sources now give; restore the sources, or give the "
        "new run another name"
    )


def fill_from(trainer: Trainer, source: Path) -> dict[str, Any]:
    """Fills weights and moments from the checkpoint `source`, and returns its state.

    Raises DamagedCheckpoint for one that is not what was saved, and for one that is not finite, whoever saved
    it: no run goes on from it.
    """
    faults.reach("load.begin")
    saved = checkpoint.load(source, checkpoint_tensors(trainer))
    faults.reach("load.filled")
    if not is_finite(trainer.arena):
        raise DamagedCheckpoint(f"{source}: weights or moments of the optimizer are not finite")
    return saved


def is_finite(arena: Arena) -> bool:
    """Whether weights and moments hold neither NaN nor infinity."""
    return all(ops.is_finite(arena[name]) for name in STATE_BUFFERS if name in arena)


def _check_arithmetic(source: Path, plan: MemoryPlan, device: Literal["auto", "cuda", "cpu"]) -> None:
    """What the machine or albor's table of attention decides may not round the rest of a run otherwise; nor
    may `device: auto` take a run from a GPU to the CPU, as it would where a driver fails after a reboot.
    """
    saved = checkpoint.read_state(source)
    attention, chosen = saved.get("attention"), plan.attention
    if attention not in (None, "torch") and plan.device == "cpu" and device == "auto":
        problem = f"auto, which is the CPU here, and {source} was computed on a GPU"
        remedy = "find out why no GPU is found (albor doctor), or set device to cpu to go on without one"
        raise ConfigError([Problem("device", problem, remedy)])
    computed = saved.get("compute_dtype")
    if computed != plan.compute_dtype:
        problem = (
            f"{source} was computed in {computed}, and this machine computes the run in {plan.compute_dtype}"
        )
        remedy = "go on where it began, or give a new run another name"
        raise ConfigError([Problem("train.precision", problem, remedy)])
    # A checkpoint from a CPU has the CPU's attention: going on elsewhere is allowed (resume_policy, device).
    if attention not in (None, "torch", chosen.backend) and chosen.backend != "torch":
        problem = f"{source} was computed with {attention} attention, and here it would be {chosen}"
        remedy = f"train.attention={attention} goes on as it began"
        raise ConfigError([Problem("train.attention", problem, remedy)])
