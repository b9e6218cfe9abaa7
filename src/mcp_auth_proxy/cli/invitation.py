"""What ``login`` says: who has to open which link, and what the server offers then."""

from collections.abc import Iterable

from mcp_auth_proxy.broker import PendingAuthorization, ownership, sign_in
from mcp_auth_proxy.errors import excerpt
from mcp_auth_proxy.models import Account

NOT_USED = "The link was not used in time. Run login again for a new one."


def who_opens(account: Account, owner: str | None) -> str:
    """Return who has to sign in to open the link of an account."""
    return "an admin" if ownership.is_shared(account) or owner is None else owner


def invitation(shown: str, pending: PendingAuthorization, opener: str | None) -> list[str]:
    """Return in lines what the user has to do: open a link here or, with a code, on any device (RFC 8628).

    ``shown`` is the account; ``opener`` who has to sign in to open the link, None if callers are not identified.
    """
    device = pending.flow.device
    if device is None:
        return link_lines(shown, pending.link, opener)
    asked = sign_in(pending.flow).in_words
    return code_lines(asked, device.verification_uri, device.user_code, complete=device.verification_uri_complete or "")


def link_lines(shown: str, link: str, opener: str | None) -> list[str]:
    """Return in lines that a link has to be opened, and by whom."""
    who = f" Its page asks for a sign-in: only {opener} can open it." if opener is not None else ""
    return [f"Open this link to authorize {shown}:{who}", "", f"  {link}", ""]


def code_lines(asked: str, address: str, code: str, *, complete: str = "") -> list[str]:
    """Return in lines where a code has to be entered. ``complete``: the address that has the code in it, if any."""
    lines = [f"To authorize {asked}, open on any device", address, "and enter", code]
    if complete:
        lines += ["or open this address, and check that it shows the same code:", complete]
    return [part for number, line in enumerate(lines) for part in (("", f"  {line}", "") if number % 2 else (line,))]


def offer(tools: Iterable[str]) -> str:
    """Return which tools a server offers, in one line."""
    names = sorted(map(excerpt, tools))
    return f"It offers {len(names)} tool{'s'[: len(names) != 1]}{': ' if names else ''}{', '.join(names)}"
