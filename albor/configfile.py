"""A YAML file and dotted overrides -> a `RunConfig`, or every problem at once, each on its line. Files of
other kinds (a ladder, a sweep) are read with the same parts: `read_file` and `validate_as`.

    configs/mine.yaml:12: model.hiden_size: unknown key; did you mean hidden_size?
    command line: optimizer.lr: is the text 'fast'; a number is expected

Types and ranges are pydantic's to judge, relations between keys are `check_algebra`'s, and what a rule may be
about is `check_alerts`'; this module says where a problem stands and what would be right.
"""

from __future__ import annotations

import difflib
import re
import stat
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from albor.config import RunConfig, Section, Source, check_algebra
from albor.errors import ConfigError, Problem
from albor.metric_names import check_alerts
from albor.yamlcore import (
    COMMAND_LINE,
    MAX_BYTES,
    UNREADABLE,
    Document,
    KeyPath,
    dotted,
    dump_yaml,
    read_yaml,
)

_MOST_PROBLEMS = 100  # that are reported at once
_SOURCES: KeyPath = ("data", "sources")
_SOURCE_TYPES: dict[str, type[Section]] = {
    get_args(source.model_fields["kind"].annotation)[0]: source for source in get_args(get_args(Source)[0])
}
SectionType = TypeVar("SectionType", bound=Section)
_OVERRIDE = re.compile(r"(?P<key>[\w-]+(?:\.[\w-]+|\[[0-9]+\])*)\s*=(?P<value>.*)", re.DOTALL | re.ASCII)

# Any valid values: they hold the place of required keys that are broken, so that the algebra of all others
# can still be checked. What involves a broken key is not reported, so these numbers reach no one.
_STAND_INS: dict[str, Any] = {
    "name": "stand-in",
    "model": dict.fromkeys(
        ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size"), 2
    ),
    "train": {},
}


def load_config(path: Path, overrides: Sequence[str] = ()) -> RunConfig:
    """The run that the file at `path` describes, after `overrides` (`optimizer.lr=3e-4`, applied in order).

    An override's value is YAML. `data.sources[0].weight=2` (or `.0.`) reaches into a list that the file
    gives; `null` clears a key. Raises ConfigError with everything that is wrong.
    """
    document = read_file(path, "give at least name, model and train")
    for override in overrides:
        apply_override(document, override)

    config, broken = _validate(document)
    for problem in [*check_algebra(config), *check_alerts(config)]:
        keys = (problem.key, *problem.related)
        if not any(overlap(key, other) for key in keys for other in broken):
            paths = [_path_of(key) for key in keys]
            document.refuse(paths[0], problem.message, problem.remedy, _blame(document, paths))
    if document.problems:
        raise refused(document)
    return config


def read_file(path: Path, least: str) -> Document:
    """The keys of the YAML file at `path`; `least` is the remedy for an empty one.

    Single keys that are wrong are in its `problems`; raises ConfigError where there are no keys at all.
    """
    document = read_yaml(_read_text(path), str(path))
    if document.value is None:
        raise ConfigError([Problem("", "the file is empty", least, str(path))])
    if document.value is UNREADABLE:
        raise ConfigError(_first(document.problems))
    if not isinstance(document.value, dict):
        what = f"the file holds {_describe(document.value).removeprefix('is ')}, not keys"
        raise ConfigError([Problem("", what, "begin with `name: my-run`", document.where(()))])
    return document


def validate_as(document: Document, root: type[SectionType]) -> SectionType | None:
    """The keys of `document` as a `root`. None where they are none: `document.problems` then says why, key by
    key.
    """
    try:
        return root.model_validate(document.value)
    except ValidationError as invalid:
        _refuse_all(document, invalid, root)
        return None


def refused(document: Document) -> ConfigError:
    """Everything that is wrong with a document, in the order of its lines."""
    return ConfigError(_first(sorted(document.problems, key=_line)))


def _path_of(key: str) -> KeyPath:
    """A rule of `alerts` is one key, whatever points there are in its number."""
    return tuple(key.split(".", 1 if key.startswith("alerts.") else -1))


