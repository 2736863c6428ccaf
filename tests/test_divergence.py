"""Steps that are not finite, spikes, and the way back: rows 10, 11 and 12 of the fault matrix.

What is wrong with a run here lies in its data: at certain samples loss or gradient are made NaN or large. So
a run that goes back in its steps but not in its data gets past them, and one that is killed and resumes meets
them again.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_cases import exit_code_of, fork, save_step
from helpers import make_batches, make_config, make_trainer
from run_cases import bits, call, checkpoints, events, rows, tree, write_project

from albor import checkpoint, faults, tensorfile
from albor.checkpoint import checkpoint_name, find_latest
from albor.config import DivergenceConfig
from albor.data.loader import Loader
from albor.manifest import Manifest
from albor.tensorfile import read_tensors_into, write_tensors
from albor.train import guard, session
from albor.train.guard import GuardState, Verdict, judge, must_roll_back, spread
from albor.train.loop import Loop
from albor.train.step import Trainer, TrainState

Patch = pytest.MonkeyPatch
RUN = Path("runs/tiny")
PER_STEP = 3  # samples
STEPS = 24
QUIET = ("evaluate.prompts=[]", "evaluate.every_steps=8", "evaluate.batches=1", "evaluate.final_batches=1")

# The verdict, step by step


def follow(
    values: list[tuple[float, float]], policy: DivergenceConfig, state: GuardState | None = None
) -> tuple[list[Verdict], GuardState]:
    state, verdicts = state or GuardState(), []
    for step, (loss, norm) in enumerate(values, 1):
        verdict, state = judge(state, step, loss, norm, policy, "float32")
        verdicts.append(verdict)
    return verdicts, state


def noise(count: int, level: float = 3.0, seed: int = 0) -> list[tuple[float, float]]:
    generator = torch.Generator().manual_seed(seed)
    drawn = 1 + 0.02 * torch.randn(count, 2, generator=generator, dtype=torch.float64)
    return [(level * loss, norm) for loss, norm in drawn.tolist()]


@pytest.mark.parametrize("bad", [(math.nan, 1.0), (3.0, math.inf), (math.inf, 1.0), (3.0, math.nan)])
@pytest.mark.parametrize("on_spike", ["none", "clip", "skip"])
def test_one_bad_step_makes_no_other_one_look_bad(bad: tuple[float, float], on_spike: Any):
    """A window with a NaN in it finds nothing, or everything, unusual for as long as it holds it."""
    policy = DivergenceConfig(on_spike=on_spike)
    verdicts, state = follow([*noise(300), bad, *noise(300, seed=1)], policy)
    assert [i for i, verdict in enumerate(verdicts) if verdict != Verdict("good", True)] == [300]
    assert verdicts[300] == Verdict("non-finite", False)
    assert all(map(math.isfinite, (*state.losses, *state.norms)))
    assert (state.skipped, state.skips, state.spikes) == (1, (), 0)


@pytest.mark.parametrize("bad", [(0.0, 1.0), (3.0, 0.0), (0.0, 0.0), (-1.0, 1.0)])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_zero_is_no_loss_and_no_gradient_but_of_a_step_without_targets(bad: tuple[float, float], dtype: str):
    """In fp16 neither: a smaller loss scale would make more zeros."""
    policy, state = DivergenceConfig(), GuardState.initial(dtype)
    verdict, after = judge(state, 1, *bad, policy, dtype)
    assert verdict == Verdict("zero", False)
    assert after == replace(state, skips=(1,), skipped=1)
    assert judge(state, 1, *bad, policy, dtype, has_targets=False)[0].kind == "good"
    assert judge(state, 1, 1e-30, 1e-30, policy, dtype)[0].kind == "good"


def test_skips_are_counted_over_the_last_steps_and_no_longer():
    policy = DivergenceConfig(max_skips=3, window_steps=10)
    state, due = GuardState(), []
    for step in range(1, 40):
        _, state = judge(
            state, step, math.nan if step in (5, 10, 15, 19, 20, 21) else 3.0, 1.0, policy, "float32"
        )
        due.append(must_roll_back(state, policy))
        assert all(step - 10 < skipped <= step for skipped in state.skips)
    assert [step for step, is_due in enumerate(due, 1) if is_due] == [19, 20, 21, 22, 23, 24, 25, 26, 27, 28]
    # 5, 10 and 15 never are in one window of ten; 10, 15 and 19 are.


def test_a_window_of_skips_holds_its_last_step_and_not_the_one_before():
    policy = DivergenceConfig(max_skips=2, window_steps=4)
    for later, is_due in ((4, True), (5, False)):
        _, state = follow(
            [(math.nan if step in (1, later) else 3.0, 1.0) for step in range(1, later + 1)], policy
        )
        assert must_roll_back(state, policy) is is_due


@pytest.mark.parametrize("place", [0, 1])
def test_a_spike_is_judged_by_the_window_before_it(place: int):
    """By more than 6 deviations, in the loss or in the norm, and only once the window is half full."""
    policy = DivergenceConfig(on_spike="clip", spike_window=64)
    for count, judged in ((31, False), (32, True), (200, True)):
        values = noise(count)
        _, before = follow(values, policy)
        mean, deviation = spread((before.losses, before.norms)[place])
        for z, is_spike in ((5.9, False), (6.1, judged)):
            spike = list(values[-1])
            spike[place] = mean + z * deviation
            verdict, after = judge(before, count + 1, spike[0], spike[1], policy, "float32")
            assert (verdict.kind == "spike") is is_spike
            assert after.spikes == int(is_spike)
            window = (after.losses, after.norms)[place]
            limit = mean + 6 * deviation if judged else math.inf
            assert window[-1] == pytest.approx(min(spike[place], limit))
            assert len(window) == min(64, count + 1)


def test_clip_scales_down_to_the_mean_norm_and_skip_leaves_the_weights():
    values = noise(100)
    for on_spike, expected in (("clip", True), ("skip", False)):
        policy = DivergenceConfig(on_spike=on_spike)
        _, state = follow(values, policy)
        verdict, _ = judge(state, 101, 3.0, 50.0, policy, "float32")
        assert (verdict.kind, verdict.updates) == ("spike", expected)
        mean = sum(state.norms) / len(state.norms)
        assert verdict.largest_norm == (pytest.approx(mean) if expected else math.inf)
    verdicts, state = follow([*values, (300.0, 50.0)], DivergenceConfig())
    assert verdicts[-1] == Verdict("good", True)
    assert state.spikes == 0


def test_spikes_are_no_reason_to_go_back():
    policy = DivergenceConfig(on_spike="skip", max_skips=1, window_steps=1)
    verdicts, state = follow([*noise(100), (3000.0, 1000.0)], policy)
    assert verdicts[-1].kind == "spike"
    assert not must_roll_back(state, policy)


def test_a_new_level_is_followed_and_not_fought():
    """Spikes enter the window cut at the threshold: were they left out, a loss that has risen for good would
    be a spike until the end.
    """
    policy = DivergenceConfig(on_spike="skip")
    verdicts, state = follow([*noise(128), *noise(300, level=9.0, seed=1)], policy)
    fought = [i for i, verdict in enumerate(verdicts) if verdict.kind == "spike"]
    assert fought[0] == 128
    assert fought == list(range(128, 128 + len(fought))), "a spike after one that was none"
    assert len(fought) < 40
    assert spread(state.losses)[0] == pytest.approx(9.0, rel=0.02)


def test_equal_values_are_no_reason_to_call_the_next_one_a_spike():
    verdicts, _ = follow([(3.0, 1.0)] * 100 + [(3.001, 1.001)], DivergenceConfig(on_spike="skip"))
    assert verdicts[-1].kind == "good"


def test_the_verdict_is_a_function_and_its_state_is_json():
    """What is written is read back equal, in the middle of everything, and decides alike."""
    policy = DivergenceConfig(on_spike="clip", spike_window=16)
    values = [
        *noise(40),
        (math.nan, 1.0),
        (900.0, 50.0),
        *noise(40, seed=1),
        (3.0, math.inf),
        *noise(5, seed=2),
    ]
    straight, last = follow(values, policy)
    state, verdicts = GuardState(), []
    for step, (loss, norm) in enumerate(values, 1):
        state = GuardState.from_json(json.loads(json.dumps(state.as_json(), allow_nan=False)))
        verdict, state = judge(state, step, loss, norm, policy, "float32")
        verdicts.append(verdict)
    assert (verdicts, state) == (straight, last)


@pytest.mark.parametrize(
    "change",
    [
        {"skips": None}, {"skips": ["a"]}, {"skips": [-1]}, {"losses": [None]}, {"losses": "nan"},
        {"anchor": 1.5}, {"rollbacks": True}, {"loss_scale": 0.0}, {"loss_scale": "1"}, {"more": 1},
        {"norms": [1]},
    ],
)  # fmt: skip
def test_a_state_that_nobody_wrote_is_refused(change: dict[str, Any]):
    with pytest.raises(ValueError, match="guard"):
        GuardState.from_json(GuardState().as_json() | change)
    with pytest.raises(ValueError, match="guard"):
        GuardState.from_json([])


# Runs


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = write_project(tmp_path_factory.mktemp("project"))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(path.parent)
        assert call("data", "prepare", path).code == 0
    return path


@pytest.fixture(autouse=True)
def own_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def poison_loss(trainer: Trainer) -> None:
    trainer.arena["io.results"][:1].fill_(math.nan)


def poison_gradient(trainer: Trainer) -> None:
    trainer.accumulator.sums[5] = math.inf


def poison_weight(trainer: Trainer) -> None:
    trainer.arena["weights"][7] = math.nan


def poison_moment(trainer: Trainer) -> None:
    trainer.arena["moments.second"][7] = math.inf


def nothing_computed(trainer: Trainer) -> None:
    """As if no kernel had written anything."""
    trainer.arena["io.results"][:1].zero_()
    trainer.accumulator.sums.zero_()


def enlarge(trainer: Trainer) -> None:
    """Loss and gradient are a hundred times what they are."""
    trainer.arena["io.results"][:1].mul_(100)
    trainer.accumulator.sums.mul_(100)


@contextmanager
def bad_samples(samples: Collection[int], act: Callable[[Trainer], None]) -> Iterator[None]:
    """`act` happens to the trainer after each micro-batch with one of these samples."""
    read, healthy = Loader.next, Trainer._micro_batch
    now = {"sample": -1}

    def noted(self: Loader, *out: Any) -> None:
        now["sample"] = self.state()["samples"]
        read(self, *out)

    def disturbed(self: Trainer) -> None:
        healthy(self)
        if now["sample"] in samples:
            act(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Loader, "next", noted)
        patch.setattr(Trainer, "_micro_batch", disturbed)
        yield


def samples_of(*steps: int) -> set[int]:
    """The last of each of these steps' samples, in a run that never goes back."""
    return {PER_STEP * step - 1 for step in steps}


