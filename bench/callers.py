"""What it costs that callers are identified: requests, memory and start in each mode, and the API's list of grants."""

import asyncio
import http.client
import http.server
import json
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import jwt
from cryptography.hazmat.primitives.asymmetric import rsa

from bench import measures
from bench.backend import ROOT, Backend
from bench.contenders import SECRET, Contender, Endpoint, configuration, source_path
from bench.measures import Speed, UnexpectedResponse
from bench.processes import Child, free_port
from bench.workloads import JSON
from mcp_auth_proxy.config.load import load
from mcp_auth_proxy.identity.keys import make_key
from mcp_auth_proxy.models import (
    ALL_SCOPES,
    Account,
    ClientAuth,
    Endpoints,
    Grant,
    GrantKey,
    GrantType,
    Principal,
    Registration,
    RegistrationKind,
    Role,
    TokenSet,
)
from mcp_auth_proxy.store import Engine, open_store
from mcp_auth_proxy.store.api_keys import ApiKeys
from mcp_auth_proxy.store.grants import Grants
from mcp_auth_proxy.store.principals import Principals

MODES = ("none", "api_key", "jwt", "trusted_header")
AUDIENCE = "https://proxy.bench"
CALLER = "alice"
PAGE = 50


@dataclass(slots=True)
class CallerResults:
    """By mode: the speed in each round, the seconds until ready, the bytes resident then."""

    rounds: dict[str, list[Speed]] = field(default_factory=dict)
    ready: dict[str, float] = field(default_factory=dict)
    idle: dict[str, int] = field(default_factory=dict)
    principals: int = 0
    grants: int = 0
    page: float | None = None
    """Seconds for one page of grants, the median."""

    def share(self, mode: str) -> float | None:
        """Return the rate of a mode over that of ``none``: the median of the shares of each round."""
        pairs = zip(self.rounds.get(mode, []), self.rounds.get("none", []), strict=False)
        shares = [one.rate / other.rate for one, other in pairs]
        return median(shares) if shares else None

    def cpu(self, mode: str) -> float | None:
        """Return the seconds of CPU per request that a mode adds to ``none``: the median over the rounds."""
        pairs = zip(self.rounds.get(mode, []), self.rounds.get("none", []), strict=False)
        added = [one.cpu - other.cpu for one, other in pairs if one.cpu is not None and other.cpu is not None]
        return median(added) if added else None


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


def start(
    folder: Path, backend: Backend, *, mode: str, provider: Issuer, principals: int, grants: int = 0
) -> Contender:
    """Start the proxy in a mode, on a store with this many principals, each with a key, and grants."""
    port = free_port()
    home = folder / f"callers-{port}"
    home.mkdir()
    config = home / "config.yaml"
    config.write_text(configuration(port, backend, 1) + inbound(mode, provider))
    key = asyncio.run(_fill(config, principals=principals, grants=grants))
    command = [sys.executable, "-m", "mcp_auth_proxy", "serve", "--config", str(config)]
    environment = {SECRET: "bench-client-secret", **source_path(ROOT)}
    child = Child(command, log=home / "log", environment=environment)
    ready = child.wait_for(port, "/readyz", deadline=120.0)
    headers = {
        "api_key": (("authorization", f"Bearer {key}"),),
        "jwt": (("authorization", f"Bearer {provider.token}"),),
        "trusted_header": (("x-forwarded-user", CALLER),),
    }.get(mode, ())
    return Contender(f"callers: {mode}", {JSON.key: Endpoint(port, f"/{JSON.key}/mcp", headers)}, child, ready)


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
        await _add_grants(engine, grants, principals)
        return first
    finally:
        await engine.close()


async def _add_grants(engine: Engine, count: int, principals: int) -> None:
    store = Grants(engine)
    for number in range(count):
        account = Account(f"prn_{number % principals:024x}", JSON.key, f"a{number // principals}")
        await store.add(_grant(account, time.time()))


def _grant(account: Account, now: float) -> Grant:
    registration = Registration(
        server=account.server,
        account=account.name,
        issuer="https://as.bench",
        client_id="bench",
        client_auth=ClientAuth.NONE,
        kind=RegistrationKind.DYNAMIC,
    )
    tokens = TokenSet(access_token="a" * 200, refresh_token="r" * 200, obtained_at=now, expires_at=now + 3600)
    return Grant(
        key=GrantKey(account=account, resource="http://127.0.0.1", issuer="https://as.bench"),
        grant_type=GrantType.AUTHORIZATION_CODE,
        registration=registration,
        endpoints=Endpoints(token="https://as.bench/token"),
        tokens=tokens,
        scopes=("read",),
        granted_at=now,
    )


def measure(
    folder: Path, backend: Backend, *, rounds: int, seconds: float, connections: int, principals: int, grants: int
) -> CallerResults:
    """Measure every mode, in turns, and then the list of grants."""
    results = CallerResults(principals=principals, grants=grants)
    with issuer() as provider:
        begin = partial(start, folder, backend, provider=provider, principals=principals)
        started: dict[str, Contender] = {}
        try:
            for mode in MODES:
                started[mode] = one = begin(mode=mode)
                child = measures.require_child(one)
                measures.settle(child)
                results.ready[mode], results.idle[mode] = one.ready_seconds, child.resident_bytes()
            for one in started.values():
                measures.verify(one, JSON.key)
            for number in range(rounds):
                for mode, one in list(started.items())[:: -1 if number % 2 else 1]:
                    found = measures.speed(one, JSON.key, connections=connections, seconds=seconds)
                    results.rounds.setdefault(mode, []).append(found)
        finally:
            for one in started.values():
                one.stop()
        listed = begin(mode="api_key", grants=grants)
        try:
            results.page = page_seconds(listed.endpoints[JSON.key])
        finally:
            listed.stop()
    return results


def page_seconds(endpoint: Endpoint, *, pages: int = 20) -> float:
    """Return how long a page of all grants takes an admin, following the list from page to page; the median."""
    connection = http.client.HTTPConnection("127.0.0.1", endpoint.port, timeout=30)
    token, found = "", []
    for _ in range(pages):
        begun = time.perf_counter()
        connection.request("GET", f"/api/v1/grants?page_size={PAGE}&page_token={token}", headers=dict(endpoint.headers))
        response = connection.getresponse()
        body = response.read()
        found.append(time.perf_counter() - begun)
        if response.status != 200:
            raise UnexpectedResponse(f"GET /grants: {response.status} {body[:300].decode(errors='replace')}")
        token = json.loads(body)["page"]["next_page_token"] or ""
    connection.close()
    # The first one imports the API.
    return median(found[1:])
