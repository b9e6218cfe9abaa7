"""Turn the frozen values of ``models`` into rows and back, sealing and opening their secrets."""

import hashlib
import hmac
import json
import secrets
import struct
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import TypeVar

from mcp_auth_proxy.errors import DecryptionError
from mcp_auth_proxy.models import (
    Account,
    Attempt,
    ClientAuth,
    DeviceAuthorization,
    Endpoints,
    Flow,
    FlowStatus,
    Grant,
    GrantKey,
    GrantType,
    Registration,
    RegistrationKind,
    TokenSet,
)
from mcp_auth_proxy.store.cipher import Cipher
from mcp_auth_proxy.store.engine import Engine, Row

Columns = dict[str, object]
T = TypeVar("T")

SEAL = "seal"
"""The column with the seal of a whole row."""

UNSEALED: Mapping[str, frozenset[str]] = {
    "grants": frozenset({"refresh_begun_at", "refresh_owner"}),
    "flows": frozenset({"poll_owner", "next_poll_at"}),
}
"""The columns that the seal of a row leaves out, by table: who may send the next request, and since when.

They change often, and whoever forges them can only hold a renewal or a poll up, as by deleting the row.
"""


def new_uid() -> str:
    """Return an id for a row that is about to be written."""
    return secrets.token_hex(16)


class RowCipher:
    """Seal and open the columns of one row."""

    def __init__(self, cipher: Cipher, table: str, uid: str) -> None:
        self._cipher = cipher
        self._table = table
        self._uid = uid

    def seal(self, column: str, value: str) -> bytes:
        """Encrypt a value for its column."""
        return self._cipher.seal(value, table=self._table, row=self._uid, column=column)

    def seal_if(self, column: str, value: str | None) -> bytes | None:
        """Encrypt a value for its column; None stays None."""
        return None if value is None else self.seal(column, value)

    def open(self, column: str, sealed: bytes) -> str:
        """Decrypt the value of a column. Raises DecryptionError."""
        if not isinstance(sealed, bytes):
            raise DecryptionError(f"{self._table}.{column} of row {self._uid} is damaged: not a sealed value.")
        return self._cipher.open(sealed, table=self._table, row=self._uid, column=column)

    def open_if(self, column: str, sealed: bytes | None) -> str | None:
        """Decrypt the value of a column; None stays None. Raises DecryptionError."""
        return None if sealed is None else self.open(column, sealed)

    def seal_row(self, columns: Mapping[str, object]) -> bytes:
        """Return the seal of the row that has these columns; ``uid``, the seal itself and UNSEALED may be missing."""
        return self.seal(SEAL, self._fingerprint(columns))

    def check_row(self, row: Row) -> None:
        """Raise DecryptionError if a row is not as it was sealed."""
        found = self._fingerprint({name: row[name] for name in row.keys()})  # noqa: SIM118 - a Row is no dict
        if not hmac.compare_digest(found, self.open(SEAL, row[SEAL])):
            raise DecryptionError("it was changed by something else than mcp-auth-proxy, and counts as missing.")

    def _fingerprint(self, columns: Mapping[str, object]) -> str:
        """Hash the names and values of columns. Those that are NULL are left out, so that a migration may add some."""
        left_out = {"uid", SEAL} | UNSEALED.get(self._table, frozenset())
        hashed = hashlib.sha256()
        for name in sorted(columns.keys() - left_out):
            value = columns[name]
            if value is not None:
                for part in (name.encode(), _canonical(value)):
                    hashed.update(len(part).to_bytes(8, "big") + part)
        return hashed.hexdigest()


def _canonical(value: object) -> bytes:
    """Return the same bytes for a value before it is written and after it was read: databases turn 1 into 1.0."""
    match value:
        case str():
            return b"t" + value.encode("utf-8", "surrogatepass")
        case bytes():
            return b"b" + value
        case int() | float():
            return b"n" + struct.pack(">d", value)
        case _:
            raise TypeError(f"no column holds a {type(value).__name__}")


def decode_rows(engine: Engine, table: str, rows: list[Row], read: Callable[[Row, RowCipher], T]) -> list[T]:
    """Read rows into values; those that cannot be decrypted or decoded are logged and left out."""
    found: list[T] = []
    for row in rows:
        uid = row["uid"]
        try:
            found.append(read(row, RowCipher(engine.cipher, table, uid)))
        except DecryptionError as error:
            engine.report_broken(table, uid, error)
        except (ValueError, TypeError) as error:
            # Only the type: the text of the error may contain a value of the row.
            engine.report_broken(table, uid, DecryptionError(f"a value is damaged ({type(error).__name__})"))
    return found


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


def read_registration(row: Row, cipher: RowCipher) -> Registration:
    """Read the registration in a row of grants, registrations or flows."""
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
    }


def grant_columns(grant: Grant, cipher: RowCipher) -> Columns:
    """Return the columns of a new grant: not being refreshed, not ended."""
    return {
        **_key_columns(grant.key),
        "grant_type": str(grant.grant_type),
        **registration_columns(grant.registration, cipher),
        **_endpoint_columns(grant.endpoints),
        **token_columns(grant.tokens, cipher),
        "scopes": " ".join(grant.scopes),
        "granted_at": grant.granted_at,
        "dpop_key": cipher.seal_if("dpop_key", grant.dpop_key),
        "version": grant.version,
    }


def read_grant(row: Row, cipher: RowCipher) -> Grant:
    """Read the grant in a row."""
    tokens = TokenSet(
        access_token=cipher.open("access_token", row["access_token"]),
        token_type=row["token_type"],
        refresh_token=cipher.open_if("refresh_token", row["refresh_token"]),
        obtained_at=row["obtained_at"],
        expires_at=row["expires_at"],
        scopes=tuple(row["token_scopes"].split()),
    )
    return Grant(
        id=row["id"],
        key=_read_key(row),
        grant_type=GrantType(row["grant_type"]),
        registration=read_registration(row, cipher),
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
    )


def flow_columns(flow: Flow, cipher: RowCipher) -> Columns:
    """Return the columns of a flow."""
    return {
        "id": flow.id,
        **_key_columns(flow.key),
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
    }


def read_flow(row: Row, cipher: RowCipher) -> Flow:
    """Read the flow in a row."""
    device = cipher.open_if("device", row["device"])
    return Flow(
        id=row["id"],
        key=_read_key(row),
        registration=read_registration(row, cipher),
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


def _key_columns(key: GrantKey) -> Columns:
    return {
        **account_params(key.account),
        "resource": key.resource,
        "issuer": key.issuer,
        "upstream": key.upstream,
    }


def _read_key(row: Row) -> GrantKey:
    return GrantKey(
        account=Account(row["principal"], row["server"], row["account"]),
        resource=row["resource"],
        issuer=row["issuer"],
        upstream=row["upstream"],
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
