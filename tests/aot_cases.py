"""What tests/test_aot.py checks, run in a process of its own: under TRITON_INTERPRET nothing can be compiled.

python tests/aot_cases.py     # prints one JSON object
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
import triton
import triton.language as tl
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from albor.errors import AlborError
from albor.kernels.launches import for_capability, precompile, record
from albor.kernels.target import target_of
from albor.train import rehearsal

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import aot


@triton.jit
def add_one(x, out, n, stride, bias, BLOCK: tl.constexpr):
    offset = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(x + offset * stride, mask=offset < n)
    if bias is not None:
        value += tl.load(bias)
    tl.store(out + offset, value + 1, mask=offset < n)


@triton.jit
def multiply(a, b, out, K, M: tl.constexpr, N: tl.constexpr, BLOCK: tl.constexpr):
    """out (M, N) = a (M, K) @ b (K, N), all of it by one program."""
    row, column, inner = tl.arange(0, M), tl.arange(0, N), tl.arange(0, BLOCK)
    total = tl.zeros((M, N), tl.float32)
    for start in range(0, K, BLOCK):
        left = tl.load(a + row[:, None] * K + (start + inner)[None, :])
        right = tl.load(b + (start + inner)[:, None] * N + column[None, :])
        total = tl.dot(left, right, total, input_precision="ieee")
    tl.store(out + row[:, None] * N + column[None, :], total)


@triton.jit
def multiply_twice(a, b, out, wide, SIZE: tl.constexpr):
    """One product on tensor cores, and one beside them."""
    at = tl.arange(0, SIZE)[:, None] * SIZE + tl.arange(0, SIZE)[None, :]
    product = tl.dot(tl.load(a + at), tl.load(b + at))
    tl.store(out + at, tl.dot(product, tl.load(wide + at), input_precision="ieee"))


def meta(dtype: torch.dtype) -> torch.Tensor:
    """A megabyte that does not exist."""
    return torch.empty(1 << 20, dtype=torch.uint8, device="meta").view(dtype)


def launches() -> list[dict[str, Any]]:
    """What is recorded of launches that differ in what Triton specialises on."""
    x = meta(torch.bfloat16)
    with record(89) as recorded:
        for grid in ((4,), (4,), (2, 3)):
            add_one[grid](x[:512], x[512:1024], 512, 1, None, BLOCK=128)
        add_one[lambda constants: (1024 // constants["BLOCK"],)](
            x, x[1:], 511, 2, x[8:], BLOCK=256, num_warps=2
        )
        add_one[(1,)](x.float(), x, 1, 2**40, None, BLOCK=128, enable_fp_fusion=False)
        assert target_of(x).capability == 89
    return [
        {
            "name": launch.name, "arguments": launch.arguments, "constants": launch.constants,
            "options": launch.options, "capability": launch.capability, "grids": sorted(grids),
        }
        for launch, grids in recorded.items()
    ]  # fmt: skip


def restored() -> bool:
    """Whether Triton is as it was after a recording that failed."""

    def state() -> list[Any]:
        return [JITFunction.run, triton.knobs.runtime.jit_cache_hook, driver._active]

    before = state()
    try:
        with record(90):
            assert state() != before
            raise KeyError("on purpose")
    except KeyError:
        return state() == before


def compilations() -> dict[str, list[bool]]:
    """Of `precompile` and of JIT calls after it: what was compiled (False), or found on disk (True)."""
    found: list[bool] = []
    x = meta(torch.bfloat16)
    arguments = (x[:512], x[512:], 512, 1, None)
    with record(90) as recorded:
        add_one[(4,)](*arguments, BLOCK=128)
        multiply[(1,)](x, x, x, 64, M=64, N=64, BLOCK=32, num_warps=4)
    result = {}
    triton.knobs.compilation.listener = lambda *, cache_hit, **_: found.append(cache_hit)

    def after(name: str) -> None:
        result[name] = list(found)
        found.clear()

    with for_capability(90):
        precompile(recorded, workers=2)
        after("precompile")
        add_one.warmup(*arguments, grid=(4,), BLOCK=128)
        multiply.warmup(x, x, x, 64, grid=(1,), M=64, N=64, BLOCK=32, num_warps=4)
        after("same process")
    with for_capability(90):  # knows nothing of the other, as a new process would
        add_one.warmup(*arguments, grid=(4,), BLOCK=128)
        multiply.warmup(x, x, x, 64, grid=(1,), M=64, N=64, BLOCK=32, num_warps=4)
        after("new process")
        add_one.warmup(x[1:], *arguments[1:], grid=(4,), BLOCK=128)
        after("other alignment")
    with for_capability(89):
        add_one.warmup(*arguments, grid=(4,), BLOCK=128)
        after("other card")
    triton.knobs.compilation.listener = None
    return result


def verdicts() -> dict[str, list[str]]:
    """What the check says of a good kernel and of bad ones."""
    half, single = meta(torch.bfloat16), meta(torch.float32)

    def verdict(capability: int, launch: Any) -> list[str]:
        with record(capability) as recorded:
            launch()
        ((only, grids),) = recorded.items()
        with for_capability(capability):
            return list(aot.examine(aot.Entry(only, grids, ["case"])).problems)

    def product(matrix: torch.Tensor, **options: int) -> Any:
        return lambda: multiply[(1,)](matrix, matrix, matrix, 1024, **options)

    small = {"M": 64, "N": 64, "BLOCK": 32, "num_warps": 4, "num_stages": 2}
    large = {"M": 128, "N": 128, "BLOCK": 64, "num_warps": 8, "num_stages": 5}
    found = {f"good {target}": verdict(target, product(half, **small)) for target in aot.TARGETS}
    found["spills"] = verdict(80, product(half, **small | {"M": 256, "N": 128}))
    found["shared on 4090"] = verdict(89, product(half, **large))
    found["shared on A100"] = verdict(80, product(half, **large))
    found["no tensor cores"] = verdict(90, product(single, **small))
    found["a dot beside"] = verdict(80, lambda: multiply_twice[(1,)](half, half, single, single, SIZE=32))
    found["grid"] = verdict(80, lambda: add_one[(1, 65536)](half, half, 512, 1, None, BLOCK=128))
    found["broken"] = verdict(80, lambda: multiply[(1,)](half, single, half, 64, M=16, N=16, BLOCK=16))
    return found


def on_gpu() -> dict[str, Any] | None:
    """On a machine with a GPU: what a real launch still compiles after `precompile`, and its result."""
    if not torch.cuda.is_available():
        return None
    major, minor = torch.cuda.get_device_capability()
    x = torch.arange(512, dtype=torch.float32, device="cuda")
    with record(10 * major + minor) as recorded:
        add_one[(4,)](x.to("meta"), x.to("meta"), 512, 1, None, BLOCK=128)
    precompile(recorded, workers=2)
    found: list[bool] = []
    triton.knobs.compilation.listener = lambda *, cache_hit, **_: found.append(cache_hit)
    out = torch.zeros_like(x)
    add_one[(4,)](x, out, 512, 1, None, BLOCK=128)
    triton.knobs.compilation.listener = None
    return {"compiled": found, "right": bool((out == x + 1).all())}


def before_the_first_step() -> dict[str, Any]:
    """What `albor train` does on CUDA, with other kernels: what it says, and how it fails."""
    x = meta(torch.bfloat16)
    with record(90) as good:
        add_one[(4,)](x[:512], x[512:], 512, 1, None, BLOCK=128)
    with record(90) as broken:
        multiply[(1,)](x, meta(torch.float32), x, 64, M=16, N=16, BLOCK=16)
    torch.cuda.get_device_capability = lambda *_: (9, 0)
    said: list[str] = []
    with for_capability(90):
        rehearsal.record_run = lambda *_: good
        rehearsal.compile_kernels(None, None, said.append)
        rehearsal.record_run = lambda *_: broken
        try:
            rehearsal.compile_kernels(None, None, said.append)
        except AlborError as error:
            return {"said": said, "error": str(error)}
    raise AssertionError("a kernel that does not compile went unnoticed")


if __name__ == "__main__":
    cases = (launches, restored, compilations, verdicts, on_gpu, before_the_first_step)
    print(json.dumps({case.__name__: case() for case in cases}))
