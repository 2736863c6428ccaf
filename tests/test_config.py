"""The YAML file, its overrides, its messages, its schema, and the shipped configurations."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import jsonschema
import pytest
import yaml
from hypothesis import HealthCheck, given, settings

from albor.config import RunConfig
from albor.configfile import dump_config, load_config, schema
from albor.errors import ConfigError
from albor.units import parse_bytes, parse_count
from albor.yamlcore import dump_yaml, read_yaml

ROOT = Path(__file__).parent.parent
# Those of runs: ladders and sweeps have no model of their own.
SHIPPED = [path for path in sorted((ROOT / "configs").glob("*.yaml")) if "\nmodel:" in path.read_text()]
MALFORMED = sorted((ROOT / "tests" / "configs_malformed").glob("*.yaml"))

MINIMAL = """\
name: minimal
model:
  hidden_size: 64
  intermediate_size: 128
  num_hidden_layers: 2
  num_attention_heads: 4
  vocab_size: 512
train:
  max_steps: 500
"""


@pytest.fixture
def minimal(tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(MINIMAL)
    return path


def messages(path: Path, *overrides: str) -> list[str]:
    """What is wrong, a line each, with the file's name (but not its line) left out."""
    with pytest.raises(ConfigError) as caught:
        load_config(path, overrides)
    assert str(caught.value) == "\n".join(map(str, caught.value.problems))
    return [str(problem).removeprefix(f"{path}").removeprefix(":") for problem in caught.value.problems]


# Shipped configurations


@pytest.mark.parametrize(
    ("name", "parameters", "tokens_per_step"),
    [
        ("quickstart", 2_361_024, 2_048),
        ("pretrain-50m", 62_403_072, 32_768),
        ("pretrain-125m", 163_603_200, 122_880),
        ("pretrain-350m", 398_509_056, 131_072),
        ("pretrain-1.3b", 1_224_837_120, 131_072),
    ],
)
def test_shipped_config_has_the_published_size(name: str, parameters: int, tokens_per_step: int) -> None:
    config = load_config(ROOT / "configs" / f"{name}.yaml")
    model = config.model
    assert model.num_key_value_heads is not None
    c, f = model.hidden_size, model.intermediate_size
    kv = c // model.num_attention_heads * model.num_key_value_heads
    block = 2 * c * c + 2 * c * kv + 3 * c * f + 2 * c  # q and o, k and v, gate-up-down, two norms
    assert model.tie_word_embeddings
    assert model.vocab_size * c + model.num_hidden_layers * block + c == parameters
    assert config.tokens_per_step == tokens_per_step
    assert config.name == name
    assert config.train.accumulator == "cpu"


def test_every_shipped_config_is_tested() -> None:
    sizes = {"pretrain-50m", "pretrain-125m", "pretrain-350m", "pretrain-1.3b"}
    assert {path.stem for path in SHIPPED} >= {"quickstart", *sizes}


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_config_explains_every_key(path: Path) -> None:
    lines = path.read_text().splitlines()
    assert lines[0] == "# yaml-language-server: $schema=../albor/config.schema.json"
    self_explaining = re.compile(r"\s*(- )?((name|kind|path|split|weight|text_key): .*|\w+:)")
    for line in lines[1:]:
        assert not line or "#" in line or self_explaining.fullmatch(line), f"{path.name}: no comment: {line}"


# Schema


def test_schema_file_is_current() -> None:
    shipped = (ROOT / "albor" / "config.schema.json").read_text()
    remedy = "write json.dumps(albor.configfile.schema(), indent=2) to albor/config.schema.json"
    assert json.loads(shipped) == schema(), remedy


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_config_validates_against_the_schema(path: Path) -> None:
    validator = jsonschema.Draft202012Validator(schema())
    value = read_yaml(path.read_text(), path.name).value
    validator.validate(value)
    validator.validate(load_config(path).model_dump(mode="json"))


@pytest.mark.parametrize(
    ("given", "instead"),
    [
        ("seed: 1", "sed: 1"),
        ("hidden_size: 64", "hidden_size: 0"),
        ("max_steps: 500", "max_steps: 2X"),
        ("seed: 1", "optimizer: {lr: fast}"),
        ("seed: 1", "schedule: {kind: cosin}"),
        ("seed: 1", "data: {sources: [{kind: files}]}"),
        ("seed: 1", "tokenizer: {sample_bytes: 200M}"),
    ],
)
def test_schema_refuses_what_the_loader_refuses(minimal: Path, given: str, instead: str) -> None:
    text = MINIMAL + "seed: 1\n"
    validator = jsonschema.Draft202012Validator(schema())
    assert validator.is_valid(yaml.safe_load(text))
    assert not validator.is_valid(yaml.safe_load(text.replace(given, instead, 1)))
    minimal.write_text(text.replace(given, instead, 1))
    assert len(messages(minimal)) == 1


