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


def main() -> int:
    """Runs the peer; 0 where it went through all steps."""
    name, path = sys.argv[1:]
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    import torch

    from albor.bench.floor import SDPA_BACKENDS
    from albor.bench.peers import PEERS
    from albor.bench.recorder import Recorder
    from albor.bench.workload import Spec

    spec = Spec.from_json(json.loads(Path(path).read_text(encoding="utf-8")))
    recorder = Recorder(spec.device, out)
    try:
        if spec.attention is not None:
            for backend in SDPA_BACKENDS:  # the math backend stays on, for shapes that this one refuses
                getattr(torch.backends.cuda, f"enable_{backend}_sdp")(backend == spec.attention)
        PEERS[name](spec, recorder)
        recorder.finish()
    except Exception as error:
        traceback.print_exc()
        recorder.emit("failed", error=_explain(error))
        return 1
    return 0


def _explain(error: Exception) -> str:
    if isinstance(error, ModuleNotFoundError):
        return f"{error.name} is not installed; pip install 'albor[bench]'"
    first = next(iter(str(error).strip().splitlines()), "")
    return f"{type(error).__name__}: {first}"


if __name__ == "__main__":
    sys.exit(main())
