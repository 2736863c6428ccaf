"""One thread for the arithmetic of every test, subprocesses included: the models are tiny, the bits do not
depend on the machine's cores, and a busy neighbour does not stall each small operation at its barrier.

Hypothesis tries the same examples everywhere. Without a GPU, Triton's interpreter runs the kernels; it must
be asked for before a kernel is defined.
"""

import os

os.environ["OMP_NUM_THREADS"] = "1"

import hypothesis
import torch

# What the machine that runs the tests was calibrated to is no part of them.
os.environ["ALBOR_CALIBRATION"] = os.path.join(os.sep, "nonexistent", "calibration.json")

hypothesis.settings.register_profile("albor", derandomize=True, database=None)
hypothesis.settings.load_profile("albor")
torch.set_num_threads(1)
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

from pathlib import Path  # noqa: E402
from typing import Any  # noqa: E402

import pytest  # noqa: E402
from run_cases import bits, call, write_project  # noqa: E402


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The configuration of a run that is small enough for a test, beside its corpus."""
    return write_project(tmp_path_factory.mktemp("project"))


@pytest.fixture(scope="module")
def whole(config: Path) -> dict[str, Any]:
    """The bits of that run, when nothing disturbs it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(config.parent)
        assert call("train", config).code == 0
    return bits(config.parent / "runs" / "tiny")
