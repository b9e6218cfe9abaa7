"""Deviations of providers from RFC 6749 §5 at the token endpoint that are safe to accept.

Nothing here weakens a check: a provider's own error code is mapped to the standard one, and tokens found in another
place must follow the same rules.
"""

from collections.abc import Mapping

# Codes of GitHub, then of Slack. Both send them with HTTP 200.
_STANDARD: Mapping[str, str] = {
    "bad_verification_code": "invalid_grant",
    "bad_refresh_token": "invalid_grant",
    "incorrect_client_credentials": "invalid_client",
    "invalid_code": "invalid_grant",
    "code_already_used": "invalid_grant",
    "invalid_refresh_token": "invalid_grant",
    "token_revoked": "invalid_grant",
    "invalid_client_id": "invalid_client",
    "bad_client_secret": "invalid_client",
    "ratelimited": "temporarily_unavailable",
    "service_unavailable": "temporarily_unavailable",
    "internal_error": "server_error",
    "fatal_error": "server_error",
}

_TOKEN_MEMBERS = ("access_token", "token_type", "refresh_token", "expires_in", "scope")


def standard_error(code: str) -> str:
    """Return the error code of RFC 6749 §5.2 for a provider's own code. Other codes are returned unchanged."""
    return _STANDARD.get(code, code)


def standard_answer(answer: dict[str, object]) -> dict[str, object]:
    """Return a successful token response in the form of RFC 6749 §5.1.

    Slack's responses have ``ok: true``. The user's token is a bearer token with token_type ``user``; if there is no
    access_token at the top level, it is in ``authed_user``. Scopes are separated by commas. A bot's token is left
    unchanged, and is refused later: it does not act for a user.
    """
    if answer.get("ok") is not True:
        return answer
    nested = answer.get("authed_user")
    user: dict[str, object] = nested if isinstance(nested, dict) else {}
    if not answer.get("access_token"):
        answer = {**answer, **{name: user[name] for name in _TOKEN_MEMBERS if name in user}}
    elif not answer.get("scope") and user.get("access_token") == answer["access_token"]:
        answer = {**answer, "scope": user.get("scope")}
    scope = answer.get("scope")
    if isinstance(scope, str):
        answer = {**answer, "scope": scope.replace(",", " ")}
    return {**answer, "token_type": "Bearer"} if answer.get("token_type") == "user" else answer
