"""The pages to sign in with, made when they are first needed: their modules cost memory that most proxies save."""

from collections.abc import Callable
from typing import TYPE_CHECKING

from mcp_auth_proxy.config.settings import InboundSettings
from mcp_auth_proxy.identity import Callers
from mcp_auth_proxy.oauth.fetch import Fetcher
from mcp_auth_proxy.web.audit import PageAudit
from mcp_auth_proxy.web.failed_credentials import FailedCredentials
from mcp_auth_proxy.web.session import Visitors

if TYPE_CHECKING:
    from mcp_auth_proxy.identity.openid import OpenIdProvider
    from mcp_auth_proxy.web.sign_in import SignInPages


class SignInMount:
    """Make the pages as ``inbound`` says, and again after it has changed."""

    def __init__(
        self,
        inbound: InboundSettings,
        *,
        visitors: Visitors,
        callers: Callers,
        fetcher: Fetcher,
        failed_credentials: FailedCredentials,
        audit: PageAudit,
        public_url: str,
        clock: Callable[[], float],
    ) -> None:
        self._inbound = inbound
        self._visitors = visitors
        self._callers = callers
        self._fetcher = fetcher
        self._failed_credentials = failed_credentials
        self._audit = audit
        self._public_url = public_url
        self._clock = clock
        self._pages: SignInPages | None = None
        self._providers: list[OpenIdProvider] = []

    def configure(self, inbound: InboundSettings) -> None:
        """Apply changed settings."""
        if (inbound.sign_in, inbound.jwt) != (self._inbound.sign_in, self._inbound.jwt):
            self._pages = None
        self._inbound = inbound

    def pages(self) -> "SignInPages":
        """Return the pages."""
        if self._pages is None:
            self._pages = self._make()
        return self._pages

    async def aclose(self) -> None:
        """End what the identity providers are still asked."""
        for provider in self._providers:
            await provider.aclose()

    def _make(self) -> "SignInPages":
        from mcp_auth_proxy.web.sign_in import SignInPages  # noqa: PLC0415 - see the module

        inbound = self._inbound
        # Keys of programs are no way to sign in if there is another one and the data plane takes no keys either.
        takes_keys = inbound.sign_in is None or "api_key" in inbound.modes
        return SignInPages(
            visitors=self._visitors,
            check_key=self._callers.caller_of_key if takes_keys else None,
            provider=self._make_provider() if inbound.sign_in is not None and inbound.modes else None,
            public_url=self._public_url,
            failed_credentials=self._failed_credentials,
            audit=self._audit,
        )

    def _make_provider(self) -> "OpenIdProvider":
        from mcp_auth_proxy.identity.openid import OpenIdProvider  # noqa: PLC0415 - see the module

        provider = OpenIdProvider(
            self._inbound,
            fetcher=self._fetcher,
            public_url=self._public_url,
            caller_of_claims=self._callers.caller_of_claims,
            clock=self._clock,
        )
        self._providers.append(provider)
        return provider
