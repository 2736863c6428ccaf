"""Runs the protocol: calibration, then every case with every system, in an order in which each stands beside
a run of albor.

Whatever is done is on the disk, and so is the report of it: a second call with the same options does what is
left, so that nothing is lost on a machine that is lent for minutes at a time.
"""

from __future__ import annotations

import hashlib
import json
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from albor.bench.cases import Case
from albor.bench.launch import environment, launch
from albor.bench.machine import facts
from albor.bench.page import render_markdown
from albor.bench.protocol import (
    CALIBRATE_AGAIN,
    OWN,
    PROFILE_STEPS,
    PROFILED,
    Options,
    Run,
    turns,
)
from albor.bench.records import Records, replace_text
from albor.bench.report import build_report, case_floor
from albor.floor import SDPA_BACKENDS, Attention, Calibration


def run_benchmark(options: Options, say: Callable[[str], None]) -> dict[str, Any]:
    """Does what is left of `options`, and returns the report, which also lies in the folder.

    SIGTERM ends it as Ctrl-C does, and with it the process that is running.
    """
    previous = signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        return _run_all(options, say)
    except (KeyboardInterrupt, SystemExit):
        say(f"interrupted; {options.out} holds what is finished, and the same command goes on")
        raise
    finally:
        signal.signal(signal.SIGTERM, previous)


def _run_all(options: Options, say: Callable[[str], None]) -> dict[str, Any]:
    deadline = time.time() + options.time_limit if options.time_limit is not None else float("inf")
    here = facts(options.device)
    (options.out / "work").mkdir(parents=True, exist_ok=True)
    records = Records(options, here)
    say(f"{here['device']}{'' if here['is_gpu'] else ' (a CPU; no GPU is measured)'}, {options.dtype}")
    calibration, failure = _calibrate(options, here, deadline, say) if options.calibrate else (None, None)
    floors = [case_floor(case, calibration, options.device) for case in options.cases]
    finished = None not in floors or failure is not None or not options.calibrate

    def write_report(*, complete: bool) -> dict[str, Any]:
        report = build_report(options, here, calibration, records.everything(), complete=complete)
        report["calibration_error"] = failure
        replace_text(options.out / "report.json", json.dumps(report, indent=1) + "\n")
        replace_text(options.out / "report.md", render_markdown(report))
        return report

    write_report(complete=False)
    jobs = [(case, *turn) for case in options.cases for turn in turns(options)] if options.systems else []
    found = [records.find(*job) for job in jobs]
    new = [job for job, run in zip(jobs, found, strict=True) if run is None]
    # What failed may have failed for a reason that is gone; but what is missing comes first.
    again = [job for job, run in zip(jobs, found, strict=True) if run is not None and run.status != "ok"]
    specs: dict[str, dict[str, Any]] = {}
    for place, (case, peer, number) in enumerate(new + again):
        run = None
        if time.time() < deadline:
            if case.name not in specs:
                specs[case.name] = _prepare(options, case, calibration, say)
            say(f"{case.name}: {peer}, {'profile' if number == PROFILED else f'run {number}'}")
            cache = options.out / "work" / "cache" / f"{case.name}-{peer}"
            about = {
                "fingerprint": records.fingerprint(case, peer, number),
                "date": here["date"],
                "commit": here["commit"],
            }
            path = records.path(case, peer, number)
            run = launch(
                options, case, peer, number, specs[case.name], path, cache.resolve(), deadline, about
            )
        if run is None:
            finished = finished and place >= len(new)
            break
        records.save(case, run)
        say(f"  {describe(run, options, case)}")
        write_report(complete=False)
    if not finished:
        say("time is up; the same command goes on with what is left")
    return write_report(complete=finished)


