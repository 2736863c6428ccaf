"""Accuracies, errors and pass@k, against definitions written out."""

from __future__ import annotations

import itertools
import math
import random
import statistics

import pytest

from albor.evaluate import metrics
from albor.evaluate.metrics import is_right, mean, measure, pass_at_k
from albor.evaluate.scorer import Score
from albor.evaluate.tasks import TASKS, Item

PAIRS = (("context", " a"), ("context", " b"))


def test_acc_takes_the_likeliest_and_acc_norm_the_likeliest_per_character():
    item = Item(PAIRS, 1, (2, 10))
    scores = [Score(-4.0, True), Score(-9.0, False)]  # -2 and -0.9 per character
    assert not is_right("acc", item, scores)
    assert is_right("acc_norm", item, scores)
    measured = measure(
        TASKS["piqa"], [item, item, item], [scores, scores, [Score(-4, False), Score(-1, False)]]
    )
    assert measured["acc"].value == pytest.approx(1 / 3)
    assert measured["acc_norm"].value == 1
    assert measured["acc"].stderr == pytest.approx(statistics.stdev([0, 0, 1]) / math.sqrt(3))
    assert measured["acc_norm"].stderr == 0


def test_of_equal_choices_the_first_is_taken():
    scores = [Score(-1.0, False), Score(-1.0, False)]
    assert is_right("acc", Item(PAIRS, 0, (1, 1)), scores)
    assert not is_right("acc", Item(PAIRS, 1, (1, 1)), scores)


def test_a_last_word_is_right_if_greedy_decoding_writes_it():
    items = [Item(PAIRS[:1], 0, (1,))] * 2
    scores = [[Score(-1.5, True)], [Score(-2.5, False)]]
    measured = measure(TASKS["lambada_openai"], items, scores)
    assert measured["acc"].value == 0.5
    assert measured["perplexity"].value == pytest.approx(math.exp(2.0))


def test_the_error_of_a_perplexity_is_of_the_very_resamples_that_lm_eval_draws(monkeypatch):
    monkeypatch.setattr(metrics, "_RESAMPLES", 3000)
    monkeypatch.setattr(metrics, "_AT_A_TIME", 1000)  # several draws for each generator
    values = [-1.0, -3.5, -0.25, -7.0, -2.0, -2.5, -4.0]
    resampled = []
    for chunk in range(3):  # what its _bootstrap_internal does
        generator = random.Random(chunk)
        for _ in range(1000):
            drawn = generator.choices(values, k=len(values))
            resampled.append(math.exp(-sum(drawn) / len(drawn)))
    scores = [[Score(value, False)] for value in values]
    items = [Item(PAIRS[:1], 0, (1,))] * len(values)
    measured = measure(TASKS["lambada_openai"], items, scores)["perplexity"]
    assert measured.stderr == pytest.approx(statistics.stdev(resampled), rel=1e-9)


def test_one_item_has_no_error_and_what_is_no_number_is_null():
    assert mean([1.0]).stderr is None
    scores = [[Score(-1e5, False)], [Score(-2e5, False)]]
    measured = measure(TASKS["lambada_openai"], [Item(PAIRS[:1], 0, (1,))] * 2, scores)["perplexity"]
    assert measured.as_json() == {"value": None, "stderr": None}


@pytest.mark.parametrize(("samples", "passed"), [(5, 0), (5, 1), (5, 3), (5, 5), (1, 1), (4, 2)])
def test_pass_at_k_is_the_share_of_all_choices_of_k_samples(samples: int, passed: int):
    outcomes = [index < passed for index in range(samples)]
    for k in range(1, samples + 1):
        choices = list(itertools.combinations(outcomes, k))
        assert pass_at_k(samples, passed, k) == pytest.approx(sum(map(any, choices)) / len(choices))
    with pytest.raises(ValueError, match="pass@"):
        pass_at_k(samples, passed, samples + 1)
