"""HumanEval and MBPP: what is right counts, and nothing else does."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from eval_cases import data, run  # fixtures
from run_cases import call

from albor.errors import ConfigError
from albor.evaluate import code, command
from albor.evaluate.code import Sampling
from albor.evaluate.sandbox import NotIsolated, Sandbox
from albor.generate.generate import PromptTooLong

try:
    Sandbox().check()
except NotIsolated as error:
    pytest.skip(f"NO PROGRAM WAS RUN, FOR NONE RUNS HERE: {error}", allow_module_level=True)


def writes(answer: Callable[[str, int], str], monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Makes the model write `answer(prompt, call's number)`; returns what it is asked."""
    asked: list[dict[str, Any]] = []

    def generate(decoder: Any, tokenizer: Any, prompt: str, **settings: Any) -> SimpleNamespace:
        asked.append({"prompt": prompt, **settings})
        return SimpleNamespace(text=answer(prompt, len(asked) - 1))

    monkeypatch.setattr(code, "generate", generate)
    return asked


def evaluate(where: Path, data: Path, tasks: str, *others: object) -> dict[str, Any]:
    result = call(
        "eval", where, "--tasks", tasks, "--data", data, "--allow-code-execution", "--json", *others
    )
    assert result.code == 0, result.err
    return json.loads(result.out)["results"]


@pytest.fixture
def nothing_stored(run: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Where results go for this test."""
    monkeypatch.setattr(command.Opened, "results", property(lambda _: tmp_path / "eval"))
    return tmp_path / "eval"


def test_programs_that_pass_their_tests_count(
    run: Path, data: Path, nothing_stored: Path, monkeypatch: pytest.MonkeyPatch
):
    answers = {"zero": " 0", "one": " 1", '"""': "def three():\n    return 3"}
    asked = writes(
        lambda prompt, _: next(text for word, text in answers.items() if word in prompt), monkeypatch
    )
    found = evaluate(run, data, "humaneval,mbpp")
    assert found["humaneval"]["pass@1"] == {"value": 1.0, "stderr": 0.0}
    assert found["mbpp"]["pass@1"] == {"value": 1.0, "stderr": None}
    assert found["humaneval"]["outcomes"] == {"passed": 2}
    assert [request["temperature"] for request in asked] == [0, 0, 0]
    assert "\ndef" in asked[0]["stop"]
    assert len({request["seed"] for request in asked}) == 3


@pytest.mark.parametrize(
    "text", ["", " 7", "\n", " exit(0)", " __import__('os')._exit(0)", " 0 if", "'''", " open('/etc/passwd')"]
)
def test_an_empty_or_wrong_or_sly_program_does_not(
    run: Path, data: Path, nothing_stored: Path, monkeypatch: pytest.MonkeyPatch, text: str
):
    writes(lambda *_: text, monkeypatch)
    found = evaluate(run, data, "humaneval,mbpp")
    assert found["humaneval"]["pass@1"]["value"] == 0
    assert found["mbpp"]["pass@1"]["value"] == 0
    assert found["humaneval"]["outcomes"] == {"failed": 2}


def test_pass_at_k_of_several_samples(
    run: Path, data: Path, nothing_stored: Path, monkeypatch: pytest.MonkeyPatch
):
    # Of ten programs for each of the two problems, 3 and 0 are right.
    asked = writes(lambda prompt, number: " 0" if number < 3 else " 5", monkeypatch)
    found = evaluate(run, data, "humaneval", "--samples", 10)["humaneval"]
    assert found["pass@1"]["value"] == pytest.approx((3 / 10 + 0) / 2)
    assert found["pass@10"]["value"] == pytest.approx(1 / 2)
    assert "pass@100" not in found
    assert found["outcomes"] == {"failed": 17, "passed": 3}
    assert {request["temperature"] for request in asked} == {0.8}
    assert len({request["seed"] for request in asked}) == 20


def test_what_was_run_is_not_run_again(
    run: Path, data: Path, nothing_stored: Path, monkeypatch: pytest.MonkeyPatch
):
    def answer(prompt: str, number: int) -> str:
        if number == 1:
            raise NotIsolated("stopped in between")
        return " 0"

    writes(answer, monkeypatch)
    stopped = call("eval", run, "--tasks", "humaneval", "--data", data, "--allow-code-execution")
    assert stopped.code == 1
    asked = writes(lambda *_: " 1", monkeypatch)
    found = evaluate(run, data, "humaneval")["humaneval"]
    assert len(asked) == 1
    assert found["outcomes"] == {"passed": 2}
    lines = [json.loads(line) for path in (nothing_stored / "scores").iterdir() for line in path.open()]
    assert [(line["problem"], line["text"]) for line in lines[1:]] == [
        ("HumanEval/0", " 0"),
        ("HumanEval/1", " 1"),
    ]


def test_a_prompt_that_is_too_long_has_failed_and_is_counted(
    run: Path, data: Path, nothing_stored: Path, monkeypatch: pytest.MonkeyPatch
):
    def answer(prompt: str, number: int) -> str:
        raise PromptTooLong("it is")

    writes(answer, monkeypatch)
    found = evaluate(run, data, "humaneval")["humaneval"]
    assert found["pass@1"]["value"] == 0
    assert found["outcomes"] == {"prompt too long": 2}


def test_a_real_model_writes_and_is_judged(run: Path, data: Path, nothing_stored: Path):
    found = evaluate(run, data, "humaneval,mbpp")
    assert sum(found["humaneval"]["outcomes"].values()) == 2
    assert found["humaneval"]["pass@1"]["value"] == 0


def test_where_programs_cannot_be_isolated_none_is_written_or_run(
    run: Path, data: Path, nothing_stored: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(
        Sandbox, "_run", lambda *_: ("failed", "entering namespaces of its own: not permitted")
    )
    writes(lambda *_: pytest.fail("a program was written"), monkeypatch)
    result = call("eval", run, "--tasks", "humaneval", "--data", data, "--allow-code-execution")
    assert result.code == 1
    assert "this machine cannot isolate them (entering namespaces of its own: not permitted)" in result.err
    assert not nothing_stored.exists()


def test_several_samples_at_temperature_0_would_be_one():
    assert Sampling.of(1, None).temperature == 0
    assert Sampling.of(5, None).temperature == 0.8
    with pytest.raises(ConfigError, match="all 5 samples would be the same program"):
        Sampling.of(5, 0.0)
