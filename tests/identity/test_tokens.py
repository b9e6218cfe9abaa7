"""JWTs of callers: which are accepted, for how long, and what happens if the identity provider is down (T60-T62)."""

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric import rsa
from jwt.algorithms import RSAAlgorithm

from fakes.hostile import honeypot
from identity.idp import AUDIENCE, IdentityProvider, forged, identity_provider
from identity.setup import PEER, Setup, bearer, identifying
from mcp_auth_proxy.config.settings import InboundSettings, JwtSettings
from mcp_auth_proxy.errors import CallerRefused
from mcp_auth_proxy.identity import key_sets
from mcp_auth_proxy.identity.tokens import LEEWAY, VERDICT_LIFETIME
from mcp_auth_proxy.models import ALL_SCOPES, Identity, PrincipalStatus, Role
from store.builders import NOW


def inbound(*providers: IdentityProvider, **changes: Any) -> InboundSettings:
    issuers = tuple(JwtSettings(issuer=each.issuer, audience=AUDIENCE, **changes) for each in providers)
    return InboundSettings(modes=("jwt",), jwt=issuers)


@asynccontextmanager
async def with_provider(folder: Path, **changes: Any) -> AsyncIterator[tuple[Setup, IdentityProvider]]:
    async with identity_provider() as provider, identifying(folder, inbound(provider, **changes)) as setup:
        yield setup, provider


async def refused(setup: Setup, token: str) -> CallerRefused:
    assert setup.known(bearer(token)) is None
    with pytest.raises(CallerRefused) as caught:
        await setup.callers.identify(bearer(token), PEER)
    return caught.value


@pytest.mark.parametrize("algorithm", ["RS256", "PS384", "ES256"])
async def test_a_good_token_names_its_caller(tmp_path: Path, algorithm: str) -> None:
    async with with_provider(tmp_path) as (setup, provider):
        token = provider.token(algorithm=algorithm)
        assert setup.known(bearer(token)) is None
        caller = await setup.callers.identify(bearer(token), PEER)
        assert (caller.principal.name, caller.principal.role) == ("alice", Role.MEMBER)
        assert (caller.credential, caller.scopes) == (f"jwt:{provider.issuer}", ALL_SCOPES)
        assert caller.jwt == token
        assert token not in repr(caller)
        assert setup.known(bearer(token)) is caller
        assert await setup.callers.identify_api(bearer(token), PEER) is caller
        assert provider.paths == ["/.well-known/openid-configuration", "/keys"]


async def test_a_url_without_a_path_is_the_same_audience_with_a_slash(tmp_path: Path) -> None:
    """JavaScript's ``URL`` writes the slash, so older TypeScript SDKs ask for tokens with it."""
    async with with_provider(tmp_path) as (setup, provider):
        for audience in (AUDIENCE, f"{AUDIENCE}/"):
            caller = await setup.callers.identify(bearer(provider.token(aud=audience)), PEER)
            assert caller.principal.name == "alice"


@pytest.mark.parametrize(
    ("configured", "presented"),
    [
        ("https://proxy.example/notes", "https://proxy.example/notes/"),
        ("https://proxy.example/notes/", "https://proxy.example/notes"),
        ("proxy", "proxy/"),
        ("api://proxy", "api://proxy/"),
    ],
)
async def test_no_other_slash_may_differ(tmp_path: Path, configured: str, presented: str) -> None:  # T60
    async with identity_provider() as provider:
        issuer = JwtSettings(issuer=provider.issuer, audience=configured)
        async with identifying(tmp_path, InboundSettings(modes=("jwt",), jwt=(issuer,))) as setup:
            assert (await refused(setup, provider.token(aud=presented))).status == 401
            caller = await setup.callers.identify(bearer(provider.token(aud=configured)), PEER)
            assert caller.principal.name == "alice"


async def test_keys_are_fetched_once_for_many_tokens(tmp_path: Path) -> None:
    async with with_provider(tmp_path) as (setup, provider):
        for number in range(20):
            await setup.callers.identify(bearer(provider.token(jti=str(number))), PEER)
        assert provider.paths.count("/keys") == 1
        assert len(setup.callers.directory.principals()) == 1


