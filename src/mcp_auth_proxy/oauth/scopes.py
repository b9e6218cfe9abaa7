"""Which scopes to request (MCP 2025-11-25, scope selection strategy; RFC 6749 §3.3)."""

import re
from collections.abc import Iterable
from itertools import accumulate

OFFLINE_ACCESS = "offline_access"
"""Requests a refresh token (OpenID Connect Core §11)."""

MAX_FOREIGN = 4000
"""Characters of the scopes that a server asks for; those beyond are not requested. All scopes are part of a URL."""

_TOKEN = re.compile(r"[\x21\x23-\x5b\x5d-\x7e]+")


def parse(text: str) -> tuple[str, ...]:
    """Return the scopes of a space-separated list, in order; duplicates and invalid scopes are dropped."""
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
    """Return the scopes to request; empty if the parameter is to be omitted.

    The configured scopes, or those of the challenge, or those of the resource metadata. ``already``: scopes requested
    before a step-up; empty if this is not a step-up. A step-up keeps them first and adds those of the challenge, also
    to configured scopes, because those were not enough. ``offline_access``: whether to add that scope if the
    authorization server lists it; False for grants without a refresh token.
    """
    challenged = _bounded(challenged or ())
    step_up = challenged if already else ()
    if configured is not None:
        base = (*configured, *step_up)
    elif challenged:
        base = challenged
    else:
        base = _bounded(supported_by_resource or ())
    chosen = _clean((*already, *base))
    if chosen and offline_access and OFFLINE_ACCESS in (supported_by_server or ()):
        chosen = _clean((*chosen, OFFLINE_ACCESS))
    return chosen


def _bounded(scopes: tuple[str, ...]) -> tuple[str, ...]:
    ends = accumulate(len(scope) + 1 for scope in scopes)
    return tuple(scope for scope, end in zip(scopes, ends, strict=True) if end <= MAX_FOREIGN)


def _clean(scopes: Iterable[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(scope for scope in scopes if _TOKEN.fullmatch(scope)))
