"""Challenges, metadata, and answers of authorization servers."""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TypeVar, cast
from urllib.parse import parse_qsl, urlsplit

from fuzz.checks import check_error, check_fields
from mcp_auth_proxy.errors import (
    AddressRefused,
    AuthorizationServerUnavailable,
    DocumentRefused,
    RegistrationImpossible,
    TokenRefused,
)
from mcp_auth_proxy.models import (
    Account,
    ClientAuth,
    Endpoints,
    Flow,
    GrantKey,
    Registration,
    RegistrationKind,
    TokenSet,
)
from mcp_auth_proxy.net import urls
from mcp_auth_proxy.oauth import challenge as challenges
from mcp_auth_proxy.oauth import (
    device_authorization,
    discovery,
    documents,
    jwt_expiry,
    oauth_error,
    pasted_address,
    registration,
    retry_after,
    token_endpoint,
    token_exchange,
)

T = TypeVar("T")

ISSUER = "https://as.example"
SERVER_URL = "https://h.example/mcp"
TOKEN_URL = f"{ISSUER}/token"
SECRET = "the-secret-that-was-sent"
NOW = 1_800_000_000.0

FLOW = Flow(
    id="flow",
    key=GrantKey(account=Account("local", "s"), resource=SERVER_URL, issuer=ISSUER),
    registration=Registration(
        server="s", issuer=ISSUER, client_id="client", client_auth=ClientAuth.NONE, kind=RegistrationKind.DYNAMIC
    ),
    endpoints=Endpoints(authorization=f"{ISSUER}/authorize", token=TOKEN_URL),
    scopes=("a",),
    redirect_uri="http://127.0.0.1:8787/oauth/callback",
    iss_supported=True,
    created_at=NOW - 1,
    expires_at=NOW + 600,
)

_TOKEN = re.compile(r"[!#$%&'*+\-.^_`|~0-9a-z]+")
_VISIBLE = re.compile(r"[\x21-\x7e]+")
_FIELD_CONTROLS = re.compile(r"[\x00-\x08\x0a-\x1f\x7f]")

# Challenges


def challenge(data: bytes) -> None:
    """Check what is read of WWW-Authenticate: each line of the input is a field."""
    values = data.split(b"\n")
    found = challenges.parse(values)
    for one in found:
        assert _TOKEN.fullmatch(one.scheme), f"not a scheme: {one.scheme!r}"
        for name, value in one.params.items():
            assert _TOKEN.fullmatch(name), f"not a parameter: {name!r}"
            assert not _FIELD_CONTROLS.search(value), f"a control character: {value!r}"
    written = [_written(one).encode("latin-1") for one in found]
    together = b", ".join(written)
    parts = sum(2 + len(one.params) for one in found)
    if len(together) <= challenges.MAX_BYTES and parts <= challenges.MAX_PARTS:
        assert challenges.parse(written) == found, "another challenge if it is written out"
        assert challenges.parse([together]) == found, "another challenge if all are in one field"
    bearer = challenges.bearer(values)
    assert (bearer is None) == all(one.scheme not in ("bearer", "dpop") for one in found)
    if bearer is not None:
        assert all(map(_VISIBLE.fullmatch, bearer.scopes or ()))
        assert not bearer.names_metadata or ":" in (bearer.resource_metadata or "")
    challenges.wants_nonce(values)
    schemes = challenges.other_schemes(values)
    assert len(schemes) <= 3 and all(name.isprintable() and len(name) <= 20 for name in schemes)


def _written(one: challenges.Challenge) -> str:
    escaped = {name: value.replace("\\", "\\\\").replace('"', '\\"') for name, value in one.params.items()}
    return f"{one.scheme} " + ", ".join(f'{name}="{value}"' for name, value in escaped.items())


# Metadata


