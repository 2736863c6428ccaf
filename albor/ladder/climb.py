"""A ladder's way up: what is asked of each rung, in which order, and what is not asked twice.

Whatever touches a model is an albor command in a process of its own, so that memory and crashes stay apart.
A rung that has been trained is known by its run directory, and not trained again; a gate that has passed is
not judged again while the rung's resolved configuration and the gate's thresholds are the same.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
import statistics
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from albor.architecture import Architecture
from albor.child_process import Child, wait_for_one
from albor.config import RunConfig
from albor.configfile import load_config
from albor.data.prepare import check_horizon, prepare
from albor.data.sources import list_files
from albor.errors import AlborError, ConfigError, DoesNotFit, Interrupted, Problem
from albor.ladder import gates
from albor.ladder.file import GATES, LadderFile, Planned
from albor.ladder.gates import Result, RunLog
from albor.ladder.ngrams import Baselines, measure_baselines
from albor.ladder.predict import (
    NotPredicted,
    Observation,
    Prediction,
    compare,
    predict,
    predict_speed,
)
from albor.ladder.state import State
from albor.memory.estimate import Estimate, plan_for_training
from albor.progress import show_progress
from albor.runs.follow import Follower
from albor.runs.record import CONFIG, FINAL
from albor.train.signals import Stopped, StopRequest

# Judged by what the training left, and so anew when it has gone on.
_AFTER = ("unigram", "bigram", "gradients", "skipped_steps", "validation", "schedule_end", "export", "speed")
_OF_A_RUN = ("result", "comparison", "trained")
_PROBE_STEPS, _PROBE_FIRST = 12, 4  # of which the ones before are not timed
_PASSED_ON = (2, 3, 4, 75)  # exit codes that keep their meaning
_TEMPORARY = ".ladder-"

Row = dict[str, Any]


class GateFailed(AlborError):
    """A rung has not shown what it was to show; the ladder ends there."""


class RungEnded(AlborError):
    """A command of a rung ended otherwise than by being done."""

    def __init__(self, message: str, code: int):
        super().__init__(message)
        self.exit_code = code if code in _PASSED_ON else 1


class Climb:
    """Goes up the ladder of `file`, and tells `console`."""

    def __init__(self, file: LadderFile, state: State, console: Console, stop: StopRequest):
        self.file, self.state, self.stop, self.console = file, state, stop, console
        self.rungs = [self._with_budget(planned) for planned in file.rungs]

    def run(self, start: str | None) -> None:
        """Every rung from `start` on, or from the first.

        Raises GateFailed, RungEnded with the exit code of what ended, DoesNotFit where a plan is too large,
        ConfigError for what the file asks and cannot have, and Interrupted after a signal.
        """
        first = self._first(start)
        try:
            self._check_changed()
            self._check_fits(first)
            self._prepare_local_data(first)
            for index in range(first, len(self.rungs)):
                self._climb(index)
        except Stopped:
            raise Interrupted(
                f"stopped by {self.stop.reason}; the same command goes on where the ladder was"
            ) from None

    # What is known before anything is trained

    def _first(self, start: str | None) -> int:
        first = self.file.index_of(start)
        for planned in self.rungs[:first]:
            skipped = not self.has_passed(planned)
            self.state.set(planned.name, "skipped", skipped)
            if skipped:
                self._say(f"{planned.name}: SKIPPED by --from, and has not passed its gates")
        return first

    def has_passed(self, planned: Planned) -> bool:
        """Whether it has been trained, and every gate has been judged and none failed."""
        results = [self.state.result(planned, gate) for gate in GATES]
        return finished(planned) and all(one is not None and one.status != "failed" for one in results)

    def _check_changed(self) -> None:
        problems = []
        for planned in self.rungs:
            trained = RunLog.read(planned.config, planned.directory).final is not None
            if trained and (changes := changed_keys(planned)):
                message = f"has been trained, and was another run then: {', '.join(changes)}"
                remedy = f"undo that, rename the rung, or remove {planned.directory} to train it again"
                problems.append(self.file.refuse_rung(planned, message, remedy))
            elif trained:
                self._forget_another_run(planned)
        if problems:
            raise ConfigError(problems)

    def _forget_another_run(self, planned: Planned) -> None:
        """What was found of a run that somebody has trained anew since does not hold for the new one."""
        known = self.state.get(planned.name, "trained")
        if known is not None and known != _digest_of_end(planned):
            self._say(f"{planned.name}: has been trained anew since; what it left is judged again")
            self.state.forget(planned, _AFTER, _OF_A_RUN)

    def _check_fits(self, first: int) -> None:
        """Of every rung that is still to be trained: the last one may be days away."""
        failed = []
        for planned in self.rungs[first:]:
            gate = planned.gates.fits
            if gate is None:
                self._judged(planned, gates.left_out("fits"))
            elif not finished(planned) or self.state.result(planned, "fits") is None:
                target = plan_for_training(planned.config)
                result = gates.fits(gate, target)
                self._judged(planned, result)
                if result.status == "failed":
                    failed.append(f"{planned.name}: {result.measured}; wanted: {result.threshold}")
                    failed += target.advice if target.fits is False else []
        if failed:
            raise DoesNotFit("\n".join(["a rung does not fit this machine; nothing was started:", *failed]))

    def _prepare_local_data(self, first: int) -> None:
        """Of rungs that read files: what they ask of too little text is found now, for all of them."""
        problems = []
        for planned in self.rungs[first:]:
            local = all(list_files(source) is not None for source in planned.config.data.sources)
            if local and not finished(planned):
                problems += self._prepare(planned)
        if problems:
            raise ConfigError(list(dict.fromkeys(problems)))

    def _prepare(self, planned: Planned) -> list[Problem]:
        """Prepares a rung's data and measures what counting reaches on it. Returns what is wrong."""
        with self._stoppable(), show_progress(self.console) as progress:

            def report(stage: str, done: int, total: int | None) -> None:
                self.stop.check()
                progress(stage, done, total)

            data = prepare(planned.config, report)
        if planned.rung.hours is not None and self._tokens(planned) is None:
            return []  # how much of it the rung reads is not known yet
        horizon = check_horizon(planned.config, data)
        wanted = planned.gates.unigram is not None or planned.gates.bigram is not None
        if not horizon and wanted and self._baselines(planned) is None:
            found = measure_baselines(planned.config, data)
            self.state.set(planned.name, "baselines", found.as_json(), planned)
        return [self.file.refuse(planned, one.key, one.message, one.remedy) for one in horizon]

    # A rung

    def _climb(self, index: int) -> None:
        planned = self.rungs[index]
        if self.has_passed(planned):
            self._say(f"{planned.name}: has passed")
            return
        self.state.set(planned.name, "skipped", False)
        if not finished(planned):
            if planned.rung.hours is not None and self._tokens(planned) is None:
                fits = self.state.result(planned, "fits")
                self._prepare(planned)  # shows how far it is; the child that is timed shows nothing
                planned = self.rungs[index] = self._probe(planned)
                if fits is not None:  # memory does not depend on a run's length
                    self.state.judged(planned, fits)
            if problems := self._prepare(planned):
                raise ConfigError(problems)
        self._say(f"{planned.name}: {_describe(planned)}")
        self._before(planned)
        self._predict(index)
        if not finished(planned):
            self._train(planned)
        self._after(planned)
        self._note_result(index)
        self._end_if_failed(planned, GATES)

    def _before(self, planned: Planned) -> None:
        """The gates that need no trained model."""
        config = planned.config
        if (gate := planned.gates.canary) is None:
            self._judged(planned, gates.left_out("canary"))
        elif self._is_due(planned, "canary"):
            batches = min(config.train.gradient_accumulation_steps, gate.micro_batches)
            code, found, words = self._command(
                planned, "canary", *planned.arguments, f"train.gradient_accumulation_steps={batches}",
                "--steps", str(min(gate.steps, config.steps)), "--reference", gate.reference,
            )  # fmt: skip
            self._expect(planned, "albor canary", code, words, (0, 1, DoesNotFit.exit_code))
            self._judged(planned, gates.canary(gate, code, found, words))
        if (resume := planned.gates.verify_resume) is None:
            self._judged(planned, gates.left_out("verify_resume"))
        elif config.steps < 3:
            reason = f"the run has {config.steps} steps, and 3 are needed"
            self._judged(planned, gates.not_checked("verify_resume", reason))
        elif self._is_due(planned, "verify_resume"):
            code, found, words = self._command(
                planned, "verify-resume", *planned.arguments,
                "--steps", str(min(resume.steps, config.steps - 1)), "--signal", resume.signal,
            )  # fmt: skip
            self._expect(planned, "albor verify-resume", code, words, (0, 1))
            self._judged(planned, gates.verify_resume(resume, code, found, words))
        self._end_if_failed(planned, ("canary", "verify_resume"))

    def _train(self, planned: Planned) -> None:
        self.state.forget(planned, _AFTER, _OF_A_RUN)
        self._judge_unigram(planned, RunLog.read(planned.config, planned.directory))
        self._end_if_failed(planned, ("unigram",))  # on the disk already: going on would not mend that
        self._say(f"{planned.name}: training")
        follower, seen = Follower(planned.directory), list[Row]()

        def asked_to_stop() -> bool:
            """A signal, or a gate that has failed already: hours are not spent on the rest."""
            update = follower.poll()
            if update.rows_anew:
                seen.clear()
            seen.extend(update.rows)
            if update.rows and self.state.result(planned, "unigram") is None:
                self._judge_unigram(planned, RunLog(planned.config, seen, []))
            return self.stop.reason is not None or self._failed(planned, "unigram")

        with Child(["train", *planned.arguments], self._say) as child:
            wait_for_one([child], asked_to_stop)
            code = child.poll()
            words = child.last_words
        assert code is not None
        self.stop.check()
        self._end_if_failed(planned, ("unigram",))
        self._expect(planned, "albor train", code, words, (0,))
        if not finished(planned):
            raise AlborError(
                f"{planned.name}: albor train ended, and {planned.directory} has no eval/final.json"
            )

    def _judge_unigram(self, planned: Planned, run: RunLog) -> None:
        """Once the run has come to that step; the loss of later steps is no excuse."""
        gate, entropies = planned.gates.unigram, self._baselines(planned)
        if gate is not None and entropies is not None:
            result = gates.unigram(gate, run, entropies.unigram)
            if result.status != "not checked":
                self._judged(planned, result)

    def _after(self, planned: Planned) -> None:
        """The gates that a trained run is held against: all of them, so that one sees everything at once."""
        run = RunLog.read(planned.config, planned.directory)
        for problem in run.problems:
            self._say(f"{planned.name}: {problem}")
        self.state.set(planned.name, "trained", _digest_of_end(planned))
        chosen = planned.gates
        wanted = chosen.unigram is not None or chosen.bigram is not None
        if wanted and self._baselines(planned) is None and (problems := self._prepare(planned)):
            raise ConfigError(problems)  # they were lost with ladder.json
        entropies = self._baselines(planned) or Baselines(math.nan, math.nan, 0, 0)

        def judge(name: str, measure: Callable[[Any], Result]) -> None:
            settings = getattr(chosen, name)
            if settings is None:
                self._judged(planned, gates.left_out(name))
            elif self._is_due(planned, name):
                self._judged(planned, measure(settings))

        judge("unigram", lambda gate: gates.unigram(gate, run, entropies.unigram))
        judge("bigram", lambda gate: gates.bigram(gate, run, entropies.bigram))
        judge("gradients", lambda gate: gates.gradients(gate, run))
        judge("skipped_steps", lambda gate: gates.skipped_steps(gate, run))
        judge("validation", lambda gate: gates.validation(gate, run))
        judge("schedule_end", lambda gate: gates.schedule_end(gate, run))
        judge("speed", lambda gate: gates.speed(gate, run, modelled_speed(plan_for_training(planned.config))))
        judge("export", lambda gate: self._export(planned))

    def _export(self, planned: Planned) -> Result:
        """Nothing of the export stays: `albor export` makes one that does."""
        with self._temporary() as directory:
            target = directory / "hf"
            code, found, words = self._command(
                planned, "export", str(planned.directory), "--to", "hf", "--out", str(target)
            )
            self._expect(planned, "albor export", code, words, (0, 1))
            result = gates.export(code, found, words)
            if result.status == "not checked":
                from albor.ladder.readback import read_back  # torch, and a model in memory

                gate = read_back(planned.directory, target) | {"unchecked": None}
                own = gates.export(0, {"exports": [{"gate": gate}]})
                why = result.measured.removeprefix("not checked: ")
                result = replace(own, measured=f"{own.measured}; beside another program {why}")
        return result

    def _end_if_failed(self, planned: Planned, names: Sequence[str]) -> None:
        results = [self.state.result(planned, gate) for gate in names]
        failed = [one for one in results if one is not None and one.status == "failed"]
        if failed:
            lines = [
                f"{planned.name}: {one.gate}: {one.measured}; wanted: {one.threshold}. Look at "
                f"{gates.LOOK[one.gate]} ({planned.directory})"
                for one in failed
            ]
            end = f"gates.{failed[0].gate} in {self.file.path} has its thresholds"
            raise GateFailed("\n".join([*lines, f"The ladder ends here; {end}, and false leaves it out."]))

    # Budgets

    def _with_budget(self, planned: Planned) -> Planned:
        """A rung of so many hours with the tokens that were found for it, if they were. Where ladder.json is
        lost, the run that has begun still says how long it is.
        """
        if planned.rung.hours is not None and self.state.get(planned.name, "budget") is None:
            with suppress(ConfigError):
                begun = load_config(planned.directory / CONFIG)
                found = {"hours": planned.rung.hours, "tokens": begun.train.max_tokens}
                self.state.set(planned.name, "budget", found | {"tokens_per_second": None, "steps": None})
        tokens = self._tokens(planned)
        return planned if tokens is None else self.file.with_tokens(planned, tokens)

    def _tokens(self, planned: Planned) -> int | None:
        found = self.state.get(planned.name, "budget")
        if planned.rung.hours is None or found is None or found["hours"] != planned.rung.hours:
            return None
        tokens: int | None = found["tokens"]
        return tokens

    def _probe(self, planned: Planned) -> Planned:
        """Times a few steps, and makes tokens of the rung's hours."""
        self._say(f"{planned.name}: timing {_PROBE_STEPS} steps")
        with self._temporary() as directory:
            steps = _PROBE_STEPS
            arguments = [
                *planned.arguments,
                f"runs_dir={json.dumps(str(directory))}",
                "train.max_tokens=null", f"train.max_steps={steps}", "train.max_hours=null",
                "schedule.warmup_steps=0", f"evaluate.every_steps={steps}", "evaluate.batches=1",
                "evaluate.final_batches=1", "evaluate.prompts=[]", f"checkpoint.every_steps={steps}",
                "checkpoint.keep_last=1", "checkpoint.keep_every=null", "log.every_steps=1", "alerts={}",
            ]  # fmt: skip
            with Child(["train", *arguments]) as child:
                wait_for_one([child], lambda: self.stop.reason is not None)
                code, words = child.poll(), child.last_words
            self.stop.check()
            self._expect(planned, "albor train, timed,", -1 if code is None else code, words, (0,))
            rates = RunLog.read(planned.config, directory / planned.name).series("train/tokens_per_second")
        timed = [rate for step, rate in rates if step >= _PROBE_FIRST]
        if not timed or planned.rung.hours is None:
            raise AlborError(f"{planned.name}: no step was timed")
        rate, per_step = statistics.median(timed), planned.config.tokens_per_step
        tokens = max(1, int(planned.rung.hours * 3600 * rate / per_step)) * per_step
        found = {"hours": planned.rung.hours, "tokens": tokens, "tokens_per_second": rate, "steps": steps}
        self.state.set(planned.name, "budget", found)
        self._say(
            f"{planned.name}: {rate:,.0f} tokens/s, so {planned.rung.hours:g} hours are {tokens:,} tokens"
        )
        return self.file.with_tokens(planned, tokens)

    # Predictions

    def _predict(self, index: int) -> None:
        """Once, before the rung is trained: a prediction that is made afterwards is none."""
        planned = self.rungs[index]
        if finished(planned) or self.state.get(planned.name, "prediction", planned) is not None:
            return
        model = Architecture.from_config(planned.config.model)
        parameters, tokens = model.parameter_count, planned.config.steps * planned.config.tokens_per_step
        seen = self._observations(index)
        found: Row
        try:
            found = asdict(predict([one for same, one in seen if same], parameters, tokens))
            shown = f"validation loss {found['loss']:.3f}, {found['low']:.3f} to {found['high']:.3f}"
        except NotPredicted as reason:
            found, shown = {"not_predicted": str(reason)}, str(reason)
        self.state.set(planned.name, "prediction", found, planned)
        target = plan_for_training(planned.config)
        gpu = target.hardware.gpu
        try:
            speed = predict_speed(
                [one for _, one in seen],
                model.flops_per_token(planned.config.data.sequence_length),
                tokens,
                modelled_tokens_per_second=modelled_speed(target),
                board_watts=None if gpu is None else gpu.board_watts,
            ).as_json()
            shown += f"; {speed['hours']:.2f} hours"
        except NotPredicted as reason:
            speed = {"not_predicted": str(reason)}
        self.state.set(planned.name, "predicted_speed", speed, planned)
        self._say(f"{planned.name}: predicted: {shown}")

    def _observations(self, index: int) -> list[tuple[bool, Observation]]:
        """What the rungs below have shown, and whether of the same text in the same tokens."""
        found = []
        for planned in self.rungs[:index]:
            result = self.state.get(planned.name, "result", planned)
            if result is None or result["loss"] is None:
                continue
            config = planned.config
            ended = self.state.result(planned, "schedule_end")
            observation = Observation(
                parameters=result["parameters"],
                tokens=result["tokens"],
                loss=result["loss"],
                tokens_per_second=result["tokens_per_second"],
                annealed=config.schedule.kind != "constant" and (ended is None or ended.status != "failed"),
                flops_per_token=Architecture.from_config(config.model).flops_per_token(
                    config.data.sequence_length
                ),
                modelled_tokens_per_second=result["modelled_tokens_per_second"],
            )
            found.append((_text(config) == _text(self.rungs[index].config), observation))
        return found

    def _note_result(self, index: int) -> None:
        planned = self.rungs[index]
        if self.state.get(planned.name, "result", planned) is not None:
            return
        run = RunLog.read(planned.config, planned.directory)
        final = run.final or {}
        rates = [rate for step, rate in run.series("train/tokens_per_second") if step > 1]
        rate = statistics.median(rates) if rates else None
        loss = final.get("val/loss")
        result = {
            "parameters": Architecture.from_config(planned.config.model).parameter_count,
            "tokens": final.get("tokens"),
            "steps": final.get("step"),
            "loss": loss,
            "bits_per_byte": final.get("val/bits_per_byte"),
            "tokens_per_second": rate,
            "modelled_tokens_per_second": modelled_speed(plan_for_training(planned.config)),
            "hours": final["tokens"] / rate / 3600 if rate and final.get("tokens") else None,
        }
        self.state.set(planned.name, "result", result, planned)
        prediction = self.state.get(planned.name, "prediction", planned)
        if prediction is not None and "loss" in prediction and loss is not None:
            exponents = tuple(prediction["exponents"])
            comparison = compare(Prediction(**{**prediction, "exponents": exponents}), loss)
            self.state.set(planned.name, "comparison", comparison.as_json(), planned)
            self._say(f"{planned.name}: {comparison}")

    # Commands

    def _command(self, planned: Planned, command: str, *arguments: str) -> tuple[int, Row | None, str]:
        """`albor COMMAND ARGUMENTS --json`: its exit code, its object if there is one, its last words."""
        self._say(f"{planned.name}: {command}")
        with tempfile.TemporaryFile() as output:
            with Child([command, *arguments, "--json"], self._say, output=output) as child:
                wait_for_one([child], lambda: self.stop.reason is not None)
                code = child.poll()
            self.stop.check()
            output.seek(0)
            try:
                found = json.loads(output.read())
            except ValueError:
                found = None
        assert code is not None
        words = child.last_words.rpartition("\n")[2]
        return code, found if isinstance(found, dict) else None, words

    def _expect(self, planned: Planned, what: str, code: int, words: str, codes: tuple[int, ...]) -> None:
        if code not in codes:
            how = f"was ended by signal {-code}" if code < 0 else f"ended with {code}"
            last = words.splitlines()[-1] if words else "it said nothing"
            raise RungEnded(f"{planned.name}: {what} {how}: {last.removeprefix('albor: ')}", code)

    def _judged(self, planned: Planned, result: Result) -> None:
        if result != self.state.result(planned, result.gate):
            self.state.judged(planned, result)
            if result.status != "left out":
                self._say(f"{planned.name}: {result.gate}: {result.status.upper()}: {result.measured}")

    def _is_due(self, planned: Planned, gate: str) -> bool:
        found = self.state.result(planned, gate)
        return found is None or found.status in ("failed", "not checked")

    def _failed(self, planned: Planned, gate: str) -> bool:
        found = self.state.result(planned, gate)
        return found is not None and found.status == "failed"

    def _baselines(self, planned: Planned) -> Baselines | None:
        found = self.state.get(planned.name, "baselines", planned)
        return None if found is None else Baselines(**found)

    def _say(self, line: str) -> None:
        self.console.out(line, highlight=False)

    @contextmanager
    def _stoppable(self) -> Iterator[None]:
        """Libraries that call back make errors of their own of Stopped: SentencePiece a RuntimeError."""
        try:
            yield
        except Exception:
            self.stop.check()
            raise

    @contextmanager
    def _temporary(self) -> Iterator[Path]:
        """A directory on the runs' disk; what a killed ladder left is removed first."""
        parent = self.file.ladder.directory
        for left in parent.glob(f"{_TEMPORARY}*"):  # the ladder's lock is ours: nobody uses them
            shutil.rmtree(left, ignore_errors=True)
        directory = Path(tempfile.mkdtemp(prefix=_TEMPORARY, dir=parent))
        try:
            yield directory
        finally:
            with suppress(OSError):
                shutil.rmtree(directory)


