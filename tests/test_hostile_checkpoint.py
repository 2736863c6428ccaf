"""Checkpoints from a stranger: whatever is in them is refused by name or loaded as data, and nothing of it
runs.

Whoever can write a checkpoint can also write a manifest that fits (`forge`), so that the hashes find nothing.
"""

from __future__ import annotations

import json
import os
import pickle
import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoint_cases import forge, load_step, save_step
from run_cases import Result, call, write_project
from test_structure import ROOT, misuses
from test_tensorfile import HOSTILE

from albor import strictjson
from albor.checkpoint import BEST, candidates, checkpoint_name, load, read_best, verify
from albor.configfile import load_config
from albor.data.cache import file_sha256
from albor.errors import CheckpointError, DamagedCheckpoint
from albor.generate import load as generate_load
from albor.manifest import MANIFEST, STATE
from albor.strictjson import DEEPEST, LARGEST, from_json
from albor.train import session
from albor.train.saved import read_saved

STEP = 8
NEWEST = Path("runs/tiny/checkpoints", checkpoint_name(STEP))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project with a finished run of a few steps."""
    config = write_project(tmp_path_factory.mktemp("project"))
    config.write_text(config.read_text().replace("max_steps: 24", f"max_steps: {STEP}"))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(config.parent)
        assert call("train", config).code == 0
    return config


@pytest.fixture
def config(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The run with its last checkpoint, copied to the current directory; the data are shared."""
    shutil.copytree(trained.parent / "runs", tmp_path / "runs")
    monkeypatch.chdir(tmp_path)
    shutil.rmtree(NEWEST.with_name(checkpoint_name(STEP - 4)))
    return trained


def refused(result: Result, *named: str, code: int = 1) -> None:
    assert result.code == code, result
    assert "Traceback" not in result.err
    assert "bug in albor" not in result.err
    for name in named:
        assert name in result.err, result.err


# What could run


class Payload:
    """Unpickled, it makes a file called `ran`."""

    def __init__(self, place: Path):
        self.place = str(place / "ran")

    def __reduce__(self) -> Any:
        return os.mkdir, (self.place,)


def as_pickle(place: Path) -> bytes:
    return pickle.dumps(Payload(place))


def as_torch_file(place: Path) -> bytes:
    torch.save(Payload(place), place / "payload")
    return (place / "payload").read_bytes()


def as_numpy_file(place: Path) -> bytes:
    np.save(place / "payload.npy", np.array([Payload(place)], dtype=object), allow_pickle=True)
    return (place / "payload.npy").read_bytes()


KINDS: dict[str, Callable[[Path], bytes]] = {
    "pickle": as_pickle,
    "torch": as_torch_file,
    "numpy": as_numpy_file,
}


@pytest.fixture(params=KINDS)
def payload(request: pytest.FixtureRequest, tmp_path: Path) -> bytes:
    return KINDS[request.param](tmp_path)


def test_the_payload_runs_where_it_is_unpickled(tmp_path: Path):
    """What cannot fail proves nothing."""
    pickle.loads(as_pickle(tmp_path))
    assert (tmp_path / "ran").exists()
    (tmp_path / "ran").rmdir()
    as_torch_file(tmp_path)
    torch.load(tmp_path / "payload", weights_only=False)
    assert (tmp_path / "ran").exists()
    (tmp_path / "ran").rmdir()
    as_numpy_file(tmp_path)
    np.load(tmp_path / "payload.npy", allow_pickle=True)
    assert (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "name", ["weights.safetensors", "optimizer.safetensors", STATE, "config.yaml", "tokenizer.model"]
)
def test_a_pickle_in_a_checkpoint_does_not_run(config: Path, payload: bytes, name: str):
    forge(NEWEST, name, payload)
    code = 2 if name == "config.yaml" else 1
    if name != "tokenizer.model":  # a run has its tokenizer from the data
        refused(call("train", config), name, code=code)
    if name != "optimizer.safetensors":
        refused(call("generate", NEWEST), name, code=code)
    assert not Path("ran").exists()


