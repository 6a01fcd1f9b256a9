"""One line on stderr that says what is going on."""

import re
import shutil
import sys
import time
from typing import Self, TextIO

_COUNT = re.compile(r"\b\d+(?:[./]\d+)?\b")
_QUIET_INTERVAL_S = 15.0


class ProgressLine:
    """Show messages in place on a terminal, and sparingly in a log.

    Call it with a message. On a terminal each replaces the one before and the last vanishes at the
    end. Elsewhere a message is written when it differs in more than its numbers, or every 15 s.
    """

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = sys.stderr if stream is None else stream
        self._in_place = self._stream.isatty()
        self._stage = ""
        self._written_at = 0.0

    def __call__(self, message: str) -> None:
        """Show a message of one line."""
        if self._in_place:
            width = shutil.get_terminal_size().columns - 1
            self._stream.write(f"\r\x1b[K{message[:width]}")
            self._stream.flush()
            return
        stage = _COUNT.sub("#", message)
        now = time.monotonic()
        if stage != self._stage or now - self._written_at >= _QUIET_INTERVAL_S:
            self._stage = stage
            self._written_at = now
            self._stream.write(message + "\n")
            self._stream.flush()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._in_place:
            self._stream.write("\r\x1b[K")
            self._stream.flush()
