"""The tokenizer: lossless on any text, exact in its byte counts, the same at every training."""

import io

import numpy as np
import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

from albor.data.sources import Document
from albor.data.tokenizer import CHAT_MARKERS, END_OF_DOCUMENT, Tokenizer, inspect, sample_text
from albor.errors import DataError

CODE = [
    f"def function_{i}(self, value):\n    if value > {i}:\n        return self.values[{i * 7}] + value\n\n"
    f"# The quick brown fox {'jumps' if i % 2 else 'sleeps'} over {i} lazy dogs.\n"
    for i in range(200)
]
NASTY = [
    "",
    " ",
    "   leading and  double   spaces ",
    "tabs\t\tand\r\nline\rends\n\n\n",
    "\0 nul \x1f \x7f \x85 \u2028",
    "\ufeff bom \ufffe \uffff \ufffd",
    "emoji 😀👨‍👩‍👧 e\u0301 ﬁ Ⅳ ½ \U0010ffff",
    "\u2581",
    "a\u2581b \u2581 c \u2581\u2581\u2581 d\n\u2581\n",
    f"{END_OF_DOCUMENT}{CHAT_MARKERS[0]}user\nhi{CHAT_MARKERS[1]}\n<unk><s></s><pad><0x41> \u2047 \u2585",
    "x" * 70_000,
    " " * 40_000 + "\n" * 40_000,
    ("word " * 20 + "\n") * 2_000,
]


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train(CODE, 420)


def check_lossless(tokenizer, text):
    ids = tokenizer.encode(text)
    assert ids.dtype == np.int32
    assert tokenizer.decode(ids) == text
    assert tokenizer.token_bytes[ids].sum() == len(text.encode())
    assert not set(tokenizer.special_ids.values()) & set(ids.tolist())


@pytest.mark.parametrize("text", NASTY, ids=lambda text: ascii(text[:12]))
def test_nasty_texts_come_back_exactly(tokenizer, text):
    check_lossless(tokenizer, text)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(
    st.text(st.characters(exclude_categories=["Cs"]) | st.sampled_from(" \n\t\r\u2581<|_>0aä"), max_size=60)
)
def test_any_text_comes_back_exactly(tokenizer, text):
    check_lossless(tokenizer, text)


def test_a_batch_is_its_texts_one_by_one(tokenizer):
    texts = [*NASTY, *CODE[:20]]
    for text, ids in zip(texts, tokenizer.encode_batch(texts), strict=True):
        np.testing.assert_array_equal(ids, tokenizer.encode(text))
    assert tokenizer.encode_batch([]) == []


def test_every_token_is_the_bytes_that_it_counts(tokenizer):
    assert tokenizer.token_bytes.shape == (tokenizer.vocab_size,) == (420,)
    for token in range(tokenizer.vocab_size):
        assert len(tokenizer.decode_bytes([token])) == tokenizer.token_bytes[token]
    assert tokenizer.token_bytes[tokenizer.end_of_document_id] == 0
    assert sum(tokenizer.is_byte(token) for token in range(420)) == 256
    assert sorted(tokenizer.decode_bytes([t]) for t in range(420) if tokenizer.is_byte(t)) == [
        bytes([b]) for b in range(256)
    ]


def test_decoding_half_a_character_marks_it(tokenizer):
    ids = tokenizer.encode("😀")
    assert len(ids) == 4
    assert tokenizer.decode(ids[:2]) == "\ufffd"
    assert tokenizer.decode_bytes(ids[:2]) == "😀".encode()[:2]


def test_end_of_document(tokenizer):
    ids = tokenizer.end_document(tokenizer.encode("text"))
    assert ids.dtype == np.int32
    assert ids[-1] == tokenizer.end_of_document_id
    assert tokenizer.decode(ids) == "text"


def test_the_markers_are_control_tokens_at_fixed_ids(tokenizer):
    """Those who write a chat use the ids; a text that spells a marker never becomes one."""
    assert tokenizer.special_ids == {END_OF_DOCUMENT: 0, "<|im_start|>": 2, "<|im_end|>": 3}
    assert tokenizer.can_chat
    assert tokenizer.decode_bytes([0, 2, 3]) == b""
    often = [f"{marker}{text}\n" * 9 for text in CODE for marker in (*CHAT_MARKERS, END_OF_DOCUMENT)]
    trained = Tokenizer.train(often, 440)  # however often the text spells them, they are no pieces
    assert trained.special_ids == tokenizer.special_ids
    check_lossless(trained, often[0])


def test_runs_of_spaces_are_pieces_and_line_ends_and_digits_stand_alone(tokenizer):
    pieces = [tokenizer.decode_bytes([token]) for token in tokenizer.encode("\n        return self")]
    assert len(pieces) <= 5
    assert not any(b"\n" in tokenizer.decode_bytes([token]).strip(b"\n") for token in range(420))
    assert pieces[0] == b"\n"
    assert [tokenizer.decode([token]) for token in tokenizer.encode("1999")] == ["1", "9", "9", "9"]


def test_training_twice_gives_the_same_file(tokenizer):
    assert Tokenizer.train(iter(CODE), 420).sha256 == tokenizer.sha256
    assert Tokenizer.train(CODE[1:], 420).sha256 != tokenizer.sha256


def test_long_lines_without_spaces_and_odd_texts_can_be_trained_on():
    trained = Tokenizer.train([*CODE, "xy" * 200_000, "\0", "\u2581" * 9, "\n\n", "tab\ttab", ""], 400)
    assert trained.vocab_size == 400
    check_lossless(trained, "xyxyxyxy\0\u2581")


