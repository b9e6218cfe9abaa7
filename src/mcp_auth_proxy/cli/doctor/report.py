"""The result of ``doctor``, as text for people and as JSON for programs."""

import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum

import click

from mcp_auth_proxy.cli.terminal import Styled
from mcp_auth_proxy.errors import without_query_values
from mcp_auth_proxy.secret_values import masked

FORMAT = 1
"""Version of the JSON. Increased if a member is removed or changes its meaning; new members may be added any time."""

_WIDTH = 110
_INDENT = " " * 4
_TEXT_EXCERPT = 320
_MARKS = {"ok": ("ok     ", "green"), "note": ("note   ", "yellow"), "refused": ("REFUSED", "red")}


class Verdict(StrEnum):
    """The verdict on one step: fine; worth knowing; the proxy stops here."""

    OK = "ok"
    NOTE = "note"
    REFUSED = "refused"


class Outcome(StrEnum):
    """The overall result: the proxy can authorize; it does not need to; it can't, or the server is unusable."""

    READY = "ready"
    OPEN = "open"
    REFUSED = "refused"


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """A request that was sent. ``rpc`` is the MCP method, empty for documents."""

    method: str
    url: str
    rpc: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class ResponseExcerpt:
    """The response. ``text`` is the challenge or the beginning of the body."""

    status: int
    text: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One check. ``says`` is the result in words, with the proxy's own error if it refuses; ``clause`` is the rule."""

    step: str
    verdict: Verdict
    says: str
    clause: str = ""
    request: Request | None = None
    reply: ResponseExcerpt | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """A key that the configuration needs. ``applied``: whether it is set in the proposal, or only named there."""

    key: str
    value: object
    why: str
    applied: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class Preview:
    """What the proxy would request, with the proposed configuration if the current one does not work."""

    grant: str
    issuer: str
    registration: str
    client_id: str
    client_auth: str
    redirect_uri: str
    resource: str
    scopes: tuple[str, ...]
    authorization_endpoint: str
    token_endpoint: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """The whole report. ``config`` is valid YAML; None if no configuration helps."""

    server: str
    url: str
    outcome: Outcome
    summary: str
    steps: tuple[Step, ...]
    preview: Preview | None
    config: str | None
    config_complete: bool
    """Whether nothing in it is left to fill in or to decide."""
    changes: tuple[Change, ...]


def shown(text: str | bytes, limit: int = 4000) -> str:
    """Return text from a server on one line of at most ``limit`` characters.

    It is without controls, URL query values and secrets of ours.
    """
    if isinstance(text, bytes):
        text = text[: 4 * limit].decode("utf-8", "replace")
    line = without_query_values(" ".join(text.split()))
    safe = masked("".join(character if character.isprintable() else "\ufffd" for character in line))
    return safe if len(safe) <= limit else f"{safe[:limit]}…"


def as_document(report: Report) -> dict[str, object]:
    """Return the report as a JSON object."""
    return {
        "format": FORMAT,
        "server": report.server,
        "url": report.url,
        "verdict": report.outcome,
        "summary": report.summary,
        "steps": [_step(step) for step in report.steps],
        "plan": _members(report.preview),
        "config": report.config,
        "config_complete": report.config_complete,
        "changes": [_members(change) for change in report.changes],
    }


def as_lines(report: Report) -> list[str]:
    """Return the report for a terminal, in lines."""
    lines = [f"{report.server}: {report.url}", ""]
    for number, step in enumerate(report.steps, 1):
        lines += _paragraph(number, step)
    lines += [*_wrapped(report.summary, ""), ""]
    if report.config is not None:
        how = "The configuration that works" if report.config_complete else "The configuration, to be completed"
        lines += [f"{how}:", "", *report.config.rstrip("\n").split("\n")]
    else:
        lines += ["No configuration can help: see what is refused above."]
    return lines


def _paragraph(number: int, step: Step) -> Iterator[str]:
    mark, color = _MARKS[step.verdict]
    clause = f"  [{step.clause}]" if step.clause else ""
    yield Styled(f"{number:>2}. {click.style(mark, fg=color)}  {click.style(step.step, bold=True)}{clause}")
    if step.request is not None:
        rpc = f"  {step.request.rpc}" if step.request.rpc else ""
        yield f"{_INDENT}> {step.request.method} {step.request.url}{rpc}"
    if step.reply is not None:
        excerpt = shown(step.reply.text, _TEXT_EXCERPT)
        yield from _wrapped(f"HTTP {step.reply.status}{f'  {excerpt}' if excerpt else ''}", f"{_INDENT}< ")
    yield from _wrapped(step.says, _INDENT)
    yield ""


def _wrapped(text: str, first: str) -> list[str]:
    return textwrap.wrap(
        text,
        _WIDTH,
        initial_indent=first,
        subsequent_indent=" " * len(first),
        break_long_words=False,
        break_on_hyphens=False,
    )


def _step(step: Step) -> dict[str, object]:
    return {
        "step": step.step,
        "verdict": step.verdict,
        "says": step.says,
        "clause": step.clause,
        "request": _members(step.request),
        "answer": _members(step.reply),
    }


def _members(value: Request | ResponseExcerpt | Preview | Change | None) -> dict[str, object] | None:
    return None if value is None else {name: getattr(value, name) for name in value.__slots__}
