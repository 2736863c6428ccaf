"""No key is read and forgotten: for each there is a run that goes otherwise when it is changed.

The keys are enumerated from the models, so that a new one without an entry fails. And the two halves of a
promise are held together here: a key that may change when a run resumes never changes what is learned.
"""

from __future__ import annotations

import errno
import json
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar, NamedTuple, get_args
from unittest import mock

import pytest
from pretrained_cases import write_llama
from pydantic import BaseModel
from run_cases import call, checkpoints, events, rows, tree, write_project

from albor import checkpoint
from albor.architecture import Architecture
from albor.checkpoint import find_latest
from albor.config import RunConfig, Source
from albor.configfile import load_config
from albor.errors import ConfigError
from albor.memory.attention import Measurement
from albor.trackers.installed import open_sink
from albor.trackers.sink import Source as Tracked
from albor.train.resume_policy import changes_on_resume

LAST_STEP = 6
SHORT = ("train.max_steps=6", "schedule.warmup_steps=3", "evaluate.every_steps=3", "checkpoint.every_steps=3")
TOKENS = ("train.max_steps=null", "train.max_tokens=500")
SOURCES = {get_args(kind.model_fields["kind"].annotation)[0]: kind for kind in get_args(get_args(Source)[0])}


Observe = Callable[..., dict[str, Any]]


class Effect(NamedTuple):
    """With `change`, the parts of what a run shows that are named in `shows` are other ones than without it.
    `base` are overrides of both runs."""

    key: str
    change: str
    shows: str
    base: tuple[str, ...] = ()


def source(kind: str, **keys: Any) -> str:
    """The override to a source of `kind` (see `project`) beside one of 20 files."""
    where = {"hf": "org/set", "python-stdlib": None}.get(kind, f"PROJECT/{kind}")
    given = {"kind": kind} | ({"path": where} if where else {"max_bytes": 60_000}) | keys
    return "data.sources=" + json.dumps([given, {"kind": "files", "path": "PROJECT/corpus"}])


def source_effects(kind: str) -> Iterator[Effect]:
    """Those of the keys that every kind of source has."""
    base = (source(kind), "model.vocab_size=500" if kind == "python-stdlib" else "model.vocab_size=360")
    yield Effect(f"data.sources.{kind}.weight", source(kind, weight=3.0), "loss weights", base)
    yield Effect(f"data.sources.{kind}.max_bytes", source(kind, max_bytes=1000), "data", base)
    # Text files read Parquet's bytes as no text, and know no hub.
    other = source("jsonl" if kind == "files" else "files", path=f"PROJECT/{kind}")
    shows = "data" if kind in ("files", "jsonl") else "code"
    yield Effect(f"data.sources.{kind}.kind", other, shows, base)