def _calibrate(
    options: Options, here: dict[str, Any], deadline: float, say: Callable[[str], None]
) -> tuple[Calibration | None, str | None]:
    """The calibration of this card, as far as time allowed; and what went wrong, if anything did. Systems can
    be measured without it: only the floor is then missing.
    """
    path = options.out / "calibration.json"
    same = {"device": here["device"], "torch": here["versions"]["torch"], "dtype": options.dtype}
    if path.exists():
        found = Calibration.load(path)
        if {"device": found.device, "torch": found.facts["versions"]["torch"], "dtype": found.dtype} != same:
            say(f"{path} is of {found.device}, torch {found.facts['versions']['torch']}: measured anew")
            path.unlink()
        elif found.facts["code"] != here["code"]:  # what was measured of albor's own attention is of the past
            for times in found.attention.values():
                times.pop(OWN, None)
            found.facts = here
            found.save(path)
    job = options.out / "work" / "calibrate.json"
    job.write_text(json.dumps({
        "cases": {case.name: case.config.model_dump(mode="json") for case in options.cases},
        "device": options.device, "dtype": options.dtype, "card": here["device"], "facts": here,
        "out": str(path.resolve()), "until": min(deadline, 1e12),
    }))  # fmt: skip
    say("calibration")
    code = CALIBRATE_AGAIN
    while code == CALIBRATE_AGAIN and time.time() < deadline:
        code = _calibrate_in_a_process(job, options.run_timeout, say)
    failure = None
    if code not in (0, CALIBRATE_AGAIN):
        failure = f"the calibration ended with exit code {code}, and is not complete"
        say(failure)
    return (Calibration.load(path) if path.exists() else None), failure


def _calibrate_in_a_process(job: Path, timeout: float, say: Callable[[str], None]) -> int:
    """Its exit code; what hangs is killed after `timeout` seconds."""
    command = [sys.executable, "-m", "albor.bench.calibrate", str(job)]
    with subprocess.Popen(command, env=environment(), stdout=subprocess.PIPE, text=True) as process:
        timer = threading.Timer(timeout, process.kill)
        timer.start()
        try:
            for line in process.stdout or ():
                say(f"  {line.rstrip()}")
        except BaseException:
            process.kill()
            raise
        finally:
            timer.cancel()
    return process.returncode


def sdpa_choice(case: Case, calibration: Calibration) -> str | None:
    """The backend of scaled_dot_product_attention that was fastest forward and backward together."""
    model, config = case.architecture, case.config
    shape = (
        config.train.micro_batch_size, config.data.sequence_length, model.num_attention_heads,
        model.num_key_value_heads, model.head_dim,
    )  # fmt: skip
    totals: dict[str, float] = {}
    for backend in SDPA_BACKENDS:
        forward = calibration.backend_seconds(Attention(*shape, "forward"), backend)
        backward = calibration.backend_seconds(Attention(*shape, "backward"), backend)
        if forward is not None and backward is not None:
            totals[backend] = forward + backward
    return min(totals, key=lambda name: totals[name], default=None)


def _prepare(
    options: Options, case: Case, calibration: Calibration | None, say: Callable[[str], None]
) -> dict[str, Any]:
    """Writes weights and tokens where they are not there yet; returns the Spec as JSON."""
    from albor.bench.workload import Spec, write_tokens, write_weights

    config, work = case.config, options.out / "work"
    key = hashlib.sha256(f"{config.model!r} {config.seed}".encode()).hexdigest()[:12]
    total = options.warmup + options.steps
    count = max(total, options.reference_steps, PROFILE_STEPS) * config.tokens_per_step + 1
    weights = work / f"weights-{key}.safetensors"
    tokens = work / f"tokens-{config.model.vocab_size}-{count}.npy"
    for path, write in (
        (weights, lambda draft: write_weights(draft, config)),
        (tokens, lambda draft: write_tokens(draft, count, config.model.vocab_size)),
    ):
        if not path.exists():
            say(f"{case.name}: writing {path.name}")
            draft = path.with_name(f"draft-{path.name}")
            write(draft)
            draft.replace(path)
    # Only CUDA has backends to choose from.
    chosen = sdpa_choice(case, calibration) if calibration is not None and options.device == "cuda" else None
    spec = Spec(
        config=config,
        device=options.device,
        dtype=options.dtype,
        weights=str(weights.resolve()),
        tokens=str(tokens.resolve()),
        steps=total,
        compile_backend=options.compile_backend,
        attention=chosen,
    )
    return spec.as_json()


def describe(run: Run, options: Options, case: Case) -> str:
    """One line for the terminal."""
    took = f"{run.wall_seconds:.0f} s in all"
    if run.status != "ok":
        return f"{run.status}: {run.error} ({took})"
    if run.profile is not None:
        return f"{run.profile['busy_seconds'] * 1e3:,.1f} ms of work in a step ({took})"
    counted = sorted(run.seconds[options.warmup :] or run.seconds)
    speed = case.config.tokens_per_step / counted[len(counted) // 2]
    first, loss = run.first_step_seconds or 0.0, run.losses[-1]
    return f"{speed:,.0f} tokens/s, first step after {first:.1f} s, loss {loss:.3f} ({took})"
