"""What tells who calls, as the data plane, the pages and the API see it."""

from collections.abc import Callable, Sequence
from typing import Protocol

from mcp_auth_proxy.models import LOCAL_CALLER, Caller

Fields = Sequence[tuple[bytes, bytes]]
"""The fields of a request; names are in lower case."""


class Authenticator(Protocol):
    """Identify callers. Belongs to one event loop."""

    anonymous: bool
    """Whether everybody is the principal ``local`` (mode ``none``)."""
    credential_fields: frozenset[bytes]
    """Names of the fields with credentials, in lower case: they are never forwarded."""

    def identify_nowait(self, fields: Fields, peer: str) -> Caller | None:
        """Return the caller if it is known without waiting; None if ``identify`` has to be awaited.

        ``peer`` is the address that the connection comes from. This is called for every request, also on the fast path.
        """

    async def identify(self, fields: Fields, peer: str) -> Caller:
        """Return the caller. Raises CallerRefused, and StoreError if it can't be looked up now."""

    def on_refused(self, callback: Callable[[str], None]) -> None:
        """Call ``callback`` with the id of each principal that may no longer call, within a second of the change."""

    def on_key_refused(self, callback: Callable[[str], None]) -> None:
        """Call ``callback`` with the id of each API key that was revoked or has expired, within a second."""


class NoAuthenticator:
    """Mode ``none``: callers are not identified."""

    anonymous = True
    credential_fields: frozenset[bytes] = frozenset()

    def identify_nowait(self, fields: Fields, peer: str) -> Caller:
        """Return the caller that stands for everybody."""
        return LOCAL_CALLER

    async def identify(self, fields: Fields, peer: str) -> Caller:
        """Return the caller that stands for everybody."""
        return LOCAL_CALLER

    def on_refused(self, callback: Callable[[str], None]) -> None:
        """Do nothing: ``local`` can't be disabled."""

    def on_key_refused(self, callback: Callable[[str], None]) -> None:
        """Do nothing: there are no keys on the data plane."""
