"""`albor monitor`: live on a terminal, one snapshot elsewhere."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import sys
from pathlib import Path

from albor.errors import AlborError
from albor.monitor.attach import Attachment, find_target

NEEDS = "pip install 'albor[monitor]'"


def run_monitor(given: Path | None, interval: float, *, once: bool, as_json: bool) -> int:
    """Shows the run until the user leaves; returns the exit code."""
    attachment = Attachment(find_target(given))
    if as_json:
        print(json.dumps(attachment.poll().as_json()))
        return 0
    _check_installed()
    if once or not _can_draw():
        from albor.monitor.snapshot import lines

        print("\n".join(lines(attachment.poll(), ascii_only=not _has_unicode())))
        return 0
    from albor.monitor.app import SIGNALS, Monitor

    if not os.environ.get("NO_COLOR"):
        os.environ.pop("NO_COLOR", None)  # empty means unset, and Textual does not know that
    # A signal must find the handlers that give the terminal back; until they are there it waits.
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    app = Monitor(attachment.poll, attachment.reload, interval)
    code = app.run(mouse=False)
    if app.gone is not None:
        raise AlborError(app.gone)
    if app.return_code:  # an exception inside; Textual has restored the terminal and printed it
        return app.return_code
    if app.view is not None and not code:
        reason = f" ({app.view.reason})" if app.view.reason else ""
        print(f"{app.view.directory}: {app.view.state}{reason}")
    return code or 0


def _check_installed() -> None:
    missing = [name for name in ("textual", "plotext") if importlib.util.find_spec(name) is None]
    if missing:
        raise AlborError(f"albor monitor draws with {' and '.join(missing)}: {NEEDS}; --json needs neither")


def _can_draw() -> bool:
    return all(stream.isatty() for stream in (sys.stdin, sys.stdout, sys.stderr)) and os.environ.get(
        "TERM", "dumb"
    ) not in ("dumb", "unknown", "")


def _has_unicode() -> bool:
    return (sys.stdout.encoding or "").lower().replace("-", "").startswith("utf")
