"""Read the ``oauth`` section of a server."""

from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from mcp_auth_proxy.config import signing_key, values
from mcp_auth_proxy.config.reader import Section
from mcp_auth_proxy.config.settings import Credential, IdpSettings, OAuthSettings, ServerSettings
from mcp_auth_proxy.config.signing_key import SigningKey
from mcp_auth_proxy.models import ClientAuth, DpopUse, GrantType

_GRANTS: Mapping[str, GrantType] = {str(grant): grant for grant in GrantType}
_CLIENT_AUTHS: Mapping[str, ClientAuth] = {str(method): method for method in ClientAuth}
_IDP_AUTHS = {name: method for name, method in _CLIENT_AUTHS.items() if method is not ClientAuth.PRIVATE_KEY_JWT}
_ALGORITHMS: Mapping[str, str] = {name: name for name in signing_key.ALGORITHMS}
_DPOP: Mapping[str, DpopUse] = {str(use): use for use in DpopUse}
_AUDIENCES: Mapping[str, Literal["issuer", "endpoint"]] = {"issuer": "issuer", "endpoint": "endpoint"}
_MAX_NAMED = 20
_OWN_PARAMS = frozenset(
    {
        *("response_type", "response_mode", "client_id", "client_secret", "client_assertion", "client_assertion_type"),
        *("redirect_uri", "state", "scope", "resource", "request", "request_uri", "grant_type", "code"),
        *("code_verifier", "code_challenge", "code_challenge_method", "dpop_jkt"),
    }
)
_OWN_TOKEN_PARAMS = _OWN_PARAMS | {
    *("refresh_token", "assertion", "device_code", "subject_token", "subject_token_type", "requested_token_type"),
}
_HINTS = {"scope": "use scopes", "resource": "use the key resource", "client_id": "use the key client_id"}

# Grants that need a client registered beforehand: nobody is there to approve a registration.
_PRE_REGISTERED = frozenset({GrantType.CLIENT_CREDENTIALS, GrantType.ID_JAG, GrantType.TOKEN_EXCHANGE})
# Grants whose credential is worth more than one server: it goes to no authorization server that the MCP server chooses.
_PINNED = frozenset({GrantType.JWT_BEARER, GrantType.ID_JAG, GrantType.TOKEN_EXCHANGE})
# Keys that only one grant uses, and that it requires.
_OF_ONE_GRANT: Mapping[str, GrantType] = {"assertion": GrantType.JWT_BEARER, "idp": GrantType.ID_JAG}
_ENDPOINTS: Mapping[GrantType, str] = {
    GrantType.AUTHORIZATION_CODE: "authorization_endpoint",
    GrantType.DEVICE_CODE: "device_authorization_endpoint",
}
# Endpoints that the proxy or the user's browser sends requests to.
_REQUESTED_ENDPOINTS = frozenset(
    {"token_endpoint", "registration_endpoint", "revocation_endpoint", *_ENDPOINTS.values()}
)


def read_oauth(section: Section, *, http_server: str = "") -> OAuthSettings:
    """Return the settings of the section. Errors go to the context.

    ``http_server``: the URL of the server if it has allow_http, else empty.
    """
    grant = section.choice("grant", _GRANTS, GrantType.AUTHORIZATION_CODE)
    client_auth = section.choice("client_auth", _CLIENT_AUTHS, None)
    if not section.is_faulty("grant") and not section.is_faulty("client_auth"):
        _check_client(section, grant, client_auth)
        _check_key(section, grant, client_auth)
        _check_grant(section, grant)
    settings = OAuthSettings(
        grant=grant,
        client_id=section.text("client_id"),
        client_secret=section.parsed("client_secret", section.context.secret, None),
        client_auth=client_auth,
        private_key=_read_key(section),
        client_assertion_audience=section.choice("client_assertion_audience", _AUDIENCES, "issuer"),
        assertion=section.parsed("assertion", lambda text: _credential(section, text), None),
        idp=_read_idp(section.section("idp")) if section.has("idp") else None,
        scopes=read_scopes(section),
        issuer=section.parsed("issuer", lambda text: values.issuer(text, own=http_server), None),
        resource=section.parsed("resource", values.resource, "auto"),
        authorization_params=read_authorization_params(section),
        token_params=_read_params(section.section("token_params"), _OWN_TOKEN_PARAMS),
        metadata=_read_metadata(section, grant, http_server),
        client_metadata_url=section.parsed("client_metadata_url", values.client_metadata_url, None),
        dpop=section.choice("dpop", _DPOP, DpopUse.OFF),
        allow_missing_pkce=section.boolean("allow_missing_pkce", default=False),
    )
    section.close()
    return settings


