"""Where providers depart from RFC 6749 §5 at the token endpoint, and can be understood without any risk.

Nothing here makes a check weaker: an error that is a provider's own name for a standard one gets that name, and
tokens that lie elsewhere are held to the same rules.
"""

from collections.abc import Mapping

# Left: GitHub, then Slack. They come with HTTP 200.
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
    """Return the error code of RFC 6749 §5.2 that a provider's own one stands for; any other as it is."""
    return _STANDARD.get(code, code)


def standard_answer(answer: dict[str, object]) -> dict[str, object]:
    """Return a successful token response in the form of RFC 6749 §5.1.

    Slack's have ``ok: true``. The user's token is a bearer token of token_type ``user``, and lies in ``authed_user``
    where there is none beside it; scopes are separated by commas. A bot's token stays what it is: it acts for nobody.
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
