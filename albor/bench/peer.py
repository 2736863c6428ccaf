"""One system in a process of its own: `python -m albor.bench.peer NAME SPEC.json`.

Standard output is JSON lines (`albor.bench.recorder`) and nothing else; what libraries print there goes to
standard error.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from pathlib import Path

from albor.parent import end_with


def main() -> int:
    """Runs the peer; 0 where it went through all steps."""
    name, path = sys.argv[1:]
    end_with(os.getppid())  # a benchmark that was killed must not go on holding the card
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    from albor.bench.peers import PEERS
    from albor.bench.recorder import Recorder
    from albor.bench.sdpa import preferring
    from albor.bench.workload import Spec

    spec = Spec.from_json(json.loads(Path(path).read_text(encoding="utf-8")))
    recorder = Recorder(spec.device, out, spec.steps if spec.profile else None)
    try:
        with preferring(spec.attention):
            PEERS[name](spec, recorder)
        recorder.finish()
    except Exception as error:
        traceback.print_exc()
        recorder.emit("failed", **_explain(error))
        return 1
    return 0


def _explain(error: Exception) -> dict[str, str | None]:
    """In a line; `missing` is the library that is not installed, if that is what is wrong."""
    if isinstance(error, ModuleNotFoundError):
        return {"missing": error.name, "error": f"{error.name}; docs/performance.md says how to get it"}
    first = next(iter(str(error).strip().splitlines()), "")
    return {"missing": None, "error": f"{type(error).__name__}: {first}"}


if __name__ == "__main__":
    sys.exit(main())
