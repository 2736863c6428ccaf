"""Random bits that are a function of (seed, index), and rounding with them: the same on every device.

Philox4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3") turns a 128-bit counter and
a 64-bit key into four 32-bit words. Here the key is a seed, and the counter a group of four indices and a
stream, its words from the low to the high one:

    word(seed, stream, index) = philox((group, group >> 32, stream, 0), (seed, seed >> 32))[index % 4]
    group = index // 4

There is no state: nothing to save, and a slice draws what the whole would have drawn there. `words` and
`stochastic_bf16` are for kernels; `philox_reference` has the same functions, bit for bit, in plain torch.
"""

from __future__ import annotations

import triton
import triton.language as tl


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
