"""Export to GGUF: one file for llama.cpp, and beside it what Ollama wants.

llama.cpp's `llama` models turn neighbours of a head, (x[2i], x[2i + 1]); albor turns (x[i], x[i + D/2]). So
the rows of every query and key head are interleaved here, as llama.cpp's own converter does. A tied head has
no tensor: the program takes the embedding where `output.weight` is missing.
"""

from __future__ import annotations

import importlib.util
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import torch

from albor.architecture import Architecture, round_up
from albor.durable import write_file
from albor.export.card import write_card
from albor.export.format import CannotCarry, Format, Source
from albor.export.gate import Runtime, Tolerance
from albor.export.gguf_types import (
    BLOCKS,
    FILE_TYPES,
    MissingLibrary,
    decode,
    encode,
    needs_llama_cpp,
    quantiser,
    stored_bytes,
)
from albor.export.gguf_vocabulary import Vocabulary, vocabulary
from albor.export.llama_cpp import LlamaCpp
from albor.export.ollama import CHAT_TEMPLATE, TEXT_TEMPLATE, modelfile, parameters
from albor.export.tokenizer_files import CHAT_TEMPLATE as JINJA
from albor.export.weights import Piece, hf_tensors, layout
from albor.progress import Report
from albor.strictjson import to_json

_ALIGNMENT = 32  # of each tensor in the file: the format's default
_OTHER_BYTES = 1_000_000  # keys, card, picture and what Ollama reads
_BYTES_PER_TOKEN = 100  # of the vocabulary: its text, score, type and merge
_TEMPERATURE = 0.8  # as `albor generate`
_OUTSIDE = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
_INSIDE = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)\.weight")


def gguf_name(name: str) -> str:
    """The name in a GGUF file of a tensor of the Hugging Face layout."""
    match = _LAYER.fullmatch(name)
    return f"blk.{match[1]}.{_INSIDE[match[2]]}.weight" if match else _OUTSIDE[name]


