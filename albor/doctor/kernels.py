"""What Triton needs to make kernels (compiler, headers, ptxas), and which of albor's its cache has."""

from __future__ import annotations

import ast
import json
import os
import shutil
import sysconfig
from collections import Counter
from importlib import util
from pathlib import Path

import albor
from albor.doctor.checks import Check, Gain, Section
from albor.doctor.storage import existing, file_system, is_network
from albor.units import format_bytes


def examine(has_gpu: bool, capability: tuple[int, int] | None, root: Path = Path("/")) -> Section:
    """The section on kernels. Without a GPU nothing in it is needed, so nothing is wrong.

    `capability`: of the card that a run gets, where that is known.
    """
    architecture = None if capability is None else 10 * capability[0] + capability[1]
    folder = cache_folder()
    entries, size, mine = scan(folder, kernel_names())
    kind, writable = file_system(folder, root), os.access(existing(folder), os.W_OK)
    compiler, header, assembler = find_compiler(), python_header(), ptxas()
    facts = {
        "cache": str(folder),
        "cache_exists": folder.is_dir(),
        "cache_writable": writable,
        "cache_file_system": kind,
        "cache_entries": entries,
        "cache_bytes": size,
        "compiled": {f"sm_{arch}": count for arch, count in sorted(mine.items())},
        "warm": None if architecture is None else mine[architecture] > 0,
        "c_compiler": compiler,
        "python_header": header,
        "ptxas": assembler,
    }
    checks = [
        _cache_check(entries, size, mine, architecture),
        _folder_check(folder, kind, writable, has_gpu),
        _tool_check(
            "C compiler", compiler, has_gpu, "install a C compiler, or set CC", "sudo apt install gcc"
        ),
        _tool_check("Python.h", header, has_gpu, "install Python's headers", "sudo apt install python3-dev"),
        _tool_check(
            "ptxas", assembler, has_gpu, "install triton again", "pip install --force-reinstall triton"
        ),
    ]
    return Section("Kernels", facts, checks)


def cache_folder() -> Path:
    """Where Triton keeps compiled kernels."""
    if given := os.environ.get("TRITON_CACHE_DIR"):
        return Path(given)
    return Path(os.environ.get("TRITON_HOME") or os.path.expanduser("~")) / ".triton" / "cache"


def kernel_names() -> frozenset[str]:
    """The names of albor's kernels, which Triton gives to their files."""
    names: set[str] = set()
    for path in (Path(albor.__file__).parent / "kernels").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef):
                names |= {node.name for mark in node.decorator_list if "jit" in ast.unparse(mark)}
    return frozenset(names)


def scan(folder: Path, names: frozenset[str]) -> tuple[int, int, Counter[int]]:
    """Entries and bytes of a Triton cache, and how many kernels of `names` it has for each architecture.

    A kernel counts once, however many of its variants there are. That an entry is there does not mean that it
    is of this version: Triton knows by hashes that only it can compute.
    """
    entries, size = 0, 0
    mine: set[tuple[str, int]] = set()
    for here, _, files in os.walk(folder):
        entries += Path(here) != folder and bool(files)
        for file in files:
            path = Path(here, file)
            try:
                size += path.stat().st_size
                if path.suffix == ".cubin" and path.stem in names:
                    metadata = json.loads(path.with_suffix(".json").read_text())
                    mine.add((path.stem, int(metadata["target"]["arch"])))
            except (OSError, ValueError, KeyError, TypeError):  # another process is writing it, or removed it
                continue
    return entries, size, Counter(arch for _, arch in mine)


def find_compiler() -> str | None:
    """The C compiler that Triton would take, in its order."""
    if given := os.environ.get("CC"):
        return shutil.which(given)
    return shutil.which("gcc") or shutil.which("clang")


def python_header() -> str | None:
    """Python.h, which Debian has in a package of its own."""
    scheme = sysconfig.get_default_scheme()
    # As Triton does: Debian's own scheme points to a folder that its headers are not in.
    include = sysconfig.get_paths("posix_prefix" if scheme == "posix_local" else scheme)["include"]
    path = Path(include) / "Python.h"
    return str(path) if path.is_file() else None


def ptxas() -> str | None:
    """NVIDIA's assembler, which Triton brings."""
    if (given := os.environ.get("TRITON_PTXAS_PATH")) and os.access(given, os.X_OK):
        return given
    spec = util.find_spec("triton")
    if spec is None or spec.origin is None:
        return None
    path = Path(spec.origin).parent / "backends" / "nvidia" / "bin" / "ptxas"
    return str(path) if os.access(path, os.X_OK) else None


def _cache_check(entries: int, size: int, mine: Counter[int], architecture: int | None) -> Check:
    if architecture is None:
        known = ", ".join(f"sm_{arch} ({count})" for arch, count in sorted(mine.items()))
        state = f"albor's kernels for {known}" if known else "none of albor's kernels"
    elif mine[architecture]:
        state = f"warm: {mine[architecture]} of albor's kernels for sm_{architecture}, which is this GPU"
    else:
        state = f"cold: none of albor's kernels for sm_{architecture}, so the first start compiles them"
    return Check("cache", f"{state}\n{entries:,} entries, {format_bytes(size)}")


def _folder_check(folder: Path, kind: str | None, writable: bool, has_gpu: bool) -> Check:
    check = Check("cache folder", str(folder))
    if not writable:
        return check.found(
            "problem" if has_gpu else "note",
            "cannot be written to, so kernels cannot be compiled",
            "give Triton a folder that it can write to",
            "export TRITON_CACHE_DIR=/tmp/triton",
        )
    if is_network(kind):
        remedy = "keep the kernel cache on a local disk: every start reads it"
        command = "export TRITON_CACHE_DIR=/tmp/triton"
        return check.found("note", f"on a shared file system ({kind})", remedy, command, Gain.SLIGHT)
    return check


def _tool_check(name: str, path: str | None, has_gpu: bool, remedy: str, command: str) -> Check:
    if path is not None:
        return Check(name, path)
    if not has_gpu:
        return Check(name, "not found; only a GPU needs it")
    return Check(name, "not found").found(
        "problem", "Triton cannot launch kernels without it", remedy, command
    )