def first_contact_warning(servers: Mapping[str, ServerSettings]) -> str | None:
    """Return what to warn of if a client secret goes to the authorization server that an MCP server names first."""
    keys = [
        server.key("oauth.issuer")
        for server in servers.values()
        if server.oauth.grant is GrantType.CLIENT_CREDENTIALS and not server.oauth.pinned
    ]
    if not keys:
        return None
    more = f" and {len(keys) - _MAX_NAMED} more" if len(keys) > _MAX_NAMED else ""
    return (
        f"{', '.join(keys[:_MAX_NAMED])}{more}: not set, so with grant client_credentials the client's credentials go "
        "to the authorization server that the MCP server names first. `mcp-auth-proxy doctor NAME` shows what to write"
    )


def _check_client(section: Section, grant: GrantType, client_auth: ClientAuth | None) -> None:
    has_id, has_secret = section.has("client_id"), section.has("client_secret")
    if grant in _PRE_REGISTERED and not has_id:
        section.error("client_id", f"is needed with grant {grant}")
    elif has_secret and not has_id:
        section.error("client_secret", "needs a client_id")
    proves_itself = has_secret or section.has("private_key")
    needs_no_secret = client_auth in (ClientAuth.NONE, ClientAuth.PRIVATE_KEY_JWT)
    if grant is GrantType.CLIENT_CREDENTIALS and not proves_itself and not needs_no_secret:
        section.error("client_secret", "is needed with grant client_credentials (or private_key, or client_auth: none)")
    elif has_id and not has_secret and client_auth in (ClientAuth.BASIC, ClientAuth.POST):
        section.error("client_auth", f"{client_auth} needs a client_secret")


def _check_key(section: Section, grant: GrantType, client_auth: ClientAuth | None) -> None:
    has_key = section.has("private_key")
    if client_auth is ClientAuth.PRIVATE_KEY_JWT:
        if not has_key:
            section.error("private_key", "is needed with client_auth private_key_jwt")
        if not section.has("client_id"):
            section.error("client_id", "is needed with client_auth private_key_jwt")
    elif has_key and client_auth is not None:
        section.error("private_key", f"has no effect with client_auth {client_auth}: use private_key_jwt")
    elif has_key and section.has("client_secret"):
        section.error("private_key", "there is a client_secret too: choose one with client_auth")
    elif has_key and not section.has("client_id") and grant not in _PRE_REGISTERED:
        section.error("private_key", "needs a client_id")
    for key in ("signing_alg", "client_assertion_audience"):
        if section.has(key) and not has_key and not section.is_faulty("private_key"):
            section.error(key, "needs a private_key")


def _check_grant(section: Section, grant: GrantType) -> None:
    for key, its_grant in _OF_ONE_GRANT.items():
        if grant is its_grant and not section.has(key):
            section.error(key, f"is needed with grant {grant}")
        elif grant is not its_grant and section.has(key):
            section.error(key, f"is for grant {its_grant} only")
    if grant in _PINNED and not section.has("issuer") and not section.has("metadata"):
        section.error(
            "issuer",
            f"is needed with grant {grant}, or metadata: the credential would go to whatever authorization server the "
            f"MCP server names. `mcp-auth-proxy doctor URL` shows which one that is",
        )


