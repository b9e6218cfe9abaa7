"""Decoding a body: piece by piece, bounded, and with an error if it does not match its encoding."""

import gzip
import zlib
from collections.abc import Sequence

import pytest

from mcp_auth_proxy.errors import UpstreamError, UpstreamProtocolError
from mcp_auth_proxy.net.http_head import Fields
from mcp_auth_proxy.net.http_response import Response
from mcp_auth_proxy.proxy.decoding import PIECE, decoded


class BodySource:
    """The connection of a response that has come in whole."""

    def pause(self) -> None: ...

    def resume(self) -> None: ...

    def push_body_to(self, response: Response) -> None: ...

    def abort(self) -> None: ...

    def fail(self, error: UpstreamError) -> None: ...


def response(body: bytes, *encodings: bytes) -> Response:
    found = Response(BodySource(), 200, Fields([(b"content-encoding", encoding) for encoding in encodings]))
    found.feed(body)
    found.finish(None)
    return found


async def pieces(answer: Response) -> list[bytes]:
    return [piece async for piece in decoded(answer)]


@pytest.mark.parametrize(
    ("body", "encodings"),
    [
        (b"text", []),
        (b"text", [b"identity"]),
        (gzip.compress(b"text", mtime=0), [b"gzip"]),
        (gzip.compress(b"text", mtime=0), [b" X-GZIP "]),
        (zlib.compress(b"text"), [b"deflate"]),
        (b"", [b"gzip"]),
    ],
)
async def test_the_body_is_decoded(body: bytes, encodings: Sequence[bytes]) -> None:
    assert b"".join(await pieces(response(body, *encodings))) == (b"text" if body else b"")


async def test_a_decompression_bomb_is_decoded_in_bounded_pieces() -> None:  # T24
    found = await pieces(response(gzip.compress(b"\0" * 10_000_000), b"gzip"))
    assert sum(map(len, found)) == 10_000_000
    assert max(map(len, found)) <= PIECE


@pytest.mark.parametrize("encodings", [[b"br"], [b"gzip, br"], [b"gzip", b"gzip"]])
async def test_an_unsupported_encoding_is_named(encodings: list[bytes]) -> None:
    with pytest.raises(UpstreamProtocolError, match=encodings[0].decode()):
        await pieces(response(b"x", *encodings))


async def test_a_body_that_does_not_match_its_encoding_is_an_error() -> None:
    with pytest.raises(UpstreamProtocolError, match="Content-Encoding"):
        await pieces(response(b"plain text", b"gzip"))
