"""The plan for an authorization: everything that is known and decided before a user is asked or a token requested."""

from dataclasses import dataclass

from mcp_auth_proxy.config.settings import ServerSettings
from mcp_auth_proxy.models import Endpoints, GrantKey, Registration
from mcp_auth_proxy.oauth import device_authorization, dpop
from mcp_auth_proxy.oauth.discovery import ServerMetadata


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What to request, where, and as which client."""

    server: ServerSettings
    key: GrantKey
    metadata: ServerMetadata
    registration: Registration
    scopes: tuple[str, ...]
    dpop: bool = False
    """Whether the tokens will be bound to a key of the proxy (RFC 9449)."""
    redirect_uris: tuple[str, ...] = ()
    """Further redirect URIs of the client, for headless authorizations."""

    @property
    def endpoints(self) -> Endpoints:
        return Endpoints(
            authorization=self.metadata.authorization_endpoint,
            token=self.metadata.token_endpoint,
            revocation=self.metadata.revocation_endpoint,
        )

    @property
    def device_endpoint(self) -> str:
        """The device authorization endpoint. Raises AuthorizationError if the server has none."""
        url = self.metadata.device_authorization_endpoint
        if url is None:
            raise device_authorization.not_offered(self.key.issuer, self.server.name)
        return url

    def new_dpop_key(self) -> str | None:
        """Return a new key to bind a grant to; None for bearer tokens.

        Each grant has its own key: a shared one would show that two grants belong together.
        """
        return dpop.Key.generate().text if self.dpop else None
