"""The shape of the package, from its syntax trees: who may import whom, and what is never used."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# From the ground up: a module imports from its own row and from those before it. A room stands for all in it.
ROWS = (
    (
        "__init__", "errors", "units", "seeds", "progress", "faults", "strictjson", "alerts", "spikes",
        "durable", "runlog", "build", "parent", "child_process", "filelock", "signals", "kernels",
    ),
    ("yamlcore", "config", "configfile", "overrides", "architecture", "metric_names", "floor", "gguffile"),
    ("runs", "group_directory"),
    ("trackers",),
    (
        "memory.__init__", "memory.packing", "memory.attention", "memory.attention_bytes", "memory.plan",
        "memory.cards", "memory.nvml", "memory.host", "memory.pytorch",
        "memory.calibration", "memory.outside", "memory.devices", "memory.suggest",
        "memory.speed", "memory.measured", "memory.cost", "memory.fit", "memory.fit_report",
        "memory.estimate", "memory.sweep", "memory.plot", "memory.report", "memory.sweep_report",
        "memory.process", "memory.audit",
        "ladder.__init__", "ladder.predict",
    ),
    ("memory.arena", "memory.shortage"),
    ("ops",),
    ("model",),
    ("data",),
    ("report",),
    ("tensorfile",),
    ("manifest", "checkpoint"),
    (
        "train.__init__", "train.schedule", "train.streams", "train.accumulator", "train.optimizer",
        "train.guard",
        "train.step", "train.metrics", "train.display", "train.report", "train.time_limit",
        "train.signals", "train.resume_policy",
        "train.snapshot",
    ),
    ("evaluate", "generate", "export"),
    ("pretrained",),
    ("train.rehearsal", "train.run_directory", "train.saved", "train.session", "train.saver", "train.spikes",
        "train.divergence", "train.memory_record", "train.loop", "train.run",
        "train.verify_resume", "canary"),
    ("doctor", "calibrate", "monitor", "serve", "sweep", "ladder"),
    ("bench",),
    ("cli", "child", "__main__"),
)  # fmt: skip

# Rows alone would allow these. (who, whom, because)
STRANGERS = (
    ("data", ("memory", "ops", "model"), "text and tokens need no device"),
    ("tensorfile", ("memory", "ops", "model", "data"), "it sees named tensors and nothing else"),
    ("checkpoint", ("memory", "ops", "model", "data"), "it sees named tensors and nothing else"),
    ("evaluate", ("train",), "it reads a checkpoint or a model, never a trainer"),
    ("generate", ("train",), "it reads a checkpoint or a model, never a trainer"),
    ("export", ("train",), "it reads a checkpoint or a model, never a trainer"),
    ("serve", ("train",), "it reads a checkpoint or a model, never a trainer"),
)

WITHOUT_TORCH = (
    "errors", "units", "faults", "alerts", "spikes", "config", "configfile", "architecture", "floor",
    "runlog", "runs.owner", "runs.record", "runs.state", "runs.follow",
    "runs.text", "runs.summary", "runs.listing", "runs.details", "runs.compare", "trackers.feed",
    "trackers.command", "memory.packing",
    "memory.attention", "memory.attention_bytes", "memory.plan", "memory.cards", "memory.nvml",
    "memory.host", "memory.pytorch", "memory.calibration", "memory.outside", "memory.devices",
    "memory.suggest", "memory.speed", "memory.measured", "memory.cost", "memory.fit", "memory.fit_report",
    "memory.estimate", "memory.sweep", "memory.plot", "memory.report",
    "memory.sweep_report", "memory.process", "memory.audit", "ladder.predict", "ladder.file",
    "ladder.dry_run", "ladder.gates", "ladder.command", "doctor.report",
    "monitor.command", "monitor.snapshot", "monitor.app", "sweep.command",
    "report.command", "cli",
)  # fmt: skip


def modules() -> dict[str, ast.Module]:
    """Every module of the package by its name below `albor`, the kernels included."""
    sources = {path: path.relative_to(ROOT / "albor") for path in (ROOT / "albor").rglob("*.py")}
    sources |= {path: Path("kernels") / path.name for path in (ROOT / "kernels").glob("*.py")}
    return {
        ".".join(name.with_suffix("").parts): ast.parse(path.read_text(encoding="utf-8"), str(path))
        for path, name in sources.items()
    }


MODULES = modules()


def imported(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """(dotted name, line) of every import in `tree`; `from a import b` names a.b."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: imports are absolute here"
            yield from ((f"{node.module}.{alias.name}", node.lineno) for alias in node.names)