def arranged(name: str, tensor: torch.Tensor, model: Architecture) -> torch.Tensor:
    """The tensor with its rows where llama.cpp looks for them: a query or key head's pairs side by side."""
    if not name.endswith(("q_proj.weight", "k_proj.weight")):
        return tensor
    rows, columns = tensor.shape
    halves = tensor.view(rows // model.head_dim, 2, model.head_dim // 2, columns)
    return halves.transpose(1, 2).reshape(rows, columns)


def metadata(source: Source, dtype: str, chat_template: str | None) -> dict[str, Any]:
    """Every key of the file but for the tokenizer's lists; bool, int (uint32), float (float32) and str."""
    model, name = source.architecture, source.config.name
    words = vocabulary(source.tokenizer, model.vocab_size)
    keys: dict[str, Any] = {
        "general.type": "model",
        "general.name": name,
        "general.size_label": _size_label(model.parameter_count),
        "general.license": source.model_license,
        "general.quantization_version": 2,
        "general.file_type": FILE_TYPES[dtype].number,
        "llama.vocab_size": model.vocab_size,
        "llama.context_length": model.max_position_embeddings,
        "llama.embedding_length": model.hidden_size,
        "llama.block_count": model.num_hidden_layers,
        "llama.feed_forward_length": model.intermediate_size,
        "llama.attention.head_count": model.num_attention_heads,
        "llama.attention.head_count_kv": model.num_key_value_heads,
        "llama.attention.layer_norm_rms_epsilon": model.rms_norm_eps,
        "llama.rope.freq_base": float(model.rope_theta),
        "llama.rope.dimension_count": model.head_dim,
        "tokenizer.ggml.model": words.model,
        "tokenizer.ggml.pre": words.pre,
        "tokenizer.chat_template": chat_template,
    }
    keys |= {f"tokenizer.ggml.{which}_token_id": number for which, number in words.ids.items()}
    keys |= {f"tokenizer.ggml.{which}": flag for which, flag in words.flags.items()}
    return {key: value for key, value in keys.items() if value is not None}


def write_gguf(source: Source, path: Path, dtype: str, chat_template: str | None, report: Report) -> None:
    """Writes the model as one file; of the weights one tensor at a time is in memory beside the source's.

    Raises CannotCarry where a value is too large for the type.
    """
    import gguf

    model, file_type = source.architecture, FILE_TYPES[dtype]
    writer = gguf.GGUFWriter(path, "llama")
    try:
        for key, value in metadata(source, dtype, chat_template).items():
            _add(writer, key, value)
        _add_lists(writer, vocabulary(source.tokenizer, model.vocab_size))
        for piece in layout(model):
            number = gguf.GGMLQuantizationType[file_type.type_of(piece.name)]
            size, shape = _size(piece, dtype), piece.shape
            writer.add_tensor_info(gguf_name(piece.name), shape, np.dtype("float32"), size, raw_dtype=number)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        done, total = 0, sum(_size(piece, dtype) for piece in layout(model))
        for name, tensor in hf_tensors(source.loaded.arena, model):
            kind = file_type.type_of(name)
            encoded = encode(arranged(name, tensor, model).numpy(), kind)
            if kind == "F16" and not np.isfinite(encoded).all():
                raise CannotCarry(f"{name} has values that fp16 cannot hold; take --dtype bf16")
            writer.write_tensor_data(encoded)
            done += encoded.nbytes
            report("writing the weights", done, total)
        writer.flush()
    finally:
        writer.close()


def _add(writer: Any, key: str, value: str | bool | int | float) -> None:
    if isinstance(value, str):
        writer.add_string(key, value)
    elif isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    else:
        writer.add_float32(key, value)


def _add_lists(writer: Any, words: Vocabulary) -> None:
    writer.add_token_list(words.tokens)
    writer.add_token_types(words.types)
    if words.scores:
        writer.add_token_scores(words.scores)
    if words.suppressed:
        writer.add_array("tokenizer.ggml.suppress_tokens", words.suppressed)
    if words.merges:
        writer.add_token_merges(words.merges)


def _size(piece: Piece, dtype: str) -> int:
    return stored_bytes(math.prod(piece.shape), FILE_TYPES[dtype].type_of(piece.name))


def _size_label(parameters: int) -> str:
    """As the names of GGUF files have it: 2.4M, 399M, 1.2B."""
    value, unit = (parameters / 1e9, "B") if parameters >= 1e9 else (parameters / 1e6, "M")
    return f"{value:.1f}{unit}" if value < 100 else f"{value:.0f}{unit}"


def _write(source: Source, directory: Path, dtype: str, report: Report) -> None:
    tokenizer = source.tokenizer
    chat = tokenizer.can_chat
    weights = f"{source.config.name}-{dtype.upper()}.gguf"
    write_gguf(source, directory / weights, dtype, JINJA if chat else None, report)
    names = {number: name for name, number in tokenizer.special_ids.items()}
    context = source.architecture.max_position_embeddings
    settings = parameters(context, [names[i] for i in source.stop_ids], _TEMPERATURE)
    template = CHAT_TEMPLATE if chat else TEXT_TEMPLATE
    text = modelfile(weights, template, settings, source.model_license)
    write_file(directory / "Modelfile", text.encode())
    write_file(directory / "template", template.encode())
    write_file(directory / "params", to_json(settings))
    write_card(source, directory, "gguf", dtype)


def _needed_bytes(source: Source, dtype: str) -> int:
    sizes = sum(round_up(_size(piece, dtype), _ALIGNMENT) for piece in layout(source.architecture))
    widened = (
        0 if dtype == "fp32" else 4 * source.architecture.parameter_count
    )  # for as long as it is checked
    return sizes + widened + source.architecture.vocab_size * _BYTES_PER_TOKEN + _OTHER_BYTES


def _check(source: Source, dtype: str) -> None:
    if importlib.util.find_spec("gguf") is None:
        raise MissingLibrary("gguf", "it writes the file")
    file_type = FILE_TYPES[dtype]
    if any(needs_llama_cpp(kind) for kind in file_type.types):
        quantiser()
    for piece in layout(source.architecture):
        kind = file_type.type_of(piece.name)
        if piece.shape[-1] % BLOCKS[kind][0]:
            raise CannotCarry(
                f"{kind} stores {BLOCKS[kind][0]} values of a row together, and a row of {piece.name} has "
                f"{piece.shape[-1]}; take --dtype {_smaller_blocks(source, kind)}"
            )
    vocabulary(source.tokenizer, source.architecture.vocab_size)


def _smaller_blocks(source: Source, kind: str) -> str:
    fits = all(piece.shape[-1] % 32 == 0 for piece in layout(source.architecture) if len(piece.shape) > 1)
    return "q8_0, q5_1 or q4_1" if BLOCKS[kind][0] > 32 and fits else "fp16, bf16 or fp32"


def _rounded(name: str, tensor: torch.Tensor, dtype: str) -> torch.Tensor:
    kind = FILE_TYPES[dtype].type_of(name)
    return torch.from_numpy(decode(encode(tensor.contiguous().numpy(), kind), kind))


def _tolerance(dtype: str) -> Tolerance:
    what = "" if dtype == "fp32" else f", with the values that are stored in {dtype}"
    return Tolerance(1e-4, f"both sides compute in fp32{what}")


def _open_runtime(directory: Path, dtype: str) -> Runtime:
    (path,) = directory.glob("*.gguf")
    return LlamaCpp(path)


FORMAT = Format(
    name="gguf",
    program="llama.cpp",
    dtypes=tuple(FILE_TYPES),
    needed_bytes=_needed_bytes,
    check=_check,
    write=_write,
    rounded=_rounded,
    open_runtime=_open_runtime,
    tolerance=_tolerance,
)