@contextmanager
def at(point: str, step: int, number: signal.Signals, time: int = 1) -> Iterator[None]:
    """A signal when `faults.reach` comes to `point` of `step` for the `time`-th time."""
    left = {"times": time}

    def reach(where: str, when: int | None = None) -> float:
        if (where, when) == (point, step):
            left["times"] -= 1
            if left["times"] == 0:
                os.kill(os.getpid(), number)
        return 1.0

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(faults, "reach", reach)
        yield


def train(config: Path, *arguments: object) -> Any:
    return call("train", config, *QUIET, *arguments)


def killed(config: Path, point: str, step: int, *arguments: object, time: int = 1) -> None:
    """A run that is killed there."""

    def work() -> None:
        with at(point, step, signal.SIGKILL, time):
            train(config, *arguments)

    assert exit_code_of(fork(work)) == -signal.SIGKILL, "it was not killed"


def stopped(config: Path, step: int, *arguments: object, time: int = 1) -> None:
    """A run that a signal stops in `step`, which is still taken."""
    with at("step.updated", step, signal.SIGTERM, time):
        assert train(config, *arguments).code == 75


def state_of(run: Path = RUN) -> dict[str, Any]:
    newest = find_latest(run / "checkpoints")
    assert newest is not None
    return json.loads((newest / "state.json").read_text())


