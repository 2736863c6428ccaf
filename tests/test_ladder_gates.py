"""Each gate passes what is right and fails what is wrong, with the number that shows it; and no gate passes
what it could not judge."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
from ladder_cases import CANARY, EXPORT, RESUME, config_of, final_of, logged, run_of

from albor.ladder import gates
from albor.ladder.file import (
    BigramGate,
    CanaryGate,
    FitsGate,
    Gates,
    GradientsGate,
    ScheduleEndGate,
    SkippedStepsGate,
    SpeedGate,
    UnigramGate,
    ValidationGate,
    VerifyResumeGate,
)
from albor.ladder.gates import LOOK, WHY, Result, RunLog
from albor.ladder.ngrams import cross_entropies
from albor.memory.estimate import estimate

CONFIG = config_of(100, warmup_steps=10)


def changed(rows: list[dict[str, Any]], of: str, change: Any, steps: range = range(1, 10**6)) -> list[Any]:
    """The rows with a metric's value v at these steps replaced by change(step, v)."""
    return [
        {**row, of: change(row["step"], row[of])} if of in row and row["step"] in steps else row
        for row in rows
    ]


def test_every_gate_says_why_and_where_to_look():
    assert set(WHY) == set(LOOK) == set(Gates.model_fields)


def test_a_result_survives_the_file():
    result = gates.bigram(BigramGate(), run_of(CONFIG), 3.0)
    assert Result.from_json(result.as_json()) == result
    bad = gates.bigram(BigramGate(), run_of(CONFIG, loss=math.nan), 3.0)
    assert (bad.status, bad.as_json()["value"]) == ("failed", None)


# Unigram


def test_unigram():
    run = run_of(CONFIG)
    passed = gates.unigram(UnigramGate(by_step=60), run, 3.0)
    assert passed.status == "passed"
    assert passed.value == pytest.approx(2.0 + 4.0 * 0.5**2 + 0.1) or passed.value < 3.0
    failed = gates.unigram(UnigramGate(by_step=20), run, 3.0)
    assert (failed.status, failed.limit) == ("failed", 3.0)
    assert gates.unigram(UnigramGate(by_step=60, margin=1.0), run, 3.0).status == "failed"
    early = RunLog(CONFIG, logged(CONFIG, last=30), [])
    assert gates.unigram(UnigramGate(by_step=60), early, 3.0).status == "not checked"


def test_unigram_does_not_take_a_smoothed_training_loss_for_a_cross_entropy():
    smoothed = config_of(100, warmup_steps=10, label_smoothing=0.1)
    no_validation = [row for row in logged(smoothed) if "train/loss" in row]
    found = gates.unigram(UnigramGate(by_step=60), run_of(smoothed, no_validation), 3.0)
    assert found.status == "not checked"
    assert gates.unigram(UnigramGate(by_step=60), run_of(CONFIG, no_validation), 3.0).status == "passed"


@pytest.mark.parametrize(
    ("steps", "warmup", "by_step"), [(61_000, 1000, 6100), (3000, 500, 1000), (900, 30, 200), (50, 10, 50)]
)
def test_the_step_of_the_unigram_gate(steps: int, warmup: int, by_step: int):
    assert gates.unigram_step(UnigramGate(), config_of(steps, warmup_steps=warmup)) == by_step


# Bigram, and what counting reaches


def test_bigram():
    assert gates.bigram(BigramGate(), run_of(CONFIG, loss=2.0), 2.01).status == "passed"
    assert gates.bigram(BigramGate(), run_of(CONFIG, loss=2.02), 2.01).status == "failed"
    assert gates.bigram(BigramGate(margin=0.1), run_of(CONFIG, loss=2.0), 2.01).status == "failed"
    unended = RunLog(CONFIG, logged(CONFIG), [])
    assert gates.bigram(BigramGate(), unended, 2.01).status == "not checked"


