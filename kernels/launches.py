"""Which kernels a piece of code launches, and their machine code, without launching anything.

    with record(capability=90) as launches:  # {Launch: {grid, ...}}
        trainer.step(...)                    # over tensors of device "meta", or any others
    precompile(launches)

`record` puts a driver without a device in place of Triton's own, so that the JIT binds arguments and
specialises on them (dtypes, integers that are 1 or a multiple of 16, alignment of pointers) by its own code,
for the asked capability; and it stops at the hook that Triton calls before it compiles. A `Launch` holds what
that hook was told, which is what `JITFunction.preload` compiles from. So the name under which Triton's cache
keeps the result is the one under which a real launch looks it up.

Compiling needs no GPU: with a GPU the results are for its driver, without one for `for_capability`'s.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import CompiledKernel
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from albor.kernels.target import Target, assume

Grid = tuple[int, int, int]
_USUAL = {"num_ctas": 1, "maxnreg": None, "enable_fp_fusion": True}


@dataclass(frozen=True)
class Launch:
    """One specialisation of a kernel: its argument types, its constants and its launch options."""

    capability: int
    kernel: JITFunction = field(repr=False)
    specialization: str = field(repr=False)  # Triton's JSON of it, for JITFunction.preload

    @property
    def name(self) -> str:
        """The kernel's file and name: attention._forward."""
        return f"{self.kernel.__module__.rpartition('.')[2]}.{self.kernel.__name__}"

    @cached_property
    def _data(self) -> dict[str, Any]:
        return json.loads(self.specialization)

    @property
    def arguments(self) -> dict[str, str]:
        """What is passed at run time: *bf16, fp32, i32 by parameter; `:16` where it is a multiple of 16."""
        divisible = {
            path[0]
            for path, attributes in zip(self._data["attrs_keys"], self._data["attrs_vals"], strict=True)
            if ["tt.divisibility", 16] in attributes
        }
        return {
            name: dtype + (":16" if index in divisible else "")
            for index, (name, dtype) in enumerate(self._data["signature"].items())
            if dtype != "constexpr"
        }

    @property
    def constants(self) -> dict[str, Any]:
        """What is compiled in: constexpr parameters, integers that are 1, and None."""
        names = list(self._data["signature"])
        keys, values = self._data["constant_keys"], self._data["constant_vals"]
        return {names[path[0]]: value for path, value in zip(keys, values, strict=True)}

    @property
    def options(self) -> dict[str, Any]:
        """num_warps, num_stages, and of the other launch options those that are not as Triton has them."""
        options = self._data["options"]
        others = {name: options[name] for name, usual in _USUAL.items() if options[name] != usual}
        return {name: options[name] for name in ("num_warps", "num_stages")} | others


class _DriverWithoutDevice:
    """As much of a Triton driver as specialising and compiling ask for."""

    def __init__(self, capability: int):
        self._target = GPUTarget("cuda", capability, 32)
        # Triton keeps what it compiled by device. A device of its own keeps one recording from finding
        # another's, and either from being mistaken for a real device's.
        self._device = object()

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_current_device(self) -> object:
        return self._device

    def set_current_device(self, device: object) -> None:
        assert device is self._device

    def get_current_stream(self, device: object) -> int:
        return 0


@contextmanager
def for_capability(capability: int) -> Iterator[None]:
    """Within it Triton compiles for a CUDA device of `capability` (90 is 9.0), whatever this machine has.

    Raises RuntimeError where TRITON_INTERPRET was set as the kernels were defined: they cannot be compiled.
    """
    if triton.knobs.runtime.interpret:
        raise RuntimeError(
            "the kernels are interpreted, not compiled; unset TRITON_INTERPRET and start again"
        )
    before = driver._active  # not `driver.active`, which would look for a device
    driver.set_active(_DriverWithoutDevice(capability))
    try:
        with assume(Target(capability)):
            yield
    finally:
        driver._active = before


@contextmanager
def record(capability: int) -> Iterator[dict[Launch, set[Grid]]]:
    """Collects what is launched within it, and the grids it is launched with; nothing runs.

    Launchers choose for `capability`. Tensors on device "meta" pass for ones whose storage is aligned.
    """
    launches: dict[Launch, set[Grid]] = {}
    found: list[Launch] = []

    def hook(*, fn: Any, compile: dict[str, Any], **_: Any) -> bool:
        found.append(Launch(capability, fn.jit_function, compile["specialization_data"]))
        return True  # tells Triton not to compile

    def run(kernel: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        found.clear()
        _run(kernel, *args, grid=grid, warmup=True, **kwargs)
        (launch,) = found
        if callable(grid):
            grid = grid(dict(zip(kernel.arg_names, args, strict=False)) | kwargs)
        launches.setdefault(launch, set()).add((*grid, 1, 1)[:3])

    _run: Callable[..., Any] = JITFunction.run
    hook_before = triton.knobs.runtime.jit_cache_hook
    with for_capability(capability):
        triton.knobs.runtime.jit_cache_hook = hook
        JITFunction.run = run
        try:
            yield launches
        finally:
            JITFunction.run = _run
            triton.knobs.runtime.jit_cache_hook = hook_before


def compile_launch(launch: Launch) -> CompiledKernel:
    """The machine code of `launch`, from Triton's cache on disk where it has it.

    Raises what Triton raises: CompilationError, PTXASError.
    """
    return launch.kernel.preload(launch.specialization)


def precompile(launches: Iterable[Launch], workers: int) -> None:
    """Compiles `launches` in `workers` threads (Triton's passes and ptxas leave Python's lock alone).

    The launches' capability has to be that of the current driver: on a machine with a GPU, its own. There, a
    later launch finds its kernel loaded, and its launcher built (Triton 3.6 compiles one for each signature).
    """
    device = driver.active.get_current_device()

    def make_ready(launch: Launch) -> None:
        kernel = compile_launch(launch)
        if not isinstance(driver.active, _DriverWithoutDevice):
            kernel._init_handles()

    # A new thread's current CUDA device is device 0.
    with ThreadPoolExecutor(
        workers, initializer=driver.active.set_current_device, initargs=(device,)
    ) as pool:
        for _ in pool.map(make_ready, launches):
            pass
