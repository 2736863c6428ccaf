"""Shards: what is read is what was written, or the file that is not is named."""

import errno
import json
import os

import numpy as np
import pytest

from albor.data import shards as shards_module
from albor.data.cache import file_sha256
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


@pytest.mark.parametrize("vocab_size", [65_536, 65_537])
def test_the_first_id_that_does_not_fit_at_the_edge_of_uint16(tmp_path, vocab_size):
    with pytest.raises(DataError, match=f"do not fit a vocabulary of {vocab_size}"):
        write(tmp_path / "bad", [[vocab_size]], vocab_size)


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


def test_a_vector_that_ends_while_it_is_read_is_named(shards, monkeypatch):
    """Its size was right a moment ago. A mapped file would end the process by a signal instead."""
    header = shards_module._header_bytes
    found = shards / "documents.npy"
    content = found.read_bytes()

    def cut(path, *rest):
        start = header(path, *rest)
        if path == found:
            found.write_bytes(content[:-8])
        return start

    monkeypatch.setattr(shards_module, "_header_bytes", cut)
    with pytest.raises(DataError, match="it ends after"):
        TokenStream.open(shards)


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


def header_of(directory, text, version=b"\x01\x00", data=b""):
    """A first shard that begins with the header `text`, as long as it says it is."""
    length = len(text).to_bytes(2 if version == b"\x01\x00" else 4, "little")
    (directory / "tokens-00000.npy").write_bytes(b"\x93NUMPY" + version + length + text + data)


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"{",
        b"()",
        b"(" * 9000,
        b"-" * 9000 + b"1",
        b"[" * 9000 + b"]" * 9000,
        b"{'descr': '<u2', 'fortran_order': False, 'shape': (" + b"9" * 5000 + b",)}",
        b"{'descr': '<u2', 'fortran_order': False, 'shape': (-64,)}",
        b"{'descr': '<u2', 'fortran_order': False, 'shape': (64.0,)}",
        b"{'descr': '<u2', 'fortran_order': False, 'shape': 64}",
        b"{'descr': '|O', 'fortran_order': False, 'shape': (64,)}",
        b"{'descr': [('a', '<u2')], 'fortran_order': False, 'shape': (64,)}",
        b"{'descr': '<u2', 'fortran_order': False, 'shape': (64,), 1: 2}",
        b"{'descr': '<u2', 'fortran_order': False, 'shape': (__import__('os').getpid(),)}",
        b"\xff\xfe" * 40,
    ],
    ids=lambda text: text[:20].decode(errors="replace"),
)
def test_a_header_that_makes_no_sense_is_refused(shards, text):
    header_of(shards, text, data=bytes(128))
    with pytest.raises(DataError, match=r"tokens-00000.npy"):
        TokenStream.open(shards)


def test_a_header_that_claims_gigabytes_is_not_read(shards):
    """A version 2.0 header may say that it is 4 GiB long; a sparse file really is."""
    header_of(shards, b"{", version=b"\x02\x00")
    path = shards / "tokens-00000.npy"
    with open(path, "r+b") as file:
        file.seek(8)
        file.write(b"\xff\xff\xff\xff")
        file.truncate(2**32 + 100)
    with pytest.raises(DataError, match=r"tokens-00000.npy is damaged \(its version is not 1.0\)"):
        TokenStream.open(shards)


def test_what_is_no_npy_file_is_refused(shards):
    for name in ("tokens-00000.npy", "documents.npy"):
        path, content = shards / name, (shards / name).read_bytes()
        with open(path, "wb") as file:
            np.savez(file, np.arange(64, dtype=np.uint16))
        with pytest.raises(DataError, match=name):
            TokenStream.open(shards)
        for put in (
            path.mkdir,
            lambda path=path: os.mkfifo(path),
            lambda path=path: path.symlink_to("/dev/zero"),
        ):
            path.unlink() if not path.is_dir() else path.rmdir()
            put()
            with pytest.raises(DataError, match=name):  # and no waiting for who writes into a pipe
                TokenStream.open(shards)
        path.unlink()
        path.write_bytes(content)
    TokenStream.open(shards)


@pytest.mark.parametrize("dtype", [np.int16, ">u2", np.float16, np.uint32, np.uint8])
def test_any_other_dtype_is_found(shards, dtype):
    """Also those in which as many values take as many bytes."""
    path = shards / "tokens-00000.npy"
    np.save(path, np.load(path).astype(dtype))
    with pytest.raises(DataError, match=r"tokens-00000.npy holds .*, expected uint16"):
        TokenStream.open(shards, "size")


def test_starts_of_documents_that_go_back_are_refused(shards):
    path = shards / "documents.npy"
    starts = np.load(path)
    for wrong in (np.concatenate([[1], starts[1:]]), np.concatenate([starts[2::-1], starts[3:]])):
        np.save(path, wrong)
        with pytest.raises(DataError, match=r"documents.npy does not hold the starts of documents"):
            TokenStream.open(shards, "size")


@pytest.mark.parametrize(
    "content",
    [
        b"[" * 100_000,
        b'{"a":' * 100_000,
        b'{"format": 1e999}',
        b'{"format": NaN}',
        b'{"format": 1, "format": 1}',
        b"\xff\xfe{",
        b'{"format": 1}',
        b'{"format": 1, "vocab_size": 1000, "documents": 1e3, "text_bytes": 1, "tokens": 1, "shards": []}',
    ],
    ids=lambda content: content[:16].decode(errors="replace"),
)
def test_a_hostile_manifest_is_refused(shards, content):
    (shards / "manifest.json").write_bytes(content)
    with pytest.raises(DataError, match=r"manifest.json"):
        TokenStream.open(shards)