PARQUET = (source("parquet"),)
GIVEN = ("tokenizer.path=PROJECT/other.model",)
FULL_DISK = "name=full"  # of a run whose first attempt to save finds no room
# One step leaves weights with which no other one is finite.
DIVERGES = ("optimizer.lr=1e15", "checkpoint.every_steps=1")
JUMPS = ("optimizer.lr=0.3", "divergence.spike_window=8", "divergence.spike_zscore=0.1")
SKIPPED = (*JUMPS, "divergence.on_spike=skip")
# Allowed to change, for they say what becomes of steps that are still to come.
JUDGING = ("divergence.on_spike", "divergence.spike_zscore", "divergence.spike_window")
WANDB, TRACKIO = ("track.to=[wandb]",), ("track.to=[trackio]",)
EFFECTS = [
    Effect("name", "name=other", "places"),
    Effect("runs_dir", "runs_dir=elsewhere", "places"),
    Effect("seed", "seed=8", "loss weights"),
    Effect("device", "device=cuda", "code"),  # there is none
    Effect("model.hidden_size", "model.hidden_size=48", "plan loss weights"),
    Effect("model.intermediate_size", "model.intermediate_size=96", "plan loss weights"),
    Effect("model.num_hidden_layers", "model.num_hidden_layers=3", "plan loss weights"),
    Effect("model.num_attention_heads", "model.num_attention_heads=4", "plan loss weights"),
    Effect("model.num_key_value_heads", "model.num_key_value_heads=2", "plan loss weights"),
    Effect("model.vocab_size", "model.vocab_size=350", "tokenizer data plan"),
    Effect("model.max_position_embeddings", "model.max_position_embeddings=128", "plan"),
    Effect("model.rope_theta", "model.rope_theta=100", "loss weights"),
    Effect("model.rms_norm_eps", "model.rms_norm_eps=1e-3", "loss weights"),
    Effect("model.tie_word_embeddings", "model.tie_word_embeddings=false", "plan loss weights"),
    Effect("model.initializer_range", "model.initializer_range=0.03", "loss weights"),
    Effect("model.mup_base_width", "model.mup_base_width=16", "loss weights"),
    Effect("model.init_from", "model.init_from=PROJECT/llama", "loss weights", GIVEN),
    Effect("tokenizer.kind", "tokenizer.kind=hf", "code", GIVEN),  # the file is of the other kind
    Effect("tokenizer.path", "tokenizer.path=PROJECT/other.model", "tokenizer data"),
    Effect("tokenizer.sample_bytes", "tokenizer.sample_bytes=6KB", "tokenizer data"),
    Effect("data.sequence_length", "data.sequence_length=16", "plan loss tokens"),
    Effect("data.validation_fraction", "data.validation_fraction=0.4", "data"),
    Effect("data.document_mask", "data.document_mask=true", "plan loss weights"),
    Effect("data.max_epochs", "data.max_epochs=0.1", "code"),
    Effect("data.cache_dir", "data.cache_dir=elsewhere", "places"),
    *(effect for kind in SOURCES for effect in source_effects(kind)),
    Effect("data.sources.files.path", source("files", path="PROJECT/jsonl"), "data", (source("files"),)),
    Effect("data.sources.files.separator", source("files", separator="title"), "data", (source("files"),)),
    Effect("data.sources.jsonl.path", source("jsonl", path="PROJECT/other"), "data", (source("jsonl"),)),
    Effect("data.sources.jsonl.text_key", source("jsonl", text_key="title"), "data", (source("jsonl"),)),
    Effect("data.sources.parquet.path", source("parquet", path="PROJECT/other"), "data", PARQUET),
    Effect("data.sources.parquet.text_key", source("parquet", text_key="title"), "data", PARQUET),
    *(
        Effect(f"data.sources.hf.{key}", source("hf", **{key: "title"}), "data", (source("hf"),))
        for key in ("path", "subset", "split", "revision", "text_key")
    ),
    Effect("optimizer.name", "optimizer.name=sgd", "code"),  # there is one choice
    Effect("optimizer.lr", "optimizer.lr=2e-2", "lr loss weights"),
    Effect("optimizer.betas", "optimizer.betas=[0.8, 0.95]", "loss weights"),
    Effect("optimizer.betas", "optimizer.betas=[0.9, 0.99]", "loss weights"),
    Effect("optimizer.eps", "optimizer.eps=1e-3", "loss weights"),
    Effect("optimizer.weight_decay", "optimizer.weight_decay=0", "loss weights"),
    Effect("optimizer.grad_clip", "optimizer.grad_clip=0.5", "loss weights"),
    Effect("optimizer.state_dtype", "optimizer.state_dtype=bf16", "plan weights", ("train.precision=bf16",)),
    Effect("schedule.kind", "schedule.kind=linear", "lr weights"),
    Effect("schedule.warmup_steps", "schedule.warmup_steps=2", "lr weights"),
    Effect("schedule.min_lr_ratio", "schedule.min_lr_ratio=0.5", "lr weights"),
    Effect("schedule.decay_fraction", "schedule.decay_fraction=0.5", "lr weights", ("schedule.kind=wsd",)),
    Effect("train.max_steps", "train.max_steps=5", "rows lr tokens"),
    Effect("train.max_tokens", "train.max_tokens=700", "rows lr tokens", TOKENS),
    Effect("train.max_hours", "train.max_hours=1e-9", "code"),  # too little for a save
    Effect("train.micro_batch_size", "train.micro_batch_size=2", "plan loss tokens"),
    Effect("train.gradient_accumulation_steps", "train.gradient_accumulation_steps=2", "loss tokens"),
    Effect("train.precision", "train.precision=bf16", "plan loss weights"),
    Effect("train.precision", "train.precision=fp16", "code"),  # needs a GPU
    Effect("train.accumulator", "train.accumulator=gpu", "plan"),
    Effect("train.attention", "train.attention=flash", "code"),  # on a CPU there is one way
    Effect("train.deterministic", "train.deterministic=false", "on_gpu", ("train.precision=bf16",)),
    Effect("train.recompute", "train.recompute=cheap", "plan"),
    Effect("train.recompute", "train.recompute=block", "plan"),
    Effect("train.head_chunk_tokens", "train.head_chunk_tokens=8", "plan"),
    Effect("train.label_smoothing", "train.label_smoothing=0.1", "loss weights"),
    Effect("train.z_loss", "train.z_loss=0.01", "loss weights"),
    Effect("divergence.max_skips", "divergence.max_skips=2", "skipped", DIVERGES),
    Effect("divergence.window_steps", "divergence.window_steps=4", "code"),  # of which 5 cannot be skipped
    Effect("divergence.max_rollbacks", "divergence.max_rollbacks=1", "skipped", DIVERGES),
    Effect("divergence.on_spike", "divergence.on_spike=skip", "spikes weights", JUMPS),
    Effect("divergence.on_spike", "divergence.on_spike=clip", "spikes", JUMPS),
    Effect("divergence.spike_zscore", "divergence.spike_zscore=1e6", "spikes weights", SKIPPED),
    Effect("divergence.spike_window", "divergence.spike_window=100", "spikes weights", SKIPPED),
    Effect("divergence.keep_spikes", "divergence.keep_spikes=1", "batches", DIVERGES),
    Effect("evaluate.every_steps", "evaluate.every_steps=2", "evaluations samples"),
    Effect("evaluate.batches", "evaluate.batches=1", "validation"),
    Effect("evaluate.micro_batch_size", "evaluate.micro_batch_size=3", "plan"),
    Effect("evaluate.prompts", 'evaluate.prompts=["a"]', "samples"),
    Effect("evaluate.final_batches", "evaluate.final_batches=1", "final"),
    Effect("evaluate.sample_tokens", "evaluate.sample_tokens=3", "samples"),
    Effect("evaluate.temperature", "evaluate.temperature=0", "samples"),
    Effect("evaluate.smoke_test", "evaluate.smoke_test=false", "smoke"),
    Effect("checkpoint.every_steps", "checkpoint.every_steps=2", "saved"),
    Effect("checkpoint.keep_last", "checkpoint.keep_last=1", "kept"),
    Effect("checkpoint.keep_every", "checkpoint.keep_every=3", "kept", ("checkpoint.keep_last=1",)),
    Effect("checkpoint.keep_best", "checkpoint.keep_best=true", "best"),
    Effect("checkpoint.retries", "checkpoint.retries=0", "code", (FULL_DISK,)),
    Effect("checkpoint.background", "checkpoint.background=true", "plan"),
    Effect("log.every_steps", "log.every_steps=2", "rows"),
    Effect("track.to", "track.to=[wandb]", "tracked"),
    Effect("track.project", "track.project=p", "tracked", WANDB),
    Effect("track.project", "track.project=p", "tracked", TRACKIO),
    Effect("track.group", "track.group=g", "tracked", WANDB),
    Effect("track.group", "track.group=g", "tracked", TRACKIO),
    Effect("track.tags", "track.tags=[t]", "tracked", WANDB),
    Effect("track.entity", "track.entity=e", "tracked", WANDB),
    Effect("track.wandb_mode", "track.wandb_mode=online", "tracked", WANDB),
    Effect("track.trackio_dir", "track.trackio_dir=other", "tracked", TRACKIO),
    Effect("alerts", "alerts={train/loss > 0: warn}", "alerts"),
]


