"""Each operation alone against torch's functions and autograd, in float64, at sizes that divide nothing.

Outputs begin as NaN and lie between canaries: what is not written, or written beside its place, shows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import pytest
import torch
from helpers import make_config
from torch.nn import functional as F

from albor import ops
from albor.architecture import IGNORED_TARGET
from albor.memory.arena import Arena
from albor.memory.plan import plan_training

ROWS = 259  # more than ROW_CHUNK and QUERY_BLOCK, and prime
MARGIN, CANARY = 64, -77.0

Empty = Callable[..., torch.Tensor]


@pytest.fixture
def empty() -> Iterator[Empty]:
    """Makes NaN-filled tensors between canaries, and checks every canary when the test is over."""
    buffers = []

    def make(*shape: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
        buffer = torch.full((math.prod(shape) + 2 * MARGIN,), CANARY, dtype=dtype)
        buffers.append(buffer)
        return buffer[MARGIN:-MARGIN].view(shape).fill_(math.nan)

    yield make
    assert buffers
    for buffer in buffers:
        assert (buffer[:MARGIN] == CANARY).all(), "written before its beginning"
        assert (buffer[-MARGIN:] == CANARY).all(), "written past its end"


def filled(empty: Empty, values: torch.Tensor) -> torch.Tensor:
    """`values` between canaries: for what an operation overwrites."""
    return empty(*values.shape, dtype=values.dtype).copy_(values)


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def randint(high: int, *shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(high, shape, generator=torch.Generator().manual_seed(seed))


def workspace(dtype: str = "float64", **keys: int) -> ops.Ops:
    """Operations over poisoned scratch, as the plan of such a model has it."""
    return ops.make_ops(Arena(plan_training(make_config(**keys), "cpu", dtype), poison=True))


def assert_equal(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-12)


def gradients(
    output: torch.Tensor, d_output: torch.Tensor, *inputs: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    return torch.autograd.grad(output, inputs, d_output)


# Embedding


def test_embedding_forward(empty: Empty):
    tokens, weight, out = randint(37, ROWS), randn(37, 22), empty(ROWS, 22)
    workspace().embedding_forward(tokens, weight, out)
    assert torch.equal(out, F.embedding(tokens, weight))


def run_embedding_backward(
    empty: Empty, tokens: torch.Tensor, d_out: torch.Tensor, d_weight: torch.Tensor, dtype: str
):
    keys = {"hidden_size": d_out.shape[1], "num_attention_heads": 1, "num_key_value_heads": 1}
    work = workspace(dtype, **keys, sequence_length=tokens.numel(), micro_batch_size=1)
    index = {name: torch.from_numpy(values) for name, values in work.token_index(tokens.numpy()).items()}
    work.embedding_backward(filled(empty, d_out), index, d_weight)


@pytest.mark.parametrize("lowest", [0, 3], ids=["token-0-occurs", "token-0-absent"])
def test_embedding_backward_adds_to_what_is_there(empty: Empty, lowest: int):
    tokens, d_out, head_share = lowest + randint(20, ROWS), randn(ROWS, 22), randn(37, 22, seed=1)
    d_weight = filled(empty, head_share)
    run_embedding_backward(empty, tokens, d_out, d_weight, "float64")
    assert_equal(d_weight, head_share.index_add(0, tokens, d_out))


def test_embedding_backward_in_bf16_rounds_once_per_token(empty: Empty):
    """900 rows for 2 tokens: a running sum in bf16 would stand still at 512; this is as near as bf16 gets."""
    tokens, d_out = randint(2, 900), 1 + randn(900, 22).abs().to(torch.bfloat16)
    d_weight = empty(37, 22, dtype=torch.bfloat16).zero_()
    run_embedding_backward(empty, tokens, d_out, d_weight, "bfloat16")
    exact = torch.zeros(37, 22, dtype=torch.float64).index_add(0, tokens, d_out.double())
    torch.testing.assert_close(d_weight.double(), exact, rtol=2**-8, atol=0)


# RMSNorm


def rmsnorm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    return F.rms_norm(x, x.shape[-1:], weight, eps)


@pytest.mark.parametrize("with_delta", [True, False], ids=["x+delta", "x"])
def test_rmsnorm_forward_and_recompute(empty: Empty, with_delta: bool):
    x, delta, weight, work = (
        randn(ROWS, 22),
        randn(ROWS, 22, seed=1),
        randn(22, seed=2),
        workspace(hidden_size=22),
    )
    total, out, rstd, again = empty(ROWS, 22), empty(ROWS, 22), empty(ROWS), empty(ROWS, 22)
    work.rmsnorm_forward(x, delta if with_delta else None, weight, 0.01, total, out, rstd)
    expected = x + delta if with_delta else x
    assert_equal(out, rmsnorm(expected, weight, 0.01))
    if with_delta:
        assert torch.equal(total, expected)
    work.rmsnorm_recompute(expected, rstd, weight, again)
    assert torch.equal(again, out)


@pytest.mark.parametrize("add", [True, False])
def test_rmsnorm_backward(empty: Empty, add: bool):
    x, weight = randn(ROWS, 22).requires_grad_(), randn(22, seed=1).requires_grad_()
    d_out, residual, work = randn(ROWS, 22, seed=2), randn(ROWS, 22, seed=3), workspace(hidden_size=22)
    expected_x, expected_weight = gradients(rmsnorm(x, weight, 0.01), d_out, x, weight)
    rstd = (x.detach().pow(2).mean(-1) + 0.01).rsqrt()
    d_x, d_weight = filled(empty, residual) if add else empty(ROWS, 22), empty(22)
    work.rmsnorm_backward(d_out, x.detach(), rstd, weight.detach(), d_x, d_weight, residual=add)
    assert_equal(d_x, expected_x + residual if add else expected_x)
    assert_equal(d_weight, expected_weight)


# Linear layers


@pytest.mark.parametrize("scale", [1.0, 0.375])
def test_linear(empty: Empty, scale: float):
    x, weight, d_out = (
        randn(ROWS, 22).requires_grad_(),
        randn(29, 22, seed=1).requires_grad_(),
        randn(ROWS, 29, seed=2),
    )
    expected = scale * F.linear(x, weight)
    expected_x, expected_weight = gradients(expected, d_out, x, weight)
    out, d_x, d_weight = empty(ROWS, 29), empty(ROWS, 22), empty(29, 22)
    work = workspace()
    work.linear_forward(x.detach(), weight.detach(), out, scale=scale)
    work.linear_backward_input(d_out, weight.detach(), d_x, scale=scale)
    work.linear_backward_weight(d_out, x.detach(), d_weight, scale=scale)
    assert_equal(out, expected.detach())
    assert_equal(d_x, expected_x)
    assert_equal(d_weight, expected_weight)
    work.linear_backward_weight(d_out, x.detach(), d_weight, add=True, scale=scale)
    assert_equal(d_weight, 2 * expected_weight)


# Rotary positions


def rotary_tables(empty: Empty, positions: int, half: int, theta: float) -> tuple[torch.Tensor, torch.Tensor]:
    cos, sin = empty(positions, half), empty(positions, half)
    ops.rotary_tables(theta, cos, sin)
    return cos, sin


HEADS = {"hidden_size": 32, "num_attention_heads": 8, "num_key_value_heads": 2}  # head width 4: half of it 2


@pytest.mark.parametrize("start", [0, 5])
def test_rotary_turns_queries_and_keys_by_their_position(empty: Empty, start: int):
    """Pair i of position t turns by t * theta^(-2i/D), as complex numbers; the values stay as they are."""
    packed = randn(2 * ROWS, 12, 4)
    qkv = filled(empty, packed.view(2 * ROWS, 48))
    cos, sin = rotary_tables(empty, ROWS + 5, 2, 50.0)
    workspace(**HEADS).rotary(qkv, cos, sin, 10, ROWS, start=start)

    angle = torch.outer(
        start + torch.arange(ROWS).double(), torch.tensor([1.0, 50.0**-0.5], dtype=torch.float64)
    )
    turn = torch.polar(torch.ones_like(angle), angle).repeat(2, 1).unsqueeze(1)
    turned = torch.complex(packed[:, :10, :2], packed[:, :10, 2:]) * turn
    assert_equal(qkv.view(-1, 12, 4)[:, :10], torch.cat([turned.real, turned.imag], -1))
    assert torch.equal(qkv.view(-1, 12, 4)[:, 10:], packed[:, 10:])


def test_rotary_inverse_is_the_inverse_and_the_gradient(empty: Empty):
    """The transpose of a rotation: <rotate(x), y> = <x, inverse(y)> for any x and y."""
    x, y, work = randn(ROWS, 48), randn(ROWS, 48, seed=1), workspace(**HEADS)
    tables = rotary_tables(empty, ROWS, 2, 50.0)
    forth, back = filled(empty, x), filled(empty, y)
    work.rotary(forth, *tables, 10, ROWS)
    work.rotary(back, *tables, 10, ROWS, inverse=True)
    assert_equal((forth * y).sum(), (x * back).sum())
    work.rotary(forth, *tables, 10, ROWS, inverse=True)
    assert_equal(forth, x)


# Attention


def attention(qkv: torch.Tensor, length: int, heads: int, kv_heads: int) -> torch.Tensor:
    """torch's own, on packed qkv (N, (H + 2K) D)."""
    split = qkv.view(-1, length, heads + 2 * kv_heads, qkv.shape[1] // (heads + 2 * kv_heads)).transpose(1, 2)
    q, k, v = split.split([heads, kv_heads, kv_heads], dim=1)
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    return out.transpose(1, 2).reshape(qkv.shape[0], -1)


@pytest.mark.parametrize("length", [1, 7, 256, 259, 600])
@pytest.mark.parametrize(("heads", "kv_heads"), [(1, 1), (3, 3), (6, 2), (8, 1)])
def test_attention(empty: Empty, heads: int, kv_heads: int, length: int):
    batch, width = 2, 6
    keys = {"hidden_size": heads * width, "num_attention_heads": heads, "num_key_value_heads": kv_heads}
    work = workspace(**keys, sequence_length=length)
    qkv = randn(batch * length, (heads + 2 * kv_heads) * width).requires_grad_()
    d_out = randn(batch * length, heads * width, seed=1)
    expected = attention(qkv, length, heads, kv_heads)
    (expected_qkv,) = gradients(expected, d_out, qkv)

    out, d_qkv = empty(*d_out.shape), empty(*qkv.shape)
    work.attention_forward(qkv.detach(), out, None, length, kv_heads, width)
    work.attention_backward(d_out, qkv.detach(), out, None, d_qkv, length, kv_heads, width)
    assert_equal(out, expected.detach())
    assert_equal(d_qkv, expected_qkv)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_at_large_scores_is_finite_and_causal(empty: Empty, dtype: torch.dtype):
    """Scores of some 1e6: the softmax is one-hot, nothing overflows, and the mask is below all of them."""
    qkv, d_out = 1e3 * randn(300, 24, dtype=dtype), 1e3 * randn(300, 12, seed=1, dtype=dtype)
    keys = {"hidden_size": 12, "num_attention_heads": 2, "num_key_value_heads": 1, "sequence_length": 300}
    work = workspace(str(dtype).removeprefix("torch."), **keys)
    out, d_qkv = empty(300, 12, dtype=dtype), empty(300, 24, dtype=dtype)
    work.attention_forward(qkv, out, None, 300, 1, 6)
    work.attention_backward(d_out, qkv, out, None, d_qkv, 300, 1, 6)
    assert out.isfinite().all()
    assert out.abs().max() <= qkv.abs().max()
    assert d_qkv.isfinite().all()
    past = out[:150].clone()
    qkv[150:] *= -2
    work.attention_forward(qkv, out, None, 300, 1, 6)
    assert torch.equal(out[:150], past)


# SwiGLU


def test_swiglu(empty: Empty):
    gate_up, d_out = randn(ROWS, 58).requires_grad_(), randn(ROWS, 29, seed=1)
    expected = F.silu(gate_up[:, :29]) * gate_up[:, 29:]
    (expected_gate_up,) = gradients(expected, d_out, gate_up)

    out, again, in_place = empty(ROWS, 29), empty(ROWS, 29), filled(empty, gate_up.detach())
    work = workspace(intermediate_size=29)
    work.swiglu_forward(gate_up.detach(), out)
    work.swiglu_backward(filled(empty, d_out), in_place, again)
    assert_equal(out, expected.detach())
    assert torch.equal(again, out)
    assert_equal(in_place, expected_gate_up)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_swiglu_and_rmsnorm_are_finite_at_large_magnitudes(empty: Empty, dtype: torch.dtype):
    work = workspace(str(dtype).removeprefix("torch."), hidden_size=22, intermediate_size=11)
    x, weight = 1e6 * randn(ROWS, 22, dtype=dtype), randn(22, seed=1, dtype=dtype)
    total, out, rstd = (
        empty(ROWS, 22, dtype=dtype),
        empty(ROWS, 22, dtype=dtype),
        empty(ROWS, dtype=torch.float32),
    )
    work.rmsnorm_forward(x, torch.zeros_like(x), weight, 1e-5, total, out, rstd)
    assert out.isfinite().all()
    assert out.abs().max() <= 22**0.5 * weight.abs().max() * 1.01
    d_x, d_weight = empty(ROWS, 22, dtype=dtype), empty(22, dtype=dtype)
    work.rmsnorm_backward(x, x, rstd, weight, d_x, d_weight, residual=False)
    assert d_x.isfinite().all()
    assert d_weight.isfinite().all()
    gate_up, product = filled(empty, x), empty(ROWS, 11, dtype=dtype)
    work.swiglu_backward(filled(empty, x[:, :11].contiguous()), gate_up, product)
    assert gate_up.isfinite().all()
    assert product.isfinite().all()


# Cross-entropy


def exact_loss(logits: torch.Tensor, targets: torch.Tensor, smoothing: float, z_loss: float) -> torch.Tensor:
    """torch's own cross-entropy per token, and the z-loss written out."""
    options = {"ignore_index": IGNORED_TARGET, "label_smoothing": smoothing, "reduction": "none"}
    z_terms = z_loss * logits.logsumexp(-1).square() * (targets != IGNORED_TARGET)
    return F.cross_entropy(logits, targets, **options) + z_terms


@pytest.mark.parametrize("spread", [1.0, 1e4], ids=["usual", "spread-1e4"])
@pytest.mark.parametrize("ignored", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("scale", [None, 0.37])
@pytest.mark.parametrize(("smoothing", "z_loss"), [(0.0, 0.0), (0.1, 0.0), (0.0, 1e-4), (0.2, 0.01)])
def test_cross_entropy(
    empty: Empty, spread: float, ignored: float, scale: float | None, smoothing: float, z_loss: float
):
    logits, targets = (spread * randn(29, 37)).requires_grad_(), randint(37, 29)
    targets[: round(29 * ignored)] = IGNORED_TARGET
    expected = exact_loss(logits, targets, smoothing, z_loss)

    in_place, losses = filled(empty, logits.detach()), empty(29)
    factor = None if scale is None else torch.tensor([scale], dtype=torch.float64)
    workspace().cross_entropy(
        in_place, targets, losses, None, factor, label_smoothing=smoothing, z_loss=z_loss
    )
    torch.testing.assert_close(losses, expected.detach(), rtol=1e-12, atol=1e-12)
    if scale is not None:
        (expected_logits,) = gradients(expected.sum() * scale, torch.tensor(1.0).double(), logits)
        torch.testing.assert_close(in_place, expected_logits, rtol=1e-11, atol=1e-15)


@pytest.mark.parametrize("spread", [1.0, 1e4], ids=["usual", "spread-1e4"])
def test_cross_entropy_in_bf16_loses_only_the_logits_rounding(empty: Empty, spread: float):
    """From the same bf16 logits, the loss is exact in fp32 and the gradient is rounded once."""
    rounded, targets = (spread * randn(29, 37)).bfloat16(), randint(37, 29)
    exact = rounded.double().requires_grad_()
    expected = F.cross_entropy(exact, targets, reduction="none")
    (expected_logits,) = gradients(expected.sum(), torch.tensor(1.0).double(), exact)

    logits, losses, probabilities = (
        filled(empty, rounded),
        empty(29, dtype=torch.float32),
        empty(29, 37, dtype=torch.float32),
    )
    work = workspace("bfloat16")
    work.cross_entropy(logits, targets, losses, probabilities, torch.ones(1))
    torch.testing.assert_close(losses.double(), expected.detach(), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(logits.double(), expected_logits, rtol=2**-8, atol=1e-7)


# Gradient and optimizer arithmetic


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_accumulate_adds_wide(empty: Empty, dtype: torch.dtype):
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    gradient, before = randn(20_011, dtype=dtype), randn(20_011, seed=1, dtype=wide)
    sums = filled(empty, before)
    ops.accumulate(gradient, sums, randn(1000, dtype=wide))
    assert torch.equal(sums, before + gradient)


@pytest.mark.parametrize("size", [1, 4095, 4096, 1_000_003])
def test_norm_is_exact_at_any_size(size: int):
    """One fp32 sum over a million squares is 1e-5 off, and the more the larger the model."""
    flat = randn(size, dtype=torch.float32)
    assert ops.norm(flat) == pytest.approx(flat.double().norm().item(), rel=1e-7)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", [0, 5000, -1])
def test_norm_of_a_non_finite_gradient_is_not_finite(bad: float, place: int):
    flat = torch.ones(9001)
    flat[place] = bad
    assert not math.isfinite(ops.norm(flat))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_the_largest_number_is_finite_and_one_beyond_it_is_not(dtype: torch.dtype):
    """Wherever it lies; a moment of 1e20 is a large number whose square is none."""
    flat = torch.full((9001,), torch.finfo(dtype).max, dtype=dtype)
    flat[::2] *= -1
    assert ops.is_finite(flat)
    for bad in (math.nan, math.inf, -math.inf):
        for place in (0, 4097, -1):
            poisoned = flat.clone()
            poisoned[place] = bad
            assert not ops.is_finite(poisoned)
    assert ops.is_finite(flat[:1])


@pytest.mark.parametrize(("decayed", "lr_scale"), [(0, 1.0), (700, 1.0), (1003, 1.0), (700, 0.3)])
def test_adamw_equals_torch_over_20_steps(empty: Empty, decayed: int, lr_scale: float):
    keys = {"betas": (0.8, 0.95), "eps": 1e-6}
    parts = [torch.nn.Parameter(part) for part in randn(1003).split([decayed, 1003 - decayed])]
    groups = [
        {"params": [parts[0]], "lr": 0.02 * lr_scale, "weight_decay": 0.1 / lr_scale},
        {"params": [parts[1]], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=0.02, **keys)
    master = filled(empty, torch.cat(parts).detach())
    weights, first, second = empty(1003, dtype=torch.bfloat16), empty(1003).zero_(), empty(1003).zero_()
    work = workspace()
    for step in range(1, 21):
        gradient = randn(1003, seed=step)
        for part, grad in zip(parts, gradient.split([decayed, 1003 - decayed]), strict=True):
            part.grad = 0.25 * grad
        optimizer.step()
        work.begin_update(ops.UpdateScalars(0.02, 0.25, step, seed=0), keys["betas"])
        work.adamw(
            weights, master, filled(empty, gradient), first, second,
            decayed=decayed, start=0, weight_decay=0.1, lr_scale=lr_scale, **keys,
        )  # fmt: skip
        torch.testing.assert_close(master, torch.cat(parts).detach(), rtol=1e-12, atol=1e-14)
        assert torch.equal(weights, master.bfloat16())
