"""Tensor files: readable by others, equal bytes for equal tensors, and nothing accepted that does not fit."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from albor.errors import CheckpointError
from albor.tensorfile import TensorSpec, read_tensors_into, tensor_specs, write_tensors


def _tensors() -> dict[str, torch.Tensor]:
    """Views of one storage as in an arena, every supported dtype, a scalar, an empty and a strided tensor."""
    generator = torch.Generator().manual_seed(0)
    arena = torch.randn(1000, generator=generator)
    tensors = {
        "block.1.weight": arena[:600].view(20, 30),
        "block.0.weight": arena[600:].view(-1, 4),
        "bf16": torch.randn(7, 3, generator=generator).bfloat16(),
        "strided": torch.randn(5, 9, generator=generator).t(),
        "scalar": torch.tensor(3.5, dtype=torch.float64),
        "empty": torch.empty(0, 4),
    }
    for dtype in (torch.float16, torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool):
        tensors[str(dtype)] = torch.randn(11, generator=generator).mul(3).abs().to(dtype)
    return tensors


def _same_bits(left: torch.Tensor, right: torch.Tensor) -> bool:
    as_bytes = [t.contiguous().reshape(-1).view(torch.uint8) for t in (left, right)]
    return left.dtype == right.dtype and left.shape == right.shape and torch.equal(*as_bytes)


def test_safetensors_reads_what_was_written(tmp_path: Path) -> None:
    tensors = _tensors()
    write_tensors(tmp_path / "t.safetensors", tensors)
    loaded = load_file(tmp_path / "t.safetensors")
    assert loaded.keys() == tensors.keys()
    assert all(_same_bits(loaded[name], tensor) for name, tensor in tensors.items())


def test_special_values_keep_their_bits(tmp_path: Path) -> None:
    bits = torch.tensor(
        [0x7FC0, 0x7F81, 0x7F80, -0x80, -0x8000, 1], dtype=torch.int16
    )  # NaNs, inf, -0.0, subnormal
    write_tensors(tmp_path / "t.safetensors", {"x": bits.view(torch.bfloat16)})
    target = torch.zeros(6, dtype=torch.bfloat16)
    read_tensors_into(tmp_path / "t.safetensors", {"x": target})
    assert torch.equal(target.view(torch.int16), bits)


def test_record_describes_the_bytes_on_disk(tmp_path: Path) -> None:
    record = write_tensors(tmp_path / "t.safetensors", _tensors())
    content = (tmp_path / "t.safetensors").read_bytes()
    assert record.size == len(content)
    assert record.sha256 == hashlib.sha256(content).hexdigest()


def test_equal_tensors_are_equal_bytes_whatever_their_order(tmp_path: Path) -> None:
    tensors = _tensors()
    first = write_tensors(tmp_path / "a.safetensors", tensors)
    copies = {name: tensor.clone() for name, tensor in reversed(tensors.items())}
    assert write_tensors(tmp_path / "b.safetensors", copies) == first


def test_every_tensor_is_aligned_to_its_own_size(tmp_path: Path) -> None:
    write_tensors(tmp_path / "t.safetensors", _tensors())
    content = (tmp_path / "t.safetensors").read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    tensors = _tensors()
    for name in tensors:
        assert (8 + length + header[name]["data_offsets"][0]) % tensors[name].element_size() == 0


def test_a_large_tensor_is_written_from_its_own_memory(tmp_path: Path) -> None:
    tensor = torch.arange(3_000_000, dtype=torch.float32)  # several chunks
    write_tensors(tmp_path / "t.safetensors", {"x": tensor})
    target = torch.zeros_like(tensor)
    read_tensors_into(tmp_path / "t.safetensors", {"x": target})
    assert torch.equal(target, tensor)


def test_reading_fills_the_given_views(tmp_path: Path) -> None:
    tensors = _tensors()
    record = write_tensors(tmp_path / "t.safetensors", tensors)
    arena = torch.full((1000,), torch.nan)
    views = {name: torch.zeros(tensor.shape, dtype=tensor.dtype) for name, tensor in tensors.items()}
    views["block.1.weight"] = arena[400:].view(20, 30)
    views["block.0.weight"] = arena[:400].view(-1, 4)
    assert read_tensors_into(tmp_path / "t.safetensors", views) == record, (
        "what was read is not what is there"
    )
    assert all(_same_bits(views[name], tensor) for name, tensor in tensors.items())
    assert not arena.isnan().any()


def test_every_difference_is_listed_and_nothing_is_filled(tmp_path: Path) -> None:
    path = tmp_path / "t.safetensors"
    good = torch.ones(2)
    write_tensors(path, {"a": good, "b": good, "c": good, "extra": good})
    targets = {"a": torch.zeros(2), "b": torch.zeros(1, 2), "c": torch.zeros(2).bfloat16(), "absent": good}
    with pytest.raises(CheckpointError) as caught:
        read_tensors_into(path, targets)
    message = str(caught.value)
    assert "absent is missing (F32 [2] expected)" in message
    assert "extra is not expected (F32 [2])" in message
    assert "b is F32 [2], expected F32 [1, 2]" in message
    assert "c is F32 [2], expected BF16 [2]" in message
    assert not targets["a"].any()


def test_specs_list_what_the_file_holds(tmp_path: Path) -> None:
    write_tensors(tmp_path / "t.safetensors", {"w": torch.zeros(2, 3).bfloat16(), "n": torch.tensor(1)})
    assert tensor_specs(tmp_path / "t.safetensors") == {
        "n": TensorSpec("I64", ()),
        "w": TensorSpec("BF16", (2, 3)),
    }


def _entry(dtype: str, shape: list[int], start: int, end: int) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


def _file(header: dict[str, object] | bytes, body: int, length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + bytes(body)


HOSTILE = {
    "empty file": b"",
    "header longer than the file": _file(b"{}", 0, length=1 << 40),
    "header longer than a header may be": _file(b"{" + b" " * 1000, 0, length=200_000_000),
    "header is no JSON": _file(b'{"a":', 0),
    "overlapping tensors": _file({"a": _entry("F32", [2], 0, 8), "b": _entry("F32", [2], 4, 12)}, 12),
    "hole between tensors": _file({"a": _entry("F32", [2], 0, 8), "b": _entry("F32", [2], 12, 20)}, 20),
    "unknown dtype": _file({"a": _entry("Z32", [2], 0, 8)}, 8),
    "shape larger than the data": _file({"a": _entry("F32", [1 << 40], 0, 8)}, 8),
    "shape that overflows": _file({"a": _entry("F32", [1 << 62, 1 << 62], 0, 8)}, 8),
    "negative offset": _file({"a": _entry("F32", [2], -8, 0)}, 8),
    "data cut off": _file({"a": _entry("F32", [2], 0, 8)}, 4),
    "data left over": _file({"a": _entry("F32", [2], 0, 8)}, 12),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_file_is_refused(tmp_path: Path, name: str) -> None:
    path = tmp_path / "t.safetensors"
    path.write_bytes(HOSTILE[name])
    with pytest.raises(CheckpointError, match=r"t\.safetensors"):
        read_tensors_into(path, {"a": torch.zeros(2)})


def test_a_missing_file_and_a_directory_are_refused(tmp_path: Path) -> None:
    for path in (tmp_path / "absent.safetensors", tmp_path):
        with pytest.raises(CheckpointError):
            tensor_specs(path)
