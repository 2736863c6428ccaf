"""Shards: what is read is what was written, or the file that is not is named."""

import json

import numpy as np
import pytest

from albor.data.shards import ShardWriter, TokenStream, token_dtype
from albor.errors import DataError

VOCAB = 1000


def write(directory, documents, vocab_size=VOCAB, shard_tokens=64, tokenizer="t" * 64):
    writer = ShardWriter(directory, vocab_size, tokenizer, shard_tokens)
    for document in documents:
        writer.add(np.asarray(document), text_bytes=3 * len(document))
    writer.close()
    return directory


def some_documents(count=20, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.integers(0, VOCAB, size=rng.integers(1, 40), dtype=np.int32) for _ in range(count)]


@pytest.fixture
def shards(tmp_path):
    return write(tmp_path / "shards", some_documents())


def edit_manifest(directory, **changes):
    path = directory / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_a_stream_reads_back_across_shard_borders(tmp_path):
    documents = some_documents()
    expected = np.concatenate(documents)
    stream = TokenStream.open(write(tmp_path / "shards", documents))
    assert len(list((tmp_path / "shards").glob("tokens-*.npy"))) == -(-len(expected) // 64) > 3
    assert len(stream) == len(expected)
    np.testing.assert_array_equal(stream.read(0, len(stream)), expected)
    for start in range(len(expected)):
        for count in (0, 1, 63, 64, 65, 130):
            if start + count <= len(expected):
                np.testing.assert_array_equal(stream.read(start, count), expected[start : start + count])
    for start, count in ((-1, 1), (0, len(expected) + 1), (len(expected), 1), (0, -1)):
        with pytest.raises(IndexError):
            stream.read(start, count)


def test_document_offsets_and_counts(tmp_path):
    documents = some_documents()
    stream = TokenStream.open(write(tmp_path / "shards", documents))
    assert stream.documents == len(documents)
    assert stream.text_bytes == 3 * sum(map(len, documents))
    for i, document in enumerate(documents):
        start, end = stream.document_offsets[i : i + 2]
        np.testing.assert_array_equal(stream.read(start, end - start), document)


def test_each_shard_is_an_ordinary_npy_file(shards):
    parts = [np.load(path) for path in sorted(shards.glob("tokens-*.npy"))]
    np.testing.assert_array_equal(np.concatenate(parts), np.concatenate(some_documents()))
    assert {part.dtype for part in parts} == {np.dtype(np.uint16)}


def test_an_empty_stream(tmp_path):
    stream = TokenStream.open(write(tmp_path / "empty", []))
    assert (len(stream), stream.documents, stream.text_bytes) == (0, 0, 0)
    assert stream.read(0, 0).shape == (0,)


def test_joined_streams(tmp_path):
    many, few, none = some_documents(seed=1), some_documents(3, seed=2), []
    streams = [TokenStream.open(write(tmp_path / str(i), docs)) for i, docs in enumerate((many, none, few))]
    joined = TokenStream.join(streams)
    np.testing.assert_array_equal(joined.read(0, len(joined)), np.concatenate(many + few))
    np.testing.assert_array_equal(np.diff(joined.document_offsets), [len(doc) for doc in many + few])
    assert joined.text_bytes == sum(stream.text_bytes for stream in streams)
    other = TokenStream.open(write(tmp_path / "other", few, tokenizer="u" * 64))
    with pytest.raises(DataError, match="different tokenizers"):
        TokenStream.join([joined, other])


def test_the_name_of_the_content_depends_on_nothing_else(tmp_path):
    first, second = (TokenStream.open(write(tmp_path / name, some_documents())) for name in "ab")
    assert first.sha256 == second.sha256
    assert TokenStream.open(write(tmp_path / "c", some_documents(seed=3))).sha256 != first.sha256


@pytest.mark.parametrize(("vocab_size", "dtype"), [(2, "uint16"), (65_536, "uint16"), (65_537, "uint32")])
def test_dtype_at_the_edge_of_uint16(tmp_path, vocab_size, dtype):
    assert token_dtype(vocab_size) == dtype
    top = np.array([0, vocab_size - 1])
    stream = TokenStream.open(write(tmp_path / "top", [top], vocab_size))
    np.testing.assert_array_equal(stream.read(0, 2), top)


@pytest.mark.parametrize("ids", [[VOCAB], [-1], [70_000], [1 << 40], [65_536 + 5]])
def test_ids_outside_the_vocabulary_are_not_written(tmp_path, ids):
    with pytest.raises(DataError, match="do not fit a vocabulary of 1000"):
        write(tmp_path / "bad", [ids])
    assert not (tmp_path / "bad" / "manifest.json").exists()


def test_ids_must_be_integers(tmp_path):
    with pytest.raises(DataError, match="vector of integers"):
        write(tmp_path / "bad", [[0.5]])


def test_without_a_manifest_there_is_nothing(shards):
    (shards / "manifest.json").unlink()
    with pytest.raises(DataError, match=r"manifest.json is missing"):
        TokenStream.open(shards)


@pytest.mark.parametrize("verify", ["hash", "size"])
@pytest.mark.parametrize("name", ["tokens-00001.npy", "documents.npy"])
@pytest.mark.parametrize("change", [lambda b: b[:-1], lambda b: b[:50], lambda b: b"", lambda b: b + b"x"])
def test_a_file_of_another_size_is_named(shards, name, change, verify):
    path = shards / name
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(DataError, match=name):
        TokenStream.open(shards, verify)


@pytest.mark.parametrize("name", ["tokens-00001.npy", "documents.npy"])
def test_a_missing_file_is_named(shards, name):
    (shards / name).unlink()
    with pytest.raises(DataError, match=f"{name} is missing"):
        TokenStream.open(shards)


@pytest.mark.parametrize("name", ["tokens-00000.npy", "documents.npy"])
def test_one_flipped_bit_is_found(shards, name):
    path = shards / name
    data = bytearray(path.read_bytes())
    data[-4] ^= 1
    path.write_bytes(data)
    with pytest.raises(DataError, match=rf"{name} is not the file that was written"):
        TokenStream.open(shards, "hash")


def test_reordered_shards_are_found(shards):
    first, second, spare = (shards / name for name in ("tokens-00000.npy", "tokens-00001.npy", "spare"))
    first.rename(spare)
    second.rename(first)
    spare.rename(second)
    with pytest.raises(DataError, match=r"tokens-00000.npy is not the file that was written"):
        TokenStream.open(shards)


def test_another_dtype_is_found(shards):
    path = shards / "tokens-00000.npy"
    np.save(path, np.load(path).astype(np.int16))
    with pytest.raises(DataError, match=r"tokens-00000.npy holds int16, expected uint16"):
        TokenStream.open(shards, "size")


def test_ids_beyond_the_vocabulary_are_found_at_open_and_at_read(shards):
    edit_manifest(shards, vocab_size=900)
    with pytest.raises(
        DataError, match=r"tokens-0000\d.npy holds token id 9\d\d, the vocabulary ends at 899"
    ):
        TokenStream.open(shards, "hash")
    stream = TokenStream.open(shards, "size")
    with pytest.raises(DataError, match="the vocabulary ends at 899"):
        stream.read(0, len(stream))


@pytest.mark.parametrize(
    "changes",
    [
        {"format": 99},
        {"tokens": 5},
        {"vocab_size": 70_000},
        {"vocab_size": "many"},
        {"dtype": "uint32"},
        {"shards": []},
        {"shards": [{}]},
        {"shards": None},
        {"documents": 3},
    ],
    ids=str,
)
def test_an_edited_manifest_is_refused(shards, changes):
    edit_manifest(shards, **changes)
    with pytest.raises(DataError):
        TokenStream.open(shards)


@pytest.mark.parametrize("content", ["", "{", "[]", "null"])
def test_a_manifest_that_is_none_is_refused(shards, content):
    (shards / "manifest.json").write_text(content)
    with pytest.raises(DataError, match=r"manifest.json"):
        TokenStream.open(shards)


def test_document_offsets_that_do_not_end_with_the_stream_are_refused(shards):
    path = shards / "documents.npy"
    np.save(path, np.load(path) + 1)
    with pytest.raises(DataError, match="does not agree"):
        TokenStream.open(shards, "size")


def test_a_pickled_array_is_refused(shards):
    np.save(shards / "tokens-00000.npy", np.array([{}], dtype=object), allow_pickle=True)
    with pytest.raises(DataError, match=r"tokens-00000.npy"):
        TokenStream.open(shards)
