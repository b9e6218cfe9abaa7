"""Tokens as programs see them, and where programs may keep them."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenData:
    """The tokens for one server. ``expires_at`` is in Unix seconds, ``scope`` separated by spaces."""

    access_token: str = field(repr=False)
    token_type: str = "Bearer"
    expires_at: float | None = None
    refresh_token: str | None = field(default=None, repr=False)
    scope: str | None = None

    @classmethod
    def read(cls, given: object) -> "TokenData | None":
        """Return the tokens that a storage gives, as a mapping or with attributes; None if it has no access token."""
        values = given if isinstance(given, Mapping) else {name: getattr(given, name, None) for name in cls.__slots__}
        access_token, expires_at = text(values.get("access_token")), values.get("expires_at")
        if not access_token:
            return None
        return cls(
            access_token=access_token,
            token_type=text(values.get("token_type")) or "Bearer",
            expires_at=float(expires_at) if isinstance(expires_at, int | float) else None,
            refresh_token=text(values.get("refresh_token")),
            scope=text(values.get("scope")),
        )


class TokenStorage(Protocol):
    """Where tokens are kept, by the exact URL of the server. A program may bring its own."""

    async def save_tokens(self, server_url: str, tokens: dict[str, Any]) -> None:
        """Keep the tokens of a server, in place of those that were kept before. The keys are those of ``TokenData``."""

    async def load_tokens(self, server_url: str) -> Any:
        """Return the tokens of a server, as ``TokenData`` or a mapping; None if there are none."""

    async def delete_tokens(self, server_url: str) -> None:
        """Forget the tokens of a server."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PlainClient:
    """A client that was registered by another program."""

    client_id: str
    client_secret: str | None = field(default=None, repr=False)
    redirect_uri: str = ""
    token_endpoint_auth_method: str | None = None


def as_mapping(tokens: TokenData) -> dict[str, Any]:
    """Return tokens as a storage takes them."""
    return asdict(tokens)


def text(value: object) -> str | None:
    """Return a text that is not empty, or None."""
    return value if isinstance(value, str) and value else None
