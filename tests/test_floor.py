"""What a step is priced at: recomputation, where gradients are summed, cards that nobody has measured."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from helpers import make_config

from albor.architecture import Architecture
from albor.config import RunConfig
from albor.configfile import load_config
from albor.floor import CARDS, Attention, Gemm, Operation, Traffic, Work, step_work
from albor.memory import attention as attention_table
from albor.memory.attention import AttentionChoice, Measurement, slowdown
from albor.memory.cards import GPUS, find_gpu
from albor.memory.estimate import estimate
from albor.memory.speed import SpeedModel, modelled_card

CONFIGS = Path(__file__).parent.parent / "configs"
TRITON = AttentionChoice("triton", "for a test")
RTX_4090 = find_gpu("RTX 4090")


def _config(*overrides: str, name: str = "pretrain-350m") -> RunConfig:
    return load_config(CONFIGS / f"{name}.yaml", overrides)


MODEL = Architecture.from_config(_config().model)


def _flops(work: list[Work], kind: type[Operation]) -> float:
    return sum(one.count * one.operation.flops for one in work if isinstance(one.operation, kind))


def _traffic(work: list[Work]) -> float:
    return sum(one.count * one.operation.bytes for one in work if isinstance(one.operation, Traffic))


# The work


def test_recomputed_norms_cost_their_traffic_alone():
    none, cheap = (step_work(MODEL, 1024, 4, 32, recompute=mode) for mode in ("none", "cheap"))
    assert _flops(none, Gemm) == _flops(cheap, Gemm)
    assert _flops(none, Attention) == _flops(cheap, Attention)
    read_and_written = 2 * 2 * MODEL.hidden_size  # bf16
    assert _traffic(cheap) - _traffic(none) == 32 * 24 * 2 * 4 * 1024 * read_and_written


def test_a_recomputed_block_is_its_forward_without_the_last_gemm():
    none, block = (step_work(MODEL, 1024, 4, 32, recompute=mode) for mode in ("none", "block"))
    width, ffn, tokens = MODEL.hidden_size, MODEL.intermediate_size, 32 * 4 * 1024
    again = 2 * tokens * width * (MODEL.qkv_size + width + 2 * ffn)
    assert _flops(block, Gemm) - _flops(none, Gemm) == 24 * again
    forward = next(one for one in none if one.name == "attention forward")
    assert _flops(block, Attention) - _flops(none, Attention) == forward.count * forward.operation.flops
    # Two norms, of which the second adds to the residual stream, and the rotation.
    columns = 2 * width + 4 * width + 2 * (16 + 4) * 64
    assert _traffic(block) - _traffic(none) == 24 * tokens * 2 * columns


def test_the_update_moves_its_state():
    """fp32: master and moments read and written, weights written; bf16: weights and moments, both ways."""

    def update(**keys: bool) -> float:
        operation = step_work(MODEL, 1024, 4, 32, **keys)[-1].operation
        assert isinstance(operation, Traffic)
        return operation.bytes / MODEL.parameter_count

    assert update() == 8 + 8 + 16 + 2
    assert update(rounded_state=True) == 8 + 4 + 8
    assert update(sums_on_device=False) == 4 + 8 + 16 + 2  # the norm is taken where the sums are


def test_gradients_that_leave_are_written_once():
    for on_device in (True, False):
        work = step_work(MODEL, 1024, 4, 32, sums_on_device=on_device)
        gradients = [one.operation for one in work if one.name.endswith("d_weight")]
        assert [gemm.accumulate for gemm in gradients if isinstance(gemm, Gemm)] == [on_device] * 5


def test_smaller_chunks_make_the_head_slower():
    card = CARDS[0]

    def head(chunk: int) -> float:
        work = step_work(MODEL, 1024, 4, 1, chunk)
        return sum(one.count * card.seconds(one.operation) for one in work if one.name.startswith("head"))

    assert head(128) > 1.2 * head(512) > 1.2 * head(4096)


# The cards


def test_attention_has_a_rate_for_every_head_width():
    card = CARDS[0]
    shape = Attention(4, 1024, 16, 4, 64, "forward")

    def rate(width: int) -> float:
        return card._attention_rate(width, 0)

    assert (rate(64), rate(128)) == tuple(card.attention_flops[width][0] for width in (64, 128))
    assert rate(32) == rate(64) / 2
    assert rate(96) == pytest.approx((rate(64) + rate(128)) / 2)
    assert rate(256) == rate(128)
    assert card.seconds(shape) < card.seconds(replace(shape, direction="backward"))


def test_a_card_is_its_own_model_or_scaled_from_one():
    own = {card.name: card for card in CARDS}
    modelled = {gpu.name: card for gpu in GPUS if (card := modelled_card(gpu)) is not None}
    assert len(modelled) >= 20
    for name, card in modelled.items():
        gpu = find_gpu(name)
        assert (card.name, card.multiprocessors) == (name, gpu.multiprocessors)
        assert 0.75 < card.sustained_flops / (gpu.bf16_peak_flops or 0) < 1, name
        if name in own:
            assert card is own[name]
        elif name != "A100 80GB":
            assert card.source.startswith("scaled from "), name
    like, gpu, scaled = own["RTX 4090"], find_gpu("RTX 4080"), modelled["RTX 4080"]
    assert scaled.sustained_flops == pytest.approx(like.sustained_flops * 97.5 / 165.2)
    assert scaled.attention_flops[64][1] == pytest.approx(like.attention_flops[64][1] * 97.5 / 165.2)
    assert scaled.bandwidth == pytest.approx(like.bandwidth * (gpu.bandwidth or 0) / 1008e9)
    assert modelled_card(find_gpu("T4")) is None  # no bf16
    assert modelled_card(replace(gpu, bandwidth=None)) is None


def test_no_modelled_run_is_beyond_the_peak():
    for name in ("pretrain-50m", "pretrain-350m", "pretrain-1.3b"):
        for gpu in GPUS:
            run = estimate(_config("train.accumulator=gpu", name=name), gpu.name)
            model = SpeedModel.of(gpu, run.plan.compute_dtype)
            if model is not None:
                flops = run.architecture.flops_per_token(run.config.data.sequence_length)
                share = (
                    run.config.tokens_per_step
                    * flops
                    / model.step_seconds(run.config, run.plan)
                    / (gpu.bf16_peak_flops or 0)
                )
                assert 0.1 < share < 0.9, (name, gpu.name, share)


def test_fp32_and_unknown_cards_have_no_speed():
    assert SpeedModel.of(RTX_4090, "float32") is None
    assert SpeedModel.of(None, "bfloat16") is None


# Gradients that are summed in host memory


def _model(**keys: float) -> SpeedModel:
    model = SpeedModel.of(RTX_4090, "bfloat16")
    assert model is not None
    return replace(model, _known={}, **keys)


def _seconds(model: SpeedModel, config: RunConfig, *, on_device: bool = False, early: bool = True) -> float:
    return model.seconds(config, "bfloat16", on_device, TRITON, early=early)


def test_what_hides_behind_the_work_costs_nothing():
    config = _config()
    instant = _model(link_bytes_per_second=1e18, sums_bytes_per_second=1e18)
    work = step_work(MODEL, 1024, 4, 1, sums_on_device=False)
    times = [one.count * instant.card.seconds(one.operation) for one in work]
    device = 32 * sum(times[:-1]) + times[-1]
    assert _seconds(instant, config) == pytest.approx(device)
    # With the rates that are assumed only the end of the step shows, where nothing is left to hide behind.
    table = next(p.size for p in MODEL.parameters if p.block == "embedding")
    assert device < _seconds(_model(), config) < device + 1.5 * table * (6 / 25.2e9 + 14 / 60e9) + 0.1


@pytest.mark.parametrize(
    ("slow", "bytes_per_gradient"),
    [("sums_bytes_per_second", 6 + 31 * 10 + 4), ("link_bytes_per_second", 32 * 2)],
)
def test_what_takes_longer_than_the_work_shows(slow: str, bytes_per_gradient: int):
    rate = 1e9
    fast = {"link_bytes_per_second": 1e18, "sums_bytes_per_second": 1e18}
    expected = MODEL.parameter_count * bytes_per_gradient / rate
    seconds = _seconds(_model(**fast | {slow: rate}), _config())
    assert expected < seconds < 1.1 * expected


def test_sums_that_come_back_late_cost_time():
    slow = _model(link_bytes_per_second=10e9)
    config = _config()
    # Nothing of a large batch's return shows when it is early; late, all of it but the update does.
    batch = _config("train.micro_batch_size=32", "train.gradient_accumulation_steps=4")
    late = 4 * MODEL.parameter_count / 10e9
    update = step_work(MODEL, 1024, 4, 1, sums_on_device=False)[-1].operation
    shown = _seconds(slow, batch, early=False) - _seconds(slow, batch)
    assert shown == pytest.approx(late - slow.card.seconds(update))
    assert _seconds(slow, config) <= _seconds(slow, config, early=False)


def test_cards_with_half_the_lanes_have_half_the_link():
    wide, narrow, server = (SpeedModel.of(find_gpu(name), "bfloat16") for name in ("4070", "4060", "H100"))
    assert wide is not None and narrow is not None and server is not None  # noqa: PT018
    assert wide.link_bytes_per_second == 2 * narrow.link_bytes_per_second
    assert server.link_bytes_per_second > wide.link_bytes_per_second
    assert server.sums_bytes_per_second > wide.sums_bytes_per_second


# A library's attention


def test_a_slower_backend_is_priced_by_what_was_measured(monkeypatch: pytest.MonkeyPatch):
    row = Measurement(
        89, 64, 16, 4, 1024, 4, True, "RTX 4090", "2.13", "3.7", {"triton": 3e-3, "flash": 1.5e-3}
    )
    config = _config()
    assert slowdown(config, "triton", (8, 9)) == 1  # nothing is measured
    before = _seconds(_model(), config, on_device=True)
    monkeypatch.setattr(attention_table, "read_table", lambda: [row])
    assert slowdown(config, "triton", (8, 9)) == 2
    assert slowdown(config, "cudnn", (8, 9)) == slowdown(config, "triton", (9, 0)) == 1
    attention = sum(
        one.count * _model().card.seconds(one.operation)
        for one in step_work(MODEL, 1024, 4, 32)
        if isinstance(one.operation, Attention)
    )
    assert _seconds(_model(), config, on_device=True) == pytest.approx(before + attention)


def test_a_tiny_model_has_a_speed_too():
    model = _model()
    assert 0 < _seconds(model, make_config(), on_device=True) < 1e-2
