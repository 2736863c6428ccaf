"""Configurations that mean harm or mischief: a message and exit code 2, in bounded time and memory.

What single keys and files must say is in test_config.py; here nothing may get through, hang or end in a
traceback.
"""

from __future__ import annotations

import json
import os
import resource
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
from checkpoint_cases import exit_code_of, fork
from hypothesis import HealthCheck, given, settings
from run_cases import Result, call, checkpoints, unlogged, write_project
from test_config_effects import keys

from albor import yamlcore
from albor.configfile import load_config
from albor.data.cache import file_sha256
from albor.errors import ConfigError
from albor.train import run, session
from albor.yamlcore import read_yaml

ROOT = Path(__file__).parents[1]
SHIPPED = ROOT / "configs" / "quickstart.yaml"
RUN = Path("runs/tiny")


@pytest.fixture(autouse=True)
def own_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def refused(result: Result) -> None:
    """What every refusal looks like."""
    assert result.code == 2, result
    assert result.err.startswith("albor:")
    assert "Traceback" not in result.err
    assert result.out == ""


# Every key


ODD = {
    "nan": ".nan", "infinity": ".inf", "minus infinity": "-.inf", "null": "null", "true": "true",
    "zero": "0", "largest": "9223372036854775807", "beyond": "9223372036854775808",
    "90 digits": "1" + "0" * 90, "huge": "1e308", "overflow": "1e999",
    "tiny": "1e-320", "underscores": "1" + "_" * 1000, "a number as text": "'1e3'",
    "no text": "''", "a NUL": '"\\0"', "a surrogate": '"\\ud800"', "long text": "x" * 10_000,
    "a date": "2024-01-01", "binary": "!!binary aGk=", "a Python object": "!!python/object:os.system {}",
    "an alias": "*x", "an empty list": "[]", "an empty group": "{}",
    "a group": "{a: {b: 1}}", "broken YAML": "[1", "a tab": "\t1",
}  # fmt: skip
NEVER = ("nan", "infinity", "minus infinity", "overflow", "a NUL", "a surrogate", "binary")
NEVER += ("a Python object", "an alias", "broken YAML")


def overrides() -> Iterator[tuple[str, str, str]]:
    """Every key with every odd value."""
    for key in keys():
        place = key
        if key.startswith("data.sources."):
            kind, name = key.removeprefix("data.sources.").split(".")
            if kind != "files":
                continue
            place = f"data.sources[0].{name}"
        for name, value in ODD.items():
            yield place, name, value


def test_every_key_refuses_what_it_cannot_be(config: Path):
    """By name, or it loads; never anything else. What is never a value is refused for each of them."""
    loaded, refusals = [], []
    for key, name, value in overrides():
        try:
            load_config(config, [f"{key}={value}"])
        except ConfigError as error:
            refusals.append((key, name, error))
        else:
            loaded.append((key, name))
    assert len(refusals) > 1200
    for key, name, error in refusals:
        assert error.problems, (key, name)
        assert all(problem.message and problem.where for problem in error.problems), (key, name)
        str(error).encode()
    assert [(key, name) for key, name in loaded if name in NEVER] == []
    assert len({key for key, _ in loaded}) > 50, "hardly anything loads, so hardly anything is tested"


def test_numbers_that_are_as_large_as_they_may_be_are_planned_or_refused(config: Path):
    """Each count and size at its bound: an answer within seconds, whatever it is."""
    slowest = 0.0
    for key in keys():
        for value in ("9223372036854775807", "1000000007"):
            if key.startswith("data.sources."):
                continue
            began = time.process_time()
            result = call("vram-estimate", config, f"{key}={value}", "--json")
            slowest = max(slowest, time.process_time() - began)
            assert result.code in (0, 2, 4), (key, result)
            assert "Traceback" not in result.err
            assert result.code == 2 or json.loads(result.out)["device_bytes"] > 0
    assert slowest < 5.0


# Text that explodes