async def test_tokens_for_others_are_refused(tmp_path: Path) -> None:
    # T60: an identity provider's or upstream's token that was not made for this proxy.
    async with with_provider(tmp_path) as (setup, provider):
        for changes in (
            {"aud": "https://mcp.example"},
            {"aud": ["https://mcp.example", f"{AUDIENCE}/notes/mcp", f"{AUDIENCE}//", f"{AUDIENCE}?"]},
            {"aud": None},
            {"iss": "https://other.example"},
            {"iss": f"{provider.issuer}/"},
            {"iss": None},
            {"exp": None},
            {"exp": "tomorrow"},
            {"exp": True},
            {"exp": int(NOW) - 31},
            {"nbf": int(NOW) + 31},
            {"iat": int(NOW) + 31},
            {"sub": None},
            {"sub": ""},
            {"sub": 7},
            {"sub": "a\nb"},
            {"cnf": {"jkt": "x"}},
        ):
            assert (await refused(setup, provider.token(**changes))).status == 401, changes
        assert (await refused(setup, "upstream-token")).status == 401
        assert (await refused(setup, provider.token(padding="x" * 8192))).status == 401
        assert (await refused(setup, provider.token({"typ": "logout+jwt"}))).status == 401
        assert not setup.callers.directory.principals()
        several = provider.token(aud=["https://mcp.example", AUDIENCE], nbf=int(NOW) + 29, exp=int(NOW) - 29)
        await setup.callers.identify(bearer(several), PEER)


async def test_forged_signatures_are_refused_and_nothing_is_fetched_for_them(tmp_path: Path) -> None:
    # T61
    attacker = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    own_key = json.loads(RSAAlgorithm.to_jwk(attacker.public_key())) | {"kid": "rsa"}
    async with honeypot() as trap, with_provider(tmp_path) as (setup, provider):
        claims = provider.claims()
        url = f"http://127.0.0.1:{trap.port}/keys"
        await setup.callers.identify(bearer(provider.token()), PEER)
        asked = len(provider.paths)
        for token in (
            forged({"alg": "none"}, claims),
            forged({"alg": "none", "kid": "rsa"}, claims, b"x"),
            forged({"alg": "None", "kid": "rsa"}, claims, b"x"),
            forged({"alg": "HS256", "kid": "rsa"}, claims, provider.public_pem),
            forged({"alg": "RS256", "kid": "rsa"}, claims, provider.public_pem),
            forged({"alg": ["RS256"], "kid": "rsa"}, claims, b"x"),
            forged({"alg": "ES256", "kid": "rsa"}, claims, b"x"),
            jwt.encode(claims, attacker, algorithm="RS256", headers={"kid": "rsa"}),
            jwt.encode(claims, attacker, algorithm="RS256"),
            jwt.encode(claims, attacker, algorithm="RS256", headers={"kid": "rsa", "jwk": own_key}),
            jwt.encode(claims, attacker, algorithm="RS256", headers={"kid": "x", "jku": url}),
            jwt.encode(claims, attacker, algorithm="RS256", headers={"kid": "x", "x5u": url}),
            provider.token({"jku": url}),
            provider.token({"crit": ["b64"], "b64": False}),
            provider.token()[:-4] + "AAAA",
        ):
            assert (await refused(setup, token)).status == 401, token
        assert trap.visits == []
        assert len(provider.paths) == asked


async def test_the_same_subject_of_another_issuer_is_another_principal(tmp_path: Path) -> None:
    # T62
    async with (
        identity_provider() as first,
        identity_provider() as second,
        identifying(tmp_path, inbound(first, second)) as setup,
    ):
        one = await setup.callers.identify(bearer(first.token()), PEER)
        other = await setup.callers.identify(bearer(second.token()), PEER)
        assert one.principal.id != other.principal.id
        authority = second.issuer.removeprefix("http://")
        assert (one.principal.name, other.principal.name) == ("alice", f"alice@{authority}")
        # A token of one issuer that is signed by the other is nobody's.
        assert (await refused(setup, second.token(iss=first.issuer))).status == 401


