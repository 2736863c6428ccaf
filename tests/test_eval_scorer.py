"""Log-likelihoods against a plain model that reads one text at a time and has all logits."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from eval_cases import data, run  # fixtures

from albor.canary.reference import Reference, unpacked
from albor.errors import AlborError, ConfigError, DataError
from albor.evaluate.model import Opened, open_model
from albor.evaluate.requests import encode_pairs, padded_length, plan_requests, text_windows
from albor.evaluate.scorer import Scorer
from albor.evaluate.tasks import TASKS
from albor.evaluate.text import read_text, score_text
from albor.model.parameters import named_tensors


@pytest.fixture(scope="module")
def opened(run: Path) -> Opened:
    return open_model(run, "cpu", "fp32", 1024)


@pytest.fixture(scope="module")
def reference(opened: Opened) -> Reference:
    architecture = opened.loaded.model.architecture
    model = Reference(architecture).double()
    weights = unpacked(named_tensors(opened.loaded.arena["weights"], architecture), architecture)
    model.load_state_dict({name: tensor.double() for name, tensor in weights.items()}, strict=False)
    return model


def plain(model: Reference, tokens: list[int], count: int) -> tuple[float, bool]:
    """Of the last `count` of `tokens`, by one forward over all that comes before each."""
    with torch.no_grad():
        logits = model(torch.tensor([tokens[:-1]]))[0, -count:]
    targets = torch.tensor(tokens[-count:])
    logprobs = logits.log_softmax(-1).gather(1, targets[:, None])
    return float(logprobs.sum()), bool((logits.argmax(-1) == targets).all())


def score(scorer: Scorer, encoded: list[tuple[list[int], list[int]]], batch_tokens: int):
    plan = plan_requests(encoded, scorer.context, batch_tokens)
    totals, greedy = np.zeros(len(encoded)), np.ones(len(encoded), dtype=bool)
    for batch in plan.batches:
        for index, found in zip(batch, scorer.score_batch(plan, batch), strict=True):
            totals[plan.parts[index].request] += found.logprob
            greedy[plan.parts[index].request] &= found.greedy
    return plan, totals, greedy


@pytest.mark.parametrize("batch_tokens", [1, 100, 1024])
def test_the_questions_of_all_tasks(opened: Opened, reference: Reference, data: Path, batch_tokens: int):
    scorer = Scorer(opened.loaded)
    items = [item for task in TASKS.values() for item in task.items(data, None)]
    encoded = encode_pairs(scorer.tokenizer, [pair for item in items for pair in item.requests])
    assert scorer.batch_tokens == 1024
    plan, totals, greedy = score(scorer, encoded, batch_tokens)
    assert plan.truncated > 0
    assert plan.split == 0
    for (before, after), total, likeliest in zip(encoded, totals, greedy, strict=True):
        expected, is_likeliest = plain(reference, [*before, *after][-scorer.context - 1 :], len(after))
        assert total == pytest.approx(expected, abs=1e-3)
        assert likeliest == is_likeliest


def test_what_greedy_decoding_writes_is_greedy(opened: Opened, reference: Reference):
    tokens = [7, 8, 9]
    for _ in range(4):
        with torch.no_grad():
            tokens.append(int(reference(torch.tensor([tokens]))[0, -1].argmax()))
    other = (tokens[-1] + 1) % 300
    encoded = [(tokens[:3], tokens[3:]), (tokens[:3], [*tokens[3:-1], other])]
    _, _, greedy = score(Scorer(opened.loaded), encoded, 1024)
    assert greedy.tolist() == [True, False]


def test_an_answer_longer_than_the_context_is_scored_whole(opened: Opened, reference: Reference):
    scorer, generator = Scorer(opened.loaded), np.random.default_rng(0)
    before = generator.integers(4, 300, 40).tolist()
    after = generator.integers(4, 300, scorer.context + 100).tolist()
    plan, totals, _ = score(scorer, [(before, after)], 1024)
    assert plan.split == 1
    assert [token for part in plan.parts for token in part.targets] == after
    tokens, expected = [*before, *after], 0.0
    half = scorer.context // 2
    for start in range(0, len(after), half):
        end = min(start + half, len(after))
        window = tokens[max(0, len(before) + end - scorer.context - 1) : len(before) + end]
        expected += plain(reference, window, end - start)[0]
    assert totals[0] == pytest.approx(expected, rel=1e-5)


def test_a_row_is_read_once_for_all_answers_of_one_token():
    encoded = [([1, 2, 3], [4]), ([1, 2, 3], [5]), ([1, 2], [3, 4]), ([1, 2, 3], [4, 5])]
    plan = plan_requests(encoded, 64, 1024)
    assert sorted(plan.rows) == [(1, 2, 3), (1, 2, 3, 4)]
    assert [part.row for part in plan.parts[:3]] == [0, 0, 0]
    assert sorted(index for batch in plan.batches for index in batch) == [0, 1, 2, 3]


def test_batches_are_of_like_length_and_never_too_large():
    generator = np.random.default_rng(1)
    encoded = [([int(token)] * int(length), [1]) for token, length in generator.integers(2, 200, (300, 2))]
    plan = plan_requests(encoded, 128, 1000)
    for batch in plan.batches:
        rows = {plan.parts[index].row for index in batch}
        length = padded_length(max(len(plan.rows[row]) for row in rows), 128)
        assert len(rows) * length <= 1000
    assert plan == plan_requests(encoded, 128, 1000)
    longest = [max(len(plan.rows[plan.parts[index].row]) for index in batch) for batch in plan.batches]
    assert longest == sorted(longest, reverse=True)


def test_a_context_and_its_answer_are_cut_as_lm_eval_cuts_them(opened: Opened):
    tokenizer = opened.loaded.tokenizer
    encode = lambda text: tokenizer.encode(text).tolist()  # noqa: E731
    pairs = [
        ("the model", " reads"),
        ("the model  ", "reads"),
        ("", " reads"),
        ("the\n", " é"),
        ("the mod", "el reads text, and writes"),
    ]
    (plain_pair, spaced, empty, line, within) = encode_pairs(tokenizer, pairs)
    assert plain_pair == (encode("the model"), encode("the model reads")[len(encode("the model")) :])
    assert spaced == (encode("the model"), encode("the model  reads")[len(encode("the model")) :])
    assert empty == ([tokenizer.end_of_document_id], encode(" reads"))
    assert line == (encode("the"), encode("the\n é")[len(encode("the")) :])
    assert encode("the model reads text, and writes") != encode("the mod") + encode(
        "el reads text, and writes"
    )
    assert within == (encode("the mod"), encode("the model reads text, and writes")[len(encode("the mod")) :])
    with pytest.raises(DataError, match="no token of ''"):
        encode_pairs(tokenizer, [("the model", "")])


@pytest.mark.parametrize(
    ("length", "context", "stride"), [(1, 4, 2), (4, 4, 2), (5, 4, 2), (50, 16, 5), (50, 16, 16), (9, 3, 1)]
)
def test_windows_predict_every_token_once_from_enough_before_it(length: int, context: int, stride: int):
    ids = np.arange(100, 100 + length)
    predicted = []
    for number, (row, count) in enumerate(text_windows(ids, 0, context, stride)):
        assert 0 < count <= len(row) <= context
        targets = ids[len(predicted) : len(predicted) + count].tolist()
        assert row[-count:] == [0, *ids.tolist()][len(predicted) : len(predicted) + count]
        assert number == 0 or len(row) - count == context - count >= context - stride
        predicted += targets
    assert predicted == ids.tolist()


def test_bits_per_byte_of_a_text(opened: Opened, reference: Reference):
    scorer = Scorer(opened.loaded)
    text = "the model reads text ☕ and def return self\n" * 40
    calls: list[tuple[int, int]] = []
    found = score_text(scorer, text, 100, lambda *counts: calls.append(counts))
    ids, nats, done = scorer.tokenizer.encode(text), 0.0, 0
    tokens = [scorer.tokenizer.end_of_document_id, *ids.tolist()]
    while done < ids.size:
        end = min(ids.size, done + (scorer.context if done == 0 else 100))
        nats -= plain(reference, tokens[max(0, end - scorer.context) : end + 1], end - done)[0]
        done = end
    assert ids.size > 2 * scorer.context
    assert found.nats == pytest.approx(nats, rel=1e-6)
    assert found.bits_per_byte == pytest.approx(nats / math.log(2) / len(text.encode()), rel=1e-6)
    assert found.perplexity == pytest.approx(math.exp(nats / ids.size), rel=1e-4)
    assert calls[-1] == (ids.size, ids.size)


def test_a_text_that_is_none(opened: Opened, tmp_path: Path):
    path = tmp_path / "text"
    with pytest.raises(DataError, match="cannot be read: No such file"):
        read_text(path)
    path.write_bytes(b"")
    with pytest.raises(DataError, match="is empty"):
        read_text(path)
    path.write_bytes(b"caf\xe9")
    with pytest.raises(DataError, match="byte 3 is not UTF-8"):
        read_text(path)
    with pytest.raises(ConfigError, match="--stride: is 257, and the model's context holds 256"):
        score_text(Scorer(opened.loaded), "text", 257, lambda *_: None)


def test_a_model_that_computes_no_numbers_is_no_result(run: Path):
    opened = open_model(run, "cpu", "fp32", 256)
    opened.loaded.arena["weights"].fill_(math.nan)
    with pytest.raises(AlborError, match="are no numbers"):
        score(Scorer(opened.loaded), [([1, 2], [3])], 256)
