"""Randomness is a function of (seed, purpose): no generator with a hidden state is ever read or advanced.

So the order in which things draw does not matter, and a resumed run draws what an uninterrupted one would.
"""

from __future__ import annotations

import hashlib


def derive_seed(seed: int, *purpose: str | int) -> int:
    """A 63-bit seed for one purpose, such as `derive_seed(1337, "initialise", "blocks.00.attention.qkv")`."""
    text = "\x1f".join(map(str, (seed, *purpose)))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1
