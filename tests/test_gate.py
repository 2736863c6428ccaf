"""The gate: what it must let through, and every kind of broken export that it must not."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from export_cases import make_source
from safetensors.torch import load_file, save_file

from albor.export import gate, hf
from albor.export.format import Source
from albor.export.gate import AlborRuntime, Gate, NotInstalled, Runtime, Tolerance
from albor.export.weights import layout

TIGHT = hf.FORMAT.tolerance("fp32")
WEIGHTS = "model.safetensors"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Source:
    return make_source(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def own(source: Source) -> AlborRuntime:
    return AlborRuntime(source.loaded, source.stop_ids)


@pytest.fixture(scope="module")
def exported(source: Source, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sound fp32 export of `source`."""
    directory = tmp_path_factory.mktemp("exported")
    hf.FORMAT.write(source, directory, "fp32", lambda *_: None)
    return directory


def check(own: AlborRuntime, directory: Path) -> Gate:
    context = own._decoder.context
    return gate.compare(own, "transformers", lambda: hf.Transformers(directory), context, TIGHT)


def verdicts(found: Gate) -> dict[str, bool]:
    return {row.check: row.passed for row in found.rows}


def test_a_sound_export_passes_every_check(own: AlborRuntime, exported: Path):
    found = check(own, exported)
    assert found.passed is True, found
    assert list(verdicts(found)) == ["tokens of texts", "logits", "greedy tokens", "stop"]
    assert found.runtime.startswith("transformers ")
    assert found.rows[2].compared == "64 tokens"


# Every way of being wrong that a converter is known for: what is done to the files, and what sees it


def edit_json(name: str, change: Callable[[dict], None]) -> Callable[[Path], None]:
    def edit(directory: Path) -> None:
        path = directory / name
        content = json.loads(path.read_text())
        change(content)
        path.write_text(json.dumps(content))

    return edit


def edit_weights(change: Callable[[dict[str, torch.Tensor]], None]) -> Callable[[Path], None]:
    def edit(directory: Path) -> None:
        tensors = load_file(directory / WEIGHTS)
        change(tensors)
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, directory / WEIGHTS)

    return edit


Q, K, V = (f"model.layers.1.self_attn.{name}_proj.weight" for name in "qkv")
GATE, UP = "model.layers.2.mlp.gate_proj.weight", "model.layers.2.mlp.up_proj.weight"


def permute_rows(tensors: dict[str, torch.Tensor]) -> None:
    """Half-split to interleaved pairs, as GGUF wants them: K has 2 heads."""
    tensors[K] = tensors[K].reshape(2, 2, 6, 48).swapaxes(1, 2).reshape(24, 48)


def swap_heads(tensors: dict[str, torch.Tensor]) -> None:
    tensors[V] = tensors[V].reshape(2, 12, 48).flip(0).reshape(24, 48)


def swap_gate_and_up(tensors: dict[str, torch.Tensor]) -> None:
    tensors[GATE], tensors[UP] = tensors[UP], tensors[GATE]


def swap_norms(tensors: dict[str, torch.Tensor]) -> None:
    a, b = (f"model.layers.0.{name}_layernorm.weight" for name in ("input", "post_attention"))
    tensors[a], tensors[b] = tensors[b], tensors[a]


def swap_layers(tensors: dict[str, torch.Tensor]) -> None:
    a, b = (f"model.layers.{layer}.self_attn.o_proj.weight" for layer in (0, 1))
    tensors[a], tensors[b] = tensors[b], tensors[a]


def swap_tokens(tensors: dict[str, torch.Tensor]) -> None:
    rows = tensors["model.embed_tokens.weight"]
    rows[[350, 351]] = rows[[351, 350]]


def round_to_bf16(tensors: dict[str, torch.Tensor]) -> None:
    for name, tensor in tensors.items():
        tensors[name] = tensor.bfloat16().float()


def drop(name: str) -> Callable[[dict], None]:
    return lambda content: content.__delitem__(name)


def set_(**keys: object) -> Callable[[dict], None]:
    return lambda content: content.update(keys)


def set_theta(content: dict) -> None:
    content["rope_theta"] = content["rope_parameters"]["rope_theta"] = 20000.0


def add_prefix_space(content: dict) -> None:
    """What SentencePiece converters do by default."""
    parts = [{"type": "Prepend", "prepend": "\u2581"}, content["normalizer"]]
    content["normalizer"] = {"type": "Sequence", "normalizers": [part for part in parts if part]}


def normalise(content: dict) -> None:
    parts = [{"type": "NFKC"}, content["normalizer"]]
    content["normalizer"] = {"type": "Sequence", "normalizers": [part for part in parts if part]}


def reorder_merges(content: dict) -> None:
    content["model"]["merges"].reverse()


