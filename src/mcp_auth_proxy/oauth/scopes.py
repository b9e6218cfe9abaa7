"""Which scopes to ask for (MCP 2025-11-25, scope selection strategy; RFC 6749 §3.3)."""

import re
from collections.abc import Iterable

OFFLINE_ACCESS = "offline_access"
"""OpenID Connect Core §11: asks for a refresh token."""

_TOKEN = re.compile(r"[\x21\x23-\x5b\x5d-\x7e]+")


def parse(text: str) -> tuple[str, ...]:
    """Return the scopes of a space-separated list, in order, without repeats and without what breaks the grammar."""
    return _clean(text.split(" "))


def choose(
    *,
    configured: tuple[str, ...] | None,
    challenged: tuple[str, ...] | None,
    supported_by_resource: tuple[str, ...] | None,
    supported_by_server: tuple[str, ...] | None,
    already: tuple[str, ...] = (),
    offline_access: bool = True,
) -> tuple[str, ...]:
    """Return the scopes to ask for; empty where the parameter is to be left out.

    The configured ones, else those of the challenge, else those of the resource metadata. On a step-up, told by
    ``already``, those asked for before come first and those of the challenge are added: also to configured ones,
    which were just seen not to be enough. ``offline_access`` is added to what is asked for where the authorization
    server lists it; it is False for grants that have no refresh token.
    """
    step_up = (challenged or ()) if already else ()
    if configured is not None:
        base = (*configured, *step_up)
    elif challenged:
        base = challenged
    else:
        base = supported_by_resource or ()
    chosen = _clean((*already, *base))
    if chosen and offline_access and OFFLINE_ACCESS in (supported_by_server or ()):
        chosen = _clean((*chosen, OFFLINE_ACCESS))
    return chosen


def _clean(scopes: Iterable[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(scope for scope in scopes if _TOKEN.fullmatch(scope)))
