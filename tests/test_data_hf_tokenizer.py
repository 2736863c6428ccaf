"""Tokenizers in Hugging Face's format, behind the same interface."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from run_cases import call, events, write_project
from test_data_tokenizer import CODE, NASTY, check_lossless

from albor.checkpoint import find_latest
from albor.data.hf_encoder import byte_alphabet
from albor.data.tokenizer import Tokenizer
from albor.data.tokenizer_json import PRESETS
from albor.errors import ConfigError, DataError
from albor.export.tokenizer_files import hf_tokenizer_json, write_tokenizer_files

tokenizers = pytest.importorskip("tokenizers", reason="needs the hf extra")
VOCABULARY = 400


def byte_level(texts: list[str] = CODE, vocab_size: int = VOCABULARY, pre: str = "gpt-2") -> Any:
    """A byte-level BPE, as GPT-2's; its first tokens are control tokens."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizer(PRESETS[pre])
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def pre_tokenizer(content: dict[str, Any]) -> Any:
    """The library makes one only as a part of a whole tokenizer."""
    whole = json.loads(tokenizers.Tokenizer(tokenizers.models.BPE()).to_str())
    return tokenizers.Tokenizer.from_str(json.dumps(whole | {"pre_tokenizer": content})).pre_tokenizer


def write(directory: Path, content: dict[str, Any]) -> Path:
    path = directory / "tokenizer.json"
    path.write_text(json.dumps(content))
    return path


@pytest.fixture(scope="module")
def content() -> dict[str, Any]:
    """A tokenizer.json that is fine, but for what must be turned off: a token in front, and a length."""
    tokenizer = byte_level()
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)]
    )
    tokenizer.enable_truncation(8)
    tokenizer.enable_padding(length=12)
    return dict(json.loads(tokenizer.to_str()))


