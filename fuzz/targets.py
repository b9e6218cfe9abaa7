"""The targets: functions that give an input to a parser and raise if it breaks what the parser promises."""

from collections.abc import Callable, Mapping
from pathlib import Path

from fuzz import (
    callback_target,
    clients_target,
    config_target,
    exports_target,
    http_targets,
    oauth_targets,
    rpc_targets,
    stdio_target,
)

HERE = Path(__file__).resolve().parent
CORPUS = HERE / "corpus"

Target = Callable[[bytes], None]

TARGETS: Mapping[str, Target] = {
    "challenge": oauth_targets.challenge,
    "metadata": oauth_targets.metadata,
    "token": oauth_targets.token,
    "callback": callback_target.callback,
    "pasted": oauth_targets.pasted,
    "config": config_target.config,
    "clients": clients_target.clients,
    "request": http_targets.request,
    "response": http_targets.response,
    "messages": rpc_targets.messages,
    "decoding": rpc_targets.decoding,
    "stdio": stdio_target.event_stream,
    "exports": exports_target.export,
}


def corpus(name: str) -> list[Path]:
    """Return the inputs of a target that are kept in the repository."""
    return sorted((CORPUS / name).iterdir())
