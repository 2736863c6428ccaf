"""The hand-written forward and backward against autograd, and the promises that the model makes besides."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers import (
    forward_backward,
    gradient_norm,
    gradients_of,
    make_batches,
    make_config,
    make_reference,
    make_trainer,
    reference_loss,
    relative_error,
    spread_norms,
    trainer_over,
    weights_of,
)

from albor import ops
from albor.canary.reference import unpacked
from albor.memory import plan
from albor.model import parameters
from albor.train.step import Trainer, TrainState

RECOMPUTE = ("none", "cheap", "block")

CASES = {
    "plain": {},
    "heads-1:1": {"num_attention_heads": 3, "num_key_value_heads": 3},
    "heads-3:1": {"num_attention_heads": 3, "num_key_value_heads": 1},
    "heads-8:1": {"hidden_size": 32, "num_attention_heads": 8, "num_key_value_heads": 1},
    "heads-8:2": {"hidden_size": 32, "num_attention_heads": 8, "num_key_value_heads": 2},
    "one-head": {"num_attention_heads": 1, "num_key_value_heads": 1},
    "odd-sizes": {
        "hidden_size": 22,
        "num_attention_heads": 11,
        "num_key_value_heads": 11,
        "intermediate_size": 29,
    },
    "odd-length": {"sequence_length": 13, "vocab_size": 31},
    "one-token": {"sequence_length": 1, "micro_batch_size": 3},
    "one-layer": {"num_hidden_layers": 1},
    "five-layers": {"num_hidden_layers": 5},
    "one-sequence": {"micro_batch_size": 1},
    "head-chunk-uneven": {"micro_batch_size": 3, "head_chunk_tokens": 11},
    "head-chunk-1": {"sequence_length": 5, "head_chunk_tokens": 1},
    "row-chunks": {"sequence_length": 100, "micro_batch_size": 3},  # 300 rows: more than ROW_CHUNK
    "query-blocks": {"sequence_length": 300, "micro_batch_size": 1, "num_hidden_layers": 1},
    "query-blocks-even": {"sequence_length": 512, "micro_batch_size": 1, "num_hidden_layers": 1},
    "query-blocks-batch": {"sequence_length": 257, "micro_batch_size": 3, "num_key_value_heads": 1},
    "theta-eps": {"rope_theta": 37.5, "rms_norm_eps": 0.1},
    "accumulated": {"gradient_accumulation_steps": 3},
    "muP": {"mup_base_width": 6, "head_chunk_tokens": 11, "gradient_accumulation_steps": 2},
}


def check_against_reference(keys: dict, ignored: float = 0.0) -> None:
    """Loss and every gradient, in float64, out of buffers that start as NaN, with norms away from 1."""
    config = make_config(**keys)
    trainer = make_trainer(config)
    spread_norms(trainer)
    batches = make_batches(config, ignored=ignored)
    reference = make_reference(trainer)
    expected = reference_loss(reference, batches)
    expected.backward()

    assert forward_backward(trainer, batches) == pytest.approx(expected.item(), rel=1e-12)
    ours = unpacked(gradients_of(trainer), trainer.architecture)
    theirs = {name: parameter.grad for name, parameter in reference.named_parameters()}
    assert ours.keys() == theirs.keys()
    for name, gradient in ours.items():
        assert theirs[name].norm() > 0 or config.data.sequence_length == 1, (
            f"{name} has no gradient to compare"
        )
        assert torch.equal(gradient, theirs[name]) or relative_error(gradient, theirs[name]) < 1e-10, name


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("keys", CASES.values(), ids=CASES.keys())
def test_loss_and_every_gradient_equal_autograd(keys: dict, tied: bool):
    check_against_reference(keys | {"tie_word_embeddings": tied})


@pytest.mark.parametrize("recompute", RECOMPUTE)
@pytest.mark.parametrize("keys", [{"num_hidden_layers": 3}, {"sequence_length": 300, "num_hidden_layers": 1}])
def test_recompute_modes_equal_autograd(keys: dict, recompute: str):
    check_against_reference(keys | {"recompute": recompute})


@pytest.mark.parametrize("ignored", [0.3, 0.9])
def test_ignored_targets_have_no_part_in_loss_and_gradients(ignored: float):
    check_against_reference({"micro_batch_size": 3, "head_chunk_tokens": 7}, ignored)


def test_the_cases_reach_beyond_one_chunk():
    """The long cases above prove what they say only while the chunks are smaller than they are."""
    assert plan.ROW_CHUNK < 300
    assert plan.QUERY_BLOCK < 257


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_recompute_modes_give_the_same_bits(dtype: str):
    """A recomputed activation is the one that was thrown away: the modes trade memory for time alone."""
    outcomes = []
    for recompute in RECOMPUTE:
        config = make_config(
            recompute=recompute, num_hidden_layers=3, sequence_length=100, gradient_accumulation_steps=2
        )
        trainer, state, losses = make_trainer(config, dtype), TrainState(), []
        for step in range(3):
            result, state = trainer.step(make_batches(config, seed=step), state)
            losses.append(result.loss)
        assert state.updates == 3
        outcomes.append((losses, weights_of(trainer)))
    for losses, weights in outcomes[1:]:
        assert losses == outcomes[0][0]
        for name, weight in weights.items():
            assert torch.equal(weight, outcomes[0][1][name]), name


def evaluation_losses(trainer: Trainer, tokens: np.ndarray, targets: np.ndarray) -> torch.Tensor:
    losses = torch.full((tokens.size,), float("nan"), dtype=trainer.arena["io.losses"].dtype)
    trainer.model.losses(torch.from_numpy(tokens).flatten(), torch.from_numpy(targets).flatten(), losses)
    return losses


@pytest.mark.parametrize("length", [16, 300])
def test_a_future_token_cannot_change_a_past_loss(length: int):
    """Bit for bit: not even through a masked score of minus infinity."""
    config = make_config(sequence_length=length)
    trainer = make_trainer(config)
    (tokens, targets) = make_batches(config)[0]
    changed = tokens.copy()
    changed[0, length // 2] = (tokens[0, length // 2] + 1) % config.model.vocab_size

    before, after = (evaluation_losses(trainer, t, targets).view(2, length) for t in (tokens, changed))
    assert torch.equal(before[0, : length // 2], after[0, : length // 2])
    assert (before[0, length // 2 :] != after[0, length // 2 :]).all(), (
        "each later token should see the change"
    )
    assert torch.equal(before[1], after[1]), "the other sequence saw it"


@pytest.mark.parametrize("dtype", ["float64", "bfloat16"])
@pytest.mark.parametrize("recompute", RECOMPUTE)
def test_no_parameter_has_a_zero_gradient(dtype: str, recompute: str):
    config = make_config(num_hidden_layers=4, recompute=recompute, tie_word_embeddings=False)
    trainer = make_trainer(config, dtype)
    (tokens, targets) = make_batches(config)[0]
    forward_backward(trainer, [(tokens, targets)])
    for name, gradient in gradients_of(trainer).items():
        if name == "embedding.tokens":
            gradient = gradient[np.unique(tokens)]
        rows = gradient.reshape(-1, gradient.shape[-1]) if gradient.dim() > 1 else gradient.unsqueeze(1)
        assert (rows != 0).any(1).all(), f"{name} has a row without a gradient"


WRITERS = (
    "embedding_forward",
    "rmsnorm_forward",
    "linear_forward",
    "attention_forward",
    "swiglu_forward",
    "rmsnorm_backward",
    "linear_backward_input",
    "linear_backward_weight",
    "attention_backward",
    "swiglu_backward",
    "cross_entropy",
)


@pytest.mark.parametrize("operation", WRITERS)
def test_poison_shows_a_write_that_is_lost(operation: str, monkeypatch: pytest.MonkeyPatch):
    """What the tests above rely on: with any one operation left out, the step ends in NaN."""
    config = make_config()
    trainer = make_trainer(config)
    monkeypatch.setattr(ops.TorchOps, operation, lambda *_, **__: None)
    loss = forward_backward(trainer, make_batches(config))
    assert not np.isfinite([loss, gradient_norm(trainer)]).all()


@pytest.mark.parametrize(
    "buffer", ["blocks.00.input", "blocks.00.qkv", "blocks.01.gate_up", "blocks.01.middle"]
)
def test_a_lifetime_that_is_too_short_shows_in_the_gradient(buffer: str):
    """A kept activation that the planner took for dead in the head's phase, and the head took its place."""
    config = make_config()
    good = plan.plan_training(config, "cpu", "float64")
    offset = next(b.offset for b in good.buffers if b.name == "head.logits")
    wrong = replace(good)
    vars(wrong)["buffers"] = tuple(replace(b, offset=offset) if b.name == buffer else b for b in good.buffers)
    norms = []
    for candidate in (good, wrong):
        trainer = trainer_over(config, candidate)
        forward_backward(trainer, make_batches(config))
        norms.append(gradient_norm(trainer))
    assert norms[1] != pytest.approx(norms[0], rel=1e-6)


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
@pytest.mark.parametrize(
    "keys", [{}, {"tie_word_embeddings": False, "head_chunk_tokens": 7}, {"sequence_length": 300}]
)
def test_evaluation_losses_are_the_training_losses(keys: dict, dtype: str):
    """Bit for bit: evaluation runs the same operations through one set of buffers."""
    config = make_config(**keys)
    trainer = make_trainer(config, dtype)
    (tokens, targets) = make_batches(config, ignored=0.2)[0]
    forward_backward(trainer, [(tokens, targets)])
    training = trainer.arena["io.losses"].clone()
    assert torch.equal(evaluation_losses(trainer, tokens, targets), training)


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("recompute", ["none", "block"])
def test_bf16_gradients_point_where_the_true_ones_do(tied: bool, recompute: str):
    """Against float64 at the same rounded weights. A wrong term anywhere costs more than rounding."""
    keys = {"hidden_size": 64, "intermediate_size": 96, "vocab_size": 101, "sequence_length": 64}
    config = make_config(**keys, initializer_range=0.05, tie_word_embeddings=tied, recompute=recompute)
    trainer = make_trainer(config, "bfloat16")
    spread_norms(trainer)
    trainer.arena["master"].copy_(trainer.arena["weights"])  # so that the oracle gets the rounded weights
    batches = make_batches(config)
    reference = make_reference(trainer)
    reference_loss(reference, batches).backward()
    forward_backward(trainer, batches)
    theirs = {name: parameter.grad for name, parameter in reference.named_parameters()}
    for name, gradient in unpacked(gradients_of(trainer), trainer.architecture).items():
        cosine = torch.cosine_similarity(gradient.double().flatten(), theirs[name].flatten(), dim=0)
        assert cosine > 0.999, name
        assert gradient.norm() == pytest.approx(theirs[name].norm().item(), rel=0.02), name


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_equals_transformers_llama(tied: bool, kv_heads: int):
    """The architecture is the one that the published name stands for: losses and gradients in float32."""
    transformers = pytest.importorskip("transformers")
    keys = {
        "num_key_value_heads": kv_heads,
        "rope_theta": 500.0,
        "rms_norm_eps": 1e-3,
        "tie_word_embeddings": tied,
    }
    config = make_config(**keys, initializer_range=0.1)
    trainer = make_trainer(config, "float32")
    spread_norms(trainer)
    fields = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
    llama = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            **{name: getattr(config.model, name) for name in fields},
            num_key_value_heads=kv_heads,
            rms_norm_eps=1e-3,
            rope_parameters={"rope_type": "default", "rope_theta": 500.0},
            tie_word_embeddings=tied,
            max_position_embeddings=64,
        )
    )

    def their_names(named: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        split = unpacked(named, trainer.architecture)
        return {
            name if name.startswith("lm_head") else f"model.{name}": tensor for name, tensor in split.items()
        }

    state = their_names(weights_of(trainer))
    if tied:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    llama.load_state_dict(state)
    (tokens, targets) = make_batches(config)[0]
    logits = llama(torch.from_numpy(tokens)).logits
    losses = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), torch.from_numpy(targets).flatten(), reduction="none"
    )
    losses.mean().backward()

    loss = forward_backward(trainer, [(tokens, targets)])
    assert loss == pytest.approx(losses.mean().item(), rel=1e-5)
    torch.testing.assert_close(trainer.arena["io.losses"], losses.detach(), rtol=1e-5, atol=1e-5)
    theirs = {name: parameter.grad for name, parameter in llama.named_parameters()}
    ours = their_names(gradients_of(trainer))
    assert ours.keys() == theirs.keys()
    for name, gradient in ours.items():
        assert relative_error(gradient, theirs[name]) < 1e-5, name


