"""What is seen: the display that suits the place, a terminal left as it was, a picture of the right shape."""

from __future__ import annotations

import gzip
import io
import lzma
import re
from pathlib import Path

import pytest
from rich.console import Console

from albor.train.display import (
    Display,
    LiveDisplay,
    PlainDisplay,
    RemainingTime,
    make_display,
)
from albor.train.report import Summary, compression_bits_per_byte, draw_loss_curve, print_summary
from albor.units import format_count, format_duration

ROW = {
    "train/loss": 4.321,
    "train/lr": 3.2e-3,
    "train/grad_norm": 0.87,
    "train/tokens_per_second": 5210.0,
    "train/mfu": None,
    "memory/process": 1.5 * 2**30,
}
COLOUR = re.compile(r"\x1b\[[0-9;]*3[0-9][0-9;]*m")  # sets a foreground colour


def _console(terminal: bool, width: int = 80) -> tuple[Console, io.StringIO]:
    file = io.StringIO()
    return Console(file=file, force_terminal=terminal, width=width, color_system="auto"), file


class _Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture(autouse=True)
def _ordinary_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    for name in ("NO_COLOR", "FORCE_COLOR", "COLUMNS"):
        monkeypatch.delenv(name, raising=False)


def test_the_display_suits_the_place(monkeypatch: pytest.MonkeyPatch) -> None:
    assert isinstance(make_display(_console(True)[0], 10), LiveDisplay)
    assert isinstance(make_display(_console(False)[0], 10), PlainDisplay)
    assert type(make_display(_console(True)[0], 10, json=True)) is Display
    monkeypatch.setenv("TERM", "dumb")
    assert isinstance(make_display(_console(True)[0], 10), PlainDisplay)


def test_plain_lines_are_aligned_and_nothing_else(tmp_path: Path) -> None:
    console, file = _console(False, width=20)  # no line may be cut to the console's width
    clock = _Clock()
    with PlainDisplay(console, RemainingTime(1300, clock=clock)) as display:
        clock.now += 20
        display.row(10, {**ROW, "train/loss": 10.0})
        clock.now += 20
        display.row(120, ROW)
        display.validation(120, {"val/loss": 4.5, "val/bits_per_byte": 1.876})
        display.checkpoint(Path("runs/x/checkpoints/step-00000120"))
        display.message("[bold]not markup[/] 123")
    assert file.getvalue().splitlines() == [
        "step   10/1300  loss 10.000  lr 3.2e-03  norm  0.87   5.2k tok/s  eta 43m00s",
        "step  120/1300  loss  4.321  lr 3.2e-03  norm  0.87   5.2k tok/s  eta 6m33s",
        "step  120/1300  validation loss 4.500  bits/byte 1.876",
        "checkpoint runs/x/checkpoints/step-00000120",
        "[bold]not markup[/] 123",
    ]


def test_plain_lines_show_what_is_known() -> None:
    console, file = _console(False)
    display = make_display(console, 100)
    display.row(10, {**ROW, "train/mfu": 0.312})
    display.row(20, {"train/loss": None})
    first, second = file.getvalue().splitlines()
    assert "mfu 31.2%" in first
    assert re.fullmatch(r"step  20/100  eta \S+", second)


@pytest.mark.parametrize("width", [80, 120])
def test_the_live_block_fits_and_shows_everything(width: int) -> None:
    console, file = _console(True, width)
    clock = _Clock()
    display = LiveDisplay(console, RemainingTime(1300, first_step=600, clock=clock), "quickstart")
    with display:
        clock.now += 60
        display.row(650, ROW)
        display.validation(650, {"val/loss": 4.5, "val/bits_per_byte": 1.876})
        display.checkpoint(Path("runs/x/checkpoints/step-00000600"))
        display.message("a message")
    plain, out = _console(False, width)
    plain.print(display._draw())
    drawn = out.getvalue()
    assert {len(line) for line in drawn.splitlines()} == {width}
    for text in (
        "quickstart",
        "650/1300",
        "50%",
        "eta 13m00s",
        "4.321",
        "3.2e-03",
        "0.87",
        "5.2k",
        "1.5 GiB",
    ):
        assert text in drawn
    assert "loss 4.500  bits/byte 1.876  (step 650)" in drawn
    assert "step-00000600" in drawn
    assert re.search(r"mfu.*\n.* - ", drawn), "what is not known is a dash"
    assert "a message" in file.getvalue()


def test_the_live_block_can_be_drawn_before_anything_is_known() -> None:
    console, _ = _console(True)
    with make_display(console, 10) as display:
        assert isinstance(display, LiveDisplay)
        console.print(display._draw())


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
def test_the_terminal_is_restored_whatever_happens(error: type[BaseException]) -> None:
    console, file = _console(True)
    display = make_display(console, 10)
    with pytest.raises(error), display:
        raise error
    display.stop()  # a second time does no harm
    written = file.getvalue()
    assert "\x1b[?25l" in written, "the cursor was never hidden, so this shows nothing"
    assert written.rindex("\x1b[?25h") > written.rindex("\x1b[?25l")


