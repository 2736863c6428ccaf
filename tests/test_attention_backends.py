"""`train.attention`: what is refused, what `auto` chooses and says, what a library's attention takes beside
the arena, and that the calls to it mean what the project's own attention means.

No library computes here: theirs runs on CUDA only. The calls are checked against PyTorch's own signatures and
shapes (device "meta") and answered in float64; on a GPU test_gpu_attention.py has the real ones.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers import make_batches, make_config, make_trainer, trainer_over
from kernel_cases import DEVICE
from run_cases import call, write_project

from albor.architecture import Architecture
from albor.config import check_algebra
from albor.configfile import load_config
from albor.errors import AlborError, ConfigError
from albor.memory import attention as table
from albor.memory.arena import Arena
from albor.memory.attention import AttentionChoice, Measurement, choose_attention
from albor.memory.attention_bytes import pool_bytes, temporaries
from albor.memory.cards import Gpu, Hardware
from albor.memory.estimate import Estimate, estimate
from albor.memory.outside import outside
from albor.memory.plan import plan_inference, plan_training
from albor.ops import TorchOps, library_attention, make_ops
from albor.ops.library_attention import deterministic_algorithms
from albor.ops.triton_ops import TritonOps
from albor.train.step import TrainState

ROOT = Path(__file__).parents[1]
MIB = 2**20
HOPPER = (9, 0)
# Heads of 8 columns, which every backend takes; a sequence that is no multiple of anything.
SHAPE = {"hidden_size": 32, "precision": "bf16", "sequence_length": 11}


def script() -> Any:
    """benchmarks/attention.py as a module."""
    spec = spec_from_file_location("measure_attention", ROOT / "benchmarks" / "attention.py")
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules.setdefault("measure_attention", module_from_spec(spec))
    if not hasattr(module, "main"):
        spec.loader.exec_module(module)
    return module


# What is refused


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"attention": "cudnn"}, "adds in any order, and train.deterministic is true; use auto or flash"),
        ({"attention": "cudnn", "document_mask": True, "deterministic": False}, "attends across documents"),
        ({"attention": "flash", "document_mask": True}, "attends across documents"),
        ({"attention": "flash", "precision": "fp32"}, "computes in bf16 or fp16"),
        ({"attention": "cudnn", "precision": "fp32", "deterministic": False}, "computes in bf16 or fp16"),
        ({"attention": "flash", "hidden_size": 24}, "8, 16, 24, ... 192 columns, and here they have 6"),
        ({"attention": "flash", "hidden_size": 800}, "8, 16, 24, ... 192 columns, and here they have 200"),
        ({"attention": "cudnn", "hidden_size": 544, "deterministic": False}, "... 128 columns"),
        ({"attention": "cudnn", "sequence_length": 1, "deterministic": False}, "one key alone"),
    ],
)
def test_what_a_library_does_not_do_is_refused(keys: dict[str, Any], message: str):
    (problem,) = check_algebra(make_config(**SHAPE | keys))
    assert problem.key == "train.attention"
    assert message in str(problem)
    assert "use auto" in problem.remedy


@pytest.mark.parametrize(
    "keys",
    [
        {},
        {"attention": "triton", "document_mask": True, "precision": "fp32", "hidden_size": 24},
        {"attention": "flash"},
        {"attention": "flash", "hidden_size": 768, "precision": "fp16", "sequence_length": 1},
        {"attention": "cudnn", "deterministic": False, "hidden_size": 512},
        {"deterministic": False},
    ],
)
def test_what_it_does_is_not(keys: dict[str, Any]):
    assert check_algebra(make_config(**SHAPE | keys)) == []


def test_everything_is_refused_at_once_with_its_line(tmp_path: Path):
    config = write_project(tmp_path)
    text = config.read_text().replace("train: {", "train: {attention: cudnn, ")
    config.write_text(text.replace("data:\n", "data:\n  document_mask: true\n"))
    with pytest.raises(ConfigError) as refusal:
        load_config(config)
    lines = str(refusal.value).splitlines()
    (number,) = (n for n, line in enumerate(config.read_text().splitlines(), 1) if "cudnn" in line)
    assert len(lines) == 4
    assert all(line.startswith(f"{config}:{number}: train.attention: ") for line in lines)
    for words in ("device is cpu; use auto", "train.deterministic", "data.document_mask", "train.precision"):
        assert sum(words in line for line in lines) == 1


@pytest.mark.parametrize("backend", ["triton", "flash"])
def test_a_gpu_that_is_not_there_is_not_replaced_by_the_cpu(
    backend: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("albor.memory.devices.installed_gpu", lambda: None)
    monkeypatch.chdir(tmp_path)
    config = write_project(tmp_path)
    keys = ("device=auto", "train.precision=bf16", f"train.attention={backend}")
    result = call("train", config, *keys)
    assert result.code == 2
    assert f"train.attention: {backend} needs a GPU, and there is none here; use auto" in result.err
    assert not (tmp_path / "runs").exists()
    assert call("train", config, "device=auto", "train.attention=auto", "--dry-run").code == 0


def test_an_old_card_is_refused_to_a_library():
    config = make_config(**SHAPE, attention="flash")
    with pytest.raises(ConfigError, match="flash needs sm_80 or later, and the card is sm_75; use auto"):
        choose_attention(config, "cuda", (7, 5))
    assert choose_attention(config, "cuda", (8, 0)).backend == "flash"
    assert choose_attention(config, "cuda", None).backend == "flash"
    assert choose_attention(make_config(**SHAPE, attention="triton"), "cuda", (7, 5)).backend == "triton"


# What `auto` chooses


def row(seconds: dict[str, float], **keys: Any) -> Measurement:
    values = {
        "capability": 90, "head_dim": 8, "heads": 4, "kv_heads": 2, "length": 11, "batch": 2,
        "deterministic": True, "device": "a card", "torch": "2.13.0", "triton": "3.7.1",
    }  # fmt: skip
    return Measurement(**values | keys, seconds=seconds)


FASTER = {"triton": 1.04, "flash": 1.0}
SLOWER = {"triton": 1.0, "flash": 1.25}


@pytest.fixture
def rows(monkeypatch: pytest.MonkeyPatch) -> list[Measurement]:
    """What the table holds in this test."""
    content: list[Measurement] = []
    monkeypatch.setattr(table, "read_table", lambda: content)
    return content


def chosen(capability: tuple[int, int] | None = HOPPER, device: str = "cuda", **keys: Any) -> AttentionChoice:
    return choose_attention(make_config(**SHAPE | keys), device, capability)  # type: ignore[arg-type]


def test_without_a_measurement_it_is_triton(rows: list[Measurement]):
    assert str(chosen()) == "triton (no measurement for sm_90, head width 8, deterministic)"
    assert str(chosen(deterministic=False)) == "triton (no measurement for sm_90, head width 8, in any order)"
    assert str(chosen((12, 0))) == "triton (no measurement for sm_120, head width 8, deterministic)"
    rows.append(row(FASTER))
    assert str(chosen(None)) == "triton (the card's compute capability is not known)"
    assert str(chosen(device="cpu", capability=None)) == "torch (on a CPU)"


@pytest.mark.parametrize(
    "other",
    [
        {"capability": 80},
        {"head_dim": 16},
        {"deterministic": False},
        {"length": 5},
        {"length": 23},
    ],
)
def test_a_measurement_of_something_else_does_not_count(rows: list[Measurement], other: dict[str, Any]):
    rows.append(row(FASTER, **other))
    assert "no measurement" in chosen().reason
    rows.append(row(FASTER))
    assert chosen().backend == "flash"


def test_the_fastest_is_taken_where_it_is_worth_it(rows: list[Measurement]):
    rows[:] = [row(FASTER)]
    expected = "flash (1.04x the speed of triton, measured on a card, 2 x 11, 4/2 heads of 8)"
    assert str(chosen()) == expected
    rows[:] = [row({"triton": 1.02, "flash": 1.0})]
    assert str(chosen()) == "triton (flash has 1.02x its speed, measured on a card, 2 x 11, 4/2 heads of 8)"
    rows[:] = [row(SLOWER)]
    assert str(chosen()) == "triton (flash has 0.80x its speed, measured on a card, 2 x 11, 4/2 heads of 8)"
    rows[:] = [row({"triton": 1.0, "flash": 0.9, "cudnn": 0.8}, deterministic=False)]
    assert chosen(deterministic=False).backend == "cudnn"
    # It cannot be here, whatever the table says.
    assert chosen(deterministic=False, sequence_length=1, micro_batch_size=22).backend == "triton"
    rows[:] = [row({"triton": 1.0, "cudnn": 0.1})]
    assert str(chosen()) == "triton (nothing else measured on a card, 2 x 11, 4/2 heads of 8)"


def test_the_nearest_length_counts_and_then_the_nearest_number_of_heads(rows: list[Measurement]):
    rows[:] = [row(FASTER, length=22, device="longer"), row(SLOWER, length=9, device="nearer", batch=100)]
    assert "nearer" in chosen().reason
    rows[:] = [row(FASTER, batch=b, device=f"batch {b}") for b in (1, 8, 3, 100)]
    for batch, nearest in ((2, 3), (1, 1), (6, 8), (1000, 100)):
        assert f"batch {nearest}," in chosen(micro_batch_size=batch).reason
    rows[:] = [row(FASTER, heads=8, batch=1, device="as many"), row(FASTER, heads=4, batch=1)]
    assert "as many" in chosen(micro_batch_size=2).reason


def test_what_only_our_kernels_do_they_do(rows: list[Measurement]):
    rows.append(row(FASTER))
    reason = "flash computes in bf16 or fp16, and train.precision is fp32"
    assert str(chosen(precision="fp32")) == f"triton ({reason})"
    assert "flash attends across documents" in chosen(document_mask=True).reason


def test_what_is_configured_is_not_second_guessed(rows: list[Measurement]):
    rows.append(row(FASTER))
    assert chosen(attention="triton") == AttentionChoice("triton", "as configured")
    assert chosen(attention="flash") == AttentionChoice("flash", "as configured")
    for backend in ("flash", "cudnn"):
        choice = chosen(attention=backend, deterministic=False)
        assert str(choice) == f"{backend} (as configured; its backward adds in any order)"
        assert not choice.deterministic


def test_the_committed_table_is_sound(tmp_path: Path):
    measured = table.read_table()
    script().write_table(script().merge([], measured), tmp_path / "table.json")
    assert table.TABLE.read_text() == (tmp_path / "table.json").read_text(), "sorted, each shape once"
    for found in measured:
        assert found.seconds["triton"] > 0
        assert set(found.seconds) <= set(script().backends(shape_of(found), found.deterministic))
        assert all(0 < seconds < 10 for seconds in found.seconds.values())


# What a run says and plans


def test_the_estimate_says_what_and_why(rows: list[Measurement]):
    config = make_config(**SHAPE)
    assert estimate(config, "H100").as_json()["attention"] == {
        "backend": "triton", "reason": "no measurement for sm_90, head width 8, deterministic",
    }  # fmt: skip
    rows.append(row(FASTER))
    answer = estimate(config, "H100").as_json()
    assert answer["attention"]["backend"] == "flash"
    assert answer["outside"]["flash attention"] > 0
    assert estimate(config, "RTX 4090").as_json()["attention"]["backend"] == "triton"


def test_training_says_it_before_anything_takes_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rows: list[Measurement]
):
    rows.append(row(FASTER, head_dim=16, heads=2, length=32))
    card = Gpu("a card", 80 * 2**30, HOPPER, 1e15, "a test")

    def stop(*_: object) -> None:
        raise AlborError("the kernels come next")

    monkeypatch.setattr("albor.memory.devices.installed_gpu", lambda: Hardware("cuda", "a card", card))
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.synchronize", lambda *_: None)
    monkeypatch.setattr("albor.train.rehearsal.compile_kernels", stop)
    monkeypatch.chdir(tmp_path)
    result = call("train", write_project(tmp_path), "device=cuda", "train.precision=bf16")
    assert (result.code, "the kernels come next" in result.err) == (1, True)
    assert "\nattention: flash (1.04x the speed of triton, measured on a card, 2 x 32" in f"\n{result.out}"


def test_auto_takes_the_accumulator_that_fits_beside_the_chosen_attention(rows: list[Measurement]):
    """The chosen backend takes memory, and so the sums may have to leave the device."""
    config = make_config(**SHAPE, accumulator="auto", micro_batch_size=64, num_hidden_layers=12)
    here = Hardware("cuda", "a card", Gpu("a card", None, HOPPER, None, "a test"))

    def accumulator(capacity: int) -> str:
        return Estimate.of(config, Hardware("cuda", "", here.gpu, capacity)).plan.accumulator

    on_device = plan_training(config, "cuda", "bfloat16", "gpu")
    needed = on_device.size("device") + sum(outside(on_device, here.gpu).values())
    assert accumulator(needed) == "gpu"
    rows.append(row(FASTER, batch=64))
    assert accumulator(needed) == "cpu"


def choice_of(backend: Any, deterministic: bool = True) -> AttentionChoice:
    return AttentionChoice(backend, "", deterministic)


def model_of(heads: int, kv_heads: int, head_dim: int) -> Architecture:
    keys = {"hidden_size": heads * head_dim, "num_attention_heads": heads, "num_key_value_heads": kv_heads}
    return Architecture.from_config(make_config(**keys).model)


def test_flash_takes_what_one_computes_by_hand():
    """350M: B = 4, T = 1024, H = 16, K = 4, D = 64, in MiB."""
    out, lse, keys = 8, 1 / 4, 2
    forward = [out, lse]
    # dQ, dK, dV; for grouped queries dK and dV of all 16 heads; a number per row; dQ's sums in fp32, for 64
    # heads and at most 192 multiprocessors 3 of them, or one.
    backward = [out, keys, keys, out, out, lse]
    # 8 + 8 + 2 + 2 + 8 + 8 = 36 MiB lie in segments of 20 that are at least half full; sums of 16 may take
    # room there too, those of 48 do not.
    for deterministic, sums, segments in ((True, 48, 20 * 4 + 48), (False, 16, 20 * 6)):
        small = 2  # MiB: a segment holds both lse
        found = temporaries(choice_of("flash", deterministic), model_of(16, 4, 64), 4, 1024)
        step = pool_bytes([int(size * MIB) for size in (*forward, *backward, sums)])
        assert step == (small + segments) * MIB
        # An evaluation finds room in what the first step has left, unless its batch is larger.
        assert found == {"flash attention": step, "flash attention, graphs": step}
        larger = temporaries(choice_of("flash", deterministic), model_of(16, 4, 64), 4, 1024, 64)
        assert larger["flash attention"] == step + pool_bytes([128 * MIB, 4 * MIB])
        assert larger["flash attention, graphs"] == step
    assert pool_bytes([8 * MIB, MIB // 4]) == 22 * MIB


def test_every_head_with_keys_of_its_own_has_nothing_to_expand():
    grouped, single = (temporaries(choice_of("flash"), model_of(16, k, 64), 32, 1024) for k in (8, 16))
    # 64 MiB each of dK and dV of all heads, against 32 more of each result.
    assert grouped["flash attention, graphs"] - single["flash attention, graphs"] == (2 * 64 - 2 * 32) * MIB


def test_few_programs_are_split_along_the_keys():
    """One head of 64, T = 4096. One sequence is 64 programs: 16 partial results in fp32, 16 MiB in all."""
    one, eight = (temporaries(choice_of("flash", False), model_of(1, 1, 64), b, 4096) for b in (1, 8))
    # Small: out 1/2, its logarithms 1/64 and 16 partial ones; dQ, dK, dV 1/2, 1/64, and 1 MiB of sums.
    assert one["flash attention, graphs"] == (16 + 2 * 4) * MIB
    assert one["flash attention"] == one["flash attention, graphs"]
    # 512 programs are not split: 4 of 4 MiB and 8 MiB of sums.
    assert eight["flash attention, graphs"] == (3 * 20 + 2) * MIB
    assert eight["flash attention"] == eight["flash attention, graphs"]


def test_cudnn_keeps_a_square_of_scores_while_it_is_small():
    def step(length: int, batch: int) -> int:
        found = temporaries(choice_of("cudnn", False), model_of(16, 16, 64), batch, length)
        return found["cuDNN attention, graphs (estimate)"]

    # 1024 x 1024 x 16 x 2 bytes are 32 MiB a sequence; 256 MiB is the limit.
    assert step(1024, 8) > 256 * MIB
    assert step(1024, 9) < step(1024, 8)
    assert step(1024, 64) > step(1024, 32) > step(1024, 16)


def test_a_plan_has_room_for_a_library_and_none_for_what_it_does_not_need():
    config = make_config(**SHAPE)
    ours, flash = (
        plan_training(config, "cuda", "bfloat16", attention=choice_of(name)) for name in ("triton", "flash")
    )
    assert ours.temporaries == {}
    assert "backward.attention_delta" in {buffer.name for buffer in ours.buffers}
    assert {b.name for b in ours.buffers} - {b.name for b in flash.buffers} == {"backward.attention_delta"}
    extra = sum(outside(flash).values()) - sum(outside(ours).values())
    assert extra >= sum(flash.temporaries.values()) > 0
    assert (
        plan_training(make_config(**SHAPE, attention="flash"), "cuda", "bfloat16").temporaries
        == flash.temporaries
    )
    assert plan_training(config, "cpu", "float32").attention.backend == "torch"
    inference = plan_inference(make_config(**SHAPE, attention="flash"), "cuda", "bfloat16")
    assert (inference.attention.backend, inference.temporaries) == ("triton", {})


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ([], 2),
        ([1], 2),
        ([MIB] * 3, 8),
        ([MIB + 1], 20 + 2),
        ([6 * MIB] * 2, 20 + 2),
        ([6 * MIB] * 4, 60 + 2),
        ([10 * MIB + 1], 12 + 2),
    ],
)
def test_the_allocator_takes_whole_segments(sizes: list[int], expected: int):
    assert pool_bytes(sizes) == expected * MIB


# What is called, and what comes of it


def on_meta(value: Any) -> Any:
    return value.to("meta") if isinstance(value, torch.Tensor) else value


class Libraries:
    """Answers as flash and cuDNN would, in float64. Each call goes first to PyTorch on device "meta": it has
    to fit the operator's signature, and the answer has the shapes and strides that are returned there.
    """

    def __init__(self) -> None:
        self.calls: list[tuple[str, int, bool]] = []  # name, debug mode, whether memory would be filled
        self.fails = False
        self._flash_attention_forward = self._wrap("_flash_attention_forward", self._flash_forward)
        self._flash_attention_backward = self._wrap("_flash_attention_backward", self._flash_backward)
        self._scaled_dot_product_cudnn_attention = self._wrap(
            "_scaled_dot_product_cudnn_attention", self._cudnn_forward
        )
        self._scaled_dot_product_cudnn_attention_backward = self._wrap(
            "_scaled_dot_product_cudnn_attention_backward", self._cudnn_backward
        )

    def _wrap(self, name: str, answer: Any) -> Any:
        real = getattr(torch.ops.aten, name).default

        def run(*arguments: Any, scale: float) -> tuple[Any, ...]:
            filled = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
            self.calls.append((name, torch.get_deterministic_debug_mode(), filled))
            if self.fails:
                raise RuntimeError("CUDA out of memory")
            shapes = real(*map(on_meta, arguments), scale=scale)
            found = answer(*arguments, scale=scale)
            results = list(shapes)
            for index, values in enumerate(found):
                empty = shapes[index]
                assert empty.shape == values.shape
                results[index] = torch.empty_strided(empty.shape, empty.stride(), dtype=values.dtype)
                results[index].copy_(values)
            return tuple(results)

        return SimpleNamespace(default=run)

    def _flash_forward(self, query, key, value, cum_q, cum_k, max_q, max_k, dropout, causal, debug, *, scale):
        assert (cum_q, cum_k, dropout, causal, debug) == (None, None, 0.0, True, False)
        assert (max_q, max_k) == (query.shape[1], key.shape[1])
        return attend(*(part.transpose(1, 2) for part in (query, key, value)), scale, heads_first=False)

    def _flash_backward(
        self, d_out, query, key, value, out, lse, cum_q, cum_k, max_q, max_k, dropout, causal, state, unused,
        *, scale,
    ):  # fmt: skip
        assert (cum_q, cum_k, dropout, causal) == (None, None, 0.0, True)
        assert (max_q, max_k) == (query.shape[1], key.shape[1])
        assert (state.dtype, unused.dtype) == (torch.uint64, torch.uint64)
        assert d_out.is_contiguous(), "or it would be copied"
        assert out.is_contiguous(), "or it would be copied"
        tensors = (part.transpose(1, 2) for part in (d_out, query, key, value, out))
        return [part.transpose(1, 2) for part in gradients(*tensors, lse, scale)]

    def _cudnn_forward(self, query, key, value, bias, log_sum, dropout, causal, debug, *, scale):
        assert (bias, log_sum, dropout, causal, debug) == (None, True, 0.0, True, False)
        out, lse = attend(query, key, value, scale, heads_first=True)
        return out, lse.unsqueeze(-1)

    def _cudnn_backward(
        self, d_out, query, key, value, out, lse, seed, offset, bias, cum_q, cum_k, max_q, max_k, dropout,
        causal, *, scale,
    ):  # fmt: skip
        assert (bias, cum_q, cum_k, dropout, causal) == (None, None, None, 0.0, True)
        assert (max_q, max_k) == (query.shape[2], key.shape[2])
        assert (seed.dtype, offset.dtype) == (torch.int64, torch.int64)
        assert d_out.stride() == out.stride(), "cuDNN before 9.5.1 would copy it"
        assert lse.shape[-1] == 1
        return gradients(d_out, query, key, value, out, lse.squeeze(-1), scale)


def scores_of(query: torch.Tensor, key: torch.Tensor, scale: float) -> torch.Tensor:
    """(B, H, T, T), causal, of query (B, H, T, D) and key (B, K, T, D)."""
    key = key.repeat_interleave(query.shape[1] // key.shape[1], 1)
    scores = query.double() @ key.double().transpose(2, 3) * scale
    return scores.masked_fill(torch.ones(scores.shape[-2:]).triu(1).bool(), -torch.inf)


def attend(query: Any, key: Any, value: Any, scale: float, *, heads_first: bool) -> tuple[Any, Any]:
    scores = scores_of(query, key, scale)
    out = scores.softmax(-1) @ value.double().repeat_interleave(query.shape[1] // key.shape[1], 1)
    return (out if heads_first else out.transpose(1, 2)).to(query.dtype), scores.logsumexp(-1)


def gradients(d_out: Any, query: Any, key: Any, value: Any, out: Any, lse: Any, scale: float) -> list[Any]:
    """From what the forward saved, as a library does it: another lse or out gives another gradient."""
    heads, kv_heads = query.shape[1], key.shape[1]
    weights = (scores_of(query, key, scale) - lse.double().unsqueeze(-1)).exp()
    d_weights = d_out.double() @ value.double().repeat_interleave(heads // kv_heads, 1).transpose(2, 3)
    delta = (d_out.double() * out.double()).sum(-1, keepdim=True)
    d_scores = weights * (d_weights - delta) * scale
    d_query = d_scores @ key.double().repeat_interleave(heads // kv_heads, 1)
    d_key, d_value = d_scores.transpose(2, 3) @ query.double(), weights.transpose(2, 3) @ d_out.double()
    d_key, d_value = (part.unflatten(1, (kv_heads, -1)).sum(2) for part in (d_key, d_value))
    return [part.to(query.dtype) for part in (d_query, d_key, d_value)]


@pytest.fixture
def libraries(monkeypatch: pytest.MonkeyPatch) -> Iterator[Libraries]:
    answers = Libraries()
    monkeypatch.setattr(library_attention, "aten", answers)
    yield answers
    assert torch.get_deterministic_debug_mode() == 0


BACKENDS = [("flash", True), ("flash", False), ("cudnn", False)]
LAYOUTS = [(4, 2, 8, 11, 2), (3, 3, 16, 8, 1), (4, 1, 8, 5, 3), (1, 1, 24, 2, 1)]  # H, K, D, T, B


def make_both(layout: tuple[int, ...], choice: AttentionChoice) -> tuple[TritonOps, TorchOps, Arena, Arena]:
    """A library's attention and the torch path, in float64 out of poisoned buffers."""
    heads, kv_heads, head_dim, length, batch = layout
    config = make_config(
        hidden_size=heads * head_dim, num_attention_heads=heads, num_key_value_heads=kv_heads,
        sequence_length=length, micro_batch_size=batch, num_hidden_layers=1,
    )  # fmt: skip
    library = Arena(plan_training(config, "cuda", "float64", "gpu", choice), poison=True)
    torch_path = Arena(plan_training(config, "cpu", "float64"), poison=True)
    ours, theirs = make_ops(library), make_ops(torch_path)
    assert isinstance(ours, TritonOps)
    assert isinstance(theirs, TorchOps)
    return ours, theirs, library, torch_path


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("backend", "deterministic"), BACKENDS)
def test_forward_and_backward_are_the_torch_paths(
    backend: str, deterministic: bool, layout: tuple[int, ...], libraries: Libraries
):
    _, kv_heads, head_dim, length, _ = layout
    ours, theirs, library, torch_path = make_both(layout, choice_of(backend, deterministic))
    generator = torch.Generator().manual_seed(1)
    results = []
    shape = (length, kv_heads, head_dim)
    for ops, arena in ((ours, library), (theirs, torch_path)):
        generator.manual_seed(1)
        qkv, out, d_out, d_qkv = (
            arena[name] for name in (
                "blocks.00.qkv", "blocks.00.attention_out", "backward.d_attention", "backward.d_qkv",
            )
        )  # fmt: skip
        for part in (qkv, d_out):
            part.copy_(torch.randn(part.shape, dtype=torch.float64, generator=generator))
        lse = arena.get("blocks.00.attention_lse")
        before = qkv.clone()
        ops.attention_forward(qkv, out, lse, *shape)
        ops.attention_backward(d_out, qkv, out, lse, d_qkv, *shape)
        assert torch.equal(qkv, before), "the input is the rotary's and the recomputation's"
        results.append((out.clone(), d_qkv.clone()))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)
    assert library["blocks.00.attention_lse"].isfinite().all()
    assert len(libraries.calls) == 2


