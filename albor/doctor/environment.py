"""Environment variables that change what a run does, how fast it is, or how much memory it needs."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from albor.doctor.checks import Check, Gain, Section, Status
from albor.memory.pytorch import CUBLAS_SETTING

_SHOWN = re.compile(
    r"TRITON_|TORCH_|TORCHINDUCTOR_|PYTORCH_|CUBLAS|OMP_|MKL_|KMP_|GOMP_|OPENBLAS_NUM_THREADS$"
    r"|CUDA_(?!PATH|HOME|VERSION)|NVIDIA_(VISIBLE_DEVICES|TF32_OVERRIDE)$|LD_(PRELOAD|LIBRARY_PATH)$"
    r"|PYTHONPATH$|CC$"
)
_SECRET = re.compile(r"TOKEN|KEY|SECRET|PASSWORD|CREDENTIAL")  # no place in a bug report
_LONGEST = 60


def _on(value: str) -> bool:
    return value.strip().lower() not in ("", "0", "false", "off", "no")


@dataclass(frozen=True)
class Rule:
    """What is to be said of a variable."""

    status: Status
    message: str
    remedy: str = ""  # why to unset it
    gain: Gain = Gain.NONE
    applies: Callable[[str], bool] = _on
    gpu_only: bool = True  # elsewhere it changes nothing


_DEBUGGING = "it is for debugging"
_ALLOCATOR = Rule(
    "note",
    "another allocator, which the memory estimate does not know",
    applies=lambda value: "cudaMallocAsync" in value,
)
_DUMPS = Rule("note", "every compilation writes files", _DEBUGGING, Gain.SLIGHT)
_SANITIZES = Rule("warning", "kernels check themselves while they run", _DEBUGGING, Gain.CLEAR)
RULES = {
    "CUDA_LAUNCH_BLOCKING": Rule("problem", "the host waits for every kernel", _DEBUGGING, Gain.LARGE),
    "TRITON_INTERPRET": Rule(
        "problem", "the kernels are interpreted, on the CPU", "it is for tests", Gain.LARGE
    ),
    "PYTORCH_NO_CUDA_MEMORY_CACHING": Rule(
        "problem", "every allocation asks the driver", _DEBUGGING, Gain.LARGE
    ),
    "TRITON_DEBUG": _SANITIZES,
    "TRITON_ENABLE_ASAN": _SANITIZES,
    "TRITON_INSTRUMENTATION_MODE": _SANITIZES,
    "TRITON_ALWAYS_COMPILE": Rule(
        "warning", "the kernel cache is not used", "every start compiles all kernels", Gain.SLIGHT
    ),
    "TRITON_KERNEL_OVERRIDE": Rule("warning", "kernels may come from files that albor does not know"),
    "TRITON_KERNEL_DUMP": _DUMPS,
    "MLIR_ENABLE_DUMP": _DUMPS,
    "NVIDIA_TF32_OVERRIDE": Rule(
        "note", "overrules what a run asks for in fp32: 1 rounds to TF32, 0 forbids it", applies=bool
    ),
    "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE": Rule("note", "products in fp32 are rounded to TF32"),
    "CUBLAS_WORKSPACE_CONFIG": Rule(
        "note",
        f"replaces albor's {CUBLAS_SETTING}, and with it which products are fast",
        applies=lambda value: value != CUBLAS_SETTING,
    ),
    "PYTORCH_CUDA_ALLOC_CONF": _ALLOCATOR,
    "PYTORCH_ALLOC_CONF": _ALLOCATOR,
    "CUDA_DEVICE_MAX_CONNECTIONS": Rule(
        "warning",
        "copies wait for kernels: one queue to the card",
        "transfers then overlap with computation",
        Gain.CLEAR,
        lambda value: value.strip() == "1",
    ),
    "CUDA_MODULE_LOADING": Rule(
        "note",
        "all kernels of all libraries are loaded",
        "start-up is quicker, and takes less GPU memory",
        Gain.SLIGHT,
        lambda value: value.strip().upper() == "EAGER",
    ),
    "TORCH_SHOW_CPP_STACKTRACES": Rule("note", "errors are slow to build", _DEBUGGING, gpu_only=False),
    "TORCH_LOGS": Rule("note", "torch logs what it does", _DEBUGGING, applies=bool, gpu_only=False),
}


def examine(environment: Mapping[str, str], usable_cores: int, has_gpu: bool) -> Section:
    """The section on the environment: every variable that is set and may count, by name."""
    found = {
        name: value
        for name, value in sorted(environment.items())
        if (_SHOWN.match(name) or name in RULES) and not _SECRET.search(name)
    }
    checks = [_check(name, value, usable_cores, has_gpu) for name, value in found.items()]
    return Section("Environment", dict(found), checks or [Check("variables", "none that matter")])


def _check(name: str, value: str, usable_cores: int, has_gpu: bool) -> Check:
    text = (value if len(value) <= _LONGEST else f"{value[: _LONGEST - 3]}...") or "(empty)"
    if name == "OMP_NUM_THREADS" and value.isdigit() and 0 < int(value) < usable_cores:
        work = "sum gradients with accumulator: cpu" if has_gpu else "train"
        return Check(
            name,
            text,
            "note",
            f"{usable_cores} processors are there",
            f"let more threads work: {value} of {usable_cores} processors {work}",
            f"unset {name}",
            Gain.SLIGHT if has_gpu else Gain.CLEAR,
        )
    rule = RULES.get(name)
    if rule is None or not rule.applies(value) or (rule.gpu_only and not has_gpu):
        return Check(name, text)
    if not rule.remedy:
        return Check(name, text, rule.status, rule.message)
    return Check(
        name, text, rule.status, rule.message, f"unset {name}: {rule.remedy}", f"unset {name}", rule.gain
    )
