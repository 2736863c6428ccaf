"""`albor serve`: loads a run's model, listens, and ends in order when it is asked to."""

from __future__ import annotations

import ipaddress
import json
import os
import signal
import socket
import sys
import time
from pathlib import Path
from types import FrameType

from albor.errors import AlborError, ConfigError, Problem
from albor.memory.shortage import explained
from albor.signals import ONE_REQUEST_SECONDS

_GRACE_SECONDS = 10  # what a request that is being answered gets when the server is to end
_COMMAND_LINE = "command line"


class CannotListen(AlborError):
    """The address is taken, or is none of this machine's."""


def run_serve(
    run: Path, host: str, port: int, waiting: int, api_key_env: str | None, *, as_json: bool
) -> None:
    """Serves until SIGINT or SIGTERM; then no one new is let in, and who is being answered has some seconds.
    A second signal ends the process at once.

    Raises ConfigError where the extra is missing or the variable with the key is empty, CannotListen, and
    what `load_to_write` raises.
    """
    try:
        import starlette  # noqa: F401
        import uvicorn
    except ImportError as error:
        problem = f"needs {error.name}, which is not installed"
        remedy = "pip install 'albor[serve]'"
        raise ConfigError([Problem("albor serve", problem, remedy, _COMMAND_LINE)]) from error
    api_key = _read_key(api_key_env)
    with _listen(host, port) as listener, explained("find out what else uses it, or take a larger machine"):
        from albor.generate.load import load_to_write
        from albor.model.decode import Decoder
        from albor.serve.app import Service
        from albor.serve.engine import Engine

        loaded = load_to_write(run)
        engine = Engine(Decoder(loaded.model, loaded.arena), loaded.tokenizer, waiting)
        local = ipaddress.ip_address(listener.getsockname()[0]).is_loopback
        application = Service(engine, loaded.config.name, api_key, local=local).application()
        config = uvicorn.Config(
            application, log_level="warning", access_log=False, lifespan="off", ws="none",
            server_header=False, timeout_graceful_shutdown=_GRACE_SECONDS,
            loop="asyncio", http="h11",  # not what else happens to be installed
        )  # fmt: skip
        server = uvicorn.Server(config)
        asked: list[float] = []  # when a signal came

        def end(number: int, frame: FrameType | None) -> None:
            """The second one ends the process: uvicorn would say much about what it then breaks off."""
            asked.append(time.monotonic())
            if asked[-1] - asked[0] > ONE_REQUEST_SECONDS:
                os._exit(128 + number)
            server.should_exit = True

        server.handle_exit = end  # type: ignore[assignment, method-assign]

        # uvicorn's own, which it puts in place of those from before: but it may be asked before it runs.
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, end)
        _announce(
            listener, loaded.config.name, loaded.tokenizer.can_chat, local or api_key is not None, as_json
        )
        server.run(sockets=[listener])
        engine.close()


def _read_key(variable: str | None) -> str | None:
    if variable is None:
        return None
    key = os.environ.get(variable, "")
    if not key:
        problem = f"names {variable}, which is not set in the environment, or empty"
        raise ConfigError([Problem("--api-key-env", problem, where=_COMMAND_LINE)])
    return key


def _listen(host: str, port: int) -> socket.socket:
    """A listening socket. Taken before the model is loaded: what cannot work is known at once."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen()
    except OSError as error:
        raise CannotListen(
            f"cannot listen on {host} port {port}: {error.strerror}; take another --port or --host"
        ) from error
    return listener


def _announce(listener: socket.socket, model: str, chats: bool, is_safe: bool, as_json: bool) -> None:
    """Where clients find the server, on standard output: its port may have been 0."""
    host, port = listener.getsockname()[:2]
    url = f"http://{f'[{host}]' if ':' in host else host}:{port}/v1"
    if as_json:
        print(json.dumps({"url": url, "model": model, "can_chat": chats}), flush=True)
    else:
        print(f"{url} serves {model}; Ctrl-C ends it", flush=True)
        if not chats:
            print(
                "its tokenizer has no markers for the turns of a chat: /v1/completions only", file=sys.stderr
            )
    if not is_safe:
        print(f"albor: everyone who reaches {host} may use it; --api-key-env asks for a key", file=sys.stderr)
