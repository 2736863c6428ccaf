"""What a run survives, at length: random kills, damaged checkpoints, power cuts.

    python benchmarks/torture.py            # 15 to 30 minutes; writes benchmarks/results/torture.json and the
                                            # table in docs/reliability.md
    python benchmarks/torture.py --kills 20 --damages 50 --scenes 3 --no-write
    python benchmarks/torture.py --seed 7 --life 12 --no-write      # one life again, for a look at it

Kills: a life is a run of tests/fault_cases.py that is killed, told to stop or made to fail, at a random point
of albor.faults or after a random time, one to five times in a row, and then left alone. It must come to the
bits of a run that nothing happened to. Lives differ in how they train: with random rounding, with saves in
the background, with steps that are not finite and make the run go back. Only ends that leave the process no
word count as kills: SIGKILL, and an exit on the spot. Signals that are heeded and errors come on top.

Damages: one place in one file of a checkpoint is changed, at random. That must be found, and said of that
file; no tensor of it may be used; and the checkpoint before it must be taken, in some cases by a whole run.

Power cuts: tests/power_cut.py records what random saves, evaluations, removals and rollbacks do to the disk,
and makes every state in which it may be found afterwards.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import numpy as np
import torch
from fault_cases import (
    BACKGROUND,
    PLAIN,
    ROLLED_BACK,
    ROUNDED,
    STEPS,
    Bench,
    NotReached,
    Server,
    Variant,
    directory_of_runs,
    newest,
    outcome,
    reach,
    reached,
    run_of,
)
from fault_server import REACHED
from power_cut_cases import replay_random_scene
from run_cases import Result

import albor
from albor import faults
from albor.checkpoint import find_latest, list_checkpoints, load, verify
from albor.errors import DamagedCheckpoint
from albor.manifest import Manifest

ROOT = Path(__file__).parents[1]
RECORD = ROOT / "benchmarks" / "results" / "torture.json"
PAGE = ROOT / "docs" / "reliability.md"
BEGIN, END = "<!-- torture: begin -->", "<!-- torture: end -->"

VARIANTS = {PLAIN: 4, ROUNDED: 2, BACKGROUND: 2, ROLLED_BACK: 2}  # and how often they are drawn
ENDS = {"kill": -signal.SIGKILL, "exit": faults.EXIT_CODE, "raise": 1, "term": 75, "int": 75, "hup": 75}
KILLS = ("kill", "exit")  # the process has no last word
SIGNALS = {"kill": signal.SIGKILL, "term": signal.SIGTERM, "int": signal.SIGINT, "hup": signal.SIGHUP}
# At a random time the process may not have come to taking signals itself.
BEFORE = (-signal.SIGTERM, -signal.SIGINT, -signal.SIGHUP, 128 + signal.SIGINT)
MISSED = ("ended before the random time", "did not come to the point")
LONGEST_LIFE = 0.35  # seconds: about what a run takes that is left alone, on an idle machine
OWN_DATA = 0.2  # of the lives prepare their data themselves, and may be killed at that
RUN_EVERY = 25  # damages of which one is shown to a whole run


@dataclass
class Tally:
    """What happened in one part, and what should not have."""

    counts: Counter[str] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)
    seconds: float = 0.0

    def __post_init__(self) -> None:
        self._lock = threading.Lock()

    def add(self, *names: str) -> None:
        """Counts one of each; two lives do so at once."""
        with self._lock:
            self.counts.update(names)

    def as_json(self) -> dict[str, Any]:
        return {
            "counts": dict(sorted(self.counts.items())),
            "failures": self.failures,
            "seconds": round(self.seconds, 1),
        }


# Kills

Point = tuple[str, int | None]


def live(bench: Bench, seed: int, number: int, tally: Tally) -> None:
    """One life. Raises AssertionError if anything is lost or not as it would have been."""
    rng = random.Random(f"{seed}/{number}")
    variants = [variant for variant in VARIANTS if variant.name in bench.expected]
    variant = rng.choices(variants, [VARIANTS[variant] for variant in variants])[0]
    depth = rng.choices((1, 2, 3, 4, 5), (6, 1, 1, 1, 1))[0]
    directory, kept = bench.fresh(), 0
    own_data = rng.random() < OWN_DATA
    # The first undisturbed run prepared the data of all.
    preparing = [found for found in bench.points["plain"] if found[0].startswith("shard.")]
    arguments = [f"data.cache_dir={directory}/data"] if own_data else []
    for _ in range(depth):
        action = rng.choices(list(ENDS), (12, 1, 1, 4, 4, 2))[0]
        if rng.random() < 0.2 and action in SIGNALS:
            place, result = "a random time", _end_after(bench, rng, action, directory, arguments, variant)
            allowed = (ENDS[action], 0, *BEFORE)
            missed = MISSED[0]
        else:
            point, when = _draw_point(rng, bench.points[variant.name], kept, preparing if own_data else [])
            place, fault = point, f"{point}:{when}:{action}"
            (directory / REACHED).unlink(missing_ok=True)
            result = bench.train(directory, *arguments, variant=variant, fault=fault, trace=True)
            allowed = (ENDS[action],) if _was_reached(directory, point, when) else (0,)
            missed = MISSED[1]
        assert result.code in allowed, f"{place}, {action}: ended with {result.code}: {result.err[-500:]}"
        if result.code == 0:
            tally.add(missed)
            continue
        tally.add(f"at {place}", f"by {action}", "kills" if action in KILLS else "other ends")
        stands_at = newest(directory) if run_of(directory).exists() else 0
        # Going back removes what is not good; otherwise what was saved stays saved.
        assert stands_at >= kept or variant is ROLLED_BACK, (
            f"{place}, {action}: step {kept} was saved, and is gone"
        )
        kept = stands_at
    bench.finish(directory, *arguments, variant=variant)
    tally.add(f"lives: {variant.name}", f"lives: {depth} deep")


def _was_reached(directory: Path, point: str, when: str) -> bool:
    """Whether the last command in `directory` came to `point` as often as `when` says."""
    step, times = when.split(".")
    found = [other for name, other in reached(directory) if name == point]
    return sum(not step or other == int(step) for other in found) >= int(times)


def _draw_point(
    rng: random.Random, points: list[Point], kept: int, preparing: list[Point]
) -> tuple[str, str]:
    """A point that a run comes to that goes on from step `kept`, and when: as ALBOR_FAULT writes them.

    `preparing` are the points of its data, where these are its own.
    """
    ahead = [(point, step) for point, step in points if step is not None and step > kept]
    rare = {"rollback.begin", "rollback.loaded"} & {point for point, _ in ahead}
    if preparing and not kept:
        ahead += preparing
        rare = {point for point, _ in preparing}
    if kept:
        ahead += [(point, None) for point in ("load.begin", "load.filled")] * 2
    ahead = ahead or [("evaluate.begin", STEPS)]
    names = {point for point, _ in ahead}  # each is as likely as any other, but for the rarest
    point = rng.choice(sorted(rare if rare and rng.random() < 0.5 else names))
    step = rng.choice([step for candidate, step in ahead if candidate == point])
    times = sum((point, step) == other for other in ahead) if not point.startswith("load.") else 1
    return point, f"{'' if step is None else step}.{rng.randint(1, times)}"


def _end_after(
    bench: Bench, rng: random.Random, action: str, directory: Path, arguments: list[str], variant: Variant
) -> Result:
    """A run that gets a signal after a random time."""
    child = bench.start(directory, *arguments, variant=variant)
    time.sleep(rng.uniform(0, LONGEST_LIFE))
    child.send(SIGNALS[action])
    return child.wait()


def torture_by_kills(bench: Bench, seed: int, kills: int, only: int | None = None) -> Tally:
    """Lives until there were so many kills, two at a time; or `only` one."""
    tally, began = Tally(), time.monotonic()

    def attempt(number: int) -> None:
        try:
            live(bench, seed, number, tally)
        except (AssertionError, NotReached, TimeoutError) as error:
            reason = " ".join(str(error).split())[:600] or type(error).__name__
            tally.failures.append(f"--seed {seed} --life {number}: {reason}")
            print(f"FAILED {tally.failures[-1]}", flush=True)

    if only is not None:
        attempt(only)
    numbers, shown = itertools.count(), 0
    with ThreadPoolExecutor(2) as pool:
        while tally.counts["kills"] < kills:
            list(pool.map(attempt, itertools.islice(numbers, 4)))
            if tally.counts["kills"] >= shown + 25:
                shown = tally.counts["kills"]
                print(f"{shown} of {kills} kills, {len(tally.failures)} failures", flush=True)
    tally.seconds = time.monotonic() - began
    return tally


# Damages


def damage(rng: random.Random, content: bytes) -> tuple[str, bytes]:
    """Another content, and in which way it is another."""
    changed = bytearray(content)
    place = rng.randrange(len(content))
    kind = rng.choice(
        ("a flipped bit", "a zeroed page", "cut off", "longer", "a byte less", "two bytes swapped")
    )
    if kind == "a flipped bit":
        changed[place] ^= 1 << rng.randrange(8)
    elif kind == "a zeroed page":
        start = place - place % 4096
        changed[start : start + 4096] = bytes(len(changed[start : start + 4096]))
    elif kind == "cut off":
        del changed[place:]
    elif kind == "longer":
        changed += rng.randbytes(rng.randint(1, 4096))
    elif kind == "a byte less":
        del changed[place]
    else:
        other = rng.randrange(len(content))
        changed[place], changed[other] = changed[other], changed[place]
    return kind, bytes(changed)


def check_damage(checkpoints: Path, name: str) -> None:
    """The newest checkpoint, in which the file `name` is damaged, is found to be, and not used."""
    before, last = list_checkpoints(checkpoints)[-2:]
    found = ""
    try:
        verify(last)
    except DamagedCheckpoint as error:
        found = str(error)
    assert str(last / name) in found, f"found is {found or 'nothing'}"
    said: list[str] = []
    assert find_latest(checkpoints, lambda path, reason: said.append(reason)) == before
    assert len(said) == 1
    assert str(last / name) in said[0]
    tensors = _tensors_of(before)
    with suppress(DamagedCheckpoint):
        load(last, tensors)
        raise AssertionError("it was loaded")


def _tensors_of(path: Path) -> dict[str, dict[str, torch.Tensor]]:
    """Tensors to load the checkpoint at `path` into."""
    manifest = Manifest.from_bytes((path / "manifest.json").read_bytes())
    return {
        file.removesuffix(".safetensors"): {
            name: torch.empty(spec.shape, dtype=_DTYPES[spec.dtype]) for name, spec in specs.items()
        }
        for file, specs in manifest.tensors.items()
    }


_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "F64": torch.float64}


def torture_by_damage(bench: Bench, seed: int, damages: int) -> Tally:
    """Places in the files of a checkpoint, the small files as often as the large ones."""
    tally, began, rng = Tally(), time.monotonic(), random.Random(f"{seed}/damage")
    run = bench.fresh()
    stopped = bench.train(run, fault=f"step.updated:{STEPS - 1}:kill")
    reach(stopped.code == -signal.SIGKILL, stopped)
    checkpoints = run_of(run) / "checkpoints"
    last = list_checkpoints(checkpoints)[-1]
    whole = {path.name: path.read_bytes() for path in sorted(last.iterdir())}
    done = 0
    while done < damages:
        name = rng.choice(sorted(whole))
        kind, content = damage(rng, whole[name])
        if content == whole[name]:
            continue  # zeros were zeros, or equal bytes changed places
        done += 1
        (last / name).write_bytes(content)
        tally.counts[kind] += 1
        tally.counts[name] += 1
        try:
            check_damage(checkpoints, name)
            if done % RUN_EVERY == 0:
                _check_run(bench, run, str(last.relative_to(run) / name))
                tally.counts["whole runs"] += 1
        except AssertionError as error:
            tally.failures.append(f"--seed {seed}, damage {done} ({kind} in {name}): {error}")
            print(f"FAILED {tally.failures[-1]}", flush=True)
        (last / name).write_bytes(whole[name])
        if done % 200 == 0:
            print(f"{done} of {damages} damages, {len(tally.failures)} failures", flush=True)
    tally.counts["damages"] = done
    tally.seconds = time.monotonic() - began
    return tally


def _check_run(bench: Bench, damaged: Path, file: str) -> None:
    """A run says which file is damaged, goes on from the checkpoint before, and ends as it would have."""
    directory = bench.fresh()
    subprocess.run(["cp", "-r", str(damaged), str(directory)], check=True)
    result = bench.train(directory)
    assert result.code == 0, result.err
    assert file in result.out.replace("\n", ""), "the run does not name the file"
    assert outcome(directory) == bench.expected["plain"], "the run ended otherwise"


# Power cuts


def torture_by_power_cuts(seed: int, scenes: int) -> Tally:
    """Random scenes, every state of each."""
    tally, began = Tally(), time.monotonic()
    for number in range(scenes):
        with tempfile.TemporaryDirectory(prefix="albor-") as directory:
            try:
                tally.counts["states of the disk"] += replay_random_scene(
                    Path(directory, "root"), seed * 1_000_000 + number
                )
            except AssertionError as error:
                tally.failures.append(f"scene {seed * 1_000_000 + number}: {error}")
                print(f"FAILED {tally.failures[-1]}", flush=True)
        tally.counts["scenes"] += 1
        if (number + 1) % 50 == 0:
            print(f"{number + 1} of {scenes} scenes, {len(tally.failures)} failures", flush=True)
    tally.seconds = time.monotonic() - began
    return tally


# The record


def describe() -> dict[str, Any]:
    """When, with what and on what."""

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True).stdout.strip()

    return {
        "date": datetime.now(UTC).isoformat("T", "minutes"),
        "commit": git("rev-parse", "HEAD") or None,
        "changed": sorted(
            line[3:] for line in git("status", "--porcelain", "--", "albor", "kernels").splitlines()
        ),
        "albor": albor.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "system": platform.platform(),
        "processor": next(_processor(), platform.machine()),
        "cores": len(os.sched_getaffinity(0)),
    }


def _processor() -> Iterator[str]:
    with suppress(OSError), open("/proc/cpuinfo") as file:
        yield from (line.split(":", 1)[1].strip() for line in file if line.startswith("model name"))


def table(record: dict[str, Any]) -> str:
    """The record as Markdown."""
    kills, damages, cuts = (Counter(record[part]["counts"]) for part in ("kills", "damages", "power_cuts"))
    lives = sum(count for name, count in kills.items() if name.startswith("lives:") and "deep" not in name)

    def count(what: str, actions: Iterable[str]) -> str:
        of = {action: kills[f"by {action}"] for action in actions}
        each = ", ".join(f"{number} {action}" for action, number in of.items() if number)
        return f"{sum(of.values())} {what} ({each})"

    others = [action for action in ENDS if action not in KILLS]
    ends = f"{count('random kills', KILLS)}, and {count('other ends', others)}, in {lives} runs"
    points = sum(name.startswith("at ") and name != "at a random time" for name in kills)
    missed = sum(kills[name] for name in MISSED)
    besides = f"; {missed} more were meant, and the run had ended" if missed else ""
    rows = [
        (
            f"{ends}, at {points} of the {len(faults.POINTS)} points and at random times{besides}",
            "the bits of an undisturbed run",
            record["kills"],
        ),
        (
            f"{damages['damages']} damaged places in the files of a checkpoint",
            f"found and named, the one before taken ({damages['whole runs']} of them by a whole run)",
            record["damages"],
        ),
        (
            f"power cuts: {cuts['states of the disk']:,} states of the disk in {cuts['scenes']} scenes",
            "the newest checkpoint that can be found is whole, and none is lost",
            record["power_cuts"],
        ),
    ]
    lines = ["| what was done | what must be | failures | seconds |", "|---|---|---|---|"]
    lines += [
        f"| {done} | {must} | {len(part['failures'])} | {part['seconds']:.0f} |" for done, must, part in rows
    ]
    place = record["machine"]
    commit = (place["commit"] or "unknown")[:10] + (" and changes" if place["changed"] else "")
    lines += [
        "",
        f"{place['date'][:10]}, commit {commit}, seed {record['seed']}; Python {place['python']}, PyTorch "
        f"{place['torch']}; {place['processor']}, {place['cores']} cores.",
    ]
    return "\n".join(lines)


def write_page(text: str) -> None:
    """Puts the table between its marks."""
    page = PAGE.read_text(encoding="utf-8")
    before, rest = page.split(BEGIN)
    _, after = rest.split(END)
    PAGE.write_text(f"{before}{BEGIN}\n{text}\n{END}{after}", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kills", type=int, default=500)
    parser.add_argument("--damages", type=int, default=1000)
    parser.add_argument("--scenes", type=int, default=300, help="of power cuts")
    parser.add_argument("--life", type=int, help="only this life of --seed")
    parser.add_argument("--no-write", action="store_true", help="print the table, and leave record and page")
    options = parser.parse_args()
    torch.set_num_threads(1)
    record = {"machine": describe(), "seed": options.seed}
    with Server() as server, directory_of_runs() as directory:
        bench = Bench(server, directory, tuple(VARIANTS))
        if options.life is not None:
            tally = torture_by_kills(bench, options.seed, 0, options.life)
            print(json.dumps(tally.as_json(), indent=1))
            sys.exit(bool(tally.failures))
        record["kills"] = torture_by_kills(bench, options.seed, options.kills).as_json()
        record["damages"] = torture_by_damage(bench, options.seed, options.damages).as_json()
    record["power_cuts"] = torture_by_power_cuts(options.seed, options.scenes).as_json()
    print(table(record))
    if not options.no_write:
        RECORD.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        write_page(table(record))
    sys.exit(any(record[part]["failures"] for part in ("kills", "damages", "power_cuts")))


if __name__ == "__main__":
    main()
