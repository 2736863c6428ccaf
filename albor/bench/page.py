"""The report as a Markdown page."""

from __future__ import annotations

from typing import Any

from albor.bench.peers import TITLES
from albor.bench.protocol import KINDS

_KERNELS_SHOWN = 15
_NAME_SHOWN = 90  # characters of a kernel's name


def render_markdown(report: dict[str, Any]) -> str:
    """The page."""
    machine = report["machine"]
    lines = [f"# Training on {machine['device']}", ""]
    if not machine["is_gpu"]:
        lines += ["This is a CPU. Nothing on this page says anything about a GPU.", ""]
    versions = ", ".join(f"{name} {v}" for name, v in machine["versions"].items() if v is not None)
    lines += [
        f"- {machine['date']}, commit {machine['commit'] or 'unknown'}, sources {machine['code']}",
        f"- `{report['command']}`",
        f"- {versions}, Python {machine['python']}",
        f"- {machine['processor']}, {machine['cores']} cores, {machine['platform']}",
    ]
    if machine["is_gpu"]:
        lines.append(
            f"- driver {machine['driver']}, power limit {_number(machine['power_limit_watts'])} W, "
            f"clock at most {_number(machine['clock_max_mhz'])} MHz"
        )
    lines += [
        f"- {report['dtype']}; whole optimizer steps, the median of {report['measured_steps']} after "
        f"{report['warmup_steps']} to warm up",
        f"- MFU by the formula that is {report['mfu_formula']}",
        *(f"- {name}: {rate / 1e9:,.1f} GB/s" for name, rate in report["links"].items()),
    ]
    if report.get("calibration_error"):
        lines += ["", f"**{report['calibration_error']}.**"]
    if not report["complete"]:
        lines += ["", "**Not complete: the same command goes on with what is left.**"]
    if report["left_out"]:
        lines += ["", f"{report['left_out']} records in the folder are of other code, versions or settings, "
                  "and are not shown."]  # fmt: skip
    for name, case in report["cases"].items():
        lines += ["", *_case_lines(name, case, machine)]
    return "\n".join(lines) + "\n"


def _case_lines(name: str, case: dict[str, Any], machine: dict[str, Any]) -> list[str]:
    shape = case["shape"]
    lines = [
        f"## {name}",
        "",
        f"{shape['parameters']:,} parameters; {shape['num_hidden_layers']} layers of {shape['hidden_size']}, "
        f"{shape['num_attention_heads']}/{shape['num_key_value_heads']} heads; "
        f"micro-batch {shape['micro_batch_size']} x {shape['sequence_length']}, "
        f"{case['tokens_per_step']:,} tokens a step.",
    ]
    if case["systems"]:
        lines += _system_lines(case["systems"], machine)
    if case["goals"]:
        lines += ["", "| goal | measured | |", "|---|---|---|"]
        lines += [f"| {g['goal']} | {_range(g['measured'])} | {g['verdict']} |" for g in case["goals"]]
    if case["profiles"]:
        lines += _profile_lines(case)
    if case["floor"] is not None:
        lines += _floor_lines(case)
    return lines


def _system_lines(systems: dict[str, Any], machine: dict[str, Any]) -> list[str]:
    lines = [
        "",
        "| | tokens/s | albor is faster by | range | MFU | of the floor | allocated | reserved | device "
        "| first step, cold / warm | loss gap | norm gap |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
        *(_row(peer, row, machine) for peer, row in systems.items() if row["status"] == "ok"),
    ]
    if max((row.get("share_of_floor") or 0 for row in systems.values()), default=0) > 1:
        lines += ["", "A system was faster than the floor: the machine was slower while it was calibrated."]
    notes = [f"- {TITLES[peer]}: {row['status']}: {row['error']}" for peer, row in systems.items()
             if row["status"] != "ok"]  # fmt: skip
    for peer, row in systems.items():
        elsewhere = sorted({commit or "unknown" for _, commit in row["measured"]} - {machine["commit"]})
        if elsewhere:
            notes.append(f"- {TITLES[peer]}: measured at commit {', '.join(elsewhere)}")
    took = (
        f"{TITLES[peer]} {' + '.join(f'{seconds:.0f}' for seconds in row['wall_seconds'])}"
        for peer, row in systems.items()
    )
    preferred = sorted({backend for row in systems.values() if (backend := row["notes"].get("sdpa"))})
    if preferred:
        notes.append(f"- attention of the peers in PyTorch: {', '.join(preferred)} wherever it can be")
    return [*lines, *([""] if notes else []), *notes, "", f"Seconds that the runs took: {'; '.join(took)}."]


