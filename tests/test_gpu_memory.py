"""What only a GPU can show of the plan: the allocator takes what was planned and the process little else, a
run trains on a card that has just what was asked for, and the next larger one was refused rightly.

benchmarks/memory.py does the same with all shapes; these are a few of them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from test_memory_benchmark import load

from albor.memory.audit import GOAL_UNDER
from albor.memory.devices import this_machine
from albor.memory.estimate import Estimate
from albor.units import MIB

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

script = load()
CAPPED = ("10m-mb2-gpu", "10m-mb16-cpu", "wide-heads-mb2-gpu", "50m-block-gpu", "50m-background", "50m-flash")
SEGMENT = 2 * MIB  # what PyTorch's allocator takes at least


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where all of them run, so that data and kernels are made once."""
    return tmp_path_factory.mktemp("memory")


def measured(shape: Any, work: Path) -> dict[str, Any]:
    script.prepare([shape], work, print)
    row = script.measure(shape, "cuda", work, 300)
    assert row is not None, "did not end within five minutes"
    return row


@pytest.mark.parametrize("name", CAPPED)
def test_a_run_takes_what_was_planned_and_trains_with_no_more(name: str, work: Path):
    shape = next(shape for shape in script.shapes("cuda") if shape.name == name)
    row = measured(shape, work)
    assert row["status"] == "ok", row["error"]
    for record in (row["components"], row["at_the_tenth_step"]):
        for place in ("device", "pinned"):
            assert record.get(f"arena, {place}", {"residual": 0})["residual"] == 0
        assert record["allocator"]["residual"] <= SEGMENT
    assert row["measured"] - row["planned"] <= GOAL_UNDER
    if row["calibrated"]:
        assert abs(row["measured"] - row["planned"]) / row["measured"] <= script.GOAL_MAXIMUM


@pytest.mark.parametrize("gib", [4, 5.8])
def test_what_a_card_accepts_trains_on_it(gib: float, work: Path):
    accepted, refused = script.edges("cuda", this_machine("cuda"), sizes=[gib])
    row = measured(accepted, work)
    assert row["status"] == "ok", row["error"]
    assert Estimate.of(accepted.config, this_machine("cuda")).required_bytes <= accepted.capacity
    assert row["measured"] <= accepted.capacity + GOAL_UNDER
    row = measured(refused, work)
    beyond = (row["planned"] - refused.capacity) / refused.capacity
    assert row["status"] == "out of memory" or beyond <= script.GOAL_MAXIMUM, "refused, and had room"
