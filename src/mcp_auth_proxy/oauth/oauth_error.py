"""OAuth errors as text for people. Text from an authorization server is reduced to what is safe to show."""

import re
from collections.abc import Iterable
from dataclasses import dataclass

from mcp_auth_proxy.config.settings import server_key
from mcp_auth_proxy.errors import MAX_FOREIGN, ConfigHint, excerpt

MAX_DESCRIPTION = MAX_FOREIGN
"""Maximum number of characters of an error_description to show."""

# RFC 6749 §4.1.2.1 and §5.2: error = 1*NQSCHAR
_CODE = re.compile(r"[\x20\x21\x23-\x5b\x5d-\x7e]{1,80}")

# Long enough to be a code or a token.
_OPAQUE = re.compile(r"[A-Za-z0-9_-]{32,}")
_UUID = re.compile(r"[0-9A-Fa-f]{8}(-[0-9A-Fa-f]{4}){3}-[0-9A-Fa-f]{12}")

# Entra ID: the resource does not match the scopes; the parameter is not supported.
_RESOURCE_REFUSED = re.compile(r"\bAADSTS(9010010|901002)\b")
_RESOURCE_ERRORS = frozenset({"invalid_target", "invalid_resource"})


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenRequestContext:
    """What a token request was for: used to explain an error in terms of the configuration."""

    server: str
    resource: str = ""
    scopes: tuple[str, ...] = ()
    configured_client: bool = False
    """Whether the client is one of the configuration, and not registered by the proxy."""


def hint(error: str, description: object, context: TokenRequestContext) -> tuple[str, ConfigHint | None]:
    """Return (explanation, hint): a sentence that names the configuration key to change, and the hint itself.

    ("", None) if no key is known to help. ``error`` is the result of ``code``. The server's description is used for
    this hint only, never to decide what the error means.
    """
    words = description if isinstance(description, str) else ""
    about_resource = error in _RESOURCE_ERRORS or (error == "invalid_request" and re.search(r"\bresource\b", words))
    if context.resource and (about_resource or _RESOURCE_REFUSED.search(words)):
        return (
            f" The resource parameter was {excerpt(context.resource)} (RFC 8707 §2). Set "
            f"{server_key(context.server, 'oauth.resource')} to the name that this authorization server uses for the "
            f"MCP server, or to omit if it does not support the parameter.",
            ConfigHint("oauth.resource", "omit"),
        )
    if error == "invalid_scope":
        requested = excerpt(" ".join(context.scopes)) or "none"
        key = server_key(context.server, "oauth.scopes")
        return f" The scopes requested were: {requested}. Set others in {key}.", ConfigHint("oauth.scopes")
    if error == "invalid_client" and context.configured_client:
        key = server_key(context.server, "oauth")
        return (
            f" Check {key}.client_id and what it proves itself with (client_secret or private_key, client_auth).",
            None,
        )
    return "", None


def code(value: object) -> str:
    """Return an OAuth error code, or ``unknown_error`` if the value is not a valid one (RFC 6749 §5.2)."""
    return value if isinstance(value, str) and _CODE.fullmatch(value) else "unknown_error"


def format_error(error: str, description: object = None, *, secrets: Iterable[str | None] = ()) -> str:
    """Return error code and description on one line of at most 300 characters, without control characters.

    ``secrets`` are values to mask if the server repeats them. Other long strings that look like a code or a token are
    masked too, except UUIDs: providers use them as trace ids.
    """
    if not isinstance(description, str):
        description = ""
    for secret in secrets:
        if secret:
            error = error.replace(secret, "****")
            description = description.replace(secret, "****")
    description = _OPAQUE.sub(_mask, excerpt(description, 4 * MAX_DESCRIPTION))
    # isprintable() is also False for characters that change the direction of the text.
    printable = (character if character.isprintable() else " " for character in description)
    words = " ".join("".join(printable).split())
    if len(words) > MAX_DESCRIPTION:
        words = words[:MAX_DESCRIPTION] + "…"
    return f"{error} ({words})" if words else error


def _mask(run: re.Match[str]) -> str:
    text = run.group()
    looks_random = any(character.isdigit() for character in text) and not _UUID.fullmatch(text)
    return "****" if looks_random else text