def metadata(data: bytes) -> None:
    """Check what is read of a document, as metadata of a resource, of an authorization server, and of an old one."""
    resource = _read(
        lambda: discovery.read_resource_metadata(data, url=f"{SERVER_URL}/metadata", server_url=SERVER_URL)
    )
    if resource is not None:
        given = _object(data)
        assert given["resource"] == resource.resource
        path = urlsplit(resource.resource).path.rstrip("/")
        assert urlsplit(resource.resource).hostname == "h.example" and path in ("", "/mcp")
        assert resource.authorization_servers, "no issuer"
        for issuer in resource.authorization_servers:
            assert issuer in cast("list[str]", given["authorization_servers"])
            _check_url(issuer)
            assert "?" not in issuer
        _check_texts(resource.scopes_supported)
    for legacy in (False, True):
        found = _read(
            partial(
                discovery.read_server_metadata,
                data,
                url=f"{ISSUER}/metadata",
                issuer=ISSUER,
                policy_http_loopback=False,
                legacy=legacy,
            )
        )
        if found is not None:
            _check_server_metadata(found, _object(data), legacy=legacy)


def _check_server_metadata(found: discovery.ServerMetadata, given: Mapping[str, object], *, legacy: bool) -> None:
    assert found.issuer == given["issuer"]
    assert found.issuer == ISSUER or (legacy and found.issuer.startswith(f"{ISSUER}/"))
    for name in ("authorization", "token", "registration", "revocation", "device_authorization"):
        url = getattr(found, f"{name}_endpoint")
        assert (url or None) == (given.get(f"{name}_endpoint") or None), f"another {name}_endpoint"
        if url:
            _check_url(url)
    for name in ("scopes", "response_types", "grant_types", "code_challenge_methods"):
        _check_texts(getattr(found, f"{name}_supported"))
    assert found.iss_parameter_supported is (given.get("authorization_response_iss_parameter_supported") is True)
    if found.authorization_endpoint:
        _read(lambda: discovery.require_own_authorization_endpoint(found, server="s"))


def _check_url(url: str) -> None:
    """Check that another parser finds the same host in a URL, and that it is for https."""
    parts, ours = urlsplit(url), urls.parse(url)
    assert parts.scheme == ours.origin.scheme == "https", f"not https: {url}"
    assert (parts.hostname, parts.port or 443) == (ours.origin.host, ours.origin.port), f"another host: {url}"
    assert parts.username is parts.password is None and not parts.fragment
    assert len(url) <= urls.MAX_LENGTH and url.isascii() and url.isprintable()
    target = ours.target
    assert target.startswith(b"/") and _VISIBLE.fullmatch(target.decode("ascii")), f"not a target: {target!r}"


def _check_texts(texts: tuple[str, ...] | None) -> None:
    assert all(len(text) <= documents.MAX_TEXT and text.isprintable() for text in texts or ())


def _object(data: bytes) -> dict[str, object]:
    """Return what Python's own reading of JSON makes of a document that was accepted."""
    return cast("dict[str, object]", json.loads(data.decode("utf-8-sig")))


def _read(read: Callable[[], T]) -> T | None:
    try:
        return read()
    except DocumentRefused as error:
        check_error(error)
        return None


# Answers of authorization servers


def token(data: bytes) -> None:
    """Check what is read of an answer. The first line of the input is the status and Retry-After, the rest the body."""
    line, _, body = data.partition(b"\n")
    number, _, pause = line.decode("latin-1").partition(" ")
    status = int(number) if re.fullmatch("[2-5][0-9]{2}", number) else 200
    headers = {"retry-after": pause} if pause else {}
    assert 0 <= retry_after.read(pause) <= retry_after.LONGEST
    tokens = _answer(
        lambda: token_endpoint.read_tokens(
            status,
            headers,
            body,
            url=TOKEN_URL,
            now=NOW,
            requested_scopes=("a",),
            secrets=(SECRET,),
            context=oauth_error.TokenRequestContext(server="s", resource=SERVER_URL, scopes=("a",)),
        )
    )
    if tokens is not None:
        _check_tokens(tokens)
    polled = _answer(
        lambda: device_authorization.read_poll(status, headers, body, flow=FLOW, now=NOW, secrets=(SECRET,))
    )
    if isinstance(polled, TokenSet):
        _check_tokens(polled)
    _check_others(status, headers, body)


