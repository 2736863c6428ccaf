"""The manifest: what a checkpoint must hold, to the byte, and the one JSON text that says so."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass

from albor.strictjson import from_json, to_json
from albor.tensorfile import FileRecord, TensorSpec

MANIFEST = "manifest.json"
STATE = "state.json"
FORMAT = 1


@dataclass(frozen=True)
class Manifest:
    """What a verified checkpoint holds: `files` by name, and the tensors of each tensor file by name."""

    step: int
    albor_version: str
    files: Mapping[str, FileRecord]
    tensors: Mapping[str, Mapping[str, TensorSpec]]

    def to_bytes(self) -> bytes:
        """The one JSON text of this manifest, with its own hash in it, so that damage to it shows too."""
        content = {
            "format": FORMAT,
            "albor": self.albor_version,
            "step": self.step,
            "files": {name: {"size": r.size, "sha256": r.sha256} for name, r in self.files.items()},
            "tensors": {
                file: {name: {"dtype": spec.dtype, "shape": spec.shape} for name, spec in specs.items()}
                for file, specs in self.tensors.items()
            },
        }
        content["sha256"] = hashlib.sha256(to_json(content)).hexdigest()
        return to_json(content)

    @classmethod
    def from_bytes(cls, raw: bytes) -> Manifest:
        """Parse what `to_bytes` wrote; `ValueError` for anything else."""
        content = from_json(raw)
        if not isinstance(content, dict) or "format" not in content:
            raise ValueError("it is not a manifest")
        if content["format"] != FORMAT:
            raise ValueError(f"it has format {content['format']}, and this albor reads format {FORMAT}")
        try:
            manifest = cls(
                step=content["step"],
                albor_version=content["albor"],
                files={name: FileRecord(r["size"], r["sha256"]) for name, r in content["files"].items()},
                tensors={
                    file: {name: TensorSpec(s["dtype"], tuple(s["shape"])) for name, s in specs.items()}
                    for file, specs in content["tensors"].items()
                },
            )
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"it lacks what a manifest has: {error!r}") from error
        if manifest.to_bytes() != raw:
            raise ValueError("it was changed after it was written")
        if not {STATE, *manifest.tensors} <= manifest.files.keys():
            raise ValueError(f"it does not list {STATE} and every tensor file among its files")
        return manifest
