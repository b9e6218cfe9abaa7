"""What is measured, each as one function that returns plain numbers (seconds, bytes)."""

import http.client
import json
import socket
import ssl
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from bench import load
from bench.backend import Backend
from bench.contenders import Contender, Endpoint, Start
from bench.processes import Child, http_get
from bench.workloads import BODY, HEADERS, TOOL_RESULT

FIRST_EVENT = b"notifications/message"


@dataclass(frozen=True, slots=True)
class Speed:
    """One contender under one workload and one number of connections."""

    rate: float
    """Requests a second."""
    p50: float
    p99: float
    cpu: float | None
    """Seconds of CPU per request, of the proxy alone; None for direct traffic."""


class UnexpectedResponse(Exception):
    """A contender did not answer with the upstream's response, so its numbers would mean nothing."""


def verify(contender: Contender, workload: str) -> None:
    """Send one request and compare the result with the upstream's; raise UnexpectedResponse if it differs."""
    endpoint = contender.endpoints[workload]
    if endpoint.authority:
        context = ssl.create_default_context(cafile=str(endpoint.authority))
        connection: http.client.HTTPConnection = http.client.HTTPSConnection(
            "127.0.0.1", endpoint.port, timeout=30, context=context
        )
    else:
        connection = http.client.HTTPConnection("127.0.0.1", endpoint.port, timeout=30)
    connection.request("POST", endpoint.path, BODY, dict(HEADERS + endpoint.headers))
    response = connection.getresponse()
    body = response.read()
    connection.close()
    if response.status != 200 or content_of(body) != TOOL_RESULT["content"]:
        text = body[:500].decode(errors="replace")
        raise UnexpectedResponse(f"{contender.name}, {workload}: {response.status} {text}")


def content_of(body: bytes) -> object:
    """Return the content of the tool result in a JSON body or in an event stream of one event, or None."""
    text = body.decode(errors="replace")
    if text.startswith("event: "):
        text = next((line for line in text.splitlines() if line.startswith("data: ")), "").removeprefix("data: ")
    try:
        return json.loads(text)["result"]["content"]
    except (ValueError, LookupError, TypeError):
        return None


def speed(contender: Contender, workload: str, *, connections: int, seconds: float) -> Speed:
    """Put load on ``contender``; raise UnexpectedResponse if a request fails."""
    before = contender.child.cpu_seconds() if contender.child else 0.0
    done = load.run(contender.endpoints[workload], connections=connections, seconds=seconds)
    if done.errors or not done.requests:
        raise UnexpectedResponse(f"{contender.name}, {workload}: {done.errors} of {done.requests} requests failed")
    cpu = (contender.child.cpu_seconds() - before) / done.requests if contender.child else None
    return Speed(done.rate, done.p50, done.p99, cpu)


def summary(rounds: list[Speed]) -> Speed:
    """Return the median of each number, but the lowest p50: whatever else runs on the machine can only add to it."""
    cpus = [one.cpu for one in rounds if one.cpu is not None]
    return Speed(
        median(one.rate for one in rounds),
        min(one.p50 for one in rounds),
        median(one.p99 for one in rounds),
        median(cpus) if cpus else None,
    )


def stream_memory(contender: Contender, counts: list[int]) -> list[float]:
    """Return the bytes of the proxy's memory per held event stream, for each of the growing ``counts``."""
    child = require_child(contender)
    endpoint = contender.endpoints["stream"]
    held: list[socket.socket] = [open_stream(endpoint)]  # the first one pays for code and grant
    empty = child.resident_bytes()
    found = []
    try:
        for count in counts:
            held += [open_stream(endpoint) for _ in range(count - len(held) + 1)]
            settle(child)
            found.append((child.resident_bytes() - empty) / count)
    finally:
        for connection in held:
            connection.close()
    return found


def open_stream(endpoint: Endpoint) -> socket.socket:
    """Return a connection with a GET event stream on which the first event has come."""
    connection = socket.create_connection(("127.0.0.1", endpoint.port), timeout=30)
    connection.sendall(get_request(endpoint, ("Accept", "text/event-stream")))
    received = b""
    while FIRST_EVENT not in received:
        part = connection.recv(4096)
        if not part:
            raise UnexpectedResponse(f"a stream ended at once: {received[:300].decode(errors='replace')}")
        received += part
    return connection


def get_request(endpoint: Endpoint, *fields: tuple[str, str]) -> bytes:
    lines = [f"GET {endpoint.path} HTTP/1.1", f"Host: 127.0.0.1:{endpoint.port}"]
    lines += [f"{name}: {value}" for name, value in (*fields, *endpoint.headers)]
    return "\r\n".join([*lines, "", ""]).encode()


def settle(child: Child) -> None:
    """Wait until memory stops changing, three seconds at most."""
    last = -1
    for _ in range(30):
        now = child.resident_bytes()
        if now == last:
            return
        last = now
        time.sleep(0.1)


def download_rate(contender: Contender, size: int) -> float:
    """Return the bytes a second of one body of ``size`` bytes, read as fast as it comes."""
    endpoint = contender.endpoints["blob"]
    with socket.create_connection(("127.0.0.1", endpoint.port), timeout=30) as connection:
        buffer = bytearray(1 << 20)
        received = 0
        started = time.perf_counter()
        connection.sendall(get_request(endpoint, ("Connection", "close")))
        while received < size and (count := connection.recv_into(buffer)):
            received += count
        elapsed = time.perf_counter() - started
    if received < size:
        raise UnexpectedResponse(f"{contender.name}: the body ended after {received} of {size} bytes")
    return received / elapsed


def start_up(start: Start, folder: Path, backend: Backend, *, times: int) -> tuple[float, int]:
    """Return the seconds from start to readiness, and the bytes resident then; the median of ``times`` starts."""
    seconds, memory = [], []
    for _ in range(times):
        contender = start(folder, backend)
        settle(require_child(contender))
        seconds.append(contender.ready_seconds)
        memory.append(require_child(contender).resident_bytes())
        contender.stop()
    return median(seconds), int(median(memory))


def many_servers(one: Contender, many: Contender, *, rounds: int, seconds: float) -> tuple[float, float]:
    """Return p50 at one connection with one configured server and with many, measured in turns."""
    first: list[float] = []
    second: list[float] = []
    for _ in range(rounds):
        first.append(speed(one, "json", connections=1, seconds=seconds).p50)
        second.append(speed(many, "json", connections=1, seconds=seconds).p50)
    return min(first), min(second)


def fetch_grants(contender: Contender) -> None:
    """Make the proxy obtain its grant for the large body, so that no measure includes it."""
    endpoint = contender.endpoints["blob"]
    if http_get(endpoint.port, endpoint.path, timeout=20.0) != 200:
        raise UnexpectedResponse(f"{contender.name} does not forward the large body")


def require_child(contender: Contender) -> Child:
    if contender.child is None:
        raise ValueError(f"{contender.name} has no process of its own")
    return contender.child
