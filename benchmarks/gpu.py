"""The protocol of docs/performance.md on the GPU of this machine: calibration, then albor and its peers.

    python benchmarks/gpu.py                                  # all of it
    python benchmarks/gpu.py --models 350m --time-limit 450   # what fits into ten minutes; again to go on

Takes the options of `albor bench`, which does the work. Measured steps, logs and what is prepared lie in
runs/bench; the report is copied to benchmarks/results/gpu-CARD.json and .md, to be committed.
"""

from __future__ import annotations

import json
import re
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from albor.cli import main as albor  # noqa: E402  (a checkout need not be installed)


def main() -> None:
    out = Path("runs/bench")
    arguments = sys.argv[1:]
    if "--out" in arguments:
        out = Path(arguments[arguments.index("--out") + 1])
    else:
        arguments = [*arguments, "--out", str(out)]
    sys.argv = ["albor", "bench", *arguments]
    try:
        albor()
    except SystemExit as end:
        if end.code:
            raise
    if {"--modelled", "--help", "-h"} & set(arguments):
        return
    report = json.loads((out / "report.json").read_text(encoding="utf-8"))
    if not report["machine"]["is_gpu"]:
        sys.exit("benchmarks/gpu.py: this was a CPU; nothing is put under benchmarks/results")
    card = re.sub(r"[^a-z0-9]+", "-", report["machine"]["device"].lower()).strip("-")
    for kind in ("json", "md"):
        target = ROOT / "benchmarks" / "results" / f"gpu-{card}.{kind}"
        shutil.copyfile(out / f"report.{kind}", target)
        print(f"written to {target}", file=sys.stderr)


if __name__ == "__main__":
    main()