@pytest.fixture(scope="module")
def tokenizer(content: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer.load(write(tmp_path_factory.mktemp("given"), content), "hf")


def test_it_is_what_the_file_says(tokenizer: Tokenizer):
    assert tokenizer.special_ids == {"<|endoftext|>": 0, "<|im_start|>": 1, "<|im_end|>": 2}
    assert (tokenizer.vocab_size, tokenizer.end_of_document_id) == (VOCABULARY, 0)
    assert tokenizer.can_chat
    assert tokenizer.file_name == "tokenizer.json"
    assert tokenizer.decode_bytes([0, 1, 2]) == b""
    singles = [token for token in range(VOCABULARY) if tokenizer.is_byte(token)]
    assert sorted(tokenizer.decode_bytes([token]) for token in singles) == [bytes([b]) for b in range(256)]
    assert np.array_equal(
        tokenizer.token_bytes, [len(tokenizer.decode_bytes([i])) for i in range(VOCABULARY)]
    )


@pytest.mark.parametrize("text", NASTY, ids=lambda text: ascii(text[:12]))
def test_nasty_texts_come_back_exactly(tokenizer: Tokenizer, text: str):
    check_lossless(tokenizer, text)


@settings(max_examples=200, deadline=None)
@given(
    st.text(st.characters(exclude_categories=["Cs"]) | st.sampled_from(" \n\t\r\u2581<|_>0aä"), max_size=60)
)
def test_any_text_comes_back_exactly(tokenizer: Tokenizer, text: str):
    check_lossless(tokenizer, text)


def test_the_tokens_are_the_librarys(tokenizer: Tokenizer):
    plain = byte_level()
    for text in CODE:
        assert tokenizer.encode(text).tolist() == plain.encode(text, add_special_tokens=False).ids


def test_the_alphabet_is_the_librarys():
    assert sorted(byte_alphabet()) == sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    decoder = tokenizers.decoders.ByteLevel()
    for letter, byte in byte_alphabet().items():
        assert decoder.decode([letter]) == bytes([byte]).decode(errors="replace")


def test_pieces_that_are_added_are_found_in_the_text(content: dict[str, Any], tmp_path: Path):
    """As runs of spaces are in some code models; letters outside GPT-2's alphabet stand for themselves."""
    library = byte_level()
    library.add_tokens([tokenizers.AddedToken("    ", normalized=False), tokenizers.AddedToken("語彙")])
    given = Tokenizer.load(write(tmp_path, json.loads(library.to_str())), "hf")
    assert given.decode_bytes([VOCABULARY]) == b"    "
    ids = given.encode("a    語彙").tolist()
    assert ids[-2:] == [VOCABULARY, VOCABULARY + 1]
    for text in NASTY:
        check_lossless(given, text)


def test_an_exported_tokenizer_of_ours_is_the_same_again(tmp_path: Path):
    """Byte fallback instead of GPT-2's alphabet."""
    ours = Tokenizer.train(CODE, 420)
    write_tokenizer_files(ours, tmp_path, 512)
    again = Tokenizer.load(tmp_path, "hf")
    assert again.special_ids == ours.special_ids
    for text in [*NASTY, *CODE[:30]]:
        assert np.array_equal(again.encode(text), ours.encode(text))
    for token in range(420):
        assert again.decode_bytes([token]) == (ours.decode_bytes([token]) or again.decode_bytes([token]))
    assert hf_tokenizer_json(again) == again.model == (tmp_path / "tokenizer.json").read_bytes()


def test_it_is_exported_as_it_is(tmp_path: Path, content: dict[str, Any]):
    """And transformers, which adds what the configuration beside it says, has the same tokens."""
    transformers = pytest.importorskip("transformers", reason="needs the hf extra")
    library = byte_level()
    library.add_tokens([tokenizers.AddedToken("    ", normalized=False)])
    path = write(tmp_path, json.loads(library.to_str()))
    given = Tokenizer.load(path, "hf")
    (tmp_path / "out").mkdir()
    write_tokenizer_files(given, tmp_path / "out", 512)
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == path.read_bytes()
    assert not (tmp_path / "out" / "tokenizer.model").exists()
    loaded = transformers.AutoTokenizer.from_pretrained(tmp_path / "out", local_files_only=True)
    assert (loaded.eos_token, len(loaded)) == ("<|endoftext|>", VOCABULARY + 1)
    for text in [*NASTY, *CODE[:30]]:
        ids = given.encode(text).tolist()
        assert loaded.encode(text, add_special_tokens=False, split_special_tokens=True) == ids
        assert loaded.decode(ids) == text


def without_normal_form(content: dict[str, Any]) -> None:
    content["normalizer"] = {"type": "NFC"}


def with_prefix_space(content: dict[str, Any]) -> None:
    content["pre_tokenizer"] = {**PRESETS["gpt-2"], "add_prefix_space": True}


def that_strips(content: dict[str, Any]) -> None:
    token = {"id": VOCABULARY, "content": "<piece>", "single_word": False, "lstrip": True, "rstrip": True}
    content["added_tokens"].append(token | {"normalized": False, "special": False})


def that_drops(content: dict[str, Any]) -> None:
    content["model"]["dropout"] = 0.1


def of_words(content: dict[str, Any]) -> None:
    content["decoder"] = {"type": "WordPiece", "prefix": "##", "cleanup": False}


def endless(content: dict[str, Any]) -> None:
    content["added_tokens"] = content["added_tokens"][1:]


def without_decoder(content: dict[str, Any]) -> None:
    content["decoder"] = None


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            without_normal_form,
            "changes the text that it encodes.*set tokenizer.kind to sentencepiece and set",
        ),
        (with_prefix_space, "changes the text"),
        (that_strips, "changes the text"),
        (that_drops, "dropout"),
        (of_words, "decoder is WordPiece"),
        (without_decoder, "decoder is missing"),
        (endless, "no special token"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_what_would_change_texts_is_refused(
    content: dict[str, Any], tmp_path: Path, change: Callable[[dict[str, Any]], None], said: str
):
    changed = json.loads(json.dumps(content))
    change(changed)
    with pytest.raises(DataError, match=said):
        Tokenizer.load(write(tmp_path, changed), "hf")


def test_a_byte_that_the_vocabulary_lacks_is_left_out_and_never_the_end_of_a_document(
    content: dict[str, Any], tmp_path: Path
):
    """As U+0004 is missing from SmolLM2's, where <|endoftext|> would stand for it."""
    changed = json.loads(json.dumps(content))
    model = changed["model"]
    del model["vocab"]["\u0104"]  # U+0004 in GPT-2's alphabet
    model["unk_token"] = "<|endoftext|>"
    given = Tokenizer.load(write(tmp_path, changed), "hf")
    assert given.encode("a\x04b").tolist() == [*given.encode("a"), *given.encode("b")]
    assert given.vocab_size == VOCABULARY
    check_lossless(given, "a\x05b<|endoftext|>")


@pytest.mark.parametrize("given", ["", "[]", "{", "[" * 100_000, "null", '{"model": 1}'])
def test_files_that_are_no_tokenizer(tmp_path: Path, given: str):
    (tmp_path / "tokenizer.json").write_text(given)
    with pytest.raises(DataError, match=r"is not a tokenizer\.json file"):
        Tokenizer.load(tmp_path / "tokenizer.json", "hf")


def test_what_is_not_there_is_named(tmp_path: Path):
    with pytest.raises(DataError, match=r"there is no tokenizer\.json in it"):
        Tokenizer.load(tmp_path, "hf")
    with pytest.raises(DataError, match="cannot be read: No such file"):
        Tokenizer.load(tmp_path / "other.json", "hf")


def test_a_file_of_the_other_kind_says_so(content: dict[str, Any], tmp_path: Path):
    with pytest.raises(DataError, match=r"not a SentencePiece model file; tokenizer\.kind would be hf"):
        Tokenizer.load(write(tmp_path, content))


def test_without_the_library_the_message_has_the_command(
    content: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(ConfigError, match=r"pip install 'albor\[hf\]'"):
        Tokenizer.load(write(tmp_path, content), "hf")


def test_a_run_trains_and_writes_with_it(
    content: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """The model may have more ids than the tokenizer; the checkpoint has the file as it was."""
    monkeypatch.chdir(tmp_path)
    config, path = write_project(tmp_path), write(tmp_path, content)
    keys = ("tokenizer.kind=hf", f"tokenizer.path={path}", "train.max_steps=8")
    result = call("train", config, *keys, "model.vocab_size=399")
    assert result.code == 2
    assert "model.vocab_size: 399, but the tokenizer" in result.err
    assert "set it to 400 or more" in result.err
    result = call("train", config, *keys, "model.vocab_size=448")
    assert result.code == 0, result.err
    newest = find_latest(Path("runs/tiny/checkpoints"))
    assert newest is not None
    assert (newest / "tokenizer.json").read_bytes() == path.read_bytes()
    path.unlink()  # what was trained needs no other file
    written = call("generate", "runs/tiny", "--prompt", "the model", "--max-tokens", "4", "--json")
    assert written.code == 0, written.err
    assert json.loads(written.out)["prompt_tokens"] > 1


def test_it_has_to_be_given(tmp_path: Path):
    result = call("train", write_project(tmp_path), "tokenizer.kind=hf")
    assert result.code == 2
    assert "tokenizer.path: is null, and a tokenizer of kind hf is not trained here" in result.err


def test_a_run_goes_on_with_it(content: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    config, path = write_project(tmp_path), write(tmp_path, content)
    keys = ("tokenizer.kind=hf", f"tokenizer.path={path}", "model.vocab_size=400", "schedule.kind=constant")
    assert call("train", config, *keys, "train.max_steps=8").code == 0
    assert call("train", config, *keys, "train.max_steps=12").code == 0
    assert events(Path("runs/tiny"), "resumed")
    path.write_text(json.dumps(content, indent=1))
    result = call("train", config, *keys, "train.max_steps=16")
    assert result.code == 1
    assert "was trained with another tokenizer" in result.err
