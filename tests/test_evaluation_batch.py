"""`evaluate.micro_batch_size`: memory and speed of an evaluation, and nothing of its result."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers import END_OF_DOCUMENT, make_batches, make_config, trainer_over

from albor.architecture import IGNORED_TARGET
from albor.config import EvaluateConfig, RunConfig
from albor.data.loader import validation_batches
from albor.evaluate.validation import Validation, validate
from albor.memory.arena import Arena
from albor.memory.plan import plan_inference, plan_training
from albor.model.batch import BatchInput
from albor.model.transformer import Transformer
from albor.train.step import Trainer, TrainState

VOCABULARY, SEQUENCES = 37, 7
BATCHES = (1, 2, 3, 4, 7, 16)  # below, at and above the 2 of training; the last batch is full or is not
TOKEN_BYTES = np.arange(VOCABULARY) % 5


class Text:
    """A stream of `count` tokens."""

    def __init__(self, count: int):
        self.tokens = np.random.default_rng(3).integers(VOCABULARY, size=count)

    def __len__(self) -> int:
        return len(self.tokens)

    def read(self, start: int, count: int) -> np.ndarray:
        return self.tokens[start : start + count]


def config_of(batch: int | None, **keys: object) -> RunConfig:
    config = make_config(**keys)
    return config.model_copy(update={"evaluate": EvaluateConfig(micro_batch_size=batch)})


def evaluated(trainer: Trainer, batch: int) -> Validation:
    """Of a text whose last window is short."""
    length = trainer.config.data.sequence_length
    batches = validation_batches(Text(SEQUENCES * length - 3), length, SEQUENCES, batch)
    return validate(trainer.model, trainer.input, batches, TOKEN_BYTES)


@pytest.mark.parametrize(
    "keys", [{}, {"document_mask": True}, {"sequence_length": 300}, {"recompute": "block"}]
)
def test_the_result_does_not_depend_on_the_batch(keys: dict[str, object]) -> None:
    """Before and after training steps, whose buffers are poisoned as each life begins."""
    results: list[list[Validation]] = []
    for batch in BATCHES:
        config = config_of(batch, **keys)
        trainer = trainer_over(config, plan_training(config, "cpu", "float64"))
        before = evaluated(trainer, batch)
        _, state = trainer.step(make_batches(config), TrainState())
        assert state.updates == 1
        results.append([before, evaluated(trainer, batch)])
    for before, after in results:
        assert before.loss == pytest.approx(results[0][0].loss, rel=1e-12)
        assert after.loss == pytest.approx(results[0][1].loss, rel=1e-12)
        assert after.loss != pytest.approx(before.loss, rel=1e-6)
        assert (before.target_tokens, before.text_bytes) == (
            results[0][0].target_tokens,
            results[0][0].text_bytes,
        )
        assert before.bits_per_byte == pytest.approx(results[0][0].bits_per_byte, rel=1e-12)


@pytest.mark.parametrize("document_mask", [False, True])
def test_training_does_not_depend_on_the_batch(document_mask: bool) -> None:
    """Bit for bit, though the io buffers are larger."""
    weights = []
    for batch in (None, 1, 16):
        config = config_of(batch, document_mask=document_mask)
        trainer = trainer_over(config, plan_training(config, "cpu", "float32"))
        state = TrainState()
        for _ in range(2):
            _, state = trainer.step(make_batches(config), state)
        weights.append(trainer.arena["weights"].clone())
    assert torch.equal(weights[0], weights[1])
    assert torch.equal(weights[0], weights[2])


@pytest.mark.parametrize("batch", [1, 3])
def test_a_plan_for_inference_evaluates_what_it_was_made_for(batch: int) -> None:
    config = make_config()
    trained = trainer_over(config, plan_training(config, "cpu", "float64"))
    arena = Arena(plan_inference(config, "cpu", "float64", batch), poison=True)
    arena["weights"].copy_(trained.arena["weights"])
    model = Transformer(trained.architecture, arena, config.data.sequence_length)
    length = config.data.sequence_length
    batches = validation_batches(Text(SEQUENCES * length), length, SEQUENCES, batch)
    batch_input = BatchInput(arena, model.ops, END_OF_DOCUMENT)
    found = validate(model, batch_input, batches, TOKEN_BYTES)
    held_out = validation_batches(Text(SEQUENCES * length), length, SEQUENCES, 2)
    assert found.loss == pytest.approx(
        validate(trained.model, trained.input, held_out, TOKEN_BYTES).loss, rel=1e-12
    )
    assert arena["io.tokens"].numel() == batch * length
    assert "evaluate.input" not in Arena(plan_inference(config, "cpu", "float64"))


def test_a_text_shorter_than_a_batch() -> None:
    """Rows beyond the text are padding, and count for nothing."""
    config = config_of(16)
    trainer = trainer_over(config, plan_training(config, "cpu", "float64"))
    length = config.data.sequence_length
    ((tokens, targets),) = validation_batches(Text(length // 2), length, SEQUENCES, 16)
    assert (targets != IGNORED_TARGET).sum() == length // 2 - 1
    found = validate(trainer.model, trainer.input, [(tokens, targets)], TOKEN_BYTES)
    assert found.target_tokens == length // 2 - 1
    assert np.isfinite(found.loss)
