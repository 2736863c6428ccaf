"""The picture of an estimate: what is drawn is what is planned, and no file of the user's is lost."""

from __future__ import annotations

import itertools
import json
import re
import subprocess
import sys
import warnings
import zlib
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from albor import cli
from albor.configfile import load_config
from albor.errors import AlborError, ConfigError
from albor.memory import plot
from albor.memory.estimate import Estimate, estimate
from albor.memory.plan import GROUPS
from albor.memory.sweep import Sweep, sweep

pytest.importorskip("matplotlib", reason="the extra `plot` is not installed")

CONFIGS = Path(__file__).parents[1] / "configs"
LARGE, SMALL = CONFIGS / "pretrain-350m.yaml", CONFIGS / "quickstart.yaml"
NEARLY = ("train.micro_batch_size=8",)
FAR_TOO_LARGE = ("data.sequence_length=2048", "train.micro_batch_size=32")
DEEP = ("model.num_hidden_layers=1000",)


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("albor.memory.devices.installed_gpu", lambda: None)


def large(*overrides: str, gpu: str | None = "RTX 4090", vram: int | None = None) -> Estimate:
    return estimate(load_config(LARGE, overrides), gpu, vram)


def grid(*overrides: str, gpu: str = "RTX 4090") -> Sweep:
    return sweep(LARGE, overrides, gpu, None)


def bars(figure: Any) -> list[dict[str, tuple[float, float]]]:
    """Of every bar, from left to right, its parts: (bottom, height)."""
    found: dict[float, dict[str, tuple[float, float]]] = {}
    for container in figure.axes[0].containers:
        for part in container:
            bar = found.setdefault(part.get_x(), {})
            bar[container.get_label()] = (part.get_y(), part.get_height())
    return [found[x] for x in sorted(found)]


def line(figure: Any, name: str) -> float | None:
    found = [line.get_ydata()[0] for line in figure.axes[0].lines if line.get_gid() == name]
    return found[0] if found else None


def texts(figure: Any) -> list[str]:
    return [text.get_text() for text in figure.axes[0].texts]


def check_stack(bar: dict[str, tuple[float, float]], parts: dict[str, int]) -> None:
    """Every part is as high as its bytes, in the order of COLOURS, each upon the last."""
    drawn = {name: height for name, (_, height) in bar.items() if height}
    assert drawn == {name: size for name, size in parts.items() if size}
    top = 0.0
    for name in plot.COLOURS:
        bottom, height = bar.get(name, (top, 0))
        assert bottom == top, name
        top += height


def test_a_sweeps_bars_are_as_high_as_its_bytes():
    result = grid("train.micro_batch_size=2,8", "data.sequence_length=1024,4096", gpu="RTX 3060 12GB")
    figure = plot.draw_sweep(result)
    drawn = bars(figure)
    assert len(drawn) == len(result.estimates) == 2
    for bar, cell in zip(drawn, result.estimates, strict=True):
        assert sum(height for _, height in bar.values()) == cell.required_bytes
        check_stack(bar, {plot.OUTSIDE: sum(cell.outside.values()), **cell.plan.groups})
    assert texts(figure).count("refused") == 2
    assert line(figure, "capacity") == result.base.hardware.capacity_bytes


def test_bars_stand_in_the_order_of_their_names():
    figure = plot.draw_sweep(grid("train.micro_batch_size=1,2,4", "data.sequence_length=512,1024"))
    axes = figure.axes[0]
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["512", "1024"] * 3
    middles = sorted({round(p.get_x() + p.get_width() / 2, 6) for c in axes.containers for p in c})
    assert middles == list(axes.get_xticks())
    heights = [sum(height for _, height in bar.values()) for bar in bars(figure)]
    assert heights == [e.required_bytes for e in grid(
        "train.micro_batch_size=1,2,4", "data.sequence_length=512,1024").estimates]  # fmt: skip
    assert "train.micro_batch_size" in axes.get_xlabel()
    assert {"1", "2", "4"} <= set(texts(figure))


def test_the_phases_are_the_plans():
    found = large()
    figure = plot.draw_phases(found)
    plan, outside = found.plan, sum(found.outside.values())
    drawn = bars(figure)
    assert len(drawn) == len(plan.phases)
    for bar, phase in zip(drawn, plan.phases, strict=True):
        assert sum(height for _, height in bar.values()) == outside + plan.live_bytes[phase]
    check_stack(drawn[plan.phases.index(plan.peak_phase)], {
        plot.OUTSIDE: outside, **{g: s for g, s in plan.groups.items() if g != "gaps"}})  # fmt: skip
    assert line(figure, "needed") == found.required_bytes
    assert line(figure, "capacity") == found.hardware.capacity_bytes
    assert plan.peak_phase in figure.axes[0].get_xlabel()


