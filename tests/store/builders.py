"""Values for the tests of the store, with secrets that can be searched for."""

import hashlib
from pathlib import Path

from fakes import postgresql
from mcp_auth_proxy.config.settings import KeySource, StoreSettings
from mcp_auth_proxy.models import (
    DEFAULT_ACCOUNT,
    Account,
    Attempt,
    ClientAuth,
    Endpoints,
    Flow,
    Grant,
    GrantKey,
    GrantType,
    Registration,
    RegistrationKind,
    TokenSet,
)
from mcp_auth_proxy.store.lease import Owners

NOW = 1_800_000_000.0
ENDPOINTS = Endpoints(
    authorization="https://as.example/authorize",
    token="https://as.example/token",
    revocation="https://as.example/revoke",
)


def store_settings(folder: Path) -> StoreSettings:
    """Return the settings of a folder's store: a file, or a database if a test on both engines is run on that."""
    if (database := postgresql.settings_of(folder)) is not None:
        return database
    key = KeySource(kind="file", name=str(folder / "store.key"))
    return StoreSettings(path=folder / "store.db", keys=(key,), default_key=True)


def registration(
    server: str = "linear",
    issuer: str = "https://as.example",
    *,
    client_id: str = "client",
    account: str = DEFAULT_ACCOUNT,
) -> Registration:
    return Registration(
        server=server,
        issuer=issuer,
        client_id=client_id,
        account=account,
        client_auth=ClientAuth.BASIC,
        kind=RegistrationKind.DYNAMIC,
        client_secret="canary-secret",
        redirect_uri="http://127.0.0.1:8787/oauth/callback",
        secret_expires_at=NOW + 1000,
        created_at=NOW,
    )


def tokens(name: str = "1", at: float = NOW) -> TokenSet:
    return TokenSet(
        access_token=f"canary-access-{name}",
        refresh_token=f"canary-refresh-{name}",
        obtained_at=at,
        expires_at=at + 3600,
        scopes=("read", "write"),
    )


def grant(server: str = "linear", issuer: str = "https://as.example", at: float = NOW, name: str = "1") -> Grant:
    return Grant(
        key=GrantKey(account=Account("local", server), resource=f"https://{server}.example/mcp", issuer=issuer),
        grant_type=GrantType.AUTHORIZATION_CODE,
        registration=registration(server, issuer),
        endpoints=ENDPOINTS,
        tokens=tokens(name, at),
        scopes=("read", "write", "offline_access"),
        granted_at=at,
    )


def flow(flow_id: str = "flow-1", server: str = "linear", at: float = NOW) -> Flow:
    return Flow(
        id=flow_id,
        key=GrantKey(account=Account("local", server), resource="", issuer="https://as.example"),
        registration=registration(server),
        endpoints=ENDPOINTS,
        scopes=("read",),
        redirect_uri="http://127.0.0.1:8787/oauth/callback",
        iss_supported=True,
        extra_params=(("access_type", "offline"), ("prompt", "a b")),
        created_at=at,
        expires_at=at + 600,
    )


def sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def attempt(state: str, flow_id: str = "flow-1", at: float = NOW) -> Attempt:
    return Attempt(
        flow_id=flow_id,
        state_hash=sha256(state),
        browser_hash=sha256("browser"),
        code_verifier="canary-verifier",
        created_at=at,
        expires_at=at + 600,
    )


def dead_owner(owners: Owners) -> str:
    """Return the name of a process that has ended and left leases behind."""
    process = Owners(owners.beside)
    process.appear()
    process.took("anything")
    process.close()
    return process.new()
