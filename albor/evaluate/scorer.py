"""Log-likelihoods of tokens by a loaded model, a batch of rows at a time, in the arena that was planned."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, replace
from typing import Any, NamedTuple

import numpy as np
import torch

from albor.errors import AlborError
from albor.evaluate.requests import Part, Plan, padded_length
from albor.generate.load import Loaded
from albor.model.activations import Activations
from albor.model.transformer import Transformer
from albor.ops.base import shaped


class Score(NamedTuple):
    """What a model makes of a continuation."""

    logprob: float  # natural logarithm of its probability
    greedy: bool  # whether each of its tokens is the likeliest


class Scorer:
    """Scores with a model that was loaded with `scored_tokens`. Logits exist for the targets only."""

    def __init__(self, loaded: Loaded):
        self.arena, self.tokenizer = loaded.arena, loaded.tokenizer
        self.architecture = loaded.model.architecture
        self.context = self.architecture.max_position_embeddings
        self.batch_tokens: int = loaded.arena["io.tokens"].shape[0]
        self._models: dict[int, Transformer] = {}  # views of the one arena, for rows of another length each

    def score_batch(self, plan: Plan, batch: Sequence[int]) -> list[Score]:
        """The parts of one batch of `plan`, in its order."""
        parts = [plan.parts[index] for index in batch]
        places = {row: place for place, row in enumerate(dict.fromkeys(part.row for part in parts))}
        rows = [plan.rows[row] for row in places]
        wanted: list[int] = []
        targets: list[int] = []
        length = padded_length(max(map(len, rows)), self.context)
        for part in parts:
            last = places[part.row] * length + len(plan.rows[part.row])
            wanted += range(last - len(part.targets), last)
            targets += part.targets
        losses, greedy = self.score_rows(rows, wanted, targets)
        return _by_part(parts, losses, greedy)

    def score_rows(
        self, rows: Sequence[Sequence[int]], wanted: Sequence[int], targets: Sequence[int] | np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Losses (n,) float64 of `targets` at the places `wanted`, and whether each is the likeliest, (n,).

        Rows are laid out side by side, each padded to `padded_length` of the longest; a place is counted
        through all of them. Raises AlborError where a loss is no number.
        """
        length = padded_length(max(map(len, rows)), self.context)
        tokens = np.zeros((len(rows), length), dtype=np.int64)  # what pads lies behind all that is read
        for row, values in enumerate(rows):
            tokens[row, : len(values)] = values
        residual, delta = self._forward(tokens.reshape(-1), length)
        return self._project(residual, delta, np.array(wanted), np.array(targets, dtype=np.int64))

    def _forward(self, tokens: np.ndarray, length: int) -> tuple[torch.Tensor, torch.Tensor]:
        model = self._models.get(length)
        if model is None:
            model = self._models[length] = Transformer(self.architecture, self.arena, length)
        assert model.evaluation is not None
        self.arena.enter("evaluate")
        a = _first_rows(model.evaluation, tokens.size, length)
        inputs = self.arena["io.tokens"][: tokens.size]
        inputs.copy_(torch.from_numpy(tokens))
        model.embedding.forward(inputs, a.input)
        residual, delta = a.input, None
        for block in model.blocks:
            residual, delta = block.forward(residual, delta, a)
        assert delta is not None
        return residual, delta

    def _project(
        self, residual: torch.Tensor, delta: torch.Tensor, wanted: np.ndarray, targets: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """The head over the wanted positions alone."""
        arena, model = self.arena, next(iter(self._models.values()))
        head, ops = model.head, model.ops
        chunk = arena["evaluate.logits"].shape[0]
        # A block's input and its norm are done with: they take the positions that are looked at.
        names = ("input", "attention_normed", "mlp_normed", "mlp_rstd")
        x, d, normed, rstd = (arena[f"evaluate.{name}"] for name in names)
        losses, greedy = np.empty(wanted.size), np.empty(wanted.size, dtype=bool)
        for start in range(0, wanted.size, chunk):
            part = slice(start, start + chunk)
            places = torch.from_numpy(wanted[part]).to(arena.device)
            aims = torch.from_numpy(targets[part]).to(arena.device)
            n = places.numel()
            torch.index_select(residual, 0, places, out=x[:n])
            torch.index_select(delta, 0, places, out=d[:n])
            ops.rmsnorm_forward(x[:n], d[:n], head.norm, head.eps, x[:n], normed[:n], rstd[:n])
            logits, loss = arena["evaluate.logits"][:n], arena["io.losses"][:n]
            head.project(normed[:n], logits)
            greedy[part] = (logits.argmax(-1) == aims).cpu().numpy()
            wide = arena.get("evaluate.probabilities")
            ops.cross_entropy(logits, aims, loss, None if wide is None else wide[:n], None)
            losses[part] = loss.double().cpu().numpy()
        if not np.isfinite(losses).all():
            raise AlborError(
                "the model's log-likelihoods are no numbers; its weights are damaged, or its training "
                "diverged: use an earlier checkpoint"
            )
        return losses, greedy


def _first_rows(a: Activations, rows: int, length: int) -> Activations:
    """The same buffers for `rows` tokens in sequences of `length`, of which a full batch has more."""
    views: dict[str, Any] = {}
    for field in fields(a):
        tensor = getattr(a, field.name)
        if tensor is None:
            views[field.name] = None
        elif field.name == "attention_lse":  # (B, H, T)
            views[field.name] = shaped(tensor, rows // length, tensor.shape[1], length)
        else:
            views[field.name] = tensor[:rows]
    return replace(a, **views)


def _by_part(parts: Sequence[Part], losses: np.ndarray, greedy: np.ndarray) -> list[Score]:
    scores, start = [], 0
    for part in parts:
        stop = start + len(part.targets)
        scores.append(Score(-float(losses[start:stop].sum()), bool(greedy[start:stop].all())))
        start = stop
    return scores