def keys(section: type[BaseModel] = RunConfig, path: str = "") -> Iterator[str]:
    """Every key that holds a value; a source's under its kind."""
    for name, field in section.model_fields.items():
        if path + name == "data.sources":
            for kind, below in SOURCES.items():
                yield from keys(below, f"{path}{name}.{kind}.")
        elif isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from keys(field.annotation, f"{path}{name}.")
        else:
            yield path + name


def test_every_key_has_an_entry():
    assert sorted({effect.key for effect in EFFECTS}) == sorted(keys())


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The configuration, and beside it what the sources of the entries read."""
    config = write_project(tmp_path_factory.mktemp("project"))
    home = config.parent
    texts = [path.read_text() for path in sorted((home / "corpus").iterdir())]
    documents = [{"text": text, "title": text[::-1]} for text in texts]
    for name in ("files", "jsonl", "parquet", "other"):
        (home / name).mkdir()
    (home / "files" / "all.jsonl").write_text("".join(json.dumps(row) + "\n" for row in documents[:9]))
    (home / "jsonl" / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in documents[:5]))
    (home / "other" / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in documents[5:]))
    arguments = ("tokenizer", "train", config, "data.validation_fraction=0.5")
    model = Path(call(*arguments).out.removesuffix("\n"))
    (home / "other.model").write_bytes(model.read_bytes())
    write_llama(home / "llama", Architecture.from_config(load_config(config).model))
    return config


def write_parquet(home: Path) -> None:
    table = pytest.importorskip("pyarrow", reason="needs the hf extra").table
    from pyarrow import parquet

    rows = [json.loads(line) for line in (home / "jsonl" / "rows.jsonl").read_text().splitlines()]
    columns = {name: [row[name] for row in rows] for name in rows[0]}
    parquet.write_table(table(columns), home / "parquet" / "rows.parquet")
    parquet.write_table(table({"text": columns["title"]}), home / "other" / "rows.parquet")


def load_dataset(path: str, **arguments: Any) -> Iterator[dict[str, str]]:
    """Stands in for the hub's: rows that tell how it was called."""
    assert arguments.keys() == {"name", "split", "revision", "streaming"}
    asked = f"{path} {arguments['name']} {arguments['split']} {arguments['revision']} "
    texts = (f"the {number} {asked}" * 20 for number in range(20))
    return ({"text": text, "title": text[::-1]} for text in texts)