def test_cross_entropies_by_hand():
    """Text 0 1 0 1 0 2 over three tokens: 0 is followed by 1 twice and by 2 once, 1 by 0 twice."""
    text = np.array([0, 1, 0, 1, 0, 2])
    found = cross_entropies([text], np.array([0, 1, 2]), np.array([1, 0, 1]), 3)
    unigram = np.array([4, 3, 2]) / 9
    d = 1 / (1 + 2 * 2)  # one pair occurs once, two occur twice
    after_0 = (2 - d) / 3 + d * 2 / 3 * unigram[1]
    after_1 = (2 - d) / 2 + d * 1 / 2 * unigram[0]
    expected = -np.log([after_0, after_1, unigram[1]]).mean()  # 2 was never followed by anything
    assert found.bigram == pytest.approx(expected, rel=1e-12)
    assert found.unigram == pytest.approx(-np.log(unigram[[1, 0, 1]]).mean(), rel=1e-12)
    assert (found.counted, found.targets) == (6, 3)


def test_the_bigram_model_is_a_distribution():
    random = np.random.default_rng(0)
    texts = [random.integers(7, size=50), random.integers(7, size=30)]
    for before in range(7):
        probabilities = [
            math.exp(-cross_entropies(texts, np.array([before]), np.array([after]), 7).bigram)
            for after in range(7)
        ]
        assert sum(probabilities) == pytest.approx(1.0, rel=1e-12)


def test_a_pair_that_was_never_seen_is_possible_where_none_is_rare():
    """Else the threshold were infinite, and any loss below it."""
    text = np.array([0, 1] * 10 + [0])
    found = cross_entropies([text], np.array([0]), np.array([2]), 3)
    assert math.exp(-found.bigram) == pytest.approx(1 / 10 * 1 / 24, rel=1e-12)


# Gradients


def test_gradients():
    found = gates.gradients(GradientsGate(), run_of(CONFIG))
    assert (found.status, found.value) == ("passed", pytest.approx(1.0, abs=0.2))


@pytest.mark.parametrize("value", [0.0, math.nan, None])
def test_a_part_without_a_gradient(value: float | None):
    part = "gradients/block_01/mlp"
    written = None if value is None or math.isnan(value) else value
    odd = {"non_finite": {part: "nan"}} if value is not None and math.isnan(value) else {}
    rows = [
        {**row, part: written, **odd} if row["step"] == 37 and part in row else row for row in logged(CONFIG)
    ]
    found = gates.gradients(GradientsGate(), run_of(CONFIG, rows))
    assert found.status == "failed"
    assert f"{part} is" in found.measured
    assert "step 37" in found.measured


def test_a_gradient_that_is_skipped_is_the_guards_to_judge():
    rows = changed(logged(CONFIG), "gradients/head", lambda step, value: 0.0, range(37, 38))
    events = [{"event": "skipped_step", "step": 37, "action": "skipped"}]
    assert gates.gradients(GradientsGate(), run_of(CONFIG, rows)).status == "failed"
    assert gates.gradients(GradientsGate(), run_of(CONFIG, rows, events)).status == "passed"


def test_fp16s_search_for_its_scale_is_no_fault():
    # Each such step is logged, with norms that are not finite: every fp16 run begins with some.
    rows = [dict(row) for row in logged(CONFIG)]
    infinite = [name for name in rows[0] if name.startswith("gradients/")]
    for row in rows[:2]:
        row |= dict.fromkeys(infinite) | {"non_finite": dict.fromkeys(infinite, "inf")}
    scales = [{"event": "loss_scale", "step": step, "scale": 2.0**15} for step in (1, 2)]
    assert gates.gradients(GradientsGate(), run_of(CONFIG, rows, scales)).status == "passed"
    assert gates.gradients(GradientsGate(), run_of(CONFIG, rows, scales[:1])).status == "failed"
    assert gates.skipped_steps(SkippedStepsGate(at_most=0), run_of(CONFIG, rows, scales)).status == "passed"


