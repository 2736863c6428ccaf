"""HumanEval and MBPP: the model writes programs, and the problems' own tests say whether they are right.

A program counts as right if it came to the end of its tests, in isolation, and in no other case.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from albor.errors import ConfigError, Problem
from albor.evaluate import items
from albor.evaluate.items import Document
from albor.evaluate.metrics import Measured, mean, pass_at_k
from albor.evaluate.sandbox import Sandbox
from albor.evaluate.store import Scores
from albor.generate.generate import PromptTooLong, generate
from albor.generate.load import Loaded
from albor.model.decode import Decoder
from albor.seeds import derive_seed

_REPORTED = (1, 10, 100)  # the k of pass@k, as far as there are samples


@dataclass(frozen=True)
class CodeTask:
    """A benchmark of programming problems."""

    name: str
    read: Callable[[Path], list[Document]]
    prompt: Callable[[Document], str]
    program: Callable[[Document, str], str]  # with what the model wrote
    stop: tuple[str, ...]
    max_tokens: int


@dataclass(frozen=True)
class Sampling:
    """How many programs are written for a problem, and how."""

    samples: int
    temperature: float

    @classmethod
    def of(cls, samples: int, temperature: float | None) -> Sampling:
        """Without a temperature: 0 for one sample, else 0.8. Raises ConfigError where all would be alike."""
        if temperature is None:
            temperature = 0.0 if samples == 1 else 0.8
        if samples > 1 and temperature == 0:
            problem = f"is 0, so that all {samples} samples would be the same program"
            raise ConfigError([Problem("--temperature", problem, "use 0.2 to 0.8", "command line")])
        return cls(samples, temperature)


def _humaneval_program(document: Document, completion: str) -> str:
    return f"{document['prompt']}{completion}\n{document['test']}\ncheck({document['entry_point']})\n"


def _mbpp_prompt(document: Document) -> str:
    """The description and a test as a docstring, without examples (Fried et al. 2022, arXiv:2204.05999)."""
    return f'"""\n{document["text"]}\n{document["test_list"][0]}\n"""\n'


def _mbpp_program(document: Document, completion: str) -> str:
    return "\n".join([completion, document["test_setup_code"], *document["test_list"]]) + "\n"


CODE = {
    task.name: task
    for task in (
        CodeTask(
            "humaneval", items.humaneval, lambda document: str(document["prompt"]), _humaneval_program,
            ("\nclass", "\ndef", "\n#", "\nif", "\nprint"), 512,
        ),
        CodeTask(
            "mbpp", items.mbpp, _mbpp_prompt, _mbpp_program,
            ("\nclass", "\nassert", '\n"""', "\nprint", "\nif", "\n#"), 512,
        ),
    )
}  # fmt: skip


@dataclass(frozen=True)
class CodeScore:
    """What became of a model's programs."""

    metrics: dict[str, Measured]  # pass@k
    items: int
    outcomes: dict[str, int]  # of programs: passed, failed, timed out, prompt too long


def evaluate_code(
    loaded: Loaded,
    task: CodeTask,
    documents: list[Document],
    sampling: Sampling,
    sandbox: Sandbox,
    scores: Scores,
    on_program: Callable[[int, int], None],
) -> CodeScore:
    """Lets the model write each program that is not in `scores`, and runs its tests.

    A prompt that is longer than the context has failed, and is counted. `on_program` is called with the
    programs done and in all, and may raise; what is done is in `scores`.
    """
    decoder = Decoder(loaded.model, loaded.arena)
    total = len(documents) * sampling.samples
    for number in range(total):
        on_program(number, total)
        if number not in scores.found:
            index, sample = divmod(number, sampling.samples)
            entry = _attempt(decoder, loaded, task, documents[index], sample, sampling, sandbox)
            scores.found[number] = {"n": number, **entry}
            scores.add([scores.found[number]])
    on_program(total, total)
    return _summary([scores.found[number]["verdict"] for number in range(total)], sampling.samples)


def _attempt(
    decoder: Decoder,
    loaded: Loaded,
    task: CodeTask,
    document: Document,
    sample: int,
    sampling: Sampling,
    sandbox: Sandbox,
) -> dict[str, Any]:
    """One program and what became of it."""
    name = document["task_id"]
    try:
        written = generate(
            decoder,
            loaded.tokenizer,
            task.prompt(document),
            max_tokens=task.max_tokens,
            temperature=sampling.temperature,
            top_p=0.95 if sampling.temperature else None,
            stop=task.stop,
            seed=derive_seed(0, task.name, str(name), sample),
        )
    except PromptTooLong:
        return {"problem": name, "sample": sample, "verdict": "prompt too long"}
    verdict = sandbox.run(task.program(document, written.text))
    return {"problem": name, "sample": sample, "verdict": verdict, "text": written.text}


def _summary(verdicts: list[str], samples: int) -> CodeScore:
    passed = [
        sum(verdict == "passed" for verdict in verdicts[start : start + samples])
        for start in range(0, len(verdicts), samples)
    ]
    metrics = {
        f"pass@{k}": mean([pass_at_k(samples, count, k) for count in passed])
        for k in _REPORTED
        if k <= samples
    }
    return CodeScore(metrics, len(passed), dict(sorted(Counter(verdicts).items())))
