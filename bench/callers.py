"""What it costs that callers are identified: requests, memory and start in each mode, and the API's list of grants."""

import asyncio
import http.server
import json
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import jwt
from cryptography.hazmat.primitives.asymmetric import rsa

from bench import measures
from bench.backend import ROOT, Backend
from bench.contenders import SECRET, Contender, Endpoint, configuration, source_path
from bench.grant_lists import add_grants, add_indexes, page_seconds
from bench.measures import Speed
from bench.processes import Child, free_port
from bench.workloads import JSON
from mcp_auth_proxy.config.load import load
from mcp_auth_proxy.identity.keys import make_key
from mcp_auth_proxy.models import ALL_SCOPES, Principal, Role
from mcp_auth_proxy.store import open_store
from mcp_auth_proxy.store.api_keys import ApiKeys
from mcp_auth_proxy.store.principals import Principals

MODES = ("none", "api_key", "jwt", "trusted_header")
AUDIENCE = "https://proxy.bench"
CALLER = "alice"


@dataclass(slots=True)
class CallerResults:
    """By mode: the speed of ``none`` and of the mode, one after the other, in each round; the start."""

    pairs: dict[str, list[tuple[Speed, Speed]]] = field(default_factory=dict)
    ready: dict[str, float] = field(default_factory=dict)
    """Seconds until ready: the median of the starts."""
    idle: dict[str, int] = field(default_factory=dict)
    """Bytes resident then: the most of all starts."""
    principals: int = 0
    grants: int = 0
    pages: dict[str, float] = field(default_factory=dict)
    """Seconds for one page of grants, by filter: the median."""

    def share(self, mode: str) -> float | None:
        """Return the rate of a mode over that of ``none``: the median of the shares of each round."""
        shares = [one.rate / none.rate for none, one in self.pairs.get(mode, [])]
        return median(shares) if shares else None

    def cpu(self, mode: str) -> float | None:
        """Return the seconds of CPU per request that a mode adds to ``none``.

        Both are those of their quietest round: whatever else runs on the machine can only add to them.
        """
        found = [(none.cpu, one.cpu) for none, one in self.pairs.get(mode, []) if none.cpu and one.cpu]
        return min(one for _, one in found) - min(none for none, _ in found) if found else None


@dataclass(frozen=True, slots=True)
class Issuer:
    """An identity provider on loopback: its metadata and keys, and a token for a principal."""

    url: str
    token: str


@contextmanager
def issuer() -> Iterator[Issuer]:
    """Serve the metadata and the key of an issuer until the block ends."""
    key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    public: dict[str, Any] = json.loads(jwt.algorithms.RSAAlgorithm.to_jwk(key.public_key()))
    documents: dict[str, bytes] = {}

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = documents.get(self.path, b"{}")
            self.send_response(200)
            self.send_header("content-type", "application/json")
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            """Say nothing."""

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        url = f"http://127.0.0.1:{server.server_port}"
        metadata = json.dumps({"issuer": url, "jwks_uri": f"{url}/keys"}).encode()
        documents["/.well-known/openid-configuration"] = metadata
        documents["/.well-known/oauth-authorization-server"] = metadata
        documents["/keys"] = json.dumps({"keys": [{**public, "kid": "1", "use": "sig", "alg": "RS256"}]}).encode()
        threading.Thread(target=server.serve_forever, daemon=True).start()
        now = int(time.time())
        claims = {"iss": url, "aud": AUDIENCE, "sub": CALLER, "iat": now, "exp": now + 86_400}
        yield Issuer(url, jwt.encode(claims, key, algorithm="RS256", headers={"kid": "1"}))
        server.shutdown()


def inbound(mode: str, provider: Issuer) -> str:
    """Return the lines of the configuration that identify callers in a mode."""
    match mode:
        case "api_key":
            return "inbound: {mode: api_key}\n"
        case "jwt":
            return f"inbound: {{mode: jwt, jwt: [{{issuer: '{provider.url}', audience: '{AUDIENCE}'}}]}}\n"
        case "trusted_header":
            return "inbound: {mode: trusted_header, trusted_header: {name: X-Forwarded-User, from: [127.0.0.1/32]}}\n"
        case _:
            return ""


