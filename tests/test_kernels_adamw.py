"""albor.kernels.adamw: against torch.optim.AdamW in float64, and bit for bit against plain torch."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch
from kernel_cases import DEVICE, Guarded, assert_close, empty, randn

from albor.kernels import adamw
from albor.kernels.philox_reference import stochastic_round

__all__ = ["empty"]

BETAS, EPS, DECAY = (0.9, 0.95), 1e-8, 0.1
GRADIENT_SCALE = 0.25
# In the interpreter a store of fp32 as bf16 truncates; rounding of the weights to bf16 is for a GPU to show.
HALF = [torch.float16, torch.bfloat16] if DEVICE == "cuda" else [torch.float16]
SIZES = [(1, 0), (37, 37), (1024, 1024), (2500, 1300), (2500, 0)]  # elements, of which decayed


@dataclass
class State:
    """What one slice holds; `weights` are the masters where there are none."""

    weights: torch.Tensor
    master: torch.Tensor | None
    first: torch.Tensor
    second: torch.Tensor

    def tensors(self) -> list[torch.Tensor]:
        kept = (self.weights, self.master, self.first, self.second)
        return [tensor for tensor in kept if tensor is not None]

    def update(self, gradient: torch.Tensor, scalars: torch.Tensor, decayed: int, **more) -> None:
        adamw.update(
            self.weights, self.master, gradient, self.first, self.second, scalars, decayed,
            betas=BETAS, eps=EPS, weight_decay=DECAY, **more,
        )  # fmt: skip


def fresh(n: int, dtype: torch.dtype, empty: Guarded) -> State:
    """The state before the first step, with masters where the weights are fp16 or, on a GPU, bf16."""
    values = randn(n, seed=n)
    master = None if dtype == torch.float32 else empty.filled(values)
    zero = torch.zeros(n, device=DEVICE)
    return State(empty.filled(values.to(dtype)), master, empty.filled(zero), empty.filled(zero))


def bf16_state(n: int, empty: Guarded) -> State:
    """A state in the middle of a run: second moments are positive."""
    values = [randn(n, seed=n + k).bfloat16() for k in range(3)]
    weights, first, second = (empty.filled(t) for t in (values[0], 0.1 * values[1], values[2].square()))
    return State(weights, None, first, second)


def scalars_of(step: int, lr: float) -> torch.Tensor:
    corrections = (1 - BETAS[0] ** step, 1 - BETAS[1] ** step)
    return torch.tensor([lr, GRADIENT_SCALE, *corrections], device=DEVICE)


def twin(
    state: State, gradient: torch.Tensor, scalars: torch.Tensor, decayed: int, lr_scale: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Weights and moments after one step, in fp32 on the CPU: the kernel's operations in its order."""
    source = state.weights if state.master is None else state.master
    p, m, v, g = (t.cpu().float() for t in (source, state.first, state.second, gradient))
    lr, scale, correction1, correction2 = scalars.cpu()
    g = g * scale
    decays, step = torch.arange(len(p)) < decayed, lr / correction1
    p = torch.where(decays, p * (1 - lr * DECAY), p)
    steps = torch.where(decays, step * torch.tensor(lr_scale), step)
    m = m * BETAS[0] + g * (1 - BETAS[0])
    v = v * BETAS[1] + g * g * (1 - BETAS[1])
    return p - steps * m / (root(v) / root(correction2) + EPS), m, v


def root(x: torch.Tensor) -> torch.Tensor:
    """Correctly rounded, which torch.sqrt in fp32 is not on every CPU."""
    return x.double().sqrt().float()


def same_bits(ours: torch.Tensor, expected: torch.Tensor) -> bool:
    integer = torch.int16 if ours.element_size() == 2 else torch.int32
    return torch.equal(ours.cpu().view(integer), expected.view(integer))


