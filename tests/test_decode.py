"""Decoding with the cache against decoding without, against the loss, and against the oracle."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from albor.architecture import Architecture
from albor.canary.reference import Reference, unpacked
from albor.config import RunConfig
from albor.memory.arena import Arena
from albor.memory.plan import plan_inference, plan_training
from albor.model.decode import ContextFull, Decoder
from albor.model.parameters import named_tensors
from albor.model.transformer import Transformer

SHAPES = {
    "grouped": {"num_key_value_heads": 2},
    "one key head": {"num_attention_heads": 6, "num_key_value_heads": 1, "tie_word_embeddings": False},
    "ungrouped, odd sizes": {
        "hidden_size": 30, "num_attention_heads": 3, "num_key_value_heads": 3,
        "intermediate_size": 37, "vocab_size": 101,
    },
    "muP": {"mup_base_width": 36},
}  # fmt: skip
CONTEXT = 24
CHUNK = 7  # the training sequence, and so the rows of a prompt that are read at a time


def make_config(shape: dict[str, object], prompts: tuple[str, ...] = ()) -> RunConfig:
    model = {
        "hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4,
        "vocab_size": 96, "max_position_embeddings": CONTEXT, **shape,
    }  # fmt: skip
    return RunConfig.model_validate({
        "name": "test",
        "model": model,
        "data": {"sequence_length": CHUNK, "sources": [{"kind": "python-stdlib"}]},
        "train": {"max_steps": 1000, "micro_batch_size": 2},
        "evaluate": {"prompts": list(prompts)},
    })  # fmt: skip


def make_model(shape: dict[str, object], dtype: str = "float64") -> Transformer:
    config = make_config(shape)
    architecture = Architecture.from_config(config.model)
    arena = Arena(plan_inference(config, "cpu", dtype, config.train.micro_batch_size), poison=True)
    generator = torch.Generator().manual_seed(1)
    for name, tensor in named_tensors(arena["weights"], architecture).items():
        mean = 1.0 if name.endswith("norm") else 0.0
        tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.3 + mean)
    return Transformer(architecture, arena, CHUNK)


def random_tokens(model: Transformer, count: int = CONTEXT) -> torch.Tensor:
    return torch.randint(model.architecture.vocab_size, (count,), generator=torch.Generator().manual_seed(2))


def step_by_step(decoder: Decoder, tokens: torch.Tensor, prompt: int) -> torch.Tensor:
    """The logits after each token from the prompt's last on."""
    decoder.reset()
    logits = [decoder.feed(tokens[:prompt]).clone()]
    return torch.stack(logits + [decoder.feed(token).clone() for token in tokens[prompt:, None]])


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_every_position_agrees_with_the_reference(shape: dict[str, object]) -> None:
    model = make_model(shape)
    reference = Reference(model.architecture).double()
    named = named_tensors(model.arena["weights"], model.architecture)
    reference.load_state_dict(unpacked(named, model.architecture), strict=False)
    tokens = random_tokens(model)
    with torch.no_grad():
        expected = reference(tokens[None])[0]
    decoder = Decoder(model, model.arena)
    # Token by token; one chunk; two whole chunks; a last chunk of one row; the full context.
    for prompt in (1, CHUNK, 2 * CHUNK, 2 * CHUNK + 1, CONTEXT):
        got = step_by_step(decoder, tokens, prompt)
        torch.testing.assert_close(got, expected[prompt - 1 :], rtol=1e-10, atol=1e-10)
    # All positions of one call, in the same chunks.
    for count in (1, CHUNK, CONTEXT):
        decoder.reset()
        got = torch.cat([decoder.feed_for_each(part) for part in tokens.split(count)])
        torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_logits_give_the_loss_of_the_full_forward(shape: dict[str, object]) -> None:
    model = make_model(shape)
    tokens = random_tokens(model, 2 * CHUNK)  # a micro-batch of two sequences
    targets, losses = tokens.roll(-1), torch.empty(2 * CHUNK, dtype=torch.float64)
    model.losses(tokens, targets, losses)
    decoder = Decoder(model, model.arena)
    logits = torch.cat([step_by_step(decoder, sequence, 3) for sequence in tokens.split(CHUNK)])
    rows = [n for n in range(2 * CHUNK) if n % CHUNK >= 2]  # a prompt of 3 gives the logits of its last token
    expected = F.cross_entropy(logits, targets[rows], reduction="none")
    torch.testing.assert_close(losses[rows], expected, rtol=1e-10, atol=1e-10)


