"""Sources: every document is used or counted under its reason, in an order of its own."""

import gzip
import io
import json
import logging
import os
import subprocess
import sys
import tracemalloc
from itertools import pairwise
from pathlib import Path
from random import Random
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from albor.config import FilesSource, HubSource, JsonlSource, ParquetSource, PythonStdlibSource
from albor.data import sources
from albor.data.sources import SourceReport, list_files, read_documents
from albor.errors import ConfigError, DataError


def read(source):
    report = SourceReport()
    return [(document.name, document.text) for document in read_documents(source, report)], report


def counts(report):
    return {reason: entry.count for reason, entry in report.skipped.items()}


def files_source(path, **options):
    return FilesSource(kind="files", path=str(path), **options)


def test_python_library_is_read_without_tests_and_packages():
    documents, report = read(PythonStdlibSource(kind="python-stdlib", max_bytes=2_000_000))
    files = list_files(PythonStdlibSource(kind="python-stdlib"))
    names = [file.name for file in files]
    assert len(names) > 500
    assert {"argparse.py", "json/decoder.py", "asyncio/events.py"} <= set(names)
    folders = {part for name in names for part in name.split("/")[:-1]}
    assert folders.isdisjoint({"test", "tests", "idle_test", "site-packages", "__pycache__"})
    assert all(name.endswith(".py") for name in names)
    assert report.documents == len(documents) > 50
    assert report.text_bytes == sum(len(text.encode()) for _, text in documents) == 2_000_000


