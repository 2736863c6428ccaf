"""Runs the protocol: calibration, then every case with every system in a process of its own, in an order in
which each stands beside a run of albor.

Whatever is done is on the disk: a second call with the same options does what is left, so that nothing is
lost on a machine that is lent for minutes at a time. Results of other code, another card or another torch are
not continued.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import albor
from albor.bench.cases import Case
from albor.bench.floor import SDPA_BACKENDS, Attention, Calibration
from albor.bench.machine import Watch, facts
from albor.bench.protocol import OWN, REFERENCE, Options, Run, order
from albor.bench.report import build_report, case_floor, render_markdown


def run_benchmark(options: Options, say: Callable[[str], None]) -> dict[str, Any]:
    """Does what is left of `options`, and returns the report, which also lies in the folder.

    SIGTERM ends it as Ctrl-C does, and with it the process that is running.
    """
    previous = signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        return _run_all(options, say)
    finally:
        signal.signal(signal.SIGTERM, previous)


def _run_all(options: Options, say: Callable[[str], None]) -> dict[str, Any]:
    deadline = time.time() + options.time_limit if options.time_limit is not None else float("inf")
    here = facts(options.device)
    work = options.out / "work"
    work.mkdir(parents=True, exist_ok=True)
    say(f"{here['device']}{'' if here['is_gpu'] else ' (a CPU; no GPU is measured)'}, {options.dtype}")
    calibration, failure = _calibrate(options, here, deadline, say) if options.calibrate else (None, None)
    floors = [case_floor(case, calibration, options.device) for case in options.cases]
    finished = None not in floors or failure is not None or not options.calibrate

    runs: list[Run] = []

    def write_report(*, complete: bool) -> dict[str, Any]:
        report = build_report(options, here, calibration, runs, complete=complete)
        report["calibration_error"] = failure
        _replace(options.out / "report.json", json.dumps(report, indent=1) + "\n")
        _replace(options.out / "report.md", render_markdown(report))
        return report

    for case in options.cases if options.systems else ():
        spec: dict[str, Any] | None = None
        numbers: dict[str, int] = {}
        for peer in order(options.peers, options.rounds):
            number = numbers[peer] = numbers.get(peer, 0) + 1
            fingerprint = _fingerprint(options, case, here)
            path = options.out / "runs" / case.name / f"{peer}-{number}.json"
            run = _load(path, fingerprint)
            if run is None and time.time() < deadline:
                spec = spec or _prepare(options, case, calibration, work, say)
                run = _run(options, case, peer, number, spec, path, fingerprint, say)
            if run is None:
                finished = False
                continue
            runs.append(run)
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
    if time.time() >= deadline:
        return (Calibration.load(path) if path.exists() else None), None
    job = options.out / "work" / "calibrate.json"
    job.write_text(json.dumps({
        "cases": {case.name: case.config.model_dump(mode="json") for case in options.cases},
        "device": options.device, "dtype": options.dtype, "card": here["device"], "facts": here,
        "out": str(path.resolve()), "until": min(deadline, 1e12),
    }))  # fmt: skip
    say("calibration")
    command = [sys.executable, "-m", "albor.bench.calibrate", str(job)]
    with subprocess.Popen(command, env=_environment(), stdout=subprocess.PIPE, text=True) as process:
        try:
            for line in process.stdout or ():
                say(f"  {line.rstrip()}")
        except BaseException:
            process.kill()
            raise
    failure = None
    if process.returncode:
        failure = f"the calibration ended with exit code {process.returncode}, and is not complete"
        say(failure)
    return (Calibration.load(path) if path.exists() else None), failure


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
    options: Options, case: Case, calibration: Calibration | None, work: Path, say: Callable[[str], None]
) -> dict[str, Any]:
    """Writes weights and tokens where they are not there yet; returns the Spec as JSON."""
    from albor.bench.workload import Spec, write_tokens, write_weights

    config = case.config
    key = hashlib.sha256(f"{config.model!r} {config.seed}".encode()).hexdigest()[:12]
    total = options.warmup + options.steps
    count = total * config.tokens_per_step + 1
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


def _run(
    options: Options,
    case: Case,
    peer: str,
    number: int,
    spec: dict[str, Any],
    path: Path,
    fingerprint: str,
    say: Callable[[str], None],
) -> Run:
    """Runs one system to its end, its failure or its timeout, and writes the record."""
    path.parent.mkdir(parents=True, exist_ok=True)
    cache = (options.out / "work" / "cache" / f"{case.name}-{peer}").resolve()
    if number == 1:
        shutil.rmtree(cache, ignore_errors=True)
    cold = not cache.exists()
    cache.mkdir(parents=True, exist_ok=True)
    if peer == REFERENCE:
        # It is slow, and only as many losses are compared as steps are measured; and what is fastest in bf16
        # may not compute fp32 at all.
        spec = spec | {"steps": min(spec["steps"], options.steps), "attention": None}
    spec_path = path.with_suffix(".spec.json")
    spec_path.write_text(json.dumps(spec))
    log = path.with_suffix(".log")
    say(f"{case.name}: {peer}, run {number}")
    command = [sys.executable, "-m", "albor.bench.peer", peer, str(spec_path)]
    environment = _environment() | {
        "TRITON_CACHE_DIR": str(cache / "triton"),
        "TORCHINDUCTOR_CACHE_DIR": str(cache / "inductor"),
    }
    expired = False
    with Watch(options.device) as watch, open(log, "w", encoding="utf-8") as errors:
        started = time.time()
        process = subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, stderr=errors, text=True, start_new_session=True
        )
        try:
            output, _ = process.communicate(timeout=options.run_timeout)
        except subprocess.TimeoutExpired:
            expired = True
            os.killpg(process.pid, signal.SIGKILL)
            output, _ = process.communicate()
        except BaseException:
            os.killpg(process.pid, signal.SIGKILL)
            raise
        wall = time.time() - started
    events = [json.loads(line) for line in output.splitlines() if line.endswith("}")]
    run = _record(events, process.returncode, expired, log)
    run |= {"wall_seconds": wall, "cold": cold, "gpu": watch.summary()}
    if run["first_step_seconds"] is not None:
        run["first_step_seconds"] -= started
    if run["gpu"]:
        run["memory"]["device_peak"] = run["gpu"].pop("device_peak_bytes")
    record = Run(case=case.name, peer=peer, number=number, fingerprint=fingerprint, **run)
    if record.status == "timed out":
        record.error = f"did not end within {options.run_timeout:g} seconds"
    _replace(path, json.dumps(asdict(record), indent=1) + "\n")
    say(f"  {describe(record, options, case)}")
    return record


def _record(events: list[dict[str, Any]], code: int, expired: bool, log: Path) -> dict[str, Any]:
    steps = [event for event in events if event["event"] == "step"]
    named = {event["event"]: event for event in events}
    error = named.get("failed", {}).get("error")
    if code and error is None:
        last = [
            line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()
        ]
        error = f"ended with exit code {code}: {last[-1] if last else 'no output'}"
    return {
        "status": "timed out" if expired else "failed" if code else "ok",
        "error": error,
        "first_step_seconds": named.get("first_step", {}).get("at"),
        "losses": [event["loss"] for event in steps],
        "seconds": [event["seconds"] for event in steps],
        "memory": dict(named.get("done", {}).get("memory", {})),
        "notes": {k: v for event in events if event["event"] == "note" for k, v in event["facts"].items()},
    }


def describe(run: Run, options: Options, case: Case) -> str:
    """One line for the terminal."""
    if run.status != "ok":
        return f"{run.status}: {run.error}"
    counted = sorted(run.seconds[options.warmup :] or run.seconds)
    speed = case.config.tokens_per_step / counted[len(counted) // 2]
    return (
        f"{speed:,.0f} tokens/s, first step after {run.first_step_seconds:.1f} s, loss {run.losses[-1]:.3f}"
    )


def _environment() -> dict[str, str]:
    """This process's, with this package importable and without Triton's interpreter, which is no machine."""
    root = str(Path(albor.__file__).resolve().parents[1])
    paths = [root, *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    kept = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    # Of several cards only the one that is measured: transformers.Trainer would use them all.
    card = kept.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    order_of_cards = {} if "CUDA_VISIBLE_DEVICES" in kept else {"CUDA_DEVICE_ORDER": "PCI_BUS_ID"}
    here = {"PYTHONPATH": os.pathsep.join(paths), "CUDA_VISIBLE_DEVICES": card, "HF_HUB_OFFLINE": "1"}
    return kept | order_of_cards | here


def _fingerprint(options: Options, case: Case, here: dict[str, Any]) -> str:
    values = {
        "code": here["code"],
        "device": here["device"],
        "versions": here["versions"],
        "config": case.config.model_dump(mode="json"),
        "steps": [options.warmup, options.steps],
        "dtype": options.dtype,
        "backend": options.compile_backend,
    }
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]


def _load(path: Path, fingerprint: str) -> Run | None:
    """A finished run of the same thing; a failed one is tried again."""
    if not path.exists():
        return None
    run = Run(**json.loads(path.read_text(encoding="utf-8")))
    return run if run.status == "ok" and run.fingerprint == fingerprint else None


def _replace(path: Path, text: str) -> None:
    draft = path.with_name(f"draft-{path.name}")
    draft.write_text(text, encoding="utf-8")
    draft.replace(path)
