"""Build the proxy's own answers, in the protocol version of the client.

A client never sees the upstream's 401: it would start an OAuth flow of its own. What it gets instead depends on what it
supports; docs/architecture.md has the table.
"""

from collections.abc import Callable

from mcp_auth_proxy.rpc.encoding import encode, shortened
from mcp_auth_proxy.rpc.messages import INPUT_KEY, Json, Message, RequestBody

URL_ELICITATION_REQUIRED = -32042
"""MCP 2025-11-25, client/elicitation: the user has to visit a URL first."""

AUTHORIZATION_REQUIRED = -32001
"""The proxy's own code, from the range left to implementations: a user has to authorize, or could not."""

UPSTREAM_FAILED = -32002
"""The proxy's own code: the upstream server, or its authorization server, can't be used now."""

NOT_FOUND = -32004
"""The proxy's own code: there is no such server, or no such session, for whoever calls."""

CALLER_REFUSED = -32005
"""The proxy's own code: it is not known who calls, or they may not."""

JSON_HEADERS = [(b"content-type", b"application/json"), (b"cache-control", b"no-store")]
"""The headers of every JSON answer of the proxy's own."""

LINK_KEY = "io.mcp-auth-proxy/authorization_url"

MAX_REASON = 1200
"""Bytes of the reason in an error: but for the client's own id, an answer is below 4 KiB."""

MAX_BATCH_ANSWER = 1024 * 1024
"""Bytes of the answer to a batch."""

_INPUT_REQUIRED_METHODS = frozenset({"tools/call", "prompts/get", "resources/read"})


def authorization_text(name: str, link: str) -> str:
    """Return what a user is told while a server waits for authorization; ``name`` is that of its account too."""
    return f"Server {name} needs your authorization. Open {link} in a browser, then try again."


def authorization_needed(
    message: Message,
    *,
    server: str,
    name: str,
    link: str,
    elicitation_id: str,
    session_elicits: bool,
    trace_id: str = "",
) -> Json:
    """Return the answer to one request while a user has to authorize.

    ``name`` is how the server and its account are shown.
    ``session_elicits``: the client declared URL elicitation when it initialized the session of this request.
    """
    text = authorization_text(name, link)
    prompt = f"Server {name} needs your authorization."
    elicits = message.url_elicitation or (session_elicits and not message.modern)
    if elicits and message.modern and message.method in _INPUT_REQUIRED_METHODS:
        return _result(message, _input_required(prompt, link))
    if elicits and not message.modern:
        elicitation = {"mode": "url", "url": link, "elicitationId": elicitation_id, "message": prompt}
        data: Json = {"elicitations": [elicitation], "authorization_url": link}
        return _error(message.id, URL_ELICITATION_REQUIRED, text, _traced(data, trace_id))
    if message.method == "tools/call":
        return _result(message, _tool_error(text, link, modern=message.modern))
    data = {"authorization_url": link, "server": server}
    return _error(message.id, AUTHORIZATION_REQUIRED, text, _traced(data, trace_id))


def _input_required(text: str, link: str) -> Json:
    """Return the result that makes a client of MCP 2026-07-28 show the URL and retry.

    It has no ``requestState``: the retry goes to the server, which would refuse a foreign one.
    """
    return {
        "resultType": "input_required",
        "inputRequests": {
            INPUT_KEY: {"method": "elicitation/create", "params": {"mode": "url", "url": link, "message": text}}
        },
        "_meta": {LINK_KEY: link},
    }


def admin_needed(message: Message, *, server: str, name: str, trace_id: str = "") -> Json:
    """Return the answer to one request while an admin has to authorize, for a caller who is none: it has no link."""
    text = ask_admin_text(name)
    if message.method == "tools/call":
        return _result(message, _tool_error(text, None, modern=message.modern))
    return failure(message, text, code=AUTHORIZATION_REQUIRED, server=server, trace_id=trace_id)


def declined(message: Message, name: str, *, server: str, trace_id: str = "") -> Json:
    """Return the answer to one request of a user who has declined to authorize; ``name`` as in ``Account.shown``."""
    text = declined_text(name)
    if message.method == "tools/call":
        return _result(message, _tool_error(text, None, modern=message.modern))
    return failure(message, text, code=AUTHORIZATION_REQUIRED, server=server, trace_id=trace_id)


def declined_text(name: str) -> str:
    """Return what a user is told who has declined to authorize."""
    return (
        f"The authorization of server {name} was declined, so it can't be used. To authorize it after all, run "
        f"`mcp-auth-proxy login {name}`, or try again in a minute."
    )


def ask_admin_text(name: str) -> str:
    """Return what a caller is told who may not authorize a server whose grant is shared."""
    return f"Server {name} needs an authorization that all share, which only an admin can give. Ask one."


def _tool_error(text: str, link: str | None, *, modern: bool) -> Json:
    result: Json = {"content": [{"type": "text", "text": text}], "isError": True}
    if link is not None:
        result["_meta"] = {LINK_KEY: link}
    if modern:
        result["resultType"] = "complete"
    return result


def reason(text: str) -> str:
    """Return the text of an error as ``failure`` takes it: some of it may come from a hostile server."""
    return shortened(text, MAX_REASON)


def failure(
    message: Message | None,
    text: str,
    *,
    code: int,
    server: str,
    link: str | None = None,
    retry_after: int | None = None,
    trace_id: str = "",
) -> Json:
    """Return a JSON-RPC error; give ``link`` only if opening it helps. ``text`` is a result of ``reason``.

    ``retry_after``: seconds after which trying again may help.
    """
    data: Json = {"server": server}
    if retry_after is not None:
        data["retry_after"] = retry_after
    if link is not None:
        data["authorization_url"] = link
    return _error(message.id if message else None, code, text, _traced(data, trace_id))


def _traced(data: Json, trace_id: str) -> Json:
    return {**data, "trace_id": trace_id} if trace_id else data


def answer_all(body: RequestBody, answer: Callable[[Message], Json], fallback: Callable[[], Json]) -> bytes:
    """Answer every request of a body, as a batch if it is one.

    ``fallback`` is the one answer if the body has no request, or if the answers take more than MAX_BATCH_ANSWER.
    """
    requests = body.requests
    if not requests:
        return encode(fallback())
    if not body.is_batch:
        return encode(answer(requests[0]))
    answers: list[bytes] = []
    left = MAX_BATCH_ANSWER - len(b"[]")
    for message in requests:
        encoded = encode(answer(message))
        left -= len(encoded) + len(b",")
        if left < 0:
            return encode(fallback())
        answers.append(encoded)
    return b"[%s]" % b",".join(answers)


def _result(message: Message, result: Json) -> Json:
    return {"jsonrpc": "2.0", "id": message.id, "result": result}


def _error(identifier: str | int | float | None, code: int, text: str, data: Json) -> Json:
    return {"jsonrpc": "2.0", "id": identifier, "error": {"code": code, "message": text, "data": data}}
