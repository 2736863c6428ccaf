"""Versions: albor, Python, torch and what it was built for, and every package against what albor asks for.

torch is read from its files: to import it fails on just the machines that need a doctor (see `trial`).
"""

from __future__ import annotations

import ast
import os
import platform
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib import metadata, util
from pathlib import Path
from typing import Any

import albor
from albor.doctor.checks import Check, Gain, Section

CudaVersion = tuple[int, int]
PYPI = "https://pypi.org/simple"


@dataclass(frozen=True)
class TorchBuild:
    """The torch that is installed."""

    version: str
    cuda: CudaVersion | None  # None: built without CUDA
    hip: str | None  # not None: built for AMD's cards


@dataclass(frozen=True)
class Package:
    """A distribution that albor asks for, in this environment."""

    name: str
    version: str | None  # None: not installed
    asked: str  # such as >=2.1,<3
    fits: bool


def torch_folder() -> Path | None:
    """Where `import torch` would look; None where there is nothing of that name."""
    spec = util.find_spec("torch")
    if spec is None:
        return None
    # A folder without __init__.py has no origin.
    return (
        Path(spec.origin).parent if spec.origin else Path(next(iter(spec.submodule_search_locations or [])))
    )


def torch_build() -> TorchBuild | None:
    """What torch/version.py says; None where torch is not installed, or does not say."""
    folder = torch_folder()
    if folder is None:
        return None
    try:
        tree = ast.parse((folder / "version.py").read_text(encoding="utf-8"))
    except (OSError, SyntaxError):
        return None
    values: dict[str, object] = {}
    for node in tree.body:
        if isinstance(node, ast.AnnAssign) and node.value is not None:
            target: ast.expr = node.target
        elif isinstance(node, ast.Assign):
            target = node.targets[0]
        else:
            continue
        if isinstance(target, ast.Name) and isinstance(node.value, ast.Constant):
            values[target.id] = node.value.value
    hip = values.get("hip")
    return TorchBuild(
        str(values.get("__version__")), parse_cuda(values.get("cuda")), None if hip is None else str(hip)
    )


def parse_cuda(text: object) -> CudaVersion | None:
    """ "12.8" as (12, 8)."""
    found = re.match(r"(\d+)\.(\d+)", text) if isinstance(text, str) else None
    return (int(found[1]), int(found[2])) if found else None