def test_initial_weights_have_the_configured_moments():
    """Mean 0 and the configured deviation; by sqrt(2 * layers) less for what adds to the residual stream."""
    config = make_config(
        hidden_size=128, intermediate_size=192, num_hidden_layers=3, vocab_size=300, initializer_range=0.03
    )
    trainer = make_trainer(config)
    for name, weight in weights_of(trainer).items():
        if name.endswith("norm"):
            assert (weight == 1).all(), name
            continue
        std = 0.03 / 6**0.5 if name.endswith(("attention.out", "mlp.down")) else 0.03
        standard_error = std / weight.numel() ** 0.5
        assert abs(weight.mean()) < 5 * standard_error, name
        assert abs(weight.std() - std) < 5 * standard_error, name
        normal = (weight / std).flatten().sort().values
        assert abs((normal.abs() < 1).double().mean() - 0.6827) < 0.02, name


def test_initial_weights_follow_from_the_seed_and_the_name_alone():
    """A parameter draws the same numbers whatever else the model has: architectures compare fairly."""
    weights = weights_of(make_trainer(make_config()))
    again = weights_of(make_trainer(make_config(), "bfloat16"))
    other_shapes = weights_of(make_trainer(make_config(intermediate_size=77, tie_word_embeddings=False)))
    other_seed = weights_of(make_trainer(make_config(seed=7)))
    for name, weight in weights.items():
        assert torch.equal(weight.float(), again[name]), name
        if weight.shape == other_shapes[name].shape:
            assert torch.equal(weight, other_shapes[name]), name
        if not name.endswith("norm"):
            assert not torch.equal(weight, other_seed[name]), name
    drawn = [
        weight.flatten()[:8] for name, weight in weights.items() if not name.endswith(("norm", "out", "down"))
    ]
    assert len({tuple(values.tolist()) for values in drawn}) == len(drawn), (
        "two parameters drew the same numbers"
    )


@pytest.mark.parametrize("size", [1, 15, 16, 24, 2**16 + 15, 2**16 + 16, 2**16 + 17, 3 * 2**16 + 5])
def test_initial_values_are_drawn_as_if_at_once(size: int):
    """The published weights of a seed may not depend on how much memory drawing them took."""
    values = torch.empty(size, dtype=torch.float64)
    parameters._draw(values, 0.02, torch.Generator().manual_seed(5))
    expected = torch.empty(size).normal_(0.0, 0.02, generator=torch.Generator().manual_seed(5))
    assert torch.equal(values, expected.double())
