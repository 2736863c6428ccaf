"""Preparation: the whole way from files to streams, the cache, and what a crash or a race may leave."""

import itertools
import json
import os
import shutil
import time
from pathlib import Path

import numpy as np
import pytest

from albor.config import RunConfig
from albor.data import cache as cache_module
from albor.data import prepare as prepare_module
from albor.data import sources
from albor.data.prepare import check_horizon, is_held_out, prepare, prepare_tokenizer
from albor.data.shards import ShardWriter
from albor.data.tokenizer import Tokenizer
from albor.errors import ConfigError, DataError

TEXTS = [
    f"def function_{i}(self, value):\n    if value > {i}:\n        return self.values[{i * 7}] + value\n" * 3
    for i in range(60)
]


@pytest.fixture
def corpus(tmp_path):
    folder = tmp_path / "corpus"
    folder.mkdir()
    for i, text in enumerate(TEXTS):
        (folder / f"{i:03d}.py").write_text(text)
    return folder


@pytest.fixture
def make_config(tmp_path, corpus):
    def make(*paths, vocab_size=320, weights=None, train=None, tokenizer=None, **data):
        paths = paths or (corpus,)
        weights = weights or [1.0] * len(paths)
        entries = [
            {"kind": "files", "path": str(path), "weight": weight}
            for path, weight in zip(paths, weights, strict=True)
        ]
        model = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
        defaults = {"sequence_length": 16, "validation_fraction": 0.2, "cache_dir": str(tmp_path / "cache")}
        return RunConfig.model_validate(
            {
                "name": "test",
                "model": {**model, "vocab_size": vocab_size},
                "tokenizer": tokenizer or {},
                "data": {**defaults, "sources": entries, **data},
                "train": train or {"max_steps": 2, "micro_batch_size": 2},
            }
        )

    return make


@pytest.fixture
def work(monkeypatch):
    """What was done rather than found: names of tokenizers trained and of texts tokenised."""
    done = []
    train, encode_batch = Tokenizer.train.__func__, Tokenizer.encode_batch

    def watched_train(cls, *args):
        done.append("train")
        return train(cls, *args)

    def watched_encode(self, texts):
        done.extend(f"encode {text[:15]}" for text in texts if text in TEXTS or text.startswith("new"))
        return encode_batch(self, texts)

    monkeypatch.setattr(Tokenizer, "train", classmethod(watched_train))
    monkeypatch.setattr(Tokenizer, "encode_batch", watched_encode)
    return done


def documents_of(stream, tokenizer):
    ids = stream.read(0, len(stream))
    ends = stream.document_offsets
    assert (ids[ends[1:] - 1] == tokenizer.end_of_document_id).all()
    assert (ids == tokenizer.end_of_document_id).sum() == stream.documents
    return [tokenizer.decode(ids[start:end]) for start, end in itertools.pairwise(ends)]


def test_every_document_is_in_exactly_one_stream_and_exact(make_config):
    prepared = prepare(make_config())
    train = documents_of(prepared.train[0], prepared.tokenizer)
    validation = documents_of(prepared.validation, prepared.tokenizer)
    assert sorted(train + validation) == sorted(TEXTS)
    assert validation == [text for text in TEXTS if is_held_out(text, 0.2)]
    assert 3 < len(validation) < 25
    assert prepared.validation_text_bytes == sum(len(text.encode()) for text in validation)
    counted = prepared.tokenizer.token_bytes[prepared.validation.read(0, len(prepared.validation))].sum()
    assert counted == prepared.validation_text_bytes
    assert prepared.reports[0].documents == 60
    assert prepared.tokenizer.vocab_size == 320
    assert Tokenizer.load(prepared.tokenizer_path).sha256 == prepared.tokenizer.sha256


def test_held_out_share_and_copies():
    held_out = [is_held_out(f"document {i}", 0.1) for i in range(5000)]
    assert 0.085 < np.mean(held_out) < 0.115
    assert held_out == [is_held_out(f"document {i}", 0.1) for i in range(5000)]
    # A larger share keeps what a smaller one held out.
    assert all(is_held_out(f"document {i}", 0.3) for i in range(5000) if held_out[i])


