"""Puts what discovery found into words: each document that was asked for, and each decision that follows."""

from collections.abc import Iterator

from mcp_auth_proxy.broker.discovery import MetadataLookup
from mcp_auth_proxy.broker.plan import Plan
from mcp_auth_proxy.cli.doctor.proposal import PLACEHOLDER
from mcp_auth_proxy.cli.doctor.report import Reply, Request, Step, Verdict, shown
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
"""Step and clause of what has a remedy."""

_GRANT_NAMES = {
    GrantType.AUTHORIZATION_CODE: "authorization_code",
    GrantType.CLIENT_CREDENTIALS: "client_credentials",
    GrantType.DEVICE_CODE: device_authorization.GRANT_TYPE,
    GrantType.JWT_BEARER: jwt_bearer.GRANT_TYPE,
    GrantType.ID_JAG: jwt_bearer.GRANT_TYPE,
    GrantType.TOKEN_EXCHANGE: token_exchange.GRANT_TYPE,
}
_GRANT_DEFAULT = ("authorization_code", "implicit")
"""RFC 8414 §2, where the server does not say."""


def look_steps(looks: list[MetadataLookup], error: AuthorizationError | None, oauth: OAuthSettings) -> Iterator[Step]:
    """Yield a step for each address that was asked; what stopped discovery is refused, anything else passed over."""
    without_resource = False
    for look in looks:
        if look.document == discovery.RESOURCE_METADATA:
            without_resource = look.found is None
        elif without_resource:
            without_resource = False
            yield _without_resource_metadata(oauth)
        refused = look.error is not None and look.error is error
        yield Step(
            step=look.document,
            verdict=Verdict.REFUSED if refused else Verdict.OK if look.found else Verdict.NOTE,
            says=_look_says(look),
            clause=_look_clause(look),
            request=Request(method="GET", url=shown(look.url)) if look.url else None,
            reply=Reply(status=look.response.status, text=shown(look.response.body)) if look.response else None,
        )


def error_step(error: AuthorizationError, looks: list[MetadataLookup], remedy: ConfigHint | None) -> Step | None:
    """Return the step for what stopped the proxy, and would be allowed by ``remedy``.

    None where a look tells of it already.
    """
    if any(look.error is error for look in looks):
        return None
    key = remedy.key if remedy else ""
    name, clause = _STEPS.get(key, ("authorization", ""))
    if isinstance(error, DocumentRefused):
        clause = error.clause
    return Step(step=name, verdict=Verdict.REFUSED, says=str(error), clause=clause)


def default_endpoint(plan: Plan, url: str, response: Response, schemes: tuple[str, ...]) -> Step:
    """Return the step for a server without metadata that does not have the default endpoints either."""
    if plan.registration.client_id:
        says = (
            f"The server has no metadata, and of the default endpoints {url} answers HTTP {response.status}: no OAuth "
            f"can be found there. If its authorization server is elsewhere, give that in oauth.issuer or "
            f"oauth.metadata."
        )
    else:
        says = str(registration.oauth_not_found(url, response.status, server=plan.server.name, schemes=schemes))
    return Step(
        step="authorization",
        verdict=Verdict.REFUSED,
        says=f"{says} If it wants an API key or the like, that is not what this proxy is for.",
        clause="MCP 2025-03-26",
        request=Request(method="OPTIONS", url=url),
        reply=Reply(status=response.status, text=shown(response.body)),
    )


def plan_steps(plan: Plan, resource: ResourceMetadata | None, asked: tuple[str, ...] | None) -> Iterator[Step]:
    """Yield a step for each thing that was decided; ``asked`` are the scopes of the challenge."""
    yield _issuer(plan)
    if plan.server.oauth.grant is GrantType.AUTHORIZATION_CODE:
        yield _pkce(plan.metadata)
    yield from _grants(plan)
    yield _registration(plan)
    yield _client_auth(plan)
    yield _scopes(plan, resource, asked)
    yield _resource(plan)
    if plan.server.oauth.grant is GrantType.AUTHORIZATION_CODE:
        yield _iss(plan.metadata)
    yield _revocation(plan.metadata)


def registered_by(plan: Plan) -> str:
    """Return in words how the proxy becomes a client there."""
    match plan.registration.kind:
        case RegistrationKind.CONFIGURED if plan.registration.client_id == PLACEHOLDER:
            return "a client that is yet to be registered by hand"
        case RegistrationKind.CONFIGURED if not plan.registration.client_id:
            return "none: the assertion says who it is"
        case RegistrationKind.CONFIGURED:
            return "a client that was registered beforehand"
        case RegistrationKind.METADATA_DOCUMENT:
            return "a Client ID Metadata Document"
        case RegistrationKind.DYNAMIC if plan.registration.client_id:
            return "dynamic registration, done already"
        case _:
            return "dynamic registration"


def _look_says(look: MetadataLookup) -> str:
    if look.error is not None:
        return str(look.error)
    match look.found:
        case ResourceMetadata(resource=resource, authorization_servers=issuers, scopes_supported=scopes):
            listed = f"; it lists the scopes {' '.join(scopes)}" if scopes else ""
            return f"It is for {shown(resource)}, which trusts the authorization server {', '.join(issuers)}{listed}."
        case ServerMetadata() as found:
            where = "Given in the configuration" if not look.url else "It is valid"
            ends = f"token endpoint {found.token_endpoint}"
            if found.authorization_endpoint:
                ends = f"authorization endpoint {found.authorization_endpoint}, {ends}"
            return f"{where}: issuer {found.issuer}, {ends}."
    if look.response is None:
        return "No answer came before discovery was given up."
    return "It is not there; the next address is tried."


