"""The smoke test's verdicts, each against texts that have the fault and texts that do not."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from run_cases import call
from test_generate import Script
from writing_cases import make_tokenizer, save_run

from albor.data.tokenizer import Tokenizer
from albor.generate.load import load_to_write
from albor.generate.smoke import PROMPTS, TOKENS, Finding, is_varied, parses, smoke_test, summary
from albor.model.decode import Decoder


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return make_tokenizer()


def findings_of(tokenizer: Tokenizer, text: str, *, ends: bool = True) -> list[Finding]:
    """What is found where the model writes `text` after every prompt, and then ends, or goes on with it."""
    tokens = tokenizer.encode(text).tolist()
    script = [*tokens, tokenizer.end_of_document_id] if ends else tokens * (TOKENS + 1)

    class Certain(Script):
        def feed(self, tokens: torch.Tensor) -> torch.Tensor:
            return super().feed(tokens) * 1000  # whatever the temperature

    return smoke_test(Certain(script, tokenizer.vocab_size), tokenizer)


def test_a_sound_text_has_nothing_wrong(tokenizer: Tokenizer) -> None:
    for finding, prompt in zip(findings_of(tokenizer, "x = 1\n"), PROMPTS, strict=True):
        assert (finding.prompt, finding.text, finding.stop_reason) == (
            prompt.text,
            "x = 1\n",
            "end_of_document",
        )
        assert finding.says_something
        assert finding.printable
        assert finding.varied
        assert finding.ends
        assert finding.parses is (True if prompt.code else None)


@pytest.mark.parametrize(
    ("text", "ends", "verdict"),
    [
        ("", True, "says_something"),
        (" \n ", True, "says_something"),
        ("a\x07b", True, "printable"),
        ("a\x00b", True, "printable"),
        ("the cat ", False, "varied"),
        ("the cat", False, "ends"),
        ("the cat sat", True, "parses"),
        ("return (", True, "parses"),
    ],
)
def test_each_fault_is_found(tokenizer: Tokenizer, text: str, ends: bool, verdict: str) -> None:
    findings = findings_of(tokenizer, text, ends=ends)
    verdicts = [getattr(finding, verdict) for finding in findings]
    assert False in verdicts
    assert True not in verdicts


def test_what_goes_in_circles_is_told_from_what_does_not() -> None:
    assert is_varied([])
    assert is_varied([1, 1, 1])  # too short to tell
    assert is_varied(list(range(64)))
    assert is_varied([*range(30), *range(30)])  # said twice
    assert not is_varied([*range(15)] * 4)
    assert not is_varied([7] * 64)
    assert not is_varied([*range(20), *[1, 2] * 22])


FUNCTION = "def add(a, b):\n    "


@pytest.mark.parametrize(
    ("prompt", "text", "whole", "expected"),
    [
        (FUNCTION, "return a + b\n", True, True),
        (FUNCTION, "return a +", True, False),
        (FUNCTION, "return a +", False, False),  # no line of it is whole
        (FUNCTION, "return a + b\n\n\ndef sub(a,", False, True),  # cut within a statement
        (FUNCTION, "return a + b\n\n\ndef sub(a,", True, False),
        (FUNCTION, "return a b\n\n\nx = 1\ny = 2\nz", False, False),
        (FUNCTION, "x = a\n    y = b\n    return [\n        x,", False, True),
        (FUNCTION, "x = a\ny = [\n1,\n2,\n3,\n4,\n5,\n", False, False),  # most of it is no whole statement
        (FUNCTION, "'\\d'\n", True, True),  # a warning is none of our business
        ("", "\0", True, False),
        ("", "(" * 5000, True, False),
    ],
)
def test_code_is_python(prompt: str, text: str, whole: bool, expected: bool) -> None:
    assert parses(prompt, text, whole=whole) is expected


def test_the_summary_counts(tokenizer: Tokenizer) -> None:
    findings = findings_of(tokenizer, "the cat sat")
    findings[0] = dataclasses.replace(findings[0], text=None, problem="NaN", ends=None, printable=None)
    said = summary(findings)
    assert said.startswith(f"of {len(PROMPTS)} texts ")
    assert f"{len(PROMPTS) - 1} are printable" in said
    assert "0 of 2 are Python" in said
    assert "1 could not be written" in said


@pytest.fixture
def run(tokenizer: Tokenizer, tmp_path: Path) -> Path:
    return save_run(tmp_path, tokenizer)


def test_damaged_weights_and_a_short_context_are_findings(
    tokenizer: Tokenizer, run: Path, tmp_path: Path
) -> None:
    loaded = load_to_write(run)
    decoder = Decoder(loaded.model, loaded.arena)
    assert smoke_test(decoder, tokenizer) == smoke_test(decoder, tokenizer)
    loaded.arena["weights"].fill_(float("nan"))
    assert all("logit" in str(finding.problem) for finding in smoke_test(decoder, tokenizer))
    short = load_to_write(save_run(tmp_path / "short", tokenizer, context=16))
    findings = smoke_test(Decoder(short.model, short.arena), tokenizer)
    assert "context holds 16" in str(findings[-1].problem)
    assert findings[0].text is not None


def test_the_command_prints_the_texts(run: Path) -> None:
    result = call("smoke", run)
    assert result.code == 0
    assert result.out.splitlines()[-1].startswith("of 6 texts ")
    content = json.loads(call("smoke", run, "--json").out)
    assert [finding["prompt"] for finding in content["findings"]] == [prompt.text for prompt in PROMPTS]
    assert content["summary"] == result.out.splitlines()[-1]
