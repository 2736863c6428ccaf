"""configs/ladder-cpu.yaml, as people use it: three rungs, really trained, and every gate really passed. Alone
in its file, because it takes longer than any other test and is scheduled by files."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

import pytest
from run_cases import ENVIRONMENT, Result, start

from albor.ladder.file import GATES

ROOT = Path(__file__).parents[1]
_LONGEST = 480  # seconds; on two quiet cores it takes a fifth of that


def ladder(directory: Path, *arguments: str) -> Result:
    environment = {**ENVIRONMENT, "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
    process = start(directory, "ladder", ROOT / "configs" / "ladder-cpu.yaml", *arguments, env=environment)
    out, err = process.communicate(timeout=_LONGEST)
    return Result(process.returncode, out, err)


@pytest.mark.slow
def test_the_shipped_ladder_for_a_cpu(tmp_path: Path):
    """Interrupted once on its way, for that is how long ladders are gone up."""
    command = ["ladder", ROOT / "configs" / "ladder-cpu.yaml"]
    first = start(tmp_path, *command, env={**ENVIRONMENT, "OMP_NUM_THREADS": "1"}, start_new_session=True)
    trained = tmp_path / "runs" / "ladder-cpu" / "small" / "checkpoints" / "step-00000400"
    end = time.monotonic() + _LONGEST
    while not trained.is_dir():
        assert first.poll() is None, first.communicate()[1]
        assert time.monotonic() < end
        time.sleep(0.1)
    os.killpg(first.pid, signal.SIGKILL)
    first.communicate()

    result = ladder(tmp_path)
    assert result.code == 0, result.err + result.out[-3000:]
    directory = tmp_path / "runs" / "ladder-cpu"
    assert "small: canary" not in result.out, "what had passed was judged again"
    assert "resumed" in (directory / "small" / "events.jsonl").read_text()

    done = ladder(tmp_path, "--json")
    assert done.code == 0
    content = json.loads(done.out)
    assert content["passed"] is True
    assert [rung["name"] for rung in content["rungs"]] == ["small", "medium", "large"]
    for rung in content["rungs"]:
        judged = {gate["gate"]: gate["status"] for gate in rung["gates"]}
        assert set(judged) == set(GATES)
        left_out = {name for name, status in judged.items() if status != "passed"}
        wanted = {"small": set(), "medium": {"verify_resume", "export"}, "large": {"verify_resume"}}
        assert left_out == wanted[rung["name"]], judged
        assert rung["result"]["loss"] < rung["baselines"]["bigram"] < rung["baselines"]["unigram"]
        line = f"{rung['name']}  "
        assert f"{rung['result']['loss']:.3f}" in next(
            x for x in result.out.splitlines() if x.startswith(line)
        )
    losses = [rung["result"]["loss"] for rung in content["rungs"]]
    assert losses[2] == min(losses), "the largest rung has learnt the most"
    large = content["rungs"][2]
    assert large["prediction"]["runs"] == 2
    compared = large["comparison"]
    assert (compared["loss"], compared["low"]) == (losses[2], large["prediction"]["low"])
    assert abs(compared["off"]) < 0.1 * losses[2], "two rungs say something of the third"
    assert "| large | bigram | passed |" in (directory / "ladder.md").read_text()
    assert not list(directory.glob(".ladder-*")), "temporary directories are left"