def test_a_manifest_names_the_files_of_its_directory_in_their_order(shards, tmp_path):
    """No path out of it, and no shard twice or in another's place, however well the hashes fit."""
    entries = json.loads((shards / "manifest.json").read_text())["shards"]
    outside = tmp_path / "outside.npy"
    outside.write_bytes((shards / "tokens-00000.npy").read_bytes())
    for wrong in (
        [{**entries[0], "file": "../outside.npy"}, *entries[1:]],
        [{**entries[0], "file": str(outside)}, *entries[1:]],
        [entries[1], entries[0], *entries[2:]],
        [entries[0], entries[0], *entries[2:]],
        [{**entries[0], "tokens": True}, *entries[1:]],
        [{**entries[0], "tokens": -1}, *entries[1:]],
        {"0": entries[0]},
    ):
        edit_manifest(shards, shards=wrong)
        with pytest.raises(DataError, match=r"manifest.json is not what was written"):
            TokenStream.open(shards)


def swap_first_two(directory):
    first, second = directory / "tokens-00000.npy", directory / "tokens-00001.npy"
    one, other = first.read_bytes(), second.read_bytes()
    first.write_bytes(other)
    second.write_bytes(one)


def flip_a_bit(directory):
    path = directory / "tokens-00001.npy"
    data = bytearray(path.read_bytes())
    data[-2] ^= 1
    path.write_bytes(data)


def put_in_an_id(directory):
    """Beyond the vocabulary, by somebody who writes the hash that fits."""
    path = directory / "tokens-00000.npy"
    tokens = np.load(path)
    tokens[3] = VOCAB
    np.save(path, tokens)
    manifest = json.loads((directory / "manifest.json").read_text())
    manifest["shards"][0]["sha256"] = file_sha256(path)
    edit_manifest(directory, shards=manifest["shards"])


@pytest.mark.parametrize(
    ("damage", "guard"),
    [(swap_first_two, "_verify_hash"), (flip_a_bit, "_verify_hash"), (put_in_an_id, "_verify_ids")],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_without_its_guard_damage_would_be_read(shards, damage, guard, monkeypatch):
    """Rows 15 and 16 of the fault matrix: refused; and, with the guard dropped, tokens for the model."""
    expected = np.concatenate(some_documents())
    damage(shards)
    with pytest.raises(DataError, match=r"tokens-0000[01].npy"):
        TokenStream.open(shards)
    monkeypatch.setattr(shards_module, guard, lambda *_: None)
    stream = TokenStream.open(shards)
    assert (stream.read(0, len(stream)) != expected).any()


def test_without_its_guard_a_wide_id_would_wrap_around(tmp_path, monkeypatch):
    """Row 16: 65,541 in 16 bits is 5. The check before the narrowing is the one that sees it."""
    ids = np.array([65_541, 1], dtype=np.int64)
    with pytest.raises(DataError, match="do not fit a vocabulary of 1000"):
        write(tmp_path / "guarded", [ids])
    monkeypatch.setattr(ShardWriter, "add", unchecked(ShardWriter.add))
    stream = TokenStream.open(write(tmp_path / "unguarded", [ids]))
    assert stream.read(0, 2).tolist() == [5, 1]


def unchecked(add):
    """`add` as it would be without the check of ids: they are narrowed first."""

    def narrow_first(self, ids, text_bytes):
        add(self, ids.astype(np.uint16), text_bytes)

    return narrow_first


def test_a_pickled_array_is_refused(shards):
    np.save(shards / "tokens-00000.npy", np.array([{}], dtype=object), allow_pickle=True)
    with pytest.raises(DataError, match=r"tokens-00000.npy"):
        TokenStream.open(shards)


@pytest.mark.parametrize(("failures", "pauses"), [(1, [0.1]), (3, [0.1, 0.4, 1.0]), (4, [0.1, 0.4, 1.0])])
def test_a_read_that_fails_for_a_moment_is_tried_again(shards, failures, pauses, monkeypatch):
    """With a warning; a disk that keeps failing is an error that names the file, within two seconds."""
    stream = TokenStream.open(shards)
    expected, slept, failed, read = stream.read(0, 100), [], [], os.pread

    def failing(*arguments):
        if len(failed) < failures:
            failed.append(arguments)
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return read(*arguments)

    monkeypatch.setattr(os, "pread", failing)
    monkeypatch.setattr(shards_module.time, "sleep", slept.append)
    if failures <= len(pauses):
        with pytest.warns(UserWarning, match=r"tokens-00000\.npy could not be read at first \(Input/output"):
            np.testing.assert_array_equal(stream.read(0, 100), expected)
    else:
        with pytest.raises(DataError, match=r"tokens-00000\.npy cannot be read: Input/output error"):
            stream.read(0, 100)
    assert slept == pauses
    assert sum(slept) < 2


def test_without_trying_again_a_moment_ends_the_run(shards, monkeypatch):
    """The guard dropped: one read that fails is an error."""
    stream, read, failed = TokenStream.open(shards), os.pread, []

    def failing(*arguments):
        if not failed:
            failed.append(arguments)
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return read(*arguments)

    monkeypatch.setattr(os, "pread", failing)
    monkeypatch.setattr(shards_module, "_READ_PAUSES", ())
    with pytest.raises(DataError, match=r"tokens-00000\.npy cannot be read: Input/output error"):
        stream.read(0, 100)
    assert len(stream.read(0, 100)) == 100


def test_a_file_that_cannot_be_hashed_is_named(shards, monkeypatch):
    def failing(path):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(shards_module, "file_sha256", failing)
    with pytest.raises(DataError, match=r"documents\.npy cannot be read: Input/output error"):
        TokenStream.open(shards)
