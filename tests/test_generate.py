"""Sampling against its definition, streaming against every cut of a text into tokens, the whole from disk."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from test_decode import CONTEXT, make_config

from albor import checkpoint
from albor.architecture import Architecture
from albor.configfile import dump_config
from albor.data.tokenizer import Tokenizer
from albor.errors import CheckpointError, ConfigError
from albor.generate.generate import Generation, PromptTooLong, generate
from albor.generate.load import load_for_inference
from albor.generate.sampler import NotFinite, sample, uniform_for
from albor.generate.text_stream import TextStream
from albor.memory.devices import compute_dtype
from albor.model.decode import Decoder

LOGITS = torch.log(torch.tensor([0.1, 0.4, 0.2, 0.3], dtype=torch.float64))


def drawn(
    logits: torch.Tensor, temperature: float = 1.0, top_k: int | None = None, top_p: float | None = None
) -> dict[int, float]:
    """The share of a fine, even grid of uniform numbers that each token gets."""
    grid = [(i + 0.5) / 1000 for i in range(1000)]
    tokens = [sample(logits, temperature, top_k, top_p, uniform) for uniform in grid]
    return {token: tokens.count(token) / 1000 for token in sorted(set(tokens))}


def test_sampling_follows_the_softmax() -> None:
    assert drawn(LOGITS) == pytest.approx({0: 0.1, 1: 0.4, 2: 0.2, 3: 0.3}, abs=0.002)
    squared = torch.softmax(LOGITS / 0.5, 0).tolist()
    assert drawn(LOGITS, temperature=0.5) == pytest.approx(dict(enumerate(squared)), abs=0.002)


@pytest.mark.parametrize(
    ("top_k", "top_p", "expected"),
    [
        (2, None, {1: 4 / 7, 3: 3 / 7}),
        (1, None, {1: 1.0}),
        (99, None, {0: 0.1, 1: 0.4, 2: 0.2, 3: 0.3}),
        (None, 0.0, {1: 1.0}),
        (None, 0.39, {1: 1.0}),
        (None, 0.41, {1: 4 / 7, 3: 3 / 7}),
        (None, 0.89, {1: 4 / 9, 2: 2 / 9, 3: 3 / 9}),
        (None, 1.0, {0: 0.1, 1: 0.4, 2: 0.2, 3: 0.3}),
        (2, 0.58, {1: 4 / 7, 3: 3 / 7}),  # of the 2 likeliest, 0.57 of the probability is the first one's
        (2, 0.56, {1: 1.0}),
    ],
)
def test_top_k_and_top_p_keep_the_likeliest(
    top_k: int | None, top_p: float | None, expected: dict[int, float]
) -> None:
    assert drawn(LOGITS, top_k=top_k, top_p=top_p) == pytest.approx(expected, abs=0.002)


def test_top_p_keeps_the_fewest_tokens_that_reach_it() -> None:
    logits = torch.log(torch.tensor([0.5, 0.25, 0.125, 0.125], dtype=torch.float64))  # exact in binary
    assert set(drawn(logits, top_p=0.5)) == {0}
    assert set(drawn(logits, top_p=0.75)) == {0, 1}


def test_of_equal_logits_the_lower_id_comes_first() -> None:
    logits = torch.tensor([1.0, 3.0, 3.0, 3.0])
    assert sample(logits, 0.0, None, None, 0.99) == 1
    assert sample(logits, 1.0, 1, None, 0.99) == 1
    assert set(drawn(logits, top_k=2)) == {1, 2}


@pytest.mark.parametrize("uniform", [0.0, 0.5, 1 - 2**-53])
@pytest.mark.parametrize("top_p", [None, 1.0])
def test_a_token_without_probability_is_never_drawn(uniform: float, top_p: float | None) -> None:
    logits = torch.tensor([-1e4, 0.0, -1e4, 0.0, -1e4])  # exp(-1e4) is 0 in float64
    assert sample(logits, 1.0, None, top_p, uniform) in (1, 3)
    assert sample(logits + torch.tensor([0, 1, 0, 0, 0]), 5e-324, None, top_p, uniform) == 1
    assert sample(torch.tensor([3e38, -3e38, 0.0]), 1.0, None, top_p, uniform) == 0


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_not_finite_are_refused(value: float, temperature: float) -> None:
    with pytest.raises(NotFinite, match="logit for token 2"):
        sample(torch.tensor([0.0, 1.0, value]), temperature, None, None, 0.5)


def test_uniform_numbers_are_even_and_depend_on_seed_and_index() -> None:
    numbers = np.array([uniform_for(seed, index) for seed in range(20) for index in range(100)])
    assert len(set(numbers)) == len(numbers)
    assert numbers.min() >= 0
    assert numbers.max() < 1
    counts, _ = np.histogram(numbers, bins=10, range=(0, 1))
    assert ((counts - 200) ** 2 / 200).sum() < 27.9  # chi-squared with 9 degrees of freedom, p = 0.001


# Streaming


def cut(data: bytes, places: list[int]) -> Iterator[bytes]:
    borders = sorted({0, len(data), *(place % (len(data) + 1) for place in places)})
    return (data[a:b] for a, b in pairwise(borders))


def streamed(text: str, stop: list[str], places: list[int]) -> tuple[str, bool]:
    stream = TextStream(stop)
    pieces = [stream.push(part) for part in cut(text.encode(), places)]
    return "".join([*pieces, stream.finish()]), stream.stopped


def stopped_by_hand(text: str, stop: list[str]) -> tuple[str, bool]:
    """The text before the first stop string that is complete when the text is read character by character."""
    for end in range(1, len(text) + 1):
        starts = [end - len(s) for s in stop if text[:end].endswith(s)]
        if starts:
            return text[: min(starts)], True
    return text, False


@settings(max_examples=300, deadline=None)
@given(
    st.text(alphabet="ab😀é", max_size=12),
    st.lists(st.text(alphabet="ab😀é", min_size=1, max_size=4), max_size=3),
    st.lists(st.integers(0, 60), max_size=8),
)
def test_streaming_does_not_depend_on_the_cuts(text: str, stop: list[str], places: list[int]) -> None:
    assert streamed(text, stop, places) == stopped_by_hand(text, stop)


def test_a_character_waits_for_its_last_byte() -> None:
    stream = TextStream()
    assert [stream.push(bytes([byte])) for byte in "a😀b".encode()] == ["a", "", "", "", "😀", "b"]
    assert stream.push(b"\xf0\x9f") == ""
    assert stream.push(b"c\xff") == "\ufffdc\ufffd"  # these bytes can no longer become characters
    assert stream.push("é".encode()[:1]) == ""
    assert stream.finish() == ""


def test_only_what_may_begin_a_stop_string_is_held_back() -> None:
    stream = TextStream(["\n\n", "END"])
    assert [stream.push(c.encode()) for c in "a\nEEN"] == ["a", "", "\n", "E", ""]
    assert stream.push(b"x") == "ENx"
    assert stream.push(b"\n") == ""
    assert stream.finish() == "\n"
    assert not stream.stopped


# Generation


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(["the cat sat on the mat and the dog ran to the cat\n"] * 20, 300)


class Script(Decoder):
    """A decoder whose model always wants to write `tokens`, and which records what it reads."""

    def __init__(self, tokens: list[int], vocab_size: int, context: int = 1000):
        self.script, self.vocab_size, self.context = tokens, vocab_size, context
        self.reset()

    def reset(self) -> None:
        self.length, self.read = 0, list[int]()

    def rewind(self, length: int) -> None:
        assert length == 0
        self.reset()

    def feed_one(self, token: int) -> torch.Tensor:
        return self.feed(torch.tensor([token]))

    def feed(self, tokens: torch.Tensor) -> torch.Tensor:
        written = 0 if self.length == 0 else len(self.read) - self.prompt + 1
        self.prompt = len(tokens) if self.length == 0 else self.prompt
        self.read += tokens.tolist()
        self.length = len(self.read)
        logits = torch.zeros(self.vocab_size)
        logits[self.script[written]] = 9.0
        return logits


def write(tokenizer: Tokenizer, tokens: list[int], prompt: str = "the ", **arguments: object) -> Generation:
    """`generate` with a scripted model; checks that the streamed pieces join to the text."""
    pieces: list[str] = []
    context = arguments.pop("context", 1000)
    script = Script([*tokens, tokenizer.end_of_document_id], tokenizer.vocab_size + 5, context)  # type: ignore[arg-type]
    settings = {"max_tokens": 100, "temperature": 0.0, "on_text": pieces.append, **arguments}
    generation = generate(script, tokenizer, prompt, **settings)  # type: ignore[arg-type]
    assert "".join(pieces) == generation.text
    assert "" not in pieces
    read = [tokenizer.end_of_document_id, *tokenizer.encode(prompt).tolist(), *generation.tokens]
    assert script.read == read[: len(script.read)]
    return generation


def test_writing_ends_at_the_end_of_the_document(tokenizer: Tokenizer) -> None:
    tokens = tokenizer.encode("cat sat 😀 here").tolist()
    generation = write(tokenizer, tokens)
    assert generation.text == "cat sat 😀 here"
    assert generation.tokens == tuple(tokens)
    assert generation.stop_reason == "end_of_document"
    assert generation.prompt_tokens == 1 + len(tokenizer.encode("the "))


def test_an_empty_prompt_is_the_end_of_document_token(tokenizer: Tokenizer) -> None:
    assert write(tokenizer, tokenizer.encode("cat").tolist(), prompt="").prompt_tokens == 1


def test_writing_ends_at_its_length(tokenizer: Tokenizer) -> None:
    tokens = tokenizer.encode("the dog").tolist()
    for length in range(len(tokens) + 1):
        generation = write(tokenizer, tokens, max_tokens=length)
        assert generation.text == tokenizer.decode(tokens[:length])
        assert generation.stop_reason == "length"
    byte_tokens = tokenizer.encode("😀").tolist()
    assert len(byte_tokens) == 4
    assert write(tokenizer, byte_tokens, max_tokens=3).text == ""  # no half characters


def test_a_stop_string_may_lie_across_tokens(tokenizer: Tokenizer) -> None:
    tokens = [token for c in "dog 😀 cat" for token in tokenizer.encode(c).tolist()]
    generation = write(tokenizer, tokens, stop=["xyz", "😀 c"])
    assert (generation.text, generation.stop_reason) == ("dog ", "stop_string")
    assert tokenizer.decode(generation.tokens) == "dog 😀 c"
    assert write(tokenizer, tokens, stop=["cats"]).text == "dog 😀 cat"  # it only began


def test_writing_ends_where_the_context_is_full(tokenizer: Tokenizer) -> None:
    prompt, tokens = "the cat", tokenizer.encode(" sat on").tolist()
    prompt_tokens = 1 + len(tokenizer.encode(prompt))
    # One token is read into the last position, and one more is written after it.
    generation = write(tokenizer, tokens, prompt, context=prompt_tokens + 1)
    assert (generation.tokens, generation.stop_reason) == (tuple(tokens[:2]), "context_full")
    context = prompt_tokens - 1
    with pytest.raises(PromptTooLong, match=rf"prompt has {prompt_tokens} tokens.* holds {context} "):
        write(tokenizer, tokens, prompt, context=context)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"temperature": -1.0}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"top_k": 0}, "top_k"),
        ({"top_p": 1.5}, "top_p"),
        ({"stop": [""]}, "stop"),
    ],
)
def test_settings_that_mean_nothing_are_refused(
    tokenizer: Tokenizer, settings: dict[str, object], named: str
) -> None:
    with pytest.raises(ConfigError, match=rf"^{named}: is "):
        write(tokenizer, [], **settings)


# From disk


def save_run(directory: Path, tokenizer: Tokenizer, dtype: torch.dtype, **train: object) -> Path:
    """A run directory with one checkpoint, of random weights; returns the checkpoint's directory."""
    config = make_config({"vocab_size": tokenizer.vocab_size + 3})
    config = config.model_copy(update={"train": config.train.model_copy(update=train)})
    generator = torch.Generator().manual_seed(3)
    weights = {
        parameter.name: torch.randn(parameter.shape, generator=generator).mul_(0.3).to(dtype)
        for parameter in Architecture.from_config(config.model).parameters
    }
    return checkpoint.save(
        directory / "checkpoints",
        7,
        {"weights": weights, "optimizer": {"first": torch.zeros(5)}},
        {"step": 7},
        {"config.yaml": dump_config(config).encode(), "tokenizer.model": tokenizer.model},
        checkpoint.Retention(keep_last=1),
    )