def finished(planned: Planned) -> bool:
    """Whether the rung's run directory holds this very run, trained to its end."""
    run = RunLog.read(planned.config, planned.directory)
    return (
        run.final is not None and run.final.get("step") == planned.config.steps and not changed_keys(planned)
    )


def _digest_of_end(planned: Planned) -> str:
    """Names what the rung's run came to; equal runs come to the same."""
    return hashlib.sha256((planned.directory / FINAL).read_bytes()).hexdigest()[:16]


def changed_keys(planned: Planned) -> list[str]:
    """What is other than in the run that lies in the rung's directory: `optimizer.lr 0.001 -> 0.002`. Raises
    ConfigError where nobody can say what that run was.
    """
    path = planned.directory / CONFIG
    try:
        before = load_config(path)
    except ConfigError as error:
        message = (
            f"{planned.name} has been trained, and what it was cannot be read: {error.problems[0].message}"
        )
        remedy = f"restore that file, or remove {planned.directory} to train the rung again"
        raise ConfigError([Problem("", message, remedy, error.problems[0].where or str(path))]) from error
    old, new = (_flat(config.model_dump(mode="json")) for config in (before, planned.config))
    return [
        f"{key} {old.get(key)} -> {new.get(key)}" for key in {**old, **new} if old.get(key) != new.get(key)
    ]