def learned(run: Path = RUN) -> dict[str, str]:
    """The tensors of the newest checkpoint."""
    return {name: digest for name, digest in bits(run)["saved"].items() if name.endswith(".safetensors")}


WINDOW = samples_of(10, 11, 12, 13, 14)  # five steps in a row, after the checkpoint of step 8
JUMPED = PER_STEP * (14 - 8)


@pytest.fixture(scope="module")
def rolled_back(config: Path) -> dict[str, Any]:
    """The bits of a run that goes back once, and that nothing else happens to."""
    with pytest.MonkeyPatch.context() as patch, bad_samples(WINDOW, poison_loss):
        patch.chdir(config.parent)
        assert train(config, "name=rolled").code == 0
    return bits(config.parent / "runs/rolled")


def row_10_goes_back(config: Path, act: Callable[[Trainer], None] = poison_gradient) -> None:
    """To the weights of the last checkpoint, on with the data behind the bad ones: the bits of a run that was
    told to leave them out."""
    with bad_samples(WINDOW, act):
        result = train(config)
    assert result.code == 0
    skipped, (rollback,) = events(RUN, "skipped_step"), events(RUN, "rollback")
    assert [event["step"] for event in skipped] == [10, 11, 12, 13, 14]
    assert [event["samples"] for event in skipped] == [[3 * s - 3, 3 * s] for s in range(10, 15)]
    assert (rollback["from_step"], rollback["step"], rollback["samples"]) == (14, 8, [24, 42])
    assert "14: 5 of the last 20 steps" in result.out
    assert "back to step 8" in result.out
    assert [row["step"] for row in rows(RUN) if "train/loss" in row] == list(range(1, STEPS + 1))
    assert all(row["train/loss"] is not None for row in rows(RUN) if "train/loss" in row)

    stepped = Loop.step

    def leap(self: Loop) -> None:
        if self.session.state.step == 8:
            self.session.loader.restore({"samples": 24 + JUMPED, "per_source": [24 + JUMPED]})
        stepped(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Loop, "step", leap)
        assert train(config, "name=told").code == 0
    assert learned() == learned(Path("runs/told"))
    assert bits(RUN)["rows"] == bits(Path("runs/told"))["rows"]
    state, told = state_of(), state_of(Path("runs/told"))
    assert (state["guard"]["rollbacks"], state["guard"]["skipped"], state["guard"]["skips"]) == (1, 5, [])
    assert state["guard"] | {"rollbacks": 0, "skipped": 0} == told["guard"]
    assert state["loader"] == told["loader"]
    assert state["best_validation_loss"] == told["best_validation_loss"]


