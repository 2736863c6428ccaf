"""A real server process, through OpenAI's own client and through sockets that misbehave."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx2 as httpx
import openai
import pytest
from writing_cases import make_tokenizer, save_run

from albor.data.tokenizer import Tokenizer
from albor.generate.chat import Turn, encode
from albor.generate.generate import Generation, Settings, generate, write
from albor.generate.load import load_to_write
from albor.model.decode import Decoder
from albor.serve.engine import Engine
from albor.serve.requests import Asked, Refused, read_request

CONTEXT = 8192  # so long that a text is still being written when something is done about it
KEY = "a secret"
WAITING = 1


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return make_tokenizer()


@pytest.fixture(scope="module")
def run(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_run(tmp_path_factory.mktemp("tiny"), tokenizer, CONTEXT)


@pytest.fixture(scope="module")
def decoder(run: Path) -> Decoder:
    loaded = load_to_write(run)
    return Decoder(loaded.model, loaded.arena)


def start(run: Path, *arguments: str, **pipes: Any) -> tuple[subprocess.Popen[str], dict[str, Any]]:
    command = [sys.executable, "-m", "albor", "serve", str(run), "--port", "0", "--json", *arguments]
    environment = {**os.environ, "SERVE_KEY": KEY, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment, **pipes)
    assert process.stdout is not None
    return process, json.loads(process.stdout.readline())


@pytest.fixture(scope="module")
def url(run: Path) -> Iterator[str]:
    process, said = start(run, "--waiting", str(WAITING), "--api-key-env", "SERVE_KEY")
    assert (said["model"], said["can_chat"]) == ("tiny", True)
    yield said["url"]
    process.terminate()
    assert process.wait(30) == 0


@pytest.fixture
def client(url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=url, api_key=KEY, max_retries=0) as client:
        yield client


def post(url: str, path: str, body: Any, **arguments: Any) -> httpx.Response:
    headers = {"Authorization": f"Bearer {KEY}", "Content-Type": "application/json"}
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    request = {"content": content, "headers": headers, "timeout": 60, **arguments}
    return httpx.post(f"{url}{path}", **request)


def test_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").owned_by == "albor"
    with pytest.raises(openai.NotFoundError, match="there is no model 'gpt-4' here"):
        client.models.retrieve("gpt-4")


def test_a_completion_is_what_generate_writes(
    client: openai.OpenAI, decoder: Decoder, tokenizer: Tokenizer
) -> None:
    for settings in ({"temperature": 0.0}, {"temperature": 0.9, "top_p": 0.8, "seed": 5}):
        expected = generate(decoder, tokenizer, "the cat", max_tokens=20, **settings)  # type: ignore[arg-type]
        for _ in range(2):  # what came before leaves no trace
            given = client.completions.create(model="tiny", prompt="the cat", max_tokens=20, **settings)  # type: ignore[call-overload]
            assert given.choices[0].text == expected.text
            assert given.choices[0].finish_reason == "length"
            assert given.usage.prompt_tokens == expected.prompt_tokens
            assert given.usage.completion_tokens == len(expected.tokens) == 20
    ids = [tokenizer.end_of_document_id, *tokenizer.encode("the cat").tolist()]
    given = client.completions.create(model="tiny", prompt=ids, max_tokens=20, temperature=0)
    assert given.choices[0].text == generate(decoder, tokenizer, "the cat", max_tokens=20, temperature=0).text
    assert len(client.completions.create(model="tiny", prompt="the", seed=1).choices[0].text) > 0
    drawn = {client.completions.create(model="tiny", prompt="the").choices[0].text for _ in range(5)}
    assert len(drawn) > 1  # without a seed there is another one each time


def test_a_completion_stops_at_a_text(client: openai.OpenAI, decoder: Decoder, tokenizer: Tokenizer) -> None:
    whole = generate(decoder, tokenizer, "the", max_tokens=30, temperature=0).text
    stop = whole[10:12]
    given = client.completions.create(model="tiny", prompt="the", max_tokens=30, temperature=0, stop=stop)
    assert given.choices[0].text == whole[: whole.index(stop)]
    assert given.choices[0].finish_reason == "stop"


def test_a_chat_is_what_the_template_asks(
    client: openai.OpenAI, decoder: Decoder, tokenizer: Tokenizer
) -> None:
    messages = [
        {"role": "developer", "content": "the mat"},
        {"role": "user", "content": [{"type": "text", "text": "the "}, {"type": "text", "text": "cat"}]},
    ]
    turns = [Turn("system", "the mat"), Turn("user", "the cat")]
    settings = Settings(max_tokens=15, temperature=0.7, seed=9)
    expected = write(decoder, tokenizer, encode(tokenizer, turns), settings)
    common = {"model": "tiny", "messages": messages, "temperature": 0.7, "seed": 9}
    given = client.chat.completions.create(**common, max_completion_tokens=15)  # type: ignore[call-overload]
    assert given.choices[0].message.content == expected.text
    assert given.choices[0].message.role == "assistant"
    assert given.usage.prompt_tokens == expected.prompt_tokens

    options = {"stream": True, "stream_options": {"include_usage": True}}
    parts = list(client.chat.completions.create(**common, max_tokens=15, **options))  # type: ignore[call-overload]
    assert parts[0].choices[0].delta.role == "assistant"
    assert "".join(part.choices[0].delta.content or "" for part in parts[:-1]) == expected.text
    assert [part.choices[0].finish_reason for part in parts[:-1]] == [None] * (len(parts) - 2) + ["length"]
    assert len(parts) > 5  # it came in pieces
    assert parts[-1].choices == []
    assert parts[-1].usage.completion_tokens == 15
    assert len({part.id for part in parts}) == 1


def test_a_completion_streams(client: openai.OpenAI, decoder: Decoder, tokenizer: Tokenizer) -> None:
    expected = generate(decoder, tokenizer, "the", max_tokens=20, temperature=0).text
    parts = list(
        client.completions.create(model="tiny", prompt="the", max_tokens=20, temperature=0, stream=True)
    )
    assert "".join(part.choices[0].text for part in parts) == expected
    assert parts[-1].choices[0].finish_reason == "length"
    assert all(part.usage is None for part in parts)


BAD = {
    "no JSON": (b"{", "the body is no JSON", None),
    "no object": ([], "has to be a JSON object", None),
    "unknown field": ({"prompt": "a", "tempature": 1}, "unknown field 'tempature'", "tempature"),
    "no model": ({"prompt": "a", "model": None}, "model is missing", "model"),
    "several answers": ({"prompt": "a", "n": 2}, "n=2 is not supported", "n"),
    "a text as a number": ({"prompt": "a", "temperature": "1"}, "has to be a number", "temperature"),
    "a truth as a number": ({"prompt": "a", "max_tokens": True}, "has to be a whole number", "max_tokens"),
    "a negative temperature": ({"prompt": "a", "temperature": -1}, "use 0", "temperature"),
    "a NaN": (b'{"model": "tiny", "prompt": "a", "temperature": NaN}', "temperature", "temperature"),
    "a number without end": ({"prompt": "a", "temperature": 10**400}, "too large", "temperature"),
    "no tokens": ({"prompt": "a", "max_tokens": 0}, "1 or more", "max_tokens"),
    "an empty stop": ({"prompt": "a", "stop": [""]}, "is empty", "stop"),
    "a stop of numbers": ({"prompt": "a", "stop": [1]}, "list of texts", "stop"),
    "several prompts": ({"prompt": ["a", "b"]}, "one text", "prompt"),
    "tokens beyond": ({"prompt": [0, 300]}, "outside 0 to 299", "prompt"),
    "half a character": (b'{"model": "tiny", "prompt": "\\ud800"}', "half of a pair", "prompt"),
    "a penalty": ({"prompt": "a", "presence_penalty": 0.5}, "presence_penalty=0.5", "presence_penalty"),
    "probabilities": ({"prompt": "a", "logprobs": 3}, "logprobs is not supported", "logprobs"),
    "options without a stream": (
        {"prompt": "a", "stream_options": {"include_usage": True}}, "with stream only", "stream_options",
    ),
    "too long": ({"prompt": "é" * CONTEXT}, f"the model's context holds {CONTEXT:,}", "prompt"),
}  # fmt: skip


@pytest.mark.parametrize(("body", "message", "param"), BAD.values(), ids=BAD)
def test_a_bad_completion_is_refused(url: str, body: Any, message: str, param: str | None) -> None:
    given = {"model": "tiny", **body} if isinstance(body, dict) else body
    answer = post(url, "/completions", given)
    error = answer.json()["error"]
    assert (answer.status_code, error["param"], error["type"]) == (400, param, "invalid_request_error")
    assert message in error["message"]


BAD_CHATS = {
    "no messages": ({}, "messages is missing", "messages"),
    "none": ({"messages": []}, "messages is empty", "messages"),
    "a role": ({"messages": [{"role": "tool", "content": "a"}]}, "role has to be", "messages[0].role"),
    "a picture": (
        {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
        "content has to be text", "messages[0].content",
    ),
    "tools": ({"messages": [{"role": "user", "content": "a"}], "tools": [{}]}, "tools=", "tools"),
    "JSON only": (
        {"messages": [{"role": "user", "content": "a"}], "response_format": {"type": "json_object"}},
        "response_format", "response_format",
    ),
    "two limits": (
        {"messages": [{"role": "user", "content": "a"}], "max_tokens": 1, "max_completion_tokens": 2},
        "one setting", "max_tokens",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("body", "message", "param"), BAD_CHATS.values(), ids=BAD_CHATS)
def test_a_bad_chat_is_refused(url: str, body: dict[str, Any], message: str, param: str) -> None:
    answer = post(url, "/chat/completions", {"model": "tiny", **body})
    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (400, param)
    assert message in error["message"]


def test_what_is_neutral_is_allowed(client: openai.OpenAI) -> None:
    client.chat.completions.create(
        model="tiny", messages=[{"role": "user", "content": "the", "name": "x"}], max_tokens=2, n=1,
        user="me", presence_penalty=0, frequency_penalty=0.0, logit_bias={}, logprobs=False, stop=None,
        response_format={"type": "text"},
    )  # fmt: skip


def test_the_official_client_raises_its_own_errors(client: openai.OpenAI, url: str) -> None:
    with pytest.raises(openai.NotFoundError) as unknown:
        client.completions.create(model="gpt-4", prompt="a")
    assert (unknown.value.code, unknown.value.param) == ("model_not_found", "model")
    with pytest.raises(openai.BadRequestError) as too_long:
        client.completions.create(model="tiny", prompt="é" * CONTEXT)
    assert too_long.value.code == "context_length_exceeded"
    with (
        openai.OpenAI(base_url=url, api_key="wrong", max_retries=0) as stranger,
        pytest.raises(openai.AuthenticationError, match="API key is missing or wrong"),
    ):
        stranger.models.list()


def test_what_is_no_request_of_ours(url: str) -> None:
    body = {"model": "tiny", "prompt": "a"}
    assert httpx.get(url.replace("/v1", "/health")).json()["status"] == "ok"  # needs no key
    assert httpx.get(f"{url}/models").status_code == 401
    assert post(url, "/embeddings", body).status_code == 404
    assert "error" in post(url, "/embeddings", body).json()
    answer = httpx.get(f"{url}/completions")
    assert (answer.status_code, "GET" in answer.json()["error"]["message"]) == (405, True)
    plain = {"Authorization": f"Bearer {KEY}", "Content-Type": "text/plain"}
    assert post(url, "/completions", body, headers=plain).status_code == 415
    assert post(url, "/completions", {**body, "user": "x" * 5_000_000}).status_code == 413


ENDLESS = {"model": "tiny", "prompt": "the", "max_tokens": CONTEXT, "temperature": 0}


@pytest.mark.parametrize("stream", [True, False])
def test_who_goes_away_frees_the_slot(url: str, stream: bool) -> None:
    began = time.monotonic()
    whole = post(url, "/completions", ENDLESS)
    seconds = time.monotonic() - began
    assert whole.json()["usage"]["completion_tokens"] > 1000, "the model ends too early for this test"
    address = url.removeprefix("http://").partition("/")[0].rsplit(":", 1)
    content = json.dumps({**ENDLESS, "stream": stream}).encode()
    for _ in range(2 * WAITING + 4):  # more than there is room for, were none given back
        with socket.create_connection((address[0], int(address[1]))) as connection:
            head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {KEY}\r\n"
            head += f"Content-Type: application/json\r\nContent-Length: {len(content)}\r\n\r\n"
            connection.sendall(head.encode() + content)
            if stream:
                assert b" 200 " in connection.recv(100)
            else:
                time.sleep(0.05)
    began = time.monotonic()
    deadline = began + 2 * seconds
    while post(url, "/completions", {**ENDLESS, "max_tokens": 1}).status_code == 503:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert time.monotonic() - began < max(0.5 * seconds, 0.5)


def test_more_than_may_wait_are_refused(url: str) -> None:
    headers = {"Authorization": f"Bearer {KEY}"}
    body = {**ENDLESS, "stream": True}
    with httpx.stream("POST", f"{url}/completions", json=body, headers=headers, timeout=60) as first:
        lines = first.iter_lines()
        next(lines)  # it is being answered
        with ThreadPoolExecutor(WAITING + 2) as threads:
            short = {**ENDLESS, "max_tokens": 1}
            answers = list(threads.map(lambda _: post(url, "/completions", short), range(WAITING + 2)))
    refused = [answer for answer in answers if answer.status_code == 503]
    assert len(refused) == 2
    assert [answer.status_code for answer in answers if answer not in refused] == [200] * WAITING
    assert "try again later" in refused[0].json()["error"]["message"]
    assert refused[0].headers["retry-after"] == "1"


def test_who_reads_slowly_does_not_hold_the_slot(decoder: Decoder, tokenizer: Tokenizer) -> None:
    async def both() -> tuple[Generation, Generation]:
        engine = Engine(decoder, tokenizer, waiting=1)

        def asked(text: str, tokens: int) -> Asked:
            ids = (tokenizer.end_of_document_id, *tokenizer.encode(text).tolist())
            return Asked("completion", ids, Settings(tokens, temperature=0), stream=True, include_usage=False)

        slow = engine.pieces(asked("the", 500))
        await anext(slow)  # and then looks at none for a while
        *_, second = [piece async for piece in engine.pieces(asked("a", 5))]
        *_, first = [piece async for piece in slow]
        engine.close()
        return first, second

    first, second = asyncio.run(asyncio.wait_for(both(), 60))
    assert (len(first.tokens), len(second.tokens)) == (500, 5)
    assert first.text == generate(decoder, tokenizer, "the", max_tokens=500, temperature=0).text
    assert second.text == generate(decoder, tokenizer, "a", max_tokens=5, temperature=0).text


def test_a_page_of_another_name_is_refused_where_there_is_no_key(run: Path, url: str) -> None:
    """DNS rebinding: a site's own name, with this machine's address behind it."""
    process, said = start(run)
    try:
        port = said["url"].removesuffix("/v1").rsplit(":", 1)[1]
        for name, status in ((f"localhost:{port}", 200), (f"[::1]:{port}", 200), ("evil.example", 403)):
            assert httpx.get(f"{said['url']}/models", headers={"Host": name}).status_code == status, name
        refused = post(said["url"], "/completions", ENDLESS, headers={
            "Host": "evil.example", "Content-Type": "application/json",
        })  # fmt: skip
        assert "use 127.0.0.1 or localhost" in refused.json()["error"]["message"]
    finally:
        process.terminate()
        process.wait()
    with_key = {"Host": "my.example", "Authorization": f"Bearer {KEY}"}
    assert httpx.get(f"{url}/models", headers=with_key).status_code == 200


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_in_order(run: Path, number: signal.Signals) -> None:
    process, said = start(run)
    try:
        body = {**ENDLESS, "max_tokens": 2000, "stream": True}
        with httpx.stream("POST", f"{said['url']}/completions", json=body, timeout=60) as answer:
            lines = answer.iter_lines()
            next(lines)
            process.send_signal(number)
            *_, last = (line for line in lines if line)
        assert last == "data: [DONE]"  # who is being answered is answered to the end
        assert process.wait(30) == 0
    finally:
        process.kill()
        process.wait()


def test_a_second_signal_ends_it_at_once_and_quietly(run: Path) -> None:
    """Though somebody is being let in, whose request does not come."""
    process, said = start(run, stderr=subprocess.PIPE)
    try:
        with socket.create_connection(
            ("127.0.0.1", int(said["url"].split(":")[2].partition("/")[0]))
        ) as client:
            head = "POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 99\r\n"
            client.sendall(f"{head}Content-Type: application/json\r\nExpect: 100-continue\r\n\r\n".encode())
            assert b"100 Continue" in client.recv(100)  # it is reading
            process.send_signal(signal.SIGINT)
            time.sleep(0.7)
            assert process.poll() is None
            process.send_signal(signal.SIGINT)
            _, error = process.communicate(timeout=5)
        assert (process.returncode, error) == (130, "")
    finally:
        process.kill()
        process.wait()


def test_a_model_without_markers_completes_but_does_not_chat(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = make_tokenizer()
    monkeypatch.setattr(plain, "special_ids", {"<|endoftext|>": 0})
    assert read_request("completion", {"model": "m", "prompt": "a"}, "m", plain, 99, 0).prompt_ids[0] == 0
    body = {"model": "m", "messages": [{"role": "user", "content": "a"}]}
    with pytest.raises(Refused, match="/v1/completions") as refused:
        read_request("chat", body, "m", plain, 99, 0)
    assert (refused.value.status, refused.value.code) == (400, "model_cannot_chat")


def call(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "albor", "serve", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


def test_what_cannot_be_served_is_said_in_one_line(run: Path) -> None:
    unset = call(run, "--api-key-env", "NO_SUCH_KEY")
    assert (unset.returncode, "NO_SUCH_KEY" in unset.stderr, unset.stderr.count("\n")) == (2, True, 1)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        result = call(run, "--port", taken.getsockname()[1])
    assert (result.returncode, result.stdout) == (1, "")
    assert "take another --port" in result.stderr