def test_no_color_is_honoured(monkeypatch: pytest.MonkeyPatch) -> None:
    def everything() -> str:
        console, file = _console(True)
        with make_display(console, 10) as display:
            display.row(5, ROW)
        print_summary(console, Summary(2.0, 1.5, {"xz": 1.7}, [], {}))
        return file.getvalue()

    assert COLOUR.search(everything())
    monkeypatch.setenv("NO_COLOR", "1")
    assert not COLOUR.search(everything())


def test_json_mode_leaves_standard_output_alone(capsys: pytest.CaptureFixture[str]) -> None:
    with make_display(Console(), 10, json=True) as display:
        display.row(1, ROW)
        display.validation(1, {"val/loss": 1.0})
        display.checkpoint(Path("x"))
        display.message("a message")
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == "a message\n"


def test_the_time_left_follows_the_last_rows() -> None:
    clock = _Clock()
    remaining = RemainingTime(1000, first_step=100, clock=clock)
    remaining.start()
    assert remaining.after(100) is None
    for step in range(110, 510, 10):  # slow first, then ten times as fast
        clock.now += 100 if step < 300 else 10
        left = remaining.after(step)
    assert left == pytest.approx(1000 - 500)


def test_formats() -> None:
    durations = [None, 0, 59.4, 59.6, 190, 3600, 7500, 86399.7, 273600]
    assert [format_duration(s) for s in durations] == [
        *("-", "0s", "59s", "1m00s", "3m10s", "1h00m", "2h05m", "1d00h", "3d04h"),
    ]
    counts = [None, 0, 840, 999.7, 5210, 99_960, 118_000, 1_300_000, 2e9, 3e12]
    assert [format_count(n) for n in counts] == [
        "-",
        "0",
        "840",
        "1.0k",
        "5.2k",
        "100k",
        "118k",
        "1.3M",
        "2.0B",
        "3.0T",
    ]


@pytest.mark.parametrize("width", [40, 80, 120])
def test_the_curve_falls_and_fits(width: int) -> None:
    steps = list(range(10, 1310, 10))
    picture = draw_loss_curve(steps, [2 + 600 / (s + 90) for s in steps], [(650, 3.0)], width, colour=False)
    lines = picture.splitlines()
    assert max(map(len, lines)) <= width
    assert "\x1b" not in picture
    assert picture.count("●") == 2  # the point and its key
    assert lines[-1].split() == ["10", "step", "1300"]
    plot = [line.split("│")[-1].split("┤")[-1] for line in lines[1:-2]]
    first_dots = [
        next(i for i, character in enumerate(row) if character != " ") for row in plot if row.strip()
    ]
    assert len(first_dots) == 12, "the curve reaches every row"
    assert first_dots == sorted(first_dots), "and goes down to the right"
    assert any(len(row) >= width - 5 for row in plot), "to the end"


def test_the_curve_with_colour_and_with_little_to_draw() -> None:
    assert COLOUR.search(draw_loss_curve([1, 2], [3.0, 2.0], [], 40, colour=True))
    assert draw_loss_curve([], [], [], 80, colour=False) == ""
    assert draw_loss_curve([1], [float("nan")], [], 80, colour=False) == ""
    assert "●" in draw_loss_curve([], [], [(5, 2.0)], 80, colour=False)
    gaps = draw_loss_curve([1, 2, 3, 4], [float("inf"), 3.0, None, 2.0], [], 80, colour=False)
    assert gaps == draw_loss_curve([2, 4], [3.0, 2.0], [], 80, colour=False)
    flat = draw_loss_curve([1, 2, 3], [2.0, 2.0, 2.0], [], 80, colour=False)
    assert any("⣀" * 70 in line for line in flat.splitlines())


def test_compression_is_what_the_compressors_need() -> None:
    text = Path(__file__).read_bytes()
    bits = compression_bits_per_byte(text)
    assert bits == compression_bits_per_byte(text)
    assert bits["gzip"] == 8 * len(gzip.compress(text, 9)) / len(text)
    assert bits["xz"] == 8 * len(lzma.compress(text, preset=9 | lzma.PRESET_EXTREME)) / len(text)
    with pytest.raises(ValueError, match="no text"):
        compression_bits_per_byte(b"")


def test_the_summary_in_a_pipe() -> None:
    console, file = _console(False, width=30)
    place = "runs/" + "x" * 60
    summary = Summary(
        2.0, 1.75, {"gzip": 1.99, "xz": 1.77}, [("def f(", "x):\n    return [x]\n")], {"run": place}
    )
    print_summary(console, summary)
    lines = file.getvalue().splitlines()
    assert lines == [line.rstrip() for line in lines]
    assert "  validation loss             2.000" in lines
    assert "  perplexity                   7.39" in lines
    ranked = [line.split(",")[1].split() for line in lines if "bits per byte" in line]
    assert ranked == [["this", "model", "1.750"], ["xz", "1.770"], ["gzip", "1.990"]]
    assert lines[lines.index("Sample 1") + 1 :][:2] == ["def f(x):", "    return [x]"]
    assert f"  run   {place}" in lines


def test_the_summary_of_a_run_that_knows_little() -> None:
    console, file = _console(True)
    print_summary(console, Summary(None, None, {}, [], {}))
    assert "bits per byte, this model" in file.getvalue()
    print_summary(console, Summary(1e6, None, {}, [], {}))
