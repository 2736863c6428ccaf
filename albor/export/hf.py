"""Export to a Hugging Face directory: the Llama layout, which needs no code of ours to be loaded.

transformers, MLX and vLLM read it, and llama.cpp's and Ollama's converters. What they disagree about is
written in every way that one of them looks for: the rotary base at the top level (mlx-lm) and in
`rope_parameters` (transformers 5); `tie_word_embeddings` always, for its default is false in one and true in
the other.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch

from albor.durable import write_file
from albor.errors import AlborError
from albor.export.card import write_card
from albor.export.format import CannotCarry, Format, Source
from albor.export.gate import NotInstalled, Runtime, Tolerance
from albor.export.tokenizer_files import write_tokenizer_files
from albor.export.weights import Piece, hf_tensors, layout
from albor.progress import Report
from albor.strictjson import to_json
from albor.tensorfile import write_tensors

SHARD_BYTES = 5_000_000_000  # of tensors in a file; from there on there are several, and an index
_TORCH = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_NAMES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
_OTHER_BYTES = 1_000_000  # configuration, card and picture
_TOKENIZER_BYTES_PER_TOKEN = 400  # of tokenizer.json and tokenizer.model together, with the merges
_TEMPERATURE = 0.8  # as `albor generate`


def config_json(source: Source, dtype: str) -> dict[str, Any]:
    """The content of config.json: a LlamaConfig, with every key of which readers have unlike defaults."""
    model, tokenizer = source.architecture, source.tokenizer
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": model.vocab_size,
        "hidden_size": model.hidden_size,
        "intermediate_size": model.intermediate_size,
        "num_hidden_layers": model.num_hidden_layers,
        "num_attention_heads": model.num_attention_heads,
        "num_key_value_heads": model.num_key_value_heads,
        "head_dim": model.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": model.max_position_embeddings,
        "initializer_range": model.initializer_range,
        "rms_norm_eps": model.rms_norm_eps,
        "rope_theta": model.rope_theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": model.rope_theta},
        "attention_bias": False,
        "mlp_bias": False,
        "attention_dropout": 0.0,
        "tie_word_embeddings": model.tie_word_embeddings,
        "use_cache": True,
        # albor puts the end of a document in front of every text, so it begins one too.
        "bos_token_id": tokenizer.end_of_document_id,
        "eos_token_id": tokenizer.end_of_document_id,
        "pad_token_id": None,  # an id here would never be trained again: its embedding gets no gradient
        "dtype": _NAMES[dtype],
    }


def generation_config_json(source: Source) -> dict[str, Any]:
    """The content of generation_config.json: where to stop, and how `albor generate` samples."""
    tokenizer = source.tokenizer
    content: dict[str, Any] = {
        "bos_token_id": tokenizer.end_of_document_id,
        "eos_token_id": list(source.stop_ids),
        "pad_token_id": tokenizer.end_of_document_id,
        "do_sample": True,
        "temperature": _TEMPERATURE,
        "top_k": 0,  # transformers would take the 50 likeliest
    }
    beyond = list(range(tokenizer.vocab_size, source.architecture.vocab_size))
    return content | ({"suppress_tokens": beyond} if beyond else {})


def shards(pieces: Sequence[Piece], element_bytes: int, limit: int) -> list[list[Piece]]:
    """`pieces` in their order, in groups of at most `limit` bytes; a larger tensor is alone in one."""
    groups: list[list[Piece]] = []
    room = 0
    for piece in pieces:
        size = piece.size * element_bytes
        if not groups or size > room:
            groups.append([])
            room = limit
        groups[-1].append(piece)
        room -= size
    return groups


def write_weights(
    source: Source, directory: Path, dtype: str, report: Report, limit: int = SHARD_BYTES
) -> None:
    """Writes model.safetensors, or where that would be larger than `limit`, its shards and their index."""
    torch_dtype = _TORCH[dtype]
    tensors = dict(hf_tensors(source.loaded.arena, source.architecture))
    pieces = list(layout(source.architecture))
    total = sum(piece.size for piece in pieces) * torch_dtype.itemsize
    groups = shards(pieces, torch_dtype.itemsize, limit)
    weight_map: dict[str, str] = {}
    done = 0

    def written(size: int) -> None:
        nonlocal done
        done += size
        report("writing the weights", done, total)

    for number, group in enumerate(groups, start=1):
        name = "model.safetensors"
        if len(groups) > 1:
            name = f"model-{number:05d}-of-{len(groups):05d}.safetensors"
        rounded = {piece.name: tensors[piece.name].to(torch_dtype) for piece in group}
        for tensor_name, tensor in rounded.items():
            if not tensor.isfinite().all():
                wider = "bf16" if dtype == "fp16" else "fp32"
                raise CannotCarry(f"{tensor_name} has values that {dtype} cannot hold; take --dtype {wider}")
        write_tensors(directory / name, rounded, written)
        weight_map |= dict.fromkeys(rounded, name)
    if len(groups) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        write_file(directory / "model.safetensors.index.json", to_json(index))


def _write(source: Source, directory: Path, dtype: str, report: Report) -> None:
    write_weights(source, directory, dtype, report)
    write_file(directory / "config.json", to_json(config_json(source, dtype)))
    write_file(directory / "generation_config.json", to_json(generation_config_json(source)))
    write_tokenizer_files(source.tokenizer, directory, source.architecture.max_position_embeddings)
    write_card(source, directory, "hf", dtype)


def _needed_bytes(source: Source, dtype: str) -> int:
    weights = source.architecture.parameter_count * _TORCH[dtype].itemsize
    return weights + source.tokenizer.vocab_size * _TOKENIZER_BYTES_PER_TOKEN + _OTHER_BYTES


def _check(source: Source, dtype: str) -> None:
    """Whatever a Llama of albor's is, this format can say."""


