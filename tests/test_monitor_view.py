"""What the monitor makes of a run's logs: numbers, times, curves, words; and how they fit a window."""

from __future__ import annotations

import itertools
import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from monitor_cases import BEGAN, EVENTS, ROWS, TOKENS, event, history, row, subject, validation

from albor.monitor import panels
from albor.monitor.chart import ZOOMS, draw
from albor.monitor.layout import HEADER, LEAST_HEIGHT, LEAST_WIDTH, arrange
from albor.monitor.snapshot import lines
from albor.monitor.view import Chart, Curve, Kind, View, build_view
from albor.runs.follow import Update

DOCS = Path(__file__).parents[1] / "docs" / "monitor.md"


def view(rows: Any = ROWS, events: Any = EVENTS, now: float = 12.0, **about: Any) -> View:
    return build_view(history(rows, events), subject(**about), BEGAN + now)


# Numbers and times


def test_the_last_numbers_and_how_far_it_is():
    seen = view()
    assert (seen.step, seen.steps, seen.tokens, seen.tokens_planned) == (10, 24, 10 * TOKENS, 24 * TOKENS)
    assert seen.numbers["train/loss"] == 0.8
    assert seen.numbers["val/loss"] == 2.5
    assert "train/mfu" not in seen.numbers  # null: not known here
    assert seen.best == (10, 2.5)
    assert seen.progress == 10 / 24


def test_the_time_left_is_that_of_the_tokens_left_and_of_pauses_as_before():
    # 10 steps of a second each took 12 seconds: a fifth goes into evaluations and checkpoints.
    assert view().eta_seconds == pytest.approx(14 * 1.2)
    assert view(now=15.0).eta_seconds == pytest.approx(14 * 1.2 - 3)  # it runs down between two rows
    assert view(state="stopped").eta_seconds is None
    assert view(config=None).eta_seconds is None


def test_the_time_left_follows_the_recent_speed():
    slow = [row(step, **{"train/tokens_per_second": 96.0 if step <= 50 else 48.0}) for step in range(1, 101)]
    config = subject().config.model_copy(
        update={"train": subject().config.train.model_copy(update={"max_steps": 200})}
    )
    seen = view(slow, EVENTS[:1], now=150.0, config=config, last_row=BEGAN + 150)
    assert seen.eta_seconds == pytest.approx(100 * 2.0)


def test_pauses_between_two_processes_do_not_count_as_time_of_the_run():
    events = [event("started", 0, 0), event("stopped", 5, 10, reason="SIGTERM"), event("resumed", 5, 1000)]
    seen = view(events=events, now=1005.0)
    assert seen.elapsed_seconds == pytest.approx(10 + 5)
    assert seen.reason == "resumed 1 time"
    # A process that was killed has no end: it counts until the last thing that is known of it.
    assert view(events=[event("started", 0, 0)], now=99.0, state="lost").elapsed_seconds == pytest.approx(12)
    events = [event("started", 0, 0), event("checkpoint", 5, 10), event("resumed", 5, 1000)]
    assert view(events=events, now=1005.0).elapsed_seconds == pytest.approx(10 + 5)


def test_a_row_is_late_only_when_it_is_much_later_than_usual():
    assert not view(now=60.0).is_late
    assert view(now=80.0).is_late
    assert not view(now=80.0, state="stopped").is_late


def test_rows_that_are_written_again_replace_those_that_they_were():
    known = history()
    known.take(Update([row(6, 5.0), row(7, 4.0)], [event("resumed", 5, 20)]))
    seen = build_view(known, subject(), BEGAN + 21)
    assert (seen.step, seen.tokens) == (7, 7 * TOKENS)
    raw = seen.charts["loss"].curves[0]
    assert raw.steps.tolist() == [1, 2, 3, 4, 5, 6, 7]
    assert raw.values.tolist()[-2:] == [5.0, 4.0]
    assert seen.best is None  # that of step 10 has not happened
    assert seen.samples == ()


def test_a_log_that_begins_anew_leaves_nothing_of_the_old_one():
    known = history()
    known.take(Update([row(1, 7.0)], [], rows_anew=True))
    seen = build_view(known, subject(), BEGAN + 21)
    assert seen.charts["loss"].curves[0].values.tolist() == [7.0]
    assert len(seen.events) == len(EVENTS) - 1


def test_what_is_not_finite_is_named_and_not_drawn():
    rows = [row(1), {**row(2), "train/loss": None, "non_finite": {"train/loss": "nan"}}]
    seen = view(rows, now=3.0)
    assert math.isnan(seen.numbers["train/loss"])
    assert seen.charts["loss"].curves[0].steps.tolist() == [1]
    assert "loss nan" in panels.header(seen, 200).plain
    assert json.loads(json.dumps(seen.as_json(), allow_nan=False))["numbers"]["train/loss"] == "nan"


