"""API keys: who is let in by one, where, until when, and how soon a change is heeded (T74)."""

import base64
import time
from pathlib import Path

import pytest

from fakes.proxy import until
from identity.setup import MCP_AND_SELF, PEER, Setup, bearer, identifying
from mcp_auth_proxy.config.settings import InboundSettings
from mcp_auth_proxy.errors import CallerRefused
from mcp_auth_proxy.models import LOCAL, PrincipalStatus, Role, Scope
from store.builders import NOW

API_KEYS = InboundSettings(modes=("api_key",))
ANYBODY = InboundSettings()
HEED_SECONDS = 1.0


async def refusal(setup: Setup, fields: list[tuple[bytes, bytes]], *, api: bool = False) -> CallerRefused:
    """Return why a request is refused, also if it is asked again."""
    assert setup.known(fields) is None or api
    with pytest.raises(CallerRefused) as caught:
        await (setup.callers.identify_api(fields, PEER) if api else setup.callers.identify(fields, PEER))
    return caught.value


async def test_a_key_is_its_principals_in_every_way_to_send_it(tmp_path: Path) -> None:
    async with identifying(tmp_path, API_KEYS) as setup:
        alice = await setup.add("alice")
        key = await setup.key_of(alice)
        basic = base64.b64encode(f"anything:{key}".encode())
        ways = [
            bearer(key),
            [(b"authorization", f"bearer  {key}".encode())],
            [(b"x-api-key", key.encode())],
            [(b"authorization", b"Basic " + basic)],
        ]
        for fields in ways:
            caller = await setup.callers.identify(fields, PEER)
            assert (caller.principal, caller.scopes) == (alice, MCP_AND_SELF)
            assert await setup.callers.identify_api(fields, PEER) == caller
        for fields in (ways[0], ways[2]):
            assert setup.known(fields) == caller


async def test_without_a_credential_a_request_is_401(tmp_path: Path) -> None:
    async with identifying(tmp_path, API_KEYS) as setup:
        assert (await refusal(setup, [(b"host", b"x"), (b"cookie", b"a=b")])).status == 401
        assert await setup.callers.identify_api([(b"host", b"x")], PEER) is None


async def test_two_credentials_are_400_whatever_they_are(tmp_path: Path) -> None:
    async with identifying(tmp_path, API_KEYS) as setup:
        key = await setup.key_of(await setup.add("alice"))
        both = [*bearer(key), (b"x-api-key", key.encode())]
        for fields in (both, [*bearer(key), *bearer(key)], [*bearer("x"), (b"x-api-key", b"y")]):
            assert (await refusal(setup, fields)).status == 400
            assert (await refusal(setup, fields, api=True)).status == 400


async def test_bad_keys_are_401_without_saying_what_is_wrong(tmp_path: Path) -> None:
    async with identifying(tmp_path, API_KEYS) as setup:
        alice = await setup.add("alice")
        expired = await setup.key_of(alice, expires_at=NOW)
        revoked = await setup.key_of(alice)
        await setup.callers.directory.revoke_key(revoked.split("_")[1])
        good = await setup.key_of(alice)
        unknown = good[:-1] + ("a" if good[-1] != "a" else "b")
        texts = set()
        for key in (expired, revoked, unknown, "nonsense", "", f"{good}x", good.upper()):
            refused = await refusal(setup, bearer(key))
            assert refused.status == 401
            texts.add(str(refused))
        assert len(texts) == 1
        assert (await refusal(setup, [(b"authorization", b"Digest a=b")])).status == 401
        assert (await refusal(setup, [(b"authorization", b"Basic !")])).status == 401


async def test_a_key_ends_when_its_time_has_come(tmp_path: Path) -> None:
    async with identifying(tmp_path, API_KEYS) as setup:
        key = await setup.key_of(await setup.add("alice"), expires_at=NOW + 60)
        assert setup.known(bearer(key))
        setup.clock.now += 60
        assert (await refusal(setup, bearer(key))).status == 401
        assert (await refusal(setup, bearer(key), api=True)).status == 401


