"""Gradient norms of the parts of a model: each that of its own tensors, and together the whole gradient's."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from helpers import gradients_of, make_batches, make_config, make_trainer, trainer_over
from kernel_cases import DEVICE

from albor.architecture import Architecture
from albor.memory import plan
from albor.train.step import Trainer, TrainState, gradient_norms

ODD = {"hidden_size": 22, "num_attention_heads": 1, "num_key_value_heads": 1, "num_hidden_layers": 3}


def norms_by_name(trainer: Trainer, scale: float) -> dict[str, float]:
    """From the gradient's tensors, sorted by their names."""
    squares: dict[str, float] = {}
    for name, gradient in gradients_of(trainer).items():
        first, *rest = name.split(".")
        groups = [f"block_{rest[0]}", f"block_{rest[0]}/{rest[1]}"] if first == "blocks" else [first]
        for group in groups:
            squares[group] = squares.get(group, 0.0) + float(gradient.double().square().sum())
    return {group: math.sqrt(square) * scale for group, square in squares.items()}


def check(trainer: Trainer, tolerance: float) -> None:
    sums = trainer.accumulate(make_batches(trainer.config, ignored=0.2), TrainState())
    expected = norms_by_name(trainer, sums.gradient_scale)
    assert list(sums.gradient_norms) == list(expected)
    assert sums.gradient_norms == pytest.approx(expected, rel=tolerance)
    parts = [norm for group, norm in sums.gradient_norms.items() if "/" not in group]
    assert sums.grad_norm == pytest.approx(math.hypot(*parts), rel=1e-12)
    result, _ = trainer.update(sums, TrainState())
    assert result.gradient_norms == sums.gradient_norms


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
def test_each_is_the_norm_of_its_own_tensors(dtype: str, tied: bool):
    """Between padding that holds anything: sizes here are no multiples of the alignment."""
    config = make_config(**ODD, tie_word_embeddings=tied, gradient_accumulation_steps=2)
    check(make_trainer(config, dtype, poison=dtype != "bfloat16"), 1e-12 if dtype == "float64" else 1e-6)


@pytest.mark.skipif(DEVICE == "cuda", reason="the kernels are interpreted here")
@pytest.mark.parametrize("accumulator", ["cpu", "gpu"])
def test_those_of_the_gpu_path_too(accumulator: Any, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(plan, "NORM_PARTIALS", 3)
    monkeypatch.setattr(plan, "SUM_PARTIALS", 20)
    config = make_config(**ODD, sequence_length=11, vocab_size=29, gradient_accumulation_steps=2)
    check(trainer_over(config, plan.plan_training(config, "cuda", "float32", accumulator)), 1e-6)


def test_segments_cover_the_flat_buffers_without_a_gap():
    for layers, tied in ((1, True), (3, False)):
        config = make_config(num_hidden_layers=layers, tie_word_embeddings=tied)
        model = Architecture.from_config(config.model)
        segments = model.segments
        starts, ends = [s.start for s in segments], [s.end for s in segments]
        assert [0, *ends] == [*starts, model.flat_size]
        assert len(segments) == 2 + 4 * layers
        for parameter in model.parameters:
            (segment,) = (s for s in segments if s.start <= parameter.offset < s.end)
            assert parameter.offset + parameter.size <= segment.end
            assert parameter.name.replace("s.", "_").replace(".", "/").startswith(segment.group)
        # The kernel loads 16 bytes at a time.
        assert all(s.start % 16 == 0 and s.end % 16 == 0 for s in segments)


def test_a_program_for_every_segment_and_most_for_the_large_ones():
    model = Architecture.from_config(make_config(vocab_size=40_000).model)
    programs = plan.norm_programs(model)
    sizes = [s.end - s.start for s in model.segments]
    assert min(programs) == 1
    assert programs.index(max(programs)) == sizes.index(max(sizes))
    assert plan.SUM_PARTIALS < sum(programs) <= plan.SUM_PARTIALS + len(sizes)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_shows_where_it_is(value: float):
    config = make_config(**ODD)
    trainer = make_trainer(config, "float32")
    trainer.accumulate(make_batches(config), TrainState())
    gradients_of(trainer)["blocks.01.mlp.norm"][3] = value
    squares = trainer.accumulator.squared_norms()
    assert squares is not None
    total, norms = gradient_norms(trainer.architecture.segments, squares, 1.0)
    assert not math.isfinite(total)
    assert {group for group, norm in norms.items() if not math.isfinite(norm)} == {"block_01", "block_01/mlp"}


def test_the_order_of_the_sum_is_fixed():
    config = make_config(**ODD)
    norms = []
    for _ in range(2):
        trainer = make_trainer(config, "float32")
        sums = trainer.accumulate(make_batches(config), TrainState())
        norms.append((sums.grad_norm, sums.gradient_norms))
        assert torch.isfinite(torch.tensor(list(sums.gradient_norms.values()))).all()
    assert norms[0] == norms[1]
