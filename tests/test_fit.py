"""`--fit`: against trying everything, and what it prints against what the estimate then says."""

from __future__ import annotations

import json
import random
import re
import shlex
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import yaml
from helpers import make_config
from run_cases import Result, call

from albor.config import RunConfig, check_algebra
from albor.configfile import load_config
from albor.errors import ConfigError
from albor.memory import speed
from albor.memory.cards import Gpu, Hardware, find_gpu
from albor.memory.estimate import Estimate, estimate
from albor.memory.fit import NEAR, Choice, Fit, Options, _Search, find_fit
from albor.memory.suggest import apply
from albor.units import GIB

CONFIGS = Path(__file__).parent.parent / "configs"
LARGE = CONFIGS / "pretrain-350m.yaml"
CASES_TRIED = 30


@pytest.fixture(autouse=True)
def own_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")


def _config(*overrides: str, name: str = "pretrain-350m") -> RunConfig:
    return load_config(CONFIGS / f"{name}.yaml", overrides)


def _fit(*overrides: str, gpu: str = "RTX 4090", **options: bool) -> Fit:
    return find_fit(estimate(_config(*overrides), gpu), Options(**options))


# Against trying everything


def _everything(given: Estimate, options: Options) -> list[tuple[Choice, int]]:
    """Every configuration of the search at the given length, planned; and the bound on its memory."""
    search = _Search(given, options)
    candidates = list(search._candidates(given.config.data.sequence_length))
    return [(search._choice(c.change), search._bound(c)) for c in candidates]


@lru_cache
def _random_case(number: int) -> tuple[Estimate, Fit, list[tuple[Choice, int]]]:
    """A small model on a card with room for some of its configurations, what is found, and all there is."""
    rng = random.Random(number)
    heads = rng.choice([2, 4, 8])
    config = make_config(
        hidden_size=heads * rng.choice([32, 48, 64]),
        intermediate_size=rng.choice([256, 768]),
        num_attention_heads=heads,
        num_key_value_heads=rng.choice([1, 2]),
        num_hidden_layers=rng.choice([1, 2, 4]),
        vocab_size=rng.choice([512, 8192]),
        tie_word_embeddings=rng.random() < 0.5,
        sequence_length=rng.choice([384, 1024]),
        max_position_embeddings=1024,
        micro_batch_size=rng.choice([1, 3, 4, 16]),
        gradient_accumulation_steps=rng.choice([1, 4, 6, 8]),
        accumulator=rng.choice(["cpu", "gpu"]),
        recompute=rng.choice(["none", "cheap", "block"]),
        head_chunk_tokens=rng.choice([None, None, 100]),
    )
    card = rng.choice([find_gpu(name) for name in ("3060 12GB", "RTX 4090", "H100", "B200", "5090", "T4")])
    options = Options(state=rng.random() < 0.3)
    if number >= 20:  # a library's attention, whose scratch may shrink as the micro-batch grows
        card = rng.choice([find_gpu(name) for name in ("RTX 4090", "H100", "RTX 5090")])
        backend = rng.choice(["flash", "flash", "cudnn"])
        config = apply(config, {
            "model.max_position_embeddings": 4096, "data.sequence_length": rng.choice([1024, 4096]),
            "data.document_mask": False, "train.attention": backend,
            "train.deterministic": backend == "flash" and rng.random() < 0.7,
        })  # fmt: skip
    # In every second case the link is so slow that it matters when the sums come back.
    with pytest.MonkeyPatch.context() as patch:
        if number % 2:
            patch.setattr(speed, "_LINKS", dict.fromkeys(speed._LINKS, 1e9))
        return _solve(config, card, options, rng.uniform(-0.25, 1.05))


def _solve(
    config: RunConfig, card: Gpu, options: Options, room: float
) -> tuple[Estimate, Fit, list[tuple[Choice, int]]]:
    roomy = _everything(Estimate.of(config, Hardware("cuda", card.name, card, 1024 * GIB)), options)
    needs = sorted(choice.estimate.required_bytes for choice, _ in roomy)
    # Below the least in a fifth of the cases, and not often above the most.
    capacity = needs[0] + int((needs[-1] - needs[0]) * room)
    here = Hardware("cuda", card.name, card, capacity)
    found = find_fit(Estimate.of(config, here), options)
    all_of_them = [
        (replace(choice, estimate=replace(choice.estimate, hardware=here)), bound) for choice, bound in roomy
    ]
    return found.given.estimate, found, all_of_them


