"""A store with callers in it, and what identifies them."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from mcp_auth_proxy.config.settings import Address, InboundSettings, Settings
from mcp_auth_proxy.identity import Callers, make_authenticator
from mcp_auth_proxy.identity.keys import make_key
from mcp_auth_proxy.models import Caller, Identity, Principal, Role, Scope
from mcp_auth_proxy.net.http_head import Fields
from mcp_auth_proxy.oauth.fetch import Fetcher
from mcp_auth_proxy.store import Engine, open_store
from mcp_auth_proxy.store.principals import new_principal_id
from store.builders import NOW, store_settings

PEER = "192.0.2.7"
MCP_AND_SELF = frozenset({Scope.MCP, Scope.SELF})


@dataclass
class Clock:
    now: float = NOW

    def __call__(self) -> float:
        return self.now


@dataclass
class Head:
    """What a request is recognized by."""

    fields: Fields
    peer: str


@dataclass
class Setup:
    """One process: its callers, and what stands behind them."""

    callers: Callers
    engine: Engine
    clock: Clock

    def known(self, fields: Fields | list[tuple[bytes, bytes]], peer: str = PEER) -> Caller | None:
        """Return whose request is known at once. The same ``Fields`` stand for requests of one connection."""
        return self.callers.recognize(Head(fields if isinstance(fields, Fields) else Fields(fields), peer))

    async def add(self, name: str, *identities: Identity, role: Role = Role.MEMBER, listed: bool = True) -> Principal:
        principal = Principal(id=new_principal_id(), name=name, role=role, listed=listed, created_at=NOW)
        await self.callers.directory.add(principal, identities)
        return principal

    async def key_of(
        self, principal: Principal, scopes: frozenset[Scope] = MCP_AND_SELF, *, expires_at: float | None = None
    ) -> str:
        """Make a key for a principal, and return it as its owner has it."""
        key, text = make_key(principal=principal.id, name="test", scopes=scopes, now=NOW, expires_at=expires_at)
        await self.callers.directory.add_key(key)
        return text


@asynccontextmanager
async def identifying(
    folder: Path, inbound: InboundSettings, *, clock: Clock | None = None, fetcher: Fetcher | None = None
) -> AsyncIterator[Setup]:
    """Run what identifies callers on the store in a folder. Several at a time are several processes."""
    clock = clock or Clock()
    engine = await open_store(store_settings(folder))
    fetcher = fetcher or Fetcher()
    settings = Settings(
        listen=Address("127.0.0.1", 0), public_url=None, store=store_settings(folder), servers={}, inbound=inbound
    )
    callers = make_authenticator(settings, database=engine, fetcher=fetcher, clock=clock)
    try:
        await callers.start()
        yield Setup(callers, engine, clock)
    finally:
        await callers.aclose()
        await fetcher.aclose()
        await engine.close()


def bearer(credential: str) -> list[tuple[bytes, bytes]]:
    """Return the fields of a usual request with a credential."""
    return [
        (b"host", b"proxy.example"),
        (b"accept", b"application/json, text/event-stream"),
        (b"authorization", b"Bearer " + credential.encode()),
        (b"content-type", b"application/json"),
    ]
