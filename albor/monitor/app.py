"""The live picture, in Textual: it draws only what has changed, works over ssh, and gives the terminal back.

Why Textual and not rich alone: rich's Live repaints and has no keys; reading them, decoding escape sequences
that arrive in pieces over a slow line, following SIGWINCH, suspending with Ctrl-Z and restoring the terminal
after an exception would all be ours to write. The charts are plotext's (`albor.monitor.chart`), the snapshot
for a pipe needs no Textual. Mouse reporting is off, so that text can be selected; the kitty protocol is
asked for and not needed. The colours are the terminal's own; with NO_COLOR Textual writes none.

At rest it wakes once per interval to look at the two logs' size and time, and every tenth of a second, in
Textual, for keys: a third of a percent of a core. While rows come, all but the header waits until what the
last picture cost is a hundredth of the time since; a key, or another state of the run, is answered at once.
"""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from typing import ClassVar

from rich.text import Text
from textual.app import App, ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import VerticalScroll
from textual.events import Resize
from textual.geometry import Size
from textual.screen import ModalScreen, Screen
from textual.widgets import Static

from albor.monitor import panels
from albor.monitor.attach import Gone
from albor.monitor.chart import ZOOMS
from albor.monitor.layout import HEADER, Place, arrange
from albor.monitor.view import View

HELP = """\
q, Esc, Ctrl-C    quit; the run goes on; Ctrl-Z suspends
Tab, right        next metric in the large chart
Shift-Tab, left   the one before
up, +             the newer half of the steps
down, -           twice as many
l                 logarithmic scale, and back
r                 read everything again
?                 this page, and back

A small window leaves parts out, in this order: sample, events,
gradient norms, memory, small charts. The header, the large
chart and, while one holds, the alerts stay."""
SIGNALS = {signal.SIGTERM: 143, signal.SIGHUP: 129, signal.SIGINT: 0}  # with their exit codes
_DRAWING_SHARE = 0.01  # of a core, for pictures that nobody has asked for
_KEYS = "q quit  ? help  tab metric  ↑↓ zoom  l log  r reload"
_PARTS = ("large", "small-1", "small-2", *panels.PANELS)


class Help(ModalScreen[None]):
    """The keys."""

    BINDINGS: ClassVar[list[BindingType]] = [Binding("escape,q,question_mark,enter,space", "dismiss", "back")]
    CSS = """
    Help { align: center middle; background: ansi_default; }
    Help > VerticalScroll {
        width: 68; max-width: 100%; height: auto; max-height: 100%; border: round ansi_cyan; padding: 0 1;
        background: ansi_default;
    }
    """

    def compose(self) -> ComposeResult:
        """The text, which scrolls where the window is small."""
        with VerticalScroll():
            yield Static(Text(HELP))


class MonitorScreen(Screen[None]):
    """Header, parts in frames, key line; each where `albor.monitor.layout` puts it."""


