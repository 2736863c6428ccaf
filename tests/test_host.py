"""What this host has: memory for a new process within its control group, and bf16 instructions."""

from __future__ import annotations

from pathlib import Path

import pytest

from albor.memory.host import host_capacity
from albor.units import GIB


def _write(root: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


MEMINFO = {"proc/meminfo": "MemTotal: 16777216 kB\nMemAvailable:    8388608 kB\n"}


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, 8 * GIB),
        (
            {  # version 2: the limit of a parent holds, and cached files can go
                "proc/self/cgroup": "0::/user/job\n",
                "cg/user/job/memory.max": "max\n",
                "cg/user/memory.max": f"{4 * GIB}\n",
                "cg/user/memory.current": f"{3 * GIB}\n",
                "cg/user/memory.stat": f"anon 5\ninactive_file {1 * GIB}\n",
            },
            2 * GIB,
        ),
        (
            {  # version 1, in a container whose path is the host's
                "proc/self/cgroup": "4:memory:/docker/abc\n2:cpu:/\n",
                "cg/memory/memory.limit_in_bytes": f"{2 * GIB}\n",
                "cg/memory/memory.usage_in_bytes": f"{1 * GIB}\n",
            },
            1 * GIB,
        ),
        (
            {  # no limit, as version 1 writes it
                "proc/self/cgroup": "4:memory:/\n",
                "cg/memory/memory.limit_in_bytes": "9223372036854771712\n",
                "cg/memory/memory.usage_in_bytes": "5\n",
            },
            8 * GIB,
        ),
    ],
)
def test_host_capacity(tmp_path: Path, files: dict[str, str], expected: int) -> None:
    _write(tmp_path, MEMINFO | files)
    assert host_capacity(tmp_path / "proc", tmp_path / "cg") == expected


def test_host_capacity_unknown(tmp_path: Path) -> None:
    assert host_capacity(tmp_path / "proc", tmp_path / "cg") is None