def test_schema_describes_every_key() -> None:
    for name, section in schema()["$defs"].items():
        assert section["additionalProperties"] is False
        for key, field in section["properties"].items():
            assert "description" in field or field.get("const"), f"{name}.{key} has no description"


# Malformed files: each ends with the messages that it must cause, `# LINE: KEY: MESSAGE`, in order


@pytest.mark.parametrize("path", MALFORMED, ids=lambda path: path.stem)
def test_malformed_file(path: Path) -> None:
    expected = re.findall(r"^# (\d+: .*)$", path.read_text(), re.MULTILINE)
    assert expected, "the file does not say what is expected"
    assert messages(path) == expected


def test_there_are_at_least_ten_malformed_files() -> None:
    assert len(MALFORMED) >= 10


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "the file is empty; give at least name, model and train"),
        (b"# only a comment\n", "the file is empty; give at least name, model and train"),
        (b"name: a\nseed: \xff\n", "2: byte 0xff is not UTF-8; save the file as UTF-8"),
        (b"name: a\nseed: \x07\n", "2: has the character '\\x07', which YAML does not allow; remove it"),
        (b"just text", "1: the file holds the text 'just text', not keys; begin with `name: my-run`"),
        (b"!mine {}", "1: has the tag !mine, which is not understood here; write a plain value"),
        (b"#" * 300_000, "is larger than 262,144 bytes; is this the configuration?"),
        (b"[" * 1000, "1: is not valid YAML: more than 16 levels of nesting"),
        (b'"\\ud800": 1', "1: has '\\ud800' as a key; keys are plain text; quote it if it is meant"),
    ],
)
def test_unreadable_content(tmp_path: Path, content: bytes, expected: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_bytes(content)
    assert messages(path)[0].strip() == expected


def test_unreadable_file(tmp_path: Path) -> None:
    absent = tmp_path / "absent.yaml"
    assert messages(absent) == [" there is no such file; give the path of a YAML file"]
    assert messages(tmp_path) == [" is a directory; give the path of a YAML file in it"]
    assert messages(tmp_path / "a\0b")[0].startswith(" cannot be read (")


def test_byte_order_mark_is_no_character(minimal: Path) -> None:
    minimal.write_bytes(b"\xef\xbb\xbf" + MINIMAL.encode())
    assert load_config(minimal).name == "minimal"


# YAML


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("3e-4", 3e-4),
        ("1E6", 1e6),
        (".5", 0.5),
        ("+1.0", 1.0),
        ("5.", 5.0),
        ("1_000.5", 1000.5),
        ("-12", -12),
        ("012", 12),
        ("1_000", 1000),
        ("0x10", 16),
        ("0o17", 15),
        ("true", True),
        ("False", False),
        ("~", None),
        ("null", None),
        ("", None),
        ("-.inf", float("-inf")),
        ('"3e-4"', "3e-4"),
        ("!!str 12", "12"),
        ("!!float 12", 12.0),
        *(
            (text, text)
            for text in ("no", "on", "Yes", "y", "12:30:45", "2024-01-01", "0b1", "1e", ".", "=", "_1")
        ),
    ],
)
def test_scalars_follow_the_yaml_1_2_core_schema(text: str, value: Any) -> None:
    read = read_yaml(text, "text").value
    assert read == value
    assert type(read) is type(value)


@pytest.mark.parametrize(
    "text",
    [
        "3e-4",
        "no",
        "1_000",
        "0o17",
        "~",
        "12:30:45",
        "a: b",
        " a ",
        "",
        "x\n",
        "\x85",
        "\u2028",
        "é😀",
        "\ufeff",
    ],
)
def test_written_text_reads_back_as_text(text: str) -> None:
    written = dump_yaml({"key": text})
    assert read_yaml(written, "text").value == {"key": text}
    assert yaml.safe_load(written) == {"key": text}  # YAML 1.1 readers agree


def test_aliases_are_expanded(minimal: Path) -> None:
    minimal.write_text("runs_dir: &dir here\ndata: {cache_dir: *dir}\n" + MINIMAL)
    assert load_config(minimal).data.cache_dir == "here"


@pytest.mark.parametrize(
    ("text", "count"),
    [("20K", 20_000), ("2B", 2 * 10**9), ("64Ki", 65_536), ("1.005K", 1005), ("1e3", 1000), ("1_0", 10)],
)
def test_counts(text: str, count: int) -> None:
    assert parse_count(text) == count


