"""``/discover``: what a server asks for, found out without registering or storing anything."""

from collections.abc import Sequence
from typing import Annotated, Literal

from msgspec import Meta

from mcp_auth_proxy.broker import Examination
from mcp_auth_proxy.broker.discovery import MetadataLookup
from mcp_auth_proxy.errors import AuthorizationServerUnavailable, ConfigurationError, DocumentRefused, excerpt
from mcp_auth_proxy.oauth import challenge as challenges
from mcp_auth_proxy.oauth.discovery import ServerMetadata
from mcp_auth_proxy.web.api.models import Body, View
from mcp_auth_proxy.web.api.operations import Access, Answer, Call, Operation
from mcp_auth_proxy.web.api.problems import invalid_field
from mcp_auth_proxy.web.api.reach import answered

Method = Literal["client_id_metadata_document", "dynamic", "configured"]


class Target(Body):
    """The server to ask."""

    mcp_server_url: Annotated[str, Meta(min_length=1, max_length=2000)]


class Finding(View):
    """One step of discovery: a document that was looked up, or a rule."""

    step: str
    verdict: Literal["ok", "note", "refused"]
    says: str
    url: str | None = None
    status: Annotated[int | None, Meta(description="The HTTP status of the answer.")] = None


class DiscoveryView(View):
    """What a server asks for. What it does not have, is null."""

    mcp_server_url: str
    requires_authorization: bool
    resource: str | None
    issuer: str | None
    scopes_supported: list[str] | None
    authorization_endpoint: str | None
    token_endpoint: str | None
    registration_endpoint: str | None
    supports_dynamic_registration: bool
    registration_methods: Annotated[list[Method], Meta(description="How the proxy can become a client there.")]
    findings: list[Finding]


async def discover(call: Call[Target, None]) -> Answer:
    """Ask a server and its authorization server."""
    url = call.body.mcp_server_url
    try:
        server = call.api.made.preview(call.caller.principal, url)
    except ConfigurationError as error:
        raise invalid_field(("body", "mcp_server_url"), error.errors[0].problem) from None
    with answered():
        status, challenge = await call.api.probe(server)
        found = await call.api.broker.examine(server, challenge=challenge)
        demanded = status == 401
        failed = isinstance(found.error, DocumentRefused | AuthorizationServerUnavailable)
        if found.error is not None and found.metadata is None and (demanded or failed):
            raise found.error
    asked = challenges.bearer(challenge) if demanded else None
    return Answer(_view(url, found, demanded=demanded, scopes=() if asked is None else asked.scopes or ()))


def _view(url: str, found: Examination, *, demanded: bool, scopes: Sequence[str]) -> DiscoveryView:
    """``scopes``: those of the challenge."""
    metadata, resource = found.metadata, found.resource
    supported = resource.scopes_supported if resource is not None else None
    if supported is None and metadata is not None:
        supported = metadata.scopes_supported
    return DiscoveryView(
        mcp_server_url=url,
        requires_authorization=demanded,
        resource=resource.resource if resource is not None else None,
        issuer=metadata.issuer if metadata is not None else None,
        scopes_supported=None if supported is None else list(supported),
        authorization_endpoint=(metadata.authorization_endpoint or None) if metadata is not None else None,
        token_endpoint=metadata.token_endpoint if metadata is not None else None,
        registration_endpoint=metadata.registration_endpoint if metadata is not None else None,
        supports_dynamic_registration=metadata is not None and metadata.registration_endpoint is not None,
        registration_methods=_methods(metadata),
        findings=_findings(found, demanded=demanded, scopes=scopes),
    )


def _methods(metadata: ServerMetadata | None) -> list[Method]:
    if metadata is None:
        return []
    methods: list[Method] = []
    if metadata.client_id_metadata_document_supported:
        methods.append("client_id_metadata_document")
    if metadata.registration_endpoint is not None:
        methods.append("dynamic")
    return [*methods, "configured"]


def _findings(found: Examination, *, demanded: bool, scopes: Sequence[str]) -> list[Finding]:
    asks = f"It asks for a token, and for the scopes {excerpt(' '.join(scopes))}." if scopes else "It asks for a token."
    says = asks if demanded else "It answers without a token, so it may need no authorization."
    findings = [Finding(step="challenge", verdict="ok" if demanded else "note", says=says)]
    findings += [_finding(lookup, refused=lookup.error is not None) for lookup in found.lookups]
    if found.error is not None and all(lookup.error is not found.error for lookup in found.lookups):
        findings.append(Finding(step="authorization", verdict="refused", says=str(found.error)))
    if found.metadata is not None and found.metadata.is_fallback:
        says = "There is no metadata of an authorization server: the endpoints are the default ones of MCP 2025-03-26."
        findings.append(Finding(step="issuer", verdict="note", says=says))
    return findings


def _finding(lookup: MetadataLookup, *, refused: bool) -> Finding:
    if lookup.error is not None:
        says = str(lookup.error)
    elif lookup.found is not None:
        says = "It is valid."
    else:
        says = "It does not exist here."
    return Finding(
        step=lookup.document,
        verdict="refused" if refused else "ok" if lookup.found is not None else "note",
        says=says,
        url=lookup.url or None,
        status=lookup.response.status if lookup.response is not None else None,
    )


OPERATIONS = (
    Operation(
        "POST",
        "/discover",
        discover,
        action="servers.discover",
        access=Access.SELF,
        summary="Find out what a server asks for, without registering or storing anything",
        body=Target,
        answers={200: DiscoveryView},
        problems=(502, 504),
    ),
)