def _first(problems: list[Problem]) -> list[Problem]:
    """As many as a person reads, and how many there are besides."""
    more = len(problems) - _MOST_PROBLEMS
    return problems if more <= 0 else [*problems[:_MOST_PROBLEMS], Problem("", f"and {more:,} more problems")]


def dump_config(config: RunConfig) -> str:
    """`config` as YAML with every key written out; `load_config` reads it back to an equal value."""
    return dump_yaml(config.model_dump(mode="json"))


def schema() -> dict[str, Any]:
    """The JSON schema of the YAML file, by which editors complete keys and show what they mean."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **RunConfig.model_json_schema()}


def _read_text(path: Path) -> str:
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode) and not stat.S_ISDIR(status.st_mode):
            # Opening a pipe may wait for ever, and what is read from it cannot be read again.
            problem = Problem("", "is no regular file", "give the path of a YAML file", str(path))
            raise ConfigError([problem])
        with path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
        if len(content) <= MAX_BYTES:
            return content.decode()
        message, remedy, line = f"is larger than {MAX_BYTES:,} bytes", "is this the configuration?", ""
    except UnicodeDecodeError as error:
        message, remedy = f"byte {error.object[error.start]:#04x} is not UTF-8", "save the file as UTF-8"
        line = ":" + str(error.object.count(b"\n", 0, error.start) + 1)
    except FileNotFoundError:
        message, remedy, line = "there is no such file", "give the path of a YAML file", ""
    except IsADirectoryError:
        message, remedy, line = "is a directory", "give the path of a YAML file in it", ""
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        reason = (error.strerror if isinstance(error, OSError) else None) or str(error)
        message, remedy, line = f"cannot be read ({reason})", "", ""
    raise ConfigError([Problem("", message, remedy, f"{path}{line}")])


def apply_override(document: Document, override: str) -> None:
    """Replaces a key of `document` by KEY=VALUE; what is wrong with that is added to its problems."""
    match = _OVERRIDE.fullmatch(override)
    if match is None:
        message = f"{override!r} is not an override"
        document.refuse((), message, "write key=value, such as optimizer.lr=3e-4", COMMAND_LINE)
        return
    steps = re.findall(r"[\w-]+", match["key"])
    path: KeyPath = tuple(int(step) if re.fullmatch("[0-9]{1,6}", step) else step for step in steps)
    try:
        given = read_yaml(match["value"], COMMAND_LINE, path)
    except ConfigError as error:
        document.problems += error.problems
        return
    document.problems += given.problems

    parent = document.value
    for depth, step in enumerate(path, 1):
        outer = dotted(path[: depth - 1])
        if isinstance(step, int) and not (isinstance(parent, list) and step < len(parent)):
            message, remedy = "there is no such item in the file", f"give the whole list, as in {outer}=[...]"
            document.refuse(path[:depth], message, remedy, COMMAND_LINE)
            return
        if isinstance(step, str) and not isinstance(parent, dict):
            document.refuse(path, f"cannot be set, because {outer} {_describe(parent)}", "", COMMAND_LINE)
            return
        if depth == len(path):
            parent[step] = given.value
        elif isinstance(step, str):
            if isinstance(path[depth], str) and parent.get(step) is None:
                parent[step] = {}
                document.places[path[:depth]] = COMMAND_LINE
            parent = parent.get(step)
        else:
            parent = parent[step]

    replaced = [place for place in document.places if place[: len(path)] == path]
    for place in replaced:
        del document.places[place]
    document.places |= {path: COMMAND_LINE, **given.places}


def _validate(document: Document) -> tuple[RunConfig, set[str]]:
    """The configuration with every broken key replaced by a default or a stand-in, and these keys."""
    broken = {problem.key for problem in document.problems if problem.key}
    try:
        return RunConfig.model_validate(document.value), broken
    except ValidationError as invalid:
        paths, meant = _refuse_all(document, invalid, RunConfig)
    for path in paths:
        _mend(document.value, path)
    return RunConfig.model_validate(document.value), broken | meant | {dotted(path) for path in paths}


def _refuse_all(
    document: Document, invalid: ValidationError, root: type[Section]
) -> tuple[list[KeyPath], set[str]]:
    """Adds what is wrong with a `root` to the problems. Returns the keys, and those that were misspelt."""
    errors = [(_path(error), error) for error in invalid.errors(include_url=False)]
    # A misspelt key is one problem, not two: the key that was meant is not missing.
    misspelt = (_meant(path, error, root) for path, error in errors if error["type"] == "extra_forbidden")
    meant = {*misspelt} - {""}
    for path, error in errors:
        if not _is_echo(error) and not (error["type"] == "missing" and dotted(path) in meant):
            document.refuse(path, *_explain(path, error, root))
    return [path for path, _ in errors], meant


def _path(error: ErrorDetails) -> KeyPath:
    """Where an error stands in the YAML; pydantic's path has a source's kind in it besides."""
    path = error["loc"]
    if path[:2] == _SOURCES:
        path = path[:3] + path[4:]
    if path[-1:] == ("[key]",):  # of a mapping, which is itself what is wrong
        path = path[:-1]
    return (*path, "kind") if error["type"].startswith("union_tag") else path


def _is_echo(error: ErrorDetails) -> bool:
    """Whether the error only repeats one that is reported elsewhere: a value that the YAML reader refused, a
    list that is too short once its broken items are taken away."""
    kind, value = error["type"], error["input"]
    if kind == "too_short":
        return len(value) >= error["ctx"]["min_length"]
    if kind == "union_tag_invalid":
        value = value["kind"]
    return value is UNREADABLE and kind != "extra_forbidden"


def _mend(data: Any, path: KeyPath) -> None:
    stand_in: Any = _STAND_INS
    for depth, step in enumerate(path, 1):
        stand_in = stand_in.get(step) if isinstance(stand_in, dict) else None
        # A list goes as a whole: its default is right, and what is left of it may not be.
        if depth == len(path) or isinstance(path[depth], int):
            if isinstance(data, dict):
                data.pop(step, None)
                if stand_in is not None:
                    data[str(step)] = stand_in if not isinstance(stand_in, dict) else dict(stand_in)
            return
        if step not in data:  # an earlier error has removed the list
            return
        data = data[step]


def overlap(one: str, other: str) -> bool:
    """Whether two dotted keys are the same, or one is a section or a list that holds the other."""
    short, long = sorted((one, other), key=len)
    return long == short or long.startswith((f"{short}.", f"{short}["))


def _blame(document: Document, paths: Sequence[KeyPath]) -> str:
    """Where a problem between keys stands: an override before the file, a given key before a default."""
    places = [document.where(path) for path in paths]
    given = [document.places[path] for path in paths if path in document.places]
    return COMMAND_LINE if COMMAND_LINE in places else (given or places)[0]


def _line(problem: Problem) -> int:
    line = problem.where.rpartition(":")[2]
    return int(line) if line.isdigit() else sys.maxsize


_EXPECTED = {
    "bool_type": "true or false is expected",
    "float_type": "a number is expected",
    "finite_number": "a finite number is expected",
    "int_type": "a whole number is expected",
    "string_type": "text is expected",
    "tuple_type": "a list is expected",
    "dict_type": "a group of keys is expected",
    "model_type": "a group of keys is expected",
    "model_attributes_type": "a group of keys, such as {kind: files, path: corpus}, is expected",
    # Only `name` has a pattern.
    "string_pattern_mismatch": "use letters, digits, '.', '_' and '-', with a letter or a digit first",
}
_BOUNDS = {
    "greater_than_equal": ("ge", "at least"),
    "greater_than": ("gt", "more than"),
    "less_than_equal": ("le", "at most"),
    "less_than": ("lt", "less than"),
}
_LENGTHS = {
    "too_short": ("min_length", "at least", "items"),
    "too_long": ("max_length", "at most", "items"),
    "string_too_short": ("min_length", "at least", "characters"),
    "string_too_long": ("max_length", "at most", "characters"),
}


def _explain(path: KeyPath, error: ErrorDetails, root: type[Section]) -> tuple[str, str]:
    """What is wrong and what would be right, in albor's words."""
    kind, value, context = error["type"], error["input"], error.get("ctx", {})
    if kind in _EXPECTED:
        return _describe(value), _EXPECTED[kind]
    if kind in _BOUNDS:
        bound, words = _BOUNDS[kind]
        limit = context[bound]
        return (
            f"must be {words} {limit if isinstance(limit, int) else format(limit, 'g')}, and is {value}",
            "",
        )
    if kind in _LENGTHS:
        bound, words, unit = _LENGTHS[kind]
        return f"has {len(value)} {unit}, where {words} {context[bound]} must be", ""
    if kind == "missing":
        field = _known_keys(path, error, root)[str(path[-1])]
        meaning = field.description or str(field.annotation.__doc__)  # a section's is its docstring
        return "is missing", f"add it ({meaning.rstrip('.')})"
    if kind == "extra_forbidden":
        return "unknown key", _advise(path, error, root)
    if kind == "literal_error":
        return _describe(value), f"use {context['expected']}"
    if kind == "union_tag_not_found":
        return "is missing", f"add one of {', '.join(_SOURCE_TYPES)}"
    if kind == "union_tag_invalid":
        return _describe(value["kind"]), f"use one of {', '.join(_SOURCE_TYPES)}"
    return str(context.get("error", error["msg"])), ""  # a ValueError of our own in config.py says it all


