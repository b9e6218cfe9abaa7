"""The field of a web server in front: believed from it alone, and never if a client may have had a hand in it (T63)."""

from dataclasses import replace
from ipaddress import ip_network
from pathlib import Path

import pytest

from identity.setup import PEER, Setup, bearer, identifying
from mcp_auth_proxy.config.settings import InboundSettings, Secret, TrustedHeaderSettings
from mcp_auth_proxy.errors import CallerRefused
from mcp_auth_proxy.models import Identity, PrincipalStatus

FRONT = "10.1.2.3"
Fields = list[tuple[bytes, bytes]]

WITHOUT_SECRET = TrustedHeaderSettings(name="x-forwarded-user", sources=(ip_network("10.0.0.0/8"),))
WITH_SECRET = TrustedHeaderSettings(
    name="x-forwarded-user",
    sources=(ip_network("10.0.0.0/8"), ip_network("::1/128")),
    secret=Secret("canary-front"),
    secret_header="x-proxy-secret",
)
HOST = (b"host", b"proxy.example")
USER = (b"x-forwarded-user", b"alice")
SECRET = (b"x-proxy-secret", b"canary-front")


def inbound(settings: TrustedHeaderSettings, *more: str, listed: bool = False) -> InboundSettings:
    modes = ("trusted_header", "api_key") if more else ("trusted_header",)
    return InboundSettings(modes=modes, trusted_header=settings, provision="listed" if listed else "auto")  # type: ignore[arg-type]


async def status_of(setup: Setup, fields: Fields, peer: str = FRONT) -> int:
    """Return the status that a request is refused with, on the fast path and else."""
    assert setup.known(fields, peer) is None
    with pytest.raises(CallerRefused) as caught:
        await setup.callers.identify(fields, peer)
    return caught.value.status


@pytest.mark.parametrize(
    ("settings", "fields"),
    [(WITHOUT_SECRET, [HOST, USER]), (WITH_SECRET, [SECRET, HOST, USER]), (WITH_SECRET, [USER, HOST, SECRET])],
)
async def test_the_web_server_in_front_names_the_caller(
    tmp_path: Path, settings: TrustedHeaderSettings, fields: Fields
) -> None:
    async with identifying(tmp_path, inbound(settings)) as setup:
        assert setup.known(fields, FRONT) is None
        caller = await setup.callers.identify(fields, FRONT)
        assert (caller.principal.name, caller.credential) == ("alice", "header:x-forwarded-user")
        assert setup.known(fields, FRONT) is caller
        assert setup.known(fields, f"::ffff:{FRONT}") is caller
        assert await setup.callers.identify_api(fields, FRONT) is caller
        found = await setup.callers.directory.find(Identity("header:x-forwarded-user", "alice"))
        assert found == caller.principal


async def test_forged_fields_are_refused_although_the_caller_is_known(tmp_path: Path) -> None:
    # T63
    async with identifying(tmp_path, inbound(WITH_SECRET)) as setup:
        await setup.callers.identify([HOST, USER, SECRET], FRONT)
        assert await status_of(setup, [HOST, USER, SECRET], PEER) == 401
        assert await status_of(setup, [HOST, USER, SECRET], "") == 401
        for fields in (
            [HOST],
            [USER],
            [USER, USER, SECRET],
            [USER, (b"x-forwarded-user", b"root"), SECRET],
            [USER, (b"x_forwarded_user", b"root"), SECRET],
            [USER, (b"x-forwarded_user", b"root"), SECRET],
            [(b"x_forwarded-user", b"root"), SECRET],
            [USER, (b"x-proxy-secret", b"canary")],
            [USER, (b"x-proxy-secret", b"")],
            [USER, (b"x_proxy_secret", b"canary-front")],
            [USER, SECRET, SECRET],
            [USER, SECRET, (b"x_proxy-secret", b"canary-front")],
        ):
            assert await status_of(setup, fields) in (400, 401), fields
        for name in (b"\xff\xfe", b"a\tb", b"x" * 256):
            assert await status_of(setup, [(b"x-forwarded-user", name), SECRET]) == 401
        assert [principal.name for principal in setup.callers.directory.principals()] == ["alice"]


async def test_nobody_is_believed_while_the_secret_is_not_known(tmp_path: Path) -> None:
    # T63: a command that needs no secrets of this section was started without them.
    skipped = replace(WITH_SECRET, secret=None)
    async with identifying(tmp_path, inbound(skipped)) as setup:
        for fields in ([USER], [USER, SECRET], [USER, (b"x-proxy-secret", b"")]):
            assert await status_of(setup, fields) == 401


async def test_fields_and_their_twins_are_never_forwarded(tmp_path: Path) -> None:
    async with identifying(tmp_path, inbound(WITH_SECRET)) as setup:
        dropped = setup.callers.credential_fields
        assert {b"authorization", b"x-api-key", b"x-forwarded-user", b"x_forwarded_user", b"x-forwarded_user"} < dropped
        assert {b"x-proxy-secret", b"x_proxy_secret"} < dropped
    async with identifying(tmp_path, InboundSettings()) as setup:
        assert setup.callers.credential_fields == frozenset()


async def test_what_the_web_server_asked_for_itself_is_no_second_credential(tmp_path: Path) -> None:
    async with identifying(tmp_path, inbound(WITHOUT_SECRET)) as setup:
        # nginx forwards the Basic credentials that it has checked.
        fields = [(b"authorization", b"Basic YWxpY2U6cGFzcw=="), USER]
        assert (await setup.callers.identify(fields, FRONT)).principal.name == "alice"
        assert setup.known(fields, FRONT)


async def test_a_key_and_a_name_are_two_credentials(tmp_path: Path) -> None:
    async with identifying(tmp_path, inbound(WITH_SECRET, "api_key")) as setup:
        key = await setup.key_of(await setup.add("bob"))
        assert await status_of(setup, [*bearer(key), USER, SECRET]) == 400
        # The secret alone, or an empty name, names nobody.
        for fields in ([*bearer(key), SECRET], [*bearer(key), (b"x-forwarded-user", b""), SECRET]):
            assert (await setup.callers.identify(fields, FRONT)).principal.name == "bob"
        assert (await setup.callers.identify(bearer(key), PEER)).principal.name == "bob"


async def test_a_name_never_is_a_principal_of_another_kind(tmp_path: Path) -> None:
    # T62
    async with identifying(tmp_path, inbound(WITHOUT_SECRET)) as setup:
        with_key = await setup.add("alice")
        caller = await setup.callers.identify([USER], FRONT)
        assert caller.principal.id != with_key.id
        assert caller.principal.name == "alice@x-forwarded-user"


async def test_listed_names_only(tmp_path: Path) -> None:
    async with identifying(tmp_path, inbound(WITHOUT_SECRET, listed=True)) as setup:
        alice = await setup.add("al", Identity("header:x-forwarded-user", "alice"))
        assert (await setup.callers.identify([USER], FRONT)).principal == alice
        assert await status_of(setup, [(b"x-forwarded-user", b"bob")]) == 403


async def test_a_disabled_principal_is_refused_at_once(tmp_path: Path) -> None:
    # T74
    async with identifying(tmp_path, inbound(WITHOUT_SECRET)) as setup:
        caller = await setup.callers.identify([USER], FRONT)
        await setup.callers.directory.change(caller.principal.id, status=PrincipalStatus.DISABLED)
        assert await status_of(setup, [USER]) == 401
