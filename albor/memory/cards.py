"""Cards that can be bought or rented: their names, and how much memory CUDA programs can have of each."""

from __future__ import annotations

import csv
import difflib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from albor.errors import ConfigError, Problem
from albor.units import GIB, KIB, MIB

Device = Literal["cpu", "cuda"]


@dataclass(frozen=True)
class Gpu:
    """One model of card. `usable_bytes` is what CUDA programs can have, which is less than what is sold.

    None: not known, or not the same for all cards of that name.
    """

    name: str
    usable_bytes: int | None
    compute_capability: tuple[int, int]
    bf16_peak_flops: float | None  # per second, dense, summed in fp32; None also where the card has no bf16
    source: str  # of usable_bytes
    bandwidth: float | None = None  # bytes per second of its memory, as sold
    multiprocessors: int | None = None
    board_watts: int | None = None  # the power limit that the card is sold with


def _reserve_mib(total_mib: int) -> int:
    """What the driver keeps of nvidia-smi's total: 250 to 630 MiB of the cards below for which both numbers
    are known; of a card of 80 GB or more, 1 GiB is taken off.
    """
    return 640 if total_mib < 64 * KIB else 1024


def _read_row(row: dict[str, str]) -> Gpu:
    total, usable, source = int(row["nvidia_smi_mib"]), row["usable"], row["source"]
    if usable:  # PyTorch's "total capacity of ... GiB", rounded to two decimals, up perhaps
        usable_bytes, source = (
            int((float(usable.removesuffix(" GiB")) - 0.005) * GIB),
            f"{usable} in {source}",
        )
    else:
        reserve = _reserve_mib(total)
        usable_bytes, source = (total - reserve) * MIB, f"derived: nvidia-smi {total} MiB less {reserve}"
    major, minor = row["capability"].split(".")

    def number(column: str, unit: float) -> float | None:
        return float(row[column]) * unit if row[column] else None

    return Gpu(
        row["name"],
        usable_bytes,
        (int(major), int(minor)),
        number("bf16_tflops", 1e12),
        source,
        bandwidth=number("gb_per_s", 1e9),
        multiprocessors=int(row["multiprocessors"]) if row["multiprocessors"] else None,
        board_watts=int(row["board_watts"]) if row["board_watts"] else None,
    )


TABLE = Path(__file__).with_name("cards.csv")


def _read_table() -> tuple[Gpu, ...]:
    with TABLE.open(encoding="utf-8", newline="") as file:
        return tuple(map(_read_row, csv.DictReader(file)))


# Usable bytes are the least that was found reported (GitHub issues): the same card moves by 170 MiB with its
# driver, and by 3 GiB with ECC. Peaks, bandwidths, multiprocessors and board power are from NVIDIA's
# architecture whitepapers and data sheets, without sparsity; GeForce cards sum in fp32 at half the rate at
# which they sum in fp16.
GPUS = _read_table()

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
