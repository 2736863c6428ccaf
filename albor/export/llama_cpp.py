"""llama.cpp as the gate's runtime: its server, in a process of its own, through `xllamacpp`.

A process of its own, because llama.cpp aborts where it meets what it does not expect, and because its memory
is then given back whole. It computes on the CPU, with keys and values in fp32 and without flash attention.

With weights in less than fp32 llama.cpp rounds the activations too, to 16 or even 8 bits. That hides a wrong
epsilon or a wrong rotary base. So there is a second server for such a file: with every tensor widened to fp32
and every key as it is, which has to agree as closely as an fp32 file. Tokens, stops and the perplexity come
from the file itself.

Raw logits are in no answer of the server. What it gives is the log-probability of every token of the
vocabulary, which is the logits up to a constant of the position. An answer has some hundred bytes per token
of the vocabulary, and there is one per position.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
from collections.abc import Sequence
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from albor.errors import AlborError
from albor.export.gate import NotInstalled
from albor.export.gguf_types import decode

_FAVOUR = 1.0e4
_ANSWER_SECONDS = 600
_END_SECONDS = 10
_SHOWN = 24  # characters of a text


class LlamaCpp:
    """The GGUF file at `path`. Raises NotInstalled, and AlborError where llama.cpp does not load it."""

    name = "llama.cpp"

    def __init__(self, path: Path):
        if importlib.util.find_spec("xllamacpp") is None:
            raise NotInstalled("xllamacpp", "gguf")
        self._wide_path = path.with_suffix(".fp32.tmp")
        self._wide: Server | None = None
        self._stored = Server(path)
        self.version = f"(xllamacpp {self._stored.version})"
        try:
            self._wide = Server(self._wide_path) if widen(path, self._wide_path) else self._stored
        except BaseException:
            self.close()
            raise

    @property
    def stop_ids(self) -> frozenset[int]:
        """See `Runtime`."""
        return self._stored.stop_ids

    def tokenize(self, text: str) -> list[int]:
        """See `Runtime`."""
        return self._stored.tokenize(text)

    def logits(self, tokens: Sequence[int]) -> np.ndarray:
        """See `Runtime`."""
        return self.logits_at(tokens, range(len(tokens)))

    def logits_at(self, tokens: Sequence[int], positions: Sequence[int]) -> np.ndarray:
        """See `AnswersByPosition`: computed in fp32."""
        assert self._wide is not None
        return self._wide.log_probabilities(tokens, positions)

    def stored_logits_at(self, tokens: Sequence[int], positions: Sequence[int]) -> np.ndarray:
        """See `ComputesAsStored`."""
        return self._stored.log_probabilities(tokens, positions)

    def greedy(self, tokens: Sequence[int], count: int, favoured: int | None = None) -> list[int]:
        """See `Runtime`: in fp32, but where a favoured token leaves no choice."""
        server = self._wide if favoured is None else self._stored
        assert server is not None
        return server.greedy(tokens, count, favoured)

    def close(self) -> None:
        """See `Runtime`."""
        self._stored.close()
        if self._wide not in (None, self._stored):
            self._wide.close()
        with suppress(FileNotFoundError):
            self._wide_path.unlink()


class Server:
    """llama.cpp's server for one file."""

    def __init__(self, path: Path):
        self._log = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115
        self._process = subprocess.Popen(
            [sys.executable, "-m", "albor.export.llama_cpp_server", str(os.getpid()), str(path)],
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=self._log, text=True,
        )  # fmt: skip
        assert self._process.stdout is not None
        try:
            said = self._process.stdout.readline().split()
            if len(said) != 2:
                raise AlborError(f"llama.cpp does not load it: {self._complaint()}")
        except BaseException:
            self.close()
            raise
        self._address, self.version = said
        # A proxy that the environment names is not for this machine's own addresses.
        self._opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))

    @cached_property
    def stop_ids(self) -> frozenset[int]:
        """What the server keeps from being written where it is asked to ignore the end."""
        answer = self._ask("completion", prompt=[0], n_predict=1, ignore_eos=True)
        return frozenset(bias["token"] for bias in answer["generation_settings"]["logit_bias"])

    def tokenize(self, text: str) -> list[int]:
        """The ids of `text` alone; no text is a control token. Raises AlborError where they, read back, are
        another text.
        """
        answer = self._ask("tokenize", content=text, add_special=False, parse_special=False)
        tokens: list[int] = answer["tokens"]
        back = self._ask("detokenize", tokens=tokens)["content"]
        if back != text:
            places = zip(text, back, strict=False)
            place = next((i for i, (a, b) in enumerate(places) if a != b), min(len(text), len(back)))
            sides = f"{text[place : place + _SHOWN]!r} as {back[place : place + _SHOWN]!r}"
            raise AlborError(f"llama.cpp reads the tokens of {sides}")
        return tokens

    def greedy(self, tokens: Sequence[int], count: int, favoured: int | None) -> list[int]:
        """The likeliest continuation, up to a stop token."""
        bias = {} if favoured is None else {"logit_bias": [[favoured, _FAVOUR]]}
        answer = self._ask(
            "completion", prompt=list(tokens), n_predict=count, temperature=0, return_tokens=True, **bias
        )
        written: list[int] = answer["tokens"]
        return written[:-1] if answer["stop_type"] == "eos" else written

    def log_probabilities(self, tokens: Sequence[int], positions: Sequence[int]) -> np.ndarray:
        """(P, V) float32. The longest goes first, and the server keeps its keys and values for the others."""
        rows = {p: self._follow(tokens[: p + 1]) for p in sorted(positions, reverse=True)}
        return np.stack([rows[p] for p in positions])

    def close(self) -> None:
        """Ends the process."""
        self._process.terminate()
        try:
            self._process.wait(_END_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        if self._process.stdout is not None:
            self._process.stdout.close()
        self._log.close()

    @cached_property
    def _letter(self) -> int:
        """A token to be written: the server says nothing of one that ends the text, or is half a letter."""
        return self.tokenize("a")[0]

    def _follow(self, tokens: Sequence[int]) -> np.ndarray:
        """The log-probability of every token that may follow, before any bias: (V,) float32."""
        answer = self._ask(
            "completion", prompt=list(tokens), n_predict=1, temperature=0,
            n_probs=2**31 - 1,  # more than there are: all
            logit_bias=[[self._letter, _FAVOUR]],
        )  # fmt: skip
        entries = answer["completion_probabilities"][0]["top_logprobs"]
        row = np.full(len(entries), np.nan, dtype=np.float32)
        for entry in entries:
            row[entry["id"]] = entry["logprob"]
        return row

    def _ask(self, route: str, **body: Any) -> dict[str, Any]:
        request = urllib.request.Request(
            f"{self._address}/{route}", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        try:
            with self._opener.open(request, timeout=_ANSWER_SECONDS) as answer:
                content: dict[str, Any] = json.load(answer)
        except urllib.error.HTTPError as error:
            raise AlborError(f"llama.cpp refuses: {error.read().decode(errors='replace')}") from error
        except OSError as error:
            raise AlborError(f"llama.cpp gives no answer: {error}; {self._complaint()}") from error
        return content

    def _complaint(self) -> str:
        """What its log says is wrong."""
        self._log.seek(0)
        lines = [line.strip() for line in self._log if line.strip()]
        telling = [line for line in lines if "error loading model" in line]
        return (telling or lines or ["it says nothing"])[-1]


def widen(path: Path, target: Path) -> bool:
    """Writes the GGUF file at `path` to `target` with all its keys, and every tensor in fp32; False, and
    nothing written, where they are all.
    """
    import gguf

    reader = gguf.GGUFReader(path)
    wide = gguf.GGMLQuantizationType.F32
    if all(tensor.tensor_type == wide for tensor in reader.tensors):
        return False
    writer = gguf.GGUFWriter(target, reader.fields["general.architecture"].contents())
    try:
        for key, entry in reader.fields.items():
            if key.startswith("GGUF.") or key == "general.architecture":  # the writer's own
                continue
            kind = entry.types[0]
            inner = entry.types[-1] if kind == gguf.GGUFValueType.ARRAY else None
            value = 0 if key == "general.file_type" else entry.contents()
            writer.add_key_value(key, value, kind, sub_type=inner)
        for tensor in reader.tensors:
            shape, count = [int(size) for size in reversed(tensor.shape)], int(tensor.n_elements)
            writer.add_tensor_info(tensor.name, shape, np.dtype("float32"), 4 * count, raw_dtype=wide)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for tensor in reader.tensors:
            writer.write_tensor_data(decode(np.asarray(tensor.data), tensor.tensor_type.name))
        writer.flush()
    finally:
        writer.close()
    return True