def test_files_are_read_recursively_in_sorted_order_without_hidden_ones(tmp_path):
    for name in ("b/two.txt", "a.txt", "b/one.txt", ".hidden", ".git/config", "c/.secret", "A.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    documents, report = read(files_source(tmp_path))
    assert [name for name, _ in documents] == ["A.txt", "a.txt", "b/one.txt", "b/two.txt"]
    assert all(name == text for name, text in documents)
    assert report.documents == 4
    assert not report.skipped


def test_a_single_file_and_a_glob(tmp_path):
    for name in ("one.txt", "deep/er/two.txt", "three.md"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    assert read(files_source(tmp_path / "three.md"))[0] == [("three.md", "three.md")]
    matched, _ = read(files_source(tmp_path / "**" / "*.txt"))
    assert [name for name, _ in matched] == ["deep/er/two.txt", "one.txt"]
    (tmp_path / "odd[1].txt").write_text("a name that looks like a pattern")
    assert len(read(files_source(tmp_path / "odd[1].txt"))[0]) == 1


def test_a_separator_cuts_a_file_into_documents(tmp_path):
    path = tmp_path / "input.txt"
    path.write_text("one\ntwo\n\nthree\n\n\n\nfour\n")
    documents, report = read(files_source(path, separator="\n\n"))
    assert documents == [
        ("input.txt part 1", "one\ntwo"),
        ("input.txt part 2", "three"),
        ("input.txt part 3", "four\n"),
    ]
    assert (report.documents, counts(report)) == (3, {})
    assert len(read(files_source(path))[0]) == 1


@settings(max_examples=300, deadline=None)
@given(
    st.text(alphabet="-\r\né😀", max_size=30),
    st.text(alphabet="-\n😀", min_size=1, max_size=4),
    st.lists(st.integers(0, 30), max_size=6),
)
def test_a_stream_is_split_as_the_whole_text_would_be(text, separator, places):
    borders = sorted({0, len(text), *(min(place, len(text)) for place in places)})
    blocks = [text[a:b] for a, b in pairwise(borders)]
    assert list(sources._split(blocks, separator)) == text.split(separator)


def test_a_large_file_with_a_separator_is_read_exactly_and_not_held_in_memory(tmp_path):
    path = tmp_path / "large.txt"
    texts = [f"{number} zwölf 😀\r\n" * (number % 7 + 1) * 40 for number in range(8_000)]
    path.write_bytes("<|end|>".join(texts).encode())
    size = path.stat().st_size
    tracemalloc.start()
    found = (
        document.text for document in read_documents(files_source(path, separator="<|end|>"), SourceReport())
    )
    equal = [text == expected for text, expected in zip(found, texts, strict=True)]
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert all(equal)
    assert peak < size / 4


@pytest.mark.parametrize(("bad", "reason"), [(b"\xff", sources.NOT_UTF8), (b"\0", sources.BINARY)])
def test_what_stands_before_the_end_of_the_text_in_a_file_stays(tmp_path, monkeypatch, bad, reason):
    monkeypatch.setattr(sources, "_BLOCK_BYTES", 3)
    (tmp_path / "a.txt").write_bytes("ö😀\n\ntwo\n\nthree".encode() + bad + b"\n\nfour")
    (tmp_path / "b.txt").write_bytes("cut😀".encode()[:-1])  # in the middle of a character
    documents, report = read(files_source(tmp_path, separator="\n\n"))
    assert documents == [("a.txt part 1", "ö😀"), ("a.txt part 2", "two")]
    assert report.skipped.pop(reason).names[0] == "a.txt"
    assert sum(entry.count for entry in report.skipped.values()) == (reason == sources.BINARY)
    assert read(files_source(tmp_path / "a.txt"))[0] == []


def test_text_is_read_exactly(tmp_path):
    text = "\ufeff  tabs\t\r\nold mac\rlines\u2028 \u2581 \x85 end"
    (tmp_path / "exact.txt").write_bytes(text.encode())
    assert read(files_source(tmp_path))[0] == [("exact.txt", text)]


def test_unusable_files_are_counted_and_named(tmp_path):
    (tmp_path / "good.txt").write_text("good")
    (tmp_path / "empty.txt").touch()
    (tmp_path / "latin.txt").write_bytes("café".encode("latin-1"))
    (tmp_path / "image.png").write_bytes(b"\x89PNG\0\0")
    (tmp_path / "broken-link").symlink_to("nowhere")
    os.mkfifo(tmp_path / "pipe")
    documents, report = read(files_source(tmp_path))
    assert documents == [("good.txt", "good")]
    assert counts(report) == {sources.EMPTY: 1, sources.NOT_UTF8: 1, sources.BINARY: 1, sources.UNREADABLE: 2}
    assert report.skipped[sources.NOT_UTF8].names == ["latin.txt"]
    assert report.skipped[sources.UNREADABLE].names == ["broken-link", "pipe"]
    assert "1 not UTF-8: latin.txt" in report.lines()


def test_what_may_not_be_read_is_named(tmp_path, monkeypatch):
    """By a stand-in for the system's refusal, because tests may run as root, whom nothing is refused."""
    for name in ("open/a.txt", "closed/b.txt", "open/c.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    scandir, open_path = os.scandir, Path.open

    def refuse_folder(path):
        if str(path).endswith("closed"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    def refuse_file(path, mode):
        if path.name == "c.txt":
            raise PermissionError(13, "Permission denied", str(path))
        return open_path(path, mode)

    monkeypatch.setattr(os, "scandir", refuse_folder)
    monkeypatch.setattr(Path, "open", refuse_file)
    documents, report = read(files_source(tmp_path))
    assert documents == [("open/a.txt", "open/a.txt")]
    assert report.skipped[sources.UNREADABLE].names == ["closed", "open/c.txt"]


def test_counts_are_exact_where_names_are_cut(tmp_path):
    for number in range(50):
        (tmp_path / f"{number:02d}.txt").touch()
    _, report = read(files_source(tmp_path))
    assert report.skipped[sources.EMPTY].count == 50
    assert report.skipped[sources.EMPTY].names == [f"{number:02d}.txt" for number in range(20)]
    assert SourceReport.from_json(json.loads(json.dumps(report.to_json()))) == report


def test_json_lines_and_what_is_wrong_with_them(tmp_path):
    lines = [
        b'{"text": "one", "other": 1}',
        b"",
        b"not json",
        b'["a list"]',
        b'{"content": "no text"}',
        b'{"text": 5}',
        b'{"text": null}',
        b'{"text": ""}',
        b'{"text": "\\ud800"}',
        b'{"text": "\xff"}',
        b"[" * 100_000,
        b'{"text": "zw\\u00f6lf \\u0000"}',
    ]
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(lines))
    with gzip.open(tmp_path / "b.jsonl.gz", "wb") as file:
        file.write(b'{"text": "packed"}\n')
    (tmp_path / "notes.txt").write_text("not a JSON file, and not looked at")
    documents, report = read(JsonlSource(kind="jsonl", path=str(tmp_path)))
    assert documents == [("a.jsonl:1", "one"), ("a.jsonl:12", "zwölf \0"), ("b.jsonl.gz:1", "packed")]
    assert {reason: entry.names for reason, entry in report.skipped.items()} == {
        sources.BAD_JSON: ["a.jsonl:3", "a.jsonl:4", "a.jsonl:11"],
        sources.NO_TEXT_KEY: ["a.jsonl:5"],
        sources.NOT_A_STRING: ["a.jsonl:6", "a.jsonl:7"],
        sources.EMPTY: ["a.jsonl:8"],
        sources.LONE_SURROGATE: ["a.jsonl:9"],
        sources.NOT_UTF8: ["a.jsonl:10"],
    }
    other_key, _ = read(JsonlSource(kind="jsonl", path=str(tmp_path / "a.jsonl"), text_key="content"))
    assert other_key == [("a.jsonl:5", "no text")]


def test_a_damaged_gz_gives_what_can_be_read_and_is_named(tmp_path):
    random = Random(0)
    rows = b"".join(json.dumps({"text": random.randbytes(50).hex()}).encode() + b"\n" for _ in range(2000))
    packed = gzip.compress(rows)
    for damaged, some in (
        (packed[:-5000], True),  # ends too early
        (packed[:-8] + bytes(8), True),  # the checksum does not match
        (packed[:12] + b"\xff" * 64 + packed[76:], False),  # not even a compressed stream
    ):
        (tmp_path / "damaged.jsonl.gz").write_bytes(damaged)
        documents, report = read(JsonlSource(kind="jsonl", path=str(tmp_path)))
        assert bool(documents) == some
        assert report.skipped[sources.UNREADABLE].names == ["damaged.jsonl.gz"]


def test_parquet(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    rows = ["one", None, "", "four"]
    parquet.write_table(pyarrow.table({"text": rows, "n": [1, 2, 3, 4]}), tmp_path / "a.parquet")
    (tmp_path / "b.parquet").write_bytes(b"no parquet")
    documents, report = read(ParquetSource(kind="parquet", path=str(tmp_path)))
    assert documents == [("a.parquet:0", "one"), ("a.parquet:3", "four")]
    assert counts(report) == {sources.NOT_A_STRING: 1, sources.EMPTY: 1, sources.UNREADABLE: 1}
    with pytest.raises(ConfigError, match="no column 'body'; set text_key to one of text, n"):
        read(ParquetSource(kind="parquet", path=str(tmp_path), text_key="body"))


@pytest.mark.parametrize(("kind", "package"), [("parquet", "pyarrow"), ("hf", "datasets")])
def test_a_missing_package_is_named_with_the_command_that_installs_it(tmp_path, monkeypatch, kind, package):
    (tmp_path / "a.parquet").touch()
    monkeypatch.setitem(sys.modules, package, None)
    source = {"parquet": ParquetSource, "hf": HubSource}[kind](kind=kind, path=str(tmp_path))
    with pytest.raises(DataError, match=rf"needs the package {package}.*pip install 'albor\[hf\]'"):
        read(source)


# One process for all: `datasets` reads its environment once, and its import takes seconds.
_READ_HUB = """
import sys
from albor.config import HubSource
from albor.data.sources import SourceReport, read_documents
from albor.errors import AlborError
for path, text_key in zip(sys.argv[1::2], sys.argv[2::2]):
    try:
        source = HubSource(kind="hf", path=path, text_key=text_key)
        print([document.text for document in read_documents(source, SourceReport())])
    except AlborError as error:
        print(type(error).__name__, error)
"""


def test_hub_data_sets_local_and_unreachable(tmp_path):
    pytest.importorskip("datasets")
    folder = tmp_path / "dataset"
    folder.mkdir()
    (folder / "train.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n')
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "home")}
    arguments = [str(folder), "text", str(folder), "body", "nobody/nothing", "text"]
    command = [sys.executable, "-c", _READ_HUB, *arguments]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    local, no_column, unreachable = result.stdout.splitlines()
    assert local == "['one', 'two']"
    assert no_column.startswith("ConfigError")
    assert "set text_key to one of text" in no_column
    assert unreachable.startswith("DataError data.sources: data set 'nobody/nothing' cannot be read")
    assert "or download it and use a source of kind parquet, jsonl or files" in unreachable


def test_a_library_s_own_log_does_not_stand_before_our_message(monkeypatch):
    log = logging.getLogger("huggingface_hub")
    said = []

    def load_dataset(*_, **__):
        logging.getLogger("huggingface_hub.utils._http").error("Retrying in 1s")
        raise ConnectionError("no network")

    monkeypatch.setattr(log, "handlers", [logging.StreamHandler(io.StringIO())])
    monkeypatch.setattr(log.handlers[0], "emit", said.append)
    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    with pytest.raises(DataError, match=r"cannot be read .*no network"):
        read(HubSource(kind="hf", path="nobody/nothing"))
    assert not said
    log.error("but later")
    assert said


@pytest.mark.parametrize("kind", ["files", "jsonl", "parquet"])
@pytest.mark.parametrize("name", ["nothing-here", "*.nothing", "empty-folder"])
def test_a_path_that_matches_nothing_is_an_error_with_a_remedy(tmp_path, kind, name):
    (tmp_path / "empty-folder").mkdir()
    source_class = {"files": FilesSource, "jsonl": JsonlSource, "parquet": ParquetSource}[kind]
    with pytest.raises(ConfigError, match=r"matches no file.*check the spelling \(relative paths start at"):
        read(source_class(kind=kind, path=str(tmp_path / name)))


def test_max_bytes_cuts_between_characters_and_says_so(tmp_path):
    (tmp_path / "a.txt").write_text("x" * 10)
    (tmp_path / "b.txt").write_text("ä" * 10)
    (tmp_path / "c.txt").write_text("never reached")
    documents, report = read(files_source(tmp_path, max_bytes=15))
    assert documents == [("a.txt", "x" * 10), ("b.txt", "ää")]
    assert report.text_bytes == 14
    assert report.skipped[sources.CUT].names == ["b.txt"]
    whole, report = read(files_source(tmp_path, max_bytes=30))
    assert len(whole) == 2
    assert not report.skipped
