"""The eight zero-shot tasks: what a model is asked of a document, to the space, as lm-eval 0.4.13 asks it.

A document becomes requests, pairs of a context and a continuation, whose log-likelihoods the model gives;
the answer is the choice with the largest. Source: lm-eval's task files, written anew; docs/evaluation.md says
what each pair is.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from albor.errors import ConfigError, Problem
from albor.evaluate import items
from albor.evaluate.items import Document


@dataclass(frozen=True)
class Item:
    """One question."""

    requests: tuple[tuple[str, str], ...]  # (context, continuation), one per choice
    gold: int  # the right one's index
    lengths: tuple[
        int, ...
    ]  # the choices in characters, without the space in front: what acc_norm divides by


@dataclass(frozen=True)
class Task:
    """A benchmark. `metrics` are those that lm-eval reports for it."""

    name: str
    metrics: tuple[str, ...]
    read: Callable[[Path], list[Document]]
    ask: Callable[[Document], Item]

    def items(self, root: Path, limit: int | None) -> list[Item]:
        """The first `limit` questions, None: all, from the directory that `items.find_items` gives."""
        return [self.ask(document) for document in self.read(root)[:limit]]


def _choose(context: str, choices: Sequence[str], gold: int) -> Item:
    requests = tuple((context, f" {choice}") for choice in choices)
    return Item(requests, gold, tuple(len(choice) for choice in choices))


def _hellaswag(document: Document) -> Item:
    context = f"{document['activity_label']}: {document['ctx_a']} {document['ctx_b'].capitalize()}"
    endings = [_without_marks(ending) for ending in document["endings"]]
    return _choose(_without_marks(context), endings, int(document["label"]))


def _without_marks(text: str) -> str:
    """WikiHow's marks in brackets are no text."""
    return re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". ")).replace("  ", " ")


def _arc(document: Document) -> Item:
    choices = document["choices"]
    gold = choices["label"].index(document["answerKey"])
    return _choose(f"Question: {document['question']}\nAnswer:", choices["text"], gold)


def _openbookqa(document: Document) -> Item:
    choices = document["choices"]
    return _choose(
        document["question_stem"], choices["text"], choices["label"].index(document["answerKey"].lstrip())
    )


def _winogrande(document: Document) -> Item:
    """Partial evaluation: the sentence's end is scored, after its beginning with either name."""
    before, _, after = document["sentence"].partition("_")
    options = [document["option1"], document["option2"]]
    requests = tuple((before + option, f" {after.strip()}") for option in options)
    lengths = tuple(len(before + option) for option in options)
    return Item(requests, int(document["answer"]) - 1, lengths)


def _piqa(document: Document) -> Item:
    context = f"Question: {document['goal']}\nAnswer:"
    return _choose(context, [document["sol1"], document["sol2"]], document["label"])


def _boolq(document: Document) -> Item:
    context = f"{document['passage']}\nQuestion: {document['question']}?\nAnswer:"
    return _choose(context, ["no", "yes"], document["label"])


def _lambada(document: Document) -> Item:
    """The last word, which is right if it is the likeliest, token by token."""
    context, _, word = document["text"].rpartition(" ")
    return _choose(context, [word], 0)


_BOTH = ("acc", "acc_norm")
TASKS = {
    task.name: task
    for task in (
        Task("hellaswag", _BOTH, items.hellaswag, _hellaswag),
        Task("arc_easy", _BOTH, items.arc_easy, _arc),
        Task("arc_challenge", _BOTH, items.arc_challenge, _arc),
        Task("winogrande", ("acc",), items.winogrande, _winogrande),
        Task("piqa", _BOTH, items.piqa, _piqa),
        Task("boolq", ("acc",), items.boolq, _boolq),
        Task("openbookqa", _BOTH, items.openbookqa, _openbookqa),
        Task("lambada_openai", ("acc", "perplexity"), items.lambada, _lambada),
    )
}
CODE_TASKS = ("humaneval", "mbpp")


def find_tasks(given: str) -> list[str]:
    """The names in a list with commas; `all` is the eight zero-shot tasks. Raises ConfigError for others."""
    names: list[str] = []
    for name in (part.strip() for part in given.split(",")):
        names += TASKS if name == "all" else [name] if name else []
    known = [*TASKS, *CODE_TASKS]
    problems = []
    for name in dict.fromkeys(names):
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            remedy = f"did you mean {near[0]}?" if near else f"use all, {', '.join(known)}"
            problems.append(Problem("--tasks", f"there is no task {name}", remedy, "command line"))
    if not names:
        problems.append(Problem("--tasks", "names no task", f"use all, {', '.join(known)}", "command line"))
    if problems:
        raise ConfigError(problems)
    return list(dict.fromkeys(names))