@dataclass(frozen=True, slots=True)
class Prepared:
    """A proxy in one mode, on a store with principals, each with a key. It can be started several times."""

    mode: str
    port: int
    home: Path
    headers: tuple[tuple[str, str], ...]

    def start(self) -> Contender:
        """Start it, and wait until it is ready."""
        command = [sys.executable, "-m", "mcp_auth_proxy", "serve", "--config", str(self.home / "config.yaml")]
        child = Child(command, log=self.home / "log", environment={SECRET: "bench-client-secret", **source_path(ROOT)})
        ready = child.wait_for(self.port, "/readyz", deadline=120.0)
        endpoint = Endpoint(self.port, f"/{JSON.key}/mcp", self.headers)
        return Contender(f"callers: {self.mode}", {JSON.key: endpoint}, child, ready)


def prepare(
    folder: Path, backend: Backend, *, mode: str, provider: Issuer, principals: int, grants: int = 0
) -> Prepared:
    """Write the configuration of a mode, and fill its store."""
    port = free_port()
    home = folder / f"callers-{port}"
    home.mkdir()
    config = home / "config.yaml"
    config.write_text(configuration(port, backend, 1) + inbound(mode, provider))
    key = asyncio.run(_fill(config, principals=principals, grants=grants))
    add_indexes(home / "store.db")
    headers = {
        "api_key": (("authorization", f"Bearer {key}"),),
        "jwt": (("authorization", f"Bearer {provider.token}"),),
        "trusted_header": (("x-forwarded-user", CALLER),),
    }.get(mode, ())
    return Prepared(mode, port, home, headers)


async def _fill(config: Path, *, principals: int, grants: int) -> str:
    """Make the principals, their keys and grants; return the key of the first one, an admin."""
    settings = load(config, environ={SECRET: "bench-client-secret"})
    engine = await open_store(settings.store)
    try:
        store, keys, first = Principals(engine), ApiKeys(engine), ""
        for number in range(principals):
            name, role = (CALLER, Role.ADMIN) if number == 0 else (f"caller-{number}", Role.MEMBER)
            await store.add(Principal(id=f"prn_{number:024x}", name=name, role=role, created_at=time.time()))
            key, text = make_key(principal=f"prn_{number:024x}", name="bench", scopes=ALL_SCOPES, now=time.time())
            await keys.add(key)
            first = first or text
        await add_grants(engine, grants, principals)
        return first
    finally:
        await engine.close()


def measure(
    folder: Path,
    backend: Backend,
    *,
    rounds: int,
    seconds: float,
    connections: int,
    starts: int,
    principals: int,
    grants: int,
) -> CallerResults:
    """Measure every mode against ``none``, in turns, and then the list of grants."""
    results = CallerResults(principals=principals, grants=grants)
    with issuer() as provider:
        prepared = [prepare(folder, backend, mode=mode, provider=provider, principals=principals) for mode in MODES]
        for one in prepared:
            _start_up(results, one, times=starts)
        started: dict[str, Contender] = {}
        try:
            for one in prepared:
                started[one.mode] = one.start()
                measures.verify(started[one.mode], JSON.key)
            for number in range(rounds):
                for mode in MODES[1:]:
                    _compare(results, mode, started, first=number % 2, connections=connections, seconds=seconds)
        finally:
            for contender in started.values():
                contender.stop()
        listed = prepare(
            folder, backend, mode="api_key", provider=provider, principals=principals, grants=grants
        ).start()
        try:
            results.pages = page_seconds(listed.endpoints[JSON.key])
        finally:
            listed.stop()
    return results


def _start_up(results: CallerResults, prepared: Prepared, *, times: int) -> None:
    """Start a proxy several times, and note how long that took and how much memory is resident then."""
    ready, idle = [], []
    for _ in range(times):
        contender = prepared.start()
        try:
            child = measures.require_child(contender)
            measures.settle(child)
            ready.append(contender.ready_seconds)
            idle.append(child.resident_bytes())
        finally:
            contender.stop()
    results.ready[prepared.mode], results.idle[prepared.mode] = median(ready), max(idle)


def _compare(
    results: CallerResults,
    mode: str,
    started: dict[str, Contender],
    *,
    first: int,
    connections: int,
    seconds: float,
) -> None:
    """Put load on ``none`` and a mode, one right after the other; ``first``: 1 if the mode comes first."""
    found = {}
    for each in ("none", mode)[:: -1 if first else 1]:
        found[each] = measures.speed(started[each], JSON.key, connections=connections, seconds=seconds)
    results.pairs.setdefault(mode, []).append((found["none"], found[mode]))
