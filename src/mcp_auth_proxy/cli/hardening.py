"""Keep the secrets of this process out of files: the key log of TLS, and core dumps."""

import contextlib
import ctypes
import os
import resource
import sys

_PR_SET_DUMPABLE = 4


def protect_process() -> None:
    """Ignore ``SSLKEYLOGFILE`` and allow no core dump, for as long as this process lives.

    Linux ignores ``RLIMIT_CORE`` if dumps are piped to a program, hence the second step (prctl(2), PR_SET_DUMPABLE). It
    also keeps debuggers of the same user away, and makes most files in ``/proc/PID`` unreadable to them.
    """
    # Every TLS context of Python writes its keys there, also those that libraries make.
    os.environ.pop("SSLKEYLOGFILE", None)
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0)
