"""How errors of the layers below are answered by the API."""

import json

import pytest

from mcp_auth_proxy.errors import (
    AuthorizationError,
    AuthorizationServerUnavailable,
    CallbackRefused,
    CallerRefused,
    ClientNotActive,
    LoopDetected,
    McpAuthProxyError,
    StoreUnavailable,
    UpstreamPoolTimeout,
    UpstreamTimeout,
    UpstreamUnreachable,
)
from mcp_auth_proxy.web.api.problems import problem_of


@pytest.mark.parametrize(
    ("error", "status", "kind"),
    [
        (CallerRefused("No."), 401, "unauthenticated"),
        (CallerRefused("No.", 400), 400, "several-credentials"),
        (CallerRefused("No.", 503, retry_after=2.0), 503, "unavailable"),
        (ClientNotActive("notes", "github", "inactive"), 409, "client-inactive"),
        (ClientNotActive("notes", "github", "revoked"), 409, "client-revoked"),
        (AuthorizationServerUnavailable("Later."), 503, "authorization-server-unavailable"),
        (AuthorizationError("Never."), 502, "authorization-failed"),
        (CallbackRefused("Used.", 410), 410, "callback-refused"),
        (UpstreamTimeout("Slow."), 504, "upstream-timeout"),
        (UpstreamPoolTimeout("Full."), 503, "upstream-busy"),
        (UpstreamUnreachable("Down."), 502, "upstream-failed"),
        (StoreUnavailable("Locked."), 503, "store-unavailable"),
        (LoopDetected("Around."), 500, "failed"),
    ],
)
def test_each_error_has_a_status_and_a_kind(error: McpAuthProxyError, status: int, kind: str) -> None:
    response = problem_of(error).response("request-1")
    body = json.loads(bytes(response.body))
    assert (response.status_code, body["status"], body["type"]) == (status, status, f"urn:mcp-auth-proxy:{kind}")
    assert (body["detail"], body["request_id"]) == (str(error), "request-1")
    assert response.headers["content-type"] == "application/problem+json"


def test_who_has_to_wait_is_told_for_how_long() -> None:
    assert problem_of(CallerRefused("No.", 503, retry_after=1.2)).headers == {"retry-after": "2"}
    assert problem_of(StoreUnavailable("Locked.")).headers == {"retry-after": "1"}
    assert problem_of(CallerRefused("No.")).headers["www-authenticate"].startswith("Bearer")
