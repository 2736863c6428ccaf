"""The random bits of `albor.kernels.philox`, and the rounding, in plain torch: the same, bit for bit.

For the CPU's path, which needs no Triton, and for tests.
"""

from __future__ import annotations

import torch

_WORD = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10


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
