"""The next token from logits: temperature, top-k and top-p, by one given uniform number.

Randomness comes in as an argument, so that the same seed writes the same text whatever was drawn before.
"""

from __future__ import annotations

import numpy as np
import torch

from albor.errors import AlborError, ConfigError, Problem
from albor.seeds import derive_seed


class NotFinite(AlborError):
    """The model computed NaN or infinity: no choice among its tokens means anything."""


def uniform_for(seed: int, index: int) -> float:
    """A number in [0, 1) for the `index`-th token that is drawn with `seed`."""
    return (derive_seed(seed, "token", index) >> 10) / 2**53  # 53 of 63 bits: what a float holds exactly


def check_settings(temperature: float, top_k: int | None, top_p: float | None) -> None:
    """Raises ConfigError with every setting that no token could be drawn by."""
    problems = []
    if not 0 <= temperature < float("inf"):
        problems.append(Problem("temperature", f"is {temperature}", "use 0 (the likeliest token) or more"))
    if top_k is not None and top_k < 1:
        problems.append(Problem("top_k", f"is {top_k}", "use 1 or more, or leave it out"))
    if top_p is not None and not 0 <= top_p <= 1:
        problems.append(Problem("top_p", f"is {top_p}", "use a probability from 0 to 1, or leave it out"))
    if problems:
        raise ConfigError(problems)


def sample(
    logits: torch.Tensor, temperature: float, top_k: int | None, top_p: float | None, uniform: float
) -> int:
    """The token at `uniform` in [0, 1) of the distribution that logits (V,) give.

    Temperature 0 means the likeliest token. `top_k` keeps the k likeliest; of these `top_p` keeps the fewest
    that have that share of the probability, and one at least. None keeps all; of equal logits the lower id
    comes first. Arithmetic is in float64. Raises NotFinite where a logit is NaN or infinite.
    """
    scores: np.ndarray = (logits if logits.dtype == torch.float64 else logits.float()).cpu().numpy()
    if not np.isfinite(scores).all():
        token = int(np.flatnonzero(~np.isfinite(scores))[0])
        raise NotFinite(
            f"the model's logit for token {token} is {scores[token]}; its weights are damaged, or its "
            "training diverged: use an earlier checkpoint"
        )
    if temperature == 0:
        return int(scores.argmax())
    scores = scores.astype(np.float64)
    tokens = np.arange(scores.size)
    if top_k is not None and top_k < scores.size:  # the k likeliest and what equals them: far fewer to sort
        tokens = np.flatnonzero(scores >= np.partition(scores, -top_k)[-top_k])
    if top_k is not None or top_p is not None:
        tokens = tokens[np.argsort(-scores[tokens], kind="stable")][:top_k]
        scores = scores[tokens]
    with np.errstate(over="ignore"):  # a tiny temperature: exp(-inf) is the right 0
        cumulative = np.exp((scores - scores.max()) / temperature).cumsum()
    if top_p is not None:
        kept = np.searchsorted(cumulative, top_p * cumulative[-1]) + 1
        cumulative = cumulative[:kept]
    total = cumulative[-1]
    # The first token at which the sum exceeds the target, so that one without probability is never drawn;
    # where rounding lifts the target to the total, the first that reaches it.
    place = min(
        np.searchsorted(cumulative, uniform * total, side="right"), np.searchsorted(cumulative, total)
    )
    return int(tokens[place])
