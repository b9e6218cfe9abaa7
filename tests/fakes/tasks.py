"""Which tasks the proxy makes in this event loop: a request on the fast path needs none."""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import CodeType
from typing import Any

import mcp_auth_proxy
from mcp_auth_proxy.net.client_request import ClientRequest

PACKAGE = Path(mcp_auth_proxy.__file__).parent
DEMO = PACKAGE / "cli"
"""The fakes run the demo's servers in the same event loop."""

TASK_OF_A_REQUEST = ClientRequest.run_to_end.__qualname__


def tasks_of_requests() -> int:
    """Return how many requests are answered in a task now."""
    return sum(_code(task.get_coro()) is ClientRequest.run_to_end.__code__ for task in asyncio.all_tasks())


@contextmanager
def tasks_made() -> Iterator[list[str]]:
    """Yield a list that gets the name of each coroutine of the proxy that is made a task until the block ends."""
    loop = asyncio.get_running_loop()
    before = loop.get_task_factory()
    names: list[str] = []

    def make(loop: asyncio.AbstractEventLoop, coroutine: Any, **options: Any) -> asyncio.Task[Any]:
        code = _code(coroutine)
        path = Path(code.co_filename) if code is not None else Path()
        if path.is_relative_to(PACKAGE) and not path.is_relative_to(DEMO):
            names.append(coroutine.__qualname__)
        return asyncio.Task(coroutine, loop=loop, **options)

    loop.set_task_factory(make)
    try:
        yield names
    finally:
        loop.set_task_factory(before)


def _code(coroutine: object) -> CodeType | None:
    return getattr(coroutine, "cr_code", None)
