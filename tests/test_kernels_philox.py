"""albor.kernels.philox: the published generator, equal bits from kernel and torch, rounding without bias."""

from __future__ import annotations

import math

import pytest
import torch
import triton
import triton.language as tl
from kernel_cases import DEVICE, Guarded, empty, randn

from albor.kernels import philox_reference as philox
from albor.kernels.philox import stochastic_bf16, words

__all__ = ["empty"]

# Counter, key, result: the known answers for philox4x32 with 10 rounds that Random123 is distributed with.
KNOWN_ANSWERS = [
    ((0,) * 4, (0,) * 2, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]
SPECIAL = [
    0x00000000, 0x80000000, 0x00000001, 0x80000001, 0x0000FFFF, 0x007FFFFF,  # zeros, subnormal
    0x3F800000, 0xBF800000, 0x3F80FFFF, 0x3F808000, 0xC0490FDB,
    0x7F7F0000, 0x7F7F0001, 0x7F7FFFFF, 0xFF7FFFFF,  # the largest bf16, and beyond it up to the largest fp32
    0x7F800000, 0xFF800000, 0x7F800001, 0x7FFFFFFF, 0xFFFFFFFF, 0x7FC00000,  # infinities and NaN
]  # fmt: skip


@triton.jit
def known_kernel(seed, counter, out):
    c0, c1 = tl.load(counter).to(tl.uint32), tl.load(counter + 1).to(tl.uint32)
    c2, c3 = tl.load(counter + 2).to(tl.uint32), tl.load(counter + 3).to(tl.uint32)
    word0, word1, word2, word3 = tl.philox(tl.load(seed), c0, c1, c2, c3)
    tl.store(out, word0.to(tl.int64))
    tl.store(out + 1, word1.to(tl.int64))
    tl.store(out + 2, word2.to(tl.int64))
    tl.store(out + 3, word3.to(tl.int64))


@triton.jit
def words_kernel(seed, first_group, out, STREAM: tl.constexpr, GROUPS: tl.constexpr):
    group = tl.load(first_group) + tl.arange(0, GROUPS)
    drawn = words(tl.load(seed), group, STREAM)
    tl.store(out + tl.arange(0, 4 * GROUPS), drawn.to(tl.int64))


@triton.jit
def round_kernel(values, bits, out, BLOCK: tl.constexpr):
    lane = tl.arange(0, BLOCK)
    rounded = stochastic_bf16(tl.load(values + lane), tl.load(bits + lane).to(tl.uint32))
    tl.store(out + lane, rounded)


def int64(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int64, device=DEVICE)


def signed(value: int) -> int:
    """The int64 with the bits of this uint64."""
    return value - (1 << 64) if value >> 63 else value


def floats(patterns: list[int]) -> torch.Tensor:
    return torch.tensor(patterns, dtype=torch.int64).to(torch.int32).view(torch.float32)


@pytest.mark.parametrize(("counter", "key", "answer"), KNOWN_ANSWERS)
def test_known_answers(
    counter: tuple[int, ...], key: tuple[int, int], answer: tuple[int, ...], empty: Guarded
):
    drawn = philox.philox(tuple(torch.tensor([c]) for c in counter), key)
    assert tuple(int(word) for word in drawn) == answer
    out = empty(4, dtype=torch.int64)
    known_kernel[(1,)](int64(signed(key[1] << 32 | key[0])), int64(*counter), out)
    assert tuple(out.tolist()) == answer


@pytest.mark.parametrize("seed", [0, 1337, -1, 2**63 - 1])
@pytest.mark.parametrize("group", [0, 5, 2**32 - 3, 2**40 + 1])
@pytest.mark.parametrize("stream", [0, 1, 7])
def test_kernel_and_reference_draw_the_same(seed: int, group: int, stream: int, empty: Guarded):
    out = empty(32, dtype=torch.int64)
    words_kernel[(1,)](int64(seed), int64(group), out, STREAM=stream, GROUPS=8)
    assert torch.equal(out.cpu(), philox.reference(seed, 4 * group, 32, stream))


def test_a_slice_draws_what_the_whole_draws_there():
    whole = philox.reference(3, 0, 64)
    assert whole.shape == (64,)
    for start in range(9):
        for count in (0, 1, 5, 8):
            assert torch.equal(philox.reference(3, start, count), whole[start : start + count])


def test_seeds_streams_and_indices_give_different_uniform_words():
    drawn = [philox.reference(seed, 0, 1 << 14, stream) for seed, stream in ((1, 0), (2, 0), (1, 1))]
    for one in drawn:
        assert int(one.min()) >= 0
        assert int(one.max()) < 1 << 32
        for bit in range(32):  # 6 standard deviations
            assert abs(((one >> bit) & 1).double().mean().item() - 0.5) < 3 / math.sqrt(one.numel())
        assert one.unique().numel() > one.numel() - 4  # birthdays: 0.03 pairs expected
    assert (drawn[0] == drawn[1]).sum() == 0
    assert (drawn[0] == drawn[2]).sum() == 0


def test_the_kernel_rounds_as_the_reference(empty: Guarded):
    values = torch.cat([floats(SPECIAL), randn(256 - len(SPECIAL)).cpu()])
    for bits in (torch.zeros(256).long(), torch.full((256,), 0xFFFF), philox.reference(1, 0, 256)):
        out = empty(256, dtype=torch.bfloat16)
        round_kernel[(1,)](values.to(DEVICE), bits.to(DEVICE), out, BLOCK=256)
        expected = philox.stochastic_round(values, bits)
        assert torch.equal(out.cpu().view(torch.int16), expected.view(torch.int16))


def test_rounding_goes_to_a_neighbour_and_keeps_what_bf16_can_hold():
    values = torch.cat([floats(SPECIAL), randn(1000).cpu()])
    down, up = (philox.stochastic_round(values, torch.full_like(values, b).long()) for b in (0, 0xFFFF))
    nearest = values.bfloat16()
    assert bool(((nearest == down) | (nearest == up) | values.isnan()).all())
    held = nearest.float() == values
    assert torch.equal(down[held], nearest[held])
    assert torch.equal(up[held], nearest[held])
    assert bool(down[values.isnan()].isnan().all())
    assert bool(up[values.isnan()].isnan().all())
    assert not bool(down[values.isfinite()].isinf().any())
    largest = torch.finfo(torch.bfloat16).max
    assert torch.equal(up.isinf(), values.isinf() | (values.isfinite() & (values.abs() > largest)))


@pytest.mark.parametrize("value", [1.001, -1.001, 3.14159, 1e-30, -2.5e20])
def test_rounding_has_no_bias(value: float):
    draws = 1 << 16
    values = torch.full((draws,), value)
    rounded = philox.stochastic_round(values, philox.reference(7, 0, draws)).double()
    low, high = rounded.min().item(), rounded.max().item()
    assert low < values[0].item() < high
    deviation = (high - low) / 2 / math.sqrt(draws)  # of the mean, at most
    assert abs(rounded.mean().item() - values[0].double().item()) < 4 * deviation
