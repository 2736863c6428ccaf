"""What a run does about a step that is not good: says so, keeps what shows why, and goes back if it must."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NoReturn

from albor import faults
from albor.data.prepare import check_horizon
from albor.errors import CheckpointError, DataError, Diverged
from albor.spikes import SPIKES
from albor.train.guard import GuardState, Verdict, must_roll_back
from albor.train.metrics import MetricsLog
from albor.train.session import Session
from albor.train.spikes import describe_spike, write_spike
from albor.train.step import StepResult

Position = Mapping[str, Any]  # a loader's state

NOT_FINITE = "weights or moments of the optimizer are not finite"


class Divergence:
    """Follows a session; `say` shows a message."""

    def __init__(self, session: Session, log: MetricsLog, say: Callable[[str], None]):
        self.session, self.log, self.say = session, log, say
        self._last: tuple[int, StepResult, GuardState, Position] | None = None
        self._cannot_write = False

    def follow(self, result: StepResult, before: GuardState, position: Position) -> None:
        """Takes note of a step, which began with the guard's state `before` and the loader at `position`."""
        step = self.session.state.step
        self._last = (step, result, before, position)
        kind = result.verdict.kind
        if kind == "good":
            return
        seen = f"loss {result.loss:g}, gradient norm {result.grad_norm:g}"
        read = self._between(position, self.session.loader.state())
        details = {"loss": str(result.loss), "grad_norm": str(result.grad_norm), **read}
        if kind == "loss scale":
            scale = self.session.state.guard.loss_scale
            self.log.event("loss_scale", step, scale=scale, **details)
            self.say(f"step {step}: too large for fp16 ({seen}); the loss scale is {scale:g} now")
            return
        action = _action(result.verdict)
        self.log.event("spike" if kind == "spike" else "skipped_step", step, action=action, **details)
        outcome = "gradient scaled down" if result.updated else "skipped, weights unchanged"
        self.say(f"step {step} {'is a spike: ' if kind == 'spike' else ''}{outcome}: {seen}")
        self._keep(action)

    def reason_to_roll_back(self) -> str | None:
        """That too many of the last steps were skipped, if they were."""
        guard, policy = self.session.state.guard, self.session.config.divergence
        if not must_roll_back(guard, policy):
            return None
        return (
            f"{len(guard.skips)} of the last {policy.window_steps} steps had a loss or gradient norm that is "
            f"not finite, or zero (steps {', '.join(map(str, guard.skips))})"
        )

    def roll_back(self, reason: str) -> None:
        """Goes back to the newest good checkpoint, and leaves the data behind that were read since.

        Raises Diverged where that is not possible, or not allowed any more.
        """
        session, policy = self.session, self.session.config.divergence
        step, guard, position = session.state.step, session.state.guard, session.loader.state()
        faults.reach("rollback.begin", step)
        if guard.rollbacks >= policy.max_rollbacks:
            times = "time" if policy.max_rollbacks == 1 else "times"
            self._give_up(
                f"{reason}; the run has gone back {guard.rollbacks} {times} (divergence.max_rollbacks)"
            )
        try:
            found = session.roll_back(self.say)
        except CheckpointError as error:
            self._give_up(f"{reason}; no checkpoint is good to go back to: {error}", step)
        checkpoint, then = found
        if problems := check_horizon(session.config, session.data, session.left_out):
            repeated = "; ".join(problem.message for problem in problems)
            self._give_up(f"{reason}; with another rollback {repeated}", step, problems[0].remedy)
        faults.reach("rollback.loaded", step)
        self.log.truncate_after(session.state.step)
        jumped = self._between(then, position)
        source = None if checkpoint is None else str(checkpoint)
        details = {"from_step": step, "checkpoint": source, "reason": reason, **jumped}
        self.log.event("rollback", session.state.step, rollbacks=session.state.guard.rollbacks, **details)
        first, end = jumped["samples"]
        number = f"rollback {session.state.guard.rollbacks} of {policy.max_rollbacks}"
        self.say(
            f"step {step}: {reason}; back to step {session.state.step} ({source or 'the beginning'}), "
            f"{number}; samples {first} to {end - 1} are left out"
        )
        self._keep(f"rolled back to step {session.state.step}")

    def _give_up(self, reason: str, step: int | None = None, remedy: str = "") -> NoReturn:
        session = self.session
        step = session.state.step if step is None else step
        self.log.event("diverged", step, reason=reason)
        self._keep("gave up")
        remedy = remedy or (
            "start again under another name with a lower optimizer.lr or a longer schedule.warmup_steps, or "
            "go on with a larger divergence.max_rollbacks"
        )
        if (session.directory / SPIKES).is_dir():
            remedy += f"; albor inspect-spike {session.directory} shows the batches"
        raise Diverged(f"step {step}: {reason}; {remedy}")

    def _keep(self, action: str) -> None:
        """Writes the last step's file. A disk that has no room for it, or does not give the tokens again,
        does not stop the run.
        """
        session, policy = self.session, self.session.config.divergence
        if self._last is None or policy.keep_spikes == 0:
            return
        step, result, before, position = self._last
        try:
            spike = describe_spike(
                session.config, session.data, session.loader, position, before, step, result, action
            )
            write_spike(session.directory, spike, policy.keep_spikes)
        except (OSError, DataError) as error:
            if not self._cannot_write:
                self._cannot_write = True
                place, reason = session.directory / SPIKES, getattr(error, "strerror", None) or error
                self.say(f"cannot write {place}: {reason}; training goes on, and such batches are not kept")

    def _between(self, first: Position, end: Position) -> dict[str, Any]:
        """What was read from one position of the loader to another: samples, by source too, and tokens."""
        length = self.session.config.data.sequence_length
        return {
            "samples": [first["samples"], end["samples"]],
            "per_source": [list(pair) for pair in zip(first["per_source"], end["per_source"], strict=True)],
            "tokens": [first["samples"] * length, end["samples"] * length],
        }


def _action(verdict: Verdict) -> str:
    return "clipped" if verdict.updates else "skipped"
