"""A proxy that runs elsewhere, as commands reach it: its API with a key, and each failure as one line."""

import os
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import httpx2

from mcp_auth_proxy import __version__, secret_values
from mcp_auth_proxy.errors import MAX_MESSAGE, ConfigError, ConfigurationError, McpAuthProxyError, excerpt
from mcp_auth_proxy.net import urls

Json = dict[str, Any]

TIMEOUT = 60.0
"""Seconds for one request: the proxy may ask an MCP server and an authorization server meanwhile."""

PAGE_SIZE = "200"
MAX_KEY = 16 * 1024


class ApiProblem(McpAuthProxyError):
    """The API refuses a request. ``kind`` is the last part of the problem's ``type``, empty if it has none."""

    def __init__(self, message: str, kind: str) -> None:
        self.kind = kind
        super().__init__(message)


class RemoteProxy:
    """The API of one proxy, with the rights of one key. Every request raises McpAuthProxyError.

    Use it as an asynchronous context manager.
    """

    def __init__(self, url: str, key_source: str) -> None:
        """``url`` is the proxy's, without a path or below one; ``key_source`` is ``env:NAME`` or ``file:PATH``.

        Raises ConfigurationError.
        """
        self._url = checked_url(url)
        key = read_key(key_source)
        secret_values.remember(key)
        self.options = f"--url {self._url} --api-key {key_source}"
        """What the commands have to be given again."""
        self._client = httpx2.AsyncClient(
            headers={
                "authorization": f"Bearer {key}",
                "accept": "application/json",
                "user-agent": f"mcp-auth-proxy/{__version__}",
            },
            timeout=TIMEOUT,
        )

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._client.aclose()

    async def get(self, path: str, **query: str) -> Json:
        """Return what is at a path below ``/api/v1``."""
        return await self._send("GET", path, params=query)

    async def post(self, path: str, body: Json) -> Json:
        """Send a body, and return the answer."""
        return await self._send("POST", path, json=body)

    async def delete(self, path: str) -> Json:
        """Delete something, and return what the API says about it."""
        return await self._send("DELETE", path)

    async def items(self, path: str, **query: str) -> list[Json]:
        """Return the items of all pages of a list."""
        found: list[Json] = []
        token: str | None = ""
        while token is not None:
            paged = {**query, "page_size": PAGE_SIZE, **({"page_token": token} if token else {})}
            page = await self.get(path, **paged)
            found += page["items"]
            token = page["page"]["next_page_token"]
        return found

    async def _send(self, method: str, path: str, **options: Any) -> Json:
        try:
            response = await self._client.request(method, f"{self._url}/api/v1{path}", **options)
        except (httpx2.HTTPError, httpx2.InvalidURL) as error:
            reason = excerpt(" ".join(str(error).split()), MAX_MESSAGE) or type(error).__name__
            raise McpAuthProxyError(f"{self._url} can't be reached: {reason.rstrip('.')}.") from None
        try:
            document = response.json() if response.content else {}
        except ValueError:
            document = None
        if response.is_success and isinstance(document, dict):
            return document
        raise self._problem(response.status_code, document)

    def _problem(self, status: int, document: object) -> ApiProblem:
        """Return the error for an answer that is not what was asked for (RFC 9457)."""
        problem = document if isinstance(document, dict) else {}
        kind = str(problem.get("type", "")).rpartition(":")[2]
        said = [str(problem.get("detail") or problem.get("title") or "")]
        faults = problem.get("errors")
        for fault in faults if isinstance(faults, list) else []:
            if isinstance(fault, dict):
                place = ".".join(map(str, fault.get("loc", [])))
                said.append(f"{place}: {fault.get('msg', '')}")
        text = excerpt(" ".join(" ".join(said).split()), MAX_MESSAGE)
        if not text:
            return ApiProblem(
                f"{self._url} answers {status}, and not as the API of mcp-auth-proxy does. Is that the address of a "
                f"proxy, and is its API on (admin.enabled)?",
                kind,
            )
        return ApiProblem(f"{self._url} answers {status}: {text}", kind)


def read_key(source: str) -> str:
    """Return the key that ``env:NAME`` or ``file:PATH`` names. Raises ConfigurationError, which never repeats it."""
    kind, _, name = source.partition(":")
    if kind not in ("env", "file") or not name:
        raise _refused("must be env:NAME or file:PATH. A key itself would be seen by every user of this machine.")
    if kind == "env":
        text = os.environ.get(name)
        if not text:
            raise _refused(f"the environment variable {name!r} is not set")
    else:
        try:
            with Path(name).expanduser().open(encoding="utf-8") as file:
                text = file.read(MAX_KEY)
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or "it is not text"
            raise _refused(f"{name} can't be read ({reason})") from None
    key = text.strip()
    if not key or not key.isascii() or not key.isprintable() or " " in key:
        raise _refused(f"{source} has no key in it")
    return key


def checked_url(text: str) -> str:
    """Return a URL without a slash at its end."""
    try:
        url = urls.parse(text)
    except ValueError as error:
        raise ConfigurationError([ConfigError("--url", str(error))]) from None
    if "?" in text or "#" in text:
        raise ConfigurationError([ConfigError("--url", "must have neither a query nor a fragment")])
    if url.origin.scheme != "https" and not urls.is_loopback(url.origin.host):
        problem = "must begin with https://, because the key is sent there; http:// is for this machine only"
        raise ConfigurationError([ConfigError("--url", problem)])
    return text.rstrip("/")


def _refused(problem: str) -> ConfigurationError:
    return ConfigurationError([ConfigError("--api-key", problem)])