@pytest.mark.parametrize("junk", [
    {"step": "x", "tokens": 1}, {"step": 3}, {"step": True, "tokens": 1}, {"step": -1, "tokens": 1},
    {"step": 11, "tokens": 11, "train/loss": 10**400}, {"step": 11, "tokens": 11, "train/loss": "high"},
])  # fmt: skip
def test_a_row_that_no_run_writes_harms_nothing(junk: dict[str, Any]):
    assert view([*ROWS, junk]).charts["loss"].curves[0].steps.tolist() == list(range(1, 11))


@pytest.mark.parametrize("junk", [
    {"event": "sample", "prompt": 7}, {"event": "alert", "rule": "no rule at all", "values": 3},
    {"event": "memory", "components": {"process": 3}}, {"event": "checkpoint", "seconds": "x", "time": 5},
    {"event": "started", "time": "yesterday", "step": None}, {"event": "of the future", "x": {"y": [1]}},
])  # fmt: skip
def test_an_event_that_no_run_writes_harms_nothing(junk: dict[str, Any]):
    seen = view(events=[*EVENTS, junk])
    for name in panels.PANELS:
        panels.PANELS[name][1](seen, 60, 6)
    json.dumps(seen.as_json(), allow_nan=False)


# Words


def test_alerts_say_whether_they_still_hold():
    over, holds = sorted(view().alerts, key=lambda alert: alert.holds)
    assert (over.rule, over.holds, over.step) == ("train/loss > 3", False, 2)
    assert (holds.rule, holds.holds) == ("gradients/* > 0.2", True)
    assert view().alerts[0].holds, "those that hold come first"


def test_events_are_told_in_words():
    told = {happening.kind: happening for happening in view().events}
    assert told["checkpoint"].text == "in 0.2 s"
    assert told["spike"].text == "clipped: loss 1e+30, gradient norm 123.5"
    assert told["spike"].level == "warning"
    assert "sample" not in told, "they have a panel of their own"


@pytest.mark.parametrize(("state", "reason", "shown"), [
    ("new", "", "it has written nothing yet"),
    ("stopped", "SIGTERM", "SIGTERM; the same command goes on"),
    ("diverged", "5 of the last 8 steps", "5 of the last 8 steps"),
    ("failed", "OSError: full", "OSError: full"),
    ("finished", "", "at step 10"),
])  # fmt: skip
def test_a_state_says_why(state: str, reason: str, shown: str):
    assert view(state=state, reason=reason).reason == shown
    assert view(state=state).has_ended == (state != "new")


def test_nothing_that_a_model_writes_reaches_the_terminal_as_a_command():
    hostile = {"prompt": "\x1b]0;x\x07", "text": "a\x1b[2J\x9b1mb\r\x00\u202e\ud800"}
    events = [*EVENTS, event("sample", 10, 11, **hostile), event("failed", 10, 12, error="x\x1b[31m\ny")]
    seen = view(events=events, name="n\x1b[1m", state="failed", reason="e\x1b[1m")
    shown = "\n".join([*lines(seen), panels.header(seen, 300).plain, panels.sample(seen, 80, 20).plain])
    assert "model" in shown
    assert not set(shown) & set("\x1b\x9b\r\x00\x07\u202e\ud800")


def test_the_keys_of_the_json_are_documented():
    documented = set(re.findall(r"^\| `(\w\w+)` \|", DOCS.read_text(encoding="utf-8"), re.MULTILINE))
    assert documented == set(view().as_json())


def test_memory_is_the_newest_record_and_before_it_the_rows():
    assert [(part.name, part.planned, part.measured) for part in view().memory] == [("process", 2**30, 2**29)]
    parts = {
        "arena, device": {"planned": 5, "measured": 5, "how": "size"},
        "process": {"planned": 9, "measured": 7, "how": "x"},
        "CUDA context": {"planned": 1, "measured": None, "how": "not told apart"},
    }
    seen = view(events=[*EVENTS, event("memory", 10, 11, moment="tenth step", components=parts)])
    assert [(part.name, part.planned, part.measured) for part in seen.memory] == [
        ("arena, device", 5, 5), ("process", 9, 7),
    ]  # fmt: skip


# Panels and layout


def test_a_block_without_gradient_and_one_that_explodes_are_named():
    rows = [*ROWS, row(11, **{"gradients/block_00": 0.0, "gradients/block_01": 3.0})]
    text = panels.gradients(view(rows), 120, 7).plain
    assert "zero or not finite: block_00" in text
    assert "over ten times as usual: block_01" in text
    assert "zero" not in panels.gradients(view(), 120, 7).plain


@pytest.mark.parametrize("ascii_only", [False, True])
def test_the_gradients_of_many_blocks_fit(ascii_only: bool):
    many = {
        f"gradients/block_{n:02d}{part}": 0.1 + n for n in range(96) for part in ("", "/attention", "/mlp")
    }
    seen = view([{**row(1), **many}])
    for width, height in itertools.product((20, 40, 80, 200), range(1, 12)):
        text = panels.gradients(seen, width, height, ascii_only=ascii_only)
        assert max(map(len, text.plain.split("\n"))) <= width
        assert len(text.plain.split("\n")) <= height
        assert text.plain.isascii() or not ascii_only


