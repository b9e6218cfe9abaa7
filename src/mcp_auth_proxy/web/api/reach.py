"""Which servers and flows a caller of the API may see, and how failures of a server are answered."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any

from msgspec import Meta

from mcp_auth_proxy.config.settings import ServerSettings
from mcp_auth_proxy.errors import (
    AuthorizationServerUnavailable,
    ConfigError,
    ConfigurationError,
    DocumentRefused,
    NotConnected,
    ServerConflict,
    UpstreamError,
    UpstreamTimeout,
)
from mcp_auth_proxy.models import Account, Caller, Flow, Scope, shared_principal
from mcp_auth_proxy.web.api.models import Fault
from mcp_auth_proxy.web.api.operations import Call, is_admin
from mcp_auth_proxy.web.api.problems import Problem, forbidden, invalid, not_found, retry_after

AccountName = Annotated[str, Meta(pattern="^[a-z0-9][a-z0-9-]{0,31}$", description="An account of the server.")]


def sees(call: Call[Any, Any], server: ServerSettings) -> bool:
    """Return whether a caller may know of a server: if it may use it, or is an admin of its project."""
    principal = call.caller.principal
    return server.admits(principal) or (call.is_admin and server.project == principal.project_id)


def visible_server(call: Call[Any, Any]) -> ServerSettings:
    """Return the server that the path names. Raises Problem (404)."""
    server = call.api.servers.by_id(call.path["id"])
    if server is None or not sees(call, server):
        raise not_found("server")
    call.server = (server.server_id, server.name)
    return server


def usable_server(call: Call[Any, Any]) -> ServerSettings:
    """Return the server that the path names, if the caller may use it. Raises Problem (404)."""
    server = call.api.servers.by_id(call.path["id"])
    if server is None or not server.admits(call.caller.principal):
        raise not_found("server")
    call.server = (server.server_id, server.name)
    return server


def own_account(call: Call[Any, Any], server: ServerSettings, name: str) -> Account:
    """Return the account whose grant the caller may change. Raises Problem (403) if only admins may."""
    account = server.account(call.caller.principal, name)
    if account.principal != call.caller.principal.id and not call.is_admin:
        raise forbidden(f"Everybody uses {server.name} with one authorization, which only an admin gives.")
    return account


def owns(call: Call[Any, Any], flow: Flow) -> bool:
    """Return whether a flow is the caller's: its own, or one that its project shares and it is an admin."""
    principal, owner = call.caller.principal, flow.key.account.principal
    if owner == shared_principal(principal.project_id):
        return call.is_admin
    return owner == principal.id


def server_id_and_name(call: Call[Any, Any], name: str) -> tuple[str, str]:
    """Return the id and name of a server by its name, which stands for the id if the server is gone."""
    server = call.api.servers.get(name)
    return (name if server is None else server.server_id), name


def may_use_api(caller: Caller) -> bool:
    """Return whether a credential is for the API at all."""
    return is_admin(caller) or Scope.SELF in caller.scopes


@contextmanager
def answered(server: str = "") -> Iterator[None]:
    """Answer what goes wrong at a server, or with its settings, in place of an error. Raises Problem."""
    try:
        yield
    except ConfigurationError as error:
        raise invalid([config_fault(each) for each in error.errors]) from None
    except ServerConflict as error:
        status = 412 if error.kind == "changed" else 409
        raise Problem(status, error.kind, str(error)) from None
    except NotConnected as error:
        raise Problem(400, "not-authorized", str(error)) from None
    except UpstreamTimeout as error:
        raise Problem(504, "upstream-timeout", _named(server, error)) from None
    except UpstreamError as error:
        raise Problem(502, "upstream-failed", _named(server, error)) from None
    except DocumentRefused as error:
        raise Problem(502, "document-refused", str(error)) from None
    except AuthorizationServerUnavailable as error:
        status = 504 if error.timed_out else 503
        headers = {} if error.timed_out else retry_after(error.retry_after)
        raise Problem(status, "authorization-server-unavailable", str(error), headers=headers) from None


def config_fault(error: ConfigError) -> Fault:
    """Return an error of the configuration as a fault of the body: ``oauth.scopes[0]`` is below ``oauth``."""
    loc: list[str | int] = ["body"]
    for part in error.path.replace("[", ".[").split("."):
        loc.append(int(part[1:-1]) if part.startswith("[") and part[1:-1].isdecimal() else part)
    kind = "extra_forbidden" if error.problem.startswith("unknown key") else "value_error"
    return Fault(loc=loc, msg=error.problem, type=kind)


def _named(server: str, error: UpstreamError) -> str:
    return f"{server} can't be used: {error}" if server else str(error)
