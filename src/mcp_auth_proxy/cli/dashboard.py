"""``dashboard``: a single-use link that opens a session in a browser, made in the store beside a running proxy."""

import os

from mcp_auth_proxy.cli import audit
from mcp_auth_proxy.cli.terminal import complain, say
from mcp_auth_proxy.config.settings import Settings, StoreSettings, reachable
from mcp_auth_proxy.errors import McpAuthProxyError
from mcp_auth_proxy.identity.sessions import LINK_LIFETIME, new_link
from mcp_auth_proxy.models import LOCAL_PRINCIPAL, Principal
from mcp_auth_proxy.net import urls
from mcp_auth_proxy.store import Engine, open_store, serving
from mcp_auth_proxy.store.principals import Principals
from mcp_auth_proxy.store.sessions import Sessions
from mcp_auth_proxy.web import browser

OPENING = 10.0
"""Seconds that the browser is given to start before the command ends."""


async def dashboard(store: StoreSettings, settings: Settings | None, *, name: str | None) -> int:
    """Print a link for one session, and open it if a browser can be shown. Return 0; raise McpAuthProxyError.

    ``settings`` is None if there is no configuration. ``name``: the principal whose session it is; without it that of
    mode ``none``.
    """
    public_url = _public_url(store, settings)
    identified = settings is not None and bool(settings.inbound.modes)
    database = await open_store(store)
    try:
        principal = await _principal(database, name, identified=identified)
        secret = await new_link(Sessions(database), principal=principal.id, now=database.now())
        await audit.record(database, "links.create", target=principal.id, project=principal.project_id)
    finally:
        await database.close()
    link = f"{public_url}/sign-in?link={secret}"
    complain(f"Open this link within {LINK_LIFETIME / 60:.0f} minutes. It works once:")
    say(link)
    choice = settings.authorization.open_browser if settings is not None else "auto"
    loopback = urls.is_loopback(urls.parse(public_url).origin.host)
    if browser.should_open(choice, loopback=loopback, environ=os.environ):
        browser.open_link(link).join(OPENING)
    return 0


def _public_url(store: StoreSettings, settings: Settings | None) -> str:
    """Return how a browser reaches the proxy that serves the store. Raises McpAuthProxyError if there is none."""
    served = serving.addresses(store)
    if not served:
        raise McpAuthProxyError(
            f"No proxy is running with the store {store.shown}, so nothing would answer the link. Start one with "
            f"`mcp-auth-proxy serve`."
        )
    if settings is not None and settings.public_url is not None:
        return settings.public_url
    return f"http://{reachable(served[0])}"


async def _principal(database: Engine, name: str | None, *, identified: bool) -> Principal:
    """Return the principal whose session it will be."""
    if not identified:
        if name is not None:
            raise McpAuthProxyError("The callers of this proxy are not identified: leave --as out.")
        return LOCAL_PRINCIPAL
    if name is None:
        raise McpAuthProxyError("The callers of this proxy are identified. Say whose session it will be: --as NAME.")
    found = await Principals(database).by_name(name)
    if found is None:
        raise McpAuthProxyError(f"There is no principal {name!r}; `mcp-auth-proxy principals list` shows them.")
    return found
