"""The smoke test: a fixed set of prompts, and what is plainly wrong with how the model goes on.

It says whether a model writes at all: whether it says something, in characters that can be shown, without
going in circles, whether it comes to an end, and whether its code is code. A verdict is information about the
model, and no failure of the run.
"""

from __future__ import annotations

import ast
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from albor.data.tokenizer import Tokenizer
from albor.generate.generate import Generation, PromptTooLong, generate
from albor.generate.sampler import NotFinite
from albor.model.decode import Decoder

TOKENS = 64
TEMPERATURE = 0.8  # the likeliest tokens alone make every small model go in circles
_RUN = 4  # tokens in a row that are looked for again
_FEWEST_DISTINCT = 0.5  # of the runs of so many tokens; prose and code have 0.9 and more
_READABLE_CONTROLS = "\n\r\t"


@dataclass(frozen=True)
class Prompt:
    """The beginning of a text; of `code` Python can be asked."""

    text: str
    code: bool = False


PROMPTS = (
    Prompt(""),
    Prompt("The "),
    Prompt("Once upon a time"),
    Prompt("# How to"),
    Prompt("def add(a, b):\n    ", code=True),
    Prompt("class Stack:\n    def __init__(self):\n        ", code=True),
)


@dataclass(frozen=True)
class Finding:
    """How the model went on from a prompt, and the verdicts; without a text, `problem` says why there is
    none.
    """

    prompt: str
    text: str | None
    problem: str | None
    tokens: int
    stop_reason: str | None
    says_something: bool | None
    printable: bool | None
    varied: bool | None
    ends: bool | None  # by itself, within TOKENS
    parses: bool | None  # None for what is no code


def smoke_test(
    decoder: Decoder, tokenizer: Tokenizer, on_token: Callable[[], None] = lambda: None
) -> list[Finding]:
    """A finding for each of PROMPTS, the same for the same weights in the same arithmetic. `on_token` is that
    of `write`.
    """
    findings = []
    for index, prompt in enumerate(PROMPTS):
        try:
            generation = generate(
                decoder, tokenizer, prompt.text,
                max_tokens=TOKENS, temperature=TEMPERATURE, seed=index, on_token=on_token,
            )  # fmt: skip
        except (NotFinite, PromptTooLong) as error:
            nothing = dict.fromkeys(("says_something", "printable", "varied", "ends", "parses"))
            findings.append(Finding(prompt.text, None, str(error), 0, None, **nothing))
        else:
            findings.append(_judge(prompt, generation))
    return findings


def _judge(prompt: Prompt, generation: Generation) -> Finding:
    text, ends = generation.text, generation.stop_reason in ("end_of_document", "end_of_turn")
    return Finding(
        prompt=prompt.text,
        text=text,
        problem=None,
        tokens=len(generation.tokens),
        stop_reason=generation.stop_reason,
        says_something=bool(text.strip()),
        printable=all(c.isprintable() or c in _READABLE_CONTROLS for c in text) and "\ufffd" not in text,
        varied=is_varied(generation.tokens),
        ends=ends,
        parses=parses(prompt.text, text, whole=ends) if prompt.code else None,
    )


def is_varied(tokens: Sequence[int]) -> bool:
    """Whether most runs of four tokens occur once; what goes in circles has few of them, again and again."""
    runs = [tuple(tokens[i : i + _RUN]) for i in range(len(tokens) - _RUN + 1)]
    return len(set(runs)) >= _FEWEST_DISTINCT * len(runs)


def parses(prompt: str, text: str, *, whole: bool) -> bool:
    """Whether prompt and text are Python, by `ast.parse`, which runs nothing.

    A text that was cut off may end within a statement: then it is enough that its first lines are, if they
    are half of what was written or more.
    """
    source = prompt + text
    if whole or _is_python(source):
        return _is_python(source)
    lines = source.splitlines(keepends=True)
    first = len(prompt.splitlines())  # the one that the text begins in
    fewest = max(first, first - 1 + (len(lines) - first + 1) // 2)
    return any(_is_python("".join(lines[:count])) for count in range(len(lines) - 1, fewest - 1, -1))


def _is_python(source: str) -> bool:
    try:
        with warnings.catch_warnings(action="ignore"):  # of escapes and comparisons that look odd
            ast.parse(source)
    except (SyntaxError, ValueError, RecursionError, MemoryError):  # what the documentation of ast names
        return False
    return True


def as_json(findings: Sequence[Finding]) -> dict[str, Any]:
    """The content of eval/smoke.json."""
    settings = {"tokens": TOKENS, "temperature": TEMPERATURE}
    return {**settings, "summary": summary(findings), "findings": [asdict(finding) for finding in findings]}


def lines(findings: Sequence[Finding]) -> Iterator[str]:
    """The texts with their verdicts, and the summary."""
    words = {
        "says_something": "says nothing", "printable": "not printable", "varied": "goes in circles",
        "ends": "does not end", "parses": "not Python",
    }  # fmt: skip
    for finding in findings:
        wrong = [words[name] for name in words if getattr(finding, name) is False]
        yield f"{finding.prompt!r}: {finding.problem or ', '.join(wrong) or 'nothing wrong'}"
        shown = finding.prompt + (finding.text or "")
        yield from (f"    {line}" for line in shown.splitlines())
    yield summary(findings)


def summary(findings: Sequence[Finding]) -> str:
    """The verdicts in one line."""
    facts = [f"of {len(findings)} texts"]
    verdicts: Mapping[str, str] = {
        "says_something": "say something",
        "printable": "are printable",
        "varied": "do not go in circles",
        "ends": f"end within {TOKENS} tokens",
    }
    for name, words in verdicts.items():
        facts.append(f"{sum(getattr(finding, name) is True for finding in findings)} {words}")
    code = [finding.parses for finding in findings if finding.parses is not None]
    if code:
        facts.append(f"{sum(code)} of {len(code)} are Python")
    failed = sum(finding.text is None for finding in findings)
    if failed:
        facts.append(f"{failed} could not be written")
    return f"{facts[0]} " + ", ".join(facts[1:])
