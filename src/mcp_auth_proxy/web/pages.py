"""HTML pages: rendered on the server, without external resources; only the last page of a popup has a script."""

from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Self

from jinja2 import Environment, FileSystemLoader
from starlette.responses import HTMLResponse

from mcp_auth_proxy.errors import excerpt

MAX_SCOPES = 1000
"""Characters of all scopes on a page; the others are counted."""

_templates = Environment(
    loader=FileSystemLoader(Path(__file__).parent / "templates"), autoescape=True, trim_blocks=True, lstrip_blocks=True
)


def visible(text: str) -> str:
    """Return a text without control characters, among them those that reverse what follows (U+202E)."""
    return "".join(character if character.isprintable() else "\ufffd" for character in text)


_templates.filters["visible"] = visible

SECURITY_HEADERS = {
    "content-security-policy": (
        "default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; form-action 'none'; "
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
    script: str
    """The path of the script that does it."""


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
    html = _templates.get_template(template).render(popup=popup, **values)
    more = _popup_headers() if popup is not None else {}
    return HTMLResponse(html, status_code=status, headers={**SECURITY_HEADERS, **more, **(headers or {})})


def _popup_headers() -> dict[str, str]:
    policy = f"script-src 'self'; {SECURITY_HEADERS['content-security-policy']}"
    return {"content-security-policy": policy, "cross-origin-opener-policy": "unsafe-none"}


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
) -> HTMLResponse:
    """Return a page with one message. ``onward``: words and path of a link to another page of ours."""
    return page(
        "message.html",
        status=status,
        popup=popup,
        title=title,
        text=text,
        hint=hint,
        onward=onward,
        good=status < 400,
    )
