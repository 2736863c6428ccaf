"""Width transfer (muP): what the option multiplies, what it leaves alone, and that activations keep their
scale as a model gets wider.

Beside these, the option is one of the cases of test_model.py (gradients), test_decode.py, test_export_hf.py,
test_ops.py and test_kernels_adamw.py.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from export_cases import make_source, tokenizer
from helpers import (
    END_OF_DOCUMENT,
    gradients_of,
    make_batches,
    make_config,
    make_reference,
    make_trainer,
    spread_norms,
    weights_of,
)
from safetensors.torch import load_file

from albor.architecture import Architecture
from albor.bench.cases import case_of
from albor.canary.plain import PlainTraining, make_model, short_name
from albor.canary.reference import Reference, unpacked
from albor.config import RunConfig, check_algebra
from albor.errors import ConfigError
from albor.evaluate.scorer import Scorer
from albor.export import hf
from albor.export.command import _check
from albor.export.weights import hf_tensors
from albor.generate.load import Loaded
from albor.memory.arena import Arena
from albor.memory.plan import plan_inference, plan_training
from albor.model.parameters import initialise, named_tensors
from albor.model.transformer import Transformer
from albor.ops import UpdateScalars
from albor.train.step import Trainer, TrainState

ROOT = Path(__file__).parent.parent
RATES = {"kind": "constant", "min_lr_ratio": 1.0}


def train(config: RunConfig, steps: int, dtype: str = "float32") -> Trainer:
    trainer, state = make_trainer(config, dtype), TrainState()
    for step in range(steps):
        _, state = trainer.step(make_batches(config, seed=step), state)
    return trainer


# What it multiplies


@pytest.mark.parametrize("tied", [True, False])
def test_at_the_base_width_nothing_changes(tied: bool):
    """To the bit, in losses and weights; and the option is seen, for at another base they are others."""
    keys: dict[str, Any] = {"tie_word_embeddings": tied, "head_chunk_tokens": 11, **RATES}
    without, same, other = (
        train(make_config(**keys, mup_base_width=base), 3).arena["weights"] for base in (None, 24, 12)
    )
    assert torch.equal(without, same)
    assert not torch.equal(without, other)


def test_it_takes_no_memory():
    plans = [plan_training(make_config(mup_base_width=base), "cuda", "bfloat16") for base in (None, 6)]
    assert plans[0] == plans[1]


def test_the_blocks_matrices_begin_with_less():
    parameters = {
        base: {p.name: p.init_std for p in Architecture.from_config(config.model).parameters}
        for base in (None, 6)
        for config in [make_config(mup_base_width=base, tie_word_embeddings=False)]
    }
    for name, std in parameters[None].items():
        inner = name.startswith("blocks.") and not name.endswith("norm")
        expected = std if std is None else pytest.approx(std * (0.5 if inner else 1), rel=1e-12)
        assert parameters[6][name] == expected, name


@pytest.mark.parametrize("state", ["fp32", "bf16"])
def test_the_blocks_matrices_take_smaller_steps_and_decay_as_the_others_do(state: str):
    """One update of weights that are all 1 by gradients that are all 1: Adam's first step is the rate."""
    lr, decay = 2**-5, 0.25
    config = make_config(
        lr=lr, weight_decay=decay, mup_base_width=6, tie_word_embeddings=False, eps=1e-30,
        state_dtype=state, precision="bf16" if state == "bf16" else "fp32",
    )  # fmt: skip
    trainer = make_trainer(config, "bfloat16" if state == "bf16" else "float32", poison=False)
    for tensors in (weights_of(trainer), gradients_of(trainer)):
        for tensor in tensors.values():
            tensor.fill_(1.0)
    trainer.model.ops.begin_update(UpdateScalars(lr, 1.0, 1, seed=0), config.optimizer.betas)
    trainer.optimizer.update(trainer.accumulator)
    for name, tensor in weights_of(trainer).items():
        decayed = 1.0 if name.endswith("norm") else 1 - lr * decay
        inner = name.startswith("blocks.") and not name.endswith("norm")
        expected = decayed - (lr / 4 if inner else lr)
        found = tensor.double().mean().item()  # bf16 is rounded to either side
        assert found == pytest.approx(expected, abs=1e-6 if state == "fp32" else 5e-4), name


