"""The trackers by name, which are the names of their packages too. None is imported before it is used."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable
from importlib import import_module

from albor.errors import Problem
from albor.trackers.sink import Sink, Source

_CLASSES = {
    "tensorboard": "albor.trackers.tensorboard:TensorBoard",
    "trackio": "albor.trackers.trackio:Trackio",
    "wandb": "albor.trackers.wandb:Wandb",
}


def missing(trackers: Iterable[str], key: str) -> list[Problem]:
    """A problem with `key` for each of `trackers` that is not installed."""
    return [
        Problem(key, f"{tracker} is not installed", f"run: pip install {tracker}, or 'albor[track]' for all")
        for tracker in trackers
        if importlib.util.find_spec(tracker) is None
    ]


def open_sink(tracker: str, source: Source) -> Sink:
    """Imports the tracker, and opens it for the run."""
    module, _, name = _CLASSES[tracker].partition(":")
    opened: Sink = getattr(import_module(module), name)(source)
    return opened
