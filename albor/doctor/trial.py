"""What only a try shows: whether torch and triton load here, and whether CUDA starts.

A library that is missing or of another version, or a container without CUDA's half of the driver, is seen in
no version and no file. The try is a process of its own, so it cannot take the report with it; it creates no
CUDA context.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import asdict, dataclass

from albor.doctor.checks import Check, Gain, Section

_SECONDS = 120  # a cold disk or a network one needs tens of seconds for torch's libraries
_PROGRAM = """
import json, sys, time, warnings
start = time.monotonic()
import torch
if sys.argv[1] == "triton":
    import triton
seconds = time.monotonic() - start
with warnings.catch_warnings(record=True) as said:
    warnings.simplefilter("always")
    cuda = torch.cuda.is_available()
print(json.dumps([seconds, cuda, " ".join(str(warning.message) for warning in said)]))
"""


@dataclass(frozen=True)
class Trial:
    """What came of importing torch and triton."""

    error: str | None  # why they do not load
    import_seconds: float | None
    cuda: bool | None  # torch finds a GPU that it can use
    cuda_reason: str | None  # why not, where torch says so


def attempt(with_triton: bool, seconds: float = _SECONDS) -> Trial:
    """Imports torch, and triton if asked to, in a Python like this one."""
    command = [sys.executable, "-P", "-c", _PROGRAM, "triton" if with_triton else ""]
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=seconds,
            stdin=subprocess.DEVNULL,
            cwd=os.sep,  # where this process is may have been removed, and then no library loads
        )
    except subprocess.TimeoutExpired:
        return Trial(f"not loaded within {seconds:g} s", None, None, None)
    except OSError as error:
        return Trial(f"Python cannot be started: {error}", None, None, None)
    if done.returncode < 0:
        return Trial(f"Python was ended by signal {-done.returncode}", None, None, None)
    if done.returncode:
        said = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        return Trial(said[-1], None, None, None)
    # Libraries may print while they load; the answer is the last line.
    took, cuda, reason = json.loads(done.stdout.splitlines()[-1])
    return Trial(None, round(took, 1), cuda, reason or None)


def examine(trial: Trial | None, gpu_expected: bool) -> Section:
    """The section on the try; None: there is no torch to import.

    `gpu_expected`: by all other checks torch should find a GPU.
    """
    if trial is None:
        return Section("Start", {}, [Check("import", "not tried: there is no torch")])
    if trial.error is not None:
        message = "nothing runs without torch and triton"
        remedy = "install torch again, and with it the triton and the CUDA libraries that belong to it"
        command = "pip install --force-reinstall torch"
        checks = [Check("import", trial.error).found("problem", message, remedy, command)]
    else:
        checks = [
            Check("import", f"torch loads in {trial.import_seconds} s"),
            _cuda_check(trial, gpu_expected),
        ]
    return Section("Start", asdict(trial), checks)


def _cuda_check(trial: Trial, expected: bool) -> Check:
    if trial.cuda:
        return Check("CUDA", "starts, and torch finds a GPU")
    check = Check("CUDA", trial.cuda_reason or "torch finds no GPU")
    if not expected:
        return check
    remedy = (
        "let CUDA start: give a container CUDA's half of the driver (NVIDIA_DRIVER_CAPABILITIES="
        "compute,utility), start NVIDIA's fabric manager on a machine with NVSwitch, or restart the machine"
    )
    return check.found("problem", "the driver has a card, and CUDA cannot use it", remedy, gain=Gain.LARGE)
