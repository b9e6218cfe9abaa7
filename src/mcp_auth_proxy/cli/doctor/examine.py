"""Examine one server with the proxy's own steps, in order. None of them registers, starts or stores anything."""

import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

from mcp_auth_proxy.app import effective_public_url
from mcp_auth_proxy.broker import Examination
from mcp_auth_proxy.broker.backoff import Backoff
from mcp_auth_proxy.broker.client_registration import ClientRegistrar
from mcp_auth_proxy.broker.discovery import Discoverer
from mcp_auth_proxy.broker.plan import Plan
from mcp_auth_proxy.broker.planning import Planner
from mcp_auth_proxy.broker.token_requests import TokenClient
from mcp_auth_proxy.cli.doctor import findings, providers
from mcp_auth_proxy.cli.doctor.probing import ProbeResult, probe_all
from mcp_auth_proxy.cli.doctor.proposal import Proposal
from mcp_auth_proxy.cli.doctor.providers import Provider
from mcp_auth_proxy.cli.doctor.report import Outcome, Preview, Report, Step, Verdict, shown
from mcp_auth_proxy.config.settings import Address, KeySource, ServerSettings, Settings, StoreSettings
from mcp_auth_proxy.errors import AuthorizationError, ConfigHint, StoreError, StoreRejected
from mcp_auth_proxy.models import LOCAL, Account
from mcp_auth_proxy.net.dial import Dialer
from mcp_auth_proxy.net.http_client import HttpClient
from mcp_auth_proxy.oauth import registration
from mcp_auth_proxy.oauth.challenge import BearerChallenge
from mcp_auth_proxy.oauth.fetch import Fetcher
from mcp_auth_proxy.proxy import routes
from mcp_auth_proxy.proxy.upstream_client import UpstreamClient
from mcp_auth_proxy.store import Engine, open_store, open_store_read_only, store_exists
from mcp_auth_proxy.store.registrations import Registrations

ANY_PORT = 8787
"""Used in the redirect URI if the port is chosen at start-up."""

