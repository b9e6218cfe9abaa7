"""What a request waits for while a user authorizes, and what it has been through."""

import asyncio
from dataclasses import dataclass
from typing import Any

from mcp_auth_proxy.errors import AuthorizationError
from mcp_auth_proxy.models import AccessToken, Flow


@dataclass(eq=False, slots=True)
class PendingAuthorization:
    """A flow that waits for a user; every request that needs it waits on the same one.

    Near its end it is followed by another, which whoever waits for this one waits for too.
    """

    flow: Flow
    link: str
    _released: asyncio.Future[AccessToken]

    async def wait(self, timeout: float, interrupt: asyncio.Future[None] | None = None) -> AccessToken | None:
        """Return the token as soon as the user has consented; None after ``timeout`` seconds, or on ``interrupt``.

        Raises AuthorizationError when the authorization has failed.
        """
        futures: set[asyncio.Future[Any]] = {self._released}
        if interrupt is not None:
            futures.add(interrupt)
        await asyncio.wait(futures, timeout=max(0.0, timeout), return_when=asyncio.FIRST_COMPLETED)
        return self._released.result() if self._released.done() else None

    @property
    def done(self) -> bool:
        return self._released.done()

    def replaced_by(self, flow: Flow, link: str) -> "PendingAuthorization":
        """Return what to wait for from now on: a consent by either link lets everyone go on."""
        return PendingAuthorization(flow, link, self._released)

    def release(self, token: AccessToken) -> None:
        if not self._released.done():
            self._released.set_result(token)

    def fail(self, error: AuthorizationError) -> None:
        if not self._released.done():
            self._released.set_exception(error)
            # Marks it as seen: nobody may be waiting.
            self._released.exception()


@dataclass(slots=True)
class ChallengeHistory:
    """What one request has been through; it bounds how often the request is carried on."""

    unauthorized: int = 0
    authorizations: int = 0
    with_new_nonce: int = 0
    """The generation of the token that was last sent again with a nonce its server asked for."""