def test_copies_are_on_one_side_over_all_sources(make_config, corpus, tmp_path):
    shutil.copytree(corpus, tmp_path / "copy")
    (tmp_path / "copy" / "more.py").write_text("one file that makes the folders differ\n" * 30)
    prepared = prepare(make_config(corpus, tmp_path / "copy"))
    train = {text for stream in prepared.train for text in documents_of(stream, prepared.tokenizer)}
    assert train.isdisjoint(documents_of(prepared.validation, prepared.tokenizer))
    assert prepared.validation.documents >= 2 * sum(is_held_out(text, 0.2) for text in TEXTS)


def test_the_tokenizer_has_not_seen_what_is_held_out(make_config, monkeypatch):
    seen = []

    def sample_text(documents, sample_bytes):
        seen.extend(document.text for document in documents)
        return seen

    monkeypatch.setattr(prepare_module, "sample_text", sample_text)
    prepare_tokenizer(make_config())
    assert seen == [text for text in TEXTS if not is_held_out(text, 0.2)]


def test_a_second_run_does_nothing_again(make_config, corpus, tmp_path, work, monkeypatch):
    first = prepare(make_config())
    assert work[0] == "train"
    assert len(work) == 1 + len(TEXTS)
    work.clear()
    monkeypatch.setattr(cache_module, "file_sha256", lambda path: pytest.fail(f"{path} was read again"))
    again = prepare(make_config(weights=[0.25], max_epochs=9.0, sequence_length=8))
    assert not work
    assert (again.sha256, again.reports, again.paths) == (first.sha256, first.reports, first.paths)


def test_times_and_folders_do_not_matter_but_content_does(make_config, corpus, tmp_path, work):
    first = prepare(make_config())
    work.clear()
    for path in corpus.iterdir():
        os.utime(path, (1, 1))
    corpus.rename(tmp_path / "moved")
    assert prepare(make_config(tmp_path / "moved")).sha256 == first.sha256
    assert not work
    (tmp_path / "moved" / "new.py").write_text("new = 1\n" * 50)
    assert prepare(make_config(tmp_path / "moved")).sha256 != first.sha256
    assert "train" in work
    assert "encode new = 1\nnew = 1"[:22] in work


def test_a_file_that_changes_within_its_size_and_time_is_noticed(make_config, corpus):
    first = prepare(make_config())
    path = corpus / "000.py"
    status = path.stat()
    path.write_text(path.read_text().replace("def", "DEF"))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert prepare(make_config()).sha256 != first.sha256


def test_a_new_source_leaves_the_others_as_they_are(make_config, corpus, tmp_path, work):
    tokenizer = {"path": str(prepare(make_config()).tokenizer_path)}
    prepare(make_config(tokenizer=tokenizer))
    work.clear()
    other = tmp_path / "other"
    other.mkdir()
    for i in range(20):
        (other / f"{i}.txt").write_text(f"new text {i}\n" * 20)
    prepared = prepare(make_config(corpus, other, tokenizer=tokenizer))
    assert len(work) == 20
    assert [report.documents for report in prepared.reports] == [60, 20]


@pytest.mark.parametrize("change", [{"vocab_size": 300}, {"validation_fraction": 0.3}, {"sample": 4000}])
def test_what_the_tokens_depend_on_makes_new_ones(make_config, change, work):
    first = prepare(make_config())
    work.clear()
    tokenizer = {"sample_bytes": change["sample"]} if "sample" in change else None
    options = {key: value for key, value in change.items() if key != "sample"}
    assert prepare(make_config(tokenizer=tokenizer, **options)).sha256 != first.sha256
    assert "train" in work


def test_another_held_out_share_with_the_same_tokenizer(make_config):
    tokenizer = {"path": str(prepare(make_config()).tokenizer_path)}
    for fraction in (0.1, 0.4):
        validation = prepare(make_config(tokenizer=tokenizer, validation_fraction=fraction)).validation
        assert validation.documents == sum(is_held_out(text, fraction) for text in TEXTS)


