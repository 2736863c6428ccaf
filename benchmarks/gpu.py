"""The protocol of docs/performance.md on the GPU of this machine: calibration, then albor and its peers.

    python benchmarks/gpu.py                                  # all of it
    python benchmarks/gpu.py --models 350m --time-limit 540   # what fits into ten minutes; again to go on

Takes the options of `albor bench`, which does the work. Measured steps, logs and what is prepared lie in
runs/bench; the report is copied to benchmarks/results/gpu-CARD.json and .md, to be committed. An interrupted
run leaves the report of what it came to.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from albor.cli import main as albor  # noqa: E402  (a checkout need not be installed)


def main() -> None:
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--out", type=Path, default=Path("runs/bench"))
    given, others = parser.parse_known_args()
    started = time.time()
    sys.argv = ["albor", "bench", *others, "--out", str(given.out)]
    try:
        albor()
    finally:
        publish(given.out, started)


def publish(folder: Path, since: float) -> None:
    """Copies the report, if it was written after `since` (a time in seconds), to benchmarks/results."""
    report = folder / "report.json"
    if not report.exists() or report.stat().st_mtime < since:
        return
    machine = json.loads(report.read_text(encoding="utf-8"))["machine"]
    if not machine["is_gpu"]:
        print("benchmarks/gpu.py: this was a CPU; nothing is put under benchmarks/results", file=sys.stderr)
        return
    card = re.sub(r"[^a-z0-9]+", "-", machine["device"].lower()).strip("-")
    for kind in ("json", "md"):
        target = ROOT / "benchmarks" / "results" / f"gpu-{card}.{kind}"
        shutil.copyfile(folder / f"report.{kind}", target)
        print(f"written to {target}", file=sys.stderr)


if __name__ == "__main__":
    main()
