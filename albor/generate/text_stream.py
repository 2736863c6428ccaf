"""From tokens' bytes to text that can be shown: whole characters, and nothing of a stop string."""

from __future__ import annotations

import codecs
from collections.abc import Sequence

from albor.errors import ConfigError, Problem


class TextStream:
    """Takes bytes as they are generated, and gives text as soon as it is certain.

    A character's first bytes wait for its last; bytes that cannot become a character are U+FFFD. What could
    be the beginning of a stop string waits until it is one or cannot be one. The result does not depend on
    how the bytes are cut into tokens.
    """

    def __init__(self, stop: Sequence[str] = ()):
        if "" in stop:
            raise ConfigError(
                [Problem("stop", "is empty, and would stop before the first token", "leave it out")]
            )
        self.stopped = False  # a stop string has occurred; what is pushed from then on is ignored
        self._stop = tuple(stop)
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._held = ""

    def push(self, data: bytes) -> str:
        """The text that is certain now. A stop string, and what follows it, is never given out."""
        if self.stopped:
            return ""
        self._held += self._decoder.decode(data)
        # The stop string that ends first is the one that an observer of single characters would see.
        ends = [(start + len(stop), start) for stop in self._stop if (start := self._held.find(stop)) >= 0]
        if ends:
            self.stopped = True
            return self._release(min(ends)[1])
        return self._release(len(self._held) - self._doubtful())

    def finish(self) -> str:
        """The text that waited for a stop string. A character that was left unfinished is dropped."""
        return "" if self.stopped else self._release(len(self._held))

    def _release(self, count: int) -> str:
        text, self._held = self._held[:count], self._held[count:]
        return text

    def _doubtful(self) -> int:
        """Characters at the end that are the beginning of a stop string."""
        longest = min(max(map(len, self._stop), default=0) - 1, len(self._held))
        lengths = (n for n in range(longest, 0, -1) if any(s.startswith(self._held[-n:]) for s in self._stop))
        return next(lengths, 0)
