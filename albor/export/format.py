"""What is exported, and what a format has to offer so that `albor export` can write it and check it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from albor import checkpoint
from albor.architecture import Architecture
from albor.config import RunConfig
from albor.data.tokenizer import CHAT_MARKERS, Tokenizer
from albor.errors import AlborError
from albor.export.gate import Runtime, Tolerance
from albor.generate.load import Loaded, load_checkpoint
from albor.model.parameters import named_tensors
from albor.progress import Report

WEIGHTS = "weights"  # a checkpoint's group of tensors


class CannotCarry(AlborError):
    """A format, or the program that reads it, has no way to express this model or its vocabulary."""

    exit_code = 2


@dataclass(frozen=True)
class Source:
    """A trained model on its way out, in fp32 on the CPU, whatever it was trained in."""

    run: Path  # the run's directory, which may be gone but for the checkpoint
    checkpoint: Path
    state: dict[str, Any]  # the checkpoint's: step, tokens, loader, ...
    loaded: Loaded
    model_license: str | None  # an SPDX name, where whoever exports gave one

    @property
    def config(self) -> RunConfig:
        """What the run was trained by."""
        return self.loaded.config

    @property
    def tokenizer(self) -> Tokenizer:
        """The run's tokenizer; its vocabulary may be smaller than the model's."""
        return self.loaded.tokenizer

    @cached_property
    def architecture(self) -> Architecture:
        """The model's shapes and numbers."""
        return Architecture.from_config(self.config.model)

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """What ends a generation: the end of a document, and of a turn where the tokenizer knows turns."""
        ends = self.tokenizer.special_ids.get(CHAT_MARKERS[1])
        first = self.tokenizer.end_of_document_id
        return (first,) if ends is None or ends == first else (first, ends)

    def load_weights(self) -> None:
        """Fills the arena's weights from the checkpoint again: checking a format rounds them."""
        weights = named_tensors(self.loaded.arena["weights"], self.architecture)
        checkpoint.load(self.checkpoint, {WEIGHTS: weights}, partial=True, convert=True)


def open_source(path: Path, model_license: str | None = None) -> Source:
    """The model that `path` means (a run, a checkpoint, RUN/best); of several checkpoints the first intact.

    Raises CheckpointError where there is none, and DoesNotFit where this machine has not the memory.
    """

    def use(directory: Path) -> Source:
        loaded = load_checkpoint(directory, "cpu", dtype="float32")
        state = checkpoint.read_state(directory)
        return Source(directory.parent.parent, directory, state, loaded, model_license)

    return checkpoint.first_intact(checkpoint.candidates(path), use)


@dataclass(frozen=True)
class Format:
    """One way to write a model down. A module of this package defines it, and imports its library inside."""

    name: str  # what --to calls it, and the directory below RUN/export
    program: str  # that checks it
    dtypes: tuple[str, ...]  # what --dtype may be; the first is the default unless `default_dtype` says other
    # (source, dtype) -> bytes that `write` will put on the disk, not too few: what the disk must have free.
    needed_bytes: Callable[[Source, str], int]
    # (source, dtype): raises CannotCarry, or AlborError for a missing library, before anything is written.
    check: Callable[[Source, str], None]
    # (source, empty directory, dtype, progress): writes the whole export.
    write: Callable[[Source, Path, str, Report], None]
    # (name in the Hugging Face layout, fp32 tensor, dtype) -> the values that the file has of it, in fp32.
    rounded: Callable[[str, torch.Tensor, str], torch.Tensor]
    # (directory, dtype) -> the program with the export loaded; raises gate.NotInstalled.
    open_runtime: Callable[[Path, str], Runtime]
    # dtype -> how far the program's numbers may be from albor's own over the same rounded weights.
    tolerance: Callable[[str], Tolerance]

    def default_dtype(self, source: Source) -> str:
        """The run's own precision where the format has it, else its first."""
        own = source.config.train.precision
        return own if own in self.dtypes else self.dtypes[0]
