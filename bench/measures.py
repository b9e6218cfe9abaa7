"""What is measured, each as one function that returns plain numbers (seconds, bytes)."""

import http.client
import json
import socket
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from bench import load
from bench.contenders import Backend, Contender, Start, wake
from bench.origin import TOOL_RESULT
from bench.processes import Child

FIRST_EVENT = b"notifications/message"


@dataclass(frozen=True, slots=True)
class Speed:
    """One contender under one number of connections."""

    rate: float
    p50: float
    p99: float
    cpu: float | None
    """Seconds of CPU per request, of the proxy alone; None for direct traffic."""


class Wrong(Exception):
    """A contender answered something else than what was asked for: its numbers would mean nothing."""


def verify(contender: Contender) -> None:
    """Asks once and compares the result with the upstream's."""
    connection = http.client.HTTPConnection("127.0.0.1", contender.port, timeout=30)
    connection.request("POST", contender.path, load.BODY, dict(load.HEADERS + contender.headers))
    response = connection.getresponse()
    body = response.read()
    connection.close()
    if response.status != 200 or json.loads(body)["result"]["content"] != TOOL_RESULT["content"]:
        raise Wrong(f"{contender.name} answered {response.status}: {body[:500].decode(errors='replace')}")


def speed(contender: Contender, *, connections: int, seconds: float) -> Speed:
    before = contender.child.cpu_seconds() if contender.child else 0.0
    seen = load.run(contender, connections=connections, seconds=seconds)
    if seen.errors or not seen.requests:
        raise Wrong(f"{contender.name}: {seen.errors} of {seen.requests} requests failed")
    cpu = (contender.child.cpu_seconds() - before) / seen.requests if contender.child else None
    return Speed(seen.rate, seen.p50, seen.p99, cpu)


def middle(rounds: list[Speed]) -> Speed:
    """The median of each number, but the lowest p50: what else runs on the machine can only add to it."""
    cpus = [one.cpu for one in rounds if one.cpu is not None]
    return Speed(
        median(one.rate for one in rounds),
        min(one.p50 for one in rounds),
        median(one.p99 for one in rounds),
        median(cpus) if cpus else None,
    )


def stream_memory(contender: Contender, path: str, counts: list[int]) -> list[float]:
    """Bytes of the proxy's memory per held event stream, for each of the growing ``counts``."""
    child = require_child(contender)
    held: list[socket.socket] = [open_stream(contender.port, path)]  # the first pays for code and grant
    empty = child.resident_bytes()
    found = []
    try:
        for count in counts:
            held += [open_stream(contender.port, path) for _ in range(count - len(held) + 1)]
            settle(child)
            found.append((child.resident_bytes() - empty) / count)
    finally:
        for connection in held:
            connection.close()
    return found


def open_stream(port: int, path: str) -> socket.socket:
    """A GET event stream on which the first event has come."""
    connection = socket.create_connection(("127.0.0.1", port), timeout=30)
    head = f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nAccept: text/event-stream\r\n\r\n"
    connection.sendall(head.encode())
    seen = b""
    while FIRST_EVENT not in seen:
        part = connection.recv(4096)
        if not part:
            raise Wrong(f"a stream ended at once: {seen[:300].decode(errors='replace')}")
        seen += part
    return connection


def settle(child: Child) -> None:
    """Waits, three seconds at most, until memory stands still."""
    last = -1
    for _ in range(30):
        now = child.resident_bytes()
        if now == last:
            return
        last = now
        time.sleep(0.1)


def download_rate(contender: Contender, path: str, size: int) -> float:
    """Bytes a second of one body of ``size`` bytes, read as fast as it comes."""
    fields = [f"GET {path} HTTP/1.1", f"Host: 127.0.0.1:{contender.port}", "Connection: close"]
    fields += [f"{name}: {value}" for name, value in contender.headers]
    with socket.create_connection(("127.0.0.1", contender.port), timeout=30) as connection:
        buffer = bytearray(1 << 20)
        received = 0
        begun = time.perf_counter()
        connection.sendall("\r\n".join([*fields, "", ""]).encode())
        while received < size and (count := connection.recv_into(buffer)):
            received += count
        elapsed = time.perf_counter() - begun
    if received < size:
        raise Wrong(f"{contender.name}: the body ended after {received} of {size} bytes")
    return received / elapsed


def start_up(start: Start, folder: Path, backend: Backend, *, times: int) -> tuple[float, int]:
    """Seconds from the start of the process until it is ready, and bytes resident then; the median of ``times``."""
    seconds, memory = [], []
    for _ in range(times):
        contender = start(folder, backend)
        settle(require_child(contender))
        seconds.append(contender.ready_seconds)
        memory.append(require_child(contender).resident_bytes())
        contender.stop()
    return median(seconds), int(median(memory))


def many_servers(one: Contender, many: Contender, *, rounds: int, seconds: float) -> tuple[float, float]:
    """p50 at one connection with one configured server and with many; taken in turns."""
    first: list[float] = []
    second: list[float] = []
    for _ in range(rounds):
        first.append(speed(one, connections=1, seconds=seconds).p50)
        second.append(speed(many, connections=1, seconds=seconds).p50)
    return min(first), min(second)


def fetch_grants(contender: Contender) -> None:
    """Has the proxy obtain its grants for the stream and the body, so that no measure includes it."""
    if wake(contender, "/blob/mcp") != 200:
        raise Wrong(f"{contender.name} does not forward the large body")


def require_child(contender: Contender) -> Child:
    if contender.child is None:
        raise ValueError(f"{contender.name} has no process of its own")
    return contender.child
