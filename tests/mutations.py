"""Guards, dropped one at a time: a row of the fault matrix proves something only if it fails without its
guard. `apply` patches albor in the process under test, before its command begins; `cases` are those of
test_faults.py that must then fail, each saying what `shows` matches. test_guards.py has the guards whose
tests need no process of their own.
"""

from __future__ import annotations

import dataclasses
import fcntl
import itertools
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from albor import checkpoint, tensorfile
from albor import signals as two_signals
from albor.data import loader
from albor.data.cache import Cache
from albor.data.loader import Loader
from albor.errors import CheckpointError
from albor.memory import shortage
from albor.train import loop, run, session, signals, step
from albor.train.guard import GuardState
from albor.train.loop import Loop
from albor.train.metrics import MetricsLog
from albor.train.saved import Saved
from albor.train.step import TrainState


@dataclass(frozen=True)
class Mutation:
    """Which cases rest on a guard, how it is taken away, and what they then fail with: `shows` is a regular
    expression, since a case that fails of something else proves nothing.
    """

    cases: tuple[str, ...]
    apply: Callable[[], None]
    shows: str


MUTATIONS: dict[str, Mutation] = {}


def without(guard: str, *cases: str, shows: str = "") -> Callable[[Callable[[], None]], Callable[[], None]]:
    """Enters a function that takes `guard` away."""

    def enter(apply: Callable[[], None]) -> Callable[[], None]:
        assert guard not in MUTATIONS
        MUTATIONS[guard] = Mutation(cases, apply, shows)
        return apply

    return enter


def nothing(*_: Any, **__: Any) -> None:
    """In place of what guards."""


# What a resumed run takes up


@without(
    "the loader's position is restored",
    "1 kill step.begin",
    "2 kill five in one place",
    "22 mid-accumulation",
    shows="differs in consumed",
)
def _() -> None:
    restored = session.Loader

    def begun_anew(*arguments: Any, state: Any = None, **keywords: Any) -> Loader:
        return restored(*arguments, **keywords)

    session.Loader = begun_anew  # type: ignore[misc, assignment]


def _restored(change: Callable[[TrainState], TrainState]) -> None:
    """Every state that is read from a checkpoint is changed."""
    read = TrainState.from_json
    TrainState.from_json = staticmethod(lambda saved: change(read(saved)))  # type: ignore[method-assign]


@without(
    "the bias correction's count is restored",
    "1 kill step.updated",
    shows=r"differs in .*weights\.safetensors",
)
def _() -> None:
    _restored(lambda state: dataclasses.replace(state, updates=0))


@without("the guard's window is restored", "1 kill step.accumulated", shows=r"differs in state\.json")
def _() -> None:
    _restored(lambda state: dataclasses.replace(state, guard=GuardState()))


@without(
    "random numbers are keyed by their place",
    "1 kill with rounded state",
    shows=r"differs in .*optimizer\.safetensors",
)
def _() -> None:
    """Instead, the n-th draw of this process, as from a generator whose state is not saved."""
    drawn, derive = itertools.count(1), step.derive_seed
    step.derive_seed = lambda seed, purpose, number: derive(seed, purpose, next(drawn))


@without("rows beyond the checkpoint are taken back", "1 kill step.begin", shows="differs in rows")
def _() -> None:
    MetricsLog.truncate_after = nothing  # type: ignore[method-assign]


@without("an epoch's order is that of its number", "22 an epoch's edge", shows="differs in consumed")
def _() -> None:
    """Instead, the n-th order of this process."""
    made, permute = itertools.count(), loader.Permutation
    loader.Permutation = lambda n, *key: permute(n, *key[:-1], next(made))  # type: ignore[misc, assignment]


@without("an evaluation that was lost is made up for", "1 kill evaluate.batch", shows="differs in rows")
def _() -> None:
    Loop._catch_up = nothing  # type: ignore[method-assign]


@without("a stopped step gives its data back", "8 int step.micro_batch", shows="was passed over")
def _() -> None:
    begun = Loader.__init__

    def init(self: Loader, *arguments: Any, **keywords: Any) -> None:
        begun(self, *arguments, **keywords)
        self.restore = nothing  # type: ignore[method-assign]

    Loader.__init__ = init  # type: ignore[method-assign]


# How a checkpoint comes about


@without(
    "a checkpoint gets its name last",
    "3 kill second file",
    shows=r"there is no manifest\.json",
)
def _() -> None:
    """It is written where it belongs."""
    write = checkpoint._write_contents

    def in_place(directory: Path, number: int, *arguments: Any) -> Any:
        named = directory.parent / checkpoint.checkpoint_name(number)
        os.rename(directory, named)
        directory.symlink_to(named.name)
        return write(named, number, *arguments)

    checkpoint._write_contents = in_place


@without("litter is removed", "3 kill first save.verified", shows="left behind")
def _() -> None:
    checkpoint.clear_leftovers = nothing