@pytest.mark.parametrize(("backend", "deterministic"), BACKENDS)
def test_determinism_is_asked_for_around_flashs_backward_alone(
    backend: str, deterministic: bool, libraries: Libraries
):
    ours, _, library, _ = make_both(LAYOUTS[0], choice_of(backend, deterministic))
    for buffer in ("blocks.00.qkv", "backward.d_attention"):
        library[buffer].fill_(0.5)
    saved = [library[f"blocks.00.{name}"] for name in ("qkv", "attention_out", "attention_lse")]
    ours.attention_forward(*saved, 11, 2, 8)
    ours.attention_backward(library["backward.d_attention"], *saved, library["backward.d_qkv"], 11, 2, 8)
    (_, forward_mode, forward_fill), (name, mode, fill) = libraries.calls
    assert name.endswith("backward")
    assert (forward_mode, forward_fill) == (0, True)
    assert (mode, fill) == ((2, False) if deterministic else (0, True))
    libraries.fails = True
    with pytest.raises(RuntimeError, match="out of memory"):
        ours.attention_backward(library["backward.d_attention"], *saved, library["backward.d_qkv"], 11, 2, 8)
    assert torch.get_deterministic_debug_mode() == 0
    assert torch.utils.deterministic.fill_uninitialized_memory is True  # type: ignore[attr-defined]


