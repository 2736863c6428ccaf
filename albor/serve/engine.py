"""The model behind the server: one text at a time, in a thread, and a short queue before it."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncGenerator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing

from albor.data.tokenizer import Tokenizer
from albor.generate.generate import EndWriting, Generation, write
from albor.model.decode import Decoder
from albor.serve.requests import Asked, Refused

Piece = str | Generation  # of an answer: text as it is written, and at last the whole


class Engine:
    """Writes for one request at a time; at most `waiting` others wait for their turn, and more are refused.

    Nothing of one request is left for the next, so equal requests with equal seeds get equal answers. The
    decoder is called in one thread only, for torch's number of threads is a thread's own.
    """

    def __init__(self, decoder: Decoder, tokenizer: Tokenizer, waiting: int):
        self.decoder, self.tokenizer, self._waiting = decoder, tokenizer, waiting
        self._slot = asyncio.Semaphore(1)
        self._present = 0  # requests that write or wait
        self._thread = ThreadPoolExecutor(1, "decoder")

    async def pieces(self, asked: Asked) -> AsyncGenerator[Piece, None]:
        """The answer's text in pieces, and then the whole generation.

        Whoever stops iterating (`aclose`) ends the writing, and the slot is free once it ended. Raises
        Refused where too many wait, before the first piece, and what `write` raises.
        """
        if self._present > self._waiting:
            raise Refused(503, f"{self._present} requests are being answered or wait; try again later")
        self._present += 1
        try:
            async with self._slot, aclosing(self._write(asked)) as pieces:
                async for piece in pieces:
                    yield piece
        finally:
            self._present -= 1

    async def _write(self, asked: Asked) -> AsyncGenerator[Piece, None]:
        loop, given_up = asyncio.get_running_loop(), threading.Event()
        pieces: asyncio.Queue[str | None] = asyncio.Queue()

        def on_token() -> None:
            if given_up.is_set():
                raise EndWriting

        def work() -> Generation:
            try:
                return write(
                    self.decoder, self.tokenizer, asked.prompt_ids, asked.settings,
                    on_text=lambda piece: _tell(loop, pieces, piece), on_token=on_token,
                )  # fmt: skip
            finally:
                _tell(loop, pieces, None)

        writing = loop.run_in_executor(self._thread, work)
        try:
            while (piece := await pieces.get()) is not None:
                yield piece
            yield await writing
        finally:
            given_up.set()
            # The next request must not begin before this one's last token is done, whoever cancels us.
            await _ended(writing)

    def close(self) -> None:
        """Ends the thread."""
        self._thread.shutdown(cancel_futures=True)


def _tell(loop: asyncio.AbstractEventLoop, queue: asyncio.Queue[str | None], piece: str | None) -> None:
    call: Callable[[str | None], None] = queue.put_nowait
    loop.call_soon_threadsafe(call, piece)


async def _ended(writing: asyncio.Future[Generation]) -> None:
    """Waits for the thread even while this task is being cancelled: a token takes milliseconds."""
    while not writing.done():
        try:
            await asyncio.wait([writing])
        except asyncio.CancelledError:
            continue
    if not writing.cancelled():
        writing.exception()  # looked at, so that asyncio does not complain of one that nobody awaited
