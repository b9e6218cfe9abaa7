"""Get from a server URL to its authorization server: the URLs of metadata, and validators for the documents.

There are two documents: protected resource metadata (RFC 9728) and authorization server metadata (RFC 8414, OpenID
Connect Discovery). Resource and issuer are compared as raw JSON strings, never through a type that normalizes URLs.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from urllib.parse import urlsplit, urlunsplit

from mcp_auth_proxy.config.settings import server_key
from mcp_auth_proxy.errors import AuthorizationError, ConfigHint, DocumentRefused, excerpt
from mcp_auth_proxy.net import urls
from mcp_auth_proxy.net.sites import same_site
from mcp_auth_proxy.oauth.documents import Document

RESOURCE_METADATA = "protected resource metadata"
SERVER_METADATA = "authorization server metadata"
"""The names of the documents, for errors."""

_RESOURCE_WELL_KNOWN = "/.well-known/oauth-protected-resource"
_SERVER_WELL_KNOWN = "/.well-known/oauth-authorization-server"
_OPENID_WELL_KNOWN = "/.well-known/openid-configuration"


@dataclass(frozen=True, slots=True, kw_only=True)
class ResourceMetadata:
    """Validated protected resource metadata (RFC 9728 §2)."""

    resource: str
    """As spelled in the document: authorization servers compare it as a string."""
    authorization_servers: tuple[str, ...]
    """Issuers, never empty."""
    scopes_supported: tuple[str, ...] | None = None
    dpop_required: bool = False
    """The resource accepts only tokens bound to a key (RFC 9728 §2, dpop_bound_access_tokens_required)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerMetadata:
    """Validated authorization server metadata (RFC 8414 §2). None means that the server does not say."""

    issuer: str
    authorization_endpoint: str = ""
    """Empty if the server has no grant that needs it."""
    token_endpoint: str
    registration_endpoint: str | None = None
    revocation_endpoint: str | None = None
    device_authorization_endpoint: str | None = None
    userinfo_endpoint: str | None = None
    scopes_supported: tuple[str, ...] | None = None
    response_types_supported: tuple[str, ...] | None = None
    grant_types_supported: tuple[str, ...] | None = None
    code_challenge_methods_supported: tuple[str, ...] | None = None
    token_endpoint_auth_methods_supported: tuple[str, ...] | None = None
    token_endpoint_auth_signing_alg_values_supported: tuple[str, ...] | None = None
    dpop_signing_alg_values_supported: tuple[str, ...] | None = None
    client_id_metadata_document_supported: bool = False
    iss_parameter_supported: bool = False
    """Every authorization response has ``iss`` (RFC 9207 §3)."""
    is_fallback: bool = False
    """There was no document; these are the default endpoints of MCP 2025-03-26."""


def canonical_resource(server_url: str) -> str:
    """Return the resource identifier of a server that has no metadata (RFC 8707 §2; MCP, canonical server URI).

    Scheme and host are in lower case; there is no fragment, and no slash if there is no path.
    """
    parts = urlsplit(server_url)
    path = "" if parts.path == "/" and not parts.query else parts.path
    return urlunsplit((parts.scheme.lower(), parts.netloc.lower(), path, parts.query, ""))


def resource_metadata_urls(server_url: str, challenge_url: str | None) -> list[str]:
    """Return the URLs of resource metadata, in order: from the challenge, path-inserted, root (RFC 9728 §3.1)."""
    parts = urlsplit(server_url)
    origin = urls.raw_origin(server_url)
    path = "" if parts.path == "/" else parts.path
    query = f"?{parts.query}" if parts.query else ""
    candidates = [
        *([challenge_url] if challenge_url else []),
        f"{origin}{_RESOURCE_WELL_KNOWN}{path}{query}",
        f"{origin}{_RESOURCE_WELL_KNOWN}{path}",
        f"{origin}{_RESOURCE_WELL_KNOWN}",
    ]
    return list(dict.fromkeys(candidates))


