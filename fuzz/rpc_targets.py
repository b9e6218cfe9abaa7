"""JSON-RPC bodies of clients, and bodies of servers in a Content-Encoding."""

import asyncio
import json
import zlib
from collections.abc import Sequence
from typing import Any, cast

from fuzz.checks import check_error, cuttings
from mcp_auth_proxy.errors import UpstreamProtocolError
from mcp_auth_proxy.net.http_response import Response
from mcp_auth_proxy.proxy.decoding import PIECE, decoded
from mcp_auth_proxy.rpc import answers, events
from mcp_auth_proxy.rpc.messages import INPUT_KEY, MAX_BATCH, Message, RequestBody, needs_inspection

LINK = "http://127.0.0.1:8787/connect/s?flow=f"

MAX_ANSWER = 4096
"""Bytes of an answer to one request, without its id."""


def messages(data: bytes) -> None:
    """Check what is read of a request's body, and what is answered to it."""
    needs_inspection(data)
    body = RequestBody(data)
    assert len(body.messages) <= MAX_BATCH
    if body.error is not None:
        assert not body.messages and not body.consent_action
    elif not body.too_costly and not body.is_batch:
        assert RequestBody.of_start(data).requests in ([], body.requests), "the start shows another request"
    if body.content != data:
        _check_without_entry(data, body.content)
    link = answers.answer_all(
        body,
        lambda message: answers.authorization_needed(
            message, server="s", name="s", link=LINK, elicitation_id="e", session_elicits=True, trace_id="t"
        ),
        lambda: _failure(None),
    )
    for document in (link, answers.answer_all(body, _failure, lambda: _failure(None))):
        _check_answer(document, body)


def _failure(message: Message | None) -> dict[str, Any]:
    reason = answers.reason("\x00" * 5000)
    return answers.failure(message, reason, code=answers.UPSTREAM_FAILED, server="s", link=LINK, trace_id="t")


def _check_without_entry(data: bytes, sent: bytes) -> None:
    """Check that nothing but the proxy's own entry was taken out of a body."""
    document = json.loads(data)
    responses = document["params"]["inputResponses"]
    del responses[INPUT_KEY]
    if not responses:
        del document["params"]["inputResponses"]
    assert json.loads(sent) == document, "more was changed than the proxy's own entry"


def _check_answer(document: bytes, body: RequestBody) -> None:
    answered = json.loads(document)
    event = events.message_event(document)
    assert event.count(b"\n") == 3 and b"\r" not in event, "an event of more lines"
    many = body.is_batch and bool(body.requests) and isinstance(answered, list)
    found = answered if many else [answered]
    ids = [message.id for message in body.requests]
    assert [one["id"] for one in found] == (ids if many or len(ids) == 1 else [None]), "answers for other ids"
    assert len(document) <= answers.MAX_BATCH_ANSWER or not body.is_batch
    size = len(document) - sum(len(json.dumps(one["id"])) for one in found)
    assert size <= MAX_ANSWER * len(found), f"an answer of {size} bytes"


class Parts:
    """A body as it arrives."""

    def __init__(self, encoding: bytes, parts: Sequence[bytes]) -> None:
        self.headers = [(b"content-encoding", encoding)]
        self._parts = [part for part in parts if part]

    @property
    def complete(self) -> bool:
        return not self._parts

    async def read(self) -> bytes:
        return self._parts.pop(0)


_RUNNER = asyncio.Runner()


async def _decode(encoding: bytes, parts: Sequence[bytes]) -> tuple[bytes, str]:
    """Return what was decoded, and the error that ended it."""
    found = b""
    try:
        async for piece in decoded(cast(Response, Parts(encoding, parts))):
            assert len(piece) <= PIECE, f"a piece of {len(piece)} bytes"
            found += piece
            if len(found) > 16 * PIECE:
                break
    except UpstreamProtocolError as error:
        check_error(error)
        return b"", str(error)
    return found, ""


def decoding(data: bytes) -> None:
    """Check what is decoded. The first line of the input is Content-Encoding, the rest the body."""
    encoding, _, body = data.partition(b"\n")
    whole, *others = [_RUNNER.run(_decode(encoding, parts)) for parts in cuttings(body)]
    if len(whole[0]) <= 16 * PIECE:
        assert all(other == whole for other in others), "another result if the bytes come in other pieces"
    content, error = whole
    if not error and encoding.strip().lower() in (b"gzip", b"deflate") and len(content) <= 16 * PIECE:
        assert zlib.decompressobj(32 + zlib.MAX_WBITS).decompress(body) == content
