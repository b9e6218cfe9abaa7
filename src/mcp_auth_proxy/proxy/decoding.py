"""Decode a body for a response whose head was sent before, without Content-Encoding."""

import asyncio
import zlib
from collections.abc import AsyncIterator, Sequence

from mcp_auth_proxy.errors import UpstreamProtocolError
from mcp_auth_proxy.net.http_response import Response

PIECE = 64 * 1024
"""Maximum number of bytes decoded at a time, so that a caller who counts them notices a decompression bomb."""

_GZIP_OR_ZLIB = 32 + zlib.MAX_WBITS


async def decoded(response: Response) -> AsyncIterator[bytes]:
    """Yield the body without its Content-Encoding (RFC 9110 §8.4), as it arrives. Raises UpstreamProtocolError.

    The proxy asks for ``identity``; gzip and deflate are decoded too, because some servers compress regardless.
    """
    encoding = _encoding(response.headers)
    if encoding not in (b"", b"gzip", b"x-gzip", b"deflate"):
        name = encoding.decode("latin-1")[:40]
        raise UpstreamProtocolError(f"its answer is encoded as {name!r}, though only identity was asked for.")
    unpack = zlib.decompressobj(_GZIP_OR_ZLIB) if encoding else None
    while not response.complete:
        data = await response.read()
        if unpack is None:
            yield data
            continue
        while data:
            try:
                piece = unpack.decompress(data, PIECE)
            except zlib.error:
                raise UpstreamProtocolError("its answer is not what its Content-Encoding says.") from None
            data = unpack.unconsumed_tail
            if piece:
                yield piece
            # 64 KiB may become 64 MiB: others have their turn.
            await asyncio.sleep(0)
    if unpack is not None and (rest := unpack.flush()):
        yield rest


def _encoding(headers: Sequence[tuple[bytes, bytes]]) -> bytes:
    values = [value.strip().lower() for name, value in headers if name.lower() == b"content-encoding"]
    return b", ".join(value for value in values if value and value != b"identity")