def read_resource_metadata(
    body: bytes, *, url: str, server_url: str, http_loopback: bool | None = None
) -> ResourceMetadata:
    """Return validated resource metadata for ``server_url``. Raises DocumentRefused.

    ``resource`` must be the server URL, or have its origin and a path that is a parent of the server's path
    (RFC 9728 §3.3; MCP lets one resource span several endpoints). Issuers that break RFC 8414 §2 are left out; one
    must remain. ``http_loopback``: accept http issuers on loopback; the default is whether the server is on loopback.
    """
    document = Document.parse(body, name=RESOURCE_METADATA, url=url, clause="RFC 9728 §2", form="RFC 9728 §3.2")
    resource = document.required_string("resource")
    if not covers(resource, server_url):
        raise document.refusal(
            f"it is for the resource {excerpt(resource)}, not for {excerpt(server_url)}; check the server's url",
            "RFC 9728 §3.3",
        )
    if http_loopback is None:
        http_loopback = urls.is_loopback(urls.parse(server_url).origin.host)
    issuers = document.strings("authorization_servers")
    if not issuers:
        raise document.refusal("it names no authorization server")
    problems: list[str] = []
    good: list[str] = []
    for issuer in issuers:
        try:
            _check_issuer(issuer, http_loopback=http_loopback)
            good.append(issuer)
        except ValueError as problem:
            problems.append(f"the authorization server {excerpt(issuer)} can't be used: it {problem}")
    if not good:
        raise document.refusal(problems[0], "RFC 8414 §2")
    return ResourceMetadata(
        resource=resource,
        authorization_servers=tuple(good),
        scopes_supported=document.strings("scopes_supported"),
        dpop_required=document.boolean("dpop_bound_access_tokens_required"),
    )


def authorization_server_metadata_urls(issuer: str) -> list[str]:
    """Return the URLs of an issuer's metadata, in the order of MCP 2025-11-25 (RFC 8414 §3.1 and §5).

    For an issuer with a path, the root is not among them: a document there belongs to another issuer.
    """
    origin = urls.raw_origin(issuer)
    path = urlsplit(issuer).path.rstrip("/")
    if not path:
        return [f"{origin}{_SERVER_WELL_KNOWN}", f"{origin}{_OPENID_WELL_KNOWN}"]
    return [
        f"{origin}{_SERVER_WELL_KNOWN}{path}",
        f"{origin}{_OPENID_WELL_KNOWN}{path}",
        f"{origin}{path}{_OPENID_WELL_KNOWN}",
    ]


def issuer_of_document(url: str) -> str:
    """Return the issuer whose metadata are at a URL (RFC 8414 §3.1, OpenID Connect Discovery §4). Raises ValueError."""
    origin, path = urls.raw_origin(url), urlsplit(url).path
    for name in (_SERVER_WELL_KNOWN, _OPENID_WELL_KNOWN):
        if path.startswith(name):
            return f"{origin}{path.removeprefix(name)}"
        if path.endswith(name):
            return f"{origin}{path.removesuffix(name)}"
    raise ValueError(f"must be at {_SERVER_WELL_KNOWN} or {_OPENID_WELL_KNOWN}")


def read_server_metadata(
    body: bytes, *, url: str, issuer: str, policy_http_loopback: bool, legacy: bool = False
) -> ServerMetadata:
    """Return validated authorization server metadata of ``issuer``. Raises DocumentRefused.

    ``issuer`` in the document must be the same string (RFC 8414 §3.3). ``legacy`` is for servers of MCP 2025-03-26: no
    document names their issuer, and ``issuer`` is only a guess, the server's origin. Then the document may also name a
    path below that origin: the party that serves the well-known documents of an origin controls those names too. The
    document's spelling is kept, because ``iss`` has the same. An issuer at another origin is refused even then: we
    would expect that server's ``iss`` and send its codes to endpoints that it did not name (mix-up, RFC 9700 §4.4).
    """
    document = Document.parse(body, name=SERVER_METADATA, url=url, clause="RFC 8414 §2", form="RFC 8414 §3.2")
    stated = document.required_string("issuer")
    if stated != issuer and not (legacy and _is_below(stated, issuer)):
        remedy = "; if that is this server's authorization server, set the key oauth.issuer" if legacy else ""
        raise document.refusal(
            f"its issuer is {excerpt(stated)}, not {excerpt(issuer)} as expected{remedy}", "RFC 8414 §3.3"
        )
    return _server_metadata(document, stated, http_loopback=policy_http_loopback)


