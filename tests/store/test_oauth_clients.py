"""OAuth clients in the store: conflicts, changes at the same time, and what somebody without the key can do."""

import sqlite3
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest

from mcp_auth_proxy.models import OAuthClient, OAuthClientStatus
from mcp_auth_proxy.store import Engine
from mcp_auth_proxy.store.oauth_clients import OAuthClientChanged, OAuthClientConflict, OAuthClients
from store.builders import NOW

CLIENT = OAuthClient(
    id="oac_1",
    customer_id="default",
    provider="github",
    provider_name="GitHub",
    client_id="by-hand",
    client_secret="canary-client-secret",
    authorization_url="https://as.example/authorize",
    token_url="https://as.example/token",
    scopes=("read", "write"),
    redirect_uris=("https://proxy.example/oauth/callback",),
    metadata={"issuer": "https://as.example", "team": ["a"]},
    server_ids=("notes",),
    created_at=NOW,
    updated_at=NOW,
)
OTHER = replace(CLIENT, id="oac_2", provider="slack", server_ids=())


@pytest.fixture
def clients(engine: Engine) -> OAuthClients:
    return OAuthClients(engine)


def columns(folder: Path) -> list[str]:
    with closing(sqlite3.connect(folder / "store.db")) as connection:
        return [name for _, name, *_ in connection.execute("PRAGMA table_info(oauth_clients)")]


async def test_a_client_comes_back_as_it_was_given(clients: OAuthClients) -> None:
    await clients.add(CLIENT)
    await clients.add(OTHER)
    assert await clients.get("oac_1") == CLIENT
    assert await clients.of_project("default") == [CLIENT, OTHER]
    assert await clients.of_project("other") == []
    assert await clients.get("oac_3") is None


async def test_of_two_changes_at_the_same_time_one_counts(clients: OAuthClients) -> None:
    await clients.add(CLIENT)
    changed = replace(CLIENT, version=2, client_secret=None, status=OAuthClientStatus.REVOKED)
    await clients.change(changed)
    with pytest.raises(OAuthClientChanged):
        await clients.change(replace(CLIENT, version=2, client_id="late"))
    assert await clients.get("oac_1") == changed


async def test_conflicts(clients: OAuthClients) -> None:
    await clients.add(CLIENT)
    await clients.add(OTHER)
    with pytest.raises(OAuthClientConflict) as same_provider:
        await clients.add(replace(OTHER, id="oac_3", provider="github"))
    with pytest.raises(OAuthClientConflict) as same_server:
        await clients.change(replace(OTHER, version=2, server_ids=("more", "notes")))
    assert same_provider.value.existing_id == same_server.value.existing_id == "oac_1"
    await clients.add(replace(OTHER, id="oac_3", provider="github", project_id="other"))
    await clients.change(replace(CLIENT, version=2, deleted_at=NOW))
    await clients.change(replace(OTHER, version=2, server_ids=("notes",)))
    await clients.add(replace(CLIENT, id="oac_4", server_ids=()))


async def test_a_changed_row_is_missing(engine: Engine, clients: OAuthClients, tmp_path: Path) -> None:
    await clients.add(CLIENT)
    for name in columns(tmp_path):
        with closing(sqlite3.connect(tmp_path / "store.db")) as connection, connection:
            (value,) = connection.execute(f"SELECT {name} FROM oauth_clients").fetchone()
            changed = NOW if value is None else value + 1 if isinstance(value, int | float) else b"x" if value else "x"
            if isinstance(value, str):
                changed = "ab" * 16 if name == "uid" else value + "x"
            connection.execute(f"UPDATE oauth_clients SET {name} = :changed", {"changed": changed})
        assert await clients.of_project(CLIENT.project_id if name != "project_id" else "defaultx") == [], name
        with closing(sqlite3.connect(tmp_path / "store.db")) as connection, connection:
            connection.execute(f"UPDATE oauth_clients SET {name} = :value", {"value": value})
        assert await clients.of_project("default") == [CLIENT], name


@pytest.mark.sqlite
async def test_a_view_can_not_pass_one_client_off_as_another(clients: OAuthClients, tmp_path: Path) -> None:
    await clients.add(CLIENT)
    await clients.add(OTHER)
    with closing(sqlite3.connect(tmp_path / "store.db")) as connection, connection:
        kept = [name for name in columns(tmp_path) if name != "id"]
        connection.execute("ALTER TABLE oauth_clients RENAME TO true_clients")
        connection.execute(
            f"CREATE VIEW oauth_clients AS SELECT {', '.join(kept)}, "
            "CASE WHEN random() & 1 THEN 'oac_1' ELSE id END AS id FROM true_clients WHERE id = 'oac_2'"
        )
    for _ in range(20):
        assert await clients.get("oac_1") is None


@pytest.mark.sqlite
async def test_no_secret_is_in_the_file(clients: OAuthClients, tmp_path: Path) -> None:  # T76
    await clients.add(CLIENT)
    assert b"canary-client-secret" not in b"".join(path.read_bytes() for path in tmp_path.glob("store.db*"))
    assert "canary" not in repr(CLIENT)