def test_one_step_that_was_left_out_does_not_speak_for_the_others():
    rows = [dict(row) for row in logged(CONFIG) if "val/loss" not in row or row["step"] == CONFIG.steps]
    for row in rows:
        if row["step"] in (50, 99) and "train/loss" in row:
            row |= {"train/loss": None, "non_finite": {"train/loss": "nan"}}
    run = run_of(CONFIG, rows)
    for found in (
        gates.unigram(UnigramGate(by_step=50), run, 5.0),  # events are not known while it trains
        gates.validation(ValidationGate(), run),
    ):
        assert found.status == "passed", found
    for row in rows:
        if "train/loss" in row and row["step"] <= 50:
            row |= {"train/loss": None, "non_finite": {"train/loss": "nan"}}
    assert gates.unigram(UnigramGate(by_step=50), run_of(CONFIG, rows), 5.0).status == "failed"


def test_a_norm_that_grows_without_bound():
    grows = changed(logged(CONFIG), "gradients/block_00", lambda step, value: value * 1.1**step)
    found = gates.gradients(GradientsGate(), run_of(CONFIG, grows))
    assert found.status == "failed"
    assert "gradients/block_00" in found.measured
    assert found.value == pytest.approx(1.1**49, rel=0.2)
    assert gates.gradients(GradientsGate(growth=1000), run_of(CONFIG, grows)).status == "passed"


def test_odd_steps_are_no_growth():
    spikes = changed(
        logged(CONFIG),
        "gradients/block_00",
        lambda step, value: value * (1e6 if step % 5 == 4 or step > 97 else 1),
    )
    assert gates.gradients(GradientsGate(), run_of(CONFIG, spikes)).status == "passed"


# The rest of what is logged


def test_skipped_steps():
    def with_skips(count: int, action: str = "skipped") -> RunLog:
        events = [{"event": "skipped_step", "step": 10 + i, "action": action} for i in range(count)]
        events += [{"event": "loss_scale", "step": 1}, {"event": "spike", "step": 5, "action": "clipped"}]
        return run_of(CONFIG, events=events)

    assert gates.skipped_steps(SkippedStepsGate(), with_skips(1)).status == "passed"
    failed = gates.skipped_steps(SkippedStepsGate(), with_skips(2))
    assert (failed.status, failed.value, failed.limit) == ("failed", 2, 1)
    assert "10, 11" in failed.measured
    assert gates.skipped_steps(SkippedStepsGate(at_most=2), with_skips(2)).status == "passed"
    lost = dataclasses.replace(run_of(CONFIG), events=[])
    assert gates.skipped_steps(SkippedStepsGate(), lost).status == "not checked"


def test_validation():
    assert gates.validation(ValidationGate(), run_of(CONFIG)).status == "passed"
    memorised = gates.validation(ValidationGate(), run_of(CONFIG, loss=2.7))
    assert (memorised.status, memorised.limit) == ("failed", 0.5)
    assert memorised.value == pytest.approx(0.7, abs=0.1)
    rises = changed(logged(CONFIG), "val/loss", lambda step, value: value + 0.8, range(100, 101))
    risen = gates.validation(ValidationGate(), run_of(CONFIG, rises))
    assert (risen.status, risen.limit) == ("failed", 0.05)
    assert "from step 75" in risen.measured


def test_validation_beside_a_smoothed_loss_is_judged_by_its_rise_alone():
    config = config_of(100, warmup_steps=10, z_loss=1e-4)
    found = gates.validation(ValidationGate(), run_of(config, loss=9.0))
    assert (found.status, found.details["gap"]) == ("passed", None)
    assert "gap not checked" in found.measured


def test_schedule_end():
    assert gates.schedule_end(ScheduleEndGate(), run_of(CONFIG)).status == "passed"
    short = run_of(CONFIG, logged(CONFIG, last=99))
    assert gates.schedule_end(ScheduleEndGate(), short).status == "failed"
    high = changed(logged(CONFIG), "train/lr", lambda step, value: value * 1.01)
    assert gates.schedule_end(ScheduleEndGate(), run_of(CONFIG, high)).status == "failed"