def _check_tokens(tokens: TokenSet) -> None:
    assert tokens.token_type == "Bearer"
    assert tokens.refresh_expires_at is None or tokens.refresh_expires_at > NOW
    hint = jwt_expiry.read(tokens.access_token, obtained_at=NOW)
    assert hint is None or NOW + 1 <= hint <= NOW + jwt_expiry.MAX_LIFETIME
    for text in (tokens.access_token, tokens.refresh_token):
        if text is not None:
            assert _VISIBLE.fullmatch(text) and len(text) <= token_endpoint.MAX_TOKEN
            check_fields([(b"authorization", f"Bearer {text}".encode("ascii"))])
    assert all(map(_VISIBLE.fullmatch, tokens.scopes))
    if tokens.expires_at is not None:
        assert NOW + 1 <= tokens.expires_at <= NOW + token_endpoint.MAX_LIFETIME


def _check_others(status: int, headers: Mapping[str, str], body: bytes) -> None:
    """Check what is read of the same answer as one of the other endpoints."""
    start = _answer(
        lambda: device_authorization.read_response(
            status, headers, body, url=TOKEN_URL, http_loopback=False, secrets=(SECRET,)
        )
    )
    if start is not None:
        device = start.device
        _check_url(device.verification_uri)
        _check_texts((device.device_code, device.user_code))
        assert device_authorization.INTERVAL_MIN <= device.interval <= device_authorization.INTERVAL_MAX
        assert device_authorization.LIFETIME_MIN <= start.lifetime <= device_authorization.LIFETIME_MAX
    id_jag = _answer(lambda: token_exchange.read_id_jag(status, headers, body, url=TOKEN_URL, secrets=(SECRET,)))
    assert id_jag is None or _VISIBLE.fullmatch(id_jag.assertion)
    client = _answer(
        lambda: registration.read_response(
            status, body, url=f"{ISSUER}/register", supported=None, requested=ClientAuth.NONE, server="s"
        ),
        secrets=(),  # none is sent to register
    )
    if client is not None:
        _check_texts((client.client_id, client.client_secret or ""))
        assert client.client_auth is ClientAuth.NONE or client.client_secret
        assert client.secret_expires_at is None or 0 < client.secret_expires_at < 1e12


def _answer(read: Callable[[], T], secrets: Sequence[str] = (SECRET,)) -> T | None:
    try:
        return read()
    except AuthorizationServerUnavailable as error:
        assert error.retry_after is not None and 0 < error.retry_after <= retry_after.LONGEST
        check_error(error, secrets)
    except (DocumentRefused, TokenRefused, RegistrationImpossible) as error:
        check_error(error, secrets)
    return None


def pasted(data: bytes) -> None:
    """Check an address that a user pastes: what is taken from it is what it has, each once."""
    text = data.decode("utf-8", "replace")
    uri = FLOW.redirect_uri
    try:
        params = pasted_address.read(text, uri)
    except AddressRefused as refused:
        given = [value for name, value in parse_qsl(text.partition("?")[2]) if name in ("code", "state")]
        check_error(refused, [value for value in given if len(value) > 8])
        return
    start, _, query = text.strip(pasted_address.AROUND).partition("#")[0].partition("?")
    assert start in (uri, uri.removeprefix("http://")), "an address of somebody else"
    taken = {(name, value) for name, values in params.items() for value in values}
    assert taken == set(parse_qsl(query, keep_blank_values=True)), "other parameters"
    assert len(params["state"]) == 1
    assert params["state"][0]
    assert "code" in params or "error" in params
    assert all(len(params.get(name, ())) <= 1 for name in ("code", "error", "iss")), "a parameter twice"