@pytest.mark.parametrize("number", range(CASES_TRIED))
def test_nothing_that_was_searched_is_better(number: int):
    given, found, all_of_them = _random_case(number)
    assert found.tried == len(all_of_them)
    # A T4 has no bf16.
    always = {"train.precision"} if "T4" in given.hardware.description else set()
    for choice, bound in all_of_them:
        assert bound <= choice.estimate.required_bytes
        assert check_algebra(choice.estimate.config) == []
        assert choice.estimate.config.tokens_per_step == given.config.tokens_per_step
        assert choice.estimate.config.optimizer.state_dtype == "fp32" or found.options.state
        assert always <= set(choice.change) <= always | {
            "train.micro_batch_size", "train.gradient_accumulation_steps", "train.accumulator",
            "train.recompute", "train.head_chunk_tokens", "optimizer.state_dtype",
        }  # fmt: skip
    fitting = [choice for choice, _ in all_of_them if choice.estimate.fits]
    if not fitting:
        assert found.best is None
        least = min(choice.estimate.required_bytes for choice, _ in all_of_them)
        assert found.smallest is not None
        assert found.smallest.estimate.required_bytes <= 1.02 * least
        return
    assert found.best is not None
    assert found.best.estimate.fits
    assert found.best.order == min(choice.order for choice in fitting)
    alike = [choice for choice in fitting if choice.order == found.best.order]
    least = min(choice.estimate.required_bytes for choice in alike)
    assert found.best.estimate.required_bytes == least
    if found.best.seconds is not None:
        near = [c for c in fitting if c.seconds is not None and c.seconds <= (1 + NEAR) * found.best.seconds]
        small = found.smallest_near or found.best
        assert small.estimate.required_bytes == min(c.estimate.required_bytes for c in near)


def test_the_cases_above_are_varied():
    found = [_random_case(number)[1] for number in range(CASES_TRIED)]
    best = [fit.best for fit in found if fit.best is not None]
    assert {fit.basis for fit in found} == {"modelled", "order"}
    assert 2 <= len(found) - len(best) <= CASES_TRIED // 3
    assert sum(fit.smallest_near is not None for fit in found) >= 5
    assert len({choice.estimate.config.train.recompute for choice in best}) >= 2
    assert {choice.estimate.plan.accumulator for choice in best} == {"cpu", "gpu"}
    attention = [choice.estimate.plan.attention.backend for choice in best]
    assert min(attention.count(backend) for backend in ("triton", "flash", "cudnn")) >= 2
    # What a bound on the micro-batch alone would get wrong: fewer sequences that need more.
    shrinks = 0
    for number in range(20, CASES_TRIED):
        sizes: dict[object, dict[int, int]] = {}
        for choice, _ in _random_case(number)[2]:
            config = choice.estimate.config
            rest = (config.train.recompute, choice.estimate.plan.accumulator, config.train.head_chunk_tokens)
            needs = sizes.setdefault(rest, {})
            needs[config.train.micro_batch_size] = choice.estimate.required_bytes
        ordered = [[needs[batch] for batch in sorted(needs)] for needs in sizes.values()]
        shrinks += any(needs != sorted(needs) for needs in ordered)
    assert shrinks >= 3


@pytest.mark.parametrize("number", [24, 28])
def test_fewer_sequences_of_flash_attention_may_need_more(number: int):
    """With few of them the keys are split, and dQ has several sums. On a card that just holds one of the
    configurations, those with a larger micro-batch than one that does not fit are looked at all the same.
    """
    given, found, all_of_them = _random_case(number)
    for room in sorted({choice.estimate.required_bytes for choice, _ in all_of_them}):
        here = replace(given, hardware=replace(given.hardware, capacity_bytes=room))
        best = find_fit(here, found.options).best
        assert best is not None
        fitting = [choice for choice, _ in all_of_them if choice.estimate.required_bytes <= room]
        assert best.order == min(choice.order for choice in fitting)