def _profile_lines(case: dict[str, Any]) -> list[str]:
    """Sums by kind beside the floor's, and the longest kernels of each system."""
    good = {peer: found for peer, found in case["profiles"].items() if found["status"] == "ok"}
    lines = ["", "Where one step's time goes, in ms, by the names of its kernels:", ""]
    heads = [TITLES[peer] for peer in good]
    if case["floor_kinds"] is not None:
        heads = ["floor", *heads]
    lines += [f"| | {' | '.join(heads)} |", "|---" * (len(heads) + 1) + "|"]
    for kind in KINDS:
        cells = [found["kinds"][kind] for found in good.values()]
        if case["floor_kinds"] is not None:
            cells = [case["floor_kinds"].get(kind, 0.0), *cells]
        lines.append(f"| {kind} | {' | '.join(_milliseconds(cell) for cell in cells)} |")
    idle = [_idle(found, case["systems"].get(peer, {})) for peer, found in good.items()]
    cells = [""] * (case["floor_kinds"] is not None) + [_milliseconds(value) for value in idle]
    lines.append(f"| nothing runs | {' | '.join(cells)} |")
    for peer, found in case["profiles"].items():
        if found["status"] != "ok":
            lines += ["", f"- {TITLES[peer]}, profile: {found['status']}: {found['error']}"]
            continue
        shown, rest = found["kernels"][:_KERNELS_SHOWN], found["kernels"][_KERNELS_SHOWN:]
        lines += ["", f"| {TITLES[peer]} | calls | ms a step | |", "|---|---|---|---|"]
        lines += [
            f"| `{row['name'][:_NAME_SHOWN].replace('|', '/')}` | {row['calls']:,} "
            f"| {_milliseconds(row['seconds'])} | {row['kind']} |"
            for row in shown
        ]
        if rest:
            calls, seconds = (sum(row[key] for row in rest) for key in ("calls", "seconds"))
            lines.append(f"| {len(rest)} others | {calls:,} | {_milliseconds(seconds)} | |")
    return lines


def _idle(profile: dict[str, Any], system: dict[str, Any]) -> float | None:
    """What is left of a step of the timed runs, which no profiler slowed down."""
    whole: float | None = system.get("seconds_per_step")
    return None if whole is None else whole - float(profile["busy_seconds"])


def _floor_lines(case: dict[str, Any]) -> list[str]:
    least = case["floor"]
    return [
        "",
        f"Floor, {least['basis']} operation by operation: {least['seconds_per_step'] * 1e3:,.1f} ms "
        f"a step, {case['tokens_per_step'] / least['seconds_per_step']:,.0f} tokens/s.",
        "",
        "| operation | ms a step | share | TFLOP/s |",
        "|---|---|---|---|",
        *(
            f"| {item['name']} | {item['seconds'] * 1e3:,.2f} | "
            f"{item['seconds'] / least['seconds_per_step']:.1%} | "
            f"{'' if item['tflops'] is None else format(item['tflops'], ',.3g')} |"
            for item in least["items"]
        ),
    ]


def _row(peer: str, row: dict[str, Any], machine: dict[str, Any]) -> str:
    memory = row["memory"]
    device = memory.get("device_peak" if machine["is_gpu"] else "max_rss")
    ratio = (
        f"{row['albor_is_faster_by']:.2f}x" if row.get("claim") in ("faster", "slower") else row.get("claim")
    )
    spread = " to ".join(f"{value:.2f}" for value in row["ratio_range"]) if "ratio_range" in row else None
    first = " / ".join(
        _number(row[f"first_step_seconds_{cache}"], ".1f", " s") or "-" for cache in ("cold", "warm")
    )
    cells = [
        TITLES[peer],
        _number(row.get("tokens_per_second"), ",.0f"),
        ratio,
        spread,
        _number(row.get("mfu"), ".1%"),
        _number(row.get("share_of_floor"), ".1%"),
        *(_gigabytes(value) for value in (memory.get("max_allocated"), memory.get("max_reserved"), device)),
        first,
        _number(row["largest_loss_gap"], ".4f"),
        _number(row["largest_norm_gap"], ".2%"),
    ]
    return "| " + " | ".join(cell or "" for cell in cells) + " |"


def _number(value: float | None, form: str = ",.0f", unit: str = "") -> str:
    return "" if value is None else f"{value:{form}}{unit}"


def _milliseconds(seconds: float | None) -> str:
    return "" if seconds is None else f"{seconds * 1e3:,.2f}"


def _gigabytes(size: int | None) -> str:
    return "" if size is None else f"{size / 1e9:.2f} GB"


def _range(measured: list[float | None]) -> str:
    low, high = measured
    if low is None or high is None:
        return ""
    return f"{low:.4g}" if low == high else f"{low:.4g} to {high:.4g}"
