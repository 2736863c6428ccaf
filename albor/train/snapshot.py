"""A copy of a run's state in host memory, from which a checkpoint is written while the training goes on."""

from __future__ import annotations

import torch

from albor.memory.plan import STATE_BUFFERS
from albor.train.step import Trainer
from albor.train.streams import Event


class Snapshot:
    """The plan's `snapshot.*` buffers: one for each flat buffer that a checkpoint holds."""

    def __init__(self, trainer: Trainer):
        self._trainer = trainer
        self.flats = {
            name: trainer.arena[f"snapshot.{name}"] for name in STATE_BUFFERS if name in trainer.arena
        }
        self._arrivals: list[Event] = []

    def take(self) -> None:
        """Begins to copy the state as it is now. A GPU goes on meanwhile, but for the next update."""
        trainer = self._trainer
        self._arrivals = [
            trainer.streams.copy_out(flat, trainer.arena[name]) for name, flat in self.flats.items()
        ]
        trainer.update_after(self._arrivals)

    def wait(self) -> dict[str, torch.Tensor]:
        """The copy by the names of the buffers, once all of it has arrived. Other threads go on."""
        for arrival in self._arrivals:
            self._trainer.streams.host_waits(arrival)
        return self.flats