def configured_server_metadata(mapping: Mapping[str, object], *, issuer: str | None) -> ServerMetadata:
    """Return the metadata from the configuration, which replaces discovery. Raises DocumentRefused.

    If neither it nor ``issuer`` names the issuer, the origin of the token endpoint is used: grants and credentials
    are stored by issuer.
    """
    document = Document(mapping, name="configured metadata", url="", clause="RFC 8414 §2")
    stated = document.string("issuer")
    if issuer is not None and stated is not None and issuer != stated:
        raise document.refusal(f"its issuer is {stated}, but the key oauth.issuer says {issuer}")
    known = issuer or stated or urls.raw_origin(document.required_string("token_endpoint"))
    return _server_metadata(document, known, http_loopback=True)


def legacy_server_metadata(server_url: str) -> ServerMetadata:
    """Return the default endpoints at the server's origin (MCP 2025-03-26, fallbacks for servers without metadata).

    Raises DocumentRefused if they would be http and not on loopback.
    """
    origin = urls.raw_origin(server_url)
    try:
        urls.check(origin, http_loopback=True)
    except ValueError as problem:
        raise DocumentRefused(
            "default authorization server of a server without metadata", origin, f"its URL {problem}"
        ) from None
    return ServerMetadata(
        issuer=origin,
        authorization_endpoint=f"{origin}/authorize",
        token_endpoint=f"{origin}/token",
        registration_endpoint=f"{origin}/register",
        is_fallback=True,
    )


def require_pkce(metadata: ServerMetadata, *, allow_missing: bool, server: str) -> None:
    """Raise AuthorizationError if the server does not advertise PKCE with S256 (MCP, authorization code protection).

    Default endpoints have no metadata to advertise it in, but MCP 2025-03-26 requires PKCE of every server.
    """
    if allow_missing or metadata.is_fallback or "S256" in (metadata.code_challenge_methods_supported or ()):
        return
    raise AuthorizationError(
        f"The authorization server {excerpt(metadata.issuer)} does not advertise PKCE with S256 "
        f"(code_challenge_methods_supported, RFC 8414 §2; RFC 7636 §4.2). If you know that it supports PKCE, set "
        f"{server_key(server, 'oauth.allow_missing_pkce')}: true.",
        hint=ConfigHint("oauth.allow_missing_pkce", "true"),
    )


def require_authorization_endpoint(metadata: ServerMetadata) -> None:
    """Raise AuthorizationError if there is no endpoint for the user's browser (RFC 8414 §2)."""
    if not metadata.authorization_endpoint:
        raise AuthorizationError(
            f"The metadata of the authorization server {excerpt(metadata.issuer)} has no authorization_endpoint "
            f"(RFC 8414 §2), so users can't authorize there."
        )


def require_own_authorization_endpoint(metadata: ServerMetadata, *, server: str) -> None:
    """Raise DocumentRefused if the authorization endpoint may be another server's (mix-up, RFC 9700 §4.4).

    A hostile server can name an honest one's authorization endpoint and its own token endpoint, and would be sent the
    honest one's code and the verifier. An endpoint on the issuer's own site is the issuer's. For any other, the server
    must promise ``iss``: then a response without it, or with another one, is refused (RFC 9207 §2.4).
    """
    if metadata.iss_parameter_supported:
        return
    endpoint = urls.parse(metadata.authorization_endpoint).origin
    if not same_site(endpoint.host, _issuer_host(metadata)):
        raise _mixed_up(
            metadata,
            f"its authorization_endpoint is at {endpoint.serialized}, on another site than the issuer, and it does not "
            f"promise iss (RFC 9207 §3)",
            server=server,
        )


