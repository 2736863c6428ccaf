"""onnxruntime as the gate's runtime, with the tokenizers library: the exported files and nothing else.

What can be wrong with a cache, positions or a mask shows only in how a graph is used. So every reading for
the gate is made twice: the whole sequence at once, and in pieces through the cache, beside a shorter sequence
that is padded on its left.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from albor.errors import AlborError
from albor.export.gate import NotInstalled

_FAVOUR = 1.0e4
_PADDING = 3  # tokens on the left of the shorter sequence
_TYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16}

Cache = dict[str, np.ndarray]  # by name of the input


class OnnxRuntime:
    """model.onnx and tokenizer.json of a directory, on the CPU.

    `tolerance` is how far two readings of the same tokens may be from each other, as a share of the largest
    logit. Raises NotInstalled.
    """

    name = "onnxruntime"

    def __init__(self, directory: Path, tolerance: float):
        for package in ("onnxruntime", "tokenizers"):
            if importlib.util.find_spec(package) is None:
                raise NotInstalled(package, "onnx")
        import onnxruntime
        from tokenizers import Tokenizer

        self.version: str = onnxruntime.__version__
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.log_severity_level = 3  # errors: they are raised too
        path, providers = str(directory / "model.onnx"), ["CPUExecutionProvider"]
        self._session = onnxruntime.InferenceSession(path, options, providers=providers)
        self._past = [
            given for given in self._session.get_inputs() if given.name.startswith("past_key_values.")
        ]
        self._names = ["logits", *(given.name.replace("past_key_values", "present") for given in self._past)]
        self._tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
        self._tokenizer.encode_special_tokens = True  # a marker in a text is text
        generation = json.loads((directory / "generation_config.json").read_text(encoding="utf-8"))
        self.stop_ids = frozenset[int](generation["eos_token_id"])
        self._suppressed: list[int] = generation.get("suppress_tokens", [])
        self._tolerance = tolerance

    def tokenize(self, text: str) -> list[int]:
        """See `Runtime`."""
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    def logits(self, tokens: Sequence[int]) -> np.ndarray:
        """See `Runtime`. Raises AlborError where the cache, or padding, changes them."""
        whole, _ = self.read(np.array([tokens]), np.ones((1, len(tokens)), np.int64), self.empty_cache(1))
        padding = min(_PADDING, len(tokens) - 1)
        kept = len(tokens) - padding
        batch = np.array([tokens, [tokens[0]] * padding + list(tokens[:kept])])
        mask = np.ones_like(batch)
        mask[1, :padding] = 0
        cache, parts, start = self.empty_cache(2), list[np.ndarray](), 0
        for stop in sorted({padding, len(tokens) // 2, len(tokens) // 2 + 1, len(tokens)} - {0}):
            part, cache = self.read(batch[:, start:stop], mask[:, :stop], cache)
            parts.append(part)
            start = stop
        pieces = np.concatenate(parts, axis=1)
        self._hold("through the cache", whole[0], pieces[0])
        self._hold("padded on the left", whole[0, :kept], pieces[1, padding:])
        return whole[0]

    def greedy(self, tokens: Sequence[int], count: int, favoured: int | None = None) -> list[int]:
        """See `Runtime`. Raises AlborError where a reading without the cache would not write the same."""
        chosen, written = list[int](), np.array([tokens])
        cache, given = self.empty_cache(1), written
        while len(chosen) < count:
            logits, cache = self.read(given, np.ones_like(written), cache)
            chosen.append(int(self._scores(logits[0, -1], favoured).argmax()))
            if chosen[-1] in self.stop_ids:
                break
            given = np.array([chosen[-1:]])
            written = np.concatenate([written, given], axis=1)
        if chosen:
            read = written[:, : len(tokens) + len(chosen) - 1]
            again, _ = self.read(read, np.ones_like(read), self.empty_cache(1))
            for place, token in enumerate(chosen):
                logits = again[0, len(tokens) - 1 + place]
                scores = self._scores(logits, favoured)
                if scores.max() - scores[token] > 2 * self._tolerance * np.abs(logits).max():
                    raise AlborError(
                        f"token {place} is {token} with the cache, and {int(scores.argmax())} without it"
                    )
        return chosen[:-1] if chosen and chosen[-1] in self.stop_ids else chosen

    def close(self) -> None:
        """See `Runtime`."""
        del self._session, self._tokenizer

    def empty_cache(self, batch: int) -> Cache:
        """Keys and values of no tokens, for each layer (B, K, 0, D)."""
        return {
            given.name: np.zeros((batch, given.shape[1], 0, given.shape[3]), _TYPES[given.type])
            for given in self._past
        }

    def read(self, ids: np.ndarray, mask: np.ndarray, cache: Cache) -> tuple[np.ndarray, Cache]:
        """Logits (B, T, V) of ids (B, T), which follow the cache's, and the cache with them in it; the mask
        (B, S) is 0 where there is padding, over all of them. Positions count what is no padding.
        """
        positions = np.maximum(mask.cumsum(1) - 1, 0)[:, -ids.shape[1] :]
        given = {"input_ids": ids, "attention_mask": mask, "position_ids": positions, **cache}
        logits, *present = self._session.run(self._names, given)
        return logits, dict(zip(cache, present, strict=True))

    def _scores(self, logits: np.ndarray, favoured: int | None) -> np.ndarray:
        """What is written next by: logits (V,), without what generation_config.json suppresses."""
        scores: np.ndarray = logits.copy()
        scores[self._suppressed] = -np.inf
        if favoured is not None:
            scores[favoured] += _FAVOUR
        return scores

    def _hold(self, how: str, whole: np.ndarray, other: np.ndarray) -> None:
        """Raises AlborError unless `other` is what was read at once; rows (T, V) each."""
        apart = np.abs(whole - other).max(axis=1) / np.abs(whole).max()
        if not apart.max() <= self._tolerance:  # NaN neither
            where = int(apart.argmax())
            raise AlborError(f"{how}, position {where} gives logits {apart[where]:.1e} of the largest apart")
