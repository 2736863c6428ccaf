"""The step around the model: accumulation, clipping, AdamW, schedule and guard, against torch's own."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
import torch
from helpers import (
    forward_backward,
    gradient_norm,
    gradients_of,
    make_batches,
    make_config,
    make_reference,
    make_trainer,
    reference_loss,
    spread_norms,
    weights_of,
)

from albor.architecture import IGNORED_TARGET
from albor.canary.reference import unpacked
from albor.config import DivergenceConfig, RunConfig, ScheduleConfig
from albor.ops import UpdateScalars
from albor.train.guard import GuardState, judge
from albor.train.schedule import learning_rate
from albor.train.step import Trainer, TrainState


def state_tensors(trainer: Trainer) -> dict[str, torch.Tensor]:
    """Copies of all that a step may change and the next one depends on."""
    flats = ("weights", "master", "moments.first", "moments.second")
    return {name: trainer.arena[name].clone() for name in flats if name in trainer.arena}


def same_bits(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> bool:
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def train(trainer: Trainer, steps: int, *, first: int = 0, state: TrainState | None = None) -> list[float]:
    """The losses of `steps` steps on batches that differ."""
    losses, state = [], state or TrainState()
    for step in range(first, first + steps):
        result, state = trainer.step(make_batches(trainer.config, seed=step, ignored=0.1), state)
        losses.append(result.loss)
    assert state.updates == state.step, "a step was skipped"
    return losses


# Accumulation


@pytest.mark.parametrize(("size", "count"), [(1, 8), (2, 4), (4, 2)])
def test_micro_batches_make_the_same_step_as_one_batch(size: int, count: int):
    """And every target token weighs the same, though some sequences have many more of them than others."""
    whole_config = make_config(micro_batch_size=8, eps=1e-3)
    ((tokens, targets),) = make_batches(whole_config)
    for row in range(8):
        targets[row, 2 * row + 1 :] = IGNORED_TARGET  # 1, 3, 5, ... targets

    results, trainers = [], []
    for micro_batch_size, accumulation in ((8, 1), (size, count)):
        config = make_config(
            micro_batch_size=micro_batch_size, gradient_accumulation_steps=accumulation, eps=1e-3
        )
        trainer = make_trainer(config)
        reference = make_reference(trainer)
        batches = list(zip(np.split(tokens, accumulation), np.split(targets, accumulation), strict=True))
        results.append(trainer.step(batches, TrainState())[0])
        trainers.append(trainer)
    whole, parts = results
    assert parts.target_tokens == whole.target_tokens == 64
    assert parts.loss == pytest.approx(whole.loss, rel=1e-12)
    assert parts.loss == pytest.approx(reference_loss(reference, [(tokens, targets)]).item(), rel=1e-12)
    assert parts.grad_norm == pytest.approx(whole.grad_norm, rel=1e-12)
    for name, weight in weights_of(trainers[0]).items():
        torch.testing.assert_close(weights_of(trainers[1])[name], weight, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_sums_on_the_host_and_on_the_device_have_the_same_bits(dtype: str):
    config = make_config(gradient_accumulation_steps=3, num_hidden_layers=3)
    host, device = (make_trainer(config, dtype, accumulator=place) for place in ("cpu", "gpu"))
    assert host.arena.plan.size("host") > device.arena.plan.size("host"), "the places are the same"
    assert train(host, 3) == train(device, 3)
    assert same_bits(state_tensors(host), state_tensors(device))


# Clipping


@pytest.mark.parametrize("grad_clip", [0.0, 0.1, 1e6], ids=["off", "clips", "does-not-clip"])
def test_clipping_equals_clip_grad_norm(grad_clip: float, monkeypatch: pytest.MonkeyPatch):
    """The norm is over all parameters, and what the optimizer gets is torch's clipped gradient."""
    config = make_config(grad_clip=grad_clip, gradient_accumulation_steps=2)
    trainer = make_trainer(config)
    scales: list[float] = []
    monkeypatch.setattr(
        trainer.model.ops, "begin_update", lambda scalars, _: scales.append(scalars.gradient_scale)
    )
    monkeypatch.setattr(trainer.optimizer, "update", lambda _: None)
    batches = make_batches(config, ignored=0.3)
    reference = make_reference(trainer)
    reference_loss(reference, batches).backward()
    expected = torch.nn.utils.clip_grad_norm_(reference.parameters(), grad_clip or math.inf)

    result, _ = trainer.step(batches, TrainState())
    assert result.grad_norm == pytest.approx(expected.item(), rel=1e-12)
    ours = unpacked(gradients_of(trainer), trainer.architecture)
    for name, parameter in reference.named_parameters():
        torch.testing.assert_close(ours[name] * scales[0], parameter.grad, rtol=1e-9, atol=1e-14)


