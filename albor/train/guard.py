"""What keeps a non-finite value out of the weights, and fp16 inside its range."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

_GROWTH_INTERVAL = (
    2000  # good steps after which fp16 tries twice the loss scale (the usual choice: torch.amp's)
)
_LARGEST_SCALE = 2.0**24


@dataclass(frozen=True)
class GuardState:
    """Part of a run's state: what the next step's verdict depends on."""

    skipped_in_row: int = 0
    loss_scale: float = 1.0  # of fp16; bf16 and fp32 have none
    good_steps: int = 0  # since the loss scale last changed

    @classmethod
    def initial(cls, compute_dtype: str) -> GuardState:
        """A new run's state. fp16 gradients of a small model vanish without a scale; bf16 has fp32's
        range.
        """
        return cls(loss_scale=2.0**16) if compute_dtype == "float16" else cls()


def judge(state: GuardState, loss: float, norm: float, compute_dtype: str) -> tuple[bool, GuardState]:
    """Whether a step with this loss and gradient norm may update the weights, and the state after it.

    An fp16 gradient that overflowed only because of the scale is no divergence: the scale is halved, and the
    step counts as skipped in a row only once the scale can go no lower.
    """
    if math.isfinite(loss) and math.isfinite(norm):
        good = state.good_steps + 1
        if compute_dtype == "float16" and good >= _GROWTH_INTERVAL and state.loss_scale < _LARGEST_SCALE:
            return True, GuardState(0, state.loss_scale * 2, 0)
        return True, GuardState(0, state.loss_scale, good)
    if compute_dtype == "float16" and math.isfinite(loss) and state.loss_scale > 1.0:
        return False, replace(state, loss_scale=state.loss_scale / 2, good_steps=0)
    return False, replace(state, skipped_in_row=state.skipped_in_row + 1, good_steps=0)
