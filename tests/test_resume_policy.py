"""Which keys may change while a run goes on (row 18): the table, what is recorded, and what it protects."""

from __future__ import annotations

import json
import os
import re
import signal
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_cases import forge
from helpers import make_config
from run_cases import bits, call, checkpoints, events, unlogged
from test_config_effects import EFFECTS, Effect, keys

from albor import checkpoint
from albor.checkpoint import checkpoint_name
from albor.configfile import load_config
from albor.errors import ConfigError
from albor.memory.attention import AttentionChoice
from albor.memory.plan import plan_training
from albor.strictjson import to_json
from albor.train import resume_policy, session
from albor.train.resume_policy import POLICIES, Policy, changes_on_resume, policy_of
from albor.train.step import Trainer

RUN = Path("runs/tiny")
STEP = 7  # where the runs here are stopped; the warm-up has 4 steps, the run 24


@pytest.fixture(autouse=True)
def own_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each test has its own runs; the prepared data are the module's."""
    monkeypatch.chdir(tmp_path)


def stop_after(step: int, config: Path, *overrides: str) -> None:
    """A run that gets a signal as `step` ends."""
    update, patch = Trainer.update, pytest.MonkeyPatch()

    def signalled(self: Trainer, sums: Any, state: Any) -> Any:
        if state.step + 1 == step:
            os.kill(os.getpid(), signal.SIGTERM)
        return update(self, sums, state)

    patch.setattr(Trainer, "update", signalled)
    assert call("train", config, *overrides).code == 75
    patch.undo()
    assert checkpoints(RUN)[-1] == step


def refused(config: Path, before: tuple[str, ...], after: tuple[str, ...], step: int = STEP) -> list[str]:
    """The keys that may not change from `before` to `after` at `step`."""
    saved, now = load_config(config, before), load_config(config, after)
    try:
        changes_on_resume(now, saved, step, Path("checkpoint"))
    except ConfigError as error:
        return [problem.key for problem in error.problems]
    return []


# The table


def of_any_kind(key: str) -> str:
    """A source's key, whose kind the effects name, as the table names it."""
    return re.sub(r"^data\.sources\.[a-z-]+\.", "data.sources[].", key)


def test_every_key_has_a_policy():
    assert set(POLICIES) == {of_any_kind(key) for key in keys()}
    assert all(policy.why for policy in POLICIES.values())


def test_a_key_without_a_policy_is_found():
    """What the test above rests on."""
    assert of_any_kind("data.sources.files.separator") == "data.sources[].separator"
    with pytest.raises(KeyError):
        policy_of("train.unheard_of")
    assert policy_of("data.sources.12.path") == POLICIES["data.sources[].path"]


# Where the effect's other value is none that a run here could have, and why.
NO_OTHER_VALUE = {
    "optimizer.name": "use 'adamw'",
    "train.attention": "flash needs a GPU",
    "divergence.window_steps": "5 steps cannot be skipped within 4",
    "checkpoint.keep_every": "3 is no multiple of every_steps",
}


@pytest.mark.parametrize("effect", EFFECTS, ids=lambda effect: effect.key)
def test_a_change_meets_its_policy(effect: Effect, config: Path):
    """For each key, with the value for which test_config_effects shows that it matters."""
    if effect.key in NO_OTHER_VALUE:
        with pytest.raises(ConfigError) as refusal:
            load_config(config, (*effect.base, effect.change))
        assert NO_OTHER_VALUE[effect.key] in str(refusal.value)
        return
    saved, now = (load_config(config, given) for given in (effect.base, (*effect.base, effect.change)))
    verdict = POLICIES[of_any_kind(effect.key)].verdict
    problems = refused(config, effect.base, (*effect.base, effect.change))
    assert "allowed" not in {policy_of(problem).verdict for problem in problems}
    if problems:
        assert verdict != "allowed" or effect.key.startswith("data.sources")  # whose kind changes too
    else:
        assert verdict != "refused"
        changed = [change.key for change in changes_on_resume(now, saved, STEP, Path("checkpoint"))]
        assert of_any_kind(effect.key) in {re.sub(r"\.\d+\.", "[].", key) for key in changed}