async def test_a_key_without_the_scope_mcp_is_for_the_api_alone(tmp_path: Path) -> None:
    async with identifying(tmp_path, API_KEYS) as setup:
        key = await setup.key_of(await setup.add("alice"), frozenset({Scope.SELF}))
        assert (await refusal(setup, bearer(key))).status == 401
        caller = await setup.callers.identify_api(bearer(key), PEER)
        assert caller is not None
        assert caller.scopes == {Scope.SELF}


async def test_the_api_takes_keys_in_mode_none_too(tmp_path: Path) -> None:
    async with identifying(tmp_path, ANYBODY) as setup:
        callers = setup.callers
        assert callers.anonymous
        caller = setup.known(bearer("anything"))
        assert caller is not None
        assert caller.principal.id == LOCAL
        key = await setup.key_of(await setup.add("alice"))
        found = await callers.identify_api(bearer(key), PEER)
        assert found is not None
        assert found.principal.name == "alice"
        of_local = await setup.key_of(caller.principal)
        local = await callers.identify_api(bearer(of_local), PEER)
        assert local is not None
        assert (local.principal.id, local.principal.role) == (LOCAL, Role.ADMIN)


async def until_refused(setup: Setup, key: str) -> float:
    """Return after how many seconds a key is no longer known."""
    begun = time.monotonic()
    await until(lambda: setup.known(bearer(key)) is None, "refusal", 5)
    return time.monotonic() - begun


async def test_a_principal_disabled_by_another_process_is_refused_within_a_second(tmp_path: Path) -> None:
    # T74
    refused: list[str] = []
    async with identifying(tmp_path, API_KEYS) as one, identifying(tmp_path, API_KEYS) as other:
        one.callers.on_refused(refused.append)
        alice, bob = await one.add("alice"), await one.add("bob")
        key, bobs = await one.key_of(alice), await one.key_of(bob)
        assert one.known(bearer(key))
        await other.callers.directory.change(alice.id, status=PrincipalStatus.DISABLED)
        assert await until_refused(one, key) < HEED_SECONDS
        assert refused == [alice.id]
        assert (await refusal(one, bearer(key))).status == 401
        assert one.known(bearer(bobs))
        await other.callers.directory.change(alice.id, status=PrincipalStatus.ACTIVE)
        assert (await one.callers.identify(bearer(key), PEER)).principal == alice


async def test_a_principal_disabled_by_this_process_is_refused_at_once(tmp_path: Path) -> None:
    # T74
    refused: list[str] = []
    async with identifying(tmp_path, API_KEYS) as setup:
        setup.callers.on_refused(refused.append)
        alice = await setup.add("alice")
        key = await setup.key_of(alice)
        await setup.callers.directory.change(alice.id, status=PrincipalStatus.DISABLED)
        assert refused == [alice.id]
        assert (await refusal(setup, bearer(key))).status == 401
        assert (await refusal(setup, bearer(key), api=True)).status == 401


async def test_a_key_that_another_process_revokes_or_makes_is_heeded(tmp_path: Path) -> None:
    async with identifying(tmp_path, API_KEYS) as one, identifying(tmp_path, API_KEYS) as other:
        key = await other.key_of(await other.add("alice"))
        # At once: whoever makes a key uses it in the next command.
        assert (await one.callers.identify(bearer(key), PEER)).principal.name == "alice"
        await other.callers.directory.revoke_key(key.split("_")[1])
        assert await until_refused(one, key) < HEED_SECONDS


async def test_a_new_role_is_heeded(tmp_path: Path) -> None:
    async with identifying(tmp_path, API_KEYS) as setup:
        alice = await setup.add("alice")
        key = await setup.key_of(alice)
        await setup.callers.directory.change(alice.id, role=Role.ADMIN)
        caller = setup.known(bearer(key))
        assert caller is not None
        assert caller.principal.role is Role.ADMIN


async def test_the_last_use_is_stored_to_the_hour(tmp_path: Path) -> None:
    async with identifying(tmp_path, API_KEYS) as setup:
        key = await setup.key_of(await setup.add("alice"))
        unused = await setup.key_of(await setup.add("bob"))
        assert setup.known(bearer(key))
        await setup.callers.directory.aclose()
        used = {each.id: each.last_used_at for each in await setup.callers.directory.keys()}
        assert used == {key.split("_")[1]: NOW // 3600 * 3600, unused.split("_")[1]: None}
