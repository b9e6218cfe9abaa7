"""What follows a challenge of a server: the same token, a newer one, or an authorization."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from mcp_auth_proxy.broker import dpop
from mcp_auth_proxy.broker.authorization import Authorizations
from mcp_auth_proxy.broker.backoff import Backoff, of_tokens
from mcp_auth_proxy.broker.challenge_history import MAX_REFUSED, ChallengeHistory
from mcp_auth_proxy.broker.matching import configured_at
from mcp_auth_proxy.broker.pending import PendingAuthorization
from mcp_auth_proxy.broker.renewal import renewable
from mcp_auth_proxy.broker.token_cache import CachedToken, TokenCache
from mcp_auth_proxy.config.settings import ServerSettings
from mcp_auth_proxy.errors import AuthorizationDenied, AuthorizationError, excerpt
from mcp_auth_proxy.models import AccessToken, Account
from mcp_auth_proxy.oauth import challenge as challenges


class ChallengeHandler:
    """Decide how requests continue after a 401 or 403."""

    def __init__(
        self,
        *,
        servers: Mapping[str, ServerSettings],
        tokens: TokenCache,
        authorizations: Authorizations,
        backoff: Backoff,
    ) -> None:
        """``servers`` may change at any time."""
        self._servers = servers
        self._tokens = tokens
        self._authorizations = authorizations
        self._backoff = backoff

    async def challenged(
        self,
        account: Account,
        *,
        sent_to: ServerSettings,
        status: int,
        challenge: Sequence[bytes],
        used: AccessToken | None,
        history: ChallengeHistory,
        nonce: Sequence[bytes],
        subject: str | None = None,
    ) -> AccessToken | PendingAuthorization | None:
        """Return how to continue: see ``Broker.challenged``."""
        bearer = challenges.bearer(challenge)
        if not challenges.demands_authorization(status, bearer):
            return None
        server = configured_at(self._servers, sent_to)
        cached = self._tokens.get(account) or await self._tokens.load(account)
        if cached is not None and (used is None or cached.token.generation > used.generation):
            cached.used = history.given = True
            return cached.token
        if status == 401 and used is not None:
            same = _with_new_nonce(used, server, challenge, nonce, history)
            if same is not None:
                return same
        if server.oauth.grant.unattended:
            self._backoff.check(of_tokens(account))
        if status == 401 and used is not None:
            token = await self._renew_after_401(account, server, cached, history)
            if token is not None:
                return token
        try:
            history.count_authorization(server.name, (bearer and bearer.scopes) or ())
        except AuthorizationDenied as denied:
            self._backoff.failed(of_tokens(account), denied)
            raise
        if status == 403 and bearer is not None and used is not None and used.signer is not None:
            # The server accepted the proof: the new scopes must not come with a token that is not bound.
            bearer = replace(bearer, dpop=True)
        history.given = True
        return await self._authorizations.authorize(
            account,
            server,
            bearer,
            already=cached.grant.scopes if cached is not None and status == 403 else None,
            schemes=challenges.other_schemes(challenge),
            subject=subject,
        )

    async def _renew_after_401(
        self, account: Account, server: ServerSettings, cached: CachedToken | None, history: ChallengeHistory
    ) -> AccessToken | None:
        """Return a renewed token; None if a new authorization is needed.

        If fresh tokens are refused, renewals are paused. After the pause one more is tried.
        """
        tokens = of_tokens(account)
        history.refused += history.given
        may_renew = history.refused < (1 if self._backoff.has_failed(tokens) else MAX_REFUSED)
        if cached is not None and renewable(cached.grant) and may_renew and not self._backoff.is_paused(tokens):
            renewed = await self._tokens.renew_rejected(account, cached)
            if renewed is not None:
                renewed.used = history.given = True
                return renewed.token
        elif history.given:
            refused = AuthorizationError(
                f"Server {server.name} refuses a token that its authorization server has just issued"
                f"{f' ({excerpt(cached.grant.key.issuer)})' if cached else ''}. Check "
                f"{server.key('oauth.resource')} and scopes, "
                f"authorization_params or token_params if the provider wants an audience there "
                f"(docs/providers.md), and what the account may use."
            )
            self._backoff.failed(tokens, refused)
            if history.authorizations or (cached is not None and cached.grant.grant_type.repeatable):
                # Another authorization would bring more of the same.
                raise refused
        return None


def _with_new_nonce(
    used: AccessToken,
    server: ServerSettings,
    challenge: Sequence[bytes],
    nonce: Sequence[bytes],
    history: ChallengeHistory,
) -> AccessToken | None:
    """Return the token of a request with the DPoP nonce that its server asked for; None if it asked for none."""
    repeated = history.with_new_nonce == used.generation
    same = dpop.with_new_nonce(used, server=server, challenge=challenge, nonce=nonce, repeated=repeated)
    if same is not None:
        history.with_new_nonce = used.generation
    return same
