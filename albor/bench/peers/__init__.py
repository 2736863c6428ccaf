"""The systems that are compared, by name. Each trains a Spec's model on its tokens, and tells a Recorder."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from albor.bench.recorder import Recorder
    from albor.bench.workload import Spec

Peer = Callable[["Spec", "Recorder"], None]


def _peer(module: str, **options: Any) -> Peer:
    # Imported when it runs: a system pays for its own libraries only, in time and memory.
    def run(spec: Spec, recorder: Recorder) -> None:
        import_module(f"albor.bench.peers.{module}").train(spec, recorder, **options)

    return run


_plain = partial(_peer, "plain")
_hf = partial(_peer, "huggingface")
PEERS: dict[str, Peer] = {
    "albor": _peer("own"),
    "albor-host": _peer("own", accumulator="cpu"),
    "hf": _hf(),
    "hf-compile": _hf(compiled=True),
    "hf-liger": _hf(liger=True),
    "torch-compile": _plain(),
    "torch-chunked": _plain(head_chunk=8192),
    "torch-graphs": _plain(mode="reduce-overhead"),
    "torch-autotune": _plain(mode="max-autotune-no-cudagraphs"),
    "torch-autocast": _plain(autocast=True),
    "litgpt": _peer("litgpt"),
    "reference": _plain(reference=True),
}
# What a reader of the results is told each one is.
TITLES = {
    "albor": "albor",
    "albor-host": "albor, gradients summed in host memory",
    "hf": "HF Trainer",
    "hf-compile": "HF Trainer + torch.compile",
    "hf-liger": "HF Trainer + Liger",
    "torch-compile": "plain torch loop, torch.compile",
    "torch-chunked": "plain torch loop, torch.compile, chunked loss",
    "torch-graphs": "plain torch loop, torch.compile, CUDA graphs",
    "torch-autotune": "plain torch loop, torch.compile max-autotune",
    "torch-autocast": "plain torch loop, torch.compile, autocast",
    "litgpt": "litgpt, torch.compile",
    "reference": "plain torch, fp32, eager",
}
# What each needs beyond torch, as packages are called.
_TRANSFORMERS = ("transformers", "accelerate")
LIBRARIES = {
    "hf": _TRANSFORMERS,
    "hf-compile": _TRANSFORMERS,
    "hf-liger": (*_TRANSFORMERS, "liger-kernel"),
    "litgpt": ("litgpt", "lightning"),
}
DEFAULT = ("albor", "hf", "hf-compile", "hf-liger", "torch-compile", "litgpt", "reference")