def _look_clause(look: MetadataLookup) -> str:
    if isinstance(look.error, DocumentRefused) and look.error.clause:
        return look.error.clause
    if look.document == discovery.RESOURCE_METADATA:
        return "RFC 9728 §3.1"
    return "OpenID Connect Discovery §4" if look.url.endswith("/openid-configuration") else "RFC 8414 §3.1"


def _without_resource_metadata(oauth: OAuthSettings) -> Step:
    taken = f"{oauth.issuer}, which the configuration names" if oauth.issuer else "the server's own origin"
    clause = "RFC 9728 §3" if oauth.issuer else "MCP 2025-03-26"
    says = f"The server has none. Its authorization server is taken to be {taken}."
    return _note(discovery.RESOURCE_METADATA, says, clause)


def _issuer(plan: Plan) -> Step:
    issuer, oauth = plan.key.issuer, plan.server.oauth
    if oauth.metadata is not None:
        return _ok("issuer", f"{issuer}, as the configuration has it.", "RFC 8414 §2")
    if plan.metadata.is_fallback:
        says = f"{issuer} is taken for the issuer, with default endpoints: it has no metadata that would say."
        return _note("issuer", says, "MCP 2025-03-26")
    pinned = ", and it is the one that oauth.issuer pins" if oauth.issuer else ""
    return _ok("issuer", f"The metadata names {issuer}, letter by letter as expected{pinned}.", "RFC 8414 §3.3")


def _pkce(metadata: ServerMetadata) -> Step:
    if "S256" in (metadata.code_challenge_methods_supported or ()):
        return _ok("pkce", "S256 is supported.", "RFC 7636 §4.2")
    if metadata.is_fallback:
        return _note("pkce", "There is no metadata to say so; MCP 2025-03-26 demands it of every server.", "RFC 7636")
    return _note("pkce", "S256 is not advertised, and used all the same: oauth.allow_missing_pkce.", "RFC 8414 §2")


def _grants(plan: Plan) -> Iterator[Step]:
    grant, listed = plan.server.oauth.grant, plan.metadata.grant_types_supported
    name, clause = _GRANT_NAMES[grant], "RFC 8414 §2"
    stated = listed if listed is not None else _GRANT_DEFAULT
    listing = f"listed are {', '.join(listed) or 'none'}" if listed is not None else "the server lists none"
    if name in stated or (listed is None and grant is not GrantType.AUTHORIZATION_CODE):
        yield _ok("grant", f"{name} is used; {listing}.", clause)
    else:
        yield _note("grant", f"{name} is used, but not listed; {listing}. It may be refused.", clause)
    if not grant.unattended and listed is not None and "refresh_token" not in listed:
        yield _note("grant", "refresh_token is not listed: the user may be asked again when a token ends.", clause)


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
    return _ok("registration", used, clause)


def _client_auth(plan: Plan) -> Step:
    method, listed = plan.registration.client_auth, plan.metadata.token_endpoint_auth_methods_supported
    if plan.registration.kind is RegistrationKind.DYNAMIC and not plan.registration.client_id and listed is None:
        says = "The server lists no methods; it decides when the client is registered."
        return _ok("client authentication", says, "RFC 7591 §2")
    listing = f"listed are {', '.join(listed)}" if listed else "the server lists none"
    if not listed or method.value in listed:
        return _ok("client authentication", f"By {method.value}; {listing}.", "RFC 8414 §2")
    hint = " Its client needs a secret: oauth.client_secret." if method is ClientAuth.NONE else ""
    says = f"By {method.value}, which is not listed; {listing}.{hint}"
    return _note("client authentication", says, "RFC 8414 §2")


def _scopes(plan: Plan, resource: ResourceMetadata | None, asked: tuple[str, ...] | None) -> Step:
    clause = "RFC 6749 §3.3"
    if not plan.scopes:
        says = "None are asked for: neither configuration nor challenge nor resource metadata names any."
        return _ok("scopes", says, clause)
    if plan.server.oauth.scopes is not None:
        source = "the configuration"
    elif asked:
        source = "the challenge"
    else:
        source = "the resource metadata"
    added = " (offline_access is added, since the server lists it)" if "offline_access" in plan.scopes else ""
    return _ok("scopes", f"Asked for: {' '.join(plan.scopes)}, as {source} has it{added}.", clause)


def _resource(plan: Plan) -> Step:
    clause = "RFC 8707 §2"
    if not plan.key.resource:
        return _note("resource", "The parameter is left out (oauth.resource: omit).", clause)
    return _ok("resource", f"Sent with every request for a token: {shown(plan.key.resource)}", clause)


def _iss(metadata: ServerMetadata) -> Step:
    if metadata.iss_parameter_supported:
        return _ok("iss", "Promised in every authorization response; one without it is refused.", "RFC 9207 §3")
    return _note("iss", "Not promised; where it comes all the same it is checked.", "RFC 9207 §2.4")


def _revocation(metadata: ServerMetadata) -> Step:
    if metadata.revocation_endpoint:
        return _ok("revocation", f"`logout` revokes at {metadata.revocation_endpoint}.", "RFC 7009")
    return _note("revocation", "Not offered: `logout` only forgets.", "RFC 7009")


def _ok(step: str, says: str, clause: str) -> Step:
    return Step(step=step, verdict=Verdict.OK, says=says, clause=clause)


def _note(step: str, says: str, clause: str) -> Step:
    return Step(step=step, verdict=Verdict.NOTE, says=says, clause=clause)