def test_on_a_cpu_the_summed_gradients_are_there():
    found = estimate(load_config(SMALL, ["device=cpu"]))
    parts = plot.parts_of(found)
    assert parts[plot.SUMMED] == found.plan.size("host") > 0
    assert sum(parts.values()) == found.required_bytes
    assert all(bar[plot.SUMMED][1] == parts[plot.SUMMED] for bar in bars(plot.draw_phases(found)))


def test_every_group_has_a_colour_and_every_colour_a_name():
    assert {*GROUPS, "gaps", plot.OUTSIDE, plot.SUMMED} == set(plot.COLOURS)
    assert len(set(plot.COLOURS.values())) == len(plot.COLOURS)
    figure = plot.draw_phases(large())
    names = [text.get_text() for text in figure.axes[0].get_legend().get_texts()]
    assert names == [name for name in reversed(plot.COLOURS) if any(name in bar for bar in bars(figure))]


@pytest.mark.parametrize(
    ("figure", "shown"),
    [
        (lambda: plot.draw_phases(large()), True),
        (lambda: plot.draw_phases(large(gpu="H200")), False),  # far above: said, not drawn
        (lambda: plot.draw_phases(large(gpu=None)), False),
        (lambda: plot.draw_phases(large(*NEARLY, gpu="RTX 4070")), True),
        (lambda: plot.draw_phases(large(*FAR_TOO_LARGE, gpu="RTX 4070")), True),
        (lambda: plot.draw_sweep(grid("train.micro_batch_size=4,64", gpu="RTX 3060 12GB")), True),
    ],
)
def test_what_is_drawn_lies_within_the_picture(figure: Any, shown: bool):
    axes = figure().axes[0]
    top = axes.get_ylim()[1]
    assert (line(axes.figure, "capacity") is not None) == shown
    assert all(0 < drawn.get_ydata()[0] < top for drawn in axes.lines)
    assert all(text.xy[1] <= top for text in axes.texts)
    highest = max(sum(height for _, height in bar.values()) for bar in bars(axes.figure))
    assert highest < top or any("↑" in text for text in texts(axes.figure))
    assert highest > top / 8
    assert 3 <= len([tick for tick in axes.get_yticks() if tick <= top]) <= 10


def test_a_line_that_is_far_above_is_said():
    said = [text for text in texts(plot.draw_phases(large(gpu="H200"))) if "available" in text]
    assert len(said) == 1
    assert said[0].endswith("available ↑")


