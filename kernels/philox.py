"""Random bits that are a function of (seed, index), and rounding with them: the same on every device.

Philox4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3") turns a 128-bit counter and
a 64-bit key into four 32-bit words. Here the key is a seed, and the counter a group of four indices and a
stream, its words from the low to the high one:

    word(seed, stream, index) = philox((group, group >> 32, stream, 0), (seed, seed >> 32))[index % 4]
    group = index // 4

There is no state: nothing to save, and a slice draws what the whole would have drawn there. `words` and
`stochastic_bf16` are for kernels; `reference` and `stochastic_round` are the same functions, bit for bit, in
plain torch.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

_WORD = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10


@triton.jit
def words(seed, group, stream: tl.constexpr):
    """One 32-bit word for each of 4 * len(group) indices; `group` (G,) int64 counts up by 1 from any number.

    All four words of a call are used: index 4 g + k gets word k of group g.
    """
    low = (group & 0xFFFFFFFF).to(tl.uint32)
    high = (group >> 32).to(tl.uint32)
    zero = low * 0
    word0, word1, word2, word3 = tl.philox(seed, low, high, zero + stream, zero)
    return tl.interleave(tl.interleave(word0, word2), tl.interleave(word1, word3))


@triton.jit
def stochastic_bf16(values, bits):
    """`values` fp32 as bf16, rounded up or down by the low 16 of `bits` as in stochastic_round."""
    pattern = values.to(tl.int32, bitcast=True)
    # 0x7FC0 is a NaN. Adding would carry a NaN of large payload to zero; dropping 16 bits of payload, to
    # infinity.
    rounded = tl.where(values == values, (pattern + (bits & 0xFFFF).to(tl.int32)) >> 16, 0x7FC0)
    return rounded.to(tl.int16).to(tl.bfloat16, bitcast=True)


def philox(counter: tuple[torch.Tensor, ...], key: tuple[int, int]) -> tuple[torch.Tensor, ...]:
    """Philox4x32-10; the counter is four int64 tensors of one shape, as is the result, that hold uint32."""
    c0, c1, c2, c3 = counter
    key0, key1 = key
    for _ in range(_ROUNDS):
        # The product of two uint32 wraps around in int64, but its 64 bits are right.
        product0, product1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1 = ((product1 >> 32) & _WORD) ^ c1 ^ key0, product1 & _WORD
        c2, c3 = ((product0 >> 32) & _WORD) ^ c3 ^ key1, product0 & _WORD
        key0, key1 = (key0 + _KEY_STEPS[0]) & _WORD, (key1 + _KEY_STEPS[1]) & _WORD
    return c0, c1, c2, c3


def reference(seed: int, start: int, count: int, stream: int = 0) -> torch.Tensor:
    """The words of indices start .. start + count - 1, as int64 (count,) on the CPU.

    `seed` is an int64 (a negative one counts as its bit pattern), `stream` below 2^32, `start` at least 0.
    """
    group = torch.arange(start // 4, (start + count + 3) // 4, dtype=torch.int64)
    zero = torch.zeros_like(group)
    drawn = philox((group & _WORD, group >> 32, zero + stream, zero), (seed & _WORD, (seed >> 32) & _WORD))
    return torch.stack(drawn, -1).view(-1)[start % 4 : start % 4 + count]


def stochastic_round(values: torch.Tensor, bits: torch.Tensor) -> torch.Tensor:
    """`values` fp32 as bf16: up with the probability that the discarded bits are of a whole step, else down.

    Adds the low 16 of `bits` (int64, of the same shape) to the fp32 pattern and drops its low 16. So the
    expectation is the value (Gupta et al. 2015, arXiv:1502.02551), and what bf16 can hold stays as it is,
    infinities too. The neighbours of what is beyond the largest finite bf16 are that and infinity. NaN
    becomes the NaN 0x7FC0.
    """
    rounded = (values.view(torch.int32) + (bits & 0xFFFF).to(torch.int32)) >> 16
    return rounded.masked_fill_(values.isnan(), 0x7FC0).to(torch.int16).view(torch.bfloat16)