@pytest.mark.parametrize("name", [MANIFEST, BEST])
def test_a_pickle_in_the_place_of_json_does_not_run(config: Path, payload: bytes, name: str):
    path = NEWEST / name if name == MANIFEST else NEWEST.parent / name
    path.write_bytes(payload)
    refused(call("generate", NEWEST if name == MANIFEST else "runs/tiny/best"), name)
    if name == MANIFEST:
        refused(call("train", config), name)
    assert not Path("ran").exists()


def test_a_pickle_for_a_tokenizer_does_not_run(config: Path, payload: bytes):
    Path("evil.model").write_bytes(payload)
    refused(call("train", config, "name=other", "tokenizer.path=evil.model"), "evil.model", code=2)
    assert not Path("ran").exists()


@pytest.mark.parametrize("name", ["tokens-00000.npy", "documents.npy"])
def test_a_pickle_for_a_token_shard_does_not_run(config: Path, payload: bytes, name: str):
    shutil.copytree(config.parent / "data", "data")
    (shard,) = Path("data").glob(f"*/train/{name}")
    honest = file_sha256(shard)
    shard.write_bytes(payload)
    text = (shard.parent / "manifest.json").read_text()
    (shard.parent / "manifest.json").write_text(text.replace(honest, file_sha256(shard)))
    refused(call("train", config, "name=other", "data.cache_dir=data"), name)
    assert not Path("ran").exists()


def test_nothing_in_the_sources_unpickles():
    """Beside the package, which test_structure walks: what else comes with it and is run."""
    paths = [
        path for place in ("albor", "kernels", "benchmarks", "docs") for path in (ROOT / place).rglob("*.py")
    ]
    assert len(paths) > 100
    import ast

    found = [
        f"{path}: {misuse}"
        for path in paths
        for misuse in misuses(ast.parse(path.read_text(encoding="utf-8")))
        if "can run what it reads" in misuse or "import" in misuse
    ]
    assert [line for line in found if "random" not in line] == []


# What is not what it says


def test_tensor_files_of_a_stranger(tmp_path: Path):
    """Each that test_tensorfile knows, in a checkpoint that vouches for it."""
    for name, content in HOSTILE.items():
        path = save_step(tmp_path / name.replace(" ", "-"), 1)
        forge(path, "weights.safetensors", content)
        with pytest.raises(DamagedCheckpoint, match=r"weights\.safetensors: "):
            verify(path)


def test_links_and_pipes(tmp_path: Path):
    """Neither followed nor waited for, and not removed as if they were ours."""
    path = save_step(tmp_path / "c", 1)
    path.rename(tmp_path / "elsewhere")
    path.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(DamagedCheckpoint, match="step-00000001: a symbolic link"):
        verify(path)
    for step in (2, 3):
        save_step(tmp_path / "c", step, keep_last=1)
    assert path.is_symlink()
    assert verify(tmp_path / "elsewhere")
    other = tmp_path / "c" / checkpoint_name(3)
    (other / STATE).unlink()
    os.mkfifo(other / STATE)
    with pytest.raises(DamagedCheckpoint, match=r"state\.json: not a regular file"):
        verify(other)
    os.mkfifo(tmp_path / "c" / BEST)
    with pytest.raises(DamagedCheckpoint, match=r"best\.json: not a regular file"):
        read_best(tmp_path / "c")


@pytest.mark.parametrize("name", ["/etc/passwd", "../../x", "a/b", "..", "", "\0", "weights.safetensors/x"])
def test_names_that_lead_out(tmp_path: Path, name: str):
    """In the manifest, as a file and as a tensor file; and in best.json there are none."""
    path = save_step(tmp_path, 1)
    honest = verify(path)
    record, specs = honest.files["weights.safetensors"], honest.tensors["weights.safetensors"]
    for tensors in (honest.tensors, {**honest.tensors, name: specs}):
        forged = replace(honest, files={**honest.files, name: record}, tensors=tensors)
        (path / MANIFEST).write_bytes(forged.to_bytes())
        with pytest.raises(DamagedCheckpoint, match="missing"):
            verify(path)