def filled(part: str, size: int = 250_000) -> str:
    return part * (size // len(part))


EXPLOSIVE = {
    "a billion laughs": "a: &a [x, x, x, x, x, x, x, x, x]\n"
    + "".join(
        f"{b}: &{b} [{', '.join(['*' + a] * 9)}]\n" for a, b in zip("abcdefghi", "bcdefghij", strict=True)
    ),
    "aliases of one list": "a: &a [1]\nb: [" + filled("*a, ") + "]",
    "an alias of itself": "a: &a [*a]",
    "lists in lists": filled("["),
    "groups in groups": filled("{a: "),
    "lists in lines": filled("- "),
    "keys in keys": filled("? "),
    "keys on one line": filled("a: "),
    "deeper and deeper": "\n".join(" " * depth + "a:" for depth in range(600)),
    "anchors": filled("&a "),
    "tags": filled("!!a "),
    "quotes": filled("'"),
    "escapes": '"' + filled("\\x41"),
    "many keys": "\n".join(f"key{number}: 1" for number in range(5_000)),
    "one key, many times": filled("k: 1\n", 20_000),
    "digits": "seed: " + filled("9"),
    "a long key": filled("k") + ": 1",
    "documents": filled("---\n"),
    "directives": filled("%a\n"),
    "carriage returns": filled("\r"),
    "spaces": filled(" "),
}


def test_nothing_explodes():
    """Together within 20 s of one core and half a GB more than Python and torch take."""

    def work() -> None:
        mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (mapped + 2**29, resource.RLIM_INFINITY))
        resource.setrlimit(resource.RLIMIT_CPU, (20, 20))
        for name, text in EXPLOSIVE.items():
            Path("run.yaml").write_text(text)
            result = call("train", "run.yaml")
            refused(result)
            assert len(result.err) < 100_000, f"{name}: a flood of {len(result.err):,} characters"
        for name in ("a billion laughs", "lists in lists", "one key, many times", "escapes"):
            refused(call("train", SHIPPED, f"evaluate.prompts={EXPLOSIVE[name][:100_000]}"))
        os._exit(7)

    assert exit_code_of(fork(work)) == 7


def test_without_its_guard_it_would_explode(monkeypatch: pytest.MonkeyPatch):
    """Row 19: what each of the bounds of albor.yamlcore keeps from happening."""
    laughs = "\n".join(EXPLOSIVE["a billion laughs"].splitlines()[:5])  # a few thousand of them
    for text, message in (
        (laughs, "more than 10,000 values"),
        ("[" * 5000, "more than 16 levels of nesting"),
    ):
        with pytest.raises(ConfigError, match=message):
            read_yaml(text, "run.yaml")
    monkeypatch.setattr(yamlcore, "MAX_NODES", 10**12)
    assert len(read_yaml(laughs, "run.yaml").places) > 50_000
    monkeypatch.setattr(yamlcore, "MAX_DEPTH", 10**12)
    with pytest.raises(RecursionError):
        read_yaml("[" * 5000, "run.yaml")


def test_as_many_problems_are_told_as_a_person_reads():
    Path("run.yaml").write_text("\n".join(f"key{number}: 1" for number in range(500)))
    lines = call("train", "run.yaml").err.splitlines()
    assert len(lines) == 102
    assert lines[-1] == "and 403 more problems"  # 500 unknown keys, and three that are missing


# What is no file


def listening_socket() -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind("run.yaml")


NO_FILES: dict[str, Callable[[], object]] = {
    "a device without end": lambda: Path("run.yaml").symlink_to("/dev/zero"),
    "an empty device": lambda: Path("run.yaml").symlink_to("/dev/null"),
    "a pipe that nobody writes into": lambda: os.mkfifo("run.yaml"),
    "a socket": listening_socket,
    "a directory": lambda: Path("run.yaml").mkdir(),
    "a link to nothing": lambda: Path("run.yaml").symlink_to("absent"),
    "a link to itself": lambda: Path("run.yaml").symlink_to("run.yaml"),
}


@pytest.mark.parametrize("name", NO_FILES)
def test_what_is_no_file_is_not_read(name: str):
    NO_FILES[name]()
    refused(call("train", "run.yaml"))


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-32", "latin-1", "utf-7"])
def test_another_encoding_is_no_utf_8(encoding: str):
    text = SHIPPED.read_text().replace("name: quickstart", "name: quickstart\nruns_dir: café")
    Path("run.yaml").write_bytes(text.encode(encoding))
    result = call("train", "run.yaml", "--dry-run")
    if encoding == "utf-7":  # plain ASCII, in which the é is spelt out
        assert result.code == 0
    else:
        refused(result)


@pytest.mark.parametrize(
    "arguments",
    [
        ("runs_dir=" + "x" * 5000,),
        ("data.cache_dir=" + "x" * 5000,),
        ("tokenizer.path=" + "x" * 5000,),
        ("tokenizer.path=/dev/zero",),
        ("data.sources=[{kind: files, path: /dev/zero, separator: x}]",),
        ("data.sources=[{kind: files, path: " + "x" * 5000 + "}]",),
        ("runs_dir=/dev/null",),
        ("--resume", "x" * 5000),
        ("--resume", "/dev/zero"),
        ("--resume", "\udcff"),
        ("--resume", ""),
        ("a[999999]=1",),
        ("a[99999999999999999999]=1",),
        ("=",),
        ("[" * 10_000,),
        ("model." * 1000 + "a=1",),
    ],
    ids=lambda arguments: " ".join(arguments)[:30].encode("ascii", "replace").decode(),
)
def test_an_argument_that_makes_no_sense(config: Path, arguments: tuple[str, ...]):
    """A path that cannot be is found when it is used, which is a failure (1), or when it is read (2)."""
    result = call("train", config, *arguments)
    assert result.code in (1, 2)
    assert result.err.startswith("albor:")
    assert "Traceback" not in result.err
    assert not RUN.exists()


