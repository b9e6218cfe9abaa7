"""Standard error of a bridge: clients need not read it (MCP, stdio), and must not be waited for then."""

import io
import logging
import os
import select
import sys

STDERR = 2

_WAIT = 0.05
"""Seconds for the reader to make room."""


def write_or_drop(data: bytes) -> None:
    """Write bytes to standard error, as long as there is room for them. What is left is dropped."""
    try:
        while data and select.select([], [STDERR], [], _WAIT)[1]:
            # A pipe that can be written to takes this much at once.
            data = data[os.write(STDERR, data[: select.PIPE_BUF]) :]
    except OSError:
        # It is closed. The bridge goes on.
        return


class LogOutput(io.TextIOBase):
    """The stream that a bridge logs to."""

    def write(self, text: str) -> int:
        write_or_drop(text.encode(errors="replace"))
        return len(text)


def log_without_waiting() -> None:
    """Let what this process writes to standard error wait for nobody."""
    sys.stderr = LogOutput()
    for handler in logging.getLogger().handlers:
        if isinstance(handler, logging.StreamHandler):
            handler.setStream(sys.stderr)