@pytest.mark.parametrize(
    ("text", "size"),
    [("200MB", 2 * 10**8), ("24GiB", 24 * 2**30), ("1.5 KiB", 1536), ("512B", 512), ("7", 7)],
)
def test_sizes(text: str, size: int) -> None:
    assert parse_bytes(text) == size


# Overrides


def test_overrides_are_yaml_at_dotted_paths(minimal: Path) -> None:
    config = load_config(
        minimal,
        [
            "optimizer.lr=3e-4",
            "data.sources=[{kind: files, path: x}, {kind: python-stdlib}]",
            "data.sources.0.weight=2",
            "data.sources[1].weight=.5",
            "data.sources[0].path=y",
            "train.max_steps=null",
            "train.max_tokens=1B",
            "evaluate.prompts=['a=b']",
            "seed=1",
            "seed=2",
        ],
    )
    assert config.optimizer.lr == 3e-4
    assert [source.weight for source in config.data.sources] == [2.0, 0.5]
    assert config.data.sources[0].path == "y"
    assert config.train.max_steps is None
    assert config.train.max_tokens == 10**9
    assert config.evaluate.prompts == ("a=b",)
    assert config.seed == 2


def test_override_fills_a_section_that_the_file_leaves_empty(minimal: Path) -> None:
    minimal.write_text(MINIMAL + "log:\n")
    assert load_config(minimal, ["log.every_steps=3"]).log.every_steps == 3


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("optimizer.lr=fast", "optimizer.lr: is the text 'fast'; a number is expected"),
        ("optimiser.lr=1", "optimiser: unknown key; did you mean optimizer?"),
        ("optimizer.lrr=1", "optimizer.lrr: unknown key; did you mean lr?"),
        ("grad_clip=1", "grad_clip: unknown key; did you mean optimizer.grad_clip?"),
        ("seed", "'seed' is not an override; write key=value, such as optimizer.lr=3e-4"),
        (".seed=1", "'.seed=1' is not an override; write key=value, such as optimizer.lr=3e-4"),
        ("seed.x=1", "seed: is a group of keys; a whole number is expected"),
        ("name.x=1", "name.x: cannot be set, because name is the text 'minimal'"),
        (
            "data.sources[0].weight=2",
            "data.sources[0]: there is no such item in the file; give the whole list, as in data.sources=[",
        ),
        (
            "data.sources=[{kind: hf}]",
            "data.sources[0].path: is missing; add it (The data set's name on the hub, ",
        ),
        (
            "optimizer.betas=[",
            "optimizer.betas: is not valid YAML: while parsing a flow node: expected the node",
        ),
        ("optimizer.betas=[0.9]", "optimizer.betas: has length 1; give two numbers, such as [0.9, 0.95]"),
        ("optimizer.betas=[]", "optimizer.betas: has length 0; give two numbers, such as [0.9, 0.95]"),
        ("model.num_hidden_layers=100K", "model.num_hidden_layers: must be at most 1000, and is 100000"),
        ("model={a: 1, a: 2}", "model.a: is given twice; remove one"),
        (
            "train.max_tokens=1M",
            "train.max_steps: the run's length is train.max_steps or train.max_tokens, and both are given; "
            "set one of them to null",
        ),
        (
            "train.max_steps=100",
            "schedule.warmup_steps: a warm-up of 100 steps does not end within the run's 100 (train.max_s",
        ),
        ("model=", "model: is empty (null); a group of keys is expected"),
    ],
)
def test_wrong_override_is_placed_on_the_command_line(minimal: Path, override: str, expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(minimal, [override])
    assert str(caught.value.problems[0]).startswith(f"command line: {expected}")


def test_override_that_mends_the_file_leaves_no_problem(minimal: Path) -> None:
    minimal.write_text(MINIMAL.replace("hidden_size: 64", "hidden_size: wrong", 1))
    assert messages(minimal)[0].startswith("3: model.hidden_size: ")
    assert load_config(minimal, ["model.hidden_size=128"]).model.hidden_size == 128


# Writing, and reading what was written

text = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), min_size=1, max_size=20)
awkward = text | st.sampled_from(
    ["3e-4", "no", "1_000", "0o17", "~", "<<", "12:30:45", "null", "=", " a ", "a: b"]
)
positive = st.floats(min_value=1e-300, max_value=1e300)
count = st.integers(1, 2**62)


