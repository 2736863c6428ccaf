"""An exported Hugging Face directory, read back by albor itself: the gate's way where transformers is not
installed. It shows that the files hold the run's weights and tokens, not that another program reads them so.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from albor.data.tokenizer import Kind, Tokenizer
from albor.errors import AlborError
from albor.export.format import open_source
from albor.export.gate import CORPUS
from albor.export.weights import hf_tensors
from albor.pretrained.source import open_pretrained


def read_back(run: Path, exported: Path) -> dict[str, Any]:
    """The rows of a gate, as `Gate.as_json` has them."""
    rows = []
    try:
        source, found = open_source(run, None), open_pretrained(exported)
        own = dict(hf_tensors(source.loaded.arena, source.architecture))
        wrong, seen = [], 0
        for name, tensor in found.weights.tensors():
            seen += 1
            if name not in own or not torch.equal(tensor, own[name].to(tensor.dtype)):
                wrong.append(name)
        equal = not wrong and seen == len(own)
        said = "equal" if equal else f"{len(wrong)} differ, {', '.join(wrong[:3])}; {seen} are there"
        rows.append(_row("weights", f"{len(own)} tensors", said, equal))
        rows.append(_compare_tokens(source.tokenizer, exported, found.tokenizer))
    except AlborError as error:
        rows.append(_row("loads", "", str(error), False))
    return {
        "passed": all(row["passed"] for row in rows),
        "runtime": "albor's own reader",
        "checks": rows,
        "unchecked": None,
    }


def _compare_tokens(own: Tokenizer, exported: Path, tokenizer: Path | None) -> dict[str, Any]:
    plain = exported / "tokenizer.model"  # the one that needs no other package
    kind: Kind = "sentencepiece" if plain.is_file() else "hf"
    path = plain if plain.is_file() else tokenizer
    if path is None:
        return _row("tokens of texts", "0 texts", "there is no tokenizer", False)
    read = Tokenizer.load(path, kind)
    same = all(list(read.encode(text)) == list(own.encode(text)) for text in CORPUS)
    return _row("tokens of texts", f"{len(CORPUS)} texts", "equal" if same else "they differ", same)


def _row(check: str, compared: str, found: str, passed: bool) -> dict[str, Any]:
    return {"check": check, "compared": compared, "found": found, "passed": passed}
