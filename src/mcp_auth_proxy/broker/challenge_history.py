"""The retry state of one request: it limits how often the request is sent again."""

from collections.abc import Iterable
from dataclasses import dataclass

from mcp_auth_proxy.broker.step_up import MAX_AUTHORIZATIONS, step_up_limit

MAX_REFUSED = 2
"""Number of fresh tokens that may be refused before one request stops: another request had perhaps just renewed the
first, and it may be dead too."""


@dataclass(slots=True)
class ChallengeHistory:
    """The challenges that one request was answered with so far. The caller keeps it; the broker updates it."""

    given: bool = False
    """Whether the request was given a token after a challenge: one that is refused then is a fresh one."""
    refused: int = 0
    """Fresh tokens that were refused."""
    authorizations: int = 0
    with_new_nonce: int = 0
    """The generation of the token that was last sent again with a new DPoP nonce."""

    def count_authorization(self, server: str, requested: Iterable[str]) -> None:
        """Count one authorization. Raises AuthorizationDenied if the server keeps asking."""
        self.authorizations += 1
        if self.authorizations > MAX_AUTHORIZATIONS:
            raise step_up_limit(server, requested)
