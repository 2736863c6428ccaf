"""Writes docs/configuration.md from the schema of the YAML file, so that the two cannot differ.

python docs/generate_configuration.py
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from albor.configfile import schema
from albor.train.resume_policy import POLICIES, Policy

PAGE = Path(__file__).parent / "configuration.md"
LARGEST = 2**63 - 1  # the bound of every count, which says nothing to a reader

INTRODUCTION = """\
<!-- Written by docs/generate_configuration.py; edit the descriptions in albor/config.py instead. -->

# Configuration

One YAML file describes a run. `name`, `model` and `train` must be there; every other section and key has the
default shown below. The files in `configs/` are complete examples, with a comment on every key.

**On the command line.** `albor train`, `albor vram-estimate`, `albor data prepare` and the tokenizer commands
take overrides after the file: `optimizer.lr=3e-4`, `data.sequence_length=2048`, `data.sources[0].weight=2`.
The value is YAML, and `null` clears a key. Overrides apply in order. What a run really used is written to
`config.resolved.yaml` in its run directory, with every key; `albor train --dry-run` prints it with the
memory plan and trains nothing, and exits with 4 where the plan does not fit.

**Numbers.** A *count* is a whole number and may be written `20000`, `20_000`, `1e6`, `20K` (20,000), `2B`
(2,000,000,000) or `64Ki` (65,536). A *size* is a number of bytes: `200MB` (200,000,000), `24GiB` (24 x 2^30),
or plain bytes. Every spelling of a number that YAML 1.2 knows works, `3e-4` included.

**Mistakes.** Unknown and duplicate keys are errors. All problems are reported at once, each with its line,
the key, and what would be right, and the exit code is 2:

<!-- from tests/configs_malformed/misspelt_keys.yaml -->
```text
misspelt_keys.yaml:2: lr: unknown key; did you mean optimizer.lr?
misspelt_keys.yaml:4: model.hiden_size: unknown key; did you mean hidden_size?
misspelt_keys.yaml:9: train.max_step: unknown key; did you mean max_steps?
```

Relations between keys are checked as well: heads must divide the hidden size, a warm-up must end within the
run, the run may not repeat its data more often than `data.max_epochs` allows.

**In an editor.** The first line of the shipped files names the JSON schema, by which editors with a YAML
language server complete keys and show what they mean. `albor schema` prints it for files elsewhere.

