"""Describe the results of discovery: each document that was requested, and each decision that follows."""

from collections.abc import Iterator

from mcp_auth_proxy.broker.discovery import MetadataLookup
from mcp_auth_proxy.broker.plan import Plan
from mcp_auth_proxy.cli.doctor.proposal import PLACEHOLDER
from mcp_auth_proxy.cli.doctor.report import Request, ResponseExcerpt, Step, Verdict, shown
from mcp_auth_proxy.config.settings import OAuthSettings
from mcp_auth_proxy.errors import AuthorizationError, ConfigHint, DocumentRefused
from mcp_auth_proxy.models import ClientAuth, GrantType, RegistrationKind
from mcp_auth_proxy.oauth import device_authorization, discovery, jwt_bearer, registration, token_exchange
from mcp_auth_proxy.oauth.discovery import ResourceMetadata, ServerMetadata
from mcp_auth_proxy.oauth.fetch import Response

_STEPS = {
    "oauth.allow_missing_pkce": ("pkce", "RFC 8414 §2"),
    "oauth.client_auth": ("client authentication", "RFC 8414 §2"),
    "oauth.client_id": ("registration", "RFC 7591"),
    "oauth.dpop": ("dpop", "RFC 9728 §2"),
    "oauth.issuer": ("issuer", "RFC 9728 §2"),
    "oauth.metadata": (discovery.SERVER_METADATA, "RFC 8414 §3"),
}
"""Step and clause by the key of a hint."""

_GRANT_NAMES = {
    GrantType.AUTHORIZATION_CODE: "authorization_code",
    GrantType.CLIENT_CREDENTIALS: "client_credentials",
    GrantType.DEVICE_CODE: device_authorization.GRANT_TYPE,
    GrantType.JWT_BEARER: jwt_bearer.GRANT_TYPE,
    GrantType.ID_JAG: jwt_bearer.GRANT_TYPE,
    GrantType.TOKEN_EXCHANGE: token_exchange.GRANT_TYPE,
}
_GRANT_DEFAULT = ("authorization_code", "implicit")
"""The default if the server does not say (RFC 8414 §2)."""


def lookup_steps(
    lookups: list[MetadataLookup], error: AuthorizationError | None, oauth: OAuthSettings
) -> Iterator[Step]:
    """Yield a step for each URL that was requested. The one that stopped discovery is refused, others are notes."""
    without_resource = False
    for lookup in lookups:
        if lookup.document == discovery.RESOURCE_METADATA:
            without_resource = lookup.found is None
        elif without_resource:
            without_resource = False
            yield _without_resource_metadata(oauth)
        refused = lookup.error is not None and lookup.error is error
        yield Step(
            step=lookup.document,
            verdict=Verdict.REFUSED if refused else Verdict.OK if lookup.found else Verdict.NOTE,
            says=_describe_lookup(lookup),
            clause=_lookup_clause(lookup),
            request=Request(method="GET", url=shown(lookup.url)) if lookup.url else None,
            reply=ResponseExcerpt(status=lookup.response.status, text=shown(lookup.response.body))
            if lookup.response
            else None,
        )


def error_step(error: AuthorizationError, lookups: list[MetadataLookup], hint: ConfigHint | None) -> Step | None:
    """Return the step for the error that stopped the proxy; ``hint`` is the key that would allow it.

    None if the step of a lookup already has the error.
    """
    if any(lookup.error is error for lookup in lookups):
        return None
    key = hint.key if hint else ""
    name, clause = _STEPS.get(key, ("authorization", ""))
    if isinstance(error, DocumentRefused):
        clause = error.clause
    return Step(step=name, verdict=Verdict.REFUSED, says=str(error), clause=clause)


def default_endpoint(plan: Plan, url: str, response: Response, schemes: tuple[str, ...]) -> Step:
    """Return the step for a server that has neither metadata nor the default endpoints."""
    if plan.registration.client_id:
        says = (
            f"The server has no metadata, and the default endpoint {url} answers HTTP {response.status}: there is no "
            f"OAuth. If its authorization server is elsewhere, set oauth.issuer or oauth.metadata."
        )
    else:
        says = str(registration.oauth_not_found(url, response.status, server=plan.server.name, schemes=schemes))
    return Step(
        step="authorization",
        verdict=Verdict.REFUSED,
        says=f"{says} If the server needs an API key, this proxy can't help.",
        clause="MCP 2025-03-26",
        request=Request(method="OPTIONS", url=url),
        reply=ResponseExcerpt(status=response.status, text=shown(response.body)),
    )


