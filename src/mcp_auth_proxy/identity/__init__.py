"""Who is calling: from the credentials of a request to a principal.

``Authenticator`` is what the data plane asks; ``Callers`` is that of a running proxy, in every mode, and also tells who
uses the API. ``Directory`` has the principals and keys.
"""

import time
from collections.abc import Callable

from mcp_auth_proxy.config.settings import Settings
from mcp_auth_proxy.identity.authenticator import Authenticator, Fields, NoAuthenticator
from mcp_auth_proxy.identity.callers import Callers
from mcp_auth_proxy.identity.directory import Directory
from mcp_auth_proxy.oauth.fetch import Fetcher
from mcp_auth_proxy.store.engine import Engine

__all__ = ["Authenticator", "Callers", "Directory", "Fields", "NoAuthenticator", "make_authenticator"]


def make_authenticator(
    settings: Settings, *, database: Engine, fetcher: Fetcher, clock: Callable[[], float] = time.time
) -> Callers:
    """Return what identifies callers as ``inbound`` says. ``start`` and ``aclose`` of it must be awaited."""
    directory = Directory(database, clock=clock, local=not settings.inbound.modes)
    return Callers(settings.inbound, directory, fetcher=fetcher, clock=clock)
