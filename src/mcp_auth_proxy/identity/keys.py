"""API keys as callers have them: ``mapk_<id>_<secret>``. The secret has 256 random bits, so a plain hash is safe."""

import hashlib
import re
import secrets
import string
from collections.abc import Iterable

from mcp_auth_proxy.models import ApiKey, Scope

PREFIX = "mapk_"

_ALPHABET = string.ascii_letters + string.digits
_SECRET_LENGTH = 43
"""Characters of base62: 256 bits."""

_FORM = re.compile(rb"mapk_[0-9a-f]{12}_[0-9A-Za-z]{43}")


def make_key(
    *, principal: str, name: str, scopes: Iterable[Scope], now: float, expires_at: float | None = None
) -> tuple[ApiKey, str]:
    """Return a new key as it is stored, and as its owner needs it. Times are in Unix seconds."""
    key_id = secrets.token_hex(6)
    secret = "".join(secrets.choice(_ALPHABET) for _ in range(_SECRET_LENGTH))
    text = f"{PREFIX}{key_id}_{secret}"
    key = ApiKey(
        id=key_id,
        principal=principal,
        name=name,
        key_hash=hashlib.sha256(text.encode()).hexdigest(),
        scopes=frozenset(scopes),
        created_at=now,
        expires_at=expires_at,
    )
    return key, text


def has_key_form(credential: bytes) -> bool:
    """Return whether a credential can be an API key."""
    return _FORM.fullmatch(credential) is not None