@pytest.mark.parametrize("kind", ["oracle", "transformers"])
@pytest.mark.parametrize("tied", [True, False])
def test_training_equals_the_canarys_plain_loop(kind: Any, tied: bool):
    """Ten steps by another model, autograd and torch's AdamW with a group for each learning rate."""
    if kind == "transformers":
        pytest.importorskip("transformers")
    config = make_config(
        mup_base_width=18, tie_word_embeddings=tied, lr=0.01, eps=1e-3, weight_decay=0.3, grad_clip=0.5,
        z_loss=0.01, label_smoothing=0.1, num_key_value_heads=1, **RATES,
    )  # fmt: skip
    trainer, state = make_trainer(config, "float32"), TrainState()
    spread_norms(trainer)
    module, logits, _ = make_model(kind, trainer.architecture, torch.device("cpu"))
    plain = PlainTraining(config, module, logits, END_OF_DOCUMENT)

    def ours() -> dict[str, torch.Tensor]:
        named = unpacked(weights_of(trainer), trainer.architecture)
        return {short_name(name): tensor for name, tensor in named.items()}

    plain.load(ours())
    for step in range(10):
        batches = make_batches(config, seed=step, ignored=0.2)
        loss = plain.accumulate(batches, lambda *_: None)
        plain.update(config.optimizer.lr)
        result, state = trainer.step(batches, state)
        assert result.loss == pytest.approx(loss, rel=1e-5)
    for name, weight in ours().items():
        torch.testing.assert_close(weight, plain.parameters[name].detach(), rtol=1e-4, atol=1e-5)


# Where the logits are computed


def test_every_way_to_a_loss_multiplies_the_logits():
    """The evaluation of a training, and the scorer of benchmarks, whose head is its own."""
    config = make_config(mup_base_width=6, max_position_embeddings=16)
    arena = Arena(plan_inference(config, "cpu", "float32", 2), poison=True)
    architecture = Architecture.from_config(config.model)
    initialise(arena, architecture, config.seed)
    model = Transformer(architecture, arena, 16)
    reference = Reference(architecture)
    named = unpacked(named_tensors(arena["weights"], architecture), architecture)
    reference.load_state_dict(named, strict=False)
    ((tokens, targets),) = make_batches(config)
    logits = reference(torch.from_numpy(tokens)).flatten(0, 1).detach()
    flat = torch.from_numpy(targets).flatten()
    expected = torch.nn.functional.cross_entropy(logits, flat, reduction="none")
    plain = torch.nn.functional.cross_entropy(4 * logits, flat, reduction="none")
    assert (plain - expected).abs().max() > 0.5

    evaluated = torch.empty(flat.numel())
    model.losses(torch.from_numpy(tokens).flatten(), flat, evaluated)
    torch.testing.assert_close(evaluated, expected, rtol=1e-5, atol=1e-5)
    scorer = Scorer(Loaded(config, model, tokenizer(), arena))
    scored, _ = scorer.score_rows(tokens.tolist(), list(range(flat.numel())), targets.flatten())
    torch.testing.assert_close(torch.from_numpy(scored).float(), expected, rtol=1e-5, atol=1e-5)


# Exports


@pytest.mark.parametrize(("base", "tied"), [(12, True), (12, False), (36, True)])
def test_an_export_contains_the_output_multiplier(base: int, tied: bool, tmp_path: Path):
    """In the final norm and nowhere else. A power of two costs no bit of it in any dtype."""
    source = make_source(tmp_path, mup_base_width=base, tie_word_embeddings=tied)
    (tmp_path / "out").mkdir()
    hf.FORMAT.write(source, tmp_path / "out", "bf16", lambda *_: None)
    stored = load_file(tmp_path / "out" / "model.safetensors")
    plain = Architecture.from_config(source.config.model.model_copy(update={"mup_base_width": None}))
    for name, tensor in hf_tensors(source.loaded.arena, plain):
        expected = tensor.bfloat16()
        if name == "model.norm.weight" and base == 12:
            assert torch.equal(stored[name], expected / 4)
        elif name == "model.norm.weight":  # rounded once, from fp32
            assert torch.equal(stored[name], (tensor * 0.75).bfloat16())
            assert not torch.equal(stored[name], expected)
        else:
            assert torch.equal(stored[name], expected), name
    assert "mup" not in (tmp_path / "out" / "config.json").read_text()
    assert "muP" in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_the_gate_passes_an_export(dtype: str, tmp_path: Path):
    """With a factor that rounds; the gate compares with the run's own arithmetic, which multiplies."""
    pytest.importorskip("transformers")
    source = make_source(tmp_path / "run", mup_base_width=36)
    (tmp_path / "out").mkdir()
    hf.FORMAT.write(source, tmp_path / "out", dtype, lambda *_: None)
    gate = _check(source, hf.FORMAT, tmp_path / "out", dtype, True, lambda *_: None)
    assert gate.passed is True, gate.rows


