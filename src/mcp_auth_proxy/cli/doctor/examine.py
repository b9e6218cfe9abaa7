"""Examines one server: the proxy's own steps in their order, none of which registers, begins or stores anything."""

import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory

from mcp_auth_proxy.app import effective_public_url
from mcp_auth_proxy.broker.discovery import Discoverer, MetadataLookup
from mcp_auth_proxy.broker.planning import Authorizer, Plan
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
from mcp_auth_proxy.oauth.discovery import ResourceMetadata, ServerMetadata
from mcp_auth_proxy.oauth.fetch import Fetcher
from mcp_auth_proxy.proxy import routes
from mcp_auth_proxy.store.database import Database
from mcp_auth_proxy.store.registrations import Registrations

ANY_PORT = 8787
"""Stands in the redirect URI for a port that is chosen at the start."""

MAX_CURES = 4
"""Things missing from the configuration that are looked for one after another."""


@dataclass(slots=True, kw_only=True)
class _Run:
    """One discovery: what was asked, and the plan or what stopped it."""

    looks: list[MetadataLookup] = field(default_factory=list)
    plan: Plan | None = None
    error: AuthorizationError | None = None

    @property
    def resource(self) -> ResourceMetadata | None:
        return next((look.found for look in self.looks if isinstance(look.found, ResourceMetadata)), None)

    @property
    def metadata(self) -> ServerMetadata | None:
        return next((look.found for look in self.looks if isinstance(look.found, ServerMetadata)), None)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Means:
    """What discovery works with; the same for every run."""

    fetcher: Fetcher
    registrations: Registrations
    public_url: str
    allow_private: tuple[str, ...]

    async def run(self, server: ServerSettings, challenge: BearerChallenge | None) -> _Run:
        run = _Run()
        authorizer = Authorizer(
            fetcher=self.fetcher,
            registrations=self.registrations,
            public_url=self.public_url,
            allow_private=self.allow_private,
            clock=time.time,
            observe=run.looks.append,
        )
        try:
            run.plan = await authorizer.preview(Account(LOCAL, server.name), server, challenge)
        except AuthorizationError as error:
            run.error = error
        return run

    async def listed_method(self, server: ServerSettings, probed: ProbeResult, run: _Run) -> ConfigHint | None:
        """Return what is to stand in ``client_auth``, where nothing but its value is in the way."""
        configured = server.oauth.client_auth
        listed = run.metadata.token_endpoint_auth_methods_supported if run.metadata else None
        if configured is None or not listed or configured.value in listed:
            return None
        without = await self.run(replace(server, oauth=replace(server.oauth, client_auth=None)), probed.challenge)
        chosen = without.plan.registration.client_auth.value if without.plan else ""
        return ConfigHint("oauth.client_auth", chosen) if chosen in listed else None

    async def default_endpoints(self, plan: Plan, probed: ProbeResult) -> Step | None:
        """Return why the default endpoints can't be used; None where they can, as far as that is seen without use.

        Anything that demands a credential without OAuth, such as an API key, looks like a server of MCP 2025-03-26.
        """
        known = plan.registration.client_id
        url = plan.metadata.token_endpoint if known else plan.metadata.registration_endpoint or ""
        policy = Discoverer(fetcher=self.fetcher, allow_private=self.allow_private).policy(plan.server.url)
        try:
            response = await self.fetcher.options(url, document="default endpoint", policy=policy)
        except AuthorizationError:
            return None
        # A 401 tells of no OAuth only where a token was never asked for, and a token endpoint may want its client's.
        absent = (404, 410) if known or probed.challenge else (401, 404, 410)
        if response.status not in absent or not registration.is_no_oauth(response.status, response.body):
            return None
        return findings.default_endpoint(plan, url, response, probed.schemes)

    async def announces(self, server: ServerSettings) -> bool:
        """Whether a server that lets everything through has OAuth all the same, for other methods perhaps."""
        discoverer = Discoverer(fetcher=self.fetcher, allow_private=self.allow_private)
        try:
            return await discoverer.resource_metadata(server, None) is not None
        except AuthorizationError:
            return False


async def examine(settings: Settings, server: ServerSettings) -> Report:
    """Return what the proxy would meet at a server, and the configuration that would work. Raises ProxyError."""
    async with AsyncExitStack() as stack:
        registrations, steps = await stack.enter_async_context(_registrations(settings))
        dialer = Dialer(ca_bundle=settings.outbound.ca_bundle)
        fetcher = Fetcher(dialer)
        stack.push_async_callback(fetcher.aclose)
        upstream = HttpClient(dialer, connections_per_origin=2)
        stack.push_async_callback(upstream.aclose)
        probed = await probe_all(upstream, routes.build({server.name: server})[f"/{server.name}/mcp".encode()])
        steps += probed.steps
        proposal = Proposal(settings, server)
        means = _Means(
            fetcher=fetcher,
            registrations=registrations,
            public_url=_public_url(settings),
            allow_private=settings.authorization.allow_private,
        )
        if probed.demanded or (probed.served and await means.announces(server)):
            return await _examine_authorization(means, server, probed, proposal, steps)
    return _without_authorization(server, probed, proposal, steps)


