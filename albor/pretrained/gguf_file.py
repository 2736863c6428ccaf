"""A GGUF of a Llama, as llama.cpp's converters write it.

llama.cpp turns the pairs (x[2i], x[2i + 1]) of a head, and albor (x[i], x[i + D/2]), as Hugging Face does; so
the rows of query and key lie in another order in the file, and are put back here.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from albor.gguffile import GGUFFile
from albor.pretrained.model import KEY, Pretrained, refusal

_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_BLOCK = re.compile(r"blk\.(\d+)\.(\w+)\.weight")
_PLAIN = re.compile(r"(\w+)\.weight")


def open_gguf(path: Path) -> Pretrained:
    """The model in the file `path`, of which nothing but its metadata is read yet.

    Raises ConfigError, with everything that is wrong with it, and DataError for a damaged file.
    """
    file = GGUFFile(path, KEY)
    kind = file.need("general.architecture")
    if kind != "llama":
        raise refusal(path, [f"general.architecture is {kind!r}, and albor reads 'llama' only"])
    heads, width = file.need("llama.attention.head_count"), file.need("llama.embedding_length")
    if not all(type(number) is int and number > 0 for number in (heads, width)):
        raise refusal(path, ["llama.attention.head_count or llama.embedding_length is no single number"])
    keys = {
        "hidden_size": width,
        "intermediate_size": file.need("llama.feed_forward_length"),
        "num_hidden_layers": file.need("llama.block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": file.get("llama.attention.head_count_kv", heads),
        "vocab_size": file.shapes.get("token_embd.weight", (0,))[0],
        "max_position_embeddings": file.get("llama.context_length", 2048),
        # These are stored in fp32: what was meant is the shortest number that rounds to it.
        "rope_theta": _shortest(file.get("llama.rope.freq_base", 10000.0)),
        "rms_norm_eps": _shortest(file.need("llama.attention.layer_norm_rms_epsilon")),
        "tie_word_embeddings": "output.weight" not in file.shapes,
    }
    problems = _problems(file, width // heads)
    problems += [
        f"it has no {key} that is a number"
        for key in ("intermediate_size", "num_hidden_layers", "num_key_value_heads", "vocab_size")
        if type(keys[key]) is not int or keys[key] < 1
    ]
    if problems:
        raise refusal(path, problems)
    return Pretrained(path, keys, _Tensors(file, heads, keys["num_key_value_heads"]), path)


class _Tensors:
    """See `Weights`."""

    def __init__(self, file: GGUFFile, heads: int, kv_heads: int):
        self._file = file
        self._heads = {"attn_q": heads, "attn_k": kv_heads}

    @property
    def sha256(self) -> dict[str, str]:
        """See `Weights`."""
        return {self._file.path.name: self._file.sha256()}

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """See `Weights`."""
        for name, values in self._file.tensors():
            block, plain = _BLOCK.fullmatch(name), _PLAIN.fullmatch(name)
            if block and block[2] in _NAMES:
                if block[2] in self._heads:
                    values = _unpermuted(values, self._heads[block[2]])
                name = f"model.layers.{block[1]}.{_NAMES[block[2]]}.weight"
            elif plain and plain[1] in _NAMES:
                name = f"{_NAMES[plain[1]]}.weight"
            yield name, torch.from_numpy(values)


def _unpermuted(rows: np.ndarray, heads: int) -> np.ndarray:
    """Rows (H * D, C) with the halves of each head apart again; other shapes stay, to be refused."""
    if rows.shape[0] % (2 * heads):
        return rows
    pairs = rows.reshape(heads, rows.shape[0] // heads // 2, 2, -1)
    return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(rows.shape)


def _problems(file: GGUFFile, head_dim: int) -> list[str]:
    """What makes another function of the same weights."""
    problems = []
    scaling = file.get("llama.rope.scaling.type", "none")
    if scaling != "none" or "rope_freqs.weight" in file.shapes:
        where = "rope_freqs.weight" if scaling == "none" else f"llama.rope.scaling.type {scaling!r}"
        problems.append(f"it has {where}: scaled rotary frequencies, and albor turns by the default only")
    for key in ("rope.dimension_count", "attention.key_length", "attention.value_length"):
        if file.get(f"llama.{key}", head_dim) != head_dim:
            problems.append(f"llama.{key} is {file.get(f'llama.{key}')}, and albor's head is {head_dim} wide")
    if file.get("llama.expert_count", 0):
        problems.append("llama.expert_count: it has experts, and albor's feed-forward layer has none")
    return problems


def _shortest(value: float) -> float:
    return float(str(np.float32(value)))
