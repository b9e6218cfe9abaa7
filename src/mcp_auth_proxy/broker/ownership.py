"""Decide who may open a link: whoever the authorization is for, and nobody else (T51–T53).

A link is not authenticated by itself (MCP 2026-07-28, elicitation): whoever consents gives their account to the
principal who waits for it.
"""

from collections.abc import Callable

from mcp_auth_proxy.errors import CallbackRefused
from mcp_auth_proxy.models import Account, Principal, Role, shared_principal

MayOpen = Callable[[Account], bool]
"""Return whether a browser's user may authorize an account."""


def anyone(account: Account) -> bool:
    """Allow every account: callers are not identified, and having the link is enough."""
    return True


def nobody(account: Account) -> bool:
    """Allow no account: the browser's user has not signed in."""
    return False


def owner(principal: Principal) -> MayOpen:
    """Return what allows a principal its own accounts and, if it is an admin, those that its project shares."""

    def may_open(account: Account) -> bool:
        if account.principal == shared_principal(principal.project_id):
            return principal.role is Role.ADMIN
        return account.principal == principal.id

    return may_open


def is_shared(account: Account) -> bool:
    """Return whether an account belongs to a project."""
    return account.principal.startswith(shared_principal(""))


def require(may_open: MayOpen, account: Account) -> None:
    """Raise CallbackRefused (403) if a browser's user may not authorize an account."""
    if may_open(account):
        return
    if is_shared(account):
        raise CallbackRefused(
            f"Everybody uses {account.server} with one authorization, which only an admin gives. Ask an admin to open "
            f"this link.",
            403,
        )
    raise CallbackRefused(
        "This link was made for another user than the one who is signed in with this browser, or nobody is signed in. "
        "Sign in as the user that it was made for, and open it again.",
        403,
    )
