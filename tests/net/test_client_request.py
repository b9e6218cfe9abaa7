"""How answers reach a client: over a real socket, from applications that a test brings along."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
from uvicorn import Config
from uvicorn.server import ServerState

from mcp_auth_proxy.net.http_server import InboundProtocol

Send = Callable[[dict[str, Any]], Awaitable[None]]
Answer = Callable[[Send], Awaitable[None]]

LENGTH_2 = (b"content-length", b"2")


def start(*headers: tuple[bytes, bytes], status: int = 200) -> dict[str, Any]:
    return {"type": "http.response.start", "status": status, "headers": list(headers)}


def body(data: bytes, *, more: bool = False) -> dict[str, Any]:
    return {"type": "http.response.body", "body": data, "more_body": more}


class Client:
    """A socket that tells what came in one piece."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer

    async def ask(self, method: bytes = b"GET", version: bytes = b"1.1") -> None:
        self._writer.write(b"%b / HTTP/%b\r\nHost: a\r\n\r\n" % (method, version))
        await self._writer.drain()

    async def piece(self) -> bytes:
        """Return what is there of an answer as soon as something is; ``b""`` at the end."""
        return await asyncio.wait_for(self._reader.read(65536), 5)

    async def close(self) -> None:
        self._writer.close()
        await self._writer.wait_closed()


@asynccontextmanager
async def client_of(*messages: dict[str, Any], answer: Answer | None = None) -> AsyncIterator[Client]:
    """A connection to an application that sends these messages, or answers as told."""

    async def app(scope: dict[str, Any], receive: object, send: Send) -> None:
        if answer is not None:
            await answer(send)
        for message in messages:
            await send(message)

    config = Config(app, ws="none", lifespan="off", log_config=None, access_log=False)
    config.load()
    state = ServerState()
    server = await asyncio.get_running_loop().create_server(
        lambda: InboundProtocol(config=config, server_state=state, app_state={}), "127.0.0.1", 0
    )
    client = Client(*await asyncio.open_connection(*server.sockets[0].getsockname()))
    try:
        yield client
    finally:
        await client.close()
        server.close()
        await server.wait_closed()


async def test_head_and_body_arrive_in_one_piece() -> None:
    async with client_of(start((b"x", b"y"), LENGTH_2), body(b"ok")) as client:
        await client.ask()
        assert await client.piece() == b"HTTP/1.1 200 OK\r\nx: y\r\ncontent-length: 2\r\n\r\nok"


async def test_an_empty_part_sends_the_head_ahead_of_a_slow_body() -> None:
    arrived = asyncio.Event()

    async def answer(send: Send) -> None:
        await send(start())
        await send(body(b"", more=True))
        await arrived.wait()
        await send(body(b"abc", more=True))
        await send(body(b""))

    async with client_of(answer=answer) as client:
        await client.ask()
        assert await client.piece() == b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n"
        arrived.set()
        rest = await client.piece()
        while not rest.endswith(b"0\r\n\r\n"):
            rest += await client.piece()
        assert rest == b"3\r\nabc\r\n0\r\n\r\n"


async def test_a_connection_carries_one_answer_after_the_other() -> None:
    async with client_of(start(LENGTH_2), body(b"ok")) as client:
        for _ in range(3):
            await client.ask()
            assert (await client.piece()).endswith(b"\r\n\r\nok")


async def test_an_answer_to_head_keeps_its_length_and_has_no_body() -> None:
    async with client_of(start((b"content-length", b"700")), body(b"")) as client:
        for _ in range(2):
            await client.ask(b"HEAD")
            assert await client.piece() == b"HTTP/1.1 200 OK\r\ncontent-length: 700\r\n\r\n"


@pytest.mark.parametrize("status", [204, 304])
async def test_an_answer_that_has_no_body_gets_no_framing(status: int) -> None:
    async with client_of(start(status=status), body(b"")) as client:
        await client.ask()
        assert b"transfer-encoding" not in await client.piece()


async def test_a_client_of_http_1_0_sees_the_end_of_the_connection() -> None:
    async with client_of(start(LENGTH_2), body(b"ok")) as client:
        await client.ask(version=b"1.0")
        assert await client.piece() == b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\nconnection: close\r\n\r\nok"
        assert await client.piece() == b""


async def test_a_client_of_http_1_0_gets_no_chunks() -> None:
    async with client_of(start(), body(b"a", more=True), body(b"bc")) as client:
        await client.ask(version=b"1.0")
        answer = b""
        while piece := await client.piece():
            answer += piece
        assert answer == b"HTTP/1.1 200 OK\r\nconnection: close\r\n\r\nabc"


@pytest.mark.parametrize(
    "messages",
    [
        (start(LENGTH_2), body(b"too long")),
        (start(LENGTH_2), body(b"1")),
        (start((b"x", b"a\r\nset-cookie: b")), body(b"")),
        (start((b"x\n", b"a")), body(b"")),
        (start((b"x", b"a\0")), body(b"")),
        (start(), start()),
    ],
    ids=["too long", "too short", "line break", "line break in a name", "NUL", "two heads"],
)
async def test_nothing_of_a_faulty_answer_reaches_the_client(messages: tuple[dict[str, Any], ...]) -> None:
    async with client_of(*messages) as client:
        await client.ask()
        assert await client.piece() == b""
