"""What is kept of a step that was not good, and `albor inspect-spike`."""

from __future__ import annotations

import json
import math
import os
import signal
import stat
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from run_cases import albor, bits, call, events, start, wait, write_project
from test_divergence import (
    PER_STEP,
    WINDOW,
    bad_samples,
    enlarge,
    killed,
    poison_gradient,
    poison_loss,
    samples_of,
    train,
)

from albor import spikes
from albor.configfile import load_config
from albor.data.loader import Loader
from albor.data.prepare import prepare
from albor.errors import AlborError
from albor.train import divergence
from albor.train.spikes import write_spike

RUN = Path("runs/tiny")


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With two sources, of which one weighs twice as much."""
    path = write_project(tmp_path_factory.mktemp("project"))
    home = path.parent
    (home / "more").mkdir()
    for file in sorted((home / "corpus").iterdir())[10:]:
        file.rename(home / "more" / file.name)
    text = path.read_text().replace(
        "[{kind: files, path:",
        "[{kind: files, weight: 2, path: " + str(home / "more") + "}, {kind: files, path:",
    )
    path.write_text(text)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        assert call("data", "prepare", path).code == 0
    return path


@pytest.fixture(autouse=True)
def own_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def run(config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that skipped step 6, clipped step 20, and went back from 14 to 8."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("kept"))
        bad = samples_of(6, *range(11, 15))
        # From step 9 on the samples are those of six steps later.
        with bad_samples(bad, poison_gradient), bad_samples({3 * 26 - 2}, enlarge):
            result = train(config, "divergence.on_spike=clip", "divergence.spike_window=16")
        assert result.code == 0, result.err
        return Path.cwd() / RUN


def read(run: Path, step: int, rollbacks: int = 0) -> dict[str, Any]:
    return json.loads((run / "spikes" / spikes.spike_name(step, rollbacks)).read_text())


def test_each_step_that_is_not_good_has_a_file_and_no_other(run: Path):
    names = [spikes.spike_name(step) for step in (6, 11, 12, 13, 14)]
    assert {path.name for path in (run / "spikes").iterdir()} == {*names, "step-00000020-rollback-1.json"}
    kept = {path.name: json.loads(path.read_text()) for path in (run / "spikes").iterdir()}
    actions = {spike["step"]: (spike["verdict"], spike["action"]) for spike in kept.values()}
    assert actions[6] == ("non-finite", "skipped")
    assert actions[14] == ("non-finite", "rolled back to step 8")
    assert actions[20] == ("spike", "clipped")
    assert [event["step"] for event in events(run, "skipped_step")] == [6, 11, 12, 13, 14]
    assert all(stat.S_IMODE(path.stat().st_mode) & 0o400 for path in (run / "spikes").iterdir())


def test_the_batch_is_the_one_that_was_read(run: Path, config: Path, monkeypatch: pytest.MonkeyPatch):
    """Token for token, by a loader that reads from the start; and the documents are those of the shards."""
    monkeypatch.chdir(config.parent)
    settings = load_config(config)
    data = prepare(settings)
    length = settings.data.sequence_length
    sources = {0: "more", 1: "corpus"}
    for step in (6, 12):
        loader = Loader(data.train, [s.weight for s in settings.data.sources], length, 1, settings.seed)
        tokens = np.empty((1, length), dtype=np.int64)
        targets = np.empty_like(tokens)
        for _ in range(PER_STEP * (step - 1)):
            loader.next(tokens, targets)
        spike = read(run, step)
        assert spike["samples"] == [PER_STEP * (step - 1), PER_STEP * step]
        assert len(spike["sequences"]) == PER_STEP
        assert {sequence["source"] for sequence in spike["sequences"]} == {0, 1}
        for number, sequence in enumerate(spike["sequences"], PER_STEP * (step - 1)):
            loader.next(tokens, targets)
            window = np.append(tokens[0], targets[0, -1])
            stream = data.train[sequence["source"]]
            start_, end = sequence["tokens"]
            assert (sequence["sample"], end - start_) == (number, length + 1)
            assert np.array_equal(stream.read(start_, end - start_), window)
            assert sequence["text"] == data.tokenizer.decode(window)
            assert sequence["origin"] == f"files {config.parent / sources[sequence['source']]}"
            found = []
            for document in sequence["documents"]:
                first, last = document["tokens"]
                begin = int(stream.document_offsets[document["document"]])
                assert begin + last <= stream.document_offsets[document["document"] + 1]
                found += range(begin + first, begin + last)
            assert found == list(range(start_, end))


def test_the_numbers_are_those_of_the_step(run: Path):
    spike, clipped = read(run, 6), read(run, 20, rollbacks=1)
    assert (spike["grad_norm"], spike["gradient_norms"]["embedding"]) == ("inf", "inf")
    assert spike["gradient_norms"]["block_01/mlp"] > 0
    assert (spike["window"]["steps"], spike["skipped_before"], spike["rollbacks"]) == (5, [], 0)
    assert read(run, 13)["skipped_before"] == [6, 11, 12]
    assert clipped["window"]["grad_norm"]["zscore"] > 6
    assert (clipped["window"]["steps"], clipped["rollbacks"]) == (16, 1)
    norms = clipped["gradient_norms"]
    whole = math.hypot(*(norm for group, norm in norms.items() if "/" not in group))
    assert clipped["grad_norm"] == pytest.approx(whole)


def test_only_the_newest_are_kept(config: Path):
    """By age: after a rollback the newest has a lower step."""
    with bad_samples(WINDOW, poison_loss):
        train(config, "divergence.keep_spikes=2")
    assert sorted(path.name for path in (RUN / "spikes").iterdir()) == [
        "step-00000013.json",
        "step-00000014.json",
    ]
    spike = read(RUN, 14)
    os.utime(RUN / "spikes/step-00000013.json", ns=(2, 2))
    os.utime(RUN / "spikes/step-00000014.json", ns=(3, 3))
    write_spike(RUN, spike | {"step": 9}, 2)
    assert sorted(path.name for path in (RUN / "spikes").iterdir()) == [
        "step-00000009.json",
        "step-00000014.json",
    ]
    with bad_samples(WINDOW, poison_loss):
        train(config, "name=none", "divergence.keep_spikes=0")
    assert not Path("runs/none/spikes").exists()


def test_a_file_is_whole_or_not_there(config: Path, run: Path, monkeypatch: pytest.MonkeyPatch):
    """Whether the process dies or the disk is full; and neither costs the training anything."""
    spike = read(run, 6)
    replaced = os.replace

    def fail(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch, bad_samples(WINDOW, poison_loss):
        patch.setattr(divergence, "write_spike", fail)
        result = train(config)
    assert result.code == 0
    assert result.out.count("cannot write runs/tiny/spikes: No space left on device; training goes on") == 1
    with bad_samples(WINDOW, poison_loss):
        assert train(config, "name=undisturbed").code == 0
    assert bits(RUN) == bits(Path("runs/undisturbed"))

    (RUN / "spikes").mkdir()
    (RUN / "spikes" / ".step-00000001.json.tmp-1").write_text("half of")
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", fail)
        with pytest.raises(OSError, match="No space"):
            write_spike(RUN, spike, 20)
    assert list((RUN / "spikes").iterdir()) == []
    assert os.replace is replaced
    write_spike(RUN, spike, 20)
    assert read(RUN, 6) == spike


def test_a_run_that_was_killed_writes_the_same_files_again(config: Path):
    with bad_samples(WINDOW, poison_loss):
        killed(config, "rollback.loaded", 14)
        before = {path.name: path.read_bytes() for path in (RUN / "spikes").iterdir()}
        assert json.loads(before["step-00000014.json"])["action"] == "skipped"
        assert train(config).code == 0
    after = {path.name: path.read_bytes() for path in (RUN / "spikes").iterdir()}
    del before["step-00000014.json"]
    assert before.items() <= after.items()
    assert read(RUN, 14)["action"] == "rolled back to step 8"


# The command


def test_the_list_is_a_line_for_each_step(run: Path):
    result = call("inspect-spike", run)
    assert (result.code, result.err) == (0, "")
    lines = result.out.splitlines()
    assert [part.strip() for part in lines[0].split("  ") if part] == [
        *("step", "rollbacks", "verdict", "action", "loss", "z", "norm", "z", "largest norm in")
    ]
    assert [line.split()[1] for line in lines[1:7]] == ["0"] * 5 + ["1"]
    assert [line.split()[0] for line in lines[1:7]] == ["6", "11", "12", "13", "14", "20"]
    assert "rolled back to step 8" in lines[5]
    assert lines[1].split()[-1] == "embedding"
    assert f"albor inspect-spike {run} --step 20" in lines[-1]
    assert all(len(line) < 110 for line in lines[:-1])


def test_one_step_is_shown_with_its_texts(run: Path):
    result = call("inspect-spike", run, "--step", 12)
    assert result.code == 0
    spike = read(run, 12)
    assert "step 12: non-finite, skipped" in result.out
    assert "skipped shortly before: steps 6, 11" in result.out
    for sequence in spike["sequences"]:
        assert (
            f"sample {sequence['sample']}: {sequence['origin']}, tokens {sequence['tokens'][0]} to"
            in result.out
        )
        for line in sequence["text"].splitlines():
            assert f"  | {line}".rstrip() in result.out
    shown = [line.split() for line in result.out.splitlines()]
    assert ["embedding", "inf"] in shown
    (row,) = (line for line in shown if line[:1] == ["block_01"])
    assert [float(cell) for cell in row[1:]] == pytest.approx(
        [spike["gradient_norms"][f"block_01{part}"] for part in ("", "/attention", "/mlp")], rel=1e-3
    )


def test_json_is_one_object_and_nothing_else(run: Path):
    result = call("inspect-spike", run, "--json")
    listed = json.loads(result.out)
    assert [spike["step"] for spike in listed["spikes"]] == [6, 11, 12, 13, 14, 20]
    assert "sequences" not in listed["spikes"][0]
    shown = json.loads(call("inspect-spike", run, "--step", 12, "--json").out)
    assert shown == {**read(run, 12), "before_rollbacks": []}
    assert result.err == ""


def test_what_is_not_there_is_said_with_what_is(run: Path, config: Path):
    for arguments, says in (
        ((run, "--step", 7), "--step: nothing is kept of step 7; there are 6, 11, 12, 13, 14, 20"),
        (("runs/nowhere",), "RUN: runs/nowhere is no directory; give a run directory, such as runs/my-run"),
        ((config.parent,), f"RUN: {config.parent} is no run's directory; give a run directory"),
    ):
        result = call("inspect-spike", *arguments)
        assert result.code == 2
        assert says in result.err
        assert len(result.err.splitlines()) == 1
        assert result.out == ""
    assert call("inspect-spike", run, "--step", "six").code == 2


def test_a_run_without_any_says_so(config: Path):
    train(config)
    assert not (RUN / "spikes").exists()
    result = call("inspect-spike", RUN)
    assert (result.code, result.out) == (0, "runs/tiny: no step was skipped or clipped\n")
    assert json.loads(call("inspect-spike", RUN, "--json").out)["spikes"] == []
    result = call("inspect-spike", RUN, "--step", 3)
    assert (result.code, "runs/tiny has none" in result.err) == (2, True)


@pytest.mark.parametrize("kept", ["divergence.keep_spikes=0", "divergence.keep_spikes=2"])
def test_steps_whose_batch_is_not_kept_are_named_all_the_same(kept: str, config: Path):
    with bad_samples(WINDOW, poison_loss):
        assert train(config, kept).code == 0
    gone = [10, 11, 12, 13, 14][: 5 - int(kept[-1])]
    result = call("inspect-spike", RUN)
    assert (result.code, "no step was skipped" in result.out) == (0, False)
    assert result.out.splitlines()[-1] == (
        "skipped or clipped as well, and not kept (divergence.keep_spikes, or a disk that had no room): "
        f"steps {', '.join(map(str, gone))}"
    )
    assert json.loads(call("inspect-spike", RUN, "--json").out)["not_kept"] == gone
    assert "no room)" in call("inspect-spike", RUN, "--step", 10).err
    assert "no room)" not in call("inspect-spike", RUN, "--step", 9).err


@pytest.mark.parametrize(("bad", "shown"), [(["a", "b/attention", "b/mlp"], "all"), (["b/mlp"], "b/mlp")])
def test_where_everything_is_nan_no_part_is_named_for_the_rest(bad: list[str], shown: str, run: Path):
    norms = dict.fromkeys(["a", "b", "b/attention", "b/mlp"], 1.0) | dict.fromkeys(bad, "nan")
    (RUN / "spikes").mkdir(parents=True)
    spike = read(run, 6) | {"gradient_norms": norms}
    (RUN / "spikes" / spikes.spike_name(6)).write_text(json.dumps(spike))
    assert call("inspect-spike", RUN).out.splitlines()[1].split()[-1] == shown


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        "[]",
        "{}",
        '{"format": 2}',
        '{"format": 1}',
        "[" * 5000,
        '{"format": 1, "format": 1}',
        "\udcff",
    ],
)
def test_a_file_that_a_run_did_not_write_is_named(content: str, run: Path):
    (RUN / "spikes").mkdir(parents=True)
    path = RUN / "spikes" / "step-00000003.json"
    path.write_bytes(content.encode(errors="surrogateescape"))
    (RUN / "spikes" / "step-00000012.json").write_bytes((run / "spikes" / "step-00000012.json").read_bytes())
    with pytest.raises(AlborError, match="not what a run writes"):
        spikes.read_spike(path)
    result = call("inspect-spike", RUN)
    assert result.code == 0
    assert result.out.splitlines()[1].split()[:3] == ["12", "0", "non-finite"]
    assert f"{path}: not what a run writes" in result.out
    result = call("inspect-spike", RUN, "--step", 3)
    assert (result.code, "Traceback" in result.err) == (1, False)
    assert f"{path}: not what a run writes" in result.err


@pytest.mark.parametrize(
    "change",
    [
        {"sequences": 3}, {"sequences": [{}]}, {"window": None}, {"gradient_norms": {"a/b": "large"}},
        {"lr": None}, {"samples": []}, {"step": {}}, {"verdict": 7}, {"loss": "much"},
        {"skipped_before": ["x"]},
    ],
)  # fmt: skip
def test_neither_is_one_whose_content_was_edited(change: dict[str, Any], run: Path):
    path = Path("step-00000006.json")
    path.write_text(json.dumps(read(run, 6) | change))
    with pytest.raises(AlborError, match="not what a run writes"):
        spikes.read_spike(path)


def test_a_step_that_comes_again_after_a_rollback_keeps_both_files(config: Path):
    """Steps 11 to 14 go back to 8; the same numbers then come with other samples, which are bad too."""
    with bad_samples(samples_of(6, *range(11, 15), 17), poison_loss):
        assert train(config).code == 0
    assert [event["step"] for event in events(RUN, "rollback")] == [8]
    first, again = read(RUN, 11), read(RUN, 11, rollbacks=1)
    assert first["samples"] != again["samples"]
    out = call("inspect-spike", RUN, "--step", 11).out
    assert [f"samples {spike['samples'][0]} to" in out for spike in (first, again)] == [True, True]
    shown = json.loads(call("inspect-spike", RUN, "--step", 11, "--json").out)
    assert shown == {**again, "before_rollbacks": [first]}
    listed = json.loads(call("inspect-spike", RUN, "--json").out)["spikes"]
    assert [spike["rollbacks"] for spike in listed if spike["step"] == 11] == [0, 1]


def test_a_text_cannot_drive_the_terminal(run: Path):
    """Escape sequences, a line that is turned around, a carriage return over what stands there."""
    (RUN / "spikes").mkdir(parents=True)
    spike = read(run, 6)
    spike["sequences"][0]["text"] = "a\x1b[2Jb\u202ec\rd\x07e\x9bf é 語 " + "x" * 5000
    spike["sequences"][0]["origin"] = "files \x1b]0;title\x07"
    (RUN / "spikes" / "step-00000006.json").write_text(json.dumps(spike))
    out = call("inspect-spike", RUN, "--step", 6).out
    assert all(character.isprintable() or character == "\n" for character in out)
    assert "a\\x1b[2Jb\\u202ec" in out
    assert "é 語" in out
    assert "more characters, which --json has" in out


def test_in_a_pipe_that_closes_and_under_an_interrupt(run: Path):
    """As a user has it, in a process of its own: no escape codes, no traceback."""
    result = albor(Path(), "inspect-spike", run, "--step", 12)
    assert result.code == 0
    assert "\x1b" not in result.out
    assert result.out == call("inspect-spike", run, "--step", 12).out
    process = start(Path(), "inspect-spike", run, "--step", 12)
    assert process.stdout is not None
    process.stdout.close()
    process.stdout = None
    assert "Traceback" not in wait(process).err
    process = start(Path(), "inspect-spike", run)
    process.send_signal(signal.SIGINT)
    result = wait(process)
    assert result.code in (0, 130, -signal.SIGINT)