class Monitor(App[int]):
    """Shows what `poll` returns, every `interval` seconds, until a key or a signal ends it.

    `poll` raises Gone when the run's directory is gone: then the app ends, and `gone` says why.
    """

    ENABLE_COMMAND_PALETTE = False
    INLINE_PADDING = 0
    CSS = """
    Screen { background: ansi_default; color: ansi_default; overflow: hidden; }
    Static { position: absolute; background: ansi_default; color: ansi_default; }
    .part { border: round ansi_bright_black; border-title-color: ansi_default; padding: 0; }
    #alerts { border: round ansi_red; }
    #large { border: round ansi_cyan; }
    """
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("q,escape,ctrl+c,ctrl+q", "leave", "quit", priority=False),
        Binding("tab,right", "metric(1)", priority=True),
        Binding("shift+tab,left", "metric(-1)", priority=True),
        Binding("up,plus", "zoom(1)", priority=False),
        Binding("down,minus", "zoom(-1)", priority=False),
        Binding("l", "scale"),
        Binding("r", "reload"),
        Binding("question_mark", "help"),
        Binding("ctrl+z", "suspend_process"),
    ]

    def __init__(self, poll: Callable[[], View], reload: Callable[[], None], interval: float):
        super().__init__(ansi_color=True)
        self._poll, self._reload, self._interval = poll, reload, interval
        self.view: View | None = None
        self.metric = panels.METRICS[0]
        self.zoom = 0
        self.logarithmic = False
        self.gone: str | None = None
        self._window: Size | None = None
        self.drawing_share = _DRAWING_SHARE
        self._not_before = 0.0
        self._drawn: dict[str, tuple[object, ...]] = {}  # what each part was drawn from
        self._shown: dict[str, object] = {}
        self._places: dict[str, Place] = {}

    def get_default_screen(self) -> Screen[None]:
        """Ours."""
        return MonitorScreen()

    def compose(self) -> ComposeResult:
        """Every part; which of them are shown is decided with the size."""
        yield Static(id="header")
        for name in _PARTS:
            yield Static(id=name, classes="part")
        yield Static(id="keys")

    def on_mount(self) -> None:
        """Reads once, and from then on at the interval."""
        loop = asyncio.get_running_loop()
        for number, code in SIGNALS.items():
            with suppress(ValueError, RuntimeError):  # only the main thread may
                loop.add_signal_handler(number, self.exit, code)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
        self.refresh_view()
        self.set_interval(self._interval, self.refresh_view)

    def on_resize(self, event: Resize) -> None:
        """The window has another size, which `self.size` learns only after this."""
        self._window = event.size
        self._draw()

    def refresh_view(self) -> None:
        """Reads what is new, and shows it."""
        if not self.is_headless and not _is_open():
            self.exit(129)
            return
        try:
            self.view = self._poll()
        except Gone as reason:
            self.gone = str(reason)
            self.exit(1)
            return
        self._draw()

    def _draw(self) -> None:
        view = self.view
        if view is None:
            return
        said = len(view.alerts) + len(view.problems)
        width, height = self._window or self.size
        places = arrange(width, height, alerts=said)
        self._place(places, width, height)
        asked = (view.directory, view.state, said, self.metric, self.zoom, self.logarithmic)
        began, early = time.thread_time(), time.monotonic() < self._not_before
        for name, place in places.items():
            basis = (place, asked, view.revision)
            known = self._drawn.get(name)
            if name in _PARTS and known and (known == basis or (early and known[:2] == basis[:2])):
                continue
            self._drawn[name] = basis
            self._show(name, *self._render_part(view, name, place))
        if not early:
            self._not_before = time.monotonic() + (time.thread_time() - began) / self.drawing_share

    def _place(self, places: dict[str, Place], width: int, height: int) -> None:
        if not places:
            places = {"header": Place(0, 0, width, min(height, HEADER))}
            self._show("header", "", Text("The window is too small: 40 columns and 10 lines are needed."))
        if places == self._places:
            return
        self._places = places
        screen = self.screen_stack[0]
        for name in ("header", *_PARTS, "keys"):
            widget, place = screen.query_one(f"#{name}", Static), places.get(name)
            widget.display = place is not None
            if place is not None:
                widget.styles.offset = (place.x, place.y)
                widget.styles.width, widget.styles.height = place.width, place.height

    def _render_part(self, view: View, name: str, place: Place) -> tuple[str, Text]:
        """Its title and its content."""
        if name == "header":
            return "", panels.header(view, place.width)
        if name == "keys":
            return "", self._key_line(view, place.width)
        width, height = place.width - 2, place.height - 2
        if name in panels.PANELS:
            title, render = panels.PANELS[name]
            return title, render(view, width, height)
        key, zoom, logarithmic = self.metric, ZOOMS[self.zoom], self.logarithmic
        if name != "large":
            key = panels.small_charts(self.metric)[int(name[-1]) - 1]
            zoom, logarithmic = 1.0, False
        title = panels.chart_title(view, key, zoom=zoom, logarithmic=logarithmic)
        return title, panels.chart(view, key, width, height, zoom=zoom, logarithmic=logarithmic)

    def _key_line(self, view: View, width: int) -> Text:
        if view.has_ended:
            reason = f" ({view.reason})" if view.reason else ""
            line = Text.assemble((f"The run has ended: {view.state}{reason}.", "bold"), "  q quit")
        elif view.state == "new":
            line = Text(f"Waiting for {view.directory} to begin.  {_KEYS}")
        else:
            line = Text(_KEYS, "dim")
        line.truncate(width, overflow="ellipsis")
        return line

    def _show(self, name: str, title: str, content: Text) -> None:
        """Draws only what is other than it was."""
        known = (title, content.plain, tuple(content.spans))
        if self._shown.get(name) != known:
            self._shown[name] = known
            widget = self.screen_stack[0].query_one(f"#{name}", Static)
            widget.border_title = Text(title) if title else None
            widget.update(content)

    def action_leave(self) -> None:
        """Quits."""
        self.exit(0)

    def action_metric(self, by: int) -> None:
        """The next metric that the run has, or the one before."""
        known = [name for name in panels.METRICS if self.view and name in self.view.charts]
        if known:
            at = known.index(self.metric) if self.metric in known else 0
            self.metric = known[(at + by) % len(known)]
            self._draw()

    def action_zoom(self, by: int) -> None:
        """Fewer of the steps, or more."""
        self.zoom = max(0, min(len(ZOOMS) - 1, self.zoom + by))
        self._draw()

    def action_scale(self) -> None:
        """Logarithmic, or not."""
        self.logarithmic = not self.logarithmic
        self._draw()

    def action_reload(self) -> None:
        """Reads everything again, and draws it."""
        self._reload()
        self._drawn.clear()
        self.refresh_view()

    def action_help(self) -> None:
        """The page of keys."""
        self.push_screen(Help())


def _is_open() -> bool:
    """Whether the terminal is there still: one that was closed gives no size."""
    for handle in (0, 1, 2):
        with suppress(OSError):
            os.get_terminal_size(handle)
            return True
    return False
