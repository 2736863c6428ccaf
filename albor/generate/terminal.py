"""`albor chat` and what `albor generate` says on a terminal: lines in, text as it is written, the speed."""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from types import FrameType

from albor.errors import ConfigError, Problem
from albor.generate.chat import Chat
from albor.generate.generate import EndWriting, Generation, PromptTooLong

_PROMPT = "> "
_HELP = """\
/reset   forget what was said
/help    this list
Ctrl-C   end the answer
Ctrl-D   end the chat"""


def describe(generation: Generation) -> str:
    """How much was written, how fast, and what ended it: 42 tokens, 3,412 tokens/s, end of turn."""
    speed = generation.tokens_per_second
    facts = [f"{len(generation.tokens):,} tokens", generation.stop_reason.replace("_", " ")]
    if speed is not None:
        facts.insert(1, f"{speed:,.0f} tokens/s")
    return ", ".join(facts)


def show(piece: str) -> None:
    """Prints text as it comes."""
    sys.stdout.write(piece)
    sys.stdout.flush()


def run_chat(chat: Chat, *, as_json: bool) -> None:
    """Answers standard input line by line, until it ends.

    On a terminal there is a prompt, and /reset and /help are heeded; otherwise a line is a message whatever
    it begins with, and with `as_json` each answer is one JSON object in a line of its own. Raises
    PromptTooLong where no one can say it shorter, and ConfigError for a line that is not UTF-8.
    """
    talk = sys.stdin.isatty() and not as_json
    told = 0  # dropped turns that the user has been told of
    for message in _lines_of_terminal() if talk else _lines_of_pipe():
        if talk and message == "/help":
            print(_HELP)
        elif talk and message == "/reset":
            chat.reset()
            told = 0
        elif talk and message.startswith("/"):
            print(f"there is no {message.split()[0]}; /help shows what there is", file=sys.stderr)
        elif message.strip():
            try:
                with _interrupt_ends() if talk else nullcontext(lambda: None) as on_token:
                    answer = chat.ask(message, None if as_json else show, on_token)
            except PromptTooLong as error:
                if not talk:
                    raise
                print(f"albor: {error}", file=sys.stderr)
                continue
            generation = answer.generation
            if as_json:
                print(json.dumps({
                    "message": message, "text": generation.text, "tokens": len(generation.tokens),
                    "prompt_tokens": generation.prompt_tokens, "stop_reason": generation.stop_reason,
                    "seconds": generation.seconds, "tokens_per_second": generation.tokens_per_second,
                    "dropped_turns": answer.dropped,
                }), flush=True)  # fmt: skip
            else:
                show("\n")
            if talk:
                print(f"[{describe(generation)}]", file=sys.stderr)
            if talk and answer.dropped > told:
                told = answer.dropped
                print(f"[the context is full: the first {told} turns are no longer read]", file=sys.stderr)


def _lines_of_terminal() -> Iterator[str]:
    """What the user types, until Ctrl-D; Ctrl-C gives a fresh line."""
    with suppress(ImportError):
        import readline  # noqa: F401 - input() then edits lines, and remembers them
    while True:
        try:
            yield input(_PROMPT if sys.stdout.isatty() else "")
        except KeyboardInterrupt:
            print("\nCtrl-D ends the chat, /help shows what else there is", file=sys.stderr)
        except EOFError:
            print()
            return


def _lines_of_pipe() -> Iterator[str]:
    for number, line in enumerate(sys.stdin.buffer, start=1):
        try:
            yield line.decode().rstrip("\r\n")
        except UnicodeDecodeError as error:
            place = "standard input"
            raise ConfigError([Problem(f"line {number}", "is not UTF-8 text", where=place)]) from error


@contextmanager
def _interrupt_ends() -> Iterator[Callable[[], None]]:
    """Gives what `write` calls before each token: it ends the text once Ctrl-C was pressed."""
    pressed = False

    def note(number: int, frame: FrameType | None) -> None:
        nonlocal pressed
        pressed = True

    def on_token() -> None:
        if pressed:
            raise EndWriting

    before = signal.signal(signal.SIGINT, note)
    try:
        yield on_token
    finally:
        signal.signal(signal.SIGINT, before)
