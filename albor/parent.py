"""A process that ends with the one that started it, however that ends: not even SIGKILL leaves an orphan."""

from __future__ import annotations

import os
import signal
import threading
import time

_POLL_SECONDS = 1.0


def end_with(parent: int) -> None:
    """From here on this process and its workers end soon after the process `parent`, which started it."""
    threading.Thread(target=_watch, args=(parent,), daemon=True).start()


def _watch(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(_POLL_SECONDS)
    if (
        os.getpgrp() == os.getpid()
    ):  # a group of its own, as whoever starts one gives it; else not ours to end
        os.killpg(0, signal.SIGKILL)
    os._exit(1)
