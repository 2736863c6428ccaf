"""ladder.json: what a ladder has found so far, so that the same command goes on from there.

Whether a rung has been trained is not in it: its run directory says that. A file that cannot be read, or that
a later albor wrote, is refused and left as it is.
"""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

from albor import durable
from albor.errors import AlborError
from albor.ladder.file import Planned
from albor.ladder.gates import Result
from albor.ladder.ngrams import Baselines
from albor.ladder.predict import Comparison, Prediction, Speed
from albor.strictjson import from_json, read_bounded, to_json

STATE = "ladder.json"
VERSION = 1
_WANTED = {  # what the entries of a rung hold at least
    "budget": {"hours", "tokens"},
    "baselines": {field.name for field in fields(Baselines)},
    "prediction": {field.name for field in fields(Prediction)},
    "predicted_speed": {field.name for field in fields(Speed)},
    "result": {"parameters", "tokens", "loss", "tokens_per_second", "modelled_tokens_per_second", "hours"},
    "comparison": {field.name for field in fields(Comparison)} | {"verdict"},
}
_REMEDY = "move it away, and the same command judges anew; what has been trained stays"


class State:
    """The content of `DIRECTORY/ladder.json`. Each change is on the disk when its method returns."""

    def __init__(self, path: Path, content: dict[str, Any]):
        self._path, self._content = path, content

    @classmethod
    def open(cls, directory: Path, name: str) -> State:
        """What is there, or the beginning. Raises AlborError for a file that is not ours to replace."""
        path = directory / STATE
        try:
            content = from_json(read_bounded(path))
        except FileNotFoundError:
            return cls(path, {"version": VERSION, "name": name, "rungs": {}})
        except OSError as error:
            raise AlborError(f"{path} cannot be read: {error.strerror or error}") from error
        except ValueError as error:
            raise AlborError(f"{path} is damaged ({error}); {_REMEDY}") from error
        version = content.get("version") if isinstance(content, dict) else None
        if version != VERSION:
            known = f"this albor reads version {VERSION}"
            raise AlborError(f"{path} has version {version!r}, and {known}; {_REMEDY}")
        try:
            for rung in content["rungs"].values():
                _check(rung)
        except (AttributeError, KeyError, TypeError, ValueError):
            raise AlborError(f"{path} is not what a ladder writes; {_REMEDY}") from None
        return cls(path, content)

    def get(self, rung: str, key: str, planned: Planned | None = None) -> Any:
        """What was found of a rung; with `planned`, only if it was found for that configuration."""
        found = self._content["rungs"].get(rung, {}).get(key)
        if found is None or planned is None:
            return found
        return found["value"] if found.get("sha256") == planned.sha256 else None

    def set(self, rung: str, key: str, value: Any, planned: Planned | None = None) -> None:
        """Keeps it, `planned` likewise."""
        stored = value if planned is None else {"sha256": planned.sha256, "value": value}
        self._content["rungs"].setdefault(rung, {})[key] = stored
        self._save()

    def result(self, planned: Planned, gate: str) -> Result | None:
        """What a gate has found, for this configuration with this gate's thresholds."""
        found = self._content["rungs"].get(planned.name, {}).get("gates", {}).get(gate)
        if found is None or found["key"] != _key(planned, gate):
            return None
        return Result.from_json(found["result"])

    def judged(self, planned: Planned, result: Result) -> None:
        """Keeps a gate's result."""
        gates = self._content["rungs"].setdefault(planned.name, {}).setdefault("gates", {})
        gates[result.gate] = {"key": _key(planned, result.gate), "result": result.as_json()}
        self._save()

    def forget(self, planned: Planned, gates: tuple[str, ...], keys: tuple[str, ...]) -> None:
        """Drops what these gates have found, and what these `keys` hold: the rung is trained further, or
        again.
        """
        rung = self._content["rungs"].get(planned.name, {})
        known = rung.get("gates", {})
        dropped = [known.pop(gate) for gate in gates if gate in known]
        if dropped + [rung.pop(key) for key in keys if key in rung]:
            self._save()

    def _save(self) -> None:
        try:
            durable.replace_file(self._path, to_json(self._content))
        except OSError as error:
            raise AlborError(f"{self._path} cannot be written: {error.strerror or error}") from error


def _check(rung: Any) -> None:
    """Raises one of several errors where a rung's entry is not as `State` writes it."""
    for found in rung.get("gates", {}).values():
        dict(found["key"])
        Result.from_json(found["result"]).as_json()
    for key, wanted in _WANTED.items():
        value = rung.get(key)
        if value is not None and key != "budget":
            str(value["sha256"])
            value = value["value"]
        if value is not None and not (wanted <= dict(value).keys() or "not_predicted" in value):
            raise KeyError(key)


def _key(planned: Planned, gate: str) -> dict[str, Any]:
    settings = getattr(planned.gates, gate)
    return {"config": planned.sha256, "gate": None if settings is None else settings.model_dump()}