def require_own_device_endpoint(metadata: ServerMetadata, *, server: str) -> None:
    """Raise DocumentRefused if the device authorization endpoint may be another server's, as above.

    Its device codes are sent to the token endpoint, and there is no ``iss``. Some providers have both endpoints on
    another site than the issuer.
    """
    if metadata.device_authorization_endpoint is None:
        return
    endpoint = urls.parse(metadata.device_authorization_endpoint).origin
    token_host = urls.parse(metadata.token_endpoint).origin.host
    if not any(same_site(endpoint.host, host) for host in (_issuer_host(metadata), token_host)):
        raise _mixed_up(
            metadata,
            f"its device_authorization_endpoint is at {endpoint.serialized}, on another site than the issuer and the "
            f"token_endpoint",
            server=server,
        )


def _issuer_host(metadata: ServerMetadata) -> str:
    return urls.parse(urls.raw_origin(metadata.issuer)).origin.host


def _mixed_up(metadata: ServerMetadata, problem: str, *, server: str) -> DocumentRefused:
    return DocumentRefused(
        SERVER_METADATA,
        metadata.issuer,
        f"{problem}, so the code of another server might be sent to it; if you know that this is the right "
        f"authorization server for server {server}, set {server_key(server, 'oauth.issuer')}: {metadata.issuer}",
        "RFC 9700 §4.4",
        hint=ConfigHint("oauth.issuer", metadata.issuer),
    )


def _server_metadata(document: Document, issuer: str, *, http_loopback: bool) -> ServerMetadata:
    def endpoint(member: str) -> str | None:
        url = document.string(member)
        if not url:
            return None
        try:
            urls.check(url, http_loopback=http_loopback)
        except ValueError as problem:
            raise document.refusal(f"{member} {excerpt(url)} can't be used: it {problem}") from None
        return url

    token_endpoint = endpoint("token_endpoint")
    if token_endpoint is None:
        raise document.refusal("it has no token_endpoint")
    return ServerMetadata(
        issuer=issuer,
        authorization_endpoint=endpoint("authorization_endpoint") or "",
        token_endpoint=token_endpoint,
        registration_endpoint=endpoint("registration_endpoint"),
        revocation_endpoint=endpoint("revocation_endpoint"),
        device_authorization_endpoint=endpoint("device_authorization_endpoint"),
        userinfo_endpoint=endpoint("userinfo_endpoint"),
        scopes_supported=document.strings("scopes_supported"),
        response_types_supported=document.strings("response_types_supported"),
        grant_types_supported=document.strings("grant_types_supported"),
        code_challenge_methods_supported=document.strings("code_challenge_methods_supported"),
        token_endpoint_auth_methods_supported=document.strings("token_endpoint_auth_methods_supported"),
        token_endpoint_auth_signing_alg_values_supported=document.strings(
            "token_endpoint_auth_signing_alg_values_supported"
        ),
        dpop_signing_alg_values_supported=document.strings("dpop_signing_alg_values_supported"),
        client_id_metadata_document_supported=document.boolean("client_id_metadata_document_supported"),
        iss_parameter_supported=document.boolean("authorization_response_iss_parameter_supported"),
    )


def _check_issuer(issuer: str, *, http_loopback: bool) -> None:
    urls.check(issuer, http_loopback=http_loopback)
    if "?" in issuer:
        raise ValueError("must not have a query")


def _is_below(issuer: str, origin: str) -> bool:
    """Return whether an issuer is ``origin``, spelled exactly so, followed by a path and nothing else."""
    return issuer.startswith(f"{origin}/") and "?" not in issuer and "#" not in issuer


def covers(resource: str, server_url: str) -> bool:
    """Return whether a resource identifier is the server URL, or its origin with a parent path (whole segments)."""
    if resource == server_url:
        return True
    try:
        theirs, ours = urls.parse(resource), urls.parse(server_url)
    except ValueError:
        return False
    if theirs.origin != ours.origin or "?" in resource:
        return False
    return f"{ours.path.rstrip('/')}/".startswith(f"{theirs.path.rstrip('/')}/")