def test_one_that_turns_out_slower_than_it_could_be_is_no_obstacle(monkeypatch: pytest.MonkeyPatch):
    """Sums that come back late are known of only when there is a plan; what comes after may be better."""
    monkeypatch.setattr(speed, "_LINKS", dict.fromkeys(speed._LINKS, 1e9))
    given = replace(_random_case(5)[0], hardware=Hardware("cuda", "a card", find_gpu("RTX 4090"), 80 * GIB))
    search = _Search(given, Options())
    candidates = sorted(search._candidates(given.config.data.sequence_length), key=lambda c: c.soonest)
    order = {candidate: search._choice(candidate.change).order for candidate in candidates}
    overtaken = [
        (late, other)
        for late in candidates
        for other in candidates
        if late.soonest < other.soonest == order[other] < order[late]
    ]
    assert overtaken
    for late, other in overtaken:
        best = search._best([late, other])
        assert best is not None
        assert best.change == other.change


def test_a_bound_spares_most_plans():
    for layers, most in ((24, 20), (200, 20)):
        fit = _fit(f"model.num_hidden_layers={layers}", gpu="H200")
        assert fit.tried > 150
        assert fit.planned <= most


def test_more_micro_batches_than_a_step_can_have_are_no_candidates():
    config = _config(f"train.micro_batch_size={2**63 - 1}", "train.gradient_accumulation_steps=2")
    candidates = list(_Search(estimate(config, "RTX 4090"), Options())._candidates(1024))
    counts = {candidate.config.train.gradient_accumulation_steps for candidate in candidates}
    assert 2**63 - 1 in counts  # two sequences at a time; one at a time would be 2**64 - 2
    assert max(counts) == 2**63 - 1


def test_many_sequences_have_few_micro_batches():
    fit = _fit("train.micro_batch_size=1", f"train.gradient_accumulation_steps={2**40}")
    assert fit.tried < 500
    assert fit.best is not None


# What is printed


def _json(*words: object) -> tuple[int, dict[str, Any]]:
    result = call("vram-estimate", *words, "--json")
    return result.code, json.loads(result.out)


LONG = ("data.sequence_length=16384", "model.max_position_embeddings=16384", "train.micro_batch_size=1")
CASES = [
    (("--gpu", "RTX 4090"), ()),
    (("--gpu", "RTX 3060 12GB"), ("data.sequence_length=2048", "train.micro_batch_size=8")),
    (("--gpu", "RTX 4090"), ("train.accumulator=auto",)),
    (("--gpu", "H100"), ("train.head_chunk_tokens=4096", "train.recompute=block")),
    (("--vram", "7.5GiB"), ()),
    (("--gpu", "T4"), ("train.precision=fp16",)),
    (("--gpu", "T4"), ()),
    (("--gpu", "V100 32GB", "--fit-state"), ("optimizer.state_dtype=bf16",)),
    (("--gpu", "RTX 3060 12GB", "--fit-state"), ("model.num_hidden_layers=40",)),
    (("--vram", "7GiB", "--fit-sequence"), LONG),
]


