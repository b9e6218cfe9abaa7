"""Token revocation (RFC 7009)."""


def request(token: str, hint: str) -> list[tuple[str, str]]:
    """Return the form that revokes a token (RFC 7009 §2.1), without client authentication. ``hint`` is its type.

    Revoke the refresh token if there is one: many servers can't revoke JWT access tokens.
    """
    return [("token", token), ("token_type_hint", hint)]