def test_speed_beside_a_model():
    run = run_of(CONFIG)
    assert gates.speed(SpeedGate(), run, 1900.0).status == "passed"
    failed = gates.speed(SpeedGate(), run, 2100.0)
    assert (failed.status, failed.limit) == ("failed", 1050.0)


def test_speed_where_nothing_is_modelled():
    assert gates.speed(SpeedGate(), run_of(CONFIG), None).status == "passed"
    slows = changed(logged(CONFIG), "train/tokens_per_second", lambda step, value: value / 3, range(26, 101))
    failed = gates.speed(SpeedGate(), run_of(CONFIG, slows), None)
    assert failed.status == "failed"
    assert "not modelled" in failed.measured
    short = config_of(6)
    assert gates.speed(SpeedGate(), run_of(short), None).status == "not checked"


# What other commands say


def test_fits():
    config = config_of()
    assert gates.fits(FitsGate(), estimate(config, vram=8 * 2**30)).status == "passed"
    small = estimate(config, vram=2**20)
    failed = gates.fits(FitsGate(), small)
    assert (failed.status, failed.value) == ("failed", small.required_bytes)
    tight = estimate(config, vram=small.required_bytes + 1000)
    assert gates.fits(FitsGate(), tight).status == "passed"
    assert gates.fits(FitsGate(free=0.1), tight).status == "failed"
    assert (
        gates.fits(FitsGate(), estimate(config.model_copy(update={"device": "cuda"}))).status == "not checked"
    )


def test_canary():
    assert gates.canary(CanaryGate(), 0, CANARY).status == "passed"
    fails = {**CANARY, "verdict": "FAIL", "explanation": ["FAIL: loss, step 2"]}
    failed = gates.canary(CanaryGate(), 1, fails)
    assert failed.status == "failed"
    assert "step 2" in failed.measured
    assert gates.canary(CanaryGate(), 1, CANARY).status == "failed", "an exit code that says otherwise"
    assert "no words" in gates.canary(CanaryGate(), 1, None, "no words").measured
    assert gates.canary(CanaryGate(), 4, None, "8 GiB are too little").status == "not checked"


def test_verify_resume():
    assert gates.verify_resume(VerifyResumeGate(), 0, RESUME).status == "passed"
    differing = {"identical": False, "comparisons": [{**RESUME["comparisons"][0], "difference": "at [3]"}]}
    failed = gates.verify_resume(VerifyResumeGate(), 1, differing)
    assert failed.status == "failed"
    assert "weights: at [3]" in failed.measured
    assert gates.verify_resume(VerifyResumeGate(), 1, None, "no space").status == "failed"


def test_export():
    assert gates.export(0, EXPORT).status == "passed"
    gate = EXPORT["exports"][0]["gate"]
    wrong = {
        **gate,
        "passed": False,
        "checks": [{**gate["checks"][0], "passed": False, "found": "0.3 apart"}],
    }
    failed = gates.export(1, {"exports": [{"gate": wrong}]})
    assert failed.status == "failed"
    assert "0.3 apart" in failed.measured
    unchecked = {**gate, "passed": None, "checks": [], "unchecked": "transformers is not installed"}
    found = gates.export(0, {"exports": [{"gate": unchecked}]})
    assert (found.status, "transformers" in found.measured) == ("not checked", True)
    assert gates.export(1, None, "disk full").status == "failed"
    older = gates.export(0, {**EXPORT, "step": 8})  # `albor export` passes over a damaged checkpoint
    assert (older.status, "of step 8, and the run ended at 9" in older.measured) == ("failed", True)


def test_what_has_not_ended_is_not_judged():
    nothing = RunLog(CONFIG, [], [])
    for found in (
        gates.gradients(GradientsGate(), nothing),
        gates.validation(ValidationGate(), nothing),
        gates.schedule_end(ScheduleEndGate(), nothing),
        gates.speed(SpeedGate(), nothing, 1000.0),
    ):
        assert (found.status, found.passed) == ("not checked", None)
    assert final_of(CONFIG)["step"] == 100