@pytest.mark.parametrize(
    ("before", "after", "at_once", "later"),
    [
        # (the run so far, what it is to be, refused within the warm-up, refused at STEP)
        (("train.max_steps=24",), ("train.max_steps=30",), [], ["train.max_steps"]),  # a cosine
        (("schedule.kind=constant",), ("schedule.kind=constant", "train.max_steps=30"), [], []),
        (("schedule.kind=constant",), ("schedule.kind=constant", "train.max_steps=7"), [], []),
        (
            ("schedule.kind=constant",),
            ("schedule.kind=constant", "train.max_steps=6"),
            [],
            ["train.max_steps"],
        ),
        (("schedule.kind=wsd",), ("schedule.kind=wsd", "train.max_steps=30"), [], []),
        (
            ("schedule.kind=wsd", "schedule.decay_fraction=0.9"),
            ("schedule.kind=wsd", "schedule.decay_fraction=0.9", "train.max_steps=30"),
            [],
            ["train.max_steps"],  # the decay had begun
        ),
        (("schedule.kind=wsd",), ("schedule.kind=wsd", "schedule.decay_fraction=0.5"), [], []),
        (("schedule.kind=wsd",), ("schedule.kind=wsd", "schedule.min_lr_ratio=0.5"), [], []),
        (("schedule.kind=constant",), ("schedule.kind=wsd",), [], []),
        ((), ("schedule.kind=linear",), [], ["schedule.kind"]),
        ((), ("schedule.warmup_steps=5",), ["schedule.warmup_steps"], ["schedule.warmup_steps"]),
        ((), ("optimizer.lr=2e-2",), ["optimizer.lr"], ["optimizer.lr"]),
        ((), ("train.max_steps=null", "train.max_tokens=2304"), [], []),  # 24 steps of 96 tokens
    ],
)
def test_what_the_schedule_may_become(
    config: Path, before: tuple[str, ...], after: tuple[str, ...], at_once: list[str], later: list[str]
):
    assert refused(config, before, after, step=0) == []
    assert refused(config, before, after, step=3) == at_once
    assert refused(config, before, after) == later


def test_every_key_that_may_not_change_is_named_at_once(config: Path):
    changes = ("seed=8", "model.hidden_size=64", "train.micro_batch_size=3", "log.every_steps=2")
    changes += ("train.gradient_accumulation_steps=1",)
    assert refused(config, (), changes) == [
        "seed",
        "model.hidden_size",
        "train.micro_batch_size",
        "train.gradient_accumulation_steps",
    ]


def test_a_source_more_or_less_is_refused(config: Path):
    two = ("data.sources=[{kind: files, path: a}, {kind: files, path: b}]",)
    one = ("data.sources=[{kind: files, path: a}]",)
    assert "data.sources.1.kind" in refused(config, one, two)
    assert "data.sources.1.weight" in refused(config, two, one)


# What is recorded


def test_a_change_that_is_allowed_is_said_and_recorded(config: Path):
    stop_after(STEP, config)
    result = call("train", config, "evaluate.batches=1", "train.recompute=block", "checkpoint.keep_last=9")
    assert result.code == 0
    said = " ".join(result.out.split())
    assert (
        'the run goes on with another configuration: train.recompute "none" -> "block", evaluate.batches '
        "2 -> 1, checkpoint.keep_last 2 -> 9"
    ) in said
    recorded = [
        (event["step"], event["key"], event["before"], event["after"])
        for event in events(RUN, "config_changed")
    ]
    assert recorded == [
        (STEP, "train.recompute", "none", "block"),
        (STEP, "evaluate.batches", 2, 1),
        (STEP, "checkpoint.keep_last", 2, 9),
    ]


def test_without_a_change_nothing_is_said(config: Path):
    stop_after(STEP, config)
    result = call("train", config)
    assert (result.code, events(RUN, "config_changed")) == (0, [])
    assert "another configuration" not in result.out


@pytest.mark.parametrize(
    ("saved", "now", "refused"),
    [
        ("flash", "triton", True),
        ("triton", "flash", True),
        ("flash", "flash", False),
        ("torch", "triton", False),  # from a CPU to a GPU, which device allows
        ("flash", "torch", False),
        (None, "flash", False),  # by an albor that did not write it down
    ],
)
def test_what_auto_attention_comes_to_may_not_change(
    saved: str | None, now: Any, refused: bool, monkeypatch: pytest.MonkeyPatch
):
    """Its table changes with albor's version; bits would change with it."""
    plan = plan_training(make_config(), "cuda", "bfloat16", attention=AttentionChoice(now, "as measured"))
    state = {"compute_dtype": "bfloat16"} | ({} if saved is None else {"attention": saved})
    monkeypatch.setattr(checkpoint, "read_state", lambda _: state)
    with pytest.raises(ConfigError) if refused else nullcontext() as caught:
        session._check_arithmetic(Path("step-1"), plan, "cuda")
    if caught is not None:
        [problem] = caught.value.problems
        assert problem.key == "train.attention"
        assert f"train.attention={saved} goes on" in problem.remedy


@pytest.mark.parametrize("guarded", [True, False], ids=["", "without-its-guard"])
def test_a_gpus_run_goes_on_on_the_cpu_only_where_that_is_written(
    config: Path, guarded: bool, monkeypatch: pytest.MonkeyPatch
):
    """A driver that fails after a reboot leaves `auto` the CPU, and nobody would see that for days."""
    stop_after(STEP, config)
    newest = RUN / "checkpoints" / checkpoint_name(STEP)
    state = {**checkpoint.read_state(newest), "attention": "triton"}  # as on a GPU
    forge(newest, "state.json", to_json(state))
    if not guarded:
        monkeypatch.setattr(session, "_check_arithmetic", lambda *_: None)
    result = call("train", config, "device=auto")
    assert result.code == (2 if guarded else 0)
    if guarded:
        assert f"device: auto, which is the CPU here, and {newest} was computed on a GPU" in result.err
        assert "albor doctor" in result.err
        assert call("train", config, "device=cpu").code == 0


