"""The login of another program as a grant of ours: its tokens, and the client that they were issued to."""

from dataclasses import dataclass, field, replace

from mcp_auth_proxy.broker.planning import Planner
from mcp_auth_proxy.config.settings import ServerSettings
from mcp_auth_proxy.errors import AuthorizationError, excerpt
from mcp_auth_proxy.models import Account, Grant, GrantType, Registration, TokenSet
from mcp_auth_proxy.oauth.challenge import BearerChallenge


@dataclass(frozen=True, slots=True)
class ForeignLogin:
    """What another program has obtained. ``granted_at`` is in Unix seconds.

    ``client`` is None if it kept none. ``issuer`` is the authorization server that it noted, if it did.
    """

    tokens: TokenSet = field(repr=False)
    client: Registration | None = None
    granted_at: float = 0.0
    issuer: str = ""


async def grant_for(
    planner: Planner,
    server: ServerSettings,
    account: Account,
    login: ForeignLogin,
    challenge: BearerChallenge | None,
) -> Grant:
    """Return the grant that a login is, without storing it. Nothing is registered.

    The authorization server is found as for an authorization; one that is not the login's is never sent its tokens.
    Without a client they can't be renewed, unless the configuration names it. Raises AuthorizationError and StoreError.
    """
    plan = await planner.preview(account, server, challenge, client=login.client)
    if login.issuer and login.issuer.rstrip("/") != plan.key.issuer.rstrip("/"):
        raise AuthorizationError(
            f"The login is from {excerpt(login.issuer)}, but server {server.name} names "
            f"{excerpt(plan.key.issuer)} as its authorization server now. Authorize again instead."
        )
    registration, tokens = plan.registration, login.tokens
    if login.client is not None:
        # A client of the API may stand for us in new authorizations; these tokens belong to their own.
        registration = replace(login.client, server=server.name, account=account.name, issuer=plan.key.issuer)
    if not registration.client_id:
        tokens = replace(tokens, refresh_token=None)
    return Grant(
        key=plan.key,
        grant_type=GrantType.AUTHORIZATION_CODE,
        registration=registration,
        endpoints=plan.endpoints,
        tokens=tokens,
        scopes=tokens.scopes,
        granted_at=login.granted_at,
    )
