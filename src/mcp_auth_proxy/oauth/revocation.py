"""Giving tokens back (RFC 7009)."""


def request(token: str, hint: str) -> list[tuple[str, str]]:
    """Return the form that revokes a token, still without client authentication (RFC 7009 §2.1).

    Revoke the refresh token where there is one: JWT access tokens can't be revoked at many servers.
    """
    return [("token", token), ("token_type_hint", hint)]
