"""The export gate: what was exported, loaded by the program it is for, must compute what albor computes.

Both sides get the same values: albor's weights are rounded as the format stores them, and albor computes with
them in fp32. What is left is the order of sums, and whatever the program itself rounds, so that a tolerance
can be tight enough for a wrong epsilon, a wrong rotary base or a permuted row to show.
"""

from __future__ import annotations

import errno
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import cycle, islice
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch

from albor import __version__
from albor.data.tokenizer import Tokenizer
from albor.export.rounding import Before, log_softmax, look_before, spread
from albor.generate.load import Loaded
from albor.memory.shortage import is_out_of_memory
from albor.model.decode import Decoder

GREEDY_TOKENS = 64
_LONGEST_PROBE = 256  # tokens of a sequence whose logits are compared
_ASKED_POSITIONS = 16  # of such a sequence, where a program gives them one by one
_MOST_PERPLEXITY = 2.0  # times the one before: what rounding may do to a model that is still the same one
_PROMPT_TOKENS = 8
_FAVOUR = 1.0e4
_LONGEST_REASON = 300
_SHOWN = 24  # characters of a text that are shown where tokens differ
_FULL = (errno.ENOSPC, errno.EDQUOT)  # of a disk that the program needs beside the export

# SentencePiece writes a space as U+2581, and so do those who read its vocabularies: a U+2581 that is in the
# text reaches them as a space. albor encodes it as its three bytes. That one character is left out here.
_SPACE_MARK = "\u2581"

CORPUS = (
    "The quick brown fox jumps over the lazy dog, and the model reads on.\nA second line follows it.\n",
    "def fibonacci(n: int) -> int:\n    if n < 2:\n        return n\n    a, b = 0, 1\n\n"
    "    for _ in range(n):\n        a, b = b, a + b  # 0x1F + 3.14e-10\n    return a\n",
    "if (x) {\n\tfor (;;) {\n\t\tprintf(\"%d\\t%s\\n\", i++, s[i]);\n\t}\n}\r\n\tcase '\\0': break;\r\n",
    "  leading,  double   and trailing spaces    \n\n\n \t \n",
    "0 1 12 123 1234567890 3.14159 1,000,000 2024-02-29T23:59:59Z 0b1010 v1.2.3-rc4",
    "Grüße aus Ærøskøbing, señor Łukasz; naïve café, e\u0301 against \u00e9; Ελληνικά, Русский язык, עברית, "
    "العربية, हिन्दी, ไทย, 中文字符，日本語のテキスト。한국어 ﬁ Ⅷ ½ №",
    "\U0001f600\U0001f468\u200d\U0001f469\u200d\U0001f467\u200d\U0001f466 \U0001f44d\U0001f3fd "
    "\U0001f1eb\U0001f1f7 \u2764\ufe0f \U0001d518\U0001d52b\U0001d526 \U00020000",
    "\u00a0\u3000\u2028\ufeff\u200b soft\u00adhyphen, \x01\x7f\x85, \ufffd and quotes “‘’”—…",
    "<|endoftext|> <|im_start|>user\nThese are text here.<|im_end|>\n<s></s><unk><0x41> [INST] <pad>",
    '{\'key\': [1, 2.5, null], "nested": {"a\\"b": "\\u00e9"}} <p class="x">&amp;</p> $\\alpha_{i}^2$ #!@',
    "x",
    " ",
    "\n",
)


class NotInstalled(Exception):
    """A program that an export would be checked with is missing; nothing is wrong with the export."""

    def __init__(self, package: str, extra: str):
        super().__init__(f"{package} is not installed; run: pip install 'albor[{extra}]'")


class Runtime(Protocol):
    """A program that loads an exported model, as its users do: by the files alone.

    Whatever these methods need to know (stop tokens, positions, epsilon) they take from the exported files or
    from the program's own reading of them, never from albor: the gate would compare albor with itself.
    """

    name: str  # transformers, llama.cpp, onnxruntime
    version: str

    @property
    def stop_ids(self) -> frozenset[int]:
        """The tokens that end a generation."""

    def tokenize(self, text: str) -> list[int]:
        """The ids of `text`, without a token that the program would put in front or behind; markers such as
        `<|endoftext|>` in a text are text.
        """

    def logits(self, tokens: Sequence[int]) -> np.ndarray:
        """What follows each of `tokens`, read from position 0: (T, V) float32."""

    def greedy(self, tokens: Sequence[int], count: int, favoured: int | None = None) -> list[int]:
        """The likeliest continuation, at most `count` tokens, by the program's own loop; it ends before a
        stop token, which is not returned.

        `favoured` is a token whose logit is raised (by 1e4, say) so that it is the likeliest at each step:
        so every program can be brought to the point where it has to stop.
        """

    def close(self) -> None:
        """Gives back memory, files and processes."""


