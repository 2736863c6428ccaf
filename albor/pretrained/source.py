"""`model.init_from`: open what it names, hold it against the configuration, and fill the weights from it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from albor import gguffile
from albor.architecture import Architecture
from albor.config import ModelConfig
from albor.data.tokenizer import Kind, Tokenizer
from albor.errors import AlborError, CheckpointError, ConfigError, Problem
from albor.export.weights import read_hf_tensors
from albor.memory.arena import Arena
from albor.model.parameters import clear, master_weights
from albor.pretrained.gguf_file import open_gguf
from albor.pretrained.hf_directory import open_directory
from albor.pretrained.model import KEY, Pretrained, refusal
from albor.yamlcore import dump_yaml

# Training does not see it, and a run may use less of the context than the model has, or extend it.
_MAY_DIFFER = ("max_position_embeddings",)


def open_pretrained(path: Path) -> Pretrained:
    """The model that the directory or the GGUF file at `path` holds. Weights are not read yet.

    Raises ConfigError for one that albor cannot be, with every reason, and DataError for a damaged file.
    """
    path = path.expanduser()
    if path.is_dir():
        return open_directory(path)
    if path.suffix.lower() == gguffile.SUFFIX:
        return open_gguf(path)
    problem = (
        "it is no directory and no .gguf file" if path.exists() else "there is no such file or directory"
    )
    raise refusal(path, [problem])


def open_for(model: ModelConfig) -> Pretrained | None:
    """The model that `model.init_from` names, which has the architecture that the other keys describe.

    Raises ConfigError with every key that does not fit, and what would be right.
    """
    if model.init_from is None:
        return None
    pretrained = open_pretrained(Path(model.init_from))
    given = model.model_dump()
    given["num_key_value_heads"] = model.num_key_value_heads or model.num_attention_heads
    problems = [
        Problem(
            f"model.{key}", f"{given[key]}, but {pretrained.path} has {_shown(value)}", f"use {_shown(value)}"
        )
        for key, value in pretrained.keys.items()
        if key not in _MAY_DIFFER and not _same(given[key], value)
    ]
    if problems:
        raise ConfigError(problems)
    return pretrained


def fill_weights(arena: Arena, model: Architecture, pretrained: Pretrained) -> dict[str, str]:
    """Fills the weights of a run that begins, clears the rest of its state, and returns the SHA-256 of each
    file that was read, by its name.

    Raises CheckpointError where the tensors are not those of `model` or are not finite.
    """
    clear(arena)
    master = master_weights(arena)
    try:
        read_hf_tensors(pretrained.weights.tensors(), master, model)
    except CheckpointError as error:
        raise CheckpointError(f"{KEY}: {pretrained.path}: {error}") from error
    if master is not arena["weights"]:
        arena["weights"].copy_(master)
    return pretrained.weights.sha256


def describe(path: Path) -> str:
    """The sections `model` and `tokenizer` of a configuration that begins from `path`, as YAML."""
    pretrained = open_pretrained(path)
    sections: dict[str, dict[str, Any]] = {"model": {"init_from": str(path), **pretrained.keys}}
    comment = ""
    place = pretrained.tokenizer
    if place is not None:
        kind: Kind = "sentencepiece" if place.suffix == ".model" else "hf"
        try:
            Tokenizer.load(place, kind)
        except AlborError as error:
            comment = "".join(f"# {line}\n" for line in str(error).splitlines())
        sections["tokenizer"] = {"kind": kind, "path": str(place)}
    else:
        comment = f"# there is no tokenizer in {path}; give the model's own\n"
        sections["tokenizer"] = {"kind": "hf", "path": None}
    return dump_yaml({"model": sections["model"]}) + comment + dump_yaml({"tokenizer": sections["tokenizer"]})


def _same(given: Any, found: Any) -> bool:
    """Whether two values of a key are one; a GGUF has its numbers in fp32."""
    if isinstance(found, float):
        return bool(np.float32(given) == np.float32(found))
    return bool(given == found)


def _shown(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else f"{value}"