def test_logits_do_not_depend_on_how_the_tokens_are_fed() -> None:
    model = make_model(SHAPES["grouped"])
    tokens, decoder = random_tokens(model), Decoder(model, model.arena)
    whole = decoder.feed(tokens).clone()
    for sizes in ((10, 14), (1, 22, 1), (3, 1, 20)):
        decoder.reset()
        for part in tokens.split(sizes):
            logits = decoder.feed(part)
        torch.testing.assert_close(logits, whole, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_greedy_tokens_are_those_of_decoding_without_a_cache(shape: dict[str, object]) -> None:
    model = make_model(shape, "float32")
    decoder, prompt = Decoder(model, model.arena), random_tokens(model, 5)
    cached, logits = prompt, decoder.feed(prompt)
    while len(cached) < CONTEXT:
        token = logits.argmax().view(1)
        cached, logits = torch.cat([cached, token]), decoder.feed(token)
    uncached = prompt
    while len(uncached) < CONTEXT:
        decoder.reset()
        uncached = torch.cat([uncached, decoder.feed(uncached).argmax().view(1)])
    assert cached.tolist() == uncached.tolist()


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_one_token_at_a_time_computes_what_a_chunk_does(shape: dict[str, object]) -> None:
    """In fp32, to its rounding; the paths share no more than the weights and the cache."""
    model = make_model(shape, "float32")
    tokens, decoder = random_tokens(model), Decoder(model, model.arena)
    whole = decoder.feed_for_each(tokens).clone()
    decoder.reset()
    singly = torch.stack([decoder.feed_one(int(token)).clone() for token in tokens])
    # Sums of at most 64 products; three layers of them.
    assert (singly - whole).abs().max() < 64 * 3 * torch.finfo(torch.float32).eps * whole.abs().max()
    assert decoder.length == CONTEXT


def test_what_is_rewound_is_read_again() -> None:
    model = make_model(SHAPES["grouped"])
    tokens, decoder = random_tokens(model), Decoder(model, model.arena)
    decoder.feed(tokens[:9])
    expected = decoder.feed(tokens[9:12]).clone()
    decoder.feed(tokens[12:])
    decoder.rewind(9)
    assert torch.equal(decoder.feed(tokens[9:12]), expected)
    for length in (-1, 13):
        with pytest.raises(ValueError, match="12 tokens are read"):
            decoder.rewind(length)


def test_bfloat16_stays_near_float64() -> None:
    wide, narrow = make_model(SHAPES["grouped"]), make_model(SHAPES["grouped"], "bfloat16")
    narrow.arena["weights"].copy_(wide.arena["weights"])
    wide.arena["weights"].copy_(narrow.arena["weights"])  # the same values, rounded
    tokens = random_tokens(wide)
    expected = step_by_step(Decoder(wide, wide.arena), tokens, 9)
    got = step_by_step(Decoder(narrow, narrow.arena), tokens, 9)
    assert got.dtype == torch.bfloat16
    assert (got - expected).abs().mean() < 0.05 * expected.abs().mean()


def test_a_full_context_refuses_more_and_keeps_what_it_read() -> None:
    model = make_model(SHAPES["grouped"])
    decoder, tokens = Decoder(model, model.arena), random_tokens(model, CONTEXT + 1)
    with pytest.raises(ContextFull, match=rf"^{CONTEXT + 1} tokens .* context of {CONTEXT} "):
        decoder.feed(tokens)
    assert decoder.length == 0
    decoder.feed(tokens[: CONTEXT - 1])
    with pytest.raises(ContextFull):
        decoder.feed(tokens[:2])
    last = decoder.feed(tokens[CONTEXT - 1 : CONTEXT]).clone()
    assert decoder.length == CONTEXT
    with pytest.raises(ContextFull):
        decoder.feed(tokens[:1])
    decoder.reset()
    torch.testing.assert_close(decoder.feed(tokens[:CONTEXT]), last, rtol=1e-10, atol=1e-10)


def test_nothing_is_no_token_to_follow() -> None:
    model = make_model(SHAPES["grouped"])
    with pytest.raises(ValueError, match="without a token"):
        Decoder(model, model.arena).feed(torch.empty(0, dtype=torch.int64))


def test_a_training_plan_with_prompts_decodes_after_other_phases_used_its_memory() -> None:
    """`sample` and `evaluate` share memory there; poison shows a buffer that is read before it is written."""
    config = make_config(SHAPES["grouped"], prompts=("a",))
    inference = make_model(SHAPES["grouped"])
    arena = Arena(plan_training(config, "cpu", "float64"), poison=True)
    arena["weights"].copy_(inference.arena["weights"])
    model = Transformer(inference.architecture, arena, CHUNK)
    tokens = random_tokens(model, 2 * CHUNK)
    decoder, losses = Decoder(model, arena), torch.empty(2 * CHUNK, dtype=torch.float64)
    expected = step_by_step(Decoder(inference, inference.arena), tokens, 9)
    for _ in range(2):
        model.losses(tokens, tokens, losses)
        assert torch.equal(step_by_step(decoder, tokens, 9), expected)
