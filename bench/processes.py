"""Child processes of the benchmark: start them, watch them through /proc, and end them by their own id."""

import os
import resource
import socket
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

TICKS = os.sysconf("SC_CLK_TCK")
PAGE = os.sysconf("SC_PAGE_SIZE")


def free_port() -> int:
    """Return a port of the loopback on which nothing listens now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def raise_file_limit() -> int:
    """Let this process and its children open as many files as the system allows; return how many."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return hard


def http_get(port: int, path: str, timeout: float = 5.0) -> int:
    """Return the status of one GET, 0 if there is no answer."""
    request = f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nConnection: close\r\n\r\n"
    try:
        with socket.create_connection(("127.0.0.1", port), timeout) as connection:
            connection.sendall(request.encode())
            head = connection.recv(64).split()
    except OSError:
        return 0
    return int(head[1]) if len(head) > 1 else 0


class Child:
    """One server under test, with the processes that it starts itself."""

    def __init__(self, command: Sequence[str], *, log: Path, environment: Mapping[str, str] | None = None) -> None:
        self.log = log
        self.started = time.perf_counter()
        with log.open("wb") as output:
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env={**os.environ, **(environment or {})},
                cwd=log.parent,
            )

    def wait_for(self, port: int, path: str | None = None, *, deadline: float = 30.0) -> float:
        """Return the seconds from the start until ``path`` answers 200 or, without a path, the port is open.

        Raises RuntimeError with the end of the log after ``deadline`` seconds, or if the process ends.
        """
        while time.perf_counter() - self.started < deadline:
            if self.process.poll() is not None:
                break
            if self.answers(port, path):
                return time.perf_counter() - self.started
            time.sleep(0.004)
        tail = self.log.read_text(errors="replace")[-2000:]
        code = self.process.poll()
        self.stop()
        fate = f"was not ready within {deadline:.0f} s" if code is None else f"ended with exit code {code}"
        raise RuntimeError(f"{self.process.args!r} {fate}:\n{tail}")

    def answers(self, port: int, path: str | None) -> bool:
        if path is not None:
            return http_get(port, path) == 200
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", port)) == 0

    def pids(self) -> list[int]:
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        return [self.process.pid, *map(int, children)]

    def cpu_seconds(self) -> float:
        """Return the seconds of user and system time spent so far."""
        return sum(cpu_ticks(pid) for pid in self.pids()) / TICKS

    def resident_bytes(self) -> int:
        """Return the resident memory. Pages that a master shares with its workers count once per process."""
        return sum(int(Path(f"/proc/{pid}/statm").read_text().split()[1]) for pid in self.pids()) * PAGE

    def stop(self) -> None:
        """Send SIGTERM, and SIGKILL after five seconds."""
        self.process.terminate()
        try:
            self.process.wait(5)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


def cpu_ticks(pid: int) -> int:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return int(fields[11]) + int(fields[12])