async def test_a_name_that_is_taken_is_not_shared(tmp_path: Path) -> None:
    # T62
    async with with_provider(tmp_path) as (setup, provider):
        with_key = await setup.add("alice")
        caller = await setup.callers.identify(bearer(provider.token()), PEER)
        assert caller.principal.id != with_key.id
        assert caller.principal.name == f"alice@{provider.issuer.removeprefix('http://')}"
        for name in ("local", "role:admin"):
            reserved = await setup.callers.identify(bearer(provider.token(sub=name)), PEER)
            assert reserved.principal.name.startswith(f"{name}@")


async def test_a_verdict_holds_for_a_minute_but_not_beyond_the_end(tmp_path: Path) -> None:
    async with with_provider(tmp_path) as (setup, provider):
        longer, shorter = bearer(provider.token()), bearer(provider.token(exp=int(NOW) + 20))
        for fields in (longer, shorter):
            await setup.callers.identify(fields, PEER)
        setup.clock.now = NOW + 20
        assert setup.known(shorter) is None
        assert setup.known(longer)
        setup.clock.now = NOW + VERDICT_LIFETIME
        assert setup.known(longer) is None
        setup.clock.now = NOW + 20 + LEEWAY
        with pytest.raises(CallerRefused):
            await setup.callers.identify(shorter, PEER)


async def test_an_identity_provider_that_is_down_means_503_and_known_tokens_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with with_provider(tmp_path) as (setup, provider):
        provider.down = 503
        first = await refused(setup, provider.token())
        assert first.status == 503
        assert first.retry_after is not None
        assert 0 < first.retry_after <= key_sets.RETRY_INTERVAL
        assert provider.issuer in setup.callers.problems()[0]
        asked = len(provider.paths)
        assert (await refused(setup, provider.token(jti="2"))).status == 503
        assert len(provider.paths) == asked
        provider.down = 0
        monkeypatch.setattr(key_sets, "RETRY_INTERVAL", 0.0)
        known = bearer(provider.token())
        await setup.callers.identify(known, PEER)
        assert setup.callers.problems() == []
        provider.down = 503
        monkeypatch.setattr(key_sets, "LIFETIME", 0.0)
        assert setup.known(known)
        assert (await refused(setup, provider.token(jti="3"))).status == 503
        setup.clock.now += VERDICT_LIFETIME
        with pytest.raises(CallerRefused) as caught:
            await setup.callers.identify(known, PEER)
        assert caught.value.status == 503


async def test_a_rotated_key_is_fetched_once_in_thirty_seconds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with with_provider(tmp_path) as (setup, provider):
        await setup.callers.identify(bearer(provider.token()), PEER)
        provider.rotate()
        rotated = provider.token({"kid": "rsa-2"})
        assert (await refused(setup, rotated)).status == 401
        assert provider.paths.count("/keys") == 1
        monkeypatch.setattr(key_sets, "UNKNOWN_KEY_INTERVAL", 0.0)
        await setup.callers.identify(bearer(rotated), PEER)
        assert provider.paths.count("/keys") == 2


@pytest.mark.parametrize(
    "keys",
    [
        [],
        [{"kty": "oct", "k": "c2VjcmV0", "kid": "rsa"}],
        [{"kty": "RSA", "n": "x", "e": "AQAB", "kid": "rsa"}],
        ["nonsense"],
    ],
)
async def test_a_key_set_without_a_usable_key_is_no_key_set(tmp_path: Path, keys: list[Any]) -> None:
    async with with_provider(tmp_path) as (setup, provider):
        provider.keys = keys
        assert (await refused(setup, provider.token())).status == 503
        assert "no key" in setup.callers.problems()[0]


async def test_keys_for_other_uses_are_left_out(tmp_path: Path) -> None:
    async with with_provider(tmp_path) as (setup, provider):
        provider.keys[0]["use"] = "enc"
        assert (await refused(setup, provider.token())).status == 401
        await setup.callers.identify(bearer(provider.token(algorithm="ES256")), PEER)