def _describe(value: Any) -> str:
    match value:
        case None:
            return "is empty (null)"
        case bool():
            return f"is {str(value).lower()}"
        case str():
            shown = value if len(value) <= 60 else value[:57] + "..."
            return f"is the text {shown!r}"
        case int() if abs(value) >= 10**30:
            return "is a number too large to mean"
        case int() | float():
            return f"is the number {value}"
        case list():
            return "is a list"
        case _:
            return "is a group of keys"


def _fields(root: type[Section], path: KeyPath, kind: str = "") -> dict[str, FieldInfo]:
    """The keys that may stand at `path`, which for an item of `data.sources` depends on its kind."""
    if path[:2] == _SOURCES and len(path) == 3:
        return _SOURCE_TYPES[kind].model_fields
    annotation: Any = root
    for step in path:
        if get_origin(annotation) is dict:  # whose keys are anybody's
            annotation = get_args(annotation)[1]
        elif isinstance(step, str):
            field = _section_in(annotation).get(step)
            annotation = None if field is None else field.annotation
    return _section_in(annotation)


def _section_in(annotation: Any) -> dict[str, FieldInfo]:
    """The keys of a section, or of the one that an annotation holds, such as `tuple[Section, ...]`."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation.model_fields
    return next((keys for inner in get_args(annotation) if (keys := _section_in(inner))), {})


def _known_keys(path: KeyPath, error: ErrorDetails, root: type[Section]) -> dict[str, FieldInfo]:
    """The keys that may stand beside `path`."""
    kind = str(error["loc"][3]) if path[:2] == _SOURCES and len(path) > 3 else ""
    return _fields(root, path[:-1], kind)


def _meant(path: KeyPath, error: ErrorDetails, root: type[Section]) -> str:
    """The dotted key for which the unknown one at `path` was probably meant; empty if none is near."""
    if "." in str(path[-1]):  # `optimizer.lr: 1` in a file, where it is one flat key
        return dotted(path)
    known = _known_keys(path, error, root)
    near = difflib.get_close_matches(str(path[-1]).lower(), known, n=1, cutoff=0.7)
    return dotted((*path[:-1], near[0])) if near else ""


def _advise(path: KeyPath, error: ErrorDetails, root: type[Section]) -> str:
    if "." in str(path[-1]):
        return "dotted keys are for the command line; write one key inside the other"
    if meant := _meant(path, error, root):
        return f"did you mean {meant.rpartition('.')[2]}?"
    if len(path) <= 2:  # a key of another section
        names = root.model_fields
        homes = [f"{name}.{path[-1]}" for name in names if path[-1] in _fields(root, (name,))]
        if homes:
            return f"did you mean {' or '.join(homes)}?"
    return f"the keys here are {', '.join(_known_keys(path, error, root))}"
