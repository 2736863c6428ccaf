"""MLX reads the Hugging Face directory as it is. On Linux it computes on the CPU, so any machine can tell.

It reads other keys than transformers: the rotary base at the top level, `tie_word_embeddings` with another
default, the stop tokens of generation_config.json. The same gate as for every export holds it against albor.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from export_cases import make_source

from albor.export import gate, hf
from albor.export.gate import AlborRuntime, Gate

pytest.importorskip("mlx_lm", reason="mlx-lm is not installed: pip install 'mlx[cpu]' mlx-lm")

import mlx.core as mx
import mlx_lm
from mlx_lm.generate import stream_generate


class Mlx:
    """mlx-lm, with what it makes of a directory."""

    name, version = "mlx-lm", mlx_lm.__version__

    def __init__(self, directory: Path):
        mx.set_default_device(mx.cpu)
        self._model, self._tokenizer = mlx_lm.load(str(directory))

    @property
    def stop_ids(self) -> frozenset[int]:
        return frozenset(self._tokenizer.eos_token_ids)

    def tokenize(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)
        return ids

    def logits(self, tokens: Sequence[int]) -> np.ndarray:
        return np.array(self._model(mx.array([tokens])).astype(mx.float32))[0]

    def greedy(self, tokens: Sequence[int], count: int, favoured: int | None = None) -> list[int]:
        def raise_one(_: mx.array, logits: mx.array) -> mx.array:
            return logits.at[..., favoured].add(1.0e4)

        processors = [] if favoured is None else [raise_one]
        answers = stream_generate(
            self._model, self._tokenizer, list(tokens), max_tokens=count, logits_processors=processors
        )
        written = [answer.token for answer in answers]
        return written[:-1] if written and written[-1] in self.stop_ids else written

    def close(self) -> None:
        pass


def compare(keys: dict[str, Any], directory: Path, **changed: object) -> Gate:
    source = make_source(directory, **keys)
    out = directory / "out"
    out.mkdir()
    hf.FORMAT.write(source, out, "fp32", lambda *_: None)
    config = json.loads((out / "config.json").read_text()) | changed
    (out / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))
    own = AlborRuntime(source.loaded, source.stop_ids)
    context = source.architecture.max_position_embeddings
    return gate.compare(own, "mlx-lm", lambda: Mlx(out), context, hf.FORMAT.tolerance("fp32"))


MODELS = {
    "tied": {},
    "untied": {"tie_word_embeddings": False},
    "other-numbers": {"rope_theta": 500000.0, "rms_norm_eps": 1e-3, "num_key_value_heads": 1},
}


@pytest.mark.parametrize("keys", MODELS.values(), ids=MODELS)
def test_it_computes_the_same_and_stops(keys: dict[str, Any], tmp_path: Path):
    found = compare(keys, tmp_path)
    assert found.passed is True, found.rows
    assert found.rows[2].compared == "64 tokens"


def test_without_the_rotary_base_at_the_top_level_it_would_take_another(tmp_path: Path):
    """Why the key is written twice."""
    found = compare({"rope_theta": 500000.0}, tmp_path, rope_theta=None)
    assert {row.check: row.passed for row in found.rows}["logits"] is False


def test_without_the_word_on_tying_it_would_tie(tmp_path: Path):
    """Why that is always written."""
    found = compare({"tie_word_embeddings": False}, tmp_path, tie_word_embeddings=None)
    assert found.passed is False