**When a run goes on** from a checkpoint, some keys may have another value than before. The
[table at the end](#when-a-run-goes-on) has all of them.
"""

RESUME = """\
## When a run goes on

What `albor train` does with a key that is not what the checkpoint was trained with
(`albor/train/resume_policy.py` holds this table). A change that is refused is named, with all others, before
anything is written, and the exit code is 2; it would make another run, which needs another `name`. One that
is allowed is said, and recorded in `events.jsonl` as `config_changed` with the key, the value before and the
value after. The keys of a source are those of its place in the list.
"""


def page() -> str:
    """The whole page."""
    whole = schema()
    definitions, top = whole["$defs"], whole["properties"]
    sections = {name: definitions[_reference(field)] for name, field in top.items() if _reference(field)}
    parts = [INTRODUCTION, "## The top of the file\n"]
    plain = {name: field for name, field in top.items() if name not in sections}
    parts.append(_table(plain, whole["required"], ""))
    for name, section in sections.items():
        parts.append(f"## {name}\n\n{section['description']}\n")
        parts.append(_table(section["properties"], section.get("required", []), f"{name}."))
        for kind, reference in _kinds(section).items():
            source = definitions[reference.rpartition("/")[2]]
            keys = {key: field for key, field in source["properties"].items() if key != "kind"}
            parts.append(f"### `kind: {kind}`\n\n{source['description']}\n")
            parts.append(_table(keys, source["required"], ""))
    parts.append(RESUME)
    parts.append(_resume_table())
    return "\n".join(parts)


def _resume_table() -> str:
    """`POLICIES` with the keys of one policy in one row."""
    keys: dict[Policy, list[str]] = {}
    for key, policy in POLICIES.items():
        keys.setdefault(policy, []).append(f"`{key}`")
    words = {"allowed": "yes", "refused": "no", "schedule": "in part"}
    rows = [("may change", "keys", "because"), ("---", "---", "---")]
    order = sorted(keys, key=lambda policy: list(words).index(policy.verdict))
    rows += [(words[policy.verdict], ", ".join(keys[policy]), policy.why) for policy in order]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows) + "\n"


def _reference(field: dict[str, Any]) -> str:
    """The section that a top-level field is, or ''."""
    return str(field.get("$ref", "")).rpartition("/")[2]


def _kinds(section: dict[str, Any]) -> dict[str, str]:
    """The kinds of `data.sources`, by name."""
    sources = section["properties"].get("sources", {})
    if not sources:
        return {}
    mapping = sources["items"]["discriminator"]["mapping"]
    order = [item["$ref"] for item in sources["items"]["oneOf"]]
    return dict(sorted(mapping.items(), key=lambda item: order.index(item[1])))


def _table(fields: dict[str, Any], required: list[str], prefix: str) -> str:
    rows = [("key", "value", "default", "meaning"), ("---", "---", "---", "---")]
    for name, field in fields.items():
        default = "required" if name in required else _default(field["default"], field)
        rows.append((f"`{prefix}{name}`", _value(field), default, _escape(field["description"])))
    return "\n".join(f"| {' | '.join(row)} |" for row in rows) + "\n"


def _escape(text: str) -> str:
    """`text` for a cell of a table. Code keeps its stars."""
    parts = text.split("`")
    parts[::2] = [re.sub(r"([*|<])", r"\\\1", part) for part in parts[::2]]
    return "`".join(parts)


def _default(value: Any, field: dict[str, Any]) -> str:
    if _is_size(field) and isinstance(value, int):
        return f"`{value // 10**6}MB`"
    if isinstance(value, float):
        return f"`{value:g}`".replace("e-0", "e-")
    if isinstance(value, list) and value and isinstance(value[0], dict):
        return f"`[{{kind: {value[0]['kind']}}}]`"
    return f"`{json.dumps(value) if not isinstance(value, str) else value}`"


def _value(field: dict[str, Any]) -> str:
    """What may stand there, in words."""
    alternatives = list(_alternatives(field))
    return " or ".join(dict.fromkeys(alternatives))


def _alternatives(field: dict[str, Any]) -> Iterator[str]:
    if "anyOf" in field:
        options = field["anyOf"]
        if any(option.get("type") == "integer" for option in options):
            lowest = next(option["minimum"] for option in options if option.get("type") == "integer")
            yield ("size" if _is_size(field) else "count") + (", or 0" if lowest == 0 else "")
            options = [option for option in options if option.get("type") == "null"]
        for option in options:
            yield from _alternatives(option)
    elif "enum" in field:
        yield ", ".join(f"`{choice}`" for choice in field["enum"])
    elif "const" in field:
        yield f"`{field['const']}`"
    elif field.get("type") == "array":
        inner = field.get("prefixItems", [field.get("items", {})])[0]
        if "oneOf" in inner:
            yield "list of sources, each by its `kind`"
        elif "prefixItems" in field:
            yield f"list of {len(field['prefixItems'])}, each a {_value(inner)}"
        else:
            yield f"list of {_value(inner)}"
    elif field.get("type") in ("number", "integer"):
        yield ("number" if field["type"] == "number" else "whole number") + _bounds(field)
    elif field.get("type") == "object":
        yield f"group of keys, each with {_value(field['additionalProperties'])}"
    elif "pattern" in field:
        yield f"text that matches `{field['pattern']}`"
    else:
        yield {"boolean": "`true`, `false`", "null": "`null`", "string": "text"}[field["type"]]


def _is_size(field: dict[str, Any]) -> bool:
    return any("?)?[Bb])?$" in str(option.get("pattern")) for option in field.get("anyOf", []))


def _bounds(field: dict[str, Any]) -> str:
    words = (("minimum", "≥"), ("exclusiveMinimum", ">"), ("maximum", "≤"), ("exclusiveMaximum", "<"))
    found = [f"{sign} {field[key]:g}" for key, sign in words if key in field and abs(field[key]) < LARGEST]
    return f" {' and '.join(found)}" if found else ""


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    print(f"wrote {PAGE}")