@pytest.mark.parametrize("rows", [[], ROWS], ids=["nothing", "rows"])
def test_every_panel_keeps_to_its_place(rows: list[dict[str, Any]]):
    seen = view(rows, EVENTS if rows else [])
    for (name, (_, render)), width, height in itertools.product(
        panels.PANELS.items(), (1, 7, 20, 38, 90), (1, 2, 3, 8)
    ):
        shown = render(seen, width, height).plain.split("\n")
        assert len(shown) <= height, name
        if rows:
            assert max(map(len, shown)) <= width, name
    for width in (40, 60, 100, 200):
        header = panels.header(seen, width).plain.split("\n")
        assert len(header) == HEADER
        assert max(map(len, header)) <= width


def test_a_narrow_header_keeps_what_matters():
    assert {"step 10/24", "eta 17s"} <= set(re.split(" {2,}", panels.header(view(), 40).plain.split("\n")[1]))
    assert "loss 0.800" in panels.header(view(), 40).plain


@pytest.mark.parametrize("alerts", [0, 1, 9])
def test_parts_lie_in_the_window_and_not_upon_each_other(alerts: int):
    for width, height in itertools.product(range(LEAST_WIDTH, 240, 13), range(LEAST_HEIGHT, 80)):
        places = arrange(width, height, alerts=alerts)
        taken = np.zeros((height, width), dtype=int)
        for place in places.values():
            assert place.x >= 0
            assert place.y >= 0
            taken[place.y : place.y + place.height, place.x : place.x + place.width] += 1
        assert taken.sum() == sum(place.width * place.height for place in places.values()), "outside"
        assert taken.max() == 1, f"{width}x{height}"
        assert {"header", "large", "keys"} <= set(places)
        assert places["large"].height >= 6


def test_a_shrinking_window_drops_parts_in_the_documented_order():
    order = ["sample", "events", "gradients", "memory", "small-1"]
    shown = [
        [part for part in order if part in arrange(80, height)] for height in range(60, LEAST_HEIGHT, -1)
    ]
    assert shown[0] == order
    assert [order[order.index(parts[0]) :] if parts else [] for parts in shown] == shown
    assert shown[-1] == []
    assert set(arrange(60, 15, alerts=1)) == {"header", "large", "alerts", "keys"}
    assert arrange(LEAST_WIDTH - 1, 50) == arrange(100, LEAST_HEIGHT - 1) == {}


# Charts


def chart(values: list[float], kind: Kind = "raw") -> Chart:
    return Chart("x", (Curve("x", kind, np.arange(1, len(values) + 1), np.array(values)),))


def test_a_chart_fits_whatever_the_values():
    odd = [0.0, -0.0, 1e308, -1e308, 5e-324, 1.0, 1.0000000001, 3e5]
    for values in (*itertools.product(odd, repeat=2), [1.0], [3.0] * 9, [0.0]):
        for logarithmic in (False, True):
            text = draw(chart(list(values)), 40, 8, logarithmic=logarithmic, colour=False)
            shown = text.split("\n")
            if text:
                assert len(shown) == 8
                assert max(map(len, shown)) <= 40
            else:
                assert logarithmic
                assert max(values) <= 0


def test_a_spike_among_ten_thousand_rows_is_seen():
    values = [1.0] * 10_000
    values[4321] = 50.0
    top = draw(chart(values), 60, 12, colour=False).split("\n")[0]
    assert any(0x2800 < ord(mark) <= 0x28FF for mark in top)


def test_zoom_shows_the_newest_steps():
    text = draw(chart([float(n) for n in range(1000)]), 60, 12, zoom=ZOOMS[2], colour=False)
    assert text.split("\n")[-1].split() == ["750", "875", "1.0k"]


def test_a_logarithmic_scale_has_round_numbers():
    def labels(*values: float) -> list[str]:
        text = draw(chart(list(values)), 60, 12, logarithmic=True, colour=False)
        return [line.partition("┤")[0].strip() for line in text.split("\n") if "┤" in line]

    assert labels(0.005, 2000.0) == ["1000", "100", "10", "1", "0.1", "0.01"]
    assert labels(2.0, 9.0) == ["5", "2"]


def test_colours_and_braille_only_where_they_are_wanted():
    seen = view()
    assert "\x1b[" in draw(seen.charts["loss"], 60, 12)
    assert "\x1b" not in draw(seen.charts["loss"], 60, 12, colour=False)
    assert draw(seen.charts["loss"], 60, 12, colour=False, ascii_only=True).isascii()


def test_the_snapshot_has_everything_and_no_escape_code():
    text = "\n".join(lines(view()))
    for part in (
        "running",
        "10 of 24 (42%)",
        "0.8000",
        "2.5000",
        "block_01",
        "checkpoint",
        "writes",
        "gradients/*",
    ):
        assert part in text
    assert "\x1b" not in text
    assert "\n".join(lines(view(), ascii_only=True)).isascii()
    assert lines(view([], []))[0] == "run        runs/x"


def test_validation_alone_is_a_curve_too():
    assert [curve.kind for curve in view([validation(4, 3.0)], []).charts["loss"].curves] == ["points"]
