"""YAML text -> plain values, each with the line on which it stands.

Scalars follow the YAML 1.2 core schema, in which `3e-4` is a number and `no`, `12:30:45` and `2024-01-01` are
text; PyYAML alone follows YAML 1.1, where each of these is something else. `1_000` stays a number, because
people write it. Refused: duplicate keys, keys that are not text, merge keys (`<<`, not in YAML 1.2), and tags
beyond the core schema. Aliases work, within bounds that keep an exploding file from being expanded.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

import yaml

from albor.errors import ConfigError, Problem

KeyPath = tuple[str | int, ...]

COMMAND_LINE = "command line"
UNREADABLE = object()  # stands where a problem has been reported already; no field accepts it

MAX_BYTES = 256 * 1024  # a configuration is a few kilobytes; these three bound the work on one that is not
MAX_NODES = 10_000
MAX_DEPTH = 16

_STR, _MAP, _SEQ = "tag:yaml.org,2002:str", "tag:yaml.org,2002:map", "tag:yaml.org,2002:seq"
_SCALARS = {
    "tag:yaml.org,2002:null": r"~|null|Null|NULL|",
    "tag:yaml.org,2002:bool": r"true|True|TRUE|false|False|FALSE",
    "tag:yaml.org,2002:int": r"[-+]?[0-9][0-9_]*|0o[0-7][0-7_]*|0x[0-9a-fA-F][0-9a-fA-F_]*",
    "tag:yaml.org,2002:float": r"[-+]?(?:\.[0-9][0-9_]*|[0-9][0-9_]*(?:\.[0-9_]*)?)(?:[eE][-+]?[0-9]+)?"
    r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
}
_PATTERNS = {tag: re.compile(rf"(?:{pattern})\Z") for tag, pattern in _SCALARS.items()}


class _CoreLoader(yaml.SafeLoader):
    yaml_implicit_resolvers: dict[Any, Any] = {}  # noqa: RUF012  (PyYAML's own name for the YAML 1.1 rules)
    depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        self.depth += 1  # PyYAML recurses here, so the bound has to stand here
        if self.depth > MAX_DEPTH + 1:  # a key's value at depth n is a child of n mappings
            mark = self.peek_event().start_mark
            raise yaml.MarkedYAMLError(problem=f"more than {MAX_DEPTH} levels of nesting", problem_mark=mark)
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node


class _CoreDumper(yaml.SafeDumper):
    """Writes what YAML 1.1 and 1.2 readers understand alike: text that either takes for more is quoted."""

    def ignore_aliases(self, data: Any) -> bool:
        return True

    def represent_text(self, text: str) -> yaml.ScalarNode:
        # Only double quotes have escapes; PyYAML folds a bare U+0085 or U+2028 into a space.
        return self.represent_scalar(_STR, text, style=None if text.isprintable() else '"')


_CoreDumper.add_representer(str, _CoreDumper.represent_text)

for _tag, _pattern in _PATTERNS.items():
    _CoreLoader.add_implicit_resolver(_tag, _pattern, None)
    _CoreDumper.add_implicit_resolver(_tag, _pattern, None)


@dataclass
class Document:
    """What a YAML text says. `places` maps the path of every key and list item to its place (`FILE:LINE`)."""

    source: str
    prefix: KeyPath = ()
    value: Any = None
    places: dict[KeyPath, str] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)

    def where(self, path: KeyPath) -> str:
        """The place of `path`, or of the nearest section around it."""
        while path and path not in self.places:
            path = path[:-1]
        return self.places.get(path, self.source)

    def refuse(self, path: KeyPath, message: str, remedy: str = "", where: str = "") -> None:
        self.problems.append(Problem(dotted(path), message, remedy, where or self.where(path)))


def dotted(path: KeyPath) -> str:
    """`data.sources[1].path` for `("data", "sources", 1, "path")`."""
    text = "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in path)
    return text.removeprefix(".")


def dump_yaml(value: Any) -> str:
    """`value` as block YAML in its own key order; `read_yaml` and any other YAML reader give it back."""
    return yaml.dump(value, Dumper=_CoreDumper, sort_keys=False, allow_unicode=True, width=110)


def read_yaml(text: str, source: str, prefix: KeyPath = ()) -> Document:
    """The one document that `text` holds, below `prefix`; `value` is None where there is none.

    `source` is a file's name, or COMMAND_LINE, which has no line numbers. What is wrong with single keys is
    left in `problems`; raises ConfigError where nothing can be read.
    """
    document = Document(source, prefix)
    try:
        root = yaml.compose(text, Loader=_CoreLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        message = ": ".join(part for part in (error.context, error.problem) if part)
        remedy = "indent with spaces, not with tabs" if r"'\t'" in message else ""
        raise _fatal(document, f"is not valid YAML: {message}", remedy, mark) from None
    except yaml.reader.ReaderError as error:
        mark = yaml.Mark(source, 0, text.count("\n", 0, error.position), 0, None, 0)
        message = f"has the character {chr(error.character)!a}, which YAML does not allow"
        raise _fatal(document, message, "remove it", mark) from None
    if root is not None:
        document.places[prefix] = _place(document, root.start_mark)
        document.value = _build(document, root, prefix)
    return document


def _place(document: Document, mark: Any) -> str:
    if document.source == COMMAND_LINE or mark is None:
        return document.source
    return f"{document.source}:{mark.line + 1}"


def _fatal(document: Document, message: str, remedy: str, mark: Any) -> ConfigError:
    return ConfigError([Problem(dotted(document.prefix), message, remedy, _place(document, mark))])


def _build(document: Document, node: Any, path: KeyPath) -> Any:
    if len(path) > MAX_DEPTH + len(document.prefix):  # only an alias can be deeper than what was composed
        raise _fatal(document, "an alias here contains itself", "write the values out", node.start_mark)
    if len(document.places) > MAX_NODES:
        raise _fatal(document, f"holds more than {MAX_NODES:,} values", "use fewer aliases", node.start_mark)
    if isinstance(node, yaml.MappingNode) and node.tag == _MAP:
        return _build_mapping(document, node, path)
    if isinstance(node, yaml.SequenceNode) and node.tag == _SEQ:
        items = []
        for index, item in enumerate(node.value):
            document.places[*path, index] = _place(document, item.start_mark)
            items.append(_build(document, item, (*path, index)))
        return items
    if isinstance(node, yaml.ScalarNode) and node.tag == _STR:
        if re.search("[\0\ud800-\udfff]", node.value):
            document.refuse(path, "holds a character that no text file can hold", "remove the escape")
            return UNREADABLE
        return node.value
    if isinstance(node, yaml.ScalarNode) and node.tag in _PATTERNS:
        try:
            return _read_scalar(node.tag, node.value)
        except ValueError as error:
            document.refuse(path, str(error), "write a plain value")
            return UNREADABLE
    tag = node.tag.replace("tag:yaml.org,2002:", "!!")
    document.refuse(path, f"has the tag {tag}, which is not understood here", "write a plain value")
    return UNREADABLE


def _build_mapping(document: Document, node: yaml.MappingNode, path: KeyPath) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for key_node, value_node in node.value:
        where = _place(document, key_node.start_mark)
        key = key_node.value
        if not isinstance(key_node, yaml.ScalarNode) or key_node.tag != _STR or not key.isprintable():
            shown = repr(key) if isinstance(key, str) else "a list or a group of keys"
            document.refuse(
                path, f"has {shown} as a key", "keys are plain text; quote it if it is meant", where
            )
        elif key == "<<":
            message = "merge keys (<<) are not part of YAML 1.2"
            document.refuse((*path, key), message, "write the keys out", where)
        elif key in values:
            first = document.places[*path, key].rpartition(":")[2]
            message = "is given twice" + (f", first on line {first}" if first.isdigit() else "")
            document.refuse((*path, key), message, "remove one", where)
        else:
            document.places[*path, key] = where
            values[key] = _build(document, value_node, (*path, key))
    return values


def _read_scalar(tag: str, text: str) -> Any:
    kind = tag.rpartition(":")[2]
    if not _PATTERNS[tag].match(text):  # an explicit tag, such as !!int on a word
        raise ValueError(f"{text[:40]!r} cannot be read as !!{kind}")
    if kind == "null":
        return None
    if kind == "bool":
        return text.lower() == "true"
    digits = text.replace("_", "")
    if kind == "int":
        if len(digits) > 100:  # Python refuses to convert thousands of digits, and nobody means them
            raise ValueError(f"is a number of {len(digits)} digits")
        return int(digits, {"0x": 16, "0o": 8}.get(digits[:2], 10))
    return float(digits.replace(".inf", "inf").replace(".nan", "nan") if "n" in digits.lower() else digits)