@pytest.mark.parametrize("gradient_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
@pytest.mark.parametrize(("n", "decayed"), SIZES)
def test_as_torch_over_several_steps(
    n: int, decayed: int, dtype: torch.dtype, gradient_dtype: torch.dtype, empty: Guarded
):
    state = fresh(n, dtype, empty)
    source = state.weights if state.master is None else state.master
    exact = [torch.nn.Parameter(part.double()) for part in (source[:decayed], source[decayed:])]
    optimizer = torch.optim.AdamW(
        [{"params": [exact[0]], "weight_decay": DECAY}, {"params": [exact[1]], "weight_decay": 0.0}],
        betas=BETAS,
        eps=EPS,
    )
    for step in range(1, 6):
        gradient = empty.filled(randn(n, seed=100 * step + n, dtype=gradient_dtype))
        before = gradient.clone()
        scalars = scalars_of(step, lr=1e-2 / step)
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 / step
        for parameter, part in zip(exact, (gradient[:decayed], gradient[decayed:]), strict=True):
            parameter.grad = part.double() * GRADIENT_SCALE
        optimizer.step()
        state.update(gradient, scalars, decayed)
        assert torch.equal(gradient, before)
    moments = [optimizer.state[parameter] for parameter in exact if parameter.numel()]
    assert_close(source, torch.cat(exact).detach(), 1e-6)
    assert_close(state.first, torch.cat([m["exp_avg"] for m in moments]), 1e-6)
    assert_close(state.second, torch.cat([m["exp_avg_sq"] for m in moments]), 1e-6)
    assert torch.equal(state.weights, source.to(dtype))


@pytest.mark.parametrize("lr_scale", [1.0, 0.3])
@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
def test_fp32_state_has_the_bits_of_plain_torch(dtype: torch.dtype, lr_scale: float, empty: Guarded):
    state = fresh(1500, dtype, empty)
    state.first.copy_(randn(1500, seed=3))
    state.second.copy_(randn(1500, seed=4).square())
    gradient, scalars = randn(1500, seed=5), scalars_of(7, 3e-4)
    p, m, v = twin(state, gradient, scalars, 700, lr_scale)
    state.update(gradient, scalars, 700, lr_scale=lr_scale)
    for ours, expected in zip(state.tensors()[-3:], (p, m, v), strict=True):
        assert same_bits(ours, expected)


def test_bf16_weights_follow_their_masters(empty: Guarded):
    """Within one bf16 step: both truncation, which the interpreter does, and rounding stay within it."""
    state = fresh(300, torch.bfloat16, empty)
    assert state.master is not None
    state.update(randn(300, seed=1), scalars_of(1, 1e-2), 100)
    assert bool(((state.weights.float() - state.master).abs() <= state.master.abs() * 2**-7).all())


@pytest.mark.parametrize("gradient_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("start", [0, 1, 2, 7, 4 * 2**32 - 6, 5 * 2**33])
@pytest.mark.parametrize("n", [5, 2048, 3000])
def test_bf16_state_has_the_bits_of_plain_torch(
    n: int, start: int, gradient_dtype: torch.dtype, empty: Guarded
):
    state, decayed = bf16_state(n, empty), n // 3
    gradient, scalars = randn(n, seed=9, dtype=gradient_dtype), scalars_of(7, 1e-2)
    seed, lr_scale = -987654321987654321 + n, 0.3 if start else 1.0
    wide = twin(state, gradient, scalars, decayed, lr_scale)
    bits = adamw.rounding_bits(seed, start, n)
    state.update(
        gradient, scalars, decayed,
        seed=torch.tensor([seed], device=DEVICE), start=start, lr_scale=lr_scale,
    )  # fmt: skip
    for ours, exact, random in zip(state.tensors(), wide, bits, strict=True):
        assert same_bits(ours, stochastic_round(exact, random))


def test_bf16_state_does_not_depend_on_how_the_buffer_is_cut(empty: Guarded):
    n, decayed, scalars = 3000, 1100, scalars_of(3, 1e-2)
    gradient, seed = randn(n, seed=2), torch.tensor([5], device=DEVICE)
    whole, cut = bf16_state(n, empty), bf16_state(n, empty)
    whole.update(gradient, scalars, decayed, seed=seed, start=10)
    for begin, end in ((0, 3), (3, 1001), (1001, 3000)):
        part = State(cut.weights[begin:end], None, cut.first[begin:end], cut.second[begin:end])
        inside = min(max(decayed - begin, 0), end - begin)
        part.update(gradient[begin:end], scalars, inside, seed=seed, start=10 + begin)
    for one, other in zip(whole.tensors(), cut.tensors(), strict=True):
        assert torch.equal(one, other)


def test_another_seed_rounds_otherwise_and_the_three_tensors_independently(empty: Guarded):
    states = [bf16_state(2000, empty) for _ in range(2)]
    for seed, state in enumerate(states):
        state.update(randn(2000), scalars_of(3, 1e-2), 0, seed=torch.tensor([seed], device=DEVICE))
    for one, other in zip(states[0].tensors(), states[1].tensors(), strict=True):
        assert 0 < int((one != other).sum()) < 2000
    drawn = torch.stack([bits & 0xFFFF for bits in adamw.rounding_bits(0, 0, 1 << 14)]).double()
    correlation = torch.corrcoef(drawn) - torch.eye(3)
    assert float(correlation.abs().max()) < 4 / math.sqrt(1 << 14)


def test_updates_below_a_step_of_bf16_are_kept_in_the_mean(empty: Guarded):
    """From 1, down in steps of 1e-4, where the next bf16 is 0.0039 away: to nearest, nothing would move."""
    n, steps, lr = 2048, 5, 1e-4
    state = State(*(empty.filled(torch.full((n,), x, device=DEVICE).bfloat16()) if x is not None else None
                    for x in (1.0, None, 0.0, 0.0)))  # fmt: skip
    for step in range(1, steps + 1):
        seed = torch.tensor([step], device=DEVICE)
        state.update(torch.ones(n, device=DEVICE), scalars_of(step, lr), 0, seed=seed)
    moved = 1 - state.weights.double().mean().item()
    deviation = math.sqrt(steps * lr * 2**-8 / n)  # each element moves by 2^-8 with probability lr / 2^-8
    assert abs(moved - steps * lr) < 4 * deviation
    assert moved > 0


def test_a_gradient_that_is_not_finite_shows_in_bf16_state(empty: Guarded):
    state, gradient = bf16_state(8, empty), torch.ones(8, device=DEVICE)
    gradient[2], gradient[5] = math.nan, math.inf
    state.update(gradient, scalars_of(1, 1e-2), 8, seed=torch.tensor([1], device=DEVICE))
    assert state.weights.isfinite().tolist() == [True, True, False, True, True, False, True, True]
    assert state.first[5] == math.inf
    assert bool(state.second[2].isnan())


def test_what_it_has_no_kernel_for_is_refused(empty: Guarded):
    wide, half = torch.zeros(4, device=DEVICE), torch.zeros(4, device=DEVICE).bfloat16()
    seed, scalars = torch.tensor([1], device=DEVICE), scalars_of(1, 1e-3)
    cases = [
        (State(half, None, half, half), wide, {}, "needs a seed"),
        (State(wide, None, wide, wide), wide, {"seed": seed}, "leave the seed out"),
        (State(half, None, wide, wide), wide, {}, "bfloat16, None, float32, float32"),
        (State(wide, wide, wide, wide), wide, {}, "no kernel"),
        (State(wide, None, wide, wide), wide.double(), {}, "gradients in float32 or bfloat16"),
        (State(wide, None, wide, wide), wide[:3], {}, "of one length"),
        (State(wide, None, wide, wide), torch.zeros(8, device=DEVICE)[::2], {}, "contiguous"),
    ]
    for state, gradient, more, message in cases:
        with pytest.raises(ValueError, match=message):
            state.update(gradient, scalars, 0, **more)
