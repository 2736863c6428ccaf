"""Tokenizers in Hugging Face's format, a `tokenizer.json`: GPT-2's byte-level BPE and its kin.

What a token stands for is read from the file's decoder: the letters of GPT-2's alphabet are a byte each, or
tokens named <0x41> are. Where a file says neither, a token has no bytes of its own, and the file is refused.

Sources: Radford et al. 2019 (GPT-2's encoder.py, for the alphabet), the `tokenizers` library.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from albor import gguffile
from albor.data import tokenizer_json
from albor.data.tokenizer_file import read_tokenizer_file
from albor.errors import ConfigError, DataError, Problem

FILE = "tokenizer.json"
# What separates documents, as the models that are published call it; the first that a tokenizer has is taken.
_ENDS_OF_DOCUMENT = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<｜end▁of▁sentence｜>")
_BYTE_NAME = re.compile(r"<0x([0-9A-F]{2})>")
_MOST_IDS = 1 << 24


class HuggingFaceEncoder:
    """See `albor.data.tokenizer.Encoder`. `model` is the content of a tokenizer.json.

    Raises ValueError for one that is none, and DataError for one whose tokens are not bytes, or that has
    nothing to end documents with; ConfigError where the library is missing.
    """

    kind = "hf"

    def __init__(self, model: bytes):
        tokenizers = _library()
        self.model = model
        content = _parsed(model)
        try:
            self._tokenizer = tokenizers.Tokenizer.from_str(model.decode())
        except Exception as error:  # the library raises nothing narrower
            raise ValueError(str(error)) from error
        if (content.get("model") or {}).get("dropout"):
            raise DataError("its model has dropout, so that it would encode a text differently every time")
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        # A text that spells a control token is a text. Those that are not special are pieces, and stay.
        self._tokenizer.encode_special_tokens = True
        added = self._tokenizer.get_added_tokens_decoder()
        self.special_ids = {token.content: i for i, token in sorted(added.items()) if token.special}
        self.added = tuple(token.content for token in added.values() if not token.special)
        names = {i: name for name, i in self._tokenizer.get_vocab(with_added_tokens=True).items()}
        unspelled = {i: token.content for i, token in added.items()}  # in letters, whatever the decoder
        self.strings, self.byte_ids = _strings(names, unspelled, content.get("decoder"))
        for token in self.special_ids.values():
            self.strings[token] = b""
        # A vocabulary may lack bytes that its own text did not have: SmolLM2's has no U+0004. What stands for
        # them, where anything does, is the end of a document, which no text may yield.
        self._lacks_bytes = len(self.byte_ids) < 256
        self.end_of_document_id = self._find_end_of_document()

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of each text, on all cores. A byte that the vocabulary lacks is left out."""
        encoded = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        if not self._lacks_bytes:
            return [encoding.ids for encoding in encoded]
        special = frozenset(self.special_ids.values())
        return [[token for token in encoding.ids if token not in special] for encoding in encoded]

    def _find_end_of_document(self) -> int:
        for name in _ENDS_OF_DOCUMENT:
            if name in self.special_ids:
                return self.special_ids[name]
        raise DataError(f"it has no special token {' or '.join(_ENDS_OF_DOCUMENT)} to end documents with")


def read_tokenizer_json(path: Path) -> bytes:
    """The tokenizer.json that `path` means: that file, the one in that directory, or one that is made of a
    GGUF's metadata. Raises OSError, and DataError for what cannot be one.
    """
    if path.suffix.lower() == gguffile.SUFFIX:
        return tokenizer_json.of_gguf(path)
    if path.is_dir():
        path = path / FILE
        if not path.exists():
            raise DataError(f"there is no {FILE} in it")
    return read_tokenizer_file(path)


def _parsed(model: bytes) -> dict[str, Any]:
    try:
        content = json.loads(model)
    except RecursionError as error:
        raise ValueError("it is nested too deep") from error
    if not isinstance(content, dict):
        raise ValueError("it is no JSON object")
    return content


def byte_alphabet() -> dict[str, int]:
    """GPT-2's letters for the 256 bytes: printable ones stand for themselves, the others for U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    letters = {chr(byte): byte for byte in printable}
    return letters | {chr(0x100 + number): byte for number, byte in enumerate(others)}


def _strings(
    names: dict[int, str], added: dict[int, str], decoder: Any
) -> tuple[list[bytes], frozenset[int]]:
    """What each id stands for, nothing where there is no such id; and those that spell bytes that no other
    token covers, one for each byte.
    """
    parts = _decoders(decoder)
    kinds = [part.get("type") for part in parts]
    if max(names) >= _MOST_IDS:
        raise DataError(f"it has the id {max(names):,}")
    strings = [b""] * (max(names) + 1)
    for token, content in added.items():
        strings[token] = content.encode()
    rest = {token: name for token, name in names.items() if token not in added}
    single: dict[int, int] = {}
    if "ByteLevel" in kinds:
        alphabet = byte_alphabet()
        for token, name in rest.items():
            if not set(name) <= alphabet.keys():
                raise DataError(f"its token {name!r} is not spelled in GPT-2's alphabet of bytes")
            strings[token] = bytes(alphabet[letter] for letter in name)
            if len(name) == 1:
                single[alphabet[name]] = token
    elif "ByteFallback" in kinds:
        replaced = [part for part in parts if part.get("type") == "Replace"]
        if any("String" not in part["pattern"] for part in replaced):
            raise DataError("its decoder replaces by a pattern, after which a token has no bytes of its own")
        for token, name in rest.items():
            if match := _BYTE_NAME.fullmatch(name):
                single[int(match[1], 16)] = token
                strings[token] = bytes([int(match[1], 16)])
                continue
            for part in replaced:
                name = name.replace(part["pattern"]["String"], part["content"])
            strings[token] = name.encode()
    else:
        raise DataError(
            f"its decoder is {' and '.join(map(str, kinds)) or 'missing'}, which does not say what bytes a "
            "token is; a byte-level BPE, or one with byte fallback, would"
        )
    return strings, frozenset(single.values())


def _decoders(decoder: Any) -> list[dict[str, Any]]:
    if not decoder:
        return []
    return list(decoder["decoders"]) if decoder.get("type") == "Sequence" else [decoder]


def _library() -> Any:
    try:
        import tokenizers
    except ModuleNotFoundError as error:
        message = "hf needs the tokenizers library, which is not installed"
        raise ConfigError([Problem("tokenizer.kind", message, "run: pip install 'albor[hf]'")]) from error
    return tokenizers
