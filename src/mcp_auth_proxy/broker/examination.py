"""What discovery finds out about a server, without registering or storing anything."""

from dataclasses import dataclass, field

from mcp_auth_proxy.broker.discovery import MetadataLookup
from mcp_auth_proxy.broker.plan import Plan
from mcp_auth_proxy.errors import AuthorizationError
from mcp_auth_proxy.oauth.discovery import ResourceMetadata, ServerMetadata


@dataclass(slots=True, kw_only=True)
class Examination:
    """One run of discovery: each document that was looked up, and the plan or the error that stopped it."""

    lookups: list[MetadataLookup] = field(default_factory=list)
    plan: Plan | None = None
    error: AuthorizationError | None = None

    @property
    def resource(self) -> ResourceMetadata | None:
        """The metadata of the server."""
        return next((lookup.found for lookup in self.lookups if isinstance(lookup.found, ResourceMetadata)), None)

    @property
    def metadata(self) -> ServerMetadata | None:
        """The metadata of its authorization server."""
        found = next((lookup.found for lookup in self.lookups if isinstance(lookup.found, ServerMetadata)), None)
        return found if found is not None or self.plan is None else self.plan.metadata