def overlaps(figure: Any) -> list[tuple[str, str]]:
    """Texts that run into each other, as drawn; and whatever does not lie within the page."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # of a layout that was given up
        canvas.draw()
    axes, renderer = figure.axes[0], canvas.get_renderer()
    ticks = [label for label in axes.get_yticklabels() if 0 <= label.get_position()[1] <= axes.get_ylim()[1]]
    labels = [*axes.texts, *axes.get_xticklabels(), *ticks, axes.xaxis.label, axes.title]
    labels += axes.get_legend().get_texts()
    shown = [label for label in labels if label.get_text() and label.get_visible()]
    boxes = [(label.get_text(), label, label.get_window_extent(renderer)) for label in shown]
    found = [
        (one, other)
        for i, (one, first, box) in enumerate(boxes)
        for other, second, other_box in boxes[i + 1 :]
        if 45.0
        not in (first.get_rotation(), second.get_rotation())  # it fills its box along the diagonal only
        and box.shrunk(0.9, 0.9).overlaps(other_box)
    ]
    page, whole = figure.bbox, figure.get_tightbbox(renderer).transformed(figure.dpi_scale_trans)
    if not (page.x0 <= whole.x0 and whole.x1 <= page.x1 and page.y0 <= whole.y0 and whole.y1 <= page.y1):
        found.append(("the picture", "the edge"))
    return found + [(text, "the edge") for text, _, box in boxes if not (
        box.x0 >= page.x0 and box.x1 <= page.x1 and box.y0 >= page.y0 and box.y1 <= page.y1)]  # fmt: skip


@pytest.mark.parametrize(
    "figure",
    [
        lambda: plot.draw_sweep(grid()),
        lambda: plot.draw_sweep(grid("train.recompute=none,cheap,block")),
        lambda: plot.draw_sweep(grid("train.micro_batch_size=2,8,64", "data.sequence_length=1024,2048,4096")),
        lambda: plot.draw_sweep(grid("data.sequence_length=256,512,1024,2048",
                                     "train.micro_batch_size=256,512,1024,2048", gpu="B200")),
        lambda: plot.draw_phases(large()),
        lambda: plot.draw_phases(large(gpu="H200")),
        lambda: plot.draw_phases(large("model.num_hidden_layers=80", gpu=None, vram=2**35)),
        lambda: plot.draw_phases(large(*NEARLY, gpu="RTX 4070")),
        lambda: plot.draw_phases(large("train.micro_batch_size=12", gpu="RTX 4070")),
        lambda: plot.draw_phases(large(*FAR_TOO_LARGE, gpu="RTX 4070")),
        lambda: plot.draw_phases(large(*DEEP, gpu="RTX 3060 Ti")),
    ],
)  # fmt: skip
def test_no_text_covers_another(figure: Any):
    assert overlaps(figure()) == []


def test_bars_that_end_above_the_picture_are_marked():
    found = large(*FAR_TOO_LARGE, gpu="RTX 4070")
    figure = plot.draw_phases(found)
    top = figure.axes[0].get_ylim()[1]
    assert top < found.required_bytes
    said = texts(figure)
    assert f"{found.required_bytes / 2**30:.2f} GiB\nneeded ↑" in said
    (mark,) = [text for text in figure.axes[0].texts if text.get_text().startswith("up to")]
    highest = max(sum(height for _, height in bar.values()) for bar in bars(figure))
    assert mark.get_text() == f"up to {highest / 2**30:.1f} ↑"
    high = [part.get_x() for container in figure.axes[0].containers for part in container
            if part.get_y() + part.get_height() > top]  # fmt: skip
    assert mark.xy[1] == top
    assert min(high) < mark.xy[0] < max(high)
    assert not any("↑" in text for text in texts(plot.draw_phases(large(*NEARLY, gpu="RTX 4070"))))


def test_layers_that_are_too_many_are_drawn_in_groups():
    found = large(*DEEP, gpu="RTX 3060 Ti")
    figure = plot.draw_phases(found)
    drawn, plan = bars(figure), found.plan
    assert len(drawn) < 250
    outside, most = sum(found.outside.values()), max(plan.live_bytes.values())
    heights = [sum(height for _, height in bar.values()) for bar in drawn]
    assert max(heights) == outside + most, "of a group, what is drawn is its highest"
    assert "of each 10 layers the highest" in figure.axes[0].get_xlabel()
    last = max(part.get_x() + part.get_width() for part in figure.axes[0].containers[0])
    assert last == pytest.approx(figure.axes[0].get_xlim()[1]), "no phase is left out"


def command(*words: str) -> Any:
    return CliRunner().invoke(cli.app, ["vram-estimate", str(SMALL), "--gpu", "L4", *words])


def chunks(png: bytes) -> list[bytes]:
    """The names of a PNG file's chunks, their checksums verified."""
    assert png[:8] == b"\x89PNG\r\n\x1a\n"
    names, at = [], 8
    while at < len(png):
        length = int.from_bytes(png[at : at + 4])
        body = png[at + 4 : at + 8 + length]
        assert zlib.crc32(body) == int.from_bytes(png[at + 8 + length : at + 12 + length])
        names.append(body[:4])
        at += 12 + length
    return names


@pytest.mark.parametrize("words", [(), ("--sweep", "train.micro_batch_size=4,8")])
def test_the_command_writes_a_valid_png(tmp_path: Path, words: tuple[str, ...]):
    target = tmp_path / "picture.png"
    result = command(*words, "--plot", str(target))
    assert result.exit_code == 0
    assert result.output.splitlines()[-1] == f"Picture: {target}"
    names = chunks(target.read_bytes())
    assert (names[0], names[-1]) == (b"IHDR", b"IEND")
    assert list(tmp_path.iterdir()) == [target]
    as_json = json.loads(command(*words, "--plot", str(target), "--json").output)
    assert as_json["plot"] == str(target)


