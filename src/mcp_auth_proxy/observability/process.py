"""Measure this process (CPU, memory, files) for ``/metrics``, under the names that all Prometheus clients use.

Each function returns an empty mapping if the platform has no such number (/proc is Linux only).
"""

import os
import resource
import time
from collections.abc import Mapping
from pathlib import Path

_PROC = Path("/proc/self")
_STAT_START_TIME = 19
"""Index of ``starttime`` in /proc/PID/stat among the fields after the command's name (proc(5), field 22)."""

_IMPORTED_AT = time.time()

Sample = Mapping[tuple[str, ...], float]


def start_time() -> Sample:
    """Return when the process was started, in Unix seconds."""
    try:
        fields = (_PROC / "stat").read_text().rpartition(")")[2].split()
        lines = (_PROC.parent / "stat").read_text().splitlines()
        booted = next(float(line.split()[1]) for line in lines if line.startswith("btime "))
        return {(): booted + float(fields[_STAT_START_TIME]) / os.sysconf("SC_CLK_TCK")}
    except (OSError, StopIteration, IndexError, ValueError):
        return {(): _IMPORTED_AT}


def cpu_seconds() -> Sample:
    """Return the CPU time used, in user and system mode."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    return {(): used.ru_utime + used.ru_stime}


def resident_memory() -> Sample:
    """Return the resident memory, in bytes."""
    try:
        pages = int((_PROC / "statm").read_text().split()[1])
    except (OSError, IndexError, ValueError):
        return {}
    return {(): pages * resource.getpagesize()}


def open_files() -> Sample:
    """Return the number of open file descriptors."""
    try:
        # The listing itself takes one.
        return {(): len(os.listdir("/dev/fd")) - 1}
    except OSError:
        return {}


def max_files() -> Sample:
    """Return how many file descriptors may be open."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return {(): float("inf") if soft == resource.RLIM_INFINITY else soft}
