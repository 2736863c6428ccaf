"""What is installed: a wheel with the kernels and the schema in it, and nothing that is in anybody's way."""

from __future__ import annotations

import configparser
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
BUILD = "import sys; from setuptools.build_meta import build_wheel; build_wheel(sys.argv[1])"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built offline, as `pip install .` does it, from a copy with one more kernel, whatever there is yet."""
    pytest.importorskip("setuptools", minversion="77", reason="needs setuptools>=77, which builds albor")
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in ("albor", "kernels", "tests"):
        shutil.copytree(
            ROOT / name, source / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__")
        )
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    (source / "kernels" / "probe.py").write_text("ANSWER = 42\n")
    command = [sys.executable, "-c", BUILD, str(out)]
    done = subprocess.run(command, cwd=source, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return next(out.glob("albor-*.whl"))


def test_the_wheel_holds_the_package_and_nothing_else(wheel: Path):
    names = set(zipfile.ZipFile(wheel).namelist())
    modules = {str(path.relative_to(ROOT)) for path in (ROOT / "albor").rglob("*.py")}
    kernels = {f"albor/{path.relative_to(ROOT)}" for path in (ROOT / "kernels").glob("*.py")}
    data = {
        str(path.relative_to(ROOT)) for kind in ("*.json", "*.csv") for path in (ROOT / "albor").rglob(kind)
    }
    assert modules | kernels | data | {"albor/kernels/probe.py"} <= names
    top_level = {name.partition("/")[0].partition("-")[0] for name in names}
    assert top_level == {"albor"}, "something else would be installed beside it"
    assert any(name.endswith("/LICENSE") for name in names)


def test_the_wheel_makes_the_command(wheel: Path):
    archive = zipfile.ZipFile(wheel)
    (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/entry_points.txt"))
    entry_points = configparser.ConfigParser()
    entry_points.read_string(archive.read(name).decode())
    assert dict(entry_points["console_scripts"]) == {"albor": "albor.cli:main"}


def test_an_installed_wheel_finds_its_kernels_and_hides_nobody_elses(wheel: Path, tmp_path: Path):
    zipfile.ZipFile(wheel).extractall(tmp_path)
    program = (
        "import importlib.util, albor, albor.kernels.probe\n"
        f"assert albor.__file__.startswith({str(tmp_path)!r}), albor.__file__\n"
        "found = importlib.util.find_spec('kernels')\n"
        "print(albor.kernels.probe.ANSWER, found and found.origin)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    answer, origin = done.stdout.split()
    assert answer == "42"
    assert not origin.startswith(str(tmp_path))


def test_kernels_are_no_package_of_their_own():
    """It would shadow the PyPI package `kernels`, which transformers imports."""
    assert not (ROOT / "kernels" / "__init__.py").exists()
    assert (ROOT / "kernels").is_dir()
    assert os.readlink(ROOT / "albor" / "kernels") == "../kernels"


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="not a git checkout")
def test_git_keeps_the_link_and_what_it_points_to():
    listed = subprocess.run(
        ["git", "ls-files", "--stage", "albor/kernels", "kernels"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    modes = {line.split("\t")[1]: line.split()[0] for line in listed.stdout.splitlines()}
    assert modes.pop("albor/kernels") == "120000", "the link is no link in a fresh clone"
    assert modes, "git keeps no empty folder: the link leads nowhere in a fresh clone"
    assert all(name.startswith("kernels/") for name in modes)
