"""The measures by which two trainings are held against each other."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from albor.canary.plain import make_adamw, step_adamw
from albor.config import RunConfig

_CHUNK = 2**22  # elements that are compared at a time in float64: 64 MiB for the two sides
_SAMPLE = 4096  # elements of each parameter whose updates are followed


@dataclass(frozen=True)
class Agreement:
    """How well two gradients of one parameter agree."""

    cosine: float  # of the angle between them; 1 where both are zero, 0 where one is, or is not finite
    norm: float  # ours
    reference_norm: float

    @property
    def norm_ratio(self) -> float:
        """Ours by the reference's; 1 where both are zero."""
        if self.reference_norm > 0:
            return self.norm / self.reference_norm
        return 1.0 if self.norm == self.reference_norm else math.inf

    @classmethod
    def of(cls, ours: torch.Tensor, theirs: torch.Tensor, scale: float = 1.0) -> Agreement:
        """`scale * ours` against `theirs`, of the same shape, on any devices; summed in float64."""
        pairs = zip(ours.flatten().split(_CHUNK), theirs.flatten().split(_CHUNK), strict=True)
        dot = squared = squared_theirs = 0.0
        for a, b in pairs:
            a, b = a.to(b.device).double() * scale, b.double()
            products = torch.stack([a @ b, a @ a, b @ b]).tolist()
            dot, squared, squared_theirs = (
                sum(pair) for pair in zip((dot, squared, squared_theirs), products, strict=True)
            )
        norm, reference_norm = math.sqrt(squared), math.sqrt(squared_theirs)
        if norm == reference_norm == 0.0:
            return cls(1.0, norm, reference_norm)
        product = norm * reference_norm
        return cls(dot / product if product > 0 and math.isfinite(product) else 0.0, norm, reference_norm)


def compare_gradients(
    ours: Mapping[str, torch.Tensor], theirs: Mapping[str, torch.Tensor], scale: float
) -> dict[str, Agreement]:
    """The agreement of every parameter's gradient; `scale` makes ours the true one."""
    return {name: Agreement.of(ours[name], theirs[name], scale) for name in theirs}


class UpdateCheck:
    """Is albor's optimizer AdamW? torch's follows a sample of every parameter, with albor's own gradients.

    Both then start from the same numbers and see the same numbers, so that they must agree to rounding in any
    compute dtype, step after step: learning rate, clipping, moments, bias correction, which parameters decay,
    and whether a parameter moves at all. What the gradients are worth is not asked here.
    """

    def __init__(self, weights: Mapping[str, torch.Tensor], config: RunConfig):
        """`weights` by `short_name`."""
        self.grad_clip, self.steps = config.optimizer.grad_clip, 0
        self._initial = {name: _sample(weight) for name, weight in weights.items()}
        # A matrix's sample stays a matrix, by which the optimizer's groups are made.
        self._expected = {
            name: initial.clone().view(1, -1) if weights[name].dim() > 1 else initial.clone()
            for name, initial in self._initial.items()
        }
        self._optimizer = make_adamw(self._expected, config)

    def expect(self, gradients: Mapping[str, torch.Tensor], scale: float, norm: float, lr: float) -> None:
        """Takes the step that albor is about to take; `norm` is the global norm of `scale * gradients`."""
        if self.grad_clip:
            scale *= min(1.0, self.grad_clip / (norm + 1e-6))
        for name, sample in self._expected.items():
            sample.grad = (_sample(gradients[name]) * scale).view(sample.shape)
        step_adamw(self._optimizer, lr)
        self.steps += 1

    def errors(self, weights: Mapping[str, torch.Tensor]) -> dict[str, float]:
        """How far `weights` are from where they should be, relative to the way that they have come since the
        start, in the L2 norm per parameter.

        What the rounding of stored weights may add up to is taken off, so that short ways of large weights
        count no noise. Where neither side is finite any more, they agree.
        """
        found = {}
        for name, sample in self._expected.items():
            initial, expected = self._initial[name].double(), sample.flatten().double()
            rounding = torch.finfo(weights[name].dtype).eps * math.sqrt(self.steps) * initial.norm().item()
            ours = _sample(weights[name]).double()
            compared = ours.isfinite() | expected.isfinite()
            away = (ours - expected)[compared].norm().item()
            way = (expected - initial)[compared].norm().item()
            beyond = max(0.0, away - rounding) if math.isfinite(away) else math.inf
            found[name] = beyond / way if way > 0 else (math.inf if beyond > 0 else 0.0)
        return found


def _sample(tensor: torch.Tensor) -> torch.Tensor:
    """Up to twice `_SAMPLE` elements in fp32 on the CPU, a copy."""
    # An odd stride visits every column of a matrix whose width is a power of two.
    stride = max(1, tensor.numel() // _SAMPLE) | 1
    return tensor.detach().flatten()[::stride].to("cpu", torch.float32, copy=True)
