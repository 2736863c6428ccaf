"""albor's own trainer, as `albor train` builds it."""

from __future__ import annotations

from albor.architecture import Architecture
from albor.bench.recorder import Recorder
from albor.bench.workload import Spec, Tokens, packed_weights
from albor.memory.arena import Arena
from albor.memory.devices import this_machine
from albor.memory.estimate import Estimate
from albor.memory.suggest import apply
from albor.model.parameters import clear, master_weights, view
from albor.train.guard import GuardState
from albor.train.step import Trainer, TrainState


def train(spec: Spec, recorder: Recorder, accumulator: str | None = None) -> None:
    """`accumulator` sums gradients there; None: as configured."""
    config = apply(spec.config, {} if accumulator is None else {"train.accumulator": accumulator})
    plan = Estimate.of(config, this_machine("cuda" if spec.device == "cuda" else "cpu")).plan
    assert plan.compute_dtype == spec.dtype
    recorder.note(
        accumulator=plan.accumulator,
        attention=plan.attention.backend,
        planned_device_bytes=plan.size("device"),
        recompute=config.train.recompute,
    )
    trainer = Trainer(config, Arena(plan, spec.device))
    clear(trainer.arena)
    master = master_weights(trainer.arena)
    for parameter, values in packed_weights(spec.weights, Architecture.from_config(config.model)):
        view(master, parameter).copy_(values)
    if master is not trainer.arena["weights"]:
        trainer.arena["weights"].copy_(master)

    tokens, state = Tokens(spec), TrainState(guard=GuardState.initial(spec.dtype))
    recorder.begin()
    for step in range(spec.steps):
        batches = (tokens.batch(step, micro_step) for micro_step in range(tokens.micro_steps))
        result, state = trainer.step(batches, state)
        if not result.updated:
            raise RuntimeError(f"step {step + 1} was skipped: loss {result.loss}, norm {result.grad_norm}")
        recorder.add_loss(result.loss)
        recorder.end_step(result.grad_norm)