@runtime_checkable
class AnswersByPosition(Protocol):
    """A runtime that is asked for each position's logits, so that all of them would take too long."""

    def logits_at(self, tokens: Sequence[int], positions: Sequence[int]) -> np.ndarray:
        """`Runtime.logits` at these positions: (P, V) float32. A row may be off by a constant."""


@runtime_checkable
class ComputesAsStored(Protocol):
    """A runtime that computes in less than fp32 for its users, and whose `logits` are in fp32 even so."""

    def stored_logits_at(self, tokens: Sequence[int], positions: Sequence[int]) -> np.ndarray:
        """`AnswersByPosition.logits_at`, computed as for its users."""


class AlborRuntime:
    """albor itself, over the weights that are in the arena at the time of a call."""

    name = "albor"
    version = __version__

    def __init__(self, loaded: Loaded, stop_ids: Sequence[int]):
        self.tokenizer, self.stop_ids = loaded.tokenizer, frozenset(stop_ids)
        self._decoder = Decoder(loaded.model, loaded.arena)

    def tokenize(self, text: str) -> list[int]:
        """See `Runtime`."""
        ids: list[int] = self.tokenizer.encode(text).tolist()
        return ids

    def logits(self, tokens: Sequence[int]) -> np.ndarray:
        """See `Runtime`."""
        self._decoder.reset()
        return self._decoder.feed_for_each(torch.tensor(tokens)).float().numpy()

    def greedy(self, tokens: Sequence[int], count: int, favoured: int | None = None) -> list[int]:
        """See `Runtime`. Ids beyond the tokenizer's vocabulary are never written, as in `albor generate`."""
        self._decoder.reset()
        written: list[int] = []
        logits = self._decoder.feed(torch.tensor(tokens))
        while len(written) < count:
            scores = logits[: self.tokenizer.vocab_size].clone()
            if favoured is not None:
                scores[favoured] += _FAVOUR
            token = int(scores.argmax())
            if token in self.stop_ids:
                break
            written.append(token)
            if len(written) < count:
                logits = self._decoder.feed(torch.tensor([token]))
        return written

    def close(self) -> None:
        """See `Runtime`."""

    def look_before(self) -> Before:
        """What the model thinks now, before its weights are rounded."""
        return look_before(self._decoder, self.tokenizer.end_of_document_id, self.tokenizer.vocab_size)


@dataclass(frozen=True)
class Tolerance:
    """How far a program's logits may be from albor's, and why so far."""

    # Largest |difference| / largest |logit of albor's|, over all positions and tokens; log-probabilities
    # instead of logits for a program that gives no more than these (AnswersByPosition).
    logits: float
    reason: str  # shown with the table


@dataclass(frozen=True)
class Row:
    """One thing that was compared."""

    check: str
    compared: str  # how much of it
    found: str
    passed: bool


@dataclass(frozen=True)
class Gate:
    """What became of an export's check; without rows, `unchecked` says why there was none."""

    runtime: str
    rows: tuple[Row, ...]
    tolerance: Tolerance
    unchecked: str | None = None

    @property
    def passed(self) -> bool | None:
        """Whether all agrees; None where nothing was checked."""
        return all(row.passed for row in self.rows) if self.rows else None

    def as_json(self) -> dict[str, Any]:
        """The content of gate.json."""
        return {
            "passed": self.passed,
            "runtime": self.runtime,
            "albor": __version__,
            "unchecked": self.unchecked,
            "tolerance": asdict(self.tolerance),
            "checks": [asdict(row) for row in self.rows],
        }