def row_10_survives_kills(config: Path, expected: dict[str, Any]) -> None:
    """A run that is killed after it went back meets the same data, and goes back again to the same bits."""
    with bad_samples(WINDOW, poison_loss):
        killed(config, "step.updated", 12)
        killed(config, "rollback.begin", 14)
        killed(config, "rollback.loaded", 14)
        killed(config, "step.updated", 11, time=2)  # once before going back, once after
        assert state_of()["step"] == 8
        killed(config, "step.updated", 14, time=2)
        assert state_of()["step"] == 12
        assert state_of()["guard"]["rollbacks"] == 1
        assert train(config).code == 0
    assert bits(RUN) == expected


def row_10_survives_stops(config: Path, expected: dict[str, Any]) -> None:
    """A signal leaves checkpoints where the cadence has none: none of them is gone back to, nor pushes out
    the one that is.
    """
    kept = "checkpoint.keep_last=1"
    with bad_samples(WINDOW, poison_loss):
        stopped(config, 9, kept)
        stopped(config, 12, kept)
        assert checkpoints(RUN) == [8, 9, 12], "while steps are skipped nothing is removed"
        stopped(config, 13, kept)
        stopped(config, 10, kept, time=1)  # after the rollback of step 14
        assert checkpoints(RUN) == [8, 10]
        (evaluated,) = (row["val/loss"] for row in rows(RUN) if "val/loss" in row)
        assert state_of()["best_validation_loss"] == evaluated, "of step 8, where the run went back to"
        assert train(config).code == 0
    assert bits(RUN) == expected


def row_10_bad_weights_are_never_saved(config: Path, act: Callable[[Trainer], None]) -> None:
    """Once in a run, at step 10: whoever finds it, a step that cannot be computed or a save, goes back."""
    done: list[int] = []

    def once(trainer: Trainer) -> None:
        if not done:
            act(trainer)
        done.append(1)

    with bad_samples(samples_of(10), once):
        result = train(config, "checkpoint.every_steps=2", "checkpoint.keep_last=20")
    assert result.code == 0
    assert len(events(RUN, "rollback")) == 1
    for step in checkpoints(RUN):
        directory = RUN / "checkpoints" / checkpoint_name(step)
        for name in ("weights", "optimizer"):
            assert all(torch.isfinite(tensor).all() for tensor in tensors_of(directory, name).values()), step


EARLY = samples_of(2, 3, 4, 5, 6)  # before the first checkpoint
LATE_SAVES = "checkpoint.every_steps=20"


def row_10_goes_back_to_the_beginning(config: Path) -> None:
    """Before there is a checkpoint: to the weights that the seed gives, on with the data behind the bad ones.
    The same bits also after kills and stops on either side of it, whose checkpoints are no way back.
    """

    def leap(self: Loop) -> None:
        if self.session.state.step == 0:
            self.session.loader.restore({"samples": 18, "per_source": [18]})
        stepped(self)

    stepped = Loop.step
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Loop, "step", leap)
        assert train(config, LATE_SAVES, "name=told").code == 0
    with bad_samples(EARLY, poison_loss):
        assert train(config, LATE_SAVES).code == 0
        (rollback,) = events(RUN, "rollback")
        assert (rollback["from_step"], rollback["step"], rollback["checkpoint"]) == (6, 0, None)
        assert rollback["samples"] == [0, 18]
        assert (learned(), bits(RUN)["rows"]) == (
            learned(Path("runs/told")), bits(Path("runs/told"))["rows"],
        )  # fmt: skip
        assert state_of()["guard"]["rollbacks"] == 1

        name = "name=disturbed"
        stopped(config, 3, LATE_SAVES, name)
        killed(config, "rollback.loaded", 6, LATE_SAVES, name)
        killed(config, "step.begin", 4, LATE_SAVES, name, time=2)
        assert checkpoints(Path("runs/disturbed")) == [], "what a stop left is beyond the beginning"
        stopped(config, 1, LATE_SAVES, name, time=2)
        stopped(config, 9, LATE_SAVES, name)
        assert train(config, LATE_SAVES, name).code == 0
    assert bits(Path("runs/disturbed")) == bits(RUN)


def tensors_of(directory: Path, name: str) -> dict[str, torch.Tensor]:
    dtypes = {"F32": torch.float32, "F64": torch.float64, "BF16": torch.bfloat16}
    manifest = Manifest.from_bytes((directory / "manifest.json").read_bytes())
    specs = manifest.tensors[f"{name}.safetensors"]
    tensors = {key: torch.empty(spec.shape, dtype=dtypes[spec.dtype]) for key, spec in specs.items()}
    read_tensors_into(directory / f"{name}.safetensors", tensors)
    return tensors