def is_in(name: str, room: str) -> bool:
    return name == room or name.startswith(f"{room}.")


def row_of(module: str) -> int:
    """The row of the longest name that `module` is in."""
    fitting = [(len(room), row) for row, rooms in enumerate(ROWS) for room in rooms if is_in(module, room)]
    assert fitting, f"albor.{module} has no row: say in ROWS what may import it"
    return max(fitting)[1]


def neighbours(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """(module below albor, line) of every import from albor itself, wherever it stands."""
    for name, line in imported(tree):
        if is_in(name, "albor"):
            below = name.removeprefix("albor").removeprefix(".")
            while below not in MODULES and f"{below}.__init__" not in MODULES and "." in below:
                below = below.rpartition(".")[0]  # a.b is what module a defines
            known = below in MODULES or below == "kernels"
            yield (
                (below if known else f"{below}.__init__" if f"{below}.__init__" in MODULES else "__init__"),
                line,
            )


def offences(module: str, tree: ast.AST) -> Iterator[str]:
    """What `module` imports and may not."""
    for other, line in neighbours(tree):
        where = f"albor.{module}, line {line}: imports albor.{other}"
        if row_of(other) > row_of(module):
            yield f"{where}, which is above it"
        for who, whom, because in STRANGERS:
            if is_in(module, who) and any(is_in(other, room) for room in whom):
                yield f"{where}: {because}"
        knows = is_in(module, "ops") or is_in(module, "kernels")
        if is_in(other, "kernels") and other != "kernels.launches" and not knows:
            yield f"{where}: only ops knows which kernel does what"
    if is_in(module, "kernels"):
        for name, line in imported(tree):
            top = name.partition(".")[0]
            if not (top in {"torch", "triton"} | sys.stdlib_module_names or is_in(name, "albor.kernels")):
                yield f"albor.{module}, line {line}: a kernel imports {name}"


def test_a_module_imports_only_from_lower_rows():
    assert len(MODULES) > 30
    assert [offence for module, tree in MODULES.items() for offence in offences(module, tree)] == []


def test_no_two_modules_import_each_other():
    """Among the imports that run when a module is loaded; TopologicalSorter refuses a cycle."""
    graph: dict[str, set[str]] = {}
    for module, tree in MODULES.items():
        now = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
        graph[module] = {other for other, _ in neighbours(ast.Module(now, []))}
    assert any(graph.values())
    TopologicalSorter(graph).prepare()


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("ops", "from albor.model.block import Block"),
        ("model.block", "from albor.train import step"),
        ("memory.plan", "import albor.memory.arena"),
        ("train.step", "def f():\n    from albor.train.loop import Loop"),
        ("model.head", "from albor.kernels import rmsnorm"),
        ("generate.sampler", "from albor.train.guard import judge"),
        ("checkpoint", "from albor.memory.arena import Arena"),
        ("data.loader", "from albor import ops"),
        ("kernels.rmsnorm", "from albor.ops import norm"),
        ("kernels.rmsnorm", "import numpy as np"),
    ],
)
def test_the_walk_over_the_imports_sees(module: str, source: str):
    assert list(offences(module, ast.parse(source)))


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("ops", "from albor.kernels import rmsnorm"),
        (
            "kernels.rmsnorm",
            "import math\nimport torch\nimport triton.language as tl\nfrom albor.kernels import common",
        ),
        ("cli", "def f():\n    from albor.train.run import run_training"),
        ("train.step", "from albor import __version__, ops"),
    ],
)
def test_the_walk_over_the_imports_allows(module: str, source: str):
    assert list(offences(module, ast.parse(source))) == []