def installed(name: str) -> str | None:
    """The version of a distribution, or None where it is not installed."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def required(distribution: str, extra: str = "") -> Iterator[Package]:
    """What `distribution` asks for here: without an extra its own needs, with one what the extra adds.

    Raises ImportError without `packaging`, and PackageNotFoundError for a distribution that is not installed.
    """
    from packaging.requirements import Requirement

    for line in metadata.requires(distribution) or []:
        need = Requirement(line)
        if need.marker is not None and not need.marker.evaluate({"extra": extra}):
            continue
        if extra and (need.marker is None or need.marker.evaluate({"extra": ""})):
            continue
        if need.name == distribution:  # an extra that takes in another one
            for other in sorted(need.extras):
                yield from required(distribution, other)
            continue
        version = installed(need.name)
        fits = version is not None and need.specifier.contains(version, prereleases=True)
        yield Package(need.name, version, str(need.specifier), fits)


def commit(root: Path | None = None) -> str | None:
    """The commit that albor runs from, with -dirty where files were changed; None outside a checkout."""
    root = Path(albor.__file__).resolve().parents[1] if root is None else root
    if not (root / ".git").exists():  # git itself would go up, and find the checkout around a .venv
        return None
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    reading = {**os.environ, "GIT_OPTIONAL_LOCKS": "0"}  # or it would write what it learns into the index
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=5, check=True, env=reading)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def install_torch(build: TorchBuild, index: str) -> str:
    """The command that replaces a torch by the same version from another package index."""
    return f"pip install --force-reinstall torch=={build.version.partition('+')[0]} --index-url {index}"


def examine(build: TorchBuild | None, has_gpu: bool, wheels: str) -> Section:
    """The section on software.

    `has_gpu`: a card of NVIDIA's is here, driver or not. `wheels`: the package index with a torch for it.
    """
    revision = commit()
    checks = [
        Check("albor", f"{albor.__version__}{f', commit {revision}' if revision else ''}"),
        Check("Python", f"{platform.python_version()}, {sys.executable}"),
        _torch_check(build, has_gpu, wheels),
    ]
    facts: dict[str, Any] = {
        "albor": albor.__version__,
        "commit": revision,
        "python": platform.python_version(),
        "executable": sys.executable,
        "torch": None if build is None else build.version,
        "torch_cuda": None if build is None or build.cuda is None else "{}.{}".format(*build.cuda),
        "torch_hip": None if build is None else build.hip,
        "triton": installed("triton"),
    }
    packages = Check("packages", "not compared with what albor asks for")
    try:
        core = list(required("albor"))
        extras = {name: list(required("albor", name)) for name in _extra_names("albor")}
        by_torch = [] if build is None else list(required("torch"))
    except metadata.PackageNotFoundError as missing:
        message = f"{missing.name} has no metadata"
        checks.append(packages.found("warning", message, "install albor with pip", "pip install ."))
    except ImportError:
        message = "the package `packaging` is missing"
        checks.append(packages.found("warning", message, "install packaging", "pip install packaging"))
    else:
        checks += [_triton_check(core, by_torch), _packages_check(core), _extras_check(extras)]
        facts["packages"] = [asdict(package) for package in core]
        facts["extras"] = {name: all(need.fits for need in needs) for name, needs in extras.items()}
    return Section("Software", facts, checks)


def _extra_names(distribution: str) -> list[str]:
    return sorted(metadata.metadata(distribution).get_all("Provides-Extra") or [])


def _torch_check(build: TorchBuild | None, has_gpu: bool, wheels: str) -> Check:
    if build is None and (folder := torch_folder()) is not None:
        message = f"{folder} is not torch, or is damaged"
        remedy = "take it out of Python's path, or install torch again"
        command = "pip install --force-reinstall torch"
        return Check("torch", "no version").found("problem", message, remedy, command)
    if build is None:
        check = Check("torch", "not installed")
        return check.found("problem", "nothing runs without it", "install albor with pip", "pip install .")
    if build.hip is not None:
        check = Check("torch", f"{build.version}, built for ROCm {build.hip}")
        return check.found("warning", "on a GPU albor runs with CUDA only", "train with device=cpu")
    if build.cuda is not None:
        return Check("torch", "{}, built for CUDA {}.{}".format(build.version, *build.cuda))
    check = Check("torch", f"{build.version}, built for the CPU")
    if not has_gpu:
        return check
    remedy = "install torch for CUDA: without it every run is on the CPU"
    message = "it cannot use this machine's NVIDIA GPU"
    return check.found("problem", message, remedy, install_torch(build, wheels), Gain.LARGE)


def _triton_check(core: list[Package], by_torch: list[Package]) -> Check:
    asked = {
        who: need
        for who, needs in (("torch", by_torch), ("albor", core))
        for need in needs
        if need.name == "triton"
    }
    if not asked:
        return Check("triton", "not asked for on this system")
    version = installed("triton")
    check = Check("triton", version or "not installed")
    for who, need in asked.items():
        if not need.fits:
            command = _install([need])
            return check.found(
                "problem", f"{who} asks for {need.asked}", "install the triton that fits", command
            )
    return check


def _packages_check(core: list[Package]) -> Check:
    others = [need for need in core if need.name != "triton"]  # which has its own line
    check = Check("packages", ", ".join(f"{need.name} {need.version or 'missing'}" for need in others))
    if not (wrong := [need for need in others if not need.fits]):
        return check
    message = "albor asks for " + ", ".join(f"{need.name} {need.asked}" for need in wrong)
    return check.found("problem", message, "install the versions that albor asks for", _install(wrong))


def _extras_check(extras: dict[str, list[Package]]) -> Check:
    there = [name for name, needs in extras.items() if all(need.fits for need in needs)]
    absent = [name for name in extras if name not in there]
    check = Check("extras", f"{', '.join(there) or 'none'}; not installed: {', '.join(absent) or 'none'}")
    needs = {need.name: need for needs in extras.values() for need in needs}
    if not (wrong := [need for need in needs.values() if need.version is not None and not need.fits]):
        return check
    message = "albor would ask for " + ", ".join(f"{n.name} {n.asked}, not {n.version}" for n in wrong)
    return check.found("note", message, "for these extras, install the versions that fit", _install(wrong))


def _install(needs: list[Package]) -> str:
    return "pip install " + " ".join(f'"{need.name}{need.asked}"' for need in needs)
