"""The bridge to ASGI applications, over real sockets."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

from fakes.listener import listener
from fakes.proxy import until
from fakes.raw_client import RawClient
from mcp_auth_proxy.net.asgi import App, run_asgi
from mcp_auth_proxy.net.client_request import ClientRequest

START = {"type": "http.response.start", "status": 200}


class Pages:
    """Leave every request to an ASGI application."""

    def __init__(self, app: App) -> None:
        self._app = app

    def try_fast_path(self, request: ClientRequest) -> bool:
        return False

    async def serve(self, request: ClientRequest) -> None:
        await run_asgi(self._app, request)


@asynccontextmanager
async def client_of(app: App) -> AsyncIterator[RawClient]:
    async with listener(Pages(app)) as port, RawClient.to(f"http://127.0.0.1:{port}") as client:
        yield client


async def empty(send: Any, status: int = 204) -> None:
    await send({"type": "http.response.start", "status": status, "headers": []})
    await send({"type": "http.response.body"})


async def test_the_scope_describes_the_request() -> None:
    scopes: list[Any] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        scopes.append(scope)
        await empty(send)

    async with client_of(app) as client:
        client.send(b"GET /a%20b/%2f?c=%20 HTTP/1.1\r\nHost: a\r\nX-A: b\r\n\r\n")
        assert (await client.answer()).status == 204
    assert scopes == [
        {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.3"},
            "http_version": "1.1",
            "scheme": "http",
            "method": "GET",
            "path": "/a b//",
            "raw_path": b"/a%20b/%2f",
            "query_string": b"c=%20",
            "client": ("unknown", 0),
            "headers": [(b"host", b"a"), (b"x-a", b"b")],
        }
    ]


async def test_a_body_arrives_in_the_parts_that_were_sent() -> None:
    messages: list[Any] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        while not messages or messages[-1]["more_body"]:
            messages.append(await receive())
        await empty(send)

    async with client_of(app) as client:
        client.send(b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\n\r\nhe")
        await until(lambda: messages)
        client.send(b"llo")
        assert (await client.answer()).status == 204
    assert messages == [
        {"type": "http.request", "body": b"he", "more_body": True},
        {"type": "http.request", "body": b"llo", "more_body": False},
    ]


@pytest.mark.parametrize(
    "sent", [b"GET / HTTP/1.1\r\nHost: a\r\n\r\n", b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\n\r\nhe"]
)
async def test_a_client_that_goes_away_is_a_disconnect(sent: bytes) -> None:
    messages: list[Any] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        while not messages or messages[-1]["type"] == "http.request":
            messages.append(await receive())
        await empty(send)  # nobody reads it, and nothing is raised

    async with client_of(app) as client:
        client.send(sent)
        await until(lambda: messages)
        client.drop()
        await until(lambda: messages[-1] == {"type": "http.disconnect"})


async def test_after_the_response_there_is_nothing_left_to_receive() -> None:
    messages: list[Any] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        listening = asyncio.ensure_future(receive())
        messages.append(await listening)
        listening = asyncio.ensure_future(receive())
        await empty(send)
        messages.append(await listening)
        messages.append(await receive())

    async with client_of(app) as client:
        client.send(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n")
        assert (await client.answer()).status == 204
        await until(lambda: len(messages) == 3)
    assert [message["type"] for message in messages] == ["http.request", "http.disconnect", "http.disconnect"]


@pytest.mark.parametrize(
    "messages",
    [
        [{"type": "http.response.body", "body": b""}],
        [START, START],
        [{"type": "http.response.push"}],
        [
            {**START, "headers": [(b"content-length", b"1")]},
            {"type": "http.response.body"},
        ],
    ],
    ids=["body first", "two heads", "unknown", "too short"],
)
async def test_messages_out_of_order_are_an_error_of_the_application(messages: list[Any]) -> None:
    errors: list[Exception] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        try:
            for message in messages:
                await send(message)
        except RuntimeError as error:
            errors.append(error)

    async with client_of(app) as client:
        client.send(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n")
        assert (await client.rest())[:12] in (b"", b"HTTP/1.1 500")
    assert len(errors) == 1


def starlette(endpoint: Callable[[Request], Any]) -> App:
    return Starlette(routes=[Route("/{name}", endpoint, methods=["GET", "POST"])])


async def test_starlette_answers() -> None:
    async def endpoint(request: Request) -> Response:
        return PlainTextResponse(f"{request.path_params['name']} {(await request.body()).decode()}")

    async with client_of(starlette(endpoint)) as client:
        for body in (b"one", b"two"):
            client.send(b"POST /a HTTP/1.1\r\nHost: a\r\nContent-Length: 3\r\n\r\n" + body)
            answer = await client.answer()
            assert (answer.status, answer.body) == (200, b"a " + body)


async def test_a_stream_of_starlette_ends_with_its_client() -> None:
    closed = asyncio.Event()

    async def events() -> AsyncIterator[bytes]:
        try:
            yield b"data: {}\n\n"
            await asyncio.Event().wait()
        finally:
            closed.set()

    async def endpoint(request: Request) -> Response:
        return StreamingResponse(events())

    async with client_of(starlette(endpoint)) as client:
        client.send(b"GET /a HTTP/1.1\r\nHost: a\r\n\r\n")
        assert (await client.head())[0] == 200
        client.drop()
        await until(closed.is_set)