def test_the_estimate_needs_no_torch():
    """Importing torch takes seconds. One process, a module at a time, to name the one that brings it in."""
    code = "import importlib, sys\n" + "".join(
        f"importlib.import_module('albor.{module}'); assert 'torch' not in sys.modules, '{module}'\n"
        for module in WITHOUT_TORCH
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_the_kernels_are_a_symlink_and_no_package_of_their_own():
    """A top-level package `kernels` would hide the one on PyPI, which transformers imports."""
    assert (ROOT / "albor" / "kernels").is_symlink()
    assert os.readlink(ROOT / "albor" / "kernels") == os.path.join("..", "kernels")
    assert not (ROOT / "kernels" / "__init__.py").exists()


# What is never used


GLOBAL_DRAWS = (
    "manual_seed", "manual_seed_all", "seed", "rand", "randn", "randint", "randperm", "rand_like",
    "randn_like", "randint_like", "normal", "bernoulli", "multinomial", "poisson", "dropout",
    "normal_", "uniform_", "random_", "bernoulli_", "exponential_", "geometric_", "cauchy_", "log_normal_",
)  # fmt: skip
SEEDED = (
    "random.Random",
    "np.random.default_rng",
    "np.random.Generator",
    "np.random.Philox",
    "np.random.PCG64",
    "np.random.MT19937",
)
SEEDED += ("torch.Generator().manual_seed", "torch.Generator(device).manual_seed", "generator.manual_seed")
UNSAFE_MODULES = ("pickle", "_pickle", "cPickle", "dill", "cloudpickle", "shelve", "marshal", "joblib")
UNSAFE_CALLS = ("torch.load", "torch.save", "eval", "exec", "yaml.load", "yaml.unsafe_load", "yaml.full_load")
HIDING_IMPORTS = (
    "random.",
    "numpy.random.",
    "torch.random.",
    "torch.nn.init.",
)  # `from random import shuffle`


def misuses(tree: ast.AST) -> Iterator[str]:
    """Reads of a global generator, and anything that could run code out of a file."""
    for name, line in imported(tree):
        unsafe = name in UNSAFE_CALLS or any(is_in(name, module) for module in UNSAFE_MODULES)
        if unsafe or name.startswith(HIDING_IMPORTS):
            yield f"line {line}: import {name}"
    for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
        name = ast.unparse(call.func).replace("numpy.", "np.")
        keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
        if name in UNSAFE_CALLS or keywords.get("allow_pickle", "False") != "False":
            yield f"line {call.lineno}: {name} can run what it reads"
        if name in SEEDED:
            seeded = bool(call.args or call.keywords)
        elif name.startswith(("random.", "np.random.")):
            seeded = "(" in name  # a method of what a call returned, and that call is looked at too
        else:
            seeded = (
                name.rpartition(".")[2] not in GLOBAL_DRAWS or keywords.get("generator", "None") != "None"
            )
        if not seeded:
            yield f"line {call.lineno}: {name} draws from a global generator"


def test_nothing_draws_from_a_global_generator_or_unpickles():
    found = [f"albor.{module}, {misuse}" for module, tree in MODULES.items() for misuse in misuses(tree)]
    assert found == []


@pytest.mark.parametrize(
    "source",
    [
        "torch.manual_seed(1)",
        "torch.cuda.manual_seed_all(1)",
        "torch.rand(3)",
        "torch.multinomial(p, 1)",
        "torch.randn(3, generator=None)",
        "weight.normal_(0, 0.02)",
        "F.dropout(x, 0.1)",
        "np.random.seed(0)",
        "numpy.random.permutation(3)",
        "np.random.default_rng()",
        "random.shuffle(files)",
        "random.Random()",
        "from random import shuffle",
        "from numpy.random import default_rng",
        "import pickle",
        "from pickle import loads",
        "from torch import load",
        "from yaml import load as read",
        "torch.load(path)",
        "torch.load(path, weights_only=True)",
        "np.load(path, allow_pickle=True)",
        "yaml.load(text, Loader=yaml.Loader)",
    ],
)
def test_the_walk_over_the_calls_sees(source: str):
    assert list(misuses(ast.parse(source)))


@pytest.mark.parametrize(
    "source",
    [
        "generator = torch.Generator().manual_seed(seed)",
        "weight.normal_(0, 0.02, generator=generator)",
        "np.random.default_rng(seed).permutation(3)",
        "random.Random(seed)",
        "np.load(path, allow_pickle=False)",
        "yaml.safe_load(text)",
    ],
)
def test_the_walk_over_the_calls_allows(source: str):
    assert list(misuses(ast.parse(source))) == []
