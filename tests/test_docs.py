"""What the documentation says is so: quotes stand in the files, commands and keys exist, links resolve."""

from __future__ import annotations

import ast
import json
import re
import runpy
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from albor import cli
from albor.config import RunConfig
from albor.configfile import load_config
from albor.errors import ConfigError

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.glob("*.md"))]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
CODE = re.compile(r"`([^`\n]+)`")
TOP = {path.name for path in ROOT.iterdir() if not path.name.startswith(".")}
MADE = (
    "runs/",
    "data/",
    "checkpoints/",
    "eval/",
    "corpus/",
)  # what a run writes or reads, not the repository
# Of files whose names look like dotted keys: model.safetensors, tokenizer.model
SUFFIXES = (
    "json", "jsonl", "md", "py", "yaml", "resolved", "safetensors", "model", "onnx", "onnx_data", "gguf",
)  # fmt: skip


def every_page(test):
    return pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)(test)


def spans(page: Path) -> list[str]:
    """Inline code outside of fenced blocks."""
    return CODE.findall(FENCE.sub("", page.read_text(encoding="utf-8")))


def blocks(page: Path) -> Iterator[tuple[str, str, str]]:
    """(language, content, the line above) of every fenced block."""
    text = page.read_text(encoding="utf-8")
    for match in FENCE.finditer(text):
        above = [line for line in text[: match.start()].splitlines() if line.strip()]
        yield match[1], match[2], above[-1] if above else ""


def test_configuration_page_is_current():
    current = runpy.run_path(str(DOCS / "generate_configuration.py"))["page"]()
    written = (DOCS / "configuration.md").read_text(encoding="utf-8")
    assert written == current, "run: python docs/generate_configuration.py"


def test_the_mistakes_shown_are_real():
    page = (DOCS / "configuration.md").read_text(encoding="utf-8")
    shown = re.search(r"<!-- from (\S+) -->\n```text\n(.*?)```", page, re.DOTALL)
    assert shown is not None
    with pytest.raises(ConfigError) as caught:
        load_config(ROOT / shown[1])
    real = [re.sub(r"^\S*/", "", line) for line in str(caught.value).splitlines()]
    assert set(shown[2].splitlines()) <= set(real)


def squeezed(code: str) -> str:
    """Code without its white space and the commas that a formatter adds: where lines break is not quoted."""
    return re.sub(r",(?=[)\]}])", "", re.sub(r"\s+", "", code))


@every_page
def test_quoted_code_stands_in_the_file_named_above_it(page: Path):
    for language, code, above in blocks(page):
        if language == "python":
            paths = [span for span in CODE.findall(above) if span.endswith(".py")]
            assert paths, f"the line above this quote names no file:\n{code}"
            source = (ROOT / paths[-1]).read_text(encoding="utf-8")
            assert squeezed(code) in squeezed(source), f"{paths[-1]} does not hold:\n{code}"


def definitions(path: Path) -> set[str]:
    """Names that a Python file defines: functions, classes, methods as `Class.method`, and constants."""
    names: set[str] = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        for inner in node.body if isinstance(node, ast.ClassDef) else ():
            if isinstance(inner, ast.FunctionDef):
                names |= {f"{node.name}.{inner.name}", inner.name}
        for target in node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]:
            if isinstance(target, ast.Name):
                names.add(target.id)
    return names


@every_page
def test_names_that_stand_with_their_file_are_defined_in_it(page: Path):
    """`Trainer.step` in `albor/train/step.py`."""
    for name, path in re.findall(r"`([\w.]+)` in\s+`([\w/.]+\.py)`", page.read_text(encoding="utf-8")):
        assert name in definitions(ROOT / path), f"{path} does not define {name}"


@every_page
def test_paths_exist(page: Path):
    for span in spans(page):
        for word in span.split():
            path = word.partition("::")[0].rstrip("/,;")
            if path.partition("/")[0] in TOP and "/" in path and not path.startswith(MADE):
                assert (ROOT / path).exists(), f"{path} does not exist"
                for name in word.split("::")[1:]:
                    assert name in definitions(ROOT / path), f"{path} has no {name}"


