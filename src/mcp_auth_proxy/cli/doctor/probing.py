"""Find out whether a server asks for a token, and for which requests."""

import json
from dataclasses import dataclass

from mcp_auth_proxy.cli.doctor.report import Request, ResponseExcerpt, Step, Verdict, shown
from mcp_auth_proxy.errors import UpstreamError
from mcp_auth_proxy.oauth import challenge as challenges
from mcp_auth_proxy.oauth.challenge import BearerChallenge
from mcp_auth_proxy.proxy import probe
from mcp_auth_proxy.proxy.probe import ProbeResponse
from mcp_auth_proxy.proxy.routes import Route
from mcp_auth_proxy.proxy.upstream_client import UpstreamClient

STEP = "challenge"


@dataclass(frozen=True, slots=True, kw_only=True)
class ProbeResult:
    """``demanded``: the server asks for a token, with ``challenge`` if it sent a Bearer challenge.

    ``schemes``: other schemes that it asks for. ``served``: an MCP request was answered.
    """

    steps: tuple[Step, ...]
    demanded: bool = False
    challenge: BearerChallenge | None = None
    schemes: tuple[str, ...] = ()
    served: bool = False


async def probe_all(upstream: UpstreamClient, route: Route) -> ProbeResult:
    """Send a client's first requests, and list the tools: some servers protect only those. Never raises."""
    steps: list[Step] = []
    served = False
    try:
        for modern in (False, True):
            first = await probe.ask(upstream, route, "server/discover" if modern else "initialize", modern=modern)
            answers = [first]
            if not _demands(first) and _is_result(first):
                session = next(iter(first.all(b"mcp-session-id")), b"")
                answers.append(await probe.ask(upstream, route, "tools/list", session=session, modern=modern))
                await probe.end_session(upstream, route, first)
            steps += [_step(answer, route) for answer in answers]
            if _demands(answers[-1]):
                fields = answers[-1].challenge
                return ProbeResult(
                    steps=tuple(steps),
                    demanded=True,
                    challenge=challenges.bearer(fields),
                    schemes=challenges.other_schemes(fields),
                    served=served,
                )
            served = served or any(_is_result(answer) for answer in answers)
            if served:
                return ProbeResult(steps=tuple(steps), served=True)
    except UpstreamError as error:
        refused = Step(
            step=STEP,
            verdict=Verdict.REFUSED,
            says=f"Server {route.server.name}: {error}",
            request=Request(method="POST", url=shown(route.server.url)),
        )
        return ProbeResult(steps=(*steps, refused))
    says = f"{shown(route.server.url)} answers no MCP request, and requires no authorization. Is it the MCP endpoint?"
    return ProbeResult(steps=(*steps, Step(step=STEP, verdict=Verdict.REFUSED, says=says)))


def _demands(answer: ProbeResponse) -> bool:
    return challenges.demands_authorization(answer.status, challenges.bearer(answer.challenge))


def _is_result(answer: ProbeResponse) -> bool:
    """Return whether the request was served. An error with HTTP 200 does not count; an event stream does."""
    if not 200 <= answer.status < 300:
        return False
    try:
        message = json.loads(answer.body)
    except ValueError:
        return True
    return not isinstance(message, dict) or "error" not in message


def _step(answer: ProbeResponse, route: Route) -> Step:
    verdict, says, clause = _judged(answer)
    fields = "; ".join(f"WWW-Authenticate: {shown(value)}" for value in answer.challenge)
    return Step(
        step=STEP,
        verdict=verdict,
        says=says,
        clause=clause,
        request=Request(method="POST", url=shown(route.server.url), rpc=answer.method),
        reply=ResponseExcerpt(status=answer.status, text=fields or shown(answer.body)),
    )


def _judged(answer: ProbeResponse) -> tuple[Verdict, str, str]:
    bearer = challenges.bearer(answer.challenge)
    if _demands(answer):
        return _challenged(bearer, challenges.other_schemes(answer.challenge))
    if answer.status == 403:
        says = 'A 403 without error="insufficient_scope" is not a request for authorization: the proxy forwards it.'
        return Verdict.NOTE, says, "RFC 6750 §3.1"
    if _is_result(answer):
        return Verdict.OK, f"{answer.method} is answered without a token.", ""
    return Verdict.NOTE, f"{answer.method} is neither served nor does the server ask for authorization.", ""


def _challenged(bearer: BearerChallenge | None, schemes: tuple[str, ...]) -> tuple[Verdict, str, str]:
    if bearer is None:
        how = (
            f"asks for {', '.join(schemes)}, which the proxy does not support"
            if schemes
            else "sent no Bearer challenge"
        )
        says = f"It requires authorization, but {how}; well-known URLs are tried."
        return Verdict.NOTE, says, "RFC 6750 §3"
    asks = f" and for the scopes {' '.join(bearer.scopes)}" if bearer.scopes else ""
    if bearer.resource_metadata is None:
        says = f"It asks for a token{asks}, but names no resource metadata; well-known URLs are tried."
        return Verdict.NOTE, says, "RFC 9728 §5.1"
    return Verdict.OK, f"It asks for a token{asks}, and says where its metadata is.", "RFC 9728 §5.1"
