"""The installed card through NVML: which one CUDA would take, its free memory, and who holds the rest."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from nvml_cases import LOST, NO_PERMISSION, Card, FakeNvml, install
from run_cases import call

from albor.memory import devices, nvml
from albor.memory.nvml import installed_gpu
from albor.units import GIB, MIB

CONFIG = Path(__file__).parents[1] / "configs" / "pretrain-350m.yaml"


def seen_first(monkeypatch: pytest.MonkeyPatch, *cards: Card, **environment: str | None) -> list[str]:
    """The UUIDs of what CUDA's first device may be."""
    library = install(monkeypatch, *cards, **environment)  # type: ignore[arg-type]
    return [device.handle.uuid for device in nvml.device_zero(library)]


A, B = Card("GPU-aaaa-1"), Card("GPU-bbbb-2", free=10000)
SLOW = Card("GPU-cccc-3", "NVIDIA GeForce RTX 3060", (8, 6), 11000, 12288)


def test_installed_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    nvml = install(monkeypatch, A, B)
    monkeypatch.setattr(devices, "host_capacity", lambda: 7 * GIB)
    hardware = installed_gpu()
    assert hardware is not None
    assert hardware.gpu is not None
    assert (hardware.gpu.name, hardware.gpu.compute_capability) == ("NVIDIA GeForce RTX 4090", (8, 9))
    assert (hardware.gpu.usable_bytes, hardware.capacity_bytes) == (24080 * MIB, 20000 * MIB)
    assert hardware.gpu.bf16_peak_flops == 165.2e12
    assert nvml.closed
    hardware = devices.this_machine("auto")
    assert (hardware.device, hardware.capacity_bytes) == ("cuda", 20000 * MIB)
    assert hardware.host_capacity_bytes == 7 * GIB
    assert "19.53 GiB free of 23.52 GiB" in hardware.description


@pytest.mark.parametrize(
    ("visible", "seen"),
    [
        (None, ["GPU-aaaa-1"]),
        ("1,0", ["GPU-bbbb-2"]),
        (" 1", ["GPU-bbbb-2"]),
        ("GPU-bbbb", ["GPU-bbbb-2"]),
        ("GPU-aaaa-1", ["GPU-aaaa-1"]),
        ("GPU-aaaa-1,GPU-bbbb-2", ["GPU-aaaa-1"]),
        ("0,7", ["GPU-aaaa-1"]),  # what comes before an index that is not there
        ("", []),
        ("-1", []),
        ("-1,0", []),
        ("7", []),
        ("0,0", []),
        ("GPU-", []),  # begins two cards
        ("GPU-zzzz", []),
        ("MIG-aaaa", []),
        ("all", []),
        ("none", []),
    ],
)
def test_visible_devices(monkeypatch: pytest.MonkeyPatch, visible: str | None, seen: list[str]) -> None:
    assert seen_first(monkeypatch, A, B, visible=visible) == seen
    assert (devices.this_machine("auto").device == "cuda") == bool(seen)


@pytest.mark.parametrize(
    ("visible", "order", "seen"),
    [
        (None, None, ["GPU-cccc-3", "GPU-aaaa-1"]),
        ("1", None, ["GPU-cccc-3", "GPU-aaaa-1"]),
        ("1", "FASTEST_FIRST", ["GPU-cccc-3", "GPU-aaaa-1"]),
        (None, "PCI_BUS_ID", ["GPU-cccc-3"]),
        ("1", "PCI_BUS_ID", ["GPU-aaaa-1"]),
        ("GPU-aaaa", None, ["GPU-aaaa-1"]),  # a UUID says which
    ],
)
def test_an_index_of_different_cards_is_sure_in_the_order_of_the_bus_only(
    monkeypatch: pytest.MonkeyPatch, visible: str | None, order: str | None, seen: list[str]
) -> None:
    assert seen_first(monkeypatch, SLOW, A, visible=visible, order=order) == seen
    hardware = devices.this_machine("cuda")
    if len(seen) == 2:
        assert hardware.capacity_bytes is hardware.gpu is None
        assert "RTX 3060 or NVIDIA GeForce RTX 4090, memory unknown: CUDA chooses" in hardware.description
    else:
        assert hardware.capacity_bytes == (20000 if seen == ["GPU-aaaa-1"] else 11000) * MIB