def measured_attention() -> list[Measurement]:
    """As if an H100 had been measured: flash is the fastest where it may add in any order."""
    where = {"capability": 90, "device": "H100", "torch": "2.13.0", "triton": "3.7.1"}
    shape = {"head_dim": 16, "heads": 2, "kv_heads": 1, "length": 32, "batch": 1}
    times = {True: {"triton": 1e-3, "flash": 2e-3}, False: {"triton": 2e-3, "flash": 1e-3}}
    return [Measurement(**where, **shape, deterministic=key, seconds=times[key]) for key in times]


@pytest.fixture(scope="module")
def observe(project: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Observe]:
    """What a run of 6 steps with some overrides shows, by part; each run has a directory of its own."""

    @cache
    def run(*overrides: str) -> dict[str, Any]:
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(tmp_path_factory.mktemp("run"))
            if FULL_DISK in overrides:
                patch.setattr("albor.train.saver._FIRST_PAUSE", 0.01)
                patch.setattr(checkpoint, "write_tensors", full_once(checkpoint.write_tensors))
            patch.setattr("albor.trackers.feed.Feed", Untracked)
            patch.setattr(Untracked, "begun", [])
            shown = seen(call("train", project, *SHORT, *overrides).code) | {"tracked": Untracked.begun}
        asked = call("vram-estimate", project, *SHORT, *overrides, "device=cuda", "--gpu=H100", "--json")
        return shown | ({"on_gpu": json.loads(asked.out)["attention"]["backend"]} if asked.code == 0 else {})

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
        patch.setattr("albor.memory.devices.installed_gpu", lambda: None)
        patch.setattr("albor.memory.devices.cpu_has_bf16", lambda: True)
        patch.setattr("torch.cuda.is_available", lambda: False)
        patch.setattr("albor.memory.attention.read_table", measured_attention)
        yield run


