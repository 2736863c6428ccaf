"""A micro-batch on its way into the arena's io buffers."""

from __future__ import annotations

import numpy as np
import torch

from albor.architecture import IGNORED_TARGET
from albor.memory.arena import Arena
from albor.memory.plan import STAGED_BATCHES
from albor.ops import Ops


class BatchInput:
    """Fills the io buffers with one micro-batch after the other.

    On a GPU it goes through page-locked memory, in turns, so that the host need not wait for the device: only
    for the batch before the last to have arrived.
    """

    def __init__(self, arena: Arena, operations: Ops, end_of_document: int | None):
        """`end_of_document` is the token that ends a document, for a plan that keeps documents apart."""
        self._arena, self._ops, self._end_of_document = arena, operations, end_of_document
        if "io.document_start" in arena and end_of_document is None:
            raise ValueError("data.document_mask needs to know the token that ends a document")
        self._arrived: list[torch.cuda.Event | None] = [None] * STAGED_BATCHES
        self._turn = 0

    def load(self, tokens: np.ndarray, targets: np.ndarray, *, train: bool = True) -> int:
        """Puts tokens and targets, (B, T) int64 each, into the io buffers; returns the number of its target
        tokens. With `train`, also what the embedding's backward must know.
        """
        arrays = {"tokens": tokens.reshape(-1), "targets": targets.reshape(-1)}
        if train:
            arrays |= self._ops.token_index(arrays["tokens"])
        if "io.document_start" in self._arena:
            assert self._end_of_document is not None
            arrays |= document_borders(tokens, self._end_of_document)
        move = self._stage if self._arena.device.type == "cuda" and train else self._copy
        move(arrays)
        return int(np.count_nonzero(targets != IGNORED_TARGET))

    def _copy(self, arrays: dict[str, np.ndarray]) -> None:
        for name, values in arrays.items():
            self._target(name, values).copy_(torch.from_numpy(values))

    def _target(self, name: str, values: np.ndarray) -> torch.Tensor:
        """What `values` fill of their buffer, which has room for a step's batch and an evaluation's."""
        return self._arena[f"io.{name}"][: values.size]

    def _stage(self, arrays: dict[str, np.ndarray]) -> None:
        turn, self._turn = self._turn, (self._turn + 1) % STAGED_BATCHES
        arrived = self._arrived[turn]
        if arrived is not None:
            arrived.synchronize()
        for name, values in arrays.items():
            staged = self._arena[f"io.staged.{turn}.{name}"]
            staged.copy_(torch.from_numpy(values))
            self._target(name, values).copy_(staged, non_blocking=True)
        self._arrived[turn] = torch.cuda.current_stream().record_event(torch.cuda.Event(blocking=True))


def document_borders(tokens: np.ndarray, end_of_document: int) -> dict[str, np.ndarray]:
    """Where each token's document begins and ends (exclusively) within its row; tokens (B, T).

    A document ends with its end token; what follows, and the row's beginning, begin another.
    """
    batch, length = tokens.shape
    positions = np.arange(length, dtype=np.int32)
    ends = tokens == end_of_document
    begins = np.zeros((batch, length), dtype=bool)
    begins[:, 1:] = ends[:, :-1]
    start = np.maximum.accumulate(np.where(begins, positions, 0), axis=1)
    stops = np.where(ends, positions + 1, length)
    end = np.minimum.accumulate(stops[:, ::-1], axis=1)[:, ::-1]
    return {
        "document_start": start.astype(np.int32).reshape(-1),
        "document_end": end.astype(np.int32).reshape(-1),
    }