BREAKAGES = {
    "k-rows-permuted": (edit_weights(permute_rows), "logits"),
    "heads-swapped": (edit_weights(swap_heads), "logits"),
    "gate-and-up-swapped": (edit_weights(swap_gate_and_up), "logits"),
    "norms-swapped": (edit_weights(swap_norms), "logits"),
    "layers-swapped": (edit_weights(swap_layers), "logits"),
    "tokens-swapped": (edit_weights(swap_tokens), "logits"),
    "rounded-too-much": (edit_weights(round_to_bf16), "logits"),
    "tensor-missing": (edit_weights(drop(V)), "loads"),
    "layer-too-few": (edit_json("config.json", set_(num_hidden_layers=2)), "loads"),
    "wrong-epsilon": (edit_json("config.json", set_(rms_norm_eps=1e-6)), "logits"),
    "wrong-theta": (edit_json("config.json", set_theta), "logits"),
    "not-tied": (edit_json("config.json", set_(tie_word_embeddings=False)), "loads"),
    "wrong-activation": (edit_json("config.json", set_(hidden_act="gelu")), "logits"),
    "no-class": (edit_json("config.json", set_(model_type="albor", architectures=["Albor"])), "loads"),
    "prefix-space": (edit_json("tokenizer.json", add_prefix_space), "tokens of texts"),
    "normalised": (edit_json("tokenizer.json", normalise), "tokens of texts"),
    "merges-reordered": (edit_json("tokenizer.json", reorder_merges), "tokens of texts"),
    "one-stop-missing": (edit_json("generation_config.json", set_(eos_token_id=[0])), "stop"),
    "wrong-stop": (edit_json("generation_config.json", set_(eos_token_id=[0, 3, 300])), "stop"),
}


@pytest.mark.parametrize(("breakage", "seen"), BREAKAGES.values(), ids=BREAKAGES)
def test_a_broken_export_is_caught(
    breakage: Callable[[Path], None], seen: str, own: AlborRuntime, exported: Path, tmp_path: Path
):
    broken = tmp_path / "broken"
    shutil.copytree(exported, broken)
    breakage(broken)
    found = check(own, broken)
    assert found.passed is False
    assert verdicts(found)[seen] is False, found.rows


def test_a_padding_id_that_is_likely_is_not_written(tmp_path: Path):
    """albor never writes an id that its tokenizer does not know; the export has to say so."""
    source = make_source(tmp_path, vocab_size=448, tie_word_embeddings=False)
    tensors = {piece.name: piece.of(source.loaded.arena["weights"]) for piece in layout(source.architecture)}
    tensors["lm_head.weight"][400:] *= 5
    directory = tmp_path / "out"
    directory.mkdir()
    hf.FORMAT.write(source, directory, "fp32", lambda *_: None)
    own = AlborRuntime(source.loaded, source.stop_ids)
    assert check(own, directory).passed is True
    edit_json("generation_config.json", drop("suppress_tokens"))(directory)
    assert verdicts(check(own, directory))["greedy tokens"] is False


# What the comparison itself does, with a program that answers as it is told


class Told:
    """albor's own answers, but for those that a test changes."""

    name, version = "told", "1"

    def __init__(self, own: AlborRuntime):
        self.own, self.stop_ids, self.closed = own, own.stop_ids, False

    def tokenize(self, text: str) -> list[int]:
        return self.own.tokenize(text)

    def logits(self, tokens: Sequence[int]) -> np.ndarray:
        return self.own.logits(tokens)

    def greedy(self, tokens: Sequence[int], count: int, favoured: int | None = None) -> list[int]:
        return self.own.greedy(tokens, count, favoured)

    def close(self) -> None:
        self.closed = True


def compare(own: AlborRuntime, runtime: Runtime) -> Gate:
    return gate.compare(own, "told", lambda: runtime, 96, TIGHT)


def test_the_same_answers_pass_and_the_program_is_closed(own: AlborRuntime):
    told = Told(own)
    assert compare(own, told).passed is True
    assert told.closed


def test_what_a_program_raises_is_a_finding(own: AlborRuntime):
    class Failing(Told):
        def logits(self, tokens: Sequence[int]) -> np.ndarray:
            raise RuntimeError("no such\n  operator")

    told = Failing(own)
    found = compare(own, told)
    assert verdicts(found) == {"tokens of texts": True, "logits": False}
    assert found.rows[-1].found == "RuntimeError: no such operator"
    assert told.closed


def test_a_shortage_of_memory_is_no_finding(own: AlborRuntime):
    """It says nothing of the export, and the command explains it."""

    class Large(Told):
        def logits(self, tokens: Sequence[int]) -> np.ndarray:
            raise MemoryError

    told = Large(own)
    with pytest.raises(MemoryError):
        compare(own, told)
    assert told.closed


def test_a_full_disk_is_no_finding(own: AlborRuntime):
    class Writing(Told):
        def logits(self, tokens: Sequence[int]) -> np.ndarray:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    told = Writing(own)
    with pytest.raises(OSError, match="No space left"):
        compare(own, told)
    assert told.closed


