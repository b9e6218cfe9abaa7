"""HTML pages: rendered on the server, without external resources; they work without a script.

Only the dashboard and the last page of a popup have one.
"""

from base64 import b64encode
from dataclasses import dataclass
from hashlib import sha256
from html import escape
from pathlib import Path
from typing import Self

from jinja2 import Environment, FileSystemLoader
from starlette.responses import HTMLResponse

from mcp_auth_proxy.errors import excerpt
from mcp_auth_proxy.web.static_files import static_url

MAX_SCOPES = 1000
"""Characters of all scopes on a page; the others are counted."""

_templates = Environment(
    loader=FileSystemLoader(Path(__file__).parent / "templates"), autoescape=True, trim_blocks=True, lstrip_blocks=True
)


def visible(text: str) -> str:
    """Return a text without control characters, among them those that reverse what follows (U+202E)."""
    return "".join(character if character.isprintable() else "\ufffd" for character in text)


_templates.filters["visible"] = visible
_templates.globals["static"] = static_url

_STYLE = (Path(__file__).parent / "static" / "page.css").read_text()
_templates.globals["style"] = _STYLE
_STYLE_SOURCE = f"'sha256-{b64encode(sha256(_STYLE.encode()).digest()).decode()}'"
"""In the page itself, because ``login`` and the library end with their last page; the policy allows this very text."""

SECURITY_HEADERS = {
    "content-security-policy": (
        f"default-src 'none'; style-src {_STYLE_SOURCE}; img-src data:; base-uri 'none'; form-action 'none'; "
        "frame-ancestors 'none'"
    ),
    "x-frame-options": "DENY",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-store",
    "cross-origin-opener-policy": "same-origin",
}


@dataclass(frozen=True, slots=True)
class ScopeList:
    """The scopes to show on a page, and how many are left out."""

    shown: list[str]
    left_out: int

    @classmethod
    def of(cls, scopes: tuple[str, ...]) -> Self:
        """Return the first scopes, up to ``MAX_SCOPES`` characters, each cut as any text from outside."""
        shown: list[str] = []
        size = 0
        for scope in map(excerpt, scopes):
            size += len(scope)
            if size > MAX_SCOPES:
                break
            shown.append(scope)
        return cls(shown, len(scopes) - len(shown))


@dataclass(frozen=True, slots=True, kw_only=True)
class Popup:
    """What the last page of a popup tells its opener, as JSON, if that is a page of ``origin``."""

    origin: str
    message: str


@dataclass(frozen=True, slots=True)
class Restart:
    """A button that begins an authorization, on a page that says why another one has failed."""

    name: str
    """``SERVER`` or ``SERVER@ACCOUNT``."""
    http: bool
    """Whether its sign-in may be at an address without TLS."""
    popup: bool = False
    """Whether the page is in a popup of the dashboard."""


def page(
    template: str,
    *,
    status: int = 200,
    headers: dict[str, str] | None = None,
    popup: Popup | None = None,
    **values: object,
) -> HTMLResponse:
    """Return a page with escaped values, and headers that forbid framing and access by an opener.

    With ``popup`` it has a script that tells its opener something.
    """
    merged = {**SECURITY_HEADERS, **(headers or {})}
    if popup is not None:
        merged["content-security-policy"] = with_script(merged["content-security-policy"])
        merged["cross-origin-opener-policy"] = "unsafe-none"
    return HTMLResponse(render(template, popup=popup, **values), status_code=status, headers=merged)


def render(template: str, **values: object) -> str:
    """Return the text of a template with escaped values."""
    return _templates.get_template(template).render(**values)


def with_script(policy: str) -> str:
    """Return a policy that also allows our scripts."""
    return policy.replace("default-src 'none';", "default-src 'none'; script-src 'self';")


def with_files(policy: str) -> str:
    """Return a policy that also allows our scripts, which may ask our own pages for something, and style files."""
    return with_script(policy).replace(f"style-src {_STYLE_SOURCE}", "connect-src 'self'; style-src 'self'")


def form_headers(*, http: bool) -> dict[str, str]:
    """Return the headers in which a page differs from others whose form leads to a sign-in page.

    Chromium applies ``form-action`` also to the redirects after a form. A sign-in may lead over origins that can't be
    known here; they are https unless the first is on loopback (``http``). If a page forbids referrers, browsers send
    ``Origin: null`` with its form.
    """
    schemes = "https: http:" if http else "https:"
    policy = SECURITY_HEADERS["content-security-policy"].replace("form-action 'none'", f"form-action 'self' {schemes}")
    return {"content-security-policy": policy, "referrer-policy": "same-origin"}


def redirect(url: str, text: str) -> HTMLResponse:
    """Return a redirect (303), with a link for tools that do not follow redirects."""
    html = f'<!doctype html><title>{escape(text)}</title><p><a href="{escape(url, quote=True)}">{escape(text)}</a></p>'
    return HTMLResponse(html, status_code=303, headers={**SECURITY_HEADERS, "location": url})


def message(
    title: str,
    text: str,
    *,
    status: int,
    hint: str = "",
    onward: tuple[str, str] | None = None,
    popup: Popup | None = None,
    restart: Restart | None = None,
) -> HTMLResponse:
    """Return a page with one message.

    ``onward``: words and path of a link to another page of ours. ``restart``: what its button begins.
    """
    headers = {}
    if restart is not None:
        # Its template allows a referrer to our own pages, and none comes before it: the address may have a code in it.
        policy = form_headers(http=restart.http)["content-security-policy"]
        headers["content-security-policy"] = policy
    return page(
        "message.html",
        status=status,
        popup=popup,
        headers=headers,
        restart=restart,
        title=title,
        text=text,
        hint=hint,
        onward=onward,
        good=status < 400,
    )