@given(
    path=awkward,
    prompts=st.lists(awkward, unique=True, max_size=3),
    lr=positive,
    eps=positive,
    betas=st.tuples(*[st.floats(0, 1, exclude_max=True)] * 2),
    weight=positive,
    max_bytes=st.none() | count,
    layers=st.integers(1, 1000),
    seed=st.integers(0, 2**63 - 1),
)
@settings(max_examples=60, deadline=None)
def test_dumped_config_loads_back_equal(tmp_path_factory: pytest.TempPathFactory, **values: Any) -> None:
    source = {"kind": "files", "path": values["path"], "weight": values["weight"]}
    base = yaml.safe_load(MINIMAL)
    config = RunConfig.model_validate(
        base
        | {
            "seed": values["seed"],
            "model": base["model"] | {"num_hidden_layers": values["layers"]},
            "data": {"sources": [source | {"max_bytes": values["max_bytes"]}]},
            "optimizer": {"lr": values["lr"], "eps": values["eps"], "betas": list(values["betas"])},
            "evaluate": {"prompts": values["prompts"]},
        }
    )
    path = tmp_path_factory.getbasetemp() / "dumped.yaml"
    dumped = dump_config(config)
    path.write_bytes(dumped.encode())
    assert load_config(path) == config
    assert RunConfig.model_validate(yaml.safe_load(dumped)) == config  # YAML 1.1 readers agree


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_dumped_shipped_config_is_complete_and_stable(path: Path, tmp_path: Path) -> None:
    config = load_config(path)
    copy = tmp_path / "config.resolved.yaml"
    copy.write_text(dump_config(config))
    assert load_config(copy) == config
    assert dump_config(load_config(copy)) == copy.read_text()
    written = yaml.safe_load(copy.read_text())
    assert list(written) == list(RunConfig.model_fields)
    assert next(iter(written["data"]["sources"][0])) == "kind"


# Nothing but a ConfigError ever escapes

scalars = (
    st.none() | st.booleans() | st.integers() | st.floats() | awkward | st.sampled_from(["files", "hf", "2B"])
)
leaves = sorted({key for section in schema()["$defs"].values() for key in section["properties"]})
keys = st.sampled_from([*schema()["properties"], *leaves]) | awkward
trees = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(keys, inner, max_size=4)
)
SNIPPETS = [
    "\t",
    "[",
    "{",
    "}",
    "- ",
    ": ",
    "&a ",
    "*a",
    "!!int ",
    "<<: ",
    "'",
    '"',
    "null",
    "-1",
    "|\n",
    "\0",
    "é",
    "#",
]


def only_config_errors(path: Path, content: str, overrides: list[str]) -> None:
    path.write_bytes(content.encode(errors="surrogatepass"))
    problems = []
    try:
        load_config(path, overrides)
    except ConfigError as error:
        problems = error.problems or [None]
    for problem in problems:
        assert problem is not None, "an error without a problem"
        assert problem.message
        assert problem.where.startswith((str(path), "command line"))
        str(problem).encode()  # printable on any terminal


@given(st.data())
@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_fuzz_changed_values(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    value: Any = json.loads(
        json.dumps(yaml.safe_load(MINIMAL) | {"data": {"sources": [{"kind": "files", "path": "x"}]}})
    )
    for _ in range(data.draw(st.integers(1, 3))):
        place = value
        while isinstance(place, dict | list) and place:
            step = data.draw(st.sampled_from([*place]) | keys if isinstance(place, dict) else st.just(0))
            inner = place.get(step) if isinstance(place, dict) else place[step]
            if not isinstance(inner, dict | list) or data.draw(st.integers(0, 3)) == 0:
                place[step] = data.draw(trees)
                break
            place = inner
    overrides = data.draw(
        st.lists(st.builds("{}.{}={}".format, keys, keys | st.just("0"), scalars), max_size=2)
    )
    only_config_errors(tmp_path_factory.getbasetemp() / "fuzz.yaml", dump_yaml(value), overrides)


@given(
    config=st.sampled_from(SHIPPED),
    edits=st.lists(
        st.tuples(st.floats(0, 1), st.integers(0, 12), st.sampled_from(SNIPPETS) | text), max_size=4
    ),
    overrides=st.lists(text, max_size=1),
)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_fuzz_edited_text(
    tmp_path_factory: pytest.TempPathFactory,
    config: Path,
    edits: list[tuple[float, int, str]],
    overrides: list[str],
) -> None:
    content = re.sub("#.*", "", config.read_text())
    for where, removed, added in edits:
        at = int(where * len(content))
        content = content[:at] + added + content[at + removed :]
    only_config_errors(tmp_path_factory.getbasetemp() / "fuzz.yaml", content, overrides)