@pytest.mark.parametrize(
    "content",
    [
        b'{"step": "../../x", "val/loss": 1.0}',
        b'{"step": -1, "val/loss": 1.0}',
        b'{"step": 1e9, "val/loss": 1.0}',
        b'{"step": true, "val/loss": 1.0}',
        b'{"step": 99999999999999999999, "val/loss": 1.0}',
        b'{"step": 4, "val/loss": NaN}',
        b'{"step": 4, "val/loss": 1e999}',
        b'{"step": 4, "val/loss": "low"}',
        b'{"step": 4, "val/loss": 1.0, "step": 5}',
        b'{"step": 4}',
        b"[4, 1.0]",
        b"",
    ],
)
def test_a_mark_that_makes_no_sense(tmp_path: Path, content: bytes):
    """Is refused by who asks for the best, and replaced by the next evaluation; until then nothing goes."""
    save_step(tmp_path, 4)
    (tmp_path / BEST).write_bytes(content)
    with pytest.raises(DamagedCheckpoint, match=r"best\.json: "):
        candidates(tmp_path / "best")
    told: list[str] = []
    save_step(tmp_path, 5, keep_last=1, keep_best=True, on_warning=told.append)
    assert (tmp_path / checkpoint_name(4)).exists()
    assert "best.json" in told[0]


def test_a_mark_whose_checkpoint_is_gone(config: Path):
    (NEWEST.parent / BEST).write_text('{"step": 3, "val/loss": 1.0}')
    refused(call("generate", "runs/tiny/best"), checkpoint_name(3))


# JSON


TOO_MUCH = {
    "deep": b"[" * (DEEPEST + 1) + b"]" * (DEEPEST + 1),
    "deep and never closed": b'{"a":' * 10**6,
    "deep behind a string": b'{"a": "\\"]]]]", "b": ' + b"[" * DEEPEST + b"]" * DEEPEST + b"}",
    "NaN": b'{"a": NaN}',
    "infinity": b"-Infinity",
    "overflow": b'{"a": 1e999}',
    "duplicate": b'{"a": 1, "a": 1}',
    "not UTF-8": b'{"a": "\xff"}',
    "UTF-16": '{"a": 1}'.encode("utf-16"),
    "a number of many digits": b"9" * 10_000,
    "a string that never ends": b'{"a": "' + b'\\"' * 10**6,
    "too large": b" " * (LARGEST + 1),
}


@pytest.mark.parametrize("name", TOO_MUCH)
def test_json_that_is_too_much(name: str):
    began = time.monotonic()
    with pytest.raises(ValueError):  # noqa: PT011  # of the kind that is documented, and no RecursionError
        from_json(TOO_MUCH[name])
    assert time.monotonic() - began < 5


def test_without_the_bound_deep_json_is_no_value_error(monkeypatch: pytest.MonkeyPatch):
    """The guard dropped: the parser gives up in a way that nobody expects of a file."""
    monkeypatch.setattr(strictjson, "DEEPEST", 10**9)
    with pytest.raises(RecursionError):
        from_json(b"[" * 10**6 + b"]" * 10**6)


def test_json_that_is_just_right():
    deepest = b"[" * DEEPEST + b"]" * DEEPEST
    assert from_json(deepest)
    assert from_json(b'{"a": "[[[[{{{{\\\\", "b": [1.5, -2, null, "\\u2581"]}')["b"][3] == "\u2581"
    brackets = json.dumps({"text": "[" * 1000 + '"' * 1000}).encode()
    assert len(from_json(brackets)["text"]) == 2000


@pytest.mark.parametrize("name", TOO_MUCH)
@pytest.mark.parametrize("file", [MANIFEST, STATE])
def test_too_much_json_in_a_checkpoint(tmp_path: Path, name: str, file: str):
    path = save_step(tmp_path, 1)
    if file == STATE:
        forge(path, file, TOO_MUCH[name])
    else:
        (path / file).write_bytes(TOO_MUCH[name])
    with pytest.raises(DamagedCheckpoint, match=file):
        load(path, {}, partial=True)


def test_a_file_without_end_is_not_read_to_its_end(tmp_path: Path):
    path = save_step(tmp_path, 1)
    os.truncate(path / MANIFEST, 1 << 40)
    began = time.monotonic()
    with pytest.raises(DamagedCheckpoint, match=r"manifest\.json: it is larger than"):
        verify(path)
    assert time.monotonic() - began < 5