def test_a_damaged_memory_of_hashes_is_only_slow(make_config, tmp_path):
    first = prepare(make_config())
    for content in ("{", "[]"):
        (tmp_path / "cache" / "file-hashes.json").write_text(content)
        assert prepare(make_config()).sha256 == first.sha256


def test_damage_in_the_cache_is_named(make_config):
    prepared = prepare(make_config())
    for path in (prepared.paths[0] / "train" / "tokens-00000.npy", prepared.tokenizer_path):
        good = path.read_bytes()
        path.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
        with pytest.raises(DataError, match=path.name):
            prepare(make_config())
        path.write_bytes(good)
    other = Tokenizer.train(TEXTS[1:], 320)
    prepared.tokenizer_path.write_bytes(other.model)
    with pytest.raises(DataError, match=r"SHA-256 of tokenizer.model differs"):
        prepare(make_config())
    prepared.tokenizer_path.write_bytes(prepared.tokenizer.model)
    manifest_path = prepared.paths[0] / "validation" / "manifest.json"
    manifest = manifest_path.read_text()
    manifest_path.write_text(manifest.replace(prepared.tokenizer.sha256, other.sha256))
    with pytest.raises(DataError, match=r"validation was made with another tokenizer"):
        prepare(make_config())
    manifest_path.write_text(manifest)
    (prepared.paths[0] / "report.json").write_text("{")
    with pytest.raises(DataError, match=r"report.json is damaged"):
        prepare(make_config())


def test_documents_that_would_be_altered_are_left_out_and_named(make_config, monkeypatch):
    encode_batch = Tokenizer.encode_batch

    def forgetful(self, texts):
        return [ids[:-1] if texts[i] == TEXTS[7] else ids for i, ids in enumerate(encode_batch(self, texts))]

    monkeypatch.setattr(Tokenizer, "encode_batch", forgetful)
    prepared = prepare(make_config())
    [report] = prepared.reports
    assert report.skipped[sources.NOT_LOSSLESS].names == ["007.py"]
    assert report.documents == 59
    assert report.text_bytes == sum(len(text) for i, text in enumerate(TEXTS) if i != 7)
    assert prepared.train[0].documents + prepared.validation.documents == 59


def test_a_source_that_changes_while_it_is_read_is_an_error(make_config, corpus, tmp_path, monkeypatch):
    close = ShardWriter.add

    def add(self, ids, text_bytes):
        (corpus / "late.py").write_text("late")
        close(self, ids, text_bytes)

    monkeypatch.setattr(ShardWriter, "add", add)
    with pytest.raises(DataError, match="changed while it was read"):
        prepare(make_config())
    assert not list((tmp_path / "cache").glob("tokens-*"))


def test_a_vocabulary_that_does_not_match_the_tokenizer(make_config):
    path = prepare(make_config()).tokenizer_path
    with pytest.raises(ConfigError) as caught:
        prepare(make_config(vocab_size=512, tokenizer={"path": str(path)}))
    [problem] = caught.value.problems
    assert problem.key == "model.vocab_size"
    assert "has 320 tokens" in problem.message
    assert "set it to 320" in problem.remedy


def test_too_little_text_says_what_to_change(make_config, corpus, tmp_path):
    with pytest.raises(
        DataError, match=r"training tokens, fewer than the 100,001 .*data.sequence_length to \d+"
    ):
        prepare(make_config(sequence_length=100_000))
    with pytest.raises(DataError, match=r"validation_fraction 1e-09 holds out 0 of 60 documents.*raise it"):
        prepare(make_config(validation_fraction=1e-9))
    empty = tmp_path / "unusable"
    empty.mkdir()
    (empty / "a.bin").write_bytes(b"\0")
    with pytest.raises(DataError, match=r"gives no usable document \(1 binary .*: a.bin\)"):
        prepare(make_config(corpus, empty))


