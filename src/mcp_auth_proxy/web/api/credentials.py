"""Who calls the API: the principal of a credential, or of a browser's session."""

from starlette.requests import Request

from mcp_auth_proxy.errors import CallerRefused
from mcp_auth_proxy.models import Caller
from mcp_auth_proxy.web.api.context import ApiContext
from mcp_auth_proxy.web.api.problems import forbidden, too_many
from mcp_auth_proxy.web.failed_credentials import TOO_MANY

NO_CREDENTIAL = (
    "A credential is needed: Authorization with Bearer and an API key or a JWT, X-API-Key, Basic with the key as "
    "password, or the session of a browser."
)


async def caller_of(request: Request, api: ApiContext) -> Caller:
    """Return who calls. Raises Problem (403, 429), CallerRefused and StoreError.

    A credential that holds is accepted however many others from its address did not: several users may share one.
    """
    client, peer = addresses(request)
    try:
        caller = await _identify(request, api, peer)
    except CallerRefused as error:
        if error.status == 401 and (seconds := api.failed_credentials.count(client)):
            raise too_many(TOO_MANY, seconds) from None
        raise
    if caller is None:
        raise CallerRefused(NO_CREDENTIAL)
    return caller


async def _identify(request: Request, api: ApiContext, peer: str) -> Caller | None:
    """Return the caller; None if there is neither a credential nor a session."""
    caller = await api.authenticator.identify_api(request.headers.raw, peer)
    session = await api.session_caller(request)
    if caller is not None and session is not None:
        raise CallerRefused("The request has a session and another credential: send one of them.", 400)
    if session is not None:
        _check_origin(request)
    return caller or session


def _check_origin(request: Request) -> None:
    """Check that a page of ours sends what a session pays for. The guard has refused each foreign Origin already."""
    if "origin" not in request.headers and request.headers.get("sec-fetch-site") != "same-origin":
        raise forbidden("A session can be used by the pages of this proxy only: Origin is missing.")


def addresses(request: Request) -> tuple[str, str]:
    """Return the addresses of the client, and of the peer that the connection comes from (see ``net.peers``)."""
    shown = request.client.host if request.client is not None else "unknown"
    client, _, peer = shown.partition(" through ")
    return client, peer or client
