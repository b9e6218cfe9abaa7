"""Decide whether a user has to confirm where a server sends them to sign in, and remember that they did.

A server can name any authorization server. If that one ignores ``resource``, the server gets a token that is good for
others too (RFC 8707 §1). Only the user can know whether the two belong together.
"""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass

from mcp_auth_proxy.errors import excerpt
from mcp_auth_proxy.models import Flow
from mcp_auth_proxy.net import urls
from mcp_auth_proxy.net.sites import same_site
from mcp_auth_proxy.oauth import authorization_code
from mcp_auth_proxy.store.confirmations import Confirmations
from mcp_auth_proxy.store.grants import Grants


@dataclass(frozen=True, slots=True, kw_only=True)
class SignIn:
    """Which server sends a user where, and with which scopes: what the user has to know."""

    server: str
    upstream: str
    """The origin that the tokens will be sent to; empty if the flow is from before this was stored."""
    address: str
    """The origin of the page that the user signs in at. International names are in their ``xn--`` form."""
    scopes: tuple[str, ...]

    @property
    def in_words(self) -> str:
        """Server and scopes, as a part of a sentence for a terminal."""
        place = f" at {self.upstream}" if self.upstream else ""
        return f"{self.server}{place}" + (f" with the scopes {excerpt(' '.join(self.scopes))}" if self.scopes else "")


def sign_in(flow: Flow) -> SignIn:
    """Return what a user has to know before they sign in. Raises AuthorizationError if there is no page for it."""
    page = authorization_code.endpoint(flow) if flow.device is None else flow.device.verification_uri
    return SignIn(
        server=flow.key.account.server,
        upstream=flow.key.upstream or "",
        address=urls.parse(page).origin.serialized,
        scopes=flow.scopes,
    )


class SignIns:
    """The confirmations of users. Raises AuthorizationError if there is no page to sign in at, and StoreError."""

    def __init__(self, *, confirmations: Confirmations, grants: Grants, clock: Callable[[], float]) -> None:
        self._confirmations = confirmations
        self._grants = grants
        self._clock = clock

    async def need_confirmation(self, flow: Flow) -> bool:
        """Return whether a user must confirm before they are sent to sign in.

        They must if the page is on another site than the server, or if the issuer has granted tokens for another
        origin, and they have not confirmed it before.
        """
        key, host = flow.key, _host(flow)
        upstream = urls.parse_origin(key.upstream or "")
        if upstream is None:
            return True
        confirmed = await self._confirmations.contains(
            key.account, upstream=upstream.serialized, issuer=key.issuer, sign_in_host=host
        )
        if confirmed:
            return False
        # It may load the public suffix list, which takes 50 ms.
        if not await asyncio.to_thread(same_site, upstream.host, host):
            return True
        others = await self._grants.servers_of_issuer(key.issuer)
        return any(other.upstream != key.upstream for other in others)

    async def remember(self, flow: Flow) -> None:
        """Remember that a user has confirmed, and has authorized there."""
        key = flow.key
        if key.upstream:
            await self._confirmations.add(
                key.account,
                upstream=key.upstream,
                issuer=key.issuer,
                sign_in_host=_host(flow),
                now=self._clock(),
            )


def _host(flow: Flow) -> str:
    return urls.parse(authorization_code.endpoint(flow)).origin.host
