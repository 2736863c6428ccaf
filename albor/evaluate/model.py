"""A checkpoint that is to be evaluated: the model, and what its results are named and stored by."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from albor import __version__, checkpoint
from albor.errors import ConfigError, Problem
from albor.generate.load import Loaded, load_checkpoint
from albor.manifest import MANIFEST, Manifest

# Tokens at a time: on a CPU a batch that fits its caches is as fast as a larger one.
_BATCH_TOKENS = {"cpu": 4096, "cuda": 32768}
DTYPES = {"fp32": "float32", "bf16": "bfloat16"}


@dataclass(frozen=True)
class Opened:
    """A verified checkpoint, loaded with memory to score texts in."""

    loaded: Loaded
    path: Path
    step: int
    facts: dict[str, Any]  # all that the bits of its scores depend on, but for what is scored

    @property
    def results(self) -> Path:
        """Where results go: the run's `eval`, or one beside a checkpoint that lies in no run."""
        above = self.path.resolve().parent
        return (above.parent if above.name == "checkpoints" else above) / "eval"


def open_model(
    path: Path, device: str = "auto", dtype: str | None = None, batch_tokens: int | None = None
) -> Opened:
    """The newest intact checkpoint of the run at `path`, its best (`path/best`), or the checkpoint `path`.

    `dtype` (fp32, bf16) is what is computed in, None: as in training. Raises what
    `load_for_inference` does.
    """
    if device == "cuda" and not torch.cuda.is_available():
        problem = "there is no GPU that PyTorch can use"
        raise ConfigError([Problem("--device", problem, "use auto or cpu", "command line")])
    place: Literal["cuda", "cpu"] = "cuda" if device != "cpu" and torch.cuda.is_available() else "cpu"
    tokens = batch_tokens or _BATCH_TOKENS[place]

    def use(found: Path) -> Opened:
        loaded = load_checkpoint(
            found, place, dtype=None if dtype is None else DTYPES[dtype], scored_tokens=tokens
        )
        manifest = (found / MANIFEST).read_bytes()
        facts = _facts(hashlib.sha256(manifest).hexdigest(), loaded, place)
        return Opened(loaded, found, Manifest.from_bytes(manifest).step, facts)

    return checkpoint.first_intact(checkpoint.candidates(path), use)


def _facts(manifest_sha256: str, loaded: Loaded, place: str) -> dict[str, Any]:
    on_gpu = place == "cuda"
    return {
        "albor": __version__,
        "checkpoint": manifest_sha256,
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name() if on_gpu else "cpu",
        "threads": None if on_gpu else torch.get_num_threads(),  # who shares a sum, and so its rounding
        "dtype": str(loaded.arena["weights"].dtype).removeprefix("torch."),
        "batch_tokens": loaded.arena["io.tokens"].shape[0],
    }
