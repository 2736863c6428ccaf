"""AdamW on flat buffers, in one pass over them.

    p = p * (1 - lr * weight_decay)                     for the first `decayed` elements
    m = beta1 * m + (1 - beta1) * g                     g is gradient_scale * gradient
    v = beta2 * v + (1 - beta2) * g^2
    p = p - (s * lr / (1 - beta1^t)) * m / (sqrt(v) / sqrt(1 - beta2^t) + eps)

where s is lr_scale for the first `decayed` elements, and 1 for the others.

(Loshchilov & Hutter 2017, arXiv:1711.05101; in the order in which PyTorch's fused AdamW computes it.) All of
it is fp32, rounded after each operation as IEEE 754 says, with no fused multiply-add: so the result is the
same on every device. The pass waits for memory, which leaves the time for that.

What is kept, by dtype:
- fp32 master weights and moments; the weights, bf16 or fp16, receive the rounded masters;
- fp32 weights and moments, no masters;
- bf16 weights and moments, no masters, each stored with stochastic rounding: rounding to nearest would drop
  every update below 1/512 of a weight, which late in training are nearly all of them. `philox` draws the
  bits, from the seed and the element's index in the whole buffer, so the result does not depend on how that
  is cut: stream 0 gives its low 16 bits to the weight and its high 16 to the first moment, stream 1 its low
  16 to the second.

Overwritten: weights, master, first, second. Only read: gradient, scalars, seed.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from albor.kernels.philox import stochastic_bf16, words
from albor.kernels.philox_reference import reference

_WARPS = 8


# decayed and group change from slice to slice; specialising on them would only compile the same code again.
@triton.jit(do_not_specialize=["decayed", "group"])
def _adamw(
    weights, master, gradient, first, second, scalars, seed, n, decayed, group,
    beta1, one_minus_beta1, beta2, one_minus_beta2, eps, weight_decay, lr_scale,
    SHIFT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    lr = tl.load(scalars)
    gradient_scale = tl.load(scalars + 1)
    step_size = tl.div_rn(lr, tl.load(scalars + 2))
    correction = tl.sqrt_rn(tl.load(scalars + 3))

    block = tl.program_id(0).to(tl.int64)
    index = block * BLOCK + tl.arange(0, BLOCK) - SHIFT
    inside = index < n
    if SHIFT > 0:
        inside = inside & (index >= 0)

    g = tl.load(gradient + index, inside, other=0.0).to(tl.float32) * gradient_scale
    m = tl.load(first + index, inside, other=0.0).to(tl.float32)
    v = tl.load(second + index, inside, other=0.0).to(tl.float32)
    if master is None:
        p = tl.load(weights + index, inside, other=0.0).to(tl.float32)
    else:
        p = tl.load(master + index, inside, other=0.0)

    p = tl.where(index < decayed, p * (1.0 - lr * weight_decay), p)
    steps = tl.where(index < decayed, step_size * lr_scale, step_size)
    m = m * beta1 + g * one_minus_beta1
    v = v * beta2 + g * g * one_minus_beta2
    p = p - tl.div_rn(steps * m, tl.div_rn(tl.sqrt_rn(v), correction) + eps)

    if seed is None:
        tl.store(first + index, m, inside)
        tl.store(second + index, v, inside)
        if master is not None:
            tl.store(master + index, p, inside)
        tl.store(weights + index, p.to(weights.dtype.element_ty), inside)
    else:
        key = tl.load(seed)
        groups = group.to(tl.int64) + block * (BLOCK // 4) + tl.arange(0, BLOCK // 4)
        bits = words(key, groups, 0)
        tl.store(weights + index, stochastic_bf16(p, bits), inside)
        tl.store(first + index, stochastic_bf16(m, bits >> 16), inside)
        tl.store(second + index, stochastic_bf16(v, words(key, groups, 1)), inside)


def update(
    weights: torch.Tensor,
    master: torch.Tensor | None,
    gradient: torch.Tensor,
    first: torch.Tensor,
    second: torch.Tensor,
    scalars: torch.Tensor,
    decayed: int,
    *,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    lr_scale: float = 1.0,
    seed: torch.Tensor | None = None,
    start: int = 0,
) -> None:
    """One step on flat slices of n elements, of which the first `decayed` have weight decay and lr_scale.

    weights, master, first, second (n,) in one of the three combinations above; gradient (n,), fp32 or bf16.
    scalars (4,) fp32: lr, gradient_scale, 1 - beta1^t, 1 - beta2^t. seed (1,) int64, another at each step,
    with bf16 state only; start: the index of the slice's first element in the whole buffer. ValueError on any
    other combination.
    """
    _check(weights, master, gradient, first, second, seed)
    n = weights.numel()
    stochastic = seed is not None
    # 16 bytes per access: a thread has 4 elements of the fp32 state, or 8 of the bf16 state.
    block = 32 * _WARPS * (8 if stochastic else 4)
    # Blocks begin at multiples of 4 in the whole buffer, so that each has whole groups of Philox.
    shift = start % 4 if stochastic else 0
    _adamw[(triton.cdiv(n + shift, block),)](
        weights, master, gradient, first, second, scalars, seed, n, decayed, start // 4,
        betas[0], 1.0 - betas[0], betas[1], 1.0 - betas[1], eps, weight_decay, lr_scale,
        SHIFT=shift, BLOCK=block, num_warps=_WARPS, enable_fp_fusion=False,
    )  # fmt: skip


def rounding_bits(seed: int, start: int, count: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What `update` rounds weights, first and second moments with; int64 (count,), for stochastic_round."""
    bits = reference(seed, start, count)
    return bits, bits >> 16, reference(seed, start, count, stream=1)


def _check(
    weights: torch.Tensor,
    master: torch.Tensor | None,
    gradient: torch.Tensor,
    first: torch.Tensor,
    second: torch.Tensor,
    seed: torch.Tensor | None,
) -> None:
    wide, half = torch.float32, torch.bfloat16
    state = (weights.dtype, None if master is None else master.dtype, first.dtype, second.dtype)
    if state == (half, None, half, half):
        if seed is None:
            raise ValueError("adamw on bf16 state rounds stochastically and needs a seed; give one")
    elif state in {(half, wide, wide, wide), (torch.float16, wide, wide, wide), (wide, None, wide, wide)}:
        if seed is not None:
            raise ValueError(
                "adamw rounds stochastically on bf16 state only; leave the seed out for fp32 state"
            )
    else:
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in state)
        raise ValueError(
            f"adamw has no kernel for weights, master, first, second in {names}; use fp32 masters and "
            "moments, or no masters and all of one dtype, fp32 or bf16"
        )
    if gradient.dtype not in (wide, half):
        raise ValueError(f"adamw reads gradients in float32 or bfloat16, not {gradient.dtype}; convert it")
    tensors = [t for t in (weights, master, gradient, first, second) if t is not None]
    if any(t.shape != (weights.numel(),) or not t.is_contiguous() for t in tensors):
        raise ValueError("adamw takes flat contiguous slices of one length; give each as such a view")