def plan_steps(plan: Plan, resource: ResourceMetadata | None, challenged: tuple[str, ...] | None) -> Iterator[Step]:
    """Yield a step for each decision of the plan. ``challenged``: the scopes of the challenge."""
    yield _issuer(plan)
    if plan.server.oauth.grant is GrantType.AUTHORIZATION_CODE:
        yield _pkce(plan.metadata)
    yield from _grants(plan)
    yield _registration(plan)
    yield _client_auth(plan)
    yield _scopes(plan, challenged)
    yield _resource(plan)
    if plan.server.oauth.grant is GrantType.AUTHORIZATION_CODE:
        yield _iss(plan.metadata)
    yield _revocation(plan.metadata)


def is_first_contact(plan: Plan) -> bool:
    """Return whether a configured client secret goes to the authorization server that the MCP server names."""
    oauth = plan.server.oauth
    # An issuer without metadata can't be pinned: discovery would not find it.
    return oauth.grant is GrantType.CLIENT_CREDENTIALS and not oauth.pinned and not plan.metadata.is_fallback


def registered_by(plan: Plan) -> str:
    """Describe how the proxy becomes a client there."""
    match plan.registration.kind:
        case RegistrationKind.CONFIGURED if plan.registration.client_id == PLACEHOLDER:
            return "a client that you have to register by hand"
        case RegistrationKind.CONFIGURED if not plan.registration.client_id:
            return "no client id: the assertion identifies it"
        case RegistrationKind.CONFIGURED:
            return "the configured client"
        case RegistrationKind.METADATA_DOCUMENT:
            return "a Client ID Metadata Document"
        case RegistrationKind.DYNAMIC if plan.registration.client_id:
            return "dynamic registration, already done"
        case _:
            return "dynamic registration"


def _describe_lookup(lookup: MetadataLookup) -> str:
    if lookup.error is not None:
        return str(lookup.error)
    match lookup.found:
        case ResourceMetadata(resource=resource, authorization_servers=issuers, scopes_supported=scopes):
            listed = f"; it lists the scopes {' '.join(scopes)}" if scopes else ""
            return f"It is for {shown(resource)} and names the authorization server {', '.join(issuers)}{listed}."
        case ServerMetadata() as found:
            where = "Set in the configuration" if not lookup.url else "It is valid"
            ends = f"token endpoint {found.token_endpoint}"
            if found.authorization_endpoint:
                ends = f"authorization endpoint {found.authorization_endpoint}, {ends}"
            return f"{where}: issuer {found.issuer}, {ends}."
    if lookup.response is None:
        return "There was no response before discovery was stopped."
    return "It does not exist here; the next URL is tried."


def _lookup_clause(lookup: MetadataLookup) -> str:
    if isinstance(lookup.error, DocumentRefused) and lookup.error.clause:
        return lookup.error.clause
    if lookup.document == discovery.RESOURCE_METADATA:
        return "RFC 9728 §3.1"
    return "OpenID Connect Discovery §4" if lookup.url.endswith("/openid-configuration") else "RFC 8414 §3.1"


def _without_resource_metadata(oauth: OAuthSettings) -> Step:
    used = f"{oauth.issuer}, from the configuration" if oauth.issuer else "the server's own origin"
    clause = "RFC 9728 §3" if oauth.issuer else "MCP 2025-03-26"
    says = f"The server has none. The proxy uses as its authorization server: {used}."
    return _note(discovery.RESOURCE_METADATA, says, clause)


def _issuer(plan: Plan) -> Step:
    issuer, oauth = plan.key.issuer, plan.server.oauth
    if oauth.metadata is not None:
        return _ok("issuer", f"{issuer}, from the configuration.", "RFC 8414 §2")
    if plan.metadata.is_fallback:
        says = f"There is no metadata, so {issuer} is used as the issuer, with the default endpoints."
        return _note("issuer", says, "MCP 2025-03-26")
    if is_first_contact(plan):
        says = (
            f"The metadata has exactly the expected issuer {issuer}, but nothing pins it: the client's credentials go "
            "to whatever the MCP server names first. If it is the right one, "
            f"set {plan.server.key('oauth.issuer')}: {issuer}"
        )
        return _note("issuer", says, "RFC 8414 §3.3")
    pinned = ", and oauth.issuer pins it" if oauth.issuer else ""
    return _ok("issuer", f"The metadata has exactly the expected issuer {issuer}{pinned}.", "RFC 8414 §3.3")


def _pkce(metadata: ServerMetadata) -> Step:
    if "S256" in (metadata.code_challenge_methods_supported or ()):
        return _ok("pkce", "S256 is supported.", "RFC 7636 §4.2")
    if metadata.is_fallback:
        return _note(
            "pkce", "There is no metadata that says so, but MCP 2025-03-26 requires it of every server.", "RFC 7636"
        )
    return _note("pkce", "S256 is not advertised, but used anyway (oauth.allow_missing_pkce).", "RFC 8414 §2")


