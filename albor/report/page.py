"""The page as a whole: its head, its switches, and its parts in their order.

It holds all that it shows. Its Content-Security-Policy lets the browser run the two scripts that stand in it,
by their hashes, and load nothing; what runs wrote is escaped, and could not run if it were not.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Iterator, Sequence
from typing import Any

from albor import __version__
from albor.report import charts, panels
from albor.report.gather import Gathered
from albor.report.headline import headline
from albor.report.markup import swatch, text

MARK = '<meta name="generator" content="albor report'  # in the head of a page that is ours
MOST_RUNS = 24  # colours times dashes: more are not told apart


def render(runs: Sequence[Gathered], plotly: str, style: str, script: str, made: str) -> str:
    """The page about `runs`, which was made at `made`. `plotly` is plotly.js, `script` is page.js."""
    data = charts.data_of(runs)
    scripts = [_unending(plotly), _unending(script)]
    policy = "; ".join([
        "default-src 'none'",
        f"script-src {' '.join(map(_hash, scripts))}",
        "style-src 'unsafe-inline'",  # plotly.js sets styles as it draws
        "img-src data: blob:",  # a chart that the reader saves as a picture
        "base-uri 'none'",
        "form-action 'none'",
    ])  # fmt: skip
    title = text(", ".join(run.label for run in runs))
    body = "\n".join(_body(runs, [chart["id"] for chart in data["charts"]], title))
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
{MARK} {__version__}">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="referrer" content="no-referrer">
<link rel="icon" href="data:,">
<title>{title}: albor report</title>
<style>
{style}</style>
</head>
<body>
{body}
<footer>Made by albor {__version__} on {text(made)}. plotly.js (MIT licence), which is in this file, draws
the charts; the page loads nothing.</footer>
<div id="spoken" class="unseen" aria-live="polite"></div>
<script type="application/json" id="data">{_json(data)}</script>
<script>{scripts[0]}</script>
<script>{scripts[1]}</script>
</body>
</html>
"""


def _unending(script: str) -> str:
    """The script, such that nothing in it ends its element."""
    return script.replace("</script", "<\\/script").replace("<!--", "<\\!--")


def _hash(script: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"


def _json(data: Any) -> str:
    """JSON in which nothing looks like a tag."""
    found = json.dumps(data, separators=(",", ":"), allow_nan=False)
    return found.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _body(runs: Sequence[Gathered], drawn: Sequence[str], title: str) -> Iterator[str]:
    yield f'<header><h1>{title}</h1><p class="soft">{_subtitle(runs)}</p></header>'
    yield _controls(runs)
    yield '<main><noscript><p class="none">Without scripts there are no charts; all else is here.</p>'
    yield "</noscript>"
    yield panels.problems(runs)
    yield headline(runs)
    yield '<div class="panels">'
    for chart in (charts.LOSS, charts.BITS, charts.LR, charts.NORM):
        yield panels.line(chart, drawn, runs)
    yield panels.heat(drawn, runs)
    for chart in (charts.SPEED, charts.MFU, charts.PROCESS):
        yield panels.line(chart, drawn, runs)
    yield panels.shares(drawn, runs)
    yield panels.memory(drawn, runs)
    yield panels.timeline(drawn, runs)
    yield panels.evaluation(drawn, runs)
    yield panels.held_out(runs)
    yield panels.samples(runs)
    yield panels.settings("Configuration", [run.config for run in runs], runs, "config.resolved.yaml")
    yield panels.settings("Environment", [run.environment for run in runs], runs, "env.json")
    yield "</div></main>"


def _subtitle(runs: Sequence[Gathered]) -> str:
    if len(runs) > 1:
        return f"{len(runs)} runs"
    (run,) = runs
    reason = f" ({text(run.reason)})" if run.reason else ""
    return f"{text(run.state)}{reason}; <code>{text(run.directory)}</code>"


def _controls(runs: Sequence[Gathered]) -> str:
    legend = ""
    if len(runs) > 1:
        buttons = "".join(
            f'<button type="button" aria-pressed="true" data-run="{place}">{swatch(place)}'
            f"{text(run.label)}</button>"
            for place, run in enumerate(runs)
        )
        legend = f'<div class="runs" role="group" aria-label="Runs that are shown">{buttons}</div>'
    known = any(run.hours_from for run in runs)
    hours = "" if known else ' disabled title="no run says when, or how fast, its steps were trained"'
    scales = (("linear", "linear", ""), ("log", "log", ""))
    return f"""<div class="controls"><div>{legend}
{_switch("axis", "Over", (("t", "tokens", ""), ("h", "hours", hours), ("s", "steps", "")))}
{_switch("y-scale", "Vertical", scales)}
{_switch("x-scale", "Horizontal", scales)}
<button type="button" id="whole">Show the whole run</button>
{_switch("theme", "Colours", (("auto", "auto", ""), ("light", "light", ""), ("dark", "dark", "")))}
</div></div>"""


def _switch(name: str, legend: str, options: Sequence[tuple[str, str, str]]) -> str:
    """Of `options` (value, label, further attributes) one is chosen, at first the first."""
    buttons = "".join(
        f'<label><input type="radio" name="{name}" value="{value}"{more}{" checked" if not place else ""}>'
        f"<span>{label}</span></label>"
        for place, (value, label, more) in enumerate(options)
    )
    return f'<fieldset><legend>{legend}</legend><span class="segments">{buttons}</span></fieldset>'
