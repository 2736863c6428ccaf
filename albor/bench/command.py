"""From the words of `albor bench` to what is run, and to what is printed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from albor.bench.cases import STANDARD, Case, case_of, find_case
from albor.bench.peers import DEFAULT, PEERS
from albor.bench.protocol import Options
from albor.configfile import load_config
from albor.errors import ConfigError, Problem
from albor.floor import CARDS, Card, floor, step_work
from albor.memory.devices import compute_dtype, this_machine
from albor.memory.plan import head_chunk_tokens


def find_cases(config: Path | None, overrides: Sequence[str], models: str | None, steps: int) -> list[Case]:
    """A configuration file's case, or the named ones, or all standard ones. Raises ConfigError."""
    if config is not None and models is not None:
        raise _wrong("--models", "a configuration and models are given", "give one of them")
    if config is not None:
        return [case_of(load_config(config, overrides), steps)]
    return [find_case(name, steps) for name in (models.split(",") if models is not None else STANDARD)]


def find_peers(
    names: str | None, default: tuple[str, ...] = DEFAULT, key: str = "--peers"
) -> tuple[str, ...]:
    """The named systems, or the default ones. Raises ConfigError for one that does not exist."""
    peers = tuple(dict.fromkeys(names.split(","))) if names is not None else default
    for peer in peers:
        if peer not in PEERS:
            raise _wrong(key, f"{peer!r} is not a system of the benchmark", f"use {', '.join(PEERS)}")
    return peers


@dataclass(frozen=True)
class Request:
    """The options of the command line, as they were given."""

    steps: int
    warmup: int
    rounds: int
    reference_steps: int
    profiled: tuple[str, ...]
    time_limit: float | None
    run_timeout: float
    calibrate_only: bool
    command: str


def run_bench(
    cases: list[Case], peers: tuple[str, ...], out: Path, request: Request, say: Callable[[str], None]
) -> dict[str, Any]:
    """Runs the protocol on the device that the cases ask for, and returns the report."""
    from albor.bench.run import run_benchmark

    config = cases[0].config
    device: Literal["cuda", "cpu"] = this_machine(config.device).device
    standard = [case.name for case in cases if case.name in STANDARD or "-mb" in case.name]
    if device == "cpu" and standard:
        raise _wrong(
            "--models", f"there is no GPU here, and {standard[0]} would take hours on a CPU",
            "give a small configuration: albor bench configs/quickstart.yaml",
        )  # fmt: skip
    options = Options(
        cases=tuple(cases),
        peers=peers,
        out=out,
        device=device,
        dtype=compute_dtype(config.train.precision, device),
        warmup=request.warmup,
        steps=request.steps,
        rounds=request.rounds,
        reference_steps=min(request.reference_steps, request.warmup + request.steps),
        profiled=request.profiled,
        time_limit=request.time_limit,
        run_timeout=request.run_timeout,
        systems=not request.calibrate_only,
        command=request.command,
    )
    return run_benchmark(options, say)


def find_card(name: str) -> Card:
    """The modelled card of that name. Raises ConfigError where there is none."""
    for card in CARDS:
        if card.name.lower() == name.lower():
            return card
    raise _wrong("--modelled", f"{name!r} is not modelled", f"use {', '.join(card.name for card in CARDS)}")


def model_cases(cases: list[Case], card: Card) -> dict[str, Any]:
    """The floor of each case on a card that nobody has measured: modelled, as every figure of it is."""
    rows = {}
    for case in cases:
        config = case.config
        least = floor(
            step_work(
                case.architecture,
                config.data.sequence_length,
                config.train.micro_batch_size,
                config.train.gradient_accumulation_steps,
                head_chunk_tokens(config, "cuda"),
            ),
            card,
        )
        speed = config.tokens_per_step / least.seconds
        flops = case.architecture.flops_per_token(config.data.sequence_length)
        rows[case.name] = {
            "tokens_per_second": speed,
            "mfu": speed * flops / card.peak_flops,
            "floor": least.as_json(),
        }
    return {"basis": "modelled", "card": card.name, "source": card.source, "cases": rows}


def modelled_lines(modelled: dict[str, Any]) -> list[str]:
    """As a Markdown table."""
    card = modelled["card"]
    return [
        f"| modelled floor, {card} | tokens/s | MFU |",
        "|---|---|---|",
        *(
            f"| {name} | {row['tokens_per_second']:,.0f} | {row['mfu']:.1%} |"
            for name, row in modelled["cases"].items()
        ),
    ]


def _wrong(key: str, message: str, remedy: str) -> ConfigError:
    return ConfigError([Problem(key, message, remedy, "command line")])