async def _examine_authorization(
    means: _Means, server: ServerSettings, probed: ProbeResult, proposal: Proposal, steps: list[Step]
) -> Report:
    run = first = await means.run(server, probed.challenge)
    steps += findings.look_steps(first.looks, first.error, server.oauth)
    provider = _provider(first, server)
    tried = server
    for _ in range(MAX_CURES):
        if run.error is None:
            break
        remedy = run.error.remedy or await means.listed_method(tried, probed, run)
        if step := findings.error_step(run.error, run.looks, remedy):
            steps.append(step)
        if remedy is None or not proposal.apply_hint(remedy, provider):
            break
        tried = proposal.settings()
        run = await means.run(tried, probed.challenge)
    if provider is not None:
        steps.append(Step(step="provider", verdict=Verdict.NOTE, says=f"{provider.name}. {provider.advice}"))
        proposal.apply_provider(provider, scopes_known=run.plan is not None and bool(run.plan.scopes))
        if run.plan is not None:
            run = await means.run(proposal.settings(), probed.challenge)
    if run.plan is not None and run.plan.metadata.is_fallback:
        step = await means.default_endpoints(run.plan, probed)
        if step is not None:
            steps.append(step)
            run.plan = None
    if run.plan is not None:
        steps += findings.plan_steps(run.plan, run.resource, probed.challenge.scopes if probed.challenge else None)
    return _report(server, probed, proposal, steps, run)


def _without_authorization(
    server: ServerSettings, probed: ProbeResult, proposal: Proposal, steps: list[Step]
) -> Report:
    refused = _refusals(steps)
    outcome = Outcome.OPEN if probed.served and not refused else Outcome.REFUSED
    summary = f"{server.name} asks for no authorization: the proxy passes everything through."
    if outcome is Outcome.REFUSED:
        summary = f"The proxy can't use {server.name}: {refused[0].says}"
    return Report(
        server=server.name,
        url=shown(server.url),
        outcome=outcome,
        summary=summary,
        steps=tuple(steps),
        prospect=None,
        config=proposal.as_yaml("") if outcome is Outcome.OPEN else None,
        config_complete=outcome is Outcome.OPEN and proposal.complete,
        changes=(),
    )


def _report(server: ServerSettings, probed: ProbeResult, proposal: Proposal, steps: list[Step], run: _Run) -> Report:
    plan, refused = run.plan, _refusals(steps)
    helped = plan is not None or any(not change.applied for change in proposal.changes)
    return Report(
        server=server.name,
        url=shown(server.url),
        outcome=Outcome.REFUSED if refused else Outcome.READY,
        summary=_summary(server, probed, refused, plan),
        steps=tuple(steps),
        prospect=None if plan is None else _prospect(plan),
        config=proposal.as_yaml(plan.registration.redirect_uri if plan else "") if helped else None,
        config_complete=plan is not None and proposal.complete,
        changes=tuple(proposal.changes) if helped else (),
    )


def _summary(server: ServerSettings, probed: ProbeResult, refused: list[Step], plan: Plan | None) -> str:
    if refused or plan is None:
        return f"The proxy can't authorize {server.name}: {' '.join(step.says for step in refused)}"
    who = "by itself" if server.oauth.grant.unattended else "once a user consents"
    how = f"The proxy can authorize {server.name} {who}, at {plan.key.issuer}, by {findings.registered_by(plan)}."
    if not probed.demanded:
        how = f"{server.name} let through all that was asked without a token. For what it protects: {how}"
    return how


def _prospect(plan: Plan) -> Preview:
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


def _provider(run: _Run, server: ServerSettings) -> Provider | None:
    named = run.resource.authorization_servers[0] if run.resource else server.oauth.issuer
    issuer = run.metadata.issuer if run.metadata else named
    return None if issuer is None else providers.recognise(issuer, run.metadata)


def _public_url(settings: Settings) -> str:
    listening = settings.listen
    # Port 0 takes any that is free; which, nobody can know before.
    return effective_public_url(settings, listening if listening.port else Address(listening.host, ANY_PORT))


def _refusals(steps: list[Step]) -> list[Step]:
    return [step for step in steps if step.verdict is Verdict.REFUSED]


@asynccontextmanager
async def _registrations(settings: Settings) -> AsyncIterator[tuple[Registrations, list[Step]]]:
    """Open what the store knows, to be read alone; an empty one in its place where there is none, or none that opens.

    The second value is a step that tells of a store that does not open.
    """
    steps: list[Step] = []
    database: Database | None = None
    if settings.store.path.exists():
        try:
            database = await _readable(settings.store)
        except StoreError as error:
            verdict = Verdict.REFUSED if isinstance(error, StoreRejected) else Verdict.NOTE
            steps.append(Step(step="store", verdict=verdict, says=str(error)))
    with TemporaryDirectory(prefix="mcp-auth-proxy-doctor-") as folder:
        database = database or await Database.open(_empty(Path(folder)))
        try:
            yield Registrations(database), steps
        finally:
            await database.close()


async def _readable(store: StoreSettings) -> Database:
    database = await Database.open_to_read(store)
    try:
        # A store of an older schema opens, and fails here.
        await Registrations(database).find("", "", "")
        await Registrations(database).bound_issuer("", "")
    except BaseException:  # Ctrl-C too: the thread behind the database would outlive it
        await database.close()
        raise
    return database


def _empty(folder: Path) -> StoreSettings:
    key = KeySource(kind="file", name=str(folder / "empty.key"))
    return StoreSettings(path=folder / "empty.db", keys=(key,), default_key=True)
