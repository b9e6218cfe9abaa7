"""OAuth errors as text for people: what an authorization server wrote is cut down to what is safe to show."""

import re
from collections.abc import Iterable
from dataclasses import dataclass

from mcp_auth_proxy.errors import ConfigHint

MAX_DESCRIPTION = 300
"""Characters of an error_description that are shown."""

# RFC 6749 §4.1.2.1 and §5.2: error = 1*NQSCHAR
_CODE = re.compile(r"[\x20\x21\x23-\x5b\x5d-\x7e]{1,80}")


_OPAQUE = re.compile(r"[A-Za-z0-9_-]{32,}")
_UUID = re.compile(r"[0-9A-Fa-f]{8}(-[0-9A-Fa-f]{4}){3}-[0-9A-Fa-f]{12}")

# Entra ID: the resource does not go with the scopes; the parameter is not supported.
_RESOURCE_REFUSED = re.compile(r"\bAADSTS(9010010|901002)\b")
_RESOURCE_ERRORS = frozenset({"invalid_target", "invalid_resource"})


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenRequestContext:
    """What a request asked for that an error may be about, and for which of our servers."""

    server: str
    resource: str = ""
    scopes: tuple[str, ...] = ()


def hint(error: str, description: object, asked: TokenRequestContext) -> tuple[str, ConfigHint | None]:
    """Return a sentence that names the configuration key to look at, and the remedy; "" and None where none is known.

    ``error`` is what ``code`` returned. The text of the server is looked into for this hint alone.
    """
    words = description if isinstance(description, str) else ""
    setting = f"servers.{asked.server}.oauth"
    about_resource = error in _RESOURCE_ERRORS or (error == "invalid_request" and re.search(r"\bresource\b", words))
    if asked.resource and (about_resource or _RESOURCE_REFUSED.search(words)):
        return (
            f" The resource parameter was {asked.resource} (RFC 8707 §2): set {setting}.resource to what this "
            f"authorization server knows the MCP server by, or to omit where it takes none.",
            ConfigHint("oauth.resource", "omit"),
        )
    if error == "invalid_scope":
        asked_for = " ".join(asked.scopes) or "none"
        return f" The scopes asked for: {asked_for}. Others can be set in {setting}.scopes.", ConfigHint("oauth.scopes")
    return "", None


def code(value: object) -> str:
    """Return an OAuth error code, or ``unknown_error`` in place of one that breaks its grammar."""
    return value if isinstance(value, str) and _CODE.fullmatch(value) else "unknown_error"


def format_error(error: str, description: object = None, *, secrets: Iterable[str | None] = ()) -> str:
    """Return code and description in one line, at most 400 characters, without control characters.

    ``secrets`` are values that must not be shown should the server repeat them. Besides these, long runs that look
    like a code or a token are masked; a UUID is left, for providers give the trace of a failure that way.
    """
    if not isinstance(description, str):
        description = ""
    for secret in secrets:
        if secret:
            error = error.replace(secret, "****")
            description = description.replace(secret, "****")
    description = _OPAQUE.sub(_mask, description)
    # isprintable() is False for controls and for what turns the direction of writing round.
    printable = (character if character.isprintable() else " " for character in description[: 4 * MAX_DESCRIPTION])
    words = " ".join("".join(printable).split())
    if len(words) > MAX_DESCRIPTION:
        words = words[:MAX_DESCRIPTION] + "…"
    return f"{error} ({words})" if words else error


def _mask(run: re.Match[str]) -> str:
    text = run.group()
    looks_random = any(character.isdigit() for character in text) and not _UUID.fullmatch(text)
    return "****" if looks_random else text
