"""A conversation against the template that is exported, and its history against the context."""

from __future__ import annotations

import io
import json
import os
import pty
import select
import signal
import subprocess
import sys
import time
from importlib import resources
from pathlib import Path

import jinja2
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from writing_cases import make_tokenizer, save_run

from albor.data.tokenizer import CHAT_MARKERS, Tokenizer
from albor.generate.chat import CannotChat, Chat, Turn, encode, render
from albor.generate.generate import EndWriting, PromptTooLong, Settings, write
from albor.generate.load import load_to_write
from albor.generate.terminal import run_chat
from albor.model.decode import Decoder

CONTEXT = 256
GREEDY = Settings(max_tokens=12, temperature=0.0)
CONTENTS = st.text(alphabet="ab \n<|im_end|>é😀", max_size=12)
TURNS = st.lists(st.builds(Turn, st.sampled_from(["system", "user", "assistant"]), CONTENTS), max_size=5)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return make_tokenizer()


@pytest.fixture(scope="module")
def run(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_run(tmp_path_factory.mktemp("tiny"), tokenizer, CONTEXT)


@pytest.fixture
def decoder(run: Path) -> Decoder:
    loaded = load_to_write(run)
    return Decoder(loaded.model, loaded.arena)


@settings(max_examples=100, deadline=None)
@given(TURNS)
def test_what_is_rendered_is_what_the_exported_template_renders(turns: list[Turn]) -> None:
    source = resources.files("albor.export").joinpath("chat_template.jinja").read_text(encoding="utf-8")
    # As transformers sets its environment up.
    template = jinja2.Environment(trim_blocks=True, lstrip_blocks=True).from_string(source)
    messages = [{"role": turn.role, "content": turn.content} for turn in turns]
    assert render(turns) == template.render(messages=messages, add_generation_prompt=True)


@settings(max_examples=100, deadline=None)
@given(TURNS)
def test_markers_are_single_tokens_and_no_text_yields_one(turns: list[Turn]) -> None:
    tokenizer = make_tokenizer_once()
    ids = encode(tokenizer, turns)
    start, end = (tokenizer.special_ids[marker] for marker in CHAT_MARKERS)
    assert (ids.count(start), ids.count(end)) == (len(turns) + 1, len(turns))
    names = {number: name.encode() for name, number in tokenizer.special_ids.items()}
    text = b"".join(names.get(token, tokenizer.decode_bytes([token])) for token in ids)
    assert text.decode() == render(turns)


_made: list[Tokenizer] = []


def make_tokenizer_once() -> Tokenizer:
    if not _made:
        _made.append(make_tokenizer())
    return _made[0]


def test_a_second_answer_reads_only_what_is_new_and_is_the_same(
    decoder: Decoder, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    fed: list[int] = []
    feed = Decoder.feed
    monkeypatch.setattr(Decoder, "feed", lambda self, tokens: fed.append(len(tokens)) or feed(self, tokens))
    chat = Chat(decoder, tokenizer, GREEDY, system="the cat")
    turns, turns_ids = [Turn("system", "the cat")], list[int]()
    for message in ("the dog", "a mat\nand so", "the dog"):
        turns.append(Turn("user", message))
        answer = chat.ask(message)
        before, turns_ids = turns_ids, encode(tokenizer, turns)
        assert answer.generation.prompt_tokens == len(turns_ids)
        assert answer.dropped == 0
        turns.append(Turn("assistant", answer.generation.text))
    # The last question's tokens are in the cache, up to the marker behind which the answer stands.
    assert fed[-1] <= len(turns_ids) - len(before) + len(encode(tokenizer, [])) - 1
    decoder.reset()
    assert write(decoder, tokenizer, turns_ids, GREEDY).tokens == answer.generation.tokens


def test_the_oldest_turns_are_dropped_and_the_system_is_kept(decoder: Decoder, tokenizer: Tokenizer) -> None:
    chat = Chat(decoder, tokenizer, GREEDY, system="the mat")
    turns, dropped = [], []
    for number in range(12):
        message = f"the cat sat on {number}"
        answer = chat.ask(message)
        turns += [Turn("user", message), Turn("assistant", answer.generation.text)]
        dropped.append(answer.dropped)
        read = [Turn("system", "the mat"), *turns[answer.dropped : -1]]
        assert answer.generation.prompt_tokens == len(encode(tokenizer, read))
        assert answer.generation.prompt_tokens + GREEDY.max_tokens <= CONTEXT
        assert answer.generation.stop_reason != "context_full"
    assert dropped[0] == 0 < dropped[-1]
    assert dropped == sorted(dropped)
    assert all(count % 2 == 0 for count in dropped)  # the first that is read is the user's
    chat.reset()
    assert chat.ask("the").dropped == 0


def test_a_message_that_cannot_fit_is_refused_and_forgotten(decoder: Decoder, tokenizer: Tokenizer) -> None:
    chat = Chat(decoder, tokenizer, GREEDY)
    first = chat.ask("the cat").generation
    with pytest.raises(PromptTooLong, match=f"context holds {CONTEXT}"):
        chat.ask("é" * CONTEXT)
    again = Chat(decoder, tokenizer, GREEDY)
    assert again.ask("the cat").generation.tokens == first.tokens
    assert again.ask("so").generation.tokens == chat.ask("so").generation.tokens


def test_an_answer_that_is_ended_is_part_of_the_history(decoder: Decoder, tokenizer: Tokenizer) -> None:
    calls = 0

    def end_after_four() -> None:
        nonlocal calls
        calls += 1
        if calls > 4:
            raise EndWriting

    chat = Chat(decoder, tokenizer, GREEDY)
    ended = chat.ask("the cat", on_token=end_after_four).generation
    assert (len(ended.tokens), ended.stop_reason) == (4, "interrupted")
    turns = [Turn("user", "the cat"), Turn("assistant", ended.text), Turn("user", "so")]
    answer = chat.ask("so").generation
    decoder.reset()
    assert write(decoder, tokenizer, encode(tokenizer, turns), GREEDY).tokens == answer.tokens


def test_writing_ends_at_the_end_of_a_turn(tokenizer: Tokenizer, decoder: Decoder) -> None:
    end = tokenizer.special_ids[CHAT_MARKERS[1]]
    decoder.model.embedding.weight[end] = 0  # which is the head's row too: its logit is 0
    first = write(decoder, tokenizer, encode(tokenizer, [Turn("user", "so")]), GREEDY)
    assert first.stop_reason == "length"
    normed = decoder.arena["sample.normed"][0].clone()
    decoder.model.embedding.weight[end] = normed * 10
    answer = write(decoder, tokenizer, encode(tokenizer, [Turn("user", "so")]), GREEDY)
    assert answer.stop_reason == "end_of_turn"
    assert end not in answer.tokens


def test_a_tokenizer_without_markers_cannot_chat(
    decoder: Decoder, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = make_tokenizer()
    monkeypatch.setattr(plain, "special_ids", {"<|endoftext|>": 0})
    with pytest.raises(CannotChat, match="use albor generate"):
        Chat(decoder, plain, GREEDY)
    assert CannotChat.exit_code == 2


# The command


class Pipe(io.StringIO):
    def __init__(self, data: bytes):
        super().__init__()
        self.buffer = io.BytesIO(data)


def test_every_line_of_a_pipe_is_answered(
    decoder: Decoder,
    tokenizer: Tokenizer,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    messages = ["the cat", "/reset", "é 😀"]  # a pipe has no commands
    monkeypatch.setattr(sys, "stdin", Pipe("\r\n".join([*messages, "", ""]).encode()))
    run_chat(Chat(decoder, tokenizer, GREEDY), as_json=True)
    said = capsys.readouterr()
    answers = [json.loads(line) for line in said.out.splitlines()]
    assert [answer["message"] for answer in answers] == messages
    assert said.err == ""
    chat = Chat(decoder, tokenizer, GREEDY)
    for answer in answers:
        expected = chat.ask(answer["message"]).generation
        assert (answer["text"], answer["tokens"]) == (expected.text, len(expected.tokens))
        assert answer["tokens_per_second"] > 0


def test_an_interrupt_ends_the_answer_and_not_the_chat(
    decoder: Decoder,
    tokenizer: Tokenizer,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    lines = iter(["the cat", "so"])

    def typed(prompt: str) -> str:
        line = next(lines, None)
        if line is None:
            raise EOFError
        return line

    def show_and_press(piece: str) -> None:
        if piece != "\n":
            signal.raise_signal(signal.SIGINT)

    before = signal.getsignal(signal.SIGINT)
    monkeypatch.setattr("builtins.input", typed)
    monkeypatch.setattr("sys.stdin", type("Terminal", (), {"isatty": lambda self: True})())
    monkeypatch.setattr("albor.generate.terminal.show", show_and_press)
    run_chat(Chat(decoder, tokenizer, Settings(max_tokens=100, temperature=0.0)), as_json=False)
    told = [line for line in capsys.readouterr().err.splitlines() if line.startswith("[")]
    assert len(told) == 2
    assert all(line.endswith("interrupted]") for line in told)
    assert signal.getsignal(signal.SIGINT) is before


def test_chat_on_a_terminal(run: Path, tmp_path: Path) -> None:
    """A real terminal: a prompt, an answer with its speed, the commands, Ctrl-C at the prompt, Ctrl-D."""
    controller, terminal = pty.openpty()
    # Whoever started the tests in the background had SIGINT ignored, and then a chat ignores it too.
    heeding = "import runpy, signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
    program = [sys.executable, "-c", heeding + "runpy.run_module('albor', run_name='__main__')"]
    command = [*program, "chat", str(run), "--max-tokens", "200", "--temperature", "1.5"]
    process = subprocess.Popen(
        command, stdin=terminal, stdout=terminal, stderr=terminal, start_new_session=True, cwd=tmp_path,
        env={**os.environ, "TERM": "dumb", "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    os.close(terminal)
    seen = ""

    def until(text: str, press: int | None = None) -> str:
        nonlocal seen
        deadline = time.monotonic() + 60
        while text not in seen and time.monotonic() < deadline:
            if press is not None:
                process.send_signal(press)
            while text not in seen and select.select([controller], [], [], 1)[0]:
                seen += os.read(controller, 4096).decode(errors="replace")
        before, found, seen = seen.partition(text)
        assert found, before
        return before

    def say(text: str) -> None:
        os.write(controller, text.encode())

    try:
        until("> ")
        say("the cat\n")
        assert "tokens/s" in until("]")
        until("> ")
        say("/help\n")
        until("Ctrl-D   end the chat")
        until("> ")
        say("/what\n")
        until("there is no /what")
        until("> ")
        # No answer is being written: a fresh line. `input` shows its prompt before it waits for a line, and a
        # signal between the two only counts at the next one: it is pressed until it is heeded.
        until("Ctrl-D ends the chat", press=signal.SIGINT)
        until("> ")
        say("\x04")
        assert process.wait(30) == 0
    finally:
        process.kill()
        process.wait()
        os.close(controller)
