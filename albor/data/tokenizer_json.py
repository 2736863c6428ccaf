"""Vocabularies from elsewhere as a `tokenizer.json`: SentencePiece's pieces, and a GGUF's metadata."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from albor.errors import DataError
from albor.gguffile import GGUFFile

_SPACE_MARK = "\u2581"  # how SentencePiece writes a space
PieceKind = Literal["normal", "unknown", "control", "user_defined", "unused", "byte"]
# llama.cpp's token types are SentencePiece's.
KINDS: dict[int, PieceKind] = {
    1: "normal", 2: "unknown", 3: "control", 4: "user_defined", 5: "unused", 6: "byte",
}  # fmt: skip


class Piece(NamedTuple):
    """An entry of a SentencePiece vocabulary; of two merges the one with the higher score comes first."""

    text: str  # a space is U+2581, a byte "<0x41>"
    score: float
    kind: PieceKind


def _byte_level(*before: dict[str, Any], use_regex: bool = True) -> dict[str, Any]:
    last = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": use_regex}
    return {"type": "Sequence", "pretokenizers": [*before, last]} if before else last


_LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
_SPLIT_LLAMA_3 = {"type": "Split", "pattern": {"Regex": _LLAMA_3}, "behavior": "Isolated", "invert": False}
# What cuts a text before its bytes are merged, by the name that GGUF has for it (tokenizer.ggml.pre).
PRESETS: dict[str, dict[str, Any]] = {
    "gpt-2": _byte_level(),
    "smollm": _byte_level({"type": "Digits", "individual_digits": True}),
    "llama-bpe": _byte_level(_SPLIT_LLAMA_3, use_regex=False),
}


def of_pieces(pieces: Sequence[Piece]) -> bytes:
    """A tokenizer.json that encodes every text as albor does with these `pieces` of a BPE with byte fallback.

    Spaces are spaces in it, not U+2581: nothing has to be replaced, and a U+2581 in a text stays one, in its
    three bytes. SentencePiece merges two symbols wherever their join is a piece, so each of a piece's cuts
    into two pieces is a merge, and ranks as the piece's score does. Raises DataError for pieces that such a
    file has no way to say.
    """
    vocabulary = {piece.text: token for token, piece in enumerate(pieces)}
    normal = {}
    for token, piece in enumerate(pieces):
        if piece.kind in ("user_defined", "unused"):
            raise DataError(f"its piece {piece.text!r} is {piece.kind.replace('_', ' ')}")
        if piece.kind == "normal":
            del vocabulary[piece.text]
            text = piece.text.replace(_SPACE_MARK, " ")
            vocabulary[text], normal[text] = token, piece.score
    if len(vocabulary) != len(pieces):
        raise DataError("two of its pieces are spelled alike")
    merges = [
        (-score, vocabulary[text], (text[:cut], text[cut:]))
        for text, score in normal.items()
        for cut in range(1, len(text))
        if text[:cut] in normal and text[cut:] in normal
    ]
    merges.sort()
    # No piece goes on behind a line end, so lines can be encoded one by one, which is faster.
    by_line = not any("\n" in text[:-1] for text in normal)
    split = {"type": "Split", "pattern": {"String": "\n"}, "behavior": "MergedWithPrevious", "invert": False}
    return _content(
        vocabulary,
        [pair for _, _, pair in merges],
        {piece.text: token for token, piece in enumerate(pieces) if piece.kind == "control"},
        pre_tokenizer=split if by_line else None,
        decoder={"type": "Sequence", "decoders": [{"type": "ByteFallback"}, {"type": "Fuse"}]},
        byte_fallback=True,
    )


def of_gguf(path: Path) -> bytes:
    """The tokenizer.json of the tokenizer that the GGUF at `path` has in its metadata.

    Raises DataError for one that it has no exact equivalent of.
    """
    file = GGUFFile(path, "tokenizer.path")
    model, tokens = file.need("tokenizer.ggml.model"), file.need("tokenizer.ggml.tokens")
    types = file.get("tokenizer.ggml.token_type", [1] * len(tokens))
    kinds = [KINDS[number] for number in types if number in KINDS]
    if not len(kinds) == len(types) == len(tokens):
        raise DataError(f"{path}: tokenizer.ggml.token_type does not fit tokenizer.ggml.tokens")
    if model == "llama":
        if file.get("tokenizer.ggml.add_space_prefix", True):
            raise DataError("it puts a space in front of every text (tokenizer.ggml.add_space_prefix)")
        scores = file.need("tokenizer.ggml.scores")
        return of_pieces([Piece(*entry) for entry in zip(tokens, scores, kinds, strict=True)])
    if model != "gpt2":
        raise DataError(f"its tokenizer.ggml.model is {model!r}; albor reads 'gpt2' and 'llama'")
    pre = file.get("tokenizer.ggml.pre")
    if pre not in PRESETS:
        known = ", ".join(PRESETS)
        raise DataError(
            f"its tokenizer.ggml.pre is {pre!r}, and albor knows {known}; give the model's tokenizer.json"
        )
    merges = [tuple(merge.split(" ", 1)) for merge in file.need("tokenizer.ggml.merges")]
    return _content(
        {token: number for number, token in enumerate(tokens)},
        merges,
        {token: n for n, token in enumerate(tokens) if kinds[n] == "control"},
        {token: n for n, token in enumerate(tokens) if kinds[n] == "user_defined"},
        pre_tokenizer=PRESETS[pre],
        decoder=_byte_level(),
        ignore_merges=pre == "llama-bpe",
    )


def _content(
    vocabulary: Mapping[str, int],
    merges: Iterable[tuple[str, ...]],
    special: Mapping[str, int],
    added: Mapping[str, int] | None = None,
    *,
    pre_tokenizer: dict[str, Any] | None,
    decoder: dict[str, Any],
    byte_fallback: bool = False,
    ignore_merges: bool = False,
) -> bytes:
    tokens = [(token, text, True) for text, token in special.items()]
    tokens += [(token, text, False) for text, token in (added or {}).items()]
    content = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [_added_token(*token) for token in sorted(tokens)],
        "normalizer": None,
        "pre_tokenizer": pre_tokenizer,
        "post_processor": None,
        "decoder": decoder,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,  # every byte has a token
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": byte_fallback,
            "ignore_merges": ignore_merges,
            "vocab": vocabulary,
            "merges": list(merges),
        },
    }
    return (json.dumps(content, ensure_ascii=False, indent=1) + "\n").encode()


def _added_token(token: int, text: str, special: bool) -> dict[str, Any]:
    """An entry of `added_tokens`: a token that is found in a text as it stands."""
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": special}
    return {"id": token, "content": text, **flags}