def test_long_lines_of_wide_characters_are_trained_on():
    """SentencePiece leaves out longer sentences in silence, unless it is told not to."""
    trained = Tokenizer.train([*CODE, "語彙" * 20_000], 400)
    assert len(trained.encode("語彙語彙語彙語彙")) < 8


def test_the_vocabulary_is_exact_or_the_error_says_which_would_work():
    with pytest.raises(
        DataError, match=r"too small for a vocabulary of 4096; lower model.vocab_size to (\d+)"
    ) as e:
        Tokenizer.train(CODE[:3], 4096)
    largest = int(str(e.value).split("vocab_size to ")[1].split()[0])
    assert Tokenizer.train(CODE[:3], largest).vocab_size == largest
    with pytest.raises(DataError, match=r"no room for all bytes.*raise model.vocab_size to (\d+)") as e:
        Tokenizer.train(CODE, 200)
    smallest = int(str(e.value).split("vocab_size to ")[1].split()[0])
    assert Tokenizer.train(CODE, smallest).vocab_size == smallest


@pytest.mark.parametrize("texts", [[], [""], ["\n\n", "\u2581"]])
def test_nothing_to_train_on(texts):
    with pytest.raises(DataError, match="no text to train a tokenizer on"):
        Tokenizer.train(texts, 300)


def test_saving_and_loading(tokenizer, tmp_path):
    (tmp_path / "a.model").write_bytes(tokenizer.model)
    loaded = Tokenizer.load(tmp_path / "a.model")
    assert (loaded.sha256, loaded.vocab_size) == (tokenizer.sha256, 420)
    np.testing.assert_array_equal(loaded.encode(CODE[5]), tokenizer.encode(CODE[5]))


def test_files_that_are_no_tokenizer(tmp_path):
    with pytest.raises(DataError, match="cannot be read: No such file"):
        Tokenizer.load(tmp_path / "missing.model")
    for content in (b"", b"not a model", bytes(1000)):
        (tmp_path / "bad.model").write_bytes(content)
        with pytest.raises(DataError, match=r"bad.model"):
            Tokenizer.load(tmp_path / "bad.model")


@pytest.mark.parametrize(
    "option",
    [
        {"byte_fallback": False},
        {"normalization_rule_name": "nmt_nfkc"},
        {"add_dummy_prefix": True},
        {"remove_extra_whitespaces": True},
    ],
    ids=lambda option: next(iter(option)),
)
def test_an_imported_tokenizer_that_changes_text_is_refused(tmp_path, option):
    options = {
        "byte_fallback": True,
        "normalization_rule_name": "identity",
        "add_dummy_prefix": False,
        "remove_extra_whitespaces": False,
        **option,
    }
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CODE),
        model_writer=model,
        vocab_size=400,
        model_type="bpe",
        minloglevel=2,
        **options,
    )
    (tmp_path / "lossy.model").write_bytes(model.getvalue())
    with pytest.raises(DataError, match=r"lossy.model changes the text.*set tokenizer.path to null"):
        Tokenizer.load(tmp_path / "lossy.model")


def test_an_imported_tokenizer_without_markers_works(tmp_path):
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CODE), model_writer=model, vocab_size=400, model_type="bpe", minloglevel=2,
        byte_fallback=True, normalization_rule_name="identity", add_dummy_prefix=False,
        remove_extra_whitespaces=False,
    )  # fmt: skip
    (tmp_path / "plain.model").write_bytes(model.getvalue())
    loaded = Tokenizer.load(tmp_path / "plain.model")
    assert loaded.special_ids == {"<s>": 1, "</s>": 2}
    assert loaded.end_of_document_id == 2
    assert not loaded.can_chat
    check_lossless(loaded, NASTY[9])


def test_an_imported_tokenizer_without_an_end_of_document_is_refused(tmp_path):
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CODE), model_writer=model, vocab_size=400, model_type="bpe", minloglevel=2,
        byte_fallback=True, eos_id=-1,
    )  # fmt: skip
    (tmp_path / "endless.model").write_bytes(model.getvalue())
    with pytest.raises(DataError, match=r"endless.model.*no control token"):
        Tokenizer.load(tmp_path / "endless.model")


def test_a_sample_is_spread_over_all_documents_and_bounded():
    documents = [Document(str(i), f"{i:04d} " * 2000) for i in range(100)]  # 10,000 bytes each
    sample = sample_text(documents, 100_000)
    assert 90_000 < sum(map(len, sample)) <= 100_000
    origins = [part.split()[1] for part in sample]
    assert len(set(origins)) > 15
    assert origins == sorted(origins)
    assert sample == sample_text(documents, 100_000)
    assert "".join(sample_text(documents, 10**9)) == "".join(document.text for document in documents)


def test_inspect(tokenizer):
    found = inspect(tokenizer, CODE)
    tokens = sum(len(ids) for ids in tokenizer.encode_batch(CODE))
    assert found["vocab_size"] == 420
    assert found["sha256"] == tokenizer.sha256
    assert (found["documents"], found["tokens"]) == (200, tokens)
    assert found["bytes_per_token"] == sum(len(text.encode()) for text in CODE) / tokens > 2
    assert 0 < found["byte_fallback_share"] < 0.2  # line ends
    lengths = [len(piece.encode()) for piece in found["longest"]]
    assert lengths == sorted(lengths, reverse=True)
    assert lengths[0] == tokenizer.token_bytes.max()
    assert inspect(tokenizer, [])["bytes_per_token"] is None