def _read_key(section: Section) -> SigningKey | None:
    algorithm = section.choice("signing_alg", _ALGORITHMS, None)
    return section.parsed(
        "private_key", lambda text: signing_key.read(section.context.secret(text).value, algorithm), None
    )


def _credential(section: Section, text: str) -> Credential:
    """Return a file that is read again at each use and need not exist yet, or a secret from the environment."""
    kind, _, name = text.partition(":")
    if kind == "file" and name:
        path: Path = section.context.path(name)
        return path
    if kind == "env":
        return section.context.secret(text)
    raise ValueError("must be file:PATH, which is read again at each use, or env:NAME")


def _read_idp(section: Section) -> IdpSettings | None:
    if not section.has("issuer") and not section.has("token_endpoint"):
        section.error("issuer", "is needed, or token_endpoint: where to request the ID-JAG")
    if not section.has("client_id"):
        section.error("client_id", "is needed: the id of the proxy at the identity provider")
    if section.has("id_token") == section.has("refresh_token"):
        section.error("id_token", "is needed, or refresh_token, but not both: they identify the user")
    client_auth = section.choice("client_auth", _IDP_AUTHS, None)
    if client_auth in (ClientAuth.BASIC, ClientAuth.POST) and not section.has("client_secret"):
        section.error("client_auth", f"{client_auth} needs a client_secret")
    settings = IdpSettings(
        issuer=section.parsed("issuer", values.issuer, None),
        token_endpoint=section.parsed("token_endpoint", values.endpoint, None),
        client_id=section.text("client_id") or "",
        client_secret=section.parsed("client_secret", section.context.secret, None),
        client_auth=client_auth,
        id_token=section.parsed("id_token", lambda text: _credential(section, text), None),
        refresh_token=section.parsed("refresh_token", lambda text: _credential(section, text), None),
    )
    section.close()
    return settings


def read_scopes(section: Section) -> tuple[str, ...] | None:
    """Return the scopes of a section, without duplicates; None if it has none."""
    scopes = section.each("scopes", values.scope)
    return None if scopes is None else tuple(dict.fromkeys(scopes))


def read_authorization_params(section: Section) -> dict[str, str]:
    """Return the additional parameters of authorization requests."""
    return _read_params(section.section("authorization_params"), _OWN_PARAMS)


def _read_params(section: Section, own: frozenset[str]) -> dict[str, str]:
    params: dict[str, str] = {}
    for name, value in section.entries():
        if name in own:
            hint = f": {_HINTS[name]}" if name in _HINTS else ""
            section.error(name, f"is set by the proxy itself{hint}")
        elif not isinstance(value, str):
            section.error(name, "must be text")
        else:
            params[name] = value
    return params


def _read_metadata(section: Section, grant: GrantType, http_server: str) -> dict[str, object] | None:
    inner = section.section("metadata")
    if not section.has("metadata"):
        return None
    metadata = {name: _metadata_value(inner, name, value, http_server) for name, value in inner.entries()}
    for name in filter(None, ("token_endpoint", _ENDPOINTS.get(grant))):
        if not inner.has(name):
            inner.error(name, "is needed in static metadata")
    return metadata


def _metadata_value(section: Section, name: str, value: object, http_server: str) -> object:
    """Return a metadata value (RFC 8414 §2), read by its name: URL, list or boolean (``…_supported``), or as it is."""
    if name == "issuer":
        return section.parsed(name, lambda text: values.issuer(text, own=http_server), "")
    if name in _REQUESTED_ENDPOINTS:
        return section.parsed(name, values.endpoint, "")
    if name.endswith(("_endpoint", "_uri")):
        return section.parsed(name, values.any_url, "")
    flag = {"true": True, "false": False}.get(value) if isinstance(value, str) else None
    if flag is not None:
        return flag
    if name.endswith("_supported"):
        return list(section.each(name, str) or ())
    return value
