"""The prediction of the next rung, on laws whose constants are known."""

from __future__ import annotations

import itertools
import json
import math

import numpy as np
import pytest

from albor.ladder.predict import NotPredicted, Observation, compare, predict, predict_speed

# E, A, a, B, b of Hoffmann et al. 2022; of Besiroglu et al. 2024; and of no one.
LAWS = (
    (1.69, 406.4, 0.34, 410.7, 0.28),
    (1.817, 482.0, 0.348, 2085.4, 0.366),
    (1.2, 150.0, 0.25, 800.0, 0.3),
)
RUNGS = ((62_403_072, 20), (163_603_200, 20), (398_509_056, 20))
SIZES = [(parameters, parameters * ratio) for parameters, ratio in RUNGS]


def loss_of(law: tuple[float, ...], parameters: float, tokens: float) -> float:
    constant, of_size, a, of_tokens, b = law
    return constant + of_size / parameters**a + of_tokens / tokens**b


def observe(law: tuple[float, ...], sizes, noise: float = 0.0, seed: int = 0) -> list[Observation]:
    random = np.random.default_rng(seed)
    return [
        Observation(n, d, loss_of(law, n, d) * (1 + noise * float(random.standard_normal())))
        for n, d in sizes
    ]


@pytest.mark.parametrize("law", LAWS)
def test_two_rungs_predict_the_third(law):
    found = predict(observe(law, SIZES[:2]), *SIZES[2])
    truth = loss_of(law, *SIZES[2])
    assert found.enough
    assert found.loss == pytest.approx(truth, rel=0.02)
    assert found.low < truth < found.high
    assert found.high - found.low < 0.12 * truth


def test_many_runs_recover_the_constants():
    """With sizes and tokens varied apart the data say more than what was assumed beforehand."""
    law = (2.2, 900.0, 0.45, 300.0, 0.25)  # a is above what is published, b is below
    sizes = list(itertools.product((10**6, 10**7, 10**8, 10**9), (10**7, 10**8, 10**9, 10**10)))
    found = predict(observe(law, sizes, noise=0.002), 4 * 10**9, 8 * 10**10)
    assert found.exponents[0] == pytest.approx(0.45, abs=0.04)
    assert found.exponents[1] == pytest.approx(0.25, abs=0.03)
    assert found.irreducible == pytest.approx(2.2, abs=0.2)
    assert found.loss == pytest.approx(loss_of(law, 4 * 10**9, 8 * 10**10), rel=0.02)


def test_intervals_hold_as_many_runs_as_they_say():
    """Over laws that are as various as what is assumed, with noise: 90 % are inside, within chance."""
    random = np.random.default_rng(7)
    inside = []
    for trial in range(100):
        shares = np.array([-1.0])
        while (shares <= 0).any():
            shares = random.normal((0.45, 0.2, 0.2), 0.35)
        a, b = np.clip(random.normal(0.35, 0.08, 2), 0.1, 0.6)
        noise = 0.007 * 2.0 ** float(np.clip(random.standard_normal(), -2, 2))
        middle = math.sqrt(SIZES[0][0] * SIZES[1][0])
        law = (3 * shares[0], 3 * shares[1] * middle**a, a, 3 * shares[2] * (20 * middle) ** b, b)
        try:
            found = predict(observe(law, SIZES[:2], noise, trial), *SIZES[2])
        except NotPredicted:
            continue
        result = observe(law, SIZES[2:], noise, 1000 + trial)[0].loss
        inside.append(compare(found, result).verdict == "inside")
    assert len(inside) > 85
    assert 0.82 <= np.mean(inside) <= 0.97


def test_one_rung_is_not_enough_and_shows_it():
    one, two = (predict(observe(LAWS[1], SIZES[:count]), *SIZES[2]) for count in (1, 2))
    assert not one.enough
    assert one.high - one.low > 4 * (two.high - two.low)
    assert "literature" in one.method
    assert not predict(observe(LAWS[1], SIZES[:1] * 3), *SIZES[2]).enough  # three times the same run


def test_the_interval_narrows_with_runs_and_widens_with_distance():
    runs = observe(LAWS[1], SIZES)
    far = (SIZES[2][0] * 3, SIZES[2][1] * 3)
    widths = [found.high - found.low for found in (predict(runs[:count], *far) for count in (1, 2, 3))]
    assert widths == sorted(widths, reverse=True)
    assert widths[2] > (near := predict(runs, *SIZES[2])).high - near.low


def test_a_single_run_scatters_as_those_before_it_did():
    """Where the law is known well, the interval is one run's noise: 1.64 deviations on either side."""
    sizes = list(itertools.product((10**7, 10**8, 10**9), (10**8, 10**9, 10**10))) * 4
    for noise in (0.004, 0.012):
        found = predict(observe(LAWS[1], sizes, noise, seed=3), 10**9, 10**10)
        assert (found.high - found.low) / found.loss == pytest.approx(2 * 1.645 * noise, rel=0.25)


