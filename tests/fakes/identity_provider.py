"""oidc-provider, a certified OpenID Connect server, as a process, and a browser whose user signs in there.

``make idp`` installs it. Its own pages ask for a name, any password, and consent.
"""

import asyncio
import shutil
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from urllib.parse import urlsplit

import httpx2

from bench.processes import Child, free_port
from conftest import IDENTITY_PROVIDER, SEARCH
from fakes.headless import Browser, Form

CLIENT_SECRET = "sign-in-secret"  # as in provider.js


@asynccontextmanager
async def identity_provider(folder: Path, redirect_uri: str) -> AsyncIterator[str]:
    """Run the identity provider with a client for browsers; yield its issuer."""
    node, port = shutil.which("node", path=SEARCH), free_port()
    assert node is not None
    child = Child(
        [node, str(IDENTITY_PROVIDER / "provider.js"), str(port), redirect_uri], log=folder / "identity-provider.log"
    )
    try:
        await asyncio.to_thread(child.wait_for, port, "/.well-known/openid-configuration")
        yield f"http://127.0.0.1:{port}"
    finally:
        child.stop()


class Person(Browser):
    """A browser that signs in as one person wherever a form asks who this is: with a name and any password, or a key.

    ``asked_at`` are the hosts of these forms.
    """

    def __init__(self, *, name: str = "", key: str = "", trusted: ssl.SSLContext | None = None) -> None:
        super().__init__(trusted=trusted)
        self.fields = {"login": name, "password": "any", "key": key}
        self.asked_at: list[str] = []

    async def submit(self, page_url: str, form: Form, button: tuple[str, str] | None) -> httpx2.Response:
        """Fill in the form, and send it."""
        found = form.fields.keys() & self.fields.keys()
        if found:
            self.asked_at.append(urlsplit(page_url).netloc)
            form.fields |= {field: self.fields[field] for field in found}
        return await super().submit(page_url, form, button)
