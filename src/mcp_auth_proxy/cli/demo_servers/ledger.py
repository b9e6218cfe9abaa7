"""The state of the demo's authorization server and the rules for it, without HTTP."""

import base64
import hashlib
import hmac
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NoReturn

CODE_SECONDS = 60.0


class OAuthError(Exception):
    """An error response (RFC 6749 §5.2): error code, description for developers, HTTP status."""

    def __init__(self, error: str, description: str, status: int = 400) -> None:
        self.error = error
        self.description = description
        self.status = status
        super().__init__(f"{error}: {description}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Client:
    """A registered client (RFC 7591 §2). ``auth`` is its token_endpoint_auth_method."""

    id: str
    name: str = ""
    secret: str | None = field(default=None, repr=False)
    auth: str = "none"
    redirect_uris: tuple[str, ...] = ()


@dataclass(slots=True, kw_only=True)
class IssuedGrant:
    """What a user allowed a client to do at a resource, or the client's own access to it."""

    id: int
    client_id: str
    resource: str
    scopes: tuple[str, ...]
    ended: bool = False


@dataclass(slots=True, kw_only=True)
class Code:
    """An authorization code, with everything that its redemption is checked against."""

    grant: IssuedGrant
    redirect_uri: str
    challenge: str
    expires_at: float
    used: bool = False


@dataclass(slots=True, kw_only=True)
class Token:
    """An access token. ``resource`` is its audience (RFC 8707 §2), empty if none was requested."""

    grant: IssuedGrant
    scopes: tuple[str, ...]
    expires_at: float
    ended: bool = False

    @property
    def resource(self) -> str:
        return self.grant.resource

    @property
    def client_id(self) -> str:
        return self.grant.client_id


@dataclass(slots=True, kw_only=True)
class RefreshToken:
    grant: IssuedGrant
    spent_at: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Issued:
    """A successful response of the token endpoint."""

    access_token: str = field(repr=False)
    refresh_token: str | None = field(repr=False)
    expires_in: int
    """Seconds."""
    scopes: tuple[str, ...]


@dataclass(slots=True, kw_only=True)
class Rules:
    """What the server does if the specifications leave a choice. May be changed while it runs."""

    token_seconds: float = 60.0
    scopes: tuple[str, ...] | None = ("notes:read", "notes:write", "offline_access")
    """The scopes that exist; None for any."""
    default_scopes: tuple[str, ...] = ("notes:read",)
    """Granted if a client requests none (RFC 6749 §3.3)."""
    refresh: bool = True
    rotate: bool = True
    reuse_detection: bool = True
    """Whether a refresh token that was rotated ends its grant if it comes again (RFC 9700 §4.14.2)."""
    reuse_seconds: float = 0.0
    """Seconds in which a refresh token that was rotated may come again, as if it had not been."""
    refresh_needs_offline_access: bool = False
    require_resource: bool = False


class Ledger:
    """Clients, codes, grants and tokens of one authorization server, in memory."""

    def __init__(self, rules: Rules, *, clock: Callable[[], float] = time.time) -> None:
        self.rules = rules
        self.clock = clock
        self.clients: dict[str, Client] = {}
        self.codes: dict[str, Code] = {}
        self.grants: list[IssuedGrant] = []
        self.tokens: dict[str, Token] = {}
        self.refresh_tokens: dict[str, RefreshToken] = {}
        self.reused = 0
        """How often a rotated refresh token has come again, too late."""

    def authorize(
        self, client: Client, *, redirect_uri: str, challenge: str, resource: str, scopes: tuple[str, ...]
    ) -> str:
        """Record what the user allowed, and return the authorization code."""
        grant = self._grant(client, resource, scopes)
        code = secrets.token_urlsafe(24)
        self.codes[code] = Code(
            grant=grant, redirect_uri=redirect_uri, challenge=challenge, expires_at=self.clock() + CODE_SECONDS
        )
        return code

    def redeem(self, client: Client, *, code: str, redirect_uri: str, verifier: str, resource: str) -> Issued:
        """Redeem a code (RFC 6749 §4.1.3, RFC 7636 §4.6). A second use also ends the grant (§4.1.2)."""
        found = self.codes.get(code)
        if found is None or found.grant.client_id != client.id:
            refuse_grant("the code is unknown")
        if found.used:
            found.grant.ended = True
            refuse_grant("the code was used before; its grant has ended")
        found.used = True
        if found.expires_at < self.clock():
            refuse_grant("the code has expired")
        if found.redirect_uri != redirect_uri:
            refuse_grant("redirect_uri is not the one of the authorization request")
        if not hmac.compare_digest(s256(verifier), found.challenge):
            refuse_grant("code_verifier does not match the code_challenge")
        self._same_resource(found.grant, resource)
        return self._issue(found.grant, found.grant.scopes, refresh_token=self._first_refresh_token(found.grant))

    def refresh(self, client: Client, *, refresh_token: str, resource: str, scopes: tuple[str, ...]) -> Issued:
        """Refresh a grant (RFC 6749 §6). What reuse of a rotated refresh token does, the rules say."""
        found = self.refresh_tokens.get(refresh_token)
        if found is None or found.grant.client_id != client.id:
            refuse_grant("the refresh token is unknown")
        grant = found.grant
        if found.spent_at is not None and self.clock() - found.spent_at >= self.rules.reuse_seconds:
            self.reused += 1
            grant.ended = grant.ended or self.rules.reuse_detection
            refuse_grant(f"the refresh token was used before{'; the grant has ended' if grant.ended else ''}")
        if grant.ended:
            refuse_grant("the grant has ended")
        if not set(scopes) <= set(grant.scopes):
            raise OAuthError("invalid_scope", "a refresh may not widen the scope")
        self._same_resource(grant, resource)
        next_token = None
        if self.rules.rotate:
            found.spent_at = found.spent_at or self.clock()
            next_token = self._new_refresh_token(grant)
        return self._issue(grant, scopes or grant.scopes, refresh_token=next_token)

    def client_credentials(self, client: Client, *, resource: str, scopes: tuple[str, ...]) -> Issued:
        """Issue a client's own token (RFC 6749 §4.4): confidential clients only, no refresh token (§4.4.3)."""
        if client.auth == "none":
            raise OAuthError("unauthorized_client", "client_credentials is for clients that authenticate")
        return self._issue(self._grant(client, resource, scopes), scopes, refresh_token=None)

    def accepted_scopes(self, requested: tuple[str, ...]) -> tuple[str, ...]:
        """Return the scopes to grant. Raises OAuthError ``invalid_scope`` if one does not exist."""
        known = self.rules.scopes
        if known is not None and (unknown := [scope for scope in requested if scope not in known]):
            raise OAuthError("invalid_scope", f"unknown scope {unknown[0]}")
        return requested or self.rules.default_scopes

    def token(self, access_token: str) -> Token | None:
        """Return a token if it is valid now, else None."""
        found = self.tokens.get(access_token)
        if found is None or found.ended or found.grant.ended or found.expires_at <= self.clock():
            return None
        return found

    def revoke(self, client: Client, token: str) -> None:
        """Revoke a token (RFC 7009 §2.1): a refresh token ends its grant, an access token only itself."""
        refresh_token = self.refresh_tokens.get(token)
        if refresh_token is not None and refresh_token.grant.client_id == client.id:
            refresh_token.grant.ended = True
        access_token = self.tokens.get(token)
        if access_token is not None and access_token.client_id == client.id:
            access_token.ended = True

    def end_access_tokens(self) -> int:
        """Revoke all access tokens, but no grant or refresh token. Return how many were valid."""
        valid = [token for value, token in self.tokens.items() if self.token(value)]
        for token in valid:
            token.ended = True
        return len(valid)

    def end_grants(self) -> None:
        """End all grants: a refresh then gets ``invalid_grant``."""
        for grant in self.grants:
            grant.ended = True

    def _grant(self, client: Client, resource: str, scopes: tuple[str, ...]) -> IssuedGrant:
        grant = IssuedGrant(id=len(self.grants) + 1, client_id=client.id, resource=resource, scopes=scopes)
        self.grants.append(grant)
        return grant

    def _issue(self, grant: IssuedGrant, scopes: tuple[str, ...], *, refresh_token: str | None) -> Issued:
        access_token = f"at-{secrets.token_urlsafe(24)}"
        seconds = self.rules.token_seconds
        self.tokens[access_token] = Token(grant=grant, scopes=scopes, expires_at=self.clock() + seconds)
        return Issued(access_token=access_token, refresh_token=refresh_token, expires_in=int(seconds), scopes=scopes)

    def _first_refresh_token(self, grant: IssuedGrant) -> str | None:
        allowed = "offline_access" in grant.scopes or not self.rules.refresh_needs_offline_access
        return self._new_refresh_token(grant) if self.rules.refresh and allowed else None

    def _new_refresh_token(self, grant: IssuedGrant) -> str:
        refresh_token = f"rt-{secrets.token_urlsafe(24)}"
        self.refresh_tokens[refresh_token] = RefreshToken(grant=grant)
        return refresh_token

    def _same_resource(self, grant: IssuedGrant, resource: str) -> None:
        if self.rules.require_resource and not resource:
            raise OAuthError("invalid_target", "the resource parameter is missing")
        if resource and resource != grant.resource:
            raise OAuthError("invalid_target", "the grant is for another resource")


def refuse_grant(description: str) -> NoReturn:
    """Raise ``invalid_grant``."""
    raise OAuthError("invalid_grant", description)


def s256(verifier: str) -> str:
    """Return the S256 challenge of a verifier (RFC 7636 §4.2)."""
    return base64.urlsafe_b64encode(hashlib.sha256(verifier.encode()).digest()).rstrip(b"=").decode()
