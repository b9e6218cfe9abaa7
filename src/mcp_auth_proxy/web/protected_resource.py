"""Tell clients where callers log in: the proxy as a protected resource of the company's identity provider (RFC 9728).

Only JWTs come from somewhere that a client can be sent to. With API keys alone, and with a web server that names the
callers, there is no metadata: clients would start an OAuth flow that leads nowhere.
"""

import re

from mcp_auth_proxy.config.settings import InboundSettings
from mcp_auth_proxy.net import urls
from mcp_auth_proxy.rpc.encoding import encode

PREFIX = b"/.well-known/"
_RESOURCE = b"/.well-known/oauth-protected-resource"
_PLAIN = re.compile(rb"/(?:[A-Za-z0-9@%._~-]+/)?mcp")
"""A path that can stand in a quoted string."""


class ProtectedResource:
    """The challenges of the MCP endpoints, and the metadata that they name."""

    def __init__(self, public_url: str, inbound: InboundSettings) -> None:
        self._public_url = public_url
        # A cluster's service accounts have tokens, but nobody logs in there.
        log_in = [jwt for jwt in inbound.jwt if not jwt.kubernetes] if "jwt" in inbound.modes else []
        self._issuers = list(dict.fromkeys(jwt.issuer for jwt in log_in))
        self._audiences = [jwt.audience for jwt in log_in]
        self._scopes = list(dict.fromkeys(scope for jwt in log_in for scope in jwt.scopes))
        self._challenges = bool({"jwt", "api_key"}.intersection(inbound.modes))

    def challenge(self, path: bytes, *, presented: bool) -> list[tuple[bytes, bytes]]:
        """Return the WWW-Authenticate field for an endpoint (RFC 6750 §3), if there is one.

        ``presented``: the request had a credential, which is not good.
        """
        if not self._challenges:
            return []
        parts = ['error="invalid_token"'] if presented else []
        if self._issuers and _PLAIN.fullmatch(path):
            url = f"{self._public_url}{_RESOURCE.decode()}{path.decode('latin-1')}"
            parts.append(f'resource_metadata="{url}"')
        return [(b"www-authenticate", " ".join(["Bearer", ", ".join(parts)]).strip().encode("ascii", "replace"))]

    def document(self, path: bytes, *, is_endpoint: bool) -> bytes | None:
        """Return the metadata at a well-known path; None if there is none.

        ``is_endpoint``: whether what follows the well-known part has the form of an MCP endpoint. Whether there is such
        a server is not for those to know who have not said who they are.
        """
        if not self._issuers or not is_endpoint:
            return None
        return encode(
            {
                "resource": self._resource(f"{self._public_url}{endpoint_of(path).decode('latin-1')}"),
                "authorization_servers": self._issuers,
                **({"scopes_supported": self._scopes} if self._scopes else {}),
                "bearer_methods_supported": ["header"],
                "resource_name": "mcp-auth-proxy",
            }
        )

    def _resource(self, address: str) -> str:
        """Return the resource that clients request tokens for: the address, or the audience that stands for it too.

        An audience that is a URL above the address is what the tokens must be for. Clients accept a parent.
        """
        for audience in self._audiences:
            if audience == address or _is_origin_of(audience, self._public_url):
                return audience
        return address


def endpoint_of(path: bytes) -> bytes:
    """Return the path of the resource that a well-known path is about; empty if it is about none (RFC 9728 §3.1)."""
    return path.removeprefix(_RESOURCE) if path.startswith(_RESOURCE + b"/") else b""


def _is_origin_of(audience: str, public_url: str) -> bool:
    """Return whether an audience is the proxy's origin as a URL without a path."""
    if not audience.startswith(("https://", "http://")) or audience.rstrip("/").count("/") != 2:
        return False
    return urls.parse_origin(audience.rstrip("/")) == urls.parse_origin(public_url)
