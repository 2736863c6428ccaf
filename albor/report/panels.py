"""The parts of the page, each with its chart's place, or with why there is none."""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from typing import Any

from albor.report.charts import BITS, MFU, Chart, is_share
from albor.report.gather import Gathered
from albor.report.markup import (
    NOT_MEASURED,
    chart_place,
    count,
    details,
    figure,
    note,
    nothing,
    panel,
    scroll,
    size,
    swatch,
    table,
    text,
)

_MOST_EVENTS = 400  # rows of the table, all runs together
_PARTS = {"block": "whole block", "attention": "attention", "mlp": "MLP"}
_WHY_NOT = {
    MFU.id: "not measured: no peak is known of what the run computes on",
    BITS.id: "not measured: nothing has been evaluated yet, or the targets stand for no text",
}


def problems(runs: Sequence[Gathered]) -> str:
    """What is wrong with the runs' files; nothing where all is well."""
    lines = "".join(f"<li>{text(problem)}</li>" for run in runs for problem in run.problems)
    if not lines:
        return ""
    return f'<section class="panel problems"><h2>What could not be read</h2><ul>{lines}</ul></section>'


def line(chart: Chart, drawn: Collection[str], runs: Sequence[Gathered]) -> str:
    """A chart over the run. `drawn` are the ids of the charts that have data."""
    if chart.id not in drawn:
        why = _WHY_NOT.get(chart.id, "not measured")
        return panel(chart.id, chart.title, nothing(why), chart.about)
    names = [metric.name for metric in chart.metrics]
    notes = []
    lacking = [run.label for run in runs if not any(name in run.series for name in names)]
    if lacking:
        notes.append(f"Not measured: {text(', '.join(lacking))}.")
    for run in runs:
        own = f"{text(run.label)}: " if len(runs) > 1 else ""
        thinned = [s for name in names if (s := run.series.get(name)) and len(s["y"]) < s["of"]]
        if thinned:
            most = max(thinned, key=lambda series: series["of"])
            drawn_of = f"{len(most['y']):,} of {most['of']:,} rows are drawn"
            notes.append(f"{own}{drawn_of}, of each stretch the lowest and the highest.")
        notes += [f"{own}{text(told)}." for told in run.notes if told.partition(" ")[0] in names]
    place = chart_place(chart.id, chart.title, "line")
    return panel(chart.id, chart.title, place + note(" ".join(notes)), chart.about)


def heat(drawn: Collection[str], runs: Sequence[Gathered]) -> str:
    """The gradient norms of every block, of one run at a time."""
    title = "Gradient norms by block"
    if "heat" not in drawn:
        return panel("heat", title, nothing(), wide=True)
    choices = [(place, run.label, run.heat) for place, run in enumerate(runs) if run.heat]
    row = ""
    if len(runs) > 1:
        options = "".join(f'<option value="{place}">{text(label)}</option>' for place, label, _ in choices)
        row += f'<label>Run <select id="heat-run">{options}</select></label>'
    parts = list(dict.fromkeys(part for _, _, found in choices for part in found["maps"]))
    if len(parts) > 1:
        options = "".join(f'<option value="{part}">{_PARTS[part]}</option>' for part in parts)
        row += f'<label>Part <select id="heat-part">{options}</select></label>'
    lacking = [run.label for run in runs if not run.heat]
    told = note(f"Not measured: {text(', '.join(lacking))}." if lacking else "")
    about = "Before clipping; each cell is the highest norm in its stretch of rows."
    content = f'<div class="row">{row}</div>{chart_place("heat", title)}{told}'
    return panel("heat", title, content, about, wide=True)


def memory(drawn: Collection[str], runs: Sequence[Gathered]) -> str:
    """The plan and the measurement, by component."""
    title = "Memory: planned and measured"
    if "memory" not in drawn:
        return panel("memory", title, nothing("not known: there is no plan.json that can be read"), wide=True)
    parts = [chart_place("memory", title), '<ul class="key" id="memory-key"></ul>']
    for run in runs:
        if len(runs) > 1:
            parts.append(f"<h3>{text(run.label)}</h3>")
        parts.append(_memory_of(run))
    about = (
        "Planned: what is in the arena at its peak, and what lies outside. Measured: the whole process; what "
        "it has beyond the arena and what the driver tells apart is “not told apart”."
    )
    return panel("memory", title, "".join(parts), about, wide=True)


def _memory_of(run: Gathered) -> str:
    found = run.memory
    if found is None:
        return nothing("not known: there is no plan.json that can be read")
    verdict = found["verdict"] or f"Not measured: {found['why_not']}"
    when = f"measured {found['measured_when']}" if found["measured_when"] else ""
    facts = "; ".join(filter(None, [found["hardware"], when]))
    names = dict.fromkeys([*found["planned"], *found["measured"]])
    rows = [[text(n), size(found["planned"].get(n)), size(found["measured"].get(n))] for n in names]
    rows.append(["together", size(found["planned_total"]), size(found["measured_total"])])
    components = details("Bytes by component", table(["", "planned", "measured"], rows, numbers=(1, 2)))
    return f"<p>{text(verdict)}.</p>{note(text(facts))}{components}"