def _rounded(name: str, tensor: torch.Tensor, dtype: str) -> torch.Tensor:
    return tensor.to(_TORCH[dtype]).float()


def _tolerance(dtype: str) -> Tolerance:
    return Tolerance(1e-4, f"both sides compute in fp32 with the values that are stored in {dtype}")


class Transformers:
    """transformers, with the model and the tokenizer that its Auto classes make of a directory."""

    name = "transformers"

    def __init__(self, directory: Path):
        if find_spec("transformers") is None:
            raise NotInstalled("transformers", "hf")
        import transformers

        self.version: str = transformers.__version__
        automatic: Any = transformers.AutoModelForCausalLM
        with _quiet():
            self._model, loading = automatic.from_pretrained(
                directory, dtype=torch.float32, local_files_only=True, output_loading_info=True
            )
            self._tokenizer: Any = transformers.AutoTokenizer.from_pretrained(
                directory, local_files_only=True
            )
        for what in ("missing_keys", "unexpected_keys", "mismatched_keys"):
            if loading[what]:  # it goes on with new weights, and says so in a log
                raise AlborError(f"{what.replace('_', ' ')}: {', '.join(map(str, loading[what]))}")
        self._model.eval()

    @property
    def stop_ids(self) -> frozenset[int]:
        """See `Runtime`."""
        ids = self._model.generation_config.eos_token_id
        return frozenset(ids if isinstance(ids, list) else [ids])

    def tokenize(self, text: str) -> list[int]:
        """See `Runtime`."""
        with _quiet():  # it warns of what is longer than the context
            ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)
        return ids

    def logits(self, tokens: Sequence[int]) -> np.ndarray:
        """See `Runtime`."""
        with torch.inference_mode():
            logits: np.ndarray = self._model(torch.tensor([tokens])).logits[0].numpy()
        return logits

    def greedy(self, tokens: Sequence[int], count: int, favoured: int | None = None) -> list[int]:
        """See `Runtime`."""
        prompt = torch.tensor([tokens])
        bias = {} if favoured is None else {"sequence_bias": [[[favoured], 1.0e4]]}
        with _quiet(), torch.inference_mode():
            output = self._model.generate(
                prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=count, do_sample=False, **bias
            )
        written: list[int] = output[0, len(tokens) :].tolist()
        return written[:-1] if written and written[-1] in self.stop_ids else written

    def close(self) -> None:
        """See `Runtime`."""
        del self._model, self._tokenizer


@contextmanager
def _quiet() -> Iterator[None]:
    """What transformers shows of its own: bars, and advice on keys that we set on purpose."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def _open_runtime(directory: Path, dtype: str) -> Runtime:
    return Transformers(directory)


FORMAT = Format(
    name="hf",
    program="transformers",
    dtypes=("bf16", "fp16", "fp32"),
    needed_bytes=_needed_bytes,
    check=_check,
    write=_write,
    rounded=_rounded,
    open_runtime=_open_runtime,
    tolerance=_tolerance,
)
