"""A trained model, ready to evaluate or to write, from a run or a checkpoint directory."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, NamedTuple

import torch

from albor import checkpoint
from albor.architecture import Architecture
from albor.config import RunConfig
from albor.configfile import load_config
from albor.data.tokenizer import FILES, Tokenizer
from albor.errors import CheckpointError, DoesNotFit
from albor.manifest import Manifest
from albor.memory.arena import Arena
from albor.memory.devices import compute_dtype, this_machine
from albor.memory.plan import MemoryPlan, plan_inference
from albor.model.parameters import named_tensors
from albor.model.single_token import SMALL, suits
from albor.model.transformer import Transformer
from albor.units import format_bytes

_CONFIG, _WEIGHTS = "config.yaml", "weights"
_FP32_BYTES = 4


class Loaded(NamedTuple):
    """A model for inference, with the configuration that it was trained by."""

    config: RunConfig
    model: Transformer
    tokenizer: Tokenizer
    arena: Arena


def load_for_inference(path: Path, device: Literal["auto", "cuda", "cpu"] = "auto", batch: int = 0) -> Loaded:
    """The newest checkpoint of the run at `path`, its best one (`path/best`), or the checkpoint `path`
    itself; what is read is verified.

    It need not have been trained on this machine: `auto` is CUDA if there is a GPU, and weights are rounded
    where another dtype is computed in here. There is memory to write in, and to evaluate `batch` sequences at
    a time. Raises CheckpointError where there is no intact checkpoint, and DoesNotFit where there is not as
    much memory as its configuration asks for.
    """
    place: Literal["cuda", "cpu"] = "cuda" if device != "cpu" and torch.cuda.is_available() else "cpu"
    return checkpoint.first_intact(
        checkpoint.candidates(path), lambda found: load_checkpoint(found, place, batch)
    )


def load_to_write(path: Path) -> Loaded:
    """`load_for_inference` for a process that does nothing but write, token after token.

    On a CPU a small model computes in fp32 then, whatever it was trained in, and in one thread, which is set
    for the process: bf16 is widened exactly, and is written fastest by `albor.model.single_token`.
    """
    place: Literal["cuda", "cpu"] = "cuda" if torch.cuda.is_available() else "cpu"

    def use(directory: Path) -> Loaded:
        loaded = load_checkpoint(directory, place)
        if place == "cuda" or loaded.arena["weights"].numel() * _FP32_BYTES > SMALL:
            return loaded
        torch.set_num_threads(1)
        return loaded if suits(loaded.arena) else load_checkpoint(directory, place, dtype="float32")

    return checkpoint.first_intact(checkpoint.candidates(path), use)


def load_checkpoint(
    directory: Path,
    place: Literal["cuda", "cpu"],
    batch: int = 0,
    dtype: str | None = None,
    scored_tokens: int = 0,
) -> Loaded:
    """`load_for_inference` of this one checkpoint; `dtype` is what to compute in, None: as it was trained.

    With `scored_tokens` the sequences to evaluate may be as long as the context, whatever it was trained on,
    and there is memory for so many tokens of them at a time, or for one sequence; no document borders are
    looked at. Raises DamagedCheckpoint where it does not verify.
    """
    manifest = checkpoint.verify(directory, tensors=False)
    config = load_config(directory / _CONFIG)
    kind = config.tokenizer.kind
    tokenizer = Tokenizer.load(directory / FILES[kind], kind)
    if tokenizer.vocab_size > config.model.vocab_size:
        raise CheckpointError(
            f"{directory}: the tokenizer has {tokenizer.vocab_size} tokens, and the model only "
            f"{config.model.vocab_size}"
        )
    # The CPU has no fp16 arithmetic worth the name, but may well write with what was trained in it.
    precision = "fp32" if place == "cpu" and config.train.precision == "fp16" else config.train.precision
    architecture = Architecture.from_config(config.model)
    # Both before anything is allocated: the configuration may be a stranger's.
    _check_shapes(directory, manifest, architecture)
    shapes = config
    if scored_tokens:
        length = config.model.max_position_embeddings
        batch = max(1, scored_tokens // length)
        data = config.data.model_copy(update={"sequence_length": length, "document_mask": False})
        shapes = config.model_copy(update={"data": data})
    plan = plan_inference(shapes, place, dtype or compute_dtype(precision, place), batch)
    _check_fits(directory, plan, place)
    arena = Arena(plan, place)
    weights = named_tensors(arena["weights"], architecture)
    checkpoint.load(directory, {_WEIGHTS: weights}, partial=True, convert=True)
    return Loaded(config, Transformer(architecture, arena, shapes.data.sequence_length), tokenizer, arena)


def _check_shapes(directory: Path, manifest: Manifest, architecture: Architecture) -> None:
    """The weights that the manifest lists are those of the model that the configuration describes."""
    file = f"{_WEIGHTS}.safetensors"
    found = {name: spec.shape for name, spec in manifest.tensors.get(file, {}).items()}
    wanted = {parameter.name: parameter.shape for parameter in architecture.parameters}
    for name in sorted(found.keys() | wanted.keys()):
        if found.get(name) != wanted.get(name):
            sizes = [list(shapes[name]) if name in shapes else "missing" for shapes in (wanted, found)]
            problem = (
                f"describes another model than {file} holds: {name} would be {sizes[0]}, and is {sizes[1]}"
            )
            raise CheckpointError(f"{directory / _CONFIG}: {problem}")


def _check_fits(directory: Path, plan: MemoryPlan, place: Literal["cuda", "cpu"]) -> None:
    """By the arena alone, which is nearly all of it: what is refused here could not succeed."""
    hardware = this_machine(place)
    needed = plan.size("device") + (plan.size("host") + plan.size("pinned") if place == "cpu" else 0)
    if hardware.capacity_bytes is not None and needed > hardware.capacity_bytes:
        raise DoesNotFit(
            f"{directory}: writing with this model takes {format_bytes(needed)}, and "
            f"{format_bytes(hardware.capacity_bytes)} are free ({hardware.description}); free some, or write "
            "on a larger machine"
        )
