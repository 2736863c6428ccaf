"""albor's models in EleutherAI's lm-eval: a model class of its API, and its command line with that class.

    python -m albor.evaluate.harness run --model albor --model_args path=runs/my-run --tasks hellaswag

`albor eval --through lm-eval` does the same for its own options and results.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model

from albor.evaluate.model import Opened, open_model
from albor.evaluate.requests import Part, Plan, plan_requests, text_windows
from albor.evaluate.scorer import Scorer
from albor.generate.generate import generate
from albor.model.decode import Decoder

_DEFAULT_TOKENS = 256  # that a task asks to be written, where it does not say: as lm-eval's own models


@register_model("albor")
class AlborLM(TemplateLM):
    """A run's model. Texts are scored without an end-of-document token in front, as an exported model's are
    by lm-eval; what is written begins a document, as with `albor generate`.
    """

    def __init__(
        self,
        path: str,
        device: str | None = "auto",
        dtype: str | None = None,
        batch_tokens: int | None = None,
        batch_size: Any = None,
        max_batch_size: Any = None,
    ):
        """`path` is a run, a checkpoint or RUN/best. lm-eval always gives the last two; `batch_tokens` takes
        their place.
        """
        place = (device or "auto").partition(":")[0]  # lm-eval's default is cuda:0
        self._begin(open_model(Path(path), place, dtype, batch_tokens))

    @classmethod
    def over(cls, opened: Opened) -> AlborLM:
        """For a model that is loaded."""
        model = cls.__new__(cls)
        model._begin(opened)
        return model

    def _begin(self, opened: Opened) -> None:
        super().__init__()
        self.loaded, self.scorer = opened.loaded, Scorer(opened.loaded)

    @property
    def eot_token_id(self) -> int:
        """What stands for an empty context."""
        return self.scorer.tokenizer.end_of_document_id

    @property
    def max_length(self) -> int:
        """Positions of the model."""
        return self.scorer.context

    @property
    def tokenizer_name(self) -> str:
        """Names the tokenizer in lm-eval's cache of requests."""
        return self.scorer.tokenizer.sha256

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """The tokens of a text; there are no special ones to add."""
        return [int(token) for token in self.scorer.tokenizer.encode(string)]

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, **others: Any
    ) -> list[tuple[float, bool]]:
        encoded = [(before, after) for _, before, after in requests]
        plan = plan_requests(encoded, self.scorer.context, self.scorer.batch_tokens)
        totals, greedy = [0.0] * len(encoded), [True] * len(encoded)
        for batch in plan.batches:
            for index, score in zip(batch, self.scorer.score_batch(plan, batch), strict=True):
                which = plan.parts[index].request
                totals[which] += score.logprob
                greedy[which] &= score.greedy
        answers = list(zip(totals, greedy, strict=True))
        for (texts, _, _), answer in zip(requests, answers, strict=True):
            if texts is not None:
                self.cache_hook.add_partial("loglikelihood", texts, answer)
        return answers

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Of whole texts, in windows that do not overlap, the last of them as long as the context."""
        totals = []
        for request in requests:
            (text,) = request.args
            ids = self.scorer.tokenizer.encode(text)
            context = self.scorer.context
            rows: list[tuple[int, ...]] = []
            parts: list[Part] = []
            done = 0
            for row, count in text_windows(ids, self.eot_token_id, context, context):
                parts.append(Part(0, len(rows), tuple(ids[done : done + count].tolist())))
                rows.append(tuple(row))
                done += count
            batches = tuple((index,) for index in range(len(parts)))
            plan = Plan(tuple(rows), tuple(parts), batches, 0, 0)
            total = sum(self.scorer.score_batch(plan, batch)[0].logprob for batch in batches)
            self.cache_hook.add_partial("loglikelihood_rolling", (text,), total)
            totals.append(total)
        return totals

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """What the model writes after each context, up to the first of the strings in `until`. A context that
        leaves too little room loses its beginning.
        """
        decoder, tokenizer, texts = Decoder(self.loaded.model, self.loaded.arena), self.scorer.tokenizer, []
        for request in requests:
            context, given = request.args
            settings = dict(given)
            until = settings.get("until") or []
            tokens = int(settings.get("max_gen_toks", _DEFAULT_TOKENS))
            room = max(1, self.max_length - tokens - 1)
            prompt = tokenizer.decode(tokenizer.encode(context)[-room:])
            sampled = bool(settings.get("do_sample", False))
            written = generate(
                decoder,
                tokenizer,
                prompt,
                max_tokens=tokens,
                temperature=float(settings.get("temperature", 1.0)) if sampled else 0.0,
                top_k=settings.get("top_k") if sampled else None,
                top_p=settings.get("top_p") if sampled else None,
                stop=[until] if isinstance(until, str) else list(until),
            )
            self.cache_hook.add_partial("generate_until", (context, given), written.text)
            texts.append(written.text)
        return texts


def main() -> None:
    """lm-eval's command line, which then knows the model `albor`."""
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()


if __name__ == "__main__":
    main()
