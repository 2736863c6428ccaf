"""What a benchmark is asked to do, in which order it does it, and what it keeps of each run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from albor.bench.cases import Case

OWN, REFERENCE = "albor", "reference"
PROFILE_STEPS = 4  # of a run that is profiled; the last is the one that counts
PROFILED = 0  # the number of that run, which is not timed
KINDS = ("GEMM", "attention", "memory and arithmetic", "copies")  # of what a step's time goes to
CALIBRATE_AGAIN = 3  # exit code of a calibration that must go on in another process


@dataclass(frozen=True)
class Options:
    """What is to be run, and for how long."""

    cases: tuple[Case, ...]
    peers: tuple[str, ...]
    out: Path
    device: Literal["cuda", "cpu"]
    dtype: str
    warmup: int  # steps of each run that do not count
    steps: int  # steps that do
    rounds: int = 1
    reference_steps: int = 20  # whose losses are compared with the reference's; it is slow
    profiled: tuple[str, ...] = ()  # systems of which one step is profiled too
    time_limit: float | None = None  # seconds after which everything has ended
    run_timeout: float = 600.0  # seconds after which one system's run is ended
    calibrate: bool = True
    systems: bool = True  # False: calibrate only
    compile_backend: str = "inductor"
    command: str = ""


@dataclass
class Run:
    """One system's run of one case."""

    case: str
    peer: str
    number: int  # counted from 1; PROFILED is the run whose last step was profiled
    fingerprint: str
    date: str
    commit: str | None
    status: Literal["ok", "failed", "timed out", "not installed"]
    error: str | None
    cold: bool  # its compilation caches were empty
    first_step_seconds: float | None  # from the start of the process to the end of its first step
    wall_seconds: float
    losses: list[float]
    norms: list[float | None]  # of the gradient before clipping; None where the system does not say
    seconds: list[float]  # of each step
    memory: dict[str, int | None]
    gpu: dict[str, Any]
    notes: dict[str, Any]
    profile: dict[str, Any] | None  # `albor.bench.profile`


def turns(options: Options) -> list[tuple[str, int]]:
    """(system, number of its run) in the order in which they run."""
    counts: dict[str, int] = {}
    found = []
    for peer in order(options.peers, options.rounds):
        counts[peer] = counts.get(peer, 0) + 1
        found.append((peer, counts[peer]))
    return found + [(peer, PROFILED) for peer in options.profiled]


def order(peers: tuple[str, ...], rounds: int) -> list[str]:
    """Who runs when. albor comes back after every second peer, so each stands right beside a run of albor,
    and how far albor's own runs lie apart shows what the machine did in the meantime. The reference is timed
    against no one, and comes last.
    """
    others = [peer for peer in peers if peer not in (OWN, REFERENCE)]
    turns: list[str] = []
    for _ in range(rounds):
        for index, peer in enumerate(others):
            turns += [OWN, peer] if index % 2 == 0 and OWN in peers else [peer]
    turns += [OWN] * (1 if others else rounds) if OWN in peers else []
    return turns + ([REFERENCE] if REFERENCE in peers else [])