def _grants(plan: Plan) -> Iterator[Step]:
    grant, listed = plan.server.oauth.grant, plan.metadata.grant_types_supported
    name, clause = _GRANT_NAMES[grant], "RFC 8414 §2"
    stated = listed if listed is not None else _GRANT_DEFAULT
    listing = f"the server lists {', '.join(listed) or 'none'}" if listed is not None else "the server lists none"
    if name in stated or (listed is None and grant is not GrantType.AUTHORIZATION_CODE):
        yield _ok("grant", f"{name} is used; {listing}.", clause)
    else:
        yield _note("grant", f"{name} is used but not listed; {listing}. The server may refuse it.", clause)
    if not grant.unattended and listed is not None and "refresh_token" not in listed:
        yield _note(
            "grant", "refresh_token is not listed: the user may have to consent again when a token expires.", clause
        )


def _registration(plan: Plan) -> Step:
    metadata, oauth = plan.metadata, plan.server.oauth
    ways = [
        ("configured", oauth.client_id not in (None, PLACEHOLDER)),
        ("Client ID Metadata Document", metadata.client_id_metadata_document_supported),
        ("dynamic registration", metadata.registration_endpoint is not None),
    ]
    offered = ", ".join(f"{way}: {'yes' if there else 'no'}" for way, there in ways)
    used = f"The proxy would use {registered_by(plan)} ({offered})."
    kind = plan.registration.kind
    clause = "RFC 7591"
    if kind is RegistrationKind.METADATA_DOCUMENT:
        clause = "draft-ietf-oauth-client-id-metadata-document"
        used += f" The authorization server must be able to fetch {plan.registration.client_id}."
    if kind is RegistrationKind.DYNAMIC and plan.registration.client_id:
        forget = f"mcp-auth-proxy logout {plan.server.command_name} --forget-client"
        used += f" If the sign-in page does not know that client any more, `{forget}` makes the proxy register again."
    return _ok("registration", used, clause)


def _client_auth(plan: Plan) -> Step:
    method, listed = plan.registration.client_auth, plan.metadata.token_endpoint_auth_methods_supported
    if plan.registration.kind is RegistrationKind.DYNAMIC and not plan.registration.client_id and listed is None:
        says = "The server lists no methods; it chooses one at registration."
        return _ok("client authentication", says, "RFC 7591 §2")
    listing = f"the server lists {', '.join(listed)}" if listed else "the server lists none"
    if not listed or method.value in listed:
        return _ok("client authentication", f"{method.value} is used; {listing}.", "RFC 8414 §2")
    hint = " The client needs a secret: set oauth.client_secret." if method is ClientAuth.NONE else ""
    says = f"{method.value} is used but not listed; {listing}.{hint}"
    return _note("client authentication", says, "RFC 8414 §2")


def _scopes(plan: Plan, challenged: tuple[str, ...] | None) -> Step:
    clause = "RFC 6749 §3.3"
    if not plan.scopes:
        says = "None are requested: neither the configuration nor the challenge nor the resource metadata has any."
        return _ok("scopes", says, clause)
    if plan.server.oauth.scopes is not None:
        source = "the configuration"
    elif challenged:
        source = "the challenge"
    else:
        source = "the resource metadata"
    added = " (offline_access is added because the server lists it)" if "offline_access" in plan.scopes else ""
    return _ok("scopes", f"Requested: {' '.join(plan.scopes)}, from {source}{added}.", clause)


def _resource(plan: Plan) -> Step:
    clause = "RFC 8707 §2"
    if not plan.key.resource:
        return _note("resource", "The parameter is omitted (oauth.resource: omit).", clause)
    return _ok("resource", f"Sent with each token request: {shown(plan.key.resource)}", clause)


def _iss(metadata: ServerMetadata) -> Step:
    if metadata.iss_parameter_supported:
        return _ok(
            "iss",
            "The server sends it in every authorization response; a response without it is refused.",
            "RFC 9207 §3",
        )
    return _note("iss", "The server does not announce it; if it sends one, it is checked.", "RFC 9207 §2.4")


def _revocation(metadata: ServerMetadata) -> Step:
    if metadata.revocation_endpoint:
        return _ok("revocation", f"`logout` revokes at {metadata.revocation_endpoint}.", "RFC 7009")
    return _note("revocation", "Not supported by the server: `logout` only forgets the grant.", "RFC 7009")


def _ok(step: str, says: str, clause: str) -> Step:
    return Step(step=step, verdict=Verdict.OK, says=says, clause=clause)


def _note(step: str, says: str, clause: str) -> Step:
    return Step(step=step, verdict=Verdict.NOTE, says=says, clause=clause)
