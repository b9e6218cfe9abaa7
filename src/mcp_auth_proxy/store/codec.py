"""Turn the frozen values of ``models`` into rows and back, sealing and opening their secrets."""

import json
from dataclasses import asdict

from mcp_auth_proxy.models import (
    Account,
    Attempt,
    ClientAuth,
    DeviceAuthorization,
    Endpoints,
    Flow,
    FlowMode,
    FlowStatus,
    Grant,
    GrantKey,
    GrantType,
    Registration,
    RegistrationKind,
    RenewalHealth,
    TokenSet,
)
from mcp_auth_proxy.store.engine import Row
from mcp_auth_proxy.store.sealed_rows import Columns, RowCipher


def registration_columns(registration: Registration, cipher: RowCipher) -> Columns:
    """Return the columns of a client, which grants, registrations and flows share."""
    return {
        "client_id": registration.client_id,
        "client_auth": str(registration.client_auth),
        "client_kind": str(registration.kind),
        "client_secret": cipher.seal_if("client_secret", registration.client_secret),
        "client_redirect_uri": registration.redirect_uri,
        "client_secret_expires_at": registration.secret_expires_at,
        "client_created_at": registration.created_at,
    }


def read_registration(row: Row, cipher: RowCipher, *, oauth_client: str | None = None) -> Registration:
    """Read the registration in a row of grants, registrations or flows. The first and last have ``oauth_client``."""
    return Registration(
        server=row["server"],
        account=row["account"],
        issuer=row["issuer"],
        client_id=row["client_id"],
        client_auth=ClientAuth(row["client_auth"]),
        kind=RegistrationKind(row["client_kind"]),
        client_secret=cipher.open_if("client_secret", row["client_secret"]),
        redirect_uri=row["client_redirect_uri"],
        secret_expires_at=row["client_secret_expires_at"],
        created_at=row["client_created_at"],
        oauth_client=oauth_client,
    )


def token_columns(tokens: TokenSet, cipher: RowCipher) -> Columns:
    """Return the columns that a renewal replaces."""
    return {
        "access_token": cipher.seal("access_token", tokens.access_token),
        "refresh_token": cipher.seal_if("refresh_token", tokens.refresh_token),
        "token_type": tokens.token_type,
        "token_scopes": " ".join(tokens.scopes),
        "obtained_at": tokens.obtained_at,
        "expires_at": tokens.expires_at,
        "refresh_expires_at": tokens.refresh_expires_at,
    }


def health_columns(health: RenewalHealth) -> Columns:
    """Return the columns that tell how the renewal of a grant goes."""
    return {
        "renewal_refused_at": health.refused_at,
        "failing_since": health.failing_since,
        # NULL for what is empty: so the rows of earlier schemas keep their seals.
        "renewal_failure": health.failure or None,
        "next_try_at": health.next_try_at,
        "rejected_since": health.rejected_since,
    }


def read_health(row: Row) -> RenewalHealth:
    """Read how the renewal of the grant in a row goes."""
    return RenewalHealth(
        refused_at=row["renewal_refused_at"],
        failing_since=row["failing_since"],
        failure=row["renewal_failure"] or "",
        next_try_at=row["next_try_at"],
        rejected_since=row["rejected_since"],
    )


def grant_columns(grant: Grant, cipher: RowCipher) -> Columns:
    """Return the columns of a new grant that has not ended, without its id."""
    return {
        **key_columns(grant.key),
        "grant_type": str(grant.grant_type),
        **registration_columns(grant.registration, cipher),
        **_endpoint_columns(grant.endpoints),
        **token_columns(grant.tokens, cipher),
        **health_columns(grant.health),
        "scopes": " ".join(grant.scopes),
        "granted_at": grant.granted_at,
        "dpop_key": cipher.seal_if("dpop_key", grant.dpop_key),
        "version": grant.version,
        "ended_at": None,
        "ended_reason": "",
        "label": grant.label or None,
        "oauth_client": grant.registration.oauth_client,
    }


def read_grant(row: Row, cipher: RowCipher) -> Grant:
    """Read the grant in a row."""
    tokens = TokenSet(
        access_token=cipher.open("access_token", row["access_token"]),
        token_type=row["token_type"],
        refresh_token=cipher.open_if("refresh_token", row["refresh_token"]),
        obtained_at=row["obtained_at"],
        expires_at=row["expires_at"],
        refresh_expires_at=row["refresh_expires_at"],
        scopes=tuple(row["token_scopes"].split()),
    )
    return Grant(
        id=row["id"],
        key=_read_key(row),
        grant_type=GrantType(row["grant_type"]),
        registration=read_registration(row, cipher, oauth_client=row["oauth_client"]),
        endpoints=_read_endpoints(row),
        tokens=tokens,
        scopes=tuple(row["scopes"].split()),
        granted_at=row["granted_at"],
        dpop_key=cipher.open_if("dpop_key", row["dpop_key"]),
        version=row["version"],
        refresh_begun_at=row["refresh_begun_at"],
        refresh_owner=row["refresh_owner"],
        ended_at=row["ended_at"],
        ended_reason=row["ended_reason"],
        label=row["label"] or "",
        health=read_health(row),
    )


