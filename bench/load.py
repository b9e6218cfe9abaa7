"""One load generator for all contenders: wrk where it is installed, else ``python -m bench.load``.

The request is a stateless ``tools/call`` of MCP revision 2026-07-28, sent again and again on kept-alive
connections; each connection has one request on its way at a time.
"""

import asyncio
import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import httptools
import uvloop

from bench.contenders import Contender

VERSION = "2026-07-28"
META = {
    "io.modelcontextprotocol/protocolVersion": VERSION,
    "io.modelcontextprotocol/clientInfo": {"name": "bench", "version": "1"},
    "io.modelcontextprotocol/clientCapabilities": {},
}
BODY = json.dumps(
    {
        "jsonrpc": "2.0",
        "id": 1,
        "method": "tools/call",
        "params": {"name": "echo", "arguments": {}, "_meta": META},
    }
)
HEADERS = (
    ("content-type", "application/json"),
    ("accept", "application/json, text/event-stream"),
    ("mcp-protocol-version", VERSION),
    ("mcp-method", "tools/call"),
    ("mcp-name", "echo"),
)
WRK = shutil.which("wrk")
GENERATOR = "wrk, one thread" if WRK else "a generator of our own in Python"


@dataclass(frozen=True, slots=True)
class Load:
    """What one run of load saw; times in seconds."""

    requests: int
    seconds: float
    p50: float
    p99: float
    errors: int

    @property
    def rate(self) -> float:
        return self.requests / self.seconds


def run(target: Contender, *, connections: int, seconds: float) -> Load:
    """Asks ``target`` for ``seconds``, on so many connections."""
    headers = "\n".join(f"{name}: {value}" for name, value in HEADERS + target.headers)
    environment = {**os.environ, "BENCH_BODY": BODY, "BENCH_HEADERS": headers}
    url = f"http://127.0.0.1:{target.port}{target.path}"
    if WRK:
        script = Path(__file__).with_name("tools_call.lua")
        command = [WRK, "-t1", f"-c{connections}", f"-d{max(1, round(seconds))}s", "--timeout", "30s"]
        command += ["-s", str(script), url]
    else:
        command = [sys.executable, "-m", "bench.load", str(target.port), target.path, str(connections), str(seconds)]
    done = subprocess.run(
        command,
        env=environment,
        capture_output=True,
        text=True,
        timeout=seconds + 60,
        check=True,
        stdin=subprocess.DEVNULL,
    )
    line = next(line for line in done.stdout.splitlines() if line.startswith("BENCH "))
    return Load(**json.loads(line.removeprefix("BENCH ")))


class Asker(asyncio.Protocol):
    """One connection that asks again as soon as it is answered."""

    def __init__(self, request: bytes, latencies: list[float]) -> None:
        self.request = request
        self.latencies = latencies
        self.errors = 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        self.ask()

    def ask(self) -> None:
        self.parser = httptools.HttpResponseParser(self)
        self.sent = time.perf_counter()
        self.transport.write(self.request)

    def data_received(self, data: bytes) -> None:
        self.parser.feed_data(data)

    def on_message_complete(self) -> None:
        self.latencies.append(time.perf_counter() - self.sent)
        self.errors += self.parser.get_status_code() != 200
        asyncio.get_running_loop().call_soon(self.ask)


async def generate(port: int, path: str, connections: int, seconds: float) -> Load:
    """The stand-in for wrk; slower, so the ratios it gives are flatter."""
    fields = [f"POST {path} HTTP/1.1", f"host: 127.0.0.1:{port}", f"content-length: {len(os.environ['BENCH_BODY'])}"]
    request = "\r\n".join([*fields, *os.environ["BENCH_HEADERS"].splitlines(), "", os.environ["BENCH_BODY"]]).encode()
    loop = asyncio.get_running_loop()
    latencies: list[float] = []
    begun = time.perf_counter()
    askers = [
        (await loop.create_connection(lambda: Asker(request, latencies), "127.0.0.1", port))[1]
        for _ in range(connections)
    ]
    await asyncio.sleep(seconds)
    elapsed = time.perf_counter() - begun
    answered = sorted(latencies)
    for asker in askers:
        asker.transport.abort()
    if not answered:
        return Load(requests=0, seconds=elapsed, p50=0.0, p99=0.0, errors=connections)
    return Load(
        requests=len(answered),
        seconds=elapsed,
        p50=answered[len(answered) // 2],
        p99=answered[int(len(answered) * 0.99)],
        errors=sum(asker.errors for asker in askers),
    )


if __name__ == "__main__":
    load = uvloop.run(generate(int(sys.argv[1]), sys.argv[2], int(sys.argv[3]), float(sys.argv[4])))
    fields = {name: getattr(load, name) for name in ("requests", "seconds", "p50", "p99", "errors")}
    print("BENCH " + json.dumps(fields))
