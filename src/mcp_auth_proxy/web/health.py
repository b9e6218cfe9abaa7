"""What ``health_listen`` serves: the health endpoints, for probes that do not reach the proxy's own listener."""

from collections.abc import Callable

from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route, Router

from mcp_auth_proxy.net.asgi import run_asgi
from mcp_auth_proxy.net.client_request import ClientRequest


class HealthEndpoints:
    """The ``net.client_request.RequestServer`` of that listener.

    ``Host`` is not checked, because the kubelet sends the pod's address. Nothing here gives access to a grant.
    """

    def __init__(self, routes: list[Route], *, on_quit: Callable[[], None] | None) -> None:
        """``on_quit`` is called by the first ``POST /quitquitquit``; None: there is no such route."""
        self._on_quit = on_quit
        quit_routes = [Route("/quitquitquit", self._quit, methods=["POST"])] if on_quit is not None else []
        self._app = Router([*routes, *quit_routes], redirect_slashes=False)

    def try_fast_path(self, request: ClientRequest) -> bool:
        """Leave every request to ``serve``."""
        return False

    async def serve(self, request: ClientRequest) -> None:
        """Answer any request."""
        await run_asgi(self._app, request)

    async def _quit(self, request: Request) -> Response:
        # Browsers send these with each POST of a page, and no page may end the process.
        if "origin" in request.headers or "sec-fetch-site" in request.headers:
            return PlainTextResponse("Web pages must not end this process.\n", status_code=403)
        # Called again, it would end the running requests, as a second signal does.
        on_quit, self._on_quit = self._on_quit, None
        if on_quit is not None:
            on_quit()
        return PlainTextResponse("The process ends after its running requests, as with SIGTERM.\n")