def row_11(config: Path, on_spike: str, *, resumed: bool) -> dict[str, Any]:
    """A finite spike of a hundred times, in a run that may be stopped in the step before, in it and after."""
    arguments = (f"divergence.on_spike={on_spike}", "divergence.spike_window=16", f"name={on_spike}")
    run = Path("runs", on_spike)
    with bad_samples({PER_STEP * 14 - 3, PER_STEP * 19 - 3}, enlarge):
        for step in (5, 13, 14, 18) if resumed else ():
            stopped(config, step, *arguments)
        assert train(config, *arguments).code == 0
    spikes = events(run, "spike")
    action = {"clip": "clipped", "skip": "skipped"}[on_spike]
    assert [(event["step"], event["action"]) for event in spikes] == [(14, action), (19, action)]
    assert (state_of(run)["guard"]["spikes"], state_of(run)["guard"]["skipped"]) == (2, 0)
    assert state_of(run)["updates"] == (STEPS if on_spike == "clip" else STEPS - 2)
    seen = {row["step"]: row["train/grad_norm"] for row in rows(run) if "train/loss" in row}
    assert seen[14] > 20 * seen[13]
    return bits(run)


def row_12_refuses_a_bad_checkpoint(config: Path, expected: dict[str, Any]) -> None:
    """One whose hashes fit, and that is not finite: whoever made it, no run goes on from it."""
    with bad_samples(WINDOW, poison_loss):
        stopped(config, 10)
        forge(RUN / "checkpoints" / checkpoint_name(10))
        result = train(config)
    assert result.code == 0
    assert f"{checkpoint_name(10)}: weights or moments of the optimizer are not finite" in result.out
    assert "going on from step 8" in result.out
    assert bits(RUN) == expected


def forge(directory: Path, name: str = "optimizer") -> None:
    """A NaN in one tensor of the checkpoint, which verifies all the same."""
    path = directory / f"{name}.safetensors"
    tensors = tensors_of(directory, name)
    next(reversed(tensors.values())).view(-1)[-1] = math.nan
    record = write_tensors(path, tensors)
    manifest = Manifest.from_bytes((directory / "manifest.json").read_bytes())
    changed = replace(manifest, files={**manifest.files, path.name: record})
    (directory / "manifest.json").write_bytes(changed.to_bytes())
    checkpoint.verify(directory)


@pytest.mark.parametrize("act", [poison_gradient, nothing_computed])
def test_row_10_goes_back(config: Path, act: Callable[[Trainer], None]):
    row_10_goes_back(config, act)


def test_row_10_survives_kills(config: Path, rolled_back: dict[str, Any]):
    row_10_survives_kills(config, rolled_back)


def test_row_10_survives_stops(config: Path, rolled_back: dict[str, Any]):
    row_10_survives_stops(config, rolled_back)


def test_row_10_goes_back_to_the_beginning(config: Path):
    row_10_goes_back_to_the_beginning(config)


@pytest.mark.parametrize("act", [poison_weight, poison_moment])
def test_row_10_bad_weights_are_never_saved(config: Path, act: Callable[[Trainer], None]):
    row_10_bad_weights_are_never_saved(config, act)


