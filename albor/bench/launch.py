"""One system's run: a process of its own, what it says, and what becomes of it if it does not end."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import albor
from albor.bench.cases import Case
from albor.bench.machine import Watch
from albor.bench.protocol import OWN, PROFILE_STEPS, PROFILED, REFERENCE, Options, Run


def launch(
    options: Options,
    case: Case,
    peer: str,
    number: int,
    spec: dict[str, Any],
    path: Path,
    cache: Path,
    deadline: float,
    about: dict[str, Any],
) -> Run | None:
    """Runs one system to its end, its failure or its timeout; None where `deadline` came first.

    Beside `path`, where its record belongs, come its Spec and its log. `cache` holds what it compiles, and is
    emptied before its first run. `about` is what else the record says.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    if number == 1:
        shutil.rmtree(cache, ignore_errors=True)
    cold = not cache.exists()
    cache.mkdir(parents=True, exist_ok=True)
    if peer == REFERENCE:
        spec = spec | {"steps": options.reference_steps}
    if peer == REFERENCE or peer.startswith(OWN):  # fp32 has other backends, and albor chooses by itself
        spec = spec | {"attention": None}
    if number == PROFILED:
        spec = spec | {"steps": PROFILE_STEPS, "profile": True}
    spec_path, log = path.with_suffix(".spec"), path.with_suffix(".log")
    spec_path.write_text(json.dumps(spec))
    command = [sys.executable, "-m", "albor.bench.peer", peer, str(spec_path)]
    caches = {"TRITON_CACHE_DIR": str(cache / "triton"), "TORCHINDUCTOR_CACHE_DIR": str(cache / "inductor")}
    with Watch(options.device) as watch, open(log, "w", encoding="utf-8") as errors:
        started = time.time()
        time_left = deadline - started
        process = subprocess.Popen(
            command, env=environment() | caches, stdout=subprocess.PIPE, stderr=errors, text=True,
            process_group=0,  # of which a timeout ends all, the peer's own workers too
        )  # fmt: skip
        expired = False
        try:
            output, _ = process.communicate(timeout=max(0.0, min(options.run_timeout, time_left)))
        except subprocess.TimeoutExpired:
            expired = True
            os.killpg(process.pid, signal.SIGKILL)
            output, _ = process.communicate()
        except BaseException:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            raise
        wall = time.time() - started
    if expired and time_left < options.run_timeout:
        return None
    found = _outcome(output, process.returncode, log)
    if expired:
        found |= {"status": "timed out", "error": f"did not end within {options.run_timeout:g} seconds"}
    if found["first_step_seconds"] is not None:
        found["first_step_seconds"] -= started
    found["notes"]["sdpa"] = spec["attention"]
    seen = watch.summary()
    if seen:
        found["memory"]["device_peak"] = seen.pop("device_peak_bytes")
    return Run(
        case=case.name, peer=peer, number=number, wall_seconds=wall, cold=cold, gpu=seen, **about, **found
    )


def _outcome(output: str, code: int, log: Path) -> dict[str, Any]:
    """What a process that has ended left behind, as fields of a Run."""
    # A process that was killed may have been in the middle of a line.
    events = [json.loads(line) for line in output.splitlines() if line.endswith("}")]
    steps = [event for event in events if event["event"] == "step"]
    named = {event["event"]: event for event in events}
    status, error = ("failed", None) if code else ("ok", None)
    if "failed" in named:
        missing, error = named["failed"]["missing"], named["failed"]["error"]
        status = "failed" if missing is None else "not installed"
    elif code:
        text = log.read_text(encoding="utf-8", errors="replace")
        last = [line for line in text.splitlines() if line.strip()]
        error = f"ended with exit code {code}: {last[-1] if last else 'no output'}"
    return {
        "status": status,
        "error": error,
        "first_step_seconds": named.get("first_step", {}).get("at"),
        "losses": [event["loss"] for event in steps],
        "norms": [event["norm"] for event in steps],
        "seconds": [event["seconds"] for event in steps],
        "memory": dict(named.get("done", {}).get("memory", {})),
        "notes": {k: v for event in events if event["event"] == "note" for k, v in event["facts"].items()},
        "profile": named.get("profile", {}).get("found"),
    }


def environment() -> dict[str, str]:
    """This process's, with this package importable and without Triton's interpreter, which is no machine."""
    root = str(Path(albor.__file__).resolve().parents[1])
    paths = [root, *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    kept = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    # Of several cards only the one that is measured: transformers.Trainer would use them all.
    card = kept.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    order_of_cards = {} if "CUDA_VISIBLE_DEVICES" in kept else {"CUDA_DEVICE_ORDER": "PCI_BUS_ID"}
    here = {"PYTHONPATH": os.pathsep.join(paths), "CUDA_VISIBLE_DEVICES": card, "HF_HUB_OFFLINE": "1"}
    return kept | order_of_cards | here
