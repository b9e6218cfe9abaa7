"""The pending authorization that requests wait for while a user authorizes."""

import asyncio
from dataclasses import dataclass
from typing import Any

from mcp_auth_proxy.errors import AuthorizationError
from mcp_auth_proxy.models import AccessToken, Flow


def link_of(flow: Flow, public_url: str) -> str:
    """Return the link that a user opens to authorize."""
    return f"{public_url}/connect/{flow.key.account.server}?flow={flow.id}"


@dataclass(eq=False, slots=True)
class PendingAuthorization:
    """A flow that waits for its user. All requests of the account wait for the same one.

    Shortly before a flow expires it is replaced by another; requests that wait for the first then wait for both.
    """

    flow: Flow
    link: str
    _outcome: asyncio.Future[AccessToken]
    made_here: bool = False
    """Whether this process has made the flow; otherwise it was found in the store."""

    async def wait(self, timeout: float, interrupt: asyncio.Future[Any] | None = None) -> AccessToken | None:
        """Return the token as soon as the user has consented; None after ``timeout`` seconds or on ``interrupt``.

        Raises AuthorizationError if the authorization fails.
        """
        futures: set[asyncio.Future[Any]] = {self._outcome}
        if interrupt is not None:
            futures.add(interrupt)
        await asyncio.wait(futures, timeout=max(0.0, timeout), return_when=asyncio.FIRST_COMPLETED)
        return self._outcome.result() if self._outcome.done() else None

    @property
    def done(self) -> bool:
        """Whether the user has consented, or the authorization has failed."""
        return self._outcome.done()

    def replaced_by(self, flow: Flow, link: str, *, made_here: bool = False) -> "PendingAuthorization":
        """Return the pending authorization for a new flow. A consent by either link ends both."""
        return PendingAuthorization(flow, link, self._outcome, made_here)

    def release(self, token: AccessToken) -> None:
        """Let everyone who waits continue with this token."""
        if not self._outcome.done():
            self._outcome.set_result(token)

    def fail(self, error: AuthorizationError) -> None:
        """Raise an error for everyone who waits."""
        if not self._outcome.done():
            self._outcome.set_exception(error)
            # Marks the exception as retrieved: perhaps nobody waits.
            self._outcome.exception()