MAX_HINTS = 4
"""Maximum number of configuration hints to apply, one after another."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _DiscoveryContext:
    """What discovery needs, the same for each run."""

    fetcher: Fetcher
    registrations: Registrations
    public_url: str
    allow_private: tuple[str, ...]

    async def run(self, server: ServerSettings, challenge: BearerChallenge | None) -> Examination:
        """Run discovery once, without registering or storing anything."""
        run = Examination()
        fetcher, clock = self.fetcher, time.time
        discoverer = Discoverer(fetcher=fetcher, allow_private=self.allow_private, observe=run.lookups.append)
        registrar = ClientRegistrar(
            fetcher=fetcher, registrations=self.registrations, public_url=self.public_url, clock=clock
        )
        token_client = TokenClient(fetcher=fetcher, discoverer=discoverer, clock=clock)
        backoff = Backoff(clock=clock)
        planner = Planner(discoverer=discoverer, registrar=registrar, token_client=token_client, backoff=backoff)
        try:
            run.plan = await planner.preview(Account(LOCAL, server.name), server, challenge)
        except AuthorizationError as error:
            run.error = error
        return run

    async def listed_method(self, server: ServerSettings, probed: ProbeResult, run: Examination) -> ConfigHint | None:
        """Return a value for ``client_auth`` that the server lists, if its current value is the only obstacle."""
        configured = server.oauth.client_auth
        listed = run.metadata.token_endpoint_auth_methods_supported if run.metadata else None
        if configured is None or not listed or configured.value in listed:
            return None
        without = await self.run(replace(server, oauth=replace(server.oauth, client_auth=None)), probed.challenge)
        chosen = without.plan.registration.client_auth.value if without.plan else ""
        return ConfigHint("oauth.client_auth", chosen) if chosen in listed else None

    async def default_endpoints(self, plan: Plan, probed: ProbeResult) -> Step | None:
        """Return a step that says why the default endpoints can't be used; None if they seem to exist.

        A server that wants an API key, for example, looks like a server of MCP 2025-03-26 without metadata.
        """
        known = plan.registration.client_id
        url = plan.metadata.token_endpoint if known else plan.metadata.registration_endpoint or ""
        policy = Discoverer(fetcher=self.fetcher, allow_private=self.allow_private).policy(plan.server.url)
        try:
            response = await self.fetcher.options(url, document="default endpoint", policy=policy)
        except AuthorizationError:
            return None
        # A 401 means "no OAuth" only if the server never asked for a token; a token endpoint may want credentials.
        absent = (404, 410) if known or probed.challenge else (401, 404, 410)
        if response.status not in absent or not registration.is_not_oauth(response.status, response.body):
            return None
        return findings.default_endpoint(plan, url, response, probed.schemes)

    async def has_resource_metadata(self, server: ServerSettings) -> bool:
        """Return whether a server that answers without a token has resource metadata: it may protect other methods."""
        discoverer = Discoverer(fetcher=self.fetcher, allow_private=self.allow_private)
        try:
            return await discoverer.resource_metadata(server, None) is not None
        except AuthorizationError:
            return False


async def examine(settings: Settings, server: ServerSettings) -> Report:
    """Return the steps of the proxy at a server, and the configuration that works. Raises McpAuthProxyError."""
    async with AsyncExitStack() as stack:
        registrations, steps = await stack.enter_async_context(_registrations(settings))
        dialer = Dialer(ca_bundle=settings.outbound.ca_bundle, trust_proxy=settings.outbound.trust_proxy)
        fetcher = Fetcher(dialer)
        stack.push_async_callback(fetcher.aclose)
        http = HttpClient(dialer, connections_per_origin=2)
        stack.push_async_callback(http.aclose)
        probed = await probe_all(
            UpstreamClient(http), routes.build({server.name: server})[f"/{server.name}/mcp".encode()]
        )
        steps += probed.steps
        proposal = Proposal(settings, server)
        context = _DiscoveryContext(
            fetcher=fetcher,
            registrations=registrations,
            public_url=_public_url(settings),
            allow_private=settings.authorization.allow_private,
        )
        if probed.demanded or (probed.served and await context.has_resource_metadata(server)):
            return await _examine_authorization(context, server, probed, proposal, steps)
    return _without_authorization(server, probed, proposal, steps)


async def _examine_authorization(
    context: _DiscoveryContext, server: ServerSettings, probed: ProbeResult, proposal: Proposal, steps: list[Step]
) -> Report:
    run = first = await context.run(server, probed.challenge)
    steps += findings.lookup_steps(first.lookups, first.error, server.oauth)
    provider = _provider(first, server)
    tried = server
    for _ in range(MAX_HINTS):
        if run.error is None:
            break
        hint = run.error.hint or await context.listed_method(tried, probed, run)
        if step := findings.error_step(run.error, run.lookups, hint):
            steps.append(step)
        if hint is None or not proposal.apply_hint(hint, provider):
            break
        tried = proposal.settings()
        run = await context.run(tried, probed.challenge)
    if provider is not None:
        steps.append(Step(step="provider", verdict=Verdict.NOTE, says=f"{provider.name}. {provider.notes}"))
        proposal.apply_provider(provider, scopes_known=run.plan is not None and bool(run.plan.scopes))
        if run.plan is not None:
            run = await context.run(proposal.settings(), probed.challenge)
    if run.plan is not None and run.plan.metadata.is_fallback:
        step = await context.default_endpoints(run.plan, probed)
        if step is not None:
            steps.append(step)
            run.plan = None
    if run.plan is not None:
        steps += findings.plan_steps(run.plan, run.resource, probed.challenge.scopes if probed.challenge else None)
        if findings.is_first_contact(run.plan):
            proposal.suggest_issuer(run.plan.key.issuer)
    return _report(server, probed, proposal, steps, run)


def _without_authorization(
    server: ServerSettings, probed: ProbeResult, proposal: Proposal, steps: list[Step]
) -> Report:
    refused = _refusals(steps)
    outcome = Outcome.OPEN if probed.served and not refused else Outcome.REFUSED
    summary = f"{server.name} requires no authorization. The proxy forwards everything unchanged."
    if outcome is Outcome.REFUSED:
        summary = f"The proxy can't use {server.name}: {refused[0].says}"
    return Report(
        server=server.name,
        url=shown(server.url),
        outcome=outcome,
        summary=summary,
        steps=tuple(steps),
        preview=None,
        config=proposal.as_yaml("") if outcome is Outcome.OPEN else None,
        config_complete=outcome is Outcome.OPEN and proposal.complete,
        changes=(),
    )


def _report(
    server: ServerSettings, probed: ProbeResult, proposal: Proposal, steps: list[Step], run: Examination
) -> Report:
    plan, refused = run.plan, _refusals(steps)
    has_proposal = plan is not None or any(not change.applied for change in proposal.changes)
    return Report(
        server=server.name,
        url=shown(server.url),
        outcome=Outcome.REFUSED if refused else Outcome.READY,
        summary=_summary(server, probed, refused, plan),
        steps=tuple(steps),
        preview=None if plan is None else _preview(plan),
        config=proposal.as_yaml(plan.registration.redirect_uri if plan else "") if has_proposal else None,
        config_complete=plan is not None and proposal.complete,
        changes=tuple(proposal.changes) if has_proposal else (),
    )


def _summary(server: ServerSettings, probed: ProbeResult, refused: list[Step], plan: Plan | None) -> str:
    if refused or plan is None:
        return f"The proxy can't authorize {server.name}: {' '.join(step.says for step in refused)}"
    who = "without a user" if server.oauth.grant.unattended else "once a user consents"
    how = f"The proxy can authorize {server.name} {who}, at {plan.key.issuer}, with {findings.registered_by(plan)}."
    if not probed.demanded:
        how = f"{server.name} answered all requests without a token. For what it does protect: {how}"
    return how


def _preview(plan: Plan) -> Preview:
    return Preview(
        grant=plan.server.oauth.grant.value,
        issuer=plan.key.issuer,
        registration=plan.registration.kind.value,
        client_id=plan.registration.client_id,
        client_auth=plan.registration.client_auth.value,
        redirect_uri=plan.registration.redirect_uri,
        resource=shown(plan.key.resource),
        scopes=plan.scopes,
        authorization_endpoint=plan.metadata.authorization_endpoint,
        token_endpoint=plan.metadata.token_endpoint,
    )


def _provider(run: Examination, server: ServerSettings) -> Provider | None:
    named = run.resource.authorization_servers[0] if run.resource else server.oauth.issuer
    issuer = run.metadata.issuer if run.metadata else named
    return None if issuer is None else providers.recognize(issuer, run.metadata)


def _public_url(settings: Settings) -> str:
    listening = settings.listen
    # With port 0, the port is only known at start-up.
    return effective_public_url(settings, listening if listening.port else Address(listening.host, ANY_PORT))


def _refusals(steps: list[Step]) -> list[Step]:
    return [step for step in steps if step.verdict is Verdict.REFUSED]


@asynccontextmanager
async def _registrations(settings: Settings) -> AsyncIterator[tuple[Registrations, list[Step]]]:
    """Open the registrations of the store, read-only; an empty store if there is none or it can't be opened.

    The second value has a step if the store can't be opened.
    """
    steps: list[Step] = []
    database: Engine | None = None
    if store_exists(settings.store):
        try:
            database = await _open_readable(settings.store)
        except StoreError as error:
            verdict = Verdict.REFUSED if isinstance(error, StoreRejected) else Verdict.NOTE
            steps.append(Step(step="store", verdict=verdict, says=str(error)))
    with TemporaryDirectory(prefix="mcp-auth-proxy-doctor-") as folder:
        database = database or await open_store(_empty(Path(folder)))
        try:
            yield Registrations(database), steps
        finally:
            await database.close()


async def _open_readable(store: StoreSettings) -> Engine:
    database = await open_store_read_only(store)
    try:
        # A store whose tables somebody has changed opens, but fails here.
        await Registrations(database).find("", "", "")
        await Registrations(database).bound_issuer("", "")
    except BaseException:  # also on Ctrl-C: the database thread would keep the process alive
        await database.close()
        raise
    return database


def _empty(folder: Path) -> StoreSettings:
    key = KeySource(kind="file", name=str(folder / "empty.key"))
    return StoreSettings(path=folder / "empty.db", keys=(key,), default_key=True)
