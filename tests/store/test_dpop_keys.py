"""DPoP keys: stored with the grant and its flow, sealed."""

import sqlite3
from dataclasses import replace
from pathlib import Path

from mcp_auth_proxy.store import Engine, open_store
from mcp_auth_proxy.store.flows import Flows
from mcp_auth_proxy.store.grants import Grants
from store.builders import NOW, flow, grant, store_settings, tokens

KEY = "canary-dpop-private-key"
OWNER = "elsewhere:1:a"


async def test_a_key_survives_a_renewal_and_is_dropped_by_the_next_authorization(
    engine: Engine,
) -> None:
    grants = Grants(engine)
    stored = await grants.add(replace(grant(), dpop_key=KEY, tokens=replace(tokens(), token_type="DPoP")))
    assert await grants.get(stored.id) == stored
    assert await grants.begin_refresh(stored.id, version=stored.version, owner=OWNER, now=NOW)
    new = replace(tokens("2"), token_type="DPoP")
    renewed = await grants.renewed(stored.id, version=stored.version, owner=OWNER, tokens=new)
    assert renewed is not None
    assert (renewed.dpop_key, renewed.tokens) == (KEY, new)
    again = await grants.add(grant())
    assert (again.id, again.dpop_key) == (stored.id, None)
    assert await grants.get(stored.id) == again


async def test_a_flow_keeps_its_key(engine: Engine) -> None:
    flows = Flows(engine)
    await flows.save(replace(flow(), dpop_key=KEY))
    assert await flows.get("flow-1") == replace(flow(), dpop_key=KEY)
    await flows.save(flow())
    assert await flows.get("flow-1") == flow()


async def test_keys_are_sealed_and_bound_to_their_row(tmp_path: Path) -> None:  # T45, T47
    engine = await open_store(store_settings(tmp_path))
    await Grants(engine).add(replace(grant("a"), dpop_key=KEY))
    await Grants(engine).add(replace(grant("b"), dpop_key="another"))
    await Flows(engine).save(replace(flow(), dpop_key=KEY))
    await engine.close()
    assert not [path for path in tmp_path.iterdir() if KEY.encode() in path.read_bytes()]
    with sqlite3.connect(tmp_path / "store.db") as connection:
        connection.execute("UPDATE grants SET dpop_key = (SELECT dpop_key FROM grants WHERE server = 'b')")
    connection.close()
    engine = await open_store(store_settings(tmp_path))
    assert [found.key.account.server for found in await Grants(engine).all()] == ["b"]
    await engine.close()


def test_a_key_is_in_no_repr() -> None:
    assert KEY not in repr(replace(grant(), dpop_key=KEY)) + repr(replace(flow(), dpop_key=KEY))
