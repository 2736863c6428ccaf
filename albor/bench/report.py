"""What came out, as one JSON object.

A ratio is claimed only where it is larger than what the machine itself moved: every run is halved, and the
slowest half of one system is held against the fastest of the other.
"""

from __future__ import annotations

import statistics
from typing import Any

from albor.bench.cases import Case
from albor.bench.goals import GOALS
from albor.bench.peers import PEERS
from albor.bench.protocol import OWN, PROFILED, REFERENCE, Options, Run
from albor.bench.records import Found
from albor.floor import Attention, Calibration, Floor, Gemm, NotCalibrated, Work, floor, step_work
from albor.memory.cards import matching_gpus
from albor.memory.plan import head_chunk_tokens

MFU_FORMULA = "causal: 6 * weights in GEMMs + 6 * layers * heads * head width * length, per token"
LATE_STEPS, LATE_LOSSES = 300, 50  # so many steps in, the mean of so many differences is looked at


def case_floor(case: Case, calibration: Calibration | None, device: str) -> Floor | None:
    """The floor of one step of `case`; None where not all of it was measured."""
    if calibration is None:
        return None
    try:
        return floor(_work(case, device), calibration)
    except NotCalibrated:
        return None


def _work(case: Case, device: str) -> list[Work]:
    train = case.config.train
    return step_work(
        case.architecture,
        case.config.data.sequence_length,
        train.micro_batch_size,
        train.gradient_accumulation_steps,
        head_chunk_tokens(case.config, device),
    )


def build_report(
    options: Options,
    here: dict[str, Any],
    calibration: Calibration | None,
    found: Found,
    *,
    complete: bool,
) -> dict[str, Any]:
    """The record of what was `found`. `complete`: all that `options` ask for is among it."""
    peak = _peak_flops(here)
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
        "cases": {
            case.name: _case(
                case, options, here, peak, calibration, [run for run in found.runs if run.case == case.name]
            )
            for case in found.cases
        },
        "left_out": found.left_out,
    }


def _peak_flops(here: dict[str, Any]) -> float | None:
    if not here["is_gpu"]:
        return None
    peaks = {gpu.bf16_peak_flops for gpu in matching_gpus(here["device"])}  # some are sold with two memories
    return peaks.pop() if len(peaks) == 1 else None


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
    timed = {
        peer: of for peer in PEERS if (of := [r for r in runs if r.peer == peer and r.number != PROFILED])
    }
    halves = {peer: _halves(of, options.warmup) for peer, of in timed.items() if peer != REFERENCE}
    reference = next((run for run in timed.get(REFERENCE, []) if run.status == "ok"), None)
    systems: dict[str, Any] = {}
    for peer, of in timed.items():
        times = halves.get(peer, [])
        row = _system(of)
        if times:
            row |= _speed(config.tokens_per_step, times, flops, peak, least)
        if peer != OWN and times and halves.get(OWN):
            row |= _against(halves[OWN], times)
        row["largest_loss_gap"] = _loss_gap(of, reference)
        row["largest_norm_gap"] = _norm_gap(of, reference)
        row["late_loss_gap"] = _late_loss_gap(of, timed.get(OWN, []))
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
        "floor_kinds": _floor_kinds(_work(case, options.device), least) if least is not None else None,
        "systems": systems,
        "profiles": {
            run.peer: {"status": run.status, "error": run.error} | (run.profile or {})
            for run in runs
            if run.number == PROFILED
        },
        "goals": [goal.judge(case.name, systems) for goal in GOALS if goal.applies(case.name, here)],
    }  # fmt: skip


def _floor_kinds(work: list[Work], least: Floor) -> dict[str, float]:
    """Seconds of a step by kind, as `albor.bench.profile` names them."""
    kinds = {"GEMM": 0.0, "attention": 0.0, "memory and arithmetic": 0.0}
    for one, item in zip(work, least.items, strict=True):
        kind = {Gemm: "GEMM", Attention: "attention"}.get(type(one.operation), "memory and arithmetic")
        kinds[kind] += item.seconds
    return kinds


def _halves(runs: list[Run], warmup: int) -> list[list[float]]:
    """The measured step times of each half of each run that went through."""
    found = []
    for run in runs:
        counted = run.seconds[warmup:]
        if run.status == "ok" and counted:
            middle = len(counted) // 2
            found += [half for half in (counted[:middle], counted[middle:]) if half]
    return found


def _system(runs: list[Run]) -> dict[str, Any]:
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
        "wall_seconds": [run.wall_seconds for run in runs],
        "measured": [[run.date, run.commit] for run in runs],
        "first_step_seconds_cold": first_step(cold=True),
        "first_step_seconds_warm": first_step(cold=False),
        "memory": {name: max(run.memory.get(name) or 0 for run in good) or None for name in measures},
        "gpu": [run.gpu for run in good],
        "losses": good[0].losses if good else latest.losses,
        "norms": good[0].norms if good else latest.norms,
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


def _loss_gap(runs: list[Run], reference: Run | None) -> float | None:
    """The largest difference of a step's loss from the fp32 reference's; None where there is nothing to
    compare.
    """
    if reference is None or runs[0].peer == REFERENCE:
        return None
    gaps = [
        abs(ours - theirs)
        for run in runs
        if run.status == "ok"
        for ours, theirs in zip(run.losses, reference.losses, strict=False)
    ]
    return max(gaps, default=None)


def _norm_gap(runs: list[Run], reference: Run | None) -> float | None:
    """The same of the gradient's norm, as a share of the reference's."""
    if reference is None or runs[0].peer == REFERENCE:
        return None
    gaps = [
        abs(ours / theirs - 1)
        for run in runs
        if run.status == "ok"
        for ours, theirs in zip(run.norms, reference.norms, strict=False)
        if ours is not None and theirs
    ]
    return max(gaps, default=None)


def _late_loss_gap(runs: list[Run], own: list[Run]) -> float | None:
    """The mean difference from albor's losses at the end of a long run; None for a short one."""
    theirs, ours = (next((r.losses for r in of if r.status == "ok"), []) for of in (runs, own))
    if runs[0].peer == OWN or min(len(theirs), len(ours)) < LATE_STEPS:
        return None
    return statistics.fmean(
        abs(a - b) for a, b in zip(ours[-LATE_LOSSES:], theirs[-LATE_LOSSES:], strict=True)
    )