def test_one_file_that_is_one_document_is_refused_before_any_work(make_config, corpus, tmp_path, work):
    """It could only be trained on or held out."""
    config = make_config(corpus / "000.py")
    with pytest.raises(ConfigError, match=r"data\.sources\[0\]\.separator: is null, .*a single document"):
        prepare(config)
    assert not work
    assert not (tmp_path / "cache").exists()
    with pytest.raises(DataError):  # two files may do, and are tried
        prepare(make_config(corpus / "000.py", corpus / "001.py"))
    assert work


def test_a_source_of_the_wrong_kind_says_what_was_found_in_it(make_config, corpus, tmp_path):
    (tmp_path / "one.txt").write_text("a line\n" * 5)
    wrong = {"sources": [{"kind": "jsonl", "path": str(tmp_path / "one.txt")}]}
    with pytest.raises(
        DataError, match=r"no text to train a tokenizer on \(5 not a JSON object: one.txt:1, "
    ):
        prepare_tokenizer(make_config(**wrong))
    (tmp_path / "one.txt").write_text("\n")
    with pytest.raises(DataError, match=r"no text .* \(they are empty\)"):
        prepare_tokenizer(make_config(**wrong))
    held_out = next(path for path in corpus.iterdir() if is_held_out(path.read_text(), 0.2))
    with pytest.raises(DataError, match=r"no text .* \(1 documents, all held out\)"):
        prepare_tokenizer(make_config(held_out))


def test_a_path_that_is_not_there_is_a_mistake_of_the_configuration(make_config, tmp_path):
    with pytest.raises(ConfigError, match=r"data.sources: files path .* matches no file"):
        prepare(make_config(tmp_path / "absent"))
    (tmp_path / "bad.model").write_bytes(b"no model")
    for name, reason in (
        ("absent.model", "cannot be read"),
        ("bad.model", "is not a SentencePiece model file"),
    ):
        with pytest.raises(ConfigError, match=rf"tokenizer\.path: .*{name} {reason}"):
            prepare(make_config(tokenizer={"path": str(tmp_path / name)}))


def test_of_the_hub_the_tokenizer_reads_only_the_beginning(make_config, monkeypatch):
    """And the same beginning for every weight, so that a new mix is no reason to stream it all again."""
    read = 0

    def hub_rows(source):
        nonlocal read
        for number, text in enumerate(TEXTS * 100):
            read += len(text)
            yield f"{source.path}:{number}", text

    monkeypatch.setattr(sources, "hub_rows", hub_rows)

    def tokenizer_of(weight, **options):
        source = {"kind": "hf", "path": "nobody/nothing", "weight": weight, **options}
        return prepare_tokenizer(make_config(sources=[source], tokenizer={"sample_bytes": 8000}))[1]

    first = tokenizer_of(1.0)
    assert 8000 <= read < 9000
    assert tokenizer_of(2.0) == first
    assert read < 9000
    tokenizer_of(1.0, max_bytes=6000)
    assert read < 16_000