# Coordinate check (Yang et al. 2022, appendix D.1)

WIDTHS = (64, 128, 256, 512)
TIMES = (1, 3, 10)


def coordinates(width: int, base: int | None, tied: bool) -> dict[tuple[str, int], float]:
    """After so many steps on one batch: the root mean square over tokens and channels of what the last layer
    computes, and of the logits.
    """
    config = make_config(
        hidden_size=width, intermediate_size=2 * width, num_attention_heads=width // 32,
        num_key_value_heads=width // 64, vocab_size=64, sequence_length=32, micro_batch_size=4,
        initializer_range=0.03, lr=0.004, mup_base_width=base, tie_word_embeddings=tied, **RATES,
    )  # fmt: skip
    trainer, state, batches = make_trainer(config, "float32"), TrainState(), make_batches(config)
    found = {}
    for step in range(1, max(TIMES) + 1):
        _, state = trainer.step(batches, state)
        if step not in TIMES:
            continue
        reference = make_reference(trainer, torch.float32)
        last = reference.layers[-1]
        parts = {"attention": last.self_attn, "mlp": last.mlp, "residual": last, "logits": reference}
        for name, module in parts.items():

            def keep(_: Any, __: Any, out: torch.Tensor, key: tuple[str, int] = (name, step)) -> None:
                found[key] = out.square().mean().sqrt().item()

            module.register_forward_hook(keep)
        with torch.no_grad():
            reference(torch.from_numpy(batches[0][0]))
    return found


def slopes(base: int | None, tied: bool) -> dict[tuple[str, int], float]:
    """Of log scale against log width, by least squares."""
    measured = [coordinates(width, base, tied) for width in WIDTHS]
    x = np.log(WIDTHS)
    return {key: float(np.polyfit(x, np.log([m[key] for m in measured]), 1)[0]) for key in measured[0]}


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_activations_keep_their_scale_as_the_model_gets_wider(tied: bool):
    """Initial logits fall with the root of the width, by design: what a wide model has learned is larger than
    what it began with. So their slope begins between -0.5 and 0, and goes to 0.
    """
    found = slopes(64, tied)
    for (name, step), slope in found.items():
        lowest = {1: -0.35, 3: -0.2, 10: -0.12}[step] if name == "logits" else -0.15
        assert lowest < slope < 0.1, (name, step, slope)
    assert abs(found["logits", 10]) < abs(found["logits", 1])


def test_without_it_they_grow_with_the_width():
    assert min(slopes(None, tied=True).values()) > 0.5


def test_the_documented_sweep_is_the_record():
    """Of benchmarks/mup.py: the page has its losses, and claims no less movement than there was."""
    record = json.loads((ROOT / "benchmarks/results/mup.json").read_text(encoding="utf-8"))
    page = (ROOT / "docs/mup.md").read_text(encoding="utf-8")
    moved = {way: np.ptp(list(best.values())) for way, best in record["best_exponent"].items()}
    assert {way: f"{distance:.1f}" for way, distance in moved.items()} == {"standard": "0.9", "muP": "0.3"}
    assert "without muP by 0.9 of a doubling, with it by 0.3" in " ".join(page.split())
    for way, by_width in record["losses"].items():
        for width, losses in by_width.items():
            (row,) = [line for line in page.splitlines() if line.startswith(f"| {way} | {width} |")]
            best = record["best_exponent"][way][width]
            cells = [f"{loss:.3f}" for loss in losses.values()]
            cells.append("beyond" if best is None else f"2^{best:.2f}")
            assert row.removeprefix(f"| {way} | {width} | ") == " | ".join(cells) + " |"


# What is refused


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"mup_base_width": 25}, "25 is no multiple of the head width, 24 / 4 = 6"),
        ({"mup_base_width": 6, "init_from": "somewhere"}, "scales initial weights and logits"),
    ],
)
def test_what_has_no_meaning_is_refused(keys: dict[str, Any], message: str):
    problems = check_algebra(make_config(**keys))
    (found,) = [problem for problem in problems if problem.key == "model.mup_base_width"]
    assert found.message.startswith(message)


def test_the_benchmark_refuses_it_for_its_peers_do_not_know_it():
    with pytest.raises(ConfigError, match=r"model\.mup_base_width"):
        case_of(make_config(mup_base_width=6), 2)
