"""The model behind the server: one text at a time, in a thread, and a short queue before it."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncGenerator, Callable
from concurrent.futures import ThreadPoolExecutor

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

        What is written waits here for whoever iterates: the slot is free when the writing has ended, however
        slowly it is read. Whoever stops iterating (`aclose`) ends the writing. Raises Refused where too many
        wait, before the first piece, and what `write` raises.
        """
        if self._present > self._waiting:
            raise Refused(503, f"{self._present} requests are being answered or wait; try again later")
        pieces: asyncio.Queue[str | None] = asyncio.Queue()  # never more than the context holds
        given_up = threading.Event()
        self._present += 1
        writing = asyncio.ensure_future(self._write(asked, pieces, given_up))
        writing.add_done_callback(self._left)
        try:
            while (piece := await pieces.get()) is not None:
                yield piece
            yield await writing
        finally:
            given_up.set()  # heard before the next token; who writes next comes after it in the one thread
            writing.cancel()

    def _left(self, writing: asyncio.Future[Generation]) -> None:
        self._present -= 1
        if not writing.cancelled():
            writing.exception()  # looked at, so that asyncio does not complain of one that nobody awaited

    async def _write(
        self, asked: Asked, pieces: asyncio.Queue[str | None], given_up: threading.Event
    ) -> Generation:
        """Writes to `pieces`, behind whoever has the slot; None is the end."""
        loop = asyncio.get_running_loop()

        def on_token() -> None:
            if given_up.is_set():
                raise EndWriting

        def work() -> Generation:
            return write(
                self.decoder, self.tokenizer, asked.prompt_ids, asked.settings,
                on_text=lambda piece: _tell(loop, pieces, piece), on_token=on_token,
            )  # fmt: skip

        try:
            async with self._slot:
                return await loop.run_in_executor(self._thread, work)
        finally:
            pieces.put_nowait(None)

    def close(self) -> None:
        """Ends the thread."""
        self._thread.shutdown(cancel_futures=True)


def _tell(loop: asyncio.AbstractEventLoop, queue: asyncio.Queue[str | None], piece: str | None) -> None:
    call: Callable[[str | None], None] = queue.put_nowait
    loop.call_soon_threadsafe(call, piece)
