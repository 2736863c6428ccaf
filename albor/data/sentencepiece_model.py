"""What a SentencePiece model file says that its library does not: the kind of model, and of each piece.

The file is a protocol buffer (sentencepiece_model.proto); of it only these two are read, so that no library
for such buffers is needed.
"""

from __future__ import annotations

from collections.abc import Iterator

# The numbers are those of sentencepiece_model.proto, and llama.cpp's of its token types.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
BPE = 2

_PIECES, _TRAINER = 1, 2  # fields of ModelProto
_PIECE_TYPE = 3  # of SentencePiece
_MODEL_TYPE, _UNIGRAM = 3, 1  # of TrainerSpec, and what it is where the file does not say
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_FIXED = {_FIXED64: 8, _FIXED32: 4}


def piece_types(model: bytes) -> list[int]:
    """The type of each piece, NORMAL to BYTE. `model` is a file that SentencePiece has loaded."""
    pieces = (value for field, value in _fields(model) if field == _PIECES and isinstance(value, bytes))
    return [_number(piece, _PIECE_TYPE, NORMAL) for piece in pieces]


def model_type(model: bytes) -> int:
    """BPE or another number of TrainerSpec.ModelType. `model` is a file that SentencePiece has loaded."""
    trainer = [value for field, value in _fields(model) if field == _TRAINER and isinstance(value, bytes)]
    return _number(b"".join(trainer), _MODEL_TYPE, _UNIGRAM)


def _number(message: bytes, wanted: int, default: int) -> int:
    """The last value of this field, which is the one that counts."""
    values = [value for field, value in _fields(message) if field == wanted and isinstance(value, int)]
    return values[-1] if values else default


def _fields(message: bytes) -> Iterator[tuple[int, int | bytes]]:
    """(field number, value) of a protocol buffer: an integer, or the bytes of what is not one."""
    position = 0
    while position < len(message):
        key, position = _varint(message, position)
        field, kind = key >> 3, key & 7
        if kind == _VARINT:
            value, position = _varint(message, position)
            yield field, value
            continue
        if kind == _BYTES:
            size, position = _varint(message, position)
        elif kind in _FIXED:
            size = _FIXED[kind]
        else:
            raise ValueError(f"wire type {kind} in a SentencePiece model")
        yield field, message[position : position + size]
        position += size


def _varint(message: bytes, position: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = message[position]
        value |= (byte & 0x7F) << shift
        position, shift = position + 1, shift + 7
        if byte < 0x80:
            return value, position
