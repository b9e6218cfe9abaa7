"""Who is refreshing a grant, and whether that process still lives."""

import os
import re
import secrets
import socket
from pathlib import Path

LONGEST = 60.0
"""Seconds after which a refresh that nobody finished may be begun anew by another."""

_HOST = socket.gethostname().replace(":", "-")
_OWNER = re.compile(r"(?P<host>[^:]+):(?P<pid>[0-9]{1,9}):(?:(?P<start>[0-9]+)\.)?[^:]*")
_STATE, _START = 0, 19  # fields of /proc/PID/stat after the name: proc(5) counts them as 3 and 22
_DEAD_STATES = ("Z", "X", "x")


def new_owner() -> str:
    """A name for this process in leases: ``host:pid:start.random``, where start tells a reused pid apart."""
    pid = os.getpid()
    found = _process(pid)
    return f"{_HOST}:{pid}:{found[1] if found else ''}.{secrets.token_hex(8)}"


def is_held(owner: str, begun_at: float, now: float) -> bool:
    """Whether a refresh begun at ``begun_at`` (Unix seconds) may still be on its way.

    A dead process of this machine holds nothing: its successor must not let the few seconds pass in which servers
    still accept the previous refresh token. Of other machines only the age is known.
    """
    # Either way round: after a jump of the clock a begin in the future must not hold for the length of the jump.
    if abs(now - begun_at) > LONGEST:
        return False
    found = _OWNER.fullmatch(owner)
    if found is None or found["host"] != _HOST:
        return True
    return _is_alive(int(found["pid"]), found["start"] or "")


def _is_alive(pid: int, start: str) -> bool:
    if Path("/proc/self/stat").exists():
        found = _process(pid)
        return found is not None and found[0] not in _DEAD_STATES and start in ("", found[1])
    if os.name != "posix":
        # On Windows os.kill would end the process instead of asking for it.
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


def _process(pid: int) -> tuple[str, str] | None:
    """State and start time (clock ticks since boot) of a process; None where it, or /proc, is not there."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text("utf-8", "replace")
    except OSError:
        return None
    fields = text.rpartition(")")[2].split()
    return fields[_STATE], fields[_START]