@pytest.fixture(scope="module")
def run_directory(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("run")
    save_run(directory, tokenizer, getattr(torch, compute_dtype("bf16", "cpu")))
    return directory


def test_a_run_writes_from_its_checkpoint(run_directory: Path, tokenizer: Tokenizer) -> None:
    config, model, loaded_tokenizer, arena = load_for_inference(run_directory, "cpu")
    assert config.model.vocab_size == tokenizer.vocab_size + 3
    assert loaded_tokenizer.sha256 == tokenizer.sha256
    assert arena.plan.compute_dtype == compute_dtype("bf16", "cpu")
    decoder = Decoder(model, arena)

    def tokens(**settings: object) -> tuple[int, ...]:
        arguments = {"max_tokens": CONTEXT, "temperature": 1.0, **settings}
        return generate(decoder, tokenizer, "the cat", **arguments).tokens  # type: ignore[arg-type]

    assert tokens(seed=1) == tokens(seed=1)
    assert len({tokens(seed=seed) for seed in range(5)}) == 5
    assert tokens(top_k=1, seed=1) == tokens(top_p=0.0, seed=2) == tokens(temperature=0.0)


@pytest.mark.parametrize(
    ("precision", "stored", "computed"),
    [
        ("bf16", torch.bfloat16, "float32"),  # trained on a GPU, writing on a CPU without bf16
        ("bf16", torch.float32, "bfloat16"),  # the other way round
        ("fp16", torch.float16, "float32"),  # no CPU computes in fp16
        ("fp32", torch.float32, "float32"),
    ],
)
def test_weights_are_read_as_what_this_machine_computes_in(
    tokenizer: Tokenizer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    precision: str,
    stored: torch.dtype,
    computed: str,
) -> None:
    path = save_run(tmp_path, tokenizer, stored, precision=precision)
    monkeypatch.setattr("albor.memory.devices.cpu_has_bf16", lambda: computed == "bfloat16")
    loaded = load_for_inference(tmp_path, "cpu")
    weight = loaded.model.embedding.weight
    assert loaded.arena.plan.compute_dtype == computed
    assert weight.dtype == getattr(torch, computed)
    with safe_open(path / "weights.safetensors", framework="pt") as file:
        assert torch.equal(weight, file.get_tensor("embedding.tokens").to(weight.dtype))


@pytest.mark.parametrize("name", ["weights.safetensors", "config.yaml", "tokenizer.model"])
def test_damage_in_what_is_read_is_found(run_directory: Path, tmp_path: Path, name: str) -> None:
    source, copy = run_directory / "checkpoints" / "step-00000007", tmp_path / "copy"
    shutil.copytree(source, copy)
    for damaged in (name, "optimizer.safetensors"):
        data = (source / damaged).read_bytes()
        (copy / damaged).write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(CheckpointError, match=rf"{name}: content differs"):
        load_for_inference(copy, "cpu")
    shutil.copy(source / name, copy / name)
    load_for_inference(copy, "cpu")  # the optimizer's damage is no reason not to write


def test_a_damaged_checkpoint_is_one_line_and_the_one_before_writes(
    run_directory: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(run_directory, run)
    older, newer = (run / "checkpoints" / f"step-0000000{step}" for step in (7, 8))
    shutil.copytree(older, newer)
    (newer / "weights.safetensors").write_bytes(b"torn")
    command = [sys.executable, "-m", "albor", "generate", str(run), "--max-tokens", "2"]
    written = subprocess.run(command, capture_output=True, text=True)
    assert written.returncode == 0
    (line,) = written.stderr.splitlines()
    assert line.startswith("albor: passed over a damaged checkpoint: ")
    (older / "weights.safetensors").write_bytes(b"torn")
    refused = subprocess.run(command, capture_output=True, text=True)
    assert (refused.returncode, refused.stdout) == (1, "")
    *passed_over, last = refused.stderr.splitlines()
    assert len(passed_over) == 2
    assert all(line.startswith("albor: passed over") for line in passed_over)
    assert last.endswith("none of the 2 checkpoints verifies; use a copy of one, or train anew")


def test_a_directory_without_a_checkpoint_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no complete checkpoint"):
        load_for_inference(tmp_path)


def test_the_context_of_a_real_model_fills(run_directory: Path, tokenizer: Tokenizer) -> None:
    _, model, _, arena = load_for_inference(run_directory, "cpu")
    decoder = Decoder(model, arena)
    generation = generate(decoder, tokenizer, "the cat", max_tokens=1000, temperature=0.0)
    assert generation.stop_reason == "context_full"
    assert decoder.length == CONTEXT
    assert len(generation.tokens) == CONTEXT - generation.prompt_tokens + 1
