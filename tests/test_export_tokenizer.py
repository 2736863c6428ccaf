"""The tokenizer's files: transformers, which loads them, encodes every text as albor does."""

from __future__ import annotations

import io
import json
import random
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st
from test_data_tokenizer import CODE, NASTY

from albor.data.tokenizer import Tokenizer
from albor.export.format import CannotCarry
from albor.export.tokenizer_files import CHAT_TEMPLATE, hf_tokenizer_json, write_tokenizer_files

transformers = pytest.importorskip("transformers", reason="needs the hf extra")
TEXTS = [
    *NASTY,
    "汉字と仮名交じり文。한국어 e\u0301\u0323 ก็ עִבְרִית العَرَبِيَّة \u200f\u202e \u200b",
    "👨‍👩‍👧‍👦 👍🏽 🇫🇷 ❤️",
    "\t\tif x:\r\n\t\t\treturn  [1,  2]\r\n\r",
    "x" * 100_000 + " tail",
    "ab " * 60_000,
    "".join(map(chr, range(0x20))) + "\x7f\x80\x9f",
]
PERIODS = ("a", "ab", " ", "  ", "=", "aab", "\t", " a", "0", "\u2581", "語彙")


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    """Of a corpus with runs, periods and wide characters, whose pieces overlap with themselves."""
    runs = [f"{period * count} {period}\n" for period in PERIODS for count in range(2, 24)]
    return Tokenizer.train([*CODE, *runs * 3], 540)


@pytest.fixture(scope="module")
def directory(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("files")
    write_tokenizer_files(tokenizer, path, 2048)
    # What makes AutoTokenizer think of a class of its own for the model.
    (path / "config.json").write_text('{"model_type": "llama", "architectures": ["LlamaForCausalLM"]}')
    return path


@pytest.fixture(scope="module")
def loaded(directory: Path) -> Any:
    return transformers.AutoTokenizer.from_pretrained(directory, local_files_only=True)


def ids_of(loaded: Any, text: str) -> list[int]:
    ids: list[int] = loaded.encode(text, add_special_tokens=False, split_special_tokens=True)
    return ids


def check_same(tokenizer: Tokenizer, loaded: Any, text: str) -> None:
    expected = tokenizer.encode(text).tolist()
    assert ids_of(loaded, text) == expected
    assert loaded.decode(expected) == text


@pytest.mark.parametrize("text", TEXTS, ids=lambda text: ascii(text[:12]))
def test_transformers_encodes_nasty_texts_as_albor_does(tokenizer: Tokenizer, loaded: Any, text: str):
    check_same(tokenizer, loaded, text)


@settings(max_examples=300, deadline=None)
@given(
    st.lists(
        st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
        | st.sampled_from(
            ["def ", "return self", "    ", "\n", "\r\n", "<|im_end|>", "<0x41>", "\u2581", "12"]
        )
        | st.builds(str.__mul__, st.sampled_from(PERIODS), st.integers(1, 70)),
        max_size=8,
    ).map("".join)
)
def test_transformers_encodes_any_text_as_albor_does(tokenizer: Tokenizer, loaded: Any, text: str):
    check_same(tokenizer, loaded, text)


def test_pieces_in_any_order_are_merged_as_albor_merges_them(tokenizer: Tokenizer, loaded: Any):
    """Where two merges of the same rank overlap, the left one goes first in both."""
    rng = random.Random(5)
    pieces = [piece for i in range(260, 540) if (piece := tokenizer.decode([i]))]
    for _ in range(2000):
        period = "".join(rng.choices(pieces, k=rng.randint(1, 3)))
        text = (period * rng.randint(1, 12))[rng.randint(0, 3) :] + rng.choice(pieces)
        assert ids_of(loaded, text) == tokenizer.encode(text).tolist(), text


def test_a_marker_in_a_text_is_the_token_only_where_transformers_is_not_told_otherwise(
    tokenizer: Tokenizer, loaded: Any
):
    text = "a<|im_end|>b"
    assert loaded.encode(text) == [*tokenizer.encode("a"), 3, *tokenizer.encode("b")]
    assert 3 not in ids_of(loaded, text)
    assert loaded.decode(ids_of(loaded, text), skip_special_tokens=True) == text


def test_the_roles_and_the_template(tokenizer: Tokenizer, loaded: Any, directory: Path):
    assert len(loaded) == tokenizer.vocab_size == 540
    assert (loaded.bos_token_id, loaded.eos_token_id, loaded.pad_token_id) == (0, 0, 0)
    assert loaded.model_max_length == 2048
    assert sorted(loaded.all_special_ids) == [0, 2, 3]
    assert loaded.encode("") == []  # nothing is put in front
    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": " hi\n"}]
    given = loaded.apply_chat_template(turns, add_generation_prompt=True)["input_ids"]
    words = [
        tokenizer.encode(text).tolist() for text in ("system\nBe brief.", "\n", "user\n hi\n", "assistant\n")
    ]
    assert given == [2, *words[0], 3, *words[1], 2, *words[2], 3, *words[1], 2, *words[3]]
    assert (directory / "chat_template.jinja").read_text() == CHAT_TEMPLATE
    config = json.loads((directory / "tokenizer_config.json").read_text())
    assert config["chat_template"] == CHAT_TEMPLATE
    assert config["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert sorted(path.name for path in directory.iterdir()) == [
        "chat_template.jinja", "config.json", "special_tokens_map.json", "tokenizer.json", "tokenizer.model",
        "tokenizer_config.json",
    ]  # fmt: skip


def test_equal_tokenizers_give_equal_files(tokenizer: Tokenizer, directory: Path, tmp_path: Path):
    write_tokenizer_files(Tokenizer(tokenizer.model), tmp_path, 2048)
    for path in tmp_path.iterdir():
        assert path.read_bytes() == (directory / path.name).read_bytes()


def imported(tmp_path: Path, **options: Any) -> Tokenizer:
    """A lossless model file from elsewhere."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CODE), model_writer=model, vocab_size=420, minloglevel=2, byte_fallback=True,
        normalization_rule_name="identity", add_dummy_prefix=False, remove_extra_whitespaces=False,
        **{"model_type": "bpe"} | options,
    )  # fmt: skip
    (tmp_path / "given.model").write_bytes(model.getvalue())
    return Tokenizer.load(tmp_path / "given.model")


def test_a_given_vocabulary_with_pieces_across_words_is_exported_exactly(tmp_path: Path):
    """It has no markers of a chat, so there is no template."""
    given = imported(tmp_path, split_by_whitespace=False)
    assert any(" " in given.decode([i]).strip() for i in range(420))
    write_tokenizer_files(given, tmp_path, 64)
    loaded = transformers.AutoTokenizer.from_pretrained(tmp_path, local_files_only=True)
    for text in [*TEXTS, *CODE]:
        check_same(given, loaded, text)
    assert loaded.eos_token == "</s>"
    assert loaded.chat_template is None
    assert not (tmp_path / "chat_template.jinja").exists()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"model_type": "unigram"}, "no BPE"),
        ({"user_defined_symbols": ["def"]}, "its piece 'def' is user defined"),
    ],
)
def test_what_no_such_file_can_say_is_refused(tmp_path: Path, options: dict[str, Any], said: str):
    with pytest.raises(CannotCarry, match=said):
        hf_tokenizer_json(imported(tmp_path, **options))
