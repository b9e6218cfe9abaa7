"""What principals are called. A name is for people and for ``servers.*.allow``; identities tell who somebody is."""

from mcp_auth_proxy.models import LOCAL

MAX_NAME = 255
"""Characters."""

_OTHER_MEANINGS = ("role:", "project:", "prn_")
"""Patterns of ``allow``, owners of shared grants, and ids of principals, which commands and the API take for names."""


def check_name(name: str) -> str:
    """Return a name that somebody has chosen for a principal. Raises ValueError, as text that continues "the name"."""
    if not name or len(name) > MAX_NAME or not name.isprintable() or name != name.strip():
        raise ValueError(f"must be 1 to {MAX_NAME} printable characters, without spaces around them")
    if is_reserved(name):
        raise ValueError(f"can't be {name!r}: that has another meaning")
    return name


def is_reserved(name: str) -> bool:
    """Return whether a name would be taken for something else."""
    return name == LOCAL or name.startswith(_OTHER_MEANINGS)


def names_for(subject: str, source: str, *, plain: bool) -> tuple[str, ...]:
    """Return what the principal of a subject is called if it is made at its first request, the best first.

    ``source`` is what follows the ``@``. ``plain``: whether the subject alone may be its name.
    """
    qualified = f"{subject}@{source}"
    return (subject, qualified) if plain and not is_reserved(subject) else (qualified,)
