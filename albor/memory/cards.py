"""Cards that can be bought or rented: their names, and how much memory CUDA programs can have of each."""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass
from typing import Literal

from albor.errors import ConfigError, Problem
from albor.units import GIB, KIB, MIB

Device = Literal["cpu", "cuda"]


@dataclass(frozen=True)
class Gpu:
    """One model of card. `usable_bytes` is what CUDA programs can have, which is less than what is sold."""

    name: str
    usable_bytes: int | None  # None: the driver does not say
    compute_capability: tuple[int, int]
    bf16_peak_flops: float | None  # per second, dense, summed in fp32; None: unknown, or the card has no bf16
    source: str  # of usable_bytes


def _seen(name: str, gib: float, capability: tuple[int, int], peak: float | None, where: str) -> Gpu:
    """A row from PyTorch's "total capacity of ... GiB", which is rounded to two decimals, up perhaps."""
    return Gpu(name, int((gib - 0.005) * GIB), capability, peak, f"{gib} GiB in {where}")


def _derived(name: str, total_mib: int, capability: tuple[int, int], peak: float | None) -> Gpu:
    """A row from nvidia-smi's total. From that the driver keeps 250 to 630 MiB on the cards below for which
    both numbers are known; from a card of 80 GB or more, 1 GiB is taken off.
    """
    reserve = 640 if total_mib < 64 * KIB else 1024
    source = f"derived: nvidia-smi {total_mib} MiB less {reserve}"
    return Gpu(name, (total_mib - reserve) * MIB, capability, peak, source)


# Usable bytes are the least that was found reported (GitHub issues): the same card moves by 170 MiB with its
# driver, and by 3 GiB with ECC. Peaks are from NVIDIA's architecture whitepapers and data sheets, without
# sparsity; GeForce cards sum in fp32 at half the rate at which they sum in fp16.
GPUS = (
    _seen("RTX 3060", 11.75, (8, 6), 25.5e12, "Kunhao-Liu/StyleGaussian#12"),
    _seen("RTX 3080", 9.78, (8, 6), 59.5e12, "zai-org/CogVideo#34"),
    _seen("RTX 3090", 23.56, (8, 6), 71e12, "noonghunna/club-3090#58"),
    _derived("RTX 4060 Ti 8GB", 8188, (8, 9), 44.1e12),
    _seen("RTX 4060 Ti 16GB", 15.55, (8, 9), 44.1e12, "boson-ai/higgs-audio#48"),
    _seen("RTX 4070 Ti", 11.73, (8, 9), 80.2e12, "OpenLMLab/LOMO#17"),
    _derived("RTX 4070 Ti Super", 16376, (8, 9), 88.2e12),
    _derived("RTX 4080", 16376, (8, 9), 97.5e12),
    _seen("RTX 4090", 23.52, (8, 9), 165.2e12, "Soul-AILab/SoulX-FlashTalk#5"),
    _derived("RTX 5070 Ti", 16303, (12, 0), 87.9e12),
    _derived("RTX 5080", 16303, (12, 0), 112.6e12),
    _seen("RTX 5090", 31.36, (12, 0), 209.5e12, "TrajectoryCrafter/TrajectoryCrafter#20"),
    _derived("RTX A6000", 49140, (8, 6), 154.8e12),
    _seen("RTX 6000 Ada", 44.43, (8, 9), 364.2e12, "DINGYANB/MTVCrafter#21, with ECC"),
    _seen("T4", 14.56, (7, 5), None, "Zheng-Chong/CatVTON#133"),
    _seen("L4", 22.03, (8, 9), 121e12, "ArcInstitute/evo2#190"),
    _seen("A10", 21.99, (8, 6), 125e12, "zai-org/CogVLM#236"),
    _seen("L40", 44.40, (8, 9), 181e12, "QwenLM/Qwen3-VL#2097"),
    _derived("L40S", 46068, (8, 9), 362e12),
    _seen("A100 40GB", 39.39, (8, 0), 312e12, "PyTorch out-of-memory messages, 39.39 to 39.50 by host"),
    _derived("A100 80GB", 81920, (8, 0), 312e12),
    _derived("H100 PCIe", 81559, (9, 0), 756e12),
    _seen("H100", 79.11, (9, 0), 989.4e12, "vllm-project/vllm#27508"),
    _derived("H200", 143771, (9, 0), 989.4e12),
    _derived("B200", 183359, (10, 0), 2250e12),
)

_NOISE = re.compile(r"nvidia|geforce|tesla|quadro|rtx|generation|sxm\d?|hbm\d?e?|[^a-z0-9]")
_MEMORY = re.compile(r"(?<!\d)(\d{1,3})\s*gi?b\b|(?<=[\s-])(\d{1,3})$")


def _key(name: str) -> tuple[str, int | None]:
    """What names a card, without decoration, and the gigabytes if the name holds them: "a100", 40."""
    lowered = name.lower().strip()
    memory = _MEMORY.search(lowered)
    return _NOISE.sub("", _MEMORY.sub("", lowered)), int(memory[1] or memory[2]) if memory else None


def matching_gpus(name: str) -> list[Gpu]:
    model, memory = _key(name)
    models = {_key(gpu.name)[0] for gpu in GPUS}
    if model not in models:
        model = model.removesuffix("pcie")  # another speed for an H100, the same card for the others

    def has(gpu: Gpu) -> bool:  # cards are sold with up to a tenth more than CUDA can use
        return memory is None or abs(memory - (gpu.usable_bytes or 0) / GIB) <= memory / 10

    return [gpu for gpu in GPUS if _key(gpu.name)[0] == model and has(gpu)]


def find_gpu(name: str) -> Gpu:
    """The card that `name` means: "RTX 4090", "4090", "nvidia geforce rtx 4090 24GB", "A100-SXM4-40GB".

    Raises ConfigError, with the cards that exist, where there is none or more than one.
    """
    found = matching_gpus(name)
    if len(found) == 1:
        return found[0]
    known = ", ".join(gpu.name for gpu in GPUS)
    close = [gpu.name for gpu in found]
    if not close:
        names = {_key(gpu.name)[0]: gpu.name for gpu in GPUS}
        whole = _NOISE.sub("", name.lower())  # in "RTX 409", 409 is no memory
        close = [names[key] for key in difflib.get_close_matches(whole, names, n=2, cutoff=0.5)]
    meant = f"did you mean {' or '.join(close)}? " if close else ""
    what = "is more than one card" if found else "is not a card that albor knows"
    remedy = f"{meant}known are {known}. For any other card, give its memory: --vram 24GiB"
    raise ConfigError([Problem("--gpu", f"{name!r} {what}", remedy, "command line")])


@dataclass(frozen=True)
class Hardware:
    """Where a run is to go. A capacity that is not known is None."""

    device: Device
    description: str
    gpu: Gpu | None = None
    capacity_bytes: int | None = None  # for the device arena and what lies around it
    host_capacity_bytes: int | None = None  # for the host's part of a run on a GPU of this machine