@without(
    "the lock, not a process's number, says whose litter it is",
    "3 litter of a number that lives again",
    shows="left behind",
)
def _() -> None:
    clear = checkpoint.clear_leftovers
    checkpoint.clear_leftovers = lambda directory, **_: clear(directory)


@without("a checkpoint is read with its hashes", "6 a flipped bit", shows="passed over a damaged checkpoint")
def _() -> None:
    read = checkpoint.read_tensors_into

    def unread(path: Path, *arguments: Any, **keywords: Any) -> Any:
        read(path, *arguments, **keywords)
        return checkpoint.Manifest.from_bytes((path.parent / checkpoint.MANIFEST).read_bytes()).files[
            path.name
        ]

    checkpoint.read_tensors_into = unread


@without(
    "a state is held against its manifest",
    "26 a position that contradicts the step",
    shows="not the state of a run|differs in",
)
def _() -> None:
    session.read_saved = lambda saved, source, policy: Saved(
        saved["loader"], TrainState.from_json(saved), saved["best_validation_loss"]
    )


@without("what the disk does not give is damage", "6 an unreadable file", shows="Input/output error")
def _() -> None:
    tensorfile._unreadable = lambda path, reason: CheckpointError(str(reason))  # type: ignore[assignment]


@without("an older checkpoint goes when a newer one is whole", "3 kill second file", shows="0 == 12")
def _() -> None:
    """It goes first, to make room."""
    save = checkpoint.save

    def room_first(directory: Path, number: int, *arguments: Any, **keywords: Any) -> Path:
        for path in checkpoint.list_checkpoints(directory):
            shutil.rmtree(path)
        return save(directory, number, *arguments, **keywords)

    checkpoint.save = room_first


@without("a step is saved before it is evaluated", "13 saved first", shows="6 == 12")
def _() -> None:
    save, evaluate = Loop._save, Loop._evaluate

    def evaluate_then_save(self: Loop) -> None:
        evaluate(self)
        save(self, planned=True)

    Loop._save = lambda self, *_, **__: True  # type: ignore[method-assign]
    Loop._evaluate = evaluate_then_save  # type: ignore[method-assign]


@without("a finished run has nothing to save", "22 completed", shows="was saved again")
def _() -> None:
    session.Session.saved_step = property(nothing)  # type: ignore[assignment, method-assign]


@without("prepared data appear whole", "1 kill shard.write", shows="manifest")
def _() -> None:
    """They are written where they belong."""

    def in_place(self: Cache, name: str, write: Callable[[Path], None]) -> Path:
        directory = self.directory / name
        if not directory.is_dir():
            directory.mkdir()
            write(directory)
        return directory

    Cache.entry = in_place  # type: ignore[method-assign]


# What goes on around a run


@without("a run directory is locked", "7 claimed", shows=r"== \(1, 0\)")
def _() -> None:
    fcntl.flock = nothing  # type: ignore[assignment]


@without("the first signal is noted, not obeyed at once", "8 hup step.accumulated", shows="== 75")
def _() -> None:
    signals.StopRequest.__enter__ = lambda self: self  # type: ignore[method-assign]
    signals.StopRequest.__exit__ = nothing  # type: ignore[method-assign, assignment]


@without("the second signal ends it", "8 told twice in a step", shows=r"in \(143, -15\)")
def _() -> None:
    two_signals._end_at_the_second = lambda arrivals, *_: os.read(arrivals, 1 << 16)


@without("a shortage beside the training is survived", "13 memory evaluation", shows="out of memory")
def _() -> None:
    loop.is_out_of_memory = lambda error: False


@without("the driver's words for a shortage are known", "13 memory of the driver", shows="out of memory")
def _() -> None:
    shortage._SAID = re.compile("DefaultCPUAllocator: can't allocate memory|.*CUBLAS_STATUS_ALLOC_FAILED")


@without("a shortage is explained while a run is opened too", "13 memory arena", shows="Traceback")
@without("a shortage is explained", "13 memory step", shows="Traceback")
def _() -> None:
    run.is_out_of_memory = lambda error: False


@without("a read that comes short is noticed", "14 shard cut off", shows="it went on with")
def _() -> None:
    read = os.pread
    os.pread = lambda file, size, offset: read(file, size, offset).ljust(size, b"\0")


@without("a read that fails is explained", "14 shard unreadable", shows="it went on with")
def _() -> None:
    """As if the disk gave zeros."""
    read = os.pread

    def zeros(file: int, size: int, offset: int) -> bytes:
        try:
            return read(file, size, offset)
        except OSError:
            return bytes(size)

    os.pread = zeros


@without("a log that fails is no failure", "25 no metrics", shows="metrics.jsonl")
def _() -> None:
    MetricsLog._attempt = lambda self, path, write: write(path)  # type: ignore[method-assign]
