"""One thread for the arithmetic of every test, subprocesses included: the models are tiny, the bits do not
depend on the machine's cores, and a busy neighbour does not stall each small operation at its barrier.

Hypothesis tries the same examples everywhere. Without a GPU, Triton's interpreter runs the kernels; it must
be asked for before a kernel is defined.
"""

import os

os.environ["OMP_NUM_THREADS"] = "1"

import hypothesis
import torch

hypothesis.settings.register_profile("albor", derandomize=True, database=None)
hypothesis.settings.load_profile("albor")
torch.set_num_threads(1)
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