def _instance(uuid: str, size: int, free: int, ids: tuple[int, int] = (0, 0)) -> Card:
    return Card(uuid, "NVIDIA H100 80GB HBM3", (9, 0), free, size, ids=ids)


def _h100(*slots: Card | None, uuid: str = "GPU-h100") -> Card:
    return Card(uuid, "NVIDIA H100 80GB HBM3", (9, 0), 80000, 81559, slots)


SMALL, LARGE = _instance("MIG-1111", 9984, 9000, (9, 0)), _instance("MIG-2222", 40448, 40000, (2, 0))
SMALL_TOO = _instance("MIG-3333", 9984, 9000, (9, 1))


@pytest.mark.parametrize(
    ("cards", "visible", "seen", "free"),
    [
        # One instance is there, and CUDA takes that.
        ([_h100(None, SMALL)], None, ["MIG-1111"], 9000),
        ([_h100(SMALL)], "0", ["MIG-1111"], 9000),
        ([_h100(SMALL)], "GPU-h100", ["MIG-1111"], 9000),
        ([_h100(SMALL)], "1", [], None),
        # Of several it takes one: their number stands where it is the same.
        ([_h100(SMALL, LARGE)], None, ["MIG-1111", "MIG-2222"], None),
        ([_h100(SMALL, LARGE)], "0", ["MIG-1111", "MIG-2222"], None),
        ([_h100(SMALL, SMALL_TOO)], "0", ["MIG-1111", "MIG-3333"], 9000),
        # Named.
        ([_h100(SMALL, LARGE)], "MIG-2222", ["MIG-2222"], 40000),
        ([_h100(SMALL, LARGE)], "MIG-2", ["MIG-2222"], 40000),
        ([_h100(SMALL, LARGE)], "MIG-2222,MIG-1111", ["MIG-2222"], 40000),
        ([_h100(SMALL, LARGE)], "MIG-GPU-h100/2/0", ["MIG-2222"], 40000),
        ([_h100(SMALL, SMALL_TOO)], "MIG-GPU-h100/9/1", ["MIG-3333"], 9000),
        ([_h100(SMALL, LARGE)], "MIG-GPU-h100/3/0", [], None),
        ([_h100(SMALL, LARGE)], "MIG-9", [], None),
        ([_h100(SMALL, LARGE)], "MIG-", [], None),  # begins two
        # Beside a whole card an instance comes first, unless the whole card is named.
        ([A, _h100(SMALL)], None, ["MIG-1111"], 9000),
        ([A, _h100(SMALL)], "0", ["GPU-aaaa-1", "MIG-1111"], None),
        ([_h100(SMALL), _h100(uuid="GPU-whole")], "1", ["MIG-1111", "GPU-whole"], None),
        ([A, _h100(SMALL)], "GPU-aaaa", ["GPU-aaaa-1"], 20000),
        ([A, _h100(SMALL)], "GPU-aaaa,MIG-1111", ["MIG-1111"], 9000),
        ([_h100(SMALL), _h100(LARGE, uuid="GPU-other")], "GPU-other", ["MIG-2222"], 40000),
        # In MIG mode without an instance CUDA sees nothing; not in MIG mode (yet), the card.
        ([_h100(None)], None, [], None),
        ([_h100(None)], "0", [], None),
        ([_h100()], None, ["GPU-h100"], 80000),
    ],
)
def test_mig_instances(
    monkeypatch: pytest.MonkeyPatch,
    cards: list[Card],
    visible: str | None,
    seen: list[str],
    free: int | None,
) -> None:
    assert seen_first(monkeypatch, *cards, visible=visible) == seen
    hardware = devices.this_machine("cuda")
    assert hardware.capacity_bytes == (None if free is None else free * MIB)
    if hardware.gpu is not None and seen[0].startswith("MIG"):
        assert hardware.gpu.bf16_peak_flops is None, "an instance does not reach the card's peak"


