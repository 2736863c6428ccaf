"""A Hugging Face directory of a Llama: config.json, and safetensors in one file or in several.

Only what albor computes is taken: any key that makes another function of the same weights is refused by its
name. A pickle is never opened.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from albor.errors import CheckpointError
from albor.pretrained.model import Pretrained, refusal
from albor.strictjson import from_json, read_bounded
from albor.tensorfile import each_tensor, tensor_specs

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
_TOKENIZERS = ("tokenizer.json", "tokenizer.model")
# Keys of a LlamaConfig that must have this value, or not be there at all (null).
_FIXED: dict[str, Any] = {
    "model_type": "llama",
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "partial_rotary_factor": 1.0,
    "quantization_config": None,
}
_LARGEST = 2**63 - 1  # number that can be meant
_SIZES = (
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size",
)  # fmt: skip

# What a LlamaConfig has where these are left out, or null.
_DEFAULTS: dict[str, Any] = {
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
}


def open_directory(path: Path) -> Pretrained:
    """The model in the directory `path`, of which nothing but its configuration is read yet.

    Raises ConfigError, with everything that is wrong with it.
    """
    config = _read_json(path, CONFIG)
    problems = [
        f"{CONFIG} has {key} {config[key]!r}, and albor computes {_words(value)} only"
        for key, value in _FIXED.items()
        if config.get(key) not in (None, value)
    ]
    classes = config.get("architectures") or []
    if config.get("model_type") is None and not classes:
        problems.append(f"{CONFIG} has no model_type and no architectures, so that it may be any model")
    if classes and classes != ["LlamaForCausalLM"]:
        problems.append(f"{CONFIG} has architectures {classes!r}, and albor reads LlamaForCausalLM only")
    sizes: dict[str, Any] = {key: config.get(key) for key in _SIZES}
    missing = [key for key, value in sizes.items() if not _is_a(int, value)]
    problems += [f"{CONFIG} has no {key} that is a number" for key in missing]
    given = {key: default if config.get(key) is None else config[key] for key, default in _DEFAULTS.items()}
    for key, value in given.items():
        kind = type(_DEFAULTS[key])
        if not _is_a(kind, value):
            wanted = "truth value" if kind is bool else "positive number"
            problems.append(f"{CONFIG} has {key} {value!r}, which is no {wanted}")
    theta, rope_problems = _rope(config)
    problems += rope_problems
    kv_heads = config.get("num_key_value_heads")
    if kv_heads is None:
        kv_heads = sizes["num_attention_heads"]
    elif not _is_a(int, kv_heads):
        problems.append(f"{CONFIG} has num_key_value_heads {kv_heads!r}, which is no positive number")
    if not missing:
        width = sizes["hidden_size"] // sizes["num_attention_heads"]
        if config.get("head_dim") not in (None, width):
            problems.append(
                f"{CONFIG} has head_dim {config['head_dim']!r}, and albor's is hidden_size / "
                f"num_attention_heads, {width}"
            )
    if problems:
        raise refusal(path, problems)
    keys = {
        **sizes,
        "num_key_value_heads": kv_heads,
        "max_position_embeddings": given["max_position_embeddings"],
        "rope_theta": theta,
        "rms_norm_eps": float(given["rms_norm_eps"]),
        "tie_word_embeddings": given["tie_word_embeddings"],
    }
    tokenizer = next((path / name for name in _TOKENIZERS if (path / name).is_file()), None)
    return Pretrained(path, keys, _Safetensors(path), tokenizer)


class _Safetensors:
    """See `Weights`."""

    def __init__(self, directory: Path):
        self._paths = _weight_files(directory)
        self.sha256: dict[str, str] = {}

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """See `Weights`."""
        for path in self._paths:
            digest = hashlib.sha256()
            yield from each_tensor(path, digest.update)
            self.sha256[path.name] = digest.hexdigest()


def _weight_files(directory: Path) -> list[Path]:
    """The files with the weights: the single one, or those of the index, which must have what it says."""
    if (directory / WEIGHTS).exists():
        return [directory / WEIGHTS]
    if not (directory / INDEX).exists():
        pickles = sorted(path.name for path in directory.glob("*.bin"))
        if pickles:
            raise refusal(
                directory,
                [
                    f"it has its weights in {pickles[0]}, a pickle, which can run any code when it is read; "
                    "save the model again with save_pretrained, which writes safetensors"
                ],
            )
        raise refusal(directory, [f"there is no {WEIGHTS} and no {INDEX} in it"])
    places = _read_json(directory, INDEX).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(name, str) for name in places.values()):
        raise refusal(directory, [f"{INDEX} has no weight_map"])
    names = sorted(set(places.values()))
    if any(Path(name).name != name for name in names):
        raise refusal(directory, [f"{INDEX} names a file outside of the directory"])
    paths = [directory / name for name in names]
    for path in paths:
        found = tensor_specs(path).keys()
        if missing := sorted(
            name for name, file in places.items() if file == path.name and name not in found
        ):
            raise CheckpointError(f"{path} has no {missing[0]}, which {INDEX} says that it has")
    return paths


def _rope(config: dict[str, Any]) -> tuple[float, list[str]]:
    """The base of the rotary frequencies, in either of the two places where transformers writes it."""
    nested = config.get("rope_parameters") or {}
    scaling = config.get("rope_scaling") or {}
    problems = []
    for name, section in (("rope_parameters", nested), ("rope_scaling", scaling)):
        if not isinstance(section, dict):
            problems.append(f"{CONFIG} has {name} {section!r}, which is no JSON object")
        elif (kind := section.get("rope_type", section.get("type", "default"))) != "default":
            problems.append(f"{CONFIG} has {name} of type {kind!r}, and albor turns by the default only")
    if problems:
        return 0.0, problems
    given = nested.get("rope_theta", config.get("rope_theta", 10000.0))
    if not _is_a(float, given):
        problems.append(f"{CONFIG} has rope_theta {given!r}")
        return 0.0, problems
    return float(given), problems


def _is_a(kind: type, value: Any) -> bool:
    """Whether a value of JSON is a truth value, or a positive whole number, or any positive number."""
    if kind is bool or type(value) is bool:
        return kind is type(value)
    kinds = (int, float) if kind is float else (int,)
    return type(value) in kinds and 0 < value <= _LARGEST


def _read_json(directory: Path, name: str) -> dict[str, Any]:
    try:
        content = from_json(read_bounded(directory / name))
    except FileNotFoundError as error:
        raise refusal(directory, [f"there is no {name} in it"]) from error
    except OSError as error:
        raise refusal(directory, [f"{name} cannot be read: {error.strerror or error}"]) from error
    except ValueError as error:
        raise refusal(directory, [f"{name} cannot be read: {error}"]) from error
    if not isinstance(content, dict):
        raise refusal(directory, [f"{name} is no JSON object"])
    return content


def _words(value: Any) -> str:
    return {None: "without it", False: "false", 1.0: "1"}.get(value, repr(value))
