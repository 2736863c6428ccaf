"""The HTTP side of `albor serve`: routes, streams and errors in the form that OpenAI's clients expect."""

from __future__ import annotations

import asyncio
import hmac
import ipaddress
import json
import secrets
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from albor import __version__
from albor.errors import AlborError
from albor.generate.generate import Generation
from albor.serve.engine import Engine, Piece
from albor.serve.requests import Asked, Kind, Refused, read_request

_LARGEST_BODY = 4 * 2**20
_OBJECTS = {
    ("completion", False): "text_completion",
    ("completion", True): "text_completion",
    ("chat", False): "chat.completion",
    ("chat", True): "chat.completion.chunk",
}
_ENDS = {
    "end_of_document": "stop", "end_of_turn": "stop", "stop_string": "stop", "length": "length",
    "context_full": "length",
}  # fmt: skip

Handler = Callable[[Request], Awaitable[Response]]


class Service:
    """The routes over one model, which clients know as `model_id`.

    Without a key a `local` service, which only this machine reaches, is asked for by its address or as
    localhost: a web page whose site gave itself this machine's address (DNS rebinding) has its own name.
    """

    def __init__(self, engine: Engine, model_id: str, api_key: str | None, *, local: bool):
        self._engine, self._model_id, self._api_key = engine, model_id, api_key
        self._by_address_only = local and api_key is None
        self._created = int(time.time())

    def application(self) -> Starlette:
        """The ASGI application."""
        return Starlette(
            routes=[
                Route("/health", self._health),
                Route("/v1/models", self._guarded(self._models)),
                Route("/v1/models/{model_id:path}", self._guarded(self._model)),
                Route("/v1/completions", self._guarded(self._completions), methods=["POST"]),
                Route("/v1/chat/completions", self._guarded(self._chat), methods=["POST"]),
            ],
            exception_handlers={
                Refused: _on_refused,
                ClientDisconnect: _on_gone,
                AlborError: _on_failure,
                HTTPException: _on_http,
                Exception: _on_bug,
            },
        )

    def _guarded(self, handler: Handler) -> Handler:
        async def checked(request: Request) -> Response:
            if self._api_key is not None:
                given = request.headers.get("authorization", "")
                wanted = f"Bearer {self._api_key}"
                if not hmac.compare_digest(given.encode(), wanted.encode()):
                    raise Refused(401, "the API key is missing or wrong", code="invalid_api_key")
            elif self._by_address_only and not _is_address(request.url.hostname):
                name = request.url.hostname
                raise Refused(
                    403, f"not as {name!r}: use 127.0.0.1 or localhost, or start it with --api-key-env"
                )
            return await handler(request)

        return checked

    async def _health(self, request: Request) -> Response:
        return JSONResponse({"status": "ok", "version": __version__})

    async def _models(self, request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [self._described()]})

    async def _model(self, request: Request) -> Response:
        asked = request.path_params["model_id"]
        if asked != self._model_id:
            raise Refused(404, f"there is no model {asked!r} here", "model", "model_not_found")
        return JSONResponse(self._described())

    def _described(self) -> dict[str, Any]:
        return {"id": self._model_id, "object": "model", "created": self._created, "owned_by": "albor"}

    async def _completions(self, request: Request) -> Response:
        return await self._answer(request, "completion")

    async def _chat(self, request: Request) -> Response:
        return await self._answer(request, "chat")

    async def _answer(self, request: Request, kind: Kind) -> Response:
        body, engine = await _read_json(request), self._engine
        context, seed = engine.decoder.context, secrets.randbits(62)
        asked = await asyncio.to_thread(
            read_request, kind, body, self._model_id, engine.tokenizer, context, seed
        )
        head = {
            "id": f"{'cmpl' if kind == 'completion' else 'chatcmpl'}-{secrets.token_hex(12)}",
            "object": _OBJECTS[kind, asked.stream],
            "created": int(time.time()),
            "model": self._model_id,
            "system_fingerprint": f"albor-{__version__}",
        }
        if not asked.stream:
            generation = await _unless_gone(request, self._whole(asked))
            return JSONResponse({
                **head,
                "choices": [_choice(kind, generation.text, _ENDS[generation.stop_reason])],
                "usage": _usage(generation),
            })  # fmt: skip
        pieces = engine.pieces(asked)
        # What is refused is refused with its status, before the stream has begun with a 200.
        try:
            first = await _unless_gone(request, anext(pieces))
        except BaseException:
            await pieces.aclose()
            raise
        return _Stream(_events(head, asked, first, pieces), pieces)

    async def _whole(self, asked: Asked) -> Generation:
        async with aclosing(self._engine.pieces(asked)) as pieces:
            async for piece in pieces:
                last = piece
        assert isinstance(last, Generation)
        return last