def test_asking_for_determinism_does_not_bring_in_the_compiler():
    """use_deterministic_algorithms imports it, in every process that calls it."""
    code = (
        "import sys, torch\n"
        "from albor.ops.library_attention import deterministic_algorithms\n"
        "with deterministic_algorithms(True):\n"
        "    assert torch.are_deterministic_algorithms_enabled()\n"
        "    assert not torch.is_deterministic_algorithms_warn_only_enabled()\n"
        "assert not torch.are_deterministic_algorithms_enabled()\n"
        "assert 'torch._inductor.config' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    with deterministic_algorithms(True), deterministic_algorithms(False):
        assert torch.get_deterministic_debug_mode() == 2, "what is on outside stays on"


@pytest.mark.skipif(DEVICE == "cuda", reason="on a GPU test_gpu.py runs the kernels themselves")
@pytest.mark.parametrize("backend", ["flash", "cudnn"])
@pytest.mark.parametrize("recompute", ["none", "block"])
def test_a_step_is_the_torch_paths(
    backend: str, recompute: str, libraries: Libraries, monkeypatch: pytest.MonkeyPatch
):
    """With the other kernels around it, from poisoned buffers: loss, gradient norm and evaluation."""
    monkeypatch.setattr("albor.memory.plan.NORM_PARTIALS", 3)
    monkeypatch.setattr("albor.memory.plan.SUM_PARTIALS", 5)
    config = make_config(**SHAPE, recompute=recompute, vocab_size=29, attention=backend, deterministic=False)
    plain = make_config(**SHAPE, recompute=recompute, vocab_size=29)
    library = trainer_over(config, plan_training(config, "cuda", "float32", "gpu"))
    torch_path = make_trainer(plain, "float32")
    batches, found = make_batches(config, ignored=0.2), []
    for trainer in (library, torch_path):
        result, _ = trainer.step(batches, TrainState())
        losses = trainer.arena["io.losses"]
        trainer.model.losses(trainer.arena["io.tokens"], trainer.arena["io.targets"], losses)
        found.append((result.loss, result.grad_norm, float(losses.sum())))
    assert found[0] == pytest.approx(found[1], rel=2e-5)
    forwards = 2 + 2 * (recompute == "block") + 2  # blocks of the step, again for its backward, and evaluated
    assert len(libraries.calls) == forwards + 2


# The rehearsal, which finds out what is launched


def test_the_rehearsal_goes_through_every_backend():
    """In a process that does not interpret kernels. Only the attention's are other ones."""
    code = (
        "import json\n"
        "from helpers import make_config\n"
        "from albor.memory.plan import plan_training\n"
        "from albor.train.rehearsal import record_run\n"
        "keys = {'hidden_size': 32, 'precision': 'bf16', 'deterministic': False}\n"
        "found = {}\n"
        "for backend in ('auto', 'triton', 'flash', 'cudnn'):\n"
        "    for place in ('cpu', 'gpu'):\n"
        "        config = make_config(**keys, attention=backend)\n"
        "        launches = record_run(config, plan_training(config, 'cuda', 'bfloat16', place), 90)\n"
        "        found[backend + ' ' + place] = sorted(launch.name for launch in launches)\n"
        "print(json.dumps(found))\n"
    )
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(ROOT / "tests")
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    for place in ("cpu", "gpu"):
        ours = found[f"triton {place}"]
        kernels = [name for name in ours if "attention" in name]
        assert {name.rpartition(".")[2] for name in kernels} == {
            "attention_forward", "attention_backward_q", "attention_backward_kv",
        }  # fmt: skip
        assert found[f"auto {place}"] == ours
        rest = [name for name in ours if "attention" not in name]
        assert found[f"flash {place}"] == found[f"cudnn {place}"] == rest


# benchmarks/attention.py, as far as it needs no GPU


def shape_of(found: Measurement) -> Any:
    return script().Shape(found.head_dim, found.heads, found.kv_heads, found.length, found.batch)


def test_without_a_gpu_it_says_so_and_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert script().main([], table=tmp_path / "attention.json") == 2
    assert "no CUDA device" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_it_measures_every_shape_that_is_shipped_or_benchmarked():
    measured = script().shapes([])
    assert len(set(measured)) == len(measured)
    shipped = [path for path in (ROOT / "configs").glob("*.yaml") if "\nmodel:" in path.read_text()]
    assert len(shipped) > 3
    for path in shipped:
        assert script().Shape.of(load_config(path)) in measured
    assert script().Shape(64, 16, 4, 1024, 16) in measured
    (own,) = script().shapes([str(ROOT / "configs/quickstart.yaml"), "train.micro_batch_size=5"])
    assert own == script().Shape(64, 3, 1, 256, 5)
    for shape in measured:
        config = shape.config("flash", True)
        assert script().Shape.of(config) == shape
        assert (config.train.attention, config.train.deterministic) == ("flash", True)


def test_it_asks_each_backend_for_what_it_does():
    shape = script().Shape(64, 16, 4, 1024, 16)
    assert script().backends(shape, True) == ["triton", "flash"]
    assert script().backends(shape, False) == ["triton", "flash", "cudnn"]
    assert script().backends(script().Shape(192, 4, 4, 128, 1), False) == ["triton", "flash"]
    assert script().backends(script().Shape(6, 4, 4, 128, 1), False) == ["triton"]


@pytest.mark.parametrize("backend", ["flash", "cudnn"])
def test_what_is_timed_is_a_forward_and_a_backward(backend: str, libraries: Libraries):
    attention = script().Attention(script().Shape(8, 4, 2, 11, 2), backend, False, "cpu")
    attention.step()
    assert [name.endswith("backward") for name, *_ in libraries.calls] == [False, True]
    gradient = attention.arena["backward.d_qkv"]
    assert gradient.isfinite().all()
    assert gradient.count_nonzero() > gradient.numel() / 2


def test_rows_replace_what_was_measured_before():
    old = [
        row({"triton": 2.0}),
        row({"triton": 3.0}, capability=80),
        row({"triton": 4.0}, deterministic=False),
    ]
    new = [row({"triton": 1.0, "flash": 2.0}, torch="2.14.0"), row({"triton": 5.0}, length=7)]
    merged = script().merge(old, new)
    assert [(m.capability, m.length, m.deterministic, m.seconds["triton"]) for m in merged] == [
        (80, 11, True, 3.0), (90, 7, True, 5.0), (90, 11, True, 1.0), (90, 11, False, 4.0),
    ]  # fmt: skip
    assert script().merge(merged, []) == merged


def test_the_table_is_written_whole_and_read_back(tmp_path: Path):
    path = tmp_path / "attention.json"
    for rows in ([], [row(FASTER), row(SLOWER, deterministic=False)]):
        script().write_table(rows, path)
        assert table.read_table(path) == rows
        assert len(path.read_text().splitlines()) == (len(rows) + 2 if rows else 1)
    assert [entry.name for entry in tmp_path.iterdir()] == ["attention.json"]


def test_it_merges_shape_by_shape_and_shows_what_auto_would_take(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    path = tmp_path / "attention.json"
    script().write_table([row({"triton": 1.0}, capability=80)], path)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr(script(), "this_machine", dict)

    def measured(shape: Any, deterministic: bool, machine: dict[str, Any]) -> Measurement:
        assert machine == {}
        times = {"triton": 2e-3, "flash": 3e-3} | ({} if deterministic else {"cudnn": 1e-3})
        keys = {"head_dim": shape.head_dim, "heads": shape.heads, "kv_heads": shape.kv_heads}
        return row(times, **keys, length=shape.length, batch=shape.batch, deterministic=deterministic)

    given = [str(ROOT / "configs/pretrain-350m.yaml")]
    assert script().main(given, measured, path) == 0
    stored = table.read_table(path)
    assert [(found.capability, found.deterministic) for found in stored] == [
        (80, True),
        (90, True),
        (90, False),
    ]
    heading, ordered, free = capsys.readouterr().out.splitlines()
    assert heading.split() == ["adds", "in", "triton", "flash", "cudnn", "auto"]
    name = "sm_90, 4 x 1024, 16/4 heads of 64"
    assert ordered.split(name)[1].split() == ["one", "order", "2.000", "3.000", "-", "triton"]
    assert free.split(name)[1].split() == ["any", "order", "2.000", "3.000", "1.000", "cudnn"]
    assert script().main(["nothing.yaml"], measured, path) == 2