# Anything


@given(
    edits=st.lists(
        st.tuples(
            st.integers(0, 5000),
            st.integers(0, 40),
            st.binary(max_size=12)
            | st.sampled_from(
                [b"\0", b"\t", b"\xef\xbb\xbf", b"\xff", b"\r", b"&a ", b"*a", b"<<: ", b"{", b"["]
            ),
        ),
        min_size=1,
        max_size=4,
    )
)
@settings(
    max_examples=100,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
def test_any_bytes_are_a_configuration_or_are_refused(edits: list[tuple[int, int, bytes]]):
    """Through the whole command; a configuration that still is one is planned."""
    content = SHIPPED.read_bytes()
    for at, removed, added in edits:
        content = content[:at] + added + content[at + removed :]
    Path("run.yaml").write_bytes(content)
    result = call("train", "run.yaml", "--dry-run")
    if result.code != 2:
        assert result.code in (0, 4)
        load_config(Path("run.yaml"))
    else:
        refused(result)


# Data and tokenizer (rows 15 to 17): what a command says of them


def shard_of(config: Path) -> Path:
    (path,) = (config.parent / "data").glob("tokens-files-*/train/tokens-00000.npy")
    return path


DAMAGES: dict[str, Callable[[Path], object]] = {
    "cut off": lambda path: path.write_bytes(path.read_bytes()[:-2]),
    "a flipped bit": lambda path: path.write_bytes(path.read_bytes()[:-1] + b"\x01"),
    "another dtype": lambda path: np.save(path, np.load(path).astype(np.int16)),
    "missing": lambda path: path.unlink(),
    "empty": lambda path: path.write_bytes(b""),
    "the other shards'": lambda path: path.write_bytes(
        (path.parents[1] / "validation" / path.name).read_bytes()
    ),
}


def write_id_beyond(path: Path) -> None:
    """By somebody who writes the hash that fits."""
    tokens = np.load(path)
    tokens[5] = 360  # the vocabulary's size
    np.save(path, tokens)
    manifest = path.with_name("manifest.json")
    content = json.loads(manifest.read_text())
    content["shards"][0]["sha256"] = file_sha256(path)
    manifest.write_text(json.dumps(content))


DAMAGES["an id beyond the vocabulary"] = write_id_beyond


@pytest.fixture
def own_config() -> Path:
    """A project that a test may damage, with its data prepared."""
    path = write_project(Path("project").absolute())
    assert call("data", "prepare", path).code == 0
    return path


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_shards_are_named_before_the_first_step(own_config: Path, damage: str):
    shard = shard_of(own_config)
    DAMAGES[damage](shard)
    result = call("train", own_config)
    assert (result.code, RUN.exists()) == (1, False)
    assert str(shard) in result.err
    assert "Traceback" not in result.err


@pytest.mark.parametrize("guarded", [True, False])
def test_another_tokenizer_than_the_checkpoints_is_refused(
    own_config: Path, guarded: bool, monkeypatch: pytest.MonkeyPatch
):
    """Row 17. It has as many tokens: without the comparison the run would go on and learn nonsense."""
    assert (
        call("train", own_config, "train.max_steps=20", "name=other", "tokenizer.sample_bytes=6KB").code == 0
    )
    other = Path("runs/other/checkpoints/step-00000020/tokenizer.model").absolute()
    stop = pytest.MonkeyPatch()
    stop.setattr(run.Loop, "_owes_save", stopped_by_a_limit(run.Loop._owes_save))
    assert call("train", own_config).code == 75
    stop.undo()
    before, saved = unlogged(RUN), checkpoints(RUN)
    if not guarded:
        monkeypatch.setattr(session, "_explain_other_data", pytest.fail)
        monkeypatch.setattr(run.PreparedData, "sha256", property(lambda _: saved_data(RUN)))
        monkeypatch.setattr(session, "check_tokenizer", lambda *_: None)
    result = call("train", own_config, f"tokenizer.path={other}")
    if guarded:
        assert result.code == 1
        assert f"was trained with another tokenizer than {other}" in result.err
        assert unlogged(RUN) == before
    else:
        assert result.code == 0
        assert checkpoints(RUN) != saved


def stopped_by_a_limit(owes: Callable[[run.Loop], bool]) -> Callable[[run.Loop], bool]:
    """After step 6 the loop finds that it is to stop."""

    def stopped(self: run.Loop) -> bool:
        if self.session.state.step == 6:
            self.stop.reason = "the test"
        return owes(self)

    return stopped


def saved_data(directory: Path) -> Any:
    newest = sorted((directory / "checkpoints").glob("step-*"))[-1]
    return json.loads((newest / "state.json").read_text())["data_sha256"]