@pytest.mark.parametrize(("options", "overrides"), CASES, ids=lambda words: " ".join(words))
def test_the_lines_and_the_command_give_what_was_promised(
    options: tuple[str, ...], overrides: tuple[str, ...], tmp_path: Path
):
    where = options[:2]
    code, answer = _json(LARGE, *overrides, *options, "--fit")
    assert code == 0
    chosen = answer["fit"]["chosen"]
    assert chosen["fits"] is True

    def same(got: dict[str, Any]) -> None:
        assert got["fits"] is True
        assert got["tokens_per_step"] == answer["tokens_per_step"] == answer["fit"]["tokens_per_step"]
        assert got["device_bytes"] == chosen["device_bytes"]
        assert got["device_bytes"] + sum(got["outside"].values()) == chosen["required_bytes"]
        if chosen["tokens_per_second"] is not None:
            assert got["cost"]["modelled"]["tokens_per_second"] == pytest.approx(chosen["tokens_per_second"])

    # The overrides, the command, and the lines in the file.
    same(_json(LARGE, *overrides, *shlex.split(chosen["overrides"]), *where)[1])
    text = call("vram-estimate", LARGE, *overrides, *options, "--fit").out
    command = shlex.split(text.splitlines()[-1])
    assert command[:2] == ["albor", "train"]
    keys = [word.partition("=")[0] for word in command[3:]]
    assert len(set(keys)) == len(keys)
    same(_json(*command[2:], *where)[1])
    changed = tmp_path / "changed.yaml"
    content = yaml.safe_load(LARGE.read_text())
    given = [override.partition("=") for override in overrides]
    for section, values in [
        *((key.partition(".")[0], {key.partition(".")[2]: yaml.safe_load(value)}) for key, _, value in given),
        *yaml.safe_load("\n".join(answer["fit"]["yaml"])).items(),
    ]:
        content[section] |= values
    changed.write_text(yaml.safe_dump(content))
    same(_json(changed, *where)[1])

    # And there is nothing better than what was chosen.
    state = ["--fit-state"] if "--fit-state" in options else []
    again = call("vram-estimate", changed, *where, "--fit", *state)
    assert again.code == 0
    assert "there is nothing to change" in again.out


def test_the_json_has_what_is_documented():
    code, answer = _json(LARGE, "--gpu", "RTX 4090", "--fit")
    fit = answer["fit"]
    assert code == 0
    assert fit["basis"] == "modelled"
    assert [row["is"] for row in fit["configurations"]] == [
        "fastest",
        "other batch",
        "least memory",
        "as given",
    ]
    for row in fit["configurations"]:
        assert row["tokens_per_second"] == pytest.approx(131_072 / row["seconds_per_step"])
        assert row["micro_batch_size"] * row["gradient_accumulation_steps"] == 128
    fastest, given = fit["configurations"][0], fit["configurations"][-1]
    assert fastest == {"is": "fastest", **fit["chosen"]}
    assert given["seconds_per_step"] > fastest["seconds_per_step"]
    assert given["device_bytes"] == answer["device_bytes"]


def _page(*words: object) -> Result:
    return call("vram-estimate", *words)


@pytest.mark.parametrize(("options", "overrides"), CASES, ids=lambda words: " ".join(words))
def test_the_page_is_narrow(options: tuple[str, ...], overrides: tuple[str, ...]):
    result = _page(LARGE, *overrides, *options, "--fit")
    for line in result.out.splitlines():
        assert len(line) <= 80 or "train.micro_batch_size=" in line or str(LARGE) in line, line
    assert "\x1b" not in result.out


def test_what_each_change_does_to_the_speed():
    fit = _fit(gpu="RTX 3060 12GB")
    assert fit.best is not None
    assert fit.best.seconds is not None
    for key, gain in fit.costs.items():
        group = [key] if key != "train.micro_batch_size" else [key, "train.gradient_accumulation_steps"]
        rest = {name: value for name, value in fit.best.change.items() if name not in group}
        without = Estimate.of(apply(fit.given.estimate.config, rest), fit.given.estimate.hardware)
        found = find_fit(without).given.seconds
        assert found is not None
        # Where the sums' way back is laid out otherwise, a little more than the change shows.
        assert gain == pytest.approx(found / fit.best.seconds - 1, abs=5e-3)
    assert any(f"{gain:+.1%} speed" in line for gain in fit.costs.values() for line in fit.yaml_lines)


def test_recomputation_that_is_not_needed_is_given_up():
    fit = _fit("train.recompute=block")
    assert fit.best is not None
    assert fit.best.change["train.recompute"] == "none"
    assert fit.costs["train.recompute"] > 0.1


def test_a_card_without_bf16_gets_fp16():
    page = _page(LARGE, "--gpu", "T4", "--fit").out
    assert re.search(r"^    precision: fp16 +# no bf16 on this card$", page, re.MULTILINE)
    code, answer = _json(LARGE, "--gpu", "T4", "--fit", "optimizer.state_dtype=bf16")
    assert code == 0
    assert answer["fit"]["chosen"]["changes"]["train.precision"] == "fp16"
    assert answer["fit"]["chosen"]["state_dtype"] == "fp32"
    assert (
        "train.precision"
        not in _json(LARGE, "--gpu", "T4", "--fit", "train.precision=fp32")[1]["fit"]["chosen"]["changes"]
    )