@pytest.mark.parametrize(("name", "start"), [("a.svg", b"<?xml"), ("a.PDF", b"%PDF"), ("a.png", b"\x89PNG")])
def test_the_suffix_chooses_the_format_and_the_same_estimate_gives_the_same_bytes(
    tmp_path: Path, name: str, start: bytes
):
    target = tmp_path / name
    assert command("--plot", str(target)).exit_code == 0
    first = target.read_bytes()
    assert first.startswith(start)
    assert command("--plot", str(target)).exit_code == 0  # albor's own is replaced
    assert target.read_bytes() == first
    assert not {b"CreationDate", b"dc:date"} & set(re.findall(rb"CreationDate|dc:date", first))


def test_a_file_that_albor_did_not_draw_is_left_alone(tmp_path: Path):
    target = tmp_path / "holiday.png"
    target.write_bytes(b"\x89PNG of the sea")
    result = command("--plot", str(target))
    assert isinstance(result.exception, ConfigError)
    assert "exists, and albor did not draw it; give another name" in str(result.exception)
    assert target.read_bytes() == b"\x89PNG of the sea"
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "link.png").symlink_to(tmp_path / "elsewhere")
    for name in ("folder.png", "link.png"):
        with pytest.raises(ConfigError, match="did not draw it"):
            plot.check_target(tmp_path / name)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("a.jpeg", "end it in .png, .svg or .pdf"),
        ("a", "end it in"),
        ("no/a.png", "there is no directory"),
    ],
)
def test_what_is_no_target_is_a_usage_error(tmp_path: Path, name: str, message: str):
    with pytest.raises(ConfigError, match=message):
        plot.check_target(tmp_path / name)


def test_a_dollar_sign_is_no_formula(tmp_path: Path):
    plot.plot_sweep(grid("data.cache_dir=$a$,$b_{$"), tmp_path / "a.svg")
    assert (tmp_path / "a.svg").stat().st_size > 10_000


def test_a_picture_that_cannot_be_written_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    target = tmp_path / "a.png"
    plot.plot_phases(large(), target)
    first = target.read_bytes()

    def full(path: Path, content: bytes) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("albor.durable.write_file", full)
    with pytest.raises(AlborError, match="cannot be written: No space left on device"):
        plot.plot_phases(large("train.micro_batch_size=8"), target)
    assert target.read_bytes() == first
    assert list(tmp_path.iterdir()) == [target]
    monkeypatch.undo()
    with pytest.raises(AlborError, match="cannot be written: File name too long"):
        plot.plot_phases(large(), tmp_path / f"{'a' * 300}.png")


def test_without_matplotlib_one_message_says_what_to_install(tmp_path: Path):
    (tmp_path / "sitecustomize.py").write_text("import sys; sys.modules['matplotlib'] = None\n")
    words = ["vram-estimate", str(SMALL), "--gpu", "L4", "--plot", str(tmp_path / "a.png")]
    result = subprocess.run(
        [sys.executable, "-m", "albor", *words], capture_output=True, text=True, cwd=CONFIGS.parent,
        env={"PYTHONPATH": f"{tmp_path}:{CONFIGS.parent}"},
    )  # fmt: skip
    assert (result.returncode, result.stdout) == (1, "")
    said = "albor: --plot needs matplotlib, which is not installed; run: pip install 'albor[plot]'\n"
    assert result.stderr == said
    assert not (tmp_path / "a.png").exists()


def test_no_display_and_no_pyplot_are_needed(tmp_path: Path):
    code = (
        "import sys\nfrom pathlib import Path\n"
        "from albor.configfile import load_config\nfrom albor.memory.estimate import estimate\n"
        "from albor.memory.plot import plot_phases\n"
        "assert 'matplotlib' not in sys.modules\n"
        f"plot_phases(estimate(load_config(Path({str(SMALL)!r})), 'L4'), Path({str(tmp_path / 'a.png')!r}))\n"
        "assert 'matplotlib.pyplot' not in sys.modules and 'torch' not in sys.modules\n"
    )
    env = {"MPLBACKEND": "TkAgg", "PYTHONPATH": str(CONFIGS.parent), "HOME": str(tmp_path)}
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "a.png").stat().st_size > 10_000


def luminance(colour: str) -> float:
    """Relative, after WCAG 2."""
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_neighbours_differ_in_brightness_too():
    """So that a grey print still shows where one part ends."""
    order = [colour for name, colour in plot.COLOURS.items() if name != plot.SUMMED]
    for below, above in itertools.pairwise(order):
        dark, light = sorted((luminance(below), luminance(above)))
        assert (light + 0.05) / (dark + 0.05) > 1.15, (below, above)
