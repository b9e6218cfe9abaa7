"""Who is measured: each can be started, and says under which URL and with which header it is asked."""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from bench import nginx
from bench.origin import TOKEN
from bench.processes import Child, free_port, http_get

ROOT = Path(__file__).resolve().parent.parent
FASTMCP_PYTHON = ROOT / ".venv-bench" / "bin" / "python"
SECRET = "BENCH_CLIENT_SECRET"


@dataclass(frozen=True, slots=True)
class Backend:
    """The ports behind the contenders: the constant upstream, and the origin (tokens, streams)."""

    upstream: int
    origin: int


@dataclass(frozen=True, slots=True)
class Contender:
    """A started server. ``child`` is None for direct traffic."""

    name: str
    port: int
    path: str
    headers: tuple[tuple[str, str], ...]
    child: Child | None
    ready_seconds: float

    def stop(self) -> None:
        if self.child:
            self.child.stop()


Start = Callable[[Path, Backend], Contender]


def direct(folder: Path, backend: Backend) -> Contender:
    """No proxy: the client brings the token itself."""
    return Contender("direct", backend.upstream, "/mcp", (("authorization", f"Bearer {TOKEN}"),), None, 0.0)


def nginx_static(folder: Path, backend: Backend) -> Contender:
    port = free_port()
    child = nginx.start_proxy(folder, port, upstream=backend.upstream, origin=backend.origin)
    return Contender("nginx, static header", port, "/bench/mcp", (), child, 0.0)


def fastmcp(folder: Path, backend: Backend) -> Contender:
    """Its upstream is the origin: it speaks MCP to it, which a constant answer can't keep up."""
    port = free_port()
    url = f"http://127.0.0.1:{backend.origin}/mcp"
    command = [str(FASTMCP_PYTHON), str(ROOT / "bench" / "fastmcp_proxy.py"), str(port), url, TOKEN]
    child = Child(command, log=folder / "fastmcp.log")
    return Contender("FastMCP's proxy", port, "/mcp", (), child, child.wait_for(port))


def ours(folder: Path, backend: Backend, *, servers: int = 1) -> Contender:
    """``serve`` with a configuration of ``servers`` servers; its grant is obtained as any other is."""
    port = free_port()
    home = folder / f"ours-{port}"
    home.mkdir()
    config = home / "config.yaml"
    config.write_text(configuration(port, backend, servers))
    command = [sys.executable, "-m", "mcp_auth_proxy", "serve", "--config", str(config)]
    child = Child(command, log=home / "log", environment={SECRET: "bench-client-secret"})
    ready = child.wait_for(port, "/readyz", deadline=120.0)
    name = "mcp-auth-proxy" if servers == 1 else f"mcp-auth-proxy, {servers:,} servers"
    return Contender(name, port, "/bench/mcp", (), child, ready)


def configuration(port: int, backend: Backend, servers: int) -> str:
    constant, origin = f"http://127.0.0.1:{backend.upstream}", f"http://127.0.0.1:{backend.origin}"
    urls = {"bench": f"{constant}/mcp", "blob": f"{constant}/blob", "stream": f"{origin}/stream"}
    lines = [
        f"listen: 127.0.0.1:{port}",
        "store: {url: 'sqlite:///store.db'}",
        "authorization: {open_browser: never}",
        "limits: {upstream_connections: 5000}",
        "servers:",
    ]
    for name, url in urls.items():
        lines += [
            f"  {name}:",
            f"    url: {url}",
            "    oauth:",
            "      grant: client_credentials",
            "      client_id: bench",
            f"      client_secret: env:{SECRET}",
            "      client_auth: client_secret_basic",
        ]
    lines += [f"  s{number}: {{url: '{constant}/mcp'}}" for number in range(1, servers)]
    return "\n".join(lines) + "\n"


def available() -> dict[str, Start]:
    """Who can be started on this machine, in the order of the table."""
    found: dict[str, Start] = {"direct": direct}
    if nginx.BINARY:
        found["nginx"] = nginx_static
    if FASTMCP_PYTHON.exists() and (FASTMCP_PYTHON.parent / "fastmcp").exists():
        found["fastmcp"] = fastmcp
    found["ours"] = ours
    return found


def wake(contender: Contender, path: str) -> int:
    """One GET, so that a grant that this path needs is there before anything is measured."""
    return http_get(contender.port, path, timeout=20.0)
