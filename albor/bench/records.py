"""The runs that are finished, as files: `runs/CASE/PEER-NUMBER.json` in the folder of the results.

A record counts only where it was made by the same code on the same card with the same versions, settings and
number of steps: its fingerprint says so. albor's depends on all of its code, a peer's on what it consists of,
so that a change of a kernel does not cost the peers' runs.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from albor.bench.cases import STANDARD, Case
from albor.bench.peers import LIBRARIES, PEERS
from albor.bench.protocol import OWN, PROFILE_STEPS, PROFILED, REFERENCE, Options, Run
from albor.config import RunConfig

_EVERYWHERE = ("torch", "triton", "numpy")


@dataclass(frozen=True)
class Found:
    """What counts in a folder, and how many records do not."""

    cases: list[Case]
    runs: list[Run]
    left_out: int


class Records:
    """What lies in the folder of `options`, as far as it counts on the machine `here`."""

    def __init__(self, options: Options, here: dict[str, Any]):
        self._options, self._here = options, here
        self._root = options.out / "runs"

    def path(self, case: Case, peer: str, number: int) -> Path:
        """Where the record of a run belongs; its log lies beside it."""
        name = "profile" if number == PROFILED else str(number)
        return self._root / case.name / f"{peer}-{name}.json"

    def find(self, case: Case, peer: str, number: int) -> Run | None:
        """The record of a run, failed or not; None where there is none that counts."""
        wanted = self.fingerprint(case, peer, number)
        places = [self.path(case, peer, number)]
        if peer == REFERENCE:  # another micro-batch of the same model has the same reference
            places += sorted(self._root.glob(f"*/{places[0].name}"))
        for path in places:
            run = _load(path)
            if run is not None and run.fingerprint == wanted:
                run.case = case.name
                return run
        return None

    def save(self, case: Case, run: Run) -> None:
        """Writes the record, in one piece, and what the case is."""
        path = self.path(case, run.peer, run.number)
        values = {"name": case.name, "config": case.config.model_dump(mode="json")}
        replace_text(path.with_name("case.json"), json.dumps(values, indent=1) + "\n")
        replace_text(path, json.dumps(asdict(run), indent=1) + "\n")

    def everything(self) -> Found:
        """All cases that were asked for or have a record that counts, and all those records."""
        cases = {case.name: case for case in self._options.cases}
        files = set()
        for folder in sorted(self._root.glob("*/")):
            files |= {path for path in folder.glob("*-*.json") if not path.name.startswith("draft-")}
            if folder.name not in cases and (found := _load_case(folder / "case.json")) is not None:
                cases[folder.name] = found
        runs: list[Run] = []
        shown = {case.name: case for case in self._options.cases}
        for case in cases.values():
            of = list(self._of(case))
            files -= {self.path(case, run.peer, run.number) for run in of}
            if of:
                shown[case.name] = case
            runs += of
        rank = {name: place for place, name in enumerate(STANDARD)}
        in_order = sorted(shown.values(), key=lambda case: (rank.get(case.name, len(rank)), case.name))
        return Found(in_order, runs, left_out=len(files))

    def _of(self, case: Case) -> Iterator[Run]:
        for peer in PEERS:
            number = PROFILED
            while (run := self.find(case, peer, number)) is not None or number == PROFILED:
                if run is not None:
                    yield run
                number += 1

    def fingerprint(self, case: Case, peer: str, number: int) -> str:
        """What a record of this run must carry to count."""
        options, here = self._options, self._here
        config = case.config.model_dump(mode="json")
        config.pop("name")
        steps = [options.warmup, options.steps]
        if peer == REFERENCE:
            for key in ("micro_batch_size", "gradient_accumulation_steps", "max_steps"):
                config["train"].pop(key)
            config["tokens_per_step"] = case.config.tokens_per_step
            steps = [options.reference_steps]
        elif number == PROFILED:
            config["train"].pop("max_steps")
            steps = [PROFILE_STEPS]
        values = {
            "code": here["code"] if peer.startswith(OWN) else here["peer_code"],
            "device": here["device"],
            "versions": {name: here["versions"][name] for name in (*_EVERYWHERE, *LIBRARIES.get(peer, ()))},
            "config": config,
            "steps": steps,
            "dtype": options.dtype,
            "backend": options.compile_backend,
        }
        return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]


def replace_text(path: Path, text: str) -> None:
    """Writes the file in one piece: whoever reads it finds all of the old or all of the new."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f"draft-{path.name}")
    draft.write_text(text, encoding="utf-8")
    draft.replace(path)


def _load_case(path: Path) -> Case | None:
    if not path.exists():
        return None
    values = json.loads(path.read_text(encoding="utf-8"))
    try:
        return Case(values["name"], RunConfig.model_validate(values["config"]))
    except ValidationError:  # of a time when there were other keys
        return None


def _load(path: Path) -> Run | None:
    if not path.exists():
        return None
    try:
        return Run(**json.loads(path.read_text(encoding="utf-8")))
    except TypeError:  # of a time when a record held other things
        return None
