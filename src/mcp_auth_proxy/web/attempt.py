"""A browser on its way to an identity provider and back: what ties the response to it, in a cookie of its own.

Nothing is stored here meanwhile, so that nobody can fill the store without signing in.
"""

import base64
import hashlib
import hmac
import secrets
from dataclasses import dataclass, field
from typing import ClassVar, Self

from starlette.responses import Response

from mcp_auth_proxy import secret_values
from mcp_auth_proxy.web.paths import local_path

LIFETIME = 600
"""Seconds that a user has to sign in."""

_PREFIX = "mcp_auth_sign_in_"


@dataclass(frozen=True, slots=True)
class SignInAttempt:
    """One attempt to sign in. All its values come from one secret, which only the browser has.

    ``onward`` is the path to go on to afterwards.
    """

    PATH: ClassVar = "/sign-in/callback"

    secret: str = field(repr=False)
    onward: str = "/"

    @classmethod
    def new(cls, onward: str) -> Self:
        """Return an attempt with 256 random bits."""
        attempt = cls(secrets.token_urlsafe(32), onward)
        secret_values.remember(attempt.secret, attempt.state, attempt.nonce, attempt.code_verifier)
        return attempt

    @classmethod
    def of(cls, cookies: dict[str, str], state: str) -> Self | None:
        """Return the attempt that a browser has begun with this state; None if it has not."""
        secret, _, onward = cookies.get(_cookie_name(state), "").partition(".")
        attempt = cls(secret, local_path(_decode(onward)))
        if not secret or not hmac.compare_digest(attempt.state.encode(), state.encode("utf-8", "replace")):
            return None
        return attempt

    @property
    def state(self) -> str:
        """The ``state`` of the request (RFC 6749 §10.12)."""
        return self._derived("state")

    @property
    def nonce(self) -> str:
        """What the ID token has to repeat (OpenID Connect Core §15.5.2)."""
        return self._derived("nonce")

    @property
    def code_verifier(self) -> str:
        """The PKCE code verifier (RFC 7636 §4.1)."""
        return self._derived("verifier")

    @property
    def cookie_name(self) -> str:
        """The name of the cookie: one for each attempt, so that two tabs do not affect each other."""
        return _cookie_name(self.state)

    def bind(self, response: Response, *, secure: bool) -> None:
        """Let a response give the browser its cookie. ``Lax``: the way back is a navigation from another site."""
        response.set_cookie(
            self.cookie_name,
            f"{self.secret}.{base64.urlsafe_b64encode(self.onward.encode()).decode().rstrip('=')}",
            max_age=LIFETIME,
            path=self.PATH,
            secure=secure,
            httponly=True,
            samesite="lax",
        )

    def _derived(self, purpose: str) -> str:
        digest = hmac.digest(self.secret.encode("utf-8", "replace"), purpose.encode(), "sha256")
        return base64.urlsafe_b64encode(digest).rstrip(b"=").decode()


def _cookie_name(state: str) -> str:
    return _PREFIX + hashlib.sha256(state.encode("utf-8", "surrogatepass")).hexdigest()[:12]


def _decode(text: str) -> str:
    try:
        return base64.urlsafe_b64decode(text + "=" * (-len(text) % 4)).decode()
    except ValueError:
        return ""