def compare(
    own: AlborRuntime,
    program: str,
    open_runtime: Callable[[], Runtime],
    context: int,
    tolerance: Tolerance,
    before: Before | None = None,
    on_check: Callable[[str], None] = lambda check: None,
) -> Gate:
    """Holds the program that `open_runtime` starts against `own`, which has the weights as the export has
    them.

    `context` is the number of positions of the model; `before` is what was known of it before its weights
    were rounded, None where nothing was lost. Whatever the program raises is a finding: an export that it
    cannot load is no export. Only what `open_runtime` raises to say that there is no program goes through
    (`NotInstalled`), a shortage of memory, a full disk, and what ends the process. `on_check` is told each
    check as it begins.
    """
    runtime: Runtime | None = None
    name, rows = program, list[Row]()
    checks = (
        ("tokens of texts", _compare_tokens),
        ("logits", _compare_logits),
        ("greedy tokens", _compare_greedy),
        ("stop", _compare_stop),
    )
    try:
        check = "loads"
        on_check(check)
        runtime = open_runtime()
        name = f"{runtime.name} {runtime.version}"
        for check, function in checks:
            on_check(check)
            compared, found, passed = function(own, runtime, context, tolerance)
            rows.append(Row(check, compared, found, passed))
        if before is not None:
            check = "rounding"
            on_check(check)
            rows.append(Row(check, *_compare_rounding(own, runtime, before)))
    except NotInstalled:
        raise
    except Exception as error:
        if is_out_of_memory(error) or getattr(error, "errno", None) in _FULL:
            raise
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        rows.append(Row(check, "", reason[:_LONGEST_REASON], passed=False))
    finally:
        if runtime is not None:
            runtime.close()
    return Gate(name, tuple(rows), tolerance)


Finding = tuple[str, str, bool]  # compared, found, passed


def texts(tokenizer: Tokenizer) -> Iterator[str]:
    """What tokenisation is compared on: the corpus, in parts and as one; the vocabulary's pieces, in lines
    and as one.
    """
    yield from CORPUS
    yield "".join(CORPUS)
    pieces = (tokenizer.decode([token]) for token in range(tokenizer.vocab_size))
    usable = [piece for piece in pieces if piece and not {_SPACE_MARK, "\ufffd"} & set(piece)]
    yield "\n".join(usable)
    yield "".join(usable)


def _compare_tokens(own: AlborRuntime, runtime: Runtime, context: int, tolerance: Tolerance) -> Finding:
    total = 0
    for number, text in enumerate(texts(own.tokenizer), start=1):
        ours, theirs = own.tokenize(text), list(runtime.tokenize(text))
        if ours != theirs:
            place = _first_difference(ours, theirs)
            behind = own.tokenizer.decode(ours[place:])[:_SHOWN]
            sides = f"{ours[place : place + 3]} and {theirs[place : place + 3]}"
            return f"text {number}", f"from token {place} on, at {behind!r}: {sides}", False
        total += len(ours)
    return f"{number} texts", f"{total:,} tokens, all equal", True


def _compare_logits(own: AlborRuntime, runtime: Runtime, context: int, tolerance: Tolerance) -> Finding:
    worst, where, positions = 0.0, "", 0
    for name, tokens in _probes(own, context):
        ours = own.logits(tokens)
        if isinstance(runtime, AnswersByPosition):
            asked = spread(len(tokens), _ASKED_POSITIONS)
            ours, theirs = ours[asked], np.asarray(runtime.logits_at(tokens, asked), dtype=np.float32)
        else:
            asked, theirs = list(range(len(tokens))), np.asarray(runtime.logits(tokens), dtype=np.float32)
        positions += len(asked)
        if ours.shape != theirs.shape:
            return name, f"{list(theirs.shape)} logits instead of {list(ours.shape)}", False
        if not np.isfinite(ours).all():
            return name, "albor's own are NaN or infinite: the weights are damaged", False
        if not np.isfinite(theirs).all():
            return name, "some are NaN or infinite", False
        if isinstance(runtime, AnswersByPosition):
            ours, theirs = log_softmax(ours), log_softmax(theirs)
        difference = np.abs(ours - theirs) / np.abs(ours).max()
        if difference.max() >= worst:
            row, token = np.unravel_index(difference.argmax(), difference.shape)
            worst, where = float(difference.max()), f"{name}, position {asked[row]}, token {token}"
    found = f"at most {worst:.1e} of the largest apart ({tolerance.logits:.0e} allowed)"
    passed = worst <= tolerance.logits
    return f"{positions} positions", found if passed else f"{found}: {where}", passed


