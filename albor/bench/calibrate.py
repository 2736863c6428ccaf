"""Times the operations that training steps are made of, on the card that is here, one after the other.

The same code runs on a CPU. Operands hold random numbers: zeros draw less power, and run faster than a model.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

from albor.bench.cases import Case
from albor.bench.protocol import CALIBRATE_AGAIN, OWN
from albor.bench.sdpa import SDPA, only
from albor.config import RunConfig
from albor.floor import Attention, Calibration, Gemm, Operation, Traffic, step_work
from albor.memory.arena import Arena
from albor.memory.plan import head_chunk_tokens, plan_training
from albor.ops import make_ops

_REPEATS = 5
_SECONDS = {"cuda": 0.03, "cpu": 0.01}  # that one repeat takes at least
_MOST_IN_GRAPH = 2000  # calls
# Bytes read and written by a copy. The largest is more than any cache, and the copies walk through memory of
# several times that, so that none finds its data where the one before left it.
_TRAFFIC = {"cuda": [2**n for n in range(20, 31)], "cpu": [2**n for n in range(16, 27, 2)]}
_LINK_BYTES = {"cuda": 2**28, "cpu": 2**24}


def operations(cases: Iterable[Case], device: str) -> list[Operation]:
    """What must be measured for the floors of `cases`, each once."""
    found: dict[Operation, None] = {}
    for case in cases:
        train = case.config.train
        chunk = head_chunk_tokens(case.config, device)
        length = case.config.data.sequence_length
        for work in step_work(case.architecture, length, train.micro_batch_size, 1, chunk):
            if not isinstance(work.operation, Traffic):
                found[work.operation] = None
    return list(found)


def calibrate(
    calibration: Calibration,
    cases: Iterable[Case],
    device: str,
    done: Callable[[str], None],
    in_time: Callable[[], bool] = lambda: True,
) -> bool:
    """Measures what `calibration` lacks, calling `done` with a line after each measurement.

    Returns whether all is there; not so where `in_time` said that time is up.
    """
    for name, measure in _lacking(calibration, cases, device):
        done(f"{name}: {measure()}")
        if not in_time():
            break
    return next(_lacking(calibration, cases, device), None) is None


def _lacking(c: Calibration, cases: Iterable[Case], device: str) -> Iterator[tuple[str, Callable[[], str]]]:
    """What is not measured yet: its name, and how to; that says what came out."""
    for size in _TRAFFIC[device]:
        if size not in c.traffic:
            yield f"copy of {size // 2:,} bytes", partial(_measure_copy, c, size, device)
    for name in _LINKS if device == "cuda" else ("host add",):
        if name not in c.links:
            yield name, partial(_measure_link, c, name, device)
    for operation in operations(cases, device):
        if isinstance(operation, Gemm):
            if operation not in c.gemms:
                name = f"GEMM {operation.layout} {operation.m} x {operation.n} x {operation.k}"
                yield name, partial(_measure_gemm, c, operation, device)
        elif isinstance(operation, Attention):
            for backend in (*SDPA, OWN):
                if backend not in c.attention.get(operation, {}):
                    yield (
                        f"{backend}, {operation}",
                        partial(_measure_attention, c, operation, backend, device),
                    )


def _measure_copy(c: Calibration, size: int, device: str) -> str:
    c.traffic[size] = time_copy(size, device)
    return f"{size / c.traffic[size] / 1e9:,.1f} GB/s read and written"


def _measure_link(c: Calibration, name: str, device: str) -> str:
    c.links[name] = _LINKS[name](device)
    return f"{c.links[name] / 1e9:,.1f} GB/s"


def _measure_gemm(c: Calibration, gemm: Gemm, device: str) -> str:
    c.gemms[gemm] = time_gemm(gemm, getattr(torch, c.dtype), device)
    return _rate(gemm.flops, c.gemms[gemm])


def _measure_attention(c: Calibration, shape: Attention, backend: str, device: str) -> str:
    times = c.attention.setdefault(shape, {})
    try:
        outcome = times[backend] = time_attention(shape, backend, getattr(torch, c.dtype), device)
    except Exception as error:
        times[backend] = _first_line(error)  # or the next process would run into it again
        raise
    return outcome if isinstance(outcome, str) else _rate(shape.flops, outcome)


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)


def _rate(flops: float, seconds: float) -> str:
    return f"{flops / seconds / 1e12:,.3g} TFLOP/s"


def seconds_per_call(call: Callable[[], Any], device: str, *, graphed: bool = True) -> float:
    """The median over repeats of many calls back to back, after warming up.

    On CUDA the calls are replayed as a graph, as in albor's step: what the host needs to start a kernel is no
    part of the kernel's time. `graphed=False` is for what cannot be captured.
    """
    for _ in range(3):
        call()
    count = max(1, int(_SECONDS[device] / max(_timed(call, 3, device), 1e-7)))
    if device == "cuda" and graphed:
        count = min(count, _MOST_IN_GRAPH)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(count):
                call()
        graph.replay()
        return statistics.median(_timed(graph.replay, 1, device) / count for _ in range(_REPEATS))
    return statistics.median(_timed(call, count, device) for _ in range(_REPEATS))


def _timed(call: Callable[[], Any], count: int, device: str) -> float:
    if device == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        start.record()
        for _ in range(count):
            call()
        end.record()
        torch.cuda.synchronize()
        return float(start.elapsed_time(end)) / 1e3 / count
    begin = time.perf_counter()
    for _ in range(count):
        call()
    return (time.perf_counter() - begin) / count


def _random(*shape: int, dtype: torch.dtype, device: str) -> torch.Tensor:
    generator = torch.Generator(device).manual_seed(0)
    return torch.randn(shape, dtype=torch.float32, device=device, generator=generator).to(dtype)


def time_gemm(gemm: Gemm, dtype: torch.dtype, device: str) -> float:
    """Seconds of one GEMM with operands of `dtype` that lie as its layout says."""
    m, n, k = gemm.m, gemm.n, gemm.k
    left = _random(*((k, m) if gemm.layout[0] == "t" else (m, k)), dtype=dtype, device=device)
    right = _random(*((n, k) if gemm.layout[1] == "t" else (k, n)), dtype=dtype, device=device)
    a, b = left.t() if gemm.layout[0] == "t" else left, right.t() if gemm.layout[1] == "t" else right
    if not gemm.accumulate:
        out = torch.empty(m, n, dtype=dtype, device=device)
        return seconds_per_call(lambda: torch.mm(a, b, out=out), device)
    sums = torch.zeros(m, n, dtype=torch.float32, device=device)
    if dtype == torch.float32:
        return seconds_per_call(lambda: torch.addmm(sums, a, b, out=sums), device)
    if device == "cuda":
        return seconds_per_call(
            lambda: torch.addmm(sums, a, b, out_dtype=torch.float32, out=sums),
            device,
        )
    # On the CPU torch has no GEMM that adds bf16 products to fp32 sums.
    part = torch.empty(m, n, dtype=dtype, device=device)
    return seconds_per_call(lambda: sums.add_(torch.mm(a, b, out=part)), device)


def time_attention(shape: Attention, backend: str, dtype: torch.dtype, device: str) -> float | str:
    """Seconds of one call, or why the backend cannot do it."""
    try:
        if backend == OWN:
            return _time_own_attention(shape, dtype, device)
        with warnings.catch_warnings(), only(backend):
            warnings.simplefilter("ignore")  # it explains at length why a backend is not available
            return _time_sdpa(shape, dtype, device)
    except Exception as error:  # whatever a backend raises, the others are to be measured
        if "CUDA error" in str(error):  # after which nothing works in this process
            raise
        return _first_line(error)


def _time_sdpa(shape: Attention, dtype: torch.dtype, device: str) -> float:
    def heads(count: int) -> torch.Tensor:  # as a packed projection leaves them: (B, heads, T, D) by strides
        lying = _random(shape.batch, shape.length, count, shape.head_dim, dtype=dtype, device=device)
        return lying.transpose(1, 2).requires_grad_()

    query, key, value = heads(shape.heads), heads(shape.kv_heads), heads(shape.kv_heads)

    def forward() -> torch.Tensor:
        return F.scaled_dot_product_attention(
            query, key, value, is_causal=True, enable_gqa=shape.heads != shape.kv_heads
        )

    # Autograd runs a backward on the stream of its forward, which is not the one that captures.
    if shape.direction == "forward":
        return seconds_per_call(forward, device, graphed=False)
    out = forward()
    d_out = _random(*out.shape, dtype=dtype, device=device)
    return seconds_per_call(
        lambda: torch.autograd.grad(out, (query, key, value), d_out, retain_graph=True), device, graphed=False
    )


def _time_own_attention(shape: Attention, dtype: torch.dtype, device: str) -> float:
    """albor's own kernels, in the buffers of a model of one block."""
    config = RunConfig.model_validate({
        "name": "calibrate",
        "model": {
            "hidden_size": shape.heads * shape.head_dim, "intermediate_size": 128, "num_hidden_layers": 1,
            "num_attention_heads": shape.heads, "num_key_value_heads": shape.kv_heads, "vocab_size": 128,
            "max_position_embeddings": shape.length,
        },
        "data": {"sequence_length": shape.length},
        "train": {"max_steps": 1_000, "micro_batch_size": shape.batch}
        | ({"attention": "triton"} if device == "cuda" else {}),
    })  # fmt: skip
    plan = plan_training(config, "cuda" if device == "cuda" else "cpu", str(dtype).removeprefix("torch."))
    arena = Arena(plan, device)
    ops = make_ops(arena)
    qkv, out = arena["blocks.00.qkv"], arena["blocks.00.attention_out"]
    lse, d_out, d_qkv = (
        arena.get("blocks.00.attention_lse"),
        arena["backward.d_attention"],
        arena["backward.d_qkv"],
    )
    qkv.copy_(_random(*qkv.shape, dtype=dtype, device=device))
    d_out.copy_(_random(*d_out.shape, dtype=dtype, device=device))

    def forward() -> None:
        ops.attention_forward(qkv, out, lse, shape.length, shape.kv_heads, shape.head_dim)

    def backward() -> None:
        ops.attention_backward(d_out, qkv, out, lse, d_qkv, shape.length, shape.kv_heads, shape.head_dim)

    forward()
    return seconds_per_call(forward if shape.direction == "forward" else backward, device)