def test_cards_of_others_are_not_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a job that was given one card of several: NVML may list those that it keeps from us."""
    other, lost = Card("GPU-other", failure=NO_PERMISSION), Card("GPU-lost", failure=LOST)
    assert seen_first(monkeypatch, other, A, visible="0") == ["GPU-aaaa-1"]
    assert seen_first(monkeypatch, other, A, visible="1") == []
    assert seen_first(monkeypatch, A, lost, B, visible="GPU-bbbb") == ["GPU-bbbb-2"]
    assert list(nvml.installed_cards(FakeNvml([other, lost, A]))) == [1, 2]


def test_a_driver_before_510_does_not_say_what_it_reserves(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, A, driver=470)
    hardware = devices.this_machine("cuda")
    assert hardware.gpu is not None
    assert (hardware.gpu.usable_bytes, hardware.capacity_bytes) == (24564 * MIB, 20000 * MIB)


@pytest.mark.parametrize("reports", [None, 0, 99999], ids=["refuses", "zero", "a number"])
def test_a_card_that_shares_the_hosts_memory_has_what_is_free_of_it(
    monkeypatch: pytest.MonkeyPatch, reports: int | None
) -> None:
    """DGX Spark: some drivers refuse to say, others give a number that leaves out what the host holds."""
    free = None if reports is None else 1000
    install(monkeypatch, Card("GPU-gb10", "NVIDIA GB10", (12, 1), free, reports or 0))
    monkeypatch.setattr(nvml, "host_capacity", lambda: 100 * GIB)
    hardware = devices.this_machine("cuda")
    assert hardware.unified
    assert (hardware.capacity_bytes, hardware.host_capacity_bytes) == (100 * GIB, None)
    assert hardware.description == "NVIDIA GB10, with the host's memory: 100.00 GiB free"
    result = call("vram-estimate", CONFIG, "--json")
    answer = json.loads(result.out)
    assert (result.code, answer["fits"], answer["capacity_bytes"]) == (0, True, 100 * GIB)

    # Less than the arena, the host's part and the process take together does not do.
    both = answer["device_bytes"] + answer["pinned_bytes"] + answer["host_bytes"]
    monkeypatch.setattr(nvml, "host_capacity", lambda: both)
    assert call("vram-estimate", CONFIG).code == 4
    monkeypatch.setattr(nvml, "host_capacity", lambda: None)
    assert "Unknown: " in call("vram-estimate", CONFIG).out


@pytest.mark.parametrize("free", [None, 0], ids=["refuses", "zero"])
def test_a_card_that_does_not_say_its_memory_is_unknown(
    monkeypatch: pytest.MonkeyPatch, free: int | None
) -> None:
    install(monkeypatch, Card("GPU-new", "NVIDIA Novelty", (13, 0), free, total=0))
    result = call("vram-estimate", CONFIG)
    assert result.code == 0, result.err
    assert "pretrain-350m on NVIDIA Novelty, memory unknown to the driver" in result.out
    assert "no capacity known; give --gpu NAME or --vram 24GiB" in result.out


def test_no_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, A, driver=0)
    assert installed_gpu() is None
    assert devices.this_machine("auto").device == "cpu"
    hardware = devices.this_machine("cuda")
    assert (hardware.capacity_bytes, hardware.description) == (None, "CUDA, no GPU found")


@pytest.mark.parametrize(
    ("cards", "visible", "says"),
    [
        ([A, B], "", "CUDA_VISIBLE_DEVICES='' leaves none of 2"),
        ([A, B], "-1", "CUDA_VISIBLE_DEVICES='-1' leaves none of 2; `nvidia-smi -L` lists them"),
        ([A, B], "GPU-zzzz", "CUDA_VISIBLE_DEVICES='GPU-zzzz' leaves none of 2"),
        ([_h100(None)], None, "in MIG mode without an instance"),
        ([], None, "no GPU found"),
        ([Card("GPU-lost", failure=LOST)], None, "no GPU found"),
    ],
)
def test_why_there_is_no_gpu(
    monkeypatch: pytest.MonkeyPatch, cards: list[Card], visible: str | None, says: str
) -> None:
    library = install(monkeypatch, *cards, visible=visible)
    result = call("vram-estimate", CONFIG)
    assert result.code == 0, result.err
    assert says in result.out
    assert "Unknown: " in result.out
    assert library.closed


# Who holds the rest

OWN = os.getpid()
NAMES = {4711: "/usr/bin/python -m train --secret", 1200: "/usr/lib/xorg/Xorg", OWN: "albor"}


def _held(monkeypatch: pytest.MonkeyPatch, card: Card, **keywords: Any) -> list[tuple[Any, Any, Any]]:
    """(pid, name, MiB) of those that hold memory of the card."""
    install(monkeypatch, card, names=NAMES, **keywords)
    hardware = installed_gpu()
    assert hardware is not None
    return [
        (holder.pid, holder.name, None if holder.memory_bytes is None else holder.memory_bytes // MIB)
        for holder in hardware.holders
    ]


def test_holders_are_named_and_this_process_is_none_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    card = Card(
        "GPU-aaaa-1",
        free=3000,  # and 484 are reserved: 21080 in use
        computing=((4711, 19000), (OWN, 500), (1200, 300)),
        drawing=((1200, 300), (77, 100)),
    )
    assert _held(monkeypatch, card) == [
        (4711, "python", 19000),
        (None, None, 21080 - 19000 - 500 - 300 - 100),
        (1200, "Xorg", 300),
        (77, None, 100),
    ]


def test_an_idle_card_is_held_by_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    assert _held(monkeypatch, Card("GPU-aaaa-1", free=24564 - 484 - 80)) == [], "80 MiB are the driver's"


@pytest.mark.parametrize(
    ("computing", "drawing"), [((), ()), (None, None)], ids=["another container", "no permission"]
)
def test_hidden_programs_are_known_as_a_whole(
    monkeypatch: pytest.MonkeyPatch, computing: Any, drawing: Any
) -> None:
    card = Card("GPU-aaaa-1", free=20000, computing=computing, drawing=drawing)
    assert _held(monkeypatch, card) == [(None, None, 4080)]


def test_wsl_gives_no_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    assert _held(monkeypatch, Card("GPU-aaaa-1", free=20000, computing=((4711, None),))) == [
        (None, None, 4080),
        (4711, "python", None),
    ]
    out = call("vram-estimate", CONFIG).out
    assert (
        "Held     3.98 GiB by others: programs that the driver does not tell apart 3.98 GiB, "
        "python (pid 4711), its size not said" in out
    )


def test_an_instance_has_its_own_holders(monkeypatch: pytest.MonkeyPatch) -> None:
    instance = replace(SMALL, free=4000, computing=((4711, 5500),))
    card = replace(_h100(instance), computing=((5, 70000),))
    assert _held(monkeypatch, card) == [(4711, "python", 5500)]


def test_where_cuda_chooses_nobody_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    assert _held(monkeypatch, replace(A, computing=((4711, 4080),))) == [(4711, "python", 4080)]
    install(monkeypatch, replace(A, computing=((4711, 4080),)), SLOW, names=NAMES)
    hardware = installed_gpu()
    assert hardware is not None
    assert hardware.holders == ()


FULL = Card("GPU-aaaa-1", free=3000, computing=((4711, 21080),))
HELD = "20.59 GiB by others: python (pid 4711) 20.59 GiB; without them it would fit"


def test_a_refusal_says_who_holds_the_missing_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, FULL, names=NAMES)
    result = call("vram-estimate", CONFIG)
    assert result.code == 4
    assert f"Held     {HELD}\n" in result.out
    assert "secret" not in result.out
    answer = json.loads(call("vram-estimate", CONFIG, "--json").out)
    assert answer["holders"] == [{"pid": 4711, "name": "python", "bytes": 21080 * MIB}]
    assert (answer["capacity_bytes"], answer["capacity_source"]) == (3000 * MIB, "NVML")
    assert "Capacity" not in result.out, "it is measured"

    result = call("train", CONFIG, "device=cuda")
    assert (result.code, result.out) == (4, "")
    assert f"Held: {HELD}.\n" in result.err


def test_holders_that_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not for a card that is only named, and not as the reason where the run is too large anyway."""
    install(monkeypatch, FULL, names=NAMES)
    assert "Held" not in call("vram-estimate", CONFIG, "--gpu", "RTX 4090").out
    out = call("vram-estimate", CONFIG, "train.micro_batch_size=64").out
    assert "python (pid 4711) 20.59 GiB; without them it would not fit either" in out
    install(monkeypatch, replace(FULL, free=20000, computing=((4711, 4080),)), names=NAMES)
    out = call("vram-estimate", CONFIG).out
    assert "Held     3.98 GiB by others: python (pid 4711) 3.98 GiB\n" in out


def test_a_crowd_is_added_up(monkeypatch: pytest.MonkeyPatch) -> None:
    crowd = tuple((pid, 100) for pid in range(10, 18))
    install(monkeypatch, Card("GPU-aaaa-1", free=24564 - 484 - 800, computing=crowd))
    hardware = installed_gpu()
    assert hardware is not None
    assert hardware.held is not None
    assert hardware.held.endswith("name hidden (pid 14) 100.0 MiB, 3 more 0.29 GiB")