@pytest.mark.parametrize(
    "runs",
    [
        observe(LAWS[0], SIZES[:2], noise=0.01),
        # Within the noise the larger one is the worse: a term that is negative would fit them best.
        [Observation(*SIZES[0], 3.0), Observation(*SIZES[1], 3.06)],
    ],
)
def test_more_parameters_or_tokens_never_predict_a_higher_loss(runs):
    for grid in (
        [predict(runs, parameters, 10**10) for parameters in (10**6, 10**8, 10**9, 10**12)],
        [predict(runs, 10**8, tokens) for tokens in (10**6, 10**8, 10**10, 10**13)],
    ):
        for one, other in itertools.pairwise(grid):
            assert (one.loss, one.low, one.high) >= (other.loss, other.low, other.high)
            assert one.loss > other.loss


def test_points_before_the_end_of_the_schedule_are_left_out():
    runs = observe(LAWS[1], SIZES[:2])
    early = Observation(SIZES[1][0], SIZES[1][1] // 2, 9.0, annealed=False)
    found = predict([*runs, early], *SIZES[2])
    assert (found.runs, found.left_out) == (2, 1)
    assert found.loss == predict(runs, *SIZES[2]).loss


@pytest.mark.parametrize(
    "runs", [[], [Observation(10, 10, 3.0, annealed=False)], [Observation(10, 10, math.nan)]]
)
def test_nothing_observed_is_nothing_predicted(runs):
    with pytest.raises(NotPredicted, match="not predicted"):
        predict(runs, 100, 100)


def test_a_larger_run_that_ended_worse_is_named():
    runs = [Observation(1_000, 10_000, 3.0), Observation(2_000, 20_000, 3.4)]
    with pytest.raises(NotPredicted, match=r"2,000 parameters on 20,000 tokens came to 3\.400"):
        predict(runs, 4_000, 40_000)
    assert predict([runs[0], Observation(2_000, 20_000, 3.02)], 4_000, 40_000).loss < 3.02  # noise is none


def test_a_prediction_repeats_and_is_json():
    runs = observe(LAWS[1], SIZES[:2])
    one, other = (predict(runs, *SIZES[2]) for _ in range(2))
    assert one == other
    assert json.loads(json.dumps(one.as_json()))["runs"] == 2


@pytest.mark.parametrize(
    ("loss", "verdict", "beyond"), [(2.8, "inside", 0.0), (2.5, "better", 0.2), (3.0, "worse", 0.1)]
)
def test_what_came_of_it(loss, verdict, beyond):
    found = predict(observe(LAWS[1], SIZES[:2]), *SIZES[2])
    shown = compare(type(found)(**{**found.as_json(), "loss": 2.8, "low": 2.7, "high": 2.9}), loss)
    assert shown.verdict == verdict
    assert shown.outside_by == pytest.approx(beyond)
    assert shown.off == pytest.approx(loss - 2.8)
    assert f"{loss:.3f}" in str(shown)
    assert shown.as_json()["verdict"] == verdict


def test_hours_and_energy_from_measured_speed():
    """1,000 tokens/s at 2 MFLOP each; the next rung needs 4 MFLOP each, so it makes 500 in a second."""
    run = Observation(10, 10, 3.0, tokens_per_second=1_000.0, watts=300.0, flops_per_token=2e6)
    found = predict_speed([run], 4e6, 3_600_000)
    assert found.tokens_per_second == 500
    assert found.hours == 2.0
    assert found.kwh == pytest.approx(0.6)
    assert (found.hours_low, found.hours_high) == (None, None)
    assert "measured watts" in found.basis

    faster = Observation(20, 20, 2.9, tokens_per_second=1_500.0, flops_per_token=2e6)
    both = predict_speed([run, faster], 4e6, 3_600_000, board_watts=450.0)
    assert both.tokens_per_second == 750  # of the newest rung
    assert (both.hours_low, both.hours_high) == (pytest.approx(4 / 3), 2.0)
    assert both.kwh == pytest.approx(0.3 * 4 / 3)  # measured power, not the board's


def test_a_modelled_speed_is_corrected_by_what_was_measured():
    run = Observation(10, 10, 3.0, 800.0, flops_per_token=2e6, modelled_tokens_per_second=1_000.0)
    found = predict_speed([run], 4e6, 3_600_000, modelled_tokens_per_second=600.0, board_watts=450.0)
    assert found.tokens_per_second == pytest.approx(480)
    assert "modelled" in found.basis
    assert "limit" in found.basis
    assert predict_speed([run], 4e6, 3_600_000).tokens_per_second == 400  # without a model: FLOPs


def test_no_speed_no_hours():
    with pytest.raises(NotPredicted, match="no run has measured its speed"):
        predict_speed([Observation(10, 10, 3.0)], 1e6, 100)
    assert predict_speed([Observation(10, 10, 3.0, 5.0, flops_per_token=1.0)], 1.0, 18_000).kwh is None