def test_another_environment_is_said_and_recorded(config: Path, monkeypatch: pytest.MonkeyPatch):
    """What `auto` and the machine make of the same configuration may be other than at the last start."""
    stop_after(STEP, config)
    before = json.loads((RUN / "env.json").read_text())
    assert before["attention"] == "torch"
    (RUN / "env.json").write_text(json.dumps({**before, "device": "NVIDIA H100", "head_chunk_tokens": 4096}))
    threads = torch.get_num_threads()
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads + 1)
    result = call("train", config)
    assert result.code == 0
    found = {e["key"]: (e["before"], e["after"]) for e in events(RUN, "environment_changed")}
    assert found == {
        "threads": (threads, threads + 1),
        "device": ("NVIDIA H100", "cpu"),
        "head_chunk_tokens": (4096, before["head_chunk_tokens"]),
    }
    said = " ".join(result.out.split())
    assert f"threads {threads} -> {threads + 1}" in said
    assert "device NVIDIA H100 -> cpu" in said


def test_a_checkpoint_says_what_computed_attention(config: Path):
    stop_after(STEP, config)
    assert checkpoint.read_state(RUN / "checkpoints" / checkpoint_name(STEP))["attention"] == "torch"


def test_a_refusal_says_why_and_touches_nothing(config: Path):
    stop_after(STEP, config)
    before = unlogged(RUN)
    result = call("train", config, "train.max_steps=30", "optimizer.weight_decay=0.2")
    assert result.code == 2
    checkpoint = RUN / "checkpoints" / f"step-{STEP:08d}"
    assert result.err.splitlines()[1:] == [
        f"optimizer.weight_decay: 0.2, but {checkpoint} has 0.1: the updates so far were made with the old "
        "value; restore it, or give the new run another name and start it anew",
        f"train.max_steps: 30, but {checkpoint} has 24: step 5 of the {STEP} so far had the learning rate "
        "0.0099446, and would have had 0.00996719; restore it, or give the new run another name and start it "
        "anew",
    ]
    assert unlogged(RUN) == before


# What the table protects: a run that goes on with another value is the run that always had it, or is refused


def final(config: Path, name: str, *overrides: str) -> dict[str, Any]:
    """The newest checkpoint of an undisturbed run."""
    assert call("train", config, f"name={name}", *overrides).code == 0
    saved: dict[str, Any] = bits(Path("runs", name))["saved"]
    return saved


LENGTHENED = [
    ("schedule.kind=constant",),
    ("schedule.kind=wsd", "schedule.decay_fraction=0.2"),
]


@pytest.mark.parametrize("schedule", LENGTHENED, ids=lambda schedule: schedule[0])
def test_a_run_that_is_lengthened_is_the_long_run(config: Path, schedule: tuple[str, ...]):
    stop_after(STEP, config, *schedule)
    longer = (*schedule, "train.max_steps=30")
    assert call("train", config, *longer).code == 0
    assert bits(RUN)["saved"] == final(config, "long", *longer)


def allow(*keys: str) -> pytest.MonkeyPatch:
    """The table without its refusal of `keys`."""
    patch = pytest.MonkeyPatch()
    for key in keys:
        patch.setitem(resume_policy.POLICIES, key, Policy("allowed", "the guard is dropped"))
    return patch


@pytest.mark.parametrize(
    "change",
    [
        "optimizer.weight_decay=0.5",
        "train.max_steps=30",
        "data.sources[0].weight=2.0",
    ],
)
def test_what_is_refused_would_make_another_run(config: Path, change: str):
    """Row 18 without its guard: the run that goes on is neither the one it was nor the one it would be."""
    key = change.partition("=")[0].replace("[0]", "[]")
    two = "data.sources=[{kind: files, path: PROJECT, weight: 1.0}, {kind: files, path: PROJECT/0*}]"
    base = (two.replace("PROJECT", str(config.parent / "corpus")),)
    stop_after(STEP, config, *base)
    assert call("train", config, *base, change).code == 2
    patch = allow(key)
    assert call("train", config, *base, change).code == 0
    patch.undo()
    mixed = bits(RUN)["saved"]["weights.safetensors"]
    pure = [final(config, name, *base, *changes) for name, changes in (("old", ()), ("new", (change,)))]
    assert mixed not in [saved["weights.safetensors"] for saved in pure]


def test_regrouped_batches_are_another_run(config: Path):
    """The same tokens in the same steps: only sums are rounded otherwise, and that is enough."""
    regrouped = ("train.micro_batch_size=3", "train.gradient_accumulation_steps=1")
    keys = ["train.micro_batch_size", "train.gradient_accumulation_steps"]
    assert refused(config, (), regrouped) == keys
    stop_after(STEP, config)
    patch = allow(*keys)
    assert call("train", config, *regrouped).code == 0
    patch.undo()
    assert bits(RUN)["saved"]["weights.safetensors"] != final(config, "old")["weights.safetensors"]
