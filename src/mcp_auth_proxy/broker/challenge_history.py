"""The retry state of one request: it limits how often the request is sent again."""

from collections.abc import Iterable
from dataclasses import dataclass

from mcp_auth_proxy.broker.step_up import MAX_AUTHORIZATIONS, step_up_limit

MAX_UNAUTHORIZED = 3
"""Number of 401 responses to a token at which one request stops renewing it."""


@dataclass(slots=True)
class ChallengeHistory:
    """The challenges that one request was answered with so far. The caller keeps it; the broker updates it."""

    unauthorized: int = 0
    authorizations: int = 0
    with_new_nonce: int = 0
    """The generation of the token that was last sent again with a new DPoP nonce."""

    def count_unauthorized(self) -> bool:
        """Count one 401 to a token; return whether the token may be renewed once more."""
        self.unauthorized += 1
        return self.unauthorized < MAX_UNAUTHORIZED

    def count_authorization(self, server: str, requested: Iterable[str]) -> None:
        """Count one authorization. Raises AuthorizationError if the server keeps asking."""
        self.authorizations += 1
        if self.authorizations > MAX_AUTHORIZATIONS:
            raise step_up_limit(server, requested)
