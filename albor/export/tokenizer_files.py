"""The tokenizer's files in a Hugging Face directory, which transformers, MLX and vLLM read.

A tokenizer that was trained here becomes a `tokenizer.json` of the same tokens for every text; one that came
as a `tokenizer.json` stays as it is. `tokenizer.model` lies beside the former for llama.cpp's converter.

In a text that transformers encodes, `<|im_end|>` is the control token unless `split_special_tokens=True`; in
albor a text never yields one. What a stranger typed is to be encoded with that.
"""

from __future__ import annotations

import json
from importlib import resources
from pathlib import Path
from typing import Any

from albor.data import sentencepiece_model as model_file
from albor.data import tokenizer_json
from albor.data.sentencepiece_encoder import SentencePieceEncoder
from albor.data.tokenizer import CHAT_MARKERS, FILES, Tokenizer
from albor.data.tokenizer_json import KINDS, Piece
from albor.durable import write_file
from albor.errors import DataError
from albor.export.format import CannotCarry

CHAT_TEMPLATE = resources.files("albor.export").joinpath("chat_template.jinja").read_text(encoding="utf-8")


def hf_tokenizer_json(tokenizer: Tokenizer) -> bytes:
    """The content of a tokenizer.json that encodes every text as `tokenizer` does.

    Raises CannotCarry for a SentencePiece model that is no BPE, or that has pieces of the user's own.
    """
    encoder = tokenizer.encoder
    if not isinstance(encoder, SentencePieceEncoder):
        return tokenizer.model
    if model_file.model_type(tokenizer.model) != model_file.BPE:
        raise CannotCarry("the tokenizer is a SentencePiece model that is no BPE; only a BPE is exported")
    kinds = [KINDS[number] for number in model_file.piece_types(tokenizer.model)]
    try:
        return tokenizer_json.of_pieces(
            [Piece(text, score, kind) for (text, score), kind in zip(encoder.pieces(), kinds, strict=True)]
        )
    except DataError as error:
        raise CannotCarry(f"the tokenizer cannot be a tokenizer.json: {error}") from error


def write_tokenizer_files(tokenizer: Tokenizer, directory: Path, model_max_length: int) -> None:
    """Writes tokenizer.json, tokenizer_config.json, special_tokens_map.json and, where the tokenizer has a
    chat's markers, chat_template.jinja into `directory`; tokenizer.model too, where there is one.

    `model_max_length` is in tokens. Nothing is put in front of a text by itself: albor's documents begin with
    the end-of-document token, and whoever wants that in front asks for `bos_token`. Raises CannotCarry and
    OSError.
    """
    tokenizer_file = hf_tokenizer_json(tokenizer)
    write_file(directory / FILES["hf"], tokenizer_file)
    if tokenizer.kind == "sentencepiece":
        write_file(directory / FILES["sentencepiece"], tokenizer.model)
    names = {token: name for name, token in tokenizer.special_ids.items()}
    end = names[tokenizer.end_of_document_id]
    roles: dict[str, Any] = {"bos_token": end, "eos_token": end, "pad_token": end}
    if tokenizer.can_chat:
        roles["additional_special_tokens"] = [marker for marker in CHAT_MARKERS if marker != end]
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "added_tokens_decoder": {
            str(entry.pop("id")): entry for entry in json.loads(tokenizer_file)["added_tokens"]
        },
        **roles,
        "add_bos_token": False,
        "add_eos_token": False,
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,  # it would take spaces away when decoding
        "model_max_length": model_max_length,
    }
    if tokenizer.can_chat:
        # Here for what reads no jinja file: transformers 4, llama.cpp's converter.
        config["chat_template"] = CHAT_TEMPLATE
        write_file(directory / "chat_template.jinja", CHAT_TEMPLATE.encode())
    for name, content in (("tokenizer_config.json", config), ("special_tokens_map.json", roles)):
        text = json.dumps(content, ensure_ascii=False, indent=2) + "\n"
        write_file(directory / name, text.encode())
