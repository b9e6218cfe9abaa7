"""One load generator for all contenders: wrk if it is installed, else ``python -m bench.load``.

The same request is sent again and again on persistent connections, one at a time on each.
"""

import asyncio
import json
import os
import shutil
import ssl
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import cast
from urllib.parse import urlsplit

import httptools
import uvloop

from bench.backend import ROOT
from bench.contenders import Endpoint
from bench.workloads import BODY, HEADERS

WRK = shutil.which("wrk")
GENERATOR = "wrk, one thread" if WRK else "bench/load.py, in Python"


@dataclass(frozen=True, slots=True)
class Load:
    """What one run of load measured; times in seconds."""

    requests: int
    seconds: float
    p50: float
    p99: float
    errors: int

    @property
    def rate(self) -> float:
        return self.requests / self.seconds


def run(endpoint: Endpoint, *, connections: int, seconds: float) -> Load:
    """Send requests to ``endpoint`` for ``seconds``, on so many connections."""
    headers = "\n".join(f"{name}: {value}" for name, value in HEADERS + endpoint.headers)
    environment = {**os.environ, "BENCH_BODY": BODY, "BENCH_HEADERS": headers}
    if WRK:
        script = Path(__file__).with_name("tools_call.lua")
        command = [WRK, "-t1", f"-c{connections}", f"-d{max(1, round(seconds))}s", "--timeout", "30s"]
        command += ["-s", str(script), endpoint.url]
    else:
        command = [sys.executable, "-m", "bench.load", endpoint.url, str(connections), str(seconds)]
    done = subprocess.run(
        command,
        env=environment,
        capture_output=True,
        text=True,
        timeout=seconds + 60,
        check=True,
        stdin=subprocess.DEVNULL,
        cwd=ROOT,
    )
    line = next(line for line in done.stdout.splitlines() if line.startswith("BENCH "))
    return Load(**json.loads(line.removeprefix("BENCH ")))


class LoadConnection(asyncio.Protocol):
    """One connection, which sends the request again as soon as it is answered."""

    def __init__(self, request: bytes, latencies: list[float]) -> None:
        self.request = request
        self.latencies = latencies
        self.errors = 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        self.send_request()

    def send_request(self) -> None:
        self.parser = httptools.HttpResponseParser(self)
        self.sent = time.perf_counter()
        self.transport.write(self.request)

    def data_received(self, data: bytes) -> None:
        self.parser.feed_data(data)

    def on_message_complete(self) -> None:
        self.latencies.append(time.perf_counter() - self.sent)
        self.errors += self.parser.get_status_code() != 200
        asyncio.get_running_loop().call_soon(self.send_request)


async def generate(url: str, connections: int, seconds: float) -> Load:
    """Do what wrk does. It is slower than wrk, so the ratios that it measures are flatter."""
    target = urlsplit(url)
    body = os.environ["BENCH_BODY"]
    fields = [f"POST {target.path} HTTP/1.1", f"host: {target.netloc}", f"content-length: {len(body)}"]
    request = "\r\n".join([*fields, *os.environ["BENCH_HEADERS"].splitlines(), "", body]).encode()
    context = unverified() if target.scheme == "https" else None
    loop = asyncio.get_running_loop()
    latencies: list[float] = []
    started = time.perf_counter()
    opened = [
        await loop.create_connection(
            lambda: LoadConnection(request, latencies), "127.0.0.1", target.port or 443, ssl=context
        )
        for _ in range(connections)
    ]
    await asyncio.sleep(seconds)
    elapsed = time.perf_counter() - started
    answered = sorted(latencies)
    for transport, _ in opened:
        transport.abort()
    if not answered:
        return Load(requests=0, seconds=elapsed, p50=0.0, p99=0.0, errors=connections)
    return Load(
        requests=len(answered),
        seconds=elapsed,
        p50=answered[len(answered) // 2],
        p99=answered[int(len(answered) * 0.99)],
        errors=sum(connection.errors for _, connection in opened),
    )


def unverified() -> ssl.SSLContext:
    """Return a TLS context that takes any certificate, as wrk does: it is the upstream of this run."""
    context = ssl.create_default_context()
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return context


if __name__ == "__main__":
    load = uvloop.run(generate(sys.argv[1], int(sys.argv[2]), float(sys.argv[3])))
    fields = {name: getattr(load, name) for name in ("requests", "seconds", "p50", "p99", "errors")}
    print("BENCH " + json.dumps(fields))
