"""What ``login`` says: who has to open which link, and what the server offers then."""

from collections.abc import Iterable
from dataclasses import dataclass

from mcp_auth_proxy.broker import PendingAuthorization, ownership, sign_in
from mcp_auth_proxy.errors import McpAuthProxyError, excerpt
from mcp_auth_proxy.models import Account

NOT_USED = "The link was not used in time. Run login again for a new one."


@dataclass(frozen=True, slots=True, kw_only=True)
class LoginOptions:
    """How the user of ``login`` comes to the authorization server, and how long the command waits for them."""

    paste: bool = False
    """The user brings the address of the redirect: neither a browser here nor a running proxy is needed."""
    no_wait: bool = False
    """Only print the link."""
    wait: float | None = None
    """Seconds; None: as long as the link can be used."""


def not_in_time(seconds: float | None) -> McpAuthProxyError:
    """Return the error for a user who has not authorized within ``--wait``."""
    return McpAuthProxyError(f"Nobody has authorized within {seconds or 0:g} s. Run login again.")


def needs_waiting(server: str) -> McpAuthProxyError:
    """Return the error for ``--no-wait`` with a device code, for which somebody has to poll."""
    return McpAuthProxyError(
        f"{server} is authorized with a code on another device (oauth.grant: device_code), and this command has to "
        f"wait for it: leave --no-wait out."
    )


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


def paste_lines(shown: str, address: str, notice: str, redirect_uri: str) -> list[str]:
    """Return in lines where to sign in with any browser, what to know before, and what to paste afterwards."""
    return [
        f"Open this address in a browser, on any machine, to authorize {shown}:",
        "",
        f"  {address}",
        "",
        notice,
        f"In the end the browser is sent to an address that begins with {excerpt(redirect_uri)}? and that it may not "
        "be able to open. Copy that address from its address bar, all of it, and paste it here:",
    ]


def client_line(url: str) -> str:
    """Return at which URL MCP clients use an account."""
    return f"MCP clients use it at {url}"


def offer(tools: Iterable[str]) -> str:
    """Return which tools a server offers, in one line."""
    names = sorted(map(excerpt, tools))
    return f"It offers {len(names)} tool{'s'[: len(names) != 1]}{': ' if names else ''}{', '.join(names)}"