def test_a_program_that_is_not_installed_is_no_finding(own: AlborRuntime):
    def missing() -> Runtime:
        raise NotInstalled("program", "extra")

    with pytest.raises(NotInstalled, match=r"program is not installed; run: pip install 'albor\[extra\]'"):
        gate.compare(own, "program", missing, 96, TIGHT)
    assert Gate("none", (), TIGHT, "why").passed is None


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda logits: logits[:, :-1], r"\[96, 399\] logits instead of \[96, 400\]"),
        (lambda logits: np.where(logits > logits.max() - 1e-3, np.nan, logits), "NaN"),
        (lambda logits: logits + 1e-3, "position"),
        (lambda logits: np.roll(logits, 1, axis=0), "position"),
    ],
)
def test_logits_that_differ_are_told_apart(
    change: Callable[[np.ndarray], np.ndarray], said: str, own: AlborRuntime
):
    class Off(Told):
        def logits(self, tokens: Sequence[int]) -> np.ndarray:
            return change(self.own.logits(tokens))

    row = next(row for row in compare(own, Off(own)).rows if row.check == "logits")
    assert not row.passed
    assert re.search(said, row.found)


def test_one_token_of_difference_is_named(own: AlborRuntime):
    class Off(Told):
        def tokenize(self, text: str) -> list[int]:
            return [token + (token == 300) for token in self.own.tokenize(text)]

    row = compare(own, Off(own)).rows[0]
    assert not row.passed
    assert "300" in row.found
    assert "301" in row.found


class OtherAt(Told):
    """Writes `other` as the n-th token of a greedy text, and then goes on."""

    place, other = 5, 0

    def greedy(self, tokens: Sequence[int], count: int, favoured: int | None = None) -> list[int]:
        written = self.own.greedy(tokens, count, favoured)
        if favoured is None and len(written) > self.place:
            written[self.place] = self.other
        return written


def test_another_greedy_token_is_a_mismatch_unless_it_is_a_tie(own: AlborRuntime):
    prompt = next(gate._prompts(own, 96))
    written = own.greedy(prompt, 64)
    logits = own.logits([*prompt, *written[:5]])[-1]

    class OtherOnce(OtherAt):
        """In the first text; after it `later`, or what is right."""

        other = int(np.argsort(logits)[-2])  # the second likeliest
        later: int | None = None

        def greedy(self, tokens: Sequence[int], count: int, favoured: int | None = None) -> list[int]:
            if list(tokens) == prompt:
                return super().greedy(tokens, count, favoured)
            return self.own.greedy(tokens, count, favoured) if self.later is None else [self.later]

    told = OtherOnce(own)
    row = compare(own, told).rows[2]
    assert not row.passed
    assert row.compared == "5 tokens"

    gap = float(logits.max() - logits[told.other]) / float(np.abs(logits).max())
    wide = Tolerance(gap, "so wide that both are as likely")
    row = gate.compare(own, "told", lambda: told, 96, wide).rows[2]
    assert row.passed
    assert (row.compared, row.found.split(" within")[0]) == ("64 tokens", "all equal, but for 1 ties")

    told.later = int(own.logits(list(gate._prompts(own, 96))[1])[-1].argmin())  # no tie
    row = gate.compare(own, "told", lambda: told, 96, wide).rows[2]
    assert (row.passed, row.compared) == (False, "5 tokens")


def test_a_text_that_ends_too_early_is_a_mismatch(own: AlborRuntime):
    class Short(Told):
        def greedy(self, tokens: Sequence[int], count: int, favoured: int | None = None) -> list[int]:
            return self.own.greedy(tokens, count, favoured)[:7]

    assert verdicts(compare(own, Short(own)))["greedy tokens"] is False


@pytest.mark.parametrize("extra", [frozenset(), frozenset({0, 3, 300})])
def test_other_stop_tokens_are_a_mismatch(extra: frozenset[int], own: AlborRuntime):
    told = Told(own)
    told.stop_ids = extra
    assert verdicts(compare(own, told))["stop"] is False


def test_a_loop_that_goes_on_after_a_stop_token_is_a_mismatch(own: AlborRuntime):
    class Endless(Told):
        def greedy(self, tokens: Sequence[int], count: int, favoured: int | None = None) -> list[int]:
            return (
                self.own.greedy(tokens, count) if favoured == 3 else self.own.greedy(tokens, count, favoured)
            )

    assert verdicts(compare(own, Endless(own)))["stop"] is False


def test_the_texts_have_what_they_are_for(own: AlborRuntime):
    """Code, tabs, Unicode, emoji, markers; and all of the vocabulary but for single bytes."""
    joined = "".join(gate.CORPUS)
    for sample in (
        "\t",
        "\r\n",
        "    ",
        "def ",
        "\U0001f600",
        "\u200d",
        "é",
        "e\u0301",
        "中",
        "<|endoftext|>",
    ):
        assert sample in joined
    assert "\u2581" not in joined
    seen = {token for text in gate.texts(own.tokenizer) for token in own.tokenize(text)}
    pieces = {i for i in range(own.tokenizer.vocab_size) if own.tokenizer.token_bytes[i] and i not in seen}
    spelled = [own.tokenizer.decode([i]) for i in pieces if not own.tokenizer.is_byte(i)]
    assert len(spelled) < 0.1 * own.tokenizer.vocab_size, spelled  # what longer pieces always cover
