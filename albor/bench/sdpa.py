"""The backends of scaled_dot_product_attention, under the names that `albor.floor` has for them."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

from torch.nn.attention import SDPBackend, sdpa_kernel

from albor.floor import SDPA_BACKENDS

_BACKENDS = (SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.CUDNN_ATTENTION)
SDPA = dict(zip(SDPA_BACKENDS, _BACKENDS, strict=True))


def only(name: str) -> AbstractContextManager[Any]:
    """In this context a call that the backend refuses fails."""
    return sdpa_kernel(SDPA[name])


def preferring(name: str | None) -> AbstractContextManager[Any]:
    """In this context it is taken wherever it can be; None: PyTorch chooses.

    The others stay on behind it, fastest first: a system that calls attention in a way that the preferred one
    refuses, with a mask for instance, must not end up with unfused arithmetic.
    """
    if name is None:
        return nullcontext()
    others = (backend for backend in _BACKENDS if backend != SDPA[name])
    return sdpa_kernel([SDPA[name], *others, SDPBackend.MATH], set_priority=True)
