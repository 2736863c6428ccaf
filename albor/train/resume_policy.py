"""Which keys of the configuration may change while a run goes on, and why: one table.

A run is a function of its configuration, its data and its seed. What would make another function of it is
refused, since the checkpoint would then belong to neither; what only moves, watches or ends the run is
allowed, and the change is recorded.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from pydantic import BaseModel

from albor.config import RunConfig
from albor.errors import ConfigError, Problem
from albor.train.schedule import learning_rate

Verdict = Literal["allowed", "refused", "schedule"]


class Policy(NamedTuple):
    """What becomes of a change to a key when a run goes on."""

    verdict: Verdict  # "schedule": where `_schedule_problem` finds nothing
    why: str


def _refused(why: str) -> Policy:
    return Policy("refused", why)


def _allowed(why: str) -> Policy:
    return Policy("allowed", why)


_SHAPE = _refused("the tensors of the checkpoint have other shapes, or mean something else")
_FUNCTION = _refused("the same weights would compute something else")
_RECIPE = _refused("the updates so far were made with the old value")
_ROUNDING = _refused(
    "sums would be rounded otherwise, and the run would not be bit for bit what it was to be"
)
_MEMORY = _allowed("moves memory, and no bit of what is learned")
_CONTENT = _allowed("the same content may lie elsewhere; its SHA-256 is compared")
_WATCHED = _allowed("changes what is seen of the run, and nothing that it learns")
_KEPT = _allowed("changes what is kept of the run, and nothing that it learns")
_JUDGED = _allowed("holds for the steps to come; what was decided about earlier ones stays decided")
_DATA = _refused("the tokens, or their order, would be others")
_SCHEDULE = Policy(
    "schedule",
    "allowed where every step so far would have had the same learning rate, so that the run is the one that "
    "the new value would have given from the start; the run's end may not come before the step reached",
)

# Every key of the YAML file; those of a source stand once for all its kinds.
POLICIES: dict[str, Policy] = {
    "name": _allowed("the run goes on in another directory, from the checkpoint that --resume names"),
    "runs_dir": _allowed("the run may be moved"),
    "seed": _refused("all randomness follows from it"),
    "device": _allowed(
        "the machine may be another one; its arithmetic then rounds as it does there. What a GPU began "
        "goes on on the CPU only where cpu is written: auto does not do that silently"
    ),
    "model.hidden_size": _SHAPE,
    "model.intermediate_size": _SHAPE,
    "model.num_hidden_layers": _SHAPE,
    "model.num_attention_heads": _SHAPE,
    "model.num_key_value_heads": _SHAPE,
    "model.vocab_size": _SHAPE,
    "model.max_position_embeddings": _allowed("declared and used for generation; training does not see it"),
    "model.rope_theta": _FUNCTION,
    "model.rms_norm_eps": _FUNCTION,
    "model.tie_word_embeddings": _SHAPE,
    "model.initializer_range": _refused("the run began with weights of the old range"),
    "model.mup_base_width": _FUNCTION,
    "model.init_from": _refused("the run began with other weights; they are in it, and are not read again"),
    "tokenizer.kind": _DATA,
    "tokenizer.path": _CONTENT,
    "tokenizer.sample_bytes": _DATA,
    "data.sequence_length": _DATA,
    "data.sources[].kind": _DATA,
    "data.sources[].weight": _DATA,
    "data.sources[].max_bytes": _DATA,
    "data.sources[].path": _CONTENT,
    "data.sources[].separator": _DATA,
    "data.sources[].text_key": _DATA,
    "data.sources[].subset": _DATA,
    "data.sources[].split": _DATA,
    "data.sources[].revision": _CONTENT,
    "data.validation_fraction": _DATA,
    "data.document_mask": _FUNCTION,
    "data.max_epochs": _allowed("a limit that is checked when the run starts and when it goes back"),
    "data.cache_dir": _CONTENT,
    "optimizer.name": _RECIPE,
    "optimizer.lr": _SCHEDULE,
    "optimizer.betas": _RECIPE,
    "optimizer.eps": _RECIPE,
    "optimizer.weight_decay": _RECIPE,
    "optimizer.grad_clip": _RECIPE,
    "optimizer.state_dtype": _SHAPE,
    "schedule.kind": _SCHEDULE,
    "schedule.warmup_steps": _SCHEDULE,
    "schedule.min_lr_ratio": _SCHEDULE,
    "schedule.decay_fraction": _SCHEDULE,
    "train.max_steps": _SCHEDULE,
    "train.max_tokens": _SCHEDULE,
    "train.max_hours": _allowed("counted from every start anew"),
    "train.micro_batch_size": _ROUNDING,
    "train.gradient_accumulation_steps": _ROUNDING,
    "train.precision": _ROUNDING,
    "train.accumulator": _MEMORY,
    "train.attention": _allowed(
        "what it comes to may not change: the checkpoint says what computed attention, and another is refused"
    ),
    "train.deterministic": _ROUNDING,
    "train.recompute": _MEMORY,
    "train.head_chunk_tokens": _ROUNDING,
    "train.label_smoothing": _RECIPE,
    "train.z_loss": _RECIPE,
    "evaluate.every_steps": _WATCHED,
    "evaluate.batches": _WATCHED,
    "evaluate.micro_batch_size": _WATCHED,
    "evaluate.prompts": _WATCHED,
    "evaluate.final_batches": _WATCHED,
    "evaluate.sample_tokens": _WATCHED,
    "evaluate.temperature": _WATCHED,
    "evaluate.smoke_test": _WATCHED,
    "checkpoint.every_steps": _JUDGED,  # a rollback goes to the last of these checkpoints
    "checkpoint.keep_last": _KEPT,
    "checkpoint.keep_every": _KEPT,
    "checkpoint.keep_best": _KEPT,
    "checkpoint.retries": _KEPT,
    "checkpoint.background": _KEPT,
    "log.every_steps": _WATCHED,
    "track.to": _WATCHED,
    "track.project": _WATCHED,
    "track.group": _WATCHED,
    "track.tags": _WATCHED,
    "track.entity": _WATCHED,
    "track.wandb_mode": _WATCHED,
    "track.trackio_dir": _WATCHED,
    "divergence.max_skips": _JUDGED,
    "divergence.window_steps": _JUDGED,
    "divergence.max_rollbacks": _JUDGED,
    "divergence.on_spike": _JUDGED,
    "divergence.spike_zscore": _JUDGED,
    "divergence.spike_window": _JUDGED,
    "divergence.keep_spikes": _KEPT,
    "alerts": _WATCHED,
}


@dataclass(frozen=True)
class Change:
    """A key that a run goes on with another value of."""

    key: str
    before: Any
    after: Any

    def __str__(self) -> str:
        return f"{self.key} {json.dumps(self.before)} -> {json.dumps(self.after)}"


def changes_on_resume(config: RunConfig, saved: RunConfig, step: int, checkpoint: Path) -> list[Change]:
    """What `config` changes of `saved`, with which the run came to `step` and to `checkpoint`.

    Raises ConfigError, with every key, where the run would not be the same one any more.
    """
    before, after = _leaves(saved), _leaves(config)
    changes = [
        Change(key, before.get(key), after.get(key))
        for key in dict.fromkeys([*before, *after])
        if key not in before or key not in after or before[key] != after[key]
    ]
    problems = []
    schedule_problem = None
    if any(policy_of(change.key).verdict == "schedule" for change in changes):
        schedule_problem = _schedule_problem(config, saved, step)
    for change in changes:
        policy = policy_of(change.key)
        why = schedule_problem if policy.verdict == "schedule" else policy.why
        if policy.verdict == "refused" or (policy.verdict == "schedule" and schedule_problem):
            value, saved_value = json.dumps(change.after), json.dumps(change.before)
            message = f"{value}, but {checkpoint} has {saved_value}: {why}"
            problems.append(
                Problem(change.key, message, "restore it, or give the new run another name and start it anew")
            )
    if problems:
        raise ConfigError(problems)
    return changes


def policy_of(key: str) -> Policy:
    """The table's entry for a dotted key, such as `data.sources.0.path`."""
    return POLICIES[re.sub(r"\.\d+\.", "[].", key)]


def _schedule_problem(config: RunConfig, saved: RunConfig, step: int) -> str | None:
    """Why the learning rate's schedule, or the run's length, may not become that of `config` at `step`."""
    if config.steps < step:
        return f"the run has come to step {step} already, and would end at {config.steps}"
    for done in range(1, step + 1):
        rates = [learning_rate(done, run.steps, run.optimizer.lr, run.schedule) for run in (saved, config)]
        if rates[0] != rates[1]:
            return (
                f"step {done} of the {step} so far had the learning rate {rates[0]:g}, and would have had "
                f"{rates[1]:g}"
            )
    return None


def _leaves(section: BaseModel, path: str = "") -> dict[str, Any]:
    """The keys of a section as {dotted key: value}; the sections in a list by their number."""
    leaves: dict[str, Any] = {}
    for name in type(section).model_fields:
        key, value = f"{path}{name}", getattr(section, name)
        if isinstance(value, tuple) and value and isinstance(value[0], BaseModel):
            for number, item in enumerate(value):
                leaves |= _leaves(item, f"{key}.{number}.")
        elif isinstance(value, BaseModel):
            leaves |= _leaves(value, f"{key}.")
        else:
            leaves[key] = list(value) if isinstance(value, tuple) else value
    return leaves