def test_a_manifest_with_values_of_other_kinds(tmp_path: Path):
    """Every value of an honest one in turn, and its hash as it should be."""
    path = save_step(tmp_path, 1)
    honest = json.loads((path / MANIFEST).read_bytes())
    values: list[Any] = [None, True, -1, 2**70, 0.5, "x", [], {}, [[]], {"a": 1}]
    changed = 0

    def places(value: Any, *keys: Any) -> Any:
        yield keys
        for key in value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
            yield from places(value[key], *keys, key)

    for keys in places(honest):
        for value in values:
            content = json.loads(json.dumps(honest))
            place = content
            for key in keys[:-1]:
                place = place[key]
            if not keys or place[keys[-1]] == value or keys == ("sha256",):
                continue
            place[keys[-1]] = value
            write_with_hash(path / MANIFEST, content)
            changed += 1
            if keys == ("albor",):
                continue  # any version
            with pytest.raises(CheckpointError):
                load_step(path)
    assert changed > 200


def write_with_hash(path: Path, content: dict[str, Any]) -> None:
    """As `Manifest.to_bytes` does, of any content."""
    import hashlib

    from albor.strictjson import to_json

    content.pop("sha256", None)
    content["sha256"] = hashlib.sha256(to_json(content)).hexdigest()
    path.write_bytes(to_json(content))


# A configuration that asks for more than there is


HUGE = {
    "vocab_size: 360": ("vocab_size: 2000000000", "describes another model than weights.safetensors", 1),
    "hidden_size: 32": ("hidden_size: 3200000000", "describes another model than weights.safetensors", 1),
    "max_position_embeddings: 64": (
        f"max_position_embeddings: {2**50}",
        "writing with this model takes",
        4,
    ),
}


@pytest.mark.parametrize("key", HUGE)
def test_a_configuration_that_is_too_large_is_refused_before_anything_is_allocated(
    config: Path, key: str, monkeypatch: pytest.MonkeyPatch
):
    huge, says, code = HUGE[key]
    text = (NEWEST / "config.yaml").read_text()
    assert key in text
    forge(NEWEST, "config.yaml", text.replace(key, huge).encode())
    monkeypatch.setattr(generate_load, "Arena", allocate)
    refused(call("generate", NEWEST), checkpoint_name(STEP), says, code=code)
    for guard in ("_check_shapes", "_check_fits"):  # the guards dropped: what cannot fail proves nothing
        monkeypatch.setattr(generate_load, guard, lambda *_: None)
    refused(call("generate", NEWEST), "out of memory: [enforce fail]", "write on a larger machine")


def allocate(*_: Any) -> Any:
    raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried\nbacktrace")


# A state that fits no run


ODD: list[Any] = [None, -1, 1.5, "x", [], {}]


@pytest.mark.parametrize("key", ["step", "updates", "guard", "loader", "data_sha256", "compute_dtype"])
def test_a_state_that_was_written_by_hand(config: Path, key: str):
    """With a key of another kind, or without it: refused with the file's name."""
    honest = json.loads((NEWEST / STATE).read_bytes())
    for value in [*ODD, "missing"]:
        state = (
            {name: v for name, v in honest.items() if name != key}
            if value == "missing"
            else {**honest, key: value}
        )
        forge(NEWEST, STATE, json.dumps(state).encode())
        result = call("train", config)
        refused(result, checkpoint_name(STEP), code=2 if key == "compute_dtype" else 1)
        assert not Path("runs/other").exists()
        forge(NEWEST, STATE, json.dumps(honest, indent=1, sort_keys=True).encode() + b"\n")
    assert call("train", config).code == 0, "the honest one is refused too"