async def test_metadata_of_another_issuer_is_refused(tmp_path: Path) -> None:
    async with with_provider(tmp_path) as (setup, provider):
        provider.metadata["issuer"] = "https://other.example"
        assert (await refused(setup, provider.token())).status == 503
        assert "RFC 8414" in setup.callers.problems()[0]


async def test_metadata_can_not_lead_to_another_private_address(tmp_path: Path) -> None:
    async with with_provider(tmp_path) as (setup, provider):
        provider.metadata["jwks_uri"] = "http://169.254.169.254/keys"
        assert (await refused(setup, provider.token())).status == 503


async def test_roles_come_from_a_claim(tmp_path: Path) -> None:
    changes = {"roles_claim": "groups", "roles_admin": ("mcp-admins",)}
    async with with_provider(tmp_path, **changes) as (setup, provider):
        for groups, role in (
            (["staff", "mcp-admins"], Role.ADMIN),
            (["staff"], Role.MEMBER),
            ("staff mcp-admins", Role.ADMIN),
            (None, Role.MEMBER),
            ({"mcp-admins": 1}, Role.MEMBER),
        ):
            caller = await setup.callers.identify(bearer(provider.token(groups=groups)), PEER)
            assert caller.principal.role is role, groups
            setup.clock.now += 61
            (stored,) = setup.callers.directory.principals()
            assert stored.role is role


async def test_listed_lets_nobody_in_who_was_not_added(tmp_path: Path) -> None:
    async with identity_provider() as provider:
        automatic = inbound(provider)
        async with identifying(tmp_path, automatic) as setup:
            await setup.callers.identify(bearer(provider.token(sub="bob")), PEER)
        listed = InboundSettings(modes=("jwt",), jwt=automatic.jwt, provision="listed")
        async with identifying(tmp_path, listed) as setup:
            alice = await setup.add("somebody", Identity(f"jwt:{provider.issuer}", "alice"))
            assert (await setup.callers.identify(bearer(provider.token()), PEER)).principal == alice
            # Who came while everybody could is not listed either.
            for subject in ("bob", "carol"):
                error = await refused(setup, provider.token(sub=subject))
                assert error.status == 403
                assert f"jwt:{provider.issuer}={subject}" in str(error)
            assert len(setup.callers.directory.principals()) == 2


async def test_a_disabled_principals_token_is_refused_at_once(tmp_path: Path) -> None:
    # T74
    async with with_provider(tmp_path) as (setup, provider):
        token = provider.token()
        caller = await setup.callers.identify(bearer(token), PEER)
        await setup.callers.directory.change(caller.principal.id, status=PrincipalStatus.DISABLED)
        assert (await refused(setup, token)).status == 401
        assert (await refused(setup, provider.token(jti="2"))).status == 401


async def test_an_id_token_names_the_same_principal_as_a_token(tmp_path: Path) -> None:
    async with with_provider(tmp_path) as (setup, provider):
        caller = await setup.callers.identify(bearer(provider.token()), PEER)
        signed_in = await setup.callers.caller_of_claims(provider.issuer, {"sub": "alice"})
        assert signed_in.principal == caller.principal
        elsewhere = await setup.callers.caller_of_claims("https://idp.example", {"sub": "alice"})
        assert elsewhere.principal.name == "alice@idp.example"


async def test_a_reload_keeps_the_keys_and_takes_the_new_audience(tmp_path: Path) -> None:
    async with with_provider(tmp_path) as (setup, provider):
        await setup.callers.identify(bearer(provider.token()), PEER)
        changed = JwtSettings(issuer=provider.issuer, audience="https://other.example")
        setup.callers.configure(InboundSettings(modes=("jwt",), jwt=(changed,)))
        assert (await refused(setup, provider.token())).status == 401
        await setup.callers.identify(bearer(provider.token(aud="https://other.example")), PEER)
        assert provider.paths.count("/keys") == 1