# The optimizer


def torch_adamw(reference: torch.nn.Module, config: RunConfig) -> torch.optim.AdamW:
    """torch's AdamW as albor means it: decay for matrices alone."""
    matrices = [p for p in reference.parameters() if p.dim() > 1]
    vectors = [p for p in reference.parameters() if p.dim() == 1]
    groups = [
        {"params": matrices, "weight_decay": config.optimizer.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, betas=config.optimizer.betas, eps=config.optimizer.eps)


def test_adamw_equals_torch_over_20_steps_of_the_same_gradients():
    config = make_config(lr=0.01, weight_decay=0.3, eps=1e-3, tie_word_embeddings=False)
    trainer = make_trainer(config)
    spread_norms(trainer)
    reference = make_reference(trainer)
    optimizer = torch_adamw(reference, config)
    sums = unpacked(gradients_of(trainer), trainer.architecture)
    for step in range(1, 21):
        generator = torch.Generator().manual_seed(step)
        for name, parameter in reference.named_parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            sums[name].copy_(2 * parameter.grad)
        for group in optimizer.param_groups:
            group["lr"] = config.optimizer.lr / step
        optimizer.step()
        scalars = UpdateScalars(config.optimizer.lr / step, 0.5, step, seed=0)
        trainer.model.ops.begin_update(scalars, config.optimizer.betas)
        trainer.optimizer.update(trainer.accumulator)
    ours = unpacked(weights_of(trainer), trainer.architecture)
    for name, parameter in reference.named_parameters():
        torch.testing.assert_close(ours[name], parameter.detach(), rtol=1e-12, atol=1e-13)


TRAINING = {
    "plain": {},
    "one-layer": {"num_hidden_layers": 1},
    "untied-recompute": {"tie_word_embeddings": False, "recompute": "block", "num_key_value_heads": 1},
    "no-clip": {"grad_clip": 0.0, "schedule": "constant"},
}


@pytest.mark.parametrize(("dtype", "tolerance"), [("float64", 1e-7), ("float32", 1e-5)])
@pytest.mark.parametrize("keys", TRAINING.values(), ids=TRAINING.keys())
def test_training_equals_a_plain_torch_loop(keys: dict, dtype: str, tolerance: float):
    """20 steps: the oracle, autograd, clip_grad_norm_, torch.optim.AdamW and the schedule's formula.

    float64 is not nearer because the clipping factor enters PyTorch's fused AdamW in fp32.
    """
    keys = {
        "lr": 0.01,
        "eps": 1e-3,
        "grad_clip": 0.5,
        "gradient_accumulation_steps": 2,
        "warmup_steps": 4,
    } | keys
    keys |= {"kind": keys.pop("schedule", "cosine")}
    config = make_config(**keys)
    trainer, state = make_trainer(config, dtype), TrainState()
    reference = make_reference(trainer, getattr(torch, dtype))
    optimizer = torch_adamw(reference, config)
    for step, lr in enumerate(expected_rates(config.optimizer.lr, config.steps, config.schedule)):
        batches = make_batches(config, seed=step, ignored=0.2)
        result, state = trainer.step(batches, state)

        loss = reference_loss(reference, batches)
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(reference.parameters(), config.optimizer.grad_clip or math.inf)
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
        assert result.loss == pytest.approx(loss.item(), rel=tolerance)
        assert result.grad_norm == pytest.approx(norm.item(), rel=10 * tolerance)
    ours = unpacked(weights_of(trainer), trainer.architecture)
    for name, parameter in reference.named_parameters():
        torch.testing.assert_close(ours[name], parameter.detach(), rtol=10 * tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_learns_one_batch_by_heart(dtype: str):
    """bf16 too: its updates are far below a bf16 weight's resolution, so they must reach the fp32 masters."""
    config = make_config(lr=0.01, max_steps=90, weight_decay=0.0, initializer_range=0.1)
    trainer, state, batches = make_trainer(config, dtype, poison=False), TrainState(), make_batches(config)
    losses = []
    for _ in range(config.steps):
        result, state = trainer.step(batches, state)
        losses.append(result.loss)
    assert losses[0] > 3
    assert losses[-1] < 0.05


# The schedule


def expected_rates(peak: float, steps: int, schedule: ScheduleConfig) -> list[float]:
    """The whole run's learning rates, written down as a list."""
    low, warmup = peak * schedule.min_lr_ratio, schedule.warmup_steps
    rates = [peak * (step + 1) / warmup for step in range(warmup)]
    left = steps - warmup
    if schedule.kind == "constant":
        return rates + left * [peak]
    if schedule.kind == "cosine":
        return rates + [
            low + (peak - low) * (1 + math.cos(math.pi * (i + 1) / left)) / 2 for i in range(left)
        ]
    decay = math.ceil(Fraction(str(schedule.decay_fraction)) * steps)
    falling = min(left, decay) if schedule.kind == "wsd" else left
    return (
        rates + (left - falling) * [peak] + [peak - (peak - low) * (i + 1) / falling for i in range(falling)]
    )


@pytest.mark.parametrize("warmup", [0, 1, 7])
@pytest.mark.parametrize("kind", ["cosine", "linear", "wsd", "constant"])
def test_the_logged_learning_rate_is_the_formula(kind: str, warmup: int):
    config = make_config(kind=kind, warmup_steps=warmup, lr=0.003, max_steps=12, num_hidden_layers=1)
    trainer, state, rates = make_trainer(config, "float32"), TrainState(), []
    for _ in range(12):
        result, state = trainer.step(make_batches(config), state)
        rates.append(result.lr)
    assert rates == pytest.approx(expected_rates(0.003, 12, config.schedule), rel=1e-12)


@pytest.mark.parametrize("steps", [2, 101, 1000])
@pytest.mark.parametrize("low", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("kind", ["cosine", "linear", "wsd", "constant"])
@pytest.mark.parametrize("decay_fraction", [0.01, 0.2, 1.0])
def test_the_learning_rate_rises_to_the_peak_and_falls_to_the_minimum(
    kind: str, low: float, steps: int, decay_fraction: float
):
    for warmup in {0, 1, steps // 10, steps - 1}:
        schedule = ScheduleConfig(
            kind=kind, warmup_steps=warmup, min_lr_ratio=low, decay_fraction=decay_fraction
        )
        rates = [learning_rate(step, steps, 0.5, schedule) for step in range(1, steps + 1)]
        rising, falling = rates[:warmup], rates[max(warmup - 1, 0) :]
        assert rising == sorted(rising)
        assert falling == sorted(falling, reverse=True)
        assert max(rates) <= 0.5
        assert not warmup or rates[warmup - 1] == 0.5
        assert min(rates) >= 0
        assert rates[-1] == pytest.approx(0.5 if kind == "constant" else 0.5 * low, abs=1e-15)


@pytest.mark.parametrize(("fraction", "decaying"), [(0.07, 7), (0.29, 29), (0.071, 8), (1e-9, 1)])
def test_the_decay_takes_exactly_its_share_of_the_steps(fraction: float, decaying: int):
    """In floats 0.07 * 100 is 7.000000000000001, of which the ceiling is 8."""
    schedule = ScheduleConfig(kind="wsd", warmup_steps=0, decay_fraction=fraction)
    rates = [learning_rate(step, 100, 1.0, schedule) for step in range(1, 101)]
    assert sum(rate < 1.0 for rate in rates) == decaying


# The guard

POLICY = DivergenceConfig()
BRIEF = DivergenceConfig(spike_window=8)  # thousands of steps take less time


def poke_loss(trainer: Trainer, value: float) -> None:
    trainer.arena["io.results"][:1].fill_(value)


def poke_gradient(trainer: Trainer, value: float) -> None:
    gradients_of(trainer)["blocks.01.mlp.down"][-1, -1] = value


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("poke", [poke_loss, poke_gradient])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_non_finite_value_never_reaches_a_weight(
    dtype: str, poke: Callable[[Trainer, float], None], value: float, monkeypatch: pytest.MonkeyPatch
):
    """The step is skipped whole and counted; the next good step goes on as if it had not been."""
    config = make_config(kind="constant", gradient_accumulation_steps=2)
    batches = [make_batches(config, seed=step) for step in range(4)]
    trainer = make_trainer(config, dtype)
    _, state = trainer.step(batches[0], TrainState())
    before, healthy = state_tensors(trainer), trainer._micro_batch

    def broken() -> None:
        healthy()
        poke(trainer, value)

    with monkeypatch.context() as patch:
        patch.setattr(trainer, "_micro_batch", broken)
        for skipped in (1, 2):
            result, state = trainer.step(batches[skipped], state)
            assert not result.updated
            assert not (math.isfinite(result.loss) and math.isfinite(result.grad_norm))
            assert (state.step, state.updates, state.guard.skipped) == (1 + skipped, 1, skipped)
            assert state.guard.skips == tuple(range(2, 2 + skipped))
            assert same_bits(state_tensors(trainer), before)
    result, state = trainer.step(batches[3], state)
    assert result.updated
    assert (state.step, state.updates, state.guard.good_steps) == (4, 2, 1)

    untroubled = make_trainer(config, dtype)
    _, state = untroubled.step(batches[0], TrainState())
    untroubled.step(batches[3], state)
    assert same_bits(state_tensors(trainer), state_tensors(untroubled))


def test_a_step_without_any_target_is_finite():
    config = make_config(weight_decay=0.0)
    trainer = make_trainer(config)
    before = trainer.arena["weights"].clone()
    result, _ = trainer.step(make_batches(config, ignored=1.0), TrainState())
    assert (result.loss, result.grad_norm, result.target_tokens) == (0.0, 0.0, 0)
    assert torch.equal(trainer.arena["weights"], before)


def test_fp16_halves_its_scale_until_it_is_1_before_a_step_counts_as_skipped():
    state = GuardState.initial("float16")
    assert state.loss_scale == 2.0**16
    for halvings in range(1, 17):
        verdict, state = judge(state, halvings, 2.5, math.inf, POLICY, "float16")
        assert not verdict.updates
        assert state == GuardState(loss_scale=2.0 ** (16 - halvings))
    for step in (17, 18):
        verdict, state = judge(state, step, 2.5, math.inf, POLICY, "float16")
        assert not verdict.updates
        skips = tuple(range(17, step + 1))
        assert state == GuardState(loss_scale=1.0, skips=skips, skipped=len(skips))
    verdict, state = judge(state, 19, 2.5, 1.0, POLICY, "float16")
    assert (verdict.updates, state.loss_scale, state.good_steps) == (True, 1.0, 1)


def test_fp16_does_not_blame_the_scale_for_a_loss_that_is_not_finite():
    """The scale enters after the loss."""
    state = GuardState.initial("float16")
    verdict, after = judge(state, 1, math.nan, 1.0, POLICY, "float16")
    assert (verdict.updates, after) == (False, replace(state, skips=(1,), skipped=1))


def test_fp16_doubles_its_scale_after_2000_good_steps_up_to_a_limit():
    state = GuardState.initial("float16")
    for step in range(1, 2000):
        _, state = judge(state, step, 2.5, 1.0, BRIEF, "float16")
    assert (state.loss_scale, state.good_steps) == (2.0**16, 1999)
    for norm, scale in ((math.nan, 2.0**15), (1.0, 2.0**17)):
        _, after = judge(state, 2000, 2.5, norm, BRIEF, "float16")
        assert (after.loss_scale, after.good_steps) == (scale, 0)
    for step in range(2000, 22_000):
        _, state = judge(state, step, 2.5, 1.0, BRIEF, "float16")
    assert state.loss_scale == 2.0**24


@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "float64"])
def test_only_fp16_has_a_loss_scale(dtype: str):
    state = GuardState.initial(dtype)
    for step in range(1, 2501):
        verdict, state = judge(state, step, 2.5, 1.0, BRIEF, dtype)
        assert verdict.updates
    assert state.loss_scale == 1.0
    verdict, state = judge(state, 2501, 2.5, math.nan, BRIEF, dtype)
    assert (verdict.updates, state.loss_scale, state.skips) == (False, 1.0, (2501,))


@pytest.mark.parametrize("loss_scale", [2.0**-3, 2.0**6, 2.0**10])
def test_the_loss_scale_cancels(loss_scale: float):
    """A power of two shifts exponents alone, so that in float64 the bits of the step stay the same."""
    config = make_config(gradient_accumulation_steps=2, eps=1e-3)
    plain, scaled = make_trainer(config), make_trainer(config)
    expected, _ = plain.step(make_batches(config), TrainState())
    result, _ = scaled.step(make_batches(config), TrainState(guard=GuardState(loss_scale=loss_scale)))
    assert result == expected
    assert same_bits(state_tensors(plain), state_tensors(scaled))


def test_fp16_trains_like_fp32():
    config = make_config(lr=0.01, eps=1e-3)
    exact, half = make_trainer(config, "float32"), make_trainer(config, "float16")
    ours = train(half, 10, state=TrainState(guard=GuardState(loss_scale=2.0**10)))
    assert ours == pytest.approx(train(exact, 10), rel=0.01)


# Determinism


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_same_seed_gives_the_same_bits_and_another_seed_does_not(dtype: str):
    trainers = [make_trainer(make_config(seed=seed), dtype) for seed in (1, 1, 2)]
    losses = [train(trainer, 3) for trainer in trainers]
    states = [state_tensors(trainer) for trainer in trainers]
    assert losses[0] == losses[1] != losses[2]
    assert same_bits(states[0], states[1])
    assert not torch.equal(states[0]["weights"], states[2]["weights"])


def test_the_poison_changes_nothing():
    """What the tests fill with NaN is never read: a run without it has the same bits."""
    poisoned, plain = (make_trainer(make_config(), "float32", poison=poison) for poison in (True, False))
    assert train(poisoned, 3) == train(plain, 3)
    assert same_bits(state_tensors(poisoned), state_tensors(plain))


def test_the_norm_has_no_part_of_the_padding():
    """Gradient buffers share memory with activations, so what lies between two parameters is never zero."""
    config = make_config(
        hidden_size=22, num_attention_heads=1, num_key_value_heads=1, tie_word_embeddings=False
    )
    trainer = make_trainer(config, poison=False)
    for name in ("gradients.block.0", "gradients.block.1", "gradients.head", "gradients.embedding"):
        trainer.arena[name].fill_(1e3)
    forward_backward(trainer, make_batches(config))
    expected = math.sqrt(sum(float(g.square().sum()) for g in gradients_of(trainer).values()))
    assert gradient_norm(trainer) == pytest.approx(expected, rel=1e-12)
