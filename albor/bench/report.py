"""What came out: one JSON object, and a Markdown page made of it.

A ratio is claimed only where it is larger than what the machine itself moved: every run is halved, and the
slowest half of one system is held against the fastest of the other.
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from typing import Any, Literal

from albor.bench.cases import Case
from albor.bench.floor import Calibration, Floor, NotCalibrated, floor, step_work
from albor.bench.peers import TITLES
from albor.bench.protocol import OWN, REFERENCE, Options, Run
from albor.errors import ConfigError
from albor.memory.devices import find_gpu
from albor.memory.plan import head_chunk_tokens

MFU_FORMULA = "causal: 6 * weights in GEMMs + 6 * layers * heads * head width * length, per token"


def case_floor(case: Case, calibration: Calibration | None, device: str) -> Floor | None:
    """The floor of one step of `case`; None where not all of it was measured."""
    if calibration is None:
        return None
    train = case.config.train
    work = step_work(
        case.architecture,
        case.config.data.sequence_length,
        train.micro_batch_size,
        train.gradient_accumulation_steps,
        head_chunk_tokens(case.config, device),
    )
    try:
        return floor(work, calibration)
    except NotCalibrated:
        return None


def build_report(
    options: Options,
    here: dict[str, Any],
    calibration: Calibration | None,
    runs: list[Run],
    *,
    complete: bool,
) -> dict[str, Any]:
    """The record of what has been run so far."""
    peak = _peak_flops(here)
    cases = {
        case.name: _case(
            case, options, here, peak, calibration, [run for run in runs if run.case == case.name]
        )
        for case in options.cases
    }
    return {
        "complete": complete,
        "command": options.command,
        "machine": here,
        "dtype": options.dtype,
        "peak_flops": peak,
        "mfu_formula": MFU_FORMULA,
        "warmup_steps": options.warmup,
        "measured_steps": options.steps,
        "links": calibration.links if calibration is not None else {},
        "cases": cases,
    }


def _peak_flops(here: dict[str, Any]) -> float | None:
    if not here["is_gpu"]:
        return None
    try:
        return find_gpu(here["device"]).bf16_peak_flops
    except ConfigError:
        return None


def _case(
    case: Case,
    options: Options,
    here: dict[str, Any],
    peak: float | None,
    calibration: Calibration | None,
    runs: list[Run],
) -> dict[str, Any]:
    config, model = case.config, case.architecture
    flops = model.flops_per_token(config.data.sequence_length)
    least = case_floor(case, calibration, options.device)
    by_peer = {peer: [run for run in runs if run.peer == peer] for peer in options.peers}
    halves = {peer: _halves(of, options.warmup) for peer, of in by_peer.items() if peer != REFERENCE}
    reference = next((run.losses for run in by_peer.get(REFERENCE, []) if run.status == "ok"), None)
    systems: dict[str, Any] = {}
    for peer, of in by_peer.items():
        if of:
            times = halves.get(peer, [])
            row = _system(of, options.warmup)
            if times:
                row |= _speed(config.tokens_per_step, times, flops, peak, least)
            if peer != OWN and times and halves.get(OWN):
                row |= _against(halves[OWN], times)
            row["largest_loss_gap"] = _gap(of, reference) if peer != REFERENCE else None
            systems[peer] = row
    return {
        "shape": {
            name: getattr(model, name)
            for name in (
                "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
                "num_key_value_heads", "vocab_size", "tie_word_embeddings",
            )
        } | {
            "parameters": model.parameter_count,
            "sequence_length": config.data.sequence_length,
            "micro_batch_size": config.train.micro_batch_size,
            "gradient_accumulation_steps": config.train.gradient_accumulation_steps,
        },
        "tokens_per_step": config.tokens_per_step,
        "flops_per_token": flops,
        "floor": least.as_json() if least is not None else None,
        "systems": systems,
        "goals": [goal.judge(case.name, systems) for goal in GOALS if goal.applies(case.name, here)],
    }  # fmt: skip


def _halves(runs: list[Run], warmup: int) -> list[list[float]]:
    """The measured step times of each half of each run that went through."""
    found = []
    for run in runs:
        counted = run.seconds[warmup:]
        if run.status == "ok" and counted:
            middle = len(counted) // 2
            found += [half for half in (counted[:middle], counted[middle:]) if half]
    return found


def _system(runs: list[Run], warmup: int) -> dict[str, Any]:
    good = [run for run in runs if run.status == "ok"]

    def first_step(*, cold: bool) -> float | None:
        known = [r.first_step_seconds for r in good if r.cold == cold and r.first_step_seconds is not None]
        return min(known, default=None)

    measures = sorted({name for run in good for name in run.memory})
    latest = runs[-1]
    return {
        "status": "ok" if good else latest.status,
        "error": None if good else latest.error,
        "runs": len(good),
        "first_step_seconds_cold": first_step(cold=True),
        "first_step_seconds_warm": first_step(cold=False),
        "memory": {name: max(run.memory.get(name) or 0 for run in good) or None for name in measures},
        "gpu": [run.gpu for run in good],
        "losses": good[0].losses if good else latest.losses,
        "notes": good[-1].notes if good else latest.notes,
    }


def _speed(
    tokens: int, halves: list[list[float]], flops: int, peak: float | None, least: Floor | None
) -> dict[str, Any]:
    seconds = statistics.median(second for half in halves for second in half)
    middles = [statistics.median(half) for half in halves]
    return {
        "seconds_per_step": seconds,
        "tokens_per_second": tokens / seconds,
        "tokens_per_second_range": [tokens / max(middles), tokens / min(middles)],
        "mfu": tokens * flops / seconds / peak if peak is not None else None,
        "share_of_floor": least.seconds / seconds if least is not None else None,
    }


def _against(own: list[list[float]], other: list[list[float]]) -> dict[str, Any]:
    """How many times as fast albor is, and the range that the halves allow."""
    ours, theirs = ([statistics.median(half) for half in halves] for halves in (own, other))
    low, high = min(theirs) / max(ours), max(theirs) / min(ours)
    whole = [statistics.median(s for half in halves for s in half) for halves in (own, other)]
    claim = "faster" if low > 1 else "slower" if high < 1 else "not apart"
    return {"albor_is_faster_by": whole[1] / whole[0], "ratio_range": [low, high], "claim": claim}


def _gap(runs: list[Run], reference: list[float] | None) -> float | None:
    """The largest difference of a step's loss from the fp32 reference's; None where there is nothing to
    compare.
    """
    losses = [run.losses for run in runs if run.status == "ok"]
    if not losses or not reference:
        return None
    return max(abs(a - b) for one in losses for a, b in zip(one, reference, strict=False))


@dataclass(frozen=True)
class Goal:
    """One figure that is to be reached. A range that reaches over it leaves it undecided."""

    case: str | None  # None: every case
    what: Literal["mfu", "share_of_floor", "ratio", "memory_ratio", "bytes", "first_step", "loss"]
    value: float
    against: str | None = None  # "best": the fastest of the plain torch loops
    card: str | None = None  # of which the figure is; None: of any GPU

    def applies(self, case: str, here: dict[str, Any]) -> bool:
        """Whether this case on this machine is what the goal is about."""
        right_card = self.card is None or str(here["device"]).find(self.card) >= 0
        return here["is_gpu"] and right_card and self.case in (None, case)

    def judge(self, case: str, systems: dict[str, Any]) -> dict[str, Any]:
        """The goal, what was measured, and the verdict: reached, missed, undecided or not measured."""
        text, low, high, at_most = self._measured(systems)
        if low is None or high is None:
            verdict = "not measured"
        elif at_most:
            verdict = "reached" if high <= self.value else "missed" if low > self.value else "undecided"
        else:
            verdict = "reached" if low >= self.value else "missed" if high < self.value else "undecided"
        return {"case": case, "goal": text, "measured": [low, high], "verdict": verdict}

    def _measured(self, systems: dict[str, Any]) -> tuple[str, float | None, float | None, bool]:
        """(the goal in words, least, most, whether it is an upper limit)"""
        own = systems.get(OWN, {})
        peer = self._peer(systems)
        name = "the best compiled loop" if self.against == "best" else TITLES.get(self.against or "", "")
        if self.what in ("mfu", "share_of_floor"):
            noun = "MFU" if self.what == "mfu" else "of the calibrated floor"
            value, speeds = own.get(self.what), own.get("tokens_per_second_range")
            text = f"at least {self.value:.0%} {noun}"
            if value is None or speeds is None:
                return text, None, None, False
            one = value / own["tokens_per_second"]
            return text, speeds[0] * one, speeds[1] * one, False
        if self.what == "ratio":
            low, high = systems.get(peer, {}).get("ratio_range", (None, None))
            return f"at least {self.value:g}x the tokens/s of {name}", low, high, False
        if self.what == "memory_ratio":
            mine, theirs = (_reserved(systems.get(who, {})) for who in (OWN, peer))
            share = mine / theirs if mine and theirs else None
            return f"at most {self.value:g}x the peak memory of {name}", share, share, True
        if self.what == "bytes":
            peak = own.get("memory", {}).get("device_peak")
            return f"at most {self.value / 1e9:g} GB on the device", peak, peak, True
        if self.what == "first_step":
            cold = self.value > 10
            seconds = own.get(f"first_step_seconds_{'cold' if cold else 'warm'}")
            cache = "empty" if cold else "filled"
            return f"first step within {self.value:g} s, {cache} kernel cache", seconds, seconds, True
        gap = own.get("largest_loss_gap")
        return f"loss within {self.value:g} of the fp32 reference", gap, gap, True

    def _peer(self, systems: dict[str, Any]) -> str:
        if self.against != "best":
            return self.against or OWN
        loops = [
            peer for peer in systems if peer.startswith("torch-") and "tokens_per_second" in systems[peer]
        ]
        return max(loops, key=lambda peer: systems[peer]["tokens_per_second"], default="torch-compile")


def _reserved(system: dict[str, Any]) -> float | None:
    value: float | None = system.get("memory", {}).get("max_reserved")
    return value


GOALS = (
    Goal("350m", "mfu", 0.48, card="H100"),
    Goal("350m-mb4", "mfu", 0.45, card="H100"),
    Goal("125m", "mfu", 0.43, card="H100"),
    Goal("50m", "mfu", 0.37, card="H100"),
    Goal("1.3b", "mfu", 0.58, card="H100"),
    Goal(None, "share_of_floor", 0.95),
    Goal("350m", "ratio", 1.5, "hf"),
    Goal("350m", "ratio", 1.35, "hf-liger"),
    Goal("350m", "ratio", 1.15, "hf-compile"),
    Goal("350m", "ratio", 1.10, "litgpt"),
    Goal("350m", "ratio", 1.05, "best"),
    Goal("350m", "memory_ratio", 0.55, "hf"),
    Goal("350m", "memory_ratio", 0.8, "best"),
    Goal("350m-mb8", "bytes", 14.5e9),
    Goal("350m", "first_step", 15.0),
    Goal("350m", "first_step", 5.0),
    Goal(None, "loss", 0.005),
)


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
    for name, case in report["cases"].items():
        lines += ["", *_case_lines(name, case)]
    return "\n".join(lines) + "\n"


def _case_lines(name: str, case: dict[str, Any]) -> list[str]:
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
        lines += [
            "",
            "| | tokens/s | albor is faster by | range | MFU | of the floor | allocated | reserved | device "
            "| first step, cold / warm | loss gap |",
            "|---|---|---|---|---|---|---|---|---|---|---|",
            *(_row(peer, row) for peer, row in case["systems"].items() if row["status"] == "ok"),
        ]
        shares = [row["share_of_floor"] or 0 for row in case["systems"].values() if "share_of_floor" in row]
        if max(shares, default=0) > 1:
            lines += [
                "",
                "A system was faster than the floor: the machine was slower while it was calibrated.",
            ]
        failed = [(peer, row) for peer, row in case["systems"].items() if row["status"] != "ok"]
        lines += [""] if failed else []
        lines += [f"- {TITLES[peer]}: {row['status']}: {row['error']}" for peer, row in failed]
    if case["goals"]:
        lines += ["", "| goal | measured | |", "|---|---|---|"]
        lines += [f"| {g['goal']} | {_range(g['measured'])} | {g['verdict']} |" for g in case["goals"]]
    if case["floor"] is not None:
        least = case["floor"]
        lines += [
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
    return lines


def _row(peer: str, row: dict[str, Any]) -> str:
    memory = row["memory"]
    device = memory.get("device_peak", memory.get("max_rss"))
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
    ]
    return "| " + " | ".join(cell or "" for cell in cells) + " |"


def _number(value: float | None, form: str = ",.0f", unit: str = "") -> str:
    return "" if value is None else f"{value:{form}}{unit}"


def _gigabytes(size: int | None) -> str:
    return "" if size is None else f"{size / 1e9:.2f} GB"


def _range(measured: list[float | None]) -> str:
    low, high = measured
    if low is None or high is None:
        return ""
    return f"{low:.4g}" if low == high else f"{low:.4g} to {high:.4g}"