def test_nothing_fits():
    result = _page(LARGE, "--vram", "4GiB", "--fit")
    assert result.code == 4
    assert max(len(line) for line in result.out.splitlines() if "train." not in line) <= 80
    assert "Nothing fits: the smallest needs 6." in result.out
    assert "train.micro_batch_size=1" in result.out
    assert "--fit-state" in result.out
    code, answer = _json(LARGE, "--vram", "4GiB", "--fit")
    assert code == 4
    assert answer["fit"]["chosen"] is None
    assert answer["fit"]["smallest"]["fits"] is False
    assert answer["fit"]["with_bf16_state"]["fits"] is True
    assert _page(LARGE, "--vram", "4GiB", "--fit-state").code == 0
    assert _page(LARGE, "--vram", "1GiB", "--fit-state").code == 4


def test_the_sequence_is_only_shortened_when_asked_and_needed():
    code, answer = _json(LARGE, *LONG, "--vram", "7GiB", "--fit")
    assert code == 4
    code, answer = _json(LARGE, *LONG, "--vram", "7GiB", "--fit-sequence")
    assert code == 0
    assert answer["fit"]["chosen"]["sequence_length"] < 16_384
    assert answer["fit"]["tokens_per_step"] == answer["tokens_per_step"] == 32 * 16_384
    assert (
        _json(LARGE, *LONG, "--vram", "20GiB", "--fit-sequence")[1]["fit"]["chosen"]["sequence_length"]
        == 16_384
    )


def test_a_capacity_is_needed(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("albor.memory.devices.installed_gpu", lambda: None)
    result = _page(LARGE, "--fit")
    assert result.code == 2
    assert "give --gpu NAME or --vram 24GiB" in result.err
    with pytest.raises(ConfigError):
        find_fit(Estimate.of(_config(), Hardware("cuda", "a card that does not say", find_gpu("L4"))))
    assert _page(LARGE, "--gpu", "L4", "--fit", "--sweep").code == 2
    assert _page("--audit", "runs/none", "--fit").code == 2


def test_without_a_speed_there_is_an_order(monkeypatch: pytest.MonkeyPatch):
    """Least recomputation, sums on the device, a micro-batch of about 16,384 tokens; and it says so."""
    fit = find_fit(estimate(_config("train.recompute=block"), vram=80 * GIB))
    assert fit.basis == "order"
    assert fit.best is not None
    train = fit.best.estimate.config.train
    assert (train.recompute, train.accumulator, train.micro_batch_size) == ("none", "gpu", 16)
    assert fit.best.seconds is fit.costs.get("train.recompute") is None
    page = _page(LARGE, "--vram", "80GiB", "--fit").out
    assert "in a fixed order" in page
    assert "No speed is known: least recomputation" in page
    assert "fastest" not in page
    # On a CPU what is given stands, as far as it fits.
    monkeypatch.setattr("albor.memory.devices.host_capacity", lambda: 64 * GIB)
    on_cpu = ("device=cpu", "train.precision=fp32")
    assert find_fit(estimate(_config(*on_cpu))).best == find_fit(estimate(_config(*on_cpu))).given
    needs = estimate(_config(*on_cpu)).required_bytes
    monkeypatch.setattr("albor.memory.devices.host_capacity", lambda: needs - 1)
    best = find_fit(estimate(_config(*on_cpu))).best
    assert best is not None
    assert best.change == {"train.micro_batch_size": 2, "train.gradient_accumulation_steps": 64}


def test_host_memory_counts_too():
    """Sums in host memory that has no room for them are no choice."""
    card = find_gpu("RTX 4090")
    here = Hardware("cuda", "a card", card, 24 * GIB, host_capacity_bytes=3 * GIB)
    best = find_fit(Estimate.of(_config(), here)).best
    assert best is not None
    assert best.estimate.plan.accumulator == "gpu"
    assert best.estimate.fits
