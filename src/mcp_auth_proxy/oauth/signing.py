"""Sign JWTs (RFC 7519). PyJWT takes 1.6 MiB, so it is imported with the first of them."""

import importlib
from collections.abc import Mapping
from typing import Any


def sign(claims: Mapping[str, object], key: Any, *, algorithm: str, headers: Mapping[str, object] | None = None) -> str:
    """Return a JWT with these claims. ``key`` is a private key of ``cryptography``."""
    token: str = importlib.import_module("jwt").encode(dict(claims), key, algorithm=algorithm, headers=headers)
    return token