def time_copy(size: int, device: str) -> float:
    """Seconds of a copy within the device that reads and writes `size` bytes in all."""
    half, pool = size // 2, 2 * max(_TRAFFIC[device])
    source = torch.ones(pool, dtype=torch.uint8, device=device)
    target = torch.zeros(pool, dtype=torch.uint8, device=device)
    position = 0

    def copy() -> None:
        nonlocal position
        target[position : position + half].copy_(source[position : position + half])
        position = position + half if position + 2 * half <= pool else 0

    return seconds_per_call(copy, device)


def _link(to: str, source: str) -> Callable[[str], float]:
    def measure(device: str) -> float:
        size = _LINK_BYTES[device]
        host = torch.ones(size, dtype=torch.uint8, pin_memory=True)
        ends = {"host": host, "device": torch.ones(size, dtype=torch.uint8, device=device)}
        seconds = seconds_per_call(
            lambda: ends[to].copy_(ends[source], non_blocking=True), device, graphed=False
        )
        return size / seconds

    return measure


def _host_add(device: str) -> float:
    """Bytes per second of adding bf16 gradients to fp32 sums in host memory: 10 bytes an element."""
    count = _LINK_BYTES[device] // 4
    gradient, sums = torch.ones(count, dtype=torch.bfloat16), torch.zeros(count)
    return 10 * count / seconds_per_call(lambda: sums.add_(gradient), "cpu")


_LINKS: dict[str, Callable[[str], float]] = {
    "host to device": _link("device", "host"),
    "device to host": _link("host", "device"),
    "host add": _host_add,
}


def main() -> int:
    """`python -m albor.bench.calibrate JOB.json`: its own process, so that nothing of it stays on the card.

    The job names the configurations, the device, the dtype, the file that is filled, and when to stop
    measuring. Returns CALIBRATE_AGAIN where the card refuses this process all further work; another can
    go on.
    """
    job = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    path, device = Path(job["out"]), job["device"]
    cases = [Case(name, RunConfig.model_validate(config)) for name, config in job["cases"].items()]
    calibration = (
        Calibration.load(path) if path.exists() else Calibration(job["card"], job["dtype"], job["facts"])
    )

    def done(line: str) -> None:
        print(line, flush=True)
        calibration.save(path)

    before = calibration.refusals()
    try:
        calibrate(calibration, cases, device, done, lambda: time.time() < job["until"])
    except Exception:
        traceback.print_exc()
        calibration.save(path)
        return CALIBRATE_AGAIN if calibration.refusals() > before else 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
