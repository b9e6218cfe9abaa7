"""Owners of leases: which process holds one, and whether that process is still alive."""

import os
import re
import secrets
import socket
from pathlib import Path

LONGEST = 60.0
"""Seconds after which another process may start a refresh that was never finished."""

_HOST = socket.gethostname().replace(":", "-")
_OWNER = re.compile(r"(?P<host>[^:]+):(?P<pid>[0-9]{1,9}):(?:(?P<start>[0-9]+)\.)?[^:]*")
_STATE, _START = 0, 19  # fields of /proc/PID/stat after the name: proc(5) counts them as 3 and 22
_DEAD_STATES = ("Z", "X", "x")


def new_owner() -> str:
    """Return a name for this process as the owner of leases.

    It has the form ``host:pid:start.random``; the start time tells a process from a later one with the same pid.
    """
    pid = os.getpid()
    found = _process(pid)
    return f"{_HOST}:{pid}:{found[1] if found else ''}.{secrets.token_hex(8)}"


def is_held(owner: str, begun_at: float, now: float, *, longest: float = LONGEST) -> bool:
    """Return whether what ``owner`` began at ``begun_at`` (Unix seconds) may still be running.

    After ``longest`` seconds it counts as never finished.

    A lease of a dead process on this machine is free at once: servers accept the previous refresh token for a few
    seconds only, so its successor can't wait. Of a process on another machine only the age of the lease is known.
    """
    # abs(): after the clock was set back, a lease from the future must not last as long as the clock was off.
    if abs(now - begun_at) > longest:
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
        # On Windows os.kill ends the process instead of probing it.
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


def _process(pid: int) -> tuple[str, str] | None:
    """Return state and start time (clock ticks since boot) of a process; None if it, or /proc, does not exist."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text("utf-8", "replace")
    except OSError:
        return None
    fields = text.rpartition(")")[2].split()
    return fields[_STATE], fields[_START]
