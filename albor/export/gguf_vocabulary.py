"""A tokenizer as a GGUF file carries it, so that llama.cpp cuts a text as albor does.

A SentencePiece model of the BPE kind is llama.cpp's `llama` model: pieces, scores and types are taken over as
they are. llama.cpp looks a merged piece up by its text alone, whatever its type; so where pieces of the
vocabulary could be put together to the name of a control token, a text that spells it would become that
token. Such a vocabulary is refused.

A byte-level BPE, as tokenizer.json files have it, is the `gpt2` model: letters of GPT-2's alphabet of bytes,
and merges. What cuts a text before it is merged is only named in the file, and built into llama.cpp; so it
must be one of those that are known to be the same.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

from albor.data.sentencepiece_encoder import SentencePieceEncoder
from albor.data.sentencepiece_model import (
    BPE,
    CONTROL,
    NORMAL,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
    model_type,
    piece_types,
)
from albor.data.tokenizer import TURN_END, Tokenizer
from albor.data.tokenizer_json import PRESETS
from albor.export.format import CannotCarry

_SPACE_MARK = "\u2581"
_FLAGS = {
    # A text follows the end of another document, as in training and in `albor generate`.
    "add_bos_token": True,
    "add_eos_token": False,
    "add_space_prefix": False,
}


@dataclass(frozen=True)
class Vocabulary:
    """The keys `tokenizer.ggml.*` of a file; lists have one entry per token of the model."""

    model: str
    pre: str
    tokens: list[str]
    types: list[int]
    scores: list[float] = field(default_factory=list)
    merges: list[str] = field(default_factory=list)
    ids: dict[str, int] = field(default_factory=dict)  # bos, eos, eot, ...
    flags: dict[str, bool] = field(default_factory=dict)  # add_bos_token, ...

    @property
    def suppressed(self) -> list[int]:
        """Ids that stand for nothing, and so are never to be written, however likely they are."""
        return [i for i, kind in enumerate(self.types) if kind == UNUSED]


def vocabulary(tokenizer: Tokenizer, size: int) -> Vocabulary:
    """The vocabulary for a model of `size` tokens; ids beyond the tokenizer's are there, and unused.

    Raises CannotCarry for what llama.cpp has no way to read.
    """
    if isinstance(tokenizer.encoder, SentencePieceEncoder):
        return _sentencepiece(tokenizer, tokenizer.encoder, size)
    return _byte_level(tokenizer, size)


def _sentencepiece(tokenizer: Tokenizer, encoder: SentencePieceEncoder, size: int) -> Vocabulary:
    if model_type(tokenizer.model) != BPE:
        raise CannotCarry(
            "GGUF carries SentencePiece models of the BPE kind, and this tokenizer is of another; train one, "
            "or export with --to hf"
        )
    types = piece_types(tokenizer.model)
    tokens, scores = map(list, zip(*encoder.pieces(), strict=True))
    for i, kind in enumerate(types):
        if kind != USER_DEFINED:
            continue
        if " " in tokens[i]:  # SentencePiece looks for them behind marking spaces, and never finds this one
            types[i] = UNUSED
        else:  # llama.cpp looks before
            tokens[i] = tokens[i].replace(_SPACE_MARK, " ")
    added = range(len(types), size)
    tokens += [_unused(i) for i in added]
    types += [UNUSED for _ in added]
    _check_names(tokens, types)
    ids = _ids(tokenizer)
    if UNKNOWN in types:
        ids["unknown"] = types.index(UNKNOWN)
    return Vocabulary(
        model="llama",
        pre="default",
        tokens=tokens,
        types=types,
        scores=scores + [0.0 for _ in added],
        ids=ids,
        flags=_FLAGS | {"remove_extra_whitespaces": False},
    )


def _byte_level(tokenizer: Tokenizer, size: int) -> Vocabulary:
    content = json.loads(tokenizer.model)
    model = content["model"]
    pre = _preset(content)
    tokens, types = [_unused(i) for i in range(size)], [UNUSED] * size
    for text, i in model["vocab"].items():
        tokens[i], types[i] = text, NORMAL
    for added in content.get("added_tokens") or []:
        if any(added.get(flag) for flag in ("single_word", "lstrip", "rstrip")) and not added["special"]:
            raise CannotCarry(
                f"GGUF has no way to say where the added token {added['content']!r} may stand; export with "
                "--to hf"
            )
        tokens[added["id"]] = added["content"]
        types[added["id"]] = CONTROL if added["special"] else USER_DEFINED
    merges = [merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"]]
    spelled = {"".join(merge) for merge in merges} & tokenizer.special_ids.keys()
    if spelled:
        raise CannotCarry(
            f"llama.cpp would take the text {min(spelled)} for the token of that name, because this "
            "tokenizer merges to it; export with --to hf"
        )
    return Vocabulary(
        model="gpt2",
        pre=pre,
        tokens=tokens,
        types=types,
        merges=[" ".join(merge) for merge in merges],
        ids=_ids(tokenizer),
        flags=_FLAGS,
    )


def _preset(content: dict[str, Any]) -> str:
    """What llama.cpp calls the way in which this tokenizer.json cuts a text."""
    model, normalizer = content["model"], content.get("normalizer") or {}
    plain = model["type"] == "BPE" and not normalizer.get("normalizers", normalizer)
    for option in ("byte_fallback", "continuing_subword_prefix", "end_of_word_suffix"):
        plain = plain and not model.get(option)
    cuts = _essence(content.get("pre_tokenizer"))
    for name, preset in PRESETS.items():
        # llama.cpp takes a whole word that is a token without merging it where Llama 3 does.
        whole_words = bool(model.get("ignore_merges")) == (name == "llama-bpe")
        if plain and whole_words and cuts == _essence(preset):
            return name
    raise CannotCarry(
        f"llama.cpp has its ways to cut a text built in, and of those albor knows {', '.join(PRESETS)}; this "
        "tokenizer has another, or is no byte-level BPE; export with --to hf"
    )


def _essence(pre_tokenizer: dict[str, Any] | None) -> list[dict[str, Any]]:
    """Its parts in order, without what makes no difference to the tokens."""
    parts = (pre_tokenizer or {}).get("pretokenizers", [pre_tokenizer])
    defaults = {"ByteLevel": {"use_regex": True}, "Split": {"invert": False}}
    return [
        {
            key: value
            for key, value in (defaults.get(part["type"], {}) | part).items()
            if key != "trim_offsets"
        }
        for part in parts
        if part
    ]


def _unused(token: int) -> str:
    return f"[PAD{token}]"  # as llama.cpp's own converter names them


def _ids(tokenizer: Tokenizer) -> dict[str, int]:
    """What ends a document also begins one; the end of a turn, where there are turns, ends a text too."""
    end = tokenizer.end_of_document_id
    ids = {"bos": end, "eos": end, "padding": end}
    if TURN_END in tokenizer.special_ids:
        ids["eot"] = tokenizer.special_ids[TURN_END]
    return ids


def _check_names(tokens: list[str], types: list[int]) -> None:
    known = set(tokens)
    for text, kind in zip(tokens, types, strict=True):
        if kind in (NORMAL, USER_DEFINED):
            continue
        for cut in range(1, len(text)):
            if all(len(half) == 1 or half in known for half in (text[:cut], text[cut:])):
                raise CannotCarry(
                    f"llama.cpp would take the text {text} for the token of that name, because this "
                    f"vocabulary has {text[:cut]!r} and {text[cut:]!r}; export with --to hf"
                )
