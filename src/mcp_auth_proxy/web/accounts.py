"""The accounts that pages are about: which one a path names, and the button that authorizes one."""

from collections.abc import Mapping

from mcp_auth_proxy.config.settings import ServerSettings
from mcp_auth_proxy.models import Account, Caller, Flow
from mcp_auth_proxy.net import urls
from mcp_auth_proxy.web.pages import Restart
from mcp_auth_proxy.web.paths import split_name
from mcp_auth_proxy.web.session import Visitors


class PageAccounts:
    """The accounts of those who open pages. ``servers`` may change at any time."""

    def __init__(self, servers: Mapping[str, ServerSettings], visitors: Visitors, public_url: str) -> None:
        self._servers = servers
        self._visitors = visitors
        self._public_url = public_url

    def find(self, caller: Caller, text: str) -> tuple[ServerSettings, Account] | None:
        """Return the server and the caller's account that ``SERVER`` or ``SERVER@ACCOUNT`` names.

        None if there is none for this caller.
        """
        name, account = split_name(text)
        server = self._servers.get(name)
        if server is None or not server.admits(caller.principal):
            return None
        return server, server.account(caller.principal, account)

    def restart(self, caller: Caller | None, flow: Flow | None, name: str = "") -> Restart | None:
        """Return the button that begins an authorization in place of a flow, or for a server if there is no flow.

        It is for the account of the flow, or for their own if that is somebody else's. None if the user may not.
        """
        account = flow.key.account if flow is not None else None
        server = self._servers.get(name if account is None else account.server)
        if caller is None or server is None or not server.admits(caller.principal):
            return None
        may_open = self._visitors.may_open(caller)
        if account is None or not may_open(account):
            account = server.account(caller.principal)
        if not may_open(account):
            return None
        own_origin = urls.parse(self._public_url).origin.serialized
        popup = flow is not None and flow.return_origin == own_origin
        return self.button(server, account, popup=popup)

    def button(self, server: ServerSettings, account: Account, *, popup: bool) -> Restart:
        """Return the button that authorizes an account. ``popup``: whether its page is in a popup of the dashboard."""
        http = not (self._public_url.startswith("https://") and server.url.startswith("https://"))
        return Restart(account.shown, http, popup)
