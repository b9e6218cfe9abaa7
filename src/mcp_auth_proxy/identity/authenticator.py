"""What tells who calls, as the data plane, the pages and the API see it."""

from collections.abc import Callable, Sequence
from typing import Protocol

from mcp_auth_proxy.models import LOCAL_CALLER, Caller
from mcp_auth_proxy.net import http_head

Fields = Sequence[tuple[bytes, bytes]]
"""The fields of a request; names are in lower case."""


class Request(Protocol):
    """A request of which the head has arrived."""

    @property
    def fields(self) -> http_head.Fields:
        """The fields, in an object that the requests of a connection share while they stay the same."""

    @property
    def peer(self) -> str:
        """The address that the connection comes from."""


class Authenticator(Protocol):
    """Identify callers. Belongs to one event loop."""

    anonymous: bool
    """Whether everybody is the principal ``local`` (mode ``none``)."""
    credential_fields: frozenset[bytes]
    """Names of the fields with credentials, in lower case: they are never forwarded."""

    def recognize(self, request: Request) -> Caller | None:
        """Return the caller if it is known without waiting; None if ``identify`` has to be awaited.

        This is called for every request, also on the fast path.
        """

    async def identify(self, fields: Fields, peer: str) -> Caller:
        """Return the caller. Raises CallerRefused, and StoreError if it can't be looked up now.

        ``peer`` is the address that the connection comes from.
        """

    def on_refused(self, callback: Callable[[str], None]) -> None:
        """Call ``callback`` with the id of each principal that may no longer call, within a second of the change."""

    def on_key_refused(self, callback: Callable[[str], None]) -> None:
        """Call ``callback`` with the id of each API key that was revoked or has expired, within a second."""


class NoAuthenticator:
    """Mode ``none``: callers are not identified."""

    anonymous = True
    credential_fields: frozenset[bytes] = frozenset()

    def recognize(self, request: Request) -> Caller:
        """Return the caller that stands for everybody."""
        return LOCAL_CALLER

    async def identify(self, fields: Fields, peer: str) -> Caller:
        """Return the caller that stands for everybody."""
        return LOCAL_CALLER

    def on_refused(self, callback: Callable[[str], None]) -> None:
        """Do nothing: ``local`` can't be disabled."""

    def on_key_refused(self, callback: Callable[[str], None]) -> None:
        """Do nothing: there are no keys on the data plane."""