def test_a_horizon_beyond_the_data(make_config, corpus, tmp_path):
    shutil.copytree(corpus, tmp_path / "copy")
    (tmp_path / "copy" / "more.py").write_text("x = 1\n" * 2000)

    def config(epochs=2.0, **train):
        return make_config(
            corpus,
            tmp_path / "copy",
            weights=[3.0, 1.0],
            max_epochs=epochs,
            train={"micro_batch_size": 2, **train},
        )

    prepared = prepare(config(max_steps=10))
    assert check_horizon(config(max_steps=10), prepared) == []
    steps = 100_000
    problems = check_horizon(config(max_steps=steps), prepared)
    assert [problem.key for problem in problems] == ["train.max_steps"] * 2
    windows = [(len(stream) - 1) // 16 for stream in prepared.train]
    assert f"read {steps * 32 * 3 // 4:,} tokens" in problems[0].message
    assert f"its {windows[0] * 16:,};" in problems[0].message
    most = min(int(windows[0] * 16 * 2 / 0.75 / 32), int(windows[1] * 16 * 2 / 0.25 / 32))
    assert f"lower train.max_steps to {most}," in problems[0].remedy
    assert check_horizon(config(max_steps=most), prepared) == []
    assert len(check_horizon(config(max_steps=most + 1), prepared)) == 1
    epochs = float(problems[0].remedy.split("data.max_epochs to ")[1].split(",")[0])
    assert check_horizon(config(epochs, max_steps=steps), prepared) == []
    assert check_horizon(config(epochs - 0.02, max_steps=steps), prepared)
    [problem, _] = check_horizon(config(max_tokens=steps * 32), prepared)
    assert problem.key == "train.max_tokens"
    assert f"lower train.max_tokens to {most * 32}," in problem.remedy


def test_progress_is_told(make_config):
    told = []
    prepare(make_config(), lambda *event: told.append(event))
    total = sum(map(len, TEXTS))
    assert ("reading", total, total) in told
    assert any(stage == "training the tokenizer" for stage, _, _ in told)
    assert any(stage.startswith("tokenising files") and done == total for stage, done, _ in told)
    told.clear()
    prepare(make_config(), lambda *event: told.append(event))
    assert not told


def run_until(call: int, config: RunConfig) -> int:
    """The exit status of a process that prepares, and dies at its `call`-th write as by kill -9."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    calls = 0

    def dying(function):
        def wrapped(*args, **kwargs):
            nonlocal calls
            if calls == call:
                os._exit(9)
            calls += 1
            return function(*args, **kwargs)

        return wrapped

    os.fsync = dying(os.fsync)
    for owner, name in ((Path, "rename"), (Path, "replace"), (Path, "write_text"), (Path, "write_bytes")):
        setattr(owner, name, dying(getattr(owner, name)))
    ShardWriter._finish_shard = dying(ShardWriter._finish_shard)
    try:
        prepare(config)
    except BaseException:
        os._exit(1)
    os._exit(0)


def test_a_kill_at_any_moment_leaves_nothing_that_is_taken_for_complete(make_config, tmp_path):
    reference = prepare(make_config(cache_dir=str(tmp_path / "reference"))).sha256
    statuses = []
    while not statuses or statuses[-1] == 9:
        config = make_config(cache_dir=str(tmp_path / f"cache-{len(statuses)}"))
        statuses.append(run_until(len(statuses), config))
        assert prepare(config).sha256 == reference
    assert statuses[-1] == 0
    assert len(statuses) > 15


def test_two_processes_at_once(make_config, tmp_path):
    config = make_config()
    children = []
    for _ in range(3):
        child = os.fork()
        if not child:
            try:
                prepared = prepare(config)
                (tmp_path / f"result-{os.getpid()}").write_text(prepared.sha256)
            finally:
                os._exit(0)
        children.append(child)
    for child in children:
        os.waitpid(child, 0)
    results = [path.read_text() for path in tmp_path.glob("result-*")]
    assert results == [prepare(config).sha256] * 3


def test_a_cache_that_cannot_be_written_is_an_error_with_a_remedy(make_config, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match=r"data.cache_dir .*set it to a directory that you can write to"):
        prepare(make_config(cache_dir=str(tmp_path / "file" / "cache")))


@pytest.mark.slow
def test_the_python_library(tmp_path):
    config = RunConfig.model_validate(
        {
            "name": "stdlib",
            "model": {
                "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2,
                "vocab_size": 4096,
            },
            "data": {"sequence_length": 256, "validation_fraction": 0.02, "cache_dir": str(tmp_path)},
            "train": {"max_steps": 1300, "micro_batch_size": 8},
        }
    )  # fmt: skip
    prepared = prepare(config)
    [report] = prepared.reports
    tokens = len(prepared.train[0]) + len(prepared.validation)
    assert report.documents > 500
    assert report.text_bytes > 8_000_000
    assert 2.8 < report.text_bytes / tokens < 4.5
    assert set(report.skipped) <= {sources.EMPTY}
    assert check_horizon(config, prepared) == []
    start = time.perf_counter()
    assert prepare(config).sha256 == prepared.sha256
    assert time.perf_counter() - start < 1.0
    manifest = json.loads((prepared.paths[0] / "train" / "manifest.json").read_text())
    assert manifest["tokenizer_sha256"] == prepared.tokenizer.sha256