class _Stream(StreamingResponse):
    """Server-sent events; when the response ends, sent or not, so does the writing behind it."""

    def __init__(self, events: AsyncGenerator[str, None], pieces: AsyncGenerator[Piece, None]):
        super().__init__(events, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        self._events, self._pieces = events, pieces

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with aclosing(self._pieces), aclosing(self._events):
            await super().__call__(scope, receive, send)


def _is_address(host: str | None) -> bool:
    if host == "localhost":
        return True
    try:
        ipaddress.ip_address(host or "")
    except ValueError:
        return False
    return True


async def _read_json(request: Request) -> Any:
    # A browser asks before it sends this type to another site's server; so no other site's page can use it.
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise Refused(415, "the Content-Type has to be application/json")
    body = bytearray()
    async for part in request.stream():
        body += part
        if len(body) > _LARGEST_BODY:
            raise Refused(413, f"the body is larger than the {_LARGEST_BODY:,} bytes that are read")
    try:
        return json.loads(body)
    except (ValueError, RecursionError) as error:
        raise Refused(400, f"the body is no JSON: {error}") from error


async def _unless_gone(request: Request, work: Awaitable[Any]) -> Any:
    """What `work` gives; a client that goes away cancels it, and ClientDisconnect is raised."""
    working = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(_gone(request))
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientDisconnect
        return working.result()
    finally:
        for task in (working, leaving):
            task.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _events(
    head: dict[str, Any], asked: Asked, first: Piece, pieces: AsyncGenerator[Piece, None]
) -> AsyncGenerator[str, None]:
    """What is sent of a stream, until its end or the model's failure."""

    def event(choices: list[dict[str, Any]], usage: dict[str, int] | None = None) -> str:
        return _event({**head, "choices": choices, **({"usage": usage} if asked.include_usage else {})})

    try:
        if asked.kind == "chat":
            yield event([{"index": 0, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}])
        piece = first
        while isinstance(piece, str):
            yield event([_part(asked.kind, piece, None)])
            piece = await anext(pieces)
        yield event([_part(asked.kind, None, _ENDS[piece.stop_reason])])
        if asked.include_usage:
            yield event([], _usage(piece))
        yield "data: [DONE]\n\n"
    except AlborError as error:
        yield _event(_failure(error).body())


def _event(content: dict[str, Any]) -> str:
    return f"data: {json.dumps(content)}\n\n"


def _choice(kind: Kind, text: str, end: str) -> dict[str, Any]:
    said = {"text": text} if kind == "completion" else {"message": {"role": "assistant", "content": text}}
    return {"index": 0, **said, "logprobs": None, "finish_reason": end}


def _part(kind: Kind, text: str | None, end: str | None) -> dict[str, Any]:
    said: dict[str, Any] = {"text": text or ""}
    if kind == "chat":
        said = {"delta": {} if text is None else {"content": text}}
    return {"index": 0, **said, "logprobs": None, "finish_reason": end}


def _usage(generation: Generation) -> dict[str, int]:
    """Tokens read and written; one that only ended the text is not among them."""
    read, written = generation.prompt_tokens, len(generation.tokens)
    return {"prompt_tokens": read, "completion_tokens": written, "total_tokens": read + written}


def _failure(error: AlborError) -> Refused:
    return Refused(500, str(error), code=type(error).__name__)


async def _on_refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, Refused)
    headers = {401: {"WWW-Authenticate": "Bearer"}, 503: {"Retry-After": "1"}}.get(error.status)
    return JSONResponse(error.body(), error.status, headers)


async def _on_gone(request: Request, error: Exception) -> Response:
    return Response(status_code=499)  # which nobody receives


async def _on_failure(request: Request, error: Exception) -> Response:
    assert isinstance(error, AlborError)
    return await _on_refused(request, _failure(error))


async def _on_http(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    message = f"{request.method} {request.url.path}: {error.detail}"
    return JSONResponse(Refused(error.status_code, message).body(), error.status_code, error.headers)


async def _on_bug(request: Request, error: Exception) -> Response:
    return await _on_refused(
        request, Refused(500, "this is a bug in albor; the server's standard error says more")
    )