@pytest.mark.parametrize("on_spike", ["clip", "skip"])
def test_row_11(config: Path, on_spike: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    whole = row_11(config, on_spike, resumed=False)
    (tmp_path / "again").mkdir()
    monkeypatch.chdir(tmp_path / "again")
    assert row_11(config, on_spike, resumed=True) == whole


def test_row_12_refuses_a_bad_checkpoint(config: Path, rolled_back: dict[str, Any]):
    row_12_refuses_a_bad_checkpoint(config, rolled_back)


def test_a_clipped_step_is_that_of_a_smaller_gradient():
    """As `optimizer.grad_clip` at the window's mean norm would make it."""
    window = GuardState(losses=(3.0,) * 64, norms=(0.5,) * 64)
    keys = {"grad_clip": 0.0, "eps": 1e-2, "weight_decay": 0.0}
    results = []
    for limit, on_spike in ((0.0, "clip"), (0.5, "none"), (0.0, "none")):
        made = make_config(**keys | {"grad_clip": limit})
        policy = DivergenceConfig(on_spike=on_spike)
        trainer = make_trainer(made.model_copy(update={"divergence": policy}))
        result, state = trainer.step(make_batches(made), TrainState(guard=window))
        assert result.updated
        assert result.grad_norm > 0.6
        assert state.guard.spikes == int(on_spike == "clip")
        results.append(trainer.arena["weights"].clone())
    clipped, by_grad_clip, whole = results
    assert torch.allclose(clipped, by_grad_clip, rtol=0, atol=1e-8)
    assert not torch.allclose(clipped, whole, rtol=0, atol=1e-5)


# The end of it


def test_after_so_many_rollbacks_a_run_gives_up(config: Path):
    """With 3, the checkpoint that it would go on from, and a way on."""
    with bad_samples(range(27, 1000), poison_loss):
        result = train(config)
        assert result.code == 3
        assert "the run has gone back 2 times (divergence.max_rollbacks)" in result.err
        assert "start again under another name with a lower optimizer.lr" in result.err
        assert "albor inspect-spike runs/tiny" in result.err
        assert len(result.err.splitlines()) == 1
        assert [event["step"] for event in events(RUN, "rollback")] == [8, 8]
        assert [event["event"] for event in events(RUN)][-2:] == ["diverged", "memory"]
        assert checkpoints(RUN)[-1] == 8
        before = tree(RUN / "checkpoints")
        again = train(config)  # the same again, from the checkpoint
        assert (again.code, again.err) == (3, result.err)
        assert tree(RUN / "checkpoints") == before
    with bad_samples(
        range(27, 27 + 3 * 15), poison_loss
    ):  # it ends in the third window, and one more is allowed
        result = train(config, "divergence.max_rollbacks=3")
    assert result.code == 0


def test_where_there_is_no_way_back_a_run_gives_up_at_once(config: Path):
    with bad_samples(WINDOW, poison_loss):
        result = train(config, "divergence.max_rollbacks=0")
    assert result.code == 3
    assert "gone back 0 times" in result.err
    assert "step 14: 5 of the last 20 steps" in result.err
    assert events(RUN, "rollback") == []


def test_a_run_does_not_go_back_for_ever_before_its_first_checkpoint(config: Path):
    with bad_samples(range(1000), poison_loss):
        result = train(config)
        assert result.code == 3
        assert "gone back 2 times" in result.err
        assert [event["samples"] for event in events(RUN, "rollback")] == [[0, 15], [0, 30]]
        assert checkpoints(RUN) == []
        assert train(config).err == result.err


def test_what_rollbacks_leave_out_counts_as_read(config: Path):
    """`data.max_epochs` allows the run, and not the run and a window that is left out on top."""
    assert train(config, "name=measured").code == 0
    epochs = rows(Path("runs/measured"))[-2]["train/epoch"]
    limit = f"data.max_epochs={epochs * 1.1}"
    with bad_samples(WINDOW, poison_loss):
        for _ in range(2):
            result = train(config, limit)
            assert result.code == 3
            assert "with another rollback 24 steps and 18 samples of rollbacks read" in result.err
            assert "; raise data.max_epochs to " in result.err
            assert checkpoints(RUN)[-1] == 8
        raised = result.err.split("raise data.max_epochs to ")[1].split(";")[0]
        with at("step.updated", 12, signal.SIGTERM, time=2):
            assert train(config, f"data.max_epochs={raised}").code == 75
        assert len(events(RUN, "rollback")) == 1
        result = train(config, limit)
        assert result.code == 2
        assert "and 18 samples of rollbacks read" in result.err
        assert train(config, f"data.max_epochs={raised}").code == 0


def test_an_older_checkpoint_is_gone_back_to_where_the_newest_is_not_good(config: Path):
    """Damaged, not finite, or gone: each is said. Where none is left, the run gives up."""
    with bad_samples(samples_of(*range(14, 19)), poison_loss):
        stopped(config, 13, "checkpoint.keep_last=9")
        home = RUN / "checkpoints"
        shutil.copytree(RUN, "copy")
        shutil.rmtree(home / checkpoint_name(12))
        forge(home / checkpoint_name(8))
        result = train(config, "checkpoint.keep_last=9")
        assert result.code == 0
        assert "the checkpoint of step 12 is gone" in result.out
        assert f"{checkpoint_name(8)}: weights or moments of the optimizer are not finite" in result.out
        assert "back to step 4" in result.out
        assert events(RUN, "rollback")[0]["samples"] == [12, 54]

        shutil.rmtree(RUN)
        shutil.copytree("copy", RUN)
        for step in (4, 8):
            shutil.rmtree(home / checkpoint_name(step))
        (home / checkpoint_name(12) / "weights.safetensors").write_bytes(b"no tensors")
        result = train(config, "checkpoint.keep_last=9")
    assert result.code == 3
    assert "no checkpoint is good to go back to" in result.err
    assert "weights.safetensors: has 10 bytes" in result.err
    assert checkpoints(RUN)[-1] == 13, "what was refused is not removed"


def test_a_rollback_passes_over_a_checkpoint_that_the_disk_does_not_give(config: Path, monkeypatch: Patch):
    lost, read = f"{checkpoint_name(8)}/weights.safetensors", tensorfile._store

    def failing(path: Path, *arguments: Any) -> Iterator[memoryview]:
        if str(path).endswith(lost):
            raise OSError(5, "Input/output error")
        return read(path, *arguments)

    monkeypatch.setattr(tensorfile, "_store", failing)
    with bad_samples(WINDOW, poison_loss):
        result = train(config)
    assert result.code == 0, result.err
    assert f"{lost}: not a readable safetensors file: [Errno 5] Input/output error" in result.out
    assert events(RUN, "rollback")[0]["checkpoint"].endswith(checkpoint_name(4))


def test_a_rollback_at_the_last_step_goes_on_to_the_end(config: Path):
    with bad_samples(samples_of(*range(20, 25)), poison_loss):
        result = train(config)
    assert result.code == 0
    assert "step 24: 5 of the last 20 steps" in result.out
    assert (state_of()["step"], state_of()["guard"]["rollbacks"]) == (STEPS, 1)
    assert json.loads((RUN / "eval/final.json").read_text())["step"] == STEPS


def test_the_best_checkpoint_is_no_longer_one_that_was_left_behind(config: Path):
    """Step 10 is evaluated, and saved by a stop, before the run goes back to 8; and once more after it."""
    keep = ("checkpoint.keep_best=true", "checkpoint.every_steps=8", "evaluate.every_steps=2")
    with bad_samples(samples_of(*range(11, 16)), poison_loss):
        stopped(config, 10, *keep)
        killed(config, "rollback.begin", 15, *keep)
        best = checkpoint.read_best(RUN / "checkpoints")
        assert best is not None
        assert best.step == 10
        killed(config, "step.begin", 10, *keep)
        best = checkpoint.read_best(RUN / "checkpoints")
        assert best is not None
        assert best.step == 8
        assert checkpoints(RUN) == [8]


def test_what_is_removed_takes_its_mark_along(tmp_path: Path):
    """Else the checkpoint that gets its step later would be taken for it."""
    for step in (4, 8, 12):
        save_step(tmp_path, step)
    checkpoint.mark_best(tmp_path, 12, 0.5)
    checkpoint.remove_after(tmp_path, 8)
    assert checkpoint.read_best(tmp_path) is None
    checkpoint.mark_best(tmp_path, 4, 0.5)
    checkpoint.remove_after(tmp_path, 4)
    assert checkpoint.read_best(tmp_path) == checkpoint.Best(4, 0.5)
    assert [checkpoint.step_of(path) for path in checkpoint.list_checkpoints(tmp_path)] == [4]


def test_saving_in_the_background_changes_nothing_of_it(config: Path, rolled_back: dict[str, Any]):
    with bad_samples(WINDOW, poison_loss):
        assert train(config, "checkpoint.background=true").code == 0
    assert len(events(RUN, "rollback")) == 1
    found = bits(RUN)
    assert found == rolled_back


def test_a_named_checkpoint_that_is_not_finite_is_refused(config: Path):
    assert train(config, "name=other").code == 0
    named = Path("runs/other/checkpoints", checkpoint_name(24))
    forge(named)
    result = train(config, "--resume", named)
    assert result.code == 1
    assert f"{named}: weights or moments of the optimizer are not finite" in result.err
    assert train(config, "--resume", "runs/other").code == 0
    assert events(RUN, "resumed")[0]["source"].endswith(checkpoint_name(20))


def test_weights_that_are_not_finite_are_not_saved_by_a_signal(config: Path):
    """The run says so, and goes on from before; where there is nothing before, it gives up."""
    with bad_samples(samples_of(10), poison_moment):
        with at("step.updated", 10, signal.SIGTERM):
            result = train(config)
        assert result.code == 75
        assert "not finite and not saved, the checkpoint is that of step 8" in result.err
        assert checkpoints(RUN) == [4, 8]
    done: list[int] = []

    def once(trainer: Trainer) -> None:
        if not done:
            poison_moment(trainer)
        done.append(1)

    with bad_samples(samples_of(2), once):
        with at("step.updated", 2, signal.SIGTERM):
            result = train(config, "name=early")
        assert result.code == 75
        assert "not saved, there is no checkpoint yet, and the same command starts anew" in result.err
        assert train(config, "name=early").code == 0
    assert train(config, "name=undisturbed").code == 0
    assert bits(Path("runs/early")) == bits(Path("runs/undisturbed"))


def test_the_search_for_a_loss_scale_is_no_skip():
    policy = DivergenceConfig(max_skips=1, window_steps=1)
    state, kinds = GuardState.initial("float16"), []
    for step in range(1, 18):
        verdict, state = judge(state, step, 3.0, math.inf, policy, "float16")
        kinds.append(verdict.kind)
        assert must_roll_back(state, policy) is (step == 17)
    assert kinds == ["loss scale"] * 16 + ["non-finite"]


# Without each guard in turn, the row that rests on it fails

Row = Callable[[Path, dict[str, Any]], Any]


def whole_and_resumed(config: Path, rolled_back: dict[str, Any]) -> None:
    whole = row_11(config, "clip", resumed=False)
    shutil.rmtree("runs")
    assert row_11(config, "clip", resumed=True) == whole


def every_step_updates(patch: Patch) -> None:
    patch.setattr("albor.train.step.judge", lambda state, *_, **__: (Verdict("good", True), state))


def zero_is_a_good_step(patch: Patch) -> None:
    patch.setattr("albor.train.step.judge", lambda *given, has_targets: judge(*given, has_targets=False))


def a_nan_enters_the_windows(patch: Patch) -> None:
    def poisoned(state: GuardState, step: int, loss: float, norm: float, *rest: Any, **keywords: Any) -> Any:
        verdict, after = judge(state, step, loss, norm, *rest, **keywords)
        return verdict, replace(after, losses=(*state.losses, loss), norms=(*state.norms, norm))

    patch.setattr("albor.train.step.judge", poisoned)


def forgets(**fields: Any) -> Callable[[Patch], None]:
    """What a checkpoint says of these fields is not restored."""

    def apply(patch: Patch) -> None:
        read = session.read_saved

        def forgetful(*arguments: Any) -> Any:
            found = read(*arguments)
            guard = replace(found.state.guard, **fields)
            return found._replace(state=replace(found.state, guard=guard))

        patch.setattr(session, "read_saved", forgetful)

    return apply


def the_data_goes_back_too(patch: Patch) -> None:
    back = session.Session.roll_back

    def roll_back(self: session.Session, warn: Any) -> Any:
        found = back(self, warn)
        if found:
            self.loader.restore(found[1])
        return found

    patch.setattr(session.Session, "roll_back", roll_back)


def every_checkpoint_is_gone_back_to(patch: Patch) -> None:
    save = Loop._save
    patch.setattr(Loop, "_save", lambda self, *, planned: save(self, planned=True))


def the_way_back_is_not_kept(patch: Patch) -> None:
    removable = checkpoint.removable
    unaware = lambda where, step, retention: removable(where, step, replace(retention, rollback=None))  # noqa: E731
    patch.setattr(checkpoint, "removable", unaware)


def what_was_left_is_not_removed(patch: Patch) -> None:
    patch.setattr(checkpoint, "remove_after", lambda *_: None)


def rollbacks_are_not_counted(patch: Patch) -> None:
    patch.setattr(
        session, "rolled_back", lambda state, saved: guard.rolled_back(replace(state, rollbacks=-1), saved)
    )


def rows_stay(patch: Patch) -> None:
    patch.setattr("albor.train.metrics.MetricsLog.truncate_after", lambda self, step: None)


def nothing_is_made_up_for(patch: Patch) -> None:
    patch.setattr(Loop, "_catch_up", lambda self: None)


def everything_is_finite(patch: Patch) -> None:
    patch.setattr(session, "is_finite", lambda arena: True)


def weights_do_not_begin_anew(patch: Patch) -> None:
    begin, begun = session.initialise, []

    def once(*arguments: Any) -> None:
        if not begun:
            begin(*arguments)
        begun.append(1)

    patch.setattr(session, "initialise", once)


GUARDS: dict[str, tuple[Row, Callable[[Patch], None]]] = {
    "a step that is not finite changes nothing": (lambda c, _: row_10_goes_back(c), every_step_updates),
    "zero is no good step": (lambda c, _: row_10_goes_back(c, nothing_computed), zero_is_a_good_step),
    "no NaN in the windows": (lambda c, _: row_10_goes_back(c), a_nan_enters_the_windows),
    "skipped steps are in the checkpoint": (row_10_survives_stops, forgets(skips=())),
    "rollbacks are in the checkpoint": (row_10_survives_kills, forgets(rollbacks=0)),
    "rollbacks are counted": (lambda c, _: row_10_goes_back(c), rollbacks_are_not_counted),
    "the data does not go back": (lambda c, _: row_10_goes_back(c), the_data_goes_back_too),
    "only the cadence's checkpoints count": (row_10_survives_stops, every_checkpoint_is_gone_back_to),
    "the way back is in the checkpoint": (row_10_survives_stops, forgets(anchor=None)),
    "the way back is kept": (row_10_survives_stops, the_way_back_is_not_kept),
    "what was left behind is removed": (row_10_survives_stops, what_was_left_is_not_removed),
    "rows that were left behind are taken back": (lambda c, _: row_10_goes_back(c), rows_stay),
    "the best loss is found again": (row_10_survives_stops, nothing_is_made_up_for),
    "the beginning is the seed's": (
        lambda c, _: row_10_goes_back_to_the_beginning(c),
        weights_do_not_begin_anew,
    ),
    "moments are scanned before they are saved": (
        lambda c, _: row_10_bad_weights_are_never_saved(c, poison_moment),
        everything_is_finite,
    ),
    "windows are in the checkpoint": (whole_and_resumed, forgets(losses=(), norms=())),
    "counters are in the checkpoint": (whole_and_resumed, forgets(spikes=0)),
    "a checkpoint is scanned before it is used": (row_12_refuses_a_bad_checkpoint, everything_is_finite),
}


@pytest.mark.parametrize("name", GUARDS)
def test_without_its_guard_the_row_fails(
    name: str, config: Path, rolled_back: dict[str, Any], monkeypatch: pytest.MonkeyPatch
):
    row, apply = GUARDS[name]
    with monkeypatch.context() as patch:
        apply(patch)
        with pytest.raises(Exception) as failed:  # noqa: PT011 (whatever the missing guard leads to)
            row(config, rolled_back)
    assert not isinstance(failed.value, AttributeError | NameError | TypeError | ImportError), failed.value