def _flat(value: Any, prefix: str = "") -> Row:
    if isinstance(value, dict) and value:
        return {
            key: leaf for name, one in value.items() for key, leaf in _flat(one, f"{prefix}{name}.").items()
        }
    return {prefix.removesuffix("."): value}


def modelled_speed(target: Estimate) -> float | None:
    """Tokens per second as they are modelled for this card; None for a CPU and for unknown cards."""
    rates = [one.tokens_per_second for one in target.cost.durations if one.basis == "modelled"]
    return rates[0] if rates else None


def _text(config: RunConfig) -> Row:
    """What a loss per token depends on besides the model: the text, and how it is cut into tokens.

    Of a data set on the hub, how much of it is read does not count: held-out documents are chosen by their
    hash, and more of them are of the same kind. Of files, other ones are other text.
    """
    data = config.data
    return {
        "sources": [
            source.model_dump(exclude={"max_bytes"} if source.kind == "hf" else set())
            for source in data.sources
        ],
        "held out": data.validation_fraction,
        "tokenizer": config.tokenizer.model_dump(),
        "vocabulary": config.model.vocab_size,
        "length": data.sequence_length,
    }


def _describe(planned: Planned) -> str:
    model = Architecture.from_config(planned.config.model)
    tokens = planned.config.steps * planned.config.tokens_per_step
    return f"{model.parameter_count:,} parameters, {tokens:,} tokens, in {planned.directory}"