def _compare_greedy(own: AlborRuntime, runtime: Runtime, context: int, tolerance: Tolerance) -> Finding:
    total, ties = 0, list[float]()
    for prompt in _prompts(own, context):
        count = min(GREEDY_TOKENS - total, context - len(prompt))
        ours, theirs = own.greedy(prompt, count), list(runtime.greedy(prompt, count))
        if ours != theirs:
            place = _first_difference(ours, theirs)
            gap = _gap(own, [*prompt, *ours[:place]], theirs[place] if place < len(theirs) else None)
            if gap > 2 * tolerance.logits:
                sides = f"{ours[place : place + 3]} and {theirs[place : place + 3]}"
                return f"{total + place} tokens", f"then {sides}, {gap:.1e} of the largest logit apart", False
            ties.append(gap)
            ours = ours[:place]  # from there on each goes a way of its own; the next prompt has the rest
        total += len(ours)
        if total >= GREEDY_TOKENS:
            break
    found = f"all equal, but for {len(ties)} ties within {max(ties):.0e}" if ties else "all equal"
    return f"{total} tokens", found, True


def _compare_stop(own: AlborRuntime, runtime: Runtime, context: int, tolerance: Tolerance) -> Finding:
    """A stop token, made the likeliest, ends the generation at once; another does not."""
    missing = own.stop_ids - runtime.stop_ids
    controls = set(own.tokenizer.special_ids.values())
    foreign = {token for token in runtime.stop_ids - own.stop_ids if token not in controls}
    compared = "ids " + ", ".join(map(str, sorted(own.stop_ids)))
    if missing or foreign:
        return compared, f"the program stops at {sorted(runtime.stop_ids)}", False
    prompt = next(_prompts(own, context))
    count = min(4, context - len(prompt))
    other = next(i for i in reversed(range(own.tokenizer.vocab_size)) if i not in controls)
    for token in sorted({*own.stop_ids, other}):
        ours, theirs = (side.greedy(prompt, count, favoured=token) for side in (own, runtime))
        if ours != list(theirs):
            return compared, f"after token {token} there are {len(theirs)} more instead of {len(ours)}", False
    return compared, "each ends a generation, another token does not", True


def _compare_rounding(own: AlborRuntime, runtime: Runtime, before: Before) -> Finding:
    if isinstance(runtime, ComputesAsStored):
        logits = runtime.stored_logits_at(before.tokens, before.positions)
    else:
        logits = own.logits(before.tokens)[before.positions]
    old, new = before.perplexities(logits)
    found = f"perplexity {old:.4g}, then {new:.4g} ({new / old - 1:+.2%})"
    return f"{len(before.positions)} positions", found, new <= _MOST_PERPLEXITY * old


def _probes(own: AlborRuntime, context: int) -> Iterator[tuple[str, list[int]]]:
    """Two sequences: a document's beginning, and ids from all over the model's vocabulary."""
    length = min(context, _LONGEST_PROBE)
    document = [own.tokenizer.end_of_document_id, *own.tokenize("".join(CORPUS))]
    yield "text", list(islice(cycle(document), length))
    vocabulary = own.logits(document[:1]).shape[1]
    step = next(n for n in range(vocabulary * 5 // 8, vocabulary * 2) if np.gcd(n, vocabulary) == 1)
    yield "ids over the vocabulary", [(1 + i * step) % vocabulary for i in range(length)]


def _prompts(own: AlborRuntime, context: int) -> Iterator[list[int]]:
    """Beginnings of documents, each with room for at least one more token."""
    for text in CORPUS:
        ids = [own.tokenizer.end_of_document_id, *own.tokenize(text)]
        yield ids[: max(1, min(1 + _PROMPT_TOKENS, context - 1))]


def _gap(own: AlborRuntime, tokens: list[int], theirs: int | None) -> float:
    """By how much albor prefers its own next token to `theirs`, or, for None, to any that stops, as a share
    of the largest logit.
    """
    if theirs is not None and theirs >= own.tokenizer.vocab_size:
        return math.inf  # nothing is written with it, however likely it is
    logits = own.logits(tokens)[-1]
    other = max(logits[token] for token in own.stop_ids) if theirs is None else logits[theirs]
    return float((logits[: own.tokenizer.vocab_size].max() - other) / np.abs(logits).max())


def _first_difference(ours: list[int], theirs: list[int]) -> int:
    pairs = zip(ours, theirs, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(ours), len(theirs)))
