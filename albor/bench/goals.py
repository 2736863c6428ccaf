"""What albor is to reach on a GPU, and whether a report says that it does."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from albor.bench.peers import TITLES
from albor.bench.protocol import OWN

Range = tuple[float | None, float | None]  # least and most; None: not measured
Systems = dict[str, Any]  # the rows of a report, by system

What = Literal[
    "mfu", "share_of_floor", "ratio", "host_ratio", "memory_ratio", "bytes", "first_step_cold",
    "first_step_warm", "loss", "late_loss", "norm",
]  # fmt: skip
_AT_LEAST = ("mfu", "share_of_floor", "ratio")


@dataclass(frozen=True)
class Goal:
    """One figure that is to be reached. A range that reaches over it leaves it undecided."""

    case: str | None  # None: every case
    what: What
    value: float
    against: str | None = None  # "best": the fastest of the plain torch loops
    card: str | None = None  # of which the figure is; None: of any GPU

    def applies(self, case: str, here: dict[str, Any]) -> bool:
        """Whether this case on this machine is what the goal is about."""
        right_card = self.card is None or str(here["device"]).find(self.card) >= 0
        return here["is_gpu"] and right_card and self.case in (None, case)

    def judge(self, case: str, systems: Systems) -> dict[str, Any]:
        """The goal, what was measured, and the verdict: reached, missed, undecided or not measured."""
        low, high = self._measured(systems)
        if low is None or high is None:
            verdict = "not measured"
        elif self.what in _AT_LEAST:
            verdict = "reached" if low >= self.value else "missed" if high < self.value else "undecided"
        else:
            verdict = "reached" if high <= self.value else "missed" if low > self.value else "undecided"
        return {"case": case, "goal": self._text(), "measured": [low, high], "verdict": verdict}

    def _text(self) -> str:
        v = self.value
        name = "the best compiled loop" if self.against == "best" else TITLES.get(self.against or "", "")
        texts: dict[What, str] = {
            "mfu": f"at least {v:.0%} MFU",
            "share_of_floor": f"at least {v:.0%} of the calibrated floor",
            "ratio": f"at least {v:g}x the tokens/s of {name}",
            "host_ratio": f"at most {v:g}x the time with gradients summed in host memory",
            "memory_ratio": f"at most {v:g}x the peak memory of {name}",
            "bytes": f"at most {v / 1e9:g} GB on the device",
            "first_step_cold": f"first step within {v:g} s, empty kernel cache",
            "first_step_warm": f"first step within {v:g} s, filled kernel cache",
            "loss": f"loss within {v:g} of the fp32 reference",
            "late_loss": f"after 300 steps, loss within {v:g} of {name}, mean of the last 50",
            "norm": f"gradient norm within {v:.0%} of the fp32 reference",
        }
        return texts[self.what]

    def _measured(self, systems: Systems) -> Range:
        own, peer = systems.get(OWN, {}), systems.get(self._peer(systems), {})
        if self.what in ("mfu", "share_of_floor"):
            value, speeds = own.get(self.what), own.get("tokens_per_second_range")
            if value is None or speeds is None:
                return None, None
            one = value / own["tokens_per_second"]
            return speeds[0] * one, speeds[1] * one
        if self.what in ("ratio", "host_ratio"):
            low, high = peer.get("ratio_range", (None, None))
            return low, high
        value = self._single(own, peer)
        return value, value

    def _single(self, own: dict[str, Any], peer: dict[str, Any]) -> float | None:
        value: float | None
        if self.what == "memory_ratio":
            mine, theirs = (system.get("memory", {}).get("max_reserved") for system in (own, peer))
            value = mine / theirs if mine and theirs else None
        elif self.what == "bytes":
            value = own.get("memory", {}).get("device_peak")
        elif self.what == "late_loss":
            value = peer.get("late_loss_gap")
        else:
            keys = {
                "first_step_cold": "first_step_seconds_cold", "first_step_warm": "first_step_seconds_warm",
                "loss": "largest_loss_gap", "norm": "largest_norm_gap",
            }  # fmt: skip
            value = own.get(keys[self.what])
        return value

    def _peer(self, systems: Systems) -> str:
        return best_loop(systems) if self.against == "best" else self.against or OWN


def best_loop(systems: Systems) -> str:
    """The fastest of the plain torch loops that were measured."""
    loops = [peer for peer in systems if peer.startswith("torch-") and "tokens_per_second" in systems[peer]]
    return max(loops, key=lambda peer: systems[peer]["tokens_per_second"], default="torch-compile")


GOALS = (
    Goal("350m", "mfu", 0.48, card="H100"),
    Goal("350m-mb4", "mfu", 0.45, card="H100"),
    Goal("125m", "mfu", 0.43, card="H100"),
    Goal("50m", "mfu", 0.37, card="H100"),
    Goal("1.3b", "mfu", 0.58, card="H100"),
    Goal(None, "share_of_floor", 0.95),
    Goal("350m", "ratio", 1.5, "hf"),
    Goal("350m", "ratio", 1.35, "hf-liger"),
    Goal("350m", "ratio", 1.15, "hf-compile"),
    Goal("350m", "ratio", 1.10, "litgpt"),
    Goal("350m", "ratio", 1.05, "best"),
    Goal("350m", "host_ratio", 1.03, "albor-host"),
    Goal("350m", "memory_ratio", 0.55, "hf"),
    Goal("350m", "memory_ratio", 0.8, "best"),
    Goal("350m-mb8", "bytes", 14.5e9),
    Goal("350m", "first_step_cold", 15.0),
    Goal("350m", "first_step_warm", 5.0),
    Goal(None, "loss", 0.005),
    Goal(None, "norm", 0.01),
    Goal("50m", "late_loss", 0.01, "best"),
)