def flow_columns(flow: Flow, cipher: RowCipher) -> Columns:
    """Return the columns of a flow."""
    return {
        "id": flow.id,
        **key_columns(flow.key),
        **registration_columns(flow.registration, cipher),
        **_endpoint_columns(flow.endpoints),
        "scopes": " ".join(flow.scopes),
        "redirect_uri": flow.redirect_uri,
        "iss_supported": flow.iss_supported,
        "extra_params": json.dumps(flow.extra_params),
        "created_at": flow.created_at,
        "expires_at": flow.expires_at,
        "status": str(flow.status),
        "reason": flow.reason,
        "device": None if flow.device is None else cipher.seal("device", json.dumps(asdict(flow.device))),
        "dpop_key": cipher.seal_if("dpop_key", flow.dpop_key),
        "oauth_client": flow.registration.oauth_client,
        # NULL for the usual mode: so the rows of earlier schemas keep their seals.
        "mode": None if flow.mode is FlowMode.BROWSER else str(flow.mode),
        "return_origin": flow.return_origin,
    }


def read_flow(row: Row, cipher: RowCipher) -> Flow:
    """Read the flow in a row."""
    device = cipher.open_if("device", row["device"])
    return Flow(
        id=row["id"],
        key=_read_key(row),
        registration=read_registration(row, cipher, oauth_client=row["oauth_client"]),
        endpoints=_read_endpoints(row),
        scopes=tuple(row["scopes"].split()),
        redirect_uri=row["redirect_uri"],
        iss_supported=bool(row["iss_supported"]),
        extra_params=tuple((name, value) for name, value in json.loads(row["extra_params"])),
        created_at=row["created_at"],
        expires_at=row["expires_at"],
        status=FlowStatus(row["status"]),
        reason=row["reason"],
        device=None if device is None else DeviceAuthorization(**json.loads(device)),
        dpop_key=cipher.open_if("dpop_key", row["dpop_key"]),
        mode=FlowMode(row["mode"] or FlowMode.BROWSER),
        return_origin=row["return_origin"],
    )


def attempt_columns(attempt: Attempt, cipher: RowCipher) -> Columns:
    """Return the columns of an attempt."""
    return {
        "state_hash": attempt.state_hash,
        "flow_id": attempt.flow_id,
        "browser_hash": attempt.browser_hash,
        "code_verifier": cipher.seal("code_verifier", attempt.code_verifier),
        "created_at": attempt.created_at,
        "expires_at": attempt.expires_at,
    }


def read_attempt(row: Row, cipher: RowCipher) -> Attempt:
    """Read the attempt in a row."""
    return Attempt(
        flow_id=row["flow_id"],
        state_hash=row["state_hash"],
        browser_hash=row["browser_hash"],
        code_verifier=cipher.open("code_verifier", row["code_verifier"]),
        created_at=row["created_at"],
        expires_at=row["expires_at"],
    )


def account_params(account: Account) -> Columns:
    """Return the columns that select the rows of an account."""
    return {"principal": account.principal, "server": account.server, "account": account.name}


def key_columns(key: GrantKey) -> Columns:
    """Return the columns of what a grant or a flow is for."""
    return {
        **account_params(key.account),
        "resource": key.resource,
        "issuer": key.issuer,
        "upstream": key.upstream,
        "path": key.path,
    }


def _read_key(row: Row) -> GrantKey:
    return GrantKey(
        account=Account(row["principal"], row["server"], row["account"]),
        resource=row["resource"],
        issuer=row["issuer"],
        upstream=row["upstream"],
        path=row["path"],
    )


def _endpoint_columns(endpoints: Endpoints) -> Columns:
    return {
        "authorization_endpoint": endpoints.authorization,
        "token_endpoint": endpoints.token,
        "revocation_endpoint": endpoints.revocation,
    }


def _read_endpoints(row: Row) -> Endpoints:
    return Endpoints(
        authorization=row["authorization_endpoint"], token=row["token_endpoint"], revocation=row["revocation_endpoint"]
    )