class Untracked:
    """A tracker's feed whose tracker runs here, and is told how it is to begin and nothing else."""

    begun: ClassVar[list[Any]] = []
    left_out, problem = 0, None

    def __init__(self, tracker: str, directory: Path, config: RunConfig):
        self.tracker = tracker
        package = SimpleNamespace(
            init=self.begin,
            Settings=lambda **keys: keys,
            Api=lambda: SimpleNamespace(runs=lambda project: []),
        )
        with (
            mock.patch.dict(sys.modules, {tracker: package}),
            mock.patch.dict(os.environ),
            warnings.catch_warnings(),
        ):
            open_sink(tracker, Tracked(directory, config)).rewind(0)

    def begin(self, **how: Any) -> SimpleNamespace:
        how = {key: how.get(key) for key in ("project", "group", "tags", "entity", "mode")}
        self.begun.append((how, os.environ.get("TRACKIO_DIR", "").rpartition("/")[2]))
        return SimpleNamespace(id="x")

    def put(self, message: dict[str, Any]) -> None: ...

    def finish(self, exit_code: int) -> None: ...

    def ends_within(self, seconds: float) -> bool:
        return True

    def close(self, seconds: float, since: float) -> None: ...


def full_once(write: Callable[..., Any]) -> Callable[..., Any]:
    """`write` on a disk that is full at its first call."""
    calls = []

    def fail_once(*arguments: Any) -> Any:
        calls.append(arguments)
        if len(calls) == 1:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(*arguments)

    return fail_once


def seen(code: int) -> dict[str, Any]:
    """The parts of the run in the current directory."""
    shown: dict[str, Any] = {"code": code}
    shown["places"] = sorted(str(path) for path in Path().glob("*/*") if path.is_dir())
    if not (plan := next(Path().glob("*/*/plan.json"), None)):
        return shown
    run = plan.parent
    trained = [row for row in rows(run) if "train/loss" in row]
    evaluated = [row for row in rows(run) if "val/loss" in row]
    shown |= {
        "plan": plan.read_text(),
        "rows": [row["step"] for row in trained],
        "lr": {row["step"]: row["train/lr"] for row in trained},
        "loss": {row["step"]: row["train/loss"] for row in trained},
        "tokens": trained[-1]["tokens"],
        "evaluations": [row["step"] for row in evaluated],
        "validation": [row["val/loss"] for row in evaluated],
        "samples": [(event["prompt"], event["text"]) for event in events(run, "sample")],
        "saved": [event["step"] for event in events(run, "checkpoint")],
        "kept": checkpoints(run),
        "skipped": len(events(run, "skipped_step")),
        "spikes": [event["step"] for event in events(run, "spike")],
        "batches": sorted(path.name for path in (run / "spikes").glob("*")),
        "alerts": [event["step"] for event in events(run, "alert")],
    }
    if (best := run / "checkpoints" / "best.json").exists():
        shown["best"] = best.read_text()
    if newest := find_latest(run / "checkpoints"):
        files = tree(newest)
        shown["weights"], shown["tokenizer"] = files["weights.safetensors"], files["tokenizer.model"]
        shown["data"] = json.loads((newest / "state.json").read_text())["data_sha256"]
    if (final := run / "eval" / "final.json").exists():
        shown["smoke"] = (run / "eval" / "smoke.json").exists()
        shown["final"] = json.loads(final.read_text())["val/target_tokens"]
    return shown


@pytest.mark.parametrize("effect", EFFECTS, ids=lambda effect: effect.key)
def test_a_key_changes_what_runs(effect: Effect, project: Path, observe: Observe):
    if "parquet" in effect.key:
        write_parquet(project.parent)
    base = [override.replace("PROJECT", str(project.parent)) for override in effect.base]
    changed = [*base, effect.change.replace("PROJECT", str(project.parent))]
    before, after = observe(*base), observe(*changed)
    different = {part for part in {*before, *after} if before.get(part) != after.get(part)}
    assert before["code"] == (3 if effect.base == DIVERGES else 0)
    assert ("code" in different) == (effect.shows == "code")
    assert set(effect.shows.split()) <= different
    if effect.key.endswith((".path", ".revision")) or effect.key in JUDGING:
        return  # where the data lie may change on resume, what lies there may not: test_run has both
    if before["code"] == after["code"] == 0 and may_change_on_resume(project, base, changed):
        learned = {"tokenizer", "data", "weights"} | ({"loss"} if effect.key != "log.every_steps" else set())
        assert not different & learned, "a run that resumes with this key changed becomes another run"


def may_change_on_resume(config: Path, base: list[str], changed: list[str]) -> bool:
    try:
        saved, now = (load_config(config, [*SHORT, *overrides]) for overrides in (base, changed))
        changes_on_resume(now, saved, LAST_STEP, Path())
    except ConfigError:
        return False
    return True
