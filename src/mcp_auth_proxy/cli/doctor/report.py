"""What ``doctor`` found, as text for people and as JSON for programs."""

import json
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum

import click

from mcp_auth_proxy.errors import without_query_values

FORMAT = 1
"""Of the JSON: grows when a member changes its meaning or goes; new ones may come at any time."""

_WIDTH = 110
_INDENT = " " * 4
_TEXT_EXCERPT = 320
_MARKS = {"ok": ("ok     ", "green"), "note": ("note   ", "yellow"), "refused": ("REFUSED", "red")}


class Verdict(StrEnum):
    """Of one step: as it should be; worth knowing; the proxy stops here."""

    OK = "ok"
    NOTE = "note"
    REFUSED = "refused"


class Outcome(StrEnum):
    """Of the whole: the proxy can authorize; it need not; it can't, or the server can't be used at all."""

    READY = "ready"
    OPEN = "open"
    REFUSED = "refused"


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What was asked. ``rpc`` is the MCP method, empty for documents."""

    method: str
    url: str
    rpc: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Reply:
    """What came back: ``text`` is the challenge, or the beginning of the body."""

    status: int
    text: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One thing that was looked at. ``says`` is the proxy's own sentence where it refuses; ``clause`` the rule."""

    step: str
    verdict: Verdict
    says: str
    clause: str = ""
    request: Request | None = None
    reply: Reply | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """A key that the configuration needs. ``applied``: it stands in the proposed one, else it is only named there."""

    key: str
    value: object
    why: str
    applied: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class Preview:
    """What the proxy would ask for, with the proposed configuration where the present one does not do."""

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
    """``config`` is YAML that loads; None where nothing in the configuration helps."""

    server: str
    url: str
    outcome: Outcome
    summary: str
    steps: tuple[Step, ...]
    prospect: Preview | None
    config: str | None
    config_complete: bool
    """Nothing in it is left to fill in or to decide."""
    changes: tuple[Change, ...]


def shown(text: str | bytes, limit: int = 4000) -> str:
    """Return text of a server on one line, safe for a terminal, without the values in queries of URLs, and cut."""
    if isinstance(text, bytes):
        text = text[: 4 * limit].decode("utf-8", "replace")
    line = without_query_values(" ".join(text.split()))
    safe = "".join(character if character.isprintable() else "\ufffd" for character in line)
    return safe if len(safe) <= limit else f"{safe[:limit]}…"


def as_json(report: Report) -> str:
    """Return the report as JSON."""
    document = {
        "format": FORMAT,
        "server": report.server,
        "url": report.url,
        "verdict": report.outcome,
        "summary": report.summary,
        "steps": [_step(step) for step in report.steps],
        "plan": _members(report.prospect),
        "config": report.config,
        "config_complete": report.config_complete,
        "changes": [_members(change) for change in report.changes],
    }
    return json.dumps(document, indent=2, ensure_ascii=False)


def as_text(report: Report) -> str:
    """Return the report for a terminal; ``click.echo`` takes the colours out where there is none."""
    lines = [f"{report.server}: {report.url}", ""]
    for number, step in enumerate(report.steps, 1):
        lines += _paragraph(number, step)
    lines += [*_wrapped(report.summary, ""), ""]
    if report.config is not None:
        how = "The configuration that works" if report.config_complete else "The configuration, to be completed"
        lines += [f"{how}:", "", report.config.rstrip("\n")]
    else:
        lines += ["There is no configuration to propose: see what is refused above."]
    return "\n".join(lines)


def _paragraph(number: int, step: Step) -> Iterator[str]:
    mark, colour = _MARKS[step.verdict]
    clause = f"  [{step.clause}]" if step.clause else ""
    yield f"{number:>2}. {click.style(mark, fg=colour)}  {click.style(step.step, bold=True)}{clause}"
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


def _members(value: Request | Reply | Preview | Change | None) -> dict[str, object] | None:
    return None if value is None else {name: getattr(value, name) for name in value.__slots__}
