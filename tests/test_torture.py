"""benchmarks/torture.py: a little of it, that it can fail, and that its table is the committed record's."""

from __future__ import annotations

import json
import random
import signal
import sys
from pathlib import Path

import pytest
from checkpoint_cases import save_step

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

import torture  # noqa: E402  (which stands beside no test)
from fault_cases import Bench, Server, directory_of_runs, write_project  # noqa: E402

from albor import faults  # noqa: E402


def test_a_little_of_it():
    with Server() as server, directory_of_runs() as directory:
        bench = Bench(server, directory)
        parts = {
            "kills": torture.torture_by_kills(bench, seed=1, kills=1),
            "damages": torture.torture_by_damage(bench, seed=1, damages=torture.RUN_EVERY),
            "power_cuts": torture.torture_by_power_cuts(seed=1, scenes=1),
        }
        assert [tally.failures for tally in parts.values()] == [[], [], []]
        assert parts["kills"].counts["kills"] >= 1
        assert parts["damages"].counts["whole runs"] == 1
        assert parts["power_cuts"].counts["states of the disk"] > 3
        record = {"machine": torture.describe(), "seed": 1, **{k: v.as_json() for k, v in parts.items()}}
        assert torture.table(record).count(" | 0 | ") == 3

        # What was done to a run and left no trace is no success.
        train = bench.train
        bench.train = lambda *arguments, **keywords: train(*arguments, **{**keywords, "fault": ""})
        (failure,) = torture.torture_by_kills(bench, seed=1, kills=0, only=0).failures
        assert ": ended with 0:" in failure
        bench.train = train

        # The first of these lives, where the oracle expects something else.
        bench.expected["plain"]["consumed"][1, 1] = {"no such data"}
        (failure,) = torture.torture_by_kills(bench, seed=1, kills=0, only=0).failures
        assert failure.startswith("--seed 1 --life 0: ")


def test_signals_that_a_shell_has_had_ignored_arrive():
    """Started in the background, or by nohup, the server would otherwise run what ignores them too."""
    previous = [(number, signal.signal(number, signal.SIG_IGN)) for number in (signal.SIGINT, signal.SIGHUP)]
    try:
        with Server() as server, directory_of_runs() as directory:
            config = write_project(directory)
            for action in ("int", "hup"):
                fault = f"step.begin:2:{action}"
                assert server.run(directory / action, "train", config, fault=fault).code == 75
    finally:
        for number, handler in previous:
            signal.signal(number, handler)


def test_a_life_is_the_same_again():
    points: list[torture.Point] = [("step.begin", step) for step in range(1, 25)]
    points += [("save.tensors", 6)] * 2
    preparing: list[torture.Point] = [("shard.write", None)] * 9

    def draw(kept: int, own_data: bool) -> list[tuple[str, str]]:
        data = preparing if own_data else []
        return [torture._draw_point(random.Random(seed), points, kept, data) for seed in range(300)]

    drawn = draw(0, True)
    assert drawn == draw(0, True)
    assert {point for point, _ in drawn} == {"step.begin", "save.tensors", "shard.write"}
    assert {when for point, when in drawn if point == "save.tensors"} == {"6.1", "6.2"}
    assert {when for point, when in drawn if point == "shard.write"} == {f".{n}" for n in range(1, 10)}
    later = draw(20, False)
    assert {when for point, when in later if point == "step.begin"} == {"21.1", "22.1", "23.1", "24.1"}
    assert {point for point, _ in later} == {"step.begin", "load.begin", "load.filled"}


def test_every_way_of_damage_is_drawn_and_is_one():
    content, rng = bytes(range(256)) * 40, random.Random(0)
    drawn = [torture.damage(rng, content) for _ in range(500)]
    assert {kind for kind, _ in drawn} == {
        "a flipped bit", "a zeroed page", "cut off", "longer", "a byte less", "two bytes swapped",
    }  # fmt: skip
    assert sum(changed == content for _, changed in drawn) < 5


def test_damage_that_is_not_found_is_a_failure(tmp_path: Path):
    for step in (1, 2):
        save_step(tmp_path, step)
    with pytest.raises(AssertionError, match="found is nothing"):
        torture.check_damage(tmp_path, "weights.safetensors")
    path = tmp_path / "step-00000002" / "weights.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    torture.check_damage(tmp_path, "weights.safetensors")
    with pytest.raises(AssertionError, match=r"found is .*weights\.safetensors"):
        torture.check_damage(tmp_path, "optimizer.safetensors")


def test_what_has_a_last_word_is_no_kill(monkeypatch: pytest.MonkeyPatch):
    """Errors, and signals that are heeded, leave as many kills to be done as before."""
    begun = []

    def live(bench: Bench, seed: int, number: int, tally: torture.Tally) -> None:
        begun.append(number)
        action = ("term", "raise", "kill", "exit")[number % 4]
        tally.add(f"by {action}", "kills" if action in torture.KILLS else "other ends")

    monkeypatch.setattr(torture, "live", live)
    tally = torture.torture_by_kills(None, seed=0, kills=6)  # type: ignore[arg-type]
    assert len(begun) == 12
    record = json.loads(torture.RECORD.read_text(encoding="utf-8")) | {"kills": tally.as_json()}
    said = "6 random kills (3 kill, 3 exit), and 6 other ends (3 raise, 3 term), in 0 runs"
    assert said in torture.table(record)


def test_the_table_on_the_page_is_the_committed_record():
    record = json.loads(torture.RECORD.read_text(encoding="utf-8"))
    page = torture.PAGE.read_text(encoding="utf-8")
    assert f"{torture.BEGIN}\n{torture.table(record)}\n{torture.END}" in page
    kills = record["kills"]["counts"]
    assert kills["by kill"] + kills["by exit"] >= 500
    assert {name for name in kills if name.startswith("at ")} >= {f"at {point}" for point in faults.POINTS}
    assert record["damages"]["counts"]["damages"] >= 1000
    assert not any(record[part]["failures"] for part in ("kills", "damages", "power_cuts"))
