"""A pynvml without a driver: cards, instances of cards in MIG mode, and who holds their memory."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest

from albor.units import MIB


class NVMLError(Exception):
    def __init__(self, value: int):
        super().__init__(value)
        self.value = value


NO_PERMISSION, NOT_SUPPORTED, NOT_FOUND, LOST = 4, 3, 6, 15


@dataclass(frozen=True)
class Card:
    """A card, or an instance of one; its own handle."""

    uuid: str
    name: str = "NVIDIA GeForce RTX 4090"
    capability: tuple[int, int] = (8, 9)
    free: int | None = 20000  # MiB; None: shares the host's memory
    total: int = 24564
    slots: tuple[Card | None, ...] | None = None  # None: cannot be sliced
    ids: tuple[int, int] = (0, 0)  # of the GPU instance and the compute instance
    failure: int | None = None
    computing: tuple[tuple[int, int | None], ...] | None = ()  # (pid, MiB or not said); None: refused
    drawing: tuple[tuple[int, int | None], ...] | None = ()


class FakeNvml:
    """Cards as pynvml shows them."""

    NVMLError = NVMLError
    NVML_ERROR_NO_PERMISSION = NO_PERMISSION
    nvmlMemory_v2 = 2

    def __init__(self, cards: Sequence[Card], *, driver: int = 580, names: Mapping[int, str] | None = None):
        self.cards, self.driver, self.names, self.closed = cards, driver, names or {}, False

    def nvmlInit(self) -> None:
        if not self.driver:
            raise NVMLError(12)

    def nvmlShutdown(self) -> None:
        self.closed = True

    def nvmlDeviceGetCount(self) -> int:
        return len(self.cards)

    def nvmlDeviceGetHandleByIndex(self, index: int) -> Card:
        if failure := self.cards[index].failure:
            raise NVMLError(failure)
        return self.cards[index]

    def nvmlDeviceGetMigMode(self, card: Card) -> list[int]:
        if card.slots is None:
            raise NVMLError(NOT_SUPPORTED)
        return [int(card.slots != ()), 1]  # and is on after the next reset

    def nvmlDeviceGetMaxMigDeviceCount(self, card: Card) -> int:
        return len(card.slots or ())

    def nvmlDeviceGetMigDeviceHandleByIndex(self, card: Card, slot: int) -> Card:
        instance = (card.slots or ())[slot]
        if instance is None:
            raise NVMLError(NOT_FOUND)
        return instance

    def nvmlDeviceGetGpuInstanceId(self, instance: Card) -> int:
        return instance.ids[0]

    def nvmlDeviceGetComputeInstanceId(self, instance: Card) -> int:
        return instance.ids[1]

    def nvmlDeviceGetUUID(self, handle: Card) -> str:
        return handle.uuid

    def nvmlDeviceGetName(self, handle: Card) -> str:
        return handle.name

    def nvmlDeviceGetCudaComputeCapability(self, card: Card) -> list[int]:
        assert card in self.cards, "an instance is not asked: not every driver answers"
        return list(card.capability)

    def nvmlDeviceGetMemoryInfo(self, handle: Card, version: int | None = None) -> Any:
        if handle.free is None or (version is not None and self.driver < 510):
            raise NVMLError(NOT_SUPPORTED)
        known = {"total": handle.total * MIB, "free": handle.free * MIB}
        return SimpleNamespace(**known, **({} if version is None else {"reserved": 484 * MIB}))

    def nvmlDeviceGetComputeRunningProcesses(self, handle: Card) -> list[Any]:
        return _processes(handle.computing)

    def nvmlDeviceGetGraphicsRunningProcesses(self, handle: Card) -> list[Any]:
        return _processes(handle.drawing)

    def nvmlSystemGetProcessName(self, pid: int) -> str:
        if pid not in self.names:
            raise NVMLError(NOT_FOUND)
        return self.names[pid]


def _processes(listed: tuple[tuple[int, int | None], ...] | None) -> list[Any]:
    if listed is None:
        raise NVMLError(NOT_SUPPORTED)
    return [
        SimpleNamespace(pid=pid, usedGpuMemory=None if size is None else size * MIB) for pid, size in listed
    ]


def install(
    monkeypatch: pytest.MonkeyPatch,
    *cards: Card,
    visible: str | None = None,
    order: str | None = None,
    driver: int = 580,
    names: Mapping[int, str] | None = None,
) -> FakeNvml:
    """Makes the cards those of this machine, in an environment of which these variables are all of CUDA's."""
    nvml = FakeNvml(cards, driver=driver, names=names)
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    for name, value in {"CUDA_VISIBLE_DEVICES": visible, "CUDA_DEVICE_ORDER": order}.items():
        monkeypatch.delenv(name, raising=False)
        if value is not None:
            monkeypatch.setenv(name, value)
    return nvml
