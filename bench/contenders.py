"""The servers that are measured: each is started the same way, and has an endpoint for each workload."""

import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from bench import nginx
from bench.backend import ROOT, Backend
from bench.origin import TOKEN
from bench.processes import Child, free_port

FASTMCP_PYTHON = ROOT / ".venv-bench" / "bin" / "python"
SECRET = "BENCH_CLIENT_SECRET"


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where requests are sent on the loopback, and the header fields that they need."""

    port: int
    path: str
    headers: tuple[tuple[str, str], ...] = ()
    authority: Path | None = None
    """The certificate authority if the endpoint speaks TLS."""

    @property
    def url(self) -> str:
        return f"{'https' if self.authority else 'http'}://127.0.0.1:{self.port}{self.path}"


@dataclass(frozen=True, slots=True)
class Contender:
    """A started server. ``child`` is None for direct traffic."""

    name: str
    endpoints: Mapping[str, Endpoint]
    child: Child | None = None
    ready_seconds: float = 0.0

    def stop(self) -> None:
        if self.child:
            self.child.stop()


Start = Callable[[Path, Backend], Contender]


def direct(_folder: Path, backend: Backend) -> Contender:
    """Return the endpoints of the upstreams themselves: the client brings the token."""
    headers = (("authorization", f"Bearer {TOKEN}"),)
    endpoints = {}
    for name, url in backend.urls().items():
        scheme, _, rest = url.partition("://127.0.0.1:")
        port, _, path = rest.partition("/")
        endpoints[name] = Endpoint(int(port), f"/{path}", headers, backend.authority if scheme == "https" else None)
    return Contender("direct", endpoints)


def proxied(port: int, backend: Backend) -> dict[str, Endpoint]:
    """Return the endpoints of a proxy that serves each URL of the backend under its name."""
    return {name: Endpoint(port, f"/{name}/mcp") for name in backend.urls()}


def nginx_static(folder: Path, backend: Backend) -> Contender:
    """Start nginx, which adds a static header."""
    port = free_port()
    child = nginx.start_proxy(folder, port, urls=backend.urls(), authority=backend.authority)
    return Contender("nginx, static header", proxied(port, backend), child)


def fastmcp(folder: Path, backend: Backend) -> Contender:
    """Start FastMCP's proxy. It speaks MCP to its upstream, so that is the origin, not the constant answer."""
    port = free_port()
    url = f"http://127.0.0.1:{backend.origin}/mcp"
    command = [str(FASTMCP_PYTHON), str(ROOT / "bench" / "fastmcp_proxy.py"), str(port), url, TOKEN]
    child = Child(command, log=folder / "fastmcp.log")
    return Contender("FastMCP's proxy", {"json": Endpoint(port, "/mcp")}, child, child.wait_for(port))


def ours(
    folder: Path, backend: Backend, *, servers: int = 1, checkout: Path = ROOT, name: str = "mcp-auth-proxy"
) -> Contender:
    """Start ``serve`` from the source of ``checkout``; beyond one, ``servers`` adds servers that get no requests."""
    port = free_port()
    home = folder / f"ours-{port}"
    home.mkdir()
    config = home / "config.yaml"
    config.write_text(configuration(port, backend, servers))
    command = [sys.executable, "-m", "mcp_auth_proxy", "serve", "--config", str(config)]
    environment = {SECRET: "bench-client-secret", **source_path(checkout)}
    child = Child(command, log=home / "log", environment=environment)
    ready = child.wait_for(port, "/readyz", deadline=120.0)
    title = name if servers == 1 else f"{name}, {servers:,} servers"
    return Contender(title, proxied(port, backend), child, ready)


def configuration(port: int, backend: Backend, servers: int) -> str:
    """Return a configuration of the proxy; each grant is obtained as any other is."""
    lines = [
        f"listen: 127.0.0.1:{port}",
        "store: {url: 'sqlite:///store.db'}",
        "authorization: {open_browser: never}",
        "limits: {upstream_connections: 5000}",
    ]
    if backend.authority:
        lines.append(f"outbound: {{ca_bundle: '{backend.authority}'}}")
    lines.append("servers:")
    for name, url in backend.urls().items():
        lines += [
            f"  {name}:",
            f"    url: {url}",
            "    oauth:",
            "      grant: client_credentials",
            "      client_id: bench",
            f"      client_secret: env:{SECRET}",
            "      client_auth: client_secret_basic",
        ]
    lines += [f"  s{number}: {{url: 'http://127.0.0.1:{backend.upstream}/mcp'}}" for number in range(1, servers)]
    return "\n".join(lines) + "\n"


def source_path(checkout: Path) -> dict[str, str]:
    """Return the environment with which Python imports the proxy from ``checkout``, wherever it is installed."""
    return {"PYTHONPATH": str(checkout / "src")}


def check_checkout(checkout: Path) -> str:
    """Return a name for the source in ``checkout``; raise RuntimeError if Python would not import it."""
    done = subprocess.run(
        [sys.executable, "-c", "import mcp_auth_proxy; print(mcp_auth_proxy.__file__)"],
        env={**os.environ, **source_path(checkout)},
        capture_output=True,
        text=True,
        check=True,
        cwd="/",
    )
    if not Path(done.stdout.strip()).is_relative_to(checkout / "src"):
        raise RuntimeError(f"{checkout}/src has no mcp_auth_proxy: Python would import {done.stdout.strip()}")
    command = ["git", "-C", str(checkout), "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    return f"mcp-auth-proxy at {commit or checkout.name}"


def available(against: Path | None = None) -> dict[str, Start]:
    """Return what can be started on this machine, in the order of the table.

    ``against``: another checkout, whose proxy is one more contender, called "before".
    """
    found: dict[str, Start] = {"direct": direct}
    if nginx.BINARY:
        found["nginx"] = nginx_static
    if FASTMCP_PYTHON.exists() and (FASTMCP_PYTHON.parent / "fastmcp").exists():
        found["fastmcp"] = fastmcp
    if against is not None:
        found["before"] = partial(ours, checkout=against, name=check_checkout(against))
    found["ours"] = ours
    return found
