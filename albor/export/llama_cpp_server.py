"""llama.cpp's server for one GGUF file: `python -m albor.export.llama_cpp_server PARENT FILE`.

It says its address and version in one line, and ends with the process PARENT, or by a signal.
"""

from __future__ import annotations

import os
import signal
import sys

from albor.parent import end_with


def main() -> None:
    """Serves until it is ended. Raises what llama.cpp raises where the file cannot be loaded."""
    end_with(int(sys.argv[1]))
    import xllamacpp

    own = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # whatever llama.cpp prints is its log
    settings = xllamacpp.CommonParams()
    settings.model.path = sys.argv[2]
    settings.n_ctx = 0  # as the file says
    settings.n_parallel = 1
    settings.cpuparams.poll = settings.cpuparams_batch.poll = 0  # threads that spin hinder whatever else runs
    settings.n_gpu_layers = 0
    settings.no_op_offload = True
    settings.cache_type_k = settings.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    settings.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    settings.fit_params = False  # nothing is on a GPU
    settings.warmup = False
    settings.ui = False
    settings.verbosity = 1  # errors
    server = xllamacpp.Server(settings)
    print(server.listening_address, xllamacpp.__version__, file=own, flush=True)
    signal.pause()


if __name__ == "__main__":
    main()