def shares(drawn: Collection[str], runs: Sequence[Gathered]) -> str:
    """What the model reads, by source."""
    if "shares" not in drawn:
        return panel("shares", "Data", nothing("not known: there is no configuration that can be read"))
    lacking = [run.label for run in runs if run.shares and run.shares[0]["read"] is None]
    of = f" of {text(', '.join(lacking))}" if len(runs) > 1 else ""
    told = note(f"What was read is not known{of}: there is no checkpoint." if lacking else "")
    about = (
        "Shares of the tokens by source. Outlined: by weight. Filled: of what the newest checkpoint had read."
    )
    return panel("shares", "Data", chart_place("shares", "Data") + told, about)


def timeline(drawn: Collection[str], runs: Sequence[Gathered]) -> str:
    """What happened when."""
    if "timeline" not in drawn:
        return panel("timeline", "Events", nothing("none recorded"), wide=True)
    each = max(20, _MOST_EVENTS // len(runs))
    rows, left_out = [], 0
    for run in runs:
        rarest = sorted(run.events, key=lambda event: event["lane"] == "checkpoint")[:each]
        left_out += run.events_left_out + len(run.events) - len(rarest)
        for event in sorted(rarest, key=lambda event: event["time"]):
            cells = [text(event["kind"]), count(event["step"]), text(event["time"]), text(event["text"])]
            rows.append([text(run.label) if len(runs) > 1 else "", *cells])
    every = table(["run", "event", "step", "time", "what"], rows, numbers=(2,), long=(4,))
    told = note(f"{left_out:,} more are not in the table, checkpoints first." if left_out else "")
    content = f"{chart_place('timeline', 'Events')}{details('Events as a table', _tall(every))}{told}"
    about = "Where a stretch was trained twice, after a crash or a rollback, the events of both are here."
    return panel("timeline", "Events", content, about, wide=True)


def _tall(content: str) -> str:
    return f'<div class="tall">{content}</div>'


def evaluation(drawn: Collection[str], runs: Sequence[Gathered]) -> str:
    """What the end of the run and `albor eval` found."""
    parts = [_finals(runs)]
    if "tasks" in drawn:
        parts.append(chart_place("tasks", "Tasks, with standard errors"))
        parts.append(note("Bars: standard errors. Upright lines: guessing."))
    rows = [row for run in runs for row in _evaluation_rows(run)]
    if rows:
        heads = ["run", "step", "of", "metric", "value", "items", "limit"]
        parts.append(table(heads, rows, numbers=(1, 4, 5)))
    parts += [_smoke(run, f" of {text(run.label)}" if len(runs) > 1 else "") for run in runs if run.smoke]
    content = "".join(parts) or nothing("none yet: the run has not ended, and albor eval stored nothing here")
    return panel("evaluation", "Evaluation", content, wide=True)


def _finals(runs: Sequence[Gathered]) -> str:
    """eval/final.json of every run that has one."""
    rows = []
    for run in runs:
        final = run.final
        if final:
            measured = [figure(final.get(f"val/{name}")) for name in ("loss", "perplexity", "bits_per_byte")]
            others = [figure(run.headline["gzip"]), figure(run.headline["xz"])]
            smoke = (run.smoke or {}).get("summary") or final.get("smoke") or ""
            tokens = count(final.get("val/target_tokens"))
            rows.append([text(run.label), *measured, *others, tokens, text(smoke)])
    if not rows:
        return ""
    heads = [
        "at the end",
        "held-out loss",
        "perplexity",
        "bits per byte",
        "gzip",
        "xz",
        "tokens",
        "smoke test",
    ]
    return table(heads, rows, numbers=(1, 2, 3, 4, 5, 6), long=(7,))


def _evaluation_rows(run: Gathered) -> list[list[str]]:
    rows = []
    for entry in run.evaluations:
        name, step = text(run.label), count(entry["step"])
        limit = "" if entry["limit"] is None else f"first {text(entry['limit'])}"
        for task in entry.get("tasks", ()):
            value, items = _with_error(task), count(task["items"])
            rows.append([name, step, text(task["task"]), text(task["metric"]), value, items, limit])
        if "text" in entry:
            bits = figure(entry["text"]["bits_per_byte"])
            rows.append([name, step, text(entry["text"]["path"]), "bits per byte", bits, "", ""])
    return rows


def _with_error(task: dict[str, Any]) -> str:
    value, error = task["value"], task["stderr"]
    if value is None:
        return NOT_MEASURED
    factor, unit = (100, " %") if is_share(task["metric"]) else (1, "")
    return f"{value * factor:,.2f}" + ("" if error is None else f" ± {error * factor:,.2f}") + unit


def _smoke(run: Gathered, of: str) -> str:
    findings = (run.smoke or {}).get("findings")
    texts = [
        _written(finding.get("prompt"), finding.get("text"))
        for finding in (findings if isinstance(findings, list) else [])
        if isinstance(finding, dict)
    ]
    return details(f"Texts of the smoke test{of}", "".join(texts) or nothing("none stored"))


def _written(prompt: Any, found: Any) -> str:
    """A prompt, and how the model went on."""
    went_on = "<i>nothing: the logits were not finite</i>" if found is None else text(found)
    return f"<pre><b>{text(prompt)}</b>{went_on}</pre>"


def samples(runs: Sequence[Gathered]) -> str:
    """How the model wrote at each evaluation, a step at a time."""
    by_step = [{sample["step"]: sample["texts"] for sample in run.samples} for run in runs]
    steps = sorted({step for found in by_step for step in found})
    if not steps:
        return panel("samples", "Samples", nothing("none yet"), wide=True)
    sections = []
    for step in steps:
        columns = []
        for place, run in enumerate(runs):
            head = f"<h4>{swatch(place)} {text(run.label)}</h4>" if len(runs) > 1 else ""
            texts = [_written(sample["prompt"], sample["text"]) for sample in by_step[place].get(step, ())]
            columns.append(f"<div>{head}{''.join(texts) or nothing('no sample at this step')}</div>")
        sections.append(
            f'<section class="sample-step" data-label="step {step:,}"><h3>Step {step:,}</h3>'
            f'<div class="samples">{"".join(columns)}</div></section>'
        )
    row = (
        '<div class="row hidden" id="sample-row"><button type="button" id="sample-before">Earlier</button>'
        '<input type="range" id="sample-slider" min="0" value="0" step="1" aria-label="Step of the samples">'
        '<button type="button" id="sample-after">Later</button></div>'
    )
    left_out = sum(run.samples_left_out for run in runs)
    told = note(f"The samples of {left_out:,} more evaluations are left out." if left_out else "")
    about = "How the model went on from each prompt, which is coloured."
    return panel("samples", "Samples", f"{row}{''.join(sections)}{told}", about, wide=True)


def held_out(runs: Sequence[Gathered]) -> str:
    """The evaluations as numbers, for whoever cannot use a chart."""
    rows = []
    for run in runs:
        loss, bits = (run.series.get(name) for name in ("val/loss", "val/bits_per_byte"))
        if loss is None:
            continue
        by_step = dict(zip(bits["s"], bits["y"], strict=True)) if bits else {}
        for step, tokens, hours, value in zip(loss["s"], loss["t"], loss["h"], loss["y"], strict=True):
            measured = [figure(hours, 3), figure(value), figure(by_step.get(step))]
            rows.append([text(run.label), count(step), count(tokens), *measured])
    if not rows:
        return ""
    heads = ["run", "step", "tokens", "hours", "held-out loss", "bits per byte"]
    every = table(heads, rows, numbers=(1, 2, 3, 4, 5))
    content = details("Evaluations as a table", _tall(every))
    return panel("held-out", "Held-out text", content, wide=True)


def settings(title: str, found: Sequence[dict[str, Any]], runs: Sequence[Gathered], file: str) -> str:
    """Keys and values side by side; those that differ between the runs are marked, and come first."""
    keys = list(dict.fromkeys(key for values in found for key in values))
    if not keys:
        return panel(
            title.lower(), title, nothing(f"not known: there is no {file} that can be read"), wide=True
        )
    differing = [key for key in keys if len({_setting(values, key) for values in found}) > 1]
    rows = []
    for key in [*differing, *(key for key in keys if key not in differing)]:
        values = "".join(f'<td class="long">{_setting(values, key)}</td>' for values in found)
        begin, mark = ('<tr class="differs">', "≠ ") if key in differing else ("<tr>", "")
        rows.append(f'{begin}<th scope="row">{mark}{text(key)}</th>{values}</tr>')
    heads = ["key", *(run.label if len(runs) > 1 else "value" for run in runs)]
    head = "".join(f'<th scope="col">{text(name)}</th>' for name in heads)
    whole = scroll(f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>")
    told = f", {len(differing)} of them not the same in all runs (≠)" if len(runs) > 1 else ""
    return panel(title.lower(), title, details(f"{len(keys)} keys{told}", whole), wide=True)


def _setting(values: dict[str, Any], key: str) -> str:
    if key not in values:
        return '<span class="soft">not there</span>'
    value = values[key]
    return text(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))