@every_page
def test_links_resolve(page: Path):
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if not re.match(r"[a-z]+:", target):
            path, _, anchor = target.partition("#")
            file = (page.parent / path) if path else page
            assert file.exists(), f"{target} leads nowhere"
            if anchor:
                assert anchor in anchors(file), f"{target}: no such heading"


def anchors(page: Path) -> set[str]:
    """The headings of a page as GitHub links to them."""
    headings = re.findall(r"^#+ (.+)$", FENCE.sub("", page.read_text(encoding="utf-8")), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


COMMANDS = typer.main.get_command(cli.app)


def commands() -> Iterator[tuple[str, set[str]]]:
    """(words, options) of every command, and of `albor` itself; a group such as `data` is none."""
    pending = [("", COMMANDS)]
    while pending:
        words, command = pending.pop()
        inner = getattr(command, "commands", {})
        pending += [(f"{words} {name}".strip(), sub) for name, sub in inner.items()]
        if not (words and inner):
            yield (
                words,
                {
                    option
                    for parameter in command.params
                    for option in (*parameter.opts, *parameter.secondary_opts)
                }
                | {"-h", "--help"},
            )


OPTIONS = dict(commands())


def invocations(page: Path) -> Iterator[list[str]]:
    """The words after `albor` wherever a page shows a command."""
    lines = [
        line
        for language, code, _ in blocks(page)
        if language in ("", "bash", "sh", "text")
        for line in code.splitlines()
    ]
    for line in [*lines, *spans(page)]:
        found = re.match(r"(?:\$ |\s*)(?:\S*/)?albor ((?!:).*)", line.partition("  #")[0])
        if found:
            yield shlex.split(found[1])


@every_page
def test_commands_and_options_exist(page: Path):
    for words in invocations(page):
        command = next((c for c in (" ".join(words[:2]), words[0]) if c in OPTIONS), "")
        assert command or words[0].startswith("-"), f"there is no command albor {words[0]}"
        for word in words:
            if word.startswith("--"):
                assert word.partition("=")[0] in OPTIONS[command], f"albor {command} has no {word}"
    every_option = set().union(*OPTIONS.values())
    for span in spans(page):
        if span.startswith("--"):
            assert span.split()[0] in every_option, f"no command has {span}"


def keys() -> set[str]:
    """Every key of the configuration, dotted, and the sections."""
    found = set()
    for name, field in RunConfig.model_fields.items():
        found.add(name)
        found |= {f"{name}.{key}" for key in getattr(field.annotation, "model_fields", {})}
    return found


@every_page
def test_configuration_keys_exist(page: Path):
    known = keys()
    sections = {key.partition(".")[0] for key in known if "." in key}
    overrides = [word for words in invocations(page) for word in words if re.match(r"[a-z_.]+=", word)]
    for word in [
        *spans(page),
        *overrides,
        *(part for span in spans(page) for part in span.split() if "=" in part),
    ]:
        key = re.match(r"([a-z_]+)\.([a-z_]+)(?![\w.(])", word)
        if key and key[1] in sections and key[2] not in SUFFIXES:
            assert key[0] in known, f"there is no key {key[0]}"


@every_page
def test_estimates_shown_are_what_the_command_prints(page: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.chdir(ROOT)
    for language, code, _ in blocks(page):
        first, *shown = code.splitlines()
        if language == "text" and first.startswith("$ albor vram-estimate"):
            result = CliRunner().invoke(cli.app, shlex.split(first)[2:])
            real = [line.rstrip() for line in result.output.splitlines()]
            assert [line.rstrip() for line in shown] == real, f"{first} prints:\n" + "\n".join(real)


def test_the_readme_has_the_two_commands_and_make_knows_them():
    code = "\n".join(code for _, code, _ in blocks(ROOT / "README.md"))
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in ("quickstart", "test"):
        assert re.search(rf"^make {target}\b", code, re.MULTILINE)
        assert re.search(rf"^{target}:", makefile, re.MULTILINE)


def test_the_map_in_the_readme_is_the_repository():
    drawn = next(code for _, code, _ in blocks(ROOT / "README.md") if code.startswith("configs/"))
    for line in drawn.splitlines():
        folder = ROOT / "albor" if line.startswith("  ") else ROOT
        assert (folder / line.split()[0]).exists(), line


def test_the_sizes_in_the_readme_are_what_the_plan_says(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(ROOT)
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(configs/\S+)` \| ([\d,]+) \|.*\| ([\d,]+) bytes \|$", text, re.MULTILINE)
    assert len(rows) == 4
    for config, parameters, arena in rows:
        result = CliRunner().invoke(cli.app, ["vram-estimate", config, "--gpu", "RTX 4090", "--json"])
        plan = json.loads(result.output)
        assert (parameters, arena) == (f"{plan['parameters']:,}", f"{plan['device_bytes']:,}"), config
    command = next(
        line for _, code, _ in blocks(ROOT / "README.md") for line in code.splitlines() if "--gpu" in line
    )
    assert (
        re.search(r"^Fits: .*$", CliRunner().invoke(cli.app, shlex.split(command)[1:]).output, re.MULTILINE)[
            0
        ]
        in text
    )


def test_the_exit_codes_of_the_readme_are_those_of_the_code():
    source = (ROOT / "albor/errors.py").read_text(encoding="utf-8")
    table = {
        int(code)
        for code in re.findall(
            r"^\| `?(\d+)`? \|", (ROOT / "README.md").read_text(encoding="utf-8"), re.MULTILINE
        )
    }
    assert {int(code) for code in re.findall(r"exit_code = (\d+)", source)} <= table


def test_nothing_here_needs_torch():
    """So that these checks stay quick."""
    code = "import sys, albor.cli, albor.configfile; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_benchmark_of_the_readme_is_the_committed_record():
    table = re.search(
        r"<!-- cpu-benchmark -->(.*?)<!--", (ROOT / "README.md").read_text(encoding="utf-8"), re.S
    )
    record = json.loads((ROOT / "benchmarks/results/cpu.json").read_text(encoding="utf-8"))
    assert table is not None
    rows = [row.split("|")[2:6] for row in table[1].splitlines()[3:] if row.startswith("|")]
    assert len(rows) == len(record["systems"]) == 5
    for (speed, ratio, _, first_step), system in zip(rows, record["systems"].values(), strict=True):
        assert speed.strip() == f"{system['tokens_per_second']:,}"
        faster = system["albor_is_faster_by"]
        assert ratio.strip() == (f"{faster:.2f}x" if faster else "")
        assert first_step.strip() == f"{system['first_step_seconds']:.1f} s"


def test_the_speed_of_writing_in_the_docs_is_the_committed_record():
    table = re.search(
        r"<!-- decode-benchmark -->(.*?)<!--", (ROOT / "docs/generate.md").read_text(encoding="utf-8"), re.S
    )
    record = json.loads((ROOT / "benchmarks/results/decode.json").read_text(encoding="utf-8"))
    assert table is not None
    rows = {
        cells[1].strip(): cells[2:4] for cells in (row.split("|") for row in table[1].splitlines()[3:] if row)
    }
    systems = record["systems"]
    for name, key in {
        "albor, fp32": "albor fp32, 1 thread",
        "llama.cpp, F32 file": "llama.cpp F32, 1 thread",
        "llama.cpp, BF16 file": "llama.cpp BF16, 1 thread",
    }.items():
        speed, ratio = map(str.strip, rows.pop(name))
        assert speed == f"{systems[key]['tokens_per_second']:,}"
        assert ratio == (f"{systems[key]['albor_is_faster_by']:.2f}x" if "llama" in name else "")
    assert not rows
