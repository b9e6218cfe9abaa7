"""Requests of one connection with the same fields: looked up once, and again as soon as that may not hold (T74)."""

import time
from dataclasses import replace
from ipaddress import ip_network
from pathlib import Path

import pytest

from fakes.proxy import until
from identity.idp import AUDIENCE, identity_provider
from identity.setup import PEER, Setup, bearer, identifying
from mcp_auth_proxy.config.settings import InboundSettings, JwtSettings, TrustedHeaderSettings
from mcp_auth_proxy.identity.tokens import VERDICT_LIFETIME
from mcp_auth_proxy.models import PrincipalStatus, Role
from mcp_auth_proxy.net.http_head import Fields
from store.builders import NOW

API_KEYS = InboundSettings(modes=("api_key",))
HEED_SECONDS = 1.0
HOUR = 3600.0


async def key_in_use(setup: Setup, name: str = "alice", *, expires_at: float | None = None) -> tuple[str, Fields]:
    """Return a new key, and the fields of a connection on which it was used."""
    key = await setup.key_of(await setup.add(name), expires_at=expires_at)
    fields = Fields(bearer(key))
    assert setup.known(fields)
    return key, fields


async def test_the_same_fields_are_looked_up_once(tmp_path: Path) -> None:
    async with identifying(tmp_path, API_KEYS) as setup:
        _, fields = await key_in_use(setup)
        verdict = fields.verdict
        caller = setup.known(fields)
        assert caller is not None
        assert caller.principal.name == "alice"
        assert fields.verdict is verdict
        assert not setup.known(Fields(bearer("nobody's")))


async def test_a_key_revoked_by_this_process_is_refused_at_once(tmp_path: Path) -> None:
    async with identifying(tmp_path, API_KEYS) as setup:
        key, fields = await key_in_use(setup)
        _, others = await key_in_use(setup, "bob")
        await setup.callers.directory.revoke_key(key.split("_")[1])
        assert setup.known(fields) is None
        assert setup.known(others)


@pytest.mark.parametrize("change", ["disable", "revoke"])
async def test_what_another_process_ends_is_refused_within_a_second(tmp_path: Path, change: str) -> None:
    async with identifying(tmp_path, API_KEYS) as one, identifying(tmp_path, API_KEYS) as other:
        key, fields = await key_in_use(one)
        caller = one.known(fields)
        assert caller is not None
        if change == "disable":
            await other.callers.directory.change(caller.principal.id, status=PrincipalStatus.DISABLED)
        else:
            await other.callers.directory.revoke_key(key.split("_")[1])
        begun = time.monotonic()
        await until(lambda: one.known(fields) is None, "refusal", 5)
        assert time.monotonic() - begun < HEED_SECONDS


async def test_a_key_ends_when_its_time_has_come(tmp_path: Path) -> None:
    async with identifying(tmp_path, API_KEYS) as setup:
        _, fields = await key_in_use(setup, expires_at=NOW + 60)
        setup.clock.now += 59
        assert setup.known(fields)
        setup.clock.now += 1
        assert setup.known(fields) is None


async def test_a_new_role_is_heeded(tmp_path: Path) -> None:
    async with identifying(tmp_path, API_KEYS) as setup:
        _, fields = await key_in_use(setup)
        caller = setup.known(fields)
        assert caller is not None
        await setup.callers.directory.change(caller.principal.id, role=Role.ADMIN)
        caller = setup.known(fields)
        assert caller is not None
        assert caller.principal.role is Role.ADMIN


async def test_a_use_is_noted_in_each_hour(tmp_path: Path) -> None:
    async with identifying(tmp_path, API_KEYS) as setup:
        key, fields = await key_in_use(setup)
        directory = setup.callers.directory
        setup.clock.now += HOUR
        await until(lambda: not directory.used, "a new hour", 5)
        assert setup.known(fields)
        await directory.aclose()
        (stored,) = await directory.keys()
        assert (stored.id, stored.last_used_at) == (key.split("_")[1], (NOW + HOUR) // HOUR * HOUR)


async def test_a_token_is_checked_again_after_a_minute_and_not_known_beyond_its_end(tmp_path: Path) -> None:
    async with identity_provider() as provider:
        inbound = InboundSettings(modes=("jwt",), jwt=(JwtSettings(issuer=provider.issuer, audience=AUDIENCE),))
        async with identifying(tmp_path, inbound) as setup:
            lasting, ending = (Fields(bearer(provider.token(exp=int(NOW) + seconds))) for seconds in (600, 20))
            for fields in (lasting, ending):
                await setup.callers.identify(fields.headers, PEER)
                assert setup.known(fields)
            setup.clock.now = NOW + 20
            assert setup.known(ending) is None
            assert setup.known(lasting)
            setup.clock.now = NOW + VERDICT_LIFETIME
            assert setup.known(lasting) is None
            await setup.callers.identify(lasting.headers, PEER)
            assert setup.known(lasting)


async def test_the_token_of_a_disabled_principal_is_refused_at_once(tmp_path: Path) -> None:
    async with identity_provider() as provider:
        inbound = InboundSettings(modes=("jwt",), jwt=(JwtSettings(issuer=provider.issuer, audience=AUDIENCE),))
        async with identifying(tmp_path, inbound) as setup:
            fields = Fields(bearer(provider.token()))
            caller = await setup.callers.identify(fields.headers, PEER)
            assert setup.known(fields) is caller
            await setup.callers.directory.change(caller.principal.id, status=PrincipalStatus.DISABLED)
            assert setup.known(fields) is None


async def test_a_reload_changes_who_is_believed_on_connections_too(tmp_path: Path) -> None:
    header = TrustedHeaderSettings(name="x-forwarded-user", sources=(ip_network(PEER),))
    inbound = InboundSettings(modes=("trusted_header",), trusted_header=header)
    async with identifying(tmp_path, inbound) as setup:
        fields = Fields([(b"x-forwarded-user", b"alice")])
        caller = await setup.callers.identify(fields.headers, PEER)
        assert setup.known(fields) is caller
        setup.callers.configure(replace(inbound, trusted_header=replace(header, sources=(ip_network("192.0.2.99"),))))
        assert setup.known(fields) is None
        setup.callers.configure(inbound)
        await setup.callers.identify(fields.headers, PEER)
        assert setup.known(fields)
        await setup.callers.directory.change(caller.principal.id, status=PrincipalStatus.DISABLED)
        assert setup.known(fields) is None
