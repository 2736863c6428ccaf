"""240 recorded plans: none changes unnoticed, and the recorded numbers are what one computes by hand.

`By hand` is `Hand` below: it reads numbers from the configuration, and uses nothing of `albor.memory` or
`albor.architecture`.
"""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from pathlib import Path

import golden_plans
import pytest
from golden_plans import Case

RECORDED = json.loads(golden_plans.FILE.read_text())
CASES = {case.key: case for case in golden_plans.cases()}
TRAINING = [key for key, case in CASES.items() if case.batch is None]
ON_CUDA = [key for key in TRAINING if CASES[key].device == "cuda"]
BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}


def up(size: int, multiple: int) -> int:
    return (size + multiple - 1) // multiple * multiple


class Hand:
    """What the buffers of a training run come to, from the numbers in its configuration."""

    def __init__(self, case: Case):
        config = case.load()
        model, self.train, self.evaluate = config.model, config.train, config.evaluate
        self.cuda, self.width = case.device == "cuda", BYTES[case.dtype]
        self.C, self.F, self.V, self.L = (
            model.hidden_size, model.intermediate_size, model.vocab_size, model.num_hidden_layers,
        )  # fmt: skip
        self.H = model.num_attention_heads
        self.K = model.num_key_value_heads or self.H
        self.D = self.C // self.H
        self.Q = (self.H + 2 * self.K) * self.D
        self.T, self.B = config.data.sequence_length, self.train.micro_batch_size
        self.N = self.B * self.T
        self.positions, self.tied = model.max_position_embeddings, model.tie_word_embeddings
        self.documents, self.background = config.data.document_mask, config.checkpoint.background
        self.on_host = self.train.accumulator == "cpu"
        # Every parameter is padded to 128 elements.
        matrices = (self.Q * self.C, self.C * self.C, 2 * self.F * self.C, self.C * self.F)
        self.block = sum(up(size, 128) for size in (*matrices, self.C, self.C))
        self.embedding = up(self.V * self.C, 128)
        self.head = up(self.C, 128) + (0 if self.tied else self.embedding)
        self.P = self.embedding + self.L * self.block + self.head
        # bf16 with fp32 state has masters; with bf16 state, neither masters nor fp32 moments.
        self.rounds = config.optimizer.state_dtype == "bf16" and case.dtype == "bfloat16"
        self.masters = self.width == 2 and not self.rounds

    @property
    def state(self) -> dict[str, int]:
        moment = 2 if self.rounds else 4
        state = {
            "weights": self.width * self.P,
            "moments.first": moment * self.P,
            "moments.second": moment * self.P,
        }
        return state | ({"master": 4 * self.P} if self.masters else {})

    @property
    def gradients(self) -> dict[str, int]:
        found = {"gradients.accumulator": 4 * self.P}
        if self.cuda and not self.on_host:
            return found  # the GEMMs add to the sums
        found |= {
            "gradients.block": min(2, self.L) * self.block * self.width,
            "gradients.embedding": self.embedding * self.width,
            "gradients.head": self.head * self.width,
        }
        return found | ({"gradients.transfer": self.P * self.width} if self.cuda else {})

    @property
    def kept_by_block(self) -> dict[str, int]:
        """Bytes from a block's forward to its backward."""
        n, w = self.N, self.width
        kept = {"input": n * self.C * w}
        if self.train.recompute == "block":
            return kept
        kept |= {
            "attention_out": n * self.C * w, "middle": n * self.C * w,
            "qkv": n * self.Q * w, "gate_up": n * 2 * self.F * w,
            "attention_rstd": 4 * n, "mlp_rstd": 4 * n,
        }  # fmt: skip
        if self.cuda:
            kept["attention_lse"] = 4 * n * self.H
        if self.train.recompute == "none":
            kept |= {"attention_normed": n * self.C * w, "mlp_normed": n * self.C * w}
        return kept

    @property
    def chunk(self) -> int:
        return min(self.N, self.train.head_chunk_tokens or (4096 if self.cuda else 256))

    @property
    def parts(self) -> dict[str, int]:
        logits = {"head.logits": self.chunk * self.V * self.width}
        if not self.cuda and self.width == 2:
            logits["head.probabilities"] = self.chunk * self.V * 4
        snapshot = {"snapshot": sum(self.state.values())} if self.background else {}
        blocks = {"blocks": self.L * sum(self.kept_by_block.values())}
        return self.state | self.gradients | blocks | logits | snapshot

    @property
    def head_phase(self) -> int:
        """Device bytes that are alive while the head runs, on a GPU, each buffer rounded up to 256."""
        n, w, c = self.N, self.width, self.C
        rows = max(self.N, (self.evaluate.micro_batch_size or self.B) * self.T)
        segments = 4 * self.L + 2
        buffers = [*self.state.values(), *self.L * list(self.kept_by_block.values())]
        buffers += [
            n * c * w
        ] * 6  # input, normed, d_normed; the last block's delta; d_x; and, see below, middle
        if self.train.recompute != "block":  # where it is kept anyway
            buffers.pop()
        buffers += [4 * n, self.chunk * self.V * w]  # rstd, logits
        buffers += [4 * self.positions * self.D // 2] * 2 + [
            256 * c * 4
        ]  # rotary tables, the norms' partial sums
        buffers += [8 * rows, 8 * rows, 4 * rows] + [4 * rows] * (2 if self.documents else 0)
        buffers += [8 * n, 8 * (n + 1), 8 * n, 4, 8 * (1 + segments), 16, 8]
        if self.on_host:
            buffers += [self.block * w] * min(2, self.L) + [self.embedding * w, self.head * w]
        else:
            # A program for each 1024th of the parameters in a segment, and one more for each.
            qkv, out, gate_up, down, norm = (
                up(size, 128) for size in (self.Q * c, c * c, 2 * self.F * c, c * self.F, c)
            )
            sizes = [self.embedding, *[qkv + out, gate_up + down, norm, norm] * self.L, self.head]
            programs = sum(1 + size * 1024 // self.P for size in sizes)
            buffers += [4 * self.P, 8 * programs, 4 * 8 * programs, 8 * (segments + 1)]
        if self.evaluate.prompts:  # scratch of a chunk of 256 tokens, or of a sequence, that sampling keeps
            rows = min(256, self.T)
            buffers += [self.H * rows * self.D * w] * 2 + [rows * rows * w]
        return sum(up(size, 256) for size in buffers)


def test_no_plan_has_changed() -> None:
    """Where a change was meant: python tests/golden_plans.py"""
    assert golden_plans.differences(RECORDED, golden_plans.golden()) == []


def test_there_are_enough_and_they_differ() -> None:
    assert len(RECORDED) >= 200
    assert len({plan["sha256"] for plan in RECORDED.values()}) > 0.9 * len(RECORDED)
    peaks = {plan["peak"].partition(".")[0] for plan in RECORDED.values()}
    assert peaks >= {"head", "backward", "evaluate", "sample"}


@pytest.mark.parametrize("key", TRAINING)
def test_what_was_recorded_is_what_one_computes_by_hand(key: str) -> None:
    by_hand = Hand(CASES[key]).parts
    assert {name: RECORDED[key]["parts"].get(name) for name in by_hand} == by_hand
    absent = {"master", "snapshot", "gradients.transfer", "head.probabilities"} - by_hand.keys()
    assert not absent & RECORDED[key]["parts"].keys()


def test_whole_arenas_are_what_one_computes_by_hand() -> None:
    """Where the head's phase holds most, and that is most plans, it alone says how large the arena is."""
    whole = [
        key for key in ON_CUDA if RECORDED[key]["peak"] == "head" and "gaps" not in RECORDED[key]["groups"]
    ]
    assert len(whole) >= 100
    assert {key: RECORDED[key]["device"] for key in whole} == {
        key: Hand(CASES[key]).head_phase for key in whole
    }


@pytest.mark.parametrize("name", golden_plans.SHIPPED)
def test_what_backward_reads_is_kept_until_then(name: str) -> None:
    """From the forward of its block, and the first input from the embedding on, to its backward."""
    plan = CASES[f"{name} cuda bfloat16"].plan()
    layers = [b for b in plan.buffers if b.name.startswith("blocks.")]
    assert {int(b.name.split(".")[1]) for b in layers} == set(range(len(layers) // 10))
    for buffer in layers:
        _, layer, what = buffer.name.split(".")
        begins = "embed" if (layer, what) == ("00", "input") else f"forward.{layer}"
        assert (plan.phases[buffer.first], plan.phases[buffer.last]) == (begins, f"backward.{layer}")
    whole_run = {"weights", "moments.first", "moments.second", "rotary.cos", "rotary.sin"}
    last = len(plan.phases) - 1
    assert whole_run <= {b.name for b in plan.buffers if (b.first, b.last) == (0, last)}


def test_the_350m_example() -> None:
    """Numbers that stand in docs/memory.md, written out."""
    plan = RECORDED["pretrain-350m cuda bfloat16"]
    parameters = 398_509_056
    assert plan["parts"]["weights"] == 2 * parameters  # every width here is a multiple of 128
    assert plan["parts"]["master"] == plan["parts"]["moments.first"] == 4 * parameters
    # Per token and layer: five vectors of 1,024, qkv of 1,536 and 2 x 4,096 of gate and up in bf16; two
    # reciprocal norms and 16 logarithms in fp32.
    assert plan["parts"]["blocks"] == 24 * 4096 * (2 * (5 * 1024 + 1536 + 8192) + 4 * 18) == 2_926_313_472
    assert plan["groups"]["logits"] == 4096 * 32768 * 2
    assert plan["pinned"] - 6 * parameters < 2**20  # the sums in fp32, and a staging copy in bf16


def test_a_change_is_told() -> None:
    changed = copy.deepcopy(RECORDED)
    first, second, *_ = changed
    changed[first]["parts"]["weights"] += 2
    changed["another"] = changed.pop(second)
    lines = golden_plans.differences(RECORDED, changed)
    assert [line.partition(": ")[2].split(" ")[0] for line in lines] == ["parts", "gone", "new"]


def test_the_script_checks_itself() -> None:
    script = Path(golden_plans.__file__)
    done = subprocess.run([sys.executable, script, "--check"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, f"{len(RECORDED)} plans are as recorded\n")