CONTRADICTIONS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "a step of 10**18": lambda s: s.update(step=10**18),
    "a step less": lambda s: s.update(step=STEP - 1),
    "tokens": lambda s: s.update(tokens=1),
    "no tokens": lambda s: s.pop("tokens"),
    "samples too few": lambda s: s.update(loader=position(STEP * 3 - 1)),
    "samples too many": lambda s: s.update(loader=position(STEP * 3 + 1)),
    "samples of 10**30 and a rollback": lambda s: (s.update(loader=position(10**30)), guard(s, rollbacks=1)),
    "samples too few and a rollback": lambda s: (
        s.update(loader=position(STEP * 3 - 1)),
        guard(s, rollbacks=1),
    ),
    "samples that are no sum": lambda s: s.update(loader={"samples": STEP * 3, "per_source": [1]}),
    "samples of two sources": lambda s: s.update(loader={"samples": STEP * 3, "per_source": [STEP * 3, 0]}),
    "samples less than none": lambda s: s.update(loader=position(-1)),
    "an anchor ahead": lambda s: guard(s, anchor=999),
    "good steps": lambda s: guard(s, good_steps=10**30),
    "skips": lambda s: guard(s, skips=list(range(100_000))),
    "skips of long ago": lambda s: guard(s, skips=[STEP - 20]),
    "skips to come": lambda s: guard(s, skips=[STEP + 1]),
    "skips twice": lambda s: guard(s, skips=[STEP, STEP]),
    "skipped": lambda s: guard(s, skipped=STEP + 1),
    "spikes": lambda s: guard(s, spikes=10**30),
    "rollbacks": lambda s: (s.update(loader=position(STEP * 3)), guard(s, rollbacks=10**9)),
    "losses": lambda s: guard(s, losses=[1.0] * 10_000, norms=[1.0] * 10_000),
    "losses without norms": lambda s: guard(s, losses=[1.0], norms=[]),
    "best": lambda s: s.update(best_validation_loss="low"),
}


def position(samples: int) -> dict[str, Any]:
    return {"samples": samples, "per_source": [samples]}


def guard(state: dict[str, Any], **changes: Any) -> None:
    state["guard"] = {**state["guard"], **changes}


@pytest.mark.parametrize("name", CONTRADICTIONS)
def test_a_state_that_contradicts_its_own_manifest(config: Path, name: str):
    """Every hash of it fits. It is damage, and so an older checkpoint would be taken."""
    state, policy = json.loads((NEWEST / STATE).read_bytes()), load_config(config).divergence
    assert read_saved(state, NEWEST, policy).state.step == STEP
    CONTRADICTIONS[name](state)
    with pytest.raises(DamagedCheckpoint, match=r"state\.json: it is not the state of a run"):
        read_saved(state, NEWEST, policy)


def test_a_state_after_a_rollback_has_read_more(config: Path):
    state, policy = json.loads((NEWEST / STATE).read_bytes()), load_config(config).divergence
    state["loader"] = position(STEP * 3 + 30)
    guard(state, rollbacks=1, skipped=5, anchor=STEP)
    assert read_saved(state, NEWEST, policy).state.guard.rollbacks == 1


def test_windows_that_a_new_configuration_makes_shorter_are_cut(config: Path):
    """The run is saved with the new configuration, perhaps before the next step, and must be one of it."""
    state, policy = json.loads((NEWEST / STATE).read_bytes()), load_config(config).divergence
    guard(state, skips=[2, 3, STEP - 2], skipped=3)
    shorter = policy.model_copy(update={"window_steps": 4, "spike_window": 3})
    kept = read_saved(state, NEWEST, policy).state.guard
    assert (kept.skips, len(kept.losses)) == ((2, 3, STEP - 2), STEP)
    cut = read_saved(state, NEWEST, shorter).state.guard
    assert (cut.skips, cut.losses, cut.norms) == ((STEP - 2,), kept.losses[-3:], kept.norms[-3:])


@pytest.mark.parametrize("content", [b"junk", b""])
def test_a_tokenizer_that_is_not_the_datas(config: Path, content: bytes, monkeypatch: pytest.MonkeyPatch):
    """Nothing else reads it when a run goes on: the guard dropped, it does."""
    forge(NEWEST, "tokenizer.model", content)
    named = f"{checkpoint_name(STEP)}/tokenizer.model"
    refused(call("train", config), named, "it is not the tokenizer of the data")
    monkeypatch.setattr(session, "check_tokenizer", lambda *_: None)
    assert call("train", config).code == 0
